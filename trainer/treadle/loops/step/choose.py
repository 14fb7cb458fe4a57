"""Choose, when a run starts, how it trains on a batch."""

from __future__ import annotations

from treadle.loops.step.automatic import AutomaticStep
from treadle.loops.step.clipping import Clipping
from treadle.loops.step.manual import ManualStep
from treadle.loops.step.several import SeveralOptimizersStep
from treadle.loops.step.single import NoOptimizerStep, SingleOptimizerStep
from treadle.run.run import ReadyRun

__all__ = ["choose_step"]


def choose_step(run: ReadyRun, clipping: Clipping) -> AutomaticStep | ManualStep:
    """Choose by the kind of optimization, and by the number of optimizers."""
    if not run.module.automatic_optimization:
        return ManualStep(run)
    if len(run.optimizers) > 1:
        return SeveralOptimizersStep(run, clipping, run.optimizers)
    return SingleOptimizerStep(run, clipping, *run.optimizers) if run.optimizers else NoOptimizerStep(run, clipping)
