"""One process of `dpo.py`: runs one job and measures it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.models.qwen2.modeling_qwen2  # before the processes of the jobs are forked
from dpo_arms import REFERENCES, STEPS, Job, computed_tokens

with contextlib.suppress(ImportError):  # its arms are left out then
    import trl.trainer.dpo_trainer  # noqa: F401

Result = dict[str, Any]


def measure(job: Job) -> Result:
    """Run a job; what comes back depends on `job.what`."""
    if job.device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()  # pyright: ignore
    with contextlib.redirect_stdout(sys.stderr):
        return {"step": _steps, "reference": _reference, "memory": _memory, "matmul": _matmul}[job.what](job)


def _steps(job: Job) -> Result:
    """Seconds from the end of the step before the timed ones to the end of the last: data, forward to optimizer."""
    losses: list[float] = []
    clocks: list[tuple[float, float]] = []

    def tick(loss: float) -> None:
        losses.append(loss)
        clocks.append(_clock(job))

    STEPS[job.arm](job, tick)
    first, end = job.timed
    steps = job.batches[first:end]
    pairs = [job.pairs[row] for rows in steps for row in rows]
    completion = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    return {
        "seconds": clocks[end - 1][0] - clocks[first - 1][0],
        "cpu": clocks[end - 1][1] - clocks[first - 1][1],
        "count": end - first,
        "tokens": sum(pair.tokens for pair in pairs),
        "flops": _flops(Path(job.model), computed_tokens(job, steps), completion),
        "losses": losses,
    }


def _flops(model: Path, tokens: int, completion_tokens: int) -> int:
    """FLOPs of forward and backward, 6 for each weight and token: in the layers on `tokens`, in the head on completions.

    Attention scores are left out, and so is what an arm computes in the head beyond completion tokens.
    """
    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = hidden * (2 * hidden + 2 * keys) + 3 * hidden * config["intermediate_size"]
    return 6 * (layer * config["num_hidden_layers"] * tokens + hidden * config["vocab_size"] * completion_tokens)


def _reference(job: Job) -> Result:
    """Seconds to score all pairs, after a few of them as a warm-up."""
    score = REFERENCES[job.arm](job)
    score(job.pairs[:4])
    before = _clock(job)
    logps = score(job.pairs)
    after = _clock(job)
    return {
        "seconds": after[0] - before[0],
        "cpu": after[1] - before[1],
        "count": len(job.pairs),
        "tokens": sum(pair.tokens for pair in job.pairs),
        "logps": logps,
    }


def _memory(job: Job) -> Result:
    """Peak of the second step above the process before it, which holds weights and optimizer state, and the gradients.

    The first step, on a few tokens, allocates the optimizer's state and loads what the libraries load late.
    """
    before = 0
    result: Result = {}

    def tick(loss: float) -> None:
        nonlocal before
        if not before:
            before = _reset_peak(job)
            return
        parameters = _parameters(Path(job.model))
        peak = _peak(job)
        result.update(above=peak - before - 4 * parameters, total=peak, before=before, state=16 * parameters)

    STEPS[job.arm](job, tick)
    return result


def _parameters(model: Path) -> int:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (not a dict)


def _matmul(job: Job) -> Result:
    """FLOP/s of matrix products: float32 as the arms run it on a CPU, and bf16."""
    from dpo_ray.learn.matmul import float32_matmul_fast_path

    rates = {}
    float32_matmul_fast_path()
    m, k, n = (1024, 576, 1536) if job.device == "cpu" else (8192, 8192, 8192)
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(m, k, device=job.device).to(dtype), torch.randn(k, n, device=job.device).to(dtype)
        for _ in range(4):
            torch.mm(left, right)
        count, start = 0, _clock(job)[0]
        while _clock(job)[0] - start < 1.0:
            for _ in range(4):
                torch.mm(left, right)
            count += 4
        rates[str(dtype).removeprefix("torch.")] = 2 * m * k * n * count / (_clock(job)[0] - start)
    return rates


def _clock(job: Job) -> tuple[float, float]:
    """Seconds of the wall and of the CPU, with the device idle."""
    if job.device == "cuda":
        torch.cuda.synchronize()
    used = os.times()
    return time.perf_counter(), used.user + used.system + used.children_user + used.children_system


def _reset_peak(job: Job) -> int:
    """Forget the peak; return the bytes in use."""
    gc.collect()
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what the allocator keeps: only what is in use counts
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(job: Job) -> int:
    return torch.cuda.max_memory_allocated() if job.device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"/proc/self/status has no {key}"
    return 1024 * int(found[1])
