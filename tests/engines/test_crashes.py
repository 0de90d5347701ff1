"""Prompts that take their engine's process with them: found, bounded, and no other prompt pays for it.

The engine is a fake that really exits; processes, restarts and the pool are the real ones.
"""

import os
import shutil
import threading
from pathlib import Path

import pytest
import ray

from dpo_ray.engines import actors, pool
from dpo_ray.engines.policies import PolicyRef
from dpo_ray.engines.requests import EngineSettings, Request, Sample
from dpo_ray.errors import StageError

pytestmark = pytest.mark.usefixtures("idle_ray")
POISON, ONCE = 66, 77


class Exploding:
    """Answers with the prompt and its seed; the token POISON ends the process, ONCE does so the first time."""

    def __init__(self, starts: Path) -> None:
        self.starts = starts
        (starts / str(os.getpid())).touch()
        self.waiting = 0

    def load(self):
        return self.waiting

    def generate(self, requests, sampling):
        if any(POISON in r.prompt_token_ids for r in requests):
            os._exit(1)
        if any(ONCE in r.prompt_token_ids for r in requests) and not (self.starts / "once").exists():
            (self.starts / "once").touch()
            os._exit(1)
        return [[Sample([*r.prompt_token_ids, r.seed + k], "", "stop", None) for k in range(r.n)] for r in requests]


def explodes(settings, policy):
    return Exploding(Path(policy.path))


class ExplodingActor(actors.EngineActor):
    def __init__(self, settings, policy, companion):
        actors.start_engine = explodes  # in the actor's own process
        super().__init__(settings, policy, companion)


@pytest.fixture
def engines(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "EngineActor", ExplodingActor)
    made = pool.EnginePool(EngineSettings("hf", "float32", 64, {}, 1, 0.0, 1.0, 4, False), PolicyRef(str(tmp_path), "p"), 1, 1)
    yield made
    made.close()


def requests(*tokens):
    return [Request([token], seed=100 * token, n=2) for token in tokens]


def wanted(*tokens):
    return [None if t == POISON else [Sample([t, 100 * t + k], "", "stop", None) for k in range(2)] for t in tokens]


def generate_at_once(engines, parts):
    """Several parts in flight, as Ray Data's tasks have them."""
    found = [None] * len(parts)

    def generate(i):
        found[i] = engines.generate(requests(*parts[i]), {}, 2)

    threads = [threading.Thread(target=generate, args=[i]) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def num_starts(engines):
    return sum(name.isdigit() for name in os.listdir(engines.policy.path))


def test_poison_prompt_is_found_among_many_and_the_starts_are_bounded(engines):
    """The part, alone, its pieces of 16, 4 and 1, and the prompt once more: six crashes at most."""
    tokens = [*range(1, 40), POISON, *range(100, 124)]
    assert engines.generate(requests(*tokens), {}, 2) == wanted(*tokens)
    assert num_starts(engines) <= 1 + 6


def test_poison_prompts_of_several_parts_are_all_found_and_take_no_innocent_one_with_them(engines):
    parts = [[1, 2, POISON, 3], [POISON, 4], [7, 8, 9, 10], [11]]
    assert generate_at_once(engines, parts) == [wanted(*p) for p in parts]


def test_crash_that_does_not_come_again_quarantines_nothing(engines):
    parts = [[1, ONCE, 2], [3, 4]]
    assert generate_at_once(engines, parts) == [wanted(*p) for p in parts]


def test_engine_that_crashes_on_everything_ends_in_an_error(engines, monkeypatch):
    monkeypatch.setattr(pool, "MAX_CRASHES", 2)
    with pytest.raises(StageError, match="crashed more than 2 times"):
        engines.generate(requests(*[POISON] * 16), {}, 2)


def test_gate_alone_waits_for_those_inside_and_holds_back_new_ones():
    gate, order, inside = actors.Gate(), [], threading.Event()
    wants_alone = threading.Thread(target=lambda: enter(gate.alone, "alone"))
    comes_later = threading.Thread(target=lambda: enter(gate.together, "later"))

    def enter(way, name):
        with way():
            order.append(name)

    with gate.together():
        inside.set()
        wants_alone.start()
        with gate.changed:
            assert gate.changed.wait_for(lambda: True, timeout=5)
        while not gate.want_alone:
            inside.wait(0.001)
        comes_later.start()
        order.append("first")
    wants_alone.join(5)
    comes_later.join(5)
    assert order == ["first", "alone", "later"]


def test_policy_that_the_engine_cannot_load_is_one_message_with_the_cause(idle_ray, tmp_path, policy):
    """A cut weights file, on the engine that starts fast; tests/runs/test_broken_policy.py has the same on vLLM."""
    broken = tmp_path / "broken"
    shutil.copytree(policy.path, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    settings = EngineSettings("hf", "float32", 64, {}, 1, 0.0, 1.0, 4, False)
    with pytest.raises(StageError) as error:
        pool.EnginePool(settings, PolicyRef(str(broken), "broken"), 1, 1)
    message = str(error.value)
    assert f"could not load {broken}: " in message
    assert "afetensor" in message
    assert "Traceback" not in message
    assert len(message.splitlines()) == 1
    assert ray.available_resources()["CPU"] >= 0


def dies(settings, policy):
    """As the kernel ends a process that wants more memory than there is."""
    (Path(policy.path) / str(os.getpid())).touch()
    os._exit(1)


class DyingActor(actors.EngineActor):
    def __init__(self, settings, policy, companion):
        actors.start_engine = dies  # in the actor's own process
        super().__init__(settings, policy, companion)


class LostActor(ExplodingActor):
    """Loads once, and never again."""

    def __init__(self, settings, policy, companion):
        if os.listdir(policy.path):
            raise StageError("OSError: the weights are gone")
        super().__init__(settings, policy, companion)


def test_engine_that_dies_while_it_loads_is_one_message_after_a_few_starts(idle_ray, monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "EngineActor", DyingActor)
    settings = EngineSettings("hf", "float32", 64, {}, 1, 0.0, 1.0, 4, False)
    with pytest.raises(StageError) as error:
        pool.EnginePool(settings, PolicyRef(str(tmp_path), "p"), 1, 1)
    assert f"could not load {tmp_path}: its process died 3 times while it loaded (memory" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(os.listdir(tmp_path)) == 1 + actors.START_RETRIES


def test_engine_that_cannot_load_again_after_a_crash_ends_in_one_message(idle_ray, monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "EngineActor", LostActor)
    settings = EngineSettings("hf", "float32", 64, {}, 1, 0.0, 1.0, 4, False)
    made = pool.EnginePool(settings, PolicyRef(str(tmp_path), "p"), 1, 1)
    with pytest.raises(StageError, match=rf"could not load {tmp_path}: OSError: the weights are gone\. Check"):
        made.generate(requests(1, POISON), {}, 2)
    made.close()
