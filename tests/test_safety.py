"""What the code may open: no pickle but the run's own checkpoints, weights from safetensors alone, and no port."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_ray.learn import sharded_load
from dpo_ray.scorers.reward_model import RewardModel

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(p for below in ("dpo_ray", "pipelines", "examples") for p in (ROOT / below).rglob("*.py"))
UNPICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.load", "numpy.load", "np.load"}
UNPICKLES |= {
    "read_pickle",
    "torch.distributed.checkpoint.state_dict_loader",
    "torch.distributed.checkpoint.load",
    "torch.jit.load",
}
SERVES = {"socketserver", "http.server", "aiohttp.web", "uvicorn", "fastapi", "flask", "ray.serve", "xmlrpc", "grpc"}
SERVES |= {
    "asyncio.start_server",
    "create_server",
    "start_server",
    "start_http_server",
    "bind",
    "listen",
    "gradio",
    "TCPServer",
}
WEIGHTS_LOADERS = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel", "PreTrainedModel", "PeftModel")


def names(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, and that it calls; `a.b.c(...)` gives a.b.c, b.c and c."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            parts = ast.unparse(node.func).split(".")
            yield from (".".join(parts[i:]) for i in range(len(parts)))


def using(forbidden: set[str]) -> dict[str, set[str]]:
    found = {str(path.relative_to(ROOT)): set(names(path)) & forbidden for path in SHIPPED}
    return {path: used for path, used in found.items() if used}


def test_names_are_read_from_imports_and_calls(tmp_path):
    (tmp_path / "it.py").write_text("import pickle\nfrom torch import load\nimport torch as t\nx = s.socket().bind(y)\n")
    assert {"pickle", "torch.load", "bind"} <= set(names(tmp_path / "it.py"))


def test_nothing_unpickles_but_the_checkpoints_of_training():
    """learn/checkpoint.py hands files to DCP; train_state.py, which alone calls it on storage, has held each to its hash."""
    assert set(using(UNPICKLES)) == {"dpo_ray/learn/checkpoint.py"}
    callers = {path for path, used in using({"checkpoint.load_checkpoint", "load_checkpoint"}).items() if used}
    assert callers == {"dpo_ray/train_state.py"}


def test_nothing_serves_or_listens():
    assert using(SERVES) == {}


def test_every_model_is_loaded_from_safetensors():
    calls = [
        (path, node)
        for path in SHIPPED
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(tuple(f"{n}.from_pretrained" for n in WEIGHTS_LOADERS))
    ]
    assert {str(path.relative_to(ROOT)) for path, _ in calls} >= {"dpo_ray/learn/policy.py", "dpo_ray/scorers/reward_model.py"}
    for path, call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("use_safetensors") == "True", f"{path}:{call.lineno}"


def test_nothing_is_started_again_for_ever():
    limits = {"max_restarts", "max_retries", "max_task_retries", "max_failures", "max_preemption_failures"}
    limits |= {"controller_failure_limit"}
    given = [
        (path, keyword)
        for path in SHIPPED
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call | ast.Dict)
        for keyword in _given(node)
        if keyword[0] in limits
    ]
    assert {name for _, (name, _) in given} == limits
    assert [(str(path), name, value) for path, (name, value) in given if value.startswith("-") or value == "None"] == []


def _given(node: ast.Call | ast.Dict) -> list[tuple[str, str]]:
    if isinstance(node, ast.Call):
        return [(keyword.arg or "", ast.unparse(keyword.value)) for keyword in node.keywords]
    pairs = zip(node.keys, node.values, strict=True)
    return [(key.value, ast.unparse(value)) for key, value in pairs if isinstance(key, ast.Constant)]


@pytest.fixture
def pickled(make_reward_model) -> Path:
    """A model whose weights are there as a pickle alone."""
    directory = Path(make_reward_model(template="{{ messages[0].content }}"))
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


def test_pickled_weights_of_a_reward_model_are_refused(pickled):
    with pytest.raises(OSError, match="safetensors"):
        RewardModel(str(pickled), revision=None, trust_remote_code=False, dtype="float32", use_gpu=False)


def test_pickled_weights_of_a_policy_to_be_sharded_are_refused(pickled):
    model = sharded_load._empty_model(str(pickled), held_dtype=torch.float32, revision=None, trust_remote_code=False)
    with pytest.raises(OSError, match="safetensors"):
        sharded_load._weight_files(str(pickled), model, None)
