"""A module as a program of ONNX, TorchScript or TensorRT, and what compilers leave alone."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from treadle.metrics.sinks import silenced
from treadle.module.modes import module_modes, restore_modes
from treadle_fabric import FabricOptimizer, MisconfigurationException, move_data_to_device, require_package

if TYPE_CHECKING:
    from treadle.contracts import LightningModule


class _NoTrainer:
    """In the place of a trainer while TorchScript reads every attribute: without one, ``trainer`` is an error."""

    def __bool__(self) -> bool:
        return False


_OF_THE_RUN: Final = """log log_dict print all_gather optimizers lr_schedulers manual_backward clip_gradients
    profile toggle_optimizer untoggle_optimizer""".split()

__all__ = ["export_to_onnx", "export_to_tensorrt", "export_to_torchscript", "keep_run_out_of_graphs", "leave_alone"]


def export_to_onnx(module: LightningModule, file_path: Any, input_sample: Any, **kwargs: Any) -> Any:
    """Export the ``forward`` of a module; see :meth:`LightningModule.to_onnx`."""
    sample = _input_of(module, input_sample, "to_onnx", "input_sample")
    for package in ("onnx", "onnxscript") if kwargs.get("dynamo", True) else ("onnx",):
        require_package(package, "to_onnx", "export")
    import torch.onnx  # heavy

    inputs: Any = (sample,)
    if isinstance(sample, Mapping):
        inputs, kwargs = (), {"kwargs": dict(sample), **kwargs}
    elif isinstance(sample, tuple) and not isinstance(sample, PackedSequence):
        inputs = sample
    with _compiling(module):
        return torch.onnx.export(module, inputs, file_path, **kwargs)


def export_to_torchscript(
    module: LightningModule, file_path: Any, method: str | None, example_inputs: Any, **kwargs: Any
) -> Any:
    """Compile the ``forward`` of a module; see :meth:`LightningModule.to_torchscript`."""
    if method not in ("script", "trace"):
        raise MisconfigurationException(f"to_torchscript(method={method!r}): `method` is 'script' or 'trace'.")
    traced = method == "trace"
    sample = _input_of(module, example_inputs, "to_torchscript(method='trace')", "example_inputs") if traced else None
    with _compiling(module), warnings.catch_warnings():
        # the caller has chosen what PyTorch calls deprecated
        warnings.filterwarnings("ignore", "`torch.jit.*deprecated", DeprecationWarning)
        compile_: Any = partial(torch.jit.trace, example_inputs=sample) if traced else torch.jit.script
        compiled = compile_(module, **kwargs)
        if file_path is not None:
            import fsspec  # heavy

            with fsspec.open(str(file_path), "wb") as file:
                torch.jit.save(compiled, file)
    return compiled


def export_to_tensorrt(
    module: LightningModule,
    file_path: Any,
    input_sample: Any,
    ir: str,
    output_format: str,
    retrace: bool,
    default_device: torch.device,
    **compile_kwargs: Any,
) -> Any:
    """Compile the ``forward`` of a module for TensorRT; see :meth:`LightningModule.to_tensorrt`."""
    require_package("torch_tensorrt", "to_tensorrt", "tensorrt")
    tensorrt: Any = importlib.import_module("torch_tensorrt")  # seconds, and an extra
    device = module.device if module.device.type == "cuda" else default_device
    if device.type != "cuda":
        raise MisconfigurationException(
            f"to_tensorrt(default_device={str(default_device)!r}): TensorRT runs on CUDA devices only."
        )
    module.to(device)
    sample = _input_of(module, input_sample, "to_tensorrt", "input_sample")
    inputs = list(sample) if isinstance(sample, tuple | list) else [sample]
    with torch.no_grad(), _compiling(module):
        source: Any = module
        if ir == "ts":
            source = torch.jit.trace(module, tuple(inputs))  # type: ignore[no-untyped-call]
        compiled = tensorrt.compile(source, ir=ir, inputs=inputs, **compile_kwargs)
        if file_path is not None:
            tensorrt.save(compiled, file_path, inputs=inputs, output_format=output_format, retrace=retrace)
    return compiled


def _input_of(module: LightningModule, given: Any, call: str, argument: str) -> Any:
    sample = module.example_input_array if given is None else given
    if sample is None:
        raise MisconfigurationException(
            f"{call} needs an input of `forward`: pass `{argument}`, or set `self.example_input_array`."
        )
    return move_data_to_device(sample, module.device)


@contextmanager
def _compiling(module: LightningModule) -> Generator[None]:
    """Have the module in evaluation mode, log nothing, and let every attribute be read; then as it was."""
    modes = module_modes(module)
    nested: Any = [m for m in module.modules() if hasattr(m, "attach_metrics")]  # those of the module that may log
    alone = [m for m in module.modules() if vars(m).get("_trainer", m) is None and vars(m).get("_fabric") is None]
    try:
        with silenced(nested):  # values without numbers are logged while a module is traced
            for each in alone:  # without a trainer, `trainer` is an error
                vars(each)["_trainer"] = _NoTrainer()
            module.eval()
            yield
    finally:
        for each in alone:
            vars(each)["_trainer"] = None
        restore_modes(modes)


def leave_alone(cls: Any) -> None:
    """Let TorchScript compile no property of a class of modules, and take none of its annotations for types."""
    own = [each for each in cls.__mro__ if each not in nn.Module.__mro__]
    properties = [name for each in own for name, value in vars(each).items() if isinstance(value, property)]
    cls.__jit_unused_properties__ = properties
    cls.__jit_ignored_attributes__ = [*properties, *cls.__annotations__]


@cache
def keep_run_out_of_graphs(cls: type[nn.Module]) -> None:
    """Let compiled steps call the run as it is: traced, ``log`` is compiled anew each time, as what it keeps grows."""
    for owner, name in [(FabricOptimizer, "step"), *((cls, name) for name in _OF_THE_RUN)]:
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))  # type: ignore[no-untyped-call]
