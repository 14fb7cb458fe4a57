"""Names of Lightning in the values of YAML, JSON, TOML and INI files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import yaml

from treadle.compat.migrate.findings import Finding, Migrated
from treadle.compat.migrate.names import Found, Missing, names
from treadle.compat.migrate.python.strings import Place, rewrite
from treadle.names.older import older

__all__ = ["migrate_ini", "migrate_json", "migrate_toml", "migrate_yaml"]

_JSON_STRING: Final = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?')
_TOML_STRING: Final = re.compile(r"""(?<!["'])(["'])([\w.]+)\1(?!["'])(\s*=)?""")
_NAME: Final = re.compile(
    r"(?<![\w./-])(?:pytorch_lightning|lightning_fabric|lightning\.(?:pytorch|fabric))(?:\.\w+)*(?![\w/-])"
)
_TARGETS: Final = ("_target_", "class_path")


class _Scalar(NamedTuple):
    """A value of a YAML file, and where it lies in the text."""

    value: str
    start: int
    end: int
    line: int


def migrate_yaml(text: str) -> Migrated:
    """Rewrite the values of a YAML file that are names of Lightning; keys and comments stay."""
    try:
        documents = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if node is not None]
    except (yaml.YAMLError, ValueError):
        return Migrated(text, list(_by_line(text, "#")))  # a template, perhaps
    pieces, at = [], 0
    findings = [finding for node in documents for finding in _outdated(node)]
    for scalar in sorted({each for node in documents for each in _scalars(node, set())}, key=lambda s: s.start):
        new = rewrite(scalar.value, Place(), names())
        written = text[scalar.start : scalar.end]
        if isinstance(new, Missing):
            findings.append(Finding(scalar.line, f"`{scalar.value}`", new.remedy))
        elif new is not None and scalar.value in written:
            pieces += [text[at : scalar.start], written.replace(scalar.value, new)]
            at = scalar.end
    return Migrated("".join((*pieces, text[at:])), sorted(findings))


def _scalars(node: Any, seen: set[int]) -> Iterator[_Scalar]:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        yield _Scalar(node.value, node.start_mark.index, node.end_mark.index, node.start_mark.line + 1)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _scalars(value, seen)
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _scalars(value, seen)


def _outdated(node: Any, key: str = "") -> Iterator[Finding]:
    """Yield what an argument of Lightning 1 is written as today, for a mapping that makes an object of a class."""
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _outdated(value)
    if not isinstance(node, yaml.MappingNode):
        return
    values = {name.value: value for name, value in node.value if isinstance(name, yaml.ScalarNode)}
    called = "Trainer" if key == "trainer" else ""
    for target in _TARGETS:
        found = names().find(values[target].value) if isinstance(values.get(target), yaml.ScalarNode) else None
        if isinstance(found, Found) and found.attributes:
            called = found.attributes[-1]
    given = values.get("init_args", node)
    for name, value in given.value if called and isinstance(given, yaml.MappingNode) else ():
        remedy = older().argument(called, str(name.value))
        if not remedy and isinstance(value, yaml.ScalarNode):
            remedy = older().value(called, str(name.value), value.value)
        if remedy:
            what = f"`{name.value}` of {called}"
            yield Finding(name.start_mark.line + 1, what, f"In a program: {remedy}.")
    for name, value in node.value:
        yield from _outdated(value, str(name.value))


def migrate_json(text: str) -> Migrated:
    """Rewrite the values of a JSON file that are names of Lightning; keys stay."""
    return _quoted(text, _JSON_STRING, group=1)


def migrate_toml(text: str) -> Migrated:
    """Rewrite the values of a TOML file that are names of Lightning, and list the values that contain one."""
    done = _quoted(text, _TOML_STRING, group=2)
    return Migrated(done.text, sorted({*done.findings, *_by_line(done.text, "#")}))


def migrate_ini(text: str) -> Migrated:
    """List the names of Lightning in an INI file, where only the program that reads it knows what is a value."""
    return Migrated(text, list(_by_line(text, "#;")))


def _quoted(text: str, pattern: re.Pattern[str], group: int) -> Migrated:
    findings = []

    def written(match: re.Match[str]) -> str:
        value = match[group]
        new = None if match[group + 1] else rewrite(value, Place(), names())
        if isinstance(new, Missing):
            findings.append(Finding(text.count("\n", 0, match.start()) + 1, f"`{value}`", new.remedy))
        return match[0].replace(value, new) if isinstance(new, str) else match[0]

    return Migrated(pattern.sub(written, text), findings)


def _by_line(text: str, comments: str) -> Iterator[Finding]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip()[:1] in tuple(comments):
            continue
        for match in _NAME.finditer(line):
            found = names().find(match[0])
            remedy = f"Write `{found.dotted}`." if isinstance(found, Found) else found.remedy if found else ""
            yield Finding(number, f"`{match[0]}`", remedy)
