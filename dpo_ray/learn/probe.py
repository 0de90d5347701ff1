"""Which way of computing log-probabilities is exact for a model: tried on a real row, once, when it is loaded.

In: a model in eval mode and a real prompt with its completions, best the longest of the data, so that sliding windows
bite. Out: a `logps.Path`, and the model's attention set accordingly.
"""

import logging
import math
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo_ray.errors import ConfigError
from dpo_ray.learn import attention
from dpo_ray.learn.layout import Batch, Group, separate, share
from dpo_ray.learn.logps import Path, token_logps
from dpo_ray.learn.meshes import device_of

SharePrompt = Literal["auto", "always", "never"]
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Mean difference of the log-probability of a token, in nats, up to which two ways are the same but for rounding."""
logger = logging.getLogger(__name__)


@torch.no_grad()
def choose_path(
    model: PreTrainedModel,
    group: Group,
    *,
    pad_token_id: int,
    share_prompt: SharePrompt = "auto",
    compute_dtype: torch.dtype | None = None,
) -> Path:
    """Compare the fast ways with the model's own forward on `group`, and return the fastest that is exact.

    Sharing is not exact, for example, with linear attention, whose state runs on from one completion into the next, or
    with ALiBi, which counts positions by itself. The choice is logged. A sharded model is probed by all its ranks
    together, on the same group, and they choose alike.

    Args:
        compute_dtype: of a sharded model; None for that of its weights.

    Raises:
        ConfigError: `share_prompt` is `always`, and the shared layout gives other values.
    """
    parameter, allowed = next(model.parameters()), TOLERANCE[compute_dtype or model.dtype]
    device = device_of(parameter.device_mesh) if isinstance(parameter, DTensor) else parameter.device
    rows, packed = separate([group], pad_token_id).to(device), share([group]).to(device)
    exact = token_logps(model, rows, Path(share_prompt=False, tiled_head=False)).logps
    tiled = _error(model, rows, Path(share_prompt=False, tiled_head=True), exact)
    path = Path(share_prompt=False, tiled_head=_same(tiled, allowed))
    own_attention = str(model.config._attn_implementation)
    if share_prompt == "never":
        return path
    try:
        model.set_attn_implementation(attention.NAME)
        shared = _error(model, packed, path._replace(share_prompt=True), exact)
    except (ValueError, KeyError) as error:  # a model that lets nobody choose its attention
        shared = str(error)
    if _same(shared, allowed):
        logger.info("%s: prompts are shared (%s), head tiled: %s", type(model).__name__, _text(shared), path.tiled_head)
        return path._replace(share_prompt=True)
    model.set_attn_implementation(own_attention)
    if share_prompt == "always":
        raise ConfigError(
            f"share_prompt=always, but {type(model).__name__} gives other log-probabilities for a shared prompt: "
            f"{_text(shared)}, allowed {allowed:g}; use `auto`, which gives each completion a row of its own"
        )
    logger.warning(
        "%s: each completion gets a row of its own, since a shared prompt gave %s", type(model).__name__, _text(shared)
    )
    return path


def _error(model: PreTrainedModel, batch: Batch, path: Path, exact: torch.Tensor) -> float | str:
    """Return the mean difference to the exact values, or why the model cannot be run in this way."""
    try:
        error: float | str = (token_logps(model, batch, path).logps - exact).abs().mean().item()
    except (NotImplementedError, RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as raised:
        error = f"{type(raised).__name__}: {str(raised).splitlines()[0][:200] if str(raised) else ''}"
    if isinstance(model, FSDPModule):
        model.reset_iter_state()  # a forward that raised leaves weights gathered, one without a backward is kept track of
        errors: list[float | str] = [error] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        # Ranks on other hardware can round to the other side of what is allowed: all take the worst.
        error = max(errors, key=lambda each: math.inf if isinstance(each, str) or math.isnan(each) else each)
    return error


def _same(error: float | str, allowed: float) -> bool:
    return not isinstance(error, str) and error <= allowed  # NaN is not


def _text(error: float | str) -> str:
    return error if isinstance(error, str) else f"a mean difference of {error:.2g} nats a token"
