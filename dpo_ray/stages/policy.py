"""Resolve a policy that a run starts from: a hub id, a local directory, or the embedded quickstart policy.

Writes no table; its manifest says where the policy is and which one it is.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import ray

from dpo_ray.config import Run
from dpo_ray.engines.policies import model_identity
from dpo_ray.errors import ConfigError
from dpo_ray.flow import storage
from dpo_ray.flow.parts import MAX_DEATHS, first_cause
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
from dpo_ray.learn.policy_files import check_policy_directory
from dpo_ray.quickstart.policy import build_policy, policy_key

VERSION = 1
QUICKSTART = "quickstart"
COMPLETE = "_complete"


def stage(config: Run, policy: str, revision: str | None, name: str = "policy") -> Stage:
    """Stage that resolves `policy`, which the run names as `name` (`policy`, or `reference_policy`)."""
    seed = config.seed if policy == QUICKSTART else None
    return Stage(
        name=name,
        round=None,
        version=VERSION,
        config={"policy": policy, "revision": revision, "seed": seed},
        inputs={},
        external=lambda: {"policy": _identity(config, policy, revision)},
        needs=Needs(1, 1.0, 0.0, "policy build") if policy == QUICKSTART else Needs(),
        run=lambda context: _resolve(config, policy, revision, context),
    )


def _resolve(config: Run, policy: str, revision: str | None, context: StageContext) -> StageOutput:
    identity = _identity(config, policy, revision)
    metrics: dict[str, str | None] = {"identity": identity, "path": policy, "revision": None}
    if policy == QUICKSTART:
        metrics["path"] = _build_quickstart(config, identity)
    elif os.path.isdir(os.path.expanduser(policy)):
        metrics["path"] = os.path.abspath(os.path.expanduser(policy))
    else:
        metrics["revision"] = identity
    return StageOutput([], 1, 1, {}, metrics)


def _identity(config: Run, policy: str, revision: str | None) -> str:
    """Hash of a local policy's contents, the commit of a hub policy, or the key of the quickstart build."""
    if policy == QUICKSTART:
        return policy_key(config.seed)
    directory = Path(policy).expanduser()
    if directory.is_dir():
        if revision:
            raise ConfigError(
                f"policy {policy} is a directory here, so its revision {revision!r} would be ignored; take it out"
            )
        check_policy_directory(directory)
    return model_identity(policy, revision)


def _build_quickstart(config: Run, key: str) -> str:
    """Build the quickstart policy once per content, below the root, so that every run of that root shares it."""
    target = f"{config.root}/policies/quickstart-{key}"
    if not storage.exists(f"{target}/{COMPLETE}"):
        cpus = min(2.0, max(n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]))
        try:
            ray.get(_build_task.options(num_cpus=cpus).remote(target, config.seed, int(cpus)))
        except ray.exceptions.RayError as error:
            raise first_cause(error, "policy") from error
    return target


@ray.remote(max_retries=MAX_DEATHS)
def _build_task(target: str, seed: int, num_threads: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        build_policy(f"{scratch}/policy", seed, num_threads=num_threads)
        storage.copy_directory(f"{scratch}/policy", target)
    storage.write_bytes(f"{target}/{COMPLETE}", b"")
