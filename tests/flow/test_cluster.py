import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from dpo_ray.errors import ResourceError
from dpo_ray.flow import cluster

pytestmark = pytest.mark.usefixtures("idle_ray")


def test_idle_wait_returns_when_nothing_is_held():
    cluster.Idle().wait("pair", timeout_s=0.0)


def test_idle_wait_names_the_cpus_that_are_still_held_and_passes_when_they_are_back(hold):
    idle = cluster.Idle()
    actor = hold()
    with pytest.raises(ResourceError, match=r"round_00/pair ended.* 1 CPU"):
        idle.wait("round_00/pair", timeout_s=0.2)
    ray.kill(actor)
    idle.wait("round_00/pair", timeout_s=20)


def test_idle_wait_does_not_blame_a_stage_for_what_was_held_before_it(hold):
    hold()
    cluster.Idle().wait("round_00/pair", timeout_s=0.0)


def test_idle_wait_names_a_placement_group_that_is_left():
    idle = cluster.Idle()
    group = placement_group([{"CPU": 0.01}])
    ray.get(group.ready())
    with pytest.raises(ResourceError, match=f"placement group {group.id.hex()}"):
        idle.wait("round_00/train", timeout_s=0.2)
    remove_placement_group(group)
    idle.wait("round_00/train", timeout_s=20)


def test_probe_shared_root_that_every_node_sees_passes_and_is_left_as_it_was(tmp_path):
    cluster.probe_shared(str(tmp_path / "root with a space"))
    assert list((tmp_path / "root with a space").iterdir()) == []


def test_probe_shared_unwritable_root_is_a_resource_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    root = f"{tmp_path}/file/root"
    with pytest.raises(ResourceError, match=root):
        cluster.probe_shared(root)


def test_connect_starts_a_ray_of_its_own_where_the_one_that_was_started_here_is_gone():
    driver = "from dpo_ray.flow import cluster; cluster.connect(); import ray; print(ray.get_runtime_context().gcs_address)"
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:  # as Ray's socket paths must be
        gone = Path(short) / "ray/ray_current_cluster"
        gone.parent.mkdir()
        gone.write_text("127.0.0.1:1")
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_TMPDIR": short}
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", driver], cwd=root, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "127.0.0.1:1) does not answer" in done.stderr
    assert done.stdout.strip() not in ("", "127.0.0.1:1")
