import math

import pytest
import torch

from dpo_ray.errors import ConfigError
from dpo_ray.learn.optim import build_optimizer, clip_gradients, hold_back, learning_rate_at

from . import tiny


def rates(schedule: str, num_steps: int = 10, warmup_steps: int = 2) -> list[float]:
    return [
        learning_rate_at(step, num_steps, peak=1.0, warmup_steps=warmup_steps, schedule=schedule) for step in range(num_steps)
    ]


def test_learning_rate_linear_by_hand():
    """Two warmup steps: 1/2, 2/2; then 1 - t/8 for t = 0 ... 7."""
    assert rates("linear") == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]


def test_learning_rate_cosine_by_hand():
    """After the warmup (1 + cos(pi t / 8)) / 2; halfway, at t = 4, it is 1/2."""
    got = rates("cosine")
    assert got[:3] == [0.5, 1.0, 1.0]
    assert got[6] == pytest.approx(0.5)
    assert got[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)


def test_learning_rate_constant_stays():
    assert rates("constant") == [0.5] + [1.0] * 9


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert rates("constant", warmup_steps=0) == [1.0] * 10


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_of_every_step_is_positive(schedule):
    assert all(
        rate > 0
        for num_steps in (1, 2, 7)
        for warmup_steps in (0, 1, 3, 9)
        for rate in rates(schedule, num_steps, warmup_steps)
    )


def test_build_optimizer_does_not_decay_norms_and_biases():
    model = tiny.build_model("qwen2")
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name or "bias" in name else 0.1), name
    assert optimizer.defaults["fused"]
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_clip_gradients_by_hand():
    """Gradients 3 and 4 have norm 5; scaled to norm 1 they are 0.6 and 0.8. A frozen parameter has none."""
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(1)) for name in "abc"})
    model["a"].grad, model["b"].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients(model, 10.0) == 5.0
    assert (model["a"].grad.item(), model["b"].grad.item()) == (3.0, 4.0)
    assert clip_gradients(model, 1.0) == 5.0
    torch.testing.assert_close(torch.cat([model["a"].grad, model["b"].grad]), torch.tensor([0.6, 0.8]))


def test_hold_back_leaves_weights_and_state_as_they_are_until_it_is_taken_back():
    """Adam's moments, its count of steps and the decay too: the third step is the second."""
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, bads in zip(models, ([0.0, 0.0], [0.0, 1.0, 0.0]), strict=True):
        optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.1, betas=(0.9, 0.95))
        for bad in bads:
            model.weight.grad, model.bias.grad = torch.full((2, 3), 2.0), torch.full((2,), float("nan") if bad else 1.0)
            hold_back(optimizer, torch.tensor(bad))
            optimizer.step()
    assert torch.equal(models[0].weight, models[1].weight)
    assert torch.equal(models[0].bias, models[1].bias)


def test_hold_back_refuses_an_optimizer_that_would_step_all_the_same():
    with pytest.raises(ConfigError, match="SGD is not fused"):
        hold_back(torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1), torch.tensor(1.0))
