import shutil
import uuid

import pytest

from dpo_ray.engines import policies
from dpo_ray.engines.policies import PolicyRef, local_path, model_identity, policy_ref
from dpo_ray.errors import ConfigError
from dpo_ray.flow import storage

from ..artifacts import commit, commit_policy


def test_policy_ref_of_a_resolved_policy_is_where_it_lies(tmp_path):
    artifact = commit_policy(tmp_path, "/models/start", "abc")
    assert policy_ref(artifact, trust_remote_code=True) == PolicyRef("/models/start", "abc", None, True)


def test_policy_ref_of_a_hub_policy_has_its_commit(tmp_path):
    artifact = commit(tmp_path, [], {"path": "some/model", "identity": "c0ffee", "revision": "c0ffee"})
    assert policy_ref(artifact, trust_remote_code=False) == PolicyRef("some/model", "c0ffee", "c0ffee", False)


def test_policy_ref_of_a_trained_policy_lies_in_its_stage(tmp_path):
    artifact = commit(tmp_path, [], {"identity": "abc"})
    assert policy_ref(artifact, trust_remote_code=False) == PolicyRef(f"{tmp_path}/policy", "abc")


@pytest.mark.parametrize("path", ["/models/start", "some/model"])
def test_local_path_of_a_directory_or_hub_id_is_itself(path):
    assert local_path(PolicyRef(path, "abc")) == path


def test_local_path_of_a_uri_is_fetched_once_and_keyed_by_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "CACHE", tmp_path / "cache")
    uri = f"memory://{uuid.uuid4().hex}/policy"
    for name in ("config.json", "sub/model.safetensors"):
        storage.write_bytes(f"{uri}/{name}", name.encode())
    path = local_path(PolicyRef(uri, "abc"))
    assert storage.list_files(path, recursive=True) == ["config.json", "sub/model.safetensors"]
    storage.delete_directory(uri)
    assert local_path(PolicyRef(uri, "abc")) == path  # from the cache: the source is gone
    assert local_path(PolicyRef(f"{uri}-elsewhere", "abc")) == path  # the same contents under another name
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["abc"]
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_model_identity_of_a_directory_is_that_of_its_contents(policy, tmp_path):
    shutil.copytree(policy.path, tmp_path / "moved")
    assert model_identity(str(tmp_path / "moved"), None) == model_identity(policy.path, None) == policy.identity
    config = tmp_path / "moved/config.json"
    config.write_text(config.read_text() + " ")
    assert model_identity(str(tmp_path / "moved"), None) != policy.identity


def test_model_identity_of_neither_directory_nor_hub_name_is_a_config_error():
    with pytest.raises(ConfigError, match="no/such/directory"):
        model_identity("no/such/directory", None)
