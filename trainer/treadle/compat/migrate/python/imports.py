"""Import statements for Treadle, in the place of those for Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import libcst as cst

from treadle.compat.migrate.findings import Finding
from treadle.compat.migrate.names import Found, Missing
from treadle.compat.migrate.python.bindings import Binding, Bindings, Statement
from treadle.compat.migrate.python.strings import VERSION

__all__ = ["Imports"]

_LINE: Final = 100  # columns within which a statement is written on one line
_PLAIN: Final = cst.Module([])
_COMMA: Final = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
_NONE: Final = cst.MaybeSentinel.DEFAULT


class _Item(NamedTuple):
    """One name of a new statement: `from module import name as local`, or without a name, `import module as local`."""

    module: str
    name: str | None
    local: str
    alias: cst.ImportAlias


class Imports:
    """Writes the import statements of a program anew.

    Args:
        bindings: What the program's imports bind, with what its uses need.
        free: Names of the program that nothing binds, so that an ``import *`` may.
    """

    def __init__(self, bindings: Bindings, free: frozenset[str]) -> None:
        self.findings: list[Finding] = []
        self._names = bindings.names
        self._statements = list(bindings.statements.values())
        self._free = free
        self.replaced: dict[cst.CSTNode, list[cst.BaseSmallStatement]] = {}
        for statement in self._statements:
            self._replace(statement, star=statement in bindings.stars)

    def _replace(self, statement: Statement, *, star: bool) -> None:
        for binding in statement.bindings.values():
            if isinstance(binding.found, Missing):
                self.findings.append(Finding(statement.line, f"`{binding.imported}`", binding.found.remedy))
            elif binding.imported.endswith(".__version__") and not binding.ours:
                self.findings.append(Finding(statement.line, f"`{binding.imported}`", VERSION))
        if isinstance(statement.node, cst.Import):
            new: list[cst.BaseSmallStatement] = [self._plain(statement, statement.node)]
        elif star:
            new = self._star(statement, statement.node)
        else:
            new = self._from(statement, statement.node)
        new += [_import(need) for need in statement.needs if not self._is_there(statement, need)]
        if [_code(each) for each in new] != [_code(statement.node)]:
            self.replaced[statement.node] = new

    def _is_there(self, statement: Statement, need: str) -> bool:
        """Whether a module is reached by a plain import of the same block, or of the module's own."""
        for other in self._statements:
            if other.block is not statement.block and not (other.module_level and isinstance(other.block, cst.Module)):
                continue
            for binding in other.bindings.values():
                if binding.plain and not binding.kept and isinstance(binding.found, Found):
                    module = binding.found.module
                    package = module.partition(".")[0]
                    if f"{module}.".startswith(f"{need}."):
                        return True
                    if need.startswith(f"{package}.") and self._names.follows(package, need):
                        return True
        return False

    # --- import a.b as c ---

    def _plain(self, statement: Statement, node: cst.Import) -> cst.Import:
        aliases = []
        for alias in node.names:
            found = next((b for b in statement.bindings.values() if b.alias is alias), None)
            aliases.append(alias if found is None else self._plain_alias(found, alias))
        return node.with_changes(names=aliases)

    def _plain_alias(self, binding: Binding, alias: cst.ImportAlias) -> cst.ImportAlias:
        found = binding.found if isinstance(binding.found, Found) else None
        if binding.plain and binding.kept and not binding.ours:
            package = self._names.find(binding.local)
            if isinstance(package, Found):
                return alias.with_changes(name=_expression(package.module), asname=_as(binding.local))
        if found is None or found.attributes:
            return alias
        return alias.with_changes(name=_expression(found.module))

    # --- from a.b import c as d ---

    def _star(self, statement: Statement, node: cst.ImportFrom) -> list[cst.BaseSmallStatement]:
        assert node.module is not None
        module = _code(node.module)
        home = self._names.find(module)
        if not isinstance(home, Found) or home.attributes:
            remedy = home.remedy if isinstance(home, Missing) else "import its names one by one"
            self.findings.append(Finding(statement.line, f"`from {module} import *`", remedy))
            return [node]
        new: list[cst.BaseSmallStatement] = [node.with_changes(module=_expression(home.module))]
        for name in sorted(self._free):
            found = self._names.find(f"{module}.{name}")
            if isinstance(found, Missing) and found.named:
                self.findings.append(Finding(statement.line, f"`{module}.{name}`", found.remedy))
            elif isinstance(found, Found) and found != Found(home.module, (name,)):
                alias = cst.ImportAlias(cst.Name(name))
                new += _statements(node, [self._item(name, found, alias)])
        return new

    def _item(self, local: str, found: Found, alias: cst.ImportAlias) -> _Item:
        if found.attributes:
            return _Item(".".join((found.module, *found.attributes[:-1])), found.attributes[-1], local, alias)
        package, _, name = found.module.rpartition(".")
        return _Item(package, name, local, alias) if package else _Item(found.module, None, local, alias)

    def _from(self, statement: Statement, node: cst.ImportFrom) -> list[cst.BaseSmallStatement]:
        assert not isinstance(node.names, cst.ImportStar) and node.module is not None
        kept = _code(node.module)
        items = []
        for alias in node.names:
            binding = next((b for b in statement.bindings.values() if b.alias is alias), None)
            if binding is None or isinstance(binding.found, Missing) or binding.ours:
                items.append(_Item(kept, alias.evaluated_name, alias.evaluated_alias or alias.evaluated_name, alias))
            else:
                items.append(self._item(binding.local, binding.found, alias))
        return _statements(node, items)


