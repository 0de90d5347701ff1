"""What users get wrong: each ends in one message that says what, where and what to do, before expensive work.

The command runs in this process, on the session's Ray. What the configuration alone can show is in test_config.py.
"""

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow.parquet as pq
import pytest

from dpo_ray.engines.policies import PolicyRef

from ..waiting import wait_until
from .command import Command, sampled_round, write_jsonl
from .conftest import ROOT

pytestmark = pytest.mark.usefixtures("idle_ray")
SCORERS = """
def score(rows):
    return [float(len(r["completion"])) for r in rows]

def short(rows):
    return [1.0]

def nan(rows):
    return [float("nan") for r in rows]

def fussy(rows):
    if any(r["prompt"][-1]["content"] == "w10 w20" for r in rows):
        raise ValueError("not this one")
    return [float(len(r["completion"])) for r in rows]
"""


@pytest.fixture
def command(tmp_path: Path, policy: PolicyRef, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    (tmp_path / "scorers.py").write_text(SCORERS)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"w10 w{11 + i}"} for i in range(40)])
    return Command(tmp_path, sampled_round(tmp_path, policy.path), monkeypatch, capsys)


# The configuration


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (("--train.bta", "1"), ["train.bta", "unknown field", "--help"]),
        (("--prompts.subset", "main"), ["prompts", "subset would be ignored", "datasets:"]),
        (("--generate.deterministic", "true"), ["generate", "deterministic would be ignored", "vllm"]),
        (("--root", "runs/here"), ["root", "'runs/here'", "absolute path or a URI", "submitted jobs"]),
        (("--rounds", "2"), ["rounds=2 needs `reference", "initial | previous"]),
    ],
)
def test_option_that_cannot_be_meant_is_refused(command: Command, arguments: tuple[str, ...], facts: list[str]) -> None:
    err = command.refused(*arguments)
    assert [f for f in facts if f not in err] == []


@pytest.mark.parametrize(("block", "field"), [(None, "policy"), (None, "prompts"), ("train", "beta")])
def test_missing_decision_is_named(command: Command, block: str | None, field: str) -> None:
    del (command.tree[block] if block else command.tree)[field]
    assert f"{block + '.' if block else ''}{field}: missing" in command.refused()


# The policy


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (["tokenizer.json", "tokenizer_config.json"], "has no tokenizer"),
        (["chat_template.jinja"], "has no chat template"),
        (["model.safetensors"], "has no weights"),
        (["config.json"], "has no config.json"),
    ],
)
def test_policy_directory_that_lacks_a_file_is_refused(command: Command, lost: list[str], message: str) -> None:
    policy = command.directory / "policy"
    shutil.copytree(command.tree["policy"], policy)
    for name in lost:
        (policy / name).unlink()
    err = command.refused("--policy", str(policy))
    assert f"policy {policy} {message}" in err
    assert command.nothing_ran()


# The prompts


def test_source_without_the_mapped_column_names_those_there(command: Command) -> None:
    err = command.refused("--prompts.prompt_column", "question")
    assert "no column 'question'" in err
    assert "['prompt']" in err
    assert "prompts.prompt_column" in err
    assert command.nothing_ran("prompts")


def test_empty_file_and_empty_split_have_no_rows(command: Command) -> None:
    (command.directory / "empty.jsonl").write_text("")
    err = command.refused("--prompts.source", str(command.directory / "empty.jsonl"), kind="StageError")
    assert "empty.jsonl' has no rows" in err
    full, empty = datasets.Dataset.from_list([{"prompt": "w10"}]), datasets.Dataset.from_dict({"prompt": []})
    for name, split in {"test": empty, "dev": full}.items():
        datasets.DatasetDict({"train": full, name: split}).save_to_disk(str(command.directory / name))
    source = f"datasets:{command.directory}/"
    err = command.refused("--prompts.source", f"{source}test", "--prompts.source_split", "test")
    assert "has a split without rows" in err
    err = command.refused("--prompts.source", f"{source}dev", "--prompts.source_split", "validation")
    assert "has no split 'validation'; it has ['train', 'dev']" in err


def test_fewer_prompts_than_all_rounds_need_stop_before_the_first_round(command: Command) -> None:
    err = command.refused("--rounds", "4", "--reference", "initial", kind="StageError")
    assert "round 3 needs prompts 36 to 48, but the source has 36 for training after 4 were held out" in err
    assert command.nothing_ran("round_00/generate")


# The scorer


@pytest.mark.parametrize(
    ("function", "facts"),
    [
        ("nowhere.py:score", ["'nowhere.py' does not import", "no such file"]),
        ("no.such.module:score", ["'no.such.module' does not import", "ModuleNotFoundError"]),
        ("{}/scorers.py:points", ["has no function 'points'", "'score'"]),
        ("scorers.py", ["path/to/file.py:name"]),
    ],
)
def test_scorer_that_does_not_import_stops_before_anything_is_sampled(
    command: Command, function: str, facts: list[str]
) -> None:
    err = command.refused("--score.function", function.format(command.directory))
    assert [f for f in [*facts, "score.function"] if f not in err] == []
    assert command.nothing_ran()


def test_scorer_that_returns_what_it_must_not_is_an_error_of_its_stage(command: Command) -> None:
    assert command("--until", "generate")[0] == 0
    wrong = {"short": ["1 scores for", "one a row"], "nan": ["has the score nan", "of prompt", "score.drop_non_finite"]}
    for name, facts in wrong.items():
        function = f"{command.directory}/scorers.py:{name}"
        err = command.refused("--score.function", function, "--until", "score", kind="StageError")
        assert [f for f in facts if f not in err] == [], name
        assert command.nothing_ran("round_00/score")


