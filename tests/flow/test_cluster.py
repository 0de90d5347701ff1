import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from dpo_ray.errors import ResourceError
from dpo_ray.flow import cluster
from dpo_ray.flow.stage import Needs

from ..conftest import NUM_CPUS
from ..waiting import wait_until

pytestmark = pytest.mark.usefixtures("idle_ray")


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


@pytest.mark.parametrize(
    "needs", [Needs(), Needs(NUM_CPUS, 1.0), Needs(2, 2.0), Needs(8, 0.5), Needs(1, NUM_CPUS), Needs(3, 0.0)], ids=str
)
def test_check_fits_what_fits_passes(needs):
    cluster.check_fits("round_00/train", needs)


@pytest.mark.parametrize(
    ("needs", "named"),
    [
        (Needs(1, 64.0, 0.0, "engine"), ["1 engine x 64 CPU", "only 0 fit"]),
        (Needs(3, 2.0, 0.0, "train worker"), ["3 train worker x 2 CPU", "only 2 fit"]),
        (Needs(2, 1.0, 1.0, "engine"), ["2 engine x 1 CPU + 1 GPU", "only 0 fit"]),
    ],
    ids=str,
)
def test_check_fits_error_names_what_is_needed_and_what_there_is(needs, named):
    with pytest.raises(ResourceError) as error:
        cluster.check_fits("round_00/train", needs)
    assert [n for n in ["round_00/train", f"{NUM_CPUS} CPU + 0 GPU", *named] if n not in str(error.value)] == []


def test_check_fits_leaves_room_for_the_tasks_beside_the_actors():
    cluster.check_fits("reference", Needs(NUM_CPUS - 1, 1.0, 0.0, "actor", beside=0.25))
    with pytest.raises(ResourceError, match=rf"{NUM_CPUS} actor x 1 CPU and 0.25 CPU .*only 0 CPU would be left"):
        cluster.check_fits("reference", Needs(NUM_CPUS, 1.0, 0.0, "actor", beside=0.25))


def test_check_fits_does_not_mind_what_is_held_now(hold):
    hold()
    cluster.check_fits("train", Needs(NUM_CPUS, 1.0))


@pytest.mark.parametrize(("count", "fits"), [(0, True), (NUM_CPUS - 2, True), (NUM_CPUS - 1, False)])
def test_fits_now_leaves_one_cpu_to_the_tasks_beside(hold, count, fits):
    hold()
    assert cluster.fits_now(Needs(count, 1.0)) is fits


def test_fits_now_without_gpus_is_false():
    assert not cluster.fits_now(Needs(1, 0.0, 1.0))


def test_idle_wait_returns_when_nothing_is_held():
    cluster.Idle().wait("pair", timeout_s=0.0)


def test_idle_wait_names_the_cpus_that_are_still_held_and_passes_when_they_are_back(hold):
    idle = cluster.Idle()
    actor = hold()
    with pytest.raises(ResourceError, match=r"round_00/pair ended.* 1 CPU"):
        idle.wait("round_00/pair", timeout_s=0.2)
    ray.kill(actor)
    idle.wait("round_00/pair", timeout_s=20)


def test_idle_wait_does_not_blame_a_stage_for_what_was_held_before_it(hold):
    hold()
    cluster.Idle().wait("round_00/pair", timeout_s=0.0)


def test_idle_wait_names_a_placement_group_that_is_left():
    idle = cluster.Idle()
    group = placement_group([{"CPU": 0.01}])
    ray.get(group.ready())
    with pytest.raises(ResourceError, match=f"placement group {group.id.hex()}"):
        idle.wait("round_00/train", timeout_s=0.2)
    remove_placement_group(group)
    idle.wait("round_00/train", timeout_s=20)


def test_probe_shared_root_that_every_node_sees_passes_and_is_left_as_it_was(tmp_path):
    cluster.probe_shared(str(tmp_path / "root with a space"))
    assert list((tmp_path / "root with a space").iterdir()) == []


def test_probe_shared_unwritable_root_is_a_resource_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    root = f"{tmp_path}/file/root"
    with pytest.raises(ResourceError, match=root):
        cluster.probe_shared(root)
