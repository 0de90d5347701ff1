import pyarrow as pa
import pytest

from dpo_ray.config import SftRun
from dpo_ray.schemas import CONVERSATIONS
from dpo_ray.stages import conversations, tokenize

from ..artifacts import commit_policy, commit_tables, context, kept, quarantined
from ..learn import tiny
from ..test_config import minimal_sft


def conversation(key, *contents, split="train"):
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"conversation_id": key, "messages": messages, "split": split, "tools": None}


GOOD = [conversation(f"c{i}", f"w{10 + i}", "w20 w21", "w11", f"w{30 + i}") for i in range(5)]
BAD = [
    (conversation("long", "w10 " * 40, "w20"), "conversation_too_long"),
    (conversation("end", "w10", "w20 <eos> w21"), "template_error"),
]


def config(**fields):
    block = {"max_tokens": 40, "max_dropped": 0.5, "resources": {"rows_per_part": 3}}
    tree = minimal_sft()
    return SftRun.model_validate(tree | {"conversations": tree["conversations"] | block | fields})


def run(tmp_path, policy, rows, split="train"):
    inputs = {
        "conversations": commit_tables(tmp_path / "conversations", [pa.Table.from_pylist(rows, CONVERSATIONS)], f"{split}-"),
        "policy": commit_policy(tmp_path / "policy", policy.path, policy.identity),
    }
    made = tokenize.stage(config(), "policy", lambda artifact: conversations.parts(artifact, config(), held_out=False))
    return made.run(context(tmp_path / "out", inputs)), tmp_path / "out"


@pytest.fixture(scope="module")
def tokenized(local_ray, tmp_path_factory, policy):
    return run(tmp_path_factory.mktemp("tokenize"), policy, [*GOOD, *(row for row, _ in BAD)])


def test_tokenize_every_conversation_is_out_or_in_quarantine_with_its_reason(tokenized):
    output, directory = tokenized
    assert (output.rows_in, output.rows_out) == (7, 10)  # the template of `tiny` gives each turn a row of its own
    assert output.dropped == {reason: 1 for _, reason in BAD}
    assert {row["conversation_id"]: row["drop_reason"].split(":")[0] for row in quarantined(directory, output)} == {
        row["conversation_id"]: reason for row, reason in BAD
    }


def test_tokenize_rows_are_turns_behind_their_rendered_prompts(tokenized):
    output, directory = tokenized
    rows = [row for row in kept(directory, output) if row["conversation_id"] == "c3"]
    user, assistant = 3, 4
    assert sorted((r["prompt_token_ids"], r["completion_token_ids"], r["assistant_positions"]) for r in rows) == [
        ([tiny.BOS, user, 13, assistant], [20, 21, tiny.EOS], [0, 1, 2]),
        ([tiny.BOS, user, 13, assistant, 20, 21, user, 11, assistant], [33, tiny.EOS], [0, 1]),
    ]


def test_tokenize_counts_all_tokens_and_those_of_assistants(tokenized):
    output, directory = tokenized
    rows = kept(directory, output)
    assert output.metrics["tokens"] == sum(len(r["prompt_token_ids"]) + len(r["completion_token_ids"]) for r in rows)
    assert output.metrics["assistant_tokens"] == 5 * (3 + 2)
