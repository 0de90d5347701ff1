"""Ctrl-C and kill -9 at every point: the same command completes, and the result is that of an undisturbed run.

The policies are tiny and sample with transformers, seeded sample by sample, so an undisturbed run has the same
completions. Each command is a process of its own; a kill costs a start of Ray, so the kills of a grid are carried out one
after another on one run, which completes at the end.
"""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from dpo_ray.engines.policies import PolicyRef
from pipelines import full_round

from ..waiting import wait_until
from .command import write_jsonl
from .conftest import ROOT, Cluster

POINTS = ("start", "middle", "commit")
ONE_STEP = {"policy", "prompts", "preferences"}
"""Stages that commit no rows before their end: they have no middle."""
KEYS = {"generate": "prompt_id", "score": "prompt_id", "pair": "pair_id", "reference": "pair_id"}
SAMPLED = ["policy", "prompts", *(f"round_00/{s}" for s in ("generate", "score", "pair", "reference", "train", "evaluate"))]
ON_PREFERENCES = ["preferences", *(f"round_00/{s}" for s in ("pair", "reference", "train", "evaluate"))]

Kill = tuple[str, str, str, str]
"""Stage, point, signal, victim: see killed_round.py."""
PROCESSES = {
    ("round_00/generate", "EngineActor"): ("start", "middle", "commit"),
    ("round_00/score", "_RewardModelActor"): ("start", "middle"),
    ("round_00/reference", "LogpsActor"): ("start", "middle"),
    ("round_00/train", "RayTrainWorker"): ("start", "middle"),
    ("round_00/evaluate", "EngineActor"): ("start", "middle"),
    ("round_00/evaluate", "_RewardModelActor"): ("start", "middle"),
    ("round_00/evaluate", "LogpsActor"): ("start",),
}
"""At which points a stage has a process to lose for sure. Before its commit a stage gives back its own, which may still be
about to end and then is killed too; the engine alone outlives a stage. The log-probabilities of evaluate's few samples
are one part, so they have no middle."""
PROCESSES_ON_PREFERENCES = {
    ("round_00/reference", "LogpsActor"): ("start", "middle"),
    ("round_00/train", "RayTrainWorker"): ("start", "middle"),
    ("round_00/evaluate", "_CompareActor"): ("start", "middle"),
}


class Runs(NamedTuple):
    """A configuration, and the commands on it."""

    config: Path
    env: dict[str, str]
    left: Callable[[], list[str]]
    """Processes of these commands that still live."""

    def start(self, script: str, *arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script, *arguments, str(self.config), "--root", str(root)]
        return subprocess.run(
            command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=400, start_new_session=True
        )

    def complete(self, root: Path, *arguments: str) -> None:
        done = self.start("pipelines/full_round.py", *arguments, root=root)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def kill(self, kills: Sequence[Kill], root: Path) -> tuple[subprocess.CompletedProcess[str], list[Kill]]:
        """Run the command with these kills on the way: how it ended, and which of the kills happened, in order."""
        log = root / f"kills-{uuid.uuid4().hex}.jsonl"
        log.touch()
        wanted = ",".join(" ".join(kill) for kill in kills)
        done = self.start("tests/runs/killed_round.py", wanted, str(log), root=root)
        return done, [tuple(json.loads(line)) for line in log.read_text().splitlines()]

    def kill_driver(self, stage: str, point: str, signal: str, root: Path) -> subprocess.CompletedProcess[str]:
        """Kill the driver: it must have happened, ended the command without a traceback, and left nothing running."""
        kill = (stage, point, signal, "driver")
        done, happened = self.kill([kill], root)
        assert happened == [kill], done.stderr[-1000:]
        assert done.returncode == (-9 if signal == "SIGKILL" else 130), (kill, done.stderr[-1000:])
        assert "Traceback" not in done.stderr, (kill, done.stderr)
        assert signal != "SIGINT" or "interrupted" in done.stderr, (kill, done.stderr)
        # After Ctrl-C the driver ends its Ray; after SIGKILL Ray's own processes have to notice that it is gone.
        self.wait_until_none_left(30 if signal == "SIGINT" else 120)
        assert not (root / "run" / stage / "_manifest.json").exists(), kill
        return done

    def wait_until_none_left(self, timeout_s: float) -> None:
        try:
            wait_until(lambda: self.left() == [], timeout_s)
        except TimeoutError as error:
            raise AssertionError(f"still running after {timeout_s:g} s: {self.left()}") from error


