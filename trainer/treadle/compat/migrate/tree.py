"""Walks over the files of a project, and writes them anew where something changed."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shutil
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from treadle.compat.migrate.configs import migrate_ini, migrate_json, migrate_toml, migrate_yaml
from treadle.compat.migrate.dependencies import dependencies
from treadle.compat.migrate.findings import Finding, Migrated
from treadle.compat.migrate.notebooks import migrate_notebook, programs
from treadle.compat.migrate.python.outdated import Project, read_project
from treadle.compat.migrate.python.source import migrate_source
from treadle.names.older import older
from treadle_fabric import MisconfigurationException

__all__ = ["Outcome", "Tree"]

_CONFIGS: Final = {
    ".yaml": migrate_yaml,
    ".yml": migrate_yaml,
    ".json": migrate_json,
    ".toml": migrate_toml,
    ".cfg": migrate_ini,
    ".ini": migrate_ini,
}
_PYTHON: Final = (".py", ".pyi", ".pyw")
_OTHERS: Final = (".ipynb", ".txt", ".in", ".sh", ".dockerfile")
_NAMED: Final = ("Dockerfile", "Makefile", "Pipfile")
_OF_RUNS: Final = ("lightning_logs", "mlruns", "__pycache__", "node_modules", "site-packages")
_MENTIONS: Final = re.compile(rb"lightning|treadle", re.IGNORECASE)
_LARGEST: Final = 20 * 2**20  # bytes of a file that is no program: a larger one is data


@dataclass(frozen=True)
class Outcome:
    """What became of one file.

    Args:
        path: The file.
        before: Its content.
        after: Its content for Treadle.
        findings: What is left to do in it.
        unread: Whether it was left alone, because it could not be read or written.
    """

    path: Path
    before: bytes = b""
    after: bytes = b""
    findings: list[Finding] = field(default_factory=list)
    unread: bool = False

    @property
    def changed(self) -> bool:
        """Whether the file is another one for Treadle."""
        return self.before != self.after

    def diff(self) -> bytes:
        """Return what changed, as a unified diff in the encoding of the file."""
        name = self.path.as_posix().lstrip("/").encode()
        old, new = (re.findall(rb"[^\n]*\n|[^\n]+", content) for content in (self.before, self.after))
        lines = difflib.diff_bytes(difflib.unified_diff, old, new, b"a/" + name, b"b/" + name)
        return b"".join(line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n" for line in lines)


class Tree:
    """The files of a project.

    Args:
        paths: Files and folders. In folders, hidden ones, virtual environments, links and what runs leave are skipped.

    Raises:
        MisconfigurationException: A path is not there.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.files: list[Path] = []
        for path in paths:
            if not path.exists():
                raise MisconfigurationException(f"There is no file or folder {str(path)!r} to migrate.")
            self.files += _walk(path) if path.is_dir() else [path]
        self.files = list(dict.fromkeys(self.files))

    def migrate(self, *, write: bool) -> Iterator[Outcome]:
        """Yield the outcome of each file that changed or has something left to do.

        Args:
            write: Whether to write the files that changed. Each appears whole or not at all.
        """
        project = read_project(self._programs(), older())
        classes = set(project.heirs)
        for path in self.files:
            try:
                content = path.read_bytes()
                if not (_MENTIONS.search(content) or _has_class(path, content, classes)):
                    continue
                encoding = _encoding(path, content)
                text = content.decode(encoding)
                done = self._migrate(path, text, project)
                after = done.text.encode(encoding)
                if write and after != content:
                    _replace(path, after)
            except (OSError, UnicodeError, SyntaxError, MisconfigurationException) as e:
                finding = Finding(1, "this file", f"It is left as it is. {e}")
                yield Outcome(path, findings=[finding], unread=True)
            else:
                if after != content or done.findings:
                    findings = _moved(text, done) if write else done.findings
                    yield Outcome(path, content, after, findings)

    def _migrate(self, path: Path, text: str, project: Project) -> Migrated:
        program = partial(migrate_source, project=project)
        if path.suffix == ".ipynb":
            return migrate_notebook(text, program)
        if path.suffix in _PYTHON or _is_script(path):
            done = program(text)
        else:
            done = _CONFIGS.get(path.suffix, lambda same: Migrated(same, []))(text)
        needed = dependencies(path, text)
        lines = {each.line for each in needed}
        return Migrated(done.text, sorted([*needed, *(each for each in done.findings if each.line not in lines)]))

    def _programs(self) -> Iterator[str]:
        for path in self.files:
            with contextlib.suppress(OSError, UnicodeError, SyntaxError):
                if path.suffix in _PYTHON:
                    content = path.read_bytes()
                    if b"class " in content:
                        yield content.decode(_encoding(path, content))
                elif path.suffix == ".ipynb":
                    yield from programs(path.read_text(encoding="utf-8"))


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        here = Path(root)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in _OF_RUNS
            and not name.endswith((".egg-info", ".dist-info"))
            and not (here / name / "pyvenv.cfg").exists()
            and not (here / name / "conda-meta").exists()
        )
        for name in sorted(files):
            path = here / name
            if not name.startswith(".") and not path.is_symlink() and path.is_file() and _is_read(path):
                yield path


def _is_read(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in _PYTHON or path.name in _NAMED:
        return True
    if suffix in _CONFIGS or suffix in _OTHERS:
        return path.stat().st_size <= _LARGEST
    return not suffix and _is_script(path)


def _is_script(path: Path) -> bool:
    """Whether a file without a suffix is a program, by its first line."""
    if path.suffix or path.name in _NAMED:
        return False
    with contextlib.suppress(OSError), path.open("rb") as file:
        first = file.readline(200)
        return first.startswith(b"#!") and b"python" in first
    return False


def _has_class(path: Path, content: bytes, classes: set[str]) -> bool:
    """Whether a program that does not name Lightning names a class that derives from Lightning's."""
    return (
        bool(classes)
        and path.suffix in _PYTHON
        and not classes.isdisjoint(re.findall(r"\w+", content.decode("latin-1")))
    )


def _moved(before: str, done: Migrated) -> list[Finding]:
    """Return what is left to do with the lines of the text that was written."""
    lines = {}
    if done.findings and done.text != before:
        old, new = before.split("\n"), done.text.split("\n")
        for _, start, end, to, until in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            for line in range(start, end):
                lines[line + 1] = max(min(to + line - start, until - 1), 0) + 1
    return [finding._replace(line=lines.get(finding.line, finding.line)) for finding in done.findings]


def _encoding(path: Path, content: bytes) -> str:
    if path.suffix in _PYTHON or not path.suffix:
        return tokenize.detect_encoding(io.BytesIO(content).readline)[0]
    return "utf-8-sig" if content.startswith(b"\xef\xbb\xbf") else "utf-8"


def _replace(path: Path, content: bytes) -> None:
    """Give a file a new content, whole or not at all. Its mode and its owner stay."""
    path = path.resolve()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, name)
        there = path.stat()
        if hasattr(os, "chown") and (there.st_uid, there.st_gid) != (os.geteuid(), os.getegid()):
            with contextlib.suppress(PermissionError):
                os.chown(name, there.st_uid, there.st_gid)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
