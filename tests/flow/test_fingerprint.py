import hashlib
import math
from pathlib import Path

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.flow.fingerprint import canonical_json, differing_fields, fingerprint, hash_file


def test_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": {"c": [1, 2], "d": None}}) == fingerprint({"b": {"d": None, "c": (1, 2)}, "a": 1})


@pytest.mark.parametrize(
    "other", [{"a": 2}, {"a": 1.5}, {"a": "1"}, {"a": None}, {}, {"a": 1, "b": None}, {"b": 1}, {"a": [1]}]
)
def test_fingerprint_of_another_value_is_another(other):
    assert fingerprint(other) != fingerprint({"a": 1})


def test_fingerprint_is_the_sha256_of_canonical_json():
    """The literal is the contract: a committed stage must still match after an upgrade."""
    assert fingerprint({"b": "é", "a": [1, 0.5]}) == hashlib.sha256('{"a":[1,0.5],"b":"é"}'.encode()).hexdigest()


@pytest.mark.parametrize("value", [len, lambda: 1, object(), math.nan, math.inf, {1, 2}, b"x", Path("/a"), {(1, 2): 3}])
def test_fingerprint_of_a_value_without_stable_form_is_a_config_error(value):
    with pytest.raises(ConfigError, match="fingerprint"):
        fingerprint({"config": {"field": value}})


def test_canonical_json_has_one_form_for_equal_values():
    assert canonical_json({"b": (1,), "a": "é"}) == canonical_json({"a": "é", "b": [1]}) == '{"a":"é","b":[1]}'


def test_hash_file_is_that_of_the_contents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"same")
    assert hash_file(tmp_path / "a") == hash_file(str(tmp_path / "b")) == hashlib.sha256(b"same").hexdigest()


def test_differing_fields_names_each_leaf_with_both_values():
    old = {"config": {"beta": 0.1, "sampling": {"top_p": 1.0, "stop": ["a"]}, "same": 1}, "version": 1}
    new = {"config": {"beta": 0.2, "sampling": {"top_p": 1.0, "stop": ("b",)}, "same": 1, "more": 3}, "version": 1}
    assert differing_fields(old, new) == [
        "config.beta: 0.1 -> 0.2",
        "config.more: None -> 3",
        "config.sampling.stop: ['a'] -> ('b',)",
    ]


def test_differing_fields_of_equal_values_are_none():
    assert differing_fields({"a": {"b": [1]}}, {"a": {"b": (1,)}}) == []
