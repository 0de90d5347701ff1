"""Read the source of preferences once into COMPARISONS: train rows in a fixed permutation, eval rows held out.

Files `train-*` and `eval-*`; round r later takes rows r * pairs_per_round onwards of the train files. Unusable rows and
duplicates lie in quarantine/ with their reasons.
"""

from __future__ import annotations

import pyarrow as pa
import ray

from dpo_ray.config import PreferenceRun
from dpo_ray.errors import StageError
from dpo_ray.flow.artifact import Artifact, FileRecord, write_table
from dpo_ray.flow.parts import MAX_DEATHS, Part, first_cause, split_into_parts
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
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
        run=lambda context: _read(config, context),
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


def _read(config: PreferenceRun, context: StageContext) -> StageOutput:
    resources = config.preferences.resources
    task = ray.remote(_read_and_write).options(
        num_cpus=resources.cpus, label_selector=resources.node_labels, max_retries=MAX_DEATHS
    )
    try:
        return ray.get(task.remote(config, context.directory))
    except ray.exceptions.RayError as error:  # the user needs our message, not Ray's wrapping of it
        raise first_cause(error, "preferences") from None


def _read_and_write(config: PreferenceRun, directory: str) -> StageOutput:
    read = read_preferences(config.preferences, config.seed)
    files = _write(directory, "train", read.train) + _write(directory, "eval", read.eval)
    files += _write(directory, "quarantine/rows", read.quarantine)
    metrics = {"train": read.train.num_rows, "eval": read.eval.num_rows}
    return StageOutput(files, read.rows_in, read.train.num_rows + read.eval.num_rows, read.dropped, metrics)


def _write(directory: str, name: str, table: pa.Table) -> list[FileRecord]:
    slices = [table.slice(at, ROWS_PER_FILE) for at in range(0, table.num_rows, ROWS_PER_FILE)]
    return [write_table(directory, f"{name}-{i:05d}.parquet", s) for i, s in enumerate(slices)]
