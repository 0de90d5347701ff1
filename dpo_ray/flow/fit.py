"""Whether a stage fits the cluster: now, when every node is idle, or once autoscaling has added all the nodes that it can."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
import ray._private.state

from dpo_ray.errors import ResourceError
from dpo_ray.flow.groups import NodeGroup, node_groups
from dpo_ray.flow.stage import Needs, labels_text

NODE_GROUP = "ray.io/node-group"
"""The label by which Ray says which group a node is of."""


class Node(NamedTuple):
    """A node that takes work: it lives, and is not about to be taken away."""

    id: str
    address: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]


class Shape(NamedTuple):
    """A node, or as many more as a group can grow by."""

    labels: Mapping[str, str] | None
    """None where the cluster does not tell them."""
    total: Mapping[str, float]
    count: int


class Short(NamedTuple):
    """What a stage that does not fit lacks."""

    fitting: int
    """Bundles that fit."""
    missing: str
    advice: str


def live_nodes() -> list[Node]:
    """Every node that takes work, with what is free on it right now."""
    draining = ray._private.state.state.get_draining_nodes()
    free = ray._private.state.available_resources_per_node()
    return [
        Node(n["NodeID"], n["NodeManagerAddress"], n.get("Labels") or {}, n["Resources"], free.get(n["NodeID"], {}))
        for n in ray.nodes()
        if n["Alive"] and n["NodeID"] not in draining
    ]


def has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a node's labels are those of a label_selector: `a`, `!a`, `in(a, b)`, `!in(a, b)`.

    A node without the label matches the negations alone, as Ray's scheduler has it.
    """
    for key, selector in wanted.items():
        values = re.split(r", ?", selector.lstrip("!").removeprefix("in(").rstrip(")"))
        if (labels.get(key) in values) == selector.startswith("!"):
            return False
    return True


def places(resources: Mapping[str, float], needs: Needs) -> int:
    """How many of the stage's bundles these resources of one node hold; the stage's own count where they need nothing."""
    wanted = {"CPU": needs.cpus, "GPU": needs.gpus}
    return min((int(resources.get(name, 0) / each + 1e-6) for name, each in wanted.items() if each), default=needs.count)


def free_places(needs: Needs) -> int:
    """How many bundles fit the nodes right now."""
    return sum(places(node.free, needs) for node in live_nodes() if has_labels(node.labels, needs.node_labels))


def fits_now(needs: Needs, beside: float = 1.0) -> bool:
    """Whether what is free right now holds the stage, and leaves `beside` CPUs for Ray Data's tasks."""
    if not needs.cpus and not needs.gpus:
        return True
    nodes = live_nodes()
    left = sum(n.free.get("CPU", 0) for n in nodes) - needs.count * needs.cpus
    fitting = sum(places(n.free, needs) for n in nodes if has_labels(n.labels, needs.node_labels))
    return fitting >= needs.count and left >= beside - 1e-6


def check_fits(stage: str, needs: Needs) -> None:
    """Raise when the cluster could not hold what the stage needs: all nodes idle, and all that autoscaling can add there.

    Where autoscaling does not tell what it can add, nothing is raised: the stage waits (waiting.py).

    Raises:
        ResourceError: with the resource that is missing, and the group or nodes that should have it.
    """
    if not needs.count:
        return
    nodes, groups = live_nodes(), node_groups()
    if groups is None:
        return
    if short := lacking(needs, nodes, groups):
        adding = ", counting what autoscaling can add" if groups else ""
        raise ResourceError(
            f"{stage} needs {needs}{_beside(needs)}, but only {short.fitting} fit on this cluster{adding}: {short.missing} "
            f"({_described(nodes, groups)}). {short.advice}, or lower `resources` of {stage}"
        )


