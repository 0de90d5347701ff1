"""What a step minimises: from rows of a table to the loss of each pair.

In: a policy, rows and an `Objective`. Out: losses and implicit rewards of the pairs.

Shapes: B pairs, C = 2B completions (chosen and rejected of the first pair, of the second, ...), K completion tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_ray.learn import losses
from dpo_ray.learn.batched import lay_out
from dpo_ray.learn.layout import Group, TokenIds
from dpo_ray.learn.logps import Path, completion_sums, token_logps

Numbers = Sequence[float] | np.ndarray


class PairRows(NamedTuple):
    """Rows of the REFERENCED table, one entry per pair in every column."""

    pair_id: Sequence[str]
    prompt_token_ids: Sequence[TokenIds]
    chosen_token_ids: Sequence[TokenIds]
    rejected_token_ids: Sequence[TokenIds]
    ref_chosen_logps: Numbers | None = None
    """Sums in nats; None where no loss needs them."""
    ref_rejected_logps: Numbers | None = None
    chosen_score: Numbers | None = None
    rejected_score: Numbers | None = None
    ref_chosen_token_logps: Sequence[Numbers] | None = None
    """Per token, which LD-DPO needs."""
    ref_rejected_token_logps: Sequence[Numbers] | None = None


class Objective(NamedTuple):
    """The losses of a step and what modifies them; fields as in the configuration's `train`."""

    terms: Sequence[losses.Term]
    beta: float
    wpo: bool = False
    ld_alpha: float | None = None


class PairResult(NamedTuple):
    """What a forward says of B pairs; all (B,)."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    """Implicit ones, detached, as the following are."""
    rejected_rewards: torch.Tensor
    chosen_logps: torch.Tensor
    """Plain sums in nats."""
    rejected_logps: torch.Tensor
    losses_at_reference: torch.Tensor
    """What the losses would be if the policy had the reference's log-probabilities; 0 where not asked for."""


def pair_losses(
    model: PreTrainedModel,
    pairs: PairRows,
    objective: Objective,
    path: Path,
    *,
    mean_chosen_tokens: float,
    pad_token_id: int,
    device: torch.device | str,
    at_reference: bool = False,
) -> PairResult:
    """Run one forward over B pairs.

    Args:
        mean_chosen_tokens: chosen tokens of the global batch divided by its pairs.
        at_reference: give `losses_at_reference`; some loss must need a reference.
    """
    columns = (pairs.prompt_token_ids, pairs.chosen_token_ids, pairs.rejected_token_ids)
    groups = [Group(prompt, sides) for prompt, *sides in zip(*columns, strict=True)]
    batch = lay_out(groups, path, pad_token_id).to(device)
    # One forward for chosen and rejected: FSDP gathers the weights once per forward.
    tokens = token_logps(model, batch, path, overlaps=objective.wpo)
    plain = completion_sums(tokens.logps, batch.lengths).view(-1, 2)
    logps = _pair_logps(pairs, objective, tokens.logps, plain, batch.lengths, device)
    weights = None
    if tokens.overlaps is not None:
        aligned = completion_sums(tokens.logps.detach() - tokens.overlaps, batch.lengths) / batch.lengths
        weights = losses.wpo_weights(aligned[0::2], aligned[1::2])
    how: Any = {"beta": objective.beta, "mean_chosen_tokens": mean_chosen_tokens, "pair_weights": weights}
    total = losses.total_loss(objective.terms, logps, **how)
    known = torch.zeros_like(total)
    if at_reference:
        there = logps._replace(chosen_logps=logps.ref_chosen_logps, rejected_logps=logps.ref_rejected_logps)
        known = losses.total_loss(objective.terms, there, **how).detach()
    rewards = losses.implicit_rewards(logps, beta=objective.beta)
    chosen, rejected = plain.detach().unbind(1)
    return PairResult(total, rewards.chosen, rewards.rejected, chosen, rejected, known)


def _pair_logps(
    pairs: PairRows,
    objective: Objective,
    token_logps_K: torch.Tensor,
    plain: torch.Tensor,
    lengths: torch.Tensor,
    device: torch.device | str,
) -> losses.PairLogps:
    """Return what the losses get: sums of policy and reference, desensitised with `ld_alpha`."""

    def numbers(values: Numbers) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values), dtype=plain.dtype).to(device, non_blocking=True)

    chosen, rejected = plain.unbind(1)
    ref_chosen = ref_rejected = gap = None
    if losses.needs_reference(objective.terms):
        assert pairs.ref_chosen_logps is not None, "no reference log-probabilities"
        assert pairs.ref_rejected_logps is not None, "no reference log-probabilities"
        ref_chosen, ref_rejected = numbers(pairs.ref_chosen_logps), numbers(pairs.ref_rejected_logps)
    if losses.needs_scores(objective.terms):
        assert pairs.chosen_score is not None, "no scores"
        assert pairs.rejected_score is not None, "no scores"
        gap = numbers(pairs.chosen_score) - numbers(pairs.rejected_score)
    chosen_tokens, rejected_tokens = lengths.view(-1, 2).unbind(1)
    full_chosen = None
    if objective.ld_alpha is not None:
        assert pairs.ref_chosen_token_logps is not None, "LD-DPO needs the reference per token"
        assert pairs.ref_rejected_token_logps is not None, "LD-DPO needs the reference per token"
        sides = zip(pairs.ref_chosen_token_logps, pairs.ref_rejected_token_logps, strict=True)
        ref_K = numbers(np.concatenate([np.asarray(side) for pair in sides for side in pair]))
        full_chosen = chosen
        chosen, rejected = _desensitised(token_logps_K, lengths, objective.ld_alpha).unbind(1)
        ref_chosen, ref_rejected = _desensitised(ref_K, lengths, objective.ld_alpha).unbind(1)
    return losses.PairLogps(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens, gap, full_chosen)


def _desensitised(values_K: torch.Tensor, lengths: torch.Tensor, ld_alpha: float) -> torch.Tensor:
    """(B, 2) sums over the completions with what one has more than the other scaled."""
    shared = lengths.view(-1, 2).min(1).values.repeat_interleave(2)
    starts = lengths.cumsum(0) - lengths

    def each_token(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(lengths, output_size=len(values_K))

    position = torch.arange(len(values_K), device=values_K.device) - each_token(starts)
    scaled = losses.desensitise(values_K, position, each_token(shared), ld_alpha=ld_alpha)
    return completion_sums(scaled, lengths).view(-1, 2)
