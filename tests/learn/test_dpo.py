import math

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from dpo_ray.errors import ConfigError, NonFiniteLossError, StageError
from dpo_ray.learn.dpo import dpo_steps
from dpo_ray.learn.layout import share
from dpo_ray.learn.logps import completion_logps
from dpo_ray.learn.losses import Term
from dpo_ray.learn.objective import Objective, PairRows

from . import tiny, training


def under(model, pairs: PairRows) -> PairRows:
    """Return the pairs with their reference log-probabilities under `model`, scored in one batch of their own."""

    with torch.no_grad():
        logps = completion_logps(model, share(tiny.pair_groups(pairs)), training.PATH).view(-1, 2).T.tolist()
    return pairs._replace(ref_chosen_logps=logps[0], ref_rejected_logps=logps[1])


@pytest.fixture
def model(policies):
    return training.build(policies["qwen2"], None)


PAIRS = tiny.build_pairs(13)
SIDES = ("chosen", "rejected")


def test_dpo_steps_start_at_ln_2_and_zero_margin_where_policy_is_reference(model):
    """Reference and training batch the rows differently. Largest mean measured: 2e-7."""
    pairs = under(model, PAIRS)
    (metrics,) = training.train(model, training.build_adamw(model), pairs, training.plan(pairs, 1, 60, batch_size=13))
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(metrics[name]) < 1e-6


def test_dpo_steps_use_the_cached_reference(model):
    """One nat on one chosen reference of 13 makes its margin -beta = -0.1: loss (12 ln 2 + ln(1 + e^0.1)) / 13."""
    pairs = under(model, PAIRS)
    pairs.ref_chosen_logps[4] += 1.0
    (metrics,) = training.train(model, training.build_adamw(model), pairs, training.plan(pairs, 1, 60, batch_size=13))
    expected = (12 * math.log(2) + math.log(1 + math.exp(0.1))) / 13
    assert metrics["loss"] == pytest.approx(expected, abs=1e-6)
    assert metrics["rewards/chosen"] == pytest.approx(-0.1 / 13, abs=1e-6)


def test_dpo_steps_raise_chosen_and_lower_rejected(model):
    """After one step the implicit rewards are positive for chosen, negative for rejected, and every pair is right."""
    pairs = under(model, tiny.build_pairs(4))
    first, second = training.train(
        model, training.build_adamw(model), pairs, training.plan(pairs, 1, 10**6, batch_size=4, epochs=2)
    )
    assert second["loss"] < first["loss"]
    assert second["rewards/chosen"] > 0 > second["rewards/rejected"]
    assert second["rewards/accuracies"] == 1.0


def test_dpo_steps_metrics_are_means_over_the_global_batch(model):
    """Against the naive per-sequence log-probabilities, with the loss written out."""
    pairs = tiny.take(PAIRS, [0, 1, 2])
    chosen, rejected = (
        np.array([tiny.naive_logps(model, p, c) for p, c in zip(pairs.prompt_token_ids, completions, strict=True)])
        for completions in (pairs.chosen_token_ids, pairs.rejected_token_ids)
    )
    chosen_rewards = training.BETA * (chosen - np.array(pairs.ref_chosen_logps))
    rejected_rewards = training.BETA * (rejected - np.array(pairs.ref_rejected_logps))
    margins = chosen_rewards - rejected_rewards
    expected = {
        "loss": np.log1p(np.exp(-margins)).mean(),
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
        "kl_ref_to_policy": (np.array([*pairs.ref_chosen_logps, *pairs.ref_rejected_logps]) - [*chosen, *rejected]).mean(),
        "num_tokens": (tiny.pair_lengths(pairs) * [2, 1, 1]).sum(),  # prompt + chosen, and prompt + rejected
        "learning_rate": 1e-3,
    }
    (metrics,) = training.train(model, training.build_adamw(model), pairs, training.plan(pairs, 1, 40, batch_size=3))
    grad_norm = metrics.pop("grad_norm")
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert grad_norm > 0


def test_dpo_steps_gradients_do_not_depend_on_micro_batches(model):
    """Global batches of 8 and 5 pairs, in one micro-batch or in many. Largest relative error measured: 6e-7."""
    want = training.gradients(model, PAIRS, training.plan(PAIRS, 1, training.ONE_MICRO_BATCH, batch_size=8))
    plan = training.plan(PAIRS, 1, 30, batch_size=8)
    assert [len(step[0]) for step in plan] > [2, 2]
    got = training.gradients(model, PAIRS, plan)
    assert [training.relative_error(g, w) < 1e-5 for g, w in zip(got, want, strict=True)] == [True, True]


def test_dpo_steps_empty_micro_batch_changes_nothing(model):
    plan = training.plan(PAIRS, 1, 60, batch_size=13)
    (want,) = training.gradients(model, PAIRS, plan)
    (got,) = training.gradients(model, PAIRS, [[[*plan[0][0], []]]])
    assert torch.equal(got, want)


