"""A Ray cluster of its own, as `ray start --head` makes it, for whole rounds."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dpo_ray.quickstart.policy import build_policy

from ..processes import family, title
from ..waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
LOCAL = "127.0.0.1"
SECRETS = {
    name: f"secret-{uuid.uuid4().hex}" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY")
}
"""In the environment of every node and of whoever submits; test_job_submit.py looks for them in all that is written."""


class Cluster(NamedTuple):
    """Environment for commands that talk to it, the `bin` of its Python environment, and its first process."""

    env: dict[str, str]
    bin: Path
    pid: int
    temp: Path
    """Where Ray writes: its sessions, with every log."""

    @contextmanager
    def join(self, *options: str, on: Sequence[str] = (), address: str = LOCAL) -> Iterator[subprocess.Popen[bytes]]:
        """One more node, until the block is left; on another host by a command before its own, and the host's address."""
        start = [*on, str(self.bin / "python"), "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={address}"]
        start += [f"--address={self.env['RAY_ADDRESS']}", "--dashboard-agent-listen-port=0", *options]
        log = self.temp / f"node-{uuid.uuid4().hex}.log"
        with log.open("wb") as out:
            unbuffered = {**self.env, "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(start, env=unbuffered, stdout=out, stderr=out, start_new_session=True)
            try:
                # One at a time: nodes of one machine share the session's directory, and two that start at once may hang.
                wait_until(lambda: process.poll() is not None or b"Ray runtime started" in log.read_bytes(), 90)
                yield process
            finally:
                with suppress(ProcessLookupError):  # a test that kills the node has ended it
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)

    def state(self, of: str) -> list[Any]:
        """What Ray's state API lists: `nodes`, `actors` or `tasks`, in full."""
        from ray.util import state

        listing = getattr(state, f"list_{of}")
        return listing(address=self.env["RAY_API_SERVER_ADDRESS"], limit=5000, detail=True, raise_on_missing_output=False)

    def processes(self) -> list[str]:
        """Titles of the cluster's processes; that of a worker says which task or actor runs in it."""
        return [title(process) for process in family(self.pid)[1:]]

    def submit(self, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- python pipelines/full_round.py ...`, from the checkout."""
        command = [
            str(self.bin / "python"),
            "-m",
            "ray.scripts.scripts",
            "job",
            "submit",
            "--working-dir",
            ".",
            "--",
            "python",
            "pipelines/full_round.py",
            *arguments,
        ]
        return subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=timeout)


def start_cluster(
    *options: str, added: Mapping[str, str] | None = None, on: Sequence[str] = (), address: str = LOCAL
) -> Iterator[Cluster]:
    """A head, until the generator goes on; `added` is environment of nodes and commands, `on` and `address` as in `join`."""
    port, dashboard = _free_port(), _free_port()
    # Ray's socket paths must be short, and a process of a node that was killed may still write its log.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        environment = Path(temp) / "venv"  # Ray starts its workers through a shell and does not quote a path with a space
        environment.symlink_to(sys.prefix)
        bin_ = environment / "bin"
        env = {
            **os.environ,
            "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_ADDRESS": f"{address}:{port}",
            "RAY_API_SERVER_ADDRESS": f"http://{address}:{dashboard}",
            "RAY_USAGE_STATS_ENABLED": "0",
            **SECRETS,
            **(added or {}),
        }
        fixed = [f"--dashboard-host={address}"] if address != LOCAL else []
        fixed += [f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={temp}", "--dashboard-agent-listen-port=0"]
        command = [
            *on,
            str(bin_ / "python"),
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            f"--node-ip-address={address}",
            *fixed,
            *options,
        ]
        without = {k: v for k, v in env.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
        log = open(f"{temp}/start.log", "w")  # noqa: SIM115  # closed with the process below
        process = subprocess.Popen(command, env=without, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(address, dashboard, process, Path(log.name))
            yield Cluster(env, bin_, process.pid, Path(temp))
        finally:
            with suppress(ProcessLookupError):  # a test that kills the head has ended it
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            log.close()


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's architecture after a few steps of its training: real words, little sense."""
    directory = tmp_path_factory.mktemp("policy") / "tiny"
    build_policy(directory, seed=0, num_steps=60)
    return directory


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four logical CPUs on the two real ones, so that the engine stays up beside training."""
    yield from start_cluster("--num-cpus=4")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait_for(address: str, dashboard: int, process: subprocess.Popen[bytes], log: Path, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"ray start ended with {process.returncode}:\n{log.read_text()}")
        with socket.socket() as s:
            s.settimeout(1)
            if s.connect_ex((address, dashboard)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"ray start gave no dashboard within {timeout} s:\n{log.read_text()}")
