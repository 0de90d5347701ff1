"""Shared prompts on CUDA: one FlexAttention kernel a layer for the whole row, under a block mask made once a batch.

A token sees two runs of keys: a part of its prompt, and its own completion (for a prompt's token, its prompt) up to
itself; a sliding window only moves where a run begins. `Spans` has these bounds for every token, and both the mask within a
block and the list of blocks follow from them: the list takes T x N counts, where `create_block_mask` would make T x T
booleans (a quarter of a GiB for 16,384 tokens, several times) or compile a kernel of its own.

Shapes: T tokens of the row, N blocks of BLOCK tokens in it, H query heads, G key heads, D size of a head.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._dynamo import config as dynamo_config
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Tokens of a block, FlexAttention's own default."""
MIN_HEAD_SIZE = 16
"""FlexAttention's kernels multiply tiles of at least 16; sizes that are no power of 2 are padded by the kernel."""
DEVICE = "cuda"
"""FlexAttention has no backward on CPUs."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_TRIAL_ERROR = 0.02
"""Error of the trial relative to a plain float32 computation: bfloat16 gives 0.004, a wrong mask or scale 0.1 and more."""
logger = logging.getLogger(__name__)

Lines = tuple[tuple[int, ...], ...]
"""`layout.Batch.attention` on the host: (start of prompt, length of prompt, start, length) of each completion."""


class Spans(NamedTuple):
    """Token q sees the keys in [far[q], end[q]) and in [near[q], q]; all (T,) int32, the runs do not overlap."""

    far: torch.Tensor
    end: torch.Tensor
    near: torch.Tensor


class Kind(NamedTuple):
    """What a compiled kernel depends on, the length of the row aside."""

    device: torch.device
    dtype: torch.dtype
    heads: tuple[int, int]
    """H and G."""
    sizes: tuple[int, int]
    """D of query and key, and of value."""
    scale: float
    softcap: float | None
    backward: bool


def runs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float | None) -> bool:
    """Say whether `attend` can be used for (1, H, T, D) query, (1, G, T, D) key and value.

    That is so on CUDA, in bfloat16, float16 or float32, with heads of at least 16, where a trial of the kernel on a short
    row, its backward included if gradients are on, gives what plain attention gives. The first call for a model's shapes
    compiles; a trial that fails is a logged warning.
    """
    sizes = query.shape[-1], value.shape[-1]
    if query.device.type != DEVICE or {key.dtype, value.dtype} != {query.dtype}:
        return False
    if query.dtype not in DTYPES or min(sizes) < MIN_HEAD_SIZE:
        return False
    heads = query.shape[1], key.shape[1]
    return _passes_trial(Kind(query.device, query.dtype, heads, sizes, scale, softcap, torch.is_grad_enabled()))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lines: Lines,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Return the attention output (1, T, H, D) for query (1, H, T, D), key and value (1, G, T, D)."""
    longest = max(prompt + length for _, prompt, _, length in lines)
    window = sliding_window if sliding_window and sliding_window < longest else None
    mask = block_mask(lines, padded(query.shape[2]), window, query.device)
    return _attend(query, key, value, mask, scale, softcap)


