"""cluster/monitoring/dashboard.json: that it shows every metric of the project, by the names that Prometheus has."""

import json
import re

import pytest

from dpo_ray.flow.metrics import COUNTERS, GAUGES
from dpo_ray.flow.metrics import TAGS as TAG_NAMES

from .manifests import ROOT, of_kind

DASHBOARD = json.loads((ROOT / "cluster/monitoring/dashboard.json").read_text())
TAGS = set(TAG_NAMES)
OTHERS = {
    "ray_node_gpus_utilization", "ray_node_mem_used", "ray_node_mem_total", "autoscaler_pending_nodes"
}  # fmt: skip
"""Ray's own: dashboard/modules/reporter/reporter_agent.py and autoscaler/_private/prom_metrics.py of Ray 2.60."""
EXPRESSIONS = [t["expr"] for p in DASHBOARD["panels"] for t in p["targets"]]


def metrics(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:ray|autoscaler)_[a-z_]+\b(?=[{\[)]|$)", expression))


def test_dashboard_shows_every_metric_and_no_other():
    assert set().union(*map(metrics, EXPRESSIONS)) == {f"ray_{m}" for m in (*COUNTERS, *GAUGES)} | OTHERS


def test_dashboard_names_are_those_that_ray_exports():
    from prometheus_client import generate_latest
    from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder

    recorder, tags = OpenTelemetryMetricRecorder(), dict.fromkeys(TAGS, "x")
    for name in COUNTERS:
        recorder.register_counter_metric(name, "")
    for name in GAUGES:
        recorder.register_gauge_metric(name, "")
    for name in (*COUNTERS, *GAUGES):
        recorder.set_metric_value(name, tags, 1.0)
    exported = set(re.findall(r"^(\w*dpo_ray\w*){", generate_latest().decode(), re.MULTILINE))
    assert exported == {m for e in EXPRESSIONS for m in metrics(e)} - OTHERS


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_dashboard_expression_is_by_tags_that_the_metric_has(expression):
    assert expression.count("(") == expression.count(")")
    assert expression.count("{") == expression.count("}")
    if "dpo_ray" in expression:
        selected, by = set(re.findall(r"(\w+)=~", expression)), re.search(r"by \(([^)]*)\)", expression)
        assert selected == {"run", "round"}
        assert by
        assert set(by[1].split(", ")) <= TAGS


def test_dashboard_rates_are_of_counters():
    rated = {m for e in EXPRESSIONS if "rate(" in e for m in metrics(e)}
    assert rated
    assert rated <= {f"ray_{m}" for m in COUNTERS}


def test_dashboard_panels_do_not_overlap():
    cells = [
        (x, y) for p in DASHBOARD["panels"] for g in [p["gridPos"]]
        for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])
    ]  # fmt: skip
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert len({p["id"] for p in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_dashboard_variables_are_defined_where_they_are_used():
    defined = {v["name"] for v in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"]))) <= defined


def test_monitoring_ships_the_dashboard_and_scrapes_the_ports_of_the_pods(monitoring):
    (shipped,) = of_kind(monitoring, "ConfigMap")
    assert json.loads(shipped["data"]["dashboard.json"]) == DASHBOARD
    (monitor,) = of_kind(monitoring, "PodMonitor")
    assert [e["port"] for e in monitor["spec"]["podMetricsEndpoints"]] == ["metrics", "as-metrics", "dash-metrics"]
    assert monitor["spec"]["namespaceSelector"]["matchNames"] == ["dpo-ray"]
