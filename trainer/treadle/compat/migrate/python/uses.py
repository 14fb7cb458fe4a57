"""Where a program uses what its imports bind, and what is to be written there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import libcst as cst
from libcst.metadata import PositionProvider, Scope, ScopeProvider

from treadle.compat.migrate.findings import Finding
from treadle.compat.migrate.names import Found, Missing
from treadle.compat.migrate.python.bindings import Binding, Bindings, Reference, dotted
from treadle.compat.migrate.python.strings import VERSION, Place, rewrite

__all__ = ["Uses"]

_TYPING: Final = frozenset(
    "Annotated Any Callable ClassVar Dict Final FrozenSet Iterable Iterator List Mapping Optional Sequence Set Tuple"
    " Type Union dict frozenset list set tuple type".split()
)
_READS_A_VERSION: Final = frozenset("Version LooseVersion StrictVersion parse parse_version".split())
_CHAIN: Final = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


class Uses(cst.CSTVisitor):
    """Visits a program, and notes which expressions and strings are to be written otherwise.

    Args:
        bindings: What the program's imports bind.
        loggers: Strings that name a logger, and so no module.
    """

    METADATA_DEPENDENCIES = (ScopeProvider, PositionProvider)

    def __init__(self, bindings: Bindings, loggers: Iterable[cst.CSTNode]) -> None:
        super().__init__()
        self.replaced: dict[cst.CSTNode, cst.BaseExpression] = {}
        self.findings: list[Finding] = []
        self._bindings = bindings
        self._places: dict[cst.CSTNode, Place] = {}
        self._types: set[cst.CSTNode] = set()  # strings that are types
        self._text = set(loggers)  # strings that name nothing
        self._annotations = 0
        self._versions = 0  # how many comparisons, or readers of versions, are around

    # --- expressions ---

    def visit_Import(self, node: cst.Import) -> bool:
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        return False

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        if (named := dotted(node)) is None:
            return True
        first, parts = named
        self._use(node, self.get_metadata(ScopeProvider, first, None), parts)
        return False

    def visit_Name(self, node: cst.Name) -> None:
        self._use(node, self.get_metadata(ScopeProvider, node, None), (node.value,))

    def _use(self, node: cst.Attribute | cst.Name, scope: object, parts: tuple[str, ...]) -> None:
        if not isinstance(scope, Scope) or (reference := self._bindings.reference(scope, parts)) is None:
            return
        self._report(node, reference, parts)
        written = self._write(reference, parts)
        if written == parts:
            return
        if "#" in cst.Module([]).code_for_node(node):
            self._list(node, ".".join(parts), f"Write `{'.'.join(written)}`: there is a comment between the names.")
        else:
            expression = cst.parse_expression(".".join(written))
            self.replaced[node] = expression.with_changes(lpar=node.lpar, rpar=node.rpar)

    def _report(self, node: cst.CSTNode, reference: Reference, parts: tuple[str, ...]) -> None:
        usable = [each for each in reference.bindings if isinstance(each.found, Found)]
        if not usable:
            return  # the import is listed
        ours = all(each.ours for each in usable)
        asks = reference.dotted.endswith(".__version__")
        if asks and (self._versions or (not ours and len(parts) > 1)):
            self._list(node, ".".join(parts), VERSION)
        elif isinstance(reference.found, Missing) and not asks:
            self._list(node, ".".join(parts), reference.found.remedy)

    def _write(self, reference: Reference, parts: tuple[str, ...]) -> tuple[str, ...]:
        found = reference.found if isinstance(reference.found, Found) else reference.found.nearest
        if found is None:
            return parts
        for binding in reference.bindings:
            if binding.ours or not isinstance(binding.found, Found) or binding.found.attributes:
                continue
            written, need = self._through(binding, found)
            if need is not None:
                _need(reference.bindings, need)
            return written
        return parts

    def _through(self, binding: Binding, found: Found) -> tuple[tuple[str, ...], str | None]:
        """Return how a name is written by way of a binding, and which module has to be imported beside it."""
        full = (*found.module.split("."), *found.attributes)
        if not binding.kept:
            return full, found.module
        names = self._bindings.names
        start = names.find(binding.local) if binding.plain else binding.found
        assert isinstance(start, Found)
        if found.module == start.module:
            return (binding.local, *found.attributes), None
        if found.module.startswith(f"{start.module}."):
            below = found.module.removeprefix(f"{start.module}.").split(".")
            need = None if names.follows(start.module, found.module) else found.module
            return (binding.local, *below, *found.attributes), need
        return full, found.module

    def _list(self, node: cst.CSTNode, what: str, remedy: str) -> None:
        line = self.get_metadata(PositionProvider, node).start.line
        self.findings.append(Finding(line, f"`{what}`", remedy))

    # --- strings ---

    def visit_Annotation(self, node: cst.Annotation) -> None:
        self._annotations += 1

    def leave_Annotation(self, original_node: cst.Annotation) -> None:
        self._annotations -= 1

    def visit_Comparison(self, node: cst.Comparison) -> None:
        self._versions += 1
        for each in node.comparisons:
            if _last(each.comparator) == "modules" and isinstance(node.left, cst.SimpleString):
                self._places[node.left] = Place("sys.modules")

    def leave_Comparison(self, original_node: cst.Comparison) -> None:
        self._versions -= 1

    def visit_Call(self, node: cst.Call) -> None:
        called = _last(node.func)
        self._versions += called in _READS_A_VERSION
        for index, argument in enumerate(node.args):
            keyword = argument.keyword.value if argument.keyword else ""
            self._places[argument.value] = Place(called, keyword)
            if (called == "cast" and index == 0) or (called == "TypeVar" and (index or keyword)):
                self._types.add(argument.value)

    def leave_Call(self, original_node: cst.Call) -> None:
        self._versions -= _last(original_node.func) in _READS_A_VERSION

    def visit_Subscript(self, node: cst.Subscript) -> None:
        of = _last(node.value)
        for element in node.slice:
            if isinstance(element.slice, cst.Index):
                value = element.slice.value
                if of == "Literal":
                    self._text.add(value)
                elif of == "modules":
                    self._places[value] = Place("sys.modules")
                elif of in _TYPING:
                    self._types.add(value)

    def visit_Expr(self, node: cst.Expr) -> None:
        self._text.add(node.value)  # a docstring

    def visit_ConcatenatedString(self, node: cst.ConcatenatedString) -> None:
        self._text.update((node.left, node.right))

    def visit_FormattedString(self, node: cst.FormattedString) -> None:
        first = node.parts[0] if node.parts else None
        if isinstance(first, cst.FormattedStringText) and len(node.parts) > 1:
            made = rewrite(first.value + "{", self._places.get(node, Place()), self._bindings.names)
            if isinstance(made, Missing):
                self._list(node, cst.Module([]).code_for_node(node), made.remedy)

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        value = node.evaluated_value
        if node in self._text or not isinstance(value, str) or value != node.raw_value:
            return
        if self._annotations or node in self._types:
            new: str | Missing | None = self._type(node, value)
        else:
            new = rewrite(value, self._places.get(node, Place()), self._bindings.names)
        if isinstance(new, Missing):
            self._list(node, node.value, new.remedy)
        elif new is not None and new != value:
            self.replaced[node] = node.with_changes(value=f"{node.prefix}{node.quote}{new}{node.quote}")

    def _type(self, node: cst.SimpleString, value: str) -> str:
        """Return a type in a string with the names that it has in Treadle."""
        scope = self.get_metadata(ScopeProvider, node, None)

        def written(match: re.Match[str]) -> str:
            parts = tuple(match[0].split("."))
            reference = self._bindings.reference(scope, parts) if isinstance(scope, Scope) else None
            if reference is not None:
                self._report(node, reference, parts)
                return ".".join(self._write(reference, parts))
            new = rewrite(match[0], Place(), self._bindings.names)
            return new if isinstance(new, str) else match[0]

        return _CHAIN.sub(written, value)


def _last(node: cst.BaseExpression) -> str:
    if isinstance(node, cst.Attribute):
        return node.attr.value
    return node.value if isinstance(node, cst.Name) else ""


def _need(bindings: Iterable[Binding], module: str) -> None:
    """Note that the last import of a name in each block has to import a module, too."""
    last = {binding.statement.block: binding.statement for binding in bindings if not binding.ours}
    for statement in last.values():
        if module not in statement.needs:
            statement.needs.append(module)
