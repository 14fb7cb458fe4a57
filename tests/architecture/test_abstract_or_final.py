"""A base class declares, a leaf implements, and nobody overrides what is implemented."""

from __future__ import annotations

import abc
import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from tests.architecture.sources import PACKAGES, classes

# `Base.name`: why a documented default, not a no-op, may be replaced there.
ALLOWED = {
    "Callback.state_key": "the class name, unless arguments tell two callbacks of one class apart",
    "WeightAveraging.should_update": "the rule by which users choose when to average, as the exponential average does",
    "ModelSummary.summarize": "what users override to render the table their way, as the Rich one does",
    "BoringModel.training_step": "the model of bug reports, of which users override what a report is about",
}
CONSTRUCTION = {*dir(object), "__post_init__"}


def implementation(attribute: Any) -> Callable[..., Any] | None:
    """The function behind a method, property, classmethod or staticmethod; None for anything else."""
    if isinstance(attribute, property):
        attribute = attribute.fget
    elif isinstance(attribute, functools.cached_property):
        attribute = attribute.func
    elif isinstance(attribute, classmethod | staticmethod):
        attribute = attribute.__func__
    attribute = inspect.unwrap(attribute) if callable(attribute) else attribute
    return attribute if inspect.isfunction(attribute) else None


def does_nothing(function: Callable[..., Any]) -> bool:
    """A declaration: nothing, an argument as it came, a constant, an empty container or context, or a refusal."""
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError):
        return False  # generated, such as a dataclass's __eq__
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    arguments = {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    return all(_is_trivial(statement, arguments) for statement in node.body)


def _is_trivial(statement: ast.stmt, arguments: set[str]) -> bool:
    match statement:
        case ast.Pass() | ast.Raise() | ast.Expr(value=ast.Constant() | ast.Yield(value=None)):
            return True
        case ast.Return(value=None | ast.Constant()):
            return True
        case ast.Return(value=ast.Name(id=name)):
            return name in arguments
        case ast.Return(value=ast.Dict(keys=[]) | ast.List(elts=[]) | ast.Tuple(elts=[])):
            return True
        case ast.Return(value=ast.Call(func=ast.Name(id="nullcontext"))):
            return True
        case ast.Return(value=ast.Call(func=ast.Attribute(attr="nullcontext"))):
            return True
    return False


def overrides(cls: type, ours: Callable[[type], bool]) -> Iterator[tuple[type, str]]:
    """(base, name) of each implemented method that ``cls`` replaces."""
    for base in cls.__mro__[1:]:
        if not ours(base):
            continue
        for name in vars(cls).keys() - CONSTRUCTION:
            function = implementation(vars(base).get(name))
            if function is not None and not getattr(function, "__isabstractmethod__", False):
                if not does_nothing(function):
                    yield base, name


def test_nobody_overrides_an_implemented_method() -> None:
    def ours(base: type) -> bool:
        return base.__module__.split(".")[0] in PACKAGES

    assert classes()
    bad = sorted(
        f"{cls.__module__}.{cls.__qualname__}.{name} overrides {base.__qualname__}.{name}"
        for cls in classes()
        for base, name in overrides(cls, ours)
        if f"{base.__qualname__}.{name}" not in ALLOWED
    )
    assert not bad, "\n".join(["implemented twice in one hierarchy:", *bad])


class Base(abc.ABC):
    @abc.abstractmethod
    def declared(self) -> int:
        """Abstract, though it has a body."""
        return 1 + 1

    def no_op(self, x: int) -> None:
        """Documented."""

    def identity(self, x: int) -> int:
        return x

    def default(self) -> dict[str, int]:
        return {}

    def context(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def implemented(self) -> int:
        return len("implemented")

    @property
    def computed(self) -> int:
        return len("computed")

    @classmethod
    def made(cls) -> Base:
        return cls()

    @staticmethod
    @functools.cache
    def counted() -> int:
        return len("counted")


def test_the_rule_tells_declarations_from_implementations() -> None:
    declarations = ["declared", "no_op", "identity", "default", "context"]
    implementations = ["implemented", "computed", "made", "counted"]
    leaf = type(
        "Leaf", (Base,), dict.fromkeys([*declarations, *implementations, "__init__", "__repr__"], lambda self: 0)
    )
    assert {name for _, name in overrides(leaf, lambda base: base is Base)} == set(implementations)
