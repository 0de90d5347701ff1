import pytest
import torch

from dpo_ray.errors import ConfigError
from dpo_ray.learn import attention
from dpo_ray.learn.batched import lay_out
from dpo_ray.learn.layout import Group
from dpo_ray.learn.logps import Path, completion_logps
from dpo_ray.learn.policy import load_policy
from dpo_ray.learn.probe import choose_path

from . import tiny

ROW = Group(list(range(3, 12)), [list(range(20, 32)), list(range(40, 54))])
OTHERS = tiny.pair_groups(tiny.build_pairs(5, seed=2))
ARCHITECTURES = sorted(tiny.configs() | tiny.more_configs())


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")
    return {name: tiny.save_policy(root / name, name) for name in ARCHITECTURES}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_path_is_exact_for_every_architecture(directories, name):
    """Against one unpadded float64-softmax forward a sequence. Largest relative error measured: 1e-6."""
    model = load_policy(directories[name], dtype=torch.float32)
    wanted = torch.tensor([tiny.naive_logps(model, g.prompt, c) for g in [ROW, *OTHERS] for c in g.completions])
    path = choose_path(model, ROW, pad_token_id=tiny.PAD)
    assert path == Path(share_prompt=name not in tiny.NOT_SHARED, tiled_head=True)
    with torch.no_grad():
        got = completion_logps(model, lay_out([ROW, *OTHERS], path, tiny.PAD), path)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


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
