"""Take a plan through the cluster: skip what is committed, run the rest in order, commit each by its manifest.

Decisions (`decide`) are separate from effects (`run_plan`). A stage is skipped when its fingerprint is committed; run
when nothing is committed or it was asked for again (`--redo`); run after moving the old output to `superseded/` when only
its inputs changed; and refused when its own config changed, with the differing fields and the ways out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from dpo_ray.errors import StageError, StaleArtifactError
from dpo_ray.flow import cluster, fit, head, storage, waiting
from dpo_ray.flow.artifact import MANIFEST, Artifact, Manifest, read_artifact, write_manifest
from dpo_ray.flow.fingerprint import differing_fields, fingerprint
from dpo_ray.flow.lease import Lease
from dpo_ray.flow.metrics import Measured
from dpo_ray.flow.progress import Progress
from dpo_ray.flow.pulse import pulse
from dpo_ray.flow.stage import Engine, EngineSpec, Stage, StageContext, StageOutput
from dpo_ray.flow.versions import git_commit, library_versions


class Action(StrEnum):
    SKIP = "done"
    RUN = "run"
    REDO = "run again"
    PENDING = "run, after its inputs"


@dataclass(frozen=True)
class Outcome:
    """One line of the closing table."""

    stage: Stage
    artifact: Artifact
    skipped: bool


def identity(stage: Stage, inputs: Mapping[str, Artifact], external: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the fingerprint of a stage is the hash of."""
    return {
        "version": stage.version,
        "config": dict(stage.config),
        "inputs": {role: artifact.manifest.output_hash for role, artifact in inputs.items()},
        "external": dict(external),
    }


def decide(stage: Stage, directory: str, wanted: Mapping[str, Any], *, redo: bool) -> Action:
    """What to do with a stage whose inputs are committed.

    Raises:
        StaleArtifactError: it is committed under another config of its own.
    """
    committed = read_artifact(directory)
    if committed is None:
        return Action.RUN
    if redo:
        return Action.REDO
    recorded = committed.manifest.identity
    if committed.manifest.fingerprint == fingerprint(wanted):
        return Action.SKIP
    own = ("version", "config", "external")
    changed = differing_fields({k: recorded.get(k) for k in own}, {k: wanted[k] for k in own})
    if changed:
        lines = "\n  ".join(changed)
        raise StaleArtifactError(
            f"{stage.key} is committed in {directory} with other settings:\n  {lines}\n"
            f"Take the settings back, or run it and what follows again with `--redo {stage.key}`, or use another `name`"
        )
    return Action.REDO


def finished(stages: Sequence[Stage], root: str, redo: Collection[str]) -> list[Outcome] | None:
    """The outcomes of a plan that is committed already, as a whole; None when something is left to run."""
    if any(action is not Action.SKIP for _, action in plan_actions(stages, root, redo)):
        return None
    return [Outcome(stage, artifact, True) for stage in stages if (artifact := read_artifact(f"{root}/{stage.key}"))]


def plan_actions(stages: Sequence[Stage], root: str, redo: Collection[str]) -> list[tuple[Stage, Action]]:
    """What `run_plan` would do, without doing it (for --dry-run)."""
    actions: list[tuple[Stage, Action]] = []
    done: dict[str, Artifact] = {}
    for stage in stages:
        if any(key not in done for key in stage.inputs.values()):
            actions.append((stage, Action.PENDING))
            continue
        directory = f"{root}/{stage.key}"
        inputs = {role: done[key] for role, key in stage.inputs.items()}
        if read_artifact(directory) is None:
            action = Action.RUN  # without asking for the identity of what it names: the hub may be out of reach here
        else:
            action = decide(stage, directory, identity(stage, inputs, stage.external()), redo=_asked_again(stage, redo))
        actions.append((stage, action))
        artifact = read_artifact(directory)
        if action is Action.SKIP and artifact:
            done[stage.key] = artifact
    return actions


