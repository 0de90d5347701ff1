"""How a policy is trained: what every objective shares, and the two objectives, DPO and SFT."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dpo_ray.config.block import Block, Dtype
from dpo_ray.config.losses import Loss, loss_list, loss_terms
from dpo_ray.config.resources import TrainResources


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


class TrainBlock(Block):
    """A training loop with FSDP2 on Ray Train, whatever it minimises."""

    learning_rate: float = Field(gt=0)
    global_batch_size: int = Field(default=64, ge=1)
    """Rows (pairs, or conversations) of one optimizer step, over all workers and micro-batches."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one micro-batch, as the model sees them; gradients accumulate to the global batch."""
    share_prompt: Literal["auto", "always", "never"] = "auto"
    """Compute a prompt once for all its completions, and pack rows without padding, in every stage that needs
    log-probabilities. `auto` does it where a probe on a real row shows that the model gives the same values."""
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

    @model_validator(mode="after")
    def warmup_is_given_once(self) -> TrainBlock:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio:g} and warmup_steps={self.warmup_steps} both say how long the warmup is; "
                "take out one of them"
            )
        return self

    def num_warmup_steps(self, num_steps: int) -> int:
        """Steps of the warmup in a training of `num_steps`; a share of them is rounded up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil((0.1 if self.warmup_ratio is None else self.warmup_ratio) * num_steps)

    @model_validator(mode="after")
    def global_batch_divides_over_workers(self) -> TrainBlock:
        workers = self.resources.workers
        if isinstance(workers, tuple):
            if self.global_batch_size < self.resources.max_workers:
                raise ValueError(
                    f"global_batch_size={self.global_batch_size} cannot be cut into workers={list(workers)}: with the most of "
                    "them some would never have a row; raise it, or lower the maximum"
                )
        elif self.global_batch_size % workers:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} does not divide over workers={workers}; "
                "choose a multiple, so that no worker idles in a step"
            )
        return self


class Train(TrainBlock):
    """DPO, or another preference loss."""

    loss: tuple[Loss, ...] = Field(default="sigmoid", validate_default=True)
    """A name, a block with its options ({kind: robust, label_smoothing: 0.1}), or a list of them: a weighted sum. Which
    losses there are, and their options: dpo_ray/config/losses.py."""
    beta: float = Field(gt=0)
    """Strength of the pull to the reference (Eq. 7, arXiv:2305.18290), shared by the losses of a sum."""
    wpo: bool = False
    """Weigh each pair by how likely the policy is to sample it today (arXiv:2406.11827)."""
    ld_alpha: float | None = Field(default=None, ge=0, lt=1)
    """LD-DPO: weight of the tokens that one completion of a pair has more than the other (arXiv:2409.06411)."""

    @field_validator("loss", mode="before")
    @classmethod
    def one_loss_is_short_for_a_sum(cls, value: Any) -> Any:
        return loss_list(value)

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

    def terms(self) -> tuple[tuple[str, float, dict[str, Any]], ...]:
        """(name, weight, options) of each loss, for `dpo_ray.learn.losses.Term`."""
        return loss_terms(self.loss)

    def _names(self) -> str:
        return ", ".join(loss.name() for loss in self.loss)


class SftTrain(TrainBlock):
    """Supervised fine-tuning: the mean -log p of what an assistant says."""

    mean_over: Literal["tokens", "turns"] = "tokens"
    """The mean over all assistant tokens of the global batch, as TRL's SFTTrainer has it; or over its rows, of the mean of
    each, so that a short answer counts as much as a long one."""
