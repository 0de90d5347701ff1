import math

import numpy as np
import pytest
import torch

from dpo_ray.errors import NonFiniteLossError
from dpo_ray.learn.batches import Plan
from dpo_ray.learn.logps import Path
from dpo_ray.learn.sft import ConversationRows, sft_steps

from . import tiny, training


def build_rows(num_rows: int, seed: int = 0) -> ConversationRows:
    """Rows of random ids: prompts of 2-6 tokens, completions of 3-12 of which about half are an assistant's."""
    rng = np.random.default_rng(seed)
    ids = lambda low, high: rng.integers(3, tiny.VOCAB_SIZE, rng.integers(low, high + 1)).tolist()
    prompts, completions = zip(*[(ids(2, 6), ids(3, 12)) for _ in range(num_rows)], strict=True)
    positions = [sorted(rng.choice(len(c), rng.integers(1, len(c)), replace=False).tolist()) for c in completions]
    return ConversationRows([f"row-{i}" for i in range(num_rows)], prompts, completions, positions)


ROWS = build_rows(11)
LENGTHS = np.array([[len(p), len(c)] for p, c in zip(ROWS.prompt_token_ids, ROWS.completion_token_ids, strict=True)])
TARGETS = np.array(list(map(len, ROWS.assistant_positions)))


def take(rows: list[int]) -> ConversationRows:
    return ConversationRows(*([column[row] for row in rows] for column in ROWS))


def plan(max_batch_tokens: int, *, batch_size: int = 11, epochs: int = 1, share_prompt: bool = True) -> Plan:
    how = {"max_batch_tokens": max_batch_tokens, "seed": 0, "share_prompt": share_prompt}
    return Plan(LENGTHS, epochs=epochs, global_batch_size=batch_size, world_size=1, **how)


def train(model, optimizer, steps, path=training.PATH, fetch=take, **options):
    how = {"learning_rate_for": lambda step: 1e-3, "max_grad_norm": 1e9, "pad_token_id": tiny.PAD, "device": "cpu"} | options
    return [m for read in sft_steps(model, optimizer, fetch, steps, path, LENGTHS, TARGETS, **how) for m in read]


def gradients(model, steps, path=training.PATH, **options):
    recorder = training.GradientRecorder(model)
    train(model, recorder, steps, path, **options)
    return recorder.gradients


def negative_logps(model) -> list[list[float]]:
    """-log p of each target, from one full forward a row, in float64."""
    values = []
    for prompt, completion, positions in zip(*ROWS[1:], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
        values.append([-logits[len(prompt) + i - 1, completion[i]].item() for i in positions])
    return values


@pytest.fixture
def model(policies):
    return training.build(policies["qwen2"], None)


def test_sft_loss_is_the_mean_over_assistant_tokens(model):
    want = np.concatenate(negative_logps(model)).mean()
    (metrics,) = train(model, training.build_adamw(model), plan(40))
    assert metrics["loss"] == pytest.approx(want, rel=1e-6)
    assert metrics["num_tokens"] == LENGTHS.sum()


def test_sft_loss_over_turns_is_the_mean_of_each_rows_mean(model):
    want = np.mean([np.mean(own) for own in negative_logps(model)])
    (metrics,) = train(model, training.build_adamw(model), plan(40), mean_over="turns")
    assert metrics["loss"] == pytest.approx(want, rel=1e-6)


def test_sft_gradients_are_those_of_a_plain_forward(model):
    """Packed rows against one padded batch of transformers' own loss. Measured: 4e-7 relative."""
    (got,) = gradients(model, plan(10**6))
    width = int(LENGTHS.sum(axis=1).max())
    ids = torch.full((len(LENGTHS), width), tiny.PAD)
    labels = torch.full((len(LENGTHS), width), -100)
    for row, (prompt, completion, positions) in enumerate(zip(*ROWS[1:], strict=True)):
        ids[row, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
        for i in positions:
            labels[row, len(prompt) + i] = completion[i]
    model.zero_grad()
    model(input_ids=ids, labels=labels).loss.backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert training.relative_error(got, want) < 1e-5


@pytest.mark.parametrize("mean_over", ["tokens", "turns"])
def test_sft_gradients_do_not_depend_on_micro_batches_or_layout(model, mean_over):
    """Global batches of 8 and 3 rows. Largest relative error measured: 5e-7."""
    want = gradients(model, plan(10**6, batch_size=8), mean_over=mean_over)
    cut = plan(30, batch_size=8)
    assert [len(step[0]) for step in cut] > [2, 2]
    for steps, path in ((cut, training.PATH), (plan(60, batch_size=8, share_prompt=False), Path(False, True))):
        got = gradients(model, steps, path, mean_over=mean_over)
        assert [training.relative_error(g, w) < 1e-5 for g, w in zip(got, want, strict=True)] == [True, True]


def test_sft_steps_learn_the_rows(model):
    metrics = train(model, training.build_adamw(model), plan(60, epochs=30), max_grad_norm=1.0)
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]


def test_sft_empty_micro_batch_changes_nothing(model):
    (want,) = gradients(model, plan(10**6))
    (got,) = gradients(model, [[[*plan(10**6)[0][0], []]]])
    assert torch.equal(got, want)


def test_sft_steps_stop_at_a_row_without_a_finite_loss(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[99] = math.nan

    def fetch(rows):
        taken = take(rows)
        prompts = [
            [*ids[:-1], 99] if row == 4 else [i for i in ids if i != 99] or [5] for row, ids in zip(rows, taken[1], strict=True)
        ]
        completions = [[5 if i == 99 else i for i in ids] for ids in taken.completion_token_ids]
        return taken._replace(prompt_token_ids=prompts, completion_token_ids=completions)

    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().nan_to_num().clone())
    with pytest.raises(NonFiniteLossError, match=r"step 0: loss nan.*for rows row-4:"):
        train(model, training.build_adamw(model), plan(10**6), fetch=fetch)
