"""Processes that torch-xla started, one for each device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from treadle_fabric.environments.environment import Finding, StartedEnvironment, list_variables, pick, require_number

__all__ = ["XLAEnvironment"]

_RANK: Final = "PJRT_LOCAL_PROCESS_RANK"
_COUNT: Final = "PJRT_LOCAL_PROCESS_COUNT"
_READ: Final = (_RANK, _COUNT, "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "MASTER_ADDR", "MASTER_PORT")


class XLAEnvironment(StartedEnvironment):
    """Processes that ``torch_xla.launch`` or ``xmp.spawn`` started: ``plugins=XLAEnvironment()`` in the function.

    On the machines of a TPU pod, ``TPU_WORKER_ID`` and ``TPU_WORKER_HOSTNAMES`` say which machine this is, and which
    is the first.
    """

    @staticmethod
    def examine(environ: Mapping[str, str] | None = None) -> Finding:
        """Return whether torch-xla started this process as one of several, and by which variables that was decided."""
        environ = os.environ if environ is None else environ
        found = pick(_READ[:2], environ)
        if len(found) == 2 and "LOCAL_RANK" not in environ:
            return Finding(True, found, f"torch-xla started this process ({list_variables(found)}).")
        return Finding(False, found, f"torch_xla.launch sets {_RANK} and {_COUNT}, and no LOCAL_RANK.")

    @property
    def main_address(self) -> str:
        hosts = self.variables.get("TPU_WORKER_HOSTNAMES", "").split(",")
        return self.variables.get("MASTER_ADDR") or hosts[0] or "127.0.0.1"

    @property
    def main_port(self) -> int:
        if "MASTER_PORT" in self.variables:
            return require_number("MASTER_PORT", self.variables)
        # All processes of a machine have one parent; those of several machines agree on a number only
        return 12355 if self._num_nodes() > 1 else 12000 + os.getppid() % 16000

    def _num_nodes(self) -> int:
        return len(self.variables.get("TPU_WORKER_HOSTNAMES", "").split(","))

    def world_size(self) -> int:
        return self._num_nodes() * self.processes_per_node()

    def global_rank(self) -> int:
        return self.node_rank() * self.processes_per_node() + self.local_rank()

    def local_rank(self) -> int:
        return require_number(_RANK, self.variables, default=0)

    def node_rank(self) -> int:
        return require_number("TPU_WORKER_ID", self.variables, default=0)

    def processes_per_node(self) -> int:
        return require_number(_COUNT, self.variables, default=1)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        self.check_count(num_devices, num_nodes, "torch-xla", "Leave devices out, and give num_nodes.")

    def evidence(self) -> dict[str, str]:
        return pick(_READ, self.variables)
