"""What a training worker minimises: over pairs (DPO), or over assistant turns (SFT). In: what stages/train.py hands to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from dpo_ray.config import Round, Run, SftRun, SftTrain, Train
from dpo_ray.pair_table import PairTable, columns_of
from dpo_ray.turn_table import TurnTable

START_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""How far the loss of step 0 may lie from its known value, by compute type; an engine's own values round as bfloat16 does."""
OF_PAIRS = ("loss", "rewards/margins", "rewards/accuracies", "kl_ref_to_policy", "step_time_s", "tokens_per_s")
OF_TURNS = ("loss", "step_time_s", "tokens_per_s")


class Work(NamedTuple):
    """A table, and how steps over it are taken."""

    table: PairTable | TurnTable
    steps: Callable[..., Iterator[list[dict[str, float]]]]
    """(model, optimizer, plan, path) and the keyword arguments that every loop has."""
    shown: tuple[str, ...]
    """Metrics of the progress line."""
    num_targets: Any = None
    """(rows,) tokens that the loss is of; None where it is of all completion tokens."""


def open_work(arguments: dict[str, Any]) -> Work:
    """Open this node's copy of the table, as the run's kind asks for it.

    Raises:
        StageError: the table has no rows, or not what the loss needs.
    """
    config: Run = arguments["config"]
    if isinstance(config, SftRun):
        turns = TurnTable(arguments["tables"], arguments["table_hash"])
        return Work(turns, partial(_sft_steps, turns, config.train), OF_TURNS, turns.num_targets)
    pairs = PairTable(arguments["tables"], columns_of(config.train), arguments["table_hash"])
    tolerance = start_tolerance(config, arguments["reference"], arguments["policy"].identity)
    return Work(pairs, partial(_dpo_steps, pairs, config.train, tolerance), OF_PAIRS)


def _dpo_steps(
    pairs: PairTable, block: Train, tolerance: float | None, model: Any, optimizer: Any, plan: Any, path: Any, **loop: Any
) -> Iterator[Any]:
    from dpo_ray.learn.dpo import dpo_steps
    from dpo_ray.learn.losses import Term
    from dpo_ray.learn.objective import Objective

    objective = Objective([Term(*term) for term in block.terms()], block.beta, block.wpo, block.ld_alpha)
    return dpo_steps(model, optimizer, pairs.fetch, plan, path, objective, pairs.lengths, start_tolerance=tolerance, **loop)


def _sft_steps(
    turns: TurnTable, block: SftTrain, model: Any, optimizer: Any, plan: Any, path: Any, **loop: Any
) -> Iterator[Any]:
    from dpo_ray.learn.sft import sft_steps

    table = (turns.lengths, turns.num_targets)
    return sft_steps(model, optimizer, turns.fetch, plan, path, *table, mean_over=block.mean_over, **loop)


def start_tolerance(config: Round, reference: str | None, start: str) -> float | None:
    """How far the loss of step 0 may lie from its known value; None where it is not known.

    Args:
        reference: identity of the policy that the pairs have log-probabilities of, if any.
        start: of the one that training starts from.
    """
    if reference != start:
        return None
    return START_TOLERANCE["bfloat16" if config.reference.reuse == "sampler" else config.train.dtype]
