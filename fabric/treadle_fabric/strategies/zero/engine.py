"""DeepSpeed's engine around a module, or one of its methods."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings
import weakref
from collections import ChainMap
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from treadle_fabric.checks import require_package
from treadle_fabric.containers import leaves
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.strategies.parts import METHOD_KEYWORD, own_groups
from treadle_fabric.strategies.unwrapping import inside, user_module, with_plain_names
from treadle_fabric.strategies.zero.untouched import untouched

__all__ = ["ZeroEngine", "deepspeed_for", "start"]


def require_deepspeed() -> None:
    """Refuse a run without the package.

    Raises:
        MissingPackageError: DeepSpeed is not installed.
    """
    require_package("deepspeed", "DeepSpeedStrategy", "deepspeed")


def deepspeed_for(device: torch.device, local_rank: int, level: int) -> Any:
    """Import DeepSpeed, for an accelerator, and let it use the process group that is there.

    Args:
        device: That of this process.
        local_rank: That of this process, which is the number of a device without one of its own.
        level: From which level on DeepSpeed logs.

    Raises:
        MissingPackageError: DeepSpeed is not installed.
        MisconfigurationException: DeepSpeed runs on another accelerator in this process.
    """
    require_deepspeed()
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(level)
    deepspeed: Any = importlib.import_module("deepspeed")  # some seconds, and an extra
    # What DeepSpeed calls in torch is for DeepSpeed to change
    called = "all_gather_into_tensor|reduce_scatter_tensor"
    warnings.filterwarnings("ignore", rf"`torch\.distributed\.({called})` is deprecated", FutureWarning)
    deepspeed.utils.logger.setLevel(level)
    name = deepspeed.accelerator.get_accelerator().device_name()
    if name != device.type:
        raise MisconfigurationException(
            f"DeepSpeed runs on {name!r} in this process (DS_ACCELERATOR={os.environ['DS_ACCELERATOR']!r}), and the"
            f" run is on {device.type!r}. Use accelerator={name!r}, or set DS_ACCELERATOR={device.type} before"
            " DeepSpeed is imported."
        )
    with _without_compilation():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    _send_scalars()
    _tell_device(local_rank if device.index is None else device.index)
    return deepspeed


@functools.cache
def _send_scalars() -> None:
    """Let DeepSpeed send parameters without dimensions, too, from rank 0 to all.

    It sends the bytes of a tensor, and torch gives no view of those of a tensor without dimensions.
    """
    engine: Any = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
    partition: Any = importlib.import_module("deepspeed.runtime.zero.partition_parameters").Init
    send, share_out = engine._broadcast_model, partition._zero_init_param

    def send_all(self: Any) -> None:
        scalars = [p for p in self.module.parameters() if p.ndim == 0 and not hasattr(p, "ds_id")]
        for p in scalars:
            dist.broadcast(p.data, 0)
            p.ds_optim_param = True  # which DeepSpeed does not send
        send(self)
        for p in scalars:
            del p.ds_optim_param

    def share_out_all(self: Any, param: Any) -> None:
        if param.ndim:
            share_out(self, param)
            return
        self._convert_to_deepspeed_param(param)
        group = self.get_partition_dp_group(param)
        dist.broadcast(param.data, dist.get_global_rank(group, 0), group)
        param.partition()

    engine._broadcast_model, partition._zero_init_param = send_all, share_out_all


def _tell_device(number: int) -> None:
    """Let DeepSpeed use one device, whatever started the process, and whichever of the devices the run has.

    DeepSpeed takes the local rank for the number of the device, and reads it in the environment.
    """
    for name in ("engine", "zero.partition_parameters", "zero.utils"):
        module: Any = importlib.import_module(f"deepspeed.runtime.{name}")
        module.os = _WithVariables({"LOCAL_RANK": str(number), "OMPI_COMM_WORLD_LOCAL_RANK": str(number)})


class _WithVariables:
    """The module ``os``, with some variables that win over the environment's."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.environ = ChainMap(variables, os.environ)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@contextmanager
