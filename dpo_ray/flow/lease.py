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
from typing import Any

import psutil

from dpo_ray.errors import ResourceError
from dpo_ray.flow import storage

HEARTBEAT_S = 10.0
EXPIRES_S = 60.0


class Lease:
    """Holds the lease of one run, from construction to `release`."""

    def __init__(self, directory: str) -> None:
        self.uri = f"{directory}/_lease.json"
        holder = read(self.uri)
        if holder and alive(holder):
            raise ResourceError(
                f"{directory} is being run by process {holder['pid']} on {holder['host']} (last sign of life "
                f"{time.time() - holder['time']:.0f} s ago). Wait for it, stop it, or give this run another `name`; a driver "
                f"that died on another machine is taken over {EXPIRES_S:g} s after its last sign of life"
            )
        self.token = uuid.uuid4().hex
        self.stop = threading.Event()
        self._beat()
        threading.Thread(target=self._beat_forever, daemon=True, name="lease").start()

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
            fs, path = storage.filesystem(self.uri)
            fs.delete_file(path)

    def _beat(self) -> None:
        beat = {"token": self.token, "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        storage.write_json(self.uri, {**beat, "time": time.time()})

    def _beat_forever(self) -> None:
        while not self.stop.wait(HEARTBEAT_S):
            holder = read(self.uri)
            if holder is None or holder["token"] != self.token:
                return
            self._beat()


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
