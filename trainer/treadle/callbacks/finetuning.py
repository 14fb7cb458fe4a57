"""BaseFinetuning and BackboneFinetuning: train a part of a model first, and the rest from some epoch on."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from treadle.callbacks.callback import Callback
from treadle.module.overriding import overrides
from treadle_fabric import MisconfigurationException, check_integer, is_number, rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["BackboneFinetuning", "BaseFinetuning", "multiplicative"]


def multiplicative(epoch: int) -> float:
    """Return the factor by which the backbone's learning rate grows before an epoch: 2."""
    return 2.0


class BaseFinetuning(Callback):
    """Freeze parts of a module before training, and unfreeze parts when an epoch begins.

    Override :meth:`freeze_before_training` and :meth:`finetune_function`. The other methods help them, and work
    outside of a callback too.

    Batch norm that is frozen with ``train_bn=False`` is in evaluation mode: it normalizes by its running statistics,
    which do not change, until it is unfrozen. A checkpoint keeps what is frozen and the parameter groups, so that a run
    that is resumed within an epoch goes on exactly; :meth:`finetune_function` is then not called again for that epoch.

    Raises:
        MisconfigurationException: When fit begins, one of the two methods is not overridden.

    Example:
        >>> class Backbone(BaseFinetuning):
        ...     def freeze_before_training(self, pl_module):
        ...         self.freeze(pl_module.backbone)
        ...
        ...     def finetune_function(self, pl_module, epoch, optimizer):
        ...         if epoch == 10:
        ...             self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)
    """

    _restored = False  # whether this fit goes on from a checkpoint that tells what is frozen
    _frozen: Sequence[_BatchNorm] = ()
    _groups: Mapping[int, list[dict[str, Any]]] = {}  # all set here, for subclasses without `super().__init__()`

    @staticmethod
    def flatten_modules(modules: nn.Module | Iterable[nn.Module | Iterable[Any]]) -> list[nn.Module]:
        """Return the submodules of one or several modules that have parameters of their own or no children, each once.

        Args:
            modules: A module, or any iterable of modules, nested at will.
        """
        if isinstance(modules, nn.Module):
            found = [m for m in modules.modules() if not list(m.children()) or m._parameters]
        else:
            found = [leaf for part in modules for leaf in BaseFinetuning.flatten_modules(part)]
        return list({id(m): m for m in found}.values())

    @staticmethod
    def filter_params(
        modules: nn.Module | Iterable[nn.Module | Iterable[Any]], train_bn: bool = True, requires_grad: bool = True
    ) -> Generator[nn.Parameter]:
        """Yield the parameters that require gradients, or those that do not, each once.

        Args:
            modules: As for :meth:`flatten_modules`.
            train_bn: Whether those of batch norm are among them.
            requires_grad: Which.
        """
        seen: set[int] = set()
        for module in BaseFinetuning.flatten_modules(modules):
            if train_bn or not isinstance(module, _BatchNorm):
                for parameter in module.parameters(recurse=False):
                    if parameter.requires_grad is requires_grad and id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield parameter

    @staticmethod
    def make_trainable(modules: nn.Module | Iterable[nn.Module | Iterable[Any]]) -> None:
        """Let all parameters of modules require gradients; batch norm that was frozen trains again.

        Args:
            modules: As for :meth:`flatten_modules`.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm) and _is_frozen(module):
                module.track_running_stats = True
                module.train()
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freeze what a module itself has, its submodules not included; see the class for batch norm."""
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.track_running_stats = False
            module.eval()
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)

    @staticmethod
    def freeze(modules: nn.Module | Iterable[nn.Module | Iterable[Any]], train_bn: bool = True) -> None:
        """Freeze modules.

        Args:
            modules: As for :meth:`flatten_modules`.
            train_bn: Whether batch norm goes on training.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm) and train_bn:
                BaseFinetuning.make_trainable(module)
            else:
                BaseFinetuning.freeze_module(module)

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters that the optimizer does not have, and warn of those that it has."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        params = list(params)
        new = [p for p in params if id(p) not in held]
        if len(new) < len(params):
            rank_zero_warn(
                f"Of the {len(params)} parameters to unfreeze, {len(params) - len(new)} already exist within another"
                " group of this optimizer, and stay there with its learning rate. Let `configure_optimizers` take those"
                " only that require gradients: `filter(lambda p: p.requires_grad, self.parameters())`."
            )
        return new

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: nn.Module | Iterable[nn.Module | Iterable[Any]],
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Unfreeze modules, and give their parameters to the optimizer as a group of their own.

        Parameters that were trained before, such as those of batch norm, stay in the group that they are in.

        Args:
            modules: As for :meth:`flatten_modules`.
            optimizer: The optimizer.
            lr: The learning rate of the group. Default: that of the first group, divided by ``initial_denom_lr``.
            initial_denom_lr: See ``lr``.
            train_bn: False: batch norm that is frozen stays so.
        """
        flat = BaseFinetuning.flatten_modules(modules)
        parts = [m for m in flat if train_bn or not isinstance(m, _BatchNorm)]
        frozen = {id(p) for p in BaseFinetuning.filter_params(parts, requires_grad=False)}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        BaseFinetuning.make_trainable(parts)
        rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else float(lr)
        wanted = [p for p in BaseFinetuning.filter_params(parts) if id(p) in frozen or id(p) not in held]
        params = BaseFinetuning.filter_on_optimizer(optimizer, wanted)
        if params:
            optimizer.add_param_group({"params": params, "lr": rate})

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze what is not to be trained at first; override it.

        Args:
            pl_module: The module, before its optimizers are made.
        """
        raise NotImplementedError("Override `freeze_before_training`.")

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze what is to be trained from this epoch on; override it.

        Args:
            pl_module: The module.
            epoch: The number of the epoch that begins.
            optimizer: One optimizer; the method is called for each.
        """
        raise NotImplementedError("Override `finetune_function`.")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze, before the optimizers are made."""
        if stage != "fit":
            return
        for name in ("freeze_before_training", "finetune_function"):
            if not overrides(self, name, BaseFinetuning):
                raise MisconfigurationException(
                    f"{type(self).__qualname__} has no `{name}`, and BaseFinetuning needs one: override it, or use"
                    " BackboneFinetuning."
                )
        if trainer.strategy.steps_copies:
            raise MisconfigurationException(
                f"{type(self).__qualname__} unfreezes parameters during training, and the optimizer of"
                f" {type(trainer.strategy).__qualname__}'s engine goes on with what was trainable when it was set up."
                " Use strategy='ddp' or 'fsdp'; or freeze and unfreeze in the program, and call fit for each part."
            )
        self._restored, self._groups = False, {}
        self.freeze_before_training(pl_module)
        self._note_frozen(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note whether the checkpoint restores what is frozen; one of Lightning has the groups in its own way."""
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        self._groups = state.get("internal_optimizer_metadata", {})
        self._restored = bool(self._groups) or "changes" in checkpoint.get("treadle", {})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the optimizers the groups of a checkpoint of Lightning, whose state is restored next."""
        owners = {
            f"{prefix}.{name}" if prefix else name: module
            for prefix, module in pl_module.named_modules()
            for name, _ in module.named_parameters(recurse=False)
        }
        parameters = dict(pl_module.named_parameters())
        for index, groups in self._groups.items():
            optimizer = trainer.optimizers[index]
            for group in groups[len(optimizer.param_groups) :]:
                self.make_trainable(owners[name] for name in group["params"])
                optimizer.add_param_group({**group, "params": [parameters[name] for name in group["params"]]})
        self._groups = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call :meth:`finetune_function` for each optimizer."""
        if not (self._restored and trainer.fit_progress.begun):  # a checkpoint of this epoch has what the call did
            for optimizer in trainer.optimizers:
                self.finetune_function(pl_module, trainer.current_epoch, optimizer)
        self._note_frozen(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep frozen batch norm in evaluation mode: something may have called ``train()`` of the whole module."""
        for module in self._frozen:
            if module.training and _is_frozen(module):
                module.eval()

    def _note_frozen(self, pl_module: LightningModule) -> None:
        self._frozen = [m for m in pl_module.modules() if isinstance(m, _BatchNorm) and _is_frozen(m)]


class BackboneFinetuning(BaseFinetuning):
    """Freeze ``pl_module.backbone``, and train it from an epoch on with a learning rate of its own, which then grows.

    Args:
        unfreeze_backbone_at_epoch: The epoch, from 0, in which the backbone begins to train.
        lambda_func: Called with the number of an epoch after that, counted from 1; returns the factor by which the
            backbone's learning rate changes in it. Default: 2 in each.
        backbone_initial_ratio_lr: The backbone's first learning rate, as a share of that of the optimizer's first
            group.
        backbone_initial_lr: The backbone's first learning rate itself. Default: None, as the ratio says.
        should_align: Let the backbone's learning rate not exceed that of the first group.
        initial_denom_lr: Not used, because the first rate is always given; kept for programs that pass it.
        train_bn: Whether batch norm of the backbone trains all the time. False: it stays frozen, also after the
            backbone was unfrozen.
        verbose: Print the learning rates of each epoch.
        rounding: Digits of what is printed.

    Raises:
        MisconfigurationException: An argument is wrong; and when fit begins, the module has no ``backbone``.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        check_integer("unfreeze_backbone_at_epoch", unfreeze_backbone_at_epoch, minimum=0)
        if not callable(lambda_func):
            raise MisconfigurationException(
                f"BackboneFinetuning(lambda_func={lambda_func!r}): it must be a function of the epoch."
            )
        rates = {"backbone_initial_ratio_lr": backbone_initial_ratio_lr}
        if backbone_initial_lr is not None:
            rates["backbone_initial_lr"] = backbone_initial_lr
        for name, rate in rates.items():
            if not is_number(rate) or not 0 <= rate < math.inf:
                raise MisconfigurationException(f"BackboneFinetuning({name}={rate!r}): it must be a number from 0.")
        check_integer("BackboneFinetuning: rounding", rounding, minimum=0)
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding
        self.previous_backbone_lr: float | None = None
        """The backbone's learning rate in the current epoch; None while the backbone is frozen."""
        self._rate_of: tuple[int, float | None] = (-1, None)  # an epoch, and the backbone's rate before it

    def state_dict(self) -> dict[str, Any]:
        """Return the backbone's learning rate."""
        epoch, before = self._rate_of
        return {"previous_backbone_lr": self.previous_backbone_lr, "epoch": epoch, "before": before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the backbone's learning rate."""
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]
        self._rate_of = (state_dict.get("epoch", -1), state_dict.get("before"))

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze the backbone."""
        backbone = getattr(pl_module, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise MisconfigurationException(
                f"BackboneFinetuning freezes `backbone` of the module, and {type(pl_module).__qualname__}.backbone is"
                f" {'missing' if backbone is None else 'no nn.Module'}: make it one, or derive from BaseFinetuning."
            )
        self.freeze(backbone, train_bn=self.train_bn)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze the backbone, or set its learning rate for this epoch; of several optimizers the first has it."""
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        backbone: Any = pl_module.backbone
        group = self._group(optimizer, backbone)
        others = [o for o in getattr(pl_module._trainer, "optimizers", ()) if o is not optimizer]
        if group is None and any(self._group(other, backbone) for other in others):
            return  # one optimizer has the backbone, and two would step it twice
        if epoch != self._rate_of[0]:
            self._rate_of = (epoch, self.previous_backbone_lr)
        first, before = optimizer.param_groups[0]["lr"], self._rate_of[1]
        if before is None:
            initial = self.backbone_initial_lr
            rate = first * self.backbone_initial_ratio_lr if initial is None else initial
        else:
            rate = self.lambda_func(epoch + 1) * before
            rate = min(rate, first) if self.should_align else rate
        self.previous_backbone_lr = rate
        if group is None:
            self.unfreeze_and_add_param_group(
                backbone, optimizer, rate, train_bn=self.train_bn, initial_denom_lr=self.initial_denom_lr
            )
        else:
            group["lr"] = rate
            if not any(p.requires_grad for p in group["params"]):
                self.make_trainable(
                    [m for m in self.flatten_modules(backbone) if self.train_bn or not isinstance(m, _BatchNorm)]
                )
        if self.verbose:
            rank_zero_info(
                f"Current lr: {round(first, self.rounding)}, Backbone lr: {round(rate, self.rounding)} (epoch {epoch})"
            )

    @staticmethod
    def _group(optimizer: Optimizer, backbone: nn.Module) -> dict[str, Any] | None:
        """Return the group that has parameters of the backbone only; None where there is none."""
        mine = {id(p) for p in backbone.parameters()}
        groups = [g for g in optimizer.param_groups[1:] if g["params"] and all(id(p) in mine for p in g["params"])]
        return groups[-1] if groups else None


def _is_frozen(module: _BatchNorm) -> bool:
    """Whether batch norm has running statistics and does not update them, as :meth:`BaseFinetuning.freeze` has it."""
    return not module.track_running_stats and module.running_mean is not None
