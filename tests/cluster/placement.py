"""Whether what a configuration asks of a cluster fits the pods that a manifest lets it have."""

import math
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dpo_ray.cli import parse_arguments
from dpo_ray.config import Block, Run

from .manifests import ROOT, Object, Workload, of_kind, quantity, ray_container

IMAGE_ROOT = "/opt/dpo-ray"
"""Where cluster/Dockerfile puts pipelines/."""
BESIDE = 0.25
"""CPUs of the Ray Data tasks that feed actors (Needs.beside in dpo_ray/flow/stage.py)."""


class Bundle(NamedTuple):
    """What a stage asks for: `low` to `high` times these on one node each."""

    stage: str
    cpus: float
    gpus: float
    low: int
    high: int
    labels: dict[str, str]
    beside: float


class Group(NamedTuple):
    """What Ray sees of a worker group; resources are of one pod."""

    name: str
    cpus: float
    gpus: float
    least: int
    most: int
    labels: dict[str, str]

    def holds(self, bundle: Bundle) -> int:
        """Bundles that fit one pod."""
        if not all(selects(value, self.labels.get(key)) for key, value in bundle.labels.items()):
            return 0
        by = [int(have / want) for have, want in ((self.cpus, bundle.cpus), (self.gpus, bundle.gpus)) if want]
        return min(by, default=bundle.high)


def selects(selector: str, value: str | None) -> bool:
    """Ray's label selectors: `a`, `!a`, `in(a, b)`, `!in(a, b)`; a missing label is none of them."""
    names = {n.strip() for n in selector.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")}
    return (value in names) != selector.startswith("!")


def ray_groups(cluster: Object) -> list[Group]:
    """KubeRay gives Ray the limits of the first container, CPUs rounded up, unless rayStartParams or resources say else."""
    found = []
    for spec in cluster.get("workerGroupSpecs", []):
        limits = ray_container(spec)["resources"]["limits"]
        start, own = spec.get("rayStartParams", {}), {k.lower(): v for k, v in spec.get("resources", {}).items()}
        cpus = start.get("num-cpus") or own.get("cpu") or math.ceil(quantity(limits["cpu"]))
        gpus = start.get("num-gpus") or own.get("gpu") or limits.get("nvidia.com/gpu", 0)
        hosts = spec.get("numOfHosts", 1)
        least, most = spec.get("minReplicas", 0) * hosts, spec["maxReplicas"] * hosts
        found.append(Group(spec["groupName"], quantity(cpus), quantity(gpus), least, most, spec.get("labels", {})))
    return found


def bundles(config: Block, stage: str = "") -> Iterator[Bundle]:
    """What each block with `resources` asks for, wherever in the tree it is."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if name == "resources":
            yield _bundle(stage, value)
        elif isinstance(value, Block):
            yield from bundles(value, f"{stage}.{name}" if stage else name)


def _bundle(stage: str, resources: Any) -> Bundle:
    count, beside = getattr(resources, "workers", 1), 0.0
    if hasattr(resources, "actors"):
        count, beside = resources.actors, BESIDE
    low, high = count if isinstance(count, tuple) else (count, count)
    gpus = getattr(resources, "gpus", 0.0)
    return Bundle(stage, resources.cpus, gpus, low, high, dict(getattr(resources, "node_labels", {})), beside)


def misfits(config: Run, cluster: Object) -> list[str]:
    """What does not fit: a bundle that no pod holds, or more of them than the groups' maxima."""
    groups, found = ray_groups(cluster), []
    for b in bundles(config):
        room = {g.name: g.holds(b) * g.most for g in groups}
        asked = f"{b.stage}: {b.cpus:g} CPU + {b.gpus:g} GPU" + (f" on {b.labels}" if b.labels else "")
        if not any(g.holds(b) for g in groups):
            found.append(f"{asked} fits no pod of {[g.name for g in groups]}")
        elif sum(room.values()) < b.high:
            found.append(f"{b.high} x {asked}, but the groups' maxima hold {room}")
        elif sum(g.cpus * g.most for g in groups) - b.low * b.cpus < b.beside:
            found.append(f"{asked}: nothing is left for the tasks beside {b.low} of them")
    return found


def unheld_by_minima(config: Run, cluster: Object) -> list[str]:
    """Stages whose least number of bundles does not fit the pods that are there from the start."""
    groups = ray_groups(cluster)
    return [
        f"{b.stage} needs {b.low} x {b.cpus:g} CPU + {b.gpus:g} GPU, more than minReplicas hold"
        for b in bundles(config)
        if sum(g.holds(b) * g.least for g in groups) < b.low
    ]


def run_of(workload: Workload, objects: list[Object]) -> Run:
    """The run of a job's entrypoint, validated as the driver would.

    Raises:
        ConfigError: a flag or field is wrong.
        LookupError: the script or the configuration is neither in the image nor in a mounted ConfigMap.
    """
    assert workload.job is not None
    interpreter, script, config, *flags = shlex.split(workload.job["entrypoint"])
    if interpreter != "python":
        raise LookupError(f"the entrypoint starts with {interpreter!r}, not with python")
    read_file(script, workload, objects)
    return _parse(read_file(config, workload, objects), flags)


def read_file(path: str, workload: Workload, objects: list[Object]) -> str:
    """What the head reads at a path: of pipelines/ in the image, or of a ConfigMap that it mounts.

    Raises:
        LookupError: there is nothing.
    """
    relative = Path(path).relative_to(IMAGE_ROOT) if path.startswith(f"{IMAGE_ROOT}/pipelines/") else None
    if relative and (ROOT / relative).is_file():
        return (ROOT / relative).read_text()
    for directory, config_map in mounted_config_maps(workload, objects):
        if str(Path(path).parent) == directory and Path(path).name in config_map["data"]:
            return config_map["data"][Path(path).name]
    raise LookupError(f"{path} is neither in the image nor in a ConfigMap that the head mounts")


def mounted_config_maps(workload: Workload, objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """(mount path, ConfigMap) of the head."""
    template = workload.cluster["headGroupSpec"]["template"]["spec"]
    maps = {o["metadata"]["name"]: o for o in of_kind(objects, "ConfigMap")}
    mounts = {m["name"]: m["mountPath"] for m in template["containers"][0].get("volumeMounts", [])}
    for volume in template.get("volumes", []):
        name = volume.get("configMap", {}).get("name")
        if name in maps and volume["name"] in mounts:
            yield mounts[volume["name"]], maps[name]


def configurations(workload: Workload, objects: list[Object]) -> list[Run]:
    """The run of its entrypoint, or, without one, those of the ConfigMaps that its head mounts."""
    if workload.job is not None:
        return [run_of(workload, objects)]
    texts = [text for _, m in mounted_config_maps(workload, objects) for text in m["data"].values()]
    return [_parse(text, []) for text in texts]


def _parse(text: str, flags: list[str]) -> Run:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "run.yaml"
        file.write_text(text)
        return parse_arguments([str(file), *flags])[1]
