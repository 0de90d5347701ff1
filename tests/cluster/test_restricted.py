"""The check of "restricted" itself, against what the Pod Security Standards say."""

import copy

import pytest

from .manifests import Pod
from .restricted import violations

CONTEXT = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
POD = {
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [{"name": "a", "securityContext": CONTEXT}],
    "volumes": [{"name": "v", "emptyDir": {}}],
}


def refused(change) -> list[str]:
    spec = copy.deepcopy(POD)
    change(spec)
    return violations(Pod("pod", spec))


def of_container(**fields):
    return lambda spec: spec["containers"][0]["securityContext"].update(fields)


def of_pod(**fields):
    return lambda spec: spec["securityContext"].update(fields)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: None,
        of_container(runAsUser=1000),
        of_container(capabilities={"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}),
        of_container(seccompProfile={"type": "Localhost", "localhostProfile": "p"}),
        of_pod(seLinuxOptions={"type": "container_t"}),
        of_pod(sysctls=[{"name": "net.ipv4.tcp_syncookies", "value": "1"}]),
        lambda spec: spec["volumes"].append({"name": "s", "secret": {"secretName": "s"}}),
    ],
)
def test_restricted_lets_in_what_the_standard_does(change):
    assert refused(change) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.update(hostNetwork=True), "hostNetwork"),
        (lambda spec: spec.update(hostPID=True), "hostPID"),
        (lambda spec: spec["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "volume h is a hostPath"),
        (lambda spec: spec["volumes"].append({"name": "n", "nfs": {"server": "s", "path": "/"}}), "volume n is a nfs"),
        (of_container(allowPrivilegeEscalation=True), "allowPrivilegeEscalation"),
        (of_container(privileged=True), "privileged"),
        (of_container(procMount="Unmasked"), "procMount"),
        (of_container(capabilities={"drop": ["NET_RAW"]}), "lacks ALL"),
        (of_container(capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]}), "capabilities.add"),
        (of_container(runAsNonRoot=False), "runAsNonRoot"),
        (of_container(runAsUser=0), "runAsUser 0"),
        (of_container(seccompProfile={"type": "Unconfined"}), "seccompProfile Unconfined"),
        (of_container(appArmorProfile={"type": "Unconfined"}), "appArmorProfile"),
        (of_container(seLinuxOptions={"type": "spc_t"}), "seLinuxOptions"),
        (of_pod(runAsUser=0), "runAsUser 0"),
        (of_pod(seccompProfile={"type": "Unconfined"}), "seccompProfile Unconfined"),
        (of_pod(sysctls=[{"name": "kernel.msgmax", "value": "1"}]), "sysctl kernel.msgmax"),
        (of_pod(windowsOptions={"hostProcess": True}), "hostProcess"),
        (lambda spec: spec["securityContext"].pop("runAsNonRoot"), "runAsNonRoot"),
        (lambda spec: spec["securityContext"].pop("seccompProfile"), "no seccompProfile"),
        (lambda spec: spec["containers"][0].update(ports=[{"containerPort": 1, "hostPort": 1}]), "hostPort"),
        (lambda spec: spec.update(initContainers=[{"name": "b"}]), "container b: allowPrivilegeEscalation"),
        (lambda spec: spec["containers"][0].pop("securityContext"), "lacks ALL"),
    ],
)
def test_restricted_refuses_what_the_standard_does(change, message):
    assert any(message in v for v in refused(change))
