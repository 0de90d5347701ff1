"""Actors that hold CPUs of the session's Ray."""

import pytest
import ray

from ..conftest import NUM_CPUS
from ..waiting import wait_until


@ray.remote(num_cpus=1)
class Holder:
    def ready(self) -> bool:
        return True


@pytest.fixture
def hold():
    """Starts actors that hold a CPU each; those left are killed after the test."""
    actors = []

    def start():
        actor = Holder.remote()
        ray.get(actor.ready.remote())
        actors.append(actor)
        wait_until(lambda: ray.available_resources().get("CPU", 0) <= NUM_CPUS - len(actors))
        return actor

    yield start
    for actor in actors:
        ray.kill(actor)
