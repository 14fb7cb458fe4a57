"""The training batches once more, without learning from them."""

from __future__ import annotations

import torch

from treadle.checkpoint.exact import moment, restore_metrics
from treadle.data.find import first_loader
from treadle.data.training import TrainingData
from treadle.metrics.sinks import silenced
from treadle.module.step_arguments import TRAINING_ARGUMENTS, bind_step
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
    number = 0
    try:
        with isolate_rng(), silenced(run.modules), run.fabric.no_backward_sync(run.wrapped), torch.enable_grad():
            for batch in data.loader if data.combined is None else first_loader(data.loader):
                if number >= data.num_batches:
                    break
                step(run.transfer(batch, 0), number)
                number += 1
    finally:
        for generator, state in zip(generators, states, strict=True):
            set_generator_state(generator, state)
        restore_metrics(run, metrics)
    return number
