"""The "restricted" level of the Pod Security Standards, which includes "baseline".

Source: https://kubernetes.io/docs/concepts/security/pod-security-standards/ (Linux pods).
"""

from .manifests import Object, Pod, containers

VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"
}  # fmt: skip
SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
}  # fmt: skip


def violations(pod: Pod) -> list[str]:
    """What admission would refuse, one line each; empty for a pod that is let in."""
    found = [f"{pod.where}: {field} is true" for field in ("hostNetwork", "hostPID", "hostIPC") if pod.spec.get(field)]
    for volume in pod.spec.get("volumes", []):
        found += [f"{pod.where}: volume {volume['name']} is a {kind}" for kind in volume.keys() - VOLUMES - {"name"}]
    context = pod.spec.get("securityContext", {})
    found += [f"{pod.where}: {p}" for p in _shared(context)]
    found += [f"{pod.where}: sysctl {s['name']}" for s in context.get("sysctls", []) if s["name"] not in SYSCTLS]
    for container in containers(pod):
        found += [f"{pod.where}: container {container['name']}: {p}" for p in _container(container, context)]
    return found


def _container(container: Object, of_pod: Object) -> list[str]:
    own = container.get("securityContext", {})
    either = {**of_pod, **own}
    found = _shared(own)
    if own.get("allowPrivilegeEscalation") is not False:
        found.append("allowPrivilegeEscalation is not false")
    if own.get("privileged"):
        found.append("privileged")
    if own.get("procMount", "Default") != "Default":
        found.append(f"procMount {own['procMount']}")
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        found.append("capabilities.drop lacks ALL")
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        found.append(f"capabilities.add {capabilities['add']}")
    if either.get("runAsNonRoot") is not True:
        found.append("runAsNonRoot is not true")
    if "seccompProfile" not in either:
        found.append("no seccompProfile")
    found += [f"hostPort {p['hostPort']}" for p in container.get("ports", []) if p.get("hostPort")]
    found += [f"{hook} probe with host" for hook in ("livenessProbe", "readinessProbe") if _host(container.get(hook, {}))]
    return found


def _shared(context: Object) -> list[str]:
    """What is refused of a pod's securityContext and of a container's alike."""
    found = []
    if context.get("runAsUser") == 0:
        found.append("runAsUser 0")
    if context.get("runAsNonRoot") is False:
        found.append("runAsNonRoot is false")
    if context.get("seccompProfile", {"type": "RuntimeDefault"}).get("type") not in ("RuntimeDefault", "Localhost"):
        found.append(f"seccompProfile {context['seccompProfile']['type']}")
    if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in ("RuntimeDefault", "Localhost"):
        found.append(f"appArmorProfile {context['appArmorProfile']['type']}")
    selinux = context.get("seLinuxOptions", {})
    kinds = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
    if selinux.get("user") or selinux.get("role") or selinux.get("type", "") not in kinds:
        found.append("seLinuxOptions")
    if context.get("windowsOptions", {}).get("hostProcess"):
        found.append("hostProcess")
    return found


def _host(probe: Object) -> bool:
    return any(probe.get(how, {}).get("host") for how in ("httpGet", "tcpSocket"))
