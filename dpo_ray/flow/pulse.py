"""A thread beside a running stage: looks at the cluster for its metrics, and speaks when the stage has long said nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dpo_ray.flow.metrics import Measured
from dpo_ray.flow.waiting import pending_demand, situation

BEAT_S = 5.0
SILENT_S = 60.0
"""Without progress for so long a stage is said to wait, and again after as long."""


@contextmanager
def pulse(
    stage: str, progress: Measured, restarts: Callable[[], int], *, beat_s: float = BEAT_S, silent_s: float = SILENT_S
) -> Iterator[None]:
    """While the block runs, look every `beat_s`: how idle the cluster is, which engines died, whether rows still come.

    Args:
        restarts: how often the running engines have started again.
    """
    stop = threading.Event()
    progress.restarts = restarts()  # those of an engine that an earlier stage has started were its own

    def beat() -> None:
        said = time.monotonic()
        while not stop.wait(beat_s):
            try:
                progress.idle()
                progress.restarted(restarts())
                now = time.monotonic()
                if now - max(said, progress.moved) >= silent_s:
                    said = now
                    progress.waits(f"{stage}: nothing was finished for {now - progress.moved:.0f} s; {_why()}")
            except Exception:  # it only looks on: what Ray does not answer must not stop the stage
                continue

    thread = threading.Thread(target=beat, daemon=True, name="pulse")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(beat_s)
    progress.restarted(restarts())


def _why() -> str:
    demand = pending_demand()
    waits = f"{', '.join(demand)} wait for a node with room" if demand else "nothing waits for a node"
    return f"{waits} ({situation()})"
