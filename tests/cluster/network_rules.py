"""Who may talk to whom under an overlay's NetworkPolicies, by the rules of networking.k8s.io/v1."""

import ipaddress
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from .manifests import Object, of_kind, workloads

NAMESPACE = "dpo-ray"


class End(NamedTuple):
    """One end of a connection: a pod of a namespace, or an address outside the cluster."""

    what: str
    labels: Mapping[str, str] = MappingProxyType({})
    namespace: str = NAMESPACE
    address: str | None = None


HEAD = End("the head", {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"})
WORKER = End("a worker", {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"})
SUBMITTER = End("the submitter", {"ray.io/originated-from-crd": "RayJob", "ray.io/originated-from-cr-name": "dpo-ray"})
STRANGER = End("another pod of the namespace", {"app": "other"})
OPERATOR = End("the operator", {"app.kubernetes.io/name": "kuberay-operator"}, "kuberay-system")
PROMETHEUS = End("Prometheus", {"app.kubernetes.io/name": "prometheus"}, "monitoring")
ELSEWHERE = End("a pod of another namespace", {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}, "other")
DNS = End("DNS", {"k8s-app": "kube-dns"}, "kube-system")
API = End("the Kubernetes API", address="10.0.0.1")
INTERNET = End("the internet", address="203.0.113.7")
METADATA = End("the instance's metadata", address="169.254.169.254")

ALLOWED = [
    (WORKER, HEAD, 6379), (HEAD, WORKER, 10002), (WORKER, WORKER, 29500),
    (SUBMITTER, HEAD, 8265), (OPERATOR, HEAD, 8265), (HEAD, API, 443), (HEAD, API, 6443),
    (PROMETHEUS, HEAD, 8080), (PROMETHEUS, HEAD, 44217), (PROMETHEUS, HEAD, 44227), (PROMETHEUS, WORKER, 8080),
    *[(end, DNS, 53) for end in (HEAD, WORKER, SUBMITTER)],
]  # fmt: skip
REFUSED = [
    *[(end, HEAD, port) for end in (STRANGER, ELSEWHERE) for port in (6379, 8265, 10001, 8080)],
    *[(end, WORKER, 8080) for end in (STRANGER, ELSEWHERE, SUBMITTER)],
    (ELSEWHERE, STRANGER, 80), (ELSEWHERE, SUBMITTER, 80),
    (SUBMITTER, HEAD, 6379), (OPERATOR, HEAD, 6379), (PROMETHEUS, HEAD, 8265),
    (SUBMITTER, INTERNET, 443), (SUBMITTER, API, 443), (WORKER, API, 6443), (STRANGER, INTERNET, 443),
    *[(end, METADATA, port) for end in (HEAD, WORKER, SUBMITTER) for port in (80, 443)],
    *[(end, INTERNET, 22) for end in (HEAD, WORKER, SUBMITTER)],
]  # fmt: skip


def check_network(objects: list[Object]) -> list[str]:
    """Ray, submitter, operator, Prometheus and DNS reach what they need, and nobody anything else."""
    hub = any(v.get("secret", {}).get("secretName") == "hub-token" for w in workloads(objects)
              for v in w.cluster["headGroupSpec"]["template"]["spec"]["volumes"])  # fmt: skip
    refused = REFUSED if hub else [*REFUSED, (WORKER, INTERNET, 443)]
    allowed = [*ALLOWED, (WORKER, INTERNET, 443)] if hub else ALLOWED
    policies = of_kind(objects, "NetworkPolicy")
    found = [f"{a.what} does not reach {b.what} on {port}" for a, b, port in allowed if not reaches(policies, a, b, port)]
    return found + [f"{a.what} reaches {b.what} on {port}" for a, b, port in refused if reaches(policies, a, b, port)]


def reaches(policies: list[Object], source: End, target: End, port: int) -> bool:
    """Whether a connection passes the egress of its source and the ingress of its target."""
    return _passes(policies, "egress", source, target, port) and _passes(policies, "ingress", target, source, port)


def _passes(policies: list[Object], direction: str, pod: End, peer: End, port: int) -> bool:
    """Pods outside our namespace, and addresses, are under no policy of ours."""
    if pod.namespace != NAMESPACE or pod.address:
        return True
    own = [
        p["spec"]
        for p in policies
        if p["metadata"]["namespace"] == NAMESPACE and _selects(p["spec"]["podSelector"], pod.labels)
    ]
    own = [spec for spec in own if direction.capitalize() in spec["policyTypes"]]
    if not own:
        return True
    rules = [rule for spec in own for rule in spec.get(direction, [])]
    return any(_rule(rule, "to" if direction == "egress" else "from", peer, port) for rule in rules)


def _rule(rule: Object, key: str, peer: End, port: int) -> bool:
    ports = rule.get("ports")
    if ports and not any(p.get("port", port) <= port <= p.get("endPort", p.get("port", port)) for p in ports):
        return False
    return not rule.get(key) or any(_matches(p, peer) for p in rule[key])


def _matches(rule: Object, peer: End) -> bool:
    if "ipBlock" in rule:
        block = rule["ipBlock"]
        if not peer.address:
            return False
        address = ipaddress.ip_address(peer.address)
        inside = address in ipaddress.ip_network(block["cidr"])
        return inside and not any(address in ipaddress.ip_network(e) for e in block.get("except", []))
    if peer.address:
        return False
    if "namespaceSelector" in rule:
        if not _selects(rule["namespaceSelector"], {"kubernetes.io/metadata.name": peer.namespace}):
            return False
    elif peer.namespace != NAMESPACE:
        return False
    return _selects(rule.get("podSelector", {}), peer.labels)


def _selects(selector: Object, labels: Mapping[str, str]) -> bool:
    assert not selector.get("matchExpressions"), "matchExpressions are not used here"
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())
