"""How many training workers fit: on nodes with the labels that they need, and none on a node that is about to go.

Ray 2.60 counts what an elastic run can have on any node, whatever its labels, and on draining ones too; a group of that size
then finds no place. The rest of it, when to grow and when to start again, is Ray's.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from dpo_ray.flow.fit import has_labels, live_nodes


class Trainer(TorchTrainer):
    """Ray's trainer, with its scaling policy replaced where the number of workers is a range."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = OnSuitableNodes(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


class OnSuitableNodes(ElasticScalingPolicy):
    """Ray's elastic policy, which counts workers on suitable nodes alone."""

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        selector: Any = self.scaling_config.label_selector or {}
        nodes = live_nodes()
        if not selector and reserved_resources.keys() <= {n.id for n in nodes}:
            return super()._count_possible_workers(reserved_resources)
        # What Ray reserves may lie on other nodes: then all that suitable ones have counts.
        suitable: Any = {n.id: n.total for n in nodes if has_labels(n.labels, selector)}
        return super()._count_possible_workers(suitable)
