"""LightningCLI: a training program whose classes, arguments and methods come from the command line and from configs."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]
from jsonargparse.typing import class_from_function
from torch.optim import Optimizer

from treadle.callbacks import Callback
from treadle.cli.configured.objects import RemembersConfig
from treadle.cli.configured.optimizers import add_configure_optimizers, link_chosen
from treadle.cli.configured.parser import LightningArgumentParser
from treadle.cli.configured.save_config import SaveConfigCallback
from treadle.cli.configured.types import ArgsType, LRSchedulerTypeTuple, LRSchedulerTypeUnion, ReduceLROnPlateau
from treadle.module import LightningDataModule, LightningModule
from treadle.module.hparams import CLASS_PATH, MAKER
from treadle.module.loading import saved_hyperparameters
from treadle.trainer import Trainer
from treadle_fabric import (
    MisconfigurationException,
    one_or_several,
    rank_zero_info,
    rank_zero_warn,
    seed_everything,
)

__all__ = ["LightningCLI"]

_PLAIN = (bool, int, float, str, type(None))


class LightningCLI:
    """Reads the command line and configs, makes module, data module and trainer, and calls the trainer's method.

    In this order: the parsers are set up, and with them :meth:`add_arguments_to_parser`; the arguments are parsed;
    everything is seeded; :meth:`before_instantiate_classes`; :meth:`instantiate_classes`;
    :meth:`after_instantiate_classes`; then, for the sub-command ``fit``, ``before_fit`` if the class has that method,
    its own ``fit`` or the trainer's, and ``after_fit``. The same holds for ``validate``, ``test`` and ``predict``.

    Args:
        model_class: The module's class, or a function that returns a module. Default: the user chooses a class.
        datamodule_class: The same for the data module. Default: the user may choose a class.
        save_config_callback: Saves the config of each run; None saves none.
        save_config_kwargs: Its arguments after the parser and the config.
        trainer_class: The Trainer, a subclass, or a function that returns a trainer.
        trainer_defaults: Other defaults for arguments of the Trainer. Callbacks come on top of those of a config.
        seed_everything_default: The default of ``--seed_everything``: a seed; True for that of the environment, or 0;
            False to seed nothing.
        parser_kwargs: Arguments of the parser; those under the name of a sub-command are for the parser of that.
        parser_class: The parser's class.
        subclass_mode_model: Let the user choose a subclass of ``model_class``.
        subclass_mode_data: The same for the data module.
        args: The arguments, as a list of words or a dictionary. Default: those of the process.
        run: Whether there are sub-commands, one of which runs. False: everything is made, and nothing runs.
        auto_configure_optimizers: Add ``--optimizer`` and ``--lr_scheduler``, unless :meth:`add_arguments_to_parser`
            adds optimizers itself.
        load_from_checkpoint_support: Keep in ``hparams`` what ``load_from_checkpoint`` needs to make the module again.

    Raises:
        SystemExit: With status 2 and a message, where an argument is wrong; nothing has been started then.
    """

    def __init__(
        self,
        model_class: type[LightningModule] | Callable[..., LightningModule] | None = None,
        datamodule_class: type[LightningDataModule] | Callable[..., LightningDataModule] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: type[Trainer] | Callable[..., Trainer] = Trainer,
        trainer_defaults: dict[str, Any] | None = None,
        seed_everything_default: bool | int = True,
        parser_kwargs: dict[str, Any] | dict[str, dict[str, Any]] | None = None,
        parser_class: type[LightningArgumentParser] = LightningArgumentParser,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        args: ArgsType = None,
        run: bool = True,
        auto_configure_optimizers: bool = True,
        load_from_checkpoint_support: bool = True,
    ) -> None:
        self.save_config_callback = save_config_callback
        self.save_config_kwargs = save_config_kwargs or {}
        self.trainer_class = trainer_class
        self.trainer_defaults = trainer_defaults or {}
        self.seed_everything_default = seed_everything_default
        self.parser_kwargs = parser_kwargs or {}
        self.parser_class = parser_class
        self.auto_configure_optimizers = auto_configure_optimizers
        self.load_from_checkpoint_support = load_from_checkpoint_support
        self.model_class = model_class
        self.datamodule_class = datamodule_class
        # without a class the user chooses one
        self.subclass_mode_model = subclass_mode_model or model_class is None
        self.subclass_mode_data = subclass_mode_data or datamodule_class is None

        main_kwargs, subparser_kwargs = self._split_parser_kwargs(run)
        self.setup_parser(run, main_kwargs, subparser_kwargs)
        self.parse_arguments(self.parser, args)
        self.subcommand: str | None = self.config["subcommand"] if run else None
        self._take_hyperparameters()
        with self._misconfigurations_are_errors():
            self._seed()
        self.before_instantiate_classes()
        self.instantiate_classes()
        self.after_instantiate_classes()
        if self.subcommand is not None:
            self._run_subcommand(self.subcommand)

    # ---------------------------------------------------------------------------------------------------- parsers

    def _split_parser_kwargs(self, run: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        names = self.subcommands() if run else {}
        given = self.parser_kwargs
        return {k: v for k, v in given.items() if k not in names}, {k: v for k, v in given.items() if k in names}

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Make the parser, ``self.parser``.

        Args:
            add_subcommands: Whether there is a sub-command for each method of the trainer.
            main_kwargs: Arguments of the parser.
            subparser_kwargs: For each sub-command the arguments of its parser.
        """
        self.parser = self.init_parser(**main_kwargs)
        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        self._subcommand_method_arguments: dict[str, list[str]] = {}
        if not add_subcommands:
            self._add_arguments(self.parser)
            return
        trainer: Any = self.trainer_class
        trainer = trainer if isinstance(trainer, type) else class_from_function(trainer)
        commands = self.parser.add_subcommands()
        for name, skip in self.subcommands().items():
            about = _summary(getattr(trainer, name))
            parser = self.init_parser(**{"description": about, **subparser_kwargs.get(name, {})})
            self._add_arguments(parser)
            self._subcommand_method_arguments[name] = parser.add_method_arguments(trainer, name, skip=set(skip))
            self._subcommand_parsers[name] = parser
            commands.add_subcommand(name, parser, help=about)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make one parser; ``kwargs`` are its arguments."""
        parser = self.parser_class(**kwargs)
        about = "Path to a configuration file in json or yaml format."
        # not of every parser: jsonargparse makes one for each class, which may have an argument of this name
        parser.add_argument("-c", "--config", action=ActionConfigFile, help=about)
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the trainer's methods that are sub-commands, each with its arguments that are not for the user."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
            "predict": {"model", "dataloaders", "datamodule"},
        }

    def _add_arguments(self, parser: LightningArgumentParser) -> None:
        self.add_default_arguments_to_parser(parser)
        self.add_core_arguments_to_parser(parser)
        self.add_arguments_to_parser(parser)
        if self.auto_configure_optimizers:
            if not parser._optimizers:
                parser.add_optimizer_args((Optimizer,))
            if not parser._lr_schedulers:
                parser.add_lr_scheduler_args(LRSchedulerTypeTuple)
        self.link_optimizers_and_lr_schedulers(parser)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--seed_everything``."""
        parser.add_argument(
            "--seed_everything",
            type=bool | int,
            default=self.seed_everything_default,
            help="A seed for all random generators, set before anything is made. True: the seed in the environment "
            "variable PL_GLOBAL_SEED, or 0. False: nothing is seeded.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of trainer, module and data module."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        defaults = {f"trainer.{k}": v for k, v in self.trainer_defaults.items() if k != "callbacks"}
        if defaults:
            parser.set_defaults(defaults)
        parser.add_lightning_class_args(self.model_class or LightningModule, "model", self.subclass_mode_model)
        parser.add_lightning_class_args(
            self.datamodule_class or LightningDataModule,
            "data",
            self.subclass_mode_data,
            required=self.datamodule_class is not None,  # the module may have the loaders
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Override it to add arguments, and links between arguments.

        Args:
            parser: The parser of one sub-command.
        """

    @staticmethod
    def link_optimizers_and_lr_schedulers(parser: LightningArgumentParser) -> None:
        """Link the optimizers and schedulers that were added with ``link_to``."""
        link_chosen(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, and keep them in ``self.config``.

        Args:
            parser: The parser.
            args: The arguments; None: those of the process.
        """
        if args is not None and len(sys.argv) > 1:
            rank_zero_warn(
                f"LightningCLI's args parameter is {args!r}, so the arguments of the command line are not read:"
                f" {sys.argv[1:]}. Leave one of them out."
            )
        if isinstance(args, (dict, Namespace)):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)

    # ---------------------------------------------------------------------------------------------------- the config

    def _parser(self, subcommand: str | None) -> LightningArgumentParser:
        return self.parser if subcommand is None else self._subcommand_parsers[subcommand]

    def _get(self, config: Namespace, key: str, default: Any = None) -> Any:
        """The value of a key, under the sub-command if there is one."""
        found = config.get(str(self.subcommand), config) if self.subcommand is not None else config
        return found.get(key, default)

    def _plain(self, *, links: bool = True) -> dict[str, Any]:
        """The config of the sub-command as plain values; with or without those that links set."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\s*Dump of a value that does not round-trip")  # lists for tuples
            text = self._parser(self.subcommand).dump(
                config, format="json", skip_unset=False, skip_validation=True, skip_link_targets=not links
            )
        plain: dict[str, Any] = json.loads(text)
        return plain

    def _take_hyperparameters(self) -> None:
        """Let the hyperparameters in the checkpoint of ``--ckpt_path`` decide how the module is made."""
        path = self._get(self.config, "ckpt_path") if self.subcommand is not None else None
        if path is None or not os.path.exists(path):  # "best" and the like, or the trainer's error for a missing file
            return
        saved = saved_hyperparameters(path)
        model = self._plain(links=False).get("model") or {}
        chosen: str | None = model.get("class_path") if self.subclass_mode_model else None
        if CLASS_PATH in saved and chosen is not None and saved[CLASS_PATH] != chosen:
            return  # another class than the checkpoint's was chosen on purpose
        configured = model if chosen is None else model.get("init_args", {})
        changed = {
            name: value
            for name, value in saved.items()
            if name in configured and value != configured[name] and (MAKER in saved or isinstance(value, _PLAIN))
        }
        if changed:
            told = [f"{name}={value!r} (configured: {configured[name]!r})" for name, value in changed.items()]
            rank_zero_info(f"The module has the hyperparameters of {path}: {', '.join(told)}.")
            new = changed if chosen is None else {"class_path": chosen, "init_args": changed}
            self.config = self.parser.parse_object({str(self.subcommand): {"model": new}}, self.config)

    def _seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if seed is None or seed is False:
            return
        if seed is True:
            seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        config["seed_everything"] = seed_everything(seed, workers=True)

    # ---------------------------------------------------------------------------------------------------- the objects

    def before_instantiate_classes(self) -> None:
        """Override it to run code before the objects are made."""

    def instantiate_classes(self) -> None:
        """Make ``self.datamodule``, ``self.model`` and ``self.trainer``; ``self.config_init`` has all objects."""
        with self._misconfigurations_are_errors():
            self.config_init = self.parser.instantiate(self.config, instantiators=self._instantiators())
            self.datamodule: LightningDataModule | None = self._get(self.config_init, "data")
            self.model: LightningModule = self._get(self.config_init, "model")
            add_configure_optimizers(
                self.model,
                self._parser(self.subcommand),
                lambda key: self._get(self.config_init, key),
                self.configure_optimizers,
            )
            self.trainer: Trainer = self.instantiate_trainer()

    @contextmanager
    def _misconfigurations_are_errors(self) -> Generator[None]:
        """Values that the parser takes, and the classes do not, end the program as those that the parser refuses."""
        try:
            yield
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, MisconfigurationException):
                cause = cause.__cause__  # the parser tells of the types that it tried
            if cause is None:
                raise
            self._parser(self.subcommand).error(str(cause), error)

    def _instantiators(self) -> list[tuple[Callable[..., Any], type, bool]]:
        if not self.load_from_checkpoint_support:
            return []
        config = functools.cache(self._plain)
        kinds = {"model": (self.model_class, LightningModule), "data": (self.datamodule_class, LightningDataModule)}
        return [
            (RemembersConfig(config, key, cls if isinstance(cls, type) else base).make, base, True)
            for key, (cls, base) in kinds.items()
        ]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer.

        Args:
            **kwargs: Arguments in the place of those of the config.
        """
        config = self._get(self.config_init, "trainer")
        arguments = {**({} if config is None else vars(config)), **kwargs}
        own = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        callbacks: list[Callback] = [
            *one_or_several(arguments.get("callbacks")),
            *own,
            *one_or_several(self.trainer_defaults.get("callbacks")),
        ]
        if self.save_config_callback and not arguments.get("fast_dev_run") and not arguments.get("barebones"):
            whole = self.config if self.subcommand is None else self.config[self.subcommand]
            callbacks.append(self.save_config_callback(self._parser(self.subcommand), whole, **self.save_config_kwargs))
        takes = inspect.signature(self.trainer_class).parameters
        if "callbacks" in takes or any(each.kind is each.VAR_KEYWORD for each in takes.values()):
            arguments["callbacks"] = callbacks
        elif callbacks:
            names = ", ".join(type(callback).__name__ for callback in callbacks)
            rank_zero_warn(
                f"The `{getattr(self.trainer_class, '__qualname__', self.trainer_class)}` class does not expose the"
                f" `callbacks` argument, so these do nothing: {names}."
            )
        return self.trainer_class(**arguments)

    def after_instantiate_classes(self) -> None:
        """Override it to run code after the objects are made."""

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """Return what the module's ``configure_optimizers`` returns; override it for another interval or name.

        Args:
            lightning_module: The module.
            optimizer: The optimizer that was chosen.
            lr_scheduler: The scheduler that was chosen.
        """
        if lr_scheduler is None:
            return optimizer
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": lr_scheduler, "monitor": lr_scheduler.monitor},
            }
        return [optimizer], [lr_scheduler]

    # ---------------------------------------------------------------------------------------------------- the run

    def _run_subcommand(self, name: str) -> None:
        for hook in (f"before_{name}", name, f"after_{name}"):
            function = getattr(self, hook, None)
            if hook == name:
                (function or getattr(self.trainer, name))(**self._method_arguments(name))
            elif callable(function):
                function()

    def _method_arguments(self, name: str) -> dict[str, Any]:
        config = self.config_init[name]
        arguments = {key: config[key] for key in self._subcommand_method_arguments[name]}
        data = {} if self.datamodule is None else {"datamodule": self.datamodule}
        return {**arguments, "model": self.model, **data}


def _summary(function: Callable[..., Any]) -> str:
    """The first paragraph of a docstring, without its markup."""
    text = (inspect.getdoc(function) or "").partition("\n\n")[0]
    return re.sub(r":\w+:`([^`]*)`|``([^`]*)``", r"\1\2", " ".join(text.split()))
