import io

from dpo_ray.flow.progress import Progress

from ..artifacts import commit_tables
from .test_artifact import TABLE


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_log_writes_one_line_a_stage_when_it_is_fast(tmp_path):
    stream = io.StringIO()
    progress = Progress(stream)
    progress.stage_started("round_00/pair")
    started = stream.getvalue().count("\n")
    for done in range(100):
        progress.update(done, 100, {"tokens": 5.0})
    assert stream.getvalue().count("\n") == started  # nothing between two intervals
    progress.stage_done("round_00/pair", commit_tables(tmp_path, [TABLE]).manifest, skipped=False)
    last = stream.getvalue().splitlines()[-1]
    assert "round_00/pair" in last
    assert "2 in, 2 out" in last


def test_progress_on_a_terminal_renews_its_line_in_place(tmp_path):
    stream = Terminal()
    progress = Progress(stream)
    progress.stage_started("prompts")
    assert "\n" not in stream.getvalue()
    progress.stage_done("prompts", commit_tables(tmp_path, [TABLE]).manifest, skipped=True)
    assert stream.getvalue().count("\n") == 1


def test_progress_resumed_stage_counts_its_rate_from_what_was_done_before():
    """40 of 100 rows were there at the start: 20 more in 10 s are 2 rows/s, and the last 40 take 20 s."""
    stream = io.StringIO()
    progress = Progress(stream)
    progress.stage_started("round_00/generate")
    progress.update(40, 100, {})
    progress.started -= 10.0
    progress.last -= 10.0
    progress.update(60, 100, {"tokens": 600.0})
    last = stream.getvalue().splitlines()[-1]
    assert "60/100 rows, 2.0 rows/s, 20 tokens/s, 20 s left" in last


def test_progress_step_that_does_nothing_new_divides_by_nothing():
    progress = Progress(io.StringIO())
    progress.stage_started("score")
    for done in (100, 100):
        progress.last -= 10.0
        progress.update(done, 100, {"tokens": 5.0})


def test_progress_of_training_shows_its_own_tokens_a_second_and_counts_time_left_from_its_first_step():
    """The workers started 30 s ago, which no step took: 40 of 100 rows in 10 s leave 15 s."""
    stream = io.StringIO()
    progress = Progress(stream)
    progress.stage_started("round_00/train")
    progress.started -= 30.0
    progress.update(0, 100, {})
    progress.started -= 10.0
    progress.last -= 10.0
    progress.update(40, 100, {"loss": 0.5, "rewards/margins": 0.25, "rewards/accuracies": 0.75, "tokens_per_s": 12345.6})
    last = stream.getvalue().splitlines()[-1]
    assert last.endswith("40/100 rows, 12,346 tokens/s, 15 s left, loss 0.5, rewards/margins 0.25, rewards/accuracies 0.75")


def test_progress_says_at_once_what_a_stage_waits_for():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.stage_started("round_00/train")
    progress.waits("round_00/train waits for 2 train worker x 1 CPU")
    assert stream.getvalue().splitlines()[-1] == "round_00/train waits for 2 train worker x 1 CPU"
