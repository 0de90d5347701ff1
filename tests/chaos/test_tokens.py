"""A cluster with token authentication: `ray job submit` without the token is refused, and with it a round runs on two nodes."""

import json
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from dpo_ray.engines.policies import PolicyRef

from ..runs.conftest import Cluster, start_cluster
from .rounds import ONE_A_NODE, config, hashes

pytestmark = pytest.mark.chaos
TOKEN = uuid.uuid4().hex + uuid.uuid4().hex


@pytest.fixture(scope="module")
def guarded() -> Iterator[Cluster]:
    """A head without CPUs and two nodes."""
    for cluster in start_cluster("--num-cpus=0", added={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}):
        with ExitStack() as nodes:
            for _ in range(2):
                nodes.enter_context(cluster.join("--num-cpus=2", "--memory=2000000000", "--object-store-memory=100000000"))
            yield cluster


def listed(cluster: Cluster, path: str, token: str | None = TOKEN) -> bytes:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(cluster.env["RAY_API_SERVER_ADDRESS"] + path, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


@pytest.mark.parametrize(("token", "status"), [(None, 401), (uuid.uuid4().hex, 403)], ids=["none", "wrong"])
def test_job_without_the_token_of_its_cluster_is_refused(
    guarded: Cluster, tmp_path: Path, token: str | None, status: int
) -> None:
    before = listed(guarded, "/api/jobs/")
    env = {k: v for k, v in guarded.env.items() if not k.startswith("RAY_AUTH")} | {"HOME": str(tmp_path)}  # has no .ray
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    done = guarded._replace(env=env).submit("pipelines/quickstart.yaml", "--root", str(tmp_path / "root"), timeout=120)
    assert done.returncode != 0
    assert "authentication" in done.stderr.lower(), done.stderr
    with pytest.raises(urllib.error.HTTPError) as refused:
        listed(guarded, "/api/jobs/", token)
    assert refused.value.code == status
    assert listed(guarded, "/api/jobs/") == before
    assert not (tmp_path / "root").exists()


def test_round_submitted_with_the_token_trains_on_two_nodes(
    guarded: Cluster, undisturbed: Path, policy: PolicyRef, tmp_path: Path
) -> None:
    tree = config(tmp_path, policy.path)
    tree["root"], tree["train"]["resources"]["cpus"] = str(tmp_path / "root"), ONE_A_NODE
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    done = guarded.submit(str(tmp_path / "run.yaml"), "--until", "train", timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    run = tmp_path / "root/run"
    assert hashes(run / "round_00") == hashes(undisturbed)

    actors = json.loads(listed(guarded, "/api/v0/actors?detail=True&limit=1000"))["data"]["result"]["result"]
    workers = [a["node_id"] for a in actors if a["class_name"] == "RayTrainWorker"]
    assert len(workers) == len(set(workers)) == 2
    assert [p for p in run.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()] == []
