"""Which names of a program stand for something of Lightning, in which scope."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import libcst as cst
from libcst.metadata import ImportAssignment, PositionProvider, Scope, ScopeProvider

from treadle.compat.migrate.names import Found, Missing, Names
from treadle.names.table import PACKAGES

__all__ = ["Binding", "Bindings", "Reference", "Statement", "dotted"]

_TREADLE: Final = ("treadle", "treadle_fabric")


@dataclass(eq=False)
class Statement:
    """An import statement that binds names of Lightning, or of Treadle."""

    node: cst.Import | cst.ImportFrom
    line: int
    block: cst.CSTNode  # the suite of statements that it is in
    scope: Scope
    module_level: bool
    bindings: dict[str, Binding] = field(default_factory=dict)  # by the local name
    needs: list[str] = field(default_factory=list)  # modules of Treadle that its uses need beside what it imports


@dataclass(eq=False)
class Binding:
    """A local name that an import gives something of Lightning, or of Treadle."""

    local: str
    alias: cst.ImportAlias
    imported: str  # what the statement names
    found: Found | Missing
    statement: Statement
    plain: bool  # `import lightning.pytorch`, which binds `lightning`
    kept: bool = True  # whether the local name stays; a plain one's becomes the package's of Treadle otherwise

    @property
    def origin(self) -> str:
        """The dotted name that the local name stands for."""
        return self.local if self.plain else self.imported

    @property
    def ours(self) -> bool:
        """Whether it is a name of Treadle already."""
        return self.imported.partition(".")[0] in _TREADLE


class Reference(NamedTuple):
    """What a dotted expression means."""

    bindings: tuple[Binding, ...]
    mixed: bool  # whether something else may be bound to the name, too
    dotted: str  # the full name, of Lightning or of Treadle
    found: Found | Missing


def dotted(node: cst.BaseExpression) -> tuple[cst.Name, tuple[str, ...]] | None:
    """Return the first name of a dotted expression, and all its parts; None for any other expression."""
    parts: list[str] = []
    while isinstance(node, cst.Attribute):
        parts.append(node.attr.value)
        node = node.value
    return (node, (node.value, *reversed(parts))) if isinstance(node, cst.Name) else None


class Bindings(cst.CSTVisitor):
    """The import statements of a program that name Lightning or Treadle; visit the program with it.

    Args:
        names: Finds names.
    """

    METADATA_DEPENDENCIES = (ScopeProvider, PositionProvider)

    def __init__(self, names: Names) -> None:
        super().__init__()
        self.names = names
        self.statements: dict[cst.CSTNode, Statement] = {}
        self.stars: list[Statement] = []
        self.fixed: set[str] = set()  # names that `global`, `nonlocal` or `__all__` says, so that they stay
        self._blocks: list[cst.CSTNode] = []

    def visit_Module(self, node: cst.Module) -> None:
        self._blocks.append(node)

    def visit_IndentedBlock(self, node: cst.IndentedBlock) -> None:
        self._blocks.append(node)

    def leave_IndentedBlock(self, original_node: cst.IndentedBlock) -> None:
        self._blocks.pop()

    def visit_NameItem(self, node: cst.NameItem) -> None:
        self.fixed.add(node.name.value)

    def visit_Assign(self, node: cst.Assign) -> None:
        targets = [t.target.value for t in node.targets if isinstance(t.target, cst.Name)]
        if "__all__" in targets and isinstance(node.value, cst.List | cst.Tuple):
            for element in node.value.elements:
                if isinstance(element.value, cst.SimpleString):
                    self.fixed.add(str(element.value.evaluated_value))

    def visit_Import(self, node: cst.Import) -> None:
        statement = self._statement(node)
        for alias in node.names:
            imported = alias.evaluated_name
            local = alias.evaluated_alias
            plain = local is None
            self._bind(statement, alias, imported, local or imported.partition(".")[0], plain)

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        if node.relative or node.module is None or (named := dotted(node.module)) is None:
            return
        module = ".".join(named[1])
        statement = self._statement(node)
        if isinstance(node.names, cst.ImportStar):
            if module.partition(".")[0] in PACKAGES:
                self.stars.append(statement)
                self.statements[node] = statement
            return
        for alias in node.names:
            name = alias.evaluated_name
            self._bind(statement, alias, f"{module}.{name}", alias.evaluated_alias or name, plain=False)

    def _statement(self, node: cst.Import | cst.ImportFrom) -> Statement:
        scope = self.get_metadata(ScopeProvider, node)
        line = self.get_metadata(PositionProvider, node).start.line
        assert isinstance(scope, Scope)
        return Statement(node, line, self._blocks[-1], scope, scope is scope.globals)

    def _bind(self, statement: Statement, alias: cst.ImportAlias, imported: str, local: str, plain: bool) -> None:
        found = self.names.find(imported)
        if found is None:
            return
        statement.bindings[local if not plain else imported] = Binding(local, alias, imported, found, statement, plain)
        self.statements[statement.node] = statement

    def all(self) -> Iterator[Binding]:
        """Yield every binding."""
        for statement in self.statements.values():
            yield from statement.bindings.values()

    def decide_names(self) -> None:
        """Decide which local names change: those of plain imports that nothing else has a say in."""
        groups: dict[tuple[int, str], list[Binding]] = defaultdict(list)
        for binding in self.all():
            if binding.plain and not binding.ours:
                groups[id(binding.statement.scope), binding.local].append(binding)
        for (_, local), bindings in groups.items():
            scope = bindings[0].statement.scope
            package = self.names.find(local)
            fixed = (
                not isinstance(package, Found)
                or local in self.fixed
                or self._others(scope, local)
                or self._others(scope, package.module)
            )
            for binding in bindings:
                binding.kept = fixed

    def _others(self, scope: Scope, name: str) -> bool:
        """Whether something else than an import of Lightning or Treadle is bound to a name in a scope."""
        return any(
            not isinstance(each, ImportAssignment) or each.node not in self.statements
            for each in scope.assignments[name]
        )

    def reference(self, scope: Scope | None, parts: Sequence[str]) -> Reference | None:
        """Return what a dotted expression means in a scope.

        Returns:
            None where its first name stands for nothing of Lightning or Treadle.
        """
        if scope is None:
            return None
        assignments = scope[parts[0]]
        bindings = [
            binding
            for each in assignments
            if isinstance(each, ImportAssignment) and (statement := self.statements.get(each.node))
            for binding in statement.bindings.values()
            if binding.local == parts[0]
        ]
        if not bindings:
            return None
        bindings.sort(key=lambda each: each.statement.line)
        candidates = []
        for binding in bindings:
            full = ".".join((binding.origin, *parts[1:]))
            if (found := self.names.find(full)) is not None:
                candidates.append((full, found))
        full, found = next((c for c in candidates if isinstance(c[1], Found)), candidates[0])
        mixed = any(not isinstance(a, ImportAssignment) or a.node not in self.statements for a in assignments)
        return Reference(tuple(bindings), mixed, full, found)
