"""The configuration of a run, shaped like the pipeline: DPO on prompts (`RunConfig`) or on preferences (`PreferenceRun`), or
supervised fine-tuning on conversations (`SftRun`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from dpo_ray.config.block import URI, Block
from dpo_ray.config.data import Conversations, Preferences, Prompts
from dpo_ray.config.stages import Evaluate, EvaluatePairs, EvaluateSft, Generate, Pair, Reference, Score
from dpo_ray.config.train import SftTrain, Train, TrainBlock

EMBEDDED = ("quickstart", "quickstart-base")
"""Policies that come with the package."""


class RunBlock(Block):
    """What every run has."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The run's directory under root."""
    root: str
    """Absolute path (`~` is expanded) or URI (s3://, gs://) that every node of the cluster sees."""
    policy: str
    """What training starts from: a hub id, a local directory, `quickstart`, or `quickstart-base` (random weights)."""
    policy_revision: str | None = None
    """Commit or tag of a hub policy."""
    trust_remote_code: bool = False
    """Run Python code that a model repository brings along."""
    seed: int = 0
    max_wait_s: float = Field(default=3600.0, gt=0)
    """Longest that a stage waits for the nodes that it needs; then the run ends, and the same command goes on from there."""
    train: TrainBlock

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
    def revisions_belong_to_hub_policies(self) -> RunBlock:
        if self.policy_revision and (self.policy in EMBEDDED or self.policy.startswith(("/", "./", "../", "~"))):
            raise ValueError(f"policy_revision would be ignored: policy {self.policy!r} is no hub id; take it out")
        return self

    @property
    def directory(self) -> str:
        return f"{self.root}/{self.name}"


class RoundBlock(RunBlock):
    """What DPO rounds have, wherever their pairs come from."""

    rounds: int = Field(default=1, ge=1)
    reference: Reference = Reference()
    train: Train

    @field_validator("reference", mode="before")
    @classmethod
    def reference_policy_alone_is_short_for_the_block(cls, value: Any) -> Any:
        return {"policy": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def several_rounds_name_their_reference(self) -> RoundBlock:
        if self.rounds > 1 and self.reference.policy is None:
            raise ValueError(
                f"rounds={self.rounds} needs `reference: initial | previous | <path>`: whether the anchor stays at the "
                "initial policy or moves each round decides the result"
            )
        return self

    @model_validator(mode="after")
    def reference_options_need_a_reference(self) -> RoundBlock:
        ignored = self.reference.changed("cache", "per_token")
        if ignored and not self.train.needs_reference:
            raise ValueError(
                f"reference: {', '.join(ignored)} would be ignored: no loss of train.loss compares with a reference, so its "
                "stage is skipped; take it out"
            )
        return self

    @model_validator(mode="after")
    def sampler_values_serve_the_loss_of_every_round(self) -> RoundBlock:
        if self.reference.reuse == "none":
            return self
        if not self.train.needs_reference:
            raise ValueError("reference.reuse would be ignored: no loss of train.loss needs a reference; take it out")
        if self.train.ld_alpha is not None:
            raise ValueError(
                "reference.reuse `sampler` has one value a completion, and train.ld_alpha needs each token's; take out either"
            )
        if self.rounds > 1 and self.reference.policy == "initial":
            raise ValueError(
                f"reference.reuse `sampler` with reference `initial` and rounds={self.rounds}: from the second round on "
                "another policy samples the pairs; take out reuse, or use `previous`"
            )
        return self


class RunConfig(RoundBlock):
    """A policy and prompts taken through one or more DPO rounds."""

    prompts_per_round: int = Field(ge=1)
    """Each round takes its own slice of one fixed permutation of the training prompts."""
    prompts: Prompts
    generate: Generate = Generate()
    score: Score
    pair: Pair = Pair()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def reused_sampler_values_are_of_the_plain_distribution(self) -> RunConfig:
        if self.reference.reuse == "none":
            return self
        if not self.generate.sampler_logps:
            raise ValueError("reference.reuse `sampler` needs generate.sampler_logps: true; else there is nothing to take over")
        mode, quantization = (self.generate.engine_args.get(name) for name in ("logprobs_mode", "quantization"))
        if mode not in (None, "raw_logprobs"):
            raise ValueError(
                f"reference.reuse `sampler` needs log-probabilities before temperature and top-p, and "
                f"generate.engine_args has logprobs_mode {mode!r}; take out either"
            )
        if quantization is not None:
            raise ValueError(
                f"reference.reuse `sampler` needs an engine with the reference's own weights, and generate.engine_args has "
                f"quantization {quantization!r}; take out either"
            )
        return self


class PreferenceRun(RoundBlock):
    """A policy and existing preferences taken through one or more DPO rounds, without generation or scorer."""

    pairs_per_round: int | None = Field(default=None, ge=1)
    """Each round takes its own slice of one fixed permutation of the training pairs; None takes all, for one round."""
    preferences: Preferences
    evaluate: EvaluatePairs = EvaluatePairs()

    @model_validator(mode="before")
    @classmethod
    def nothing_is_sampled_or_scored(cls, tree: Any) -> Any:
        ignored = [n for n in ("prompts", "prompts_per_round", "generate", "score", "pair") if n in tree]
        if ignored:
            raise ValueError(
                f"{', '.join(ignored)} would be ignored: a run with `preferences` samples and scores nothing; take out these "
                "or `preferences`"
            )
        return tree

    @model_validator(mode="after")
    def no_engine_sampled_the_pairs(self) -> PreferenceRun:
        if self.reference.reuse != "none":
            raise ValueError(
                f"reference.reuse {self.reference.reuse!r} needs pairs that the reference sampled, and nobody sampled existing "
                "preferences; take it out"
            )
        return self

    @model_validator(mode="after")
    def people_give_no_scores(self) -> PreferenceRun:
        if self.train.needs_scores:
            raise ValueError(
                "train.loss: score_margin needs the scores of chosen and rejected, and existing preferences have none; take "
                "it out"
            )
        return self

    @model_validator(mode="after")
    def several_rounds_share_the_pairs(self) -> PreferenceRun:
        if self.rounds > 1 and self.pairs_per_round is None:
            raise ValueError(f"rounds={self.rounds} needs pairs_per_round; without it the first round takes every pair")
        return self


class SftRun(RunBlock):
    """A policy taught by conversations: what a round starts from must follow the format already."""

    conversations: Conversations
    train: SftTrain
    evaluate: EvaluateSft = EvaluateSft()

    @model_validator(mode="before")
    @classmethod
    def nothing_is_preferred(cls, tree: Any) -> Any:
        others = ("prompts", "prompts_per_round", "generate", "score", "pair", "preferences", "reference", "rounds")
        if ignored := [name for name in others if name in tree]:
            raise ValueError(
                f"{', '.join(ignored)} would be ignored: a run with `conversations` is supervised fine-tuning; take out these "
                "or `conversations`"
            )
        return tree


Round = RunConfig | PreferenceRun
Run = Round | SftRun


def run_class(tree: Mapping[str, Any]) -> type[RunConfig] | type[PreferenceRun] | type[SftRun]:
    """Which of them a YAML mapping describes."""
    if "conversations" in tree:
        return SftRun
    return PreferenceRun if "preferences" in tree else RunConfig
