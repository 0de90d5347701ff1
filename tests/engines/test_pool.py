"""A pool of two engines (the hf kind, which starts fast): work goes to both, and one survives the other's death."""

import os
import signal
from pathlib import Path

import psutil
import pytest
import ray

from dpo_ray.engines.policies import PolicyRef
from dpo_ray.engines.pool import EnginePool, Process
from dpo_ray.engines.requests import EngineSettings, Request, Sample
from dpo_ray.flow.cluster import Idle
from dpo_ray.learn.policy_files import policy_identity

from ..learn import tiny

SETTINGS = EngineSettings("hf", "float32", 64, {}, 1, 0.0, 1.0, 2, False)
SAMPLING = {
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    **{"max_new_tokens": 8, "stop": (), "stop_token_ids": (), "logps": False},
}


def test_pool_of_two_engines_shares_work_survives_a_death_and_leaves_nothing(idle_ray: None, policy: PolicyRef) -> None:
    """As many as fit of one to eight: four CPUs hold two engines of two."""
    idle = Idle()
    pool = EnginePool(SETTINGS._replace(cpus=2.0), policy, 1, 8)
    assert len(pool.actors) == 2
    asked = [Request([5, 6, 7], seed=10 * i, n=2) for i in range(4)]

    @ray.remote(num_cpus=0)
    def generate(engines: EnginePool) -> list[list[Sample]]:
        return engines.generate(asked, SAMPLING)

    answers = ray.get([generate.remote(pool) for _ in range(4)])
    assert all(a == answers[0] for a in answers), "samples depend on their seeds, not on the engine"
    assert ray.get([a.load.remote() for a in pool.actors]) == [0, 0]

    family = [psutil.Process(pid) for _, processes in pool.processes for pid, _ in processes]
    os.kill(pool.processes[0][1][0][0], signal.SIGKILL)
    assert ray.get(generate.remote(pool)) == answers[0]

    pool.close()
    idle.wait("the engines", timeout_s=20)
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def test_pool_use_replaces_the_engines_by_those_of_another_policy(idle_ray: None, policy: PolicyRef, tmp_path: Path) -> None:
    model = tiny.build_model("llama", seed=1)
    model.save_pretrained(tmp_path)
    tiny.build_tokenizer().save_pretrained(tmp_path)
    other = PolicyRef(str(tmp_path), policy_identity(tmp_path))
    idle, asked = Idle(), [Request([5, 6, 7], seed=1, n=2)]
    pool = EnginePool(SETTINGS, policy, 1, 1)
    family = pool.processes
    pool.use(policy)
    assert pool.processes == family, "the same policy needs no other engine"
    pool.use(other)
    assert not any(Process(*p).alive() for _, processes in family for p in processes)
    (samples,) = pool.generate(asked, {**SAMPLING, "logps": True})
    for sample in samples:
        assert sample.logps_sum == pytest.approx(tiny.naive_logps(model, [5, 6, 7], sample.token_ids), abs=1e-4)
    pool.close()
    idle.wait("the engines", timeout_s=20)
