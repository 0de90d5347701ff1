"""Each overlay is rendered once a session."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .manifests import KUBERAY, ROOT, Object, render

REQUIRED = "DPO_RAY_REQUIRE_KUBECTL"
"""Set by .ci/run where kubectl is, or could be installed: a skip would then hide that nothing was checked."""


@pytest.fixture(scope="session")
def kubectl() -> None:
    if shutil.which("kubectl") is None:
        reason = "kubectl is not installed, so cluster/kuberay cannot be rendered (any version from 1.27 on)"
        if os.environ.get(REQUIRED):
            pytest.fail(f"{reason}, and {REQUIRED} is set")
        pytest.skip(reason)


@pytest.fixture(scope="session")
def overlay(kubectl: None) -> Callable[[str], list[Object]]:
    """The objects of an overlay by its name; not to be changed."""
    return functools.cache(lambda name: render(KUBERAY / "overlays" / name))


@pytest.fixture(scope="session")
def monitoring(kubectl: None) -> list[Object]:
    return render(ROOT / "cluster/monitoring")


@pytest.fixture(scope="session")
def crds() -> Path:
    data = os.environ.get("DPO_RAY_TEST_DATA")
    directory = Path(data or "") / "kuberay-crds"
    if not data or not directory.is_dir():
        pytest.skip("the CRDs of KubeRay and Kueue are not below $DPO_RAY_TEST_DATA/kuberay-crds; see tests/README.md")
    return directory
