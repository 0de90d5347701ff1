"""Short trainings that run the same way in one process, on a mesh of one rank and on a mesh of two."""

from collections.abc import Iterator, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo_ray.learn import attention, sharded_load
from dpo_ray.learn.batches import Plan, Step
from dpo_ray.learn.dpo import dpo_steps
from dpo_ray.learn.logps import Path
from dpo_ray.learn.losses import Term
from dpo_ray.learn.objective import Objective, PairRows
from dpo_ray.learn.optim import build_optimizer
from dpo_ray.learn.policy import load_policy, shard

from . import tiny

BETA = 0.1
OBJECTIVE = Objective([Term("sigmoid")], BETA)
PATH = Path(share_prompt=True, tiled_head=True)
ONE_MICRO_BATCH = 10**6


def build(path: str, mesh: DeviceMesh | None, **options) -> PreTrainedModel:
    """Load a policy in float32 and shard it if there is a mesh."""
    model = load_policy(path, dtype=torch.float32)
    model.set_attn_implementation(attention.NAME)
    return shard(model, mesh, **{"compute_dtype": torch.float32, **options}) if mesh else model


def build_adamw(model: PreTrainedModel) -> torch.optim.AdamW:
    return build_optimizer(model, learning_rate=0.0, weight_decay=0.1, betas=(0.9, 0.95))


def plan(pairs: PairRows, world_size: int, max_batch_tokens: int, *, batch_size: int, epochs: int = 1) -> Plan:
    return Plan(
        tiny.pair_lengths(pairs),
        epochs=epochs,
        global_batch_size=batch_size,
        world_size=world_size,
        max_batch_tokens=max_batch_tokens,
        seed=0,
    )


def train(model, optimizer, pairs: PairRows, steps: Sequence[Step], *, start_step: int = 0, **options):
    """Return the metrics of all steps from `start_step` on, whenever they were read."""
    return list(take(model, optimizer, pairs, steps, start_step=start_step, **options))


def take(
    model, optimizer, pairs: PairRows, steps: Sequence[Step], *, start_step: int = 0, **options
) -> Iterator[dict[str, float]]:
    """Yield the metrics of each step from `start_step` on, after it is taken if all are read at once."""
    defaults = {"max_grad_norm": 1.0, "learning_rate_for": lambda step: 1e-3 * (step + 1)}
    defaults |= {"objective": OBJECTIVE, "lengths": tiny.pair_lengths(pairs), "pad_token_id": tiny.PAD, "device": "cpu"}
    fetch = lambda rows: tiny.take(pairs, rows)
    for read in dpo_steps(model, optimizer, fetch, steps, PATH, start_step=start_step, **(defaults | options)):
        yield from read


class GradientRecorder(torch.optim.Optimizer):
    """An optimizer that changes nothing and keeps every step's full gradients as one vector."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model.parameters(), {"lr": 0.0, "fused": True})
        self.gradients: list[torch.Tensor] = []

    def step(self, closure=None):
        del closure
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        full = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
        self.gradients.append(torch.cat([g.flatten() for g in full]).clone())


def gradients(model, pairs: PairRows, steps: Sequence[Step], **options) -> list[torch.Tensor]:
    """Return each step's unclipped gradient, all parameters in one vector."""
    recorder = GradientRecorder(model)
    train(model, recorder, pairs, steps, **{"max_grad_norm": 1e9, **options})
    return recorder.gradients


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def from_rank_0(function, *args, **options):
    """Call it as if no policy's files matched its weights one to one."""
    why, sharded_load._why_whole = sharded_load._why_whole, lambda *_: "the test asks for it"
    try:
        return function(*args, **options)
    finally:
        sharded_load._why_whole = why
