"""Warm generation through the stage (Ray Data parts, engine actor, commits) against bare `vllm.LLM.generate`.

    python benchmarks/generate.py --policy DIR [--prompts 2048] [--runs 2]

All arms sample the same prompts with the same seeds and number of threads, each in processes of its own, in turn and then
in reverse. Prints tokens/s of every run and the ratios; the project's bar is 0.9 of bare over at least 60 s a run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

K, MAX_NEW, MAX_PROMPT, THREADS, WARM_UP = 2, 96, 128, 1, 1024
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": MAX_NEW}


def bare(policy: str, num_prompts: int) -> dict[str, float]:
    """One `LLM.generate` call over all prompts, in this process."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM, SamplingParams, TokensPrompt

    from dpo_ray.learn.tokens import load_tokenizer, render_prompt
    from dpo_ray.schemas import prompt_id, sample_seed

    llm = LLM(
        model=policy,
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_PROMPT + MAX_NEW,
        seed=0,
        generation_config="vllm",
        enable_chunked_prefill=False,
    )
    tokenizer = load_tokenizer(policy)
    messages = messages_of(num_prompts)
    prompts = [TokensPrompt(prompt_token_ids=render_prompt(tokenizer, m)) for m in messages]
    params = [
        SamplingParams(n=K, seed=sample_seed(0, 0, prompt_id(m)), temperature=1.0, top_p=1.0, max_tokens=MAX_NEW)
        for m in messages
    ]
    llm.generate(prompts[:WARM_UP], params[:WARM_UP], use_tqdm=False)
    started = time.perf_counter()
    outputs = llm.generate(prompts[WARM_UP:], params[WARM_UP:], use_tqdm=False)
    seconds = time.perf_counter() - started
    return {"tokens": sum(len(o.token_ids) for r in outputs for o in r.outputs), "seconds": seconds}


def stage(policy: str, num_prompts: int, closed: bool = False) -> dict[str, float]:
    """The generate stage over committed parts, on an engine actor that is warm; `closed` is `deterministic: true`."""
    import ray

    from dpo_ray.config import Generate, Sampling
    from dpo_ray.engines.policies import PolicyRef
    from dpo_ray.engines.pool import EnginePool
    from dpo_ray.engines.requests import EngineSettings
    from dpo_ray.flow import cluster
    from dpo_ray.flow.part_commits import Part, Slice
    from dpo_ray.flow.parts import run_parts
    from dpo_ray.flow.progress import Progress
    from dpo_ray.flow.stage import StageContext
    from dpo_ray.stages.generate import GRAIN, count_completions, generate, tasks

    os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": 2 * THREADS})  # the engine's threads, and data tasks beside it
    cluster.connect()
    block = Generate(dtype="float32", sampling=Sampling(**SAMPLING), max_prompt_tokens=MAX_PROMPT)
    settings = EngineSettings(
        "vllm", "float32", MAX_PROMPT + MAX_NEW, {}, 1, 0, THREADS, block.resources.parts_in_flight, closed
    )
    ref = PolicyRef(policy, "bench")
    with tempfile.TemporaryDirectory() as directory, open(os.devnull, "w") as quiet:
        table = prompt_table(num_prompts)
        import pyarrow.parquet as pq

        pq.write_table(table, f"{directory}/prompts.parquet")
        engine = EnginePool(settings, ref, 1, 1)

        def run(start: int, stop: int, name: str) -> dict[str, Any]:
            size = block.resources.rows_per_part
            cuts = [(at, min(at + size, stop)) for at in range(start, stop, size)]
            parts = [Part(f"part-{i:05d}", (Slice(f"{directory}/prompts.parquet", *c),)) for i, c in enumerate(cuts)]
            context = StageContext(f"{directory}/{name}", name, {}, engine, lambda: None, Progress(quiet))
            output = run_parts(
                lambda ds: generate(ds, engine, ref, block, block.sampling, 0, 0, K),
                parts,
                context,
                GRAIN,
                stage="generate",
                ends=tasks(engine, block),
                count=count_completions,
            )
            return dict(output.metrics)

        run(0, WARM_UP, "warm-up")
        started = time.perf_counter()
        metrics = run(WARM_UP, num_prompts, "timed")
        seconds = time.perf_counter() - started
        engine.close()
    ray.shutdown()
    return {"tokens": metrics["tokens"], "seconds": seconds}


def messages_of(num_prompts: int) -> list[list[dict[str, str]]]:
    from dpo_ray.quickstart.reviews import prompts

    return [row["messages"] for row in prompts(num_prompts, 0)]


def prompt_table(num_prompts: int) -> Any:
    import pyarrow as pa

    from dpo_ray.schemas import PROMPTS, prompt_id

    rows = [{"prompt_id": prompt_id(m), "prompt": m, "split": "train"} for m in messages_of(num_prompts)]
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="directory of a policy, e.g. ~/dpo-ray/policies/quickstart-...")
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=2, help="runs of each arm")
    parser.add_argument("--arm", choices=["bare", "stage", "closed"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        arm = {"bare": bare, "stage": stage, "closed": functools.partial(stage, closed=True)}[arguments.arm]
        result = arm(arguments.policy, arguments.prompts)
        print("RESULT " + json.dumps(result))
        return
    rates: dict[str, list[float]] = {"bare": [], "stage": [], "closed": []}
    arms = list(rates)
    order = [arm for run in range(arguments.runs) for arm in (arms if run % 2 == 0 else reversed(arms))]
    for arm in order:
        command = [sys.executable, __file__, "--policy", arguments.policy, "--prompts", str(arguments.prompts), "--arm", arm]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": str(THREADS)}
        )
        result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
        rates[arm].append(result["tokens"] / result["seconds"])
        print(
            f"{arm:<6} {result['tokens']:>9,.0f} tokens  {result['seconds']:6.1f} s  {rates[arm][-1]:8,.0f} tokens/s",
            flush=True,
        )
    medians = {arm: statistics.median(values) for arm, values in rates.items()}
    print(f"stage / bare:   {medians['stage'] / medians['bare']:.3f} (medians)")
    print(f"closed / stage: {medians['closed'] / medians['stage']:.3f} (medians; `deterministic: true`)")


if __name__ == "__main__":
    main()
