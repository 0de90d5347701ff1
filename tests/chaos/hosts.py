"""Network namespaces as hosts: each has an address, a host name and a cable of its own; all see the same disk.

Needs root and `ip netns`. A host's processes are those in its namespace, so a whole host can be killed by them, whoever
started them. Names are made anew each time, and everything is taken away again when the block is left.
"""

import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

ETC = Path("/etc/netns")
"""`ip netns exec NAME` shows a process the files of /etc/netns/NAME in place of those in /etc."""


def missing() -> str | None:
    """Why this machine has no such hosts; None where it has."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "no `ip` or `unshare` here"
    try:
        with hosts(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}` does not work here: {error.stderr.strip()}"


class Host(NamedTuple):
    """A namespace, the address in it, and the end of its cable that stays outside."""

    name: str
    address: str
    cable: str

    @property
    def on(self) -> list[str]:
        """What stands before a command to run it here, under this host's name."""
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]

    def unplug(self) -> None:
        """Nothing reaches the host, or comes from it, from now on; its processes and its disk go on."""
        _ip("link", "set", self.cable, "down")

    def plug(self) -> None:
        _ip("link", "set", self.cable, "up")

    def pids(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.name).stdout.split()]

    def kill(self) -> None:
        """SIGKILL to every process of the host, until there is none."""
        deadline = time.monotonic() + 30
        while pids := [pid for pid in self.pids() if _lives(pid)]:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{pids} on {self.name} outlive SIGKILL")
            time.sleep(0.05)


@contextmanager
def hosts(count: int, *, own_name: str | None = None) -> Iterator[list[Host]]:
    """Hosts on one network, which this process reaches too.

    Args:
        own_name: the address that each host's own name has for itself, 127.0.1.1 on a Debian machine; its address if None.
    """
    token, network = uuid.uuid4().hex[:6], _free_network()
    bridge = f"dr{token}"
    made = [Host(f"dr{token}-{i}", f"{network}.{i + 2}", f"dr{token}v{i}") for i in range(count)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{network}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in made:
            _make(host, bridge, made, own_name)
        yield made
    finally:
        for host in made:
            with suppress(subprocess.CalledProcessError):
                host.kill()
            _ip("link", "del", host.cable, check=False)
            _ip("netns", "del", host.name, check=False)
            shutil.rmtree(ETC / host.name, ignore_errors=True)
        _ip("link", "del", bridge, check=False)
        with suppress(OSError):  # there before, or somebody else's
            ETC.rmdir()


def _make(host: Host, bridge: str, all_of_them: list[Host], own_name: str | None) -> None:
    names = {other.name: other.address for other in all_of_them} | ({host.name: own_name} if own_name else {})
    (ETC / host.name).mkdir(parents=True)
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
    (ETC / host.name / "hosts").write_text("\n".join(lines) + "\n")
    _ip("netns", "add", host.name)
    _ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.name)
    _ip("link", "set", host.cable, "master", bridge, "up")
    for command in ("addr add {} dev eth0", "link set eth0 up", "link set lo up"):
        _ip("-n", host.name, *command.format(f"{host.address}/24").split())


def _free_network() -> str:
    """The first three numbers of a private network that no interface here is in."""
    used = {address.address.rpartition(".")[0] for own in psutil.net_if_addrs().values() for address in own}
    return random.SystemRandom().choice([n for i in range(256) if (n := f"10.213.{i}") not in used])


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True, timeout=60)
