"""A module as an ONNX program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.nn.utils.rnn import PackedSequence

from treadle.metrics.sinks import silenced
from treadle.module.modes import module_modes, restore_modes
from treadle_fabric import MisconfigurationException, move_data_to_device, require_package

if TYPE_CHECKING:
    from treadle.contracts import LightningModule

__all__ = ["export_to_onnx"]


def export_to_onnx(module: LightningModule, file_path: Any, input_sample: Any, **kwargs: Any) -> Any:
    """Export the ``forward`` of a module; see :meth:`LightningModule.to_onnx`."""
    sample = module.example_input_array if input_sample is None else input_sample
    if sample is None:
        raise MisconfigurationException(
            "to_onnx needs an input of `forward`: pass `input_sample`, or set `self.example_input_array`."
        )
    for package in ("onnx", "onnxscript") if kwargs.get("dynamo", True) else ("onnx",):
        require_package(package, "to_onnx", "export")
    import torch.onnx  # heavy

    sample = move_data_to_device(sample, module.device)
    inputs: Any = (sample,)
    if isinstance(sample, Mapping):
        inputs, kwargs = (), {"kwargs": dict(sample), **kwargs}
    elif isinstance(sample, tuple) and not isinstance(sample, PackedSequence):
        inputs = sample
    modes = module_modes(module)
    nested: Any = [m for m in module.modules() if hasattr(m, "attach_metrics")]  # those of the module that may log
    try:
        with silenced(nested):  # values without numbers are logged while the exporter traces
            return torch.onnx.export(module.eval(), inputs, file_path, **kwargs)
    finally:
        restore_modes(modes)
