"""Images, figures, texts, tables and files: what loggers record beside numbers, in one form each.

A logger gets these from the ``log_image`` and the like of :class:`~treadle_fabric.loggers.logger.Logger`, which turn
whatever a user has (tensors, arrays, paths, data frames) into them. Pillow and matplotlib are imported when used.
"""

from __future__ import annotations

import csv
import ctypes
import io
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treadle_fabric.checks import require_package
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.rank_zero import rank_zero_warn

__all__ = [
    "Figure",
    "File",
    "Images",
    "Media",
    "Table",
    "Text",
    "to_figure",
    "to_file",
    "to_images",
    "to_options",
    "to_table",
]

_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(eq=False)
class Media:
    """What is recorded under a name at a step; the classes below say of what kind it is.

    Args:
        key: The name.
        step: The step it belongs to; None without one.
    """

    key: str
    step: int | None


@dataclass(eq=False)
class Images(Media):
    """One or several images.

    Args:
        images: Pillow images, or objects of the service's own class.
        options: What the user said of each image, such as its ``caption``.
    """

    images: tuple[Any, ...]
    options: tuple[Mapping[str, Any], ...]


@dataclass(eq=False)
class Figure(Media):
    """A figure of matplotlib or Plotly."""

    figure: Any

    @property
    def extension(self) -> str:
        """The extension of the file that :meth:`encode` gives."""
        return ".png" if hasattr(self.figure, "savefig") else ".html"

    def encode(self) -> bytes:
        """Return a PNG file of a matplotlib figure, an HTML file of a Plotly figure."""
        if hasattr(self.figure, "savefig"):
            self.figure.savefig(file := io.BytesIO(), format="png")
            return file.getvalue()
        self.figure.write_html(text := io.StringIO())
        return text.getvalue().encode()

    def to_image(self) -> Any:
        """Return a Pillow image of a matplotlib figure."""
        from PIL import Image  # matplotlib needs it too

        return Image.open(io.BytesIO(self.encode()))


@dataclass(eq=False)
class Text(Media):
    """A text."""

    text: str


