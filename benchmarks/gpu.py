"""A 1B policy on one GPU: a round over HH-RLHF's comparisons through the pipeline, with prompts shared and without.

    python benchmarks/gpu.py --comparisons harmless-base/test.jsonl.gz [--steps 20] [--batch 64]

Each arm is `pipelines/full_round.py` on its own Ray and its own root: reference values, training by one worker, evaluation
of the held-out pairs. Tokens are those of prompt + chosen and of prompt + rejected without padding, as posed, in both arms.
The policy has random weights, since its speed does not depend on them. `--shape tiny --gpus 0` tries the script on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import dpo_work  # noqa: E402

VOCABULARY = 151_936
ARMS = {"shared": "auto", "separate": "never"}
LOGGED_EVERY = 5
"""Steps; the first reading is left out of the medians, it pays for kernels that are compiled."""


def policy(root: Path, shape: str) -> Path:
    """A random Qwen2 with the tokenizer of the quickstart's policy."""
    from dpo_ray.quickstart.policy import build_policy

    model, small = dpo_work.model_directory(root, shape, VOCABULARY), root / "small"
    if not small.exists():
        build_policy(small, seed=0, num_steps=1)
    for file in small.iterdir():
        if not (model / file.name).exists():
            (model / file.name).write_bytes(file.read_bytes())
    return model


def round_of(arm: str, options: argparse.Namespace, root: Path) -> Path:
    """Run the round of one arm, and return its directory."""
    gpus = options.gpus
    resources = f"{{cpus: 1, gpus: {gpus}}}"
    overrides = {
        "name": arm,
        "root": root / arm,
        "policy": policy(root, options.shape),
        "preferences.source": options.comparisons.resolve(),
        "preferences.data_dir": "null",
        "preferences.source_split": "train",
        "preferences.eval_pairs": options.batch,
        "pairs_per_round": options.steps * options.batch,
        "reference.resources": resources,
        "reference.max_batch_tokens": 32768,
        "train.resources": f"{{workers: 1, cpus: 1, gpus: {gpus}}}",
        "train.share_prompt": ARMS[arm],
        "train.dtype": "bfloat16",
        "train.global_batch_size": options.batch,
        "train.max_batch_tokens": 16384,
        "train.logging_steps": LOGGED_EVERY,
        "train.learning_rate": "1e-6",
        "evaluate.resources": resources,
    }
    command = [sys.executable, str(HERE.parent / "pipelines/full_round.py"), str(HERE.parent / "pipelines/hh_rlhf.yaml")]
    command += [part for name, value in overrides.items() for part in (f"--{name}", str(value))]
    subprocess.run(command, check=True, cwd=HERE.parent)
    return root / arm / arm / "round_00"


def measured(directory: Path) -> dict[str, Any]:
    """What one round's manifests and metrics say."""
    steps = [json.loads(line) for line in (directory / "train/metrics.jsonl").read_text().splitlines()]
    warm = steps[LOGGED_EVERY:] or steps
    evaluated = json.loads((directory / "evaluate/metrics.json").read_text())
    seconds = {
        name: json.loads((directory / name / "_manifest.json").read_text())["seconds"] for name in ("reference", "train")
    }
    return {
        "steps": len(steps),
        "tokens a step": statistics.mean(step["num_tokens"] for step in steps),
        "train, tokens/s": statistics.median(step["tokens_per_s"] for step in warm),
        "seconds a step": statistics.median(step["step_time_s"] for step in warm),
        "MFU": statistics.median(step["mfu"] for step in warm),
        "peak memory, GiB": max(step["peak_memory_gib"] for step in steps),
        "tokens saved": statistics.mean(step["tokens_saved"] for step in warm),
        "loss, first step": steps[0]["loss"],
        "loss, last step": steps[-1]["loss"],
        "reference stage, s": seconds["reference"],
        "train stage, s": seconds["train"],
        "accuracy, held out": evaluated.get("eval_rewards/accuracies", float("nan")),
    }


def device() -> str:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{name}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=Path, required=True, help="HH-RLHF's harmless-base/test.jsonl.gz")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="pairs of a step")
    parser.add_argument("--shape", choices=dpo_work.SHAPES, default="1b")
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = {arm: measured(round_of(arm, options, Path(directory))) for arm in options.arms}
    print(f"\n{device()}; {options.shape}, {options.batch} pairs a step")
    print(f"{'':<22}" + "".join(f"{arm:>12}" for arm in rows))
    for name in next(iter(rows.values())):
        print(f"{name:<22}" + "".join(f"{row[name]:>12,.4g}" for row in rows.values()))
    if len(rows) == len(ARMS):
        ratio = rows["shared"]["train, tokens/s"] / rows["separate"]["train, tokens/s"]
        print(f"shared over separate, tokens/s of training: {ratio:.2f}")


if __name__ == "__main__":
    main()
