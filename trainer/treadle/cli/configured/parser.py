"""The parser: arguments for the Trainer, modules, data modules, callbacks, optimizers and schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse.typing import class_from_function, register_type
from torch import device
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from treadle import callbacks, loggers
from treadle.callbacks import Callback
from treadle.cli.configured.explain import explain
from treadle.cli.configured.types import LRSchedulerTypeTuple, ReduceLROnPlateau
from treadle.module import LightningDataModule, LightningModule
from treadle.trainer import Trainer
from treadle_fabric import MisconfigurationException, __version__

__all__ = ["AUTOMATIC", "LightningArgumentParser", "class_paths"]

AUTOMATIC = "AUTOMATIC"
"""The ``link_to`` of an optimizer or scheduler that the CLI gives the module itself."""
_KINDS = (Trainer, LightningModule, LightningDataModule, Callback)

for _package in (callbacks, loggers):  # jsonargparse finds classes by their names alone where they are imported
    for _name in _package.__all__:
        getattr(_package, _name)
set_parsing_settings(config_read_mode_fsspec_enabled=True)  # configs in object stores, like everything else
register_type(device, deserializer_exceptions=(RuntimeError, TypeError, ValueError))  # by its name, such as cuda:0


class LightningArgumentParser(ArgumentParser):
    """A parser of jsonargparse that knows the classes of this library.

    Args:
        *args: For :class:`jsonargparse.ArgumentParser`.
        description: Printed by ``--help``.
        env_prefix: What the names of environment variables begin with.
        default_env: Whether environment variables give values.
        **kwargs: For :class:`jsonargparse.ArgumentParser`.
    """

    def __init__(
        self,
        *args: Any,
        description: str = "Lightning Trainer command line tool",
        env_prefix: str = "PL",
        default_env: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("allow_abbrev", False)  # an abbreviation is more often a typing error
        kwargs.setdefault("dump_header", [f"treadle=={__version__}"])
        super().__init__(*args, description=description, env_prefix=env_prefix, default_env=default_env, **kwargs)
        self.callback_keys: list[str] = []
        """The keys of callbacks that have arguments of their own."""
        self._optimizers: dict[str, tuple[type | tuple[type, ...], str]] = {}
        self._lr_schedulers: dict[str, tuple[type | tuple[type, ...], str]] = {}

    def add_lightning_class_args(
        self,
        lightning_class: Callable[..., Any] | type[Any],
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        """Add the arguments of a Trainer, a module, a data module or a callback.

        Args:
            lightning_class: The class, or a function that returns an object of it.
            nested_key: The key that the arguments are under.
            subclass_mode: Let the user choose a subclass by ``class_path``.
            required: Whether the user has to choose one; for ``subclass_mode``.

        Returns:
            The keys of the arguments.

        Raises:
            MisconfigurationException: ``lightning_class`` is none of these.
        """
        cls = lightning_class
        if callable(cls) and not isinstance(cls, type):
            cls = class_from_function(cls)
        if not (isinstance(cls, type) and issubclass(cls, _KINDS)):
            names = ", ".join(kind.__name__ for kind in _KINDS)
            raise MisconfigurationException(
                f"{lightning_class!r} is neither a class derived from one of {names}, nor a function whose annotation "
                "says that it returns an object of such a class."
            )
        if issubclass(cls, Callback):
            self.callback_keys.append(nested_key)
        if subclass_mode:
            added = self.add_subclass_arguments(cls, nested_key, fail_untyped=False, required=required)
            return [] if added is None else list(added)
        return list(
            self.add_class_arguments(
                cls, nested_key, fail_untyped=False, instantiate=not issubclass(cls, Trainer), sub_configs=True
            )
        )

    def add_optimizer_args(
        self,
        optimizer_class: type[Optimizer] | tuple[type[Optimizer], ...] = (Optimizer,),
        nested_key: str = "optimizer",
        link_to: str = AUTOMATIC,
    ) -> None:
        """Add the arguments of an optimizer.

        Args:
            optimizer_class: A class; or a tuple of classes, of whose subclasses the user chooses one.
            nested_key: The key that the arguments are under.
            link_to: The key of a module's argument that gets class and arguments as a dictionary, for
                :func:`treadle.cli.instantiate_class`. Default: the CLI gives the module its ``configure_optimizers``.
        """
        self._add_chosen(optimizer_class, Optimizer, nested_key, {"params"})
        self._optimizers[nested_key] = (optimizer_class, link_to)

    def add_lr_scheduler_args(
        self,
        lr_scheduler_class: type[Any] | tuple[type[Any], ...] = LRSchedulerTypeTuple,
        nested_key: str = "lr_scheduler",
        link_to: str = AUTOMATIC,
    ) -> None:
        """Add the arguments of a learning-rate scheduler.

        Args:
            lr_scheduler_class: As for an optimizer.
            nested_key: The same.
            link_to: The same.
        """
        self._add_chosen(lr_scheduler_class, (LRScheduler, ReduceLROnPlateau), nested_key, {"optimizer"})
        self._lr_schedulers[nested_key] = (lr_scheduler_class, link_to)

    def _add_chosen(self, chosen: Any, kind: Any, nested_key: str, skip: set[str]) -> None:
        classes = chosen if isinstance(chosen, tuple) else (chosen,)
        for cls in classes:
            if not (isinstance(cls, type) and issubclass(cls, kind)):
                what = "an Optimizer" if kind is Optimizer else "an LRScheduler or treadle.cli.ReduceLROnPlateau"
                raise MisconfigurationException(f"{cls!r}, for {nested_key!r}, is not derived from {what}.")
        options: dict[str, Any] = {"instantiate": False, "fail_untyped": False, "skip": skip}
        if isinstance(chosen, tuple):
            self.add_subclass_arguments(chosen, nested_key, required=False, **options)
            self.set_defaults({nested_key: None})
        else:
            self.add_class_arguments(chosen, nested_key, sub_configs=True, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error, with near names for what is misspelled, and end with status 2."""
        super().error(explain(message, self), ex)


def class_paths(cls: type) -> Callable[[Any], dict[str, Any]]:
    """Return a function that makes ``class_path`` and ``init_args`` of the arguments of a class."""
    path = f"{cls.__module__}.{cls.__qualname__}"

    def with_class_path(arguments: Any) -> dict[str, Any]:
        values = arguments if isinstance(arguments, dict) else arguments.as_dict()
        return {"class_path": path, "init_args": values}

    with_class_path.__name__ = cls.__name__
    return with_class_path
