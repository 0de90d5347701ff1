"""Read the source of preferences once into COMPARISONS: train rows in a fixed permutation, eval rows held out.

Files `train-*` and `eval-*`; round r later takes rows r * pairs_per_round onwards of the train files. Unusable rows and
duplicates lie in quarantine/ with their reasons.
"""

from __future__ import annotations

import functools

from dpo_ray.config import PreferenceRun
from dpo_ray.errors import StageError
from dpo_ray.flow.artifact import Artifact
from dpo_ray.flow.part_commits import Part
from dpo_ray.flow.parts import split_into_parts
from dpo_ray.flow.stage import Needs, Stage
from dpo_ray.intake_files import take_in_files
from dpo_ray.preferences import read_preferences
from dpo_ray.sources import source_fingerprint

VERSION = 1
ROWS_PER_FILE = 4096
# What is decided later, by the round's tokenisation, or is only a limit.
LATER = {"resources", "max_dropped", "label_source", "max_prompt_tokens", "max_tokens", "too_long", "chat_template_kwargs"}


def stage(config: PreferenceRun) -> Stage:
    block = config.preferences
    return Stage(
        name="preferences",
        round=None,
        version=VERSION,
        config={"seed": config.seed, **block.model_dump(mode="json", exclude=LATER)},
        inputs={},
        external=lambda: source_fingerprint(block),
        needs=Needs(1, block.resources.cpus, 0.0, "reader", node_labels=block.resources.node_labels),
        check=lambda artifact: check_enough(artifact, config),  # before any round is paid for
        resources=block.resources.model_dump(mode="json"),
        run=lambda context: take_in_files(
            functools.partial(read_preferences, block, config.seed),
            context.directory,
            rows_per_file=ROWS_PER_FILE,
            resources=block.resources,
        ),
    )


def slice_of_round(preferences: Artifact, config: PreferenceRun, round_: int) -> list[Part]:
    """The parts of a round's own slice of the permutation; all of it without `pairs_per_round`.

    Raises:
        StageError: the source has fewer pairs than the rounds need.
    """
    check_enough(preferences, config)
    rows = config.preferences.resources.rows_per_part
    if config.pairs_per_round is None:
        return split_into_parts(preferences, rows, prefix="train-")
    start = round_ * config.pairs_per_round
    return split_into_parts(preferences, rows, prefix="train-", start=start, stop=start + config.pairs_per_round)


def check_enough(preferences: Artifact, config: PreferenceRun) -> None:
    """Raise when the source has fewer pairs for training than the rounds need."""
    available = sum(f.rows or 0 for f in preferences.tables("train-"))
    needed = config.rounds * (config.pairs_per_round or 1)
    if needed > available:
        raise StageError(
            f"preferences: rounds={config.rounds} with pairs_per_round={config.pairs_per_round} need {needed} pairs, but the "
            f"source has {available} for training after {config.preferences.eval_pairs} were held out; lower pairs_per_round "
            "or rounds, or give more pairs"
        )


def held_out(preferences: Artifact, config: PreferenceRun) -> list[Part]:
    """The parts of the held-out pairs."""
    return split_into_parts(preferences, config.preferences.resources.rows_per_part, prefix="eval-")
