"""Every object that an overlay renders is valid by its schema, with unknown fields as errors."""

import copy
import functools
import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest

from .crd_schema import OBJECT_META, problems, validator
from .manifests import OVERLAYS, of_kind, pods, workloads

NATIVE = ("v1", "networking.k8s.io/v1")
KUBERNETES = "1.37"
RELABEL = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"sourceLabels": {"type": "array", "items": {"type": "string"}}, "targetLabel": {"type": "string"}},
}
ENDPOINT = {
    "type": "object",
    "required": ["port"],
    "additionalProperties": False,
    "properties": {"port": {"type": "string"}, "relabelings": {"type": "array", "items": RELABEL}},
}
POD_MONITOR = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "PodMonitor"},
        "metadata": OBJECT_META,
        "spec": {
            "type": "object",
            "required": ["selector", "podMetricsEndpoints"],
            "additionalProperties": False,
            "properties": {
                "selector": {"type": "object"},
                "namespaceSelector": {"type": "object"},
                "podMetricsEndpoints": {"type": "array", "items": ENDPOINT},
            },
        },
    },
}
"""The fields of a PodMonitor that are used here, from the CRD of prometheus-operator; the CRD itself is not at hand."""


@pytest.fixture(scope="module")
def crd_problems(crds):
    """Mistakes in an object of a group whose CRDs are there; None for an object of another group."""
    schema_of = functools.cache(lambda name, version: validator(crds / name, version))

    def check(obj):
        group, _, version = obj["apiVersion"].rpartition("/")
        file = f"{group}_{obj['kind'].lower()}s.yaml"
        return problems(schema_of(file, version), obj) if (crds / file).exists() else None

    return check


def native_problems(obj):
    return _native_problems(json.dumps(obj, sort_keys=True))


@functools.cache  # overlays share most of their objects
def _native_problems(text):
    try:
        kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.InvalidSchemaError) as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_native_objects_are_valid(overlay, name):
    native = [o for o in overlay(name) if o["apiVersion"] in NATIVE]
    assert {o["kind"] for o in native} >= {"Namespace", "ServiceAccount", "NetworkPolicy", "ConfigMap"}
    assert [p for o in native for p in native_problems(o)] == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_custom_resources_are_valid(overlay, crd_problems, name):
    custom = [o for o in overlay(name) if o["apiVersion"] not in NATIVE]
    assert {o["kind"]: crd_problems(o) for o in custom} == {o["kind"]: [] for o in custom}


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_pod_templates_are_valid_pods(overlay, name):
    """What the CRDs of KubeRay leave open in a pod, by the schema of Pod itself; with the containers that KubeRay adds."""
    found = []
    for w in workloads(overlay(name)):
        for pod in pods(w):
            found += native_problems({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod.spec})
    assert found == []


def test_monitoring_objects_are_valid(monitoring):
    assert {o["kind"] for o in monitoring} == {"ConfigMap", "PodMonitor"}
    assert native_problems(of_kind(monitoring, "ConfigMap")[0]) == []
    assert problems(jsonschema.Draft202012Validator(POD_MONITOR), of_kind(monitoring, "PodMonitor")[0]) == []


def edited(obj, path, value):
    changed = copy.deepcopy(obj)
    *parents, last = path
    place = functools.reduce(lambda tree, key: tree[key], parents, changed)
    place[last] = value
    return changed


HEAD = ("spec", "rayClusterSpec", "headGroupSpec")
CONTAINER = (*HEAD, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "shutdownAfterJobFinish"), True),
        (("spec", "rayClusterSpec", "enableInTreeAutoScaling"), True),
        ((*CONTAINER, "securityContext", "readOnlyRootFileSystem"), True),
        ((*HEAD, "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "autoscalerOptions", "version"), "2"),
        ((*CONTAINER, "resources", "limits", "memory"), "16 GB"),
        (("spec", "backoffLimit"), "2"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "resources"), {"CPU": 4}),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "none"),
        (("spec", "submitterConfig"), {"backofLimit": 1}),
        (("metadata", "label"), {}),
    ],
    ids=lambda v: ".".join(map(str, v)) if isinstance(v, tuple) else str(v),
)
def test_ray_job_mistake_is_found(overlay, crd_problems, path, value):
    (job,) = of_kind(overlay("gpu"), "RayJob")
    assert crd_problems(job) == []
    assert crd_problems(edited(job, path, value)) != []


def test_ray_job_without_a_group_name_is_found(overlay, crd_problems):
    (job,) = of_kind(overlay("gpu"), "RayJob")
    changed = copy.deepcopy(job)
    del changed["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]
    assert any("groupName" in p for p in crd_problems(changed))


def test_object_of_a_version_that_is_not_served_is_found(overlay, crd_problems):
    (queue,) = of_kind(overlay("kueue"), "ClusterQueue")
    with pytest.raises(LookupError, match="not 'v1beta3'"):
        crd_problems(queue | {"apiVersion": "kueue.x-k8s.io/v1beta3"})


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("NetworkPolicy", ("spec", "ingres"), []),
        ("NetworkPolicy", ("spec", "policyTypes"), "Ingress"),
        ("PersistentVolumeClaim", ("spec", "accessMode"), ["ReadWriteMany"]),
        ("ServiceAccount", ("automountServiceAccountToken",), "false"),
    ],
)
def test_native_mistake_is_found(overlay, kind, path, value):
    obj = of_kind(overlay("gpu"), kind)[0]
    assert native_problems(obj) == []
    assert native_problems(edited(obj, path, value)) != []


def test_crds_are_of_the_versions_that_the_manifests_use(crds: Path):
    assert {f.name for f in crds.iterdir()} >= {f"ray.io_{k}.yaml" for k in ("rayjobs", "rayclusters", "raycronjobs")}
