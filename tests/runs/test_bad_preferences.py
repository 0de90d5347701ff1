"""What users get wrong in a file of preferences: the counterpart of test_bad_input.py, by the same command."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from dpo_ray.engines.policies import PolicyRef

from .command import Command, preference_round, write_jsonl

pytestmark = pytest.mark.usefixtures("idle_ray")


def good(num: int) -> list[dict[str, Any]]:
    return [{"prompt": f"w10 w{11 + i}", "chosen": f"w50 w{20 + i}", "rejected": f"w60 w{20 + i}"} for i in range(num)]


@pytest.fixture
def command(tmp_path: Path, policy: PolicyRef, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    write_jsonl(tmp_path / "pairs.jsonl", good(40))
    return Command(tmp_path, preference_round(tmp_path, policy.path), monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (("--preferences.prompt_colum", "question"), ["preferences.prompt_colum", "unknown field", "--help"]),
        (("--preferences.data_dir", "main"), ["preferences", "data_dir would be ignored", "datasets:"]),
        (("--generate.engine", "hf"), ["generate would be ignored", "preferences"]),
        (("--preferences.kind", "trl"), ["preferences", "trl", "explicit", "hh_rlhf"]),
        (("--rounds", "2", "--reference", "initial"), ["rounds=2 needs pairs_per_round"]),
    ],
)
def test_preference_option_that_cannot_be_meant_is_refused(
    command: Command, arguments: tuple[str, ...], facts: list[str]
) -> None:
    err = command.refused(*arguments)
    assert [f for f in facts if f not in err] == []


def test_preference_source_that_is_not_there_stops_before_anything_runs(command: Command) -> None:
    err = command.refused("--preferences.source", str(command.directory / "pair.jsonl"))
    assert "preferences.source: " in err
    assert "pair.jsonl' names no file (working directory" in err
    assert command.nothing_ran()


def test_preference_source_without_a_mapped_column_names_those_there(command: Command) -> None:
    err = command.refused("--preferences.rejected_column", "worse")
    assert "no column 'worse', which preferences.rejected_column names" in err
    assert "['chosen', 'prompt', 'rejected']" in err
    assert "never guessed" in err
    assert command.nothing_ran("preferences")


def test_preference_transcripts_without_their_columns_say_so(command: Command) -> None:
    write_jsonl(command.directory / "pairs.jsonl", [{"prompt": "w10", "chosen": "w11"}] * 4)
    command.tree["preferences"]["kind"] = "hh_rlhf"
    err = command.refused()
    assert "no column 'rejected', which preferences.kind hh_rlhf names" in err
    assert "['chosen', 'prompt']" in err


def test_preference_source_of_another_kind_is_unusable_by_reason(command: Command) -> None:
    command.tree["preferences"]["kind"] = "hh_rlhf"
    err = command.refused(kind="StageError")
    assert "40 of 40 rows" in err
    assert "{'no_transcript': 40}" in err
    assert "pairs.jsonl:1 (no_transcript): " in err


def test_preference_empty_file_and_empty_split_have_no_rows(command: Command) -> None:
    write_jsonl(command.directory / "empty.jsonl", [])
    err = command.refused("--preferences.source", str(command.directory / "empty.jsonl"), kind="StageError")
    assert "empty.jsonl' has no rows; name a file or split that has some" in err
    full, empty = datasets.Dataset.from_list(good(4)), datasets.Dataset.from_list(good(4)).select([])
    for name, split in {"test": empty, "dev": full}.items():
        datasets.DatasetDict({"train": full, name: split}).save_to_disk(str(command.directory / name))
    source = f"datasets:{command.directory}/"
    err = command.refused("--preferences.source", f"{source}test", "--preferences.source_split", "test")
    assert "has a split without rows" in err
    err = command.refused("--preferences.source", f"{source}dev", "--preferences.source_split", "validation")
    assert "has no split 'validation'; it has ['train', 'dev']" in err


def test_preference_pairs_too_few_for_all_rounds_stop_before_the_first(command: Command) -> None:
    rounds = ("--rounds", "4", "--pairs_per_round", "12", "--reference", "initial")
    err = command.refused(*rounds, kind="StageError")
    assert "rounds=4 with pairs_per_round=12 need 48 pairs, but the source has 36 for training after 4 were held out" in err
    assert "lower pairs_per_round or rounds" in err
    assert command.nothing_ran("round_00/pair")


def test_preference_pairs_too_few_to_hold_out_say_so(command: Command) -> None:
    err = command.refused("--preferences.eval_pairs", "30", kind="StageError")
    assert "eval_pairs=30 would hold out 30 of 40 usable pairs" in err
    assert "lower preferences.eval_pairs" in err


UNUSABLE: list[tuple[dict[str, Any] | str, str]] = [
    ('{"prompt": "w10", "chosen": "cut', "malformed_json"),
    ({"prompt": None, "chosen": "w11", "rejected": "w12"}, "null_prompt"),
    ({"prompt": " ", "chosen": "w11", "rejected": "w12"}, "empty_prompt"),
    ({"prompt": [{"role": "assistant", "content": "w10"}], "chosen": "w11", "rejected": "w12"}, "wrong_roles"),
    ({"prompt": "w10", "chosen": [{"role": "user", "content": "w11"}], "rejected": "w12"}, "wrong_roles"),
    ({"prompt": "w10", "chosen": None, "rejected": "w12"}, "null_completion"),
    ({"prompt": "w10", "chosen": "", "rejected": "w12"}, "empty_completion"),
    ({"prompt": "w10", "chosen": "w11", "rejected": " \n"}, "empty_completion"),
    ({"prompt": "w10", "chosen": "w11", "rejected": "w11"}, "identical"),
    (good(1)[0], "duplicate"),
]
LATER: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "w7 " * 30, "chosen": "w11", "rejected": "w12"}, "prompt_too_long"),
    ({"prompt": "w9", "chosen": "w11 " * 40, "rejected": "w12"}, "completion_too_long"),
    ({"prompt": "w8", "chosen": "w11  w12", "rejected": "w11 w12"}, "identical"),  # only once tokenised
    ({"prompt": "w6", "chosen": "w11 <eos> user", "rejected": "w12"}, "turn_token_in_text"),
]
"""Found by the round's tokenisation."""


