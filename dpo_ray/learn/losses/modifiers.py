"""What changes the input or the weight of every term of a sum: LD-DPO and WPO.

Shapes: B pairs, S sequences, T positions.
"""

import torch


def desensitise(
    per_token_logps: torch.Tensor, positions: torch.Tensor, shared_tokens: torch.Tensor, *, ld_alpha: float
) -> torch.Tensor:
    """LD-DPO: scale the log-probabilities of what one completion has more than the other, arXiv:2409.06411.

        log pi(y) = sum over t < n of log pi(y_t) + alpha * sum over t >= n of log pi(y_t),  n = min(|y_w|, |y_l|)

    This returns the summands. It goes over both completions of a pair, under policy and reference alike: the reference's
    sums must be taken again from its per-token values. alpha = 1 is plain DPO, alpha = 0 ignores the tail of the longer one.

    Args:
        per_token_logps: of completion tokens; any shape, so that padded and packed rows both work.
        positions: index of each token in its completion, from 0; shaped like `per_token_logps`.
        shared_tokens: n of the token's pair, broadcast to `positions`.
    """
    return torch.where(positions < shared_tokens, per_token_logps, ld_alpha * per_token_logps)


def desensitised_sums(
    per_token_logps_ST: torch.Tensor, completion_mask_ST: torch.Tensor, shared_tokens: torch.Tensor, *, ld_alpha: float
) -> torch.Tensor:
    """(S,) sums of LD-DPO over padded rows.

    Args:
        per_token_logps_ST: log-probability of each token, under the policy or the reference.
        completion_mask_ST: 1 on the completion's tokens, aligned with the log-probabilities.
        shared_tokens: (S,) n of each sequence's pair: the smaller token count of chosen and rejected.
    """
    mask_ST = completion_mask_ST.bool()
    positions_ST = mask_ST.long().cumsum(dim=1) - 1
    # Not a product with the mask: what stands on padding may be anything, and 0 * inf is NaN.
    completion_logps_ST = torch.where(mask_ST, per_token_logps_ST, 0)
    return desensitise(completion_logps_ST, positions_ST, shared_tokens[:, None], ld_alpha=ld_alpha).sum(dim=1)


def wpo_weights(chosen_aligned_logps: torch.Tensor, rejected_aligned_logps: torch.Tensor) -> torch.Tensor:
    """WPO: how likely the policy is to sample the pair today, (B,), detached; Eq. 2, arXiv:2406.11827.

        w = exp(a_w) exp(a_l),  a = mean over the completion's tokens t of [log p_t(y_t) - log sum_v p_t(v)^2]

    p_t is the policy's next-token distribution over the vocabulary, v. The second part makes weights comparable between
    flat and peaked distributions: it is the log of the probability that a sampled token has on average. A loss is multiplied
    by w after its own computation; sorting losses and `sft` have no loss of a pair to weigh.

    Args:
        chosen_aligned_logps: (B,) a_w, from the same forward as the policy's log-probabilities.
        rejected_aligned_logps: (B,) a_l.
    """
    return torch.exp(chosen_aligned_logps.detach() + rejected_aligned_logps.detach())
