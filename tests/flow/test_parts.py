import json
import os
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
import ray.data
from ray.exceptions import ActorUnavailableError, RayTaskError

from dpo_ray.errors import ConfigError, SchemaError, StageError
from dpo_ray.flow import parts
from dpo_ray.flow.part_commits import DROP_REASON, PART, Grain, Part, Slice
from dpo_ray.flow.parts import Actors, Tasks, map_parts, mark_dropped, run_parts, split_into_parts

from ..artifacts import commit_tables, context, kept, quarantined
from ..conftest import LABELS

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("value", pa.float64(), nullable=False)])
GRAIN = Grain("id", "id", SCHEMA)


def rows(start, stop):
    return pa.table({"id": [f"row-{i:02d}" for i in range(start, stop)], "value": list(range(start, stop))})


@pytest.fixture
def source(tmp_path):
    """Ten rows in files of 4, 1 and 5."""
    return commit_tables(tmp_path / "in", [rows(0, 4), rows(4, 5), rows(5, 10)])


def mapped(function):
    """A stage's function that runs `function` once a part."""
    return lambda ds: map_parts(ds, function, Tasks())


def doubled(table):
    return table.set_column(table.column_names.index("value"), "value", pc.multiply(table["value"], 2))


def dropping(reasons):
    """Marks the rows of `reasons`: id -> reason."""
    return mapped(lambda table: mark_dropped(table, [reasons.get(i) for i in table["id"].to_pylist()]))


def run(tmp_path, source, transform, rows_per_part=3, **options):
    fingerprint = options.pop("fingerprint", "f1")
    parts = options.pop("parts", None) or split_into_parts(source, rows_per_part)
    return run_parts(transform, parts, context(tmp_path / "out", fingerprint=fingerprint), GRAIN, stage="double", **options)


# Where parts begin and end


def cut(parts):
    return [[(Path(s.uri).name[-9:-8], s.start, s.stop) for s in p.slices] for p in parts]


def test_split_into_parts_crosses_files_and_keeps_the_order(source):
    parts = split_into_parts(source, 3)
    assert cut(parts) == [[("0", 0, 3)], [("0", 3, 4), ("1", 0, 1), ("2", 0, 1)], [("2", 1, 4)], [("2", 4, 5)]]
    assert [p.rows for p in parts] == [3, 3, 3, 1]
    assert [p.name for p in parts] == [f"part-0000{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("start", "stop", "wanted"),
    [
        (0, 3, [[("0", 0, 3)]]),
        (3, 6, [[("0", 3, 4), ("1", 0, 1), ("2", 0, 1)]]),
        (4, 5, [[("1", 0, 1)]]),
        (8, None, [[("2", 3, 5)]]),
        (8, 99, [[("2", 3, 5)]]),
        (10, None, []),
        (5, 5, []),
    ],
)
def test_split_into_parts_takes_the_range_asked_for(source, start, stop, wanted):
    assert cut(split_into_parts(source, 3, start=start, stop=stop)) == wanted


@pytest.mark.parametrize("rows_per_part", [1, 2, 3, 4, 5, 9, 10, 11])
def test_split_into_parts_holds_every_row_once_in_parts_of_the_size_asked_for(source, rows_per_part):
    parts = split_into_parts(source, rows_per_part)
    assert sum(p.rows for p in parts) == 10
    assert {p.rows for p in parts[:-1]} <= {rows_per_part}
    assert parts[-1].rows <= rows_per_part


def test_split_into_parts_reads_the_files_of_its_prefix_alone(tmp_path):
    artifact = commit_tables(tmp_path, [rows(0, 4)], prefix="train-")
    assert split_into_parts(artifact, 3) == []
    assert [p.rows for p in split_into_parts(artifact, 3, prefix="train-")] == [3, 1]


def test_mark_dropped_keeps_the_first_reason():
    table = pa.table({"id": ["a", "b", "c"], DROP_REASON: pa.array(["old", None, None], pa.string())})
    assert mark_dropped(table, ["new", "new", None])[DROP_REASON].to_pylist() == ["old", "new", None]


# Runs on real Ray Data

real = pytest.mark.usefixtures("local_ray")


