import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import dpo_table
from benchmarks.dpo_table import Bar

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--force --runs 1 --steps 2 --parity-steps 3 --batch-pairs 2 --reference-pairs 4 --memory-vocabulary 4096"


def table_of(directory: Path, arguments: str) -> dict[str, dict[str, str]]:
    """Run the command; return the cells of its table by row and column."""
    command = [sys.executable, "benchmarks/dpo.py", *SMALL.split(), *arguments.split(), "--directory", str(directory)]
    environment = {key: value for key, value in os.environ.items() if key != "DPO_RAY_TEST_DATA"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line[2:-2].split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    header, _, *rows = lines
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def filled(row: dict[str, str]) -> set[str]:
    return {column for column, cell in row.items() if cell and column not in ("what", "ratios and bars")}


@pytest.mark.slow
def test_the_command_runs_every_arm_and_losses_agree(tmp_path):
    table = table_of(tmp_path, "--profiles hh --vocabularies 512")
    step, losses, reference, errors, memory = table.values()
    float32 = {"ours", "hand-written", "TRL tuned", "naive"}
    assert filled(step) == float32 | {"ours, bf16", "TRL tuned, bf16", "TRL as shipped"}
    assert filled(reference) == filled(errors) == float32 | {"ours, bf16", "TRL tuned, bf16"}
    assert filled(losses) == float32
    assert filled(memory) == {"ours", "TRL tuned", "naive"}
    assert losses["what"].endswith("3 steps")
    assert losses["ratios and bars"].count(": met") == errors["ratios and bars"].count(": met") == 2


@pytest.mark.slow
def test_the_arms_of_a_gpu_run_on_a_cpu(tmp_path):
    table = table_of(tmp_path, "--gpu-arms --profiles hh --vocabularies 512")
    step, reference, errors, memory = table.values()
    assert filled(step) == {"packed, prompts shared", "packed", "padded", "hand-written", "TRL tuned, bf16"}
    assert "of the matmul rate (>= 35%" in step["ratios and bars"]
    assert filled(reference) == filled(errors) == {"ours, bf16", "hand-written", "TRL tuned, bf16"}
    assert "NOT MET" not in errors["ratios and bars"]
    assert filled(memory) == {"packed, prompts shared", "padded", "TRL tuned, bf16", "naive"}


def runs_of(**seconds: list[float]) -> dict[str, list[dict]]:
    return {arm: [{"seconds": 2 * s, "count": 2, "flops": 8.0} for s in each] for arm, each in seconds.items()}


def test_a_bar_is_met_where_medians_and_fastest_runs_meet_it():
    runs = runs_of(trl=[9.0, 6.0, 7.0], ours=[2.0, 3.0, 2.1])
    assert dpo_table.speed_verdicts(runs, [Bar("trl", "ours", 3.0)]) == [
        "TRL tuned / ours 3.33x (fastest runs 3.00x, >= 3x: met)"
    ]
    (verdict,) = dpo_table.speed_verdicts(runs, [Bar("trl", "ours", 3.1)])
    assert verdict.endswith(">= 3.1x: NOT MET)")
    assert dpo_table.speed_verdicts(runs, [Bar("hand", "ours", 3.0)]) == []


def test_a_step_shows_the_share_of_the_matmul_rate_of_its_dtype():
    row = dpo_table.step_row("step", runs_of(ours=[2.0, 1.0, 4.0]), [], {"float32": 8.0, "bfloat16": 100.0}, gpu=False)
    assert row.cells == {"ours": "2.000 s (50%)"}
    row = dpo_table.step_row("step", runs_of(shared=[2.0, 1.0]), [], {"float32": 8.0, "bfloat16": 16.0}, gpu=True)
    assert row.verdicts == ["25% of the matmul rate (>= 35%: NOT MET)"]


def test_losses_are_compared_between_any_two_arms_over_all_steps():
    losses = {"ours": [0.693147, 0.5], "hand": [0.693147, 0.500008], "trl": [0.693147, 0.499992]}
    runs = {arm: [{"losses": each}] for arm, each in losses.items()}
    row = dpo_table.parity_row("losses", runs, list(losses))
    assert row.what == "losses, 2 steps"
    assert row.cells == {"ours": "-", "hand": "8.0e-06", "trl": "8.0e-06"}
    assert row.verdicts[0] == "of any two 1.6e-05 (<= 1e-05: NOT MET)"
    assert row.verdicts[1].endswith(": met)")


def test_errors_of_ours_have_the_bar_of_their_dtype():
    runs = {arm: [{"logps": [[-1.0, -2.0 - error]]}] for arm, error in {"ours": 0.004, "ours-bf16": 0.05, "trl": 0.5}.items()}
    row = dpo_table.error_row("error", runs, [[-1.0, -2.0]], gpu=False)
    assert row.cells == {"ours": "4.0e-03", "ours-bf16": "5.0e-02", "trl": "5.0e-01"}
    assert row.verdicts == ["ours, float32: 4.0e-03 (<= 0.002: NOT MET)", "ours, bf16: 5.0e-02 (<= 0.1: met)"]


def test_memory_is_compared_at_the_lowest_peak_of_each_arm():
    gib = dpo_table.GIB
    runs = {
        "ours": [{"above": 2 * gib, "total": 3 * gib}, {"above": gib, "total": 2 * gib}],
        "naive": [{"above": 4 * gib, "total": 5 * gib}],
    }
    row = dpo_table.memory_row("memory", runs, dpo_table.memory_bars(gpu=False))
    assert row.cells == {"ours": "1.00 GiB (total 2.00)", "naive": "4.00 GiB (total 5.00)"}
    assert row.verdicts == ["0.25 of naive (<= 0.3: met)"]


def test_the_table_leaves_out_arms_that_did_not_run():
    rows = [dpo_table.Row("step", {"trl": "2 s", "ours": "1 s"}, ["a", "b"]), dpo_table.Row("memory", {"naive": "3"}, [])]
    assert dpo_table.markdown(rows).splitlines() == [
        "| what | ours | TRL tuned | naive | ratios and bars |",
        "| --- | --- | --- | --- | --- |",
        "| step | 1 s | 2 s |  | a; b |",
        "| memory |  |  | 3 |  |",
    ]
