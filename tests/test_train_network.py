"""The interface of an address, and who names it."""

import os

import psutil
import pytest
import ray

from dpo_ray import train_network


def test_interface_is_the_one_that_has_the_address():
    name = train_network.interface_of("127.0.0.1")
    assert name is not None
    assert "127.0.0.1" in {entry.address for entry in psutil.net_if_addrs()[name]}
    assert train_network.interface_of("198.51.100.7") is None


@pytest.mark.parametrize(("named", "expected"), [(None, train_network.interface_of("127.0.0.1")), ("ib0", "ib0")])
def test_interface_of_rays_address_is_chosen_unless_the_environment_names_one(monkeypatch, named, expected):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if named:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", named)
    train_network.choose_interface()
    chosen = os.environ.pop("GLOO_SOCKET_IFNAME")
    assert chosen == expected


def test_interface_stays_unset_where_no_interface_has_the_address(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "198.51.100.7")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    train_network.choose_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
