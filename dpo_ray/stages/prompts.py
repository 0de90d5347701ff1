"""Read the prompt source once into PROMPTS: train rows in a fixed permutation, eval rows held out.

Files `train-*` and `eval-*`; round r later takes rows r * prompts_per_round onwards of the train files. Unusable rows and
duplicates lie in quarantine/ with their reasons.
"""

from __future__ import annotations

import functools

from dpo_ray.config import RunConfig
from dpo_ray.errors import StageError
from dpo_ray.flow.artifact import Artifact
from dpo_ray.flow.part_commits import Part
from dpo_ray.flow.parts import split_into_parts
from dpo_ray.flow.stage import Needs, Stage
from dpo_ray.intake_files import take_in_files
from dpo_ray.prompts import read_prompts, source_fingerprint

VERSION = 1


def stage(config: RunConfig) -> Stage:
    resources = config.prompts.resources
    return Stage(
        name="prompts",
        round=None,
        version=VERSION,
        config={"seed": config.seed, **config.prompts.model_dump(mode="json", exclude={"resources", "max_dropped"})},
        inputs={},
        external=lambda: source_fingerprint(config.prompts),
        needs=Needs(1, resources.cpus, 0.0, "reader", node_labels=resources.node_labels),
        check=lambda artifact: slice_of_round(artifact, config, config.rounds - 1),  # before any round is paid for
        resources=resources.model_dump(mode="json"),
        run=lambda context: take_in_files(
            functools.partial(read_prompts, config.prompts, config.seed),
            context.directory,
            rows_per_file=resources.rows_per_part,
            resources=resources,
        ),
    )


def slice_of_round(prompts: Artifact, config: RunConfig, round_: int) -> list[Part]:
    """The parts of a round's own slice of the permutation.

    Raises:
        StageError: the source has fewer prompts than the rounds need.
    """
    available = sum(f.rows or 0 for f in prompts.tables("train-"))
    start, stop = round_ * config.prompts_per_round, (round_ + 1) * config.prompts_per_round
    if stop > available:
        raise StageError(
            f"round {round_} needs prompts {start} to {stop}, but the source has {available} for training after "
            f"{config.prompts.eval_prompts} were held out; lower prompts_per_round, or give more prompts"
        )
    return split_into_parts(prompts, config.generate.resources.rows_per_part, prefix="train-", start=start, stop=stop)


def held_out(prompts: Artifact, config: RunConfig) -> list[Part]:
    """The parts of the held-out prompts."""
    return split_into_parts(prompts, config.generate.resources.rows_per_part, prefix="eval-")
