"""pipelines/full_round.py: the plan and the command, without running a round."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dpo_ray.config import PreferenceRun, RunConfig, SftRun
from dpo_ray.errors import ConfigError
from pipelines import full_round

from .artifacts import commit
from .test_config import minimal, minimal_preferences, minimal_sft

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "pipelines/full_round.py")
REUSE = {"reference": {"reuse": "sampler"}, "generate": {"sampler_logps": True}}
ORDER = ["generate", "score", "pair", "reference", "train", "evaluate"]


def plan(**fields):
    tree = minimal() | fields
    return full_round.plan(RunConfig.model_validate(tree))


def preference_plan(**fields):
    return full_round.plan(PreferenceRun.model_validate(minimal_preferences() | fields))


def test_plan_of_fine_tuning_ends_in_a_policy_of_no_round():
    stages = full_round.plan(SftRun.model_validate(minimal_sft()))
    assert [s.key for s in stages] == ["policy", "conversations", "tokenize", "train", "evaluate"]
    assert by_key(stages)["train"].inputs == {"pairs": "tokenize", "policy": "policy"}
    assert by_key(stages)["evaluate"].inputs["policy"] == "train"


def by_key(stages):
    return {s.key: s for s in stages}


def test_plan_chains_the_stages_of_every_round_in_order():
    stages = plan(rounds=2, reference="initial")
    assert [s.key for s in stages] == ["policy", "prompts", *[f"round_{r:02d}/{name}" for r in (0, 1) for name in ORDER]]


@pytest.mark.parametrize("reference", ["initial", "previous", "/models/anchor"])
def test_plan_every_input_is_an_earlier_stage(reference):
    done = set()
    for stage in plan(rounds=3, reference=reference):
        assert set(stage.inputs.values()) <= done, stage.key
        done.add(stage.key)


def test_plan_round_starts_from_the_policy_that_the_round_before_trained():
    stages = by_key(plan(rounds=3, reference="initial"))
    for round_, start in [(0, "policy"), (1, "round_00/train"), (2, "round_01/train")]:
        assert stages[f"round_{round_:02d}/generate"].inputs["policy"] == start
        assert stages[f"round_{round_:02d}/train"].inputs["policy"] == start
        assert stages[f"round_{round_:02d}/evaluate"].inputs["start"] == start


@pytest.mark.parametrize(
    ("reference", "held_by"),
    [
        ("initial", ["policy", "policy"]),
        ("previous", ["policy", "round_00/train"]),
        ("/models/anchor", ["reference_policy", "reference_policy"]),
    ],
)
def test_plan_reference_is_held_by_what_the_config_says(reference, held_by):
    stages = by_key(plan(rounds=2, reference=reference))
    assert [stages[f"round_{r:02d}/reference"].inputs["reference"] for r in (0, 1)] == held_by
    assert [stages[f"round_{r:02d}/evaluate"].inputs["reference"] for r in (0, 1)] == held_by


def test_plan_evaluate_compares_with_the_initial_policy_from_the_second_round_on():
    stages = by_key(plan(rounds=2, reference="previous"))
    assert "initial" not in stages["round_00/evaluate"].inputs
    assert stages["round_01/evaluate"].inputs["initial"] == "policy"


def test_plan_more_rounds_change_no_earlier_stage():
    """`--rounds 3` extends a finished run of one."""
    one, three = by_key(plan(rounds=1, reference="initial")), by_key(plan(rounds=3, reference="initial"))
    assert {k: (s.config, s.inputs, s.version) for k, s in one.items()} == {
        k: (three[k].config, three[k].inputs, three[k].version) for k in one
    }


def test_plan_of_losses_without_a_reference_skips_its_stage():
    stages = plan(train=minimal()["train"] | {"loss": "simpo"})
    assert "reference" not in [s.name for s in stages]
    assert by_key(stages)["round_00/train"].inputs["pairs"] == "round_00/pair"
    mixed = plan(train=minimal()["train"] | {"loss": ["simpo", "sigmoid"]})
    assert by_key(mixed)["round_00/train"].inputs["pairs"] == "round_00/reference"


def test_plan_on_preferences_enters_at_pair():
    stages = preference_plan(rounds=2, reference="initial", pairs_per_round=4)
    of_round = ["pair", "reference", "train", "evaluate"]
    assert [s.key for s in stages] == [
        "policy", "preferences", *[f"round_{r:02d}/{name}" for r in (0, 1) for name in of_round]
    ]  # fmt: skip
    done = set()
    for stage in stages:
        assert set(stage.inputs.values()) <= done, stage.key
        done.add(stage.key)
    assert not any(stage.engine for stage in stages), "nothing is sampled"


@pytest.mark.parametrize(
    ("block", "changed"),
    [
        ({"max_tokens": 99}, ["pair", "evaluate"]),
        ({"label_source": "judge"}, ["pair", "evaluate"]),
        ({"eval_pairs": 9}, ["preferences"]),
        ({"system_prompt": "Be brief."}, ["preferences"]),
        ({"max_dropped": 0.5, "resources": {"rows_per_part": 8}}, []),
    ],
)
def test_plan_on_preferences_what_decides_a_result_changes_the_stages_that_it_decides(block, changed):
    given = minimal_preferences()["preferences"]
    before, after = preference_plan(), preference_plan(preferences=given | block)
    assert [b.name for b, a in zip(before, after, strict=True) if b.config != a.config] == changed


def changed_stages(**fields):
    """Names of the stages whose config differs from that of the plain plan."""
    before, after = plan(), plan(**fields)
    return [b.name for b, a in zip(before, after, strict=True) if b.config != a.config]


@pytest.mark.parametrize(
    "fields",
    [
        {"root": "/elsewhere"},
        {"name": "other"},
        {"generate": {"resources": {"actors": 4, "cpus": 2, "rows_per_part": 8, "parts_in_flight": 1}}},
        {"generate": {"engine_args": {"gpu_memory_utilization": 0.5, "max_num_seqs": 8}}},
        {"generate": {"max_dropped": 0.5}},
        {"score": minimal()["score"] | {"resources": {"cpus": 0.5}, "max_dropped": 0.5}},
        {"pair": {"resources": {"cpus": 0.5}}},
        {"reference": {"max_batch_tokens": 64, "resources": {"actors": [1, 2]}}},
        {"train": minimal()["train"] | {"max_batch_tokens": 64, "checkpoint_steps": 7, "resources": {"workers": 2}}},
        {"evaluate": {"resources": {"cpus": 0.5}}},
        {"prompts": minimal()["prompts"] | {"resources": {"rows_per_part": 8}, "max_dropped": 0.5}},
    ],
)
def test_plan_resources_and_place_change_no_stage(fields):
    assert changed_stages(**fields) == []


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"train": minimal()["train"] | {"beta": 0.2}}, ["train", "evaluate"]),
        ({"train": minimal()["train"] | {"learning_rate": 1e-4}}, ["train"]),
        ({"train": minimal()["train"] | {"dtype": "float32"}}, ["reference", "train", "evaluate"]),
        (REUSE, ["generate", "reference"]),
        ({"generate": {"num_completions": 3}}, ["generate"]),
        ({"generate": {"sampling": {"temperature": 0.5}}}, ["generate", "evaluate"]),
        ({"generate": {"chat_template_kwargs": {"a": 1}}}, ["generate", "evaluate"]),
        ({"generate": {"engine_args": {"quantization": "fp8"}}}, ["generate"]),
        ({"score": minimal()["score"] | {"reasoning_end": "</think>"}}, ["score", "evaluate"]),
        ({"pair": {"min_gap": 0.5}}, ["pair", "evaluate"]),
        ({"evaluate": {"best_of": 4}}, ["evaluate"]),
        ({"prompts_per_round": 9}, ["generate"]),
        ({"prompts": minimal()["prompts"] | {"eval_prompts": 9}}, ["prompts"]),
        ({"seed": 1}, ["prompts", "generate", "pair", "train", "evaluate"]),
        ({"policy": "other/policy"}, ["policy"]),
    ],
)
def test_plan_what_decides_a_result_changes_the_stages_that_it_decides(fields, changed):
    assert changed_stages(**fields) == changed


def test_plan_beta_decides_what_the_probe_of_sampler_values_allows():
    before, after = plan(**REUSE), plan(**REUSE, train=minimal()["train"] | {"beta": 0.2})
    changed = [b.name for b, a in zip(before, after, strict=True) if b.config != a.config]
    assert changed == ["reference", "train", "evaluate"]


@pytest.mark.parametrize(
    ("until", "last"),
    [(None, "round_01/evaluate"), ("pair", "round_00/pair"), ("round_01/pair", "round_01/pair"), ("prompts", "prompts")],
)
def test_cut_keeps_the_plan_up_to_and_with_the_stage(until, last):
    stages = plan(rounds=2, reference="initial")
    kept = full_round.cut(stages, until, [])
    assert kept == stages[: len(kept)]
    assert kept[-1].key == last


@pytest.mark.parametrize(("until", "redo"), [("pears", []), (None, ["pears"]), ("pair", ["train", "round_07/train"])])
def test_cut_unknown_stage_is_a_config_error_that_lists_the_stages(until, redo):
    with pytest.raises(ConfigError, match=r"no stage '(pears|round_07/train)'.*round_00/pair"):
        full_round.cut(plan(), until, redo)


@pytest.mark.parametrize(
    ("committed", "rounds"),
    [
        ([], 1),
        (["round_00/generate", "round_00/train"], 1),
        (["round_00/evaluate"], 2),
        (["round_00/evaluate", "round_01/evaluate", "round_02/train"], 3),
    ],
)
def test_full_round_next_round_goes_on_with_a_half_done_round_and_else_adds_one(tmp_path, monkeypatch, committed, rounds):
    tree = minimal() | {"root": str(tmp_path), "reference": "initial"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    for key in committed:
        commit(tmp_path / tree["name"] / key, [])
    asked = []
    monkeypatch.setattr(full_round, "run", lambda dry_run, until, redo, config: asked.append(config.rounds))
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(tmp_path / "run.yaml"), "--next-round"])
    assert full_round.main() == 0
    assert asked == [rounds]


def test_full_round_next_round_needs_a_reference_from_the_second_on(tmp_path):
    tree = minimal() | {"root": str(tmp_path)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    commit(tmp_path / tree["name"] / "round_00/evaluate", [])
    done = run_script(str(tmp_path / "run.yaml"), "--next-round")
    assert done.returncode == 1
    assert "rounds=2 needs `reference: initial" in done.stderr


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd="/", capture_output=True, text=True, timeout=60)


def test_full_round_help_loads_no_torch_ray_or_vllm():
    code = (
        "import json, runpy, sys\n"
        f"sys.argv = ['full_round.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(json.dumps([end.code, sorted(sys.modules)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    *text, last = done.stdout.splitlines()
    status, loaded = json.loads(last)
    assert status == 0
    assert set(loaded) & {"torch", "ray", "vllm", "transformers"} == set()
    assert any(line.split()[:1] == ["--train.beta"] for line in text)


@pytest.mark.parametrize(
    "arguments", [["--train.bta", "1"], ["--train.beta", "-1"], ["--root", "relative"], ["--rounds", "2"], ["--train.beta"]]
)
def test_full_round_bad_config_exits_1_with_one_message(tmp_path, arguments):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(minimal()))
    done = run_script(str(tmp_path / "run.yaml"), *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().startswith("ConfigError: ")
    assert "Traceback" not in done.stderr


def test_full_round_missing_file_exits_1_with_one_message():
    done = run_script("/nowhere/run.yaml")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[0].startswith("ConfigError: no configuration at /nowhere/run.yaml")
