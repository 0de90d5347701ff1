"""The arms of `dpo.py`: DPO steps and reference passes, ours and hand-written. TRL's are in `dpo_trl.py`.

A step arm takes every step of a job and calls `tick` with the loss after each: forward, backward, clipping at 1.0 and a
fused AdamW step. A reference arm loads its model and returns what scores pairs.

Shapes: S rows (chosen, then rejected), T tokens of a row, B pairs, K completion tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import dpo_trl
import torch
from dpo_work import PAD, Pair
from torch.nn import functional

BETA, LEARNING_RATE, MAX_NORM, BETAS, MAX_BATCH_TOKENS = 0.1, 1e-5, 1.0, (0.9, 0.999), 16384
MICRO_PAIRS = 8
"""Pairs of a forward in the padded arms that are not ours: about `MAX_BATCH_TOKENS` tokens at the longest."""
OURS = {"ours", "ours-bf16", "shared", "packed", "padded"}

Tick = Callable[[float], None]
Logps = list[list[float]]
"""[chosen, rejected] of each pair: sums in nats."""
Score = Callable[[Sequence[Pair]], Logps]


class Job(NamedTuple):
    """What one process does."""

    what: str
    """step, reference, memory or matmul."""
    arm: str = ""
    model: str = ""
    """Directory."""
    pairs: Sequence[Pair] = ()
    device: str = "cpu"
    threads: int = 1
    batch_pairs: int = 8
    """Pairs of a step, and of a batch of the reference loops."""
    timed: tuple[int, int] = (0, 0)
    """The steps that are timed: first, and one behind the last."""

    @property
    def batches(self) -> list[list[int]]:
        """Indices of the pairs of each step."""
        return list(_chunks(range(len(self.pairs)), self.batch_pairs))


def ours(job: Job, tick: Tick, dtype: torch.dtype) -> None:
    """What a train worker of one rank runs: float32 master weights under FSDP2, computed in `dtype`.

    The arm `padded` gives each completion a row of its own; `packed` packs them into one row without sharing the prompt.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from dpo_ray.learn import dpo, layout, losses, matmul, objective, optim, policy, probe

    matmul.float32_matmul_fast_path()
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl" if job.device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    table = _table(job.pairs)
    whole: Any = policy.load_policy(job.model, dtype=torch.float32)
    whole.to(job.device)
    share_prompt = "never" if job.arm == "padded" else "always"
    path = probe.choose_path(whole, table.longest(), pad_token_id=PAD, share_prompt=share_prompt)
    model = policy.shard(whole, init_device_mesh(job.device, (1,)), compute_dtype=dtype)
    optimizer = optim.build_optimizer(model, learning_rate=LEARNING_RATE, weight_decay=0.0, betas=BETAS)
    if job.arm == "packed":  # dpo_ray always shares where it packs: each completion becomes a group of its own
        alone = lambda groups: [layout.Group(g.prompt, [c]) for g in groups for c in g.completions]
        objective.lay_out = lambda groups, path, pad: layout.share(alone(groups))
    steps = dpo.dpo_steps(
        model,
        optimizer,
        table.fetch,
        [_plan(job, rows) for rows in job.batches],
        path,
        objective.Objective([losses.Term("sigmoid")], BETA),
        table.lengths,
        learning_rate_for=lambda step: LEARNING_RATE,
        max_grad_norm=MAX_NORM,
        pad_token_id=PAD,
        device=job.device,
    )
    for metrics in steps:
        tick(metrics["loss"])
    dist.destroy_process_group()


