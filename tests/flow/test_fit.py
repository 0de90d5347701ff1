import pytest
import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

from dpo_ray.errors import ResourceError
from dpo_ray.flow import fit
from dpo_ray.flow.fit import Node
from dpo_ray.flow.groups import NodeGroup
from dpo_ray.flow.stage import Needs

from ..conftest import LABELS, NUM_CPUS


def node(group="", free=None, labels=None, **total):
    return Node("id", "10.0.0.1", (labels or {}) | {fit.NODE_GROUP: group}, total, total if free is None else free)


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        ({}, True),
        ({"pool": "train"}, True),
        ({"pool": "trai"}, False),
        ({"pool": "in(inference,train)"}, True),
        ({"pool": "in(a, b)"}, False),
        ({"pool": "!train"}, False),
        ({"pool": "!inference"}, True),
        ({"pool": "!in(inference, cpu)"}, True),
        ({"pool": "!in(train, cpu)"}, False),
        ({"other": "x"}, False),
        ({"other": "!x"}, True),
        ({"pool": "train", "market": "!spot"}, False),
    ],
    ids=str,
)
def test_labels_match_as_rays_own_scheduler_matches_them(selector, fits):
    from ray.autoscaler.v2.scheduler import SchedulingNode, SchedulingNodeStatus
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    labels = {"pool": "train", "market": "spot"}
    assert fit.has_labels(labels, selector) is fits
    constraints = []
    for key, value in selector.items():
        values = value.removeprefix("!").removeprefix("in(").removesuffix(")").replace(" ", "").split(",")
        operator = LabelSelectorOperator.LABEL_OPERATOR_NOT_IN if value[0] == "!" else LabelSelectorOperator.LABEL_OPERATOR_IN
        constraints.append((key, operator, values))
    ray_node = SchedulingNode("type", {"CPU": 1.0}, {"CPU": 1.0}, labels, SchedulingNodeStatus.SCHEDULABLE)
    request = ResourceRequestUtil.make({"CPU": 1}, label_selectors=[constraints])
    assert bool(ray_node._satisfies_label_constraints([request])) is fits


@pytest.mark.parametrize(
    ("needs", "held"),
    [
        (Needs(1, 4.0, 1.0), 2),
        (Needs(1, 0.0, 1.0), 8),
        (Needs(1, 1.0), 10),
        (Needs(1, 0.1), 100),
        (Needs(3), 3),
        (Needs(1, 16.0), 0),
    ],
    ids=str,
)
def test_places_of_a_node_are_bounded_by_what_a_bundle_asks_for(needs, held):
    assert fit.places({"CPU": 10.0, "GPU": 8.0}, needs) == held


TRAIN = NodeGroup("train", {"CPU": 16, "GPU": 1}, {"pool": "train"}, 4)
CPUS = NodeGroup("cpu", {"CPU": 8}, {"pool": "cpu"}, 2)
WORKERS = {"cpus": 4.0, "gpus": 1.0, "what": "train worker", "node_labels": {"pool": "train"}}
HEAD = node("headgroup", CPU=0)


@pytest.mark.parametrize(
    ("needs", "nodes", "groups"),
    [
        (Needs(4, **WORKERS), [HEAD], [TRAIN, CPUS]),  # all of it is still to come
        (Needs(4, **WORKERS), [HEAD, *[node("train", CPU=16, GPU=1, labels={"pool": "train"})] * 3], [TRAIN]),
        (Needs(16, 1.0, 0.0, "task", 0.25, {"pool": "in(cpu, other)"}), [HEAD], [TRAIN, CPUS]),  # the tasks go to train nodes
        (Needs(2, 8.0, 8.0), [node(CPU=8, GPU=8), node(CPU=9, GPU=8)], []),
        (Needs(4, **WORKERS), [HEAD], [NodeGroup("any", {"CPU": 16, "GPU": 8}, None, 1)]),  # labels that nobody tells
    ],
    ids=["scale from zero", "some run", "tasks elsewhere", "no autoscaling", "unknown labels"],
)
def test_what_fits_once_autoscaling_has_added_all_it_can_lacks_nothing(needs, nodes, groups):
    assert fit.lacking(needs, nodes, groups) is None


