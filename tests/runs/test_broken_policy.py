"""A policy that lies complete on disk, but that vLLM cannot load: one message, and nothing of ours is left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from ..conftest import NUM_CPUS
from ..processes import titled
from ..waiting import wait_until
from .command import Command, sampled_round, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("idle_ray")]
ENGINE = ("EngineActor", "Companion", "vllm", "VLLM")
"""In the titles of its processes."""
SCORER = """
def score(rows):
    return [float(len(r["completion"])) for r in rows]
"""


@pytest.fixture
def command(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Describe hotel number {i}."} for i in range(24)])
    (tmp_path / "scorers.py").write_text(SCORER)
    shutil.copytree(tiny_policy, tmp_path / "policy")
    tree = sampled_round(tmp_path, str(tmp_path / "policy"))
    tree["generate"] |= {"engine": "vllm", "max_prompt_tokens": 64}
    return Command(tmp_path, tree, monkeypatch, capsys)


def cut_weights(policy: Path) -> None:
    weights = policy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def change_config(policy: Path, **fields: object) -> None:
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | fields))


def assert_refused(command: Command, policy: Path, *facts: str, until: str) -> None:
    err = command.refused("--until", until, kind="StageError")
    assert [f for f in (f"the vllm engine could not load {policy}: ", *facts, "See ") if f not in err] == []
    assert len(err.strip().splitlines()) == 1, err
    wait_until(lambda: ray.available_resources().get("CPU") == NUM_CPUS and not titled(*ENGINE))


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (cut_weights, "afetensor"),
        (lambda policy: change_config(policy, max_position_embeddings=16), "max_model_len"),
        (lambda policy: change_config(policy, num_attention_heads=3), "divi"),
    ],
    ids=["cut_weights", "short_context", "odd_heads"],
)
def test_policy_that_vllm_cannot_load_is_one_message_with_the_cause(
    command: Command, damage: Callable[[Path], None], fact: str
) -> None:
    damage(command.directory / "policy")
    assert_refused(command, command.directory / "policy", fact, until="generate")
    assert command.nothing_ran("round_00/generate")


def test_trained_policy_that_vllm_cannot_load_is_named_and_the_round_is_kept(command: Command) -> None:
    assert command("--until", "train")[0] == 0
    exported = command.run_directory / "round_00/train/policy"
    cut_weights(exported)
    assert_refused(command, exported, "afetensor", until="evaluate")
    assert command.nothing_ran("round_00/evaluate")
    assert not command.nothing_ran("round_00/train")
