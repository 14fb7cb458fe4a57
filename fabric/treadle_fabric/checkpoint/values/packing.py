"""Turn a tree of values into a plain one, with what has to be known to turn it back."""

from __future__ import annotations

import copy
import io
import pickle
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from treadle_fabric.checkpoint.per_rank import PerRank
from treadle_fabric.checkpoint.values.kept import KeptTensor
from treadle_fabric.checkpoint.values.kinds import classes_beside, take_kind
from treadle_fabric.checkpoint.values.not_loaded import NotLoaded
from treadle_fabric.checkpoint.values.standard_kinds import NoPlainFormError
from treadle_fabric.checkpoint.values.structures import name_of, take_structure
from treadle_fabric.errors import CheckpointError, MisconfigurationException

__all__ = ["Keeping", "Packed", "pack"]

OWN_KEY: Final = "treadle"
"""The entry of a checkpoint in which the types of its values lie, as ``values``."""
VERSION: Final = 1
ALONE: Final = frozenset({"treadle values", "content"})
"""The keys of a dict that takes the place of a value whose types lie beside the value, and not in the checkpoint."""
Path = tuple[Any, ...]

_KEYS: Final = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_PLAIN: Final = frozenset({*_KEYS, Tensor, Parameter, bytearray, torch.Size, torch.layout, torch.qscheme})
_PLAIN_KEYS: Final = frozenset(_KEYS)
_MAPPINGS: Final = (dict, OrderedDict, Counter)
_BASES: Final[tuple[Any, ...]] = (bool, int, float, complex, str, bytes, dict, list, tuple, set, frozenset)
_ALIAS: Final = "__orig_class__"
_ABSENT: Final = object()
"""Stands for the content of a value that has no plain form at all."""


@dataclass(frozen=True)
class Keeping:
    """How the values of a state are kept.

    Args:
        classes: By key of the state, the dataclasses, enums and named tuples that will be known where it is loaded.
        lenient: Leave out what cannot be pickled, rather than refuse it.
        name: What messages call the state. Default: "state". Without a name they call its keys by theirs.
    """

    classes: Mapping[str, Collection[type]] = field(default_factory=dict)
    lenient: bool = False
    name: str = "state"


@dataclass(frozen=True)
class Packed:
    """A packed state, and what the user has to be told of it: places and types."""

    content: dict[str, Any]
    pickled: dict[str, str]
    left_out: dict[str, str]


def pack(state: Mapping[str, Any], keeping: Keeping) -> Packed:
    """Turn a state into one of plain values; the types lie in its entry ``treadle``, and what has to be pickled, too.

    Raises:
        CheckpointError: Something cannot be pickled, and is not to be left out.
        MisconfigurationException: The state has something else under the key ``treadle``.
    """
    packer = _Packer(keeping)
    packed = {key: packer.pack(value, (key,), _Place(at, True)) for at, (key, value) in enumerate(state.items())}
    content = {key: value for key, value in packed.items() if value is not _ABSENT}
    block = packer.block()
    if block is not None:
        own = content.get(OWN_KEY, {})
        if not isinstance(own, dict) or "values" in own:
            raise MisconfigurationException(
                f"The key {OWN_KEY!r} of the state is in the place where the types of the other values are kept. Give "
                "what is there another key."
            )
        content[OWN_KEY] = {**own, "values": block}
    return Packed(content, packer.pickled, packer.left_out)


def dotted(path: Path) -> str:
    """A path in a checkpoint as people write it: "hyper_parameters.layers[0]"."""
    steps = "".join(f".{key}" if isinstance(key, str) else f"[{key!r}]" for key in path)
    return steps.removeprefix(".")


class _Cycle(Exception):
    """A container holds itself; ``container`` is its id."""

    def __init__(self, container: int) -> None:
        self.container = container


class _Place(NamedTuple):
    """Where in a dict a value is, and whether the dict may be without the value."""

    at: int
    may_lack: bool


@dataclass
class _Object:
    """A value that is to be pickled."""

    spec: dict[str, Any]
    value: Any
    path: Path
    told: bool
    optional: bool


