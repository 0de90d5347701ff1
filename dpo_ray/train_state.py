"""Checkpoints of a training run: committed by a record, written by train_saving, and resumed only when whole and its own.

    <directory>/step_00000100-<token>/{__<rank>_<i>.distcp, .metadata, metrics.jsonl, _checkpoint.json}

`_checkpoint.json` is written last and IS the commit: it lists every file with its hash, and says whose state it is. A
directory without it is what a crash left, and never read. Nothing is renamed or overwritten, so a full disk or a kill at
any moment leaves the checkpoints before as they were.

Ray Train's own checkpoint manager is not used: its report holds a step until the controller has polled, its list of
checkpoints is one file written in place, and it hands back the latest checkpoint whether or not it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from dpo_ray.errors import StageError
from dpo_ray.flow import storage
from dpo_ray.flow.artifact import FileRecord
from dpo_ray.learn import checkpoint
from dpo_ray.train_owner import taken_over

RECORD, LOG = "_checkpoint.json", "metrics.jsonl"
CACHE = Path(tempfile.gettempdir()) / f"dpo-ray-checkpoints-{os.getuid() if hasattr(os, 'getuid') else 0}"

Log = list[dict[str, float]]


class Where(NamedTuple):
    """The checkpoints of one run, and what they must have been written for."""

    directory: str
    """Path or URI that every node sees."""
    fingerprint: str
    """Of the stage: its config and inputs."""
    policy: str
    """Identity of the policy that training starts from."""
    group: dist.ProcessGroup
    """All ranks, over gloo: also beside nccl, and used by no step."""
    local_rank: int = 0
    """Of this rank on its node: rank 0 there fetches what lies under a URI."""
    ours: Callable[[], bool] = lambda: True
    """Whether these workers may still write there; asked on rank 0 (see train_owner)."""


class Record(BaseModel):
    """The commit of one checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    policy: str
    step: int
    """Steps taken."""
    world_size: int
    files: list[FileRecord]
    committed_at: str


def check_ours(where: Where) -> None:
    """Every rank calls it before the run is written to.

    Raises:
        StageError: on every rank: other workers have taken the run over.
    """
    if not agreed(where, where.ours):
        raise taken_over(where.directory)


def committed(directory: str) -> list[tuple[str, Record | None]]:
    """(name, record) of every checkpoint, newest first; the record is None where a write did not end."""
    found = {name.split("/")[0] for name in storage.list_files(directory, recursive=True) if name.startswith("step_")}
    known = [(name, _read_record(f"{directory}/{name}/{RECORD}")) for name in found]
    order = lambda item: (item[0].split("-")[0], item[1].committed_at if item[1] else "", item[0])
    return sorted(known, key=order, reverse=True)


def _read_record(uri: str) -> Record | None:
    try:
        return Record.model_validate_json(storage.read_bytes(uri))
    except (FileNotFoundError, ValidationError):
        return None


def resume(where: Where, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, Log]:
    """Load the newest whole checkpoint into model and optimizer; return the steps taken and their log. Every rank calls it.

    Where nothing was ever committed, that is (0, []). A damaged checkpoint is passed over for the one before it.

    Raises:
        StageError: a checkpoint of another model or config lies here, or all that were committed are damaged.
    """
    known = agreed(where, lambda: committed(where.directory))
    damaged: dict[str, str] = {}
    for name, record in known:
        if record is None:
            continue
        _check_owner(where, name, record)
        with _fetched(where, name, record) as (near, problems):
            if problems:
                damaged[name] = problems[0]
                continue
            step = checkpoint.load_checkpoint(near, model, optimizer, where.group)
            log = [json.loads(line) for line in (near / LOG).read_bytes().splitlines()]
        if dist.get_rank(where.group) == 0:
            for other in damaged:  # else it would count as one of those that are kept
                storage.delete_directory(f"{where.directory}/{other}")
        return step, log
    if damaged:
        what = "; ".join(f"{name}: {problem}" for name, problem in damaged.items())
        raise StageError(
            f"train: no checkpoint in {where.directory} is whole: {what}. Restore the files, or delete that directory to train "
            "from the start"
        )
    return 0, []


def _check_owner(where: Where, name: str, record: Record) -> None:
    found = {"policy": record.policy, "fingerprint of config and inputs": record.fingerprint}
    wanted = {"policy": where.policy, "fingerprint of config and inputs": where.fingerprint}
    other = [f"{what} {found[what]}, expected {wanted[what]}" for what in found if found[what] != wanted[what]]
    if other:
        raise StageError(
            f"train: the checkpoint {name} in {where.directory} is of another model or config: {'; '.join(other)}. Delete that "
            "directory, or use another `name` or `root`"
        )


@contextmanager
def _fetched(where: Where, name: str, record: Record) -> Iterator[tuple[Path, list[str]]]:
    """The checkpoint as a local directory, and what is wrong with it; every rank gets the same list.

    DCP unpickles, so every file is held to its hash before anything is opened.
    """
    uri = f"{where.directory}/{name}"
    rank, world_size = dist.get_rank(where.group), dist.get_world_size(where.group)
    near, scratch = Path(storage.filesystem(uri)[1]), None
    share: Sequence[FileRecord] = record.files[rank::world_size]
    if not storage.is_local(uri):
        near = CACHE / f"{where.fingerprint[:12]}-{name}"
        share = record.files if where.local_rank == 0 else []
        scratch = near if where.local_rank == 0 else None
    try:
        if scratch:
            CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
            storage.delete_directory(str(scratch))
            storage.copy_directory(uri, str(scratch))
        every: list[Any] = [None] * world_size
        found = [p for file in share if (p := _problem(near, file))]
        if rank == 0 or scratch:
            found += _strange(near, record)
        dist.all_gather_object(every, found, group=where.group)
        yield near, [problem for own in every for problem in own]
        dist.barrier(where.group)  # the others may still be reading
    finally:
        if scratch:
            storage.delete_directory(str(scratch))


def _problem(directory: Path, file: FileRecord) -> str | None:
    path = directory / file.path
    if not path.is_file():
        return f"{file.path} is missing"
    if (size := path.stat().st_size) != file.bytes:
        return f"{file.path} has {size} bytes, expected {file.bytes}"
    return None if sha256(path) == file.sha256 else f"{file.path} has other contents than were written"


def _strange(directory: Path, record: Record) -> list[str]:
    """What lies there for DCP to open (`.metadata`, also `__<rank>.metadata`, and shards) without a hash in the record."""
    known = {file.path for file in record.files}
    there = {path.name for path in directory.glob("*") if path.name.endswith((".metadata", ".distcp"))} | {".metadata"}
    return [f"{name} is not in its {RECORD}" for name in sorted(there - known)]


def agreed(where: Where, value: Callable[[], Any]) -> Any:
    """What it is on rank 0."""
    box = [value() if dist.get_rank(where.group) == 0 else None]
    dist.broadcast_object_list(box, group_src=0, group=where.group)
    return box[0]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lines(log: Log) -> bytes:
    """The log as JSONL, one object a step."""
    return "".join(json.dumps(metrics) + "\n" for metrics in log).encode()
