"""Processes started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Mapping

from treadle_fabric.environments.environment import ClusterEnvironment, require_number, require_variable
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.rank_zero import rank_zero_only

__all__ = ["TorchElasticEnvironment"]


class TorchElasticEnvironment(ClusterEnvironment):
    """Processes started by ``torchrun``, which may also restart them."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

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

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return require_number("RANK", self.variables)

    def set_global_rank(self, rank: int) -> None:
        rank_zero_only.rank = rank  # type: ignore[attr-defined]

    def local_rank(self) -> int:
        return require_number("LOCAL_RANK", self.variables)

    def node_rank(self) -> int:
        return require_number("GROUP_RANK", self.variables, default=0)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if num_devices * num_nodes != self.world_size():
            raise MisconfigurationException(
                f"devices={num_devices} and num_nodes={num_nodes} ask for {num_devices * num_nodes} processes, but "
                f"torchrun started {self.world_size()}. Make devices equal to --nproc-per-node and num_nodes to "
                "--nnodes; devices='auto' takes what torchrun started on a machine."
            )

    def processes_per_node(self) -> int | None:
        if "LOCAL_WORLD_SIZE" not in self.variables:
            return None
        return require_number("LOCAL_WORLD_SIZE", self.variables)
