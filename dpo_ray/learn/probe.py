"""Which way of computing log-probabilities is exact for a model: tried on a real row when it is loaded.

In: a model in eval mode and a real prompt with its completions, the longest of the data, so that sliding windows bite.
Out: a `logps.Path`, and the model's attention set accordingly.

What must not matter is tried: other completions of the prompt, other groups before and behind, and their lengths.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo_ray.errors import ConfigError
from dpo_ray.learn import attention
from dpo_ray.learn.compute_dtype import compute_dtype_of, sharded_in_float32
from dpo_ray.learn.layout import Batch, Group, separate, share
from dpo_ray.learn.logps import Path, token_logps
from dpo_ray.learn.meshes import device_of

SharePrompt = Literal["auto", "always", "never"]
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Mean difference of the log-probability of a token, in nats, up to which two ways are the same but for rounding."""
NEIGHBOUR = 256
"""Tokens that prompt and completions of the groups around the tried one have at most."""
OWN_ATTENTION = "dpo_ray_own_attention"
logger = logging.getLogger(__name__)


class Probed(NamedTuple):
    """What was found, and up to which length it was tried."""

    path: Path
    tokens: int
    """Of the longest prompt with one completion."""


def path_for(
    model: PreTrainedModel,
    groups: Sequence[Group],
    known: Probed | None,
    *,
    pad_token_id: int,
    share_prompt: SharePrompt = "auto",
) -> Probed:
    """Return what `choose_path` finds on the longest of `groups`, or `known` if that was tried on one as long.

    Some models build a window into the mask that a shared prompt replaces: only a longer row shows it.
    """
    longest = max(groups, key=sequence_tokens)
    tokens = sequence_tokens(longest)
    if known and tokens <= known.tokens:
        return known
    return Probed(choose_path(model, longest, pad_token_id=pad_token_id, share_prompt=share_prompt), tokens)


def sequence_tokens(group: Group) -> int:
    """Tokens of a group's prompt and its longest completion."""
    return len(group.prompt) + max(map(len, group.completions))


@torch.no_grad()
def choose_path(model: PreTrainedModel, group: Group, *, pad_token_id: int, share_prompt: SharePrompt = "auto") -> Path:
    """Compare the fast ways with the model's own forward of one sequence, and return the fastest that is exact.

    Sharing is not exact, for example, with linear attention, whose state runs on from one completion into the next, or
    with ALiBi, which counts positions by itself. The choice is logged. A model in bfloat16 or float16 is tried in float32,
    where rounding cannot hide a difference, if its memory allows. A sharded model is tried by all its ranks together, on
    the same group, and they choose alike.

    Raises:
        ConfigError: `share_prompt` is `always`, and the shared layout gives other values; or a completion's value depends
            on the batch around it in any layout.
    """
    _set_own_attention(model)
    if compute_dtype_of(model) not in (torch.bfloat16, torch.float16):
        return _choose(model, group, pad_token_id, share_prompt)
    try:
        with sharded_in_float32(model) if isinstance(model, FSDPModule) else _in_float32(model):
            return _choose(model, group, pad_token_id, share_prompt)
    except RuntimeError as error:  # out of memory, or a layer that wants its own dtype
        reason = str(error).splitlines()[0][:200]
        logger.warning("%s: tried in %s, not in float32: %s", type(model).__name__, compute_dtype_of(model), reason)
    return _choose(model, group, pad_token_id, share_prompt)


