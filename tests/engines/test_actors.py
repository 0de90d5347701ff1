"""Calls of an actor that nothing reaches for a while."""

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from dpo_ray.engines.actors import outlast


class Asked:
    """Unreachable for the first `times` calls."""

    def __init__(self, times: int) -> None:
        self.calls, self.times = 0, times

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise ActorUnavailableError("no route to host", None)
        return "here"


def test_answer_of_an_actor_is_asked_for_until_it_can_be_reached() -> None:
    asked = Asked(3)
    assert outlast(asked, pause_s=0.001) == "here"
    assert asked.calls == 4


def test_actor_that_stays_out_of_reach_is_an_error_in_the_end() -> None:
    asked = Asked(10**9)
    with pytest.raises(ActorUnavailableError):
        outlast(asked, limit_s=0.02, pause_s=0.001)
    assert asked.calls > 1


def test_actor_that_is_dead_for_good_is_not_asked_again() -> None:
    calls = []

    def dead() -> None:
        calls.append(1)
        raise ActorDiedError

    with pytest.raises(ActorDiedError):
        outlast(dead)
    assert len(calls) == 1
