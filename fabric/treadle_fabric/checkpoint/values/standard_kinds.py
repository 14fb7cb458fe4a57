"""The kinds of values of Python and torch that are kept plain, with the kind beside them: a fixed list."""

from __future__ import annotations

import array
import datetime
import importlib
import io
import random
import re
import sys
import zlib
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from types import MappingProxyType, SimpleNamespace
from typing import Any, Final
from uuid import UUID

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.torch_version import TorchVersion

from treadle_fabric.accelerators import count_devices, with_index
from treadle_fabric.attribute_dict import AttributeDict
from treadle_fabric.rank_zero import rank_zero_warn

__all__ = ["Kind", "NoPlainFormError", "kind_named", "kind_of"]


class NoPlainFormError(Exception):
    """A value of a known kind that has no plain form after all, such as a defaultdict with a function of the user's."""


@dataclass(frozen=True)
class Kind:
    """A kind of values that are kept plain.

    Args:
        name: What the file calls the kind.
        take: From a value its content, in which other values may be packed in turn, and what else is to be known of it.
        make: The value, from its content and what else was known of it.
    """

    name: str
    take: Callable[[Any], tuple[Any, Any]]
    make: Callable[[Any, Any], Any]


def _simple(name: str, take: Callable[[Any], Any], make: Callable[[Any], Any]) -> Kind:
    return Kind(name, lambda value: (take(value), None), lambda content, _: make(content))


# --- single kinds ---


def _namespace(cls: type[Any]) -> Callable[[Any], Any]:
    def make(content: dict[str, Any]) -> Any:
        made = cls()
        vars(made).update(content)
        return made

    return make


_FACTORIES: Final[dict[str, Any]] = {
    "None": None,
    **{cls.__name__: cls for cls in (list, dict, set, tuple, int, float, str, bool, deque, Counter, OrderedDict)},
}
"""What a defaultdict may call for a missing key."""


def _take_defaultdict(value: defaultdict[Any, Any]) -> tuple[Any, Any]:
    for name, factory in _FACTORIES.items():
        if value.default_factory is factory:
            return dict(value), name
    raise NoPlainFormError


def _make_defaultdict(content: dict[Any, Any], factory: str) -> Any:
    return defaultdict(_FACTORIES[factory], content)


def _zone(zone: datetime.tzinfo | None) -> Any:
    if zone is None:
        return None
    if kind_of(type(zone)) is _LATER["zoneinfo.ZoneInfo"] and (key := getattr(zone, "key", None)) is not None:
        return key
    if type(zone) is datetime.timezone:
        offset = zone.utcoffset(None)
        name = zone.tzname(None)
        return [*_delta(offset), *([] if datetime.timezone(offset).tzname(None) == name else [name])]
    raise NoPlainFormError


def _zone_from(kept: Any) -> datetime.tzinfo | None:
    if kept is None or isinstance(kept, str):
        return None if kept is None else _imported("zoneinfo.ZoneInfo")(kept)
    days, seconds, microseconds, *name = kept
    offset = datetime.timedelta(days, seconds, microseconds)
    return datetime.timezone(offset, *name) if name or offset else datetime.UTC


