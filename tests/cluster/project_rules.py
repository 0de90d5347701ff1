"""What cluster/ promises beyond what the operator asks for. One function a rule: objects of an overlay -> its mistakes."""

import re
import shlex
import tomllib

from dpo_ray.config import URI
from dpo_ray.errors import ConfigError

from . import restricted
from .manifests import ROOT, Object, Pod, Workload, containers, groups, of_kind, pods, ray_container, workloads
from .operator_rules import images
from .placement import configurations, misfits, run_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY = next(d.partition("==")[2] for d in PROJECT["dependencies"] if d.startswith("ray["))
TAGS = {extra: f"{PROJECT['version']}-ray{RAY}-{extra}" for extra in ("cpu", "gpu")}
PLAIN = re.compile(r"[A-Za-z0-9_./:=@%+, -]+")
ENVIRONMENT = {"RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": 1800, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": 60}
"""Ray's own limits, in seconds, which waiting for a new node would pass."""
SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL)", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{12,}|gh[pousr]_[A-Za-z0-9]{20,})|-----BEGIN"
)
EXPLICIT = (
    "submissionMode", "backoffLimit", "submitterConfig.backoffLimit", "activeDeadlineSeconds", "preRunningDeadlineSeconds",
    "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "submitterPodTemplate.spec", "rayClusterSpec.rayVersion",
)  # fmt: skip
EXPLICIT_OF_CLUSTER = {
    "authOptions.mode": "token", "enableInTreeAutoscaling": True, "autoscalerOptions.version": "v2",
    "headGroupSpec.rayStartParams.num-cpus": "0",
}  # fmt: skip
SPOT = {
    "cloud.google.com/gke-spot", "eks.amazonaws.com/capacityType", "karpenter.sh/capacity-type",
    "kubernetes.azure.com/scalesetpriority",
}  # fmt: skip
PORTS = {"head": {"metrics": 8080, "as-metrics": 44217, "dash-metrics": 44227}, "worker": {"metrics": 8080}}


def check_versions(objects: list[Object]) -> list[str]:
    """9: rayVersion, the tag of every image and the pin of pyproject.toml are one version; one image for all."""
    found = []
    for w in workloads(objects):
        if w.cluster.get("rayVersion") != RAY:
            found.append(f"{w}: rayVersion {w.cluster.get('rayVersion')}; pyproject.toml pins {RAY}")
        found += [f"{w}: image {i} of {who}; expected one of {list(TAGS.values())}" for who, i in images(w).items()
                  if i.rpartition(":")[2] not in TAGS.values()]  # fmt: skip
        if len(set(images(w).values())) > 1:
            found.append(f"{w}: different images {images(w)}")
    return found


def check_pods(objects: list[Object]) -> list[str]:
    """10: every pod passes "restricted"; nobody mounts /dev/shm, which KubeRay does; shared storage is everywhere."""
    levels = [o["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") for o in of_kind(objects, "Namespace")]
    found = [f"the namespace enforces {level}" for level in levels if level != "restricted"]
    for w in workloads(objects):
        for pod in pods(w):
            found += restricted.violations(pod)
            for c in containers(pod):
                mounts = [m["mountPath"] for m in c.get("volumeMounts", [])]
                found += [f"{pod.where}: {c['name']} mounts /dev/shm" for m in mounts if m == "/dev/shm"]
                if c["name"] != "wait-gcs-ready" and not c.get("securityContext", {}).get("readOnlyRootFilesystem"):
                    found.append(f"{pod.where}: {c['name']} can write to its image")
        found += [f"{w}: {p}" for p in _unshared(w, objects)]
    return found


def _unshared(w: Workload, objects: list[Object]) -> list[str]:
    """Groups that do not see the root of the run: a claim that all of them mount, or a URI."""
    found, roots = [], {run.root for run in configurations(w, objects)}
    claims = {o["metadata"]["name"]: o["spec"]["accessModes"] for o in of_kind(objects, "PersistentVolumeClaim")}
    for name, g in groups(w.cluster):
        spec = g["template"]["spec"]
        volumes = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v}
        mounts = {m["mountPath"]: volumes[m["name"]] for m in ray_container(g)["volumeMounts"] if m["name"] in volumes}
        for root in roots:
            claim = next((c for path, c in mounts.items() if root.startswith(f"{path}/")), None)
            if not URI.match(root) and claims.get(claim or "") != ["ReadWriteMany"]:
                found.append(f"{name} does not see the root {root} on a ReadWriteMany volume (mounts {mounts})")
    return found


