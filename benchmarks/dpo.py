"""DPO steps, reference passes and their memory, against TRL 1.16, a hand-written loop and a naive one.

    python benchmarks/dpo.py [--what step reference memory] [--profiles hh long] [--vocabularies 8192 32000] [--runs 5]
    python benchmarks/dpo.py --device cuda          # one GPU: a 1B-class model in bf16, padded / packed / shared / TRL

Prints a table with the ratios, their bars and the parity of the losses. Every run is a process of its own, its threads
pinned; arms take turns, forwards and backwards, over the same pairs in the same order from the same weights. HH-RLHF is
found by $DPO_RAY_TEST_DATA, else lengths are drawn. The command refuses to start on a busy machine, where ratios mean
little.

To take 25 minutes on a CPU, the reference pass is measured on the first profile alone, and in its smallest vocabulary
alone the losses are compared over `--parity-steps` (elsewhere over the steps that are timed) and the arms without a bar
are run, once: naive, TRL in bf16, and TRL as shipped. `trl` is TRL tuned as `dpo_trl.py` says.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata, util
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import dpo_table  # noqa: E402
import dpo_work  # noqa: E402

WHAT = ("step", "reference", "memory")
ARMS = {
    "step": ["ours", "ours-bf16", "hand", "trl", "naive", "trl-bf16", "trl-default"],
    "reference": ["ours", "ours-bf16", "hand", "trl", "naive", "trl-bf16"],
    "memory": ["ours", "trl", "naive"],
}
GPU_ARMS = {
    "step": ["shared", "padded", "hand", "trl-bf16", "packed"],
    "reference": ["ours-bf16", "hand", "trl-bf16"],
    "memory": ["shared", "padded", "trl-bf16", "naive"],
}
ONCE = {"naive", "trl-bf16", "trl-default"}
EXACT_ARMS = ["ours", "hand", "trl", "naive"]
"""In float32: their losses are compared."""
EXACT_PAIRS = 64
"""Of a reference pass: so many are compared with float64."""


def in_process(job: Any) -> dict[str, Any]:
    """Run one job in a process of its own, forked from a server that has imported everything and computed nothing."""
    import dpo_child

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpo_child"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return pool.submit(dpo_child.measure, job).result()


def in_turn(what: str, runs: int, once: set[str], jobs: dict[str, Any]) -> dict[str, list[Any]]:
    """Run the job of every arm `runs` times, ABBA; those of `once` in the first turn alone."""
    results: dict[str, list[Any]] = {arm: [] for arm in jobs}
    for turn in range(runs):
        order = list(jobs) if turn % 2 == 0 else list(jobs)[::-1]
        for arm in [arm for arm in order if turn == 0 or arm not in once]:
            started = time.monotonic()
            job, end = jobs[arm], jobs[arm].timed[1] * jobs[arm].batch_pairs
            # Only the first runs go on behind the timed steps, for the parity of the losses.
            results[arm].append(in_process(job._replace(pairs=job.pairs[:end]) if turn and what == "step" else job))
            shown = ", ".join(f"{k} {v:,.2f}" for k, v in results[arm][-1].items() if k in ("seconds", "cpu", "above"))
            print(f"  {what} run {turn + 1} {arm:<12} {shown}; {time.monotonic() - started:.0f} s in all", file=sys.stderr)
    return results


def job_of(options: argparse.Namespace, what: str, arm: str = "", **fields: Any) -> Any:
    import dpo_arms

    own = {"device": options.device, "threads": options.threads, "batch_pairs": options.batch_pairs}
    return dpo_arms.Job(what, arm, **{**own, **fields})


def arms_of(options: argparse.Namespace, what: str) -> list[str]:
    without = () if util.find_spec("trl") else ("trl", "trl-bf16", "trl-default")
    return [arm for arm in options.arms_of[what] if arm in options.arms and arm not in without]


def prepared(options: argparse.Namespace, profile: str, vocabulary: int) -> tuple[str, list[dpo_work.Pair]]:
    """Return the model's directory and the pairs, of which all that are trained on have float64 reference values."""
    root = options.directory
    model = dpo_work.model_directory(root, options.shape, vocabulary)
    trained = max(options.steps, options.parity_steps) * options.batch_pairs
    count = max(trained, min(options.reference_pairs, EXACT_PAIRS))
    bare = dpo_work.pairs_file(root, profile, vocabulary, max(count, options.reference_pairs))
    file = root / f"{bare.stem}-{options.shape}-{count}-exact.json"
    if not file.exists():
        pairs = dpo_work.read_pairs(bare)
        logps = in_process(job_of(options, "reference", "exact", model=str(model), pairs=pairs[:count]))["logps"]
        known = [pair._replace(ref_chosen=c, ref_rejected=r) for pair, (c, r) in zip(pairs, logps, strict=False)]
        file.write_text(json.dumps([*known, *pairs[count:]]))
    pairs = dpo_work.read_pairs(file)
    print(f"\n{bare.stem}: {dpo_work.describe(pairs[: options.steps * options.batch_pairs])}", flush=True)
    return str(model), pairs


