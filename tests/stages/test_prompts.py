import json

import pytest

from dpo_ray.config import RunConfig
from dpo_ray.errors import ConfigError, StageError
from dpo_ray.flow.artifact import read_table
from dpo_ray.stages import prompts

from ..artifacts import commit, commit_tables, context
from ..test_config import minimal
from . import rows


def config_of(source="prompts.jsonl", per_round=4, **fields):
    block = {"source": str(source), "eval_prompts": 3, "resources": {"rows_per_part": 5}} | fields
    return RunConfig.model_validate(minimal() | {"prompts": block, "prompts_per_round": per_round})


def write_source(path, num):
    path.write_text("".join(json.dumps({"prompt": f"question {i}", "answer": i}) + "\n" for i in range(num)))
    return path


@pytest.mark.usefixtures("local_ray")
def test_prompts_stage_commits_train_eval_and_quarantine(tmp_path):
    source = write_source(tmp_path / "prompts.jsonl", 20)
    source.write_text(source.read_text() + json.dumps({"prompt": "question 3"}) + "\n")
    config = config_of(source)
    output = prompts.stage(config).run(context(tmp_path / "out"))
    artifact = commit(tmp_path / "out", output.files)
    of = {
        prefix: [r for f in artifact.tables(prefix) for r in read_table(artifact.uri(f)).to_pylist()]
        for prefix in ("train-", "eval-")
    }
    assert (len(of["train-"]), len(of["eval-"])) == (17, 3)
    assert (output.rows_in, output.rows_out, output.dropped) == (21, 20, {"duplicate": 1})
    assert len({r["prompt_id"] for rs in of.values() for r in rs}) == 20
    assert {r["split"] for r in of["eval-"]} == {"eval"}
    assert sum(f.rows for f in output.files if f.path.startswith("quarantine/")) == 1
    assert max(f.rows for f in output.files) <= 5


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("source", "error"), [("/no/such/prompts.jsonl", ConfigError), ("few.jsonl", StageError)])
def test_prompts_stage_error_inside_its_ray_task_comes_out_as_raised(tmp_path, source, error):
    write_source(tmp_path / "few.jsonl", 4)
    path = source if source.startswith("/") else tmp_path / source
    with pytest.raises(error) as raised:
        prompts.stage(config_of(path)).run(context(tmp_path / "out"))
    assert type(raised.value) is error
    assert str(raised.value).startswith("prompts")


def test_prompts_stage_notices_other_contents_of_its_source(tmp_path):
    source = write_source(tmp_path / "prompts.jsonl", 10)
    stage = prompts.stage(config_of(source))
    before = stage.external()
    assert stage.external() == before
    write_source(source, 11)
    assert stage.external() != before


@pytest.fixture
def artifact(tmp_path):
    """22 train prompts in files of 10, 10 and 2."""
    table = rows.prompts([rows.prompt_row(f"question {i}") for i in range(22)])
    return commit_tables(tmp_path / "prompts", [table.slice(at, 10) for at in (0, 10, 20)], prefix="train-")


def ids(artifact, parts):
    return [i for p in parts for s in p.slices for i in read_table(s.uri)["prompt_id"].to_pylist()[s.start : s.stop]]


def test_slice_of_round_rounds_are_disjoint_consecutive_runs_of_the_permutation(artifact):
    config = config_of(per_round=7)
    slices = [ids(artifact, prompts.slice_of_round(artifact, config, r)) for r in range(3)]
    everything = [i for f in artifact.tables("train-") for i in read_table(artifact.uri(f))["prompt_id"].to_pylist()]
    assert [len(s) for s in slices] == [7, 7, 7]
    assert [i for s in slices for i in s] == everything[:21]


@pytest.mark.parametrize(("per_round", "round_"), [(23, 0), (8, 2), (22, 1)])
def test_slice_of_round_beyond_the_source_is_a_stage_error_with_the_numbers(artifact, per_round, round_):
    with pytest.raises(StageError, match=rf"round {round_} needs prompts .* 22 "):
        prompts.slice_of_round(artifact, config_of(per_round=per_round), round_)


def test_held_out_is_every_eval_prompt(tmp_path):
    table = rows.prompts([rows.prompt_row(f"question {i}", split="eval") for i in range(7)])
    artifact = commit_tables(tmp_path, [table.slice(0, 4), table.slice(4)], prefix="eval-")
    assert ids(artifact, prompts.held_out(artifact, config_of())) == table["prompt_id"].to_pylist()
