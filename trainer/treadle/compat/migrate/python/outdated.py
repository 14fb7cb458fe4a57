"""What a program has of Lightning 1: arguments, methods and attributes that Lightning 2 calls otherwise or lacks."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import libcst as cst
from libcst.metadata import PositionProvider, Scope, ScopeProvider

from treadle.compat.migrate.findings import Finding
from treadle.compat.migrate.names import Found
from treadle.compat.migrate.python.bindings import Bindings, dotted
from treadle.names.older import Older
from treadle.names.table import PACKAGES

__all__ = ["Outdated", "Project", "read_project"]

_HPARAMS: Final = "write `self.save_hyperparameters(...)`: what it is given is found in self.hparams"
_ORIGINS: Final = frozenset((*PACKAGES, "treadle", "treadle_fabric"))


class Project(NamedTuple):
    """What is known of all programs of a project, by the names of classes and methods alone.

    Args:
        heirs: For each class that derives from one of Lightning's, that one's name.
        called: Methods that classes call themselves, so that their names say nothing of Lightning 1.
    """

    heirs: Mapping[str, str]
    called: frozenset[str]


def read_project(programs: Iterable[str], older: Older) -> Project:
    """Read the programs of a project. One that is no Python has nothing to tell."""
    above: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    called: set[str] = set()
    for program in programs:
        try:
            nodes = list(ast.walk(ast.parse(program)))
        except (SyntaxError, ValueError):
            continue
        imported = dict(pair for node in nodes for pair in _imported(node))
        for node in (each for each in nodes if isinstance(each, ast.ClassDef)):
            for base in node.bases:
                first, _, rest = ast.unparse(base).partition("[")[0].partition(".")
                origin = f"{imported.get(first, '')}.{rest}".strip(".").split(".")
                if origin[0] in _ORIGINS and origin[-1] in older.bases:
                    found[node.name] = origin[-1]
                above.setdefault(node.name, []).append((rest or first).rpartition(".")[2])
            called.update(name for name in _called(node, older))
    while new := {
        name: found[base] for name, names in above.items() if name not in found for base in names if base in found
    }:
        found |= new
    return Project(found, frozenset(called))


def _called(node: ast.ClassDef, older: Older) -> Iterator[str]:
    """Yield what the methods of a class call of ``self``, those apart that only Lightning 1 called."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not any(older.method(base, method.name) for base in older.bases):
            for each in ast.walk(method):
                match each:
                    case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)):
                        yield name


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the names that an import binds, and the dotted names of what it imports."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            local = alias.asname or alias.name.partition(".")[0]
            yield local, alias.name if alias.asname else local
    elif isinstance(node, ast.ImportFrom) and not node.level:
        for alias in node.names:
            yield alias.asname or alias.name, f"{node.module}.{alias.name}"