class _Packer:
    """Packs values, and collects what has to be known to unpack them."""

    def __init__(self, keeping: Keeping) -> None:
        self._keeping = keeping
        self._types: list[tuple[Path, dict[str, Any]]] = []
        self._objects: list[_Object] = []
        self._open: set[int] = set()
        self._known_plain: dict[int, Any] = {}  # held, so that no other object has its id meanwhile
        self._within_objects = 0
        self.pickled: dict[str, str] = {}
        self.left_out: dict[str, str] = {}

    # --- what is to be known ---

    def block(self) -> dict[str, Any] | None:
        """What is to be known to unpack the values; None if all of them are plain."""
        stream = self._pickle()
        if not self._types:
            return None
        block: dict[str, Any] = {"version": VERSION, "types": self._types}
        return block if stream is None else {**block, "pickled": stream}

    def alone(self, content: Any, path: Path) -> Any:
        """What was packed at a path, with what is to be known of it, to be unpacked by itself."""
        block = self.block()
        if block is None:
            return content
        block["types"] = [(inner[len(path) :], spec) for inner, spec in self._types]
        return {"treadle values": block, "content": None if content is _ABSENT else content}

    def _pickle(self) -> Tensor | None:
        """The bytes of all objects together, so that what they share they share when they are loaded."""
        kept = self._objects
        try:
            stream = _dump([each.value for each in kept]) if kept else None
        except Exception:
            kept = [each for each in kept if self._can_be_pickled(each)]
            stream = _dump([each.value for each in kept]) if kept else None
        for index, each in enumerate(kept):
            each.spec["pickled"] = index
            if each.told:
                self.pickled[self._where(each.path)] = _described(each.value)
        return stream

    def _can_be_pickled(self, each: _Object) -> bool:
        try:
            _dump(each.value)
        except Exception as e:
            if not self._keeping.lenient:
                reason = str(e).rstrip(".") or type(e).__name__
                raise CheckpointError(
                    f"{self._where(each.path)} ({_described(each.value)}) cannot be pickled ({reason}). Save its "
                    "state_dict() or plain values, or leave it out."
                ) from e
            if each.optional:
                self._types = [entry for entry in self._types if entry[1] is not each.spec]
            if each.told:
                self.left_out[self._where(each.path)] = _described(each.value)
            return False
        return True

    def _where(self, path: Path) -> str:
        return f"{self._keeping.name}{''.join(f'[{key!r}]' for key in path)}" if self._keeping.name else dotted(path)

    # --- the values ---

    def pack(self, value: Any, path: Path, place: _Place | None = None) -> Any:
        """The plain form of a value; ``place`` is where it is in a dict, if it is in one."""
        if type(value) in _PLAIN or _is_plain_tensor(value) or id(value) in self._known_plain:
            return value
        if isinstance(value, PerRank):
            return self._per_rank(value, path)
        if id(value) in self._open:
            raise _Cycle(id(value))
        types, objects = len(self._types), len(self._objects)
        self._open.add(id(value))
        try:
            return self._packed(value, path, place)
        except (_Cycle, NoPlainFormError) as e:
            if isinstance(e, _Cycle) and e.container != id(value):
                raise
            del self._types[types:], self._objects[objects:]
            return self._object(value, path, place, _ABSENT)
        finally:
            self._open.discard(id(value))

    def _per_rank(self, value: PerRank, path: Path) -> PerRank:
        packer = _Packer(self._keeping)
        mine = packer.alone(packer.pack(value.value, path), path)
        self.pickled |= packer.pickled
        self.left_out |= packer.left_out
        return value if mine is value.value else PerRank(mine)

    def _packed(self, value: Any, path: Path, place: _Place | None) -> Any:
        if type(value) in (*_MAPPINGS, list, tuple, set):
            if not _has_plain_attributes(value):
                return self._object(value, path, place, dict(value))
            packed = self._content(_without_alias(value), path)
            if packed is value:
                self._known_plain[id(value)] = value
            return packed
        if _may_be_loaded(value):
            return value
        objects = len(self._objects)
        if (taken := take_kind(value)) is not None:
            kind, content, more = taken
            packed = self._content(content, path, may_lack=False)
            if kind.startswith("omegaconf.") and len(self._objects) > objects:  # it takes nothing that is not loaded
                raise NoPlainFormError
            spec: dict[str, Any] = {"kind": kind} if more is None else {"kind": kind, "more": more}
            if classes := classes_beside(kind, value):  # without the classes a load gives all but these
                spec["classes"] = [(inner, name_of(cls)) for inner, cls in classes.items()]
                if not set(classes.values()).issubset(self._keeping.classes.get(path[0], ())):
                    self._objects.append(_Object(spec, value, path, not self._within_objects, optional=False))
            self._types.append((path, spec))
            return packed
        if (structure := take_structure(value)) is not None:
            kind, content, more = structure
            spec = {"kind": kind, "class": name_of(type(value)), "more": more}
            if type(value) not in self._keeping.classes.get(path[0], ()):
                return self._object(value, path, place, content, spec)
            packed = self._content(content, path, may_lack=False)
            self._types.append((path, spec))
            return packed
        return self._object(value, path, place, _view(value))

    def _object(
        self, value: Any, path: Path, place: _Place | None, view: Any, spec: dict[str, Any] | None = None
    ) -> Any:
        """Have a value pickled; ``view`` is what plain form it has, for readers that want no more."""
        packed = _ABSENT
        if view is not _ABSENT:
            self._within_objects += 1
            try:
                packed = self._content(view, path, may_lack=False)
            finally:
                self._within_objects -= 1
        spec = {"kind": "object", "class": _described(value)} if spec is None else spec
        lacking = place if packed is _ABSENT else None
        if lacking is not None:
            spec["at"] = lacking.at
        optional = lacking is not None and lacking.may_lack
        self._objects.append(_Object(spec, value, path, told=not self._within_objects, optional=optional))
        self._types.append((path, spec))
        return packed

    # --- containers ---

    def _content(self, content: Any, path: Path, *, may_lack: bool = True) -> Any:
        """The plain form of a container, or of what a value consists of, which must be there in full."""
        if type(content) in _MAPPINGS:
            return self._mapping(content, path, may_lack)
        if type(content) in (list, tuple):
            return self._sequence(content, path)
        return self._set(content, path) if type(content) is set else self.pack(content, path)

    def _mapping(self, value: dict[Any, Any], path: Path, may_lack: bool) -> Any:
        if _PLAIN.issuperset(map(type, value.values())) and _PLAIN_KEYS.issuperset(map(type, value)):
            return value
        names: list[Any] = list(value)
        if odd := not all(map(_is_plain_key, names)):
            keys = self._keys(names, path)
            names = _plain_names(names)
        items = [
            (name, each, self.pack(each, (*path, name), _Place(at, may_lack)))
            for at, (name, each) in enumerate(zip(names, value.values(), strict=True))
        ]
        if odd:
            self._types.append((path, {"kind": "keys", "names": names, "more": keys}))
        elif all(packed is each for _, each, packed in items):
            return value
        made = copy.copy(value)  # with what it has as attributes: a state dict has the versions of its modules there
        made.clear()
        for name, _, packed in items:
            if packed is not _ABSENT:
                made[name] = packed
        return made

    def _keys(self, keys: list[Any], path: Path) -> Any:
        """Keys that are no plain ones, as a value by itself."""
        packer = _Packer(Keeping({path[0]: self._keeping.classes.get(path[0], ())}))
        content = packer.pack(keys, path[:1])
        if packer._objects:
            raise NoPlainFormError
        return packer.alone(content, path[:1])

    def _sequence(self, value: Any, path: Path) -> Any:
        if _PLAIN.issuperset(map(type, value)):  # a million numbers, perhaps
            return value
        items = [self.pack(each, (*path, i)) for i, each in enumerate(value)]
        if all(packed is each for packed, each in zip(items, value, strict=True)):
            return value
        return type(value)([None if packed is _ABSENT else packed for packed in items])

    def _set(self, value: set[Any], path: Path) -> Any:
        if all(map(_is_plain_key, value)):
            return value
        packed = self._sequence(list(value), path)
        self._types.append((path, {"kind": "set"}))
        return packed


