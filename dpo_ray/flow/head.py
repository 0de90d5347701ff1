"""Whether the head of a cluster answers: asked before a driver joins it, and by a thread beside the driver, which speaks.

Ray ends a driver whose head stays away for a minute, by an exit that Python does not see, and says nothing.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

LOOK_S = 5.0
GONE_S = 10.0
"""Without an answer for so long the head is said to be away: a busy one may need some seconds."""


@contextmanager
def watch(
    say: Callable[[str], object], address: str | None = None, *, look_s: float = LOOK_S, gone_s: float = GONE_S
) -> Iterator[None]:
    """While the block runs, connect to the head every `look_s`; say when it is away, and when it is back.

    Args:
        address: `host:port`; of this driver's cluster if None.
    """
    address, stop = address or ray.get_runtime_context().gcs_address, threading.Event()

    def look() -> None:
        answered, said = time.monotonic(), False
        while not stop.wait(look_s):
            if answers(address, look_s):
                if said:
                    say(f"the head of the cluster ({address}) answers again")
                answered, said = time.monotonic(), False
            elif not said and time.monotonic() - answered >= gone_s:
                said = True
                say(
                    f"the head of the cluster ({address}) has not answered for {time.monotonic() - answered:.0f} s; when it "
                    "stays away for a minute Ray ends this command. What is committed is kept, and the same command goes on "
                    "from there, on another cluster too"
                )

    threading.Thread(target=look, daemon=True, name="head").start()
    try:
        yield
    finally:
        stop.set()


def answers(address: str, timeout_s: float) -> bool:
    """Whether something takes a connection at `host:port` within the time."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s):
            return True
    except OSError:
        return False
