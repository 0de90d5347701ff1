"""The identity of a stage's result: a hash of what decides it, and of nothing else.

A fingerprint covers the stage's semantics version, its config without resources, the output hashes of its inputs and the
contents of what the config names outside the run (source files, hub commits). Library versions are recorded beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_ray.errors import ConfigError


def canonical_json(value: Any) -> str:
    """JSON with one form for equal values.

    Raises:
        ConfigError: a value has no stable JSON form (a function, a tensor, NaN).
    """
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cannot fingerprint {value!r}: {error}; use plain numbers, strings, lists and mappings") from error


def fingerprint(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def hash_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line a differing leaf: `config.sampling.temperature: 0.7 -> 1.0`."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differing_fields(a, b, f"{prefix}{key}.")
        elif canonical_json(a) != canonical_json(b):
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
