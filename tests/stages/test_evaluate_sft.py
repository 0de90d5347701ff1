import math

import pyarrow as pa
import pytest

from dpo_ray.schemas import CONVERSATIONS
from dpo_ray.stages import conversations, evaluate_sft, tokenize
from dpo_ray.stages.evaluate_sft import summarize

from ..artifacts import commit_policy, commit_tables, context
from ..learn import tiny
from .test_tokenize import BAD, GOOD, config


def row(conversation, tokens, start, policy):
    return {"conversation_id": conversation, "tokens": tokens, "start_logps": -start, "policy_logps": -policy}


def test_summarize_by_hand():
    """Conversation a has two rows: 6 tokens of 12 nats before, 3 after; b has 2 tokens of 8 nats, 4 after."""
    metrics = summarize([row("a", 4, 8.0, 2.0), row("a", 2, 4.0, 1.0), row("b", 2, 8.0, 4.0)])
    assert (metrics["eval_conversations"], metrics["eval_tokens"]) == (2, 8)
    assert metrics["eval_loss_start"] == pytest.approx(20 / 8)
    assert metrics["eval_loss"] == pytest.approx(7 / 8)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(7 / 8))
    assert metrics["eval_conversation_loss"] == pytest.approx((0.5 + 2.0) / 2)
    assert metrics["eval_conversation_loss_se"] == pytest.approx(0.75)


def test_evaluate_sft_is_a_plain_forward_of_both_policies_on_held_out_turns(local_ray, tmp_path, policy):
    other = tiny.build_model("llama", seed=1)
    other.save_pretrained(tmp_path / "trained")
    tiny.build_tokenizer().save_pretrained(tmp_path / "trained")
    held_out = [{**conversation, "split": "eval"} for conversation in [*GOOD, BAD[0][0]]]
    inputs = {
        "conversations": commit_tables(tmp_path / "chats", [pa.Table.from_pylist(held_out, CONVERSATIONS)], "eval-"),
        "start": commit_policy(tmp_path / "start", policy.path, policy.identity),
        "policy": commit_policy(tmp_path / "policy", str(tmp_path / "trained"), "trained"),
    }
    run = config()
    steps = evaluate_sft.Steps(
        lambda artifact: conversations.parts(artifact, run, held_out=True),
        lambda ds, start: tokenize.tokenize(ds, start, run.conversations),
        tokenize.tasks(run.conversations),
        tokenize.result_config(run.conversations),
    )
    output = evaluate_sft.stage(run, "policy", "train", steps).run(context(tmp_path / "out", inputs))

    tokenizer, nll, tokens = tiny.build_tokenizer(), [0.0, 0.0], 0
    for conversation in GOOD:
        for i in (1, 3):
            messages = conversation["messages"]
            prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
            ids = [*tokenizer.encode(messages[i]["content"], add_special_tokens=False), tiny.EOS]
            nll = [
                sum_ - tiny.naive_logps(m, prompt, ids) for sum_, m in zip(nll, (tiny.build_model("llama"), other), strict=True)
            ]
            tokens += len(ids)
    assert output.dropped == {"conversation_too_long": 1}
    assert output.metrics["eval_tokens"] == tokens
    assert output.metrics["eval_loss_start"] == pytest.approx(nll[0] / tokens, rel=1e-5)
    assert output.metrics["eval_loss"] == pytest.approx(nll[1] / tokens, rel=1e-5)
