"""The DPO core and the hf engine on one CUDA device, at the shape of a 0.5B model with random weights.

Needs neither Ray nor vLLM: `python -m pytest tests/gpu -m gpu --noconftest -s` prints the figures.
"""

import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Qwen2Config

from dpo_ray import train_saving, train_state
from dpo_ray.engines.hf import HfEngine
from dpo_ray.engines.policies import PolicyRef
from dpo_ray.engines.requests import EngineSettings, Request
from dpo_ray.errors import NonFiniteLossError
from dpo_ray.learn import batches, dpo, optim
from dpo_ray.learn.batched import score_groups
from dpo_ray.learn.layout import Group
from dpo_ray.learn.losses import Term
from dpo_ray.learn.objective import Objective, PairRows
from dpo_ray.learn.policy import export_policy, load_policy, policy_identity, shard
from dpo_ray.learn.probe import choose_path, sequence_tokens
from dpo_ray.quickstart.policy import build_policy

from ..waiting import wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
VOCABULARY, PAIRS = 151_936, 256


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-0.5B's shape, tied embeddings, random bf16 weights, with the quickstart's tokenizer files."""
    directory = tmp_path_factory.mktemp("policy")
    build_policy(directory / "small", seed=0, num_steps=1)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    target = directory / "policy"
    model.save_pretrained(target)
    for file in (directory / "small").iterdir():
        if not (target / file.name).exists():
            (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.fixture(scope="module")
def rows() -> PairRows:
    """Pairs of HH-RLHF's shape: prompts of about 100 tokens, completions of about 200."""
    draw = random.Random(0)

    def ids(mean: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(max(8, int(draw.lognormvariate(math.log(mean), 0.5))))]

    zeros = [0.0] * PAIRS
    columns = [[ids(mean) for _ in range(PAIRS)] for mean in (100, 200, 200)]
    return PairRows([f"pair-{i}" for i in range(PAIRS)], *columns, zeros, zeros)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def groups_of(rows: PairRows) -> list[Group]:
    columns = (rows.prompt_token_ids, rows.chosen_token_ids, rows.rejected_token_ids)
    return [Group(prompt, sides) for prompt, *sides in zip(*columns, strict=True)]


def longest(rows: PairRows) -> Group:
    return max(groups_of(rows), key=sequence_tokens)


def reference(policy: Path, rows: PairRows, dtype: torch.dtype, device: str = "cuda") -> list[list[float]]:
    """Log-probabilities of chosen and of rejected."""
    model = load_policy(str(policy), dtype=dtype).to(device)
    path = choose_path(model, longest(rows), pad_token_id=0)
    scored = score_groups(model, groups_of(rows), path, max_batch_tokens=16384, pad_token_id=0)
    return [[pair[side].logps for pair in scored] for side in range(2)]


def test_reference_bf16_on_gpu_is_close_to_float32_on_gpu(policy: Path, rows: PairRows) -> None:
    few = PairRows(*(column and column[:32] for column in rows))
    exact, half = reference(policy, few, torch.float32), reference(policy, few, torch.bfloat16)
    worst = max(
        abs(a - b) / len(ids)
        for e, h, side in zip(exact, half, few[2:4], strict=True)
        for a, b, ids in zip(e, h, side, strict=True)
    )
    print(f"\nbf16 against float32: {worst:.2e} nats a token at the worst")
    assert worst < 0.01


def train(model, optimizer, rows: PairRows, lengths: np.ndarray, plan: list, path, **how) -> Iterator[list[dict[str, float]]]:
    def fetch(indices: list[int]) -> PairRows:
        return PairRows(*(column and [column[i] for i in indices] for column in rows))

    options = {"learning_rate_for": lambda step: 1e-5, "max_grad_norm": 1.0, "pad_token_id": 0, "device": "cuda"}
    return dpo.dpo_steps(model, optimizer, fetch, plan, path, Objective([Term("sigmoid")], 0.1), lengths, **(options | how))


def test_dpo_steps_on_gpu_wait_for_it_once_a_read(policy: Path, rows: PairRows, group: None) -> None:
    """Under torch's check for waiting, from a first read that pays for set-up to the next; a bad step is held back there."""
    model = load_policy(str(policy), dtype=torch.float32).to("cuda")
    path = choose_path(model, longest(rows), pad_token_id=0)
    model = shard(model, init_device_mesh("cuda", (1,)), compute_dtype=torch.bfloat16)
    optimizer = optim.build_optimizer(model, learning_rate=1e-5, weight_decay=0.0, betas=(0.9, 0.999))
    lengths = np.array([[len(g.prompt), *map(len, g.completions)] for g in groups_of(rows)])
    how = {"global_batch_size": 32, "world_size": 1, "max_batch_tokens": 16384, "seed": 0, "share_prompt": path.share_prompt}
    plan = batches.Plan(lengths, epochs=1, **how)  # 8 steps
    bad = plan[6][0][0][0]
    assert rows.ref_chosen_logps is not None
    rows = rows._replace(ref_chosen_logps=[math.nan if i == bad else v for i, v in enumerate(rows.ref_chosen_logps)])

    def read_after(steps: int) -> bool:
        if steps in (2, 5, 8):
            torch.cuda.set_sync_debug_mode("default")
        return steps in (2, 5, 8)

    reads = train(model, optimizer, rows, lengths, plan, path, read_after=read_after)
    try:
        assert len(next(reads)) == 2
        torch.cuda.set_sync_debug_mode("error")
        assert len(next(reads)) == 3
        before = [p.to_local().clone() for p in model.parameters()]
        torch.cuda.set_sync_debug_mode("error")
        (sixth,) = next(reads)
        with pytest.raises(NonFiniteLossError, match=rf"step 6: loss nan.*pair-{bad}\b"):
            next(reads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(sixth["loss"])
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(mine, p.to_local()) for mine, p in zip(before, model.parameters(), strict=True))


