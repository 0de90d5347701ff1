"""Checkpoints of a training run: written while it goes on, committed by a record, and resumed only when whole and its own.

    <directory>/step_00000100-<token>/{__<rank>_<i>.distcp, .metadata, metrics.jsonl, _checkpoint.json}

`_checkpoint.json` is written last and IS the commit: it lists every file with its hash, and says whose state it is. A
directory without it is what a crash left, and never read. Nothing is renamed or overwritten, so a full disk or a kill at
any moment leaves the checkpoints before as they were.

Ray Train's own checkpoint manager is not used: its report holds a step until the controller has polled, its list of
checkpoints is one file written in place, and it hands back the latest checkpoint whether or not it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from dpo_ray.errors import StageError
from dpo_ray.flow import storage
from dpo_ray.flow.artifact import FileRecord
from dpo_ray.learn import checkpoint
from dpo_ray.train_owner import taken_over

RECORD, LOG = "_checkpoint.json", "metrics.jsonl"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CACHE = Path(tempfile.gettempdir()) / f"dpo-ray-checkpoints-{os.getuid() if hasattr(os, 'getuid') else 0}"
LAST_WRITE_TIMEOUT_S = 30.0
"""How long a run that fails still waits for the checkpoint that is being written."""

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


@contextmanager
def saving(
    where: Where,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    every: int,
    num_steps: int,
    kept: int,
    publish: Callable[[Log], object] = id,
) -> Iterator[Callable[[int, Log, bool], None]]:
    """Give a function to call after every step with the steps taken, their log, and whether to save now; every rank does.

    A checkpoint is due every `every` steps, after step `num_steps`, and when it is asked for. The call copies the state and
    returns; a thread writes it, one checkpoint at a time, and then deletes all but the newest `kept`. Leaving the block
    waits for the last.

    Args:
        publish: called on rank 0, in the thread, with the log of every checkpoint.

    Raises:
        StageError: out of the call after it, or on leaving: no space was left. What was committed before is as it was.
        CheckpointException, OSError: another failure to write.
    """
    writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    pending: Future[None] | None = None
    copied: Any = None

    def save(step: int, log: Log, now: bool = False) -> None:
        nonlocal pending, copied
        due = now or step % every == 0 or step == num_steps
        if pending and (due or pending.done()):
            pending.result()
            pending = None
        if due:
            copied = checkpoint.copy_state(model, optimizer, step, into=copied)
            pending = writer.submit(write, where, copied, list(log), kept, publish)

    try:
        yield save
        if pending:
            pending.result()
    finally:
        if pending:
            wait([pending], LAST_WRITE_TIMEOUT_S)
        writer.shutdown(wait=False, cancel_futures=True)


def write(where: Where, state: dict[str, Any], log: Log, kept: int, publish: Callable[[Log], object] = id) -> None:
    """Write one checkpoint, commit it and delete older ones; every rank calls it with its copy of the state."""
    check_ours(where)
    rank, step = dist.get_rank(where.group), state["step"]
    name, last = _agreed(where, lambda: (f"step_{step:08d}-{uuid.uuid4().hex[:8]}", _newest(where.directory)))
    uri = f"{where.directory}/{name}"
    outcomes: list[Any] = [None] * dist.get_world_size(where.group)
    dist.all_gather_object(outcomes, _written(where, uri, state, log), group=where.group)
    try:
        if errors := {i: error for i, (_, error) in enumerate(outcomes) if error}:
            raise _failure(where, step, last, kept, errors)
        if rank == 0:
            publish(log)
            record = Record(
                fingerprint=where.fingerprint,
                policy=where.policy,
                step=step,
                world_size=len(outcomes),
                files=[file for own, _ in outcomes for file in own],
                committed_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            )
            storage.write_bytes(f"{uri}/{RECORD}", record.model_dump_json(indent=2).encode())
    except Exception as error:
        if rank == 0:  # what is half written takes the space that the next attempt needs
            storage.delete_directory(uri)
        if isinstance(error, OSError) and error.errno in FULL:
            raise _failure(where, step, last, kept, {rank: _described(error)}) from error
        raise
    if rank == 0 and where.ours():
        _delete_others(where.directory, kept)


def check_ours(where: Where) -> None:
    """Every rank calls it before the run is written to.

    Raises:
        StageError: on every rank: other workers have taken the run over.
    """
    if not _agreed(where, where.ours):
        raise taken_over(where.directory)


def _written(where: Where, uri: str, state: dict[str, Any], log: Log) -> tuple[list[FileRecord], tuple[bool, str] | None]:
    """Records of this rank's files, or whether the disk was full and what went wrong: the other ranks must hear of it."""
    rank = dist.get_rank(where.group)
    try:
        with _near(uri) as near:
            near.mkdir(parents=True, exist_ok=True)
            checkpoint.write_state(state, near, where.group)
            if rank == 0:
                (near / LOG).write_bytes(lines(log))
            own = [p for p in sorted(near.iterdir()) if p.name.startswith(f"__{rank}_") or (rank == 0 and p.name[:2] != "__")]
            records = [FileRecord(path=p.name, rows=None, bytes=p.stat().st_size, sha256=_sha256(p)) for p in own]
            if not storage.is_local(uri):
                storage.copy_directory(str(near), uri)
        return records, None
    except (CheckpointException, Exception) as error:
        return [], _described(error)


