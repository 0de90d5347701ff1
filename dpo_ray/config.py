"""The configuration of a run: one frozen pydantic tree, shaped like the pipeline.

YAML in, dotted overrides from the command line over it (`--train.beta 0.2`, see cli.py), resolved YAML out. Nothing is
read from the environment. What decides the result in silence has no default: policy, prompts, beta, learning rate, and
the reference when there is more than one round. Imports no torch, ray or vllm, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Dtype = Literal["float32", "bfloat16"]
URI = re.compile(r"^[a-z][a-z0-9+.-]*://")


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataResources(Block):
    """Where a row-wise stage runs. Never part of a fingerprint: results change by rounding at most."""

    rows_per_part: int = Field(default=64, ge=1)
    """Rows that are committed together; a kill loses at most the parts in flight."""
    cpus: float = Field(default=1.0, gt=0)
    """CPUs of one task."""


class ActorResources(Block):
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


class TrainResources(Block):
    """Where training runs."""

    workers: int = Field(default=1, ge=1)
    """Ray Train workers, one process each; FSDP2 shards the policy over all of them."""
    cpus: float = Field(default=1.0, gt=0)
    """CPUs of one worker."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of one worker (0 or 1)."""


class Prompts(Block):
    """Where prompts come from, and which of them are held out."""

    source: str
    """A .jsonl, .parquet or .csv file or glob, `datasets:<hub id or local path>`, or `quickstart`."""
    subset: str | None = None
    """Configuration name of a `datasets:` source."""
    source_split: str = "train"
    """Split of a `datasets:` source."""
    revision: str | None = None
    """Commit or tag of a `datasets:` hub source."""
    prompt_column: str = "prompt"
    """Column with the prompt: chat messages (list of {role, content}) or plain text (one user turn)."""
    system_prompt: str | None = None
    """Put before every prompt that does not start with a system turn."""
    tools_column: str | None = None
    """Column with tool definitions for the chat template (a list, or its JSON)."""
    meta_columns: tuple[str, ...] | None = None
    """Columns kept in `meta` for the scorer; None keeps every other column."""
    num_prompts: int | None = Field(default=None, ge=1)
    """Read at most this many rows of the source."""
    eval_prompts: int = Field(default=256, ge=1)
    """Prompts held out for evaluation: about this many, chosen by hash, the same in every round."""
    split_by: Literal["conversation", "prompt"] = "conversation"
    """What the hash of the split is taken of: system prompt and first user turn, or the whole prompt."""
    max_dropped: float = Field(default=0.05, ge=0, le=1)
    """The stage fails when more than this share of the source's rows is unusable. Duplicates do not count."""
    resources: DataResources = DataResources(rows_per_part=4096)


class Sampling(Block):
    """Sampling parameters; every one is explicit, a model's generation_config.json changes none of them."""

    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 keeps all tokens."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: int = Field(default=512, ge=1)
    """Length limit of a completion; one that reaches it has finish_reason `length` and no end token."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """More end tokens than the model's own."""


class Generate(Block):
    """Sample completions with one vLLM engine per actor."""

    engine: Literal["vllm", "hf"] = "vllm"
    """`hf` is the fallback where vLLM has no wheel: the same rows, slower."""
    num_completions: int = Field(default=2, ge=2)
    """Completions of each prompt (K)."""
    sampling: Sampling = Sampling()
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """A longer prompt is quarantined, never cut."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking: false}."""
    dtype: Dtype = "bfloat16"
    """Compute type of the engine."""
    deterministic: bool = False
    """Run closed parts one at a time on each engine, so that the same config gives the same bytes. Slower."""
    sampler_logps: bool = False
    """Keep the engine's own log-probability of each completion (a diagnostic; never used as reference)."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Passed to the engine as they are, e.g. {gpu_memory_utilization: 0.85, enforce_eager: true}."""
    max_dropped: float = Field(default=0.05, ge=0, le=1)
    """The stage fails when more than this share of its rows is quarantined."""
    resources: EngineResources = EngineResources()

    @model_validator(mode="after")
    def hf_engine_has_no_frequency_penalties(self) -> Generate:
        if self.engine == "hf" and (self.sampling.presence_penalty or self.sampling.frequency_penalty):
            raise ValueError("engine `hf` knows no presence_penalty or frequency_penalty; use `vllm`, or leave them at 0")
        return self


class FunctionScore(Block):
    """Score with a Python function: `score(rows: list[dict]) -> list[float]`."""

    kind: Literal["function"]
    function: str
    """`package.module:name` or `path/to/file.py:name`; called with rows of prompt, completion, meta, finish_reason."""
    reasoning_end: str | None = None
    """Give the function the completion after the last such marker (e.g. `</think>`), without the reasoning part."""
    max_dropped: float = Field(default=0.05, ge=0, le=1)
    resources: DataResources = DataResources()


class RewardModelScore(Block):
    """Score with a Hugging Face sequence-classification model of one label."""

    kind: Literal["reward_model"]
    model: str
    """Hub id or local directory."""
    revision: str | None = None
    reasoning_end: str | None = None
    """Score the completion after the last such marker (e.g. `</think>`), without the reasoning part."""
    max_tokens: int = Field(default=4096, ge=1)
    """A longer conversation is dropped by reason, never cut."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Padded tokens of one forward."""
    dtype: Dtype = "bfloat16"
    max_dropped: float = Field(default=0.05, ge=0, le=1)
    resources: ActorResources = ActorResources()


