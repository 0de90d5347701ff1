"""What a training run survives: workers that die, and starts that fail, each a bounded number of times.

Ray Train starts workers again after a failure (`max_failures`) and retries some failed starts (`controller_failure_limit`).
Two things are left for here: an error that we raise on purpose would come again, so it ends the run at once; and a start
that fails outside of what Ray retries, such as a taken port, is tried again from the driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from ray.train import ControllerError, PreemptionError, UserCallback, WorkerGroupError

from dpo_ray.errors import DpoRayError, StageError

LONGEST_PAUSE_S = 30.0


class StopAtOurErrors(UserCallback):
    """Ray Train's hook, in its controller: a worker's own error passes on, and Ray does not retry what its hooks raise."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            cause = getattr(error, "_base_exc", error)
            if isinstance(cause, DpoRayError):
                raise cause


def fit(trainer: Any) -> None:
    """Run the trainer, in a task of its own so that the driver can show progress meanwhile.

    Raises:
        DpoRayError: as a worker raised it.
        WorkerGroupError: workers failed too often.
        ControllerError: the workers could not be started.
    """
    try:
        trainer.fit()
    except ControllerError as error:
        if isinstance(error.controller_failure, DpoRayError):
            raise error.controller_failure from None
        raise


def run_until_started(
    attempt: Callable[[], object], *, max_failures: int, max_setup_failures: int, pause_s: float = 1.0
) -> None:
    """Call `attempt`, which runs `fit` in a task, until it ends other than by a failed start.

    Args:
        pause_s: before the second attempt; each pause after it is twice as long, up to 30 s.

    Raises:
        DpoRayError: as a worker raised it.
        StageError: workers failed more often than `max_failures`, or starts than `max_setup_failures`.
    """
    for failures in range(max_setup_failures + 1):
        try:
            attempt()
            return
        except (RayTaskError, RayActorError, WorkerCrashedError) as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, DpoRayError):
                raise cause from None
            if isinstance(cause, WorkerGroupError | PreemptionError):
                often = f"workers failed more than train.max_failures={max_failures} times"
                if isinstance(cause, PreemptionError):
                    often = "nodes were taken away more often than train.max_preemptions allows"
                raise StageError(
                    f"train: {often}. The same command goes on from the last checkpoint. The last failure: {cause}"
                ) from error
            exhausted = "WorkerGroupStartup" in type(getattr(cause, "controller_failure", None)).__name__  # Ray's own tries
            if failures == max_setup_failures or exhausted:
                raise StageError(
                    f"train: the workers could not be started within train.max_setup_failures={max_setup_failures} more "
                    f"tries. The last failure: {cause}"
                ) from error
        time.sleep(min(pause_s * 2.0**failures, LONGEST_PAUSE_S))
