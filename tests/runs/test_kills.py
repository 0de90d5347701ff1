"""Ctrl-C and kill -9 at every point: the same command completes, and the result is that of an undisturbed run.

Each command starts a local Ray of its own. The policy is tiny and samples with transformers, seeded sample by sample, so
an undisturbed run has the same completions.
"""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from dpo_ray.engines.policies import PolicyRef

from ..waiting import wait_until
from .conftest import ROOT

KEYS = {"generate": "prompt_id", "score": "prompt_id", "pair": "pair_id", "reference": "pair_id"}
POINTS = ("start", "middle", "commit")
SCORER = """
def score(rows):
    return [float(sum(r["completion"].encode()) % 97) for r in rows]
"""


class Runs(NamedTuple):
    """A configuration, and the commands on it."""

    config: Path
    marker: str
    """Value of an environment variable that every process of these commands inherits."""

    def start(self, script: str, *arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "DPO_RAY_KILLED": self.marker}
        command = [sys.executable, script, *arguments, str(self.config), "--root", str(root)]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, start_new_session=True)

    def complete(self, root: Path, *arguments: str) -> None:
        done = self.start("pipelines/full_round.py", *arguments, root=root)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def kill(self, stage: str, point: str, signal: str, victim: str, root: Path) -> subprocess.CompletedProcess[str]:
        return self.start("tests/runs/killed_round.py", stage, point, signal, victim, root=root)

    def assert_nothing_left(self) -> None:
        wait_until(lambda: self.left() == [], timeout_s=30)

    def left(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("DPO_RAY_KILLED") == self.marker and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, policy: PolicyRef) -> Runs:
    directory = tmp_path_factory.mktemp("kills")
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w10 w{11 + i}"}) + "\n" for i in range(40)))
    (directory / "scorer.py").write_text(SCORER)
    small = {"rows_per_part": 8}
    tree = {
        "name": "run",
        "root": "/overridden",
        "policy": policy.path,
        "prompts_per_round": 24,
        "prompts": {"source": str(directory / "prompts.jsonl"), "eval_prompts": 12},
        "generate": {
            "engine": "hf",
            "max_prompt_tokens": 20,
            "dtype": "float32",
            "sampling": {"max_new_tokens": 8},
            "resources": {**small, "parts_in_flight": 1},
        },
        "score": {
            "kind": "function",
            "function": f"{directory}/scorer.py:score",
            "resources": {**small, "cpus": 0.5},
            "drop_non_finite": True,
        },
        "pair": {"drop_length_cut": False, "resources": {**small, "cpus": 0.5}},
        "reference": {"resources": small},
        "train": {
            "beta": 0.1,
            "learning_rate": 1e-3,
            "dtype": "float32",
            "epochs": 12,
            "global_batch_size": 4,
            "checkpoint_steps": 10,
            "resources": {"workers": 2, "cpus": 0.5},
        },
        "evaluate": {"resources": small},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(tree))
    return Runs(directory / "run.yaml", uuid.uuid4().hex)


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    runs.complete(root)
    return root / "run"


def rows(run: Path, stage: str) -> list[dict[str, Any]]:
    directory = run / "round_00" / stage
    files = json.loads((directory / "_manifest.json").read_text())["files"]
    return [r for f in files if f["path"].startswith("part-") for r in pq.read_table(directory / f["path"]).to_pylist()]


def assert_same(run: Path, other: Path) -> None:
    """The tables have the same ids, each once, and the same contents; training took the same steps to the same weights."""
    for stage, key in KEYS.items():
        found, wanted = ({r[key]: r for r in rows(where, stage)} for where in (run, other))
        assert len(found) == len(rows(run, stage)), stage
        assert found.keys() == wanted.keys(), stage
    assert rows(run, "pair") == rows(other, "pair")
    logs = [
        [json.loads(line)["loss"] for line in (where / "round_00/train/metrics.jsonl").read_text().splitlines()]
        for where in (run, other)
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    weights = [load_file(where / "round_00/train/policy/model.safetensors") for where in (run, other)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-5)
    metrics = [json.loads((where / "round_00/evaluate/metrics.json").read_text()) for where in (run, other)]
    assert metrics[0]["prompts"] == metrics[1]["prompts"]


def committed(run: Path) -> dict[Path, tuple[int, bytes]]:
    """Every commit on disk: of stages, and of parts."""
    files = [*run.rglob("_manifest.json"), *run.rglob("_parts/*.json")]
    return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


def test_round_interrupted_and_killed_while_it_generates_has_every_prompt_once(runs: Runs, tmp_path: Path) -> None:
    generate = tmp_path / "run/round_00/generate"

    done = runs.kill("round_00/generate", "middle", "SIGINT", "driver", tmp_path)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    runs.assert_nothing_left()
    assert not (generate / "_manifest.json").exists()
    assert list((generate / "_parts").iterdir())
    before = committed(tmp_path / "run")

    done = runs.kill("round_00/generate", "commit", "SIGKILL", "driver", tmp_path)
    assert done.returncode == -9
    runs.assert_nothing_left()
    assert not (generate / "_manifest.json").exists()
    before |= committed(tmp_path / "run")

    runs.complete(tmp_path, "--until", "generate")
    after = committed(tmp_path / "run")
    assert {f: after[f] for f in before} == before, "what was committed is not computed again"
    prompts = [row["prompt_id"] for row in rows(tmp_path / "run", "generate")]
    assert len(prompts) == len(set(prompts)) == 24
    samples = [c["completion_id"] for row in rows(tmp_path / "run", "generate") for c in row["completions"]]
    assert len(samples) == len(set(samples)) == 48


STAGES = ["policy", "prompts", *(f"round_00/{s}" for s in ("generate", "score", "pair", "reference", "train", "evaluate"))]
ONE_STEP = {"policy", "prompts"}  # no rows are committed before their end


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGINT"])
def test_round_whose_driver_dies_at_every_point_ends_as_if_undisturbed(
    runs: Runs, undisturbed: Path, tmp_path: Path, signal: str
) -> None:
    before: dict[Path, tuple[int, bytes]] = {}
    for stage in STAGES:
        for point in POINTS:
            if point == "middle" and stage in ONE_STEP:
                continue
            done = runs.kill(stage, point, signal, "driver", tmp_path)
            assert done.returncode == (-9 if signal == "SIGKILL" else 130), (stage, point, done.stderr[-1000:])
            runs.assert_nothing_left()
            assert not (tmp_path / "run" / stage / "_manifest.json").exists(), (stage, point)
            before |= committed(tmp_path / "run")
    runs.complete(tmp_path)
    after = committed(tmp_path / "run")
    assert {f: after[f] for f in before} == before
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(
    ("stage", "victim"),
    [
        ("round_00/generate", "EngineActor"),
        ("round_00/reference", "_LogpsActor"),
        ("round_00/train", "RayTrainWorker"),
        ("round_00/evaluate", "EngineActor"),
    ],
)
def test_round_that_loses_a_process_at_any_point_ends_as_if_undisturbed(
    runs: Runs, undisturbed: Path, tmp_path: Path, stage: str, victim: str, point: str
) -> None:
    done = runs.kill(stage, point, "SIGKILL", victim, tmp_path)
    if done.returncode != 0:
        assert f"no {victim} was there" in done.stderr or "Traceback" not in done.stderr
        runs.complete(tmp_path)
    runs.assert_nothing_left()
    assert_same(tmp_path / "run", undisturbed)
