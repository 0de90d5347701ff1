"""Where the metrics of training go: metrics.jsonl and TensorBoard always, W&B and MLflow where `train.report_to` asks.

In: the metrics of a few steps at a time, from rank 0, and after a resume those that the checkpoint has. Out: one line or
point a step.
Invariant: after a resume at step k each step is in metrics.jsonl once; TensorBoard hides, and W&B keeps, what was logged
after step k before. MLflow has such steps twice, with the same values.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_ray.config import Run
from dpo_ray.errors import ConfigError
from dpo_ray.flow import storage

Line = Mapping[str, float]
"""Metrics of a step; `step` counts the steps taken, from 1."""
LOG, TENSORBOARD, IDS = "metrics.jsonl", "tensorboard", "report_ids.json"
PREFIX = "train/"
"""Before the names in TensorBoard, W&B and MLflow, as transformers' Trainer and TRL have it."""


class Log(NamedTuple):
    """An open log; that of rank 0 writes."""

    write: Callable[[Sequence[Line]], None]
    publish: Callable[[], None]
    """Bring what is written to where the run lies, so that it is seen there; at every checkpoint, from any thread."""
    close: Callable[[], None]


SILENT = Log(lambda lines: None, lambda: None, lambda: None)
"""What the other ranks have."""


class _Sink(NamedTuple):
    write: Callable[[Line], object]
    close: Callable[[], object]


def check_reports(report_to: Sequence[str]) -> None:
    """Look for what the reports need, before anything runs.

    Raises:
        ConfigError: a package is missing, or MLflow is not told where to write.
    """
    for name in report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.report_to: {name} is not installed; install it on every node with `pip install 'dpo-ray[{name}]'`, or "
                "take it out"
            )
    if "mlflow" in report_to and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            "train.report_to: mlflow needs MLFLOW_TRACKING_URI, seen by every worker (in a submitted job: env_vars of its "
            "runtime_env); without it the metrics would lie in a worker's own directory"
        )


def open_log(
    directory: str, config: Run, round_: int | None, kept: Sequence[Line], ours: Callable[[], bool] = lambda: True
) -> Log:
    """Open the log of a round's training.

    Args:
        directory: of the stage; a path, or a URI, for which files are written locally until `publish`.
        kept: lines of the steps that a checkpoint has; metrics.jsonl starts with these, whatever it held.
        ours: whether these workers may still write to where the run lies (see train_owner).
    """
    local, done = storage.is_local(directory), len(kept)
    target = Path(storage.filesystem(directory)[1] if local else tempfile.mkdtemp())
    if not done:
        storage.delete_directory(f"{directory}/{TENSORBOARD}")
    ids = storage.read_json(f"{directory}/{IDS}") if done and storage.exists(f"{directory}/{IDS}") else {}
    sinks = [_jsonl(target / LOG, kept), _tensorboard(target / TENSORBOARD, done)]
    if "wandb" in config.train.report_to:
        sinks.append(_wandb(target, config, round_, ids))
    if "mlflow" in config.train.report_to:
        sinks.append(_mlflow(config, round_, ids))
    if ids:
        storage.write_json(f"{directory}/{IDS}", ids)

    def write(lines: Sequence[Line]) -> None:
        for sink in sinks:
            for line in lines:
                sink.write(line)

    def publish() -> None:
        if not local and ours():
            storage.copy_directory(str(target), directory)

    def close() -> None:
        for sink in sinks:
            sink.close()
        publish()
        if not local:
            shutil.rmtree(target)

    return Log(write, publish, close)


def _jsonl(path: Path, kept: Sequence[Line]) -> _Sink:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_suffix(".begun")
    file = made.open("w", buffering=1)  # by line: a kill leaves whole lines, and the last ones are seen at once

    def write(line: Line) -> None:
        file.write(json.dumps(line) + "\n")

    for line in kept:
        write(line)
    made.replace(path)  # another file, not the same one cut short: workers that were given up and live on write to the old
    return _Sink(write, file.close)


def _tensorboard(path: Path, done: int) -> _Sink:
    from tensorboardX import SummaryWriter

    # Event files cannot be cut: a new one tells TensorBoard to hide the steps from here on that older ones have.
    # Its name has the seconds of now; with the steps behind them a quick resume does not overwrite the one before.
    writer = SummaryWriter(logdir=str(path), purge_step=done + 1, flush_secs=10, filename_suffix=f".{done:09d}")

    def write(line: Line) -> None:
        for name, value in _points(line).items():
            writer.add_scalar(name, value, int(line["step"]))

    return _Sink(write, writer.close)


def _wandb(directory: Path, config: Run, round_: int | None, ids: dict[str, str]) -> _Sink:
    wandb: Any = importlib.import_module("wandb")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", config.name),
        name=_name(config, round_),
        id=ids.setdefault("wandb", uuid.uuid4().hex[:12]),
        resume="allow",
        config=config.model_dump(mode="json"),
        dir=str(directory),
    )
    # W&B drops a step that it has already, so what is trained again after a resume is not logged twice.
    return _Sink(lambda line: run.log(_points(line), step=int(line["step"])), run.finish)


def _mlflow(config: Run, round_: int | None, ids: dict[str, str]) -> _Sink:
    mlflow: Any = importlib.import_module("mlflow")
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", config.name))
    mlflow.start_run(run_id=ids.get("mlflow"), run_name=_name(config, round_))
    if "mlflow" not in ids:
        mlflow.log_params(config.train.model_dump(mode="json"))
        ids["mlflow"] = mlflow.active_run().info.run_id
    return _Sink(lambda line: mlflow.log_metrics(_points(line), step=int(line["step"])), mlflow.end_run)


def _name(config: Run, round_: int | None) -> str:
    return config.name if round_ is None else f"{config.name}/round_{round_:02d}"


def _points(line: Line) -> dict[str, float]:
    return {f"{PREFIX}{name}": value for name, value in line.items() if name != "step"}
