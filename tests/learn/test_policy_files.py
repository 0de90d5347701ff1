import json
import shutil
from pathlib import Path

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.learn.policy_files import check_policy_directory, file_hashes, identity_of, policy_identity


@pytest.fixture
def policy(policies, tmp_path) -> Path:
    return Path(shutil.copytree(policies["qwen2"], tmp_path / "policy"))


def test_check_policy_directory_accepts_what_transformers_saves(policy):
    check_policy_directory(policy)


def test_check_policy_directory_accepts_a_template_inside_the_tokenizer_config(policy):
    tokenizer_config = json.loads((policy / "tokenizer_config.json").read_text())
    tokenizer_config["chat_template"] = (policy / "chat_template.jinja").read_text()
    (policy / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (policy / "chat_template.jinja").unlink()
    check_policy_directory(policy)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"no config\.json.*save_pretrained"),
        ("model.safetensors", r"no weights.*\.safetensors"),
        ("tokenizer.json", r"no tokenizer.*save_pretrained"),
        ("chat_template.jinja", r"no chat template.*chat_template\.jinja"),
    ],
)
def test_check_policy_directory_names_the_missing_file(policy, missing, message):
    (policy / missing).unlink()
    with pytest.raises(ConfigError, match=message):
        check_policy_directory(policy)


def test_check_policy_directory_of_an_adapter_alone_says_to_merge_it(policy):
    (policy / "config.json").rename(policy / "adapter_config.json")
    with pytest.raises(ConfigError, match=r"is a PEFT adapter.*merge_and_unload"):
        check_policy_directory(policy)


def test_check_policy_directory_refuses_pickled_weights(policy):
    (policy / "model.safetensors").rename(policy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickled weights \(pytorch_model\.bin\)"):
        check_policy_directory(policy)


def test_check_policy_directory_names_a_missing_shard(policy):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (policy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="lacks model-00002-of-00002"):
        check_policy_directory(policy)


def test_check_policy_directory_that_does_not_exist():
    with pytest.raises(ConfigError, match="does not exist"):
        check_policy_directory("/no/such/policy")


def test_policy_identity_is_the_same_for_a_copy_written_in_another_order(policy, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in sorted(policy.iterdir(), reverse=True):
        shutil.copy(file, copy)
    (copy / "README.md").write_text("not part of a policy")
    assert policy_identity(copy) == policy_identity(policy)


def test_policy_identity_is_that_of_files_hashed_by_different_ranks(policy):
    names = sorted(path.name for path in policy.iterdir())
    parts = [file_hashes(policy, names[rank::2]) for rank in range(2)]
    assert identity_of(parts[1] | parts[0]) == policy_identity(policy)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_policy_identity_changes_with_every_file_that_matters(policy, file):
    before = policy_identity(policy)
    with open(policy / file, "ab") as changed:
        changed.write(b" ")
    assert policy_identity(policy) != before


def test_policy_identity_changes_when_two_files_swap_contents(policy):
    before = policy_identity(policy)
    (policy / "config.json").rename(policy / "other")
    (policy / "generation_config.json").rename(policy / "config.json")
    (policy / "other").rename(policy / "generation_config.json")
    assert policy_identity(policy) != before
