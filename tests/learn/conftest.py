"""Policies on disk, built once per session."""

from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from . import tiny

logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny matrices run faster on one thread than on all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def policies(tmp_path_factory) -> dict[str, str]:
    """Directory of each architecture's policy, stored in float32."""
    root: Path = tmp_path_factory.mktemp("policies")
    return {name: tiny.save_policy(root / name, name) for name in tiny.configs()}