def test_dpo_step_on_gpu_starts_at_ln_2_learns_and_exports(policy: Path, rows: PairRows, group: None, tmp_path: Path) -> None:
    started = time.perf_counter()
    chosen, rejected = reference(policy, rows, torch.bfloat16)
    tokens = 2 * sum(map(len, rows.prompt_token_ids)) + sum(len(i) for side in rows[2:4] for i in side)
    torch.cuda.synchronize()
    print(f"\nreference: {tokens / (time.perf_counter() - started):,.0f} tokens/s with loading")
    rows = rows._replace(ref_chosen_logps=chosen, ref_rejected_logps=rejected)

    model = load_policy(str(policy), dtype=torch.float32).to("cuda")
    path = choose_path(model, longest(rows), pad_token_id=0)
    model = shard(model, init_device_mesh("cuda", (1,)), compute_dtype=torch.bfloat16)
    optimizer = optim.build_optimizer(model, learning_rate=1e-5, weight_decay=0.0, betas=(0.9, 0.999))
    lengths = np.array([[len(g.prompt), *map(len, g.completions)] for g in groups_of(rows)])
    how = {"global_batch_size": 64, "world_size": 1, "max_batch_tokens": 16384, "seed": 0, "share_prompt": path.share_prompt}
    plan = batches.Plan(lengths, epochs=3, **how)
    history, marks = [], [time.perf_counter()]
    for read in train(model, optimizer, rows, lengths, plan, path):
        history += read
        marks.append(time.perf_counter())
    warm = sum(m["num_tokens"] for m in history[2:]) / (marks[-1] - marks[2])
    print(
        f"train: {warm:,.0f} tokens/s, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, loss {history[0]['loss']:.6f}"
    )
    # 1.2e-3 on an H100: the two computations of each log-probability pack other rows beside it, and round in bfloat16.
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=5e-3)
    assert history[-1]["loss"] < history[0]["loss"]

    target = tmp_path / "trained"
    export_policy(model, target, source=str(policy))
    reloaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).to("cuda")
    reloaded.set_attn_implementation(model.config._attn_implementation)  # two implementations differ by rounding
    ids = torch.tensor([rows.prompt_token_ids[0]], device="cuda")
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model(ids).logits)


def test_resume_on_gpu_has_the_weights_of_the_checkpoint(policy: Path, rows: PairRows, group: None, tmp_path: Path) -> None:
    """Written while training goes on, over gloo beside nccl; prints how long the copy holds a step, first and again."""
    owner = (str(tmp_path / "state"), "fingerprint", "policy")
    where = train_state.Where(*owner, dist.new_group(backend="gloo"))  # type: ignore[arg-type]
    few = PairRows(*(column and column[:32] for column in rows))
    lengths = np.array([[len(g.prompt), *map(len, g.completions)] for g in groups_of(few)])
    how = {"global_batch_size": 8, "world_size": 1, "max_batch_tokens": 16384, "seed": 0, "epochs": 1}

    def fresh() -> tuple[Any, Any]:
        model: Any = load_policy(str(policy), dtype=torch.float32).to("cuda")
        choose_path(model, longest(few), pad_token_id=0)
        model = shard(model, init_device_mesh("cuda", (1,)), compute_dtype=torch.bfloat16)
        return model, optim.build_optimizer(model, learning_rate=1e-5, weight_decay=0.0, betas=(0.9, 0.999))

    def weights(model: Any) -> dict[str, torch.Tensor]:
        return {name: p.full_tensor().cpu() for name, p in model.named_parameters()}

    model, optimizer = fresh()
    path = choose_path(load_policy(str(policy), dtype=torch.float32).to("cuda"), longest(few), pad_token_id=0)
    plan = batches.Plan(lengths, share_prompt=path.share_prompt, **how)
    log, held, after = [], [], {}
    with train_saving.saving(where, model, optimizer, every=2, num_steps=4, kept=2) as save:
        for (metrics,) in train(model, optimizer, few, lengths, plan, path):
            log.append(metrics)
            started = time.perf_counter()
            save(len(log), log)
            held.append(time.perf_counter() - started)
            after[len(log)] = weights(model)
            if len(log) == 3:  # else the next one waits for the files of the one before
                wait_until(lambda: any(record for _, record in train_state.committed(where.directory)), timeout_s=120)
    print(f"\nsave holds a step for {held[1]:.2f} s at first, then {held[3]:.2f} s")
    for step in (4, 2):
        resumed, its_optimizer = fresh()
        assert train_state.resume(where, resumed, its_optimizer) == (step, log[:step])
        found = weights(resumed)
        assert all(torch.equal(found[name], tensor) for name, tensor in after[step].items())
        shutil.rmtree(tmp_path / "state" / train_state.committed(where.directory)[0][0])


def test_hf_engine_on_gpu_samples_by_seed(policy: Path) -> None:
    settings = EngineSettings("hf", "bfloat16", 256, {}, 1, 1.0, 1.0, 1, False)
    ref = PolicyRef(str(policy), policy_identity(policy))
    engine = HfEngine(settings, ref)
    sampling = {
        **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        **{"max_new_tokens": 16, "stop": (), "stop_token_ids": (), "logps": True},
    }
    asked = [Request([5, 6, 7], seed=1, n=2), Request([8, 9], seed=5, n=2)]
    first = engine.generate(asked, sampling)
    assert first[0][0].token_ids != first[0][1].token_ids
    assert engine.generate(asked[:1], sampling)[0] == first[0]