@dataclass(eq=False)
class Table(Media):
    """A table: the names of the columns, and rows of that length with cells of any kind."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def plain_rows(self) -> list[list[Any]]:
        """Return the rows with numbers, truth values, strings and None as they are, all else as text."""
        return [[_plain(cell) for cell in row] for row in self.rows]

    def to_csv(self) -> str:
        """Return the table as CSV."""
        csv.writer(file := io.StringIO(), lineterminator="\n").writerows([self.columns, *self.plain_rows()])
        return file.getvalue()

    def to_markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.plain_rows()]
        cells = ([str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines)
        return "\n".join("| " + " | ".join(line) + " |" for line in cells)


@dataclass(eq=False)
class File(Media):
    """A file on the local disk."""

    path: str


def to_images(images: Any, own: Collection[str] = ()) -> tuple[Any, ...]:
    """Turn one image, a batch or a list of images into Pillow images.

    Args:
        images: Tensors (CHW, or HW for grey values), NumPy arrays (HWC or HW), Pillow images, or paths; a list of
            these; or a tensor or an array of four dimensions, which is a batch. Whole numbers are 0 to 255, other
            numbers 0 to 1; what is beyond is cut.
        own: The packages whose objects stay as they are.

    Raises:
        MisconfigurationException: An image has another shape or type.
        MissingPackageError: Pillow is not installed.
    """
    if getattr(images, "ndim", None) == 4:
        images = list(images)
    if not isinstance(images, list | tuple):
        images = [images]
    return tuple(image if _package(image) in own else _to_image(image) for image in images)


def to_options(given: Mapping[str, Any], count: int) -> tuple[Mapping[str, Any], ...]:
    """Turn lists with an entry for each item into a dictionary for each item.

    Raises:
        MisconfigurationException: A list has another length.
    """
    for name, values in given.items():
        length = len(values) if isinstance(values, Sequence) and not isinstance(values, str) else None
        if length != count:
            found = f"has {length} entries" if length is not None else f"is the {type(values).__qualname__} {values!r}"
            raise MisconfigurationException(
                f"{name} {found}, and there are {count} items to log. Give a list with one entry for each."
            )
    return tuple({name: values[i] for name, values in given.items()} for i in range(count))


def to_table(key: str, step: int | None, columns: Any, data: Any, dataframe: Any) -> Table:
    """Make a table of names and rows, or of a data frame of pandas or Polars.

    Raises:
        MisconfigurationException: There are no rows, or a row has another length than the names.
    """
    if dataframe is not None:
        columns = [str(name) for name in dataframe.columns]
        data = dataframe.rows() if callable(getattr(dataframe, "rows", None)) else dataframe.values.tolist()
    if data is None:
        raise MisconfigurationException(
            f"The table {key!r} has no rows. Give data, a list of rows (with the names in columns), or a dataframe."
        )
    rows = tuple(tuple(row) for row in data)
    if columns is None:
        columns = [f"column_{i}" for i in range(len(rows[0]) if rows else 0)]
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise MisconfigurationException(
                f"Row {number} of the table {key!r} has {len(row)} cells, and there are {len(columns)} columns: "
                f"{list(columns)}. Give each row a cell for each column."
            )
    return Table(key, step, tuple(map(str, columns)), rows)


def to_figure(key: str, step: int | None, figure: Any) -> Figure:
    """Find the figure in a figure, in axes, or in the module ``pyplot``.

    Raises:
        MisconfigurationException: ``figure`` is something else.
    """
    if callable(getattr(figure, "gcf", None)):  # pyplot
        figure = figure.gcf()
    elif not hasattr(figure, "savefig") and hasattr(getattr(figure, "figure", None), "savefig"):  # axes
        figure = figure.figure
    if not hasattr(figure, "savefig") and not hasattr(figure, "write_html"):
        raise MisconfigurationException(
            f"The figure {key!r} is a {type(figure).__qualname__}. Give a figure of matplotlib or Plotly; for pixels "
            "there is log_image."
        )
    return Figure(key, step, figure)


def to_file(key: str, path: Any, step: int | None) -> File:
    """Name a local file; without a path, ``key`` is the path, and the name is that of the file.

    Raises:
        MisconfigurationException: There is no such file.
    """
    source = os.fspath(key if path is None else path)
    if not os.path.isfile(source):
        what = "is a folder" if os.path.isdir(source) else "is not there"
        raise MisconfigurationException(f"log_file takes a file on the local disk, and {source!r} {what}.")
    return File(os.path.basename(source) if path is None else str(key), step, source)


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _to_image(value: Any) -> Any:
    require_package("PIL", "log_image", "trainer", "It is also there after `pip install pillow`.")
    from PIL import Image  # an extra

    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str | os.PathLike):
        with Image.open(os.fspath(value)) as image:
            image.load()
            return image
    if isinstance(value, Tensor):
        pixels = _channels_last(value.detach().cpu())
    elif hasattr(value, "__array__"):
        pixels = _checked(torch.as_tensor(value.__array__().copy()), "array", "HWC", "transpose(1, 2, 0)")
    else:
        raise MisconfigurationException(
            f"An image is a tensor, a NumPy array, a Pillow image or a path, and this is a {type(value).__qualname__}."
        )
    pixels = _to_bytes(pixels).contiguous()
    height, width, channels = pixels.shape
    if not height or not width:
        raise MisconfigurationException(f"An image of {height} x {width} pixels has none. Leave it out.")
    content = ctypes.string_at(pixels.data_ptr(), pixels.numel())  # a copy, which needs no NumPy
    return Image.frombytes(_CHANNELS[channels], (width, height), content)


def _channels_last(image: Tensor) -> Tensor:
    if image.ndim == 3 and image.shape[0] in _CHANNELS:
        return image.permute(1, 2, 0)
    return _checked(image, "tensor", "CHW", "permute(2, 0, 1)")


def _checked(image: Tensor, kind: str, order: str, remedy: str) -> Tensor:
    """Return an image of shape HW as HWC; an array of shape HWC passes, all else is refused."""
    if image.ndim == 2:
        return image[:, :, None]
    if kind == "array" and image.ndim == 3 and image.shape[2] in _CHANNELS:
        return image
    other = image.ndim == 3 and image.shape[2 if kind == "tensor" else 0] in _CHANNELS
    raise MisconfigurationException(
        f"This {kind} has the shape {tuple(image.shape)}, and an image as a {kind} has the shape {order} with 1, 3 or "
        f"4 channels, or HW. " + (f"Turn the axes with {remedy}." if other else "Give such images, or a list of them.")
    )


def _to_bytes(pixels: Tensor) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.dtype == torch.bool:
        return pixels.to(torch.uint8) * 255
    if not pixels.is_floating_point() and not pixels.is_complex():
        return pixels.clamp(0, 255).to(torch.uint8)
    if pixels.is_complex():
        raise MisconfigurationException("An image of complex numbers has no colors. Log its abs(), for example.")
    pixels = pixels.float().nan_to_num(0.0, 1.0, 0.0)
    low, high = (float(v) for v in pixels.aminmax()) if pixels.numel() else (0.0, 0.0)
    if low < -0.05 or high > 1.05:
        rank_zero_warn(
            f"An image has values from {low:.3g} to {high:.3g}, and what is below 0 or above 1 is cut. Scale its "
            "values to 0 to 1, or give uint8 values from 0 to 255."
        )
    return pixels.clamp(0, 1).mul(255).round().to(torch.uint8)


def _plain(cell: Any) -> Any:
    if getattr(cell, "shape", None) == () and callable(getattr(cell, "item", None)):
        cell = cell.item()
    return cell if cell is None or isinstance(cell, bool | int | float | str) else str(cell)
