"""Resume over two gloo processes, on as many workers as before and on another number."""

import os
import resource
from pathlib import Path

import pytest
import torch.distributed as dist

from dpo_ray import preemption, train_saving, train_state
from dpo_ray.errors import StageError

from .learn import ranks, tiny, training

PAIRS = tiny.build_pairs(13)
EVERY, NUM_STEPS = 2, 6


def plan(world_size: int):
    """Global batches of 5, 5 and 3 pairs, cut into micro-batches."""
    return training.plan(PAIRS, world_size, 40, batch_size=5, epochs=2)


def where(root: Path, name: str) -> train_state.Where:
    """Over a group of its own: what a thread exchanges must not meet what a step does."""
    return train_state.Where(str(root / name), "fingerprint", "policy", dist.new_group(backend="gloo"), dist.get_rank())


def run(root: Path, name: str, path: str, *, until: int = NUM_STEPS):
    """Resume, take steps with checkpoints: how many were done before, and the log."""
    world_size = dist.get_world_size()
    model = training.build(path, dist.init_device_mesh("cpu", (world_size,)))
    optimizer = training.build_adamw(model)
    place = where(root, name)
    done, log = train_state.resume(place, model, optimizer)
    before = done
    with train_saving.saving(place, model, optimizer, every=EVERY, num_steps=NUM_STEPS, kept=2) as save:
        for metrics in training.take(model, optimizer, PAIRS, plan(world_size)[:until], start_step=done):
            done += 1
            log.append(metrics)
            save(done, log)
    return before, log


def with_one_full_disk(root: Path, path: str) -> str:
    """Files of rank 1 alone cannot grow; the message of this rank. The last step is the one that is saved: before it, the
    rank that hears of the failure first would leave the other in the next step, which Ray Train then ends."""
    run(root, "full", path, until=3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        run(root, "full", path, until=4)
    except StageError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        dist.barrier()
    return "no error"


def damaged_shard_of_the_other_rank(root: Path, path: str):
    """Rank 1 alone sees, in its share of the files, that the newest checkpoint is damaged."""
    run(root, "damaged", path, until=5)
    name, record = train_state.committed(str(root / "damaged"))[0]
    dist.barrier()
    assert record is not None
    if dist.get_rank() == 0:
        os.truncate(root / "damaged" / name / record.files[1].path, 100)
    dist.barrier()
    return run(root, "damaged", path)


def notices() -> list[bool]:
    """What each of six steps hears where rank 1 alone learns of a node that goes, after its second, and of one more later."""
    told = iter([0, 0, 1, 1, 2, 2] if dist.get_rank() == 1 else [0] * 6)
    noticed = preemption.watch(dist.new_group(backend="gloo"), lambda: next(told))
    return [noticed() for _ in range(6)]


def every_scenario(root: Path, path: str) -> dict:
    return {
        "uninterrupted": run(root, "uninterrupted", path),
        "killed": run(root, "two", path, until=5),
        "resumed": run(root, "two", path),
        "from one": run(root, "one", path),
        "full": with_one_full_disk(root, path),
        "damaged": damaged_shard_of_the_other_rank(root, path),
        "to one": run(root, "to one", path, until=5),
        "notices": notices(),
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny.save_policy(tmp_path_factory.mktemp("policy"), "qwen2")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def one_rank(root, path):
    """One process, killed after step 5, and what it does undisturbed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    run(root, "one", path, until=5)
    yield run(root, "one undisturbed", path)[1]
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(root, path, one_rank) -> list[dict]:
    """Each rank's results."""
    return ranks.run_ranks(every_scenario, 2, root, root, path)


def same(log, wanted) -> bool:
    return all(got == pytest.approx(want, rel=1e-5) for got, want in zip(log, wanted, strict=True))


def test_two_ranks_resumed_take_the_same_steps_bit_for_bit(results):
    for rank in range(2):
        assert results[rank]["uninterrupted"][0] == 0
        assert results[rank]["killed"] == (0, results[rank]["uninterrupted"][1][:5])
        assert results[rank]["resumed"] == (4, results[rank]["uninterrupted"][1])
    assert results[0]["resumed"] == results[1]["resumed"]


def test_two_ranks_go_on_from_the_checkpoint_of_one(results, one_rank):
    """Largest relative error measured: 2e-6."""
    before, log = results[0]["from one"]
    assert before == 4
    assert log[:4] == one_rank[:4]
    assert same(log, one_rank)


def test_one_rank_goes_on_from_the_checkpoint_of_two(results, root, path, one_rank):
    """Largest relative error measured: 2e-6."""
    before, log = run(root, "to one", path)
    uninterrupted = results[0]["uninterrupted"][1]
    assert before == 4
    assert log[:4] == uninterrupted[:4]
    assert same(log, uninterrupted)


def test_two_ranks_both_stop_where_the_disk_of_one_is_full(results, root, one_rank):
    for rank in range(2):
        assert "the checkpoint of step 4 was not written" in results[rank]["full"]
        assert "goes on from step 2" in results[rank]["full"]
    assert [record.step for _, record in train_state.committed(str(root / "full")) if record] == [2]


def test_two_ranks_both_pass_over_what_one_of_them_finds_damaged(results):
    for rank in range(2):
        assert results[rank]["damaged"] == (2, results[rank]["uninterrupted"][1])


def test_two_ranks_hear_of_a_notice_that_one_of_them_got_at_the_same_step_and_once(results):
    for rank in range(2):
        assert results[rank]["notices"] == [False, False, False, True, False, True]