def step(options: argparse.Namespace, profile: str, vocabulary: int, rates: dict[str, float]) -> list[dpo_table.Row]:
    model, pairs = prepared(options, profile, vocabulary)
    main = (profile, vocabulary) == (options.profiles[0], min(options.vocabularies))
    jobs = {}
    for arm in arms_of(options, "step"):
        if main or options.gpu_arms or arm not in ONCE:
            steps = max(options.steps, options.parity_steps if main and arm in EXACT_ARMS else 0)
            timed, used = (options.warm, options.steps), pairs[: steps * options.batch_pairs]
            jobs[arm] = job_of(options, "step", arm, model=model, pairs=used, timed=timed)
    runs = in_turn("step", options.runs, set() if options.gpu_arms else ONCE, jobs)
    where = f"{profile}, vocabulary {vocabulary}"
    show(f"DPO step, {where}, seconds a step", runs)
    bars = dpo_table.step_bars(profile, vocabulary, options.gpu_arms)
    rows = [dpo_table.step_row(f"DPO step, {where}", runs, bars, rates, options.gpu_arms)]
    exact = [arm for arm in EXACT_ARMS if arm in runs and options.device == "cpu"]
    if len(exact) > 1:
        rows.append(dpo_table.parity_row(f"difference of its losses, {where}", runs, exact))
    return rows


def reference(options: argparse.Namespace, profile: str, vocabulary: int) -> list[dpo_table.Row]:
    model, pairs = prepared(options, profile, vocabulary)
    used = pairs[: options.reference_pairs]
    jobs = {arm: job_of(options, "reference", arm, model=model, pairs=used) for arm in arms_of(options, "reference")}
    runs = in_turn("reference", options.runs, set() if options.gpu_arms else ONCE, jobs)
    exact = [[pair.ref_chosen, pair.ref_rejected] for pair in used[:EXACT_PAIRS]]
    where = f"{profile}, vocabulary {vocabulary}"
    show(f"Reference pass, {where}, {len(used)} pairs, seconds a pair", runs)
    bars = dpo_table.reference_bars(options.gpu_arms)
    return [
        dpo_table.reference_row(f"reference pass of a pair, {where}", runs, bars),
        dpo_table.error_row(f"largest error of a log-probability, {where}", runs, exact, options.gpu_arms),
    ]


def show(title: str, runs: dict[str, list[Any]]) -> None:
    print("\n".join([f"{title}:", *(dpo_table.detail(arm, results) for arm, results in runs.items())]), flush=True)


def memory(options: argparse.Namespace) -> list[dpo_table.Row]:
    vocabulary = options.memory_vocabulary
    model = str(dpo_work.model_directory(options.directory, "tiny", vocabulary))
    work: dict[str, Any] = {"model": model, "pairs": dpo_work.memory_pairs(vocabulary), "batch_pairs": 2}
    jobs = {arm: job_of(options, "memory", arm, **work) for arm in arms_of(options, "memory")}
    runs = in_turn("memory", min(options.runs, 2), set(), jobs)
    what = f"peak memory of a step above weights, gradients and optimizer states, vocabulary {vocabulary}"
    return [dpo_table.memory_row(what, runs, dpo_table.memory_bars(options.gpu_arms))]


