"""What `dpo.py` says of its results: ratios with their bars, and the table for the README."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

NAMES = {
    "ours": "ours",
    "ours-bf16": "ours, bf16",
    "shared": "packed, prompts shared",
    "packed": "packed",
    "padded": "padded",
    "hand": "hand-written",
    "trl": "TRL tuned",
    "trl-bf16": "TRL tuned, bf16",
    "trl-default": "TRL as shipped",
    "naive": "naive",
}
MAX_LOSS_DIFFERENCE = 1e-5
MAX_FIRST_LOSS_ERROR = 1e-4
MAX_LOGPS_ERROR = {"float32": 2e-3, "bf16": 0.1}
GPU_RATE = 0.35
GIB = 2**30

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""Results of the runs of each arm."""


class Bar(NamedTuple):
    """One arm against another."""

    slow: str
    fast: str
    least: float | None = None
    """Of the time of `slow` divided by that of `fast`; None where there is no bar."""


class Row(NamedTuple):
    """A line of the table."""

    what: str
    cells: dict[str, str]
    """By arm."""
    verdicts: list[str]


def step_bars(profile: str, vocabulary: int, gpu: bool) -> list[Bar]:
    if gpu:
        return [Bar("packed", "shared", 1.15), Bar("trl-bf16", "shared", 2.0), Bar("padded", "shared")]
    trl = 6.0 if vocabulary >= 32000 else 3.0 if vocabulary >= 8192 else None
    return [
        Bar("trl", "ours", trl),
        Bar("hand", "ours", 1.4 if profile == "hh" else 1.1),
        Bar("ours", "ours-bf16", 1.15),
        Bar("naive", "ours"),
        Bar("trl-bf16", "ours-bf16"),
        Bar("trl-default", "ours-bf16"),
    ]


def reference_bars(gpu: bool) -> list[Bar]:
    if gpu:
        return [Bar("trl-bf16", "ours-bf16", 3.0), Bar("hand", "ours-bf16", 1.3)]
    return [Bar("trl", "ours", 3.0), Bar("hand", "ours", 1.3), Bar("naive", "ours"), Bar("trl-bf16", "ours-bf16")]


def memory_bars(gpu: bool) -> list[Bar]:
    """Here `least` is the most that `fast` may use of what `slow` uses."""
    if gpu:
        return [Bar("naive", "shared", 0.3), Bar("trl-bf16", "shared", 0.6), Bar("padded", "shared")]
    return [Bar("naive", "ours", 0.3), Bar("trl", "ours", 0.6)]


def step_row(what: str, runs: Runs, bars: Sequence[Bar], rates: Mapping[str, float], gpu: bool) -> Row:
    """Seconds of a step, median of the runs, and the share of the measured matmul rate that the fastest run reached."""
    cells, reached = {}, {}
    for arm, results in runs.items():
        rate = rates["float32" if arm in ("ours", "hand", "trl", "naive") and not gpu else "bfloat16"]
        reached[arm] = max(result["flops"] / result["seconds"] for result in results) / rate
        cells[arm] = f"{_median(results):.3f} s ({reached[arm]:.0%})"
    verdicts = speed_verdicts(runs, bars)
    if gpu and "shared" in reached:
        verdicts.append(
            f"{reached['shared']:.0%} of the matmul rate ({judge(reached['shared'] >= GPU_RATE, f'>= {GPU_RATE:.0%}')})"
        )
    return Row(what, cells, verdicts)


def parity_row(what: str, runs: Runs, arms: Sequence[str]) -> Row:
    """Largest difference of the loss of any two of the float32 arms over all steps of their first runs."""
    losses = {arm: runs[arm][0]["losses"] for arm in arms if arm in runs}
    largest = max(map(max, (_apart(a, b) for a in losses.values() for b in losses.values())))
    first = max(abs(each[0] - math.log(2)) for each in losses.values())
    return Row(
        f"{what}, {min(map(len, losses.values()))} steps",
        {arm: f"{max(_apart(each, losses[arms[0]])):.1e}" if arm != arms[0] else "-" for arm, each in losses.items()},
        [
            f"of any two {largest:.1e} ({judge(largest <= MAX_LOSS_DIFFERENCE, f'<= {MAX_LOSS_DIFFERENCE:.0e}')})",
            f"first loss from ln 2 {first:.1e} ({judge(first <= MAX_FIRST_LOSS_ERROR, f'<= {MAX_FIRST_LOSS_ERROR:.0e}')})",
        ],
    )


