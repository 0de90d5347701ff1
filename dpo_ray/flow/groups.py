"""The groups of nodes that autoscaling grows, with the most nodes each may have.

Ray 2.60 has them in two places: in the GCS, where a platform reports its cluster configuration, and on Kubernetes in the
RayCluster resource, which KubeRay's autoscaler reads with the service account of the head pod; so does this, on the head.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray._private.state

UNBOUNDED = 1 << 20
"""Stands for a group without a maximum."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class NodeGroup(NamedTuple):
    name: str
    resources: Mapping[str, float]
    """Of one node, by Ray's names."""
    labels: Mapping[str, str] | None
    """None where the cluster does not tell them."""
    max_nodes: int


def node_groups() -> list[NodeGroup] | None:
    """Every group that can grow; none on a cluster without autoscaling; None on Kubernetes where they cannot be read."""
    config: Any = ray._private.state.state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return [
            NodeGroup(g.name, dict(g.resources), None, g.max_count if g.max_count >= 0 else UNBOUNDED)
            for g in config.node_group_configs
            if g.max_count != 0
        ]
    return _kuberay_groups()


@functools.lru_cache(maxsize=1)
def _kuberay_groups() -> list[NodeGroup] | None:
    """Those of the RayCluster that this process is in a pod of; None where its account may not read it."""
    name = os.environ.get("RAY_CLUSTER_NAME")  # KubeRay sets it in every pod
    if not name:
        return []
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    try:
        client = KubernetesHttpApiClient(namespace=(SERVICE_ACCOUNT / "namespace").read_text().strip())
        return groups_of_raycluster(client.get(f"rayclusters/{name}"))
    except Exception as error:  # a pod without a token or the rights, no route to the API server: of many kinds
        logging.getLogger(__name__).info("the RayCluster %s cannot be read: %s", name, error)
        return None


def groups_of_raycluster(cluster: Mapping[str, Any]) -> list[NodeGroup]:
    """The worker groups of a RayCluster resource; none without in-tree autoscaling, where their size is fixed."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

    if not cluster["spec"].get("enableInTreeAutoscaling"):
        return []
    types = _generate_available_node_types_from_ray_cr_spec(dict(cluster["spec"]))
    return [
        NodeGroup(name, one["resources"], one["labels"], one["max_workers"])
        for name, one in types.items()
        if one["max_workers"] > 0
    ]