@real
def test_run_parts_makes_one_block_of_each_part(tmp_path, source):
    """Every call writes down the rows that it saw: they are the parts, from whichever files their rows come."""
    seen = tmp_path / "seen"
    seen.mkdir()

    def note(table):
        (seen / uuid.uuid4().hex).write_text(json.dumps([sorted(set(table[PART].to_pylist())), table["id"].to_pylist()]))
        return doubled(table)

    output = run(tmp_path, source, mapped(note), count=lambda table: {"tokens": 10.0 * table.num_rows})
    ids = rows(0, 10)["id"].to_pylist()
    calls = sorted(json.loads(p.read_text()) for p in seen.iterdir())
    assert calls == [[[f"part-0000{i}"], ids[3 * i : 3 * i + 3]] for i in range(4)]
    assert kept(tmp_path / "out", output) == [{"id": i, "value": 2.0 * n} for n, i in enumerate(ids)]
    assert (output.rows_in, output.rows_out, output.dropped, output.metrics) == (10, 10, {}, {"tokens": 100.0})


@real
def test_run_parts_resumed_runs_only_the_parts_that_are_not_committed(tmp_path, source):
    calls = tmp_path / "calls"
    calls.mkdir()

    def note(table):
        (calls / uuid.uuid4().hex).write_text(table[PART][0].as_py())
        return doubled(table)

    def called():
        names = sorted(p.read_text() for p in calls.iterdir())
        for p in calls.iterdir():
            p.unlink()
        return names

    first = run(tmp_path, source, mapped(note))
    assert len(called()) == 4
    (tmp_path / "out/_parts/part-00002.json").unlink()  # as if killed between its data and its commit
    second = run(tmp_path, source, mapped(note))
    assert called() == ["part-00002"]
    assert kept(tmp_path / "out", second) == kept(tmp_path / "out", first)
    torn = {f.path for f in first.files} - {f.path for f in second.files}
    assert len(torn) == 1  # its first file lies there still, and is not listed
    assert (tmp_path / "out" / torn.pop()).exists()
    assert run(tmp_path, source, mapped(note)) == second
    assert called() == []

    run(tmp_path, source, mapped(note), fingerprint="f2")
    assert len(called()) == 4  # records of another fingerprint do not count

    run(tmp_path, source, mapped(note), fingerprint="f2", rows_per_part=4)
    assert called() == ["part-00000", "part-00001", "part-00002"]  # nor those of other rows


@real
def test_run_parts_torn_part_is_never_read(tmp_path, source):
    torn = tmp_path / "out/part-00001-deadbeef.parquet"
    torn.parent.mkdir()
    torn.write_bytes(b"PAR1 half of a fi")
    output = run(tmp_path, source, mapped(doubled))
    assert torn.name not in {f.path for f in output.files}
    assert len(kept(tmp_path / "out", output)) == 10


@real
@pytest.mark.parametrize("torn", ["", '{"part": "part-00001", "att'])
def test_run_parts_torn_part_record_is_no_commit(tmp_path, source, torn):
    first = run(tmp_path, source, mapped(doubled))
    (tmp_path / "out/_parts/part-00001.json").write_text(torn)
    assert kept(tmp_path / "out", run(tmp_path, source, mapped(doubled))) == kept(tmp_path / "out", first)


@real
def test_run_parts_dropped_rows_lie_in_quarantine_with_their_reasons(tmp_path, source):
    reasons = {"row-01": "empty", "row-04": "broken: line 7", "row-05": "broken: line 9", "row-09": "empty"}
    output = run(tmp_path, source, dropping(reasons))
    assert (output.rows_in, output.rows_out, output.dropped) == (10, 6, {"empty": 2, "broken": 2})
    assert {r["id"]: r["drop_reason"] for r in quarantined(tmp_path / "out", output)} == reasons
    assert {r["id"] for r in kept(tmp_path / "out", output)} == set(rows(0, 10)["id"].to_pylist()) - set(reasons)
    assert kept(tmp_path / "out", output)[0].keys() == {"id", "value"}


@real
def test_run_parts_part_without_a_kept_row_is_committed_all_the_same(tmp_path, source):
    output = run(tmp_path, source, dropping({f"row-0{i}": "empty" for i in range(3)}))
    assert (output.rows_out, output.dropped) == (7, {"empty": 3})
    assert [Path(f.path).name[:10] for f in output.files if not f.path.startswith("q")] == [f"part-0000{i}" for i in (1, 2, 3)]


