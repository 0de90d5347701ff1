"""The optimizer, its learning rate as a pure function of the step, and gradient clipping over shards."""

import math
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dpo_ray.errors import ConfigError


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Return fused AdamW over the trainable parameters; norms and biases (vectors) are not decayed.

    Call it after `policy.shard`, so that the optimizer's state is sharded as well. Fused, it can be told on the device
    to skip a step, which `hold_back` does.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward leaves the root's weights gathered, and it is shards that are trained
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)


def learning_rate_at(
    step: int,
    num_steps: int,
    *,
    peak: float,
    warmup_steps: int,
    schedule: Literal["cosine", "linear", "constant"],
) -> float:
    """Return the learning rate of a step, counted from 0.

    It rises linearly over the warmup as peak * (step + 1) / warmup_steps, so that step 0 already learns and the last
    warmup step has the peak. After it, with t = (step - warmup_steps) / (num_steps - warmup_steps), it is peak times
    (1 + cos(pi t)) / 2, 1 - t, or 1: 0 would be reached one step after the last.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    factors = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
    return peak * factors[schedule]


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale all gradients together so that their norm is at most `max_norm`; return the norm before, () on their device.

    The norm is over all shards: one rank or several give the same.
    """
    parameters = list(model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # else it is the norm of this rank's shard only
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def hold_back(optimizer: torch.optim.Optimizer, bad: torch.Tensor) -> None:
    """Make `optimizer.step()` change nothing, neither weights nor its own state, where `bad` is 1; the host is not asked.

    This is what `torch.amp.GradScaler` tells a fused optimizer by the same attribute.

    Args:
        bad: () float32 on the parameters' device, 0 or 1, and the same on every rank.

    Raises:
        ConfigError: the optimizer is not fused, and would take the step all the same.
    """
    if not optimizer.defaults.get("fused"):
        raise ConfigError(f"{type(optimizer).__name__} is not fused: it cannot skip a step on the device; use build_optimizer")
    setattr(optimizer, "found_inf", bad)  # noqa: B010, an attribute that torch reads and does not declare