@pytest.mark.parametrize(
    ("needs", "nodes", "groups", "fitting", "missing", "advice"),
    [
        (Needs(5, **WORKERS), [HEAD], [TRAIN, CPUS], 4, "4 CPU + 1 GPU are missing", "Let group train grow to 5 nodes"),
        (
            Needs(5, **WORKERS),
            [HEAD, *[node("train", CPU=16, GPU=1, labels={"pool": "train"})] * 4],
            [TRAIN],
            4,
            "4 CPU + 1 GPU are missing",
            "Let group train grow to 5 nodes",
        ),
        (
            Needs(1, 4.0, 8.0, "engine", 0.0, {"pool": "train"}),
            [HEAD],
            [TRAIN],
            0,
            "one engine needs 8 GPU on its node, and the largest has 1",
            "Give the nodes of group train at least 4 CPU + 8 GPU",
        ),
        (
            Needs(1, 32.0, 0.0, "engine"),
            [HEAD],
            [TRAIN, CPUS],
            0,
            "one engine needs 32 CPU on its node, and the largest has 16",
            "Give the nodes of group train at least 32 CPU",
        ),
        (
            Needs(1, 1.0, 0.0, "task", 0.0, {"pool": "score", "market": "!spot"}),
            [HEAD],
            [TRAIN, CPUS],
            0,
            "no node has the labels pool=score, market=!spot",
            "Give one group the labels pool=score, market=!spot",
        ),
        (
            Needs(1, 1.0, 0.0, "task", 0.0, {"pool": "score"}),
            [node(CPU=8)],
            [],
            0,
            "no node has the labels pool=score",
            "Add nodes with the labels pool=score",
        ),
        (Needs(3, 8.0, 0.0, "actor"), [node(CPU=8), node(CPU=8)], [], 2, "8 CPU are missing", "Add nodes"),
        (
            Needs(2, 8.0, 0.0, "actor", 0.25),
            [HEAD],
            [CPUS],
            2,
            "only 0 CPU would be left for the tasks that feed it, which need 0.25",
            "Let group cpu grow beyond 2 nodes",
        ),
    ],
    ids=["count", "all run", "GPUs of a node", "CPUs of a node", "labels", "labels of nodes", "nodes", "tasks"],
)
def test_what_does_not_fit_is_named_with_the_group_that_should_have_it(needs, nodes, groups, fitting, missing, advice):
    short = fit.lacking(needs, nodes, groups)
    assert short is not None
    assert short.fitting == fitting
    assert missing in short.missing
    assert advice in short.advice


# On real Ray

real = pytest.mark.usefixtures("idle_ray")


@real
@pytest.mark.parametrize(
    "needs",
    [
        Needs(),
        Needs(NUM_CPUS, 1.0),
        Needs(2, 2.0),
        Needs(8, 0.5),
        Needs(1, NUM_CPUS),
        Needs(3, 0.0),
        Needs(1, 1.0, node_labels=LABELS),
    ],
    ids=str,
)
def test_check_fits_what_fits_passes(needs):
    fit.check_fits("round_00/train", needs)


@real
@pytest.mark.parametrize(
    ("needs", "named"),
    [
        (Needs(1, 64.0, 0.0, "engine"), ["1 engine x 64 CPU", "only 0 fit"]),
        (Needs(3, 2.0, 0.0, "train worker"), ["3 train worker x 2 CPU", "only 2 fit"]),
        (Needs(2, 1.0, 1.0, "engine"), ["2 engine x 1 CPU + 1 GPU", "only 0 fit"]),
        (Needs(1, 1.0, 0.0, "engine", 0.0, {"pool": "none"}), ["on pool=none, but only 0 fit", "no node has the labels"]),
    ],
    ids=str,
)
def test_check_fits_error_names_what_is_needed_and_what_there_is(needs, named):
    with pytest.raises(ResourceError) as error:
        fit.check_fits("round_00/train", needs)
    assert [n for n in ["round_00/train", f"{NUM_CPUS} CPU + 0 GPU", *named] if n not in str(error.value)] == []


@real
def test_check_fits_leaves_room_for_the_tasks_beside_the_actors():
    fit.check_fits("reference", Needs(NUM_CPUS - 1, 1.0, 0.0, "actor", beside=0.25))
    with pytest.raises(ResourceError, match=rf"{NUM_CPUS} actor x 1 CPU and 0.25 CPU .*only 0 CPU would be left"):
        fit.check_fits("reference", Needs(NUM_CPUS, 1.0, 0.0, "actor", beside=0.25))


@real
def test_check_fits_counts_what_the_cluster_says_that_autoscaling_can_add():
    """The configuration lies in the GCS where a platform's autoscaler puts it."""
    from ray.core.generated import autoscaler_pb2

    key, namespace = ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE
    config = autoscaler_pb2.ClusterConfig()
    config.node_group_configs.add(name="gpus", max_count=2, resources={"CPU": 16, "GPU": 8})
    _internal_kv_put(key.encode(), config.SerializeToString(), overwrite=True, namespace=namespace.encode())
    try:
        fit.check_fits("round_00/train", Needs(16, 2.0, 1.0, "train worker"))
        with pytest.raises(ResourceError, match=r"only 16 fit .*counting what autoscaling .*Let group gpus grow to 3 nodes"):
            fit.check_fits("round_00/train", Needs(17, 2.0, 1.0, "train worker"))
    finally:
        _internal_kv_del(key.encode(), namespace=namespace.encode())


@real
def test_check_fits_does_not_mind_what_is_held_now(hold):
    hold()
    fit.check_fits("train", Needs(NUM_CPUS, 1.0))


@real
@pytest.mark.parametrize(("count", "fits"), [(0, True), (NUM_CPUS - 2, True), (NUM_CPUS - 1, False)])
def test_fits_now_leaves_one_cpu_to_the_tasks_beside(hold, count, fits):
    hold()
    assert fit.fits_now(Needs(count, 1.0)) is fits


@real
def test_fits_now_and_free_places_count_suitable_nodes_alone(hold):
    hold()
    assert fit.fits_now(Needs(1, 1.0, node_labels=LABELS))
    assert not fit.fits_now(Needs(1, 1.0, node_labels={"pool": "none"}))
    assert fit.free_places(Needs(1, 1.0, node_labels=LABELS)) == NUM_CPUS - 1
    assert fit.free_places(Needs(1, 1.0, node_labels={"pool": "none"})) == 0


@real
def test_fits_now_without_gpus_is_false():
    assert not fit.fits_now(Needs(1, 0.0, 1.0))
