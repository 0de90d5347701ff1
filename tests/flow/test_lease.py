import os
import socket
import subprocess
import sys
import time

import pytest

from dpo_ray.errors import ResourceError
from dpo_ray.flow import lease, storage
from dpo_ray.flow.lease import Lease


def holder_of(tmp_path, **fields):
    """A lease on disk as another driver would have written it."""
    mine = {"token": "theirs", "host": socket.gethostname(), "pid": os.getpid(), "started": lease._started(os.getpid())}
    storage.write_json(f"{tmp_path}/_lease.json", {**mine, "time": time.time(), **fields})


def test_lease_second_driver_is_refused_while_the_first_lives(tmp_path):
    first = Lease(str(tmp_path))
    with pytest.raises(ResourceError, match=str(os.getpid())):
        Lease(str(tmp_path))
    first.check()
    first.release()
    Lease(str(tmp_path)).release()


def test_lease_released_leaves_nothing_behind(tmp_path):
    Lease(str(tmp_path)).release()
    assert list(tmp_path.iterdir()) == []


def test_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    holder_of(tmp_path, pid=ended.pid, started=1.0)
    taken = Lease(str(tmp_path))
    taken.check()
    taken.release()


def test_lease_of_a_reused_pid_is_taken_over(tmp_path):
    holder_of(tmp_path, started=1.0)
    Lease(str(tmp_path)).release()


def test_lease_of_another_machine_without_a_sign_of_life_for_long_is_taken_over_at_once(tmp_path):
    holder_of(tmp_path, host="elsewhere", time=time.time() - lease.EXPIRES_S - 1)
    said = []
    Lease(str(tmp_path), said.append).release()
    assert said == []


@pytest.mark.parametrize("clock_s", [0.0, 3600.0], ids=["same clock", "clock ahead"])
def test_lease_of_a_head_that_died_a_moment_ago_is_waited_out(tmp_path, monkeypatch, clock_s):
    """As a new cluster finds it that came up at once."""
    monkeypatch.setattr(lease, "EXPIRES_S", 0.6)
    monkeypatch.setattr(lease, "LOOK_S", 0.05)
    holder_of(tmp_path, host="elsewhere", time=time.time() + clock_s)
    said, started = [], time.monotonic()
    taken = Lease(str(tmp_path), said.append)
    assert 0.3 < time.monotonic() - started < 5
    assert len(said) == 1
    taken.check()
    taken.release()


def test_lease_of_another_machine_that_gives_a_sign_of_life_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "LOOK_S", 0.05)
    holder_of(tmp_path, host="elsewhere")
    with pytest.raises(ResourceError, match="elsewhere"):
        Lease(str(tmp_path), lambda said: holder_of(tmp_path, host="elsewhere", time=time.time() + 1))


def test_lease_taken_over_by_another_commits_nothing_more_and_leaves_it_alone(tmp_path):
    mine = Lease(str(tmp_path))
    holder_of(tmp_path)
    with pytest.raises(ResourceError):
        mine.check()
    mine.release()
    assert storage.read_json(f"{tmp_path}/_lease.json")["token"] == "theirs"