@real
def test_run_parts_more_dropped_than_allowed_is_a_stage_error_by_reason(tmp_path, source):
    transform = dropping({"row-01": "empty", "row-02": "empty", "row-03": "broken: x"})
    with pytest.raises(StageError, match=r"double: 3 of 10 rows dropped \(broken 1, empty 2\)") as error:
        run(tmp_path, source, transform, max_dropped=0.29)
    assert "quarantine" in str(error.value)
    assert run(tmp_path, source, transform, max_dropped=0.3).rows_out == 7


@real
def test_run_parts_every_row_dropped_is_a_stage_error(tmp_path, source):
    with pytest.raises(StageError, match="empty 10"):
        run(tmp_path, source, dropping({f"row-{i:02d}": "empty" for i in range(10)}))


@real
def test_run_parts_counters_below_zero_are_summed_as_they_are(tmp_path, source):
    """Scores of a reward model are often negative. The parts sum to 3 (kept positive here), 12, 21 and 9."""

    def count(table):
        total = float(pc.sum(table["value"]).as_py())
        return {"sum": total if total == 3 else -total}

    assert run(tmp_path, source, mapped(lambda table: table), count=count).metrics == {"sum": 3.0 - 42.0}


def test_run_parts_without_parts_is_a_stage_error(tmp_path):
    with pytest.raises(StageError, match="no rows"):
        run_parts(mapped(doubled), [], context(tmp_path), GRAIN, stage="double")


def lose(table):
    return table.filter(pc.not_equal(table["id"], "row-04"))


def lose_a_part(table):
    return table.filter(pc.not_equal(table[PART], "part-00001"))


def double_a_row(table):
    return pa.concat_tables([table, table.filter(pc.equal(table["id"], "row-04"))])


def keep_and_drop_a_row(table):
    other = table.filter(pc.equal(table["id"], "row-04"))
    return pa.concat_tables([table, mark_dropped(other, ["twice"] * other.num_rows)])


def keep_and_drop_one_and_lose_another(table):
    table = keep_and_drop_a_row(table)
    return table.filter(pc.not_equal(table["id"], "row-05"))


def same_id(table):
    return table.set_column(0, "id", pa.array(["row-00"] * table.num_rows))


@real
@pytest.mark.parametrize("transform", [lose, lose_a_part, double_a_row, keep_and_drop_a_row, same_id], ids=lambda f: f.__name__)
def test_run_parts_rows_lost_or_doubled_are_an_error(tmp_path, source, transform):
    with pytest.raises((StageError, SchemaError), match="double: "):
        run(tmp_path, source, mapped(transform))


@real
def test_run_parts_row_lost_is_not_made_up_for_by_one_both_kept_and_dropped(tmp_path, source):
    with pytest.raises((StageError, SchemaError), match="double: "):
        run(tmp_path, source, mapped(keep_and_drop_one_and_lose_another))


@real
def test_run_parts_id_that_did_not_go_in_is_an_error(tmp_path, source):
    def renamed(table):
        ids = [i.replace("row-04", "row-99") for i in table["id"].to_pylist()]
        return table.set_column(0, "id", pa.array(ids))

    with pytest.raises((StageError, SchemaError)):
        run(tmp_path, source, mapped(renamed))


@real
def test_run_parts_same_id_in_two_parts_is_an_error(tmp_path):
    source = commit_tables(tmp_path / "in", [rows(0, 3), rows(0, 3)])
    with pytest.raises((StageError, SchemaError)):
        run(tmp_path, source, mapped(doubled))


@real
def test_run_parts_output_of_another_type_is_a_schema_error(tmp_path, source):
    with pytest.raises(SchemaError, match="double: column 'value' is null at id='row-00'"):
        run(tmp_path, source, mapped(lambda t: t.set_column(1, "value", pa.nulls(t.num_rows, pa.float64()))))


@real
def test_run_parts_own_error_inside_a_ray_task_comes_out_as_raised(tmp_path, source):
    def refuse(table):
        raise ConfigError("score.function: no such function")

    with pytest.raises(ConfigError, match=r"^score\.function: no such function$"):
        run(tmp_path, source, mapped(refuse))


@real
def test_run_parts_other_error_inside_a_ray_task_names_stage_and_kind(tmp_path, source):
    def fail(table):
        raise KeyError("no such key")

    with pytest.raises(StageError, match=r"^double: KeyError: 'no such key'$"):
        run(tmp_path, source, mapped(fail))


