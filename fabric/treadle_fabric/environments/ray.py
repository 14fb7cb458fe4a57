"""Workers that Ray placed on machines and started."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from treadle_fabric.checks import check_integer, require_package
from treadle_fabric.environments.environment import Finding, StartedEnvironment, list_variables, pick
from treadle_fabric.environments.local import find_free_port
from treadle_fabric.errors import MisconfigurationException

__all__ = ["RayEnvironment"]

_SET_BY_RAY = ("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class _Place:
    """The ranks of a worker, and the numbers of workers."""

    world_size: int
    global_rank: int
    local_world_size: int
    local_rank: int
    node_rank: int


class RayEnvironment(StartedEnvironment):
    """Workers of Ray Train, or actors of one's own; Ray places them, ends them together and starts them again.

    In the function that a trainer of Ray Train runs in its workers, this environment is detected, and ``Fabric()`` and
    ``Trainer()`` take workers, machines and devices from Ray. Where Ray's ``TorchTrainer`` has made the process group,
    that group is used; with any other trainer of Ray Train, and in actors, Treadle makes the group.

    An exception in one rank leaves the worker's function, and Ray sees it; no rank ends its process because another one
    failed, for Ray ends the workers, and starts them again if ``FailureConfig(max_failures=...)`` says so.

    Args:
        world_size: The number of processes, for actors outside of Ray Train. Default: as Ray Train's context says, also
            for the following ones.
        global_rank: This process among all.
        local_world_size: The number of processes on this machine. Default: ``world_size``.
        local_rank: This process among those on its machine. Default: ``global_rank``.
        node_rank: This machine among all. Default: 0.
        main_address: The address of the machine of rank 0; given for actors only, and needed for several.
        main_port: A free port of that machine.

    Raises:
        MissingPackageError: Ray is not installed.
        MisconfigurationException: A number is out of its range; or some of the arguments for actors are missing.
    """

    ends_processes = True

    def __init__(
        self,
        world_size: int | None = None,
        global_rank: int | None = None,
        local_world_size: int | None = None,
        local_rank: int | None = None,
        node_rank: int = 0,
        main_address: str | None = None,
        main_port: int | None = None,
    ) -> None:
        require_package("ray", "RayEnvironment", "ray")
        self._given: _Place | None = None
        self._meeting_point = None if main_address is None or main_port is None else (main_address, main_port)
        said = {
            "world_size": world_size,
            "global_rank": global_rank,
            "local_world_size": local_world_size,
            "local_rank": local_rank,
            "node_rank": node_rank or None,
            "main_address": main_address,
            "main_port": main_port,
        }
        if any(value is not None for value in said.values()):
            several = world_size is None or check_integer("world_size", world_size, minimum=1) > 1
            needed = ["world_size", "global_rank", *(["main_address", "main_port"] if several else [])]
            missing = [name for name in needed if said[name] is None]
            if missing:
                raise MisconfigurationException(
                    f"RayEnvironment of actors needs {', '.join(missing)}, too. In a worker of Ray Train, leave all of "
                    "the arguments out."
                )
            self._given = _check(world_size, global_rank, local_world_size, local_rank, node_rank)

    @property
    def main_address(self) -> str:
        return self._meet()[0]

    @property
    def main_port(self) -> int:
        return self._meet()[1]

    @staticmethod
    def examine(environ: Mapping[str, str] | None = None) -> Finding:
        """Return whether this process is a worker of Ray Train, which its context says, and no variable."""
        if "ray.train" not in sys.modules:  # a worker has imported Ray before the user's function
            return Finding(False, {}, "This process is no worker of Ray Train: ray.train is not imported.")
        context = _context()
        if context is None:
            return Finding(False, {}, "This process is no worker of Ray Train: ray.train has no context for it.")
        rank, size = context.get_world_rank(), context.get_world_size()
        return Finding(True, {}, f"Ray Train started this process as rank {rank} of {size}.")

    def world_size(self) -> int:
        return self._place.world_size

    def global_rank(self) -> int:
        return self._place.global_rank

    def local_rank(self) -> int:
        return self._place.local_rank

    def node_rank(self) -> int:
        return self._place.node_rank

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        place = self._place
        if num_devices != place.local_world_size or num_nodes not in (1, self.started_nodes()):
            raise MisconfigurationException(
                f"devices={num_devices} and num_nodes={num_nodes}, but Ray started {place.local_world_size} of "
                f"{place.world_size} workers on this machine. Leave devices and num_nodes out: "
                "ScalingConfig(num_workers=...) says how many processes there are, and Ray where."
            )

    def processes_per_node(self) -> int | None:
        return self._place.local_world_size

    def started_nodes(self) -> int | None:
        """Return the number of machines, where each has the same number of workers; else an estimate, above 1."""
        place = self._place
        return max(1 + place.node_rank, -(-place.world_size // place.local_world_size))

    def assigned_device(self) -> torch.device | None:
        """Return the device that Ray gave this worker; with several GPUs for one worker, the first of them."""
        import ray  # an extra, and heavy

        given = {name: ids for name, ids in ray.get_runtime_context().get_accelerator_ids().items() if ids}
        if not given:
            return torch.device("cpu") if self._given is None else None
        if "GPU" not in given:
            return None
        from ray.train.torch import get_device  # an extra, and heavy

        device: torch.device = get_device()
        return device

    def evidence(self) -> dict[str, str]:
        return pick(_SET_BY_RAY, self.variables)

    def explain_ranks(self, world_size: int) -> str:
        where = "ScalingConfig(num_workers=...)" if self._given is None else "RayEnvironment(world_size=...)"
        return f"{where} says that Ray started {world_size} workers. All of them have to come to this point."

    def describe(self) -> dict[str, str]:
        place = self._place
        address = "agreed upon when the run starts"  # by a collective of Ray's, in which this process would wait
        return {
            "global rank": f"{place.global_rank} of {place.world_size}",
            "local rank": f"{place.local_rank} of {place.local_world_size}",
            "node rank": str(place.node_rank),
            "meeting point": list_variables(pick(_SET_BY_RAY[:2], self.variables)) or address,
        }

    @cached_property
    def _place(self) -> _Place:
        if self._given is not None:
            return self._given
        context = _context()
        if context is None:
            raise MisconfigurationException(
                "RayEnvironment() takes the ranks from Ray Train, and this process is no worker of Ray Train's "
                "(of its second version, which RAY_TRAIN_V2_ENABLED=0 replaces by the first). Use Fabric or the "
                "Trainer in the function that ray.train.torch.TorchTrainer(...) runs, or, in actors of your own, "
                "RayEnvironment(world_size=..., global_rank=..., main_address=..., main_port=...)."
            )
        return _Place(
            world_size=context.get_world_size(),
            global_rank=context.get_world_rank(),
            local_world_size=context.get_local_world_size(),
            local_rank=context.get_local_rank(),
            node_rank=context.get_node_rank(),
        )

    def _meet(self) -> tuple[str, int]:
        """Agree on address and port, which rank 0 chooses; every rank calls this as often."""
        if self._meeting_point is None:
            if self._place.world_size == 1:
                self._meeting_point = ("127.0.0.1", find_free_port())
                return self._meeting_point
            import ray.util  # an extra, and heavy
            from ray.train.collective import broadcast_from_rank_zero

            mine = (ray.util.get_node_ip_address(), find_free_port()) if self.global_rank() == 0 else None
            address, port = broadcast_from_rank_zero(mine)
            self._meeting_point = (str(address), int(port))
        return self._meeting_point


def _check(
    world_size: int | None,
    global_rank: int | None,
    local_world_size: int | None,
    local_rank: int | None,
    node_rank: int,
) -> _Place:
    """The place of an actor, as the arguments say.

    Raises:
        MisconfigurationException: A number is out of its range.
    """
    size = check_integer("world_size", world_size, minimum=1)
    rank = check_integer("global_rank", global_rank, minimum=0)
    local_size = size if local_world_size is None else check_integer("local_world_size", local_world_size, minimum=1)
    local = rank if local_rank is None else check_integer("local_rank", local_rank, minimum=0)
    place = _Place(size, rank, local_size, local, check_integer("node_rank", node_rank, minimum=0))
    if rank >= size or local >= local_size or local_size > size:
        raise MisconfigurationException(
            f"RayEnvironment(world_size={size}, global_rank={rank}, local_world_size={local_size}, "
            f"local_rank={local}): ranks are numbered from 0 to below their number, and no machine has more processes "
            "than there are in all."
        )
    return place


def _context() -> Any:
    """Ray Train's context of this process; None outside of its workers, and in the first version of Ray Train."""
    import ray.train  # an extra, and heavy

    if not hasattr(ray.train, "WorkerGroupError"):  # in the first version each process has a context
        return None
    try:
        context = ray.train.get_context()
        context.get_world_size()
    except (RuntimeError, DeprecationWarning):  # the latter in a trial of Ray Tune
        return None
    return context
