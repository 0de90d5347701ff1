"""Which network interface gloo uses: the one of the address by which Ray knows the node.

Gloo itself takes the address of the machine's own name. Where that is 127.0.1.1, as Debian and Ubuntu write it into
/etc/hosts, or none at all, no worker on another node reaches it.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class OnRaysNetwork(TorchConfig):
    """Ray's settings of the process group, with the interface chosen on every worker before the group is made."""

    @property
    def backend_cls(self) -> Any:
        return _OnRaysNetwork


class _OnRaysNetwork(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Tell gloo in this process the interface of Ray's address; one that the environment names stays."""
    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The interface that has this address; None where none has, as behind a translated one."""
    for name, own in psutil.net_if_addrs().items():
        if address in {entry.address for entry in own}:
            return name
    return None