@real
def test_error_of_an_actor_that_the_work_has_called_is_not_taken_for_a_death_of_its_own():
    unreachable = RayTaskError("work", "traceback", ActorUnavailableError("no route to host", None)).as_instanceof_cause()
    error = parts.first_cause(unreachable, "generate")
    assert "died" not in str(error)
    assert "generate: ActorUnavailableError: The actor None is unavailable: no route to host" in str(error)


def test_run_parts_failed_part_keeps_the_others_for_the_next_attempt(tmp_path, source):
    switch = tmp_path / "mended"

    def fail_once(table):
        if "row-09" in table["id"].to_pylist() and not switch.exists():
            raise StageError("not yet")
        return doubled(table)

    with pytest.raises(StageError, match="not yet"):
        run(tmp_path, source, mapped(fail_once))
    switch.touch()
    assert run(tmp_path, source, mapped(fail_once)).rows_out == 10


@real
def test_run_parts_part_above_the_size_of_a_block_is_refused_before_the_work(tmp_path):
    """Ray would split it, and a part would no longer be one. 70 MiB of zeros are a small file."""
    wide = pa.table({"id": ["a", "b"], "value": [1.0, 2.0], "blob": pa.array([b"\0" * (35 << 20)] * 2, pa.binary())})
    source = commit_tables(tmp_path / "in", [wide])
    with pytest.raises(StageError, match="rows_per_part"):
        run(tmp_path, source, mapped(doubled))
    assert run(tmp_path, source, mapped(doubled), parts=[Part("part-00000", (Slice(source.uri(source.tables()[0]), 0, 1),))])


class Refusing:
    def __init__(self, error):
        raise error


@real
@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (ConfigError("score.model m: it has 2 labels"), ConfigError, "score.model m: it has 2 labels"),
        (KeyError("no such key"), StageError, "double: KeyError: 'no such key'"),
    ],
    ids=["own", "other"],
)
def test_run_parts_error_of_an_actors_constructor_comes_out_as_raised(tmp_path, source, raised, kind, message):
    with pytest.raises(kind) as error:
        run(tmp_path, source, lambda ds: map_parts(ds, Refusing, Actors(1, 1, 1.0, 0.0), raised))
    assert str(error.value) == message


class Doubler:
    def __call__(self, table):
        return doubled(table)


@real
def test_map_parts_takes_actors_with_gpus_and_labels_on_whole_parts(source):
    """Making the plan; there is no GPU to run it on. `map_batches` refuses GPUs without a batch size."""
    ds = ray.data.from_items([{"id": "a", "value": 1.0}])
    made = map_parts(ds, Doubler, Actors(1, 2, 1.0, 1.0, LABELS))
    arguments = made._logical_plan.dag.ray_remote_args
    assert {k: arguments[k] for k in ("num_cpus", "num_gpus", "label_selector")} == {
        "num_cpus": 1.0,
        "num_gpus": 1.0,
        "label_selector": LABELS,
    }


@real
def test_run_parts_with_labels_that_the_node_has_runs_there(tmp_path, source):
    how = Tasks(node_labels=LABELS)
    output = run(tmp_path, source, lambda ds: map_parts(ds, doubled, how), ends=how)
    assert output.rows_out == 10


def note_start_and_die(directory):
    (directory / uuid.uuid4().hex).touch()
    os._exit(1)


class Dying:
    """Loads, and dies of the row-04."""

    def __init__(self, directory):
        self.directory = directory

    def __call__(self, table):
        if "row-04" in table["id"].to_pylist():
            note_start_and_die(self.directory)
        return doubled(table)


@real
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["task", "actor"])
def test_run_parts_process_that_dies_of_a_part_again_and_again_ends_the_stage(tmp_path, source, monkeypatch, kind):
    """Ray Data itself would start it for ever."""
    monkeypatch.setattr(parts, "MAX_DEATHS", 2)
    (tmp_path / "starts").mkdir()
    if kind == "task":
        die = lambda table: note_start_and_die(tmp_path / "starts") if "row-04" in table["id"].to_pylist() else doubled(table)
        transform = lambda ds: map_parts(ds, die, Tasks(cpus=0.5))
    else:
        transform = lambda ds: map_parts(ds, Dying, Actors(1, 1, 1.0, 0.0), tmp_path / "starts")
    with pytest.raises(StageError, match=r"^double: its process died more than 2 times .*memory.*$") as error:
        run(tmp_path, source, transform)
    assert len(str(error.value).splitlines()) == 1
    assert len(list((tmp_path / "starts").iterdir())) == 3