def _without_compilation() -> Generator[None]:
    """Let DeepSpeed not compile its reduction in shared memory, which only its inference uses.

    That takes a minute and a compiler on the CPU; and of a process that is killed meanwhile, torch keeps a file for
    which all later processes wait.
    """
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    before, backend.build_shm_op = backend.build_shm_op, lambda: None
    try:
        yield
    finally:
        backend.build_shm_op = before


class ZeroEngine(Module):
    """Runs a module, or one of its methods, through DeepSpeed's engine.

    Every attribute of :attr:`deepspeed` is one of this engine too.

    Args:
        engine: DeepSpeed's.
        module: What the engine runs: the user's module, or its compiled form.
    """

    deepspeed: Any
    """DeepSpeed's engine."""

    def __init__(self, engine: Any, module: Module) -> None:
        super().__init__()
        self.module = module
        fields = self.__dict__  # past Module.__setattr__, which is slow, and would register the engine as a submodule
        fields["deepspeed"] = engine
        fields["running"] = False  # a method of the module runs as the engine's forward
        zero = engine.optimizer
        fields["_zero"] = zero if hasattr(zero, "clear_backward_seen_flag") else None
        fields["_last"] = {}  # the last pass with a result of each method: the method, and what it was called with
        fields["_idle"] = 0  # the backward passes since the last step that had nothing to differentiate
        fields["ended_early"] = False
        fields["_joined"] = None
        stepped = engine.basic_optimizer
        fields["steps_copies"] = stepped is not None and engine.optimizer is not stepped
        fields["_trainable"] = {p: p.requires_grad for p in module.parameters()} if self.steps_copies else {}
        fields["meets_in_backward"] = engine.zero_optimization_stage() > 1
        fields["_counts_passes"] = engine.zero_optimization_stage() == 3 and fields["_zero"] is not None
        fields["_ran"] = fields["_ran_at_most"] = 0  # layers with parameters, in this pass, and in the longest one
        fields["_newest"] = None  # the output of the layer that ran last
        fields["_hooks"] = self._watch_layers() if fields["_counts_passes"] else []

    def _watch_layers(self) -> list[Any]:
        reference = weakref.ref(self)  # a copy of the module would take the engine along

        def note(layer: Module, args: Any, output: Any) -> None:
            engine = reference()
            if engine is not None and torch.is_grad_enabled():
                engine.__dict__["_ran"] += 1
                engine.__dict__["_newest"] = output

        layers = user_module(self.module).modules()
        return [each.register_forward_hook(note) for each in layers if [*each.parameters(recurse=False)]]

    def end(self) -> None:
        """Take what DeepSpeed and this engine added to the module away: another engine is made for it."""
        self.deepspeed.destroy()
        for hook in self._hooks:
            hook.remove()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's ``forward``, or the method ``treadle_method`` of it."""
        method = kwargs.pop(METHOD_KEYWORD, None)
        if torch.is_grad_enabled():
            self._check_trainable()
        self.__dict__["_ran"] = 0
        result = self.deepspeed(*args, **kwargs) if method is None else self._run(method, args, kwargs)
        fields = self.__dict__
        no_result = result is None and torch.is_grad_enabled()  # an evaluation step may return nothing
        fields["ended_early"] = no_result and not fields["_ran"]
        fields["_ran_at_most"] = max(fields["_ran_at_most"], fields["_ran"])
        if no_result and 0 < fields["_ran"] < fields["_ran_at_most"]:
            raise MisconfigurationException(
                f"A step returned None on rank {dist.get_rank()} after {fields['_ran']} of {fields['_ran_at_most']} "
                "layers had run. In stage 3 ranks gather the parameters of each layer together: return None before the "
                "model runs, or after all of it."
            )
        if not no_result:
            fields["_newest"] = None
            fields["_last"]["forward" if method is None else getattr(method, "__name__", "")] = method, args, kwargs
        return result

    def _check_trainable(self) -> None:
        """Refuse what the optimizer, whose copies are of the parameters that were trainable before, does not follow.

        Raises:
            MisconfigurationException: Other parameters require a gradient now, or the optimizer has other groups.
        """
        if not self.steps_copies:
            return
        changed = [p for p, trains in self._trainable.items() if p.requires_grad is not trains]
        if not changed and len(own_groups(self.stepped)) == len(self.stepped.param_groups):
            return
        what = "The optimizer has another number of parameter groups"
        if changed:
            own = user_module(self.module)
            names = {id(p): name for name, p in with_plain_names(own, own.named_parameters())}
            now = "can be trained now" if changed[0].requires_grad else "is frozen now"
            more = f", and {len(changed) - 1} more parameters are no longer as they were" if len(changed) > 1 else ""
            what = f"{names.get(id(changed[0]), 'A parameter')} {now}{more}"
        raise MisconfigurationException(
            f"{what}, and the optimizer of DeepSpeed's engine goes on with what it had in the set-up. Freeze and"
            " unfreeze before fit or fabric.setup, which may be called again, or use strategy='ddp' or 'fsdp'."
        )

    def _run(self, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a method of the module as the engine's forward."""
        module, fields = self.module.__dict__, self.__dict__
        before = module.get("forward")

        def restore() -> None:
            if before is None:
                module.pop("forward", None)
            else:
                module["forward"] = before

        def run(*args: Any, **kwargs: Any) -> Any:
            restore()  # the method may call the module
            return method(*args, **kwargs)

        module["forward"], fields["running"] = run, True
        try:
            return self.deepspeed(*args, **kwargs)
        finally:
            restore()
            fields["running"] = False

    @property
    def stepped(self) -> Any:
        """The optimizer that steps, torch's or DeepSpeed's own; None in an evaluation."""
        engine = self.deepspeed
        return getattr(engine.optimizer, "optimizer", None) or engine.basic_optimizer

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate a loss; the other arguments are those of ``Tensor.backward``."""
        engine = self.deepspeed
        if engine.basic_optimizer is None:
            return  # nothing is trained
        if self._counts_passes:
            self._zero.clear_backward_seen_flag()  # or the next pass would take the place of the last one's gradients
        if self.running:  # DeepSpeed gets ready for a backward pass by the outputs of the forward, which is not over
            engine._backward_prologue()
        if args or not kwargs.keys() <= {"retain_graph"}:
            engine.scale(loss).backward(*args, **kwargs)
        else:
            engine.backward(loss, retain_graph=bool(kwargs.get("retain_graph")))
        self.__dict__["_newest"] = None  # layers that were computed again in the backward pass

    def join_forward(self, method: str) -> None:
        """Take part in a pass of other ranks: run the last batch once more, which changes nothing here.

        Raises:
            MisconfigurationException: This rank had no batch yet.
        """
        if not self._last:
            raise MisconfigurationException(
                f"Rank {dist.get_rank()} has no batch at all, and other ranks have: ranks work together in each pass,"
                " and this one does not know which parameters are used. Give every rank a batch at least."
            )
        own = user_module(self.module)
        called, args, kwargs = self._last.get(method) or next(reversed(self._last.values()))
        if called is not None and method not in self._last and method:
            called = getattr(own, method)  # with a batch of another step, as those of training and validation often are
        silent = {name: own.__dict__.get(name, _MISSING) for name in ("log", "log_dict") if hasattr(own, name)}
        own.__dict__.update(dict.fromkeys(silent, _say_nothing))
        try:
            with untouched(own), torch.random.fork_rng():
                output = self.deepspeed(*args, **kwargs) if called is None else self._run(called, args, kwargs)
        finally:
            for name, value in silent.items():
                if value is _MISSING:
                    own.__dict__.pop(name, None)
                else:
                    own.__dict__[name] = value
        self.__dict__["_joined"] = output

    def join_backward(self) -> None:
        """Take part in a backward pass of other ranks, with gradients of zero."""
        output, self.__dict__["_joined"] = self._joined, None
        if not self._counts_passes:  # whole parameters: no pass is needed
            parts = [p.reshape(-1)[:0] for p in trained(user_module(self.module))]
        else:
            parts = [t for t in leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            if not parts and self._ran:
                parts = [t for t in leaves(self._newest) if isinstance(t, Tensor) and t.requires_grad]
        self.__dict__["_newest"] = None
        if not parts:
            self.join_forward("")
            output, self.__dict__["_joined"] = self._joined, None
            parts = [t for t in leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        self.backward(torch.stack([t.sum().float() * 0 for t in parts]).sum())
        self.__dict__["_idle"] += 1

    def discard(self) -> None:
        """Forget the gradients of the backward passes since the last step."""
        engine, zero = self.deepspeed, self._zero
        if engine.managed_gradient_accumulation() or not engine._unmanaged_backward_count:
            return
        engine._unmanaged_backward_count = self.__dict__["_idle"] = 0
        if zero is None:
            engine.zero_grad()
            return
        zero.zero_grad()
        if not self._counts_passes:
            zero.micro_step_id = -1
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = None

    def step(self) -> None:
        """Step the optimizer with what the backward passes have left; without any, do nothing."""
        engine, fields = self.deepspeed, self.__dict__
        if not (engine.managed_gradient_accumulation() or engine._unmanaged_backward_count):
            return
        idle, fields["_idle"] = fields["_idle"], 0
        if idle and idle == engine._unmanaged_backward_count and not self.meets_in_backward:
            with self._unless_all_are_idle():
                engine.step()
        else:
            engine.step()

    @contextmanager
    def _unless_all_are_idle(self) -> Generator[None]:
        """Let the optimizer not step where no rank has gradients, in the stages 0 and 1.

        There the ranks meet when the engine steps, which reduces the gradients: after that, all that have none are
        counted.
        """
        engine, store = self.deepspeed, dist.distributed_c10d._get_default_store()
        key, optimizer = f"treadle/idle/zero/step/{engine.global_steps}", engine.optimizer
        store.add(key, 1)
        fields, step = vars(optimizer), optimizer.step
        before = fields.get("step", _MISSING)

        def step_if_not_all(*args: Any, **kwargs: Any) -> Any:
            get_accelerator().synchronize()
            return None if store.add(key, 0) == dist.get_world_size() else step(*args, **kwargs)

        get_accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator
        fields["step"] = step_if_not_all
        try:
            yield
        finally:
            if before is _MISSING:
                del fields["step"]
            else:
                fields["step"] = before

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            engine = self.__dict__.get("deepspeed")
            if engine is None:
                raise
            return getattr(engine, name)


_MISSING: Final = object()


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """What a pass logs that others make."""


@inside.register
def _(engine: ZeroEngine) -> Module:
    return engine.module


def start(
    deepspeed: Any,
    module: Module,
    optimizer: Optimizer | None,
    scheduler: Any | None,
    config: dict[str, Any],
) -> ZeroEngine:
    """Make the engine of a module.

    Args:
        deepspeed: The package, with its process group.
        module: On its device.
        optimizer: Of its parameters; None: that of the config, if there is one.
        scheduler: A learning-rate scheduler that the engine steps; None: that of the config, if there is one.
        config: Whole.
    """
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        model_parameters=list(trained(module)) if optimizer is None else None,
        lr_scheduler=scheduler,
        dist_init_required=False,
        config=config,
    )
    # without ZeRO, DeepSpeed's own way to clip fails at parameters without dimensions
    engine.clip_fp32_gradients = lambda: clip_grad_norm_(list(module.parameters()), engine.gradient_clipping())
    return ZeroEngine(engine, module)


def trained(module: Module) -> Iterator[Tensor]:
    """The parameters that require a gradient."""
    return (p for p in module.parameters() if p.requires_grad)
