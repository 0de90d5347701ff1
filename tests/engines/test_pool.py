"""A pool of two engines (the hf kind, which starts fast): work goes to both, and one survives the other's death."""

import os
import signal

import psutil
import ray

from dpo_ray.engines.policies import PolicyRef
from dpo_ray.engines.pool import EnginePool
from dpo_ray.engines.requests import EngineSettings, Request, Sample
from dpo_ray.flow.cluster import Idle

SETTINGS = EngineSettings("hf", "float32", 64, {}, 1, 0.0, 1.0, 2, False)
SAMPLING = {
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    **{"max_new_tokens": 8, "stop": (), "stop_token_ids": (), "logps": False},
}


def test_pool_of_two_engines_shares_work_survives_a_death_and_leaves_nothing(idle_ray: None, policy: PolicyRef) -> None:
    idle = Idle()
    pool = EnginePool(SETTINGS, policy, 2, 2)
    asked = [Request([5, 6, 7], seed=10 * i, n=2) for i in range(4)]

    @ray.remote(num_cpus=0)
    def generate(engines: EnginePool) -> list[list[Sample]]:
        return engines.generate(policy, asked, SAMPLING)

    answers = ray.get([generate.remote(pool) for _ in range(4)])
    assert all(a == answers[0] for a in answers), "samples depend on their seeds, not on the engine"
    assert ray.get([a.load.remote() for a in pool.actors]) == [0, 0]

    family = [psutil.Process(pid) for _, processes in pool.processes for pid, _ in processes]
    os.kill(pool.processes[0][1][0][0], signal.SIGKILL)
    assert ray.get(generate.remote(pool)) == answers[0]

    pool.close()
    idle.wait("the engines", timeout_s=20)
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def test_pool_range_starts_as_many_engines_as_fit(idle_ray: None, policy: PolicyRef) -> None:
    pool = EnginePool(SETTINGS._replace(cpus=2.0), policy, 1, 8)
    assert len(pool.actors) == 2, "four CPUs hold two engines of two"
    pool.close()