def test_dpo_steps_put_sampled_ids_into_the_forward_unchanged(model):
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    pairs = PairRows(["a"], [[5, 6]], [[7, 7]], [[8]], [-9.0], [-4.0])
    training.train(model, training.build_adamw(model), pairs, [[[[0]]]])
    assert seen == [[[5, 6, 7, 7, 8]]]


def test_dpo_steps_apply_the_learning_rate_of_each_step_from_start_step_on(model):
    plan = training.plan(PAIRS, 1, training.ONE_MICRO_BATCH, batch_size=5)
    metrics = training.train(model, training.build_adamw(model), PAIRS, plan, start_step=1)
    assert [m["learning_rate"] for m in metrics] == [2e-3, 3e-3]


def test_dpo_steps_without_a_reference_have_no_kl_to_it(model):
    pairs = tiny.take(PAIRS, [0, 1])._replace(ref_chosen_logps=None, ref_rejected_logps=None)
    (metrics,) = training.train(
        model, training.build_adamw(model), pairs, [[[[0, 1]]]], objective=Objective([Term("simpo")], 2.0)
    )
    assert "kl_ref_to_policy" not in metrics
    assert math.isfinite(metrics["loss"])


def reads(model, optimizer, pairs, plan, read_after):
    """Yield what `dpo_steps` yields."""
    fetch, options = lambda rows: tiny.take(pairs, rows), {"max_grad_norm": 1.0, "pad_token_id": tiny.PAD, "device": "cpu"}
    return dpo_steps(
        *(model, optimizer, fetch, plan, training.PATH, training.OBJECTIVE, tiny.pair_lengths(pairs)),
        **{"learning_rate_for": lambda step: 1e-3, "read_after": read_after, **options},
    )


def test_dpo_steps_are_the_same_whenever_their_metrics_are_read(policies):
    plan = training.plan(PAIRS, 1, 40, batch_size=2)  # 7 steps
    every, some = (training.build(policies["qwen2"], None) for _ in range(2))
    want = list(reads(every, training.build_adamw(every), PAIRS, plan, lambda steps: True))
    got = list(reads(some, training.build_adamw(some), PAIRS, plan, lambda steps: steps in (2, 5)))
    assert [len(read) for read in got] == [2, 3, 2]
    assert [m for read in got for m in read] == [m for read in want for m in read]
    assert torch.equal(some.lm_head.weight, every.lm_head.weight)


HOST_READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"}