def marked(config: Path) -> Runs:
    """Commands that start a local Ray each; a variable of their environment shows every process of theirs."""
    marker = uuid.uuid4().hex

    def left() -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("DPO_RAY_KILLED") == marker and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
            except psutil.Error:
                continue
        return found

    return Runs(config, {**os.environ, "DPO_RAY_KILLED": marker}, left)


def on_cluster(config: Path, cluster: Cluster) -> Runs:
    """Commands that share a cluster, which outlives them: its workers must have none of their actors left."""
    names = ("EngineActor", "Companion", "LogpsActor", "_CompareActor", "RayTrainWorker", "TrainController", "_Board")

    def left() -> list[str]:
        return [title for title in cluster.processes() if any(name in title for name in names)]

    return Runs(config, cluster.env, left)


TRAIN = {
    "beta": 0.1,
    "learning_rate": 1e-3,
    "dtype": "float32",
    "epochs": 12,
    "global_batch_size": 4,
    "checkpoint_steps": 10,
    "logging_steps": 3,
    "resources": {"workers": 2, "cpus": 0.5},
}
SMALL = {"rows_per_part": 8}


def write_config(directory: Path, policy: PolicyRef, tree: Mapping[str, Any]) -> Path:
    common = {"name": "run", "root": "/overridden", "policy": policy.path, "reference": {"resources": SMALL}, "train": TRAIN}
    (directory / "run.yaml").write_text(yaml.safe_dump({**common, **tree}))
    return directory / "run.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, policy: PolicyRef, make_reward_model: Callable[..., str]) -> Runs:
    directory = tmp_path_factory.mktemp("kills")
    source = write_jsonl(directory / "prompts.jsonl", [{"prompt": f"w10 w{11 + i}"} for i in range(40)])
    tree = {
        "prompts_per_round": 24,
        "prompts": {"source": str(source), "eval_prompts": 12},
        "generate": {
            "engine": "hf",
            "max_prompt_tokens": 20,
            "dtype": "float32",
            "sampling": {"max_new_tokens": 8},
            "resources": {**SMALL, "parts_in_flight": 1},
        },
        "score": {"kind": "reward_model", "model": make_reward_model(), "dtype": "float32", "resources": SMALL},
        "pair": {"drop_length_cut": False, "resources": {**SMALL, "cpus": 0.5}},
        "evaluate": {"resources": SMALL},
    }
    return marked(write_config(directory, policy, tree))


@pytest.fixture(scope="module")
def preference_config(tmp_path_factory: pytest.TempPathFactory, policy: PolicyRef) -> Path:
    directory = tmp_path_factory.mktemp("kills")
    rows = [{"prompt": f"w10 w{11 + i}", "chosen": f"w50 w{20 + i}", "rejected": f"w60 w{30 + i}"} for i in range(32)]
    source = write_jsonl(directory / "pairs.jsonl", rows)
    tree = {
        "preferences": {"kind": "explicit", "source": str(source), "eval_pairs": 8, "resources": SMALL},
        "evaluate": {"resources": {"rows_per_part": 4}},
    }
    return write_config(directory, policy, tree)


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    runs.complete(root)
    return root / "run"


