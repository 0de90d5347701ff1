import pytest
import torch
import torch.distributed as dist

from dpo_ray.learn import attention, probe
from dpo_ray.learn.compute_dtype import compute_dtype_of, sharded_in_float32
from dpo_ray.learn.policy import load_policy

from . import tiny, training

IDS_ST = torch.arange(3, 23).view(2, 10)
PAIRS = tiny.build_pairs(5)


@pytest.fixture(scope="module")
def mesh_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS_ST).logits


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_sharded_model_computes_in_float32_for_a_while(policies, mesh_of_one, used):
    def build():
        return training.build(policies["qwen2"], mesh_of_one, compute_dtype=torch.bfloat16)

    plan = training.plan(PAIRS, 1, 60, batch_size=5)
    exact, (want,) = logits(training.build(policies["qwen2"], None)), training.gradients(build(), PAIRS, plan)
    half, model = logits(build()), build()
    if used:
        assert torch.equal(logits(model), half)
    with sharded_in_float32(model):
        assert compute_dtype_of(model) == torch.float32
        assert torch.equal(logits(model), exact)
    assert compute_dtype_of(model) == torch.bfloat16
    (got,) = training.gradients(model, PAIRS, plan)
    assert torch.equal(got, want)
    assert torch.equal(logits(model), half)


def test_optimizer_made_after_a_forward_trains_every_weight(policies, mesh_of_one):
    """Without gradients a forward leaves the weights of the root gathered: embeddings, norm and head."""
    model = training.build(policies["qwen2"], mesh_of_one)
    logits(model)
    optimizer = training.build_adamw(model)
    before = [p.to_local().clone() for p in model.parameters()]
    training.train(model, optimizer, PAIRS, training.plan(PAIRS, 1, 60, batch_size=5))
    assert all(not torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))


def test_probe_of_a_sharded_bfloat16_model_tries_it_in_float32(policies, mesh_of_one, monkeypatch):
    tried, same = [], probe._same
    monkeypatch.setattr(probe, "_same", lambda error, model: tried.append(compute_dtype_of(model)) or same(error, model))
    model = training.build(policies["llama"], mesh_of_one, compute_dtype=torch.bfloat16)
    path = probe.choose_path(model, tiny.pair_groups(PAIRS)[0], pad_token_id=tiny.PAD)
    assert path == probe.Path(share_prompt=True, tiled_head=True)
    assert set(tried) == {torch.float32}
    assert model.config._attn_implementation == attention.NAME
    whole = load_policy(policies["llama"], dtype=torch.bfloat16)
    whole.set_attn_implementation(attention.NAME)
    assert torch.equal(logits(model), logits(whole))
