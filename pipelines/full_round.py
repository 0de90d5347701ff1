"""READ FIRST. One DPO round after another: what the stages are, in which order, and what each reads.

    prompts -> generate -> score -> pair -> reference -> train -> evaluate -> next round
    preferences ------------------> pair
    conversations -> tokenize --------------------------> train -> evaluate   (supervised fine-tuning, before the first round)

Run it with `python pipelines/full_round.py pipelines/quickstart.yaml`, or on a cluster with
`ray job submit --working-dir . -- python pipelines/full_round.py pipelines/quickstart.yaml`. `--help` lists all fields.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing it

from dpo_ray.cli import parse_arguments
from dpo_ray.config import PreferenceRun, Round, Run, RunConfig, SftRun
from dpo_ray.errors import ConfigError, DpoRayError

if TYPE_CHECKING:
    from dpo_ray.flow.stage import Stage
    from dpo_ray.stages.evaluate import Steps


def plan(config: Run) -> list[Stage]:
    """The stages of every round, in order. Making them runs nothing."""
    from dpo_ray.stages import policy, reference, train

    if isinstance(config, SftRun):
        return fine_tuning(config)
    stages = [policy.stage(config, config.policy, config.policy_revision), data(config)]
    anchor = config.reference.policy or "initial"
    if anchor not in ("initial", "previous"):
        stages.append(policy.stage(config, anchor, config.reference.revision, name="reference_policy"))
    start = "policy"
    for r in range(config.rounds):
        held_by = {"initial": "policy", "previous": start}.get(anchor, "reference_policy")
        stages += pairs(config, r, start)
        rows = f"round_{r:02d}/pair"
        if config.train.needs_reference:
            stages.append(reference.stage(config, r, held_by))
            rows = stages[-1].key
        stages.append(train.stage(config, r, start, rows))
        stages.append(evaluation(config, r, start, held_by))
        start = f"round_{r:02d}/train"  # the next round starts from the policy that this one trained
    return stages


def fine_tuning(config: SftRun) -> list[Stage]:
    """The stages of supervised fine-tuning: what a round starts from must follow the format already."""
    from dpo_ray.stages import conversations, evaluate_sft, policy, tokenize, train

    block = config.conversations
    steps = evaluate_sft.Steps(
        held_out=lambda artifact: conversations.parts(artifact, config, held_out=True),
        tokenize=lambda ds, policy: tokenize.tokenize(ds, policy, block),
        tokenize_tasks=tokenize.tasks(block),
        tokenize_config=tokenize.result_config(block),
    )
    return [
        policy.stage(config, config.policy, config.policy_revision),
        conversations.stage(config),
        tokenize.stage(config, "policy", lambda artifact: conversations.parts(artifact, config, held_out=False)),
        train.stage(config, None, "policy", "tokenize"),
        evaluate_sft.stage(config, "policy", "train", steps),
    ]


def data(config: Round) -> Stage:
    """What all rounds take their rows from: prompts, or preferences that exist already."""
    from dpo_ray.stages import preferences, prompts

    return preferences.stage(config) if isinstance(config, PreferenceRun) else prompts.stage(config)


def pairs(config: Round, round_: int, start: str) -> list[Stage]:
    """The stages that end in the round's pairs."""
    from dpo_ray.stages import generate, ingest, pair, preferences, prompts, score

    if isinstance(config, PreferenceRun):
        return [ingest.stage(config, round_, start, preferences.slice_of_round)]
    return [
        generate.stage(config, round_, start, prompts.slice_of_round),
        score.stage(config, round_),
        pair.stage(config, round_),
    ]


def evaluation(config: Round, round_: int, start: str, reference: str) -> Stage:
    """The stage that says whether the round helped: on held-out prompts, or on held-out pairs."""
    from dpo_ray.stages import evaluate, evaluate_pairs, generate, ingest, preferences

    if isinstance(config, PreferenceRun):
        block = config.preferences
        steps = evaluate_pairs.Steps(
            held_out=preferences.held_out,
            ingest=lambda ds, policy: ingest.ingest(ds, policy, block, round_),
            ingest_tasks=ingest.tasks(block),
            ingest_config=ingest.result_config(block),
        )
        return evaluate_pairs.stage(config, round_, start, reference, steps)
    engine, needs = generate.engine_spec(config), generate.engine_needs(config.generate)
    return evaluate.stage(config, round_, start, reference, engine, needs, sampling_steps(config, round_))