class HostReads(TorchFunctionMode):
    """Counts where Python asks for a number that was computed: on a GPU the host waits there.

    Integers are not counted: `Batch.attention` holds lengths, and lies on the host whatever the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        computed = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype != torch.int64
        self.count += computed and getattr(func, "__name__", "") in HOST_READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("read_after", "times"), [(lambda steps: True, 7), (lambda steps: steps % 3 == 0, 3)])
def test_dpo_steps_wait_for_the_device_once_a_read(model, read_after, times):
    plan, optimizer = training.plan(PAIRS, 1, 40, batch_size=2), training.build_adamw(model)
    with HostReads() as host:
        taken = list(reads(model, optimizer, PAIRS, plan, read_after))
    assert len(taken) == host.count == times


@pytest.mark.parametrize("operation", [lambda t: t.item(), lambda t: t.tolist(), float, bool, lambda t: t.cpu()])
def test_host_reads_are_seen_by_this_count(operation):
    with HostReads() as host:
        operation(torch.tensor(1.0) + 1)
    assert host.count >= 1


class Counter(torch.optim.Optimizer):
    """An optimizer that counts its steps."""

    def __init__(self, model):
        super().__init__(model.parameters(), {"lr": 0.0, "fused": True})
        self.steps = 0

    def step(self, closure=None):
        self.steps += 1


@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_dpo_steps_need_no_number_of_the_device_before_the_read(policies, ld_alpha):
    """On `meta` there are none: whatever asks for one raises, in transformers' forward and in torch's kernels too."""
    meta = training.build(policies["qwen2"], None).to("meta")
    plan, optimizer = training.plan(PAIRS, 1, 40, batch_size=2), Counter(meta)
    tokens = {f"ref_{side}_token_logps": [[-5.0] * len(ids) for ids in getattr(PAIRS, f"{side}_token_ids")] for side in SIDES}
    pairs = PAIRS._replace(**tokens)
    objective = training.OBJECTIVE._replace(ld_alpha=ld_alpha)
    with pytest.raises(NotImplementedError, match="meta"):
        training.train(meta, optimizer, pairs, plan, read_after=lambda steps: False, objective=objective, device="meta")
    assert optimizer.steps == len(plan) == 7


def state_of(model, optimizer):
    named = [value for p in model.parameters() for _, value in sorted(optimizer.state[p].items())]
    return [t.detach().clone() for t in (*model.parameters(), *named)]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_dpo_steps_hold_back_a_step_that_is_not_finite_and_all_after_it_until_the_read(policies, what):
    """The third of seven steps is bad, and the only read is after the last: what is left is what two steps made."""
    plan = training.plan(PAIRS, 1, 40, batch_size=2)
    (bad,) = plan[2][0]
    want, got = (training.build(policies["qwen2"], None) for _ in range(2))
    optimizer, other = training.build_adamw(want), training.build_adamw(got)
    first_two = list(reads(want, optimizer, PAIRS, plan[:2], lambda steps: False))
    pairs = PAIRS
    if what == "loss":
        pairs = PAIRS._replace(ref_chosen_logps=[math.inf if i in bad else v for i, v in enumerate(PAIRS.ref_chosen_logps)])
        message = rf"step 2: loss (nan|inf).*for pairs {', '.join(f'pair-{i}' for i in bad)}:"
    else:
        backwards = iter(range(10))
        got.lm_head.weight.register_hook(lambda grad: grad * float("nan") if next(backwards) == 2 else grad)
        message = rf"step 2: loss \d.*gradient norm nan; pairs of the batch: {', '.join(f'pair-{i}' for i in bad)};"
    taken = reads(got, other, pairs, plan, lambda steps: False)
    assert next(taken) == first_two[0]
    with pytest.raises(NonFiniteLossError, match=message):
        next(taken)
    for mine, theirs in zip(state_of(got, other), state_of(want, optimizer), strict=True):
        assert torch.equal(mine, theirs)


def test_dpo_steps_refuse_an_optimizer_that_cannot_hold_a_step_back(model):
    with pytest.raises(ConfigError, match="AdamW is not fused"):
        training.train(model, torch.optim.AdamW(model.parameters()), PAIRS, [[[[0]]]])


def test_dpo_steps_stop_at_a_loss_that_is_not_finite(model):
    """The error names step and pair, and the policy is as before."""
    before = model.lm_head.weight.detach().clone()
    pairs = PAIRS._replace(ref_chosen_logps=[*PAIRS.ref_chosen_logps[:12], float("nan")])
    plan = training.plan(pairs, 1, 60, batch_size=13)
    with pytest.raises(NonFiniteLossError, match=r"step 0: loss nan.*for pairs pair-12:"):
        training.train(model, training.build_adamw(model), pairs, plan)
    assert torch.equal(model.lm_head.weight, before)


def test_dpo_steps_stop_at_a_gradient_that_is_not_finite(model):
    model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    pairs = tiny.take(PAIRS, [0, 1])
    with pytest.raises(NonFiniteLossError, match=r"gradient norm (inf|nan); pairs of the batch: pair-0, pair-1; "):
        training.train(model, training.build_adamw(model), pairs, [[[[0, 1]]]])


KNOWN = {
    "sigmoid": ([Term("sigmoid")], math.log(2)),
    "ipo": ([Term("ipo")], 25.0),  # (0 - 1 / (2 beta)) ** 2
    "hinge": ([Term("hinge")], 1.0),
    "robust": ([Term("robust", 1.0, {"label_smoothing": 0.1})], math.log(2)),
    "sum": ([Term("sigmoid", 0.5), Term("hinge", 2.0)], 0.5 * math.log(2) + 2.0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_dpo_steps_start_at_the_known_value_of_the_loss(model, name):
    """Measured: within 5e-7 of it in float32, relative."""
    terms, known = KNOWN[name]
    pairs, plan = under(model, PAIRS), training.plan(PAIRS, 1, 60, batch_size=13)
    how = {"objective": Objective(terms, 0.1), "start_tolerance": 1e-5}
    (metrics,) = training.train(model, training.build_adamw(model), pairs, plan, **how)
    assert metrics["loss"] == pytest.approx(known, rel=1e-5)


@pytest.mark.parametrize("name", KNOWN)
def test_dpo_steps_refuse_a_reference_that_is_not_the_policy_they_start_from(model, name):
    """One nat too much on each chosen: off by beta / 2 at the loss of DPO."""
    pairs, plan = under(model, PAIRS), training.plan(PAIRS, 1, 60, batch_size=13)
    pairs = pairs._replace(ref_chosen_logps=[value - 1.0 for value in pairs.ref_chosen_logps])
    how = {"objective": Objective(KNOWN[name][0], 0.1)}
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(StageError, match=r"loss of step 0 must be .* got .*--redo reference"):
        training.train(model, training.build_adamw(model), pairs, plan, **how, start_tolerance=1e-3)
    assert torch.equal(model.lm_head.weight, before)
    assert training.train(model, training.build_adamw(model), pairs, plan, **how)  # another policy as reference


def test_dpo_steps_after_a_resume_have_no_known_loss(model):
    plan = training.plan(PAIRS, 1, 60, batch_size=7)
    assert len(training.train(model, training.build_adamw(model), PAIRS, plan, start_step=1, start_tolerance=1e-3)) == 1
