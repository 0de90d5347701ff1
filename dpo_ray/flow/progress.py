"""What the user sees while a plan runs: one line a stage, renewed in place on a terminal, every few seconds in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import TextIO

from dpo_ray.flow.artifact import Manifest

LOG_INTERVAL_S = 5.0
WIDTH = 32


class Progress:
    """Prints progress to a stream; holds the state of the one running stage."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.key = self.label = ""
        self.started = self.last = 0.0
        self.first: int | None = None
        self.writing = threading.Lock()

    def stage_started(self, key: str) -> None:
        self.key = key
        self.begin(key.rpartition("/")[2])
        self._line(f"{key:<{WIDTH}} starting", end=False)

    def begin(self, step: str) -> None:
        """A step of the running stage begins (`generate`, `evaluate samples/start`)."""
        where = self.key.rpartition("/")[0]
        self.label = f"{where}/{step}" if where else step
        self.first = None
        self.started = self.last = time.monotonic()

    def update(self, done: int, total: int, counters: Mapping[str, float]) -> None:
        """Rows done of rows in all; the first call after a start is what an earlier attempt had already done."""
        now = time.monotonic()
        if self.first is None:
            self.first, self.started = done, now
        interval = 0.2 if self.live else LOG_INTERVAL_S
        if now - self.last < interval:
            return
        self.last = now
        seconds, fresh = max(now - self.started, 1e-9), done - self.first
        parts = [f"{self.label:<{WIDTH}} {done}/{total} rows"]
        if fresh:
            measured, tokens = counters.get("tokens_per_s"), counters.get("tokens")
            if not measured:
                parts.append(f"{fresh / seconds:.1f} rows/s")
                measured = tokens and tokens * fresh / done / seconds
            if measured:
                parts.append(f"{measured:,.0f} tokens/s")
            if done < total:
                parts.append(f"{(total - done) * seconds / fresh:.0f} s left")
        parts += [f"{k} {v:.4g}" for k, v in counters.items() if k.startswith(("loss", "rewards/"))]
        self._line(", ".join(parts), end=False)

    def waits(self, text: str) -> None:
        """Say at once that a stage waits, and for what; from any thread."""
        self._line(text, end=False)

    def stage_done(self, key: str, manifest: Manifest, *, skipped: bool) -> None:
        rows = f"{manifest.rows_in} in, {manifest.rows_out} out"
        dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(manifest.dropped.items()))
        state = "done before" if skipped else f"{manifest.seconds:.1f} s"
        self._line(f"{key:<{WIDTH}} {state}: {rows}" + (f", dropped {dropped}" if dropped else ""), end=True)

    def _line(self, text: str, *, end: bool) -> None:
        with self.writing:
            if self.live:
                self.stream.write(f"\r\x1b[K{text}" + ("\n" if end else ""))
            else:
                self.stream.write(f"{text}\n")
            self.stream.flush()
