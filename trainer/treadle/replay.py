"""Replay a micro-batch whose loss or gradients were not finite, from the file that the run wrote."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from treadle.metrics.latest import Metrics
from treadle.metrics.sinks import NOWHERE
from treadle.module.loading import instantiate
from treadle.module.module import LightningModule
from treadle.module.overriding import overrides
from treadle.numbers.examine import Findings, examine, same_values
from treadle.run.progress import FitProgress
from treadle.stages import RunningStage, TrainerFn, TrainerState
from treadle.trainer.trainer import Trainer
from treadle_fabric import (
    ACCELERATOR_REGISTRY,
    CheckpointMismatchError,
    MisconfigurationException,
    PathLike,
    describe_error,
    isolate_rng,
    move_data_to_device,
    near_names,
    with_plain_names,
)
from treadle_fabric.checkpoint import TorchCheckpointIO, known_classes, unpack
from treadle_fabric.randomness import as_own_rng_states, set_rng_states

__all__ = ["Replay", "replay"]

_KEYS: Final = {"batch", "batch_idx", "buffers", "class", "device", "epoch", "hyper_parameters", "parameters", "rng"}
_REMEDY: Final = "Give --module path/to/file.py:Class, or --module package.module:Class, if you trust it."


@dataclass(frozen=True)
class Replay:
    """The result of a replay."""

    findings: Findings
    """The loss, the first layer and the gradients that are not finite, in the replay."""
    recorded: Tensor | None
    """The loss in the run."""
    same_loss: bool
    """Whether the replay's loss is that of the run, to the last bit."""
    same_gradients: bool | None
    """Whether the replay's gradients are those of the run, to the last bit; None where the run had no gradients of
    this micro-batch alone."""

    @property
    def reproduced(self) -> bool:
        """Whether everything that could be compared is the same."""
        return self.same_loss and self.same_gradients is not False


def replay(path: PathLike, module: str | None = None) -> Replay:
    """Run the micro-batch of a file again, in this process: forward and backward, without a step.

    Args:
        path: a file from the folder ``nonfinite`` of a run.
        module: where the module's class is, ``"path/to/file.py:Class"`` or ``"package.module:Class"``. Default: where
            the file says, if that is in or below the working directory, or installed. Importing the code runs it.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe or no replay file, or does not fit the module.
        MisconfigurationException: the module cannot be found or made.
    """
    return run_bundle(read_bundle(path), module)


# --- the file ---


def read_bundle(path: PathLike) -> dict[str, Any]:
    """Read and check a replay file, without running code of it."""
    bundle: Any = TorchCheckpointIO().load_checkpoint(path, weights_only=True)
    origin = bundle.get("class") if isinstance(bundle, dict) else None
    whole = isinstance(origin, dict) and all(isinstance(origin.get(k), str) for k in ("module", "name", "file"))
    if not whole or bundle.get("replay") != 1 or not bundle.keys() >= _KEYS:
        raise CheckpointMismatchError(f"{str(path)!r} is no replay file: give one from a run's folder 'nonfinite'.")
    return dict(bundle)


def run_bundle(bundle: dict[str, Any], where: str | None) -> Replay:
    """Run the micro-batch of a replay file; ``where`` is ``--module``, the module's class."""
    if foreign := bundle.get("foreign"):
        raise MisconfigurationException(
            f"The batch held a {foreign}, which no file can hold safely, so there is nothing to run: let the loader"
            " give tensors, numbers and strings in lists, tuples and dicts."
        )
    with isolate_rng(), _flags(bundle):
        cls = _find(bundle["class"], where)
        bundle = unpack(bundle, "the replay file", classes=known_classes(cls))
        module = _make(cls, bundle)
        kind = bundle["device"]
        here = kind in ACCELERATOR_REGISTRY and ACCELERATOR_REGISTRY.class_of(kind).is_available()
        try:
            trainer = Trainer(
                accelerator=kind if here else "cpu", devices=1, precision=bundle.get("precision"), logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            state = TrainerState(fn=TrainerFn.FITTING, stage=RunningStage.TRAINING)
            progress = FitProgress(epoch=bundle["epoch"], batch=bundle["batch_idx"], step=bundle["step"])
            trainer.take_outcome(module, state, progress, Metrics(), should_stop=False)
            module.attach(trainer, NOWHERE)
            with trainer.fabric.init_module():
                module.configure_model()
            trainer.fabric.setup_module(module)
            _restore(module, bundle)
            batch = move_data_to_device(bundle["batch"], trainer.fabric.device)
            set_rng_states(as_own_rng_states(bundle["rng"], bundle.get("rank", 0)))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, (CheckpointMismatchError, MisconfigurationException)):
                raise
            raise CheckpointMismatchError(f"The state in the file could not be restored: {error!r}.") from error
        found = examine(module, trainer.strategy.precision, batch, bundle["batch_idx"])
    if found.failure:
        raise MisconfigurationException(f"`{cls.__qualname__}.training_step` failed in the replay: {found.failure}.")
    recorded, digest = bundle.get("loss"), bundle.get("digest")
    return Replay(
        findings=found,
        recorded=recorded,
        same_loss=same_values(found.loss, recorded),
        same_gradients=found.digest == digest if digest else None,
    )


