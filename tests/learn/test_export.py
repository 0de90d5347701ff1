import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_ray.learn.export import export_policy
from dpo_ray.learn.policy import load_policy
from dpo_ray.learn.policy_files import check_policy_directory, policy_identity

from . import tiny

COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture
def source(tmp_path) -> Path:
    """A tied policy stored in bfloat16, with a generation config that save_pretrained would refuse."""
    tiny.save_policy(tmp_path / "source", "qwen2", dtype=torch.bfloat16)
    (tmp_path / "source" / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7}')
    return tmp_path / "source"


def test_export_policy_writes_the_source_dtype_and_copies_its_files(source, tmp_path):
    out = tmp_path / "out"
    model = load_policy(str(source), dtype=torch.float32)
    export_policy(model, out, source=str(source))
    check_policy_directory(out)
    for name in COPIED:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    got, want = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert got.keys() == want.keys()
    assert "lm_head.weight" not in got
    assert all(torch.equal(got[name], want[name]) and got[name].dtype == torch.bfloat16 for name in got)
    assert model.config.dtype == torch.float32  # the model itself is left as it was


def test_export_policy_of_another_dtype_says_so_in_the_config(source, tmp_path):
    export_policy(load_policy(str(source), dtype=torch.float32), tmp_path / "out", source=str(source), dtype=torch.float32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("name", sorted(tiny.configs() | tiny.more_configs()))
def test_export_policy_stores_weights_as_transformers_does(tmp_path, name):
    """By the same names, fused experts taken apart, in one file with the same bytes or in several."""
    source = tiny.save_policy(tmp_path / "source", name)
    model = load_policy(source, dtype=torch.float32)
    assert "model.safetensors" in export_policy(model, tmp_path / "one", source=source)
    weights = (tmp_path / "source/model.safetensors").read_bytes()
    assert (tmp_path / "one/model.safetensors").read_bytes() == weights

    written = export_policy(model, tmp_path / "several", source=source, max_file_bytes=8000)
    check_policy_directory(tmp_path / "several")
    files = {path.name: load_file(path) for path in (tmp_path / "several").glob("*.safetensors")}
    assert len(files) > 1
    assert {*files, "model.safetensors.index.json", "config.json", "tokenizer.json"} <= set(written)
    index = json.loads((tmp_path / "several/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {weight: file for file, own in files.items() for weight in own}
    want = load_file(tmp_path / "source/model.safetensors")
    got = {weight: value for own in files.values() for weight, value in own.items()}
    assert got.keys() == want.keys()
    assert all(torch.equal(got[weight], want[weight]) for weight in want)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in want.values())


def test_export_policy_over_an_earlier_one_leaves_no_weights_of_it(source, tmp_path):
    model = load_policy(str(source), dtype=torch.float32)
    export_policy(model, tmp_path / "out", source=str(source), max_file_bytes=8000)
    export_policy(model, tmp_path / "out", source=str(source))
    assert {path.name for path in (tmp_path / "out").glob("model*")} == {"model.safetensors"}


@pytest.mark.parametrize("name", sorted(tiny.configs()))
def test_export_policy_reloads_to_the_same_logits(policies, tmp_path, name):
    ids_ST = torch.arange(3, 23).view(2, 10)
    model = load_policy(policies[name], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    export_policy(model, tmp_path, source=policies[name])
    assert policy_identity(tmp_path) != policy_identity(policies[name])
    assert torch.equal(load_policy(str(tmp_path), dtype=torch.float32)(input_ids=ids_ST).logits, model(input_ids=ids_ST).logits)


def test_export_policy_without_a_generation_config_writes_none(source, tmp_path):
    (source / "generation_config.json").unlink()
    export_policy(load_policy(str(source), dtype=torch.float32), tmp_path / "out", source=str(source))
    assert not (tmp_path / "out" / "generation_config.json").exists()
