"""Which policy to load, and the place on this node where it can be loaded from."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from dpo_ray.errors import ConfigError
from dpo_ray.flow import storage
from dpo_ray.flow.artifact import Artifact
from dpo_ray.learn.policy_files import policy_identity

CACHE = Path(tempfile.gettempdir()) / f"dpo-ray-policies-{os.getuid() if hasattr(os, 'getuid') else 0}"


class PolicyRef(NamedTuple):
    """A policy to load: a directory that every node sees (or a URI), or a hub id with its commit."""

    path: str
    identity: str
    """Hash of its contents, or the hub commit; two refs with equal identity are the same policy."""
    revision: str | None = None
    trust_remote_code: bool = False


def policy_ref(artifact: Artifact, *, trust_remote_code: bool) -> PolicyRef:
    """The policy that a `policy` or `train` stage committed."""
    metrics = artifact.manifest.metrics
    path = metrics.get("path") or f"{artifact.directory}/policy"
    return PolicyRef(path, metrics["identity"], metrics.get("revision"), trust_remote_code)


def local_path(policy: PolicyRef) -> str:
    """A hub id or a local directory as it is; a policy under a URI is fetched once per node, keyed by its contents."""
    if "://" not in policy.path:
        return policy.path
    target = CACHE / policy.identity
    if not target.exists():
        CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
        torn = Path(tempfile.mkdtemp(dir=CACHE))
        storage.copy_directory(policy.path, str(torn))
        try:
            os.rename(torn, target)
        except OSError:  # another process of this node was faster, with the same contents
            shutil.rmtree(torn)
    return str(target)


def model_identity(model: str, revision: str | None) -> str:
    """Hash of a local model directory's contents, or the commit of a hub model.

    Raises:
        ConfigError: it is no directory, and the hub does not give it.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        return policy_identity(directory)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        commit = HfApi().model_info(model, revision=revision).sha
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"{model!r} is no local directory, and the hub does not give it: {type(error).__name__}: {error}. "
            "Check the name and the network (HF_TOKEN for a gated model), or download it and give its directory"
        ) from error
    assert commit is not None
    return commit
