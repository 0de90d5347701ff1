"""One driver per run: a lease in the run's directory with a heartbeat and a fencing token.

A second driver is refused while the first one lives. A driver that lost its lease (it was frozen, another one took over)
finds another token in the file and commits nothing more.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import psutil

from dpo_ray.errors import ResourceError
from dpo_ray.flow import storage

HEARTBEAT_S = 10.0
EXPIRES_S = 60.0
LOOK_S = 0.5


class Lease:
    """Holds the lease of one run, from construction to `release`."""

    def __init__(self, directory: str, say: Callable[[str], object] = id) -> None:
        """Take the lease.

        Args:
            say: is given a line when this waits to see whether a driver on another machine still lives.

        Raises:
            ResourceError: another driver holds it, and gives signs of life.
        """
        self.uri = f"{directory}/_lease.json"
        holder = self._living_holder(say)
        if holder:
            raise ResourceError(
                f"{directory} is being run by process {holder['pid']} on {holder['host']} (last sign of life "
                f"{max(0.0, time.time() - holder['time']):.0f} s ago). Wait for it, stop it, or give this run another `name`"
            )
        self.token = uuid.uuid4().hex
        self.stop = threading.Event()
        storage.patient(self._beat)()
        threading.Thread(target=self._beat_forever, daemon=True, name="lease").start()

    def _living_holder(self, say: Callable[[str], object]) -> dict[str, Any] | None:
        """Who holds the lease and lives. A driver on another machine must show it: a new cluster may be up before it is
        clear that the old one is gone."""
        first = read(self.uri)
        if not first or not alive(first) or first["host"] == socket.gethostname():
            return first if first and alive(first) else None
        say(f"{first['host']} held this run {time.time() - first['time']:.0f} s ago; waiting up to {EXPIRES_S:g} s for a sign")
        deadline = time.monotonic() + EXPIRES_S
        while time.monotonic() < deadline:
            holder = read(self.uri)
            if holder is None or not alive(holder):
                return None
            if (holder["token"], holder["time"]) != (first["token"], first["time"]):
                return holder
            time.sleep(LOOK_S)
        return None

    def check(self) -> None:
        """Raise when another driver has taken the run over; called before every commit.

        Raises:
            ResourceError: the lease is another driver's.
        """
        holder = read(self.uri)
        if holder is None or holder["token"] != self.token:
            raise ResourceError(f"{self.uri} is another driver's now; this one commits nothing more")

    def release(self) -> None:
        self.stop.set()
        holder = read(self.uri)
        if holder and holder["token"] == self.token:
            storage.delete_file(self.uri)

    def _beat(self) -> None:
        beat = {"token": self.token, "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        # Once: a write that is tried again later could come after that of a driver that has taken over meanwhile.
        storage.write_bytes_once(self.uri, storage.json_bytes({**beat, "time": time.time()}))

    def _beat_forever(self) -> None:
        while not self.stop.wait(HEARTBEAT_S):
            try:
                holder = read(self.uri)
                if holder is None or holder["token"] != self.token:
                    return
                self._beat()
            except OSError:  # storage is away; whether the lease is still ours shows when it is back
                continue


def read(uri: str) -> dict[str, Any] | None:
    """The lease on disk, or None; one that is being written at this moment counts as held by its writer's last word."""
    for _ in range(5):
        try:
            return storage.read_json(uri) if storage.exists(uri) else None
        except (ValueError, FileNotFoundError):
            time.sleep(0.1)
    return None


def alive(holder: dict[str, Any]) -> bool:
    """Whether the holder may still be running: on this machine its process, elsewhere the age of its heartbeat."""
    if holder["host"] == socket.gethostname():
        return _started(holder["pid"]) == holder["started"]
    return time.time() - holder["time"] < EXPIRES_S


def _started(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None
