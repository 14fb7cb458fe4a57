"""Turn the plain tree of a file into the values that were saved."""

from __future__ import annotations

import copy
import io
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from treadle_fabric.checkpoint.values.kinds import make_kind
from treadle_fabric.checkpoint.values.not_loaded import NotLoaded
from treadle_fabric.checkpoint.values.packing import ALONE, OWN_KEY, VERSION, Path, dotted
from treadle_fabric.checkpoint.values.structures import make_structure, name_of
from treadle_fabric.errors import CheckpointCorruptError, CheckpointError

__all__ = ["merge_parts", "pickled_in", "unpack", "unpack_alone"]

_ABSENT: Any = object()


def unpack(
    content: dict[str, Any],
    name: str,
    *,
    weights_only: bool | None = None,
    map_location: Any = None,
    classes: Collection[type] = (),
) -> dict[str, Any]:
    """The values of a checkpoint that :func:`pack` made plain; a checkpoint without packed values is returned as it is.

    Args:
        content: What the file holds.
        name: What the user calls the file.
        weights_only: Only an explicit False has the pickled part read.
        map_location: Where the tensors in the pickled part go, as in :func:`torch.load`.
        classes: The dataclasses, enums and named tuples that values may be of.

    Raises:
        CheckpointCorruptError: What should tell the types does not.
        CheckpointError: The pickled part was asked for and cannot be read.
    """
    own = content.get(OWN_KEY)
    if not isinstance(own, dict) or "values" not in own:
        return content
    rest = {key: value for key, value in own.items() if key != "values"}
    bare = {key: value for key, value in content.items() if key != OWN_KEY or rest}
    if rest:
        bare[OWN_KEY] = rest
    made: dict[str, Any] = _Unpacker(own["values"], name, weights_only, map_location, classes).all_of(bare)
    return made


