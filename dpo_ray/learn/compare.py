"""Two policies on the same completions: the log-probabilities under each, and the KL divergence between them.

Shapes: S sequences, K kept positions, R = S * K rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from dpo_ray.learn.batched import token_budget
from dpo_ray.learn.logps import IGNORED, ROW_TILE, per_token_logps, predictions
from dpo_ray.learn.tokens import TokenIds, collate


class Compared(NamedTuple):
    """One completion; sums over its tokens, in nats."""

    policy_logps: float
    ref_logps: float
    kl: float
    """Exact KL(policy || reference) of the next token at every position, along this completion."""


@torch.inference_mode()
def compare_completions(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompt_token_ids: Sequence[TokenIds],
    completion_token_ids: Sequence[TokenIds],
    *,
    max_batch_tokens: int,
    pad_token_id: int,
) -> list[Compared]:
    """Compare the policies on each completion, in the order given, in batches of at most `max_batch_tokens` padded tokens.

    Raises:
        ValueError: the policies have vocabularies of different size.
    """
    device = next(policy.parameters()).device
    lengths = [len(p) + len(c) for p, c in zip(prompt_token_ids, completion_token_ids, strict=True)]
    compared: dict[int, Compared] = {}
    for rows in token_budget(lengths, max_batch_tokens):
        batch = collate([prompt_token_ids[i] for i in rows], [completion_token_ids[i] for i in rows], pad_token_id)
        where = (batch.input_ids_ST.to(device), batch.completion_mask_ST.to(device))
        policy_SKV, targets_SK = predictions(policy, *where)
        ref_SKV, _ = predictions(reference, *where)
        if policy_SKV.shape != ref_SKV.shape:
            raise ValueError(f"vocabularies of {policy_SKV.shape[-1]} and {ref_SKV.shape[-1]} tokens cannot be compared")
        policy_RV, ref_RV, targets = policy_SKV.flatten(0, 1), ref_SKV.flatten(0, 1), targets_SK.flatten()
        columns = (
            per_token_logps(policy_RV, targets),
            per_token_logps(ref_RV, targets),
            per_token_kl(policy_RV, ref_RV, targets),
        )
        sums = [column.view_as(targets_SK).sum(1).tolist() for column in columns]
        for i, values in zip(rows, zip(*sums, strict=True), strict=True):
            compared[i] = Compared(*values)
    return [compared[i] for i in range(len(lengths))]


def per_token_kl(policy_RV: torch.Tensor, ref_RV: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return KL(policy || reference) over the vocabulary of each row (R,), float32, 0 where `targets` is ignored."""
    tiles = []
    for policy, reference, target in zip(
        policy_RV.split(ROW_TILE), ref_RV.split(ROW_TILE), targets.split(ROW_TILE), strict=True
    ):
        policy_logps, ref_logps = policy.float().log_softmax(-1), reference.float().log_softmax(-1)
        kl = (policy_logps.exp() * (policy_logps - ref_logps)).sum(-1)
        tiles.append(kl.masked_fill(target == IGNORED, 0.0))
    return torch.cat(tiles)
