"""The names of hooks that are text in the code are those that the classes declare.

Tests of ``treadle.module.hooks``.
"""

from __future__ import annotations

import pytest

import treadle as L
from treadle.callbacks.callback import CALLBACK_HOOKS
from treadle.metrics import bus
from treadle.module.hooks import MODULE_HOOKS


@pytest.mark.parametrize("name", sorted(bus._STEP_HOOKS | bus._EVAL_STEP_HOOKS | bus._EPOCH_HOOKS))
def test_every_hook_in_which_values_can_be_logged_is_a_hook(name: str) -> None:
    assert name in MODULE_HOOKS or hasattr(L.LightningModule, name)


def test_a_callback_has_every_hook_of_a_module_but_those_that_change_its_mode() -> None:
    only = {name for name in MODULE_HOOKS if name not in CALLBACK_HOOKS}
    assert only and all("_model_" in name for name in only)
    assert all(MODULE_HOOKS[name] == CALLBACK_HOOKS[name] for name in MODULE_HOOKS.keys() - only)
    assert MODULE_HOOKS["on_train_batch_end"] == ("outputs", "batch", "batch_idx")
