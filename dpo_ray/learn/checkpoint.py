"""The state of training (trained weights, optimizer, step) as files for resume, on any number of ranks.

`copy_state` is all that a step waits for; `write_state` can run in a thread, over a process group of its own.
Out: DCP files, one or more per rank (`__<rank>_<i>.distcp`) and rank 0's `.metadata`. Ranks may write to directories of
their own; to load, all files lie in one directory.
Frozen weights, as those under adapters, are not in it: to load, the model must have them.
Trust: DCP unpickles its metadata, so load only what this run has written.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor


@torch.no_grad()
def copy_state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, into: Any = None) -> dict[str, Any]:
    """Return a copy in host memory of this rank's shards; training may go on while it is written. Every rank calls it.

    Args:
        step: steps taken, which is the index of the next one.
        into: an earlier copy that is no longer needed; its memory (page-locked for a GPU) is used again.
    """
    copied = _copied({**_state(model, optimizer), "step": step}, into)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the copies were only started
    return copied


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, optimizer_state = get_state_dict(model, optimizer)
    parameters = model.named_parameters(remove_duplicate=False)  # a tied weight is stored by both of its names
    frozen = {name.replace("_checkpoint_wrapped_module.", "") for name, p in parameters if not p.requires_grad}
    return {"model": {k: v for k, v in weights.items() if k not in frozen}, "optimizer": optimizer_state}


def _copied(value: Any, into: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v, into[k] if into else None) for k, v in value.items()}
    if isinstance(value, list):
        return [_copied(v, into[i] if into else None) for i, v in enumerate(value)]
    if not isinstance(value, torch.Tensor):
        return value
    copied = _in_host_memory(value) if into is None else into
    _local(copied).copy_(_local(value), non_blocking=True)
    return copied


def _in_host_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Memory for a copy, page-locked from the start for a GPU: on the way through other memory a copy takes several times as
    long."""
    local = _local(tensor)
    pinned = local.device.type == "cuda" and local.numel() > 0
    return torch.empty_like(tensor.detach(), device="cpu", pin_memory=pinned)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write_state(state: dict[str, Any], directory: str | Path, group: dist.ProcessGroup | None = None) -> None:
    """Write this rank's part of what `copy_state` returned; every rank calls it.

    Args:
        group: of CPU collectives; None is the default group.

    Raises:
        CheckpointException: on every rank, when one of them could not write. It is no `Exception`.
    """
    save(state, checkpoint_id=str(directory), process_group=group, no_dist=not dist.is_initialized())


def save_checkpoint(directory: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write this rank's shards before returning; every rank calls it.

    Args:
        step: steps taken, which is the index of the next one.
    """
    write_state(copy_state(model, optimizer, step), directory)


def load_checkpoint(
    directory: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
) -> int:
    """Load into model and optimizer, however many ranks wrote the checkpoint; return the step saved with it."""
    state = {**_state(model, optimizer), "step": 0}
    load(state, checkpoint_id=str(directory), process_group=group, no_dist=not dist.is_initialized())
    # DCP has refused a checkpoint without one of the names that are asked for; what is not asked for is frozen.
    options = StateDictOptions(strict=False)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)
    return state["step"]