@pytest.fixture(scope="module")
def undisturbed_on_preferences(preference_config: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    on_cluster(preference_config, cluster).complete(root)
    return root / "run"


def rows(run: Path, stage: str) -> list[dict[str, Any]]:
    directory = run / "round_00" / stage
    files = json.loads((directory / "_manifest.json").read_text())["files"]
    return [r for f in files if f["path"].startswith("part-") for r in pq.read_table(directory / f["path"]).to_pylist()]


def assert_same(run: Path, other: Path) -> None:
    """The tables have the same ids, each once, and the same contents; training took the same steps to the same weights."""
    for stage, key in KEYS.items():
        if not (other / "round_00" / stage).exists():  # a round on preferences samples nothing
            continue
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
    assert metrics[0].keys() == metrics[1].keys()
    for count in ("prompts", "eval_pairs"):
        assert metrics[0].get(count) == metrics[1].get(count)


def committed(run: Path) -> dict[Path, tuple[int, bytes]]:
    """Every commit on disk: of stages, and of parts."""
    files = [*run.rglob("_manifest.json"), *run.rglob("_parts/*.json")]
    return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


def kill_the_driver_everywhere(runs: Runs, stages: Sequence[str], signal: str, root: Path) -> None:
    """Kill the driver at every point of the stages, one command after another, and then complete the run.

    What was committed before a kill must not be computed again.
    """
    before: dict[Path, tuple[int, bytes]] = {}
    for stage in stages:
        for point in POINTS:
            if point == "middle" and stage in ONE_STEP:
                continue
            runs.kill_driver(stage, point, signal, root)
            before |= committed(root / "run")
    runs.complete(root)
    after = committed(root / "run")
    assert {f: after[f] for f in before} == before


def kill_processes_everywhere(runs: Runs, processes: Mapping[tuple[str, str], Sequence[str]], root: Path) -> None:
    """One command that loses every process at every point where there is one, and completes all the same."""
    asked = [(stage, point, "SIGKILL", victim) for stage, victim in processes for point in POINTS]
    wanted = [(stage, point, "SIGKILL", victim) for (stage, victim), points in processes.items() for point in points]
    done, happened = runs.kill(asked, root)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert set(wanted) <= set(happened)
    assert len(happened) == len(set(happened))
    runs.wait_until_none_left(30)


def test_round_killed_while_it_generates_has_every_prompt_once(
    runs: Runs, idle_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts a local Ray, of which nothing must be left, and goes on in this process, on the session's."""
    runs.kill_driver("round_00/generate", "middle", "SIGKILL", tmp_path)
    before = committed(tmp_path / "run")
    assert any("_parts" in file.parts for file in before)

    command = ["full_round.py", str(runs.config), "--root", str(tmp_path), "--until", "generate"]
    monkeypatch.setattr(sys, "argv", command)
    assert full_round.main() == 0
    after = committed(tmp_path / "run")
    assert {f: after[f] for f in before} == before, "what was committed is not computed again"
    prompts = [row["prompt_id"] for row in rows(tmp_path / "run", "generate")]
    assert len(prompts) == len(set(prompts)) == 24
    samples = [c["completion_id"] for row in rows(tmp_path / "run", "generate") for c in row["completions"]]
    assert len(samples) == len(set(samples)) == 48


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGINT"])
def test_round_whose_driver_dies_at_every_point_ends_as_if_undisturbed(
    runs: Runs, undisturbed: Path, tmp_path: Path, signal: str
) -> None:
    kill_the_driver_everywhere(runs, SAMPLED, signal, tmp_path)
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_round_that_loses_every_process_at_every_point_ends_as_if_undisturbed(
    runs: Runs, undisturbed: Path, tmp_path: Path
) -> None:
    kill_processes_everywhere(runs, PROCESSES, tmp_path)
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGINT"])
def test_round_on_preferences_whose_driver_dies_on_a_cluster_ends_as_if_undisturbed(
    preference_config: Path, cluster: Cluster, undisturbed_on_preferences: Path, tmp_path: Path, signal: str
) -> None:
    """The cluster lives on, so that what the dead driver held must be given back by it."""
    kill_the_driver_everywhere(on_cluster(preference_config, cluster), ON_PREFERENCES, signal, tmp_path)
    assert_same(tmp_path / "run", undisturbed_on_preferences)


@pytest.mark.slow
def test_round_on_preferences_that_loses_every_process_ends_as_if_undisturbed(
    preference_config: Path, undisturbed_on_preferences: Path, tmp_path: Path
) -> None:
    kill_processes_everywhere(marked(preference_config), PROCESSES_ON_PREFERENCES, tmp_path)
    assert_same(tmp_path / "run", undisturbed_on_preferences)
