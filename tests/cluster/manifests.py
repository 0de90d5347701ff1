"""What `kubectl kustomize` makes of cluster/kuberay, and the pods that KubeRay makes of that.

Source of what the operator adds: ray-operator/controllers/ray/common/pod.go and job.go of KubeRay v1.7.0.
"""

import copy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "cluster/kuberay"
OVERLAYS = sorted(d.name for d in (KUBERAY / "overlays").iterdir() if (d / "kustomization.yaml").exists())
Object = dict[str, Any]


class Workload(NamedTuple):
    """A RayJob, RayCronJob or RayCluster."""

    object: Object
    job: Object | None
    """Its RayJobSpec; None for a RayCluster."""
    cluster: Object
    """Its RayClusterSpec."""

    def __str__(self) -> str:
        return f"{self.object['kind']} {self.object['metadata']['name']}"


class Pod(NamedTuple):
    where: str
    spec: Object
    """As the kubelet gets it, with the containers that KubeRay adds."""


def render(directory: Path) -> list[Object]:
    """The objects of a Kustomize directory.

    Raises:
        RuntimeError: kubectl cannot build it; with its message.
    """
    done = subprocess.run(["kubectl", "kustomize", str(directory)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"kubectl kustomize {directory}: {done.stderr}")
    return [o for o in yaml.load_all(done.stdout, yaml.CSafeLoader) if o]


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [o for o in objects if o["kind"] in kinds]


def workloads(objects: list[Object]) -> list[Workload]:
    found = []
    for o in of_kind(objects, "RayJob", "RayCronJob", "RayCluster"):
        if o["kind"] == "RayCluster":
            found.append(Workload(o, None, o["spec"]))
        else:
            job = o["spec"] if o["kind"] == "RayJob" else o["spec"]["jobTemplate"]
            found.append(Workload(o, job, job.get("rayClusterSpec", {})))
    return found


def groups(cluster: Object) -> Iterator[tuple[str, Object]]:
    """(name, spec) of the head and of every worker group."""
    yield "head", cluster["headGroupSpec"]
    for group in cluster.get("workerGroupSpecs", []):
        yield group["groupName"], group


def ray_container(group: Object) -> Object:
    return group["template"]["spec"]["containers"][0]


def pods(workload: Workload) -> list[Pod]:
    """Every kind of pod of a workload: head, one of each group, submitter."""
    found, mode = [], (workload.job or {}).get("submissionMode", "K8sJobMode")
    for name, group in groups(workload.cluster):
        spec = copy.deepcopy(group["template"]["spec"])
        if name == "head" and workload.cluster.get("enableInTreeAutoscaling"):
            spec["containers"].append(_autoscaler(workload.cluster))
        if name == "head" and mode == "SidecarMode":
            spec["containers"].append({"name": "ray-job-submitter"})  # without a securityContext, and nothing can give it one
        if name != "head":
            spec.setdefault("initContainers", []).append(_wait_for_head(spec["containers"][0]))
        found.append(Pod(f"{workload}, {name}", spec))
    if workload.job is not None and mode == "K8sJobMode":
        template = workload.job.get("submitterPodTemplate")
        spec = template["spec"] if template else {"containers": [{"name": "ray-job-submitter"}]}
        found.append(Pod(f"{workload}, submitter", copy.deepcopy(spec)))
    return found


def _autoscaler(cluster: Object) -> Object:
    options = cluster.get("autoscalerOptions", {})
    default = {"cpu": "500m", "memory": "512Mi"}
    return {
        "name": "autoscaler",
        "image": options.get("image", ray_container(cluster["headGroupSpec"])["image"]),
        "resources": options.get("resources", {"requests": default, "limits": default}),
        **{k: options[k] for k in ("securityContext", "env", "envFrom", "volumeMounts") if k in options},
    }


def _wait_for_head(ray: Object) -> Object:
    """It has the Ray container's securityContext, environment and mounts, and resources of its own."""
    fixed = {"cpu": "200m", "memory": "256Mi"}
    kept = {k: ray[k] for k in ("image", "securityContext", "env", "volumeMounts") if k in ray}
    return {"name": "wait-gcs-ready", "resources": {"requests": fixed, "limits": fixed}, **kept}


def containers(pod: Pod) -> list[Object]:
    return [*pod.spec.get("initContainers", []), *pod.spec["containers"]]


UNITS = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity as a number: cores, bytes, devices.

    Raises:
        ValueError: it is none.
    """
    text = str(text)
    number = text.rstrip("kKmMGTi")
    if text[len(number) :] not in UNITS:
        raise ValueError(f"{text!r} is no quantity")
    return float(number) * UNITS[text[len(number) :]]