def lacking(needs: Needs, nodes: Sequence[Node], groups: Sequence[NodeGroup]) -> Short | None:
    """What is missing for the stage, on nodes that are idle and on those that the groups can still grow by; None: nothing."""
    running = Counter(node.labels.get(NODE_GROUP) for node in nodes)
    growth = [Shape(g.labels, g.resources, max(0, g.max_nodes - running[g.name])) for g in groups]
    shapes = [*(Shape(n.labels, n.total, 1) for n in nodes), *growth]
    selected = [s for s in shapes if s.labels is None or has_labels(s.labels, needs.node_labels)]
    fitting = sum(s.count * places(s.total, needs) for s in selected)
    if fitting < needs.count:
        return Short(fitting, _missing(needs, fitting, selected), _advice(needs, fitting, groups))
    left = sum(s.count * s.total.get("CPU", 0) for s in shapes) - needs.count * needs.cpus
    if left < needs.beside - 1e-6:
        missing = f"only {left:g} CPU would be left for the tasks that feed it, which need {needs.beside:g}"
        return Short(needs.count, missing, _more(groups, "CPU"))
    return None


def _missing(needs: Needs, fitting: int, selected: Sequence[Shape]) -> str:
    if not selected:
        return f"no node has the labels {labels_text(needs.node_labels)}"
    for resource, wanted in (("GPU", needs.gpus), ("CPU", needs.cpus)):
        most = max(s.total.get(resource, 0) for s in selected)
        if most < wanted:
            return f"one {needs.what} needs {wanted:g} {resource} on its node, and the largest has {most:g}"
    short = needs.count - fitting
    gpus = f" + {short * needs.gpus:g} GPU" if needs.gpus else ""
    return f"{short * needs.cpus:g} CPU{gpus} are missing"


def _advice(needs: Needs, fitting: int, groups: Sequence[NodeGroup]) -> str:
    """Which group should grow, or what should be added where there are no groups."""
    labels = labels_text(needs.node_labels)
    if not groups:
        return f"Add nodes{f' with the labels {labels}' if labels else ''}"
    named = [g for g in groups if g.labels is None or has_labels(g.labels, needs.node_labels)]
    if not named:
        return f"Give one group the labels {labels}"
    able = [g for g in named if places(g.resources, needs)]
    if not able:
        widest = max(named, key=lambda g: (g.resources.get("GPU", 0), g.resources.get("CPU", 0)))
        gpus = f" + {needs.gpus:g} GPU" if needs.gpus else ""
        return f"Give the nodes of group {widest.name} at least {needs.cpus:g} CPU{gpus}"
    group = max(able, key=lambda g: places(g.resources, needs))
    more = -(-(needs.count - fitting) // places(group.resources, needs))
    return f"Let group {group.name} grow to {group.max_nodes + more} nodes (maxReplicas, now {group.max_nodes})"


def _more(groups: Sequence[NodeGroup], resource: str) -> str:
    able = [g for g in groups if g.resources.get(resource, 0)]
    return f"Let group {able[0].name} grow beyond {able[0].max_nodes} nodes (maxReplicas)" if able else "Add nodes"


def _beside(needs: Needs) -> str:
    return f" and {needs.beside:g} CPU for the tasks that feed it" if needs.beside else ""


def _described(nodes: Iterable[Node], groups: Iterable[NodeGroup]) -> str:
    """What there is: nodes of the same shape together, and each group with its maximum."""
    shapes = Counter(_shape(n.total, {k: v for k, v in n.labels.items() if not k.startswith("ray.io/")}) for n in nodes)
    live = "; ".join(f"{count} x {shape}" if count > 1 else shape for shape, count in shapes.items()) or "none"
    grow = "; ".join(f"{g.name} up to {g.max_nodes} x {_shape(g.resources, g.labels or {})}" for g in groups)
    return f"nodes: {live}" + (f"; groups: {grow}" if grow else "")


def _shape(resources: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    text = f"{resources.get('CPU', 0):g} CPU + {resources.get('GPU', 0):g} GPU"
    return f"{text}, {labels_text(labels)}" if labels else text
