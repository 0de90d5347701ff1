"""pipelines/sft.yaml as a user runs it, on fewer chats: from an untrained model to one that writes what it was shown."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import ROOT

pytestmark = pytest.mark.slow
FEW = ("--conversations.num_conversations", "1100", "--conversations.eval_conversations", "100")


def fine_tune(root: Path, *arguments: str) -> str:
    command = [sys.executable, "pipelines/full_round.py", "pipelines/sft.yaml", "--root", str(root), *FEW, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("root")
    return root / "sft", fine_tune(root)


def test_sft_lowers_the_held_out_loss_from_that_of_random_weights(run: tuple[Path, str]) -> None:
    directory, printed = run
    metrics = json.loads((directory / "evaluate/metrics.json").read_text())
    assert metrics["eval_conversations"] == 100
    assert metrics["eval_loss_start"] > 7  # ln 2048 = 7.6 for an even guess
    assert metrics["eval_loss"] < 0.5 * metrics["eval_loss_start"]
    assert f"-> {metrics['eval_loss']:.4f} nats an assistant token" in printed
    assert f"{directory}/train/policy" in printed


def test_sft_learns_every_chat_once_an_epoch(run: tuple[Path, str]) -> None:
    lines = log(run[0])
    manifest = json.loads((run[0] / "tokenize/_manifest.json").read_text())
    assert manifest["rows_in"] == manifest["rows_out"] == 1000
    assert len(lines) == 63  # of 16
    assert sum(line["num_tokens"] for line in lines) == manifest["metrics"]["tokens"]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_sft_policy_is_what_a_round_can_start_from(run: tuple[Path, str]) -> None:
    policy = run[0] / "train/policy"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Review the film."}], add_generation_prompt=True, return_dict=False, return_tensors="pt"
    )
    assert torch.isfinite(model(ids).logits).all()


def test_sft_is_the_same_on_one_worker(run: tuple[Path, str], tmp_path: Path) -> None:
    """Two workers' first eight steps against one's, which round differently. Largest relative difference measured: 3e-7."""
    fine_tune(tmp_path, "--until", "train", "--train.resources", "{workers: 1, cpus: 2}")
    both = zip(log(run[0])[:8], log(tmp_path / "sft")[:8], strict=True)
    assert all(two["loss"] == pytest.approx(one["loss"], rel=1e-5) for two, one in both)


def test_sft_done_is_not_done_again(run: tuple[Path, str]) -> None:
    assert fine_tune(run[0].parent).count("(done before)") == 5
