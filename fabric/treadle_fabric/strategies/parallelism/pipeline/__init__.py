"""Pipeline parallelism: each rank has some stages of a model, and micro-batches flow through the ranks.

``engine.py`` is where to begin: what the strategy makes of a module. ``stages.py`` says which rank has what,
``microbatches.py`` cuts batches, ``schedule.py`` builds torch's schedules, ``sharing.py`` tells all ranks what the last
stage found, ``states.py`` keeps and restores the states of modules and optimizers of which a rank has a part. Heavy
modules of torch are imported where a schedule is built.
"""

from treadle_fabric.strategies.parallelism.pipeline.engine import PipelineEngine
from treadle_fabric.strategies.parallelism.pipeline.schedule import Order
from treadle_fabric.strategies.parallelism.pipeline.stages import is_cut, whole_loss, whole_outputs

__all__ = ["Order", "PipelineEngine", "is_cut", "whole_loss", "whole_outputs"]