def _has_plain_attributes(value: Any) -> bool:
    """Whether a file can have what an OrderedDict has as attributes: a state dict has the versions of its modules."""
    attributes = {name: each for name, each in getattr(value, "__dict__", {}).items() if name != _ALIAS}
    packed = pack(attributes, Keeping(lenient=True)).content if attributes else {}
    return all(packed.get(name) is each for name, each in attributes.items())


def _without_alias(value: Any) -> Any:
    """The same mapping without what ``OrderedDict[str, int]()`` leaves in it, which is no value of it."""
    if _ALIAS not in getattr(value, "__dict__", ()):
        return value
    value = copy.copy(value)
    vars(value).pop(_ALIAS, None)
    return value


def _is_plain_tensor(value: Any) -> bool:
    return isinstance(value, KeptTensor) or (
        isinstance(value, Tensor) and type(value).__module__.partition(".")[0] == "torch"
    )


def _is_plain_key(key: Any) -> bool:
    return all(map(_is_plain_key, key)) if type(key) is tuple else type(key) in _KEYS


def _view(value: Any) -> Any:
    """What plain form an object has that is kept pickled."""
    if isinstance(value, Module | type):
        return _ABSENT
    try:
        for base in _BASES:
            if isinstance(value, base):
                return base(value)
        if isinstance(value, Namespace):
            return dict(vars(value))
        return dict(value) if isinstance(value, Mapping) else _ABSENT
    except Exception:  # what a class of the user's does is not known
        return _ABSENT


def _plain_names(keys: list[Any]) -> list[Any]:
    """Plain keys for keys that are not: each differs from all others."""
    names: dict[Any, None] = {}
    for key in keys:
        taken = take_structure(key) or take_kind(key)
        name = next((each for each in (key, taken and taken[1]) if _is_plain_key(each)), str(key))
        while name in names:
            name = f"{name}'"
        names[name] = None
    return list(names)


def _may_be_loaded(value: Any) -> bool:
    """Whether torch loads it because the program allowed it, with ``torch.serialization.add_safe_globals``."""
    allowed = torch.serialization.get_safe_globals()
    if not any(each is type(value) or each is value for each in allowed):
        return False
    try:
        stream = io.BytesIO()
        torch.save(value, stream)
        stream.seek(0)
        torch.load(stream, weights_only=True)
    except Exception:
        return False
    return True


def _dump(value: Any) -> Tensor:
    stream = io.BytesIO()
    torch.save(value, stream, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    return torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)


def _described(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, NotLoaded):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__module__}.{value.__qualname__}".replace(" builtins.", " ")
    if isinstance(value, FunctionType | BuiltinFunctionType | MethodType):
        return f"the function {value.__qualname__}"
    return name_of(type(value)).removeprefix("builtins.")