def check_fit(objects: list[Object]) -> list[str]:
    """11: every bundle and worker of the run fits one pod of a group, and all of them the groups' maxima."""
    return [f"{w}: {p}" for w in workloads(objects) for run in configurations(w, objects) for p in misfits(run, w.cluster)]


def check_entrypoint(objects: list[Object]) -> list[str]:
    """12: one plain python command, since KubeRay pastes it into a shell; its script and configuration exist and are valid."""
    found = []
    for w in workloads(objects):
        if w.job is None:
            continue
        if not PLAIN.fullmatch(w.job["entrypoint"]) or w.job["entrypoint"] != shlex.join(shlex.split(w.job["entrypoint"])):
            found.append(f"{w}: the entrypoint is no plain command: {w.job['entrypoint']}")
            continue
        try:
            run_of(w, objects)
        except (LookupError, ConfigError) as error:
            found.append(f"{w}: the entrypoint does not run: {error}")
    return found


def check_explicit(objects: list[Object]) -> list[str]:
    """What decides how a job ends and who may reach it is written down, and not left to a default."""
    found = []
    for w in workloads(objects):
        if w.job is not None:
            found += [f"{w}: {path} is not set" for path in EXPLICIT if _get(w.job, path) is None]
        for path, value in EXPLICIT_OF_CLUSTER.items():
            if _get(w.cluster, path) != value:
                found.append(f"{w}: {path} is {_get(w.cluster, path)!r}, not {value!r}")
    return found


def _get(tree: Object, path: str) -> object:
    for key in path.split("."):
        tree = tree.get(key, {})
    return None if tree == {} else tree


def check_requests_are_limits(objects: list[Object]) -> list[str]:
    """Every container of a pod with GPUs, and of the head, asks for what it may use: the node never overcommits them."""
    found = []
    for w in workloads(objects):
        for pod in pods(w):
            for c in containers(pod):
                resources = c.get("resources", {})
                if not resources.get("limits") or resources.get("requests") != resources.get("limits"):
                    found.append(
                        f"{pod.where}: {c['name']} requests {resources.get('requests')}, limits {resources.get('limits')}"
                    )
                elif not {"cpu", "memory"} <= resources["limits"].keys():
                    found.append(f"{pod.where}: {c['name']} has no limit of cpu or memory")
    return found


def check_secrets(objects: list[Object]) -> list[str]:
    """No secret is in an environment, a ConfigMap or the job's text; a token is a file, in Ray containers that use a hub."""
    found = [f"Secret {o['metadata']['name']} is shipped" for o in of_kind(objects, "Secret")]
    texts = [(f"ConfigMap {o['metadata']['name']}", k, v) for o in of_kind(objects, "ConfigMap") for k, v in o["data"].items()]
    for w in workloads(objects):
        texts += [(f"{w}", field, str((w.job or {}).get(field, ""))) for field in ("entrypoint", "runtimeEnvYAML", "metadata")]
        for pod in pods(w):
            for c in containers(pod):
                for e in c.get("env", []):
                    texts.append((f"{pod.where}, {c['name']}", e["name"], e.get("value", "")))
                    if "secretKeyRef" in e.get("valueFrom", {}):
                        found.append(f"{pod.where}: {c['name']} has a secret in {e['name']}")
                if any("secretRef" in source for source in c.get("envFrom", [])):
                    found.append(f"{pod.where}: {c['name']} has the environment of a Secret")
            found += _token_mounts(pod)
    for where, name, text in texts:
        named = SECRET_NAME.search(name) and not name.endswith(("_PATH", "_FILE"))
        if SECRET_VALUE.search(text) or (named and text):
            found.append(f"{where}: {name} holds a secret")
    return found


