"""The training batches once more, without learning from them."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch

from treadle.checkpoint.exact import moment, restore_metrics
from treadle.data.find import first_loader
from treadle.data.training import TrainingData
from treadle.loops.lockstep import lockstep_of
from treadle.metrics.sinks import silenced
from treadle.module.steps.arguments import TRAINING_ARGUMENTS, bind_step
from treadle.run.run import ReadyRun
from treadle_fabric import isolate_rng
from treadle_fabric.data import generators_of
from treadle_fabric.randomness import generator_state, set_generator_state

__all__ = ["forward_epoch"]


def forward_epoch(run: ReadyRun, data: TrainingData | None) -> int:
    """Run ``training_step`` on the batches of an epoch, for what a forward pass leaves in layers such as batch norm.

    Nothing learns, and nothing is logged. Random states, generators of loaders and samplers and torchmetrics objects
    are afterwards as before. Every rank calls this function.

    Args:
        run: The run.
        data: The training batches; None where the fit has not come to them.

    Returns:
        The number of batches. It is 0 where ``training_step`` cannot be called without learning, because it steps the
        optimizers or draws its batches itself, or because the strategy runs whole batches; and where a stream cannot be
        iterated again.
    """
    if run.fabric.strategy.runs_whole_batch:
        return 0
    step, wants_iterator = bind_step(run.module.training_step, run.method("training_step"), TRAINING_ARGUMENTS)
    if data is None or wants_iterator or not run.module.automatic_optimization:
        return 0
    generators = generators_of(data.epochs.parts)
    states, metrics = [generator_state(each) for each in generators], moment(run)["metric_objects"]
    number, strategy = 0, run.fabric.strategy
    lockstep = lockstep_of(run, "training_step", torch.enable_grad)
    try:
        with isolate_rng(), silenced(run.modules), run.fabric.no_backward_sync(run.wrapped), torch.enable_grad():
            found = data.loader if data.combined is None else first_loader(data.loader)
            batches: Any = islice(found, None if data.num_batches == math.inf else int(data.num_batches))
            for batch in batches if lockstep is None else lockstep.turns(batches):
                step(run.transfer(batch, 0), number)
                strategy.release_gathered()  # no backward pass does that
                number += 1
    finally:
        for generator, state in zip(generators, states, strict=True):
            set_generator_state(generator, state)
        restore_metrics(run, metrics)
    return number