def _delta(value: datetime.timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def _take_moment(value: Any) -> tuple[Any, Any]:
    return value.replace(tzinfo=None, fold=0).isoformat(), {"zone": _zone(value.tzinfo), "fold": value.fold}


def _make_moment(cls: Any) -> Callable[[str, Any], Any]:
    return lambda content, more: cls.fromisoformat(content).replace(tzinfo=_zone_from(more["zone"]), fold=more["fold"])


def _make_pattern(content: Any, flags: int) -> Any:
    return re.compile(content, flags)


def _make_stream(content: bytes, position: int) -> io.BytesIO:
    stream = io.BytesIO(content)
    stream.seek(position)
    return stream


def _take_generator(value: torch.Generator) -> tuple[Any, Any]:
    return value.get_state(), str(value.device)


def _make_generator(content: torch.Tensor, device: str) -> torch.Generator:
    """Make a generator on a device of its kind; of another index where there are fewer devices than there were."""
    kind, _, index = device.partition(":")
    there = count_devices(kind)
    if there:
        generator = torch.Generator(device if int(index or 0) < there else with_index(torch.device(kind)))
        generator.set_state(content.cpu())
        return generator
    rank_zero_warn(
        f"A random generator of {device} comes back as one of the CPU, since there is no {kind} device here. It draws"
        " other numbers than it would have drawn there, but the same in each run."
    )
    return torch.Generator().manual_seed(zlib.crc32(content.cpu().numpy().tobytes()))


def _make_random(content: Any) -> random.Random:
    made = random.Random()
    made.setstate(content)
    return made


_FORMATS: Final = {
    str(each): each
    for each in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}
_PATH: Final = _simple("Path", str, Path)

_KINDS: Final[Mapping[type, Kind]] = {
    PosixPath: _PATH,
    WindowsPath: _PATH,
    PurePosixPath: _simple("PurePosixPath", str, PurePosixPath),
    PureWindowsPath: _simple("PureWindowsPath", str, PureWindowsPath),
    Namespace: _simple("Namespace", lambda v: dict(vars(v)), _namespace(Namespace)),
    SimpleNamespace: _simple("SimpleNamespace", lambda v: dict(vars(v)), _namespace(SimpleNamespace)),
    AttributeDict: _simple("AttributeDict", dict, AttributeDict),
    MappingProxyType: _simple("mappingproxy", dict, MappingProxyType),
    defaultdict: Kind("defaultdict", _take_defaultdict, _make_defaultdict),
    deque: Kind("deque", lambda v: (list(v), v.maxlen), deque),
    frozenset: _simple("frozenset", set, frozenset),
    range: _simple("range", lambda v: [v.start, v.stop, v.step], lambda c: range(*c)),
    slice: _simple("slice", lambda v: [v.start, v.stop, v.step], lambda c: slice(*c)),
    type(...): _simple("ellipsis", lambda _: "...", lambda _: ...),
    io.BytesIO: Kind("BytesIO", lambda v: (v.getvalue(), v.tell()), _make_stream),
    random.Random: _simple("Random", random.Random.getstate, _make_random),
    array.array: Kind("array", lambda v: (v.tolist(), v.typecode), lambda content, code: array.array(code, content)),
    re.Pattern: Kind("pattern", lambda v: (v.pattern, v.flags), _make_pattern),
    UUID: _simple("UUID", str, UUID),
    datetime.timedelta: _simple("timedelta", _delta, lambda c: datetime.timedelta(*c)),
    datetime.date: _simple("date", datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.datetime: Kind("datetime", _take_moment, _make_moment(datetime.datetime)),
    datetime.time: Kind("time", _take_moment, _make_moment(datetime.time)),
    datetime.timezone: _simple("timezone", _zone, _zone_from),
    TorchVersion: _simple("TorchVersion", str, TorchVersion),
    PackedSequence: _simple("PackedSequence", list, lambda c: PackedSequence(*c)),
    torch.Generator: Kind("Generator", _take_generator, _make_generator),
    torch.memory_format: _simple("memory_format", str, _FORMATS.__getitem__),
}
_LATER: Final[Mapping[str, Kind]] = {
    "decimal.Decimal": _simple("Decimal", str, lambda c: _imported("decimal.Decimal")(c)),
    "fractions.Fraction": _simple(
        "Fraction", lambda v: [v.numerator, v.denominator], lambda c: _imported("fractions.Fraction")(*c)
    ),
    "zoneinfo.ZoneInfo": _simple("ZoneInfo", _zone, _zone_from),
}
"""The same for classes of modules that take long to import, by their names: programs that have them import them."""
_BY_NAME: Final = {kind.name: kind for kind in (*_KINDS.values(), *_LATER.values())}


def kind_of(cls: type) -> Kind | None:
    """Return the kind of the values of a class; None for a class that is not on the list."""
    kind = _KINDS.get(cls)
    if kind is None and (kind := _LATER.get(f"{cls.__module__}.{cls.__qualname__}")) is not None:
        kind = kind if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls else None
    return kind


def kind_named(name: str) -> Kind:
    """Return the kind that a file calls by a name.

    Raises:
        KeyError: There is none.
    """
    return _BY_NAME[name]


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
