"""Logs on local disk and behind a URI, read back as TensorBoard, W&B and MLflow would read them."""

import json
import math
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from dpo_ray import train_log
from dpo_ray.config import RunConfig
from dpo_ray.errors import ConfigError
from dpo_ray.flow import storage
from dpo_ray.stages import train

from .test_config import minimal


def config(*report_to: str) -> RunConfig:
    tree = minimal()
    return RunConfig.model_validate(tree | {"train": tree["train"] | {"report_to": report_to}})


def line(step: int, loss: float = 0.5) -> dict[str, float]:
    return {"step": step, "loss": loss / step, "rewards/margins": step / 8}


def lines(directory: Path | str) -> list[dict[str, float]]:
    return [json.loads(text) for text in storage.read_bytes(f"{directory}/metrics.jsonl").splitlines()]


def events(directory: Path) -> Iterator[Event]:
    """Every event of every file, by name as TensorBoard reads them. Records: length (8 bytes), crc, data, crc (4 each)."""
    for file in sorted((directory / "tensorboard").glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def points(directory: Path) -> dict[str, dict[int, float]]:
    """tag -> step -> value as TensorBoard shows them: a start event hides what came before it at its step and later."""
    found: dict[str, dict[int, float]] = {}
    for event in events(directory):
        if event.HasField("session_log"):
            found = {tag: {s: v for s, v in at.items() if s < event.step} for tag, at in found.items()}
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_log_has_a_line_and_a_point_of_every_step(tmp_path):
    log = train_log.open_log(str(tmp_path), config(), 0, [])
    log.write([line(1), line(2)])
    log.write([line(3)])
    log.close()
    assert lines(tmp_path) == [line(1), line(2), line(3)]
    assert points(tmp_path) == {
        "train/loss": {1: 0.5, 2: 0.25, 3: pytest.approx(0.5 / 3)},
        "train/rewards/margins": {1: 0.125, 2: 0.25, 3: 0.375},
    }


def test_log_lines_are_on_disk_as_soon_as_they_are_written(tmp_path):
    log = train_log.open_log(str(tmp_path), config(), 0, [])
    log.write([line(1)])
    assert lines(tmp_path) == [line(1)]
    log.close()


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo'], ids=["whole", "torn"])
def test_log_resumed_has_every_step_once(tmp_path, torn):
    """A checkpoint of step 3, a kill after step 5."""
    killed = train_log.open_log(str(tmp_path), config(), 0, [])
    killed.write([line(i, loss=1.0) for i in range(1, 6)])
    killed.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    resumed = train_log.open_log(str(tmp_path), config(), 0, [line(i, loss=1.0) for i in range(1, 4)])
    resumed.write([line(4, loss=2.0)])
    resumed.close()
    assert lines(tmp_path) == [line(1, 1.0), line(2, 1.0), line(3, 1.0), line(4, 2.0)]
    assert points(tmp_path)["train/loss"] == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3, 4: 0.5})


def test_log_started_again_from_the_first_step_keeps_nothing(tmp_path):
    for loss in (1.0, 2.0):
        log = train_log.open_log(str(tmp_path), config(), 0, [])
        log.write([line(1, loss)])
        log.close()
    assert lines(tmp_path) == [line(1, 2.0)]
    assert points(tmp_path)["train/loss"] == {1: 2.0}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_log_of_workers_that_live_on_beside_those_that_took_their_place_is_another_file(tmp_path):
    given_up = train_log.open_log(str(tmp_path), config(), 0, [])
    given_up.write([line(1), line(2)])
    log = train_log.open_log(str(tmp_path), config(), 0, [line(1)])
    given_up.write([line(3), line(4)])
    log.write([line(2)])
    given_up.close()
    log.close()
    assert lines(tmp_path) == [line(1), line(2)]


def test_log_behind_a_uri_is_not_published_by_workers_that_others_have_replaced():
    directory = "memory://replaced"
    given_up = train_log.open_log(directory, config(), 0, [], lambda: False)
    given_up.write([line(1), line(2)])
    log = train_log.open_log(directory, config(), 0, [])
    log.write([line(1)])
    log.close()
    given_up.close()
    assert lines(directory) == [line(1)]


def test_log_resumed_without_its_file_has_the_lines_of_the_checkpoint(tmp_path):
    train_log.open_log(str(tmp_path), config(), 0, [line(1), line(2)]).close()
    assert lines(tmp_path) == [line(1), line(2)]


