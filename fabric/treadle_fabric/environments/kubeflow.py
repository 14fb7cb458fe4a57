"""Processes started by Kubeflow's training operator."""

from __future__ import annotations

import os
from collections.abc import Mapping

from treadle_fabric.environments.environment import (
    Finding,
    StartedEnvironment,
    list_variables,
    pick,
    refuse_ranks_beyond,
    require_number,
    require_port,
    require_variable,
)
from treadle_fabric.errors import MisconfigurationException

__all__ = ["KubeflowEnvironment"]


_READ = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")


class KubeflowEnvironment(StartedEnvironment):
    """Pods of a Kubeflow PyTorchJob, one process in each: ``Fabric(plugins=KubeflowEnvironment())``.

    It is never detected, because other ways to start processes set the same variables. With several processes in a pod,
    ``torchrun`` starts them, and is detected: it takes its options from the PET_ variables that the operator sets.
    """

    @property
    def main_address(self) -> str:
        return require_variable("MASTER_ADDR", self.variables)

    @property
    def main_port(self) -> int:
        return require_port(self.variables)

    @staticmethod
    def examine(environ: Mapping[str, str] | None = None) -> Finding:
        """Return why these variables are not taken for Kubeflow's, and what to say where nothing else follows them."""
        environ = os.environ if environ is None else environ
        found = pick(_READ, environ)
        note = ""
        if len(found) == len(_READ) and found["WORLD_SIZE"].strip() != "1" and "LOCAL_RANK" not in environ:
            note = (
                f"{list_variables(found)} are not followed, because LOCAL_RANK is not set. In the pods of a Kubeflow "
                "PyTorchJob, pass plugins=KubeflowEnvironment()."
            )
        reason = "Only plugins=KubeflowEnvironment() chooses it, because other programs set the same variables, too."
        pods = pick(("KUBERNETES_SERVICE_HOST", "PET_NODE_RANK"), environ)
        alone = f"{note} Without it each pod trains on its own." if note and pods else ""
        return Finding(False, found, reason, note, alone)

    def world_size(self) -> int:
        return require_number("WORLD_SIZE", self.variables, minimum=1)

    def global_rank(self) -> int:
        return require_number("RANK", self.variables)

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self.global_rank()

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if "TORCHELASTIC_RUN_ID" in self.variables:
            raise MisconfigurationException(
                f"KubeflowEnvironment, but torchrun started this process in its pod "
                f"({list_variables(pick(('TORCHELASTIC_RUN_ID', 'RANK', 'LOCAL_RANK'), self.variables))}). Leave out "
                "plugins=KubeflowEnvironment(): torchrun is detected."
            )
        several = self.variables.get("PET_NPROC_PER_NODE", "1").strip() != "1"
        if several or self.variables.get("LOCAL_RANK", "0").strip() != "0":
            said = list_variables(pick(("PET_NPROC_PER_NODE", "LOCAL_RANK"), self.variables))
            raise MisconfigurationException(
                f"KubeflowEnvironment is for pods with one process each, and {said}. For several in each pod, start "
                "the script with `torchrun train.py`, which takes its options from the PET_ variables, and leave out "
                "plugins=KubeflowEnvironment()."
            )
        refuse_ranks_beyond([("RANK", "WORLD_SIZE")], self.variables, "The operator")
        if self.variables.get("PET_NODE_RANK", self.variables.get("RANK")) != self.variables.get("RANK"):
            said = list_variables(pick(("RANK", "PET_NODE_RANK"), self.variables))
            raise MisconfigurationException(
                f"{said}: Kubeflow sets both to the number of the pod. One of them was set in the pod's template: "
                "leave it out there."
            )
        if num_devices != 1 or num_nodes != self.world_size():
            raise MisconfigurationException(
                f"devices={num_devices} and num_nodes={num_nodes}, but Kubeflow started {self.world_size()} pods with "
                "one process each. Use devices=1 and num_nodes equal to the number of pods."
            )

    def processes_per_node(self) -> int | None:
        return 1

    def evidence(self) -> dict[str, str]:
        return pick((*_READ, "PET_NODE_RANK", "PET_NPROC_PER_NODE", "PET_NNODES"), self.variables)

    def explain_ranks(self, world_size: int) -> str:
        said = list_variables(pick(_READ[:1], self.variables))
        return f"{said} says that there are {world_size} pods with a process each. See whether all pods run the script."