def _described(error: BaseException) -> tuple[bool, str]:
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    full = any(isinstance(cause, OSError) and cause.errno in FULL for cause in causes)
    return full, "; ".join(sorted({f"{type(cause).__name__}: {cause}".splitlines()[0] for cause in causes}))


def _failure(where: Where, step: int, last: str, kept: int, errors: dict[int, tuple[bool, str]]) -> Exception:
    """StageError where the disk is full, which another attempt does not mend; else one that is worth another attempt."""
    said = "; ".join(f"rank {rank}: {message}" for rank, (_, message) in errors.items())
    what = f"train: the checkpoint of step {step} was not written to {where.directory}: {said}"
    if not any(full for full, _ in errors.values()):
        return OSError(what)
    scratch = "" if storage.is_local(where.directory) else f" (or in {tempfile.gettempdir()} of that node, where it is made)"
    return StageError(
        f"{what}. The checkpoints before it stay: free space there{scratch} and run the same command, which goes on from "
        f"{last}. train.checkpoints_kept is {kept}, and while one is written there is one more; a larger "
        "train.checkpoint_steps writes them less often"
    )


def _newest(directory: str) -> str:
    return next((f"step {record.step}" for _, record in committed(directory) if record), "the start")


def _delete_others(directory: str, kept: int) -> None:
    """Keep the newest committed checkpoints alone; the record goes first, so that no reader trusts a half-deleted one."""
    known = committed(directory)
    keep = [name for name, record in known if record][:kept]
    for name, record in known:
        if name in keep:
            continue
        if record:
            storage.delete_file(f"{directory}/{name}/{RECORD}")
        storage.delete_directory(f"{directory}/{name}")


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
    known = _agreed(where, lambda: committed(where.directory))
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
    return None if _sha256(path) == file.sha256 else f"{file.path} has other contents than were written"


def _strange(directory: Path, record: Record) -> list[str]:
    """What lies there for DCP to open (`.metadata`, also `__<rank>.metadata`, and shards) without a hash in the record."""
    known = {file.path for file in record.files}
    there = {path.name for path in directory.glob("*") if path.name.endswith((".metadata", ".distcp"))} | {".metadata"}
    return [f"{name} is not in its {RECORD}" for name in sorted(there - known)]


def lines(log: Log) -> bytes:
    """The log as JSONL, one object a step."""
    return "".join(json.dumps(metrics) + "\n" for metrics in log).encode()


def _agreed(where: Where, value: Callable[[], Any]) -> Any:
    """What it is on rank 0."""
    box = [value() if dist.get_rank(where.group) == 0 else None]
    dist.broadcast_object_list(box, group_src=0, group=where.group)
    return box[0]


@contextmanager
def _near(uri: str) -> Iterator[Path]:
    """Where DCP, which knows local files only, writes: the place itself, or a scratch directory."""
    if storage.is_local(uri):
        yield Path(storage.filesystem(uri)[1])
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
