"""Where stages run. No field of these is part of a fingerprint: results change by rounding at most."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dpo_ray.config.block import Block

OTHER_PARALLELISM = ("tensor_parallel", "context_parallel", "pipeline_parallel", "sequence_parallel", "expert_parallel")
"""What users of other trainers look for here."""


LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
LABEL_KEY = re.compile(rf"([a-zA-Z0-9.-]{{1,253}}/)?{LABEL}")
LABEL_VALUE = re.compile(rf"!?{LABEL}|!?in\({LABEL}(, ?{LABEL})*\)")


class Placed(Block):
    """On which nodes a stage may run."""

    node_labels: dict[str, str] = Field(default_factory=dict)
    """Labels that the nodes must have, as Ray's label_selector has them: {pool: train}; a value can also be `!spot` or
    `in(a100, h100)`."""

    @field_validator("node_labels")
    @classmethod
    def node_labels_can_be_selected(cls, labels: dict[str, str]) -> dict[str, str]:
        for key, value in labels.items():
            if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
                raise ValueError(
                    f"got {key!r}: {value!r}; expected a Kubernetes label such as `pool: train` (up to 63 letters, digits, "
                    "`-`, `_` and `.`), or a value `!spot`, `in(a, b)` or `!in(a, b)`"
                )
        # Ray 2.60 takes a space for a part of the value behind it, and would look for ` b` for ever.
        return {key: value.replace(" ", "") for key, value in labels.items()}


class DataResources(Placed):
    """Where a row-wise stage runs."""

    rows_per_part: int = Field(default=64, ge=1)
    """Rows that are committed together; a kill loses at most the parts in flight."""
    cpus: float = Field(default=1.0, gt=0)
    """CPUs of one task."""


class ActorResources(Placed):
    """Where a stage with a loaded model runs."""

    rows_per_part: int = Field(default=64, ge=1)
    """Rows that are committed together; a kill loses at most the parts in flight."""
    actors: int | tuple[int, int] = 1
    """Number of model copies, or [min, max]: as many as fit, at least min."""
    cpus: float = Field(default=1.0, ge=0)
    """CPUs of one actor."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of one actor."""

    @field_validator("actors")
    @classmethod
    def actors_are_a_positive_range(cls, actors: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = actors if isinstance(actors, tuple) else (actors, actors)
        if not 1 <= low <= high:
            raise ValueError(f"got {actors}; expected a count of at least 1, or [min, max] with 1 <= min <= max")
        return actors

    @property
    def min_actors(self) -> int:
        return self.actors[0] if isinstance(self.actors, tuple) else self.actors

    @property
    def max_actors(self) -> int:
        return self.actors[1] if isinstance(self.actors, tuple) else self.actors


class EngineResources(ActorResources):
    """Where generation engines run: one actor is one engine."""

    rows_per_part: int = Field(default=256, ge=1)
    """Prompts that are committed together. With parts_in_flight and num_completions it should hold more sequences than the
    engine runs at a time (vLLM: 256 on CPU, up to 1024 on a GPU), else the engine waits at the end of every part."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Devices that one engine spans, all on one node. With GPUs, `gpus` must equal it."""
    parts_in_flight: int = Field(default=4, ge=1)
    """Parts that one engine works on at a time, so that the tail of one overlaps the next and the engine is never idle."""

    @model_validator(mode="after")
    def gpus_match_tensor_parallel(self) -> EngineResources:
        if self.gpus > 1 and self.gpus != self.tensor_parallel:
            raise ValueError(f"gpus={self.gpus:g} but tensor_parallel={self.tensor_parallel}; an engine uses one GPU a shard")
        if 0 < self.gpus <= 1 < self.tensor_parallel:
            raise ValueError(f"tensor_parallel={self.tensor_parallel} needs gpus={self.tensor_parallel}, got {self.gpus:g}")
        return self


class TrainResources(Placed):
    """Where training runs."""

    workers: int | tuple[int, int] = 1
    """Ray Train workers, one process each; FSDP2 shards the policy over all of them. [min, max]: as many as fit, at least
    min; when nodes come or go, training goes on from its last checkpoint on the new number. The pairs of every step and
    the learning rates are the same on any number."""
    cpus: float = Field(default=1.0, gt=0)
    """CPUs of one worker."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of one worker (0 or 1)."""
    shard: Literal["all", "node"] = "all"
    """Spread each weight over all workers, or over those of a node, with a copy on every node (HSDP): weights then move
    inside a node only, and memory holds them once a node. Needs the same number of workers on every node; while those of a
    range [min, max] differ, all of them share one copy."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the node's memory, and only the layers at work on the GPU."""

    @field_validator("workers")
    @classmethod
    def workers_are_a_positive_range(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = workers if isinstance(workers, tuple) else (workers, workers)
        if not 1 <= low <= high:
            raise ValueError(f"got {workers}; expected a count of at least 1, or [min, max] with 1 <= min <= max")
        return workers

    @model_validator(mode="before")
    @classmethod
    def parallel_by_data_alone(cls, fields: Any) -> Any:
        asked = [name for name in OTHER_PARALLELISM if isinstance(fields, dict) and name in fields]
        if asked:
            raise ValueError(
                f"{asked[0]} is not supported: training shards weights and splits batches over workers, never a layer or a "
                "sequence; take it out, and use more workers (activation_checkpointing and cpu_offload save memory)"
            )
        return fields

    @model_validator(mode="after")
    def offload_is_from_a_gpu(self) -> TrainResources:
        if self.cpu_offload and not self.gpus:
            raise ValueError("cpu_offload=true would be ignored: workers without GPUs hold everything in memory; take it out")
        return self

    @property
    def min_workers(self) -> int:
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def max_workers(self) -> int:
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers
