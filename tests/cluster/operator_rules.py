"""What the KubeRay operator and Kueue's webhook refuse although it is valid by its schema. One function a rule.

Sources: ray-operator/controllers/ray/utils/validation.go of KubeRay v1.7.0; pkg/controller/jobs/rayjob/rayjob_webhook.go and
pkg/controller/jobs/raycluster/common.go of Kueue v0.19.2. Each takes the objects of an overlay and returns its mistakes.
"""

import re

import yaml

from .manifests import KUBERAY, Object, Workload, groups, of_kind, ray_container, workloads

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
LABEL_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
MAX_NAME = {"RayJob": 47, "RayCluster": 53, "RayCronJob": 36}
GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
QUEUE, ELASTIC = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/elastic-job"
MAX_POD_SETS = 18


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def check_cleanup(objects: list[Object]) -> list[str]:
    """1: shutdown or deletion rules, never both; a TTL and `suspend` need the shutdown."""
    found = []
    for w in workloads(objects):
        if w.job is None:
            continue
        shutdown, rules = w.job.get("shutdownAfterJobFinishes", False), w.job.get("deletionStrategy", {}).get("deletionRules")
        if shutdown and rules:
            found.append(f"{w}: shutdownAfterJobFinishes and deletionStrategy.deletionRules exclude each other")
        if w.job.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown:
            found.append(f"{w}: ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        if w.job.get("suspend") and not shutdown:
            found.append(f"{w}: suspend needs shutdownAfterJobFinishes")
        if w.cluster.get("enableInTreeAutoscaling") and any(r["policy"] == "DeleteWorkers" for r in rules or []):
            found.append(f"{w}: DeleteWorkers is refused with autoscaling")
        found += [f"{w}: {p}" for p in _submission(w.job)]
    return found


def _submission(job: Object) -> list[str]:
    found, mode = [], job.get("submissionMode", "K8sJobMode")
    retries = job.get("backoffLimit", 0)
    if retries and (job.get("clusterSelector") or mode == "InteractiveMode"):
        found.append("backoffLimit is refused with clusterSelector and in InteractiveMode")
    if mode == "SidecarMode" and {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & job.keys():
        found.append("SidecarMode refuses submitterPodTemplate, submitterConfig and clusterSelector")
    return found


def check_kueue(objects: list[Object]) -> list[str]:
    """2: a queued job shuts its cluster down, has one of its own, and says that it is elastic when it scales."""
    found = []
    for w in workloads(objects):
        meta = w.object["metadata"]
        if QUEUE not in meta.get("labels", {}):
            continue
        if w.job is not None and not w.job.get("shutdownAfterJobFinishes"):
            found.append(f"{w}: Kueue wants shutdownAfterJobFinishes")
        if w.job is not None and w.job.get("clusterSelector"):
            found.append(f"{w}: Kueue refuses clusterSelector")
        if w.cluster.get("enableInTreeAutoscaling") and meta.get("annotations", {}).get(ELASTIC) != "true":
            found.append(f'{w}: autoscaling under Kueue needs the annotation {ELASTIC}: "true"')
        names = [g["groupName"] for g in w.cluster.get("workerGroupSpecs", [])]
        if "head" in names:
            found.append(f"{w}: Kueue reserves the group name head")
        if len(names) + 2 > MAX_POD_SETS:
            found.append(f"{w}: {len(names)} groups, head and submitter are more than {MAX_POD_SETS} pod sets")
    return found


def check_names(objects: list[Object]) -> list[str]:
    """3: names are DNS-1035 labels, short enough for what KubeRay appends; groups have different names."""
    found = []
    for w in workloads(objects):
        name, most = w.object["metadata"]["name"], MAX_NAME[w.object["kind"]]
        if len(name) > most:
            found.append(f"{w}: {len(name)} characters; at most {most}")
        names = [g["groupName"] for g in w.cluster.get("workerGroupSpecs", [])]
        for n in [name, *names]:
            if not DNS_1035.fullmatch(n):
                found.append(f"{w}: {n!r} is no DNS-1035 label")
        if len(set(names)) < len(names):
            found.append(f"{w}: two groups have one name")
    return found


def check_replicas(objects: list[Object]) -> list[str]:
    """4: minReplicas <= replicas <= maxReplicas, none negative; the CRD's default for replicas is 0."""
    found = []
    for w in workloads(objects):
        for g in w.cluster.get("workerGroupSpecs", []):
            least, now, most = g.get("minReplicas", 0), g.get("replicas", 0), g.get("maxReplicas", 2**31 - 1)
            if not 0 <= least <= now <= most:
                found.append(f"{w}: {g['groupName']} has minReplicas {least}, replicas {now}, maxReplicas {most}")
    return found


def check_feature_versions(objects: list[Object]) -> list[str]:
    """5: tokens need Ray 2.52; priority Ray 2.56 and autoscaler v2; idleTimeoutSeconds of a group autoscaler v2."""
    found = []
    for w in workloads(objects):
        ray = version(w.cluster.get("rayVersion", "0"))
        v2 = w.cluster.get("enableInTreeAutoscaling") and w.cluster.get("autoscalerOptions", {}).get("version") == "v2"
        if w.cluster.get("authOptions", {}).get("mode") == "token" and ray < (2, 52):
            found.append(f"{w}: token authentication needs rayVersion 2.52")
        if w.cluster.get("authOptions", {}).get("enableK8sTokenAuth") and w.job is not None:
            found.append(f"{w}: enableK8sTokenAuth is refused for jobs")
        for g in w.cluster.get("workerGroupSpecs", []):
            if g.get("priority") and (ray < (2, 56) or not v2):
                found.append(f"{w}: priority of {g['groupName']} needs rayVersion 2.56 and autoscaler v2")
            if "idleTimeoutSeconds" in g and not v2:
                found.append(f"{w}: idleTimeoutSeconds of {g['groupName']} needs autoscalerOptions.version v2")
        if v2:
            policies = {n: g["template"]["spec"].get("restartPolicy", "Never") for n, g in groups(w.cluster)}
            found += [f"{w}: restartPolicy {p} of {n}; autoscaler v2 wants Never" for n, p in policies.items() if p != "Never"]
    return found


def check_group_resources(objects: list[Object]) -> list[str]:
    """6: resources in rayStartParams or in `resources`, never both; labels in `labels` alone, and valid."""
    found = []
    for w in workloads(objects):
        for name, g in groups(w.cluster):
            start = g.get("rayStartParams", {})
            if g.get("resources") and start.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
                found.append(f"{w}: {name} has resources in rayStartParams and in `resources`")
            if "labels" in start:
                found.append(f"{w}: {name} has rayStartParams.labels; use `labels`")
            for key, value in g.get("labels", {}).items():
                prefix, slash, rest = key.rpartition("/")
                if not rest or not LABEL.fullmatch(rest) or (slash and not LABEL_PREFIX.fullmatch(prefix)):
                    found.append(f"{w}: {name} has the label key {key!r}")
                if not LABEL.fullmatch(value):
                    found.append(f"{w}: {name} has the label value {value!r}")
    return found


def check_gates(objects: list[Object]) -> list[str]:
    """7: what is behind a feature gate of the operator is opened in operator-values.yaml."""
    values = yaml.safe_load((KUBERAY / "operator-values.yaml").read_text())
    open_gates = {g["name"] for g in values["featureGates"] if g["enabled"]}
    found = []
    for w in workloads(objects):
        needed = {gate for field, gate in GATED.items() if field in w.cluster}
        if w.cluster.get("gcsFaultToleranceOptions", {}).get("backend") == "rocksdb":
            needed.add("GCSFaultToleranceEmbeddedStorage")
        if w.object["kind"] == "RayCronJob":
            needed.add("RayCronJob")
        found += [f"{w}: needs the feature gate {gate}" for gate in sorted(needed - open_gates)]
    return found


def check_runtime_env(objects: list[Object]) -> list[str]:
    """8: runtimeEnvYAML is YAML, and a runtime environment that Ray takes."""
    found = []
    for w in workloads(objects):
        if w.job is None or "runtimeEnvYAML" not in w.job:
            continue
        from ray.runtime_env import RuntimeEnv

        try:
            fields = yaml.safe_load(w.job["runtimeEnvYAML"])
            unknown = set(fields) - RuntimeEnv.known_fields
            if unknown:
                found.append(f"{w}: runtimeEnvYAML has unknown fields {sorted(unknown)}")
            RuntimeEnv(**{k: v for k, v in fields.items() if k not in unknown})
        except (yaml.YAMLError, ValueError, TypeError) as error:
            found.append(f"{w}: runtimeEnvYAML: {error}")
    return found


def check_autoscaler_service_account(objects: list[Object]) -> list[str]:
    """A ServiceAccount that the head of an autoscaling cluster names must exist: KubeRay makes only its own."""
    known = {o["metadata"]["name"] for o in of_kind(objects, "ServiceAccount")}
    return [
        f"{w}: {name} names the ServiceAccount {account}, which is not there"
        for w in workloads(objects)
        for name, account in _accounts(w)
        if account not in known
    ]


def _accounts(w: Workload) -> list[tuple[str, str]]:
    specs = [(name, g["template"]["spec"]) for name, g in groups(w.cluster)]
    if w.job is not None and "submitterPodTemplate" in w.job:
        specs.append(("submitter", w.job["submitterPodTemplate"]["spec"]))
    return [(name, spec["serviceAccountName"]) for name, spec in specs if "serviceAccountName" in spec]


def images(w: Workload) -> dict[str, str]:
    """Image by who runs it."""
    found = {name: ray_container(g)["image"] for name, g in groups(w.cluster)}
    if w.job is not None and "submitterPodTemplate" in w.job:
        found["submitter"] = w.job["submitterPodTemplate"]["spec"]["containers"][0]["image"]
    if "image" in w.cluster.get("autoscalerOptions", {}):
        found["autoscaler"] = w.cluster["autoscalerOptions"]["image"]
    return found
