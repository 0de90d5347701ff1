"""Sharded loading, offload to the node's memory and adapters on CUDA: one process and one device a rank.

Alone (`python -m pytest tests/gpu/test_sharding_gpu.py -m gpu --noconftest`) it takes one device. More of them:
`torchrun --nproc-per-node 2 -m pytest ...`.
"""

import math
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpo_ray.learn import batches, dpo, optim
from dpo_ray.learn.adapters import Lora
from dpo_ray.learn.batched import score_groups
from dpo_ray.learn.export import export_policy
from dpo_ray.learn.layout import Group
from dpo_ray.learn.losses import Term
from dpo_ray.learn.objective import Objective, PairRows
from dpo_ray.learn.policy import load_policy
from dpo_ray.learn.probe import choose_path
from dpo_ray.learn.sharded_load import load_sharded_policy
from dpo_ray.quickstart.policy import build_policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PAIRS = 32


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # As stages/train.py asks for with cpu_offload.
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl", rank=rank, world_size=ranks)
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cuda", (ranks,))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, mesh: DeviceMesh) -> str:
    """The quickstart's policy, made by rank 0 and seen by all."""
    made = [str(tmp_path_factory.mktemp("policy") / "policy")]
    dist.broadcast_object_list(made, src=0)
    if dist.get_rank() == 0:
        build_policy(made[0], seed=0, num_steps=1)
    dist.barrier()
    return made[0]


def rows_for(policy: str) -> PairRows:
    """Random pairs with the policy's own log-probabilities in bfloat16 as reference."""
    model = load_policy(policy, dtype=torch.bfloat16).to("cuda")
    draw = np.random.default_rng(0)
    columns = [[draw.integers(8, 500, draw.integers(8, 60)).tolist() for _ in range(PAIRS)] for _ in range(3)]
    groups = [Group(prompt, sides) for prompt, *sides in zip(*columns, strict=True)]
    path = choose_path(model, groups[0], pad_token_id=0)
    scored = score_groups(model, groups, path, max_batch_tokens=4096, pad_token_id=0)
    return PairRows([f"pair-{i}" for i in range(PAIRS)], *columns, *([p[side].logps for p in scored] for side in range(2)))


def train(policy: str, mesh: DeviceMesh, rows: PairRows, **options):
    model = load_sharded_policy(policy, mesh, compute_dtype=torch.bfloat16, **options)
    group = Group(rows.prompt_token_ids[0], [rows.chosen_token_ids[0], rows.rejected_token_ids[0]])
    path = choose_path(model, group, pad_token_id=0)
    columns = (rows.prompt_token_ids, rows.chosen_token_ids, rows.rejected_token_ids)
    lengths = np.array([[len(ids) for ids in row] for row in zip(*columns, strict=True)])
    how = {"global_batch_size": 16, "max_batch_tokens": 4096, "seed": 0, "share_prompt": path.share_prompt}
    plan = batches.Plan(lengths, epochs=2, world_size=dist.get_world_size(), **how)
    reads = dpo.dpo_steps(
        model,
        optim.build_optimizer(model, learning_rate=1e-4, weight_decay=0.0, betas=(0.9, 0.999)),
        lambda indices: PairRows(*(column and [column[i] for i in indices] for column in rows)),
        plan,
        path,
        Objective([Term("sigmoid")], 0.1),
        lengths,
        learning_rate_for=lambda step: 1e-4,
        max_grad_norm=1.0,
        pad_token_id=0,
        device="cuda",
    )
    return model, [metrics["loss"] for read in reads for metrics in read]


@pytest.mark.parametrize(
    "options",
    [{}, {"cpu_offload": True}, {"activation_checkpointing": True}, {"lora": Lora(8, 16.0)}],
    ids=["plain", "offload", "checkpointing", "lora"],
)
def test_sharded_training_on_gpu_starts_at_ln_2_learns_and_exports(policy: str, mesh: DeviceMesh, options, tmp_path) -> None:
    rows = rows_for(policy)
    model, losses = train(policy, mesh, rows, **options)
    assert losses[0] == pytest.approx(math.log(2), abs=2e-3)
    assert losses[-1] < losses[0]
    kept = {p.device.type for p in model.parameters()}
    assert kept == {"cpu" if options.get("cpu_offload") else "cuda"}
    if not options.get("lora"):
        plain = train(policy, mesh, rows)[1]
        # 1.0e-3 on an H100 with offload: AdamW then rounds as the CPU does, and the bfloat16 weights of a forward follow it.
        assert losses == pytest.approx(plain, rel=5e-3)
    target = [str(tmp_path)]
    dist.broadcast_object_list(target, src=0)
    export_policy(model, target[0], source=policy, dtype=torch.float32)
    ids = torch.tensor([rows.prompt_token_ids[0]], device="cuda")
    reloaded = load_policy(target[0], dtype=torch.float32).to("cuda")
    with torch.no_grad():
        assert (reloaded(ids).logits - model(input_ids=ids).logits).abs().mean() < 0.05
