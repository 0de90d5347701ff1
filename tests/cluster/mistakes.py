"""One-line mistakes in the manifests, by the check that finds them, with a part of what it says."""

from collections.abc import Callable
from typing import Any, NamedTuple

from .manifests import Object, of_kind
from .network_rules import check_network
from .operator_rules import (
    check_autoscaler_service_account,
    check_cleanup,
    check_feature_versions,
    check_gates,
    check_group_resources,
    check_kueue,
    check_names,
    check_replicas,
    check_runtime_env,
)
from .project_rules import (
    EXPLICIT,
    TAGS,
    check_entrypoint,
    check_explicit,
    check_fit,
    check_head,
    check_pods,
    check_pools,
    check_references,
    check_requests_are_limits,
    check_secrets,
    check_versions,
    check_waiting,
)
from .queue_rules import check_gang, check_queues, check_schedule

GONE = object()
CLUSTER = "spec.rayClusterSpec"
HEAD, HEAD_POD = f"{CLUSTER}.headGroupSpec", f"{CLUSTER}.headGroupSpec.template.spec"
HEAD_RAY = f"{HEAD_POD}.containers.0"
CPU, INFERENCE, TRAIN = (f"{CLUSTER}.workerGroupSpecs.{i}" for i in range(3))
TRAIN_POD, TRAIN_RAY = f"{TRAIN}.template.spec", f"{TRAIN}.template.spec.containers.0"
SUBMITTER_POD = "spec.submitterPodTemplate.spec"


class Mistake(NamedTuple):
    overlay: str
    kind: str
    """Of the object; `kind/beginning of its name` where there are several."""
    path: str
    """A dot in a key is written `\\.`; `+` appends to a list."""
    value: Any
    """GONE, a function of the value that is there, or a value."""
    message: str

    def make(self, objects: list[Object]) -> None:
        """Put it into the objects of the overlay."""
        kind, _, name = self.kind.partition("/")
        place: Any = next(o for o in of_kind(objects, kind) if o["metadata"]["name"].startswith(name))
        *parents, key = [part.replace("\0", ".") for part in self.path.replace("\\.", "\0").split(".")]
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place[parent]
        if key == "+":
            place.append(self.value)
            return
        index: Any = int(key) if isinstance(place, list) else key
        if self.value is GONE:
            del place[index]
        else:
            place[index] = self.value(place[index]) if callable(self.value) else self.value


def job(path: str, value: Any, message: str, overlay: str = "gpu") -> Mistake:
    return Mistake(overlay, "RayJob", path, value, message)


def cron(path: str, value: Any, message: str) -> Mistake:
    return Mistake("cron", "RayCronJob", path, value, message)


def env(name: str, value: Any, message: str) -> Mistake:
    return Mistake("gpu", "ConfigMap/dpo-ray-environment", f"data.{name}", value, message)


def config(old: str, new: str, message: str, overlay: str = "gpu") -> Mistake:
    """In the run's configuration."""
    return Mistake(overlay, "ConfigMap/dpo-ray-round", "data.round\\.yaml", lambda t: t.replace(old, new), message)


def policy(name: str, path: str, value: Any, message: str, overlay: str = "gpu") -> Mistake:
    return Mistake(overlay, f"NetworkPolicy/{name}", f"spec.{path}", value, message)


def command(text: str, message: str) -> Mistake:
    return job("spec.entrypoint", text, message)


def with_priority(cluster: Object) -> Object:
    first, *others = cluster["workerGroupSpecs"]
    return cluster | {"rayVersion": "2.55.0", "workerGroupSpecs": [first | {"priority": 1}, *others]}


DELETE = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}}
ELSEWHERE = {"ray.io/cluster": "x"}
SCRIPT, ROUND = "python /opt/dpo-ray/pipelines/full_round.py", "/etc/dpo-ray/round.yaml"
IMAGE = "registry.example.com/dpo-ray"
KEY = {"secretKeyRef": {"name": "hub-token", "key": "token"}}
ACCOUNT_TOKEN = "automountServiceAccountToken"

