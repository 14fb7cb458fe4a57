"""Which optimizers need the closure that evaluates the loss, by what is written in their ``step``."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer

__all__ = ["needs_closure", "takes_closure"]

# Compiled for the optimizers that are not torch's
_IN_IF = (
    r"if closure(?: is not None)?:\s+(?:with (?:torch\.)?enable_grad\(\):\s+)?(?:(\w+) = )?closure\(\)"
    r"(?:\s+else:\s+\w+ = None)?"
)
_IN_LINE = r"(\w+) = (?:closure\(\) if closure(?: is not None)? else None|None if closure is None else closure\(\))"
_BY_BASE = r"(?:(\w+) = |return )?super\((?:\w+, self)?\)\.step\((?:closure=)?closure\)"
_CHECK = r"self\._(?:cuda|accelerator)_graph_capture_health_check\(\)"


def needs_closure(optimizer: Optimizer) -> bool:
    """Return whether ``step`` of the optimizer, or of one that it wraps, needs a closure of the loss, as LBFGS does."""
    for one in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(one, Optimizer):
            closure = inspect.signature(type(one).step).parameters.get("closure")
            if closure is None or closure.kind is closure.VAR_POSITIONAL:
                continue
            if closure.default is closure.empty:
                return True
    return False


def takes_closure(optimizer: Optimizer) -> bool:
    """Return whether a closure may do something else in ``step`` of the optimizer's class than before it.

    It does not in torch's own optimizers, and in those that begin as they do, with ``if closure is not None: loss =
    closure()``, and do no more with ``loss`` than return it; nor in those that begin with ``super().step(closure)``,
    where the base class is such an optimizer. Everything else may need its closure: what calls it without the ``if``,
    in the midst of the step or twice, or computes with the loss; and a ``step`` whose source is not at hand.
    """
    return _may_need(type(optimizer).__mro__)


def _may_need(classes: tuple[type, ...]) -> bool:
    """Whether the first ``step`` that the classes have may need its closure."""
    index = next(i for i, each in enumerate(classes) if "step" in vars(each))
    step = inspect.unwrap(vars(classes[index])["step"])
    code = getattr(step, "__code__", None)
    if code is None or step.__module__.partition(".")[0] == "torch" or "closure" not in code.co_varnames:
        return False
    body = _body_of(step)
    if body is None:
        return True
    uses = _count(body, "closure")
    first = next((i for i, each in enumerate(body) if not _is_idle(each)), None)
    if not uses or first is None:
        return bool(uses)
    text = ast.unparse(body[first])
    by_base = re.fullmatch(_BY_BASE, text)
    found = by_base or re.fullmatch(_IN_IF, text) or re.fullmatch(_IN_LINE, text)
    if found is None or uses != _count([body[first]], "closure"):
        return True
    loss, rest = found.group(1), body[first + 1 :]
    if loss is not None and _count(rest, loss) != sum(ast.unparse(each) == f"return {loss}" for each in _walk(rest)):
        return True
    return by_base is not None and _may_need(classes[index + 1 :])


def _body_of(step: Callable[..., Any]) -> list[ast.stmt] | None:
    """The statements of a function; None where the source is not at hand."""
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(step))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return parsed.body if isinstance(parsed, ast.FunctionDef) else None


def _is_idle(statement: ast.stmt) -> bool:
    """Whether a statement neither reads nor changes weights and gradients: constants, checks, imports."""
    if isinstance(statement, ast.If):
        return not statement.orelse and all(isinstance(each, ast.Raise) for each in statement.body)
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr) and isinstance(statement.value, ast.Constant):
        return True
    if isinstance(statement, ast.Import | ast.ImportFrom | ast.Pass):
        return True
    return re.fullmatch(_CHECK, ast.unparse(statement)) is not None


def _walk(statements: Iterable[ast.stmt]) -> Iterable[ast.AST]:
    return (node for each in statements for node in ast.walk(each))


def _count(statements: Iterable[ast.stmt], name: str) -> int:
    return sum(isinstance(node, ast.Name) and node.id == name for node in _walk(statements))
