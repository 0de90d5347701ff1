"""What must be the same on two ranks as on one. Both ranks run every scenario after one start."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint import CheckpointException

from dpo_ray.errors import NonFiniteLossError
from dpo_ray.learn import attention
from dpo_ray.learn.checkpoint import load_checkpoint, save_checkpoint
from dpo_ray.learn.export import export_policy
from dpo_ray.learn.layout import share
from dpo_ray.learn.logps import completion_logps
from dpo_ray.learn.policy import load_policy

from . import ranks, tiny, training

PAIRS = tiny.build_pairs(13)
BATCH_SIZE = 8  # global batches of 8 and 5 pairs
BUDGET = 60
EPOCHS = 2  # 4 steps
LAYOUTS = {  # pairs of a micro-batch x micro-batches x ranks, and a tail of 5 pairs in the same way
    "8x1x1": [[[[0, 1, 2, 3, 4, 5, 6, 7]]], [[[8, 9, 10, 11, 12]]]],
    "2x4x1": [[[[0, 1], [2, 3], [4, 5], [6, 7]]], [[[8, 9], [10, 11], [12]]]],
    "2x2x2": [[[[0, 1], [2, 3]], [[4, 5], [6, 7]]], [[[8, 9], [12]], [[10, 11], []]]],
}
IDS_ST = torch.arange(3, 23).view(2, 10)


def gradients_of(name: str, policies: dict[str, str], mesh, max_batch_tokens: int = BUDGET, **options):
    world_size = mesh.size() if mesh else 1
    plan = training.plan(PAIRS, world_size, max_batch_tokens, batch_size=BATCH_SIZE)
    return training.gradients(training.build(policies[name], mesh, **options), PAIRS, plan)


def layout_gradients(layout: str, policies: dict[str, str], mesh):
    return training.gradients(training.build(policies["qwen2"], mesh), PAIRS, LAYOUTS[layout])


def fresh(policies: dict[str, str], mesh):
    model = training.build(policies["qwen2"], mesh)
    return model, training.build_adamw(model)


def plan_of(world_size: int):
    return training.plan(PAIRS, world_size, BUDGET, batch_size=BATCH_SIZE, epochs=EPOCHS)


def trained_and_exported(policies, mesh, root: Path):
    """Train all four steps, save after the second, export at the end. Ranks save to directories of their own."""
    model, optimizer = fresh(policies, mesh)
    metrics = training.train(model, optimizer, PAIRS, plan_of(2)[:2])
    save_checkpoint(root / f"state-{dist.get_rank()}", model, optimizer, 2)
    metrics += training.train(model, optimizer, PAIRS, plan_of(2), start_step=2)
    export_policy(model, root / "exported", source=policies["qwen2"])
    with torch.no_grad():
        return metrics, model(input_ids=IDS_ST).logits


def resumed(policies, mesh, root: Path):
    if dist.get_rank() == 0:  # as Ray Train does when it uploads a checkpoint of several ranks
        for rank in range(2):
            shutil.copytree(root / f"state-{rank}", root / "state", dirs_exist_ok=True)
    dist.barrier()
    model, optimizer = fresh(policies, mesh)
    step = load_checkpoint(root / "state", model, optimizer)
    return training.train(model, optimizer, PAIRS, plan_of(2), start_step=step)


def bfloat16_logps(path: str, mesh):
    model = training.build(path, mesh, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        return completion_logps(model, share(tiny.pair_groups(PAIRS)), training.PATH)


def non_finite_message(policies, mesh) -> str:
    """Pair 7 alone has no finite reference: one rank computes it, both must stop."""
    pairs = PAIRS._replace(ref_chosen_logps=[float("nan") if i == 7 else v for i, v in enumerate(PAIRS.ref_chosen_logps)])
    model, optimizer = fresh(policies, mesh)
    plan = training.plan(pairs, 2, BUDGET, batch_size=13)
    with pytest.raises(NonFiniteLossError) as error:
        training.train(model, optimizer, pairs, plan)
    return str(error.value)


def held_back(policies, mesh):
    """The second of four steps is bad and read after the last: the message, and the weights beside those of one step."""
    plan = plan_of(2)
    bad = plan[1][0][0][0]
    pairs = PAIRS._replace(ref_chosen_logps=[float("nan") if i == bad else v for i, v in enumerate(PAIRS.ref_chosen_logps)])
    (got, optimizer), (want, other) = fresh(policies, mesh), fresh(policies, mesh)
    training.train(want, other, PAIRS, plan[:1])
    with pytest.raises(NonFiniteLossError) as error:
        training.train(got, optimizer, pairs, plan, read_after=lambda steps: False)
    weights = [[p.full_tensor() for p in model.parameters()] for model in (got, want)]
    return str(error.value), weights


def every_scenario(root: Path, policies: dict[str, str]) -> dict:
    mesh = dist.init_device_mesh("cpu", (2,))
    return {
        "gradients": {name: gradients_of(name, policies, mesh) for name in ("qwen2", "llama", "gpt2", "gemma2")},
        "layout": layout_gradients("2x2x2", policies, mesh),
        "checkpointed": gradients_of("qwen2", policies, mesh, activation_checkpointing=True),
        "one_pair": training.train(*fresh(policies, mesh), PAIRS, [[[[3]], [[]]]]),
        "trained": trained_and_exported(policies, mesh, root),
        "resumed": resumed(policies, mesh, root),
        "bfloat16": bfloat16_logps(policies["qwen2"], mesh),
        "non_finite": non_finite_message(policies, mesh),
        "held_back": held_back(policies, mesh),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two_ranks")


@pytest.fixture(scope="module")
def results(root, policies) -> list[dict]:
    """Each rank's results."""
    return ranks.run_ranks(every_scenario, 2, root, root, policies)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("max_batch_tokens", [BUDGET, training.ONE_MICRO_BATCH])
