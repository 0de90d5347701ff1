"""What a stage counts, by the names that dashboards read. That Prometheus gets them is in tests/runs/test_metrics.py."""

import pytest
import ray

from dpo_ray.flow import metrics
from dpo_ray.flow.metrics import Measured
from dpo_ray.flow.pulse import pulse
from dpo_ray.flow.stage import Stage, StageOutput

from ..artifacts import Silent
from ..conftest import LABELS, NUM_CPUS
from ..waiting import wait_until


class Recorded:
    """Takes the place of one of Ray's metrics."""

    def __init__(self) -> None:
        self.values: dict[tuple, float] = {}

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        self.values[tuple(tags.items())] = self.values.get(tuple(tags.items()), 0.0) + value

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tuple(tags.items())] = value


@pytest.fixture
def recorded(monkeypatch):
    """Name -> value, of the one stage that a test has."""
    made: dict[str, Recorded] = {}
    monkeypatch.setattr(metrics, "_metric", lambda name: made.setdefault(name, Recorded()))

    def value(name: str, **tags: str) -> float | None:
        values = made[name].values if name in made else {}
        wanted = tuple(({"run": "run", "round": "0", "stage": "generate"} | tags).items())
        assert set(values) <= {wanted}
        return values.get(wanted)

    return value


def measured(name="generate", round_: int | None = 0) -> Measured:
    return Measured(Silent(), "run", Stage(name, round_, 1, {}, {}, lambda context: StageOutput([], 0, 0, {})))


def test_metrics_have_the_names_and_tags_that_dashboards_read():
    assert set(metrics.COUNTERS) == {f"dpo_ray_{name}_total" for name in ("rows", "tokens", "dropped", "engine_restarts")}
    assert set(metrics.GAUGES) == {f"dpo_ray_{name}" for name in ("reward_margin", "kl", "step_seconds", "idle_share")}
    assert metrics.TAGS == ("run", "round", "stage")


def test_rows_tokens_and_drops_are_counted_as_they_come_and_not_those_of_an_earlier_attempt(recorded):
    stage = measured()
    stage.begin("generate")
    stage.update(10, 40, {"tokens": 100.0, "dropped": 1.0})
    assert recorded("dpo_ray_rows_total") is None
    stage.update(10, 40, {"tokens": 100.0, "dropped": 1.0})
    stage.update(20, 40, {"tokens": 250.0, "dropped": 1.0})
    stage.update(40, 40, {"tokens": 500.0, "dropped": 3.0})
    assert recorded("dpo_ray_rows_total") == 30
    assert recorded("dpo_ray_tokens_total") == 400
    assert recorded("dpo_ray_dropped_total") == 2
    assert stage.progress.last == (40, 40, {"tokens": 500.0, "dropped": 3.0})


def test_steps_of_a_stage_are_summed(recorded):
    stage = measured()
    for step in ("samples/start", "samples/policy"):
        stage.begin(step)
        stage.update(0, 8, {})
        stage.update(8, 8, {"tokens": 80.0})
    assert recorded("dpo_ray_rows_total") == 16
    assert recorded("dpo_ray_tokens_total") == 160


def test_training_that_goes_back_to_a_checkpoint_counts_what_it_does_again(recorded):
    stage = measured("train", 1)
    for done in (0, 32, 64, 40, 64):
        shown = {"tokens": 10.0 * done, "rewards/margins": done / 100, "kl_ref_to_policy": 0.5, "step_time_s": 1.5}
        stage.update(done, 64, shown)
    tags = {"round": "1", "stage": "train"}
    assert recorded("dpo_ray_rows_total", **tags) == 64 + 24
    assert recorded("dpo_ray_tokens_total", **tags) == 640 + 240
    assert recorded("dpo_ray_reward_margin", **tags) == 0.64
    assert recorded("dpo_ray_kl", **tags) == 0.5
    assert recorded("dpo_ray_step_seconds", **tags) == 1.5


def test_stage_without_progress_counts_its_output(recorded):
    stage = measured("prompts", None)
    stage.ended(StageOutput([], 12, 9, {"duplicate": 1, "empty": 2}))
    tags = {"round": "", "stage": "prompts"}
    assert recorded("dpo_ray_rows_total", **tags) == 12
    assert recorded("dpo_ray_dropped_total", **tags) == 3


def test_evaluation_shows_its_kl_and_margin(recorded):
    stage = measured("evaluate")
    stage.update(0, 4, {})
    stage.ended(StageOutput([], 4, 4, {}, {"kl": 1.9, "eval_rewards/margins": 0.6}))
    assert recorded("dpo_ray_kl", stage="evaluate") == 1.9
    assert recorded("dpo_ray_reward_margin", stage="evaluate") == 0.6
    assert recorded("dpo_ray_rows_total", stage="evaluate") is None


def test_engine_restarts_are_counted_once_whoever_started_the_engine(recorded, local_ray):
    """Two before this stage; one here, and after other engines took their place two more."""
    stage, restarts = measured(), iter([2, 3, 3, 0, 2])
    with pulse("round_00/generate", stage, lambda: next(restarts, 2), beat_s=0.001):
        wait_until(lambda: stage.restarts == 2 and recorded("dpo_ray_engine_restarts_total") == 3)
    assert recorded("dpo_ray_engine_restarts_total") == 3


# On real Ray


def test_idle_share_is_of_what_nothing_holds(recorded, hold, idle_ray):
    hold()
    stage = measured()
    stage.idle()
    assert recorded("dpo_ray_idle_share") == (NUM_CPUS - 1) / NUM_CPUS


def test_rays_own_metrics_take_what_a_stage_counts(local_ray):
    stage = measured()
    stage.update(0, 2, {})
    stage.update(2, 2, {"tokens": 7.0, "dropped": 1.0, **dict.fromkeys(metrics.OF_PROGRESS, 0.5)})
    stage.restarted(1)
    stage.idle()
    for name in (*metrics.COUNTERS, *metrics.GAUGES):
        assert metrics._metric(name).info["tag_keys"] == metrics.TAGS


class Told(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def waits(self, text: str) -> None:
        self.lines.append(text)


def test_stage_that_finishes_nothing_says_what_waits_for_a_node(hold, idle_ray):
    @ray.remote(num_cpus=NUM_CPUS, label_selector=LABELS)
    def work() -> int:
        return 1

    progress = Told()
    stage = Measured(progress, "run", measured().stage)
    actor, waits = hold(), work.remote()
    with pulse("round_00/score", stage, lambda: 0, beat_s=0.01, silent_s=0.1):
        wait_until(lambda: any(f"1 x {NUM_CPUS} CPU wait for a node with room" in line for line in progress.lines))
        ray.kill(actor)
        assert ray.get(waits) == 1
        wait_until(lambda: "nothing waits for a node" in progress.lines[-1])
    assert all(line.startswith("round_00/score: nothing was finished for ") for line in progress.lines)


def test_stage_that_goes_on_is_not_said_to_wait(local_ray):
    progress = Told()
    stage, beats = Measured(progress, "run", measured().stage), []

    def beat() -> int:
        stage.update(len(beats), 1000, {})  # rows come with every look
        beats.append(1)
        return 0

    with pulse("round_00/score", stage, beat, beat_s=0.01, silent_s=0.3):
        wait_until(lambda: len(beats) > 60)
    assert progress.lines == []
