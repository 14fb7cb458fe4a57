"""Registries: classes by the names that users give, as mappings and as decorators.

Tests of ``treadle_fabric.registry``, ``treadle_fabric.strategies.registry`` and
``treadle_fabric.accelerators.registry``.
"""

from __future__ import annotations

from typing import Any

import pytest

from treadle_fabric import MisconfigurationException
from treadle_fabric.accelerators import AcceleratorRegistry, CPUAccelerator
from treadle_fabric.strategies import (
    STRATEGY_REGISTRY,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)

KINDS = [
    (StrategyRegistry, "strategy", SingleDeviceStrategy, {"device": "cpu"}),
    (AcceleratorRegistry, "accelerator", CPUAccelerator, {}),
]


@pytest.mark.parametrize(("registry_class", "kind", "cls", "arguments"), KINDS)
def test_an_entry_is_described_made_replaced_and_removed(
    registry_class: Any, kind: str, cls: type, arguments: dict[str, Any]
) -> None:
    registry = registry_class()
    assert registry.register("mine", cls, "for tests", **arguments) is cls
    entry = {"description": "for tests", "init_params": arguments, kind: cls, f"{kind}_name": "mine"}
    assert registry["mine"] == entry and dict(registry) == {"mine": entry}
    assert type(registry.get("mine")) is cls
    assert registry.get("mine") is not registry.get("mine")

    class Other(cls):  # type: ignore[misc]
        pass

    with pytest.raises(ValueError, match="'mine' is taken.*override=True"):
        registry.register("mine", Other, **arguments)
    registry.register("mine", Other, override=True, **arguments)
    assert type(registry.get("mine")) is Other and registry["mine"]["description"] == ""
    assert "mine" in registry and list(registry) == ["mine"] and len(registry) == 1
    registry.remove("mine")
    assert "mine" not in registry and not registry


@pytest.mark.parametrize(("registry_class", "kind", "cls", "arguments"), KINDS)
def test_a_class_is_registered_by_a_decorator(
    registry_class: Any, kind: str, cls: type, arguments: dict[str, Any]
) -> None:
    registry = registry_class()

    @registry.register("mine", description="decorated", **arguments)
    class Mine(cls):  # type: ignore[misc]
        pass

    assert isinstance(Mine, type)
    assert registry["mine"][kind] is Mine and registry["mine"]["description"] == "decorated"
    with pytest.raises(ValueError, match="taken"):
        registry.register("mine")(Mine)
    assert registry.register("mine", override=True, **arguments)(cls) is cls
    assert type(registry.get("mine")) is cls
    other = registry_class()
    other.update(registry)  # as a mapping
    assert other.pop("mine")[kind] is cls and "mine" not in other


@pytest.mark.parametrize(("registry_class", "kind", "cls", "arguments"), KINDS)
def test_a_name_that_is_not_there(registry_class: Any, kind: str, cls: type, arguments: dict[str, Any]) -> None:
    registry = registry_class()
    registry.register("mine", cls, **arguments)
    for use in (registry.get, registry.__getitem__, registry.remove, registry.class_of):
        for error in (KeyError, ValueError):
            with pytest.raises(error, match=f"^{kind}='mime' is unknown. Did you mean 'mine'"):
                use("mime")
    assert registry.get("mime", 5) == 5
    with pytest.raises(MisconfigurationException, match=f"name of an? {kind} is a string, and 3 is none"):
        registry.register(3, cls)


def test_the_printed_form_has_the_names() -> None:
    registry = StrategyRegistry()
    registry.register("a", SingleDeviceStrategy)
    registry.register("b", SingleDeviceStrategy)
    assert str(registry) == "Registered Strategies: a, b"
    assert str(AcceleratorRegistry()).startswith("Registered Accelerators:")


@pytest.mark.parametrize(
    ("name", "cls", "init_params"),
    [
        ("ddp", DDPStrategy, {"start_method": "popen"}),
        ("ddp_spawn", DDPStrategy, {"start_method": "spawn"}),
        (
            "ddp_find_unused_parameters_true",
            DDPStrategy,
            {"start_method": "popen", "find_unused_parameters": True},
        ),
        ("fsdp", FSDPStrategy, {}),
        ("fsdp_cpu_offload", FSDPStrategy, {"cpu_offload": True}),
        ("deepspeed_stage_2", DeepSpeedStrategy, {"stage": 2}),
        ("deepspeed_stage_2_offload", DeepSpeedStrategy, {"stage": 2, "offload_optimizer": True}),
        (
            "deepspeed_stage_3_offload",
            DeepSpeedStrategy,
            {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
        ),
    ],
)
def test_what_the_names_of_strategies_stand_for(name: str, cls: type, init_params: dict[str, Any]) -> None:
    assert STRATEGY_REGISTRY[name]["strategy"] is cls
    assert STRATEGY_REGISTRY[name]["init_params"] == init_params
    assert name in STRATEGY_REGISTRY.available_strategies()
