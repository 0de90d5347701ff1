"""A process is killed in the middle of a stage: Ray starts it again, or the same command does, and nothing is lost."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_ray.engines.policies import PolicyRef

from ..runs.conftest import Cluster
from .faults import Fault, Moment, kill, pids
from .rounds import config, hashes, running

pytestmark = pytest.mark.chaos


def test_round_that_loses_its_engine_and_a_train_worker_ends_in_the_same_policy(
    one_node: Cluster, undisturbed: Path, policy: PolicyRef, tmp_path: Path, record: Callable[[Fault], None]
) -> None:
    with running(one_node, tmp_path, config(tmp_path, policy.path)) as run:
        run.wait_for(lambda: len(run.parts("generate")) >= 2)
        (engine,) = pids(one_node, "EngineActor")
        moment = Moment(run, "generate", "kill -9 of the engine")
        kill(engine)
        record(moment.recovered(run))

        run.trains()
        worker, _ = pids(one_node, "RayTrainWorker")
        moment = Moment(run, "train", "kill -9 of a train worker")
        kill(worker)
        record(moment.recovered(run))

        (board,) = pids(one_node, "_Board")
        moment = Moment(run, "train", "kill -9 of the actor that shows progress")
        kill(board)
        record(moment.recovered(run))
        run.completes()
        assert hashes(run.directory) == hashes(undisturbed)


def test_round_whose_driver_is_killed_in_two_stages_ends_in_the_same_policy(
    one_node: Cluster, undisturbed: Path, policy: PolicyRef, tmp_path: Path, record: Callable[[Fault], None]
) -> None:
    tree = config(tmp_path, policy.path)
    with running(one_node, tmp_path, tree) as run:
        run.wait_for(lambda: len(run.parts("generate")) >= 2)
        generating = Moment(run, "generate", "kill -9 of the driver, same command")
        run.kill()
    with running(one_node, tmp_path, tree) as run:
        record(generating.recovered(run))
        run.trains()
        training = Moment(run, "train", "kill -9 of the driver, same command")
        run.kill()
    with running(one_node, tmp_path, tree) as run:
        record(training.recovered(run))
        run.completes()
        assert hashes(run.directory) == hashes(undisturbed)
