"""How much a step computes and how fast: tokens posed and computed, FLOPs, the device's measured peak, memory.

In: the plan of a step and the lengths of its rows. Out: numbers for the log. Nothing here asks the device during training.
"""

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from dpo_ray.learn.batches import Step, row_tokens
from dpo_ray.learn.steps import posed_tokens

CALIBRATION_S = 0.3
GIB = 2**30


class StepTokens(NamedTuple):
    """Tokens of a step over all ranks."""

    posed: int
    """Of prompt + completion of every completion: the work as it is asked for."""
    computed: int
    """What the model sees of that, without padding: a shared prompt counts once."""
    padding: int
    targets: int
    """Completion tokens that the loss is of: positions at which the head is computed."""


class Flops(NamedTuple):
    """Forward and backward of one token."""

    body: int
    head: int


def step_tokens(step: Step, lengths: np.ndarray, *, share_prompt: bool, num_targets: np.ndarray | None = None) -> StepTokens:
    """Count the tokens of a planned step.

    Args:
        lengths: (rows, 1 + C) tokens of the prompt and of the C completions of every row.
        share_prompt: the layout of the batches, as `probe.choose_path` found it.
        num_targets: (rows,) completion tokens that the loss is of; None where it is all of them.
    """
    batches = [rows for micro_batches in step for rows in micro_batches if rows]
    of_step = lengths[[row for rows in batches for row in rows]]
    prompts, *completions = of_step.sum(axis=0).tolist()
    posed, completion = posed_tokens(of_step), sum(completions)
    targets = completion if num_targets is None else int(sum(num_targets[rows].sum() for rows in batches))
    if share_prompt:
        return StepTokens(posed, prompts + completion, 0, targets)
    padded = sum(len(rows) * int(row_tokens(lengths[rows], share_prompt=False).max()) for rows in batches)
    return StepTokens(posed, posed, padded - posed, targets)


def token_flops(model: PreTrainedModel) -> Flops:
    """6 FLOPs for each weight that a token meets (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).

    The body is every parameter but embeddings and head, of experts the share that a token is routed to; the head is
    counted at targets alone. Attention scores, and what is computed a second time in the backward, are not
    counted.
    """
    config: Any = model.config.get_text_config()
    num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active = (getattr(config, "num_experts_per_tok", None) or 1) / num_experts if num_experts else 1.0
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    lookups = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) or m is head for p in m.parameters(recurse=False)}
    body = sum(
        p.numel() * (active if ".experts." in name else 1) for name, p in model.named_parameters() if id(p) not in lookups
    )
    return Flops(6 * round(body), 6 * weight.numel() if weight is not None else 0)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some large matrix products on this device, measured for about CALIBRATION_S seconds.

    Measured in the same process and settings as the training that is compared with it.
    """
    gpu = device.type == "cuda"
    m, k, n = (4096, 4096, 4096) if gpu else (1024, 576, 1536)
    left, right = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    products = 20 if gpu else 1

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right)
        if gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    seconds()  # the first product sets up the library
    until = time.perf_counter() + CALIBRATION_S
    best = seconds()
    while time.perf_counter() < until:
        best = min(best, seconds())
    return 2 * m * k * n * products / best


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has held: of its tensors on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB


def interval_metrics(
    steps: Sequence[Step],
    lengths: np.ndarray,
    seconds: float,
    flops: Flops,
    peak: float,
    *,
    share_prompt: bool,
    num_targets: np.ndarray | None = None,
) -> list[dict[str, float]]:
    """What is logged of each of the steps that one read of the metrics covers; times are those of the interval.

    - step_time_s: seconds of a step, mean over the interval.
    - tokens_per_s: posed tokens of all ranks a second, padding not counted.
    - mfu: model FLOPs a second divided by `peak`: body FLOPs of the computed tokens (no padding, a shared prompt once)
      and head FLOPs of the targets.
    - tokens_saved: share of the posed tokens that sharing prompts spares.
    - padding: share of padding in what the model sees.

    Args:
        lengths, share_prompt, num_targets: as `step_tokens` has them.
        peak: FLOP/s of all devices together.
    """
    counts = [step_tokens(step, lengths, share_prompt=share_prompt, num_targets=num_targets) for step in steps]
    work = sum(count.computed * flops.body + count.targets * flops.head for count in counts)
    speed = {
        "step_time_s": seconds / len(steps),
        "tokens_per_s": sum(count.posed for count in counts) / seconds,
        "mfu": work / seconds / peak,
    }
    return [
        {
            **speed,
            "tokens_saved": 1 - count.computed / count.posed,
            "padding": count.padding / (count.computed + count.padding),
        }
        for count in counts
    ]
