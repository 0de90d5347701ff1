import math

import pytest
import torch

from dpo_ray.engines.policies import PolicyRef
from dpo_ray.learn.losses import Term
from dpo_ray.learn.policy import load_policy
from dpo_ray.learn.tokens import load_tokenizer
from examples import own_loop

from ..learn import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [{"prompt": f"w{i} w{i + 1}", "chosen": f"w{i + 20} w{i + 21} w7", "rejected": f"w{i + 50}"} for i in range(10, 16)]


def tokens(policy: PolicyRef, pair: dict[str, str]) -> tuple[list[int], list[int], list[int]]:
    """Prompt, chosen and rejected by the template of the tiny tokenizer, word for word."""
    ids = load_tokenizer(policy.path).get_vocab()
    prompt = ["<bos>", "user", *pair["prompt"].split(), "assistant"]
    words = [prompt, [*pair["chosen"].split(), "<eos>"], [*pair["rejected"].split(), "<eos>"]]
    prompt, chosen, rejected = ([ids[word] for word in side] for side in words)
    return prompt, chosen, rejected


def test_own_loop_starts_at_ln_2_and_prefers_chosen_afterwards(policy, tmp_path):
    history = own_loop.train(policy.path, PAIRS, [Term("sigmoid")], str(tmp_path / "tuned"))
    assert len(history) == own_loop.EPOCHS * 2
    assert history[0] == pytest.approx(math.log(2), abs=1e-4)
    assert history[-1] < history[0]
    before, after = tiny.build_model("llama"), load_policy(str(tmp_path / "tuned"), dtype=torch.float32)
    for pair in PAIRS:
        prompt, *sides = tokens(policy, pair)
        chosen, rejected = (tiny.naive_logps(after, prompt, ids) - tiny.naive_logps(before, prompt, ids) for ids in sides)
        assert chosen > rejected


def test_own_loop_adds_up_losses_with_their_weights(policy):
    pairs = PAIRS[: own_loop.BATCH_PAIRS]
    model = tiny.build_model("llama")
    nll = [-tiny.naive_logps(model, prompt, chosen) / len(chosen) for prompt, chosen, _ in (tokens(policy, p) for p in pairs)]
    history = own_loop.train(policy.path, pairs, [Term("hinge"), Term("sft", weight=0.5)])
    assert history[0] == pytest.approx(1.0 + 0.5 * sum(nll) / len(nll), abs=1e-4)
