"""Save and load the state of training (weights, optimizer, step) for resume, on any number of ranks.

Out: DCP files, one or more per rank (`__<rank>_<i>.distcp`) and rank 0's `.metadata`. Ranks may write to directories of
their own; to load, all files lie in one directory.
Trust: DCP unpickles its metadata, so load only what this run has written.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


def save_checkpoint(directory: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write this rank's shards; every rank calls it.

    Args:
        step: steps taken, which is the index of the next one.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": step}
    save(state, checkpoint_id=str(directory), no_dist=not dist.is_initialized())


def load_checkpoint(directory: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load into model and optimizer, however many ranks wrote the checkpoint; return the step saved with it."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": 0}
    load(state, checkpoint_id=str(directory), no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return state["step"]
