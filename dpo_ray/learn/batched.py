"""Log-probabilities of many completions, in token-budget batches: what reference and evaluate run over a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_ray.learn.layout import Batch, Group, separate, share
from dpo_ray.learn.logps import Path, completion_sums, token_logps


class Scored(NamedTuple):
    """One completion."""

    logps: float
    """Sum of its tokens' log-probabilities, in nats."""
    token_logps: np.ndarray
    """(tokens,) float32."""


@torch.inference_mode()
def score_groups(
    model: PreTrainedModel, groups: Sequence[Group], path: Path, *, max_batch_tokens: int, pad_token_id: int
) -> list[list[Scored]]:
    """Score each completion given its prompt: a list per group, in the order given.

    A value depends on prompt and completion alone, up to float32 rounding.

    Args:
        path: as `probe.choose_path` found it.
        max_batch_tokens: tokens of a forward, as the model sees them; a larger group goes alone.
    """
    device = next(model.parameters()).device
    scored: list[list[Scored]] = [[] for _ in groups]
    for rows in batches(groups, path, max_batch_tokens):
        batch = lay_out([groups[i] for i in rows], path, pad_token_id).to(device)
        tokens = token_logps(model, batch, path).logps
        sums = completion_sums(tokens, batch.lengths).tolist()
        values = zip(sums, tokens.cpu().split(batch.lengths.tolist()), strict=True)
        for i in rows:
            own = itertools.islice(values, len(groups[i].completions))
            scored[i] = [Scored(total, each.numpy()) for total, each in own]
    return scored


def batches(groups: Sequence[Group], path: Path, max_batch_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of groups that go into a batch, shortest first; a group larger than the budget goes alone."""
    sizes = [group_tokens(group, share_prompt=path.share_prompt) for group in groups]
    return token_budget(sizes, max_batch_tokens, padded=not path.share_prompt)


def lay_out(groups: Sequence[Group], path: Path, pad_token_id: int) -> Batch:
    """Make the batch of some groups; its completions stand in their order, whatever the layout."""
    return share(groups) if path.share_prompt else separate(groups, pad_token_id)


def group_tokens(group: Group, *, share_prompt: bool) -> int:
    """Tokens of a group as the model sees them; padded to its own longest completion where these have rows of their own."""
    lengths = [len(c) for c in group.completions]
    return len(group.prompt) + sum(lengths) if share_prompt else len(lengths) * (len(group.prompt) + max(lengths))


def token_budget(sizes: Sequence[int], max_batch_tokens: int, *, padded: bool) -> Iterator[list[int]]:
    """Yield indices in batches of at most `max_batch_tokens` tokens, smallest first; a larger one goes alone.

    Args:
        padded: a batch has its largest size for each of its rows, else the sum of their sizes.
    """
    batch: list[int] = []
    total = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):  # ascending: the newest row is the longest
        total = sizes[i] * (len(batch) + 1) if padded else total + sizes[i]
        if batch and total > max_batch_tokens:
            yield batch
            batch, total = [], sizes[i]
        batch.append(i)
    if batch:
        yield batch
