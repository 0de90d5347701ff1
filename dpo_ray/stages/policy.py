"""Resolve a policy that a run starts from: a hub id, a local directory, or an embedded one.

`quickstart` is taught by SFT to write reviews; `quickstart-base` is the same before that, with random weights.

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
from dpo_ray.quickstart.policy import NUM_STEPS, build_policy, policy_key

VERSION = 1
STEPS = {"quickstart": NUM_STEPS, "quickstart-base": 0}
"""Embedded policies, and how many steps of SFT they have."""
COMPLETE = "_complete"


def stage(config: Run, policy: str, revision: str | None, name: str = "policy") -> Stage:
    """Stage that resolves `policy`, which the run names as `name` (`policy`, or `reference_policy`)."""
    seed = config.seed if policy in STEPS else None
    return Stage(
        name=name,
        round=None,
        version=VERSION,
        config={"policy": policy, "revision": revision, "seed": seed},
        inputs={},
        external=lambda: {"policy": _identity(config, policy, revision)},
        needs=Needs(1, 1.0, 0.0, "policy build") if policy in STEPS else Needs(),
        run=lambda context: _resolve(config, policy, revision, context),
    )


def _resolve(config: Run, policy: str, revision: str | None, context: StageContext) -> StageOutput:
    identity = _identity(config, policy, revision)
    metrics: dict[str, str | None] = {"identity": identity, "path": policy, "revision": None}
    if policy in STEPS:
        metrics["path"] = _build(config, policy, identity)
    elif os.path.isdir(os.path.expanduser(policy)):
        metrics["path"] = os.path.abspath(os.path.expanduser(policy))
    else:
        metrics["revision"] = identity
    return StageOutput([], 1, 1, {}, metrics)


def _identity(config: Run, policy: str, revision: str | None) -> str:
    """Hash of a local policy's contents, the commit of a hub policy, or the key of an embedded one."""
    if policy in STEPS:
        return policy_key(config.seed, STEPS[policy])
    directory = Path(policy).expanduser()
    if directory.is_dir():
        if revision:
            raise ConfigError(
                f"policy {policy} is a directory here, so its revision {revision!r} would be ignored; take it out"
            )
        check_policy_directory(directory)
    return model_identity(policy, revision)


def _build(config: Run, policy: str, key: str) -> str:
    """Build an embedded policy once per content, below the root, so that every run of that root shares it."""
    target = f"{config.root}/policies/{policy}-{key}"
    if not storage.exists(f"{target}/{COMPLETE}"):
        try:
            ray.get(_build_task.remote(target, config.seed, STEPS[policy]))
        except ray.exceptions.RayError as error:
            raise first_cause(error, "policy") from error
    return target


@ray.remote(num_cpus=1, max_retries=MAX_DEATHS)
def _build_task(target: str, seed: int, num_steps: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        build_policy(f"{scratch}/policy", seed, num_steps=num_steps)
        storage.copy_directory(f"{scratch}/policy", target)
    storage.write_bytes(f"{target}/{COMPLETE}", b"")