def test_two_ranks_gradients_equal_one_process(results, policies, name, max_batch_tokens):
    """Tied and untied heads, vocabulary 101, 8 and then 5 pairs. Largest relative error measured: 7e-7."""
    want = gradients_of(name, policies, None, max_batch_tokens)
    got = results[0]["gradients"][name]
    assert len(got) == len(want) == 2
    assert max(training.relative_error(g, w) for g, w in zip(got, want, strict=True)) < 1e-5


def test_gradients_do_not_depend_on_how_a_global_batch_is_cut(results, policies):
    """In `LAYOUTS`. Largest relative error measured: 2e-7."""
    want = layout_gradients("8x1x1", policies, None)
    for got in (layout_gradients("2x4x1", policies, None), results[0]["layout"], results[1]["layout"]):
        assert len(got) == len(want) == 2
        assert max(training.relative_error(g, w) for g, w in zip(got, want, strict=True)) < 1e-5


def test_two_ranks_with_activation_checkpointing_have_the_same_gradients(results):
    for got, want in zip(results[0]["checkpointed"], results[0]["gradients"]["qwen2"], strict=True):
        assert torch.equal(got, want)


def test_two_ranks_metrics_equal_one_process_on_every_rank(results, policies):
    """Four AdamW steps with clipping, so the norm over shards is covered too. Largest relative error measured: 2e-6."""
    model, optimizer = fresh(policies, None)
    expected = training.train(model, optimizer, PAIRS, plan_of(1))
    assert expected[0]["grad_norm"] > 1.0, "nothing was clipped"
    for rank in range(2):
        for got, want in zip(results[rank]["trained"][0], expected, strict=True):
            assert got == pytest.approx(want, rel=1e-5)


def test_two_ranks_step_of_one_pair_equals_one_process(results, policies):
    """The second rank has nothing to do, and does not change the result by doing it."""
    model, optimizer = fresh(policies, None)
    (want,) = training.train(model, optimizer, PAIRS, [[[[3]]]])
    assert results[0]["one_pair"][0] == pytest.approx(want, rel=1e-5)


def test_two_ranks_export_reloads_to_the_trained_logits(results, root, policies):
    exported = root / "exported"
    reloaded = load_policy(str(exported), dtype=torch.float32)
    reloaded.set_attn_implementation(attention.NAME)
    logits = reloaded(input_ids=IDS_ST).logits
    torch.testing.assert_close(logits, results[0]["trained"][1], rtol=1e-6, atol=1e-6)
    weights = load_file(exported / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert weights["model.embed_tokens.weight"].shape == (tiny.VOCAB_SIZE, 32)
    assert not torch.equal(weights["model.embed_tokens.weight"], load_embedding(policies["qwen2"]))


def load_embedding(path: str) -> torch.Tensor:
    return load_file(Path(path) / "model.safetensors")["model.embed_tokens.weight"]


def test_two_ranks_resume_equals_uninterrupted(results):
    assert results[0]["resumed"] == results[0]["trained"][0][2:]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_ranks_checkpoint_resumes_on_one(results, root, policies):
    """Largest relative error measured: 1e-6."""
    model, optimizer = fresh(policies, None)
    step = load_checkpoint(root / "state", model, optimizer)
    resumed = training.train(model, optimizer, PAIRS, plan_of(1), start_step=step)
    assert step == 2
    for got, want in zip(resumed, results[0]["trained"][0][2:], strict=True):
        assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_ranks_checkpoint_without_one_ranks_shard_is_refused(results, root, policies, tmp_path):
    shutil.copytree(root / "state", tmp_path / "state")
    (shard,) = (tmp_path / "state").glob("__1_*.distcp")
    shard.unlink()
    with pytest.raises(CheckpointException, match=shard.name):
        load_checkpoint(tmp_path / "state", *fresh(policies, None))


def test_two_ranks_bfloat16_training_starts_at_the_bfloat16_reference(results, policies):
    """Reference: weights loaded in bfloat16. Policy: float32 weights, cast by FSDP. Same kernels: equal to the bit."""
    reference = load_policy(policies["qwen2"], dtype=torch.bfloat16)
    reference.set_attn_implementation(attention.NAME)
    with torch.no_grad():
        want = completion_logps(reference, share(tiny.pair_groups(PAIRS)), training.PATH)
    assert torch.equal(results[0]["bfloat16"], want)


def test_two_ranks_both_stop_at_a_loss_that_is_not_finite(results):
    messages = [results[rank]["non_finite"] for rank in range(2)]
    assert messages[0].startswith("step 0: loss nan")
    assert "for pairs pair-7:" in messages[0]
    assert messages[0] == messages[1]


def test_two_ranks_hold_back_every_step_from_one_that_is_not_finite(results):
    for rank in range(2):
        message, (got, want) = results[rank]["held_back"]
        assert message.startswith("step 1: loss nan")
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
