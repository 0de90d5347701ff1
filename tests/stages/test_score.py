import json

import pytest

from dpo_ray.config import RunConfig
from dpo_ray.errors import ConfigError, DpoRayError, StageError
from dpo_ray.scorers.reward_model import RewardModel
from dpo_ray.stages import score

from ..artifacts import commit_tables, context, kept
from ..test_config import minimal
from . import rows

pytestmark = pytest.mark.usefixtures("local_ray")
SOURCE = """
import json

def length(rows):
    return [float(len(r["completion"])) for r in rows]

def fussy(rows):
    if any(r["completion"] == "bad" for r in rows):
        raise ValueError("it is bad")
    return [1.0 for r in rows]

def matches_meta(rows):
    return [float(r["completion"] == r["meta"]["answer"]) for r in rows]

def cut(rows):
    return [float(r["finish_reason"] == "length") + len(r["prompt"][-1]["content"]) for r in rows]

def nan(rows):
    return [float("nan") if r["completion"] == "bad" else 1.0 for r in rows]

def none(rows):
    return []
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "scores.py").write_text(SOURCE)
    return tmp_path / "scores.py"


def texts(key, *values, **fields):
    made = [rows.completion(f"{key}{i}", text=v, **fields) for i, v in enumerate(values)]
    return [{k: v for k, v in c.items() if k != "score"} for c in made]


def run(tmp_path, table_rows, block):
    config = RunConfig.model_validate(minimal() | {"score": block})
    made = context(tmp_path / "out", {"completions": commit_tables(tmp_path / "in", [rows.completions(table_rows)])})
    output = score.stage(config, 0).run(made)
    return output, kept(tmp_path / "out", output)


def by_function(file, name, **fields):
    return {"kind": "function", "function": f"{file}:{name}", "resources": {"rows_per_part": 2, "cpus": 0.5}, **fields}


def scores(got):
    return [[c["score"] for c in row["completions"]] for row in got]


def test_score_function_scores_every_completion_of_every_prompt(tmp_path, file):
    made = [rows.scored_row(f"p{i}", texts(f"{i}", "a" * i, "b" * (i + 1))) for i in range(5)]
    output, got = run(tmp_path, made, by_function(file, "length"))
    assert scores(got) == [[float(i), float(i + 1)] for i in range(5)]
    assert [r["prompt_id"] for r in got] == [r["prompt_id"] for r in made]
    assert (output.rows_in, output.rows_out, output.dropped) == (5, 5, {})
    assert output.metrics == {"completions": 10, "score_sum": 25.0}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("long thought</think> ok", 2.0),
        ("a</think>b</think>\n\nlast", 4.0),
        ("no marker", 9.0),
        ("only thought</think>", 0.0),
    ],
)
def test_score_reasoning_end_leaves_the_answer_after_the_last_marker(tmp_path, file, text, wanted):
    made = [rows.scored_row("p", texts("c", text))]
    _, got = run(tmp_path, made, by_function(file, "length", reasoning_end="</think>"))
    assert scores(got) == [[wanted]]
    assert got[0]["completions"][0]["text"] == text


def test_score_meta_prompt_and_finish_reason_reach_the_function(tmp_path, file):
    made = [
        rows.scored_row("p0", texts("a", "4", "5"), meta=json.dumps({"answer": "4"})),
        rows.scored_row("p1", texts("b", "4", "5"), meta=json.dumps({"answer": "5"})),
    ]
    assert scores(run(tmp_path, made, by_function(file, "matches_meta"))[1]) == [[1.0, 0.0], [0.0, 1.0]]
    cut = [rows.scored_row("four", texts("c", "x", finish_reason="length") + texts("d", "x"))]
    assert scores(run(tmp_path / "cut", cut, by_function(file, "cut"))[1]) == [[5.0, 4.0]]


def test_score_bad_completion_does_not_lose_its_prompt(tmp_path, file):
    made = [rows.scored_row("p0", texts("a", "good", "bad", "fine")), rows.scored_row("p1", texts("b", "good"))]
    output, got = run(tmp_path, made, by_function(file, "fussy", max_dropped=0.25))
    assert scores(got) == [[1.0, None, 1.0], [1.0]]
    assert [c["drop_reason"] for c in got[0]["completions"]] == [None, "scorer_error: ValueError: it is bad", None]
    assert (output.rows_out, output.dropped) == (2, {})
    assert output.metrics["dropped_completions/scorer_error"] == 1


def test_score_completion_dropped_before_stays_dropped_and_unscored(tmp_path, file):
    made = [rows.scored_row("p0", texts("a", "good") + texts("b", "gone", drop_reason="earlier: x"))]
    _, got = run(tmp_path, made, by_function(file, "length", max_dropped=0.5))
    assert scores(got) == [[4.0, None]]
    assert got[0]["completions"][1]["drop_reason"] == "earlier: x"


def test_score_function_with_a_wrong_number_of_scores_is_a_stage_error(tmp_path, file):
    with pytest.raises(StageError, match="0 scores for 1 rows"):
        run(tmp_path, [rows.scored_row("p0", texts("a", "x"))], by_function(file, "none"))


def test_score_above_the_share_of_completions_that_cannot_be_scored_fails(tmp_path, file):
    made = [rows.scored_row("p0", texts("a", "good", "bad", "fine")), rows.scored_row("p1", texts("b", "good"))]
    with pytest.raises(StageError, match=r"1 of 4 completions could not be scored \(1 scorer_error\).*0.24"):
        run(tmp_path, made, by_function(file, "fussy", max_dropped=0.24))


def test_score_that_is_not_finite_is_an_error_that_names_the_completion(tmp_path, file):
    made = [rows.scored_row("p0", texts("a", "good", "bad"))]
    with pytest.raises(StageError, match=rf"completion a1 of prompt {made[0]['prompt_id']} has the score nan.*drop_non_finite"):
        run(tmp_path, made, by_function(file, "nan"))


def test_score_that_is_not_finite_is_dropped_where_that_is_asked_for(tmp_path, file):
    made = [rows.scored_row("p0", texts("a", "good", "bad"))]
    output, got = run(tmp_path, made, by_function(file, "nan", drop_non_finite=True, max_dropped=0.5))
    assert scores(got) == [[1.0, None]]
    assert [c["drop_reason"] for c in got[0]["completions"]] == [None, "non_finite_score"]
    assert output.metrics["dropped_completions/non_finite_score"] == 1


def test_score_stage_notices_another_source(file):
    config = RunConfig.model_validate(minimal() | {"score": by_function(file, "length")})
    before = score.stage(config, 0).external()
    file.write_text(SOURCE + "# more\n")
    assert score.stage(config, 0).external() != before


def by_model(path, **fields):
    resources = {"rows_per_part": 2, "cpus": 0.5, "actors": [1, 2]}
    return {"kind": "reward_model", "model": path, "dtype": "float32", "max_batch_tokens": 64, "resources": resources, **fields}


def test_score_reward_model_gives_the_scores_of_the_model_alone_and_drops_what_is_too_long(tmp_path, make_reward_model):
    path = make_reward_model()
    made = [rows.scored_row(f"w{10 + i}", texts(f"{i}", f"w{20 + i}", f"w{30 + i} w{40 + i}")) for i in range(5)]
    made.append(rows.scored_row("w60", texts("long", "w20", " ".join(["w30"] * 40))))
    output, got = run(tmp_path, made, by_model(path, max_tokens=20, max_dropped=0.1))
    model = RewardModel(path, revision=None, trust_remote_code=False, dtype="float32", use_gpu=False)
    too_long = got[-1]["completions"].pop()
    assert (too_long["score"], too_long["drop_reason"]) == (None, "too_long_for_reward_model")
    for row in got:
        for c in row["completions"]:
            conversation = [*row["prompt"], {"role": "assistant", "content": c["text"]}]
            (alone,) = model.score([conversation], max_tokens=64, max_batch_tokens=64)
            assert c["score"] == pytest.approx(alone, rel=1e-5)
    assert (output.metrics["completions"], output.metrics["dropped_completions/too_long_for_reward_model"]) == (11, 1)


@pytest.mark.slow
def test_score_reward_model_of_two_labels_is_an_error_that_says_so(tmp_path, make_reward_model):
    with pytest.raises((ConfigError, DpoRayError), match="2 labels"):
        run(tmp_path, [rows.scored_row("w10", texts("a", "w20"))], by_model(make_reward_model(num_labels=2)))
