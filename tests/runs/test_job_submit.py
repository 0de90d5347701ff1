"""One full round on real vLLM, Ray Data, Ray Train and FSDP2, submitted as a job to a cluster that `ray start --head` made."""

import json
import math
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from dpo_ray.flow.artifact import read_artifact
from dpo_ray.learn.policy import load_policy
from dpo_ray.pair_table import REFERENCE, ROWS, PairTable
from pipelines import full_round

from ..learn.tiny import naive_logps
from .conftest import ROOT, SECRETS, Cluster

PROMPTS, EVAL = 48, 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root with a space")


@pytest.fixture(scope="module")
def arguments(root: Path, tiny_policy: Path) -> list[str]:
    return [
        "pipelines/quickstart.yaml",
        *("--root", str(root)),
        *("--policy", str(tiny_policy)),
        *("--prompts.num_prompts", "256"),
        *("--prompts.eval_prompts", str(EVAL)),
        *("--prompts_per_round", str(PROMPTS)),
        *("--generate.sampling.max_new_tokens", "32"),
        *("--generate.sampler_logps", "true"),
        *("--generate.resources.rows_per_part", "16"),
        *("--evaluate.best_of", "2"),
        *("--pair.drop_length_cut", "false"),
        *("--train.global_batch_size", "16"),
    ]


@pytest.fixture(scope="module")
def run(cluster: Cluster, root: Path, arguments: list[str]) -> Path:
    done = cluster.submit(*arguments)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "win rate against the start" in done.stdout
    return root / "quickstart"


def manifest(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "_manifest.json").read_text())


def table(run: Path, stage: str) -> list[dict[str, Any]]:
    files = [f["path"] for f in manifest(run, stage)["files"] if f["path"].startswith("part-")]
    return [row for f in files for row in pq.read_table(run / stage / f).to_pylist()]


def test_round_submitted_every_stage_accounts_for_its_rows(run: Path) -> None:
    assert manifest(run, "round_00/generate")["rows_out"] == PROMPTS
    for stage in ("prompts", "round_00/generate", "round_00/score", "round_00/reference"):
        m = manifest(run, stage)
        assert m["rows_in"] == m["rows_out"] + sum(m["dropped"].values()), stage
    pairs = manifest(run, "round_00/pair")
    assert pairs["rows_in"] == len({r["prompt_id"] for r in table(run, "round_00/pair")}) + sum(pairs["dropped"].values())


def test_round_submitted_completions_are_distinct_samples_with_their_own_seeds(run: Path) -> None:
    rows = table(run, "round_00/generate")
    for row in rows:
        assert len({c["completion_id"] for c in row["completions"]}) == 4
        assert len({c["seed"] for c in row["completions"]}) == 4
        assert {c["finish_reason"] for c in row["completions"]} <= {"stop", "length"}
    texts = [c["text"] for row in rows for c in row["completions"]]
    assert len(set(texts)) > len(texts) / 2


def test_round_submitted_token_ids_travel_unchanged_from_the_engine_to_the_trainer(run: Path) -> None:
    sampled = {r["prompt_id"]: r for r in table(run, "round_00/generate")}
    committed = read_artifact(str(run / "round_00/reference"))
    assert committed is not None
    uris = [committed.uri(f) for f in committed.tables()]
    pairs = PairTable(uris, [*ROWS, *REFERENCE], committed.manifest.output_hash)
    for i, row in enumerate(table(run, "round_00/reference")):
        into_the_batch, source = pairs.fetch([i]), sampled[row["prompt_id"]]
        assert into_the_batch.pair_id == [row["pair_id"]]
        assert into_the_batch.prompt_token_ids == [source["prompt_token_ids"]]
        for (ids,) in (into_the_batch.chosen_token_ids, into_the_batch.rejected_token_ids):
            assert ids in [c["token_ids"] for c in source["completions"]]


def test_round_submitted_training_starts_at_ln_2(run: Path) -> None:
    metrics = [json.loads(line) for line in (run / "round_00/train/metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_round_submitted_engine_and_reference_agree_on_every_pair(run: Path) -> None:
    for row in table(run, "round_00/reference"):
        assert row["sampler_id"] == row["reference_id"]
        for side in ("chosen", "rejected"):
            assert row[f"{side}_sampler_logps"] == pytest.approx(row[f"ref_{side}_logps"], abs=1e-3)


def test_round_submitted_evaluation_compares_held_out_prompts(run: Path) -> None:
    metrics = json.loads((run / "round_00/evaluate/metrics.json").read_text())
    assert metrics["prompts"] >= EVAL
    assert metrics["win_rate_low"] <= metrics["win_rate"] <= metrics["win_rate_high"]
    held_out = {r["prompt_id"] for f in (run / "prompts").glob("eval-*") for r in pq.read_table(f).to_pylist()}
    assert held_out.isdisjoint(r["prompt_id"] for r in table(run, "round_00/generate"))


def test_round_submitted_evaluation_samples_each_policy_from_its_own_weights(run: Path, tiny_policy: Path) -> None:
    """By a plain float32 forward of the start and of the exported policy (at worst 2.1e-5 nats off, measured)."""
    directories = {"start": tiny_policy, "policy": run / "round_00/train/policy"}
    for role, directory in directories.items():
        model = load_policy(str(directory), dtype=torch.float32)
        rows = [r for f in (run / "round_00/evaluate/samples" / role).glob("part-*") for r in pq.read_table(f).to_pylist()]
        for row in rows[:8]:
            for c in row["completions"]:
                expected = naive_logps(model, row["prompt_token_ids"], c["token_ids"])
                assert c["sampler_logps_sum"] == pytest.approx(expected, abs=1e-3), role


def test_round_submitted_writes_no_secret_of_its_environment_anywhere(run: Path, cluster: Cluster) -> None:
    """Not into the run, not into Ray's logs, and not where the dashboard shows jobs, runtime environments and actors."""
    written = [p for below in (run, cluster.temp / "session_latest") for p in below.rglob("*") if p.is_file()]
    known = {"_manifest.json", "resolved.yaml", "gcs_server.out", "dashboard.log", "runtime_env_agent.log"}
    assert known <= {p.name for p in written}
    pages = {path: _dashboard(cluster, path) for path in ("/api/jobs/", "/nodes?view=summary", "/api/serve/applications/")}
    pages |= {f"/api/v0/{of}": _dashboard(cluster, f"/api/v0/{of}?detail=True") for of in ("actors", "tasks", "workers")}
    assert b"full_round.py" in pages["/api/jobs/"]
    assert b"EngineActor" in pages["/api/v0/actors"]
    texts = [(str(p), p.read_bytes()) for p in written] + list(pages.items())
    assert [(where, name) for where, text in texts for name, secret in SECRETS.items() if secret.encode() in text] == []


def _dashboard(cluster: Cluster, path: str) -> bytes:
    try:
        with urllib.request.urlopen(cluster.env["RAY_API_SERVER_ADDRESS"] + path, timeout=60) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        return error.read()


def test_round_submitted_again_skips_every_stage(
    run: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the same command in this process, which finds everything done by another and from another directory."""
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["full_round.py", *arguments])
    assert full_round.main() == 0
    assert capsys.readouterr().out.count("(done before)") == 8
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_round_submitted_with_a_relative_root_is_refused_with_the_reason(cluster: Cluster) -> None:
    done = cluster.submit("pipelines/quickstart.yaml", "--root", "runs/here", timeout=120)
    assert done.returncode == 1
    assert "root: got 'runs/here'; expected an absolute path or a URI, because Ray workers and submitted jobs" in done.stdout
    assert "Traceback" not in done.stdout