def reference_row(what: str, runs: Runs, bars: Sequence[Bar]) -> Row:
    """Milliseconds of a pair, median of the runs."""
    return Row(what, {arm: f"{1000 * _median(results):.1f} ms" for arm, results in runs.items()}, speed_verdicts(runs, bars))


def error_row(what: str, runs: Runs, exact: Sequence[Sequence[float]], gpu: bool) -> Row:
    """Largest difference of the log-probability of a completion from its float64 value."""
    errors = {
        arm: max(max(_apart(a, b)) for a, b in zip(results[0]["logps"], exact, strict=False)) for arm, results in runs.items()
    }
    verdicts = []
    for dtype, most in MAX_LOGPS_ERROR.items():
        own = [
            error
            for arm, error in errors.items()
            if (gpu or arm.endswith("bf16")) == (dtype == "bf16") and arm.startswith("ours")
        ]
        verdicts += [f"ours, {dtype}: {error:.1e} ({judge(error <= most, f'<= {most:g}')})" for error in own]
    return Row(what, {arm: f"{error:.1e}" for arm, error in errors.items()}, verdicts)


def memory_row(what: str, runs: Runs, bars: Sequence[Bar]) -> Row:
    """Of each arm the run with the lower peak."""
    best = {arm: min(results, key=lambda result: result["above"]) for arm, results in runs.items()}
    verdicts = []
    for slow, fast, most in bars:
        if slow in best and fast in best:
            ratio = best[fast]["above"] / best[slow]["above"]
            asked = f" ({judge(ratio <= most, f'<= {most:g}')})" if most else ""
            verdicts.append(f"{ratio:.2f} of {NAMES[slow]}{asked}")
    cells = {arm: f"{run['above'] / GIB:.2f} GiB (total {run['total'] / GIB:.2f})" for arm, run in best.items()}
    return Row(what, cells, verdicts)


def speed_verdicts(runs: Runs, bars: Sequence[Bar]) -> list[str]:
    """Ratios of the medians; a bar is met where the ratio of the fastest runs meets it too."""
    verdicts = []
    for slow, fast, least in bars:
        if slow in runs and fast in runs:
            middle = _median(runs[slow]) / _median(runs[fast])
            best = min(map(_seconds, runs[slow])) / min(map(_seconds, runs[fast]))
            asked = f", {judge(min(middle, best) >= least, f'>= {least:g}x')}" if least else ""
            verdicts.append(f"{NAMES[slow]} / {NAMES[fast]} {middle:.2f}x (fastest runs {best:.2f}x{asked})")
    return verdicts


def detail(arm: str, results: Sequence[Mapping[str, Any]]) -> str:
    """The spread of an arm's runs, in one line: seconds and CPU seconds of a step or pair."""
    each = sorted(map(_seconds, results))
    cpu = statistics.median(result["cpu"] / result["count"] for result in results)
    tokens = results[0]["tokens"] / results[0]["count"]
    return (
        f"  {arm:<12} min {each[0]:.4f}  median {statistics.median(each):.4f}  max {each[-1]:.4f}  CPU {cpu:.4f} s  "
        f"{tokens / each[0]:9,.0f} tokens/s  {len(each)} run(s)"
    )


def markdown(rows: Sequence[Row]) -> str:
    arms = [arm for arm in NAMES if any(arm in row.cells for row in rows)]
    lines = [["what", *(NAMES[arm] for arm in arms), "ratios and bars"], ["---"] * (len(arms) + 2)]
    lines += [[row.what, *(row.cells.get(arm, "") for arm in arms), "; ".join(row.verdicts)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def judge(met: bool, bar: str) -> str:
    return f"{bar}: {'met' if met else 'NOT MET'}"


def _median(results: Sequence[Mapping[str, Any]]) -> float:
    return statistics.median(map(_seconds, results))


def _seconds(result: Mapping[str, Any]) -> float:
    return result["seconds"] / result["count"]


def _apart(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [abs(x - y) for x, y in zip(a, b, strict=False)]
