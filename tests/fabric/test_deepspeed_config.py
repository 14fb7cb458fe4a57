"""What a DeepSpeed config is made of, and which arguments contradict it: no DeepSpeed is needed for that.

Tests of ``treadle_fabric.strategies.zero.config``, ``treadle_fabric.strategies.deepspeed``,
``treadle_fabric.precision.deepspeed``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from treadle_fabric import Fabric, MisconfigurationException, MissingPackageError
from treadle_fabric.precision import DeepSpeedPrecision
from treadle_fabric.strategies import STRATEGY_REGISTRY, DeepSpeedStrategy
from treadle_fabric.strategies.zero.config import CONFIG_VARIABLE, Steps, engine_config, read_config

ZERO_2: dict[str, Any] = {"zero_optimization": {"stage": 2}}
ZERO_3: dict[str, Any] = {"zero_optimization": {"stage": 3}}


def whole(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"dtype": "float32", "scaling": {}, "world_size": 2, "batch": None, "steps": None}
    return engine_config(config, **{**given, **changes})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"stage": 4}, "stages 0, 1, 2 and 3"),
        ({"stage": 3, "config": ZERO_2}, r"stage=3.*zero_optimization.stage=2"),
        ({"zero_optimization": False, "config": ZERO_2}, "zero_optimization=0.*stage=2"),
        ({"loss_scale": 8, "config": {"fp16": {"loss_scale": 4}}}, "loss_scale=8.*fp16.loss_scale=4"),
        ({"stage": 2, "offload_parameters": True}, "offload_param to 'cpu' with stage 2.*stage=3"),
        ({"stage": 2, "offload_optimizer": True, "offload_optimizer_device": "nvme"}, "'nvme' with stage 2.*stage=3"),
        ({"stage": 3, "offload_optimizer": True, "offload_optimizer_device": "nvme"}, "'/local_nvme' is none"),
        ({"zero_optimization": False, "offload_optimizer": True}, "stage 0"),
        ({"offload_optimizer_device": "disk"}, "'disk'.*'cpu', 'nvme', 'none'"),
        ({"config": {"zero_optimization": True}}, "needs a dict"),
        ({"config": {"zero_optimization": {"stage": "two"}}}, "'two'"),
        ({"config": {"zero_optimization": {"offload_optimizer": "cpu"}}}, "offload_optimizer='cpu', and needs a dict"),
        ({"config": {"optimizer": "AdamW"}}, "optimizer='AdamW', and needs a dict"),
        ({"config": {"bf16": True}}, "bf16=True, and needs a dict.*'enabled'"),
        ({"config": {"train_batch_size": "8"}}, "train_batch_size='8' must be an integer"),
        ({"config": {"train_micro_batch_size_per_gpu": 0}}, "per_gpu=0 must be an integer of at least 1"),
        ({"config": {"gradient_clipping": "1"}}, "gradient_clipping='1', and needs a number"),
        ({"config": {"fp16": {"enabled": True}, "bf16": {"enabled": True}}}, "enables fp16 and bf16"),
        ({"config": 3}, "a dict, or the path"),
        ({"config": "nowhere.json"}, "cannot be read: No such file"),
    ],
)
def test_contradictions_of_arguments_and_config(arguments: dict[str, Any], said: str) -> None:
    if arguments == {"zero_optimization": False, "offload_optimizer": True}:
        DeepSpeedStrategy(**arguments)  # nothing is offloaded where there is no ZeRO
        return
    with pytest.raises(MisconfigurationException, match=said):
        DeepSpeedStrategy(**arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "holds no JSON"), ("[1]", "holds a list"), ('{"a": 1, "a": 2}', "the key 'a' comes twice")],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(MisconfigurationException, match=f"config.json.*{said}"):
        DeepSpeedStrategy(config=path)
    with pytest.raises(MisconfigurationException, match=f"{CONFIG_VARIABLE}.*{said}"):
        read_config(None, {CONFIG_VARIABLE: str(path)})


def test_the_arguments_go_into_the_config_and_the_users_dict_stays_as_it_is() -> None:
    config = DeepSpeedStrategy(stage=3, offload_optimizer=True, offload_parameters=True, pin_memory=True).config
    zero = config["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_optimizer"] == {"device": "cpu", "buffer_count": 4, "pin_memory": True}
    assert zero["offload_param"]["max_in_cpu"] == 1_000_000_000
    given = {"zero_optimization": {"stage": 3}}
    made = DeepSpeedStrategy(config=given, offload_optimizer=True, reduce_bucket_size=5).config
    assert made["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert made["zero_optimization"]["reduce_bucket_size"] == 5
    assert given == ZERO_3
    assert "zero_optimization" not in DeepSpeedStrategy(zero_optimization=False).config


def test_what_a_run_adds() -> None:
    made = whole(ZERO_2, batch=4)
    assert (made["train_micro_batch_size_per_gpu"], made["train_batch_size"]) == (4, 8)
    assert made["gradient_clipping"] == 0.0  # DeepSpeed's own default is 1
    assert made["managed_gradient_accumulation"] is False and made["gradient_accumulation_steps"] == 1
    assert whole({"gradient_accumulation_steps": 3})["train_batch_size"] == 6
    assert "managed_gradient_accumulation" not in whole({"gradient_accumulation_steps": 3})
    assert whole({"gradient_accumulation_steps": 3}, steps=Steps(3))["gradient_accumulation_steps"] == 1
    assert whole(ZERO_2, steps=Steps(1, 0.5))["gradient_clipping"] == 0.5
    scaled = whole({"fp16": {"loss_scale": 4}}, dtype="float16", scaling={"loss_scale": 0, "hysteresis": 2})
    assert scaled["fp16"] == {"loss_scale": 4, "enabled": True, "hysteresis": 2}
    assert whole({}, dtype="bfloat16")["bf16"] == {"enabled": True}
    assert whole({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2})["train_batch_size"] == 4


@pytest.mark.parametrize(
    ("config", "steps", "said"),
    [
        ({"gradient_accumulation_steps": 4}, (2, 0.0, 0.0), "accumulate_grad_batches=2.*gradient_accumulation_steps=4"),
        ({"gradient_clipping": 1.0}, (1, 0.5, 0.0), "gradient_clip_val=0.5.*gradient_clipping=1.0"),
        ({}, (1, 0.0, 0.5), "gradient_clip_algorithm='norm'"),
        ({"gradient_accumulation_steps": 4, "gradient_clipping": 0.5}, (4, 0.5, 0.0), None),
        ({"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}, (4, 0.5, 0.0), None),
        ({"gradient_clipping": 0.5}, (1, None, 0.0), None),
        ({"gradient_clipping": 0.5}, (1, 0.0, 0.0), "gradient_clip_val=0.0.*gradient_clipping=0.5"),
    ],
)
def test_a_trainer_and_a_config_that_step_otherwise(config: Any, steps: Any, said: str | None) -> None:
    strategy = DeepSpeedStrategy(config=config)
    if said is None:
        strategy.configure_steps(*steps)
        return
    with pytest.raises(MisconfigurationException, match=said):
        strategy.configure_steps(*steps)


@pytest.mark.parametrize(
    ("config", "precision", "said"),
    [
        ({"bf16": {"enabled": True}}, "32-true", "bf16.enabled=True.*precision='bf16-mixed'"),
        ({"fp16": {"enabled": True}}, "bf16-mixed", "fp16.enabled=True.*precision='16-mixed'"),
        ({"bf16": {"enabled": False}}, "bf16-true", "bf16.enabled=False"),
        ({}, "64-true", "precision='64-true'.*'32-true'"),
        ({"fp16": {"enabled": "auto"}}, "16-mixed", None),
        ({"bf16": {"enabled": True}}, "bf16-true", None),
    ],
)
def test_a_precision_that_is_not_the_configs(config: Any, precision: str, said: str | None) -> None:
    from treadle_fabric.precision import make_precision

    strategy = DeepSpeedStrategy(config=config)
    if said is None:
        assert strategy.precision_for(make_precision(precision, "cpu")).precision == precision
        return
    with pytest.raises(MisconfigurationException, match=said):
        strategy.precision_for(make_precision(precision, "cpu"))


def test_the_precision_casts_inputs_and_outputs() -> None:
    half, single = DeepSpeedPrecision("bf16"), DeepSpeedPrecision("32-true")
    assert half.precision == "bf16-mixed" and half.converts and not single.converts
    assert half.convert_input(torch.ones(1)).dtype == torch.bfloat16
    assert half.convert_output(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    with half.module_init_context():
        assert torch.nn.Linear(1, 1).weight.dtype == torch.float32
    with DeepSpeedPrecision("bf16-true").module_init_context():
        assert torch.nn.Linear(1, 1).weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"train_batch_size": 7}, "train_batch_size=7.*2 processes"),
        ({"train_batch_size": 9, "train_micro_batch_size_per_gpu": 4}, "train_batch_size=9.*is 8"),
    ],
)
def test_batch_sizes_that_do_not_fit(config: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle_fabric.strategies.deepspeed.require_deepspeed", lambda: None)
    with pytest.raises(MisconfigurationException, match=said):
        Fabric(accelerator="cpu", devices=2, strategy=DeepSpeedStrategy(config=config))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed here")
def test_without_the_package_the_error_has_the_command() -> None:
    with pytest.raises(MissingPackageError, match=r"pip install treadle\[deepspeed\]"):
        Fabric(accelerator="cpu", devices=2, strategy="deepspeed")


def test_the_names() -> None:
    names = [name for name in STRATEGY_REGISTRY.available_strategies() if name.startswith("deepspeed")]
    found = {name: STRATEGY_REGISTRY.get(name) for name in names if not name.endswith("nvme")}
    stages = {name: strategy.config["zero_optimization"]["stage"] for name, strategy in found.items()}  # type: ignore[attr-defined]
    assert stages == {"deepspeed": 2, **{f"deepspeed_stage_{i}{o}": i for i in (1, 2, 3) for o in ("", "_offload")}}
    with pytest.raises(MisconfigurationException, match="nvme_path='/local_nvme'"):
        STRATEGY_REGISTRY.get("deepspeed_stage_3_offload_nvme")
    assert found["deepspeed_stage_3"].forward_is_collective and not found["deepspeed_stage_2"].forward_is_collective
