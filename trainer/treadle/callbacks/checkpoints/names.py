"""File names of checkpoints: templates such as ``{epoch:02d}-{val_loss:.2f}``, and what lies at a path."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from treadle_fabric.checkpoint.folder import link_folder, put_in_place
from treadle_fabric.errors import CheckpointError, MisconfigurationException, near_names
from treadle_fabric.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from treadle.trainer import Trainer

__all__ = [
    "absolute",
    "check_template",
    "default_folder",
    "fill_template",
    "is_local",
    "link_checkpoint",
    "path_exists",
    "remove_link_and_empty_folders",
    "yaml_number",
]

_FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")  # names may hold anything else: "val/loss", "acc@1", "top 5"


def check_template(template: str) -> None:
    """Refuse a file name template that could only fail when the first checkpoint is written.

    Raises:
        MisconfigurationException: for an empty or unbalanced field, or a format that no number has.
    """
    if "{" in (rest := _FIELD.sub("", template)) or "}" in rest:
        raise MisconfigurationException(
            f"The checkpoint file name {template!r} has an empty field or an unbalanced brace: write the name of a "
            "metric between braces, as in '{epoch:02d}-{val_loss:.2f}'."
        )
    for name, spec in _FIELD.findall(template):
        if not any(_formats(number, spec) for number in (1, 1.0)):
            raise MisconfigurationException(
                f"The checkpoint file name {template!r} asks for {name!r} in the format {spec!r}, which no number has."
            )


def _formats(number: float, spec: str) -> bool:
    try:
        format(number, spec)
    except ValueError:
        return False
    return True


def fill_template(template: str, metrics: Mapping[str, Any], insert_names: bool, equals: str = "=") -> str:
    """Put the values of ``metrics`` into a template.

    Args:
        template: the file name with its fields.
        metrics: numbers and scalar tensors. A name that is not there counts as 0, with a warning.
        insert_names: write ``name=value`` rather than ``value``.
        equals: what stands between the name and the value.
    """

    def fill(match: re.Match[str]) -> str:
        name, spec = match[1], match[2] or ""
        if name not in metrics:
            rank_zero_warn(
                f"The checkpoint file name {template!r} asks for {name!r}, which was not logged: it says 0. "
                f"{near_names(name, metrics)}"
            )
        value = metrics.get(name, 0)
        text = _format(value.item() if isinstance(value, Tensor) else value, spec)
        return f"{name}{equals}{text}" if insert_names else text

    return _FIELD.sub(fill, template)


def _format(value: Any, spec: str) -> str:
    try:
        return format(value, spec)
    except ValueError:  # "d" asked of a float: no reason to lose a checkpoint
        return format(round(value), spec) if math.isfinite(value) else str(value)


def is_local(path: str) -> bool:
    """Whether a path is one of this machine's file systems, not an fsspec URL."""
    return "://" not in path


def path_exists(path: str) -> bool:
    """Whether anything lies at a local or remote path; a dangling link counts."""
    if is_local(path):
        return os.path.lexists(path)
    from fsspec.core import url_to_fs

    fs, inner = url_to_fs(path)
    return bool(fs.exists(inner))


def remove_link_and_empty_folders(path: str, root: str) -> None:
    """Remove what is left at ``path`` when its file is gone.

    A metric name with a slash makes a folder for each file; those between it and ``root`` go with it.
    """
    if not is_local(path):
        return
    if os.path.islink(path):
        os.unlink(path)
    for folder in Path(path).parents:
        if folder == Path(root) or any(folder.iterdir()):
            return
        folder.rmdir()


def link_checkpoint(
    target: str, link: str, *, symbolic: bool, after_saves: Callable[[Callable[[], None]], None] | None = None
) -> bool:
    """Give a checkpoint a second name, in the place of whatever bears it; False where that cannot be.

    Args:
        target: the checkpoint.
        link: the second name.
        symbolic: make a relative symbolic link, else a hard link, which stays when ``target`` is removed. Of a folder
            each file is linked.
        after_saves: runs a function when ``target`` is written, as :attr:`CheckpointIO.after_saves`; None: it is.

    Raises:
        CheckpointError: the new name cannot be put in the place of the old one.
    """
    if not (is_local(target) and is_local(link)):
        return False
    fresh = Path(link).with_name(f".{Path(link).name}.{os.getpid()}.link")
    try:
        fresh.parent.mkdir(parents=True, exist_ok=True)
        fresh.unlink(missing_ok=True)
        if symbolic:
            fresh.symlink_to(os.path.relpath(target, fresh.parent))
        elif os.path.isdir(target):
            link_folder(target, link)
            return True
        elif after_saves is None:
            os.link(target, fresh)
    except OSError:  # a file system without links
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        return False
    if after_saves is None:
        _replace(fresh, Path(link))
    else:  # the old name stands until the new checkpoint does
        after_saves(lambda: _put_in_place(target, fresh, Path(link), symbolic))
    return True


def _put_in_place(target: str, fresh: Path, at: Path, symbolic: bool) -> None:
    try:
        if not symbolic:
            try:
                os.link(target, fresh)
            except OSError:
                import shutil

                shutil.copyfile(target, fresh)
    except OSError as error:
        raise CheckpointError(f"{target!r} could not get the second name {str(at)!r}: {error}.") from error
    _replace(fresh, at)


def _replace(fresh: Path, at: Path) -> None:
    try:
        put_in_place(str(fresh), str(at))
    except OSError as error:
        raise CheckpointError(f"The checkpoint {str(at)!r} could not be replaced: {error}.") from error
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


def yaml_number(value: float) -> str:
    """A float as every YAML reader takes it for one."""
    if math.isnan(value):
        return ".nan"
    if math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    text = repr(value)
    return text if "." in text else text.replace("e", ".0e")


def absolute(path: str) -> str:
    """The path itself: not relative, and through no link. A URL is left as it is."""
    return os.path.realpath(os.path.expanduser(path)) if is_local(path) else path


def default_folder(trainer: Trainer) -> str:
    """``checkpoints`` beside what the first logger writes, or in the root folder."""
    if not trainer.loggers:
        return absolute(os.path.join(trainer.default_root_dir, "checkpoints"))
    logger = trainer.loggers[0]
    root = logger.save_dir or trainer.default_root_dir
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return absolute(os.path.join(root, str(logger.name), version, "checkpoints"))