Score = Annotated[FunctionScore | RewardModelScore, Field(discriminator="kind")]


class Pair(Block):
    """Choose chosen and rejected among the scored completions of a prompt."""

    method: Literal["best_worst", "random", "all_above_gap"] = "best_worst"
    """Best against worst, one random pair ordered by score, or every pair whose score gap is at least min_gap."""
    min_gap: float = Field(default=0.0, ge=0)
    """Smallest score gap of a pair."""
    drop_ties: bool = True
    """Drop pairs of equal score; else the earlier sample is the chosen one."""
    drop_identical: bool = True
    """Drop pairs whose token ids are equal."""
    drop_empty: bool = True
    """Drop completions without visible text."""
    drop_length_cut: bool = True
    """Drop completions cut by the length limit."""
    drop_non_finite: bool = True
    """Drop completions whose score is missing or not finite; else such a score is an error."""
    resources: DataResources = DataResources()


class Reference(Block):
    """Log-probabilities of chosen and rejected under the frozen reference. `reference: initial` is short for its policy."""

    policy: str | None = None
    """`initial`, `previous` (the policy that the round starts from), a hub id or a directory."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Padded tokens of one forward."""
    resources: ActorResources = ActorResources()


class Train(Block):
    """DPO with FSDP2 on Ray Train."""

    loss: Literal["sigmoid"] = "sigmoid"
    beta: float = Field(gt=0)
    """Strength of the pull to the reference (Eq. 7, arXiv:2305.18290)."""
    learning_rate: float = Field(gt=0)
    global_batch_size: int = Field(default=64, ge=1)
    """Pairs of one optimizer step, over all workers and micro-batches."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Padded tokens (chosen and rejected) of one micro-batch; gradients accumulate to the global batch."""
    epochs: int = Field(default=1, ge=1)
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to 0 after the warmup, or stays."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Not applied to norms and biases."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(default=1.0, gt=0)
    dtype: Dtype = "bfloat16"
    """Compute type, of the reference stage too; master weights and log-softmax are float32."""
    activation_checkpointing: bool = False
    checkpoint_steps: int = Field(default=100, ge=1)
    """Steps between two checkpoints for resume."""
    resources: TrainResources = TrainResources()

    @model_validator(mode="after")
    def global_batch_divides_over_workers(self) -> Train:
        if self.global_batch_size % self.resources.workers:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} does not divide over workers={self.resources.workers}; "
                "choose a multiple, so that no worker idles in a step"
            )
        return self


class Evaluate(Block):
    """Held-out prompts: the new policy against the one that the round started from."""

    sampling: Sampling | None = None
    """None: as in generate."""
    num_completions: int = Field(default=1, ge=1)
    """Completions of each held-out prompt that are compared."""
    best_of: int = Field(default=1, ge=1)
    """Completions of each held-out prompt from the starting policy, to report the mean of the best of them."""
    bootstrap_samples: int = Field(default=2000, ge=100)
    """Resamples of the prompts for the 95 % intervals."""
    resources: DataResources = DataResources()


class RunConfig(Block):
    """One run: a policy and prompts taken through one or more DPO rounds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The run's directory under root."""
    root: str
    """Absolute path (`~` is expanded) or URI (s3://, gs://) that every node of the cluster sees."""
    policy: str
    """What round 0 starts from: a hub id, a local directory, or `quickstart`."""
    policy_revision: str | None = None
    """Commit or tag of a hub policy."""
    trust_remote_code: bool = False
    """Run Python code that a model repository brings along."""
    seed: int = 0
    rounds: int = Field(default=1, ge=1)
    prompts_per_round: int = Field(ge=1)
    """Each round takes its own slice of one fixed permutation of the training prompts."""
    prompts: Prompts
    generate: Generate = Generate()
    score: Score
    pair: Pair = Pair()
    reference: Reference = Reference()
    train: Train
    evaluate: Evaluate = Evaluate()

    @field_validator("reference", mode="before")
    @classmethod
    def reference_policy_alone_is_short_for_the_block(cls, value: Any) -> Any:
        return {"policy": value} if isinstance(value, str) else value

    @field_validator("root")
    @classmethod
    def root_is_absolute_or_uri(cls, root: str) -> str:
        if URI.match(root):
            return root.rstrip("/")
        path = os.path.expanduser(root)
        if not os.path.isabs(path):
            raise ValueError(
                f"got {root!r}; expected an absolute path or a URI, because Ray workers and submitted jobs run in other "
                "directories"
            )
        return path.rstrip("/")

    @model_validator(mode="after")
    def several_rounds_name_their_reference(self) -> RunConfig:
        if self.rounds > 1 and self.reference.policy is None:
            raise ValueError(
                f"rounds={self.rounds} needs `reference: initial | previous | <path>`: whether the anchor stays at the "
                "initial policy or moves each round decides the result"
            )
        return self

    @property
    def directory(self) -> str:
        return f"{self.root}/{self.name}"