def padded(num_tokens: int) -> int:
    """Return the length of row that the kernel is given: whole blocks, of which the last tokens see only themselves.

    A part of a block in the end, under a mask and soft-capping, gave NaN gradients (pytorch issue 153799). At least two
    blocks, since torch compiles anew where a size is 1.
    """
    return max(2, -(-num_tokens // BLOCK)) * BLOCK


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float, softcap: float | None
) -> torch.Tensor:
    num_tokens = query.shape[2]
    missing = mask.shape[-1] - num_tokens
    query, key, value = (functional.pad(tensor, (0, 0, 0, missing)) for tensor in (query, key, value))
    return kernel(scale, softcap)(query, key, value, mask)[:, :, :num_tokens].transpose(1, 2).contiguous()


# Small: the layers of a batch, their recomputation and their backward share a mask, and models mix at most two windows.
# Keyed by contents, since checkpointing and FSDP hand on other tensors than they were given.
@functools.lru_cache(maxsize=8)
@torch.inference_mode(mode=False)  # a mask made while scoring may serve training, where inference tensors are refused
@torch.no_grad()
def block_mask(lines: Lines, num_tokens: int, window: int | None, device: torch.device) -> BlockMask:
    """Return which keys the tokens of a row see, equal to `create_block_mask` of the same mask function.

    Tokens behind the last completion see themselves.
    """
    far, end, near = spans(lines, num_tokens, window, device)
    num_blocks = -(-num_tokens // BLOCK)
    index = torch.arange(num_blocks * BLOCK, dtype=torch.int32, device=device)

    def overlap_TN(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Keys of each block that lie in [first, last)."""
        begins = index[::BLOCK]
        return (torch.minimum(last[:, None], begins + BLOCK) - torch.maximum(first[:, None], begins)).clamp_(min=0)

    seen_TN = overlap_TN(far, end) + overlap_TN(near, index[:num_tokens] + 1)
    seen_TN = functional.pad(seen_TN, (0, 0, 0, num_blocks * BLOCK - num_tokens))
    seen_NN = seen_TN.view(num_blocks, BLOCK, num_blocks).sum(1)
    whole_NN = seen_NN == BLOCK * BLOCK

    def sees(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ((far[q] <= k) & (k < end[q])) | ((near[q] <= k) & (k <= q))

    blocks = *_ordered(~whole_NN & (seen_NN > 0)), *_ordered(whole_NN)
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(num_tokens, num_tokens))


def spans(lines: Lines, num_tokens: int, window: int | None, device: torch.device) -> Spans:
    """Return what each token of the row sees; a window counts positions, which go on from the prompt's in a completion."""
    index = np.arange(num_tokens, dtype=np.int32)
    far, end, near = np.zeros_like(index), np.zeros_like(index), index.copy()
    reach = num_tokens if window is None else window - 1
    for start, prompt, at, length in lines:
        own, first = slice(start, start + prompt), slice(at, at + length)
        near[own] = np.maximum(start, index[own] - reach)
        near[first] = np.maximum(at, index[first] - reach)
        end[first] = start + prompt
        far[first] = np.clip(end[first] + index[:length] - reach, start, start + prompt)
    return Spans(*torch.from_numpy(np.stack([far, end, near])).to(device))


def _ordered(blocks_NN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many blocks each row of blocks has (1, 1, N) and their indices first among all (1, 1, N, N), int32."""
    indices = blocks_NN.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks_NN.sum(-1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]


@functools.cache
def kernel(scale: float, softcap: float | None) -> Callable[..., torch.Tensor]:
    """Return the compiled (query, key, value, block mask) -> (1, H, T, D), compiled once for all lengths T.

    Scores are capped as Gemma 2 does: cap * tanh(score / cap).
    """

    def capped(score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask) -> torch.Tensor:
        how: dict[str, Any] = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
        how["kernel_options"] = {"BACKEND": "TRITON"}  # never another kernel by torch's choice
        return flex_attention(query, key, value, score_mod=capped if softcap else None, block_mask=mask, **how)

    # Without `fullgraph`, torch runs the unfused T x T computation in silence where it cannot compile, or past its limit.
    whole: dict[str, Any] = {"fullgraph": True, "dynamic": True, "recompile_limit": 64, "isolate_recompiles": True}
    compiled = torch.compile(attention, **whole)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask) -> torch.Tensor:
        # Lengths are symbols of the compiled kernel; scale and cap must be numbers, or FlexAttention fails to compile.
        with dynamo_config.patch(specialize_float=True):
            return compiled(query, key, value, mask)

    return run


@functools.cache
def _passes_trial(kind: Kind) -> bool:
    try:
        error = _trial_error(kind)
    except Exception as failure:  # whatever stops dynamo, inductor, Triton or a C compiler on this machine
        text = str(failure).strip()
        reason = f"{type(failure).__name__}: {text.splitlines()[0][:300] if text else ''}"
    else:
        if error <= MAX_TRIAL_ERROR:  # NaN is not
            return True
        reason = f"a relative error of {error:.2g}, allowed {MAX_TRIAL_ERROR}"
    logger.warning("FlexAttention is not used for %s: its trial gave %s; attention runs group by group", kind, reason)
    return False


@torch.inference_mode(mode=False)
def _trial_error(kind: Kind) -> float:
    """Return the larger relative error of output and gradients on two groups of random tokens, a window included."""
    lines = ((0, 70, 70, 60), (0, 70, 130, 50), (180, 60, 240, 60))
    num_tokens, window = 300, 90
    generator = torch.Generator(kind.device).manual_seed(0)  # the caller's random state stays as it is

    def draw(heads: int, size: int) -> torch.Tensor:
        shape = 1, heads, num_tokens, size
        drawn = torch.randn(shape, generator=generator, device=kind.device).to(kind.dtype)
        return drawn.requires_grad_(kind.backward)

    (num_heads, num_key_heads), (size, value_size) = kind.heads, kind.sizes
    inputs = draw(num_heads, size), draw(num_key_heads, size), draw(num_key_heads, value_size)
    mask = block_mask.__wrapped__(lines, padded(num_tokens), window, kind.device)  # the cache is for batches
    # Activation checkpointing, if the caller is in its forward, must not take hold of what is saved here.
    keep = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.set_grad_enabled(kind.backward), keep:
        got = _attend(*inputs, mask, kind.scale, kind.softcap)
        q, k, v = (tensor.float() for tensor in inputs)
        want = _plain(q, k, v, mask, kind.scale, kind.softcap)
        pairs = [(got, want)]
        if kind.backward:
            direction = torch.randn(got.shape, generator=generator, device=kind.device).to(kind.dtype)
            pairs += zip(*(torch.autograd.grad(out, inputs, direction.to(out.dtype)) for out in (got, want)), strict=True)
        pairs = [(a.detach().float(), b.detach()) for a, b in pairs]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, scale: float, softcap: float | None
) -> torch.Tensor:
    """The same by softmax over all scores."""
    index = torch.arange(q.shape[2], device=q.device)
    sees: Any = mask.mask_mod
    seen_TT, each = sees(0, 0, index[:, None], index), q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(each, dim=1).transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return (scores.masked_fill(~seen_TT, float("-inf")).softmax(-1) @ v.repeat_interleave(each, dim=1)).transpose(1, 2)
