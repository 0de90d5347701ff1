"""Every overlay keeps every rule, and each rule is broken by the manifests that it is there to find."""

import copy
import re
import shutil
import textwrap
from collections.abc import Callable

import pytest

from . import network_rules, operator_rules, project_rules, queue_rules
from .manifests import KUBERAY, OVERLAYS, Object, of_kind, render
from .mistakes import MISTAKES

CHECKS: list[Callable[[list[Object]], list[str]]] = [
    function
    for module in (operator_rules, project_rules, queue_rules, network_rules)
    for name, function in vars(module).items()
    if name.startswith("check_")
]
CASES = [(check, mistake) for check, mistakes in MISTAKES.items() for mistake in mistakes]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_keeps_the_rule(overlay, name, check):
    assert check(overlay(name)) == []


@pytest.mark.parametrize(
    ("check", "mistake"),
    CASES,
    ids=[f"{c.__name__}-{m.overlay}-{m.path.rpartition('.')[2]}-{m.message[:24]}" for c, m in CASES],
)
def test_mistake_is_found(overlay, check, mistake):
    objects = copy.deepcopy(overlay(mistake.overlay))
    mistake.make(objects)
    assert objects != overlay(mistake.overlay), "nothing was changed"
    found = check(objects)
    assert any(mistake.message in f for f in found), found


def test_every_check_is_shown_to_fail():
    assert set(MISTAKES) == set(CHECKS)


def test_cron_job_needs_its_gate_open(overlay, monkeypatch, tmp_path):
    (tmp_path / "operator-values.yaml").write_text("featureGates: [{name: RayCronJob, enabled: false}]")
    monkeypatch.setattr(operator_rules, "KUBERAY", tmp_path)
    assert operator_rules.check_gates(overlay("cron")) == ["RayCronJob dpo-ray-nightly: needs the feature gate RayCronJob"]
    assert operator_rules.check_gates(overlay("gpu")) == []


def test_overlay_that_does_not_build_says_why(kubectl, tmp_path):
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{KUBERAY}/nowhere]")
    with pytest.raises(RuntimeError, match="nowhere"):
        render(tmp_path)


def test_overlays_are_those_of_the_readme():
    text = (KUBERAY.parent / "README.md").read_text()
    assert [name for name in OVERLAYS if f"overlays/{name}" not in text] == []


def test_readme_overlay_of_your_own_builds_and_keeps_every_rule(kubectl, tmp_path):
    readme = (KUBERAY.parent / "README.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    mine = tmp_path / "kuberay/overlays/mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(textwrap.dedent(block))
    shutil.copy(KUBERAY / "overlays/gpu/round.yaml", mine)
    objects = render(mine)
    assert [f for check in CHECKS for f in check(objects)] == []
    (claim,) = of_kind(objects, "PersistentVolumeClaim")
    assert claim["spec"]["storageClassName"] == "efs"
