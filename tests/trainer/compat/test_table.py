"""The table of names against the list of what Lightning 2.6.6 has, and against what Treadle has.

Tests of ``treadle.names.table``, ``treadle.compat.absent``, ``treadle.compat.internals``.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from treadle import LightningModule, Trainer
from treadle.callbacks import ModelCheckpoint
from treadle.compat import internals
from treadle.compat.absent import stand_in
from treadle.names.table import LIGHTNING, LeftOut, Target, table
from treadle_fabric import LeftOutError, TorchCheckpointIO

LISTED: dict[str, dict[str, list[str]]] = json.loads(
    (Path(__file__).parents[2] / f"data/lightning-{LIGHTNING}-names.json").read_text(encoding="utf-8")
)
UNTOLD = re.compile(
    r"__|args$|config$|formatter$|log$|_log|_console$|_root_logger$|_?T$|.*_(AVAILABLE$|GREATER|EQUAL|LESS)"
)
"""What is no name for programs: loggers, type variables, and flags of other packages' versions."""


def dotted(key: str) -> str:
    return f"lightning.{key}".removesuffix(".")


def get(target: Target) -> Any:
    module = importlib.import_module(target.module)
    return module if target.name is None else getattr(module, target.name)


def listed(kind: str) -> Iterator[tuple[str, str]]:
    for key, names in LISTED.items():
        if table().instead(dotted(key)) is None:
            yield from ((key, name) for name in names[kind] if not UNTOLD.match(name))


def test_every_module_is_known() -> None:
    assert not LISTED.keys() - set(table().modules())


def test_every_name_that_lightning_defines_is_there_or_left_out() -> None:
    unknown = []
    for key, name in listed("own"):
        found = table().find(dotted(key), name)
        try:
            assert found is not None
            if isinstance(found, Target):
                get(found)
        except (AssertionError, ImportError, AttributeError):
            unknown.append(f"{key}: {name} -> {found}")
    assert not unknown, "\n".join(unknown)


def test_every_public_name_of_a_package_is_there_or_left_out() -> None:
    """What a package takes from its modules is imported from the package."""
    unknown = []
    for key, name in listed("others"):
        if name.startswith("_") or not any(other.startswith(f"{key}.") for other in LISTED):
            continue
        found = table().find(dotted(key), name)
        if not isinstance(found, LeftOut):
            try:
                get(found)  # type: ignore[arg-type]
            except (AttributeError, ImportError):
                unknown.append(f"{key}: {name} -> {found}")
    assert not unknown, "\n".join(unknown)


def test_nothing_in_the_table_is_stale() -> None:
    """Homes and places are there, and what is left out is not in the home."""
    stale = []
    for key in table().modules():
        home = table().home(dotted(key))
        there: ModuleType | None = importlib.import_module(home) if home else None
        for name in table().names(dotted(key)):
            found = table().find(dotted(key), name)
            assert isinstance(found, Target)
            try:
                value = get(found)
            except (ImportError, AttributeError):
                stale.append(f"{key}: {name} is not at {found}")
                continue
            if there is not None and getattr(there, name, None) is value and value is not None:
                stale.append(f"{key}: {name} is in the home {home}")
        stale += [f"{key}: {name} is there" for name in table().left_out(dotted(key)) if hasattr(there, name)]
    assert not stale, "\n".join(stale)


def test_remedies_are_sentences() -> None:
    told = {table().instead(dotted(key)) for key in table().modules()} - {None}
    told |= {remedy for key in table().modules() for remedy in table().left_out(dotted(key)).values()}
    assert len(told) > 30 and all(str(remedy).endswith(".") for remedy in told)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pytorch.core.optimizer", "LightningOptimizer"),
        ("pytorch.core.mixins", "HyperparametersMixin"),
        ("pytorch.utilities.model_helpers", "is_overridden"),
        ("pytorch.utilities.parsing", "get_init_args"),
        ("pytorch.utilities.signature_utils", "is_param_in_hook_signature"),
        ("pytorch", "cli_lightning_logo"),
        ("pytorch.cli", "instantiate_class"),
        ("pytorch.utilities.imports", "_TORCHVISION_AVAILABLE"),
        ("fabric.utilities.imports", "_IS_WINDOWS"),
        ("fabric.utilities.load", "_lazy_load"),
        ("fabric.wrappers", "_unwrap_objects"),
        ("fabric.wrappers", "_FabricModule"),
        ("fabric.wrappers", "_FabricOptimizer"),
        ("fabric.wrappers", "_FabricDataLoader"),
        ("fabric.utilities.types", "_PATH"),
        ("fabric.utilities.types", "Optimizable"),
        ("fabric.utilities.types", "LRScheduler"),
        ("fabric.utilities.logger", "_convert_params"),
        ("fabric.utilities.cloud_io", "_atomic_save"),
        ("pytorch.core.saving", "_load_from_checkpoint"),
        ("pytorch.loggers.utilities", "_scan_checkpoints"),
        ("pytorch.plugins.io.wrapper", "_WrappingCheckpointIO"),
        ("pytorch.trainer.connectors.accelerator_connector", "_AcceleratorConnector"),
    ],
)
def test_private_names_that_programs_import(module: str, name: str) -> None:
    found = table().find(dotted(module), name)
    assert isinstance(found, Target)
    assert get(found) is not None