class Outdated(cst.CSTVisitor):
    """Visits a program, notes which arguments of Lightning 1 are to be written otherwise, and lists what else it had.

    Args:
        bindings: What the program's imports bind.
        older: What Lightning 1 had.
        project: What is known of all programs of the project.
    """

    METADATA_DEPENDENCIES = (ScopeProvider, PositionProvider)

    def __init__(self, bindings: Bindings, older: Older, project: Project) -> None:
        super().__init__()
        self.replaced: dict[cst.Arg, list[cst.Arg]] = {}
        self.findings: list[Finding] = []
        self._bindings = bindings
        self._older = older
        self._heirs = dict(project.heirs)
        self._called = project.called
        self._classes: list[str] = []  # of each class around, what it derives from
        self._own: list[set[str]] = []  # what each class around defines, or assigns to itself
        self._trainers: set[str] = set()  # variables that Trainer(...) gave
        self._parameters: list[set[str]] = []

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        base = next((kind for each in node.bases if (kind := self._kind(each.value))), "")
        if base:
            self._heirs[node.name.value] = base
        self._classes.append(base)
        own = _Own()
        node.body.visit(own)
        self._own.append(own.names)

    def leave_ClassDef(self, original_node: cst.ClassDef) -> None:
        self._classes.pop()
        self._own.pop()

    def _kind(self, node: cst.BaseExpression) -> str:
        """Return the class of Lightning that a base class is or derives from; empty: it does not."""
        name = self._class(node)
        if name in self._older.bases and self._is_of_lightning(node):
            return name
        return self._heirs.get(name, "")

    def _class(self, node: cst.BaseExpression) -> str:
        """Return the name of a class: that of Lightning's where the program imports it by another."""
        if isinstance(node, cst.Subscript):
            node = node.value
        named = dotted(node)
        if named is None:
            return ""
        scope = self.get_metadata(ScopeProvider, named[0], None)
        reference = self._bindings.reference(scope, named[1]) if isinstance(scope, Scope) else None
        if reference is not None and isinstance(reference.found, Found) and reference.found.attributes:
            return reference.found.attributes[-1]
        return named[1][-1]

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        parameters = (*node.params.posonly_params, *node.params.params, *node.params.kwonly_params)
        names = [each.name.value for each in parameters]
        self._parameters.append(set(names))
        if not self._classes or not (base := self._classes[-1]) or len(self._parameters) > 1:
            return
        method = node.name.value
        if method not in self._called and (remedy := self._older.method(base, method)):
            self._list(node.name, f"`def {method}`", remedy)
        for name in names:
            if remedy := self._older.parameter(base, method, name):
                self._list(node.name, f"`{name}` of `{method}`", remedy)

    def leave_FunctionDef(self, original_node: cst.FunctionDef) -> None:
        self._parameters.pop()

    def visit_Assign(self, node: cst.Assign) -> None:
        for each in node.targets:
            target = each.target
            if isinstance(target, cst.Name) and isinstance(node.value, cst.Call):
                if self._class(node.value.func) == "Trainer" and self._is_of_lightning(node.value.func):
                    self._trainers.add(target.value)
            elif self._base() == "LightningModule" and _reads_self(target, "hparams"):
                self._list(node, "`self.hparams = `", _HPARAMS)

    def visit_Call(self, node: cst.Call) -> None:
        called = ""
        if self._is_of_lightning(node.func):
            called = self._class(node.func)
        elif isinstance(node.func, cst.Attribute) and self._is_trainer(node.func.value):
            called = node.func.attr.value
        if not called:
            return
        self.replaced |= self._renamed(called, node.args)
        for argument in node.args:
            name = argument.keyword.value if argument.keyword else ""
            if argument in self.replaced:
                continue
            if remedy := self._older.argument(called, name):
                self._list(argument, f"`{called}({name}=)`", remedy)
            elif isinstance(argument.value, cst.SimpleString):
                value = str(argument.value.evaluated_value)
                if remedy := self._older.value(called, name, value):
                    self._list(argument, f'`{called}({name}="{value}")`', remedy)

    def _renamed(self, called: str, arguments: Sequence[cst.Arg]) -> dict[cst.Arg, list[cst.Arg]]:
        """Return what takes the place of arguments that Lightning 2 calls otherwise, where that is certain."""
        if any(each.keyword is None for each in arguments):
            return {}  # by position or from a dict: what is given otherwise cannot be known
        renamed: dict[cst.Arg, list[cst.Arg]] = {}
        for each in arguments:
            assert each.keyword is not None
            if new := self._older.renamed(called, each.keyword.value, _literal(each.value)):
                call = cst.parse_expression(f"f({new})")
                assert isinstance(call, cst.Call)
                renamed[each] = [one.with_changes(equal=each.equal) for one in call.args]
        while True:  # one that stays as it is may be in the way of another
            given = [_keyword(one) for each in arguments for one in renamed.get(each, [each])]
            twice = [each for each, new in renamed.items() if any(given.count(_keyword(one)) > 1 for one in new)]
            if not twice:
                return renamed
            for each in twice:
                del renamed[each]

    def visit_Attribute(self, node: cst.Attribute) -> None:
        name = node.attr.value
        if self._is_trainer(node.value):
            if remedy := self._older.attribute("Trainer", name):
                self._list(node, f"`trainer.{name}`", remedy)
        elif self._base() and _reads_self(node, name) and name not in self._own[-1]:
            if remedy := self._older.attribute(self._base(), name):
                self._list(node, f"`self.{name}`", remedy)

    def _base(self) -> str:
        return self._classes[-1] if self._classes else ""

    def _is_of_lightning(self, node: cst.BaseExpression) -> bool:
        if isinstance(node, cst.Subscript):
            node = node.value
        named = dotted(node)
        if named is None:
            return False
        scope = self.get_metadata(ScopeProvider, named[0], None)
        return isinstance(scope, Scope) and self._bindings.reference(scope, named[1]) is not None

    def _is_trainer(self, node: cst.BaseExpression) -> bool:
        if isinstance(node, cst.Name):
            given = bool(self._base()) and any(node.value in names for names in self._parameters)
            return node.value in self._trainers or (node.value == "trainer" and given)
        return bool(self._base()) and _reads_self(node, "trainer")

    def _list(self, node: cst.CSTNode, what: str, remedy: str) -> None:
        line = self.get_metadata(PositionProvider, node).start.line
        self.findings.append(Finding(line, what, f"{remedy[0].upper()}{remedy[1:]}."))


class _Own(cst.CSTVisitor):
    """Collects what a class defines, and what its methods assign to ``self``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self.names.add(node.name.value)

    def visit_AssignTarget(self, node: cst.AssignTarget) -> None:
        if isinstance(node.target, cst.Attribute) and _reads_self(node.target, node.target.attr.value):
            self.names.add(node.target.attr.value)


def _keyword(node: cst.Arg) -> str:
    return node.keyword.value if node.keyword else ""


def _literal(node: cst.BaseExpression) -> object:
    """Return the value of a literal; ``...`` for any other expression."""
    try:
        return ast.literal_eval(cst.Module([]).code_for_node(node))
    except (ValueError, SyntaxError):
        return ...


def _reads_self(node: cst.BaseExpression, name: str) -> bool:
    return (
        isinstance(node, cst.Attribute)
        and node.attr.value == name
        and isinstance(node.value, cst.Name)
        and node.value.value == "self"
    )
