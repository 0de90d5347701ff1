"""The project's own metrics, through Ray to Prometheus; the driver counts all of them, tagged by run, round and stage.

Counters count what this driver has seen: rows that an earlier attempt committed are not in them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from dpo_ray.flow.fit import live_nodes
from dpo_ray.flow.stage import Progress, Stage, StageOutput

TAGS = ("run", "round", "stage")
COUNTERS = {
    "dpo_ray_rows_total": "Rows that a stage has worked on.",
    "dpo_ray_tokens_total": "Tokens that a stage has sampled, scored or trained on.",
    "dpo_ray_dropped_total": "Rows that a stage has dropped by reason; they lie in quarantine/.",
    "dpo_ray_engine_restarts_total": "Generation engines that died and were started again.",
}
GAUGES = {
    "dpo_ray_reward_margin": "DPO's implicit reward of chosen minus that of rejected: of the last step read, or of evaluate.",
    "dpo_ray_kl": "Nats a completion: in train mean log reference - log policy of the batch, in evaluate KL to the reference.",
    "dpo_ray_step_seconds": "Seconds of one optimizer step.",
    "dpo_ray_idle_share": "Share of the cluster's GPUs, or of its CPUs where it has no GPU, that nothing holds.",
}
OF_PROGRESS = {
    "rewards/margins": "dpo_ray_reward_margin",
    "kl_ref_to_policy": "dpo_ray_kl",
    "step_time_s": "dpo_ray_step_seconds",
}
"""Counters of a stage's progress that are gauges here."""
OF_EVALUATE = {"eval_rewards/margins": "dpo_ray_reward_margin", "kl": "dpo_ray_kl"}
"""Metrics of a committed evaluation that are."""


class Measured:
    """A stage's progress, counted on its way to where it is shown; holds what it has counted so far."""

    def __init__(self, progress: Progress, run: str, stage: Stage) -> None:
        self.progress, self.stage = progress, stage
        self.tags = {"run": run, "round": "" if stage.round is None else str(stage.round), "stage": stage.name}
        self.seen: dict[str, float] | None = None
        self.updates = self.restarts = 0
        self.moved = time.monotonic()
        """When rows were last finished, or a step began."""

    def begin(self, step: str) -> None:
        self.progress.begin(step)
        self.seen, self.moved = None, time.monotonic()

    def update(self, done: int, total: int, counters: Mapping[str, float]) -> None:
        self.progress.update(done, total, counters)
        self.updates += 1
        if self.seen is None or done != self.seen["rows"]:
            self.moved = time.monotonic()
        now = {"rows": float(done), "tokens": counters.get("tokens", 0.0), "dropped": counters.get("dropped", 0.0)}
        if self.seen is not None:
            for name, value in now.items():
                # After a restart training counts from its last checkpoint: what it does again is work done again.
                self.count(f"dpo_ray_{name}_total", value - self.seen[name])
        self.seen = now
        for name, gauge in OF_PROGRESS.items():
            if name in counters:
                self.set(gauge, counters[name])

    def waits(self, text: str) -> None:
        self.progress.waits(text)

    def ended(self, output: StageOutput) -> None:
        """Count what came with the output alone: the rows of a stage that says nothing on its way, and its evaluation."""
        if not self.updates:
            self.count("dpo_ray_rows_total", output.rows_in)
            self.count("dpo_ray_dropped_total", sum(output.dropped.values()))
        for name, gauge in OF_EVALUATE.items():
            if name in output.metrics:
                self.set(gauge, output.metrics[name])

    def restarted(self, restarts: int) -> None:
        """How often the running engines have started again; engines of another policy count from 0."""
        self.count("dpo_ray_engine_restarts_total", restarts - (self.restarts if restarts >= self.restarts else 0))
        self.restarts = restarts

    def idle(self) -> None:
        """Look at the cluster's idle share."""
        nodes = live_nodes()
        for resource in ("GPU", "CPU"):
            if total := sum(n.total.get(resource, 0) for n in nodes):
                self.set("dpo_ray_idle_share", sum(n.free.get(resource, 0) for n in nodes) / total)
                return

    def count(self, name: str, more: float) -> None:
        if more > 0:
            _metric(name).inc(more, tags=self.tags)

    def set(self, name: str, value: float) -> None:
        _metric(name).set(value, tags=self.tags)


@functools.cache
def _metric(name: str) -> Any:
    kind, text = (Counter, COUNTERS[name]) if name in COUNTERS else (Gauge, GAUGES[name])
    return kind(name, text, TAGS)
