"""Processes started by Kubeflow's training operator."""

from __future__ import annotations

from treadle_fabric.environments.environment import StartedEnvironment, require_number, require_variable
from treadle_fabric.errors import MisconfigurationException

__all__ = ["KubeflowEnvironment"]


class KubeflowEnvironment(StartedEnvironment):
    """Pods of a Kubeflow PyTorchJob, one process in each: ``Fabric(plugins=KubeflowEnvironment())``.

    It is never detected, because other ways to start processes set the same variables.
    """

    @property
    def main_address(self) -> str:
        return require_variable("MASTER_ADDR", self.variables)

    @property
    def main_port(self) -> int:
        return require_number("MASTER_PORT", self.variables)

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return require_number("WORLD_SIZE", self.variables)

    def global_rank(self) -> int:
        return require_number("RANK", self.variables)

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self.global_rank()

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if num_devices != 1 or num_nodes != self.world_size():
            raise MisconfigurationException(
                f"devices={num_devices} and num_nodes={num_nodes}, but Kubeflow started {self.world_size()} pods with "
                "one process each. Use devices=1 and num_nodes equal to the number of pods."
            )

    def processes_per_node(self) -> int | None:
        return 1