def _table(pairs: Sequence[Pair]) -> Any:
    """The pairs as a train worker reads them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dpo_ray.pair_table import REFERENCE, ROWS, PairTable

    columns = [*ROWS, *REFERENCE]
    values = [list(map(str, range(len(pairs)))), *map(list, zip(*pairs, strict=True))]
    with tempfile.TemporaryDirectory() as directory:
        pq.write_table(pa.table(dict(zip(columns, values, strict=True))), f"{directory}/pairs.parquet")
        return PairTable([f"{directory}/pairs.parquet"], columns)


def _plan(job: Job, rows: list[int]) -> list[list[list[int]]]:
    """Let `plan_epoch` cut one step into micro-batches: over all pairs it would also change which form a step."""
    import numpy as np

    from dpo_ray.learn.batches import plan_epoch

    pairs = [job.pairs[row] for row in rows]
    lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs])
    if job.arm == "packed":
        lengths *= [2, 1, 1]
    (step,) = plan_epoch(
        lengths,
        global_batch_size=len(rows),
        world_size=1,
        max_batch_tokens=MAX_BATCH_TOKENS,
        seed=0,
        epoch=0,
        share_prompt=job.arm != "padded",
    )
    return [[[rows[i] for i in micro] for micro in rank] for rank in step]


def loop(job: Job, tick: Tick, completion_only: bool) -> None:
    """A hand-written loop over padded rows, with cached reference values; see `row_logps` for the two heads."""
    model = load(job, fast=completion_only)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0, fused=True)
    for rows in job.batches:
        total = 0.0
        for micro in _chunks(rows, MICRO_PAIRS):
            pairs = [job.pairs[row] for row in micro]
            with autocast(job):
                chosen, rejected = row_logps(model, pairs, job.device, completion_only).chunk(2)
            ref = torch.tensor([[p.ref_chosen, p.ref_rejected] for p in pairs], device=job.device)
            margins = (chosen - ref[:, 0]) - (rejected - ref[:, 1])
            loss = -functional.logsigmoid(BETA * margins).sum() / len(rows)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tick(total)


def load(job: Job, fast: bool, dtype: torch.dtype = torch.float32) -> Any:
    """The model as `from_pretrained` gives it; `fast` switches on oneDNN's float32 matrix products, where they are exact."""
    from transformers import AutoModelForCausalLM

    from dpo_ray.learn.matmul import float32_matmul_fast_path

    if fast:
        float32_matmul_fast_path()
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation="sdpa")
    return model.to(job.device)


def autocast(job: Job) -> torch.autocast:
    """bf16 on a GPU, where float32 is no fair opponent; float32 on a CPU."""
    return torch.autocast(job.device, torch.bfloat16, enabled=job.device == "cuda" and job.arm != "exact")


def row_logps(model: Any, pairs: Sequence[Pair], device: str, completion_only: bool) -> torch.Tensor:
    """Return (2 B,) sums of log-probabilities, chosen then rejected.

    `completion_only` runs head and cross-entropy on the positions that predict completion tokens, and leaves the mask out:
    padding stands on the right, so that attention takes its causal kernel. Else the logits of all positions are made.
    """
    ids_ST, attention_ST, completion_ST = pad_rows(pairs, device)
    targets_ST, counts_ST = ids_ST[:, 1:], completion_ST[:, 1:]
    if not completion_only:
        logits_STV = model(input_ids=ids_ST, attention_mask=attention_ST, use_cache=False).logits[:, :-1]
        logps_STV = logits_STV.float().log_softmax(-1)
        return (logps_STV.gather(-1, targets_ST[..., None])[..., 0] * counts_ST).sum(1)
    hidden_STH = model.model(input_ids=ids_ST, use_cache=False).last_hidden_state[:, :-1]
    logits_KV = model.lm_head(hidden_STH[counts_ST])
    logits_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
    logps_K = -functional.cross_entropy(logits_KV, targets_ST[counts_ST], reduction="none")
    # index_add would be shorter, but adds one by one: 1e-3 nats off on long completions.
    return logps_K.new_zeros(counts_ST.shape).masked_scatter(counts_ST, logps_K).sum(1)


