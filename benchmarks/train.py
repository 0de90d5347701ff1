"""What Ray Train, a second worker and checkpoints cost the training of a policy, on a CPU.

    python benchmarks/train.py [--only overhead scaling checkpoints memory] [--runs 5]

Four bars, each a ratio of two arms that take the same steps on the same pairs, which their losses must show:

overhead     the train stage, one worker, against the same loop (`dpo_steps`) in a plain process: at most 3 % more time
scaling      2 workers with 1 thread each against 1 worker with 2: at least 0.9 of the tokens/s
checkpoints  a run that saves every 20 steps against one that never does: at most 5 % more time
memory       peak of a worker of 2 against that of 1, for a policy whose states dominate: at most 0.65. Shown beside it, a
             smaller policy with layers below 32 MiB: glibc keeps what is freed of tensors below that size

Times are of steps in the steady state, from the end of one to the end of the next: start-up, load and export are not in
them. Every run is in processes of its own, on a Ray of its own; arms take turns, forwards and backwards. A bar is met where
the medians of the runs meet it and the quietest runs too. Runs of one arm differed by up to 11 % on 2 cores, where `--runs 2`
takes 16 minutes: a bar of a few per cent needs more of them. HH-RLHF is found by $DPO_RAY_TEST_DATA, else lengths are drawn.
The command refuses to start on a busy machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import dpo_work  # noqa: E402
import train_arms  # noqa: E402
import train_table  # noqa: E402
from train_arms import Job  # noqa: E402

BARS = ("overhead", "scaling", "checkpoints", "memory")
MEMORY_STEPS, MEMORY_PAIRS, MEMORY_TOKENS = 4, 2, 16
"""Steps, pairs of a step, and tokens of each prompt and completion: next to nothing beside the states."""


def in_process(job: Job) -> train_arms.Result:
    """Run one job in a new process."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(train_arms.run, job, directory).result()


def in_turn(runs: int, jobs: dict[str, Job], timed: str) -> dict[str, list[Any]]:
    """Run the job of every arm `runs` times, ABBA."""
    results: dict[str, list[Any]] = {arm: [] for arm in jobs}
    for turn in range(runs):
        for arm in list(jobs) if turn % 2 == 0 else list(jobs)[::-1]:
            started = time.monotonic()
            results[arm].append(in_process(jobs[arm]))
            print(f"  {timed} run {turn + 1} {arm:<8} {time.monotonic() - started:.0f} s in all", file=sys.stderr)
    return results


def policy(options: argparse.Namespace, shape: str, vocabulary: int) -> str:
    model = dpo_work.model_directory(options.directory, shape, vocabulary)
    if not (model / "tokenizer.json").exists():
        train_arms.add_tokenizer(model)
    return str(model)


def hh_pairs(options: argparse.Namespace) -> list[dpo_work.Pair]:
    count = max((options.warm + steps) * pairs for steps, pairs in (options.small, options.large))
    file = dpo_work.pairs_file(options.directory, "hh", options.vocabulary, count)
    pairs = dpo_work.read_pairs(file)
    print(f"{file.stem}: {dpo_work.describe(pairs)}", flush=True)
    return pairs


def small_steps(options: argparse.Namespace) -> list[train_table.Row]:
    """Overhead and checkpoints share the arm `ray`, and steps that are short: what is not a step shows."""
    model, (steps, batch_pairs) = policy(options, options.shape, options.vocabulary), options.small
    pairs = hh_pairs(options)[: (options.warm + steps) * batch_pairs]
    job = Job(model, pairs, batch_pairs)
    jobs = {
        "bare": job,
        "ray": job._replace(workers=options.workers),
        "saves": job._replace(workers=options.workers, checkpoint_steps=options.save_every),
    }
    asked = {"ray", *(["bare"] if "overhead" in options.only else []), *(["saves"] if "checkpoints" in options.only else [])}
    runs = in_turn(options.runs, {arm: jobs[arm] for arm in jobs if arm in asked}, "small steps")
    show(f"{batch_pairs} pairs a step, {options.workers} worker(s) with 1 thread", runs, options.warm)
    rows = [train_table.overhead_row(runs, options.warm)] if "bare" in runs else []
    return [*rows, *(train_table.checkpoint_rows(runs, options.warm, options.save_every) if "saves" in runs else [])]


