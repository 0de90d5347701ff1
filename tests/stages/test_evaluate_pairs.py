import math

import pyarrow as pa
import pytest

from dpo_ray.config import PreferenceRun
from dpo_ray.schemas import COMPARISONS
from dpo_ray.stages import evaluate_pairs, ingest, preferences
from dpo_ray.stages.evaluate_pairs import summarize

from ..artifacts import commit_policy, commit_tables, context
from ..learn import tiny
from ..test_config import minimal_preferences
from .test_ingest import GOOD


def compared(opening, margin, kl=1.0, tokens=2.0):
    """A pair whose log-ratios differ by `margin` nats."""
    sides = {"chosen_logps": margin - 5.0, "chosen_ref_logps": -5.0, "rejected_logps": -7.0, "rejected_ref_logps": -7.0}
    rest = {f"{side}_{name}": value for side in ("chosen", "rejected") for name, value in (("kl", kl), ("tokens", tokens))}
    return {"pair_id": f"{opening}{margin}", "opening": opening} | sides | rest


def test_summarize_by_hand():
    rows = [compared("a", 10.0), compared("b", -20.0, kl=3.0), compared("c", 40.0, tokens=6.0)]
    metrics = summarize(rows, beta=0.1, bootstrap_samples=500, seed=0)
    assert metrics["eval_rewards/accuracies"] == pytest.approx(2 / 3)
    assert metrics["eval_rewards/accuracies_low"] < 2 / 3 < metrics["eval_rewards/accuracies_high"]
    assert metrics["eval_rewards/margins"] == pytest.approx((1 - 2 + 4) / 3)
    assert metrics["eval_rewards/chosen"] == pytest.approx(1.0)
    assert metrics["eval_rewards/rejected"] == pytest.approx(0.0)
    assert metrics["eval_loss"] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in (1, -2, 4)) / 3)
    assert metrics["kl"] == pytest.approx(10 / 6)
    assert metrics["kl_per_token"] == pytest.approx(10 / 20)
    assert (metrics["eval_pairs"], metrics["eval_conversations"]) == (3, 3)


def test_summarize_interval_is_over_conversations_whose_pairs_go_together():
    """Forty copies of four answers know no more than four answers."""
    width = lambda rows: (lambda m: m["eval_rewards/accuracies_high"] - m["eval_rewards/accuracies_low"])(
        summarize(rows, 0.1, 1000, 0)
    )
    four = [compared(str(i), 1.0 if i % 2 else -1.0) for i in range(4)]
    forty = [compared(str(i), 1.0 if i % 2 else -1.0) for i in range(40)]
    assert width(four * 10) == pytest.approx(width(four))
    assert width(forty) < width(four * 10) / 2


def test_summarize_without_a_change_is_ln_2():
    metrics = summarize([compared("a", 0.0, kl=0.0)], 0.1, 100, 0)
    assert metrics["eval_loss"] == pytest.approx(math.log(2))
    assert metrics["eval_rewards/margins"] == 0.0


def test_evaluate_on_held_out_pairs_is_a_plain_forward_of_both_policies(local_ray, tmp_path, policy):
    """Measured error: 3e-6 of the margin."""
    config = PreferenceRun.model_validate(
        minimal_preferences() | {"train": minimal_preferences()["train"] | {"dtype": "float32"}}
    )
    other = tiny.build_model("llama", seed=1)
    other.save_pretrained(tmp_path / "trained")
    tiny.build_tokenizer().save_pretrained(tmp_path / "trained")
    held_out = [{**row, "split": "eval"} for row in GOOD]
    start = commit_policy(tmp_path / "start", policy.path, policy.identity)
    inputs = {
        "preferences": commit_tables(tmp_path / "preferences", [pa.Table.from_pylist(held_out, COMPARISONS)], "eval-"),
        "start": start,
        "reference": start,
        "policy": commit_policy(tmp_path / "policy", str(tmp_path / "trained"), "trained"),
    }
    block = config.preferences
    steps = evaluate_pairs.Steps(
        preferences.held_out, lambda ds, ref: ingest.ingest(ds, ref, block, 0), ingest.tasks(block), ingest.result_config(block)
    )
    output = evaluate_pairs.stage(config, 0, "policy", "policy", steps).run(context(tmp_path / "out", inputs))

    tokenizer, reference = tiny.build_tokenizer(), tiny.build_model("llama", seed=0)
    margins = []
    for row in GOOD:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        ids = [[*tokenizer.encode(row[side], add_special_tokens=False), tiny.EOS] for side in ("chosen", "rejected")]
        ratios = [tiny.naive_logps(other, prompt, i) - tiny.naive_logps(reference, prompt, i) for i in ids]
        margins.append(config.train.beta * (ratios[0] - ratios[1]))
    assert (output.rows_in, output.rows_out) == (len(GOOD), len(GOOD))
    assert output.metrics["eval_rewards/margins"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert output.metrics["eval_rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    assert output.metrics["kl"] > 0