def test_what_is_inside_can_be_named_but_not_used() -> None:
    error = LeftOutError("lightning._FitLoop is left out on purpose: use hooks.")
    absent: Any = stand_in("_FitLoop", error)
    assert not isinstance(Trainer, absent)

    class Mine(absent):  # type: ignore[misc]
        def __init__(self) -> None: ...

    for use in (absent, Mine, stand_in("_function", error)):
        with pytest.raises(LeftOutError, match="use hooks"):
            use()
    with pytest.raises(AttributeError, match="use hooks"):
        _ = absent.run


def test_merge_dicts_and_infinity() -> None:
    given: list[Any] = [{"a": 1.0, "b": {"c": 1}}, {"a": 3.0, "d": 2, "b": {"c": 5}}]
    assert internals.merge_dicts(given, {"b": {"c": max}}) == {"a": 2.0, "b": {"c": 5}, "d": 2.0}  # type: ignore[dict-item]
    assert [internals.convert_inf(x) for x in (math.inf, math.nan, None, 3)] == [None, None, None, 3]
    assert internals._convert_fp_tensor(torch.ones(1), torch.float16).dtype == torch.float16
    assert internals._convert_fp_tensor(torch.ones(1, dtype=torch.int32), torch.float16).dtype == torch.int32


def test_the_checkpoints_that_a_logger_has_not_seen() -> None:
    saved = ModelCheckpoint(monitor="loss")
    for name in ("a.ckpt", "b.ckpt"):
        Path(name).touch()
    saved.best_k_models = {"a.ckpt": torch.tensor(1.0), "gone.ckpt": torch.tensor(2.0)}
    saved.last_model_path = "b.ckpt"
    found = internals._scan_checkpoints(saved, {})
    assert [(path, tag) for _, path, _, tag in found] in (
        [("a.ckpt", "best_k"), ("b.ckpt", "latest")],
        [("b.ckpt", "latest"), ("a.ckpt", "best_k")],  # of the same moment
    )
    assert not internals._scan_checkpoints(saved, {path: time for time, path, *_ in found})


def test_flags_of_an_accelerator_connector() -> None:
    connector = internals._AcceleratorConnector(accelerator="cpu", devices=2)
    assert (connector._accelerator_flag, connector._devices_flag, connector.is_distributed) == ("cpu", 2, True)
    assert internals._AcceleratorConnector()._choose_auto_accelerator() in ("cpu", "cuda", "mps")


def test_a_checkpoint_io_around_another_one(tmp_path: Path) -> None:
    class Counting(internals._WrappingCheckpointIO):
        pass

    with pytest.raises(RuntimeError, match="Counting has no checkpoint_io yet"):
        Counting().remove_checkpoint(tmp_path)
    io = Counting(TorchCheckpointIO())
    io.save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
    assert io.load_checkpoint(tmp_path / "x.ckpt") == {"a": 1}
    io.remove_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "x.ckpt").exists()


def test_loading_for_a_class_that_overrides_it(tmp_path: Path) -> None:
    class Net(LightningModule):
        def __init__(self, size: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(size, 1)

        @classmethod
        def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
            return internals._load_from_checkpoint(cls, *args, **kwargs)

    net = Net(3)
    torch.save({"state_dict": net.state_dict(), "hyper_parameters": {"size": 3}}, tmp_path / "x.ckpt")
    assert Net.load_from_checkpoint(tmp_path / "x.ckpt").layer.weight.equal(net.layer.weight)
