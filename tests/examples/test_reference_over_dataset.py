import pyarrow as pa
import pytest
import ray.data

from dpo_ray.config import ActorResources
from dpo_ray.learn.tokens import load_tokenizer
from dpo_ray.stages.reference import How
from examples.reference_over_dataset import with_reference

from ..learn import tiny

pytestmark = pytest.mark.usefixtures("local_ray")
HOW = How("float32", "auto", max_batch_tokens=40)
ONE_CPU = ActorResources(cpus=1)


def test_reference_over_own_tokens_is_that_of_a_plain_forward(policy):
    """Two blocks with columns of the user's own; each row by its key. Measured error: 5e-6 nats."""
    made = tiny.build_pairs(12, seed=5)
    rows = [
        {"key": key, "prompt_token_ids": prompt, "chosen_token_ids": chosen, "rejected_token_ids": rejected, "source": "mine"}
        for key, prompt, chosen, rejected in zip(*made[:4], strict=True)
    ]
    pairs = ray.data.from_arrow([pa.Table.from_pylist(some) for some in (rows[:7], rows[7:])])
    got = {row["key"]: row for row in with_reference(pairs, policy.path, HOW, ONE_CPU).take_all()}
    assert sorted(got) == sorted(made.pair_id)
    model = tiny.build_model("llama")
    for row in rows:
        own = got[row["key"]]
        for side in ("chosen", "rejected"):
            expected = tiny.naive_logps(model, row["prompt_token_ids"], row[f"{side}_token_ids"])
            assert own.pop(f"ref_{side}_logps") == pytest.approx(expected, abs=1e-4)
        assert own == row


def test_reference_over_own_text_is_tokenised_by_the_chat_template(policy):
    rows = [{"key": i, "prompt": f"w{i} w7", "chosen": f"w{i + 20}", "rejected": "w50 w51 w52"} for i in range(10, 13)]
    got = {row["key"]: row for row in with_reference(ray.data.from_items(rows), policy.path, HOW, ONE_CPU).take_all()}
    ids = load_tokenizer(policy.path).get_vocab()
    model = tiny.build_model("llama")
    assert sorted(got) == [10, 11, 12]
    for key, row in got.items():
        words = ["<bos>", "user", f"w{key}", "w7", "assistant"], [f"w{key + 20}", "<eos>"], ["w50", "w51", "w52", "<eos>"]
        prompt, chosen, rejected = ([ids[word] for word in side] for side in words)
        assert list(row["prompt_token_ids"]) == prompt
        assert list(row["chosen_token_ids"]) == chosen
        assert row["ref_chosen_logps"] == pytest.approx(tiny.naive_logps(model, prompt, chosen), abs=1e-4)
        assert row["ref_rejected_logps"] == pytest.approx(tiny.naive_logps(model, prompt, rejected), abs=1e-4)
