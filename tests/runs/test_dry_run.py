"""The GPU cases are placed on nodes of their shape, without a GPU or a model hub: on a cluster with a fake GPU, as the
command of a user, and in this process on what Ray says of such nodes.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import ray

from pipelines import full_round

from .conftest import ROOT, Cluster, start_cluster

ONE_GPU, EIGHT_GPUS = "pipelines/ultrafeedback_qwen3_1.7b_1gpu.yaml", "pipelines/ultrafeedback_qwen3_8b_8gpu.yaml"
DryRun = Callable[..., tuple[int, str, str]]


@pytest.fixture
def one_gpu() -> Iterator[Cluster]:
    yield from start_cluster("--num-cpus=16", "--num-gpus=1")


@pytest.fixture
def dry_run(local_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> DryRun:
    """Takes what a node has and the arguments; gives the exit status, and what stands on stdout and stderr."""

    def run(cpus: int, gpus: int, config: str, *arguments: str) -> tuple[int, str, str]:
        node = {"NodeID": "n", "NodeManagerAddress": "a", "Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}, "Labels": {}}
        monkeypatch.setattr(ray, "nodes", lambda: [node])
        monkeypatch.setattr(sys, "argv", ["full_round.py", str(ROOT / config), *arguments, "--dry-run"])
        capsys.readouterr()
        status, printed = full_round.main(), capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_dry_run_one_gpu_case_fits_one_gpu(one_gpu: Cluster) -> None:
    command = [sys.executable, "pipelines/full_round.py", ONE_GPU, "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=one_gpu.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 engine x 4 CPU + 1 GPU" in done.stdout
    assert "1 train worker x 4 CPU + 1 GPU" in done.stdout


def test_dry_run_eight_gpu_case_on_one_gpu_says_what_is_missing(dry_run: DryRun) -> None:
    status, _, err = dry_run(16, 1, EIGHT_GPUS)
    assert status == 1
    assert "needs 4 engine x 4 CPU + 1 GPU and 0.25 CPU for the tasks that feed it, but only 1 fit" in err
    assert "12 CPU + 3 GPU are missing" in err
    assert "Traceback" not in err


def test_dry_run_eight_gpu_case_fits_eight_gpus_in_three_rounds(dry_run: DryRun) -> None:
    status, out, err = dry_run(96, 8, EIGHT_GPUS)
    assert status == 0, err
    assert "round_02/evaluate" in out
    assert "8 train worker x 4 CPU + 1 GPU" in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("--train.global_batch_size", "100"), "does not divide over workers=8"),
        (("--generate.resources.tensor_parallel", "4"), "tensor_parallel=4 needs gpus=4"),
    ],
)
def test_dry_run_indivisible_shapes_are_refused(dry_run: DryRun, override: tuple[str, str], message: str) -> None:
    status, _, err = dry_run(96, 8, EIGHT_GPUS, *override)
    assert status == 1
    assert message in err


def test_dry_run_engine_wider_than_a_node_is_refused(dry_run: DryRun) -> None:
    wide = ("--generate.resources.tensor_parallel", "16", "--generate.resources.gpus", "16")
    status, _, err = dry_run(96, 8, EIGHT_GPUS, *wide)
    assert status == 1
    assert "needs 4 engine x 4 CPU + 16 GPU and 0.25 CPU for the tasks that feed it, but only 0 fit" in err