def test_log_behind_a_uri_lies_there_from_publish_on_and_resumes_from_there():
    """`memory://` opens through fsspec, as any scheme does that Arrow lacks; it has neither append nor rename here."""
    uri = "memory://test-train-log/train"
    first = train_log.open_log(uri, config(), 0, [])
    first.write([line(1), line(2)])
    assert not storage.exists(f"{uri}/metrics.jsonl")
    first.publish()
    first.write([line(3)])  # and is killed
    assert lines(uri) == [line(1), line(2)]
    resumed = train_log.open_log(uri, config(), 0, [line(1), line(2)])
    resumed.write([line(3, loss=1.5)])
    resumed.close()
    assert lines(uri) == [line(1), line(2), line(3, 1.5)]
    assert len(storage.list_files(f"{uri}/tensorboard")) == 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_report_without_its_package_is_refused_when_the_plan_is_made(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(train_log.importlib.util, "find_spec", lambda asked: None)
    with pytest.raises(ConfigError, match=rf"report_to: {name} is not installed; .*pip install 'dpo-ray\[{name}\]'"):
        train.stage(config(name), 0, "policy", "round_00/reference")
    train.stage(config(), 0, "policy", "round_00/reference")


def test_report_to_mlflow_without_a_tracking_uri_is_refused(monkeypatch):
    monkeypatch.setattr(train_log.importlib.util, "find_spec", lambda asked: object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        train_log.check_reports(["mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    train_log.check_reports(["mlflow"])


def test_report_to_is_in_no_fingerprint(monkeypatch):
    monkeypatch.setattr(train_log.importlib.util, "find_spec", lambda asked: object())
    assert (
        train.stage(config("wandb"), 0, "policy", "round_00/reference").config
        == train.stage(config(), 0, "policy", "round_00/reference").config
    )


class Calls(types.ModuleType):
    """Stands for a package that need not be installed: takes every call and keeps it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return self if name in ("init", "active_run") else None

        return call

    @property
    def info(self) -> Any:
        return types.SimpleNamespace(run_id="run-7")

    def of(self, name: str) -> list[tuple[tuple, dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def package(request, monkeypatch) -> Calls:
    """The real packages are boundaries: they talk to servers."""
    made = Calls(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    return made


@pytest.mark.parametrize("package", ["wandb"], indirect=True)
def test_wandb_gets_every_step_in_one_run_over_a_resume(tmp_path, package, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for done in (0, 1):
        log = train_log.open_log(str(tmp_path), config("wandb"), 3, [line(1)][:done])
        log.write([line(done + 1)])
        log.close()
    (first, second) = (kwargs for _, kwargs in package.of("init"))
    assert (first["project"], first["name"], first["resume"]) == ("run", "run/round_03", "allow")
    assert first["id"] == second["id"]
    assert first["config"]["train"]["beta"] == 0.1
    logged = {kwargs["step"]: args[0] for args, kwargs in package.of("log")}
    assert logged == {
        1: {"train/loss": 0.5, "train/rewards/margins": 0.125},
        2: {"train/loss": 0.25, "train/rewards/margins": 0.25},
    }
    assert len(package.of("finish")) == 2


@pytest.mark.parametrize("package", ["wandb"], indirect=True)
def test_wandb_run_of_a_training_from_the_start_is_another_one(tmp_path, package):
    for _ in range(2):
        train_log.open_log(str(tmp_path), config("wandb"), 0, []).close()
    first, second = (kwargs["id"] for _, kwargs in package.of("init"))
    assert first != second


@pytest.mark.parametrize("package", ["mlflow"], indirect=True)
def test_mlflow_gets_every_step_in_one_run_over_a_resume(tmp_path, package):
    for done in (0, 1):
        log = train_log.open_log(str(tmp_path), config("mlflow"), 3, [line(1)][:done])
        log.write([line(done + 1)])
        log.close()
    assert package.of("set_experiment") == [(("run",), {})] * 2
    assert [kwargs for _, kwargs in package.of("start_run")] == [
        {"run_id": None, "run_name": "run/round_03"},
        {"run_id": "run-7", "run_name": "run/round_03"},
    ]
    (parameters,) = package.of("log_params")
    assert parameters[0][0]["beta"] == 0.1
    logged = {kwargs["step"]: args[0]["train/loss"] for args, kwargs in package.of("log_metrics")}
    assert logged == {1: 0.5, 2: 0.25}


@pytest.mark.parametrize("package", ["wandb", "mlflow"], indirect=True)
def test_log_calls_no_package_that_is_not_asked_for(tmp_path, package):
    log = train_log.open_log(str(tmp_path), config(), 0, [])
    log.write([line(1)])
    log.close()
    assert package.calls == []


def test_log_keeps_what_is_no_number(tmp_path):
    log = train_log.open_log(str(tmp_path), config(), 0, [])
    log.write([{"step": 1, "loss": math.nan}])
    log.close()
    assert math.isnan(lines(tmp_path)[0]["loss"])
