import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_command_measures_a_round_with_shared_and_with_separate_prompts(tmp_path):
    """On a CPU, which takes no other way through it."""
    row = "\n\nHuman: What is {0} and {0}?\n\nAssistant: {1}, I think."
    with gzip.open(tmp_path / "comparisons.jsonl.gz", "wt") as file:
        for i in range(24):
            file.write(json.dumps({"chosen": row.format(i, 2 * i), "rejected": row.format(i, 3 * i + 1)}) + "\n")
    options = ["--comparisons", str(tmp_path / "comparisons.jsonl.gz"), "--steps", "6", "--batch", "2"]
    command = [sys.executable, "benchmarks/gpu.py", *options, "--shape", "tiny", "--gpus", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, *lines, ratio = done.stdout[done.stdout.rindex("\nCPU, ") :].strip().splitlines()[1:]
    assert head.split() == ["shared", "separate"]
    table = {line[:22].strip(): [float(number) for number in line[22:].split()] for line in lines}
    assert table["steps"] == [6, 6]
    assert table["tokens a step"][0] == table["tokens a step"][1]
    assert table["loss, first step"] == pytest.approx([math.log(2)] * 2, abs=1e-3)
    assert table["tokens saved"][0] > 0 == table["tokens saved"][1]
    shared, separate = table["train, tokens/s"]
    assert float(ratio.rpartition(" ")[2]) == pytest.approx(shared / separate, abs=0.01)
