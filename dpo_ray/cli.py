"""The command line: arguments, dotted overrides over the YAML, and the tables that are printed.

Imports no torch, ray or vllm, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dpo_ray.config import PreferenceRun, Run, RunConfig, SftRun, run_class
from dpo_ray.config.block import CREDENTIALS
from dpo_ray.errors import ConfigError


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Run]:
    """The parsed arguments and the validated configuration.

    Raises:
        ConfigError: the YAML or an override does not make a valid configuration; the message names every field.
    """
    parser = argparse.ArgumentParser(
        description="Take a policy and prompts through DPO rounds: generate, score, pair, reference, train, evaluate.",
        epilog="Any field of the configuration can be set over the YAML, e.g. --train.beta 0.2:\n\n"
        + "\n".join(describe(RunConfig))
        + "\n\nand, of a run on existing preferences:\n\n"
        + "\n".join(line for line in describe(PreferenceRun) if line not in describe(RunConfig))
        + "\n\nand, of supervised fine-tuning on conversations:\n\n"
        + "\n".join(line for line in describe(SftRun) if line not in describe(RunConfig)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of the run, e.g. pipelines/quickstart.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what is already done; run nothing")
    parser.add_argument(
        "--until", metavar="STAGE", help="stop after this stage (e.g. reference: of the first round; or round_01/pair)"
    )
    parser.add_argument(
        "--redo",
        metavar="STAGE",
        action="append",
        default=[],
        help="run this stage again, and what follows it (e.g. train, round_00/pair)",
    )
    parser.add_argument(
        "--next-round", action="store_true", help="in place of --rounds: those that are finished, and one more (for a schedule)"
    )
    arguments, rest = parser.parse_known_args(argv)
    return arguments, load_config(arguments.config, overrides(rest))


def load_config(path: str, dotted: Mapping[str, Any] | None = None) -> Run:
    """Read a YAML file, put overrides over it, and validate once.

    Raises:
        ConfigError: the file is missing or no mapping, or a field is unknown, missing or invalid.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"no configuration at {path} (seen from {Path.cwd()}); pipelines/ holds examples")
    try:
        tree = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, got {type(tree).__name__}")
    for name, value in (dotted or {}).items():
        _set(tree, name.split("."), value, name)
    try:
        return run_class(tree).model_validate(tree)
    except ValidationError as error:
        lines = [f"  {_flag(e['loc']) or 'config'}: {_explain(e)}" for e in error.errors()]
        raise ConfigError(f"{path} is not a valid configuration:\n" + "\n".join(lines)) from None


def overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--a.b value` and `--a.b=value` as a mapping; values are YAML, so numbers, lists and null mean what they say."""
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(f"unexpected argument {flag!r}; overrides are written --field value, e.g. --train.beta 0.2")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{name} needs a value")
            value = rest.pop(0)
        found[name.replace("-", "_")] = yaml.safe_load(_as_yaml_number(value))
    return found


def _as_yaml_number(text: str) -> str:
    """YAML reads `1e-4` as a string; give it the dot that it wants."""
    mantissa, e, exponent = text.partition("e")
    numeric = e and mantissa.lstrip("-").isdigit() and exponent.lstrip("+-").isdigit()
    return f"{mantissa}.0e{exponent if exponent[0] in '+-' else '+' + exponent}" if numeric else text


SHORT_FOR = {"reference": "policy"}
"""Blocks that a plain value is short for one field of."""


def _set(tree: dict[str, Any], path: Sequence[str], value: Any, name: str) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--{name}: {key!r} is {tree!r} in the YAML, not a block of fields; set the block itself")
    key = path[-1]
    if key in SHORT_FOR and isinstance(value, str) and isinstance(tree.get(key), dict):
        tree, key = tree[key], SHORT_FOR[key]  # else the block's other fields were lost
    tree[key] = value


def _flag(place: Sequence[str | int]) -> str:
    """The flag of a field, without the `kind` that pydantic puts after a block of several kinds."""
    parts = [str(part) for part in place]
    several_kinds = parts[:1] in (["score"], ["preferences"]) and len(parts) > 2
    return ".".join(parts[:1] + parts[2:] if several_kinds else parts)


def _explain(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown field; see --help for the fields there are"
    if error["type"] == "missing":
        instead = (
            " (or give `preferences` or `conversations`)"
            if error["loc"] in (("prompts",), ("score",), ("prompts_per_round",))
            else ""
        )
        return f"missing; it has no default, because it decides the result{instead}"
    got = "" if isinstance(error.get("input"), dict) else f" (got {CREDENTIALS.sub('***', repr(error.get('input')))})"
    return error["msg"].removeprefix("Value error, ") + got


def describe(model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line a field of the configuration tree: `--name` with its type, default and documentation."""
    lines = []
    for name, field in model.model_fields.items():
        blocks = _blocks(field.annotation)
        if blocks:
            for block in blocks:
                lines += describe(block, f"{prefix}{name}.")
        else:
            default = "" if field.is_required() else f" [{_default(field)}]"
            doc = " ".join((field.description or "").split())
            lines.append(f"  --{prefix}{name}{default}" + (f"  {doc}" if doc else ""))
    return list(dict.fromkeys(lines))


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _blocks(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [b for a in typing.get_args(annotation) for b in _blocks(a)]
    return []
