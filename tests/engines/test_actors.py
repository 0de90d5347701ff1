"""Calls of an actor that nothing reaches for a while."""

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from dpo_ray.engines.actors import outlast


class Method:
    """Of an actor that is out of reach for the first `times` calls, or dead; its answers come as Ray's do, by `ray.get`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int = 0, dead: bool = False) -> None:
        self.calls, self.times, self.dead = 0, times, dead
        monkeypatch.setattr(ray, "get", lambda asked: asked())

    def remote(self, *args: str):
        def answer() -> tuple[str, ...]:
            self.calls += 1
            if self.dead:
                raise ActorDiedError
            if self.calls <= self.times:
                raise ActorUnavailableError("no route to host", None)
            return args

        return answer


def test_answer_of_an_actor_is_asked_for_until_it_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method(monkeypatch, times=3)
    assert outlast(method, "a", "b", pause_s=0.001) == ("a", "b")
    assert method.calls == 4


def test_actor_that_stays_out_of_reach_is_an_error_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method(monkeypatch, times=10**9)
    with pytest.raises(ActorUnavailableError):
        outlast(method, limit_s=0.02, pause_s=0.001)
    assert method.calls > 1


def test_actor_that_is_dead_for_good_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method(monkeypatch, dead=True)
    with pytest.raises(ActorDiedError):
        outlast(method)
    assert method.calls == 1
