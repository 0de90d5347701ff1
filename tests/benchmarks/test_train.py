import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import train_arms, train_table
from benchmarks.dpo_work import equal_pairs, model_directory

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--force --runs 1 --small 2 2 --large 2 2 --warm 1 --save-every 2 --vocabulary 512"
GIB = train_table.GIB


@pytest.mark.slow
def test_the_command_measures_stages_and_loops_with_equal_losses(tmp_path):
    """Without memory, which takes four more starts of Ray and no other way."""
    environment = {key: value for key, value in os.environ.items() if key != "DPO_RAY_TEST_DATA"}
    only = ["--only", "overhead", "checkpoints", "scaling", "--directory", str(tmp_path)]
    command = [sys.executable, "benchmarks/train.py", *SMALL.split(), *only]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, _, *rows = [line[2:-2].split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].split()[0] for row in rows] == ["Ray", "a", "the", "2"]
    assert all("losses within" in row[1] for row in rows), rows


@pytest.fixture
def as_before(monkeypatch, one_thread):
    """What the loop sets for its whole process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def test_the_bare_loop_starts_at_a_flat_reference_and_says_when_each_step_ended(tmp_path, as_before):
    model = model_directory(tmp_path, "tiny", 64)
    result = train_arms.run(train_arms.Job(str(model), equal_pairs(64, 8, 4), 2), str(tmp_path / "run"))
    assert result["losses"] == pytest.approx([math.log(2)] * 2, abs=0.2)
    assert result["losses"][0] != result["losses"][1]
    assert result["tokens"] == [2 * 4 * 8] * 2
    assert result["clocks"][0] < result["clocks"][1]
    assert result["peaks"][0] > 16 * 4 * 1_000_000  # weights, gradients and states of 4M parameters


def run_of(*steps: float, start: float = 5.0, losses: tuple[float, ...] = (), **more):
    clocks = [start]
    for each in steps:
        clocks.append(clocks[-1] + each)
    return {"clocks": clocks, "losses": losses or (0.7,) * len(clocks), "tokens": [100] * len(clocks), **more}


def test_times_are_the_median_of_the_runs_and_the_fastest_of_each_step():
    runs = [run_of(9.0, 1.0, 2.0), run_of(9.0, 2.0, 1.0, start=0.0), run_of(9.0, 3.0, 3.0)]
    assert train_table.seconds(runs, 2) == (3.0, 2.0)


def test_overhead_is_judged_by_the_worse_of_both_ratios():
    bare = [run_of(9.0, 1.0, 1.0), run_of(9.0, 1.0, 1.0)]
    ray = [run_of(9.0, 1.02, 1.02), run_of(9.0, 1.02, 1.02)]
    row = train_table.overhead_row({"bare": bare, "ray": ray}, 2)
    assert row.figures == "1.020 s a step, bare 1.000 s: +2.0% (quietest runs +2.0%); losses within 0.0e+00"
    assert row.verdict == "<= 3%: met"
    ray[0] = run_of(9.0, 1.02, 1.08)
    assert train_table.overhead_row({"bare": bare, "ray": ray}, 2).verdict == "<= 3%: NOT MET"


def test_scaling_compares_tokens_a_second():
    runs = {"threads": [run_of(9.0, 1.8, 1.8)], "workers": [run_of(9.0, 2.0, 2.0)]}
    row = train_table.scaling_row(runs, 2)
    assert row.figures.startswith("50 and 56 tokens/s: 0.900 (quietest runs 0.900)")
    assert row.verdict == ">= 0.9: met"
    runs["workers"] = [run_of(9.0, 2.0, 2.1)]
    assert train_table.scaling_row(runs, 2).verdict == ">= 0.9: NOT MET"


def test_a_stall_is_what_a_save_adds_between_two_steps():
    """Steps of 1 s; 0.1 s between any two, and 0.5 s where the second, fourth and sixth have just been saved."""
    pauses = {2: 0.5, 4: 0.7, 6: 0.6}
    steps = [1.0 + pauses.get(step, 0.1) for step in range(1, 8)]
    saves = run_of(*steps, step_s=[1.0] * 8)
    assert train_table.stall(saves, 2, 2) == pytest.approx(0.5)
    never = run_of(*[1.1] * 7)
    whole, wait = train_table.checkpoint_rows({"ray": [never], "saves": [saves]}, 2, 2)
    assert "+22.7%" in whole.figures
    assert whole.verdict == "<= 5%: NOT MET"
    assert "500 ms a save: 18.52%" in wait.figures


def test_memory_is_that_of_the_worse_worker():
    one = {"peaks": [4 * GIB], "step_peak": 2 * GIB, "losses": (0.7,)}
    two = {"peaks": [2 * GIB, int(2.6 * GIB)], "step_peak": GIB, "losses": (0.7,)}
    runs = {"one 1b": [one], "two 1b": [two], "one tiny": [one], "two tiny": [one]}
    large, small = train_table.memory_rows(runs, ["1b", "tiny"])
    assert large.figures.startswith("2.60 and 4.00 GiB (before the last save 1.00 and 2.00): 0.650")
    assert large.verdict == "<= 0.65: met"
    assert small.figures.startswith("4.00 and 4.00 GiB (before the last save 2.00 and 2.00): 1.000")
    assert small.verdict == "-"
    two["peaks"][1] += GIB
    assert train_table.memory_rows(runs, ["1b", "tiny"])[0].verdict == "<= 0.65: NOT MET"


def test_nothing_is_compared_where_losses_differ():
    ray = run_of(9.0, 1.0, losses=(0.7, 0.7, 0.70002))
    row = train_table.overhead_row({"bare": [run_of(9.0, 1.0)], "ray": [ray]}, 2)
    assert row.figures == "losses differ by 2.0e-05"
    assert row.verdict.endswith("NOT MET")
