"""Copies of the policy on each of two nodes, sharded inside them: four ranks train as one process does."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dpo_ray.errors import ResourceError
from dpo_ray.learn import attention
from dpo_ray.learn.export import export_policy
from dpo_ray.learn.meshes import policy_mesh
from dpo_ray.learn.policy import load_policy
from dpo_ray.learn.sharded_load import load_sharded_policy

from . import ranks, tiny, training

PAIRS = tiny.build_pairs(13)
NODES = "abba"
"""The node of each of four ranks: ranks of a node need not be neighbours."""


def plan(world_size: int):
    return training.plan(PAIRS, world_size, 60, batch_size=8, epochs=2)


def train(model, world_size: int):
    model.set_attn_implementation(attention.NAME)
    first = training.gradients(model, PAIRS, plan(world_size)[:2])
    return first, training.train(model, training.build_adamw(model), PAIRS, plan(world_size))


def refused(node: str) -> str:
    with pytest.raises(ResourceError) as error:
        policy_mesh("cpu", node, copy_per_node=True)
    return str(error.value)


def four_ranks(path: str, directory: str) -> dict:
    rank = dist.get_rank()
    mesh = policy_mesh("cpu", NODES[rank], copy_per_node=True)
    model = load_sharded_policy(path, mesh, compute_dtype=torch.float32, cpu_offload=True)
    local = sum(p.to_local().numel() for p in model.parameters())
    handed = training.from_rank_0(load_sharded_policy, path, mesh, compute_dtype=torch.float32)
    start = {name: p.full_tensor().detach() for name, p in handed.named_parameters()}
    gradients, metrics = train(model, 4)
    export_policy(model, directory, source=path, max_file_bytes=9000)
    return {
        "mesh": mesh.mesh.tolist(),
        "one_node": policy_mesh("cpu", "a", copy_per_node=True).mesh.tolist(),
        "all": policy_mesh("cpu", NODES[rank]).mesh.tolist(),
        "refused": refused("aaab"[rank]),
        "elastic": policy_mesh("cpu", "aaab"[rank], copy_per_node=True, elastic=True).mesh.tolist(),
        "local": local,
        "handed": start,
        "gradients": gradients,
        "metrics": metrics,
        "weights": {name: p.full_tensor().detach() for name, p in model.named_parameters()},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("four_ranks")


@pytest.fixture(scope="module")
def results(root, policies) -> list[dict]:
    return ranks.run_ranks(four_ranks, 4, root / "ranks", policies["qwen2"], str(root / "exported"))


def test_mesh_has_a_line_for_each_node(results):
    for result in results:
        assert result["mesh"] == [[0, 3], [1, 2]]
        assert result["one_node"] == result["all"] == [0, 1, 2, 3]


def test_mesh_of_nodes_with_different_numbers_of_ranks_is_refused_on_every_rank(results):
    assert all("same number of train workers on every node, got [1, 3]" in result["refused"] for result in results)


def test_mesh_of_nodes_with_different_numbers_of_ranks_that_come_and_go_shares_one_copy(results):
    assert all(result["elastic"] == [0, 1, 2, 3] for result in results)


def test_a_copy_per_node_trains_as_one_process_does(results, policies):
    """Gradients, and metrics of four steps with clipping. Largest relative errors measured: 3e-7 and 2e-6."""
    model = load_policy(policies["qwen2"], dtype=torch.float32)
    gradients, metrics = train(model, 1)
    total = sum(p.numel() for p in model.parameters())
    assert metrics[0]["grad_norm"] > 1.0, "nothing was clipped"
    for result in results:
        assert 0.4 * total < result["local"] < 0.6 * total
        for got, want in zip(result["gradients"], gradients, strict=True):
            assert training.relative_error(got, want) < 1e-5
        for got, want in zip(result["metrics"], metrics, strict=True):
            assert got == pytest.approx(want, rel=1e-5)


def test_rank_0_hands_out_every_copy(results, policies):
    whole = load_policy(policies["qwen2"], dtype=torch.float32)
    for result in results:
        assert all(torch.equal(result["handed"][name], p) for name, p in whole.named_parameters())


def test_four_ranks_export_has_each_weight_once_in_files_of_the_size_asked_for(results, root):
    files = [load_file(path) for path in sorted((root / "exported").glob("*.safetensors"))]
    assert len(files) > 4  # more than ranks
    written = {name: weight for file in files for name, weight in file.items()}
    assert sum(map(len, files)) == len(written)
    assert written.keys() == results[0]["weights"].keys()
    assert all(torch.equal(written[name], weight) for name, weight in results[0]["weights"].items())
    assert all(len(file) == 1 or sum(w.nbytes for w in file.values()) <= 9000 for file in files)
    reloaded = load_policy(str(root / "exported"), dtype=torch.float32)
    assert all(torch.equal(p, results[0]["weights"][name]) for name, p in reloaded.named_parameters())
