"""Attention over prompts that several completions share: the layout of `layout.share`, for any model that lets us.

Registered with transformers under NAME. A model calls it in each layer with the batch's `attention` in place of a mask;
transformers hands a 4-dimensional mask on as it is. A group is a prompt and its completions; the tokens of a group see
the prompt and their own completion, up to themselves. On CUDA one FlexAttention kernel computes the row (`flex.py`).
Elsewhere, and where that kernel does not run, groups are computed one by one: no work is done between them.

Shapes: T tokens of the row, H query heads, G key heads, N tokens of a group, D size of a head.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface

from dpo_ray.learn import flex

NAME = "dpo_ray_shared_prompt"
MAX_DENSE = 512
"""Tokens of a group up to which all its scores are computed at once on a CPU: beyond, blockwise kernels are faster."""


class SharedGroup(NamedTuple):
    """Where one prompt and its completions lie in the row."""

    start: int
    prompt: int
    """Tokens of the prompt."""
    completions: tuple[int, ...]
    """Tokens of each completion; they follow the prompt and each other."""

    @property
    def size(self) -> int:
        return self.prompt + sum(self.completions)


def shared_prompt_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention output (1, T, H, D) for query (1, H, T, D), key and value (1, G, T, D).

    Raises:
        NotImplementedError: something the model asks for is not built here, such as attention sinks; the probe then
            gives completions rows of their own.
    """
    asked = [name for name in ("s_aux", "position_bias") if extra.get(name) is not None]
    if asked or dropout:
        raise NotImplementedError(f"shared-prompt attention of {type(module).__name__} with {asked}, dropout {dropout}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    num_rows, _, num_tokens, _ = query.shape
    if attention_mask is not None and flex.runs(query, key, value, scale, softcap):
        return flex.attend(query, key, value, lines(attention_mask), scale, softcap, sliding_window), None
    # Without `attention`, as in the model's own forward, each row is one causal sequence.
    own = [SharedGroup(0, 0, (num_tokens,))] if attention_mask is None else list(groups(attention_mask))
    rows = []
    for row in range(num_rows):
        outputs = []
        for group in own:
            part = slice(group.start, group.start + group.size)
            q, k, v = query[row, :, part], key[row, :, part], value[row, :, part]
            outputs.append(_one_group(q, k, v, group, scale, softcap, sliding_window))
        rows.append(torch.cat(outputs, dim=1).transpose(0, 1))
    return torch.stack(rows), None


def _one_group(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: SharedGroup,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Return (H, N, D) for the tokens of one group, by the fastest way for its length."""
    window = sliding_window if sliding_window and sliding_window < group.prompt + max(group.completions) else None
    how = group.prompt, group.completions, window, q.dtype, q.device
    if q.device.type == "cpu" and group.size <= MAX_DENSE:
        return _dense(q, k, v, _small_bias(*how), scale, softcap)
    if softcap:
        return _dense(q, k, v, _bias(*how), scale, softcap)
    if window:
        return _fused(q, k, v, scale, attn_mask=_bias(*how))
    return _blocks(q, k, v, group, scale)


def groups(attention: torch.Tensor) -> Iterator[SharedGroup]:
    """Yield the groups of a batch's `attention`."""
    for (start, prompt), completions in itertools.groupby(lines(attention), key=lambda line: line[:2]):
        yield SharedGroup(start, prompt, tuple(line[3] for line in completions))


def lines(attention: torch.Tensor) -> flex.Lines:
    """Return a batch's `attention` as numbers of the host.

    The root of an FSDP model moves every tensor it is given to its device; reading it back waits for the device, so that is
    done once a batch, not once a layer.
    """
    if attention.device.type == "cpu":
        return tuple(map(tuple, attention[0, 0].tolist()))
    if attention not in _lines_of:
        _lines_of[attention] = tuple(map(tuple, attention[0, 0].tolist()))
    return _lines_of[attention]


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias_NN: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """All scores of a group by plain matrix products; query heads that share a key head stand under each other."""
    (num_heads, n, d), num_key_heads = q.shape, k.shape[0]
    each = num_heads // num_key_heads
    q = q.reshape(num_key_heads, each * n, d)
    if softcap:
        scores = (torch.bmm(q, k.transpose(1, 2)) * (scale / softcap)).tanh() * softcap
        scores = scores.view(num_key_heads, each, n, n) + bias_NN
    else:
        scores = torch.baddbmm(bias_NN.repeat(each, 1), q, k.transpose(1, 2), alpha=scale)
    weights = scores.view(num_key_heads, each * n, n).softmax(-1, dtype=torch.promote_types(v.dtype, torch.float32)).to(v.dtype)
    return torch.bmm(weights, v).view(num_heads, n, v.shape[-1])


def _blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: SharedGroup, scale: float) -> torch.Tensor:
    """Prompt and first completion as one causal sequence; every other completion against the prompt and itself."""
    p = group.prompt
    first = p + group.completions[0]
    outputs = [_fused(q[:, :first], k[:, :first], v[:, :first], scale, is_causal=True)]
    at = first
    for n in group.completions[1:]:
        own = slice(at, at + n)
        keys, values = (torch.cat([x[:, :p], x[:, own]], dim=1) for x in (k, v))
        seen = torch.ones(n, p + n, dtype=torch.bool, device=q.device).tril(p)
        outputs.append(_fused(q[:, own], keys, values, scale, attn_mask=seen))
        at += n
    return torch.cat(outputs, dim=1)


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, **how: Any) -> torch.Tensor:
    grouped = q.shape[0] != k.shape[0]
    return functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, enable_gqa=grouped, **how)[0]


def _bias(
    prompt: int, completions: tuple[int, ...], window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What is added to the scores (N, N) of a group: 0 where a token sees another, -inf elsewhere."""
    sizes = torch.tensor([prompt, *completions])
    branch = torch.arange(len(sizes)).repeat_interleave(sizes)  # 0 is the prompt
    index = torch.arange(len(branch))
    seen = (index[:, None] >= index) & ((branch[:, None] == branch) | (branch == 0))
    if window:
        starts = sizes.cumsum(0) - sizes
        position = index - starts[branch] + (branch > 0) * prompt
        seen &= position[:, None] - position < window
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf")).to(device)


_lines_of = WeakIdKeyDictionary()
_small_bias = functools.lru_cache(maxsize=64)(_bias)  # every layer asks for the same ones


AttentionInterface.register(NAME, shared_prompt_attention)
