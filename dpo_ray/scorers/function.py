"""Score with a user's Python function.

`score(rows) -> list[float]` is called with a batch of rows, each a dict of prompt_id, prompt (list of {role, content}),
completion (text), meta (dict of the source's other columns) and finish_reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from dpo_ray.errors import ConfigError, StageError
from dpo_ray.flow.fingerprint import hash_file

Row = dict[str, Any]
ScoreFunction = Callable[[list[Row]], Sequence[float]]


def load_function(spec: str) -> ScoreFunction:
    """The function named by `package.module:name` or `path/to/file.py:name`.

    Raises:
        ConfigError: the module, file or name does not exist, does not import, or is not callable.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise ConfigError(f"score.function: got {spec!r}; expected `package.module:name` or `path/to/file.py:name`")
    try:
        module = _import(where)
    except Exception as error:
        raise ConfigError(f"score.function: {where!r} does not import: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = sorted(n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_"))
        raise ConfigError(f"score.function: {where!r} has no function {name!r}; it has {names}")
    return cast(ScoreFunction, function)


def function_sources(spec: str) -> dict[str, str]:
    """SHA-256 of the source file of the function, for the fingerprint; by name, so that a checkout may move."""
    try:
        path = inspect.getsourcefile(load_function(spec))
    except TypeError:  # an object that can be called, a builtin
        path = None
    if path is None:
        raise ConfigError(f"score.function: {spec!r} is no function with Python source; its changes could not be noticed")
    return {f"source of {os.path.basename(path)}": hash_file(path)}


def call(function: ScoreFunction, rows: list[Row]) -> list[tuple[float | None, str | None]]:
    """(score, drop reason) of each row. When the batch raises, rows are tried alone and only the culprits are dropped.

    Raises:
        StageError: the function returned another number of scores than it got rows, or something that is no number.
    """
    try:
        scores = list(function(rows))
    except Exception as error:
        if len(rows) == 1:
            return [(None, f"scorer_error: {type(error).__name__}: {error}"[:200])]
        return [call(function, [row])[0] for row in rows]
    if len(scores) != len(rows):
        raise StageError(f"score: the function returned {len(scores)} scores for {len(rows)} rows; it must return one a row")
    try:
        return [(float(s), None) for s in scores]
    except (TypeError, ValueError) as error:
        raise StageError(f"score: the function must return numbers: {error}") from error


def _import(where: str) -> ModuleType:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such file, seen from {Path.cwd()}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
