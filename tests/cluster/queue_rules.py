"""What a job needs of whoever starts it: Kueue's quota, Volcano's gang, the nightly schedule. One function a rule."""

import re

from .manifests import Object, Workload, of_kind, pods, quantity, workloads
from .placement import configurations, unheld_by_minima


def check_queues(objects: list[Object]) -> list[str]:
    """Queues that a job names are there; Kueue's quota covers every resource that a pod requests, and all groups at once."""
    found = []
    local = {o["metadata"]["name"]: o["spec"]["clusterQueue"] for o in of_kind(objects, "LocalQueue")}
    quotas = {
        o["metadata"]["name"]: {
            r["name"]: quantity(r["nominalQuota"])
            for g in o["spec"]["resourceGroups"] for f in g["flavors"] for r in f["resources"]
        } for o in of_kind(objects, "ClusterQueue")
    }  # fmt: skip
    for w in workloads(objects):
        queue = w.object["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
        if queue is None:
            continue
        if local.get(queue) not in quotas:
            found.append(f"{w}: LocalQueue {queue} or its ClusterQueue is not there")
            continue
        for resource, needed in _requests_at_most(w).items():
            quota = quotas[local[queue]].get(resource)
            if quota is None or quota < needed:
                found.append(f"{w}: requests up to {needed:g} {resource}; the quota is {quota}")
    return found


def _requests_at_most(w: Workload) -> dict[str, float]:
    counts = {g["groupName"]: g["maxReplicas"] * g.get("numOfHosts", 1) for g in w.cluster.get("workerGroupSpecs", [])}
    total: dict[str, float] = {}
    for pod in pods(w):
        count = counts.get(pod.where.rpartition(", ")[2], 1)
        for c in pod.spec["containers"]:
            for resource, amount in c.get("resources", {}).get("requests", {}).items():
                total[resource] = total.get(resource, 0.0) + count * quantity(amount)
    return total


def check_gang(objects: list[Object]) -> list[str]:
    """Under Volcano the pods that start together are minReplicas of every group: they must hold every stage."""
    queued = [w for w in workloads(objects) if "volcano.sh/queue-name" in w.object["metadata"].get("labels", {})]
    return [f"{w}: {p}" for w in queued for run in configurations(w, objects) for p in unheld_by_minima(run, w.cluster)]


def check_schedule(objects: list[Object]) -> list[str]:
    """A nightly job, with its retries, is over before the next one; each night is another round, of the same command."""
    found = []
    for w in workloads(objects):
        if w.object["kind"] != "RayCronJob" or w.job is None:
            continue
        longest = (w.job["backoffLimit"] + 1) * w.job["activeDeadlineSeconds"]
        if longest >= 24 * 3600:
            found.append(f"{w}: {w.job['backoffLimit'] + 1} attempts of activeDeadlineSeconds are {longest} s, not below a day")
        if not re.fullmatch(r"\d+ \d+ \* \* \*", w.object["spec"]["schedule"]):
            found.append(f"{w}: schedule {w.object['spec']['schedule']!r} is not once a day")
        if "timeZone" not in w.object["spec"]:
            found.append(f"{w}: timeZone is not set")
        if "--next-round" not in w.job["entrypoint"].split():
            found.append(f"{w}: without --next-round the second night finds everything done")
    return found
