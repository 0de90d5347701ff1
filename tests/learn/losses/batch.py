"""One micro-batch of per-token log-probabilities, from which both our losses and TRL's are computed.

Shapes: B pairs, S = 2B sequences (all chosen, then all rejected), T positions after the shift.
"""

from typing import NamedTuple

import torch

from dpo_ray.learn.losses import PairLogps, desensitised_sums

CHOSEN_TOKENS = (3, 7, 1, 4, 6)
REJECTED_TOKENS = (5, 2, 4, 4, 1)
PROMPT_TOKENS = (2, 1, 3, 2, 2)


class TokenBatch(NamedTuple):
    logps_ST: torch.Tensor
    """A leaf with requires_grad; 0 outside the completions, as TRL's head gives them."""
    ref_logps_ST: torch.Tensor
    log_sum_sq_probs_ST: torch.Tensor
    """log sum over the vocabulary of p^2, at every position."""
    mask_ST: torch.Tensor


def token_batch(pairs: slice = slice(None), dtype: torch.dtype = torch.float64) -> TokenBatch:
    """Five pairs of unequal lengths, always the same numbers; `pairs` keeps some of them."""
    generator = torch.Generator().manual_seed(0)
    tokens = [*CHOSEN_TOKENS, *REJECTED_TOKENS]
    prompts = [*PROMPT_TOKENS, *PROMPT_TOKENS]
    positions = torch.arange(max(n + p for n, p in zip(tokens, prompts, strict=True)))
    mask_ST = torch.stack([(positions >= p) & (positions < p + n) for n, p in zip(tokens, prompts, strict=True)])
    draw = lambda: torch.rand(mask_ST.shape, generator=generator, dtype=torch.float64)
    logps_ST = -(0.05 + 2 * draw())
    ref_logps_ST = logps_ST + 0.8 * (draw() - 0.5)
    log_sum_sq_probs_ST = -(0.2 + draw())
    rows = [*range(5)[pairs], *(i + 5 for i in range(5)[pairs])]
    leaf_ST = (logps_ST * mask_ST)[rows].to(dtype).requires_grad_()
    return TokenBatch(
        leaf_ST, (ref_logps_ST * mask_ST)[rows].to(dtype), log_sum_sq_probs_ST[rows].to(dtype), mask_ST[rows].long()
    )


def pair_logps(batch: TokenBatch, *, ld_alpha: float | None = None) -> PairLogps:
    """What a training loop hands to the losses."""
    tokens = batch.mask_ST.sum(dim=1)
    chosen_tokens, rejected_tokens = tokens.chunk(2)
    full = batch.logps_ST.sum(dim=1).chunk(2)
    if ld_alpha is None:
        return PairLogps(*full, *batch.ref_logps_ST.sum(dim=1).chunk(2), chosen_tokens, rejected_tokens)
    shared = torch.minimum(chosen_tokens, rejected_tokens).repeat(2)
    policy, reference = (
        desensitised_sums(logps_ST, batch.mask_ST, shared, ld_alpha=ld_alpha).chunk(2)
        for logps_ST in (batch.logps_ST, batch.ref_logps_ST)
    )
    return PairLogps(*policy, *reference, chosen_tokens, rejected_tokens, full_chosen_logps=full[0])


def two_pairs(**changed: torch.Tensor | None) -> PairLogps:
    """Numbers to derive values from by hand.

    Pair 0: log-ratios 2 and -2 over 4 and 2 tokens. Pair 1: policy = reference over 3 and 5 tokens. Score gaps 1.5 and 0.
    """
    numbers = {
        "chosen_logps": [-10.0, -6.0],
        "rejected_logps": [-20.0, -9.0],
        "ref_chosen_logps": [-12.0, -6.0],
        "ref_rejected_logps": [-18.0, -9.0],
        "chosen_tokens": [4.0, 3.0],
        "rejected_tokens": [2.0, 5.0],
        "score_gap": [1.5, 0.0],
    }
    return PairLogps(**{name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()} | changed)


def swapped(logps: PairLogps) -> PairLogps:
    """Chosen and rejected exchanged."""
    return PairLogps(
        logps.rejected_logps,
        logps.chosen_logps,
        logps.ref_rejected_logps,
        logps.ref_chosen_logps,
        logps.rejected_tokens,
        logps.chosen_tokens,
        None if logps.score_gap is None else -logps.score_gap,
    )
