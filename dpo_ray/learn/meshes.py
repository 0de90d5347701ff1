"""The device mesh that a policy is spread over.

In: where each rank runs. Out: one dimension, every rank a shard; or two, copies between nodes and shards within each, so
that weights are gathered inside a node and only gradients cross between nodes.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpo_ray.errors import ResourceError


def policy_mesh(device_type: str, node: str | int, *, copy_per_node: bool = False, elastic: bool = False) -> DeviceMesh:
    """Return the mesh over all ranks; every rank calls it.

    Args:
        node: what names the node of this rank.
        copy_per_node: one copy of the policy on each node (HSDP), sharded over the node's ranks. On a single node it is
            the same as without.
        elastic: ranks come and go. While nodes have different numbers of ranks, all share one copy, which takes less
            memory on each, rather than stop.

    Raises:
        ResourceError: on every rank, if nodes have different numbers of ranks, and these do not change.
    """
    if not copy_per_node:
        return init_device_mesh(device_type, (dist.get_world_size(),))
    nodes: list[str | int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, node)
    ranks = [[rank for rank, other in enumerate(nodes) if other == each] for each in dict.fromkeys(nodes)]
    if len(sizes := {len(own) for own in ranks}) > 1 and not elastic:
        raise ResourceError(
            f"shard=node needs the same number of train workers on every node, got {sorted(sizes)}; choose workers as a "
            "multiple of a node's, or shard=all"
        )
    if len(ranks) == 1 or len(sizes) > 1:
        return init_device_mesh(device_type, (dist.get_world_size(),))
    return DeviceMesh(device_type, ranks, mesh_dim_names=("copy", "shard"))


def device_of(mesh: DeviceMesh) -> torch.device:
    """Return the device that this rank computes on."""
    return torch.device("cpu") if mesh.device_type == "cpu" else torch.device("cuda", torch.cuda.current_device())
