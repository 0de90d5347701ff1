import os
import shutil

import pytest

from dpo_ray.config import RunConfig
from dpo_ray.errors import ConfigError
from dpo_ray.stages import policy as policy_stage

from ..artifacts import context
from ..test_config import minimal


def stage_of(path, revision=None, **fields):
    config = RunConfig.model_validate(minimal() | {"policy": str(path)} | fields)
    return policy_stage.stage(config, str(path), revision)


def test_policy_of_a_local_directory_is_named_by_its_contents(policy, tmp_path):
    stage = stage_of(policy.path)
    output = stage.run(context(tmp_path))
    assert output.metrics == {"identity": policy.identity, "path": policy.path, "revision": None}
    assert stage.external() == {"policy": policy.identity}
    assert list(tmp_path.iterdir()) == []  # nothing is copied


def test_policy_given_relative_to_home_or_here_is_resolved_to_an_absolute_path(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", os.path.dirname(policy.path))
    monkeypatch.chdir(os.path.dirname(policy.path))
    for given in (f"~/{os.path.basename(policy.path)}", os.path.basename(policy.path)):
        assert stage_of(given).run(context(tmp_path)).metrics["path"] == policy.path


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_policy_directory_that_is_not_complete_is_a_config_error_that_names_the_file(policy, tmp_path, missing):
    shutil.copytree(policy.path, tmp_path / "policy")
    (tmp_path / "policy" / missing).unlink()
    with pytest.raises(ConfigError, match=str(tmp_path)):
        stage_of(tmp_path / "policy").external()


def test_policy_changed_in_place_is_another(policy, tmp_path):
    shutil.copytree(policy.path, tmp_path / "policy")
    stage = stage_of(tmp_path / "policy")
    before = stage.external()
    template = tmp_path / "policy/chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert stage.external() != before


def test_policy_directory_with_a_revision_is_refused_not_ignored(policy):
    with pytest.raises(ConfigError, match=r"'v1\.0' would be ignored"):
        stage_of(policy.path, revision="v1.0").external()


def test_policy_that_is_no_directory_and_no_hub_name_is_a_config_error():
    with pytest.raises(ConfigError, match="/no/such/policy"):
        stage_of("/no/such/policy").external()


def test_policy_quickstart_seed_decides_and_that_of_others_does_not():
    def configs(name):
        return [stage_of(name, seed=seed).config for seed in (0, 1)]

    quickstart, other = configs("quickstart"), configs("/models/start")
    assert quickstart[0] != quickstart[1]
    assert other[0] == other[1]