def pad_rows(pairs: Sequence[Pair], device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids (S, T), which of them are real, and which belong to completions."""
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), width), PAD)
    real, counted = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        real[row, :end] = 1
        counted[row, len(prompt) : end] = True
    return ids.to(device), real.to(device), counted.to(device)


def reference_ours(job: Job, dtype: torch.dtype) -> Score:
    """`score_groups` as an actor of the reference stage calls it."""
    from dpo_ray.learn import batched, layout, matmul, policy, probe

    matmul.float32_matmul_fast_path()
    model: Any = policy.load_policy(job.model, dtype=dtype)
    model.to(job.device)
    groups_of = lambda pairs: [layout.Group(p.prompt, [p.chosen, p.rejected]) for p in pairs]
    longest = max(groups_of(job.pairs), key=probe.sequence_tokens)
    path = probe.choose_path(model, longest, pad_token_id=PAD, share_prompt="always")

    def score(pairs: Sequence[Pair]) -> Logps:
        scored = batched.score_groups(model, groups_of(pairs), path, max_batch_tokens=MAX_BATCH_TOKENS, pad_token_id=PAD)
        return [[one.logps for one in sides] for sides in scored]

    return score


def reference_loop(job: Job, completion_only: bool, dtype: torch.dtype | None = None) -> Score:
    """Padded batches of pairs; sorted by length where the loop is the competent one."""
    model = load(job, completion_only, dtype or (torch.bfloat16 if job.device == "cuda" else torch.float32))

    @torch.inference_mode()
    def score(pairs: Sequence[Pair]) -> Logps:
        order = sorted(range(len(pairs)), key=lambda i: pairs[i].tokens) if completion_only else list(range(len(pairs)))
        logps: Logps = [[] for _ in pairs]
        for rows in _chunks(order, MICRO_PAIRS):
            with autocast(job):
                values = row_logps(model, [pairs[i] for i in rows], job.device, completion_only)
            for i, both in zip(rows, values.view(2, -1).T.tolist(), strict=True):
                logps[i] = both
        return logps

    return score


BF16 = torch.bfloat16
STEPS: dict[str, Callable[[Job, Tick], None]] = {
    "ours": functools.partial(ours, dtype=torch.float32),
    "ours-bf16": functools.partial(ours, dtype=BF16),
    "hand": functools.partial(loop, completion_only=True),
    "naive": functools.partial(loop, completion_only=False),
    "trl": functools.partial(dpo_trl.train, tuned=True, bf16=False),
    "trl-bf16": functools.partial(dpo_trl.train, tuned=True, bf16=True),
    "trl-default": functools.partial(dpo_trl.train, tuned=False, bf16=True),
    "padded": functools.partial(ours, dtype=BF16),
    "packed": functools.partial(ours, dtype=BF16),
    "shared": functools.partial(ours, dtype=BF16),
}
"""Those of a GPU are named by their layout and compute in bf16."""
REFERENCES: dict[str, Callable[[Job], Score]] = {
    "ours": functools.partial(reference_ours, dtype=torch.float32),
    "ours-bf16": functools.partial(reference_ours, dtype=BF16),
    "hand": functools.partial(reference_loop, completion_only=True),
    "naive": functools.partial(reference_loop, completion_only=False),
    "trl": functools.partial(dpo_trl.reference, bf16=False),
    "trl-bf16": functools.partial(dpo_trl.reference, bf16=True),
    "exact": functools.partial(reference_loop, completion_only=True, dtype=torch.float64),
}


def computed_tokens(job: Job, steps: Sequence[list[int]]) -> int:
    """Tokens that a step arm runs through the layers in some steps, padding included: what hardware utilisation counts."""
    total = 0
    for rows in steps:
        for micro in _plan(job, rows)[0] if job.arm in OURS else _chunks(rows, MICRO_PAIRS):
            pairs = [job.pairs[row] for row in micro]
            if job.arm in OURS - {"packed", "padded"}:
                total += sum(pair.tokens - len(pair.prompt) for pair in pairs)
            elif job.arm == "packed":
                total += sum(pair.tokens for pair in pairs)
            else:
                total += 2 * len(pairs) * max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    return total


def _chunks(items: Sequence[int], size: int) -> Iterator[list[int]]:
    return (list(items[i : i + size]) for i in range(0, len(items), size))