def _statements(node: cst.ImportFrom, items: Sequence[_Item]) -> list[cst.BaseSmallStatement]:
    """Write names in the style of a statement: one statement for each module that they are in."""
    groups: dict[str | int, list[_Item]] = {}
    for at, item in enumerate(items):
        groups.setdefault(at if item.name is None else item.module, []).append(item)
    if len(groups) == 1 and all(item.name is not None for item in items):
        whole = [_from_alias(item) for item in items]
        return [node.with_changes(module=_expression(items[0].module), names=whole)]
    return [_group(node, group) for group in groups.values()]


def _group(node: cst.ImportFrom, items: Sequence[_Item]) -> cst.BaseSmallStatement:
    first = items[0]
    if first.name is None:
        return cst.Import([cst.ImportAlias(_expression(first.module), _as(first.local, unless=first.module))])
    aliases = [_from_alias(item) for item in items]
    short = node.with_changes(
        module=_expression(first.module),
        names=[alias.with_changes(comma=_COMMA if at < len(aliases) else _NONE) for at, alias in enumerate(aliases, 1)],
        lpar=None,
        rpar=None,
    )
    if node.lpar is None or node.rpar is None or not (_comments(node, items) or len(_code(short)) > _LINE):
        return short
    return _in_lines(node, items, short.with_changes(names=aliases, lpar=node.lpar, rpar=node.rpar))


def _comments(node: cst.ImportFrom, items: Sequence[_Item]) -> bool:
    """Whether there are comments in parentheses that go with some of a statement's names."""
    assert not isinstance(node.names, cst.ImportStar) and node.lpar is not None and node.rpar is not None
    there: list[cst.CSTNode] = [item.alias for item in items]
    there += [node.lpar] if items[0].alias is node.names[0] else []
    there += [node.rpar] if items[-1].alias is node.names[-1] else []
    return any("#" in _code(each) for each in there)


def _in_lines(node: cst.ImportFrom, items: Sequence[_Item], new: cst.ImportFrom) -> cst.ImportFrom:
    """Let the parenthesis close as it did, after a name that was not the last one."""
    assert not isinstance(node.names, cst.ImportStar) and not isinstance(new.names, cst.ImportStar)
    last = new.names[-1]
    if items[-1].alias is node.names[-1] or not isinstance(last.comma, cst.Comma) or new.rpar is None:
        return new
    after = last.comma.whitespace_after
    if not isinstance(after, cst.ParenthesizedWhitespace):
        return new.with_changes(names=[*new.names[:-1], last.with_changes(comma=_NONE)])
    end = node.names[-1].comma
    there = end.whitespace_after if isinstance(end, cst.Comma) else new.rpar.whitespace_before
    column = there.last_line if isinstance(there, cst.ParenthesizedWhitespace) else cst.SimpleWhitespace("")
    comma = last.comma.with_changes(whitespace_after=after.with_changes(last_line=column))
    return new.with_changes(
        names=[*new.names[:-1], last.with_changes(comma=comma)],
        rpar=new.rpar.with_changes(whitespace_before=cst.SimpleWhitespace("")),
    )


def _from_alias(item: _Item) -> cst.ImportAlias:
    assert item.name is not None
    asname = item.alias.asname or _as(item.local, unless=item.name)
    return item.alias.with_changes(name=cst.Name(item.name), asname=asname)


def _as(local: str, unless: str = "") -> cst.AsName | None:
    return None if local == unless else cst.AsName(cst.Name(local))


def _import(module: str) -> cst.Import:
    return cst.Import([cst.ImportAlias(_expression(module))])


def _expression(name: str) -> cst.Name | cst.Attribute:
    parsed = cst.parse_expression(name)
    assert isinstance(parsed, cst.Name | cst.Attribute)
    return parsed


def _code(node: cst.CSTNode) -> str:
    return _PLAIN.code_for_node(node)