def test_preference_rows_that_cannot_be_used_are_quarantined_by_reason_and_the_run_goes_on(command: Command) -> None:
    rows = [*good(30), *(row for row, _ in UNUSABLE), *(row for row, _ in LATER)]
    write_jsonl(command.directory / "pairs.jsonl", rows)
    shares = ("--preferences.max_dropped", "0.3", "--preferences.eval_pairs", "1", "--preferences.split_by", "prompt")
    assert command(*shares, "--until", "pair")[0] == 0

    read = command.manifest("preferences")
    assert read["rows_in"] == 44 == read["rows_out"] + sum(read["dropped"].values())
    assert read["dropped"] == {r: [x for _, x in UNUSABLE].count(r) for _, r in UNUSABLE}
    (file,) = (f["path"] for f in read["files"] if f["path"].startswith("quarantine/"))
    places = {r["location"]: r["drop_reason"] for r in pq.read_table(command.run_directory / "preferences" / file).to_pylist()}
    source = command.directory / "pairs.jsonl"
    assert places == {f"{source}:{31 + i}": reason for i, (_, reason) in enumerate(UNUSABLE)}

    pair = command.manifest("round_00/pair")
    assert pair["rows_in"] == read["metrics"]["train"] == pair["rows_out"] + sum(pair["dropped"].values())
    held_out = json.dumps([f for f in read["files"] if f["path"].startswith("eval-")])
    assert sum(pair["dropped"].values()) >= len(LATER) - 1, f"at most one of them is held out: {held_out}"
    assert pair["dropped"].items() <= {reason: 1 for _, reason in LATER}.items()


def test_preference_rows_above_the_share_fail_with_counts_and_the_first(command: Command) -> None:
    write_jsonl(command.directory / "pairs.jsonl", [*good(18), *(row for row, _ in UNUSABLE[:2])])
    share = ("--until", "preferences", "--preferences.max_dropped")
    err = command.refused(*share, "0.09", kind="StageError")
    assert "2 of 20 rows" in err
    assert "{'malformed_json': 1, 'null_prompt': 1}" in err
    assert "pairs.jsonl:19 (malformed_json)" in err
    assert "raise preferences.max_dropped (now 0.09)" in err
    assert command(*share, "0.1")[0] == 0


def test_preference_pairs_too_long_above_the_share_fail_where_they_are_tokenised(command: Command) -> None:
    err = command.refused("--preferences.max_prompt_tokens", "3", kind="StageError")
    assert "pair: 36 of 36 rows dropped (prompt_too_long 36)" in err
    assert "quarantine/" in err
    assert command.nothing_ran("round_00/pair")


def test_preference_policy_that_lacks_a_chat_template_is_refused(command: Command) -> None:
    policy = Path(command.tree["policy"])
    bare = command.directory / "bare"
    bare.mkdir()
    for file in policy.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    err = command.refused("--policy", str(bare))
    assert f"policy {bare} has no chat template; put the one it was tuned with there as chat_template.jinja" in err
    assert command.nothing_ran()
