"""`python pipelines/full_round.py CONFIG ...` in this process, on the session's Ray, as one user runs it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import full_round


class Command:
    """A run's YAML, and the command on it."""

    def __init__(
        self, directory: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.directory, self.monkeypatch, self.capsys = directory, monkeypatch, capsys
        self.run_directory = directory / "root/run"
        self.tree = {"name": "run", "root": str(directory / "root"), **tree}

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """The exit status, and what stands on stderr."""
        self.monkeypatch.setattr(sys, "argv", ["full_round.py", str(self.write()), *map(str, arguments)])
        self.capsys.readouterr()
        status = full_round.main()
        return status, self.capsys.readouterr().err

    def write(self) -> Path:
        """Write the YAML."""
        file = self.directory / "run.yaml"
        file.write_text(yaml.safe_dump(self.tree))
        return file

    def refused(self, *arguments: str, kind: str = "ConfigError") -> str:
        """The one message of a command that must fail."""
        status, err = self(*arguments)
        assert status == 1
        assert err.strip().startswith(f"{kind}: ")
        assert "Traceback" not in err
        return err

    def manifest(self, stage: str) -> dict[str, Any]:
        return json.loads((self.run_directory / stage / "_manifest.json").read_text())

    def nothing_ran(self, stage: str = "policy") -> bool:
        return not (self.run_directory / stage / "_manifest.json").exists()


def write_jsonl(path: Path, rows: Sequence[dict[str, Any] | str]) -> Path:
    """One row a line; a string is written as it is, JSON or not."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def sampled_round(directory: Path, policy: str) -> dict[str, Any]:
    """A round of seconds: prompts of `directory`, scored by its `scorers.py`, sampled by transformers."""
    return {
        "policy": policy,
        "prompts_per_round": 12,
        "prompts": {"source": str(directory / "prompts.jsonl"), "eval_prompts": 4},
        "generate": {
            "engine": "hf",
            "max_prompt_tokens": 20,
            "dtype": "float32",
            "sampling": {"max_new_tokens": 4},
            "resources": {"rows_per_part": 6},
        },
        "score": {"kind": "function", "function": f"{directory}/scorers.py:score", "resources": {"cpus": 0.5}},
        "pair": {"drop_length_cut": False, "drop_ties": False},
        "train": {"beta": 0.1, "learning_rate": 1e-3, "dtype": "float32"},
    }


def preference_round(directory: Path, policy: str) -> dict[str, Any]:
    """The same on the preferences of `directory`."""
    return {
        "policy": policy,
        "preferences": {
            "kind": "explicit",
            "source": str(directory / "pairs.jsonl"),
            "eval_pairs": 4,
            "max_prompt_tokens": 20,
            "max_tokens": 30,
            "resources": {"rows_per_part": 20},
        },
        "train": {"beta": 0.1, "learning_rate": 1e-3, "dtype": "float32"},
    }