MISTAKES: dict[Callable[[list[Object]], list[str]], list[Mistake]] = {
    check_cleanup: [
        job("spec.deletionStrategy", {"deletionRules": [DELETE]}, "exclude each other"),
        job("spec.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished needs"),
        cron("spec.jobTemplate.shutdownAfterJobFinishes", GONE, "ttlSecondsAfterFinished needs"),
        job("spec.submissionMode", "SidecarMode", "SidecarMode refuses"),
        job("spec.clusterSelector", ELSEWHERE, "backoffLimit is refused"),
        job("spec", lambda s: s | {"suspend": True, "shutdownAfterJobFinishes": False}, "suspend needs"),
        job("spec.deletionStrategy", {"deletionRules": [DELETE | {"policy": "DeleteWorkers"}]}, "DeleteWorkers is refused"),
    ],
    check_kueue: [
        job("spec.shutdownAfterJobFinishes", False, "Kueue wants shutdownAfterJobFinishes", "kueue"),
        job("metadata.annotations", GONE, "elastic-job", "kueue"),
        job("spec.clusterSelector", ELSEWHERE, "refuses clusterSelector", "kueue"),
        job(f"{CPU}.groupName", "head", "reserves the group name head", "kueue"),
        job(f"{CLUSTER}.workerGroupSpecs", lambda groups: groups * 6, "more than 18 pod sets", "kueue"),
    ],
    check_names: [
        job("metadata.name", "a" * 48, "48 characters"),
        cron("metadata.name", "a" * 37, "37 characters"),
        Mistake("interactive", "RayCluster", "metadata.name", "Dpo_ray", "no DNS-1035 label"),
        job(f"{TRAIN}.groupName", "inference", "two groups have one name"),
    ],
    check_replicas: [
        job(f"{TRAIN}.minReplicas", 2, "train has minReplicas 2"),
        job(f"{INFERENCE}.replicas", GONE, "inference has minReplicas 2, replicas 0", "volcano"),
    ],
    check_feature_versions: [
        job(f"{CLUSTER}.rayVersion", "2.51.0", "token authentication needs"),
        job(f"{CLUSTER}.autoscalerOptions.version", GONE, "idleTimeoutSeconds of inference"),
        job(f"{CLUSTER}.authOptions.enableK8sTokenAuth", True, "enableK8sTokenAuth is refused"),
        job(f"{TRAIN_POD}.restartPolicy", "Always", "restartPolicy Always"),
        job(CLUSTER, with_priority, "priority of cpu needs rayVersion 2.56"),
    ],
    check_group_resources: [
        job(f"{HEAD}.resources", {"CPU": "0"}, "head has resources in rayStartParams"),
        job(f"{TRAIN}.rayStartParams.labels", "a=b", "rayStartParams.labels"),
        job(f"{TRAIN}.labels", {"Dpo_ray/pool": "x"}, "the label key"),
        job(f"{TRAIN}.labels", {"dpo-ray/pool": "a b"}, "the label value"),
    ],
    check_gates: [
        job(f"{CLUSTER}.networkPolicy", {"mode": "DenyAll"}, "gate RayClusterNetworkPolicy"),
        job(f"{CLUSTER}.tlsOptions", {}, "gate RayClusterMTLS"),
        job(f"{CLUSTER}.historyServerOptions", {}, "gate RayClusterHistoryServer"),
        job(f"{CLUSTER}.gcsFaultToleranceOptions", {"backend": "rocksdb"}, "gate GCSFaultToleranceEmbeddedStorage"),
    ],
    check_runtime_env: [
        job("spec.runtimeEnvYAML", "env_vars: {A: 1", "runtimeEnvYAML"),
        job("spec.runtimeEnvYAML", "env_var: {A: '1'}", "unknown fields ['env_var']"),
        job("spec.runtimeEnvYAML", "env_vars: {A: 1}", "runtimeEnvYAML"),
    ],
    check_autoscaler_service_account: [job(f"{HEAD_POD}.serviceAccountName", "ray", "which is not there")],
    check_versions: [
        job(f"{CLUSTER}.rayVersion", "2.59.0", "rayVersion 2.59.0"),
        job(f"{TRAIN_RAY}.image", f"{IMAGE}:latest", "image registry"),
        job(f"{SUBMITTER_POD}.containers.0.image", f"other/dpo-ray:{TAGS['gpu']}", "different images"),
        job(f"{SUBMITTER_POD}.containers.0.image", f"{IMAGE}:{TAGS['cpu']}", "different images"),
        job(f"{CLUSTER}.autoscalerOptions.image", "rayproject/ray:2.60.0", "different images"),
    ],
    check_pods: [
        job(f"{CLUSTER}.autoscalerOptions.securityContext", GONE, "container autoscaler: allowPrivilegeEscalation"),
        job("spec.submitterPodTemplate", GONE, "submitter: container ray-job-submitter: no seccompProfile"),
        job("spec.submissionMode", "SidecarMode", "head: container ray-job-submitter: allowPrivilegeEscalation"),
        Mistake("gpu", "Namespace", "metadata.labels", {}, "the namespace enforces None"),
        job(f"{TRAIN_POD}.securityContext", GONE, "train: container wait-gcs-ready: runAsNonRoot"),
        job(f"{TRAIN_RAY}.securityContext.capabilities.drop", [], "capabilities.drop lacks ALL"),
        job(f"{HEAD_POD}.securityContext.runAsUser", 0, "runAsUser 0"),
        job(f"{HEAD_POD}.hostNetwork", True, "hostNetwork"),
        job(f"{HEAD_POD}.volumes.1", {"name": "tmp", "hostPath": {"path": "/"}}, "volume tmp is a hostPath"),
        job(f"{TRAIN_RAY}.volumeMounts.+", {"name": "tmp", "mountPath": "/dev/shm"}, "mounts /dev/shm"),
        job(f"{HEAD_RAY}.securityContext.readOnlyRootFilesystem", False, "can write to its image"),
        job(f"{TRAIN_RAY}.volumeMounts.0", GONE, "train does not see the root"),
        job("spec.entrypoint", f"{SCRIPT} {ROUND}", "does not see the root", "gpu-s3"),
        Mistake("gpu", "PersistentVolumeClaim", "spec.accessModes", ["ReadWriteOnce"], "does not see the root"),
    ],
    check_fit: [
        job(f"{TRAIN_RAY}.resources.limits.nvidia\\.com/gpu", "4", "8 x train: 4 CPU + 1 GPU on {'dpo-ray/pool': 'train'}"),
        job(f"{TRAIN}.labels.dpo-ray/pool", "training", "train: 4 CPU + 1 GPU on {'dpo-ray/pool': 'train'} fits no pod"),
        job(f"{INFERENCE}.maxReplicas", 4, "8 x generate: 4 CPU + 1 GPU on {'dpo-ray/pool': 'inference'}"),
        config("workers: 8", "workers: 32", "32 x train: 4 CPU + 1 GPU"),
        config(
            "actors: [2, 8], cpus: 4",
            "actors: 1, cpus: 96",
            "generate: 96 CPU + 1 GPU on {'dpo-ray/pool': 'inference'} fits no pod",
        ),
        config("[2, 8], cpus: 4", "[2, 32], cpus: 4", "32 x generate", "interactive"),
        job(f"{CPU}.rayStartParams.num-cpus", "0", "fits no pod", "cpu-smoke"),
    ],
    check_entrypoint: [
        command(f"{SCRIPT} {ROUND} && echo done", "no plain command"),
        command(f"{SCRIPT} {ROUND} --name $NAME", "no plain command"),
        command(f"{SCRIPT} {ROUND} --name 'a b'", "no plain command"),
        command(f"{SCRIPT} /etc/dpo-ray/run.yaml", "run.yaml is neither in the image"),
        command(f"{SCRIPT} /opt/dpo-ray/pipelines/quick.yaml", "quick.yaml is neither in the image"),
        command(f"{SCRIPT} {ROUND} --train.bta 1", "train.bta"),
        command(f"{SCRIPT} {ROUND} --rounds 0", "rounds"),
        command(f"python /opt/dpo-ray/pipelines/round.py {ROUND}", "round.py is neither in the image"),
        command(f"bash /opt/dpo-ray/pipelines/full_round.py {ROUND}", "not with python"),
    ],
    check_explicit: [
        *[job(f"spec.{field}", GONE, f"{field} is not set") for field in EXPLICIT],
        job(f"{CLUSTER}.authOptions", GONE, "authOptions.mode is None"),
        Mistake("interactive", "RayCluster", "spec.authOptions.mode", "disabled", "authOptions.mode is 'disabled'"),
        job(f"{HEAD}.rayStartParams", {}, "num-cpus is None"),
    ],
    check_requests_are_limits: [
        job(f"{TRAIN_RAY}.resources.requests.memory", "64Gi", "train: ray-worker requests"),
        job(f"{HEAD_RAY}.resources.limits", GONE, "head: ray-head requests"),
        job(f"{CLUSTER}.autoscalerOptions.resources.requests", {"cpu": "1"}, "head: autoscaler requests"),
    ],
    check_secrets: [
        job(f"{HEAD_RAY}.env.+", {"name": "HF_TOKEN", "value": "x"}, "HF_TOKEN holds a secret"),
        job(f"{HEAD_RAY}.env.+", {"name": "NAME", "value": "hf_" + "a" * 30}, "NAME holds a secret"),
        job(f"{TRAIN_RAY}.env.+", {"name": "HF_TOKEN", "valueFrom": KEY}, "has a secret in HF_TOKEN"),
        job(f"{TRAIN_RAY}.envFrom.+", {"secretRef": {"name": "hub-token"}}, "environment of a Secret"),
        job("spec.runtimeEnvYAML", "env_vars: {A: sk-" + "a" * 24 + "}", "runtimeEnvYAML holds a secret"),
        env("OPENAI_API_KEY", "x", "OPENAI_API_KEY holds a secret"),
        job(f"{SUBMITTER_POD}.volumes.0", {"name": "tmp", "secret": {"secretName": "s"}}, "and does not use it"),
        job(f"{HEAD_RAY}.volumeMounts.3.readOnly", False, "can write to"),
    ],
    check_head: [
        job(f"{HEAD_POD}.affinity", GONE, "may land on a spot node"),
        job(f"{TRAIN_POD}.{ACCOUNT_TOKEN}", GONE, f"train: {ACCOUNT_TOKEN} is True"),
        job(f"{SUBMITTER_POD}.{ACCOUNT_TOKEN}", True, f"submitter: {ACCOUNT_TOKEN} is True"),
    ],
    check_waiting: [
        env("RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S", "1800", "head has RAY_DATA"),
        job(f"{TRAIN_RAY}.envFrom", [], "train has RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=None"),
    ],
    check_pools: [
        job(f"{TRAIN}.labels.dpo-ray/pool", "inference", "the label dpo-ray/pool"),
        job(f"{HEAD_RAY}.ports.3", GONE, "head does not declare the port as-metrics"),
        job(f"{TRAIN_RAY}.ports", [], "train does not declare the port metrics"),
    ],
    check_references: [
        job(f"{HEAD_POD}.volumes.4.configMap.name", "dpo-ray-round", "ConfigMap dpo-ray-round is not there"),
        job(f"{TRAIN_RAY}.envFrom.0.configMapRef.name", "environment", "ConfigMap environment is not there"),
        Mistake("gpu", "PersistentVolumeClaim", "metadata.name", "shared", "PersistentVolumeClaim dpo-ray-shared is not"),
        job(f"{TRAIN_POD}.volumes.1", GONE, "mounts tmp, which is no volume"),
        job(f"{HEAD_POD}.volumes.3.secret.optional", GONE, "secret hub-token must be optional"),
    ],
    check_queues: [
        Mistake("kueue", "LocalQueue", "metadata.name", "other", "LocalQueue dpo-ray or its"),
        Mistake("kueue", "ClusterQueue", "spec.resourceGroups.0.flavors.0.resources.2.nominalQuota", 8, "16 nvidia.com/gpu"),
        job(f"{TRAIN_RAY}.resources.requests.ephemeral-storage", "1Gi", "ephemeral-storage; the quota is None", "kueue"),
    ],
    check_gang: [
        job(f"{TRAIN}.minReplicas", 0, "train needs 8 x", "volcano"),
        job(f"{INFERENCE}.minReplicas", 1, "generate needs 2 x", "volcano"),
    ],
    check_schedule: [
        cron("spec.jobTemplate.activeDeadlineSeconds", 72000, "not below a day"),
        cron("spec.schedule", "0 * * * *", "not once a day"),
        cron("spec.timeZone", GONE, "timeZone is not set"),
        cron("spec.jobTemplate.entrypoint", f"{SCRIPT} {ROUND}", "without --next-round"),
    ],
    check_network: [
        policy("deny-all", "podSelector", {"matchLabels": {"a": "b"}}, "another namespace reaches another pod of the"),
        policy("ray", "ingress", [{}], "a pod of another namespace reaches the head on 6379"),
        policy("ray", "egress", GONE, "a worker does not reach the head on 6379"),
        policy("jobs-api", "ingress.0.from", GONE, "a pod of another namespace reaches the head on 8265"),
        policy("jobs-api", "ingress.0.ports", GONE, "the operator reaches the head on 6379"),
        policy("jobs-api", "ingress.0.from.1", GONE, "the operator does not reach the head"),
        policy("dns", "podSelector", {"matchLabels": {"ray.io/is-ray-node": "yes"}}, "the submitter does not reach DNS"),
        policy("hub", "egress.0.to.0.ipBlock.except", GONE, "a worker reaches the instance's metadata"),
        policy("prometheus", "ingress.0.ports", GONE, "Prometheus reaches the head on 8265"),
        policy("kubernetes-api", "egress.0.ports.0", GONE, "does not reach the Kubernetes API on 443", "cpu-smoke"),
        policy("kubernetes-api", "podSelector", {}, "a worker reaches the internet on 443", "cpu-smoke"),
    ],
}
