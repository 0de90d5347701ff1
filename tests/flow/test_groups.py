"""The groups of a RayCluster, as KubeRay's autoscaler reads them; those that a platform reports are in test_fit.py."""

import http.server
import json
import threading

import pytest
import ray

from dpo_ray.flow import groups
from dpo_ray.flow.groups import NodeGroup


def group(name, most, limits, labels=None, **fields):
    container = {"name": "ray-worker", "resources": {"limits": limits}}
    template = {"spec": {"containers": [container]}}
    named = {"groupName": name, "minReplicas": 0, "maxReplicas": most, "rayStartParams": {}, "template": template}
    return named | ({"labels": labels} if labels else {}) | fields


CLUSTER = {
    "metadata": {"name": "round", "namespace": "dpo"},
    "spec": {
        "enableInTreeAutoscaling": True,
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},
            "template": {"spec": {"containers": [{"name": "ray-head", "resources": {"limits": {"cpu": "4"}}}]}},
        },
        "workerGroupSpecs": [
            group("cpu", 3, {"cpu": "7500m", "memory": "16Gi"}, {"pool": "cpu"}),
            group("train", 2, {"cpu": "16", "nvidia.com/gpu": "8"}, {"pool": "train"}, numOfHosts=2),
            group("off", 0, {"cpu": "1"}),
        ],
    },
}


def test_groups_of_a_raycluster_have_their_pods_resources_labels_and_maximum():
    cpu, train = groups.groups_of_raycluster(CLUSTER)
    assert cpu == NodeGroup("cpu", {"CPU": 8, "memory": 16 << 30}, {"pool": "cpu"}, 3)
    assert train == NodeGroup("train", {"CPU": 16, "GPU": 8}, {"pool": "train"}, 4)


def test_groups_of_a_raycluster_without_autoscaling_do_not_grow():
    assert groups.groups_of_raycluster({**CLUSTER, "spec": {**CLUSTER["spec"], "enableInTreeAutoscaling": False}}) == []


@pytest.fixture
def in_a_pod(monkeypatch, tmp_path):
    """As in a pod of KubeRay's: the cluster's name, the service account's files, and the address of the API server."""
    (tmp_path / "namespace").write_text("dpo")
    monkeypatch.setattr(groups, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setenv("RAY_CLUSTER_NAME", "round")
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: None)
    groups._kuberay_groups.cache_clear()
    yield monkeypatch
    groups._kuberay_groups.cache_clear()


class ApiServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        found = self.path == "/apis/ray.io/v1/namespaces/dpo/rayclusters/round"
        allowed = self.headers["Authorization"] == "Bearer a-token"
        self.send_response(200 if found and allowed else 403)
        self.end_headers()
        self.wfile.write(json.dumps(CLUSTER).encode())

    def log_message(self, *arguments): ...


@pytest.mark.parametrize(("token", "names"), [("a-token", ["cpu", "train"]), ("another", None)])
def test_groups_in_a_pod_are_read_from_the_api_server_and_unknown_where_that_is_not_allowed(in_a_pod, token, names):
    """A real server over HTTP; Ray's client insists on HTTPS in the address, so the test hands it one without."""
    from ray.autoscaler._private.kuberay import node_provider

    server = http.server.HTTPServer(("127.0.0.1", 0), ApiServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/apis/ray.io/v1/namespaces/dpo/rayclusters/round"
    in_a_pod.setattr(node_provider, "load_k8s_secrets", lambda: ({"Authorization": f"Bearer {token}"}, None, None))
    in_a_pod.setattr(node_provider, "url_from_resource", lambda **where: url)
    try:
        found = groups.node_groups()
    finally:
        server.shutdown()
    assert (found and [g.name for g in found]) == names


def test_groups_in_a_pod_without_a_service_account_are_unknown(in_a_pod, tmp_path):
    (tmp_path / "namespace").unlink()
    assert groups.node_groups() is None


def test_groups_outside_of_kubernetes_are_none(in_a_pod):
    in_a_pod.delenv("RAY_CLUSTER_NAME")
    assert groups.node_groups() == []
