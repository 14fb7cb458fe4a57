"""Hyper-parameters in the forms that loggers write."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from treadle_fabric.errors import MisconfigurationException

__all__ = [
    "flatten",
    "keep_entries",
    "plain",
    "to_dict",
    "to_yaml",
]

_BARE_KEY = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)
_YAML_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def to_dict(params: Any) -> dict[str, Any]:
    """Turn a mapping, a ``Namespace`` or a dataclass, and those nested in it, into dictionaries with string keys.

    Raises:
        MisconfigurationException: ``params`` is something else.
    """
    if params is None:
        return {}
    entries = _entries(params)
    if entries is None:
        raise MisconfigurationException(
            f"Hyper-parameters are a mapping, a Namespace or a dataclass, and this is a {type(params).__qualname__}. "
            "Give a dictionary with their names, such as {'params': ...}."
        )
    return {str(key): value if _entries(value) is None else to_dict(value) for key, value in entries.items()}


def _entries(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):  # what is missing in a config of OmegaConf raises an error in items()
        return {key: value.get(key, "???") for key in value}
    if isinstance(value, Namespace):
        return vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if hasattr(value, name)}  # a field may be set later
    return None


def flatten(params: Mapping[str, Any], separator: str = "/") -> dict[str, bool | int | float | str]:
    """Give nested entries joined names, and turn every value into a number or a string."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{key}{separator}{k}": v for k, v in flatten(value, separator).items()})
        else:
            plain = _number(value)
            flat[key] = plain if isinstance(plain, bool | int | float | str) else str(plain)
    return flat


def plain(value: Any) -> Any:
    """Turn hyper-parameters into what JSON has: nested dictionaries and lists, numbers, strings, truth values, None."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    value = _number(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _number(value: Any) -> Any:
    """Turn a tensor or a NumPy scalar of shape () into a Python number; return anything else as it is."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return value.item()
    return value


def to_yaml(params: Mapping[str, Any]) -> str:
    """Format as YAML: one ``key: value`` per line, each value in YAML's JSON-like form, or as a string without one."""
    lines = (f"{_key(key)}: {_value(value)}\n" for key, value in params.items())
    return "".join(lines) or "{}\n"


def keep_entries(before: str, now: str) -> str:
    """Return the YAML ``now``, and below it the entries of the earlier YAML ``before`` that ``now`` has no key of."""
    known = {_key_of(line) for line in now.splitlines()}
    kept = [line for line in before.splitlines() if line != "{}" and _key_of(line) not in known]
    return (now if now != "{}\n" or not kept else "") + "".join(f"{line}\n" for line in kept)


def _key_of(line: str) -> str:
    if line.startswith('"'):
        with suppress(ValueError):  # edited by hand
            return line[: json.JSONDecoder().raw_decode(line)[1]]
    return line.partition(": ")[0]


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) and key.lower() not in _YAML_WORDS else _string(key)


def _value(value: Any) -> str:
    value = _number(value)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and type(value).__str__ is int.__str__:
        return str(int(value))
    if isinstance(value, float):
        return _float(float(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_string(str(k))}: {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return _string(str(value))


def _float(value: float) -> str:
    if not math.isfinite(value):
        return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}[repr(value)]
    text = repr(value)  # 1e-05 is a string to YAML 1.1 readers, which want 1.0e-05
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _string(text: str) -> str:
    return _UNPRINTABLE.sub(lambda m: f"\\u{ord(m[0]):04x}", json.dumps(text, ensure_ascii=False))
