"""The GPU cases are placed on clusters of their shape (fake GPUs), without a GPU or a model hub."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from .conftest import ROOT, Cluster, start_cluster

ONE_GPU, EIGHT_GPUS = "pipelines/ultrafeedback_qwen3_1.7b_1gpu.yaml", "pipelines/ultrafeedback_qwen3_8b_8gpu.yaml"


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[Cluster]:
    yield from start_cluster("--num-cpus=16", "--num-gpus=1")


@pytest.fixture(scope="module")
def eight_gpus() -> Iterator[Cluster]:
    yield from start_cluster("--num-cpus=96", "--num-gpus=8")


def dry_run(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "pipelines/full_round.py", *arguments, "--dry-run"]
    return subprocess.run(command, cwd=ROOT, env=cluster.env, capture_output=True, text=True, timeout=120)


def test_dry_run_one_gpu_case_fits_one_gpu(one_gpu: Cluster) -> None:
    done = dry_run(one_gpu, ONE_GPU)
    assert done.returncode == 0, done.stderr
    assert "1 engine x 4 CPU + 1 GPU" in done.stdout
    assert "1 train worker x 4 CPU + 1 GPU" in done.stdout


def test_dry_run_eight_gpu_case_on_one_gpu_says_what_is_missing(one_gpu: Cluster) -> None:
    done = dry_run(one_gpu, EIGHT_GPUS)
    assert done.returncode == 1
    assert "needs 4 engine x 4 CPU + 1 GPU, but only 1 fit" in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_eight_gpu_case_fits_eight_gpus_in_three_rounds(eight_gpus: Cluster) -> None:
    done = dry_run(eight_gpus, EIGHT_GPUS)
    assert done.returncode == 0, done.stderr
    assert "round_02/evaluate" in done.stdout
    assert "8 train worker x 4 CPU + 1 GPU" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("--train.global_batch_size", "100"), "does not divide over workers=8"),
        (("--generate.resources.tensor_parallel", "4"), "tensor_parallel=4 needs gpus=4"),
    ],
)
def test_dry_run_indivisible_shapes_are_refused(eight_gpus: Cluster, override: tuple[str, str], message: str) -> None:
    done = dry_run(eight_gpus, EIGHT_GPUS, *override)
    assert done.returncode == 1
    assert message in done.stderr


def test_dry_run_engine_wider_than_a_node_is_refused(eight_gpus: Cluster) -> None:
    wide = ("--generate.resources.tensor_parallel", "16", "--generate.resources.gpus", "16")
    done = dry_run(eight_gpus, EIGHT_GPUS, *wide)
    assert done.returncode == 1
    assert "16 GPU, but only 0 fit" in done.stderr
