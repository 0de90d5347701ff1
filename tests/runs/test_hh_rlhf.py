"""pipelines/hh_rlhf.yaml as a user without the hub runs it: 2,312 real comparisons, from the file to an evaluated policy."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from .conftest import ROOT

pytestmark = pytest.mark.slow
LOCAL = ("--preferences.data_dir", "null", "--preferences.source_split", "train")  # from the header of the YAML


class Done:
    """The finished run: what it printed, and where it lies."""

    def __init__(self, directory: Path, printed: str) -> None:
        self.directory, self.printed = directory, printed

    def manifest(self, stage: str) -> dict[str, Any]:
        return json.loads((self.directory / stage / "_manifest.json").read_text())

    def rows(self, stage: str, prefix: str, columns: list[str]) -> list[dict[str, Any]]:
        """Rows of the files of a stage's manifest whose path begins with `prefix`."""
        files = [f["path"] for f in self.manifest(stage)["files"] if f["path"].startswith(prefix)]
        return [r for f in files for r in pq.read_table(self.directory / stage / f, columns=columns).to_pylist()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Done:
    if "DPO_RAY_TEST_DATA" not in os.environ:
        pytest.skip("DPO_RAY_TEST_DATA names no directory with hh-rlhf/ (see tests/README.md)")
    source = Path(os.environ["DPO_RAY_TEST_DATA"]) / "hh-rlhf/harmless-base-test.jsonl.gz"
    root = tmp_path_factory.mktemp("root")
    local = ("--preferences.source", str(source), *LOCAL, "--root", str(root))
    command = [sys.executable, "pipelines/full_round.py", "pipelines/hh_rlhf.yaml", *local]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Done(root / "hh-rlhf", done.stdout)


def test_hh_rlhf_run_accounts_for_every_row_at_every_stage(run: Done) -> None:
    read = run.manifest("preferences")
    assert read["rows_in"] == 2312
    assert read["dropped"] == {"empty_completion": 4, "wrong_roles": 9}
    for stage in ("preferences", *(f"round_00/{s}" for s in ("pair", "reference", "train", "evaluate"))):
        m = run.manifest(stage)
        assert m["rows_in"] == m["rows_out"] + sum(m["dropped"].values()), stage
    into = [run.manifest(f"round_00/{s}")["rows_in"] for s in ("pair", "reference", "train", "evaluate")]
    out = [run.manifest(f"round_00/{s}")["rows_out"] for s in ("pair", "reference")]
    assert into == [read["metrics"]["train"], *out, read["metrics"]["eval"]]
    quarantined = run.rows("preferences", "quarantine/", ["location", "drop_reason"])
    assert len({q["location"] for q in quarantined}) == 13


def test_hh_rlhf_run_holds_out_whole_conversations(run: Done) -> None:
    train, held_out = ({r["opening"] for r in run.rows("preferences", prefix, ["opening"])} for prefix in ("train-", "eval-"))
    assert train.isdisjoint(held_out)
    trained = {r["pair_id"] for r in run.rows("round_00/reference", "part-", ["pair_id"])}
    compared = run.rows("round_00/evaluate", "compared/part-", ["pair_id", "opening"])
    assert trained.isdisjoint(r["pair_id"] for r in compared)
    assert {r["opening"] for r in compared} <= held_out


def test_hh_rlhf_run_trains_on_every_pair_and_prints_accuracy_with_its_interval(run: Done) -> None:
    train, metrics = run.manifest("round_00/train"), json.loads((run.directory / "round_00/evaluate/metrics.json").read_text())
    assert train["metrics"]["steps"] == -(-train["rows_in"] // 32)
    assert train["metrics"]["first_loss"] == pytest.approx(0.6931, abs=1e-3)
    accuracy, low, high = (metrics[f"eval_rewards/accuracies{suffix}"] for suffix in ("", "_low", "_high"))
    assert 0 <= low <= accuracy <= high <= 1
    assert metrics["eval_pairs"] == run.manifest("round_00/evaluate")["rows_out"] >= 240
    assert metrics["kl"] > 0
    assert f"implicit reward accuracy     {accuracy:.3f}  (95 % interval {low:.3f} to {high:.3f}" in run.printed
    assert "margin" in run.printed
    assert "KL to the reference" in run.printed


def test_hh_rlhf_run_ends_in_a_policy_that_transformers_loads(run: Done) -> None:
    policy = AutoModelForCausalLM.from_pretrained(run.directory / "round_00/train/policy")
    assert sum(p.numel() for p in policy.parameters()) > 1e6
