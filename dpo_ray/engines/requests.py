"""What goes into an engine and what comes out: plain data that crosses processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Request(NamedTuple):
    """One prompt to sample `n` completions of; sample k uses the seed `seed + k`."""

    prompt_token_ids: list[int]
    seed: int
    n: int


class Sample(NamedTuple):
    """One sampled completion. `token_ids` are as sampled and hold the end token if there was one."""

    token_ids: list[int]
    text: str
    finish_reason: str
    """`stop` or `length`."""
    logps_sum: float | None
    """Sum of the engine's own log-probabilities (nats) under the unscaled distribution, when asked for."""


class EngineSettings(NamedTuple):
    """How to start an engine; equal settings can share one."""

    kind: str
    dtype: str
    max_model_len: int
    engine_args: Mapping[str, Any]
    tensor_parallel: int
    gpus: float
    cpus: float
    parts_in_flight: int
    closed: bool
    """Finish each call alone before the next begins (deterministic runs)."""
    node_labels: Mapping[str, str] = {}
    """Of the nodes that engines run on, as Ray's label_selector."""
