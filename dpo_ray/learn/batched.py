"""Log-probabilities of many completions, in token-budget batches: what reference and evaluate run over a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from dpo_ray.learn.logps import completion_logps
from dpo_ray.learn.tokens import collate


@torch.inference_mode()
def score_completions(
    model: PreTrainedModel,
    prompt_token_ids: Sequence[Sequence[int]],
    completion_token_ids: Sequence[Sequence[int]],
    *,
    max_batch_tokens: int,
    pad_token_id: int,
) -> list[float]:
    """Sum of the log-probabilities (nats) of each completion given its prompt, in the order given.

    Rows are batched by length, at most `max_batch_tokens` padded tokens a forward; a longer row goes alone. A row's value
    depends on the row alone, up to float32 rounding.
    """
    device = next(model.parameters()).device
    lengths = [len(p) + len(c) for p, c in zip(prompt_token_ids, completion_token_ids, strict=True)]
    logps = [0.0] * len(lengths)
    for rows in token_budget(lengths, max_batch_tokens):
        batch = collate([prompt_token_ids[i] for i in rows], [completion_token_ids[i] for i in rows], pad_token_id)
        values = completion_logps(model, batch.input_ids_ST.to(device), batch.completion_mask_ST.to(device))
        for i, value in zip(rows, values.tolist(), strict=True):
            logps[i] = value
    return logps


def token_budget(lengths: Sequence[int], max_batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices in batches of at most `max_batch_tokens` padded tokens, shortest first; a longer row goes alone."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):  # ascending: the newest row is the longest
        if batch and lengths[i] * (len(batch) + 1) > max_batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
