"""Losses by name, and weighted sums of them.

A training loop adds `total_loss` over the pairs of every micro-batch and worker and divides by the pairs of the global
batch. For every loss outside `WHOLE_BATCH` the result then does not depend on how the batch was cut.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dpo_ray.errors import ConfigError
from dpo_ray.learn.losses import anchored, pairwise, reference_free, whole_batch
from dpo_ray.learn.losses.pairs import PairLogps

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "sigmoid": pairwise.sigmoid,
    "robust": pairwise.robust,
    "hinge": pairwise.hinge,
    "ipo": pairwise.ipo,
    "sigmoid_norm": pairwise.sigmoid_norm,
    "exo_pair": pairwise.exo_pair,
    "discopop": pairwise.discopop,
    "nca_pair": anchored.nca_pair,
    "bco_pair": anchored.bco_pair,
    "sppo_hard": anchored.sppo_hard,
    "apo_zero": anchored.apo_zero,
    "apo_down": anchored.apo_down,
    "aot": whole_batch.aot,
    "aot_unpaired": whole_batch.aot_unpaired,
    "simpo": reference_free.simpo,
    "orpo": reference_free.orpo,
    "sft": reference_free.sft,
}


class Term(NamedTuple):
    """One loss of a sum."""

    name: str
    """Of `LOSSES`."""
    weight: float = 1.0
    options: Mapping[str, Any] = {}
    """Keyword arguments of the loss, without beta. For `sft` {"token_mean": "global"} asks for the mean over the chosen
    tokens of the global batch; `total_loss` then needs mean_chosen_tokens."""


def total_loss(
    terms: Sequence[Term],
    logps: PairLogps,
    *,
    beta: float,
    mean_chosen_tokens: float | None = None,
    pair_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (B,) weighted sums of the losses, differentiable.

    Args:
        beta: shared by all terms.
        mean_chosen_tokens: chosen tokens of the global batch divided by its pairs, where `needs_mean_chosen_tokens`.
        pair_weights: (B,) detached weights of the pairs, e.g. `wpo_weights`.
    """
    assert terms, "a loss has at least one term"
    assert pair_weights is None or not unweighable(terms), "sorting losses and sft take no weights of pairs"
    losses = torch.zeros_like(logps.chosen_logps)
    for name, weight, options in terms:
        if name == "sft":
            losses = losses + weight * reference_free.sft(logps, mean_chosen_tokens=_sft_tokens(options, mean_chosen_tokens))
        else:
            losses = losses + weight * LOSSES[name](logps, beta=beta, **options)
    return losses if pair_weights is None else losses * pair_weights


def needs_reference(terms: Iterable[Term]) -> bool:
    """Whether ref_chosen_logps and ref_rejected_logps must be given."""
    return any(term.name not in reference_free.REFERENCE_FREE for term in terms)


def needs_scores(terms: Iterable[Term]) -> bool:
    """Whether score_gap must be given."""
    return any(term.options.get("score_margin") for term in terms)


def needs_mean_chosen_tokens(terms: Iterable[Term]) -> bool:
    return any(term.options.get("token_mean") == "global" for term in terms)


def unweighable(terms: Iterable[Term]) -> list[str]:
    """Losses of the sum whose values do not belong to pairs, so that weights of pairs have no meaning."""
    return [term.name for term in terms if term.name in whole_batch.WHOLE_BATCH or term.name == "sft"]


def check_whole_batch(terms: Iterable[Term], *, world_size: int, micro_batches: int) -> None:
    """Refuse a layout in which a sorting loss would see a part of the global batch.

    Args:
        micro_batches: most micro-batches that a worker takes in one step.

    Raises:
        ConfigError: the batch is cut, over workers or over micro-batches.
    """
    sorting = sorted(whole_batch.WHOLE_BATCH.intersection(term.name for term in terms))
    if sorting and (world_size > 1 or micro_batches > 1):
        raise ConfigError(
            f"loss {', '.join(sorting)} sorts the whole global batch, got {world_size} workers and up to {micro_batches} "
            "micro-batches a step, expected one of each: set train.resources.workers to 1, and raise "
            "train.max_batch_tokens or lower train.global_batch_size until a step is one micro-batch"
        )


def _sft_tokens(options: Mapping[str, Any], mean_chosen_tokens: float | None) -> float | None:
    if options.get("token_mean", "completion") == "completion":
        return None
    assert mean_chosen_tokens is not None, "sft over the global token mean needs mean_chosen_tokens"
    return mean_chosen_tokens
