"""Adapters start at the policy, train alike on one and two ranks, and are the policy's own weights after the export."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from dpo_ray.errors import ConfigError
from dpo_ray.learn.adapters import Lora, adapted, add_adapters, export_adapters, start_adapters
from dpo_ray.learn.batched import score_groups
from dpo_ray.learn.checkpoint import load_checkpoint, save_checkpoint
from dpo_ray.learn.export import export_policy
from dpo_ray.learn.policy import load_policy
from dpo_ray.learn.policy_files import check_policy_directory
from dpo_ray.learn.probe import choose_path
from dpo_ray.learn.sharded_load import load_sharded_policy

from . import ranks, tiny, training

pytest.importorskip("peft", reason="LoRA needs the extra `lora`")
LORA = Lora(r=4, alpha=8.0)
PAIRS = tiny.build_pairs(13)
IDS_ST = torch.arange(3, 23).view(2, 10)
LAST = Lora(2, 4.0, ("down_proj",))


def referenced(path: str, dtype: torch.dtype):
    """The pairs with what the policy at `path` gives them, computed as the reference stage does."""
    model, groups = load_policy(path, dtype=dtype), tiny.pair_groups(PAIRS)
    scored = score_groups(
        model, groups, choose_path(model, groups[0], pad_token_id=tiny.PAD), max_batch_tokens=60, pad_token_id=tiny.PAD
    )
    chosen, rejected = ([pair[side].logps for pair in scored] for side in range(2))
    return PAIRS._replace(ref_chosen_logps=chosen, ref_rejected_logps=rejected)


def trained(path: str, directory: Path, dtype: torch.dtype = torch.float32, lora: Lora = LORA, **options):
    """Train four steps, export; return the metrics and the logits of the model with its adapters."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = load_sharded_policy(path, mesh, compute_dtype=dtype, lora=lora, seed=3, **options)
    held = {p.dtype for p in model.parameters() if not p.requires_grad}
    choose_path(model, tiny.pair_groups(PAIRS)[0], pad_token_id=tiny.PAD)
    plan = training.plan(PAIRS, dist.get_world_size(), 60, batch_size=8, epochs=2)
    pairs = referenced(path, dtype)
    metrics = training.train(model, training.build_adamw(model), pairs, plan, learning_rate_for=lambda step: 1e-2)
    export_policy(model, directory / "policy", source=path)
    export_adapters(model, directory / "adapter", source=path)
    with torch.no_grad():
        return {"metrics": metrics, "logits": model(input_ids=IDS_ST).logits, "held": held}


def resumed(path: str, directory: Path):
    """Two steps, a checkpoint, and two more; then those again from the checkpoint, by adapters drawn otherwise."""
    ranks, found = dist.get_world_size(), []
    plan = training.plan(PAIRS, ranks, 60, batch_size=8, epochs=2)
    for seed in (3, 4):
        mesh = dist.init_device_mesh("cpu", (ranks,))
        how = {"compute_dtype": torch.float32, "lora": LORA, "activation_checkpointing": True}
        model = load_sharded_policy(path, mesh, seed=seed, **how)
        choose_path(model, tiny.pair_groups(PAIRS)[0], pad_token_id=tiny.PAD)
        optimizer = training.build_adamw(model)
        if seed == 3:
            training.train(model, optimizer, PAIRS, plan[:2])
            save_checkpoint(directory, model, optimizer, 2)
        step = load_checkpoint(directory, model, optimizer)
        found.append((step, training.train(model, optimizer, PAIRS, plan, start_step=step)))
    held = FileSystemReader(directory).read_metadata().state_dict_metadata
    return found, {name for name in held if name.startswith("model.")}


def two_rounds(policies: dict[str, str], bfloat16: str, root: Path) -> dict:
    first = trained(policies["qwen2"], root / "first")
    return {
        "first": first,
        "second": trained(str(root / "first/policy"), root / "second", lora=LAST, activation_checkpointing=True),
        "gpt2": trained(policies["gpt2"], root / "gpt2"),
        "bfloat16": trained(bfloat16, root / "bfloat16", torch.bfloat16),
        "resumed": resumed(policies["qwen2"], root / "state"),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def results(root, policies) -> dict[int, list[dict]]:
    """What each rank has, by the number of ranks."""
    given = policies, tiny.save_policy(root / "bfloat16", "llama", dtype=torch.bfloat16)
    return {n: ranks.run_ranks(two_rounds, n, root / f"ranks-{n}", *given, root / f"out-{n}") for n in (1, 2)}


@pytest.mark.parametrize("name", ["first", "second", "gpt2", "bfloat16"])
def test_first_step_has_a_loss_of_ln_2_whatever_the_reference_was_made_with(results, name):
    """The second round starts from adapters of the first, merged, with that as its reference."""
    tolerance = 1e-3 if name == "bfloat16" else 1e-6
    for result in (*results[1], *results[2]):
        metrics = result[name]["metrics"]
        assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=tolerance)
        assert metrics[-1]["loss"] < 0.99 * math.log(2)


