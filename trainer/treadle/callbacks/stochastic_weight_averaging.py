"""StochasticWeightAveraging: averages the weights of the last epochs, which train with a learning rate of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR, get_swa_avg_fn

from treadle.callbacks.averaging.callback import AveragingCallback, as_device
from treadle.callbacks.averaging.rules import OneByOne
from treadle.callbacks.averaging.weights import AveragedWeights
from treadle.callbacks.callback import epoch_is_over
from treadle.module import LRSchedulerConfig
from treadle.stages import TrainerFn
from treadle_fabric import (
    MisconfigurationException,
    check_integer,
    is_number,
    near_names,
    rank_zero_info,
    rank_zero_warn,
)

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["StochasticWeightAveraging"]

_STRATEGIES = ("cos", "linear")


class StochasticWeightAveraging(AveragingCallback):
    """Average the weights of the last epochs, and evaluate and save the average.

    From the epoch ``swa_epoch_start`` on, the learning rate goes to ``swa_lrs``, and the weights at the end of each
    epoch, the last one included, join the average. When training has ended, the statistics of batch norm layers that
    train are computed anew for the averaged weights, in one pass over the training batches; where the batches cannot be
    drawn again, they are the averages of the epochs' statistics, as they are in all evaluations before. See
    :class:`~treadle.callbacks.averaging.AveragingCallback` for which weights are where. The method is of `Averaging
    Weights Leads to Wider Optima and Better Generalization <https://arxiv.org/abs/1803.05407>`_.

    Args:
        swa_lrs: The learning rate of the averaged epochs, or a list with one for each parameter group.
        swa_epoch_start: The first epoch to average, counted from 1; or a fraction, from 0 to 1, of ``max_epochs``.
        annealing_epochs: The epochs in which the learning rate goes to ``swa_lrs``; 0 changes it at once.
        annealing_strategy: "cos" or "linear".
        avg_fn: A function of an average, a weight and the number of weights averaged so far, which returns the new
            average. Default: :meth:`avg_fn`, in which all weights count the same.
        device: Where the average is kept; None for where the weights are. Default: on the CPU.

    Raises:
        MisconfigurationException: An argument is anything else. When fit begins: the module has manual optimization, or
            not exactly one optimizer; ``swa_lrs`` has another length than its parameter groups; or ``swa_epoch_start``
            is a fraction and ``max_epochs`` has no bound.
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        device: torch.device | str | int | None = torch.device("cpu"),  # noqa: B008 - immutable
    ) -> None:
        name = "StochasticWeightAveraging"
        self._swa_lrs = _learning_rates(swa_lrs)
        self._swa_epoch_start = _start(swa_epoch_start)
        self._annealing_epochs = check_integer(f"{name}: annealing_epochs", annealing_epochs, minimum=0)
        if annealing_strategy not in _STRATEGIES:
            raise MisconfigurationException(
                f"{name}(annealing_strategy={annealing_strategy!r}): it is 'cos' or 'linear'."
                f" {near_names(str(annealing_strategy), _STRATEGIES)}"
            )
        self._annealing_strategy: Literal["cos", "linear"] = annealing_strategy
        if avg_fn is not None and not callable(avg_fn):
            raise MisconfigurationException(
                f"{name}(avg_fn={avg_fn!r}): it is a function of an average, a weight and the number averaged so far."
            )
        super().__init__(AveragedWeights(OneByOne(avg_fn or self.avg_fn), as_device(name, device), use_buffers=True))
        self._max_epochs: int | None = None
        self._begun = False
        self._latest_update_epoch = -1
        self._momenta: dict[_BatchNorm, float | None] = {}

    @property
    def swa_start(self) -> int:
        """The first epoch that is averaged, counted from 0; of a fraction it is known when fit begins."""
        start = self._swa_epoch_start
        if isinstance(start, float):
            start = int((self._max_epochs or 0) * start)
        return max(start - 1, 0)

    @property
    def swa_end(self) -> int:
        """The last epoch that is averaged, counted from 0; the largest integer where ``max_epochs`` has no bound."""
        return sys.maxsize if self._max_epochs is None else max(self._max_epochs - 1, 0)

    # ------------------------------------------------------------------------------------------------ the epochs

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be averaged so; set the learning rates where the averaged epochs have begun before."""
        bounded = trainer.max_epochs is not None and trainer.max_epochs >= 0
        self._max_epochs = trainer.max_epochs if bounded else None
        if isinstance(self._swa_epoch_start, float) and not bounded:
            raise MisconfigurationException(
                f"StochasticWeightAveraging(swa_epoch_start={self._swa_epoch_start}) is a fraction of max_epochs, which"
                f" is {trainer.max_epochs}: set max_epochs, or pass the number of an epoch."
            )
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            manual = "" if pl_module.automatic_optimization else " and manual optimization"
            raise MisconfigurationException(
                f"StochasticWeightAveraging sets the learning rates of one optimizer in automatic optimization, and"
                f" {type(pl_module).__qualname__} has {len(trainer.optimizers)}{manual}: use WeightAveraging there,"
                " which leaves learning rates alone."
            )
        groups = len(trainer.optimizers[0].param_groups)
        if isinstance(self._swa_lrs, list) and len(self._swa_lrs) != groups:
            raise MisconfigurationException(
                f"StochasticWeightAveraging(swa_lrs={self._swa_lrs}) has {len(self._swa_lrs)} learning rates, and the"
                f" optimizer has {groups} parameter groups: pass one number for all, or one for each group."
            )
        if bounded and self.swa_start > self.swa_end and not trainer.fast_dev_run:
            rank_zero_warn(
                f"StochasticWeightAveraging begins with epoch {self.swa_start + 1}, and training ends after"
                f" {self._max_epochs}: nothing will be averaged. Set a lower swa_epoch_start."
            )
        if self._begun:
            self._set_learning_rates(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the learning rates when the averaged epochs begin."""
        resumed = trainer.fit_progress.begun  # in mid-epoch, where learning rates are those of the checkpoint
        if not self._begun and not resumed and trainer.current_epoch >= self.swa_start:
            self._begun = True
            self._set_learning_rates(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average at the last batch of an epoch, so that the validation there has it."""
        if trainer.is_last_batch:
            self._update(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where the end of a stream was found after its last batch."""
        if trainer.state.fn == TrainerFn.FITTING and trainer.is_last_batch and not trainer.sanity_checking:
            self._update(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where the epoch was ended early."""
        if epoch_is_over(trainer):
            self._update(trainer, pl_module)

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._begun and trainer.current_epoch > self._latest_update_epoch:
            self.update_average(trainer, pl_module)
            self._latest_update_epoch = trainer.current_epoch

    def _set_learning_rates(self, trainer: Trainer) -> None:
        """Let the schedule of stochastic weight averaging take the place of the others."""
        optimizer, configs = trainer.optimizers[0], trainer.lr_scheduler_configs
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if names := [type(config.scheduler).__name__ for config in configs]:
            rank_zero_info(f"Swapping scheduler {' and '.join(f'`{n}`' for n in names)} for `SWALR`, for SWA.")
        lrs: Any = self._swa_lrs  # one for each group is fine, too
        scheduler = SWALR(optimizer, lrs, self._annealing_epochs, self._annealing_strategy)
        configs[:] = [LRSchedulerConfig(scheduler)]

    # ------------------------------------------------------------------------------------------------ batch norm

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the statistics of batch norm for the averaged weights."""
        if not self.pl_module_contains_batch_norm(pl_module):
            return
        averaged = [
            (norm, [tensor.clone() for tensor in tensors]) for norm in _trained(pl_module) if (tensors := _state(norm))
        ]
        self.reset_batch_norm_and_save_state(pl_module)
        try:
            batches = trainer.fit_loop.forward_epoch()
        finally:
            self.reset_momenta()
        for norm, before in averaged:
            if trainer.world_size > 1:  # the mean over the batches of all ranks
                for tensor in _state(norm):
                    tensor.copy_(trainer.strategy.all_reduce(tensor.float(), reduce_op="mean"))
            if not norm.num_batches_tracked:  # no batch came through this layer
                for tensor, value in zip(_state(norm), before, strict=True):
                    tensor.copy_(value)
        if not batches:
            rank_zero_info(
                "StochasticWeightAveraging: the training batches cannot be drawn again, so the statistics of batch norm"
                " are the averages of the epochs' statistics."
            )
        self._weights.take_buffers(pl_module)

    def pl_module_contains_batch_norm(self, pl_module: nn.Module) -> bool:
        """Tell whether a module has batch norm layers."""
        return any(isinstance(module, _BatchNorm) for module in pl_module.modules())

    def reset_batch_norm_and_save_state(self, pl_module: nn.Module) -> None:
        """Let the batch norm layers that train begin their statistics anew, as means over all batches to come.

        :meth:`reset_momenta` gives the layers their own momenta back.
        """
        self._momenta = {norm: norm.momentum for norm in _trained(pl_module)}
        for norm in self._momenta:
            norm.reset_running_stats()
            norm.momentum = None

    def reset_momenta(self) -> None:
        """Give the batch norm layers back the momenta that they had."""
        for norm, momentum in self._momenta.items():
            norm.momentum = momentum
        self._momenta = {}

    # ------------------------------------------------------------------------------------------------ the average

    @staticmethod
    def avg_fn(averaged_model_parameter: Tensor, model_parameter: Tensor, num_averaged: Tensor) -> Tensor:
        """Return the average with one weight more, all weights counting the same."""
        average: Tensor = get_swa_avg_fn()(averaged_model_parameter, model_parameter, num_averaged)  # type: ignore[no-untyped-call]
        return average

    @staticmethod
    @torch.no_grad()
    def update_parameters(
        average_model: nn.Module,
        model: nn.Module,
        n_averaged: Tensor,
        avg_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        """Take the parameters of ``model`` into the averages that are those of ``average_model``, and count that.

        Args:
            average_model: Has the averages; with ``n_averaged`` 0 they become the parameters of ``model``.
            model: A module of the same structure, perhaps on another device.
            n_averaged: The number of models averaged so far; one is added in place.
            avg_fn: As the argument of the constructor.
        """
        first = not n_averaged
        for average, parameter in zip(average_model.parameters(), model.parameters(), strict=True):
            value = parameter.detach().to(average)
            average.copy_(value if first else avg_fn(average.detach(), value, n_averaged.to(average.device)))
        n_averaged += 1

    @staticmethod
    @torch.no_grad()
    def transfer_weights(src_pl_module: nn.Module, dst_pl_module: nn.Module) -> None:
        """Copy the parameters of a module into another of the same structure, perhaps on another device."""
        for source, target in zip(src_pl_module.parameters(), dst_pl_module.parameters(), strict=True):
            target.copy_(source)

    def state_dict(self) -> dict[str, Any]:
        """Return what has begun, and the last epoch in the average; the weights are entries of their own."""
        return {"begun": self._begun, "latest_update_epoch": self._latest_update_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, also in a checkpoint of Lightning; of nothing, begin anew."""
        self._weights.forget()
        self._latest_update_epoch = state_dict.get("latest_update_epoch", -1)
        self._begun = state_dict.get("begun", self._latest_update_epoch >= 0)
        if state_dict.get("average_model_state") and state_dict.get("n_averaged"):
            self._loaded = state_dict["average_model_state"], int(state_dict["n_averaged"])


def _trained(module: nn.Module) -> list[_BatchNorm]:
    """The batch norm layers that keep statistics, and are not kept in evaluation mode."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]


def _state(norm: _BatchNorm) -> list[Tensor]:
    return [t for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked) if t is not None]


def _learning_rates(given: Any) -> float | list[float]:
    rates = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not rates or not all(is_number(lr) and lr > 0 for lr in rates):
        raise MisconfigurationException(
            f"StochasticWeightAveraging(swa_lrs={given!r}): it is a learning rate above 0, or a list of them, one for"
            " each parameter group."
        )
    numbers = [float(lr) for lr in rates]
    return numbers if isinstance(given, Sequence) else numbers[0]


def _start(given: Any) -> int | float:
    whole = isinstance(given, int) and not isinstance(given, bool) and given >= 1
    if not whole and not (isinstance(given, float) and 0 <= given <= 1):
        raise MisconfigurationException(
            f"StochasticWeightAveraging(swa_epoch_start={given!r}): it is the number of an epoch, from 1, or a fraction"
            " of max_epochs, a float from 0.0 to 1.0."
        )
    start: int | float = given
    return start
