"""Files with hyper-parameters, where users of a trainer look for what reads and writes them."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from collections.abc import Mapping, MutableMapping
from typing import Any

from treadle.module.loading import literal, read_hparams_file
from treadle_fabric import MisconfigurationException, PathLike, rank_zero_warn
from treadle_fabric.loggers import to_yaml

__all__ = [
    "convert",
    "load_hparams_from_tags_csv",
    "load_hparams_from_yaml",
    "save_hparams_to_tags_csv",
    "save_hparams_to_yaml",
    "update_hparams",
]

convert = literal


def update_hparams(hparams: MutableMapping[str, Any], updates: Mapping[str, Any]) -> None:
    """Change hyper-parameters in place, also nested ones.

    Args:
        hparams: The hyper-parameters.
        updates: New values; a mapping in the place of a mapping changes only the names that it has.
    """
    for name, value in updates.items():
        held = hparams.get(name)
        if isinstance(value, Mapping) and isinstance(held, MutableMapping):
            update_hparams(held, value)
        else:
            hparams[name] = value


def load_hparams_from_tags_csv(tags_csv: PathLike) -> dict[str, Any]:
    """Read a file with the columns ``key`` and ``value``; nothing where there is no file."""
    return _read(tags_csv)


def load_hparams_from_yaml(config_yaml: PathLike, use_omegaconf: bool = True) -> dict[str, Any]:
    """Read a YAML file; nothing where there is no file.

    Args:
        config_yaml: The file.
        use_omegaconf: Has no effect: the values are plain ones.
    """
    return _read(config_yaml)


def _read(path: PathLike) -> dict[str, Any]:
    if not os.path.exists(path):
        rank_zero_warn(f"There is no file {str(path)!r} with hyper-parameters: none are loaded.")
        return {}
    return read_hparams_file(str(path))


def save_hparams_to_tags_csv(tags_csv: PathLike, hparams: Mapping[str, Any] | Namespace) -> None:
    """Write a file with the columns ``key`` and ``value``.

    Raises:
        MisconfigurationException: The folder is not there, or these are no named values.
    """
    _check_folder(tags_csv)
    with open(tags_csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "value"])
        writer.writerows(_named(hparams).items())


def save_hparams_to_yaml(
    config_yaml: PathLike, hparams: Mapping[str, Any] | Namespace, use_omegaconf: bool = True
) -> None:
    """Write a YAML file; what YAML does not have is written as its printed form.

    Args:
        config_yaml: The file.
        hparams: The hyper-parameters.
        use_omegaconf: Has no effect: the values are plain ones.

    Raises:
        MisconfigurationException: The folder is not there, or these are no named values.
    """
    _check_folder(config_yaml)
    with open(config_yaml, "w", newline="", encoding="utf-8") as file:
        file.write(to_yaml(_named(hparams)))


def _check_folder(path: PathLike) -> None:
    if not os.path.isdir(folder := os.path.dirname(os.path.abspath(path))):
        raise MisconfigurationException(f"There is no folder {folder!r} for {str(path)!r}: make the folder first.")


def _named(hparams: Any) -> dict[str, Any]:
    if isinstance(hparams, Namespace):
        return vars(hparams)
    if isinstance(hparams, Mapping):
        return dict(hparams)
    raise MisconfigurationException(f"Hyper-parameters are a dictionary or a Namespace, and not {hparams!r}.")
