"""Row-wise stages: the two ends of every Dataset, and commits part by part.

A part is a fixed, keyed set of rows. `run_parts` makes one block per part (one map task per part descriptor, never
`read_parquet` over many files, which merges small ones), runs the stage's function on the Dataset, and lets a sink task
write and commit each part (part_commits): rows with a DROP_REASON to quarantine/, the rest conformed to the stage's schema,
then `_parts/<part>.json`, which is the part's commit. Resume is an anti-join over those records.

A stage never removes a row: it marks DROP_REASON, so every part reaches the sink, and the sink checks that every id that
went in came out once or was dropped by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

from dpo_ray.errors import DpoRayError, StageError, raised_last
from dpo_ray.flow.artifact import Artifact
from dpo_ray.flow.fingerprint import fingerprint
from dpo_ray.flow.part_commits import (
    DROP_REASON,
    Grain,
    Part,
    PartRecord,
    Slice,
    check_unique,
    committed_parts,
    load_part,
    make_sink,
)
from dpo_ray.flow.stage import StageContext, StageOutput

RETRY_ADVICE = "\nFailed to apply UDF transform after "  # Ray Data appends its settings to the message of every error
MAX_DEATHS = 8
"""How often Ray Data's task, or actor, may lose its process or node; without a limit a crash that comes again never ends."""


class Tasks(NamedTuple):
    """How a function runs as Ray Data tasks on whole parts.

    Maps with equal Tasks are fused: a part is then loaded, worked on and committed in one process. Each process costs
    seconds of CPU to start.
    """

    cpus: float = 0.25
    at_a_time: int | None = None
    """None: as many as fit."""
    node_labels: Mapping[str, str] = {}

    def options(self) -> dict[str, Any]:
        return {
            "num_cpus": self.cpus,
            "compute": TaskPoolStrategy(self.at_a_time),
            "max_retries": MAX_DEATHS,
            "label_selector": dict(self.node_labels),
        }


class Actors(NamedTuple):
    """How a class, which holds a model, runs as Ray Data actors on whole parts."""

    min_actors: int
    max_actors: int
    cpus: float
    gpus: float
    node_labels: Mapping[str, str] = {}

    def options(self) -> dict[str, Any]:
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "compute": ActorPoolStrategy(min_size=self.min_actors, max_size=self.max_actors),
            "max_restarts": MAX_DEATHS,
            "max_task_retries": MAX_DEATHS,
            "label_selector": dict(self.node_labels),
        }


def split_into_parts(
    artifact: Artifact, rows_per_part: int, *, prefix: str = "part-", start: int = 0, stop: int | None = None
) -> list[Part]:
    """Cut rows start..stop of an artifact's table, in file order, into parts of at most `rows_per_part` rows."""
    parts: list[Part] = []
    slices: list[Slice] = []
    room, position = rows_per_part, 0
    for file in artifact.tables(prefix):
        rows = file.rows or 0
        at, end = max(start - position, 0), rows if stop is None else min(stop - position, rows)
        position += rows
        while at < end:
            take = min(room, end - at)
            slices.append(Slice(artifact.uri(file), at, at + take))
            at, room = at + take, room - take
            if room == 0:
                parts.append(Part(f"part-{len(parts):05d}", tuple(slices)))
                slices, room = [], rows_per_part
    if slices:
        parts.append(Part(f"part-{len(parts):05d}", tuple(slices)))
    return parts


def run_parts(
    transform: Callable[[Dataset], Dataset],
    parts: Sequence[Part],
    context: StageContext,
    grain: Grain,
    *,
    stage: str,
    ends: Tasks | None = None,
    max_dropped: float = 1.0,
    count: Callable[[pa.Table], Mapping[str, float]] = lambda table: {},
    directory: str | None = None,
) -> StageOutput:
    """Run a Dataset -> Dataset function over the parts that are not committed yet, and commit each.

    Args:
        transform: The stage's own function; rows carry PART, and DROP_REASON (null: kept).
        ends: How parts are loaded and committed; the transform's own Tasks fuse with it.
        count: Counters of one part's kept rows, e.g. tokens, with every column that the transform gave them; summed over
            parts for progress and metrics.
        directory: Where to write, when it is not the stage's own directory.
        max_dropped: The stage fails above this share of dropped rows.

    Raises:
        StageError: there are no rows, rows were lost or doubled, or too many were dropped.
    """
    directory = directory or context.directory
    if not parts:
        raise StageError(f"{stage}: no rows to work on; the stage before it committed none")
    attempts = {p.name: fingerprint({"stage": context.fingerprint, "slices": [list(s) for s in p.slices]}) for p in parts}
    records = committed_parts(directory, attempts)
    todo = [p for p in parts if p.name not in records]
    total = sum(p.rows for p in parts)
    sink = make_sink(directory, attempts, {p.name: p for p in parts}, grain, stage, count)

    def report() -> None:
        counters = _sum_counters(records.values())
        counters["dropped"] = sum(n for r in records.values() for n in r.dropped.values())
        context.progress.update(sum(r.rows_in for r in records.values()), total, counters)

    context.progress.begin(stage)
    report()
    if todo:
        ray.data.DataContext.get_current().raise_original_map_exception = True  # its wrapping loses the cause on the way here
        descriptors = [{"part": p.name, "slices": [s._asdict() for s in p.slices]} for p in todo]
        source = ray.data.from_items(descriptors, override_num_blocks=len(descriptors))
        options = ends or Tasks(at_a_time=_tasks_beside_actors())
        sunk = map_parts(transform(map_parts(source, load_part, options)), sink, options)
        try:
            for row in sunk.iter_rows():
                record = PartRecord.model_validate_json(row["record"])
                records[record.part] = record
                report()
        except ray.exceptions.RayError as error:
            raise first_cause(error, stage) from error
    output = _summary(parts, records, stage, max_dropped)
    check_unique(directory, [r.file for r in records.values() if r.file], grain.key_out, stage)
    return output


