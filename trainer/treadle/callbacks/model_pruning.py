"""ModelPruning: sets the least important weights to zero, more of them from epoch to epoch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from treadle.callbacks.callback import Callback, epoch_is_over, fit_is_new
from treadle.callbacks.pruning.masks import (
    captured,
    is_pruned,
    made_permanent,
    mask_of,
    names_of,
    put_on,
    refresh,
    take_off,
)
from treadle.callbacks.pruning.methods import (
    CONTAINERS,
    Amount,
    Pairs,
    check_amount,
    choose,
    find_parameters,
    is_structured,
    options_of,
    parameter_of,
    read_method,
)
from treadle.module import LightningModule
from treadle.stages import TrainerFn
from treadle_fabric import MisconfigurationException, rank_zero_info

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["ModelPruning"]


@dataclass
class _Run:
    """What is pruned in a run, and what it was before."""

    pairs: Pairs = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """The full names of these parameters, without masks."""
    initial: dict[str, Tensor] = field(default_factory=dict)
    """The weights with which training began, for the lottery ticket."""
    layers: dict[int, nn.Module] = field(default_factory=dict)
    """Copies of layers, whose parameters can be drawn anew."""
    broadcast: Callable[[Any], Any] | None = None
    """Gives every rank what rank 0 has; None on one rank."""

    def __deepcopy__(self, memo: Any) -> _Run:
        return _Run()  # a copy of the callback has no run


class _Given(tuple[tuple[nn.Module, str], ...]):
    """Submodules that the user named; a copy of the callback means the same ones."""

    def __deepcopy__(self, memo: Any) -> _Given:
        return self


class ModelPruning(Callback):
    """Prune parameters with :mod:`torch.nn.utils.prune`, by default once at the end of each epoch.

    A pruned parameter ``weight`` becomes ``weight_orig`` and a mask ``weight_mask``, whose product the layer uses. The
    mask of an epoch comes on top of those before: with ``amount=0.5`` half of the entries are left after the first
    epoch, a quarter after the second. What the optimizer holds stays the same object. Where ``max_steps`` or a request
    to stop ends training within an epoch, that epoch is not over, and nothing is pruned at its end.

    Args:
        pruning_fn: "l1_unstructured", "random_unstructured", "ln_structured" or "random_structured"; or a subclass of
            :class:`torch.nn.utils.prune.BasePruningMethod`, which gets those of ``amount``, ``dim`` and ``n`` that its
            constructor takes.
        parameters_to_prune: Pairs of a submodule and the name of its parameter. Default: the parameters of
            ``parameter_names`` of all layers; in structured pruning, those with two or more dimensions.
        parameter_names: Some of ``("weight", "bias")``. Default: both.
        use_global_unstructured: Whether one ranking of the entries of all parameters decides, rather than one for each
            parameter; for unstructured methods.
        amount: The fraction (a float from 0 to 1) of the entries left, or their number, that is pruned each time; or a
            function of the number of the epoch that returns either.
        apply_pruning: Whether to prune; or a function of the number of the epoch that returns whether to.
        make_pruning_permanent: Whether parameters are without masks, under their own names, in checkpoints and after
            training. A resumed run has its masks again.
        use_lottery_ticket_hypothesis: Whether what was not pruned gets back the values with which training began
            (`The Lottery Ticket Hypothesis <https://arxiv.org/abs/1803.03635>`_); or a function of the number of the
            epoch that returns whether to.
        resample_parameters: Whether it gets newly drawn values (by the layer's ``reset_parameters``) instead.
        pruning_dim: The dimension along which a structured method removes channels.
        pruning_norm: The norm by which "ln_structured" ranks channels.
        verbose: 1 logs how much is pruned, 2 also of each parameter.
        prune_on_train_epoch_end: Whether to prune at the end of a training epoch, rather than of a validation.

    Raises:
        MisconfigurationException: An argument is anything else, or does not fit the module when fit begins.
    """

    PARAMETER_NAMES: ClassVar[tuple[str, ...]] = ("weight", "bias")
    decides_weights: ClassVar[bool] = True

    def __init__(
        self,
        pruning_fn: str | type[prune.BasePruningMethod],
        parameters_to_prune: Sequence[tuple[nn.Module, str]] = (),
        parameter_names: list[str] | None = None,
        use_global_unstructured: bool = True,
        amount: Amount | Callable[[int], Amount] = 0.5,
        apply_pruning: bool | Callable[[int], bool] = True,
        make_pruning_permanent: bool = True,
        use_lottery_ticket_hypothesis: bool | Callable[[int], bool] = True,
        resample_parameters: bool = False,
        pruning_dim: int | None = None,
        pruning_norm: int | float | str | None = None,
        verbose: int = 0,
        prune_on_train_epoch_end: bool = True,
    ) -> None:
        super().__init__()
        self.pruning_fn = read_method(pruning_fn)
        self._global = use_global_unstructured
        self._options = options_of(self.pruning_fn, use_global_unstructured, pruning_dim, pruning_norm)
        self._given = _Given(parameters_to_prune or ())
        self._names = tuple(parameter_names or self.PARAMETER_NAMES)
        for name in self._names:
            if name not in self.PARAMETER_NAMES:
                raise MisconfigurationException(
                    f"ModelPruning: parameter_names has {name!r}: it can have {' and '.join(self.PARAMETER_NAMES)}."
                    " Parameters of other names are given by parameters_to_prune."
                )
        self._amount = amount if callable(amount) else check_amount(amount)
        self._applies = choose(apply_pruning, "apply_pruning")
        self._permanent = bool(make_pruning_permanent)
        self._lottery = choose(use_lottery_ticket_hypothesis, "use_lottery_ticket_hypothesis")
        self._resample = bool(resample_parameters)
        if verbose not in (0, 1, 2):
            raise MisconfigurationException(f"ModelPruning(verbose={verbose!r}): it is 0, 1 or 2.")
        self._verbose = verbose
        self._at_train_end = prune_on_train_epoch_end
        self._run = _Run()
        self._state: dict[str, Any] = {}  # masks that are not on the parameters now, as in a checkpoint

    # ------------------------------------------------------------------------------------------------ what is pruned

    def filter_parameters_to_prune(self, parameters_to_prune: Sequence[tuple[nn.Module, str]] = ()) -> Any:
        """Return those of the parameters that are to be pruned. Override this to leave some out. Default: all."""
        return parameters_to_prune

    @staticmethod
    def sanitize_parameters_to_prune(
        pl_module: nn.Module,
        parameters_to_prune: Sequence[tuple[nn.Module, str]] = (),
        parameter_names: Sequence[str] = (),
    ) -> Pairs:
        """Return the pairs of a submodule and the name of its parameter that may be pruned, and refuse others.

        Args:
            pl_module: The module that is trained.
            parameters_to_prune: Such pairs. Default: all layers that have a parameter of these names.
            parameter_names: The names. Default: "weight" and "bias".

        Raises:
            MisconfigurationException: A pair is not in the module, or there is nothing to prune.
        """
        names = parameter_names or ModelPruning.PARAMETER_NAMES
        return find_parameters(pl_module, (LightningModule, *CONTAINERS), parameters_to_prune, names)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take masks off that an earlier fit has left, so that the weights of a checkpoint fit."""
        if stage != TrainerFn.FITTING:
            return
        if trainer.strategy.shards_parameters or trainer.strategy.steps_copies:
            raise MisconfigurationException(
                f"ModelPruning needs an optimizer that steps the whole parameters, and under"
                f" {type(trainer.strategy).__qualname__} it steps a part of them, or copies: use DDP, or prune without"
                " the Trainer."
            )
        self._take_off(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the parameters to prune, and put masks on them again where training goes on."""
        if fit_is_new(trainer):  # the callback may have been in another trainer before
            self._state = {}
        run = self._run = _Run(broadcast=trainer.strategy.broadcast if trainer.world_size > 1 else None)
        found = self.sanitize_parameters_to_prune(pl_module, self._given, self._names)
        run.pairs = list(self.filter_parameters_to_prune(self._fitting_method(found)))
        run.names = names_of(pl_module, run.pairs)
        run.initial = dict(self._state.get("initial", {}))
        for full, (owner, name) in zip(run.names, run.pairs, strict=True):
            parameter = parameter_of(owner, name)
            assert parameter is not None
            if self._lottery and self._resample and id(owner) not in run.layers:
                self._check_resampling(owner)
                run.layers[id(owner)] = copy.deepcopy(owner)
            elif self._lottery and not self._resample and full not in run.initial:
                run.initial[full] = parameter.detach().to("cpu", copy=True)
        self._check_amount_fits()
        if self._state and self._prunes_the_same():
            put_on(pl_module, run.pairs, self._state)
        self._state = {}

    def _fitting_method(self, pairs: Pairs) -> Pairs:
        """Leave out parameters with one dimension, which have no channels; refuse them where the user named them."""
        if not is_structured(self.pruning_fn):
            return pairs
        flat = [(m, name) for m, name in pairs if (p := parameter_of(m, name)) is not None and p.dim() < 2]
        if flat and (self._given or len(flat) == len(pairs)):
            raise MisconfigurationException(
                f"ModelPruning: {self.pruning_fn.__name__} removes channels, and {flat[0][1]!r} of"
                f" {type(flat[0][0]).__name__} has one dimension only: leave such parameters out."
            )
        return [(m, name) for m, name in pairs if all(m is not f or name != n for f, n in flat)]

    def _check_resampling(self, owner: nn.Module) -> None:
        if not callable(getattr(owner, "reset_parameters", None)):
            raise MisconfigurationException(
                f"ModelPruning(resample_parameters=True) draws parameters anew by `reset_parameters`, which"
                f" {type(owner).__name__} does not have: define it, or leave resample_parameters at False."
            )

    def _check_amount_fits(self) -> None:
        amount = self._amount
        if callable(amount) or isinstance(amount, float):
            return
        dim = self._options.get("dim")
        shapes = [p.shape for m, name in self._run.pairs if (p := parameter_of(m, name)) is not None]
        sizes = [shape.numel() if dim is None else shape[dim] for shape in shapes]
        most = sum(sizes) if self._global else min(sizes)
        if amount > most:
            what = "entries in all" if self._global else ("channels" if dim is not None else "entries")
            raise MisconfigurationException(
                f"ModelPruning(amount={amount}) is more than the {most} {what} of what is pruned: pass a smaller"
                " number, or a fraction."
            )

    def _prunes_the_same(self) -> bool:
        """Whether what masks prune is still 0: otherwise the program has given the module other weights since."""
        for full, (owner, name) in zip(self._run.names, self._run.pairs, strict=True):
            kept, parameter = self._state.get("masks", {}).get(full), parameter_of(owner, name)
            if kept is not None and parameter is not None:
                if kept.shape != parameter.shape or parameter.detach()[~kept.to(parameter.device)].any():
                    return False
        return True

    # ------------------------------------------------------------------------------------------------ when it prunes

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, if that is to be done at the end of training epochs."""
        if self._at_train_end and epoch_is_over(trainer):
            self._prune(trainer.current_epoch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, if that is to be done at the end of validations in fit."""
        if not self._at_train_end and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._prune(trainer.current_epoch)

    def _prune(self, epoch: int) -> None:
        if not (self._applies(epoch) if callable(self._applies) else self._applies):
            return
        amount = self._amount
        if callable(amount):
            amount = check_amount(amount(epoch), f"({epoch})")
        if not amount:
            return
        self.apply_pruning(amount)
        if self._lottery(epoch) if callable(self._lottery) else self._lottery:
            self.apply_lottery_ticket_hypothesis()

    def apply_pruning(self, amount: Amount) -> None:
        """Prune now.

        Args:
            amount: The fraction (a float) of the entries that are left, or their number.
        """
        pairs, before = self._run.pairs, list(self._counts())
        takes = inspect.signature(self.pruning_fn.__init__).parameters
        options = {**self._options, **({"amount": amount} if "amount" in takes else {})}
        try:
            if self._global:
                prune.global_unstructured(pairs, self.pruning_fn, **options)
            else:
                for owner, name in pairs:
                    self.pruning_fn.apply(owner, name, **options)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise MisconfigurationException(
                f"ModelPruning cannot prune amount={amount!r} of what is left: {error}. Pass a fraction, or a function"
                " of the epoch that ends in 0."
            ) from error
        if self._run.broadcast is not None:  # a random method draws on each rank
            masks = [m.bool().cpu() for owner, name in pairs if (m := mask_of(owner, name)) is not None]
            for (owner, name), kept in zip(pairs, self._run.broadcast(masks), strict=True):
                mask = mask_of(owner, name)
                assert mask is not None
                mask.copy_(kept)
                refresh(owner, name)
        if self._verbose:
            self._tell(amount, before)

    @torch.no_grad()
    def apply_lottery_ticket_hypothesis(self) -> None:
        """Give the parameters the values with which training began, or draw them anew."""
        run = self._run
        drawn: dict[str, Tensor] = {}
        for layer in run.layers.values():
            layer.reset_parameters()  # type: ignore[operator]
        for number, (owner, name) in enumerate(run.pairs):
            if id(owner) in run.layers:
                drawn[run.names[number]] = getattr(run.layers[id(owner)], name).detach().cpu()
        if drawn and run.broadcast is not None:
            drawn = run.broadcast(drawn)
        values = drawn or run.initial
        for full, (owner, name) in zip(run.names, run.pairs, strict=True):
            parameter = parameter_of(owner, name)
            assert parameter is not None
            parameter.copy_(values[full])
            refresh(owner, name)

    def _counts(self) -> Iterator[tuple[int, int]]:
        """For each parameter the number of pruned entries, and of all."""
        if self._verbose:
            for owner, name in self._run.pairs:
                mask, parameter = mask_of(owner, name), parameter_of(owner, name)
                assert parameter is not None
                yield 0 if mask is None else int((mask == 0).sum()), parameter.numel()

    def _tell(self, amount: Amount, before: list[tuple[int, int]]) -> None:
        method, after = self.pruning_fn.__name__, list(self._counts())
        old, new, every = (sum(n) for n in ([b for b, _ in before], [a for a, _ in after], [n for _, n in after]))
        rank_zero_info(
            f"{method} pruned {new}/{every} entries ({new / every:.2%}), before {old}/{every} ({old / every:.2%})."
        )
        if self._verbose > 1:
            for (owner, name), (was, _), (now, n) in zip(self._run.pairs, before, after, strict=True):
                rank_zero_info(
                    f"{method} with amount={amount} pruned {now}/{n} entries ({now / n:.2%}) of `{owner}.{name}`,"
                    f" before {was}/{n} ({was / n:.2%})."
                )

    # ------------------------------------------------------------------------------------------------ its end

    def make_pruning_permanent(self, module: nn.Module) -> None:
        """Set pruned entries of all submodules to 0 for good, and remove their masks."""
        for submodule in module.modules():
            for buffer in [*submodule._buffers]:
                name = buffer.removesuffix("_mask")
                if name != buffer and f"{name}_orig" in submodule._parameters:
                    prune.remove(submodule, name)  # type: ignore[no-untyped-call]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make pruning permanent, if asked to; a later fit of the trainer goes on with the masks."""
        if self._permanent:
            self._take_off(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same."""
        if self._permanent and trainer.state.fn == TrainerFn.FITTING:
            self._take_off(pl_module)

    def _take_off(self, pl_module: LightningModule) -> None:
        known = {id(m) for m in pl_module.modules()}
        if any(id(owner) in known and is_pruned(owner, name) for owner, name in self._run.pairs):
            self._state = self._captured(pl_module)
            take_off(self._run.pairs)

    def _captured(self, pl_module: nn.Module) -> dict[str, Any]:
        return {**captured(pl_module, self._run.pairs), "initial": self._run.initial}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save weights without masks, if pruning is permanent, and the masks apart from them."""
        if "optimizer_states" in checkpoint and (self._run.pairs or self._state):
            checkpoint["callbacks"][self.state_key] = self._state or self._captured(pl_module)
        plain = made_permanent(pl_module, self._run.pairs, checkpoint["state_dict"])
        if self._permanent:
            checkpoint["state_dict"] = plain
        elif "optimizer_states" in checkpoint:
            checkpoint["current_model_state"] = plain  # which fits a module that begins

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget the masks of an earlier run; those of the checkpoint follow."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._run, self._state = _Run(), {}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing; what a checkpoint keeps is made in :meth:`on_save_checkpoint`, which knows the module."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the masks of a checkpoint until the module is set up."""
        self._run, self._state = _Run(), dict(state_dict)
