"""From hidden states to log-probabilities of given tokens, a tile of positions at a time.

Logits of a tile exist in float32 while it is computed; memory does not grow with positions x vocabulary. The log-softmax
is float32 (float64 for a float64 model) whatever the model computes in.

Shapes: K positions, H hidden size, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
"""Float32 logits of one tile at most. A tile reads the head's weights four times, and adds to their gradient in float32: with
55 positions of a vocabulary of 152k a tile, that was half of a 1B policy's step on an H100."""
TILE_ROWS = {"cpu": 256, "cuda": 1024}
"""Positions of one tile at most: enough for matrix products, and small vocabularies stay in a CPU's cache."""
KEEP_BYTES = 128 * 2**20
"""Float32 logits of a batch up to which they are kept for the backward instead of being computed again."""


class Head(NamedTuple):
    """A language model's head: logits = softcap(scale * (hidden @ weight.T + bias))."""

    weight: torch.Tensor
    """(V, H)."""
    bias: torch.Tensor | None
    """(V,)."""
    scale: float
    softcap: float | None
    """softcap(x) = cap * tanh(x / cap), as Gemma 2 has it."""


def head_of(model: PreTrainedModel) -> Head:
    """Read the head from a model's module and config; `probe` compares it with the model's own logits.

    Raises:
        NotImplementedError: it has none, or one that is not linear.
    """
    module: Any = model.get_output_embeddings()
    if not isinstance(module, torch.nn.Linear):
        raise NotImplementedError(f"{type(model).__name__} has the head {type(module).__name__}, not a linear one")
    config: Any = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return Head(module.weight, module.bias, scale, getattr(config, "final_logit_softcapping", None))


def token_logps(hidden_KH: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the log-probability (K,) of each target, in nats, float32 (float64 for float64 hidden states)."""
    return _TokenLogps.apply(hidden_KH, head.weight, head.bias, targets, head.scale, head.softcap)


@torch.no_grad()
def token_overlaps(hidden_KH: torch.Tensor, head: Head) -> torch.Tensor:
    """Return log sum_v p(v)^2 (K,) of the next-token distribution at each position, which WPO compares tokens with."""
    tiles = [
        tile_overlaps(tile_logits(hidden, head)) for hidden in hidden_KH.split(tile_rows(len(head.weight), hidden_KH.device))
    ]
    return torch.cat(tiles) if tiles else hidden_KH.new_zeros(0, dtype=_precision(hidden_KH))


def tile_overlaps(logits_KV: torch.Tensor) -> torch.Tensor:
    """The same from logits (K, V)."""
    return logits_KV.softmax(-1).square().sum(-1).log()


def tile_rows(num_tokens: int, device: torch.device) -> int:
    """Positions of one tile for a vocabulary of `num_tokens`."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    return min(TILE_ROWS[kind], max(16, TILE_BYTES[kind] // (4 * num_tokens)))


def tile_logits(hidden_KH: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the logits (K, V) of a few positions in float32, or float64."""
    logits = functional.linear(hidden_KH, head.weight, head.bias)
    logits = logits.to(_precision(hidden_KH))
    if head.scale != 1.0:
        logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _precision(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Buffer:
    """Memory of one tile, used again for each: a fresh tensor of this size costs a CPU more in page faults than its sums."""

    def __init__(self, hidden_KH: torch.Tensor, head: Head, rows: int) -> None:
        self.head, shape = head, (min(rows, len(hidden_KH)), len(head.weight))
        self.memory = torch.empty(shape, dtype=_precision(hidden_KH), device=hidden_KH.device)

    def logits(self, hidden_KH: torch.Tensor) -> torch.Tensor:
        """`tile_logits`, in this memory where they are a plain product."""
        own = self.head
        if own.bias is not None or own.scale != 1.0 or own.softcap is not None or hidden_KH.dtype != self.memory.dtype:
            return tile_logits(hidden_KH, own)
        return torch.mm(hidden_KH, own.weight.T, out=self.memory[: len(hidden_KH)])

    def like(self, logits: torch.Tensor) -> torch.Tensor:
        return self.memory[: len(logits)]


class _TokenLogps(torch.autograd.Function):
    """d logp_t / d logits = onehot(target) - softmax, applied tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_KH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        head = Head(weight_VH, bias_V, scale, softcap)
        rows = tile_rows(len(weight_VH), hidden_KH.device)
        needs_grad = any(ctx.needs_input_grad[:3])
        keep = needs_grad and hidden_KH.shape[0] * weight_VH.shape[0] * 4 <= KEEP_BYTES
        buffer = _Buffer(hidden_KH, head, rows)
        logps, kept = [], []
        for hidden, target in zip(hidden_KH.split(rows), targets.split(rows), strict=True):
            logits = tile_logits(hidden, head) if keep else buffer.logits(hidden)
            if keep:
                kept.append(logits)
            # Not logsumexp: on CPUs torch's is several times slower than log_softmax.
            all_logps = torch.log_softmax(logits, -1, out=buffer.like(logits))
            logps.append(all_logps.gather(1, target[:, None])[:, 0])
        ctx.save_for_backward(hidden_KH, weight_VH, bias_V, targets, *kept)
        ctx.scale, ctx.softcap, ctx.rows = scale, softcap, rows
        return torch.cat(logps) if logps else hidden_KH.new_zeros(0, dtype=_precision(hidden_KH))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_KH, weight_VH, bias_V, targets, *kept = ctx.saved_tensors
        head = Head(weight_VH, bias_V, ctx.scale, ctx.softcap)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_KH) if wants_hidden else None
        precision = _precision(hidden_KH)
        grad_weight = torch.zeros_like(weight_VH, dtype=precision) if wants_weight else None
        grad_bias = torch.zeros(len(weight_VH), dtype=precision, device=hidden_KH.device) if wants_bias else None
        buffer = _Buffer(hidden_KH, head, ctx.rows)
        for i, at in enumerate(range(0, len(targets), ctx.rows)):
            tile = slice(at, at + ctx.rows)
            hidden, target, grad = hidden_KH[tile], targets[tile], grads[0][tile]
            logits = kept[i] if kept else buffer.logits(hidden)
            # In place where nobody reads the logits again.
            grad_logits = torch.softmax(logits, -1, out=None if head.softcap is not None else buffer.like(logits))
            grad_logits.scatter_add_(1, target[:, None], grad_logits.new_full((len(target), 1), -1.0))
            grad_logits.mul_(-grad[:, None] * head.scale)
            if head.softcap is not None:
                grad_logits.mul_(1 - (logits / head.softcap).square())
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VH, out=grad_hidden[tile])
            if grad_weight is not None:
                if precision == hidden.dtype:
                    grad_weight.addmm_(grad_logits.T, hidden)
                else:
                    grad_weight += grad_logits.T @ hidden  # summed over tiles in float32
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VH.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
            None,
            None,
            None,
        )
