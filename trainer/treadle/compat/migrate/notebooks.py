"""The cells of a Jupyter notebook, rewritten as one program."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from treadle.compat.migrate.dependencies import installs
from treadle.compat.migrate.findings import Finding, Migrated
from treadle_fabric import MisconfigurationException

__all__ = ["migrate_notebook", "programs"]

_CELL: Final = "# cell of treadle migrate: "
_MAGIC: Final = re.compile(
    r"^(?P<indent>[ \t]*)(?P<command>(?:[\w, ]+=[ \t]*)?(?:%{1,2}[A-Za-z]|!|\?).*|\w[\w.]*\?{1,2})[ \t]*$", re.MULTILINE
)
_HIDDEN: Final = re.compile(r"pass  # command of treadle migrate: (\d+)")


def migrate_notebook(text: str, migrate: Callable[[str], Migrated]) -> Migrated:
    """Rewrite the code of a notebook. What one cell imports, all of them use.

    Args:
        text: The notebook.
        migrate: Rewrites a program.

    Returns:
        The notebook, with all that is not code as it was. The line of a finding is its line in the file, where the file
        has each line of code on one of its own.

    Raises:
        MisconfigurationException: The file is no notebook, or its code is no Python.
    """
    try:
        notebook = json.loads(text)
        cells = _cells(notebook)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise MisconfigurationException(f"This is no Jupyter notebook: {e}") from None
    commands: list[str] = []
    program = "".join(
        f"{_CELL}{at}\n{_hide(_text(cell), commands)}\n" for at, cell in enumerate(cells) if _is_python(cell)
    )
    done = migrate(program)
    findings = [_place(finding, program, cells, text) for finding in done.findings]
    for command in commands:
        findings += [Finding(_find(text, command), each.what, each.remedy) for each in installs(command)]
    if done.text == program:
        return Migrated(text, sorted(findings))
    for part in done.text.split(_CELL)[1:]:
        number, _, code = part.partition("\n")
        shown = _HIDDEN.sub(lambda match: commands[int(match[1])], code.removesuffix("\n"))
        cell = cells[int(number)]
        cell["source"] = shown.splitlines(keepends=True) if isinstance(cell["source"], list) else shown
    return Migrated(_dump(notebook, text), sorted(findings))


def programs(text: str) -> Iterable[str]:
    """Yield the code of a notebook as one program; nothing where the file is none."""
    try:
        yield "\n".join(_hide(_text(cell), []) for cell in _cells(json.loads(text)) if _is_python(cell))
    except (ValueError, TypeError, KeyError, AttributeError):
        return


def _cells(notebook: Any) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _text(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def _is_python(cell: dict[str, Any]) -> bool:
    first = _text(cell).lstrip().partition("\n")[0]
    return not first.startswith("%%") or first.split()[0] in ("%%time", "%%timeit", "%%capture")


def _hide(code: str, commands: list[str]) -> str:
    """Put statements that do nothing in the place of the commands of IPython."""

    def hidden(match: re.Match[str]) -> str:
        commands.append(match["command"])
        return f"{match['indent']}pass  # command of treadle migrate: {len(commands) - 1}"

    return _MAGIC.sub(hidden, code)


def _place(finding: Finding, program: str, cells: list[dict[str, Any]], text: str) -> Finding:
    """Give a finding its line in the file in the place of its line in the program."""
    lines = program.splitlines()[: finding.line]
    above = [line for line in lines if line.startswith(_CELL)]
    cell = cells[int(above[-1].removeprefix(_CELL))]
    at = len(lines) - 1 - max(n for n, line in enumerate(lines) if line == above[-1])
    source = _text(cell).splitlines()
    line = source[at - 1] if 0 < at <= len(source) else ""
    return finding._replace(line=_find(text, line, after=source[0] if source else ""))


def _find(text: str, line: str, after: str = "") -> int:
    """Return the number of a line of code in the file of a notebook."""
    start = max(text.find(_quoted(after)), 0) if after else 0
    at = text.find(_quoted(line), start)
    return text.count("\n", 0, at) + 1 if at >= 0 else 1


def _quoted(line: str) -> str:
    return json.dumps(line, ensure_ascii=False)[1:-1]


def _dump(notebook: Any, before: str) -> str:
    """Write a notebook as its file was written."""
    found = re.match(r"\{\n([ \t]+)", before)
    indent = found[1] if found else None
    plain = before.isascii()
    end = before[len(before.rstrip()) :]
    separators = None if indent is not None or '": ' in before else (",", ":")
    return json.dumps(notebook, indent=indent, ensure_ascii=plain, separators=separators) + end