@contextmanager
def _flags(bundle: dict[str, Any]) -> Generator[None]:
    """Set the run's number of threads and determinism for the replay; restore them and ``sys.path`` afterwards."""
    threads, deterministic = bundle.get("threads"), bundle.get("deterministic") or [False, False]
    before, path = torch.get_num_threads(), sys.path[:]
    flags = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if isinstance(threads, int) and 0 < threads <= 4096:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(bool(deterministic[0]), warn_only=bool(deterministic[1]))
    try:
        yield
    finally:
        sys.path[:] = path
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])


def _restore(module: LightningModule, bundle: dict[str, Any]) -> None:
    """Restore the parameters, buffers and modes that the module had before the step."""
    for kind, mine in (("parameters", module.named_parameters()), ("buffers", module.named_buffers())):
        saved, own = bundle[kind], dict(with_plain_names(module, mine))
        if saved.keys() != own.keys():
            name, kind_of = min(saved.keys() ^ own.keys()), type(module).__qualname__
            remedy = "Check out the code of the run, or give the class with --module."
            if name in saved and overrides(module, "setup", LightningModule):
                remedy = (
                    f"A replay does not call `{kind_of}.setup`: if that makes layers, give with --module a subclass"
                    " whose `configure_model` makes them. If not, check out the code of the run."
                )
            raise CheckpointMismatchError(
                f"{kind_of} is not what ran: only {'the file' if name in saved else 'this class'} has {name!r}."
                f" {near_names(name, own if name in saved else saved)} {remedy}"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.shape != saved[name].shape:
                    raise CheckpointMismatchError(
                        f"{type(module).__qualname__} is not what ran: {name!r} has the shape {tuple(tensor.shape)},"
                        f" and in the run {tuple(saved[name].shape)}. Save the arguments of __init__ with"
                        " `self.save_hyperparameters()`, or check out the code of the run."
                    )
                tensor.copy_(saved[name])
    frozen, evaluating = set(bundle.get("frozen", ())), set(bundle.get("evaluating", ()))
    for name, parameter in with_plain_names(module, module.named_parameters()):
        parameter.requires_grad_(name not in frozen)
    for name, child in with_plain_names(module, module.named_modules()):
        child.training = name not in evaluating


def _make(cls: type[LightningModule], bundle: dict[str, Any]) -> LightningModule:
    try:
        whole = bundle.get("hparams_object")
        return instantiate(cls, dict(bundle["hyper_parameters"]), bundle.get("hparams_name"), whole, {})
    except Exception as error:
        raise MisconfigurationException(
            f"{cls.__qualname__} could not be made with the hyper-parameters in the file: {describe_error(error)}. Call"
            " `self.save_hyperparameters()` in __init__, or give with --module a class that needs no arguments."
        ) from error


# --- the module's code, which importing runs ---


def _find(origin: dict[str, str], where: str | None) -> type[LightningModule]:
    file: Path | None
    if where is None:
        file = _trusted(origin)
        dotted, name = origin["module"], origin["name"]
    else:
        source, _, name = where.rpartition(":")
        if not source or not name:
            raise MisconfigurationException(
                f"--module {where!r} is neither path/to/file.py:Class nor package.module:Class."
            )
        file = Path(source).resolve() if source.endswith(".py") or os.sep in source else None
        dotted = "__main__" if file is not None else source
    print(f"{'imports':<10} {name} from {file or dotted}", flush=True)
    try:
        code = _import(dotted, file)
    except (Exception, SystemExit) as error:
        raise MisconfigurationException(f"{file or dotted} could not be imported: {error!r}.") from error
    found: Any = code
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not issubclass(found, LightningModule):
        raise MisconfigurationException(f"{name!r} in {file or dotted} is no LightningModule class. {_REMEDY}")
    return found


def _trusted(origin: dict[str, str]) -> Path:
    """Return the file that holds the class, if it may be imported without being named by the user."""
    name, recorded = origin["name"], origin["file"]
    if "<locals>" in name:
        raise MisconfigurationException(
            f"The class {name} was made in a function, where a replay cannot find it: move it to the top of a file."
        )
    file = Path(recorded).resolve()
    if not recorded or file.suffix != ".py" or not file.is_file():
        raise MisconfigurationException(
            f"The class {name} was in {recorded or 'no file'}, which is not here. {_REMEDY}"
        )
    installed = [Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")]
    if not any(file.is_relative_to(folder) for folder in (Path.cwd().resolve(), *installed)):
        raise MisconfigurationException(
            f"The class {name} was in {file}, outside the working directory; it is not imported unasked. {_REMEDY}"
        )
    if origin["module"] == "__main__" and not _has_main_guard(file):
        raise MisconfigurationException(
            f"{file} has no `if __name__ == '__main__':`, so that importing it would run the script: put the run under"
            " one, or move the class to a file of its own and give that with --module."
        )
    return file


def _has_main_guard(file: Path) -> bool:
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.If) and "__name__" in ast.dump(node.test) for node in body)


def _import(dotted: str, file: Path | None) -> ModuleType:
    """Import a module by name where its file is part of a package of that name, otherwise the file by itself."""
    parts = dotted.split(".")
    if file is None:
        sys.path.insert(0, os.getcwd())
        return importlib.import_module(dotted)
    path = [*file.parts[:-1], *([] if file.name == "__init__.py" else [file.stem])]
    if dotted != "__main__" and path[-len(parts) :] == parts:
        sys.path.insert(0, str(Path(*path[: -len(parts)])))
        found = importlib.import_module(dotted)
        if Path(found.__file__ or "").resolve() == file:
            return found
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location("treadle_replayed", file)
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = code
    spec.loader.exec_module(code)
    return code
