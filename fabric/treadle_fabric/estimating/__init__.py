"""Planning beyond this machine: memory and traffic of a rank, of any number of ranks, computed without them.

``planned_step.py`` is where to begin: one training step of a module whose tensors have no memory, in a process group
that sends nothing, under the strategy's own code. ``ghost.py`` makes modules, optimizers and batches without memory;
``world.py`` is the process group; ``step.py`` runs the step; ``recorder.py`` and ``collectives.py`` see what it
allocates and sends; ``results.py`` is what the user gets; ``zero.py`` is the arithmetic of DeepSpeed, whose engine
cannot run so; ``layouts.py`` compares strategies for the command line.

The package imports from all of the runtime but the command line.
"""

from treadle_fabric.estimating.ghost import without_memory
from treadle_fabric.estimating.layouts import Layout, layouts
from treadle_fabric.estimating.planned_step import estimate, estimate_with, planned_nodes
from treadle_fabric.estimating.results import Estimate, Memory, Traffic, in_bytes, table

__all__ = [
    "Estimate",
    "Layout",
    "Memory",
    "Traffic",
    "estimate",
    "estimate_with",
    "in_bytes",
    "layouts",
    "planned_nodes",
    "table",
    "without_memory",
]
