"""Two policies on the same completions: the log-probabilities under each, and the KL divergence between them.

Shapes: K completion tokens of a batch, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from dpo_ray.learn.batched import batches, lay_out
from dpo_ray.learn.head import tile_rows
from dpo_ray.learn.layout import Group
from dpo_ray.learn.logps import Path, completion_sums, logits_in_tiles


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
    groups: Sequence[Group],
    paths: Sequence[Path],
    *,
    max_batch_tokens: int,
    pad_token_id: int,
) -> list[list[Compared]]:
    """Compare the policies on each completion: a list per group, in the order given.

    Args:
        paths: of policy and reference, as `probe.choose_path` found them.
        max_batch_tokens: tokens of a forward, as the policy sees them.

    Raises:
        ValueError: the policies have vocabularies of different size.
    """
    device = next(policy.parameters()).device
    compared: list[list[Compared]] = [[] for _ in groups]
    for rows in batches(groups, paths[0], max_batch_tokens):
        taken = [groups[i] for i in rows]
        batch, ref_batch = (lay_out(taken, path, pad_token_id).to(device) for path in paths)
        tile = tile_rows(policy.config.get_text_config().vocab_size, device)
        tiles = zip(
            logits_in_tiles(policy, batch, paths[0], tile),
            logits_in_tiles(reference, ref_batch, paths[1], tile),
            batch.targets.split(tile),
            strict=True,
        )
        columns = zip(*(_compare(*one) for one in tiles), strict=True)
        sums = [completion_sums(torch.cat(column), batch.lengths).tolist() for column in columns]
        values = iter(Compared(*one) for one in zip(*sums, strict=True))
        for i in rows:
            compared[i] = [next(values) for _ in groups[i].completions]
    return compared


def _compare(policy_KV: torch.Tensor, ref_KV: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return (K,) log-probabilities under both policies, and the KL divergence of the next token over the vocabulary."""
    if policy_KV.shape != ref_KV.shape:
        raise ValueError(f"vocabularies of {policy_KV.shape[-1]} and {ref_KV.shape[-1]} tokens cannot be compared")
    policy_logps, ref_logps = policy_KV.log_softmax(-1), ref_KV.log_softmax(-1)
    kl = functional.kl_div(ref_logps, policy_logps, reduction="none", log_target=True).sum(-1)
    chosen = targets[:, None]
    return policy_logps.gather(1, chosen)[:, 0], ref_logps.gather(1, chosen)[:, 0], kl