@pytest.mark.parametrize("name", ["first", "second", "gpt2"])
def test_two_ranks_train_adapters_as_one_does(results, name):
    """Margins are differences of log-probabilities near -30: their rounding is absolute."""
    want = results[1][0][name]["metrics"]
    for result in results[2]:
        for got, expected in zip(result[name]["metrics"], want, strict=True):
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_adapters_resumed_take_the_same_steps_from_a_checkpoint_without_frozen_weights(results):
    for result in (*results[1], *results[2]):
        (first, again), names = result["resumed"]
        assert first == again
        assert first[0] == 2
        assert names
        assert all("lora_A" in name or "lora_B" in name for name in names)


@pytest.mark.parametrize("name", ["first", "second", "gpt2"])
def test_merged_policy_gives_the_logits_of_the_policy_with_adapters(results, root, policies, name):
    for n in (1, 2):
        directory = root / f"out-{n}" / name
        check_policy_directory(directory / "policy")
        merged = load_policy(str(directory / "policy"), dtype=torch.float32)(input_ids=IDS_ST).logits
        torch.testing.assert_close(merged, results[n][0][name]["logits"], rtol=1e-5, atol=1e-5)
    start = load_policy(policies["gpt2" if name == "gpt2" else "qwen2"], dtype=torch.float32)(input_ids=IDS_ST).logits
    assert (merged - start).abs().max() > 0.01  # it did learn


@pytest.mark.parametrize("name", ["first", "gpt2"])
def test_adapters_loaded_by_peft_onto_the_start_give_the_same_logits(results, root, policies, name):
    from peft import PeftModel

    start = load_policy(policies["gpt2" if name == "gpt2" else "qwen2"], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(start, root / "out-2" / name / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=IDS_ST).logits, results[2][0][name]["logits"], rtol=1e-5, atol=1e-5)


def test_weights_without_adapters_are_exported_as_they_were(results, root):
    before, after = (load_file(root / "out-2" / d / "policy/model.safetensors") for d in ("first", "second"))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == ("down_proj" not in name), name


def test_frozen_weights_are_held_as_they_are_stored(results, root):
    for result in (*results[1], *results[2]):
        assert result["bfloat16"]["held"] == {torch.bfloat16}
        assert result["first"]["held"] == {torch.float32}
    assert {w.dtype for w in load_file(root / "out-2/bfloat16/policy/model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "qwen3_moe"])
def test_fresh_adapters_change_nothing_and_leave_the_head_alone(name):
    model, plain = tiny.build_model(name), tiny.build_model(name)
    add_adapters(model, LORA)
    start_adapters(model, seed=0)
    assert torch.equal(model(input_ids=IDS_ST).logits, plain(input_ids=IDS_ST).logits)
    assert type(model) is type(plain)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_A" in name or "lora_B" in name for name in trainable)
    assert not any("lm_head" in name for name in adapted(model))


def test_adapters_of_another_seed_differ():
    def first(seed: int) -> torch.Tensor:
        model = tiny.build_model("llama")
        add_adapters(model, LORA)
        start_adapters(model, seed=seed)
        return next(iter(adapted(model).values())).lora_A["default"].weight

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("lm_head", "q_proj"), "would adapt lm_head"),
        (("embed_tokens",), r"would adapt model\.embed_tokens"),
        (("no_such",), "not found in the base model"),
    ],
)
def test_adapters_that_cannot_be_are_a_config_error(targets, message):
    with pytest.raises(ConfigError, match=message):
        add_adapters(tiny.build_model("llama"), Lora(4, 8.0, targets))


def test_adapters_of_fused_experts_are_a_config_error():
    with pytest.raises(ConfigError, match="no linear layer"):
        add_adapters(tiny.build_model("qwen3_moe"), Lora(4, 8.0, ("gate_proj", "up_proj", "down_proj")))
