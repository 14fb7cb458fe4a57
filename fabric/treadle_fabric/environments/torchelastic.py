"""Processes started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Mapping

from treadle_fabric.environments.environment import StartedEnvironment, require_number, require_variable

__all__ = ["TorchElasticEnvironment"]


class TorchElasticEnvironment(StartedEnvironment):
    """Processes started by ``torchrun``, which may also restart them."""

    @property
    def main_address(self) -> str:
        return require_variable("MASTER_ADDR", self.variables)

    @property
    def main_port(self) -> int:
        return require_number("MASTER_PORT", self.variables)

    @staticmethod
    def detect(environ: Mapping[str, str] | None = None) -> bool:
        return "TORCHELASTIC_RUN_ID" in (os.environ if environ is None else environ)

    def world_size(self) -> int:
        return require_number("WORLD_SIZE", self.variables)

    def global_rank(self) -> int:
        return require_number("RANK", self.variables)

    def local_rank(self) -> int:
        return require_number("LOCAL_RANK", self.variables)

    def node_rank(self) -> int:
        return require_number("GROUP_RANK", self.variables, default=0)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        remedy = (
            "Make devices equal to --nproc-per-node and num_nodes to --nnodes; devices='auto' takes the number of "
            "processes that torchrun started on a machine."
        )
        self.check_count(num_devices, num_nodes, "torchrun", remedy)

    def processes_per_node(self) -> int | None:
        if "LOCAL_WORLD_SIZE" not in self.variables:
            return None
        return require_number("LOCAL_WORLD_SIZE", self.variables)