def map_parts(ds: Dataset, work: Any, how: Tasks | Actors, *constructor_args: Any) -> Dataset:
    """Run a function, or a class that is made with `constructor_args`, on every part as one pyarrow table."""
    # Not `map_batches`: it takes no GPUs without a batch size, and with one Ray joins small parts and cuts large ones.
    options = how.options()
    if isinstance(how, Actors):
        options["fn_constructor_args"] = constructor_args
    return ds.map_batches_internal(work, batch_size=None, batch_format="pyarrow", **options)


def _tasks_beside_actors() -> int:
    """How many loads, and how many sinks, run at a time: a few, because each is a process to start and they are short."""
    return max(2, int(ray.cluster_resources().get("CPU", 0)) // 4)


def mark_dropped(table: pa.Table, reasons: Sequence[str | None]) -> pa.Table:
    """Set DROP_REASON where `reasons` has one; a reason that is already there stays. `reason: detail` counts as `reason`."""
    column = pa.array(reasons, pa.string())
    index = table.column_names.index(DROP_REASON)
    return table.set_column(index, DROP_REASON, pc.coalesce(table[DROP_REASON], column))


def first_cause(error: BaseException, stage: str) -> DpoRayError:
    """Our own error inside Ray's wrappings as it was raised; any other as a StageError that names its kind."""
    if isinstance(error, WorkerCrashedError | RayActorError) and not isinstance(error, RayTaskError):
        if "creation task" in str(error):
            raised = raised_last(str(error))
            return raised if isinstance(raised, DpoRayError) else StageError(f"{stage}: {raised}")
        return StageError(
            f"{stage}: its process died more than {MAX_DEATHS} times at the same rows: {str(error).splitlines()[0]} The usual "
            "reasons are too little memory, and a crash in native code of the model or function; see Ray's worker logs"
        )
    innermost = error
    while inner := getattr(innermost, "cause", None) or innermost.__cause__:
        if inner.args and isinstance(inner.args[0], str):
            inner.args = (inner.args[0].partition(RETRY_ADVICE)[0], *inner.args[1:])
        if isinstance(inner, DpoRayError):
            return inner
        if not str(inner):  # Ray Data's SystemException, a mark without a message
            break
        innermost = inner
    return StageError(f"{stage}: {type(innermost).__name__}: {innermost}")


def _sum_counters(records: Iterable[PartRecord]) -> dict[str, float]:
    total = Counter[str]()
    for record in records:
        total.update(record.counters)  # not `+`, which leaves out what is not positive
    return dict(total)


def _summary(parts: Sequence[Part], records: Mapping[str, PartRecord], stage: str, max_dropped: float) -> StageOutput:
    missing = [p.name for p in parts if p.name not in records]
    if missing:
        raise StageError(
            f"{stage}: {len(missing)} of {len(parts)} parts were not committed, the first is {missing[0]}; run again"
        )
    ordered = [records[p.name] for p in parts]
    rows_in = sum(r.rows_in for r in ordered)
    dropped = sum((Counter(r.dropped) for r in ordered), Counter())
    if sum(dropped.values()) > max_dropped * rows_in:
        raise StageError(
            f"{stage}: {sum(dropped.values())} of {rows_in} rows dropped ({_by_reason(dropped)}), more than the allowed share "
            f"of {max_dropped:g}; the rows and their reasons are in quarantine/ of the stage. Fix them, or raise max_dropped"
        )
    rows_out = sum(r.rows_out for r in ordered)
    if rows_out == 0:
        raise StageError(
            f"{stage}: every one of {rows_in} rows was dropped ({_by_reason(dropped)}); nothing is left to go on with"
        )
    files = [r.file for r in ordered if r.file] + [r.quarantine for r in ordered if r.quarantine]
    return StageOutput(files, rows_in, rows_out, dict(dropped), _sum_counters(ordered))


def _by_reason(dropped: Mapping[str, Any]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in sorted(dropped.items()))
