"""Configurations against the groups of an overlay: the arithmetic, and every file of pipelines/."""

import pytest

from dpo_ray.cli import load_config

from .manifests import ROOT, workloads
from .placement import Bundle, Group, bundles, misfits, ray_groups

PIPELINES = sorted(f.name for f in (ROOT / "pipelines").glob("*.yaml"))
ON_CPU = ("quickstart.yaml", "hh_rlhf.yaml")


def config(name):
    return load_config(str(ROOT / "pipelines" / name))


@pytest.mark.parametrize(
    ("name", "file"),
    [*[("gpu", f) for f in PIPELINES], *[("interactive", f) for f in PIPELINES], *[("cpu-smoke", f) for f in ON_CPU]],
)
def test_pipeline_fits_the_groups_of_the_overlay(overlay, name, file):
    (workload,) = workloads(overlay(name))
    assert misfits(config(file), workload.cluster) == []


def test_bundles_are_found_in_every_block_that_has_resources():
    asked = {b.stage: b for b in bundles(config("ultrafeedback_qwen3_8b_8gpu.yaml"))}
    assert set(asked) == {"prompts", "generate", "score", "pair", "reference", "train", "evaluate"}
    assert asked["generate"][1:5] == (4.0, 1.0, 4, 8)
    assert asked["train"][1:5] == (4.0, 1.0, 8, 8)
    assert asked["prompts"][3:5] == (1, 1)


def group_spec(limits, **fields):
    containers = [{"resources": {"limits": limits}}]
    return {"groupName": "g", "maxReplicas": 3, "template": {"spec": {"containers": containers}}, **fields}


@pytest.mark.parametrize(
    ("spec", "cpus", "gpus", "most"),
    [
        (group_spec({"cpu": "3500m", "memory": "1Gi"}), 4, 0, 3),
        (group_spec({"cpu": 8, "nvidia.com/gpu": "2"}), 8, 2, 3),
        (group_spec({"cpu": "8"}, rayStartParams={"num-cpus": "2"}), 2, 0, 3),
        (group_spec({"cpu": "8"}, resources={"CPU": "6", "GPU": "1"}), 6, 1, 3),
        (group_spec({"cpu": "8"}, numOfHosts=2), 8, 0, 6),
    ],
)
def test_ray_groups_have_what_kuberay_gives_ray(spec, cpus, gpus, most):
    (group,) = ray_groups({"workerGroupSpecs": [spec]})
    assert (group.cpus, group.gpus, group.most) == (cpus, gpus, most)


@pytest.mark.parametrize(
    ("bundle", "holds"),
    [
        (Bundle("s", 4, 1, 1, 9, {}, 0), 2),
        (Bundle("s", 3, 0, 1, 9, {}, 0), 2),
        (Bundle("s", 9, 0, 1, 9, {}, 0), 0),
        (Bundle("s", 1, 4, 1, 9, {}, 0), 0),
        (Bundle("s", 0, 0.5, 1, 9, {}, 0), 4),
        (Bundle("s", 1, 0, 1, 9, {"pool": "a"}, 0), 8),
        (Bundle("s", 1, 0, 1, 9, {"pool": "b"}, 0), 0),
        (Bundle("s", 1, 0, 1, 9, {"zone": "a"}, 0), 0),
        (Bundle("s", 1, 0, 1, 9, {"pool": "in(b, a)"}, 0), 8),
        (Bundle("s", 1, 0, 1, 9, {"pool": "!a"}, 0), 0),
        (Bundle("s", 1, 0, 1, 9, {"zone": "!in(a, b)"}, 0), 8),
    ],
    ids=str,
)
def test_group_holds_what_fits_one_pod_and_matches_its_labels(bundle, holds):
    assert Group("g", 8, 2, 0, 1, {"pool": "a"}).holds(bundle) == holds


def cluster_of(cpus, most=1):
    return {"workerGroupSpecs": [group_spec({"cpu": cpus}) | {"maxReplicas": most}]}


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (cluster_of("1", 2), ""),
        (cluster_of("1"), "nothing is left for the tasks beside 1 of them"),
        (cluster_of("1"), "2 x train: 1 CPU + 0 GPU, but the groups' maxima hold {'g': 1}"),
        (cluster_of("1", 0), "the groups' maxima hold {'g': 0}"),
        ({"workerGroupSpecs": []}, "fits no pod of []"),
    ],
)
def test_misfits_say_what_does_not_fit(cluster, message):
    found = misfits(config("quickstart.yaml"), cluster)
    assert any(message in f for f in found) if message else found == []
