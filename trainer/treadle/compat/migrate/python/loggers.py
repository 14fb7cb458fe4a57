"""Loggers that a program gets by their names: those of Lightning's packages are Treadle's one logger."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

import libcst as cst
from libcst.metadata import PositionProvider

from treadle.compat.messages import LOGGER, LOGGERS, OF_RANK_ZERO
from treadle.compat.migrate.findings import Finding
from treadle.compat.migrate.names import Found, Names
from treadle.names.table import PACKAGES

__all__ = ["Loggers"]

_ONE: Final = f"Treadle has one logger, `{LOGGER}`"
_CHILD: Final = f"{_ONE}, and none of a single module: remove the line, or filter messages of `{LOGGER}` by their text."
_NEARLY_ALL: Final = f"{_ONE}: write that, if all messages are meant, or filter messages of `{LOGGER}` by their text."
_SETS: Final = frozenset("setLevel addHandler addFilter".split())
_CONFIGURED: Final = frozenset("level handlers filters propagate".split())
_SETTINGS: Final = frozenset("level handlers filters propagate disabled".split())


class Loggers(cst.CSTVisitor):
    """Visits a program, and notes which names of loggers are to be written otherwise.

    Args:
        names: Finds names.
    """

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, names: Names) -> None:
        super().__init__()
        self.strings: set[cst.CSTNode] = set()
        self.replaced: dict[cst.CSTNode, cst.BaseExpression] = {}
        self.findings: list[Finding] = []
        self._names = names
        self._loops: dict[str, list[cst.SimpleString]] = {}  # strings that a variable goes through
        self._variables: dict[str, cst.BaseExpression] = {}  # what gave a variable its logger
        self._got: list[cst.BaseExpression] = []  # what each call of getLogger is given
        self._set: list[tuple[cst.BaseExpression, str]] = []  # loggers, and what is set on them

    def visit_For(self, node: cst.For) -> None:
        self._loop(node.target, node.iter)

    def visit_CompFor(self, node: cst.CompFor) -> None:
        self._loop(node.target, node.iter)

    def _loop(self, target: cst.BaseExpression, through: cst.BaseExpression) -> None:
        if isinstance(target, cst.Name) and isinstance(through, cst.Tuple | cst.List | cst.Set):
            values = [element.value for element in through.elements]
            self._loops[target.value] = [each for each in values if isinstance(each, cst.SimpleString)]

    def visit_Call(self, node: cst.Call) -> None:
        if (name := _logger(node)) is not None:
            self._got.append(name)
        elif isinstance(node.func, cst.Attribute) and node.func.attr.value in _SETS:
            said = ", ".join(_code(each.value).strip("'\"").removeprefix("logging.") for each in node.args)
            self._set.append((node.func.value, f"{node.func.attr.value} {said}"))

    def visit_Assign(self, node: cst.Assign) -> None:
        for each in node.targets:
            if _logger(node.value) is not None:
                self._variables[_code(each.target)] = node.value
            elif isinstance(each.target, cst.Attribute) and each.target.attr.value in _SETTINGS:
                self._set.append((each.target.value, f"{each.target.attr.value} {_code(node.value)}"))

    def visit_DictElement(self, node: cst.DictElement) -> None:
        if _string(node.key) != "loggers" or not isinstance(node.value, cst.Dict):
            return
        for each in node.value.elements:  # a configuration for logging.config.dictConfig
            if isinstance(each, cst.DictElement) and isinstance(each.value, cst.Dict):
                if _keys(each.value) & _CONFIGURED:
                    self._got.append(each.key)
                    self._set.append((each.key, _code(each.value)))

    def leave_Module(self, original_node: cst.Module) -> None:
        settings: dict[str, set[str]] = defaultdict(set)
        for owner, setting in self._set:
            got = self._variables.get(_code(owner), owner)
            for string in self._of(got if isinstance(got, cst.SimpleString) else _logger(got)):
                settings[_string(string)].add(setting)
        unlike = {name for name, each in settings.items() if name in LOGGERS}
        if len({frozenset(settings[name]) for name in unlike}) < 2:
            unlike = set()
        for string in dict.fromkeys(string for name in self._got for string in self._of(name)):
            self._write(string, sorted(unlike))

    def _of(self, name: cst.BaseExpression | None) -> list[cst.SimpleString]:
        """Return the strings that what getLogger is given stands for."""
        if isinstance(name, cst.SimpleString):
            return [name]
        return self._loops.get(name.value, []) if isinstance(name, cst.Name) else []

    def _write(self, string: cst.SimpleString, unlike: list[str]) -> None:
        value = _string(string)
        found = self._names.find(value)
        if value in unlike:
            others = " and ".join(f"`{each}`" for each in unlike)
            self._list(string, f"{_ONE}, and this program sets {others} differently: write what is meant for all.")
        elif value in LOGGERS:
            self.replaced[string] = string.with_changes(value=f"{string.prefix}{string.quote}{LOGGER}{string.quote}")
        elif value.partition(".")[0] in PACKAGES and (isinstance(found, Found) or (found and found.certain)):
            self._list(string, _NEARLY_ALL if value in OF_RANK_ZERO else _CHILD)
        else:
            return
        self.strings.add(string)

    def _list(self, node: cst.SimpleString, remedy: str) -> None:
        line = self.get_metadata(PositionProvider, node).start.line
        self.findings.append(Finding(line, f"the logger {node.value}", remedy))


def _logger(node: cst.BaseExpression) -> cst.BaseExpression | None:
    """Return what ``getLogger`` is given, for a call of it."""
    if isinstance(node, cst.Call) and node.args:
        called = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
        if isinstance(called, cst.Name) and called.value == "getLogger":
            return node.args[0].value
    return None


def _string(node: cst.BaseExpression) -> str:
    value = node.evaluated_value if isinstance(node, cst.SimpleString) else ""
    return value if isinstance(value, str) else ""


def _keys(node: cst.Dict) -> set[str]:
    return {_string(each.key) for each in node.elements if isinstance(each, cst.DictElement)}


def _code(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node)
