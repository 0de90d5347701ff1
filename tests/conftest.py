"""One local Ray for the whole session, and tiny models on disk that several modules share."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before Ray is imported anywhere: a local cluster needs no token, and Ray Train reads its version from the environment.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest

from dpo_ray.engines.policies import PolicyRef

NUM_CPUS = 4
LABELS = {"pool": "local"}
"""Of the session's one node."""


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Four logical CPUs, so that two train workers and a task beside them find room on a small machine."""
    import ray
    import ray.data

    from dpo_ray.flow.cluster import worker_environment

    ray.init(
        runtime_env=worker_environment(),
        num_cpus=NUM_CPUS,
        labels=LABELS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=256 << 20,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    yield
    ray.shutdown()


@pytest.fixture
def idle_ray(local_ray: None) -> None:
    """Ray with every CPU free: what earlier tests held is back."""
    import ray

    from .waiting import wait_until

    wait_until(lambda: ray.available_resources().get("CPU") == NUM_CPUS)


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Tiny matrices run faster on one thread than on all."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> PolicyRef:
    """A tiny random Llama with a word tokenizer and a chat template.

    Not a Qwen2: transformers gives a directory of that model type its own tokenizer class, whatever lies there.
    """
    from dpo_ray.learn.policy_files import policy_identity

    from .learn import tiny

    path = tiny.save_policy(tmp_path_factory.mktemp("policy"), "llama")
    return PolicyRef(path, policy_identity(path))


@pytest.fixture(scope="session")
def make_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Writes a tiny random sequence classifier with a tokenizer, and returns its directory."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from .learn import tiny

    def make(
        *, num_labels: int = 1, model_pad: int | None = tiny.PAD, tokenizer_pad: str | None = "<pad>", template: str = ""
    ) -> str:
        directory: Path = tmp_path_factory.mktemp("reward-model")
        torch.manual_seed(0)
        config = LlamaConfig(**{**tiny.DECODER, "pad_token_id": model_pad, "num_labels": num_labels})
        LlamaForSequenceClassification(config).float().save_pretrained(directory)
        tokenizer = tiny.build_tokenizer()
        tokenizer.pad_token = tokenizer_pad
        if template:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)
        return str(directory)

    return make
