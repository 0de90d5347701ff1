import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_ray.errors import ConfigError
from dpo_ray.learn import attention, probe
from dpo_ray.learn.batched import score_groups
from dpo_ray.learn.layout import Group
from dpo_ray.learn.logps import Path
from dpo_ray.learn.policy import load_policy
from dpo_ray.learn.probe import choose_path, path_for

from . import tiny

ROW = Group(list(range(3, 12)), [list(range(20, 32)), list(range(40, 54))])
LONG = Group(list(range(3, 43)), [list(range(20, 32)), list(range(40, 54))])
SAME = probe._same
OTHERS = tiny.pair_groups(tiny.build_pairs(5, seed=2))
ARCHITECTURES = sorted(tiny.configs() | tiny.more_configs())


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")
    return {name: tiny.save_policy(root / name, name) for name in ARCHITECTURES}


def exact(model, groups):
    return torch.tensor([tiny.naive_logps(model, g.prompt, c) for g in groups for c in g.completions])


def scores(model, groups, path, max_batch_tokens=10**6):
    scored = score_groups(model, groups, path, max_batch_tokens=max_batch_tokens, pad_token_id=tiny.PAD)
    return torch.tensor([completion.logps for group in scored for completion in group])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("row", [ROW, Group(ROW.prompt, ROW.completions[:1])], ids=["two", "one"])
def test_path_is_exact_for_every_architecture(directories, name, row):
    """Against one unpadded float64-softmax forward a sequence, tried on a row of two completions or of one. Largest relative
    error measured: 1e-6."""
    model = load_policy(directories[name], dtype=torch.float32)
    wanted = exact(model, [ROW, *OTHERS])
    path = choose_path(model, row, pad_token_id=tiny.PAD)
    assert path == Path(share_prompt=name not in tiny.NOT_SHARED, tiled_head=name != "llama4")
    torch.testing.assert_close(scores(model, [ROW, *OTHERS], path), wanted, rtol=1e-5, atol=1e-5)


def test_path_for_longer_rows_is_tried_again():
    """A chunk that stands in the mask alone is not seen in rows within it."""
    model, known, groups = tiny.build_model("llama4"), None, [ROW, LONG]
    wanted = [exact(model, [group]) for group in groups]
    shared = []
    for group, own in zip(groups, wanted, strict=True):
        known = path_for(model, [group], known, pad_token_id=tiny.PAD)
        shared.append(known.path.share_prompt)
        torch.testing.assert_close(scores(model, [group], known.path), own, rtol=1e-5, atol=1e-5)
    assert shared == [True, False]
    assert path_for(model, [ROW], known, pad_token_id=tiny.PAD) is known


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_path_of_half_precision_is_tried_in_float32_and_leaves_the_weights_as_they_were(monkeypatch, name):
    model = tiny.build_model(name).to(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tried = []
    monkeypatch.setattr(probe, "_same", lambda error, model: tried.append(model.dtype) or SAME(error, model))
    assert choose_path(model, ROW, pad_token_id=tiny.PAD).share_prompt == (name not in tiny.NOT_SHARED)
    assert set(tried) == {torch.float32}
    after = model.state_dict()
    assert all(after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_path_of_a_model_whose_values_depend_on_the_batch_is_refused(rope_type):
    """Factors for long sequences apply to all rows of a batch as soon as one is long: no value belongs to its pair alone."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4} if rope_type == "longrope" else {}
    config = LlamaConfig(**tiny.DECODER | {"max_position_embeddings": 16}, rope_parameters=rope)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with pytest.raises(ConfigError, match=f"depend on the other rows of its batch.*rope_type '{rope_type}'.*within 16 tokens"):
        choose_path(model, ROW, pad_token_id=tiny.PAD)
    within = Group(ROW.prompt[:4], [c[:8] for c in ROW.completions])
    assert choose_path(model, within, pad_token_id=tiny.PAD).share_prompt


@pytest.mark.parametrize("kept", ["ignored", "unknown"])
def test_path_of_a_model_that_keeps_all_logits_is_exact(kept):
    """Some of a hub's own models take `logits_to_keep` and do nothing with it, or do not know it."""
    model = tiny.build_model("llama")
    wanted, own = exact(model, [ROW]), model.forward

    def ignoring(input_ids, position_ids=None, attention_mask=None, use_cache=None, logits_to_keep=0):
        return own(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=use_cache)

    def unaware(input_ids, position_ids=None, attention_mask=None, use_cache=None):
        return ignoring(input_ids, position_ids, attention_mask, use_cache)

    model.forward = ignoring if kept == "ignored" else unaware
    path = choose_path(model, ROW, pad_token_id=tiny.PAD)._replace(tiled_head=False)
    torch.testing.assert_close(scores(model, [ROW], path), wanted, rtol=1e-5, atol=1e-5)


def test_path_never_shared_keeps_the_models_own_attention():
    model = tiny.build_model("llama")
    assert choose_path(model, ROW, pad_token_id=tiny.PAD, share_prompt="never") == Path(False, True)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["bloom", "qwen3_next"])
def test_path_forced_where_sharing_is_not_exact_is_an_error(name):
    with pytest.raises(ConfigError, match="other log-probabilities for a shared prompt"):
        choose_path(tiny.build_model(name), ROW, pad_token_id=tiny.PAD, share_prompt="always")


def test_path_of_a_model_whose_attention_differs_is_not_shared(monkeypatch):
    """The probe measures, whatever the reason: here the shared attention looks one token too far."""
    monkeypatch.setattr(attention, "MAX_DENSE", 10**6)
    monkeypatch.setattr(attention, "_small_bias", lambda *how: attention._bias(*how).tril(1).fill_diagonal_(0.0) * 0.0)
    model = tiny.build_model("llama")
    assert not choose_path(model, ROW, pad_token_id=tiny.PAD).share_prompt
    assert model.config._attn_implementation == "sdpa"


def test_path_of_logits_that_are_changed_behind_the_head_uses_the_models_own():
    model = tiny.build_model("llama")
    model.register_forward_hook(lambda _, __, output: output.__setitem__("logits", output.logits * 2))
    assert not choose_path(model, ROW, pad_token_id=tiny.PAD).tiled_head
