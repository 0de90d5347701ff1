"""cluster/Dockerfile: what it installs, who it runs as, and what it can see; building it takes a Docker daemon."""

import re
import shlex
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from .manifests import KUBERAY, ROOT
from .project_rules import PROJECT, SECRET_NAME, TAGS

DOCKERFILE = (ROOT / "cluster/Dockerfile").read_text()
CONTEXT = (ROOT / "cluster/Dockerfile.dockerignore").read_text()
README = (ROOT / "cluster/README.md").read_text()


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, without comments, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def mistakes(text: str) -> list[str]:
    found, steps = [], instructions(text)
    runs = [a for i, a in steps if i == "RUN"]
    for extra in TAGS:
        if not any(f"uv pip install -r pyproject.toml --extra {extra}" in r for r in runs):
            found.append(f"the extra {extra} of pyproject.toml is not installed")
    pins = {name for run in runs for name in re.findall(r"([A-Za-z0-9._-]+)==", run)}
    found += [f"{name} is pinned here, and not in pyproject.toml" for name in pins - {"uv"}]
    minor = re.search(r"^python:(\d+\.\d+)-", dict(steps_of(steps, "ARG")).get("PYTHON_IMAGE", ""))
    if not minor or f"{minor[1]}.0" not in SpecifierSet(PROJECT["requires-python"]):
        found.append("the base is no Python that pyproject.toml allows")
    users = [a for i, a in steps if i == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]) or steps[-1][0] not in ("USER", "RUN"):
        found.append("the image does not run as a numeric user other than root")
    environment = dict(steps_of(steps, "ENV"))
    if environment.get("UV_COMPILE_BYTECODE") != "1":
        found.append("packages are installed without bytecode")
    names = [n for kind in ("ARG", "ENV") for n, _ in steps_of(steps, kind)]
    found += [f"{n} looks like a secret" for n in names if SECRET_NAME.search(n)]
    if re.search(r"huggingface|HF_HOME|snapshot_download|hf download", "\n".join(runs)):
        found.append("a model is baked in")
    copied = [a.split() for i, a in steps if i == "COPY" and "--from" not in a]
    allowed = {line[1:] for line in CONTEXT.splitlines() if line.startswith("!")}
    found += [f"{s} is copied, but not in the context" for *sources, _ in copied for s in sources if s not in allowed]
    found += [f"{s} is in the context, but not copied" for s in allowed - {s for *sources, _ in copied for s in sources}]
    return found


def steps_of(steps: list[tuple[str, str]], kind: str) -> list[tuple[str, str]]:
    """Names and values that ARG or ENV instructions set."""
    return [(n, v) for i, a in steps if i == kind for n, _, v in (word.partition("=") for word in shlex.split(a))]


def test_image_has_no_mistakes():
    assert mistakes(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("-r pyproject.toml --extra gpu", "ray==2.60.0 vllm==0.32.0", "the extra gpu of pyproject.toml is not installed"),
        ("--extra cpu --extra lora", "--extra cpu transformers==5.19.0", "transformers is pinned here"),
        ("python:3.11-slim", "python:3.14-slim", "no Python that pyproject.toml allows"),
        ("USER 1000:1000", "USER ray", "numeric user"),
        ("USER 1000:1000", "USER 0:0", "numeric user"),
        ("UV_COMPILE_BYTECODE=1 ", "", "without bytecode"),
        ("ARG EXTRA=gpu", "ARG HF_TOKEN", "HF_TOKEN looks like a secret"),
        ("uv pip install --no-deps .", "hf download Qwen/Qwen3-8B", "a model is baked in"),
        ("COPY pipelines ", "COPY . ", ". is copied, but not in the context"),
        ("COPY dpo_ray dpo_ray", "", "dpo_ray is in the context, but not copied"),
    ],
)
def test_image_mistake_is_found(old, new, message):
    assert old in DOCKERFILE
    assert any(message in m for m in mistakes(DOCKERFILE.replace(old, new)))


def test_context_shuts_everything_else_out():
    lines = [line for line in CONTEXT.splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert [s for s in lines[1:] if s.startswith("!") and not (ROOT / s[1:]).exists()] == []


def test_package_holds_nothing_that_setuptools_would_leave_behind():
    """Only Python files of packages are installed; a data file would be missing in the image alone."""
    files = [f for f in (ROOT / "dpo_ray").rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert [f for f in files if f.suffix != ".py"] == []
    assert [f.parent for f in files if not (f.parent / "__init__.py").exists()] == []


@pytest.mark.parametrize("text", [DOCKERFILE, README], ids=["Dockerfile", "README"])
def test_tags_are_of_the_pinned_versions(text):
    tags = re.findall(r"dpo-ray:([\w.-]+)", text)
    assert tags
    assert set(tags) <= set(TAGS.values())


def test_operator_is_of_one_version():
    values = (KUBERAY / "operator-values.yaml").read_text()
    version = re.search(r"^  tag: v([\d.]+)$", values, re.MULTILINE)
    assert version
    assert set(re.findall(r"--version ([\d.]+)", values + README)) == {version[1]}


def test_working_dir_leaves_out_what_a_job_does_not_need():
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    excluded = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    needed = ["pipelines/full_round.py", "dpo_ray/cli.py", "pyproject.toml", "examples/own_loop.py"]
    useless = [".git", ".git/config", "tests/conftest.py", "cluster/Dockerfile", "benchmarks/dpo.py", ".venv", ".env", "a/.env"]
    assert [p for p in needed if any(e(ROOT / p) for e in excluded)] == []
    assert [p for p in useless if not any(e(Path(ROOT / p)) for e in excluded)] == []
