"""What an engine holds is free again after its stage, on real vLLM: processes, placement groups, CPUs."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch

from dpo_ray.engines.policies import PolicyRef
from dpo_ray.engines.pool import EnginePool
from dpo_ray.engines.requests import EngineSettings, Request, Sample
from dpo_ray.flow.cluster import Idle
from dpo_ray.learn.policy import export_policy, load_policy, policy_identity
from dpo_ray.learn.tokens import load_tokenizer, render_prompt
from dpo_ray.quickstart.policy import build_policy

from ..learn.tiny import naive_logps

SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "max_new_tokens": 16,
    "stop": (),
    "stop_token_ids": (),
    "logps": True,
}


def settings(tensor_parallel: int = 1, closed: bool = False) -> EngineSettings:
    return EngineSettings("vllm", "float32", 160, {}, tensor_parallel, 0.0, 1.0, 2, closed)


def requests(policy: Path, n: int = 2) -> list[Request]:
    tokenizer = load_tokenizer(str(policy))
    texts = [
        "Write a short review of the film Blue River.",
        "Describe the hotel Amber Court.",
        "What of the novel Iron Sparrow?",
    ]
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": t}]) for t in texts]
    return [Request(p, seed=1000 * i, n=n) for i, p in enumerate(prompts)]


def ref(policy: Path) -> PolicyRef:
    return PolicyRef(str(policy), policy_identity(policy))


def processes(engine: EnginePool) -> list[psutil.Process]:
    return [psutil.Process(pid) for _, family in engine.processes for pid, _ in family]


def assert_gone(family: list[psutil.Process], idle: Idle) -> None:
    idle.wait("the engine", timeout_s=20)
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def test_engine_samples_by_seed_from_its_policy_and_leaves_nothing_after_sigkill(idle_ray: None, tiny_policy: Path) -> None:
    """One vLLM start for several facts, because a start costs half a minute."""
    idle = Idle()
    engine = EnginePool(settings(), ref(tiny_policy), 1, 1)
    asked = requests(tiny_policy)

    first = engine.generate(asked, SAMPLING)
    assert [len(samples) for samples in first] == [2, 2, 2]
    assert all(a.token_ids != b.token_ids for a, b in first), "the samples of a prompt have seeds of their own"
    assert all(len(s.token_ids) == 16 for pair in first for s in pair if s.finish_reason == "length")
    assert_sampled_from(tiny_policy, asked, first)

    alone = [engine.generate([r], SAMPLING)[0] for r in asked]
    assert ids(alone) == ids(first), "a seeded sample does not depend on the batch around it"

    family = processes(engine)
    os.kill(family[0].pid, signal.SIGKILL)
    engine.close()
    assert_gone(family, idle)


@pytest.mark.slow
def test_engine_two_stages_back_to_back_each_get_the_whole_machine(idle_ray: None, tiny_policy: Path) -> None:
    idle, answers = Idle(), []
    for _ in range(2):
        engine = EnginePool(settings()._replace(cpus=4.0), ref(tiny_policy), 1, 1)
        answers.append(ids(engine.generate(requests(tiny_policy), SAMPLING)))
        family = processes(engine)
        engine.close()
        assert_gone(family, idle)
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True], ids=["closed", "sigkilled"])
def test_engine_tensor_parallel_leaves_no_worker_process(idle_ray: None, tiny_policy: Path, killed: bool) -> None:
    idle = Idle()
    engine = EnginePool(settings(tensor_parallel=2), ref(tiny_policy), 1, 1)
    samples = engine.generate(requests(tiny_policy), SAMPLING)
    assert [len(s) for s in samples] == [2, 2, 2]
    family = processes(engine)
    assert len(family) >= 4, "the actor, a worker process a shard, and the companion"
    if killed:
        os.kill(family[0].pid, signal.SIGKILL)
    engine.close()
    assert_gone(family, idle)


@pytest.mark.slow
def test_engine_of_another_policy_samples_from_that_policy_alone(idle_ray: None, tiny_policy: Path, tmp_path: Path) -> None:
    build_policy(tmp_path / "other", seed=1, num_steps=2)
    idle = Idle()
    engine = EnginePool(settings(), ref(tiny_policy), 1, 1)
    asked = requests(tiny_policy)
    first = ids(engine.generate(asked, SAMPLING))
    engine.use(ref(tmp_path / "other"))
    assert_sampled_from(tmp_path / "other", asked, engine.generate(asked, SAMPLING))
    engine.use(ref(tiny_policy))
    assert ids(engine.generate(asked, SAMPLING)) == first
    family = processes(engine)
    engine.close()
    assert_gone(family, idle)


@pytest.mark.slow
def test_engine_killed_while_generating_starts_again_and_finishes(idle_ray: None, tiny_policy: Path) -> None:
    idle = Idle()
    engine = EnginePool(settings(), ref(tiny_policy), 1, 1)
    asked = requests(tiny_policy)
    expected = ids(engine.generate(asked, SAMPLING))

    @ray.remote(num_cpus=0)
    def generate(pool: EnginePool) -> list[list[Sample]]:
        return pool.generate(asked * 200, SAMPLING)

    running = generate.remote(engine)
    deadline = time.monotonic() + 60
    while not ray.get(engine.actors[0].load.remote()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(processes(engine)[0].pid, signal.SIGKILL)
    assert ids(ray.get(running)) == expected * 200
    _, restarted = ray.get(engine.actors[0].processes.remote())
    family = [psutil.Process(pid) for pid, _ in restarted]
    engine.close()
    assert_gone(family, idle)


@pytest.mark.slow
def test_engine_loads_a_policy_exported_in_several_files(idle_ray: None, tiny_policy: Path, tmp_path: Path) -> None:
    model = load_policy(str(tiny_policy), dtype=torch.float32)
    export_policy(model, tmp_path, source=str(tiny_policy), max_file_bytes=model.num_parameters())
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    engine, asked = EnginePool(settings(), ref(tmp_path), 1, 1), requests(tmp_path)
    assert_sampled_from(tiny_policy, asked, engine.generate(asked, SAMPLING))
    engine.close()


def assert_sampled_from(policy: Path, asked: list[Request], samples: list[list[Sample]]) -> None:
    """The engine's own log-probabilities are those of a plain forward of the policy (at worst 2.1e-5 nats off, measured)."""
    model = load_policy(str(policy), dtype=torch.float32)
    for request, pair in zip(asked, samples, strict=True):
        for s in pair:
            expected = naive_logps(model, request.prompt_token_ids, s.token_ids)
            assert s.logps_sum == pytest.approx(expected, abs=1e-3)


def ids(samples: list[list[Sample]]) -> list[list[list[int]]]:
    return [[s.token_ids for s in pair] for pair in samples]
