"""One program, rewritten."""

from __future__ import annotations

import libcst as cst
from libcst.metadata import MetadataWrapper, ScopeProvider

from treadle.compat.migrate.findings import Migrated
from treadle.compat.migrate.names import names
from treadle.compat.migrate.python.bindings import Bindings
from treadle.compat.migrate.python.imports import Imports
from treadle.compat.migrate.python.loggers import Loggers
from treadle.compat.migrate.python.outdated import Outdated, Project, read_project
from treadle.compat.migrate.python.rewriting import Rewriting
from treadle.compat.migrate.python.uses import Uses
from treadle.names.older import older
from treadle_fabric import MisconfigurationException

__all__ = ["migrate_source"]


def migrate_source(text: str, project: Project | None = None) -> Migrated:
    """Rewrite a program for Lightning as one for Treadle.

    Args:
        text: The program. Its line endings stay.
        project: What is known of all programs of the project. Default: what is known of this one.

    Returns:
        The program for Treadle, and what is left to do. A program for Treadle comes back as it is.

    Raises:
        MisconfigurationException: The text is not a program in Python.
    """
    try:
        wrapper = MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
    except cst.ParserSyntaxError as e:
        raise MisconfigurationException(f"Line {e.raw_line} is no Python: {e.message}") from None
    bindings = Bindings(names())
    wrapper.visit(bindings)
    bindings.decide_names()
    loggers = Loggers(names())
    wrapper.visit(loggers)
    uses = Uses(bindings, loggers.strings)
    wrapper.visit(uses)
    outdated = Outdated(bindings, older(), read_project([text], older()) if project is None else project)
    wrapper.visit(outdated)
    imports = Imports(bindings, _free(wrapper) if bindings.stars else frozenset())
    findings = sorted({*imports.findings, *loggers.findings, *uses.findings, *outdated.findings})
    expressions = {**uses.replaced, **loggers.replaced}
    if not imports.replaced and not expressions and not outdated.replaced:
        return Migrated(text, findings)
    rewriting = Rewriting(imports.replaced, expressions, outdated.replaced)
    return Migrated(wrapper.module.visit(rewriting).code, findings)


def _free(wrapper: MetadataWrapper) -> frozenset[str]:
    """Return the names that a program uses and nothing in it binds."""
    scopes = {scope for scope in wrapper.resolve(ScopeProvider).values() if scope is not None}
    return frozenset(
        node.value
        for scope in scopes
        for each in scope.accesses
        if isinstance(node := each.node, cst.Name) and not each.referents
    )
