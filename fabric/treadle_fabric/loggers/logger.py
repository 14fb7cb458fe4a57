"""The base class of all loggers, and loggers that write nothing."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.loggers.media import Images, Media, Text, to_figure, to_file, to_images, to_options, to_table
from treadle_fabric.loggers.media_files import write_media
from treadle_fabric.rank_zero import rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["DummyExperiment", "DummyLogger", "Logger", "rank_zero_experiment"]


class Logger(ABC):
    """The base class of loggers, which write metrics and hyper-parameters, on rank 0 only.

    ``log_image``, ``log_figure``, ``log_text``, ``log_table`` and ``log_file`` work with every logger: they call
    :meth:`record_media`, and what this logger has no place for becomes a file in the folder ``media`` of its run.
    """

    own_media: ClassVar[tuple[str, ...]] = ()
    """The packages whose images ``log_image`` passes on as they are."""

    _folder_of_all: str | None = None
    _prefix: str = ""  # put before every name, with the separator between them
    LOGGER_JOIN_CHAR: ClassVar[str] = "/"
    """The separator between the prefix of a logger and the name of a metric."""

    @property
    @abstractmethod
    def name(self) -> str | None:
        """The name of the experiment."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """The number or the name of this run of the experiment."""

    @property
    def root_dir(self) -> str | None:
        """The folder above all experiments; None for a logger that keeps no files."""
        return None

    @property
    def log_dir(self) -> str | None:
        """The folder of this run; None for a logger that keeps no files."""
        return None

    @property
    def save_dir(self) -> str | None:
        """The folder above all experiments, under the name that the trainer's users know. Default: ``root_dir``."""
        return self.root_dir if self._folder_of_all is None else self._folder_of_all

    @property
    def runs_dir(self) -> str | None:
        """The folder that has the runs which this logger may go on in; None: those of its name in ``save_dir``."""
        return None

    @property
    def group_separator(self) -> str:
        """The separator of a group of metrics and the name of a metric in it."""
        return "/"

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record metrics.

        Args:
            metrics: Numbers, or tensors of one element, by name.
            step: The step that the values belong to.
        """

    @abstractmethod
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Record the settings of the run: a mapping, a ``Namespace`` or a dataclass."""

    def log_graph(self, model: Module, input_array: Any | None = None) -> None:
        """Record the graph of ``model``; by default nothing happens."""

    def save(self) -> None:
        """Write what is still held in memory; by default nothing happens."""

    def finalize(self, status: str) -> None:
        """Close the logger after a run with ``status`` "success", "failed" or "finished". Default: nothing happens."""

    def begin_anew(self) -> None:
        """Begin another run, such as the next fold of a cross-validation, in a version of its own.

        Default: nothing happens, so that the values go where they went before.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this logger: which run it writes, and how far. Default: nothing.

        Called on rank 0, after :meth:`save`. Plain containers only.
        """
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on in the run that ``state`` names, before anything is written.

        What that run has of later steps than the checkpoint is superseded: a reader sees each step once, as in a run
        that was never interrupted. Every rank calls this method, before a hook of the fit runs; what is written changes
        with the next value, and not before. Default: nothing happens, and the values go into the run that this logger
        has.

        Args:
            state: What :meth:`state_dict` returned when the checkpoint was saved. A trainer adds ``checkpoint``, its
                path, and ``global_step``, the optimizer steps that had been made.
        """

    def supersede_nothing(self) -> None:
        """Keep all that the resumed run has, because nothing is trained again after all. Default: nothing happens."""

    def branch(self, state: Mapping[str, Any]) -> None:
        """Begin a run of its own that names the run in ``state`` as its parent, and leave that run untouched.

        Every rank calls this method, before a hook of the fit runs. Default: nothing happens.

        Args:
            state: As for :meth:`resume`.
        """

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Called after a checkpoint callback has saved; by default nothing happens."""

    # ------------------------------------------------------------------------------------------------ beside numbers

    def record_media(self, media: Media) -> bool:
        """Record images, a figure, a text, a table or a file in the way of this logger.

        Args:
            media: An object of one of the classes in ``treadle_fabric.loggers.media``.

        Returns:
            Whether that was done. Default: False, and then a file is written into the folder of the run.
        """
        return False

    def log_image(self, key: str, images: Any, step: int | None = None, **kwargs: Any) -> None:
        """Record images.

        Args:
            key: The name.
            images: One image or a list: tensors (CHW or HW), NumPy arrays (HWC or HW), Pillow images or paths; or a
                batch as a tensor or an array of four dimensions. Whole numbers are 0 to 255, other numbers 0 to 1.
            step: The step that the images belong to.
            **kwargs: Lists with one entry for each image, such as ``caption=["a cat", "a dog"]``. Loggers leave out
                what they have no place for.

        Raises:
            MisconfigurationException: A shape, a type or the length of a list does not fit.
        """
        if _writes():
            pictures = to_images(images, self.own_media)
            self._take(Images(key, step, pictures, to_options(kwargs, len(pictures))))

    def log_figure(self, key: str, figure: Any, step: int | None = None) -> None:
        """Record a figure of matplotlib or Plotly; the figure stays open.

        Args:
            key: The name.
            figure: The figure, its axes, or the module ``matplotlib.pyplot`` for its current figure.
            step: The step that the figure belongs to.

        Raises:
            MisconfigurationException: ``figure`` is something else.
        """
        if _writes():
            self._take(to_figure(key, step, figure))

    def log_text(
        self,
        key: str,
        text: str | None = None,
        step: int | None = None,
        *,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
    ) -> None:
        """Record a text, or a table of texts.

        Args:
            key: The name.
            text: The text.
            step: The step that the text belongs to.
            columns: Instead of ``text``: the names of the columns of a table.
            data: The rows of that table.
            dataframe: A data frame instead of ``columns`` and ``data``.

        Raises:
            MisconfigurationException: Neither or both of a text and a table are given, or the text is no string.
        """
        if not _writes():
            return
        table = columns is not None or data is not None or dataframe is not None
        if table and text is None:
            self._take(to_table(key, step, columns, data, dataframe))
        elif isinstance(text, str) and not table:
            self._take(Text(key, step, text))
        else:
            raise MisconfigurationException(
                f"log_text({key!r}, text={text!r}) takes either a string, or a table by keywords: "
                "log_text(key, columns=[...], data=[[...], ...])."
            )

    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Record a table.

        Args:
            key: The name.
            columns: The names of the columns.
            data: The rows, with a cell for each column.
            dataframe: A data frame of pandas or Polars, instead of ``columns`` and ``data``.
            step: The step that the table belongs to.

        Raises:
            MisconfigurationException: There are no rows, or a row has another length than ``columns``.
        """
        if _writes():
            self._take(to_table(key, step, columns, data, dataframe))

    def log_file(self, key: str, path: Any = None, step: int | None = None) -> None:
        """Record a copy of a file.

        Args:
            key: The name; or, if it is the only argument, the path, and the name is that of the file.
            path: The file, on the local disk.
            step: The step that the file belongs to.

        Raises:
            MisconfigurationException: There is no such file.
        """
        if _writes():
            self._take(to_file(key, path, step))

    def _take(self, media: Media) -> None:
        if self._prefix:
            media = replace(media, key=f"{self._prefix}{self.LOGGER_JOIN_CHAR}{media.key}")
        if self.record_media(media):
            return
        if self.log_dir is not None:
            write_media(self.log_dir, media)
        elif type(self) not in _WITHOUT_A_FOLDER:
            _WITHOUT_A_FOLDER.add(type(self))
            rank_zero_warn(
                f"{type(self).__qualname__} records numbers only, and has no folder for files: {media.key!r}, and what "
                "else log_image and the like are given, is not kept. Use another logger for it, or implement "
                "`record_media` or `log_dir`."
            )


_WITHOUT_A_FOLDER: set[type[Logger]] = set()  # those that have said so


def _writes() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


class DummyExperiment:
    """An experiment that ignores every call. Ranks other than 0 get it, so that the same code runs on every rank."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing

    def __getitem__(self, index: Any) -> DummyExperiment:
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        return None


class DummyLogger(Logger):
    """A logger that writes nothing: it has every method, and no method does anything."""

    def __init__(self) -> None:
        self._experiment = DummyExperiment()

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def experiment(self) -> DummyExperiment:
        """An object that ignores every call."""
        return self._experiment

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        return None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        return None

    def record_media(self, media: Media) -> bool:
        return True

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing

    def __getitem__(self, index: int) -> DummyLogger:
        return self


def _nothing(*_: Any, **__: Any) -> None:
    return None


def rank_zero_experiment(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorate an ``experiment`` property: rank 0 gets the experiment, any other rank one that ignores every call."""

    @functools.wraps(fn)
    def experiment(self: Any) -> Any:
        return fn(self) if _writes() else DummyExperiment()

    return experiment
