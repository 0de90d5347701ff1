"""The undisturbed round that every test compares with, and the table of what each fault cost."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpo_ray.engines.policies import PolicyRef

from ..runs.conftest import Cluster, start_cluster
from .faults import Fault
from .rounds import config, running

SEEDS = "1,2"
TABLE: pytest.StashKey[list[Fault]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos")
    group.addoption("--chaos-seeds", default=SEEDS, help=f"of the faults at random moments, by commas ({SEEDS})")
    group.addoption("--chaos-table", metavar="FILE", help="write the table of faults there too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        seeds = str(metafunc.config.getoption("--chaos-seeds", SEEDS))
        metafunc.parametrize("seed", [int(seed) for seed in seeds.split(",")])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    faults = config.stash.get(TABLE, [])
    if not faults:
        return
    rows = [("fault", "stage", "lost", "seconds to recover"), *((f.fault, f.stage, f.lost, f"{f.seconds:.1f}") for f in faults)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    terminalreporter.section("faults")
    for line in lines:
        terminalreporter.write_line(line)
    if file := config.getoption("--chaos-table", None):
        Path(file).write_text("\n".join(lines) + "\n")


@pytest.fixture
def record(pytestconfig: pytest.Config) -> Callable[[Fault], None]:
    """Puts a fault into the table that is printed at the end."""
    return pytestconfig.stash.setdefault(TABLE, []).append


@pytest.fixture(scope="session")
def one_node() -> Iterator[Cluster]:
    """A cluster that no test harms: four logical CPUs on one node."""
    yield from start_cluster("--num-cpus=4")


@pytest.fixture(scope="session")
def undisturbed(one_node: Cluster, policy: PolicyRef, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of round 0 of a run that nothing happened to."""
    directory = tmp_path_factory.mktemp("undisturbed")
    with running(one_node, directory, config(directory, policy.path)) as run:
        run.completes()
        return run.directory
