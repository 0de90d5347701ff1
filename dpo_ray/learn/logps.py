"""Log-probabilities of completions: the one definition, used by reference, train and evaluate.

In: a causal language model and a `layout.Batch`. Out: one sum in nats per completion, or one value per token.
Invariant: a completion's value depends on its prompt and itself alone, up to rounding: not on the batch, its order, its
layout, padding or activation checkpointing.

Shapes: C completions, K completion tokens of the batch, H hidden size, V vocabulary.
"""

import inspect
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn import functional
from transformers import PreTrainedModel

from dpo_ray.learn import head
from dpo_ray.learn.layout import Batch

ATTACHED = "dpo_ray_token_logps"


class Path(NamedTuple):
    """How a model's log-probabilities are computed; `probe.choose_path` says what is exact for it."""

    share_prompt: bool
    """Each prompt once (`layout.share`), or each completion in a row of its own (`layout.separate`)."""
    tiled_head: bool
    """The head tile by tile from its weights, or the model's own forward with the logits of all positions that count."""


class TokenLogps(NamedTuple):
    """Of every completion token of a batch, completion after completion."""

    logps: torch.Tensor
    """(K,) log-probabilities in nats, float32 (float64 for a float64 model)."""
    overlaps: torch.Tensor | None
    """(K,) log sum_v p(v)^2 of the distribution that the token was drawn from, without gradient; None if not asked for."""


def completion_logps(model: PreTrainedModel, batch: Batch, path: Path) -> torch.Tensor:
    """Return the log-probability of each completion given its prompt: (C,) float32 (float64 for a float64 model), nats."""
    return completion_sums(token_logps(model, batch, path).logps, batch.lengths)


def completion_sums(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sum (K,) values over each completion: (C,), added up in float64 and returned in the dtype of `values`."""
    completion = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths.to(values.device))
    sums = torch.zeros(len(lengths), dtype=torch.float64, device=values.device)
    return sums.index_add(0, completion, values.double()).to(values.dtype)


def token_logps(model: PreTrainedModel, batch: Batch, path: Path, *, overlaps: bool = False) -> TokenLogps:
    """Return what the model says of each completion token."""
    if path.tiled_head:
        return _root(model)(batch, overlaps)
    logits_KV = _own_logits(model, batch)
    logits_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
    logps = -functional.cross_entropy(logits_KV, batch.targets, reduction="none")
    return TokenLogps(logps, head.tile_overlaps(logits_KV.detach()) if overlaps else None)


def hidden_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the hidden states (K, H) at the positions that predict completion tokens."""
    backbone: Any = model.base_model
    return _kept(backbone(**_inputs(batch)).last_hidden_state, batch)


def logits_in_tiles(model: PreTrainedModel, batch: Batch, path: Path, rows: int) -> Iterator[torch.Tensor]:
    """Yield the logits behind `hidden_states`, `rows` positions at a time, in float32. Without gradients, not sharded."""
    if path.tiled_head:
        own = head.head_of(model)
        for hidden_KH in hidden_states(model, batch).split(rows):
            yield head.tile_logits(hidden_KH, own)
    else:
        for logits_KV in _own_logits(model, batch).split(rows):
            yield logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))


def attach(model: PreTrainedModel) -> None:
    """Make head and backbone one forward of the sharded root, so that FSDP gathers its weights, tied ones too, once."""
    setattr(model, ATTACHED, types.MethodType(_token_logps, model))
    register_fsdp_forward_method(model, ATTACHED)


def _root(model: PreTrainedModel) -> Any:
    return getattr(model, ATTACHED, None) or types.MethodType(_token_logps, model)


def _token_logps(model: PreTrainedModel, batch: Batch, overlaps: bool) -> TokenLogps:
    hidden_KH, own = hidden_states(model, batch), head.head_of(model)
    return TokenLogps(
        head.token_logps(hidden_KH, batch.targets, own), head.token_overlaps(hidden_KH, own) if overlaps else None
    )


def _own_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the logits (K, V) by the model's own forward, whatever stands behind its head."""
    rows, width = batch.input_ids_ST.shape
    columns = torch.unique(batch.kept % width)
    takes = inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": columns} if "logits_to_keep" in takes else {}
    logits: Any = model(**_inputs(batch), **keep).logits
    if logits.shape[1] != len(columns):  # a model that takes the argument and does nothing with it
        logits = logits[:, columns]
    place = torch.searchsorted(columns, batch.kept % width)
    return logits.reshape(rows * len(columns), -1)[(batch.kept // width) * len(columns) + place]


def _inputs(batch: Batch) -> dict[str, Any]:
    """No attention mask for separate rows: padding stands on the right, where a causal model's completion tokens do not
    see it, and without a mask attention runs its fast causal kernel."""
    return {
        "input_ids": batch.input_ids_ST,
        "position_ids": batch.position_ids_ST,
        "attention_mask": batch.attention,
        "use_cache": False,
    }


def _kept(hidden_STH: torch.Tensor, batch: Batch) -> torch.Tensor:
    return hidden_STH.flatten(0, 1).index_select(0, batch.kept)