def _token_mounts(pod: Pod) -> list[str]:
    volumes = {v["name"] for v in pod.spec.get("volumes", []) if "secret" in v}
    found = []
    for c in containers(pod):
        mounted = [m for m in c.get("volumeMounts", []) if m["name"] in volumes]
        if mounted and not any(e["name"] == "HF_TOKEN_PATH" for e in c.get("env", [])):
            found.append(f"{pod.where}: {c['name']} has a secret mounted, and does not use it")
        found += [f"{pod.where}: {c['name']} can write to {m['mountPath']}" for m in mounted if not m.get("readOnly")]
    return found


def check_head(objects: list[Object]) -> list[str]:
    """The head is off spot nodes, and is the only pod that has a token of the Kubernetes API."""
    found = []
    for w in workloads(objects):
        spec = w.cluster["headGroupSpec"]["template"]["spec"]
        terms = (
            spec.get("affinity", {})
            .get("nodeAffinity", {})
            .get("requiredDuringSchedulingIgnoredDuringExecution", {})
            .get("nodeSelectorTerms", [])
        )
        refused = [{e["key"] for e in t["matchExpressions"] if e["operator"] == "NotIn"} for t in terms]
        if not refused or any(SPOT - keys for keys in refused):
            found.append(f"{w}: the head may land on a spot node")
        for pod in pods(w):
            may = pod.spec.get("automountServiceAccountToken", True)
            if may != pod.where.endswith(", head"):
                found.append(f"{pod.where}: automountServiceAccountToken is {may}")
    return found


def check_waiting(objects: list[Object]) -> list[str]:
    """Ray's limits on waiting are raised wherever a Ray process runs, since pods are made while a stage waits."""
    found, maps = [], {o["metadata"]["name"]: o["data"] for o in of_kind(objects, "ConfigMap")}
    for w in workloads(objects):
        for name, g in groups(w.cluster):
            c = ray_container(g)
            environment = {e["name"]: e.get("value") for e in c.get("env", [])}
            for source in c.get("envFrom", []):
                environment |= maps.get(source.get("configMapRef", {}).get("name"), {})
            found += [f"{w}: {name} has {v}={environment.get(v)}" for v, own in ENVIRONMENT.items()
                      if float(environment.get(v) or 0) <= own]  # fmt: skip
    return found


def check_pools(objects: list[Object]) -> list[str]:
    """Every group has a label of its own for label_selector, and its metrics ports."""
    found = []
    for w in workloads(objects):
        pools = [g.get("labels", {}).get("dpo-ray/pool") for _, g in groups(w.cluster)]
        if None in pools or len(set(pools)) < len(pools):
            found.append(f"{w}: the label dpo-ray/pool of the groups is {pools}")
        for name, g in groups(w.cluster):
            ports = {p.get("name"): p["containerPort"] for p in ray_container(g).get("ports", [])}
            for port, number in PORTS["head" if name == "head" else "worker"].items():
                if ports.get(port) != number:
                    found.append(f"{w}: {name} does not declare the port {port} {number}")
    return found


def check_references(objects: list[Object]) -> list[str]:
    """ConfigMaps and claims that a pod names are there; a ConfigMap's name has its hash. Secrets come from elsewhere."""
    known = {k: {o["metadata"]["name"] for o in of_kind(objects, k)} for k in ("ConfigMap", "PersistentVolumeClaim")}
    found = []
    for w in workloads(objects):
        for pod in pods(w):
            for v in pod.spec.get("volumes", []):
                for kind, name in (("ConfigMap", v.get("configMap", {}).get("name")),
                                   ("PersistentVolumeClaim", v.get("persistentVolumeClaim", {}).get("claimName"))):  # fmt: skip
                    if name and name not in known[kind]:
                        found.append(f"{pod.where}: {kind} {name} is not there")
                if "secret" in v and not v["secret"].get("optional"):
                    found.append(f"{pod.where}: secret {v['secret']['secretName']} must be optional")
            for c in containers(pod):
                names = [s["configMapRef"]["name"] for s in c.get("envFrom", []) if "configMapRef" in s]
                found += [f"{pod.where}: ConfigMap {n} is not there" for n in names if n not in known["ConfigMap"]]
                volumes = {v["name"] for v in pod.spec.get("volumes", [])}
                mounts = [m["name"] for m in c.get("volumeMounts", [])]
                found += [f"{pod.where}: {c['name']} mounts {m}, which is no volume" for m in mounts if m not in volumes]
    return found
