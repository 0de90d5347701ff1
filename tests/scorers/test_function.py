import pytest

from dpo_ray.errors import ConfigError, StageError
from dpo_ray.flow.fingerprint import hash_file
from dpo_ray.scorers.function import call, function_sources, load_function

SOURCE = """
import functools

class Judge:
    def __call__(self, rows):
        return [0.0 for _ in rows]

def score(rows):
    return [float(len(r["completion"])) for r in rows]

def other(rows):
    return [0.0 for _ in rows]

judge = Judge()
number = 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "my_score.py").write_text(SOURCE)
    return tmp_path / "my_score.py"


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/__init__.py").write_text("")
    (tmp_path / "my_package/judging.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_package.judging"


def rows(*completions):
    return [{"completion": c} for c in completions]


def test_load_function_from_a_file(file):
    assert load_function(f"{file}:score")(rows("abc", "")) == [3.0, 0.0]


def test_load_function_from_a_dotted_path(package):
    assert load_function(f"{package}:score")(rows("abc")) == [3.0]


def test_load_function_that_comes_with_the_quickstart():
    assert callable(load_function("dpo_ray.quickstart.sentiment:score"))


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("{file}:scroe", ["scroe", "'other', 'score'"]),
        ("{file}:number", ["number"]),
        ("{file}", ["package.module:name"]),
        (":score", ["package.module:name"]),
        ("no.such.package:score", ["no.such.package", "ModuleNotFoundError"]),
        ("/no/such/file.py:score", ["/no/such/file.py", "no such file"]),
    ],
)
def test_load_function_that_is_not_there_is_a_config_error(file, spec, named):
    with pytest.raises(ConfigError) as error:
        load_function(spec.format(file=file))
    assert [n for n in ["score.function", *named] if n not in str(error.value)] == []


@pytest.mark.parametrize(
    ("text", "named"), [("import no_such_thing", "no_such_thing"), ("def (", "SyntaxError"), ("1 / 0", "Zero")]
)
def test_load_function_of_a_file_that_does_not_import_is_a_config_error(file, text, named):
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_function(f"{file}:score")


def test_function_sources_hash_the_file_and_change_with_it(file):
    before = function_sources(f"{file}:score")
    assert before == {"source of my_score.py": hash_file(file)}
    file.write_text(SOURCE + "\n# another rule\n")
    assert function_sources(f"{file}:score") != before


def test_function_sources_do_not_depend_on_the_place(file, tmp_path):
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved/my_score.py"
    moved.write_text(SOURCE)
    assert function_sources(f"{file}:score") == function_sources(f"{moved}:score")


def test_function_sources_of_an_imported_function_hash_the_file_that_defines_it(package, tmp_path):
    (tmp_path / "outer.py").write_text(f"from {package} import score\n")
    assert function_sources("outer:score") == {"source of judging.py": hash_file(tmp_path / "my_package/judging.py")}


@pytest.mark.parametrize("spec", ["{file}:judge", "functools:partial", "builtins:len"])
def test_function_sources_of_a_callable_without_source_are_known_or_a_config_error(file, spec):
    """What cannot be hashed could change unnoticed: either its file counts, or it is refused."""
    try:
        sources = function_sources(spec.format(file=file))
    except ConfigError:
        return
    assert all(len(digest) == 64 for digest in sources.values())


def test_call_gives_one_score_a_row_in_order():
    assert call(lambda rows: [len(r["completion"]) for r in rows], rows("abc", "", "a")) == [
        (3.0, None),
        (0.0, None),
        (1.0, None),
    ]


def test_call_row_that_raises_is_dropped_alone_with_its_error():
    def score(rows):
        return [1 / len(r["completion"]) for r in rows]

    got = call(score, rows("a", "", "ab", ""))
    assert [value for value, _ in got] == [1.0, None, 0.5, None]
    assert [reason is None for _, reason in got] == [True, False, True, False]
    assert got[1][1].split(":")[0] == "scorer_error"
    assert "ZeroDivisionError" in got[1][1]


def test_call_error_of_any_length_gives_a_short_reason():
    def score(rows):
        raise ValueError("x" * 10_000)

    ((value, reason),) = call(score, rows("a"))
    assert value is None
    assert len(reason) <= 200


@pytest.mark.parametrize("returned", [[], [1.0], [1.0, 2.0, 3.0]])
def test_call_wrong_number_of_scores_is_a_stage_error(returned):
    with pytest.raises(StageError, match=rf"{len(returned)} scores for 2 rows"):
        call(lambda rows: returned, rows("a", "b"))


@pytest.mark.parametrize("returned", [["good", 1.0], [1.0, None], [1.0, [2.0]]])
def test_call_score_that_is_no_number_is_a_stage_error(returned):
    with pytest.raises(StageError, match="numbers"):
        call(lambda rows: returned, rows("a", "b"))


def test_call_takes_any_sequence_of_numbers():
    import numpy as np

    got = call(lambda rows: np.array([1.5, 2.5], np.float32), rows("a", "b"))
    assert got == [(1.5, None), (2.5, None)]
    assert all(type(value) is float for value, _ in got)