def conditions(options: argparse.Namespace) -> str:
    names = [name for name in ("torch", "transformers", "trl") if util.find_spec(name)]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    machine = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    if options.device == "cuda":
        import torch

        machine = f"{torch.cuda.get_device_name()}, {machine}"
    data = dpo_work.HH if (Path(os.environ.get("DPO_RAY_TEST_DATA", "/nowhere")) / dpo_work.HH).exists() else "not found: drawn"
    return (
        f"{machine}, {os.cpu_count()} cores, {options.threads} used; Python {platform.python_version()}, {versions}. "
        f"HH-RLHF: {data}. {options.shape} Qwen2, {options.batch_pairs} pairs a step, steps {options.warm + 1} to "
        f"{options.steps} timed, {options.reference_pairs} pairs a reference pass, medians of {options.runs} runs"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted({arm for arms in (ARMS, GPU_ARMS) for names in arms.values() for arm in names})
    parser.add_argument("--what", nargs="+", default=WHAT, choices=WHAT)
    parser.add_argument("--profiles", nargs="+", default=["hh", "long"], choices=list(dpo_work.PROFILES))
    parser.add_argument("--vocabularies", nargs="+", type=int, help="default 8192 32000; 151936 on a GPU")
    parser.add_argument("--arms", nargs="+", default=every, choices=every)
    parser.add_argument("--runs", type=int, default=5, help="runs of each arm")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warm", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--parity-steps", type=int, default=20, help="steps over which losses are compared")
    parser.add_argument("--batch-pairs", type=int, help="pairs of a step; default 8, 64 on a GPU")
    parser.add_argument("--reference-pairs", type=int, help="default 24, 512 on a GPU")
    parser.add_argument("--memory-vocabulary", type=int, default=131072)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(dpo_work.SHAPES), help="of the model; default tiny, 1b on a GPU")
    parser.add_argument("--gpu-arms", action="store_true", help="the arms of a GPU, to try them on a CPU")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "dpo-ray-benchmark")
    parser.add_argument("--force", action="store_true", help="start on a busy machine all the same")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    options.gpu_arms |= gpu
    options.vocabularies = options.vocabularies or ([151936] if gpu else [8192, 32000])
    options.batch_pairs = options.batch_pairs or (64 if gpu else 8)
    options.reference_pairs = options.reference_pairs or (512 if gpu else 24)
    options.shape = options.shape or ("1b" if gpu else "tiny")
    options.arms_of = GPU_ARMS if options.gpu_arms else ARMS
    options.parity_steps = 0 if options.gpu_arms else options.parity_steps  # bf16 has no parity to show
    if not 0 < options.warm < options.steps:
        parser.error(f"--warm {options.warm} of --steps {options.steps}: some are warm, some are timed")
    if options.batch_pairs > 8 and options.batch_pairs % 8:
        parser.error(f"--batch-pairs {options.batch_pairs}: expected up to 8, or a multiple of 8")
    if os.getloadavg()[0] > 0.3 and not options.force:
        parser.error(f"the load average of the last minute is {os.getloadavg()[0]:.2f}, above 0.3; wait, or --force")
    return options


def main() -> None:
    options = arguments()
    options.directory.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    load, started = os.getloadavg()[0], time.monotonic()
    print(conditions(options))
    rates = in_process(job_of(options, "matmul"))
    measured = ", ".join(f"{dtype} {rate / 1e9:,.0f}" for dtype, rate in rates.items())
    print(f"matmul, GFLOP/s: {measured}", flush=True)
    rows: list[dpo_table.Row] = []

    def add(more: list[dpo_table.Row]) -> None:
        rows.extend(more)
        print("\n".join(f"  {row.what}: {verdict}" for row in more for verdict in row.verdicts), flush=True)

    for profile in options.profiles:
        for vocabulary in options.vocabularies:
            if "step" in options.what:
                add(step(options, profile, vocabulary, rates))
            if "reference" in options.what and profile == options.profiles[0]:
                add(reference(options, profile, vocabulary))
    if "memory" in options.what:
        add(memory(options))
    minutes = (time.monotonic() - started) / 60
    print(f"\n{dpo_table.markdown(rows)}\n\n{conditions(options)}; load average {load:.2f} at the start, ", end="")
    print(f"{os.getloadavg()[0]:.2f} at the end, {minutes:.0f} minutes. Matrix products, GFLOP/s: {measured}; the percentages")
    print("are of these: 6 FLOPs for each weight and token that the arm runs, padding included, the head on completions alone.")


if __name__ == "__main__":
    main()
