import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dpo_ray.quickstart import policy

MESSAGES = [{"role": "user", "content": "How was the film The Silent Harbour?"}]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quickstart") / "policy"
    policy.build_policy(directory, seed=0, num_steps=3)
    return directory


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_policy_key_depends_on_the_seed_and_the_steps():
    assert policy.policy_key(0) == policy.policy_key(0)
    assert policy.policy_key(0) != policy.policy_key(1)
    assert policy.policy_key(0) != policy.policy_key(0, num_steps=0)


def test_build_policy_same_seed_gives_identical_files_whatever_torch_is_set_to(built: Path):
    again, before = built.parent / "again", torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        policy.build_policy(again, seed=0, num_steps=3)
    finally:
        torch.set_num_threads(before)
    assert digests(again) == digests(built)


def test_build_policy_without_steps_is_the_untaught_model(built: Path):
    base = built.parent / "base"
    policy.build_policy(base, seed=0, num_steps=0)
    want, got = digests(built), digests(base)
    assert want.pop("model.safetensors") != got.pop("model.safetensors")
    assert got == want  # and everything beside the weights is equal


def test_build_policy_other_seed_gives_other_weights(built: Path):
    other = built.parent / "other"
    policy.build_policy(other, seed=1, num_steps=1)
    assert digests(other)["model.safetensors"] != digests(built)["model.safetensors"]


def test_build_policy_reports_progress_and_restores_torch(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    lines: list[str] = []
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state()
    policy.build_policy(tmp_path / "policy", seed=0, num_steps=1, progress=lines.append)
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert "step 1 of 1" in lines[-1]
    assert capfd.readouterr() == ("", "")


def test_build_policy_failure_leaves_nothing(tmp_path: Path):
    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        policy.build_policy(tmp_path / "policy", seed=0, num_steps=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_built_policy_loads_in_transformers_with_its_end_token(built: Path):
    model = AutoModelForCausalLM.from_pretrained(built)
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert 1e6 < model.num_parameters() < 5e6
    assert model.dtype == torch.float32
    assert GenerationConfig.from_pretrained(built).eos_token_id == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = torch.tensor([tokenizer.encode("Hello")])
    assert torch.isfinite(model(ids).logits).all()


def test_built_tokenizer_round_trips_any_text(built: Path):
    tokenizer = AutoTokenizer.from_pretrained(built)
    for text in ("The plot was never dull.", "  two  spaces\n\ttab", "Grüße, 世界 🙂", "don't , stop ."):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_built_chat_template_prompt_is_a_prefix_of_the_whole(built: Path):
    tokenizer = AutoTokenizer.from_pretrained(built)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    answered = [*MESSAGES, {"role": "assistant", "content": "It was good."}]
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    assert prompt == "<|im_start|>user\nHow was the film The Silent Harbour?<|im_end|>\n<|im_start|>assistant\n"
    assert whole == f"{prompt}It was good.<|im_end|>\n"
    prompt_ids, whole_ids = tokenizer.encode(prompt), tokenizer.encode(whole)
    assert whole_ids[: len(prompt_ids)] == prompt_ids
    assert whole_ids.count(tokenizer.eos_token_id) == 2
