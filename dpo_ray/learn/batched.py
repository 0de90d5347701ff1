"""Log-probabilities of many completions, in token-budget batches: what reference and evaluate run over a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_ray.learn.layout import Batch, Group, TokenIds, separate, share
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
        max_batch_tokens: tokens of a forward, as the model sees them; completions of a larger group go into several.
    """
    device = next(model.parameters()).device
    pieces = [(i, piece) for i, group in enumerate(groups) for piece in fitting(group, path, max_batch_tokens)]
    results: dict[int, list[Scored]] = {}
    for rows in batches([piece for _, piece in pieces], path, max_batch_tokens):
        batch = lay_out([pieces[row][1] for row in rows], path, pad_token_id).to(device)
        tokens = token_logps(model, batch, path).logps
        sums = completion_sums(tokens, batch.lengths).tolist()
        values = zip(sums, tokens.cpu().split(batch.lengths.tolist()), strict=True)
        for row in rows:
            own = itertools.islice(values, len(pieces[row][1].completions))
            results[row] = [Scored(total, each.numpy()) for total, each in own]
    scored: list[list[Scored]] = [[] for _ in groups]
    for row, (i, _) in enumerate(pieces):
        scored[i] += results[row]
    return scored


def fitting(group: Group, path: Path, max_batch_tokens: int) -> Iterator[Group]:
    """Cut a group's completions where they exceed the budget; one that exceeds it with the prompt alone goes alone."""
    taken: list[TokenIds] = []
    for completion in group.completions:
        if taken and group_tokens(Group(group.prompt, [*taken, completion]), path) > max_batch_tokens:
            yield Group(group.prompt, taken)
            taken = []
        taken.append(completion)
    yield Group(group.prompt, taken)


def batches(groups: Sequence[Group], path: Path, max_batch_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of groups that go into a batch, shortest first; a group larger than the budget goes alone."""
    width = [len(group.prompt) + max(map(len, group.completions)) for group in groups]
    batch: list[int] = []
    shared = rows = 0
    for i in sorted(range(len(groups)), key=lambda i: width[i]):  # ascending: the newest is the widest of its batch
        shared, rows = shared + group_tokens(groups[i], path), rows + len(groups[i].completions)
        total = shared if path.share_prompt else rows * width[i]
        if batch and total > max_batch_tokens:
            yield batch
            batch, shared, rows = [], group_tokens(groups[i], path), len(groups[i].completions)
        batch.append(i)
    if batch:
        yield batch


def lay_out(groups: Sequence[Group], path: Path, pad_token_id: int) -> Batch:
    """Make the batch of some groups; its completions stand in their order, whatever the layout."""
    return share(groups) if path.share_prompt else separate(groups, pad_token_id)


def group_tokens(group: Group, path: Path) -> int:
    """Tokens of a group as the model sees them; padded to its own longest completion where these have rows of their own."""
    lengths = [len(c) for c in group.completions]
    return len(group.prompt) + sum(lengths) if path.share_prompt else len(lengths) * (len(group.prompt) + max(lengths))