def run_plan(
    stages: Sequence[Stage],
    root: str,
    *,
    redo: Collection[str] = (),
    progress: Progress,
    begin: Callable[[], object] = lambda: None,
    max_wait_s: float = waiting.LIMIT_S,
) -> list[Outcome]:
    """Run the stages in order, as the one driver of this run, and return one outcome each.

    Args:
        begin: Called before the first stage, once the run is this driver's alone.
        max_wait_s: Longest that a stage waits for the nodes that it needs.

    Raises:
        StaleArtifactError: a committed stage has other settings.
        ConfigError: a scorer, policy or source that any stage names cannot be used; nothing has run then.
        ResourceError: a stage does not fit the cluster, found no room in time, or did not give back what it held.
        StageError: a stage failed; what it committed is kept, and the same command goes on from there.
    """
    outcomes: list[Outcome] = []
    artifacts: dict[str, Artifact] = {}
    lease = Lease(root, progress.waits)
    holder = _EngineHolder()
    try:
        # All of them before the first stage runs: a scorer that does not import must not be found after generation.
        external = {stage.key: stage.external() for stage in stages}
        begin()
        for stage in stages:
            inputs = {role: artifacts[key] for role, key in stage.inputs.items()}
            wanted = identity(stage, inputs, external[stage.key])
            directory = f"{root}/{stage.key}"
            action = decide(stage, directory, wanted, redo=_asked_again(stage, redo))
            artifact = read_artifact(directory) if action is Action.SKIP else None
            if artifact is None:
                if action is Action.REDO:
                    supersede(root, stage.key)
                artifact = _run_stage(stage, root, wanted, inputs, holder, progress, lease, max_wait_s)
            stage.check(artifact)
            artifacts[stage.key] = artifact
            outcomes.append(Outcome(stage, artifact, skipped=action is Action.SKIP))
            progress.stage_done(stage.key, artifact.manifest, skipped=action is Action.SKIP)
    finally:
        holder.close()
        lease.release()
    return outcomes


def supersede(root: str, key: str) -> None:
    """Move a stage's committed output to `superseded/`, manifest last, so that no reader sees half of it."""
    directory = f"{root}/{key}"
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    storage.copy_directory(directory, f"{root}/superseded/{stamp}/{key}")
    storage.delete_file(f"{directory}/{MANIFEST}")
    storage.delete_directory(directory)


def _asked_again(stage: Stage, redo: Collection[str]) -> bool:
    return stage.key in redo or stage.name in redo


def _run_stage(
    stage: Stage,
    root: str,
    wanted: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    holder: _EngineHolder,
    progress: Progress,
    lease: Lease,
    max_wait_s: float,
) -> Artifact:
    directory, measured = f"{root}/{stage.key}", Measured(progress, root.rpartition("/")[2], stage)
    fit.check_fits(stage.key, stage.needs)
    progress.stage_started(stage.key)
    if not holder.keeps_for(stage) and waiting.wait_for_room(stage.key, stage.needs, progress.waits, limit_s=max_wait_s):
        cluster.probe_shared(root)  # by the nodes that have come meanwhile
    started = time.monotonic()
    with head.watch(progress.waits), pulse(stage.key, measured, holder.restarts):
        engine = holder.engine_for(stage, inputs)
        idle = cluster.Idle()
        context = StageContext(directory, fingerprint(wanted), inputs, engine, holder.close, measured)
        output = stage.run(context)
    idle.wait(stage.key)
    lease.check()
    measured.ended(output)
    return write_manifest(directory, _manifest(stage, wanted, output, time.monotonic() - started))


class _EngineHolder:
    """Holds the engine that stages share; closes it as soon as the next stage does not fit beside it."""

    def __init__(self) -> None:
        self.spec: EngineSpec | None = None
        self.engine: Engine | None = None
        self.idle: cluster.Idle | None = None

    def keeps_for(self, stage: Stage) -> bool:
        """Whether the stage has its place already, in the engine that runs; an engine that is in its way is closed."""
        if stage.engine and self.spec and self.spec.key == stage.engine.key:
            return True
        if self.engine and (stage.engine or not fit.fits_now(stage.needs)):
            self.close()
        return False

    def engine_for(self, stage: Stage, inputs: Mapping[str, Artifact]) -> Engine | None:
        """The engine of a stage, started now or kept from before; None for a stage that uses none."""
        if stage.engine is None:
            return None
        if self.spec is None:
            self.idle = cluster.Idle()
            self.engine = stage.engine.start(inputs)
            self.spec = stage.engine
        return self.engine

    def restarts(self) -> int:
        """How often the running engines have started again."""
        return self.engine.restarts() if self.engine else 0

    def close(self) -> None:
        """Close the engine and prove that its resources are back."""
        if self.engine:
            engine, self.engine, self.spec = self.engine, None, None
            engine.close()
            if self.idle:
                self.idle.wait("the generation engine")


def _manifest(stage: Stage, wanted: Mapping[str, Any], output: StageOutput, seconds: float) -> Manifest:
    dropped = sum(output.dropped.values())
    one_to_one = stage.name not in ("pair", "tokenize", "train", "evaluate")
    if one_to_one and output.rows_in != output.rows_out + dropped:
        raise StageError(
            f"{stage.key}: {output.rows_in} rows in, {output.rows_out} out, {dropped} dropped: the sums must agree"
        )
    return Manifest(
        stage=stage.name,
        round=stage.round,
        fingerprint=fingerprint(wanted),
        identity=dict(wanted),
        files=output.files,
        rows_in=output.rows_in,
        rows_out=output.rows_out,
        dropped=dict(output.dropped),
        metrics=dict(output.metrics),
        seconds=round(seconds, 3),
        resources=dict(stage.resources),
        versions=library_versions(),
        git_commit=git_commit(),
        committed_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
