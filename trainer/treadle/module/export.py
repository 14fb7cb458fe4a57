"""A module as an ONNX program, or in TorchScript."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import PackedSequence

from treadle.metrics.sinks import silenced
from treadle.module.modes import module_modes, restore_modes
from treadle_fabric import MisconfigurationException, PathLike, move_data_to_device, require_package

if TYPE_CHECKING:
    from treadle.contracts import LightningModule

__all__ = ["export_to_onnx", "export_to_torchscript"]


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


def export_to_torchscript(
    base: type[LightningModule],
    module: LightningModule,
    file_path: PathLike | None,
    method: str | None,
    example_inputs: Any,
    **kwargs: Any,
) -> Any:
    """Compile a module to TorchScript; see :meth:`LightningModule.to_torchscript`. ``base`` is that class."""
    if method not in ("script", "trace"):
        raise MisconfigurationException(f"to_torchscript(method={method!r}): it is 'script' or 'trace'.")
    sample = module.example_input_array if example_inputs is None else example_inputs
    if method == "trace" and sample is None:
        raise MisconfigurationException(
            "to_torchscript(method='trace') needs an input of `forward`: pass `example_inputs`, or set"
            " `self.example_input_array`."
        )
    modes = module_modes(module)
    with _readable(base, module), warnings.catch_warnings():
        # the caller has chosen what PyTorch calls deprecated
        warnings.filterwarnings("ignore", "`torch.jit.*deprecated", DeprecationWarning)
        try:
            if method == "script":
                compiled = torch.jit.script(module.eval(), **kwargs)
            else:
                compiled = torch.jit.trace(module.eval(), move_data_to_device(sample, module.device), **kwargs)
        finally:
            restore_modes(modes)
        if file_path is not None:
            import fsspec  # heavy

            with fsspec.open(str(file_path), "wb") as file:
                torch.jit.save(compiled, file)
    return compiled


@contextmanager
def _readable(base: type[LightningModule], module: LightningModule) -> Generator[None]:
    """While entered, TorchScript can read all attributes of a module: what belongs to a run is not compiled."""
    unused = [name for name, value in inspect.getmembers_static(base) if isinstance(value, property)]
    base.__jit_unused_properties__ = unused  # type: ignore[attr-defined]
    base.__jit_ignored_attributes__ = [*base.__annotations__]  # type: ignore[attr-defined]
    nested = [each for each in module.modules() if isinstance(each, base)]
    before = [each._trainer for each in nested]
    try:
        with silenced(nested):
            for each in nested:
                each.__dict__["_trainer"] = before  # `trainer` raises where there is none
            yield
    finally:
        for each, trainer in zip(nested, before):
            each.__dict__["_trainer"] = trainer
