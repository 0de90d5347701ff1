import threading

import pytest
import ray
from ray.util.placement_group import placement_group_table

from dpo_ray.errors import ResourceError
from dpo_ray.flow import fit, waiting
from dpo_ray.flow.stage import Needs

from ..conftest import LABELS, NUM_CPUS
from ..waiting import wait_until

pytestmark = pytest.mark.usefixtures("idle_ray")


def groups_left():
    return [g for g in placement_group_table().values() if g["state"] != "REMOVED"]


@pytest.mark.parametrize(
    "needs", [Needs(), Needs(NUM_CPUS, 1.0), Needs(NUM_CPUS - 1, 1.0, beside=0.25), Needs(1, 0.0)], ids=str
)
def test_room_that_there_is_is_not_waited_for(needs):
    said = []
    assert waiting.wait_for_room("round_00/train", needs, said.append) is False
    assert said == []


def test_room_that_others_hold_is_waited_for_aloud_until_they_give_it_back(hold):
    """The tasks beside need a CPU too."""
    actor, said = hold(), []
    needs = Needs(NUM_CPUS - 1, 1.0, 0.0, "engine", beside=0.25, node_labels=LABELS)

    def give_back():
        wait_until(lambda: len(said) >= 3)
        ray.kill(actor)

    thread = threading.Thread(target=give_back)
    thread.start()
    assert waiting.wait_for_room("round_00/generate", needs, said.append, say_every_s=0.0) is True
    thread.join()
    assert fit.fits_now(needs, needs.beside)
    assert groups_left() == []
    assert all("round_00/generate waits for 3 engine x 1 CPU on pool=local" in line for line in said)
    assert "1 nodes with 3 CPU + 0 GPU free" in said[0]


def test_room_that_does_not_come_ends_in_one_message_and_leaves_nothing(hold):
    hold()
    with pytest.raises(ResourceError, match=rf"round_00/train found no room for {NUM_CPUS} worker .* within max_wait_s=0.1"):
        waiting.wait_for_room("round_00/train", Needs(NUM_CPUS, 1.0, 0.0, "worker"), id, limit_s=0.1)
    wait_until(lambda: groups_left() == [])


def test_demand_without_a_place_is_seen_and_gone_when_it_is_met(hold):
    @ray.remote(num_cpus=NUM_CPUS, num_gpus=0, label_selector=LABELS)
    def work():
        return 1

    assert waiting.pending_demand() == []
    actor, waits = hold(), work.remote()
    wait_until(lambda: waiting.pending_demand() == [f"1 x {NUM_CPUS} CPU"])
    ray.kill(actor)
    assert ray.get(waits) == 1
    wait_until(lambda: waiting.pending_demand() == [])
