"""How many elastic workers are counted, on the session's one node."""

import pytest
import ray
import ray.train

from dpo_ray.train_scaling import OnSuitableNodes, Trainer

from .conftest import LABELS, NUM_CPUS

pytestmark = pytest.mark.usefixtures("local_ray")


def counted(reserved, labels=None, cpus=1, workers=(1, 8)):
    scaling = ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": cpus}, label_selector=labels)
    return OnSuitableNodes(scaling)._count_possible_workers(reserved)


def test_workers_are_counted_on_nodes_with_the_labels_whatever_ray_has_reserved_elsewhere():
    node = ray.nodes()[0]["NodeID"]
    assert counted({"another node": {"CPU": 8.0}}, LABELS) == NUM_CPUS
    assert counted({node: {"CPU": 1.0}}, LABELS, cpus=2) == NUM_CPUS // 2
    assert counted({node: {"CPU": 8.0}}, {"pool": "none"}) == 0


def test_workers_without_labels_are_counted_where_ray_has_reserved_for_them():
    node = ray.nodes()[0]["NodeID"]
    assert counted({node: {"CPU": 2.0}}) == 2


def test_workers_are_not_counted_on_a_node_that_is_gone_or_going():
    assert counted({"gone": {"CPU": 64.0}}, workers=(1, 64)) == NUM_CPUS


@pytest.mark.parametrize(("workers", "replaced"), [(2, False), ((1, 2), True)])
def test_trainer_replaces_the_policy_of_a_range_alone(workers, replaced, monkeypatch):
    given = {}
    monkeypatch.setattr(Trainer.__mro__[1], "_initialize_and_run_controller", lambda self, **arguments: given.update(arguments))
    scaling = ray.train.ScalingConfig(num_workers=workers)
    Trainer(id, scaling_config=scaling)._initialize_and_run_controller(scaling_policy="Ray's own")
    assert isinstance(given["scaling_policy"], OnSuitableNodes) is replaced
