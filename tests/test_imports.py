"""The rules of DESIGN about who may import whom: by reading every import statement, and by what is loaded afterwards."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "ray", "vllm", "transformers", "datasets", "pyarrow"}


def files(below: str) -> list[Path]:
    return sorted((ROOT / below).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, also inside functions; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def breaking(below: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    """`file imports name` for every import at or below a forbidden name."""

    def at_or_below(name: str, tops: tuple[str, ...]) -> bool:
        return any(name == top or name.startswith(f"{top}.") for top in tops)

    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(below)
        for name in imports(path)
        if at_or_below(name, forbidden) and not at_or_below(name, allowed) and name != "dpo_ray"
    ]


def loaded_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after running `code`."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


def modules(below: str) -> list[str]:
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files(below)]
    return [n.removesuffix(".__init__") for n in names]


def test_imports_of_this_test_are_seen_by_its_own_reading():
    assert {"ast", "collections.abc", "collections.abc.Iterator", "pytest"} <= set(imports(Path(__file__)))
    assert breaking("dpo_ray/stages", ("ray.data",))  # it can fail: stages do import ray.data


def test_learn_imports_nothing_of_ours_but_errors():
    assert breaking("dpo_ray/learn", ("ray", "vllm")) == []
    assert breaking("dpo_ray/learn", ("dpo_ray",), ("dpo_ray.learn", "dpo_ray.errors")) == []


def test_learn_loaded_as_a_whole_loads_no_ray():
    loaded = loaded_after(f"import {', '.join(modules('dpo_ray/learn'))}")
    assert "torch" in loaded
    assert loaded & {"ray", "vllm"} == set()
    ours = {n for n in loaded if n.startswith("dpo_ray.")}
    assert {n for n in ours if not n.startswith("dpo_ray.learn")} == {"dpo_ray.errors"}


def test_flow_imports_no_torch_or_vllm_and_none_of_what_it_is_handed():
    handed = ("dpo_ray.stages", "dpo_ray.learn", "dpo_ray.engines", "dpo_ray.scorers", "dpo_ray.config", "pipelines")
    assert breaking("dpo_ray/flow", ("torch", "vllm", "transformers", *handed)) == []


def test_flow_imports_ray_data_in_parts_alone_and_in_cluster_to_quiet_it():
    found = {line.split()[0] for line in breaking("dpo_ray/flow", ("ray.data",))}
    assert found == {"dpo_ray/flow/parts.py", "dpo_ray/flow/cluster.py"}


def test_flow_loaded_as_a_whole_loads_no_torch():
    loaded = loaded_after(f"import {', '.join(modules('dpo_ray/flow'))}")
    assert "ray" in loaded
    assert loaded & {"torch", "vllm", "transformers"} == set()
    assert {n for n in loaded if n.startswith("dpo_ray.")} - set(modules("dpo_ray/flow")) == {
        "dpo_ray.errors",
        "dpo_ray.schemas",
    }


def test_stages_import_no_other_stage():
    assert breaking("dpo_ray/stages", ("dpo_ray.stages", "pipelines")) == []


def test_library_imports_nothing_that_uses_it():
    assert breaking("dpo_ray", ("pipelines", "examples", "benchmarks", "tests")) == []


def test_own_loop_needs_no_ray():
    loaded = loaded_after("import examples.own_loop")
    assert "torch" in loaded
    assert loaded & {"ray", "vllm"} == set()


@pytest.mark.parametrize("package", ["engines", "scorers", "learn", "flow", "quickstart"])
def test_package_below_stages_imports_no_stage(package):
    assert breaking(f"dpo_ray/{package}", ("dpo_ray.stages", "dpo_ray.cli", "pipelines")) == []


def test_only_the_vllm_engine_imports_vllm():
    assert {line.split()[0] for line in breaking("dpo_ray", ("vllm",))} <= {"dpo_ray/engines/vllm.py"}


@pytest.mark.parametrize("module", ["dpo_ray", "dpo_ray.errors", "dpo_ray.config", "dpo_ray.cli"])
def test_what_help_needs_loads_nothing_heavy(module):
    assert loaded_after(f"import {module}") & HEAVY == set()


def test_schemas_load_no_torch_or_ray():
    assert loaded_after("import dpo_ray.schemas") & {"torch", "ray", "vllm"} == set()
