"""Which group of training workers may write the run's checkpoints, log and policy: the one that started last.

A group can live on where Ray has given it up: its head is gone, or its node is cut off from the cluster and not from storage.
Ray ends such workers after a minute, and meanwhile they would go on side by side with the group that took their place.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

from dpo_ray.errors import StageError
from dpo_ray.flow import storage

OWNER = "_owner"


def take_over(directory: str) -> Callable[[], bool]:
    """Make the caller, rank 0 of a group, the one that writes below the directory; returns whether it still is."""
    token = uuid.uuid4().hex.encode()
    storage.write_bytes(f"{directory}/{OWNER}", token)

    def ours() -> bool:
        uri = f"{directory}/{OWNER}"
        return storage.exists(uri) and storage.read_bytes(uri) == token

    return ours


def taken_over(directory: str) -> StageError:
    """What a group raises that is no longer the one."""
    return StageError(
        f"train: other workers have taken {directory} over, as they do when Ray has lost sight of these, which write no more"
    )
