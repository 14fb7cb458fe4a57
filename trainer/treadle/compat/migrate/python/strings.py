"""Names of Lightning in strings: those that a program imports, patches or configures."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from treadle.compat.migrate.names import Found, Missing, Names
from treadle.names.table import LIGHTNING, PACKAGES

__all__ = ["VERSION", "Place", "rewrite"]

VERSION: Final = (
    f"Treadle has versions of its own. Write what the code does for Lightning {LIGHTNING}, and ask for no version."
)

_NAMES_A_MODULE: Final = frozenset(
    "import_module __import__ find_spec find_loader importorskip module_available _module_available package_available"
    " _package_available is_module_available reload ModuleAvailableCache RequirementCache"
    " lazy_import sys.modules".split()
)
_ASKS_FOR_A_VERSION: Final = frozenset(
    "version get_distribution distribution metadata requires compare_version _compare_version require".split()
)
_OF_LIGHTNING: Final = re.compile(r"(?:lightning|pytorch[-_]lightning|lightning[-_]fabric)(?![\w-])")
_DOTTED: Final = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_BEGINS: Final = re.compile(r"(?:pytorch_lightning|lightning_fabric|lightning\.(?:pytorch|fabric))\.[\w.{}%*]*")


class Place(NamedTuple):
    """The call that a string is an argument of: the last part of what is called, and the argument's keyword."""

    called: str = ""
    keyword: str = ""


def rewrite(value: str, place: Place, names: Names) -> str | Missing | None:
    """Return a string with Treadle's name, what is missing, or None where the string is no name of Lightning."""
    if not _OF_LIGHTNING.match(value):
        return None
    if place.called in _ASKS_FOR_A_VERSION or (place.called == "RequirementCache" and re.search("[<>=~]", value)):
        return Missing(VERSION)
    if place == ("filterwarnings", "module"):
        return Missing("Treadle warns of the line of your program that led to the warning: filter it by `message`.")
    if place.called == "startswith":
        return Missing("Write where the name lies in Treadle: `treadle` and `treadle_fabric`.")
    if not _DOTTED.fullmatch(value):
        made = _BEGINS.fullmatch(value) is not None
        return Missing("A name that is made when the program runs: write how Treadle calls it.") if made else None
    if value in PACKAGES and place.called not in _NAMES_A_MODULE:
        return None  # a word as any other
    found = names.find(value)
    if isinstance(found, Found):
        return found.dotted
    return found if found is not None and found.certain else None
