"""What `train.py` says of its results: the four bars, each with its figures."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_table import GIB, MAX_LOSS_DIFFERENCE, judge

MAX_OVERHEAD, MIN_SCALING, MAX_STALL, MAX_MEMORY = 0.03, 0.9, 0.05, 0.65

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""Results of the runs of each arm, as `train_arms.run` returns them."""


class Row(NamedTuple):
    """A line of the table."""

    what: str
    figures: str
    verdict: str


class Seconds(NamedTuple):
    """Of the timed steps of an arm together."""

    middle: float
    """Median of its runs."""
    quiet: float
    """Of each step its fastest run: what another process takes for a moment is not in it."""


def overhead_row(runs: Runs, warm: int) -> Row:
    bare, ray = (seconds(runs[arm], warm) for arm in ("bare", "ray"))
    return _row(
        "Ray Train around the bare loop",
        f"{_step(runs['ray'], warm)} s a step, bare {_step(runs['bare'], warm)} s",
        [f"{each - 1:+.1%}" for each in ratios(ray, bare)],
        judge(max(ratios(ray, bare)) <= 1 + MAX_OVERHEAD, f"<= {MAX_OVERHEAD:.0%}"),
        runs,
        ("bare", "ray"),
    )


def scaling_row(runs: Runs, warm: int) -> Row:
    threads, workers = (seconds(runs[arm], warm) for arm in ("threads", "workers"))
    tokens = sum(runs["workers"][0]["tokens"][warm:])
    return _row(
        "2 workers x 1 thread against 1 worker x 2 threads",
        f"{tokens / workers.middle:,.0f} and {tokens / threads.middle:,.0f} tokens/s",
        [f"{each:.3f}" for each in ratios(threads, workers)],
        judge(min(ratios(threads, workers)) >= MIN_SCALING, f">= {MIN_SCALING:g}"),
        runs,
        ("threads", "workers"),
    )


def checkpoint_rows(runs: Runs, warm: int, every: int) -> list[Row]:
    """What saving adds to a run, and how long a step waits for it: the rest is that files are written beside the steps."""
    never, saves = (seconds(runs[arm], warm) for arm in ("ray", "saves"))
    stalls = [stall(result, warm, every) for result in runs["saves"]]
    step = saves.middle / len(runs["saves"][0]["clocks"][warm:])
    shares = [each / (every * step) for each in (statistics.median(stalls), min(stalls))]
    arms = ("ray", "saves")
    return [
        _row(
            f"a run that saves every {every} steps against one that never saves",
            f"{_step(runs['saves'], warm)} s a step, without {_step(runs['ray'], warm)} s",
            [f"{each - 1:+.1%}" for each in ratios(saves, never)],
            judge(max(ratios(saves, never)) <= 1 + MAX_STALL, f"<= {MAX_STALL:.0%}"),
            runs,
            arms,
        ),
        _row(
            f"the wait for a copy of the state, of {every} steps",
            f"{1000 * statistics.median(stalls):.0f} ms a save",
            [f"{each:.2%}" for each in shares],
            judge(max(shares) <= MAX_STALL, f"<= {MAX_STALL:.0%}"),
            runs,
            arms,
        ),
    ]


def memory_rows(runs: Runs, shapes: Sequence[str]) -> list[Row]:
    """Peaks of whole worker processes, from their start to the end of the export; and what they were up to the last step."""
    rows = []
    for shape in shapes:
        arms = (f"one {shape}", f"two {shape}")
        one, two = (min(max(result["peaks"]) for result in runs[arm]) for arm in arms)
        steps = [min(result["step_peak"] for result in runs[arm]) / GIB for arm in arms]
        rows.append(
            _row(
                f"peak memory of a worker, with 2 workers against 1, {shape}",
                f"{two / GIB:.2f} and {one / GIB:.2f} GiB (before the last save {steps[1]:.2f} and {steps[0]:.2f})",
                [f"{two / one:.3f}"],
                judge(two / one <= MAX_MEMORY, f"<= {MAX_MEMORY:g}") if shape == shapes[0] else "-",
                runs,
                arms,
            )
        )
    return rows


def seconds(results: Sequence[Mapping[str, Any]], warm: int) -> Seconds:
    steps = [step_seconds(result, warm) for result in results]
    return Seconds(statistics.median(map(sum, steps)), sum(map(min, zip(*steps, strict=True))))


def step_seconds(result: Mapping[str, Any], warm: int) -> list[float]:
    """Of each step behind the first `warm`, from the end of the step before it."""
    clocks = result["clocks"][warm - 1 :]
    return [end - start for start, end in itertools.pairwise(clocks)]


def stall(result: Mapping[str, Any], warm: int, every: int) -> float:
    """Seconds that the loop stood still for a save: between two steps, above what it always stands still there."""
    between = {
        step: whole - result["step_s"][step] for step, whole in enumerate(step_seconds(result, warm), start=warm)
    }  # by the steps taken before it
    saved = [pause for step, pause in between.items() if step % every == 0]
    others = [pause for step, pause in between.items() if step % every]
    return statistics.mean(saved) - statistics.median(others)


def ratios(slow: Seconds, fast: Seconds) -> tuple[float, float]:
    return slow.middle / fast.middle, slow.quiet / fast.quiet


def apart(runs: Runs, arms: Sequence[str]) -> float:
    """Largest difference of the losses of any two runs in any step."""
    every = [result["losses"] for arm in arms for result in runs[arm]]
    return max(max(step) - min(step) for step in zip(*every, strict=True))


def detail(arm: str, results: Sequence[Mapping[str, Any]], warm: int) -> str:
    """The runs of an arm in one line."""
    each = sorted(statistics.mean(step_seconds(result, warm)) for result in results)
    rate = sum(results[0]["tokens"][warm:]) / len(results[0]["tokens"][warm:]) / each[0]
    peaks = ", ".join(f"{peak / GIB:.2f}" for peak in results[0]["peaks"])
    return (
        f"  {arm:<8} s a step: min {each[0]:.4f}  median {statistics.median(each):.4f}  max {each[-1]:.4f}  "
        f"{rate:9,.0f} tokens/s  {len(each)} run(s)  peak {peaks} GiB"
    )


def markdown(rows: Sequence[Row]) -> str:
    lines = [("what", "measured", "bar"), ("---",) * 3, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(what: str, figures: str, shown: Sequence[str], verdict: str, runs: Runs, arms: Sequence[str]) -> Row:
    """Nothing is compared where the losses show that it was not the same work."""
    if (difference := apart(runs, arms)) > MAX_LOSS_DIFFERENCE:
        return Row(what, f"losses differ by {difference:.1e}", judge(False, f"losses within {MAX_LOSS_DIFFERENCE:.0e}"))
    quiet = f" (quietest runs {shown[1]})" if len(shown) > 1 else ""
    return Row(what, f"{figures}: {shown[0]}{quiet}; losses within {difference:.1e}", verdict)


def _step(results: Sequence[Mapping[str, Any]], warm: int) -> str:
    return f"{seconds(results, warm).middle / len(results[0]['clocks'][warm:]):.3f}"
