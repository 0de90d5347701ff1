import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from dpo_ray.errors import ConfigError
from dpo_ray.learn.policy import load_policy, shard

from . import tiny, training

IDS_ST = torch.arange(3, 23).view(2, 10)


@pytest.fixture(scope="module")
def mesh_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])  # dropout as modules, and as a number read by attention
def test_load_policy_has_no_dropout_even_in_train_mode(policies, name):
    model = load_policy(policies[name], dtype=torch.float32)
    assert not model.training
    model.train()
    assert torch.equal(model(input_ids=IDS_ST).logits, model(input_ids=IDS_ST).logits)


def test_load_policy_without_zeroed_dropout_would_differ():
    """The test above can fail: the same model straight from its config is random in train mode."""
    model = tiny.build_model("gpt2").train()
    assert not torch.equal(model(input_ids=IDS_ST).logits, model(input_ids=IDS_ST).logits)


def test_load_policy_casts_to_the_dtype_asked_for(policies):
    assert {p.dtype for p in load_policy(policies["qwen2"], dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_load_policy_with_missing_weights_is_a_config_error(tmp_path):
    tiny.save_policy(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights.*model\.norm\.weight"):
        load_policy(str(tmp_path), dtype=torch.float32)


def test_load_policy_refuses_pickled_weights(tmp_path):
    tiny.save_policy(tmp_path, "llama")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_policy(str(tmp_path), dtype=torch.float32)


def test_load_policy_with_soft_capped_attention_applies_it(policies):
    """Gemma 2 under sdpa silently loses the cap: here the logits differ by more than 0.01."""
    model = load_policy(policies["gemma2"], dtype=torch.float32)
    capped = model(input_ids=IDS_ST).logits
    model.set_attn_implementation("sdpa")
    assert (model(input_ids=IDS_ST).logits - capped).abs().max() > 0.01


@pytest.mark.parametrize("name", sorted(tiny.configs()))
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_shard_on_one_rank_gives_the_gradients_of_the_plain_model(policies, mesh_of_one, name, activation_checkpointing):
    pairs = tiny.build_pairs(5)
    plan = training.plan(pairs, 1, 60, batch_size=5)
    (want,) = training.gradients(training.build(policies[name], None), pairs, plan)
    model = training.build(policies[name], mesh_of_one, activation_checkpointing=activation_checkpointing)
    (got,) = training.gradients(model, pairs, plan)
    assert training.relative_error(got, want) < 1e-6


def test_shard_keeps_float32_weights_and_computes_in_bfloat16(policies, mesh_of_one):
    model = training.build(policies["qwen2"], mesh_of_one, compute_dtype=torch.bfloat16)
    logits = model(input_ids=IDS_ST).logits
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_shard_of_a_model_without_decoder_layers_is_a_config_error(mesh_of_one):
    model = tiny.build_model("qwen2")
    model.model.layers = nn.ModuleList()
    with pytest.raises(ConfigError, match="no list of decoder layers"):
        shard(model, mesh_of_one, compute_dtype=torch.float32)


def share(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def scalar(model):
    model.model.layers[1].scale = nn.Parameter(torch.tensor(1.0))


def quantized(model):
    weight = torch.zeros(4, 4, dtype=torch.int8)
    model.model.layers[1].packed = nn.Parameter(weight, requires_grad=False)


def tied_to_a_layer(model):
    model.lm_head.bias = model.model.layers[0].self_attn.q_proj.bias


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (share, r"model\.layers\.0\.mlp\.gate_proj\.weight is shared between layers"),
        (tied_to_a_layer, r"bias is shared between layers"),
        (scalar, r"model\.layers\.1\.scale has shape \(\) of torch\.float32"),
        (quantized, r"model\.layers\.1\.packed has shape \(4, 4\) of torch\.int8"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_shard_of_a_model_that_fsdp2_cannot_wrap_names_the_weight(mesh_of_one, broken, message):
    model = tiny.build_model("qwen2")
    broken(model)
    with pytest.raises(ConfigError, match=message):
        shard(model, mesh_of_one, compute_dtype=torch.float32)
