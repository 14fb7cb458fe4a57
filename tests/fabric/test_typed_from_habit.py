"""What users of Lightning Fabric type without thinking, each line as it works there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from treadle_fabric import Fabric
from treadle_fabric.loggers import CSVLogger, Logger
from treadle_fabric.rank_zero import rank_zero_only


class Calls:
    """A callback whose hooks take what they need, of each kind of function."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_named(self, x: int, *, y: int = 3) -> None:
        self.heard.append((x, y))

    def on_all(self, **kwargs: Any) -> None:
        self.heard.append(kwargs)

    def on_nothing(self) -> None:
        self.heard.append("nothing")

    @functools.lru_cache  # noqa: B019 a callback that ends with the test
    def on_cached(self, x: int) -> None:
        self.heard.append(x)


@pytest.mark.parametrize(
    ("hook", "keywords", "heard"),
    [
        ("on_named", {"x": 1, "z": 2}, (1, 3)),
        ("on_named", {"x": 1, "y": 2}, (1, 2)),
        ("on_all", {"x": 1, "z": 2}, {"x": 1, "z": 2}),
        ("on_nothing", {"x": 1}, "nothing"),
        ("on_cached", {"x": 1, "z": 2}, 1),
    ],
)
def test_a_callback_gets_the_keywords_that_it_takes(hook: str, keywords: dict[str, int], heard: Any) -> None:
    callback = Calls()
    Fabric(accelerator="cpu", devices=1, callbacks=callback).call(hook, **keywords)
    assert callback.heard == [heard]


def test_a_keyword_that_is_missing_is_an_error() -> None:
    with pytest.raises(TypeError, match="'x'"):
        Fabric(accelerator="cpu", devices=1, callbacks=Calls()).call("on_named", y=1)


class Kept(Logger):
    """A logger of a user's own, with the few methods that there have to be."""

    name = "kept"
    version = 0

    def __init__(self) -> None:
        self.rows: list[tuple[Mapping[str, Any], int | None]] = []

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.rows.append((metrics, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


def test_loggers_get_numbers() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, loggers=Kept())
    fabric.log("a", torch.tensor([2.0], requires_grad=True), step=3)
    fabric.log_dict({"b": torch.tensor(4), "c": {"d": torch.tensor(0.5)}, "e": "text"})
    assert fabric.logger.rows == [({"a": 2.0}, 3), ({"b": 4, "c": {"d": 0.5}, "e": "text"}, None)]
    assert not isinstance(fabric.logger.rows[0][0]["a"], torch.Tensor)
    with pytest.raises(ValueError, match="one number"):
        fabric.log("a", torch.ones(2))


def test_only_ranks_that_write_wait_for_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreadable = torch.ones(1, device="meta")
    first = Fabric(accelerator="cpu", devices=1, loggers=CSVLogger(tmp_path))
    with pytest.raises((RuntimeError, NotImplementedError)):
        first.log("a", unreadable)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    first.log("a", unreadable)  # passes if nothing is raised
    with pytest.raises(ValueError, match="one number"):
        first.log_dict({"a": {"b": torch.ones(2)}})
    own = Fabric(accelerator="cpu", devices=1, loggers=[Kept(), CSVLogger(tmp_path)])
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    own.log("a", torch.tensor(2.0), step=1)  # this logger writes on every rank
    assert own.logger.rows == [({"a": 2.0}, 1)]


def launched_never() -> Fabric:
    return Fabric(accelerator="cpu", devices=2, strategy="ddp")


@pytest.mark.parametrize(
    ("error", "typed"),
    [
        (IndexError, lambda f, m, o: f.logger),
        (TypeError, lambda f, m, o: f.launch("train")),
        (TypeError, lambda f, m, o: f.setup(o, m)),
        (TypeError, lambda f, m, o: f.setup(m, 5)),
        (TypeError, lambda f, m, o: f.setup_dataloaders(5)),
        (TypeError, lambda f, m, o: f.no_backward_sync(m)),
        (TypeError, lambda f, m, o: f.save("x", {"m": m}, filter="m")),
        (TypeError, lambda f, m, o: f.save("x", {"m": m}, filter={"m": 5})),
        (TypeError, lambda f, m, o: f.setup(m).mark_forward_method(5)),
        (AttributeError, lambda f, m, o: f.setup(m).mark_forward_method("nope")),
        (RuntimeError, lambda f, m, o: launched_never().setup(m)),
        (RuntimeError, lambda f, m, o: launched_never().barrier()),
        (TypeError, lambda f, m, o: Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch()),
    ],
)
def test_errors_have_the_classes_that_programs_catch(
    error: type[Exception], typed: Callable[[Fabric, nn.Module, torch.optim.Optimizer], Any]
) -> None:
    model = nn.Linear(1, 2)
    with pytest.raises(error):
        typed(Fabric(accelerator="cpu", devices=1), model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_forms_of_calls(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    plain = nn.Linear(1, 2)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    model, optimizer = fabric.setup(plain, sgd, _reapply_compile=False)
    fabric.backward(model(torch.ones(1, 1)).sum())
    fabric.clip_gradients(plain, sgd, max_norm=torch.tensor(0.5))  # what was set up, as it was before
    assert torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in plain.parameters()])) < 0.51  # type: ignore[union-attr]
    fabric.clip_gradients(model, optimizer, clip_val=0.1)
    assert max(float(p.grad.max()) for p in plain.parameters()) < 0.11  # type: ignore[union-attr]
    fabric.save(tmp_path / "a.ckpt", {"model": model, "n": 3})
    assert set(fabric.load(tmp_path / "a.ckpt", {})) == {"model", "n"}
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match="size mismatch"):
        fabric.load_raw(tmp_path / "other.pt", model)
