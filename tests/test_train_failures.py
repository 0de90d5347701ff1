"""Which failures are tried again, by the errors that Ray gives; real workers die in tests/stages/test_train.py."""

import pytest
import ray.train
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerGroupStartupTimeoutError

from dpo_ray.errors import NonFiniteLossError, StageError
from dpo_ray.train_failures import StopAtOurErrors, fit, run_until_started


def raised(cause: Exception) -> RayTaskError:
    """As `ray.get` raises what a task has raised."""
    return RayTaskError("fit", "traceback", cause).as_instanceof_cause()


class Attempts:
    """Each call fails with the next of the errors; when none is left it succeeds."""

    def __init__(self, *errors: Exception):
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> None:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)


TAKEN_PORT = ray.train.ControllerError(RuntimeError("address already in use"))


@pytest.mark.parametrize("error", [raised(TAKEN_PORT), ActorDiedError()], ids=["port", "controller"])
def test_failed_start_is_tried_again(error):
    attempts = Attempts(error, error)
    run_until_started(attempts, max_failures=0, max_setup_failures=2, pause_s=0)
    assert attempts.calls == 3


def test_failed_starts_are_bounded():
    attempts = Attempts(*[raised(TAKEN_PORT)] * 9)
    with pytest.raises(StageError, match=r"(?s)could not be started within train.max_setup_failures=2 .*already in use"):
        run_until_started(attempts, max_failures=0, max_setup_failures=2, pause_s=0)
    assert attempts.calls == 3


@pytest.mark.parametrize(
    ("cause", "kind", "said"),
    [
        (NonFiniteLossError("step 3: loss nan"), NonFiniteLossError, "^step 3: loss nan$"),
        (ray.train.WorkerGroupError("rank 1 died", {}), StageError, r"more than train.max_failures=2 times.*rank 1 died"),
        (ray.train.ControllerError(WorkerGroupStartupTimeoutError(2)), StageError, r"max_setup_failures=5 .*2 workers"),
    ],
    ids=["ours", "workers", "no room"],
)
def test_what_another_start_cannot_mend_ends_at_once(cause, kind, said):
    attempts = Attempts(raised(cause))
    with pytest.raises(kind, match=f"(?s){said}"):
        run_until_started(attempts, max_failures=2, max_setup_failures=5, pause_s=0)
    assert attempts.calls == 1


def test_hook_raises_our_error_of_any_rank_and_lets_others_pass():
    ours = UserExceptionWithTraceback(NonFiniteLossError("step 3: loss nan"), "traceback")
    theirs = UserExceptionWithTraceback(RuntimeError("connection closed by peer"), "traceback")
    hook = StopAtOurErrors()
    hook.after_exception(None, {0: theirs})
    with pytest.raises(NonFiniteLossError, match="step 3"):
        hook.after_exception(None, {0: theirs, 1: ours})


def test_fit_gives_our_error_back_and_others_as_they_are():
    class Trainer:
        def __init__(self, cause: Exception):
            self.cause = cause

        def fit(self) -> None:
            raise ray.train.ControllerError(self.cause)

    with pytest.raises(NonFiniteLossError, match="step 3"):
        fit(Trainer(NonFiniteLossError("step 3: loss nan")))
    with pytest.raises(ray.train.ControllerError, match="address"):
        fit(Trainer(RuntimeError("address already in use")))
