"""Checkpoints in one process over a gloo group of its own; what two ranks do with them is in test_train_state_two_ranks.py."""

import itertools
import json
import pickle
import resource
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from dpo_ray import train_owner, train_saving, train_state
from dpo_ray.errors import StageError
from dpo_ray.flow import storage
from dpo_ray.learn import checkpoint

from .learn import tiny, training

PAIRS = tiny.build_pairs(13)
PLAN = training.plan(PAIRS, 1, 100, batch_size=5, epochs=2)  # 6 steps


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny.save_policy(tmp_path_factory.mktemp("policy"), "qwen2")


@pytest.fixture
def where(group, tmp_path) -> train_state.Where:
    return train_state.Where(str(tmp_path / "state"), "fingerprint", "policy", group)


def fresh(path: str):
    model = training.build(path, dist.init_device_mesh("cpu", (1,)))
    return model, training.build_adamw(model)


def run(where, path: str, *, until: int = len(PLAN), every: int = 2, kept: int = 2, **options):
    """Resume, take steps with checkpoints, and return how many were done before and the log."""
    model, optimizer = fresh(path)
    done, log = train_state.resume(where, model, optimizer)
    before = done
    with train_saving.saving(where, model, optimizer, every=every, num_steps=len(PLAN), kept=kept, **options) as save:
        for metrics in training.take(model, optimizer, PAIRS, PLAN[:until], start_step=done):
            done += 1
            log.append(metrics)
            save(done, log)
    return before, log


def whole(where) -> list[int]:
    return [record.step for _, record in train_state.committed(where.directory) if record]


def newest(where) -> Path:
    return Path(where.directory) / train_state.committed(where.directory)[0][0]


@pytest.fixture(scope="module")
def uninterrupted(path, group):
    model, optimizer = fresh(path)
    return training.train(model, optimizer, PAIRS, PLAN)


def test_resume_after_a_kill_takes_the_same_steps_bit_for_bit(where, path, uninterrupted):
    assert run(where, path, until=5) == (0, uninterrupted[:5])
    assert run(where, path) == (4, uninterrupted)


def test_resume_of_a_finished_run_takes_no_step(where, path, uninterrupted):
    run(where, path)
    before = newest(where)
    assert run(where, path) == (6, uninterrupted)
    assert newest(where) == before


def test_resume_where_nothing_was_saved_starts_at_the_first_step(where, path):
    assert train_state.resume(where, *fresh(path)) == (0, [])


def test_saving_keeps_the_newest_checkpoints(where, path):
    run(where, path, until=5, every=1, kept=3)
    assert whole(where) == [5, 4, 3]
    assert len(list(Path(where.directory).iterdir())) == 3


def test_saving_holds_no_step_while_a_checkpoint_is_written(where, path, uninterrupted, monkeypatch):
    """The first write waits for step 4, which is taken before it: were it to hold the step, this would not end."""
    taken, written = threading.Event(), []

    def slow(state, *arguments):
        assert taken.wait(60)
        written.append(state["step"])
        return write_state(state, *arguments)

    write_state = checkpoint.write_state
    monkeypatch.setattr(checkpoint, "write_state", slow)
    model, optimizer = fresh(path)
    with train_saving.saving(where, model, optimizer, every=2, num_steps=6, kept=2) as save:
        for step, metrics in enumerate(training.take(model, optimizer, PAIRS, PLAN[:3]), 1):
            save(step, uninterrupted[:step])
            assert metrics == uninterrupted[step - 1]
        assert (written, whole(where)) == ([], [])
        taken.set()
    assert (written, whole(where)) == ([2], [2])
    monkeypatch.undo()
    assert run(where, path) == (2, uninterrupted)


def test_saving_now_writes_a_checkpoint_that_no_step_was_due_for(where, path, uninterrupted):
    model, optimizer = fresh(path)
    with train_saving.saving(where, model, optimizer, every=100, num_steps=6, kept=2) as save:
        for step, _ in enumerate(training.take(model, optimizer, PAIRS, PLAN[:3]), 1):
            save(step, uninterrupted[:step], step == 3)
    assert whole(where) == [3]
    assert run(where, path) == (3, uninterrupted)


def test_saving_publishes_the_log_of_each_checkpoint(where, path, uninterrupted):
    published = []
    run(where, path, publish=lambda log: published.append(log))
    assert published == [uninterrupted[:2], uninterrupted[:4], uninterrupted]


