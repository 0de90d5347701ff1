"""Read the prompt source once into PROMPTS: train rows in a fixed permutation, eval rows held out.

Files `train-*` and `eval-*`; round r later takes rows r * prompts_per_round onwards of the train files. Unusable rows and
duplicates lie in quarantine/ with their reasons.
"""

from __future__ import annotations

import pyarrow as pa
import ray

from dpo_ray.config import RunConfig
from dpo_ray.errors import StageError
from dpo_ray.flow.artifact import Artifact, FileRecord, write_table
from dpo_ray.flow.parts import MAX_DEATHS, Part, first_cause, split_into_parts
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
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
        run=lambda context: _read(config, context),
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


def _read(config: RunConfig, context: StageContext) -> StageOutput:
    resources = config.prompts.resources
    task = ray.remote(_read_and_write).options(
        num_cpus=resources.cpus, label_selector=resources.node_labels, max_retries=MAX_DEATHS
    )
    try:
        return ray.get(task.remote(config, context.directory))
    except ray.exceptions.RayError as error:  # the user needs our message, not Ray's wrapping of it
        raise first_cause(error, "prompts") from None


def _read_and_write(config: RunConfig, directory: str) -> StageOutput:
    read = read_prompts(config.prompts, config.seed)
    rows = config.prompts.resources.rows_per_part
    files = _write(directory, "train", read.train, rows) + _write(directory, "eval", read.eval, rows)
    files += _write(directory, "quarantine/rows", read.quarantine, rows)
    metrics = {"train": read.train.num_rows, "eval": read.eval.num_rows}
    return StageOutput(files, read.rows_in, read.train.num_rows + read.eval.num_rows, read.dropped, metrics)


def _write(directory: str, name: str, table: pa.Table, rows: int) -> list[FileRecord]:
    slices = [table.slice(at, rows) for at in range(0, table.num_rows, rows)]
    return [write_table(directory, f"{name}-{i:05d}.parquet", s) for i, s in enumerate(slices)]
