"""Wait for the nodes that a stage needs, and say what is waited for.

A placement group stands for the stage while it waits: autoscaling sees it as demand, of this job alone, and it goes with
the driver. It is taken away before the stage asks for the same place itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from dpo_ray.errors import ResourceError
from dpo_ray.flow.fit import fits_now
from dpo_ray.flow.stage import Needs

LIMIT_S = 3600.0
SAY_EVERY_S = 30.0
LOOK_S = 1.0
RELEASED_S = 60.0


def wait_for_room(
    stage: str, needs: Needs, say: Callable[[str], object], *, limit_s: float = LIMIT_S, say_every_s: float = SAY_EVERY_S
) -> bool:
    """Return when the nodes have room for the stage; whether it had to wait.

    Args:
        say: is given a line when the wait begins, and every `say_every_s` from then on.

    Raises:
        ResourceError: there was no room within `limit_s`.
    """
    if not needs.count or fits_now(needs, needs.beside):
        return False
    started = said = time.monotonic()
    say(f"{stage} waits for {needs}: {situation()}")
    group = _stand_in(needs)
    try:
        while not group.wait(timeout_seconds=LOOK_S):
            now = time.monotonic()
            if now - started > limit_s:
                raise ResourceError(
                    f"{stage} found no room for {needs} within max_wait_s={limit_s:g}: {situation()}. What is committed is "
                    "kept: free the nodes or let the group grow, and run the same command, or raise max_wait_s"
                )
            if now - said >= say_every_s:
                said = now
                say(f"{stage} waits for {needs} since {now - started:.0f} s: {situation()}")
    finally:
        _remove(group)
    deadline = time.monotonic() + RELEASED_S
    while not fits_now(needs, needs.beside) and time.monotonic() < deadline:  # the nodes report what is free with a delay
        time.sleep(0.05)
    return True


def _stand_in(needs: Needs) -> PlacementGroup:
    bundle = {name: value for name, value in (("CPU", needs.cpus), ("GPU", needs.gpus)) if value}
    beside = [{"CPU": needs.beside}] if needs.beside else []
    labels = [dict(needs.node_labels)] * needs.count + [{} for _ in beside]
    return placement_group([bundle] * needs.count + beside, strategy="PACK", bundle_label_selector=labels)


def _remove(group: PlacementGroup) -> None:
    remove_placement_group(group)
    deadline = time.monotonic() + RELEASED_S
    while placement_group_table(group).get("state") != "REMOVED" and time.monotonic() < deadline:
        time.sleep(0.01)


def situation() -> str:
    """What the cluster does about those who wait: nodes that are starting, starts that failed, and what is free."""
    status = _cluster_status()
    parts = []
    if status is not None:
        coming = Counter(node.ray_node_type_name for node in status.pending_nodes)
        for launch in status.pending_launches:
            coming[launch.ray_node_type_name] += launch.count
        parts += [f"{count} of group {name} starting" for name, count in sorted(coming.items())]
        failed = {launch.ray_node_type_name: launch.details or "no reason given" for launch in status.failed_launches}
        parts += [f"group {name} did not start ({' '.join(why.split())[:200]})" for name, why in sorted(failed.items())]
    free = ray.available_resources()
    nodes = sum(1 for n in ray.nodes() if n["Alive"])
    return "; ".join([*parts, f"{nodes} nodes with {free.get('CPU', 0):g} CPU + {free.get('GPU', 0):g} GPU free"])


def pending_demand() -> list[str]:
    """What tasks, actors and placement groups of the cluster ask for and have no place for right now."""
    status = _cluster_status()
    if status is None:
        return []
    demands = status.resource_demands
    asked: Counter[str] = Counter()
    for demand in [*demands.ray_task_actor_demand, *demands.placement_group_demand]:
        for by_count in demand.bundles_by_count:
            asked[_bundle_text(by_count.bundle.items())] += by_count.count
    return [f"{count} x {bundle}" for bundle, count in asked.most_common()]


def _bundle_text(bundle: Iterable[tuple[str, float]]) -> str:
    shown = [f"{value:g} {name}" for name, value in sorted(bundle) if name in ("CPU", "GPU", "memory") and value]
    return " + ".join(shown) or "0 CPU"


def _cluster_status() -> Any:
    """Ray's own view of nodes and demand, as `ray status` has it; None where it does not answer."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        return get_cluster_status(ray.get_runtime_context().gcs_address, timeout=5)
    except Exception:  # for people alone: a stage must not fail for it
        return None
