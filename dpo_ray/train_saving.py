"""Writing the checkpoints of a training run while it goes on; see train_state for what lies where, and for reading them."""

from __future__ import annotations

import errno
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from dpo_ray.errors import StageError
from dpo_ray.flow import storage
from dpo_ray.flow.artifact import FileRecord
from dpo_ray.learn import checkpoint
from dpo_ray.train_state import LOG, RECORD, Log, Record, Where, agreed, check_ours, committed, lines, sha256

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LAST_WRITE_TIMEOUT_S = 30.0
"""How long a run that fails still waits for the checkpoint that is being written."""


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
    name, last = agreed(where, lambda: (f"step_{step:08d}-{uuid.uuid4().hex[:8]}", _newest(where.directory)))
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
            records = [FileRecord(path=p.name, rows=None, bytes=p.stat().st_size, sha256=sha256(p)) for p in own]
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


@contextmanager
def _near(uri: str) -> Iterator[Path]:
    """Where DCP, which knows local files only, writes: the place itself, or a scratch directory."""
    if storage.is_local(uri):
        yield Path(storage.filesystem(uri)[1])
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
