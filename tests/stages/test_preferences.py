import json

import pytest

from dpo_ray.config import PreferenceRun
from dpo_ray.errors import ConfigError, StageError
from dpo_ray.flow.artifact import read_table
from dpo_ray.stages import preferences

from ..artifacts import commit, context
from ..test_config import minimal_preferences


def config_of(source="pairs.jsonl", **fields):
    tree = minimal_preferences()
    block = tree["preferences"] | {"source": str(source), "eval_pairs": 3, "resources": {"rows_per_part": 4}}
    return PreferenceRun.model_validate(tree | {"preferences": block, "reference": "initial"} | fields)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "pairs.jsonl"
    rows = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return path


@pytest.fixture(scope="module")
def committed(local_ray, tmp_path_factory, source):
    directory = tmp_path_factory.mktemp("preferences")
    output = preferences.stage(config_of(source)).run(context(directory))
    return output, commit(directory, output.files)


def ids(artifact, parts):
    return [i for p in parts for s in p.slices for i in read_table(s.uri)["pair_id"].to_pylist()[s.start : s.stop]]


def everything(artifact, prefix):
    return [i for f in artifact.tables(prefix) for i in read_table(artifact.uri(f))["pair_id"].to_pylist()]


def test_preferences_stage_commits_train_eval_and_quarantine(committed):
    output, artifact = committed
    assert (output.rows_in, output.rows_out, output.dropped) == (21, 20, {"duplicate": 1})
    assert (len(everything(artifact, "train-")), len(everything(artifact, "eval-"))) == (17, 3)
    assert sum(f.rows for f in output.files if f.path.startswith("quarantine/")) == 1


def test_slice_of_round_is_all_pairs_or_disjoint_runs_of_the_permutation(committed, source):
    _, artifact = committed
    train = everything(artifact, "train-")
    assert ids(artifact, preferences.slice_of_round(artifact, config_of(source), 0)) == train
    config = config_of(source, pairs_per_round=6, rounds=2)
    slices = [ids(artifact, preferences.slice_of_round(artifact, config, r)) for r in range(2)]
    assert slices == [train[:6], train[6:12]]
    assert ids(artifact, preferences.held_out(artifact, config)) == everything(artifact, "eval-")


@pytest.mark.parametrize(("rounds", "per_round"), [(1, 18), (3, 6)])
def test_fewer_pairs_than_all_rounds_need_is_refused_in_the_first(committed, source, rounds, per_round):
    config = config_of(source, rounds=rounds, pairs_per_round=per_round)
    with pytest.raises(StageError, match=rf"need {rounds * per_round} pairs.* 17 for training"):
        preferences.slice_of_round(committed[1], config, 0)


@pytest.mark.usefixtures("local_ray")
def test_preferences_stage_error_inside_its_ray_task_comes_out_as_raised(tmp_path):
    with pytest.raises(ConfigError, match=r"preferences\.source"):
        preferences.stage(config_of("/no/such/pairs.jsonl")).run(context(tmp_path))