def sampling_steps(config: RunConfig, round_: int) -> Steps:
    """What evaluate does with the other stages' functions."""
    from dpo_ray.stages import evaluate, generate, pair, prompts, reference, score

    columns = {"completion_token_ids": "logps"}
    # Always with the engine's own log-probabilities: evaluate checks by them that the engine holds the policy it should.
    g = config.generate.model_copy(update={"sampler_logps": True})
    return evaluate.Steps(
        held_out=prompts.held_out,
        generate=lambda ds, engine, policy, how, n: generate.generate(ds, engine, policy, g, how, round_, config.seed, n),
        generate_tasks=lambda engine: generate.tasks(engine, g),
        score=lambda ds: score.score(ds, config.score, config.trust_remote_code),
        score_tasks=score.tasks(config.score),
        pair=lambda row: pair.pair_prompt(row, config.pair, config.seed),
        logps=lambda ds, policy: reference.add_logps(ds, policy, reference.how(config), columns, config.reference.resources),
        logps_needs=reference.needs(config),
        score_needs=score.needs(config.score),
        score_sources=lambda: score.sources(config.score),
        score_config=score.result_config(config.score),
    )


def cut(stages: list[Stage], until: str | None, redo: list[str]) -> list[Stage]:
    """The plan up to and with `until`; both names must be in it."""
    names = {s.name for s in stages} | {s.key for s in stages}
    for asked in [*redo, *([until] if until else [])]:
        if asked not in names:
            raise ConfigError(f"no stage {asked!r} in this plan; it has {', '.join(s.key for s in stages)}")
    if until is None:
        return stages
    last = next(i for i, s in enumerate(stages) if until in (s.name, s.key))
    return stages[: last + 1]


def finished_rounds(directory: str) -> int:
    """Rounds of the run that are evaluated, which is how a round ends."""
    from dpo_ray.flow.artifact import read_artifact

    return next(r for r in itertools.count() if read_artifact(f"{directory}/round_{r:02d}/evaluate") is None)


def main() -> int:
    try:
        arguments, config = parse_arguments()
        if arguments.next_round:
            _, config = parse_arguments([*sys.argv[1:], "--rounds", str(finished_rounds(config.directory) + 1)])
        run(arguments.dry_run, arguments.until, arguments.redo, config)
    except DpoRayError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what is committed is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def run(dry_run: bool, until: str | None, redo: list[str], config: Run) -> None:
    """Print the plan, or run it and print what came of it."""
    from dpo_ray import summary  # from here on torch and ray are loaded; --help and a bad config never get here
    from dpo_ray.flow import cluster, fit, runner, storage, versions
    from dpo_ray.flow.progress import Progress

    for line in versions.untested(versions.library_versions()):
        print(f"warning: {line}", file=sys.stderr)
    stages = cut(plan(config), until, redo)
    outcomes = runner.finished(stages, config.directory, redo)
    if outcomes is None or dry_run:
        cluster.connect()
        for stage in stages:
            fit.check_fits(stage.key, stage.needs)
    if dry_run:
        print(f"run {config.directory}\n\n{summary.plan_table(runner.plan_actions(stages, config.directory, redo))}")
        return
    if outcomes is None:
        cluster.probe_shared(config.root)
        resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()
        write = lambda: storage.write_bytes(f"{config.directory}/resolved.yaml", resolved)
        limits = {"max_wait_s": config.max_wait_s}
        outcomes = runner.run_plan(stages, config.directory, redo=redo, progress=Progress(), begin=write, **limits)
    print(f"\n{summary.outcome_table(outcomes)}")
    for outcome in outcomes:
        if outcome.stage.name == "evaluate":
            round_ = "" if outcome.stage.round is None else f"round {outcome.stage.round}\n"
            print(f"\n{round_}{summary.round_result(outcome.artifact.manifest.metrics)}")
            trained = outcome.stage.key.removesuffix("evaluate") + "train/policy"
            print(f"policy                       {config.directory}/{trained}")


if __name__ == "__main__":
    sys.exit(main())