def pickled_in(content: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint that was not unpacked keeps pickled: where it belongs, and what it is."""
    own = content.get(OWN_KEY)
    types = own["values"].get("types", ()) if isinstance(own, dict) and isinstance(own.get("values"), dict) else ()
    return {
        dotted(path): str(spec.get("class", spec["kind"])) for path, spec in types if spec.get("pickled") is not None
    }


def unpack_alone(
    value: Any, name: str, *, weights_only: bool | None, map_location: Any = None, classes: Collection[type] = ()
) -> Any:
    """A value that each rank has of its own, which ``pack`` made plain by itself; else as :func:`unpack`."""
    if not isinstance(value, dict) or value.keys() != ALONE:
        return value
    unpacker = _Unpacker(value["treadle values"], name, weights_only, map_location, classes)
    return unpacker.all_of(value["content"])


def merge_parts(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Put what tells the types of values that each rank has of its own into the checkpoint's own entry for that.

    Args:
        content: A checkpoint with lists of the values of all ranks, as :func:`pack` made them plain.

    Returns:
        The checkpoint as one file has it, and the places of what is lost: what a rank kept pickled.
    """
    types: list[Any] = []
    lost: list[str] = []

    def merged(value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            if value.keys() != ALONE:
                new = copy.copy(value)
                for key, each in value.items():
                    new[key] = merged(each, (*path, key))
                return new
            for inner, spec in value["treadle values"]["types"]:
                at = (*path, *inner)
                if spec.get("pickled") is not None:
                    lost.append(dotted(at))
                types.append((at, {key: each for key, each in spec.items() if key != "pickled"}))
            return value["content"]
        if type(value) in (list, tuple):
            return type(value)(merged(each, (*path, at)) for at, each in enumerate(value))
        return value

    whole: dict[str, Any] = merged(content, ())
    if types:
        own = whole.setdefault(OWN_KEY, {})
        block = own.get("values", {"version": VERSION, "types": []})
        whole[OWN_KEY] = {**own, "values": {**block, "types": [*block["types"], *types]}}
    return whole, lost


class _Node:
    """What is to be done with the value at a path, and with what the value holds."""

    def __init__(self) -> None:
        self.specs: list[Mapping[str, Any]] = []
        self.inner: dict[Any, _Node] = {}


class _Unpacker:
    def __init__(
        self,
        block: Any,
        name: str,
        weights_only: bool | None,
        map_location: Any,
        classes: Collection[type],
    ) -> None:
        self._name = name
        self._weights_only, self._map_location, self._classes = weights_only, map_location, classes
        self._prefix: Path = ()
        self._root = _Node()
        try:
            if block["version"] != VERSION:
                raise CheckpointError(
                    f"{name!r} keeps the types of its values in the format {block['version']!r}, and {VERSION} is "
                    "known here. Load it with the release that wrote it."
                )
            for path, spec in block["types"]:
                node = self._root
                for key in path:
                    node = node.inner.setdefault(key, _Node())
                node.specs.append({"kind": spec["kind"], **spec})
            stream = block.get("pickled")
        except (LookupError, TypeError, ValueError, AttributeError) as e:
            raise CheckpointCorruptError(
                f"{name!r} does not say what types its values have ({type(e).__name__}: {e}). Use another checkpoint."
            ) from e
        self._objects = self._unpickle(stream) if weights_only is False and isinstance(stream, Tensor) else []

    def _unpickle(self, stream: Tensor) -> list[Any]:
        if stream.is_meta:
            return []
        file = io.BytesIO(stream.detach().cpu().contiguous().numpy().tobytes())
        try:
            objects: list[Any] = torch.load(file, map_location=self._map_location, weights_only=False)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except (ImportError, AttributeError) as e:
            raise CheckpointError(
                f"The pickled part of {self._name!r} holds an object whose class is not there any more ({e}). Make the "
                "class importable under its old name, or load without `weights_only=False`."
            ) from e
        except Exception as e:
            raise CheckpointError(
                f"The pickled part of {self._name!r} could not be restored ({type(e).__name__}: {e}). Load without "
                "`weights_only=False` to get all the rest."
            ) from e
        return objects

    def all_of(self, content: Any) -> Any:
        """The value of the whole tree."""
        return self._value(content, self._root, ())

    def _value(self, content: Any, node: _Node, path: Path) -> Any:
        for spec in node.specs:  # an object that is there in full needs no parts
            index = spec.get("pickled")
            if isinstance(index, int) and 0 <= index < len(self._objects):
                return self._objects[index]
        value = self._with_inner(content, node, path) if node.inner and content is not _ABSENT else content
        for spec in node.specs:
            try:
                value = self._made(value, spec, path)
            except Exception as e:
                value = self._not_loaded(spec, path, e)
            if isinstance(value, NotLoaded):
                break
        return value

    def _with_inner(self, content: Any, node: _Node, path: Path) -> Any:
        def inner(key: Any, value: Any) -> Any:
            return self._value(value, node.inner[key], (*path, key)) if key in node.inner else value

        if isinstance(content, dict):
            known = {key: inner(key, value) for key, value in content.items()}
            lacking = [(s.get("at"), key) for key, n in node.inner.items() if key not in content for s in n.specs[:1]]
            items = list(known.items())
            for at, key in sorted((at, key) for at, key in lacking if isinstance(at, int)):
                items.insert(at, (key, inner(key, _ABSENT)))
            made = copy.copy(content)
            made.clear()
            for key, value in items:
                made[key] = value
            return made
        if isinstance(content, list | tuple):
            return type(content)([inner(i, value) for i, value in enumerate(content)])
        return content

    def _made(self, content: Any, spec: Mapping[str, Any], path: Path) -> Any:
        kind, more = spec["kind"], spec.get("more")
        if kind == "set":
            return set(content)
        if kind == "keys":
            keys = unpack_alone(more, self._name, weights_only=True, classes=self._classes)
            names = dict(zip(spec["names"], keys, strict=True))
            made = copy.copy(content)
            made.clear()
            for name, value in content.items():
                made[names[name]] = value
            return made
        if kind == "object":
            return self._not_loaded(spec, path)
        if "class" in spec:
            cls = self._class_of(spec["class"])
            return self._not_loaded(spec, path) if cls is None else make_structure(kind, content, more, cls)
        classes = {tuple(inner): self._class_of(name) for inner, name in spec.get("classes", ())}
        known = {inner: cls for inner, cls in classes.items() if cls is not None}
        return make_kind(kind, content, more, known if len(known) == len(classes) else None)

    def _class_of(self, name: str) -> type | None:
        """The class that the program knows by this name; a script that is now imported has another module name."""
        same = [cls for cls in self._classes if name_of(cls) == name]
        last = name.rpartition(".")[2]
        same = same or [cls for cls in self._classes if cls.__name__ == last]
        return same[0] if len(same) == 1 else None

    # --- what was not loaded ---

    def _not_loaded(self, spec: Mapping[str, Any], path: Path, error: Exception | None = None) -> NotLoaded:
        what = f"{dotted(path)!r} ({spec.get('class', spec['kind'])}) of {self._name!r}"
        argument = path[-1] if len(path) == 2 and str(path[0]).endswith("hyper_parameters") else None
        passed = f", or pass `{argument}=...` to `load_from_checkpoint`" if argument else ""
        if isinstance(error, ImportError):
            reason = f"needs a package that is not installed ({error}). Install it{passed}."
        elif error is not None:
            reason = (
                f"could not be made from what the file says ({type(error).__name__}: {error}). Use the classes and the "
                f"release that it was saved with{passed}."
            )
        elif spec.get("pickled") is not None and self._weights_only is not False:
            reason = (
                "is kept in the pickled part of the file, which a default load never reads, because that can run code. "
                "If you trust the author of the file, pass `weights_only=False`: `fit(..., weights_only=False)`, "
                f"`load_from_checkpoint(..., weights_only=False)`, `fabric.load(..., weights_only=False)`{passed}."
            )
        elif spec["kind"] == "object" or spec.get("pickled") is not None:
            reason = f"could not be pickled, and was left out when the file was saved. Make it anew{passed}."
        else:
            reason = (
                f"is of the class {spec['class']}, which a file cannot name safely. Annotate the argument of "
                f"`__init__` with that class{passed}."
            )
        return NotLoaded(what, f"{what} {reason}")