def scaling(options: argparse.Namespace) -> list[train_table.Row]:
    model, (steps, batch_pairs) = policy(options, options.shape, options.vocabulary), options.large
    job = Job(model, hh_pairs(options)[: (options.warm + steps) * batch_pairs], batch_pairs)
    jobs = {"threads": job._replace(workers=1, threads=2), "workers": job._replace(workers=2, threads=1)}
    runs = in_turn(options.runs, jobs, "scaling")
    show(f"{batch_pairs} pairs a step", runs, options.warm)
    return [train_table.scaling_row(runs, options.warm)]


def memory(options: argparse.Namespace) -> list[train_table.Row]:
    pairs = dpo_work.equal_pairs(options.vocabulary, MEMORY_TOKENS, MEMORY_STEPS * MEMORY_PAIRS)
    jobs = {
        f"{name} {shape}": Job(policy(options, shape, options.vocabulary), pairs, MEMORY_PAIRS, workers=n)
        for shape in options.memory_shapes
        for name, n in (("one", 1), ("two", 2))
    }
    runs = in_turn(1, jobs, "memory")
    show(f"{MEMORY_PAIRS} pairs of {3 * MEMORY_TOKENS} tokens a step", runs, 1)
    return train_table.memory_rows(runs, options.memory_shapes)


def show(title: str, runs: dict[str, list[Any]], warm: int) -> None:
    print("\n".join([f"{title}:", *(train_table.detail(arm, results, warm) for arm, results in runs.items())]), flush=True)


def conditions(options: argparse.Namespace) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "ray"))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    machine = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    small, large = options.small, options.large
    return (
        f"{machine}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}; Qwen2 {options.shape}, vocabulary "
        f"{options.vocabulary}, float32; {options.warm} steps of warm-up, then {small[0]} steps of {small[1]} pairs, "
        f"{options.workers} worker(s), for scaling {large[0]} of {large[1]}; memory of "
        f"Qwen2 {' and '.join(options.memory_shapes)}; {options.runs} runs of each arm, 1 for memory"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=BARS, choices=BARS)
    parser.add_argument("--runs", type=int, default=5, help="runs of each arm")
    steps = {"nargs": 2, "type": int, "metavar": ("STEPS", "PAIRS")}
    parser.add_argument("--small", **steps, default=[60, 8], help="timed steps and their pairs: overhead, checkpoints")
    parser.add_argument("--large", **steps, default=[16, 32], help="timed steps and their pairs: scaling")
    parser.add_argument("--warm", type=int, default=8, help="steps before these that are not timed")
    parser.add_argument("--save-every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--workers", type=int, default=1, help="with 1 thread each, of --only checkpoints")
    parser.add_argument("--shape", choices=list(dpo_work.SHAPES), default="tiny", help="of the policy")
    shapes = {"nargs": "+", "choices": list(dpo_work.SHAPES), "default": ["370m", "150m"]}
    parser.add_argument("--memory-shapes", **shapes, help="of the policies for memory; the bar is for the first")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "dpo-ray-benchmark")
    parser.add_argument("--force", action="store_true", help="start on a busy machine all the same")
    options = parser.parse_args()
    if not 0 < options.warm < options.save_every or options.small[0] % options.save_every:
        parser.error(
            f"--warm {options.warm}, --small {options.small[0]}, --save-every {options.save_every}: expected some steps of "
            "warm-up, fewer than lie between two checkpoints, and a whole number of checkpoints behind them"
        )
    if options.workers > 1 and "overhead" in options.only:
        parser.error(f"--workers {options.workers}: overhead compares one worker with one process; use --only checkpoints")
    if os.getloadavg()[0] > 0.3 and not options.force:
        parser.error(f"the load average of the last minute is {os.getloadavg()[0]:.2f}, above 0.3; wait, or --force")
    return options


def main() -> None:
    options = arguments()
    options.directory.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    load, started = os.getloadavg()[0], time.monotonic()
    rows: list[train_table.Row] = []
    for bars, measure in (({"overhead", "checkpoints"}, small_steps), ({"scaling"}, scaling), ({"memory"}, memory)):
        if bars & set(options.only):
            rows += measure(options)
    minutes = (time.monotonic() - started) / 60
    print(f"\n{train_table.markdown(rows)}\n\n{conditions(options)}; load average {load:.2f} at the start, ", end="")
    print(f"{os.getloadavg()[0]:.2f} at the end, {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