def test_checkpoint_that_was_not_finished_is_never_read_and_goes_with_the_next(where, path, uninterrupted):
    run(where, path, until=3)
    run(where, path, until=4)
    torn = newest(where)
    (torn / train_state.RECORD).write_bytes((torn / train_state.RECORD).read_bytes()[:100])
    assert run(where, path) == (2, uninterrupted)
    assert whole(where) == [6, 4]
    assert not torn.exists()


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("harm", ["missing", "shorter", "another byte", "pickle", "unlisted pickle", "pickle beside"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(where, path, uninterrupted, tmp_path, harm):
    run(where, path, until=5)
    damaged = newest(where)
    shard = damaged / "__0_0.distcp"
    if harm == "missing":
        shard.unlink()
    elif harm == "shorter":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif harm == "another byte":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif harm == "pickle beside":
        (damaged / "__0.metadata").write_bytes(pickle.dumps(Trap(tmp_path / "trace")))
    else:
        (damaged / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "trace")))
        if harm == "unlisted pickle":
            record = json.loads((damaged / train_state.RECORD).read_text())
            record["files"] = [file for file in record["files"] if file["path"] != ".metadata"]
            (damaged / train_state.RECORD).write_text(json.dumps(record))
    assert run(where, path, until=4) == (2, uninterrupted[:4])
    assert not (tmp_path / "trace").exists()
    assert whole(where) == [4, 2], "the damaged one does not count as one of the two that are kept"
    assert not damaged.exists()


def test_only_damaged_checkpoints_are_refused_by_name(where, path):
    run(where, path, until=3)
    (newest(where) / "__0_0.distcp").unlink()
    with pytest.raises(StageError, match=rf"no checkpoint in {where.directory} is whole: .*{newest(where).name}: __0_0"):
        train_state.resume(where, *fresh(path))


@pytest.mark.parametrize("other", [{"policy": "another"}, {"fingerprint": "another"}])
def test_checkpoint_of_another_model_or_config_is_refused(where, path, other):
    run(where, path, until=3)
    with pytest.raises(StageError, match=r"is of another model or config: .* another"):
        train_state.resume(where._replace(**dict.fromkeys(other, "mine")), *fresh(path))


@contextmanager
def full_disk():
    """No file of this process can grow over 8 KiB: EFBIG, since ENOSPC needs a disk of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(where, path, uninterrupted):
    run(where, path, until=3)
    kept = newest(where)
    said = r"step 4 was not written to .*File too large.*goes on from step 2"
    with full_disk(), pytest.raises(StageError, match=said) as error:
        run(where, path)
    assert "\n" not in str(error.value)
    assert list(Path(where.directory).iterdir()) == [kept]
    assert run(where, path) == (2, uninterrupted)


def test_failure_to_write_other_than_a_full_disk_is_worth_another_attempt(where, path, uninterrupted):
    run(where, path, until=3)

    def publish(log):
        raise ConnectionError("no route to the log")

    with pytest.raises(ConnectionError, match="no route"):
        run(where, path, publish=publish)
    assert whole(where) == [2]
    assert run(where, path) == (2, uninterrupted)


def test_checkpoints_under_a_uri_are_written_and_resumed(group, path, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(train_state, "CACHE", tmp_path / "cache")
    where = train_state.Where("memory://run/state", "fingerprint", "policy", group)
    assert run(where, path, until=5) == (0, uninterrupted[:5])
    assert whole(where) == [4, 2]
    assert run(where, path) == (4, uninterrupted)
    assert list((tmp_path / "cache").iterdir()) == []
    names = {name.split("/")[0] for name in storage.list_files(where.directory, recursive=True)}
    assert len(names) == 2


def test_checkpoints_of_one_step_are_ordered_by_when_they_were_written(where, path):
    model, optimizer = fresh(path)
    training.train(model, optimizer, PAIRS, PLAN[:1])
    state = checkpoint.copy_state(model, optimizer, 1)
    names = []
    for _ in range(4):
        train_saving.write(where, state, [], kept=9)
        names.append({name for name, _ in train_state.committed(where.directory)})
    added = [after - before for before, after in itertools.pairwise([set(), *names])]
    assert [name for name, _ in train_state.committed(where.directory)] == [name for (name,) in reversed(added)]


def test_workers_that_others_have_replaced_write_nothing_more(where, path, uninterrupted):
    directory = where.directory
    first = where._replace(ours=train_owner.take_over(directory))
    assert run(first, path, until=3) == (0, uninterrupted[:3])
    second = where._replace(ours=train_owner.take_over(directory))
    assert run(second, path, until=5, kept=1) == (2, uninterrupted[:5])
    before = {p: p.stat().st_mtime_ns for p in Path(directory).rglob("*")}
    with pytest.raises(StageError, match="other workers have taken"):
        run(first, path, kept=1)
    assert {p: p.stat().st_mtime_ns for p in Path(directory).rglob("*")} == before
    assert run(second, path) == (4, uninterrupted)


def test_workers_that_are_replaced_while_they_write_delete_no_other_checkpoint(where, path):
    """The others' is half written at that moment."""
    half = Path(where.directory) / "step_00000004-half"
    half.mkdir(parents=True)
    answers = iter([True, False])  # before the one write, and at its end
    run(where._replace(ours=lambda: next(answers)), path, until=3)
    assert half.exists()