def trial_groups(group: Group) -> list[Group]:
    """Return the group's two longest completions between two shorter groups; a single completion is joined by its reverse."""
    longest = sorted(group.completions, key=len, reverse=True)[:2]
    if len(longest) == 1:
        longest.append(np.asarray(longest[0])[::-1])
    part = slice(0, min(NEIGHBOUR, max(1, min(map(len, longest)) // 2)))
    prompt = np.asarray(group.prompt)[-min(NEIGHBOUR, max(1, len(group.prompt) // 2)) :]
    neighbour = Group(prompt, [np.asarray(completion)[part] for completion in longest])
    return [neighbour, Group(group.prompt, longest), neighbour]


def _choose(model: PreTrainedModel, group: Group, pad_token_id: int, share_prompt: SharePrompt) -> Path:
    parameter = next(model.parameters())
    device = device_of(parameter.device_mesh) if isinstance(parameter, DTensor) else parameter.device
    groups = trial_groups(group)
    rows, packed = separate(groups, pad_token_id).to(device), share(groups).to(device)
    own, tiled = Path(share_prompt=False, tiled_head=False), Path(share_prompt=False, tiled_head=True)
    exact = torch.cat(
        [
            token_logps(model, separate([Group(g.prompt, [c])], pad_token_id).to(device), own).logps
            for g in groups
            for c in g.completions
        ]
    )
    path = tiled if _same(_error(model, rows, tiled, exact), model) else own
    finite = bool(exact.isfinite().all())  # else whoever computes the rows names those that have no value
    if finite and path is own and not _same(together := _error(model, rows, own, exact), model):
        raise ConfigError(_depends_on_batch(model, sequence_tokens(group), together))
    if share_prompt == "never":
        return path
    before = str(model.config._attn_implementation)
    try:
        model.set_attn_implementation(attention.NAME)
        shared = _error(model, packed, path._replace(share_prompt=True), exact)
    except (ValueError, KeyError) as error:  # a model that lets nobody choose its attention
        shared = str(error)
    if _same(shared, model):
        logger.info("%s: prompts are shared (%s), head tiled: %s", type(model).__name__, _text(shared), path.tiled_head)
        return path._replace(share_prompt=True)
    model.set_attn_implementation(before)
    if share_prompt == "always":
        raise ConfigError(
            f"share_prompt=always, but {type(model).__name__} gives other log-probabilities for a shared prompt: "
            f"{_text(shared)}, allowed {TOLERANCE[compute_dtype_of(model)]:g}; use `auto`, which gives each completion a row "
            "of its own"
        )
    logger.warning(
        "%s: each completion gets a row of its own, since a shared prompt gave %s", type(model).__name__, _text(shared)
    )
    return path


def _set_own_attention(model: PreTrainedModel) -> None:
    """Start from the attention that the model was loaded with, which an earlier probe may have replaced."""
    own = getattr(model, OWN_ATTENTION, None) or str(model.config._attn_implementation)
    setattr(model, OWN_ATTENTION, own)
    if model.config._attn_implementation != own:
        model.set_attn_implementation(own)


@contextlib.contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Turn half-precision weights into float32 for a while; no bit of them is lost. Buffers stay as they are."""
    kept = {p: p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    try:
        for parameter in kept:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in kept.items():
            parameter.data = parameter.data.to(dtype)


def _error(model: PreTrainedModel, batch: Batch, path: Path, exact: torch.Tensor) -> float | str:
    """Return the mean difference to the exact values, or why the model cannot be run in this way."""
    try:
        error: float | str = (token_logps(model, batch, path).logps - exact).abs().mean().item()
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as raised:
        error = f"{type(raised).__name__}: {str(raised).splitlines()[0][:200] if str(raised) else ''}"
    if isinstance(model, FSDPModule):
        model.reset_iter_state()  # a forward that raised leaves weights gathered, one without a backward is kept track of
        errors: list[float | str] = [error] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        # Ranks on other hardware can round to the other side of what is allowed: all take the worst.
        error = max(errors, key=lambda each: math.inf if isinstance(each, str) or math.isnan(each) else each)
    return error


def _same(error: float | str, model: PreTrainedModel) -> bool:
    return not isinstance(error, str) and error <= TOLERANCE[compute_dtype_of(model)]  # NaN is not


def _text(error: float | str) -> str:
    return error if isinstance(error, str) else f"a mean difference of {error:.2g} nats a token"


def _depends_on_batch(model: PreTrainedModel, tokens: int, error: float | str) -> str:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kind, limit = rope.get("rope_type"), rope.get("original_max_position_embeddings")
    hint = f"; rope_type {kind!r} places all rows of a batch by its longest" if kind in ("longrope", "dynamic") else ""
    way_out = f" Keep prompt + completion within {limit} tokens." if hint and limit else ""
    return (
        f"{type(model).__name__}: the log-probabilities of a completion depend on the other rows of its batch ({_text(error)}, "
        f"tried with {tokens} tokens{hint}).{way_out} Such values are no reference"
    )
