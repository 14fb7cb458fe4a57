"""Where a project says that it needs Lightning installed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, Final

from treadle.compat.migrate.findings import Finding

__all__ = ["dependencies", "installs"]

_PACKAGE: Final = r"(?P<name>pytorch[-_]lightning|lightning[-_]fabric|lightning)(?P<extras>\[[^\]]*\])?"
_END: Final = r"(?=\s*(?:$|[<>=!~;@#,\"']))"
_REQUIREMENT: Final = re.compile(rf"\s*{_PACKAGE}{_END}", re.IGNORECASE)
_CONDA: Final = re.compile(rf"\s*-\s*[\"']?(?:[\w-]+::)?{_PACKAGE}(?=\s*(?:$|[<>=!~;#\"'\[]))", re.IGNORECASE)
_QUOTED: Final = re.compile(rf"[\"']{_PACKAGE}{_END}[^\"']*[\"']", re.IGNORECASE)
_KEY: Final = re.compile(rf"[\"']?{_PACKAGE}[\"']?\s*=", re.IGNORECASE)
_INSTALLS: Final = re.compile(r"\b(?:pip3?|uv|conda|mamba|poetry|pixi|pdm)\b.*\b(?:install|add)\b", re.IGNORECASE)
_WORD: Final = re.compile(rf"(?<![\w./-]){_PACKAGE}(?![\w./-])", re.IGNORECASE)
_MANIFESTS: Final = ("pyproject.toml", "pixi.toml", "Pipfile")


def dependencies(path: PurePath, text: str) -> list[Finding]:
    """List the lines of a file in which a project asks for Lightning; none in a file that lists no dependencies."""
    return list(_lines(path, text))


def installs(text: str) -> list[Finding]:
    """List the commands of a script, or of a notebook, that install Lightning."""
    return [
        _finding(number, match)
        for number, line in enumerate(text.splitlines(), 1)
        if _INSTALLS.search(line)
        for match in _WORD.finditer(line)
    ]


def _lines(path: PurePath, text: str) -> Iterator[Finding]:
    name, suffix = path.name.lower(), path.suffix.lower()
    if path.name in _MANIFESTS:
        yield from _in_manifest(text)
    elif suffix in (".txt", ".in") and ({"require", "constraint", "deps"} & _words(path)):
        yield from _matching(_REQUIREMENT, text)
    elif suffix in (".yml", ".yaml") and ({"env", "environment", "conda", "meta"} & _words(path)):
        yield from _matching(_CONDA, text)
    elif name == "setup.py":
        yield from (
            f for f in _matching(_QUOTED, text, anywhere=True) if "keywords" not in text.splitlines()[f.line - 1]
        )
    elif name == "setup.cfg":
        yield from _matching(re.compile(rf"(?:install_requires\s*=)?{_REQUIREMENT.pattern}", re.IGNORECASE), text)
    elif name in ("dockerfile", "makefile") or suffix in (".sh", ".dockerfile"):
        yield from installs(text)


def _words(path: PurePath) -> set[str]:
    """Return the words of a file's name and of its folder's, without their plural."""
    words = re.split(r"[\W_]+", f"{path.parent.name} {path.stem}".lower())
    return {"require" if word.startswith("require") else word.removesuffix("s") for word in words} | set(words)


def _matching(pattern: re.Pattern[str], text: str, *, anywhere: bool = False) -> Iterator[Finding]:
    for number, line in enumerate(text.splitlines(), 1):
        if match := pattern.search(line) if anywhere else pattern.match(line):
            yield _finding(number, match)


def _in_manifest(text: str) -> Iterator[Finding]:
    """Look only where dependencies are: a keyword of the project may be the same word."""
    try:
        parsed = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    wanted = set(_requirements(parsed))
    for number, line in enumerate(text.splitlines(), 1):
        for match in (*_QUOTED.finditer(line), *_KEY.finditer(line)):
            if not line.lstrip().startswith(("#", "keywords")) and match["name"].lower() in wanted:
                yield _finding(number, match)
                break


def _requirements(tree: Any, under: str = "") -> Iterator[str]:
    """Yield the packages of Lightning that the lists and tables of dependencies in a parsed file name."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if "dependencies" in under and (match := _REQUIREMENT.match(key)):
                yield match["name"].lower()
            yield from _requirements(value, f"{under}.{key}")
    elif isinstance(tree, list) and re.search("dependenc|requires|dependency-groups", under):
        for each in tree:
            if isinstance(each, str) and (match := _REQUIREMENT.match(each)):
                yield match["name"].lower()


def _finding(line: int, match: re.Match[str]) -> Finding:
    fabric = "fabric" in match["name"].lower()
    extras = ["trainer"] if not fabric else []
    if match["extras"]:
        extras.append("cli")  # jsonargparse is in each of Lightning's
    needed = f"treadle[{','.join(extras)}]" if extras else "treadle"
    beside = "" if fabric else ", and `torchmetrics` where the code imports it"
    return Finding(line, f"`{match['name']}{match['extras'] or ''}`", f"Write `{needed}`{beside}.")
