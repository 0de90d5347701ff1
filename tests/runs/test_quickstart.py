"""The quickstart as a user runs it, without a cluster, and the numbers that make it a real learning problem."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


def full_round(root: Path, *arguments: str, timeout: float = 900) -> str:
    command = [sys.executable, "pipelines/full_round.py", "pipelines/quickstart.yaml", "--root", str(root), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def metrics(root: Path, round_: int = 0) -> dict[str, Any]:
    return json.loads((root / f"quickstart/round_{round_:02d}/evaluate/metrics.json").read_text())


@pytest.fixture(scope="module")
def first(root: Path) -> dict[str, Any]:
    full_round(root)
    return metrics(root)


def test_quickstart_start_is_a_real_learning_problem(first: dict[str, Any]) -> None:
    assert first["prompts"] >= 256
    assert 0.3 <= first["mean_score_start"] <= 0.7
    assert first["distinct_start"] >= 0.9
    assert first["best_of_16_start"] > first["mean_score_start"] + 0.1


def test_quickstart_round_wins_without_degenerating(first: dict[str, Any]) -> None:
    assert first["win_rate"] >= 0.65
    assert first["win_rate_low"] > 0.5
    assert first["kl"] <= 20
    assert math.isfinite(first["kl_se"])
    assert first["distinct_2"] >= 0.8 * first["distinct_2_start"]
    assert first["cut_by_length"] <= first["cut_by_length_start"] + 0.05


def test_quickstart_second_round_extends_a_finished_run(root: Path, first: dict[str, Any]) -> None:
    done = {p: p.stat().st_mtime_ns for p in (root / "quickstart/round_00").rglob("*") if p.is_file()}
    full_round(root, "--rounds", "2")
    assert {p: p.stat().st_mtime_ns for p in done} == done
    second = metrics(root, 1)
    assert second["win_rate_initial"] >= 0.65
    of = {r: json.loads((root / f"quickstart/round_0{r}/generate/_manifest.json").read_text()) for r in (0, 1)}
    trained = json.loads((root / "quickstart/round_00/train/_manifest.json").read_text())
    assert of[1]["identity"]["inputs"]["policy"] == trained["metrics"]["identity"] != of[0]["identity"]["inputs"]["policy"]


def test_quickstart_deterministic_generation_gives_the_same_bytes(root: Path, first: dict[str, Any]) -> None:
    def content(name: str) -> list[str]:
        how = ("--name", name, "--generate.deterministic", "true", "--prompts_per_round", "192", "--until", "generate")
        full_round(root, *how)
        directory = root / name / "round_00/generate"
        files = [f["path"] for f in json.loads((directory / "_manifest.json").read_text())["files"]]
        return [hashlib.sha256((directory / f).read_bytes()).hexdigest() for f in files]

    assert content("once") == content("again")
