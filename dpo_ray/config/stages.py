"""What each stage of a round does, one block a stage."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dpo_ray.config.block import Block, Dtype
from dpo_ray.config.losses import Loss, loss_list, loss_terms
from dpo_ray.config.resources import ActorResources, DataResources, EngineResources, TrainResources


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
    """Strings that end a completion. The text is cut before them; token ids, and log-probabilities, stay as sampled."""
    stop_token_ids: tuple[int, ...] = ()
    """More end tokens than the model's own."""


NOT_ENGINE_ARGS = {
    "model": "set policy",
    "revision": "set policy_revision",
    "trust_remote_code": "set trust_remote_code of the run",
    "load_format": "weights are read from safetensors only",
    "hf_token": "it would be written into resolved.yaml and manifests; set HF_TOKEN or HF_TOKEN_PATH on the nodes",
}


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
    """Keep the engine's own log-probability of each completion; reference.reuse can take it over."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Passed to the engine as they are, e.g. {gpu_memory_utilization: 0.85, enforce_eager: true}."""
    max_engine_crashes: int = Field(default=2, ge=1)
    """A prompt that crashes its engine this often, alone, is quarantined."""
    max_dropped: float = Field(default=0.05, ge=0, le=1)
    """The stage fails when more than this share of its rows is quarantined."""
    resources: EngineResources = EngineResources()

    @field_validator("engine_args")
    @classmethod
    def engine_args_leave_what_and_how_to_load(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in NOT_ENGINE_ARGS.keys() & arguments.keys():
            raise ValueError(f"{name} is no engine argument here: {NOT_ENGINE_ARGS[name]}; take it out")
        return arguments

    @model_validator(mode="after")
    def hf_engine_has_no_frequency_penalties(self) -> Generate:
        if self.engine == "hf" and (self.sampling.presence_penalty or self.sampling.frequency_penalty):
            raise ValueError("engine `hf` knows no presence_penalty or frequency_penalty; use `vllm`, or leave them at 0")
        return self

    @model_validator(mode="after")
    def hf_engine_has_no_options_of_vllm(self) -> Generate:
        ignored = [*self.changed("engine_args", "deterministic"), *self.resources.changed("tensor_parallel")]
        if self.engine == "hf" and ignored:
            raise ValueError(
                f"{', '.join(ignored)} would be ignored: engine `hf` draws each sample alone, from its own seed, on one "
                "device; take them out, or use `vllm`"
            )
        return self


class FunctionScore(Block):
    """Score with a Python function: `score(rows: list[dict]) -> list[float]`."""

    kind: Literal["function"]
    function: str
    """`package.module:name` or `path/to/file.py:name`; called with rows of prompt, completion, meta, finish_reason."""
    reasoning_end: str | None = None
    """Give the function the completion after the last such marker (e.g. `</think>`), without the reasoning part."""
    drop_non_finite: bool = False
    """Drop completions whose score is NaN or infinite; else such a score is an error."""
    max_dropped: float = Field(default=0.05, ge=0, le=1)
    """The stage fails when more than this share of the completions cannot be scored."""
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
    drop_non_finite: bool = False
    """Drop completions whose score is NaN or infinite; else such a score is an error."""
    max_dropped: float = Field(default=0.05, ge=0, le=1)
    """The stage fails when more than this share of the completions cannot be scored."""
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
    resources: DataResources = DataResources()

    @model_validator(mode="after")
    def ties_are_kept_or_a_gap_is_asked_for(self) -> Pair:
        if self.min_gap and not self.drop_ties:
            raise ValueError(
                f"drop_ties=false would be ignored: min_gap={self.min_gap:g} drops every tie; take out one of them"
            )
        return self


class Reference(Block):
    """Log-probabilities of chosen and rejected under the frozen reference. `reference: initial` is short for its policy."""

    policy: str | None = None
    """`initial`, `previous` (the policy that the round starts from), a hub id or a directory."""
    revision: str | None = None
    """Commit or tag of a hub policy that is named here."""
    cache: bool = True
    """Keep every completion's value under `<root>/.logps`, for other pairs, rounds and runs with the same reference."""
    reuse: Literal["none", "sampler"] = "none"
    """`sampler`: where the reference sampled the pairs itself, take the engine's own values over, with no pass of the
    model. 2 % of the pairs are computed too, and the stage refuses when the engine's bias would move the reward."""
    per_token: bool = False
    """Keep the value of each token too (`ref_chosen_token_logps`); train.ld_alpha does so by itself."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one forward, as the model sees them."""
    resources: ActorResources = ActorResources()

    @model_validator(mode="after")
    def revision_belongs_to_a_hub_policy(self) -> Reference:
        named = self.policy not in (None, "initial", "previous") and not str(self.policy).startswith(("/", "./", "../", "~"))
        if self.revision and not named:
            raise ValueError(f"revision would be ignored: reference policy {self.policy!r} is no hub id; take it out")
        return self

    @model_validator(mode="after")
    def sampler_values_are_sums_of_the_rounds_own_policy(self) -> Reference:
        if self.reuse == "none":
            return self
        if self.per_token:
            raise ValueError("reuse `sampler` has one value a completion, and per_token asks for each token's; take out either")
        if self.policy not in (None, "initial", "previous"):
            raise ValueError(
                f"reuse `sampler` needs the reference to have sampled the pairs, and {self.policy!r} does not sample; take "
                "out reuse, or set policy to `previous`"
            )
        return self


class Lora(Block):
    """Train low-rank adapters around the policy's frozen weights (arXiv:2106.09685), and merge them at the end of the round."""

    r: int = Field(ge=1)
    """Rank of an adapter."""
    alpha: float = Field(gt=0)
    """An adapter's output is scaled by alpha / r."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Every linear layer but the head, or modules by name: [q_proj, v_proj]."""

    @model_validator(mode="before")
    @classmethod
    def no_dropout(cls, fields: Any) -> Any:
        asked = [name for name in ("dropout", "lora_dropout") if isinstance(fields, dict) and name in fields]
        if asked:
            raise ValueError(f"{asked[0]} is not supported: a policy with dropout differs from its reference; take it out")
        return fields


class Train(Block):
    """DPO with FSDP2 on Ray Train."""

    loss: tuple[Loss, ...] = Field(default="sigmoid", validate_default=True)
    """A name, a block with its options ({kind: robust, label_smoothing: 0.1}), or a list of them: a weighted sum. Which
    losses there are, and their options: dpo_ray/config/losses.py."""
    beta: float = Field(gt=0)
    """Strength of the pull to the reference (Eq. 7, arXiv:2305.18290), shared by the losses of a sum."""
    wpo: bool = False
    """Weigh each pair by how likely the policy is to sample it today (arXiv:2406.11827)."""
    ld_alpha: float | None = Field(default=None, ge=0, lt=1)
    """LD-DPO: weight of the tokens that one completion of a pair has more than the other (arXiv:2409.06411)."""
    learning_rate: float = Field(gt=0)
    global_batch_size: int = Field(default=64, ge=1)
    """Pairs of one optimizer step, over all workers and micro-batches."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one micro-batch, as the model sees them; gradients accumulate to the global batch."""
    share_prompt: Literal["auto", "always", "never"] = "auto"
    """Compute a prompt once for all its completions, in every stage that needs log-probabilities. `auto` does it where a
    probe on a real row shows that the model gives the same values."""
    epochs: int = Field(default=1, ge=1)
    optimizer: Literal["adamw"] = "adamw"
    """Fused, with float32 state, sharded as the weights are."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0; 0.1 unless warmup_steps is given."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The same as a number of steps."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to 0 after the warmup, or stays."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Not applied to norms and biases."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(default=1.0, gt=0)
    dtype: Dtype = "bfloat16"
    """Compute type, of the reference stage too; master weights and log-softmax are float32."""
    activation_checkpointing: bool = False
    lora: Lora | None = None
    """Train adapters alone. The reference of a round is then still a whole policy, such as the one it starts from, and so
    is what the round makes; every round has fresh adapters."""
    checkpoint_steps: int = Field(default=100, ge=1)
    """Steps between two checkpoints for resume. A step waits for the copy of its state alone, not for the files."""
    checkpoints_kept: int = Field(default=2, ge=1)
    """Newest checkpoints that stay on disk; while one is written there is one more."""
    logging_steps: int = Field(default=10, ge=1)
    """Steps between two readings of the metrics, which are kept for every step: a GPU's host waits for it then alone."""
    report_to: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Where metrics go besides metrics.jsonl and tensorboard/; each needs the extra of its name."""
    max_failures: int = Field(default=2, ge=0)
    """Times that training may lose a worker and go on from the last checkpoint. What another attempt cannot mend (a loss
    that is not finite, a full disk, unusable input) stops at once."""
    max_setup_failures: int = Field(default=10, ge=0)
    """Times that starting the workers may fail: a lost node, a taken port, no room for them within a minute."""
    max_preemptions: int = Field(default=100, ge=0)
    """Times that training may lose a node with notice. At the notice it writes a checkpoint, and goes on until the node is
    gone."""
    collective_timeout_s: int = Field(default=600, ge=1)
    """Longest that a worker waits for the others in one exchange before it counts as a failure. It must cover how much
    longer than the fastest worker the slowest one takes to load the policy, and to read or write its part of a
    checkpoint."""
    resources: TrainResources = TrainResources()

    @field_validator("optimizer", mode="before")
    @classmethod
    def optimizer_steps_on_shards(cls, value: Any) -> Any:
        if "8bit" in str(value):
            raise ValueError(
                "8-bit AdamW keeps its state in blocks that cross the shards of FSDP2's tensors, and has not been shown to "
                "step on them; use adamw"
            )
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def one_report_is_short_for_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("loss", mode="before")
    @classmethod
    def one_loss_is_short_for_a_sum(cls, value: Any) -> Any:
        return loss_list(value)

    @model_validator(mode="after")
    def warmup_is_given_once(self) -> Train:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio:g} and warmup_steps={self.warmup_steps} both say how long the warmup is; "
                "take out one of them"
            )
        return self

    @model_validator(mode="after")
    def some_loss_uses_beta(self) -> Train:
        if not any(loss.uses_beta for loss in self.loss):
            raise ValueError(f"beta would be ignored: loss {self._names()} does not use it; add a preference loss")
        return self

    @model_validator(mode="after")
    def sorting_losses_see_the_whole_batch(self) -> Train:
        sorting = [loss.name() for loss in self.loss if loss.sorts_global_batch]
        if sorting and self.resources.max_workers > 1:
            raise ValueError(
                f"loss {', '.join(sorting)} sorts the whole global batch, got workers={self.resources.workers}; set "
                "resources.workers to 1"
            )
        return self

    @model_validator(mode="after")
    def wpo_weighs_losses_of_pairs(self) -> Train:
        others = [loss.name() for loss in self.loss if loss.sorts_global_batch or not loss.uses_beta]
        if self.wpo and others:
            raise ValueError(
                f"wpo weighs the loss of each pair, and {', '.join(others)} has none: sorting losses mix pairs, sft is of "
                "chosen alone; take out either"
            )
        return self

    @model_validator(mode="after")
    def desensitising_needs_a_reference(self) -> Train:
        others = [loss.name() for loss in self.loss if loss.uses_beta and not loss.needs_reference]
        if self.ld_alpha is not None and others:
            raise ValueError(
                f"ld_alpha scales log-ratios to the reference, and {', '.join(others)} averages plain log-probabilities over "
                "tokens; take out either"
            )
        return self

    @property
    def needs_reference(self) -> bool:
        return any(loss.needs_reference for loss in self.loss)

    @property
    def needs_scores(self) -> bool:
        """Whether pairs without scores cannot be trained on."""
        return any(loss.needs_scores for loss in self.loss)

    def num_warmup_steps(self, num_steps: int) -> int:
        """Steps of the warmup in a training of `num_steps`; a share of them is rounded up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil((0.1 if self.warmup_ratio is None else self.warmup_ratio) * num_steps)

    def terms(self) -> tuple[tuple[str, float, dict[str, Any]], ...]:
        """(name, weight, options) of each loss, for `dpo_ray.learn.losses.Term`."""
        return loss_terms(self.loss)

    def _names(self) -> str:
        return ", ".join(loss.name() for loss in self.loss)

    @model_validator(mode="after")
    def global_batch_divides_over_workers(self) -> Train:
        workers = self.resources.workers
        if isinstance(workers, tuple):
            if self.global_batch_size < self.resources.max_workers:
                raise ValueError(
                    f"global_batch_size={self.global_batch_size} cannot be cut into workers={list(workers)}: with the most of "
                    "them some would never have a pair; raise it, or lower the maximum"
                )
        elif self.global_batch_size % workers:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} does not divide over workers={workers}; "
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

    @field_validator("resources")
    @classmethod
    def nodes_are_those_of_the_stages_it_borrows_from(cls, resources: DataResources) -> DataResources:
        if resources.node_labels:
            raise ValueError(
                "node_labels would be ignored: evaluate samples, scores and computes log-probabilities on the nodes of "
                "generate, score and reference; set theirs"
            )
        return resources


class EvaluatePairs(Block):
    """Held-out pairs: implicit-reward accuracy, margins and KL of the new policy; nothing is sampled."""

    bootstrap_samples: int = Field(default=2000, ge=100)
    """Resamples of the conversations for the 95 % interval."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one forward, as the models see them."""
    resources: ActorResources = ActorResources()
