import dataclasses
import json
from pathlib import Path

import pytest

from dpo_ray.errors import ConfigError, ResourceError, StageError, StaleArtifactError
from dpo_ray.flow import runner, storage
from dpo_ray.flow.artifact import FileRecord, record_files
from dpo_ray.flow.runner import Action
from dpo_ray.flow.stage import EngineSpec, Needs, Stage, StageContext, StageOutput

from ..artifacts import Silent
from ..conftest import NUM_CPUS

pytestmark = pytest.mark.usefixtures("local_ray")


class World:
    """A run's directory, what its stages write, and the order in which things happened."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[str] = []
        self.text: dict[str, str] = {}
        self.fail: set[str] = set()

    def stage(self, name, round_=0, inputs=(), config=None, **fields) -> Stage:
        """A stage that writes its text and the texts of its inputs."""

        def run(context: StageContext) -> StageOutput:
            self.events.append(stage.key)
            read = [storage.read_bytes(a.uri(a.manifest.files[0])).decode() for a in context.inputs.values()]
            storage.write_bytes(f"{context.directory}/out/text", ("".join(read) + self.text.get(name, name)).encode())
            if name in self.fail:
                raise StageError(f"{name} broke")
            return StageOutput(record_files(context.directory, "out"), 3, 2, {"bad": 1})

        stage = Stage(name, round_, 1, config or {}, {i.rpartition("/")[2]: i for i in inputs}, run, **fields)
        return stage

    def chain(self, **configs) -> list[Stage]:
        """score -> pair -> train of round 0, and score of round 1."""
        score = self.stage("score", config=configs.get("score"))
        pair = self.stage("pair", inputs=["round_00/score"], config=configs.get("pair"))
        train = self.stage("train", inputs=["round_00/pair"], config=configs.get("train"))
        return [score, pair, train, self.stage("score", 1, inputs=["round_00/train"])]

    def run(self, stages, redo=()):
        """Run the plan and return the keys of the stages that ran."""
        before = len(self.events)
        self.outcomes = runner.run_plan(stages, str(self.root), redo=redo, progress=Silent())
        assert [o.stage.key for o in self.outcomes] == [s.key for s in stages]
        ran = self.events[before:]
        assert [o.stage.key for o in self.outcomes if not o.skipped] == ran
        return ran

    def fingerprints(self):
        return [o.artifact.manifest.fingerprint for o in self.outcomes]

    def output(self, key):
        return (self.root / key / "out/text").read_text()


ALL = ["round_00/score", "round_00/pair", "round_00/train", "round_01/score"]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "run")


def test_run_plan_runs_the_stages_in_order_and_commits_each(world):
    assert world.run(world.chain()) == ALL
    manifest = json.loads((world.root / "round_00/pair/_manifest.json").read_text())
    assert (manifest["stage"], manifest["round"]) == ("pair", 0)
    assert (manifest["rows_in"], manifest["rows_out"], manifest["dropped"]) == (3, 2, {"bad": 1})
    assert [f["path"] for f in manifest["files"]] == ["out/text"]
    assert world.output("round_00/train") == "scorepairtrain"


def test_run_plan_again_skips_everything(world):
    world.run(world.chain())
    assert world.run(world.chain()) == []
    assert runner.finished(world.chain(), str(world.root), []) is not None


def test_run_plan_more_stages_run_alone(world):
    world.run(world.chain()[:2])
    assert runner.finished(world.chain(), str(world.root), []) is None
    assert world.run(world.chain()) == ALL[2:]


@pytest.mark.parametrize("redo", [[], ["score"]])
def test_run_plan_leaves_no_lease_behind(world, redo):
    world.run(world.chain(), redo)
    assert not (world.root / "_lease.json").exists()


def test_run_plan_changed_config_is_refused_with_the_field_and_the_ways_out(world):
    world.run(world.chain(pair={"min_gap": 0.0, "sampling": {"top_p": 1.0}}))
    with pytest.raises(StaleArtifactError) as error:
        world.run(world.chain(pair={"min_gap": 0.0, "sampling": {"top_p": 0.9}}))
    message = str(error.value)
    assert "config.sampling.top_p: 1.0 -> 0.9" in message
    assert "min_gap" not in message
    assert "--redo round_00/pair" in message
    assert "`name`" in message


def test_run_plan_changed_config_refused_changes_nothing_on_disk(world):
    world.run(world.chain(score={"a": 1}))
    before = {p: p.read_bytes() for p in world.root.rglob("*") if p.is_file()}
    with pytest.raises(StaleArtifactError):
        world.run(world.chain(score={"a": 2}))
    assert {p: p.read_bytes() for p in world.root.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("change", [{"version": 2}, {"external": lambda: {"source of f.py": "def"}}])
def test_run_plan_changed_version_or_source_is_refused(world, change):
    stage = world.stage("score", external=lambda: {"source of f.py": "abc"})
    world.run([stage])
    with pytest.raises(StaleArtifactError, match=next(iter(change))):
        world.run([dataclasses.replace(stage, **change)])


def test_run_plan_changed_config_with_redo_runs_it_and_what_follows(world):
    world.run(world.chain(pair={"min_gap": 0.0}))
    world.text["pair"] = "PAIR"
    assert world.run(world.chain(pair={"min_gap": 0.5}), redo=["round_00/pair"]) == ALL[1:]
    assert world.output("round_01/score") == "scorePAIRtrainscore"
    assert world.run(world.chain(pair={"min_gap": 0.5})) == []


def test_run_plan_changed_resources_skip(world):
    stages = world.chain()
    world.run(stages)
    other = [dataclasses.replace(s, resources={"cpus": 4}, needs=Needs(1, 1.0, 0.0, "task")) for s in stages]
    assert world.run(other) == []


def test_run_plan_fingerprint_does_not_depend_on_the_root(world, tmp_path):
    world.run(world.chain())
    moved = World(tmp_path / "elsewhere")
    moved.run(moved.chain())
    assert moved.fingerprints() == world.fingerprints()


def test_run_plan_copied_to_another_root_is_still_done(world, tmp_path):
    world.run(world.chain())
    storage.copy_directory(str(world.root), str(tmp_path / "copy"))
    copy = World(tmp_path / "copy")
    assert copy.run(copy.chain()) == []


def test_run_plan_redo_with_another_output_supersedes_what_follows(world):
    world.run(world.chain())
    world.text["pair"] = "PAIR"
    assert world.run(world.chain(), redo=["pair"]) == ALL[1:]
    assert world.output("round_01/score") == "scorePAIRtrainscore"
    texts = list(world.root.glob("superseded/*/*/*/out/text"))
    old = {"/".join(p.parts[-4:-2]): p.read_text() for p in texts}
    assert old == {
        "round_00/pair": "scorepair",
        "round_00/train": "scorepairtrain",
        "round_01/score": "scorepairtrainscore",
    }
    assert all((p.parent.parent / "_manifest.json").exists() for p in texts)


def test_run_plan_redo_with_the_same_output_leaves_what_follows(world):
    world.run(world.chain())
    assert world.run(world.chain(), redo=["round_00/pair"]) == ["round_00/pair"]


def test_run_plan_redo_by_name_runs_the_stage_of_every_round(world):
    world.run(world.chain())
    assert world.run(world.chain(), redo=["score"]) == ["round_00/score", "round_01/score"]


def test_run_plan_lost_output_runs_again(world):
    world.run(world.chain())
    (world.root / "round_00/pair/_manifest.json").unlink()
    world.text["pair"] = "PAIR"
    assert world.run(world.chain()) == ALL[1:]


def test_run_plan_crash_before_the_commit_runs_that_stage_again(world):
    world.fail.add("pair")
    with pytest.raises(StageError, match="pair broke"):
        world.run(world.chain())
    assert (world.root / "round_00/pair/out/text").exists()  # written, but not committed
    assert not (world.root / "round_00/pair/_manifest.json").exists()
    assert not (world.root / "_lease.json").exists()
    world.fail.clear()
    assert world.run(world.chain()) == ALL[1:]


def test_run_plan_crash_inside_a_redo_goes_on_without_asking_again(world):
    world.run(world.chain())
    world.fail.add("pair")
    world.text["pair"] = "PAIR"
    with pytest.raises(StageError):
        world.run(world.chain(), redo=["pair"])
    world.fail.clear()
    assert world.run(world.chain()) == ALL[1:]


def test_run_plan_config_that_cannot_be_fingerprinted_is_a_config_error(world):
    with pytest.raises(ConfigError, match="fingerprint"):
        world.run([world.stage("score", config={"function": len})])


def test_run_plan_stage_that_loses_rows_is_not_committed(world):
    file = FileRecord(path="x", rows=None, bytes=0, sha256="0")
    lossy = dataclasses.replace(world.stage("score"), run=lambda context: StageOutput([file], 10, 8, {"bad": 1}))
    with pytest.raises(StageError, match="10 rows in, 8 out, 1 dropped"):
        runner.run_plan([lossy], str(world.root), progress=Silent())
    assert not (world.root / "round_00/score/_manifest.json").exists()


def test_run_plan_stage_that_does_not_fit_the_cluster_is_refused_before_it_runs(world):
    with pytest.raises(ResourceError, match=r"round_00/score.*1 engine x 1000 CPU"):
        world.run([world.stage("score", needs=Needs(1, 1000.0, 0.0, "engine"))])
    assert world.events == []


def test_run_plan_stage_that_finds_no_room_in_time_says_so_and_leaves_nothing(world, idle_ray, hold):
    hold()
    stages = [world.stage("pair"), world.stage("score", needs=Needs(NUM_CPUS, 1.0, 0.0, "task"))]
    with pytest.raises(ResourceError, match=r"round_00/score found no room for 4 task x 1 CPU within max_wait_s=0.1"):
        runner.run_plan(stages, str(world.root), progress=Silent(), max_wait_s=0.1)
    assert world.events == ["round_00/pair"]
    assert not (world.root / "_lease.json").exists()
    assert world.run(stages[:1]) == []  # what was committed before is kept


def test_run_plan_second_driver_is_refused(world):
    def nested(context: StageContext) -> StageOutput:
        with pytest.raises(ResourceError):
            runner.run_plan([world.stage("pair")], str(world.root), progress=Silent())
        return StageOutput([], 0, 0, {})

    world.run([world.stage("pair", 1)])
    runner.run_plan([dataclasses.replace(world.stage("score"), run=nested)], str(world.root), progress=Silent())
    assert world.events == ["round_01/pair"]


def test_run_plan_what_any_stage_names_is_looked_up_before_the_first_one_runs(world):
    def missing():
        raise ConfigError("no scorer")

    stages = world.chain()
    stages[2] = dataclasses.replace(stages[2], external=missing)
    with pytest.raises(ConfigError, match="no scorer"):
        world.run(stages)
    assert world.events == []
    assert not (world.root / "_lease.json").exists()


@pytest.mark.parametrize("before", [False, True], ids=["run", "skipped"])
def test_run_plan_output_that_is_not_enough_for_the_plan_stops_it_there(world, before):
    def refuse(artifact):
        raise StageError(f"{artifact.manifest.rows_out} rows are too few")

    stages = world.chain()
    if before:
        world.run(stages[:1])
    stages[0] = dataclasses.replace(stages[0], check=refuse)
    with pytest.raises(StageError, match="2 rows are too few"):
        world.run(stages)
    assert world.events == ["round_00/score"]


def test_plan_actions_say_what_a_run_would_do_without_doing_it(world):
    stages = world.chain()
    world.run(stages[:2])
    before = list(world.events)

    def actions(redo=()):
        return [action for _, action in runner.plan_actions(stages, str(world.root), redo)]

    assert actions() == [Action.SKIP, Action.SKIP, Action.RUN, Action.PENDING]
    assert actions(["score"])[:2] == [Action.REDO, Action.PENDING]
    assert world.events == before


def with_engine(world, name, key="a", round_=0, **fields):
    """A stage that uses an engine; the engine writes its own life into the events."""

    class FakeEngine:
        def close(self) -> None:
            world.events.append(f"close {key}")

        def restarts(self) -> int:
            return 0

    def start(inputs):
        world.events.append(f"start {key}")
        return FakeEngine()

    return world.stage(name, round_, engine=EngineSpec(key, start), **fields)


def events_of(world, stages):
    runner.run_plan(stages, str(world.root), progress=Silent())
    return world.events


def test_engine_is_shared_by_stages_and_closed_at_the_end(world):
    stages = [with_engine(world, "generate"), world.stage("pair"), with_engine(world, "evaluate")]
    assert events_of(world, stages) == ["start a", "round_00/generate", "round_00/pair", "round_00/evaluate", "close a"]


def test_engine_of_other_settings_replaces_the_first(world):
    stages = [with_engine(world, "generate"), with_engine(world, "evaluate", key="b")]
    assert events_of(world, stages) == ["start a", "round_00/generate", "close a", "start b", "round_00/evaluate", "close b"]


def test_engine_is_closed_before_a_stage_that_does_not_fit_beside_it(world):
    train = world.stage("train", needs=Needs(4, 1.0, 0.0, "train worker"))  # all CPUs of this cluster
    stages = [with_engine(world, "generate"), train, with_engine(world, "evaluate")]
    assert events_of(world, stages) == [
        "start a",
        "round_00/generate",
        "close a",
        "round_00/train",
        "start a",
        "round_00/evaluate",
        "close a",
    ]


def test_engine_of_skipped_stages_is_not_started(world):
    events_of(world, [with_engine(world, "generate")])
    del world.events[:]
    assert events_of(world, [with_engine(world, "generate"), world.stage("pair")]) == ["round_00/pair"]


def test_engine_is_closed_when_a_stage_fails(world):
    world.fail.add("generate")
    with pytest.raises(StageError):
        events_of(world, [with_engine(world, "generate")])
    assert world.events == ["start a", "round_00/generate", "close a"]


def test_engine_released_inside_a_stage_is_closed_there_and_only_once(world):
    def run(context: StageContext) -> StageOutput:
        context.release_engine()
        world.events.append("after")
        return StageOutput([], 0, 0, {})

    stage = dataclasses.replace(with_engine(world, "evaluate"), run=run)
    assert events_of(world, [stage]) == ["start a", "close a", "after"]