# The cluster


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (("--train.resources.workers", "8"), ["round_00/train needs 8 train worker x 1 CPU", "only 4 fit"]),
        (("--generate.resources.cpus", "64"), ["round_00/generate needs 1 engine x 64 CPU", "only 0 fit"]),
        (("--generate.resources.gpus", "1"), ["round_00/generate needs 1 engine x 1 CPU + 1 GPU", "0 GPU"]),
        (("--reference.resources.cpus", "4"), ["round_00/reference", "0.25 CPU for the tasks", "only 0 CPU would be left"]),
    ],
)
def test_more_than_the_cluster_has_says_what_is_missing(command: Command, arguments: tuple[str, ...], facts: list[str]) -> None:
    err = command.refused(*arguments, kind="ResourceError")
    assert [f for f in facts if f not in err] == []
    assert command.nothing_ran()


def test_root_that_cannot_be_written_says_so(command: Command) -> None:
    err = command.refused("--root", str(command.directory / "prompts.jsonl/below"), kind="ResourceError")
    assert "prompts.jsonl/below cannot be written" in err


def test_root_that_other_processes_do_not_see_says_which_node(command: Command) -> None:
    """fsspec keeps memory:// in each process: a stand-in for a disk that only the driver's machine has."""
    err = command.refused("--root", "memory://run", kind="ResourceError")
    assert "is not seen by node" in err
    assert "shared storage" in err


def test_second_driver_on_a_run_is_refused_with_the_first_ones_place(command: Command) -> None:
    """The first is another process, frozen at its second stage; it goes on unharmed."""
    frozen, log = "prompts start SIGSTOP driver", command.directory / "kills.jsonl"
    script = [sys.executable, "tests/runs/killed_round.py", frozen, str(log), str(command.write()), "--until", "prompts"]
    # On a Ray of its own: where the checkout's path has a space, workers for a driver that joins another do not start.
    first = subprocess.Popen(script, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED, timeout_s=60)
        resolved = (command.run_directory / "resolved.yaml").read_text()
        err = command.refused("--train.beta", "0.2", kind="ResourceError")
        assert f"is being run by process {first.pid} on {socket.gethostname()}" in err
        assert "give this run another `name`" in err
        assert command.nothing_ran("prompts")
        assert (command.run_directory / "resolved.yaml").read_text() == resolved
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0
    assert not command.nothing_ran("prompts")


# Changed settings, and bad rows


def test_changed_config_of_a_committed_stage_names_the_fields_and_the_ways_out(command: Command) -> None:
    assert command("--until", "prompts")[0] == 0
    err = command.refused("--until", "prompts", "--prompts.eval_prompts", "5", kind="StaleArtifactError")
    assert "config.eval_prompts: 4 -> 5" in err
    assert "--redo prompts" in err
    assert "`name`" in err


def test_bad_rows_are_quarantined_by_reason_and_counted(command: Command) -> None:
    bad: list[dict[str, Any] | str] = [
        {"prompt": None},
        {"prompt": ""},
        {"prompt": [{"role": "assistant", "content": "w10"}]},
        '{"prompt": "cut',
    ]
    good = [{"prompt": f"w10 w{11 + i}"} for i in range(12)]
    write_jsonl(command.directory / "prompts.jsonl", [*bad, *good, {"prompt": "w7 " * 30}])
    arguments = ("--prompts.max_dropped", "0.3", "--prompts.eval_prompts", "1", "--prompts.split_by", "prompt")
    arguments += ("--generate.max_dropped", "0.5", "--score.max_dropped", "0.5", "--until", "score")
    assert command(*arguments, "--score.function", f"{command.directory}/scorers.py:fussy")[0] == 0

    prompts = command.manifest("prompts")
    assert prompts["dropped"] == {"null_prompt": 1, "empty_prompt": 1, "wrong_roles": 1, "malformed_json": 1}
    assert prompts["rows_in"] == prompts["rows_out"] + 4 == 17
    (file,) = (f["path"] for f in prompts["files"] if f["path"].startswith("quarantine/"))
    places = {r["location"]: r["drop_reason"] for r in pq.read_table(command.run_directory / "prompts" / file).to_pylist()}
    assert places[f"{command.directory}/prompts.jsonl:4"] == "malformed_json"

    generate, score = command.manifest("round_00/generate"), command.manifest("round_00/score")
    assert generate["rows_in"] == 12 == generate["rows_out"] + sum(generate["dropped"].values())
    assert generate["dropped"] == {"prompt_too_long": 1}
    assert score["metrics"]["dropped_completions/scorer_error"] == 2  # both completions of one prompt
    assert score["metrics"]["completions"] == 20


def test_bad_rows_above_the_share_fail_with_counts_and_the_first(command: Command) -> None:
    write_jsonl(command.directory / "prompts.jsonl", [{"prompt": None}, *({"prompt": f"w10 w{11 + i}"} for i in range(20))])
    err = command.refused("--prompts.max_dropped", "0.04", "--until", "prompts", kind="StageError")
    assert "1 of 21 rows" in err
    assert "'null_prompt': 1" in err
    assert "prompts.jsonl:1" in err
    assert "prompts.max_dropped" in err
