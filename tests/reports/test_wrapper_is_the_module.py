"""What ``fabric.setup`` returns behaves as the user's module in everything that ``torch.nn.Module`` documents.

Tests of ``treadle_fabric.setup.module``, ``treadle_fabric.setup.checks``.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from treadle_fabric import Fabric, FabricModule, MisconfigurationException, is_wrapped

METHODS = [name for name, member in vars(nn.Module).items() if not name.startswith("_") and callable(member)]
# Names of the wrapper that Lightning has as well.
KEPT = {"module", "mark_forward_method"}
HELPERS = sorted(n for n in vars(FabricModule) if not hasattr(nn.Module, n) and n not in KEPT and n[:2] != "__")


def fabric(**kwargs: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **kwargs)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_the_list_of_methods_is_torchs() -> None:
    assert {"register_buffer", "load_state_dict", "double", "zero_grad", "named_children", "forward"} <= set(METHODS)
    assert len(METHODS) >= 50


@pytest.mark.parametrize("name", METHODS)
def test_an_override_is_called_with_what_the_caller_passed(name: str) -> None:
    """Also one that takes less than torch's method, which an added argument would break."""
    calls: list[Any] = []

    def override(self: Any, *args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "mine"

    if name == "forward":
        Own = type("Own", (nn.Linear,), {name: override})
        model = fabric().setup(Own(3, 2))
    else:
        Own = type("Own", (nn.Linear,), {})
        model = fabric().setup(Own(3, 2))
        setattr(Own, name, override)
    assert getattr(model, name)() == "mine"
    assert getattr(model, name)("a", key=1) == "mine"
    assert calls == [((), {}), (("a",), {"key": 1})]


@pytest.mark.parametrize(
    "name", ["double", "half", "bfloat16", "float", "cpu", "to", "eval", "train", "requires_grad_"]
)
def test_a_method_that_returns_the_module_returns_the_wrapper(name: str) -> None:
    net = Net()
    model = fabric().setup(net)
    assert getattr(model, name)(*(["cpu"] if name == "to" else [])) is model
    for tensor, other in zip(model.parameters(), Net().parameters(), strict=True):
        getattr(other, name, other.to)
        assert tensor.requires_grad
    assert model.apply(lambda m: None) is model


class Fluent(nn.Sequential):
    def frozen(self) -> Fluent:
        return self.requires_grad_(False)

    def collate(self, batch: Any) -> Any:
        """The docstring."""
        return batch

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fluent)

    __hash__ = nn.Module.__hash__


def test_methods_of_containers_and_of_users_that_return_the_module_return_the_wrapper() -> None:
    model = fabric(precision="bf16-true").setup(Fluent(nn.Linear(2, 2)))
    assert model.append(nn.ReLU()) is model
    assert model.extend([nn.ReLU()]) is model
    assert model.insert(0, nn.Identity()) is model
    assert model.frozen() is model
    layers = fabric().setup(nn.ModuleList([Net()]))
    assert layers.append(nn.ReLU()) is layers


def test_methods_of_users_are_methods() -> None:
    model = fabric().setup(Fluent(nn.Linear(2, 2)))
    assert model.collate == model.collate
    assert model.collate.__doc__ == "The docstring."
    assert list(inspect.signature(model.collate).parameters) == ["batch"]
    collate = pickle.loads(pickle.dumps(model.collate))  # as workers of a loader get it
    assert collate(3) == 3
    assert torch.compile(model.collate, backend="eager")(torch.ones(1)) == 1


def test_operators_between_two_wrapped_models() -> None:
    first, second = (fabric().setup(Fluent(nn.Linear(2, 2))) for _ in range(2))
    assert first == second
    assert len(first + second) == 2
    first += second
    assert len(first) == 2
    assert second[0] in list(first)


def test_models_that_are_equal_are_several() -> None:
    class Same(nn.Linear):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Same)

        def __hash__(self) -> int:
            return 1

    run, models = fabric(), [Same(1, 1) for _ in range(3)]
    run.setup(models[0])
    run.setup(models[1])
    run.setup(models[2], torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1))


def test_narrow_overrides_of_torchs_methods_work() -> None:
    class Narrow(Net):
        def load_state_dict(self, state_dict: Any) -> Any:  # type: ignore[override]
            return super().load_state_dict(state_dict, strict=False)

        def state_dict(self) -> Any:  # type: ignore[override]
            return super().state_dict()

        def double(self) -> Any:
            self.doubled = True
            return super().double()

        def _apply(self, fn: Any) -> Any:  # type: ignore[override]
            return super()._apply(fn)

        def train(self, mode: bool = True) -> Any:
            self.trained = getattr(self, "trained", 0) + 1
            return super().train(mode)

        def zero_grad(self) -> None:  # type: ignore[override]
            self.zeroed = True

    net = Narrow()
    model = fabric().setup(net)
    state = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert net.layer.bias.tolist() == [1, 1]
    assert model.double() is model
    assert net.doubled
    assert net.layer.weight.dtype == torch.float64
    model.train()
    assert net.trained == 1, "once, not for wrapper and engine each"
    model.eval()
    assert net.trained == 2
    model.zero_grad()
    assert net.zeroed


def test_narrow_load_state_dict_goes_through_files(tmp_path: Path) -> None:
    class Narrow(Net):
        def load_state_dict(self, state_dict: Any) -> Any:  # type: ignore[override]
            return super().load_state_dict(state_dict)

    run = fabric()
    model, other = run.setup(Narrow()), run.setup(Narrow())
    run.save(tmp_path / "a.ckpt", {"model": model})
    run.load(tmp_path / "a.ckpt", {"model": other})
    assert torch.equal(model.layer.weight, other.layer.weight)


def test_what_is_registered_lands_in_the_users_module() -> None:
    net = Net()
    model = fabric().setup(net)
    model.register_buffer("mean", torch.ones(2))
    model.register_buffer("cache", torch.ones(2), persistent=False)
    model.register_parameter("scale", nn.Parameter(torch.ones(2)))
    model.register_parameter("none", None)
    model.add_module("head", nn.Linear(2, 2))
    model.register_module("tail", nn.Linear(2, 2))
    model.shift = nn.Parameter(torch.ones(2))
    model.neck = nn.Linear(2, 2)
    model.set_submodule("neck", nn.Linear(2, 3))
    model.count = torch.ones(())
    assert {name.partition(".")[0] for name in net.state_dict()} == {
        "layer", "count", "mean", "scale", "head", "tail", "shift", "neck",
    }  # fmt: skip
    assert net.cache.tolist() == [1, 1]
    assert net.neck.out_features == 3
    assert net.count == 1
    assert model.get_parameter("head.weight") is net.head.weight
    assert model.get_buffer("mean") is net.mean
    assert isinstance(model._parameters["scale"], nn.Parameter)
    del model.shift
    assert "shift" not in net.state_dict()
    with pytest.raises(KeyError, match="already exists"):
        model.register_buffer("layer", torch.ones(2))


def test_hooks_and_modes_are_the_users_modules() -> None:
    net = Net()
    model = fabric().setup(net)
    calls: list[str] = []
    model.register_forward_pre_hook(lambda m, x: calls.append("before") if m is net else None)
    model.register_forward_hook(lambda m, x, y: calls.append("after"))
    model.register_full_backward_hook(lambda m, x, y: calls.append("backward"))
    model.register_state_dict_pre_hook(lambda *a: calls.append("saving"))
    model.register_state_dict_post_hook(lambda *a: calls.append("saved"))
    model.register_load_state_dict_pre_hook(lambda *a: calls.append("loading"))
    model.register_load_state_dict_post_hook(lambda *a: calls.append("loaded"))
    model(torch.ones(1, 3, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert calls == ["before", "after", "backward", "saving", "saved", "loading", "loaded"]
    assert len(model._forward_hooks) == 1
    model.training = False
    assert not net.training
    assert net.layer.training, "as in torch: only the flag that was set"


def test_a_replaced_forward_runs() -> None:
    net = Net()
    model = fabric().setup(net)
    model.forward = lambda x: x + 1
    assert model(torch.ones(1)).item() == 2
    assert net(torch.ones(1)).item() == 2


# Modules that hold a wrapped one


class Gan(nn.Module):
    def __init__(self, generator: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.generator, self.critic = generator, critic


@pytest.mark.parametrize("strict", [True, False])
def test_a_module_that_holds_wrapped_ones_is_loaded(strict: bool, tmp_path: Path) -> None:
    run = fabric()
    gan, plain = Gan(run.setup(Net()), run.setup(Net())), Gan(Net(), Net())
    assert list(gan.state_dict()) == list(plain.state_dict())
    result = gan.load_state_dict(plain.state_dict(), strict=strict)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(gan.critic.layer.weight, plain.critic.layer.weight)
    run.save(tmp_path / "gan.ckpt", {"gan": gan})
    other = Gan(run.setup(Net()), run.setup(Net()))
    run.load(tmp_path / "gan.ckpt", {"gan": other}, strict=strict)
    assert torch.equal(other.generator.layer.weight, plain.generator.layer.weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        gan.load_state_dict({k: v for k, v in plain.state_dict().items() if "critic.layer" not in k})


def test_an_averaged_model_is_loaded(tmp_path: Path) -> None:
    run = fabric()
    model = run.setup(Net())
    average = AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        model.layer.weight.zero_()
    average.update_parameters(model)
    assert list(average.state_dict()) == list(AveragedModel(Net()).state_dict())
    run.save(tmp_path / "a.ckpt", {"average": average})
    other = AveragedModel(run.setup(Net()))
    run.load(tmp_path / "a.ckpt", {"average": other})
    assert other.n_averaged == 2
    assert torch.equal(other.module.layer.weight, average.module.layer.weight)
    assert average.module.layer.weight.any()


def test_an_outer_module_reaches_what_is_inside() -> None:
    net = Net()
    outer = nn.ModuleDict({"net": fabric().setup(net)})
    outer.double().eval().requires_grad_(False)
    assert net.layer.weight.dtype == torch.float64
    assert not net.training
    assert not net.layer.training
    assert not net.layer.weight.requires_grad
    assert [n for n, _ in outer.named_buffers()] == ["net.count"]
    assert [n for n, _ in outer.named_modules()] == ["", "net", "net.layer"]
    seen: list[nn.Module] = []
    outer.apply(seen.append)
    assert seen == [net.layer, net, outer]
    assert outer.get_submodule("net.layer") is net.layer
    with pytest.raises(MisconfigurationException, match="'1.net'"):
        fabric().setup(nn.Sequential(nn.Linear(1, 1), outer))


# Names


@pytest.mark.parametrize(
    "name", [*HELPERS, "method", "forward_module", "engine", "_run", "_bind", "_strategy", "_parts"]
)
def test_no_name_is_hidden(name: str) -> None:
    Own = type("Own", (Net,), {name: lambda self, x: ("mine", x)})
    model = fabric().setup(Own())
    assert getattr(model, name)(1) == ("mine", 1)
    model = fabric().setup(Net())
    setattr(model, name, 5)
    assert getattr(model, name) == 5
    assert model(torch.ones(1, 3)).shape == (1, 2)


def test_names_of_the_wrapper() -> None:
    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1)

    net = Own()
    model = fabric().setup(net)
    assert model.module is net
    assert model.module.module.in_features == 1
    assert "module.weight" in model.state_dict()
    with pytest.raises(AttributeError, match=r"set model.module.module"):
        model.module = nn.Linear(1, 1)
    with pytest.raises(AttributeError, match=r"parametrize .* give it model.module"):
        nn.utils.parametrizations.weight_norm(fabric().setup(nn.Linear(1, 1)))
    assert model._forward_module is net, "scripts for Lightning read this"
    assert model._original_module is net
    assert model.forward_module is net
    assert model.method("forward") is net


def test_names_that_setup_looks_for_may_be_the_users_own() -> None:
    class Own(Net):
        def forward_methods(self) -> str:
            return "mine"

        def fabric(self) -> str:
            return "mine"

    model = fabric().setup(Own())
    assert (model.forward_methods(), model.fabric()) == ("mine", "mine")


def test_a_marked_method_may_be_replaced() -> None:
    class Own(Net):
        def encode(self, x: Tensor) -> Tensor:
            return x

    net = Own()
    model = fabric(precision="bf16-true").setup(net)
    model.mark_forward_method("encode")
    model.encode = lambda x: (x, x.dtype)
    assert net.encode is not Own.encode
    assert model.encode(torch.ones(1))[1] == torch.bfloat16
    del model.encode
    assert model.encode(torch.ones(1)).dtype == torch.float32


# Special methods


def test_special_methods_are_those_of_the_users_class() -> None:
    layers = [nn.Linear(2, 2), nn.ReLU()]
    net = nn.Sequential(*layers)
    model = fabric().setup(net)
    assert isinstance(model, FabricModule)
    assert is_wrapped(model)
    assert len(model) == 2
    assert list(model) == layers
    assert model[0] is layers[0]
    assert layers[1] in list(model)
    assert model[:1][0] is layers[0]
    model[1] = nn.Tanh()
    assert isinstance(net[1], nn.Tanh)
    del model[1]
    assert len(net) == 1
    model.append(nn.ReLU())
    assert len(model) == 2
    model += nn.Sequential(nn.Tanh())
    assert is_wrapped(model)
    assert len(net) == 3

    assert "net" in fabric().setup(nn.ModuleDict({"net": Net()}))
    assert fabric().setup(nn.ParameterList([torch.ones(1)]))[0] == 1


def test_special_methods_are_nowhere_else() -> None:
    model = fabric().setup(Net())
    assert type(model) is FabricModule
    assert bool(model)
    for function in (len, iter, int, lambda m: m[0], lambda m: 1 in m, lambda m: m + m):
        with pytest.raises(TypeError):
            function(model)
    assert not any(hasattr(model, name) for name in ("__len__", "__iter__", "__getitem__", "__bool__", "__contains__"))
    assert len({model, fabric().setup(Net())}) == 2
    assert model != fabric().setup(Net())


def test_a_users_own_special_methods() -> None:
    class Own(Net):
        entered = 0

        def __bool__(self) -> bool:
            return False

        def __enter__(self) -> Any:
            self.entered += 1
            return self

        def __exit__(self, *error: object) -> None:
            self.entered -= 1

        def __matmul__(self, x: int) -> int:
            return x * 2

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Own)

        def __hash__(self) -> int:
            return 1

        def __str__(self) -> str:
            return "my net"

    net = Own()
    model = fabric().setup(net)
    assert not model
    with model as inside:
        assert inside is model
        assert net.entered == 1
    assert net.entered == 0
    assert model @ 4 == 8
    assert model == model
    assert model == net
    assert str(model) == "my net"
    assert hash(model) == 1
    assert type(model) is type(fabric().setup(Own())), "one class for each, not one for each object"


def test_a_class_with_equality_and_no_hash_can_be_wrapped() -> None:
    """Torch's own walks over such a module fail, but these are the user's business."""

    class Own(nn.Sequential):
        def __len__(self) -> int:
            return 0

    model = fabric().setup(Own(nn.Linear(1, 1)))
    assert not model, "as the module itself"
    assert hash(model) is not None


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_copies_have_the_special_methods_and_marks(precision: str) -> None:
    model = fabric(precision=precision).setup(nn.Sequential(nn.Linear(2, 2)))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert isinstance(other, FabricModule)
        assert type(other) is type(model)
        assert len(other) == 1
        assert other(torch.ones(1, 2)).dtype == torch.float32
        assert torch.equal(other[0].weight, model[0].weight)


def test_torchs_tools_take_it_for_a_module() -> None:
    net = Net()
    model, x = fabric().setup(net), torch.ones(1, 3)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert not torch.func.functional_call(model, zeros, (x,)).any()
    assert torch.equal(nn.DataParallel(model)(x), net(x))
    with pytest.raises(AttributeError, match=r"give it model.module, or the Linear before setup"):
        nn.utils.parametrizations.weight_norm(fabric().setup(nn.Linear(2, 2)))
    norm = fabric().setup(nn.Linear(3, 2))
    nn.utils.parametrizations.weight_norm(norm.module)
    assert norm(x).shape == (1, 2)
    nn.utils.parametrizations.spectral_norm(model.layer)
    model.eval()
    assert torch.equal(model(x), net(x))
    torch.optim.swa_utils.update_bn([x], model)
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(torch.ones_like(vector), model.parameters())
    assert net.layer.bias.tolist() == [1, 1]


# DDP


def _under_ddp() -> None:
    run = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    run.launch()
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    model = run.setup(net)
    for add in (
        lambda: model.register_parameter("late", nn.Parameter(torch.ones(1))),
        lambda: setattr(model, "late", nn.Parameter(torch.ones(1))),
        lambda: setattr(model, "late", nn.Linear(1, 1)),
        lambda: model.add_module("late", module=nn.Linear(1, 1)),
        lambda: model.register_module("late", nn.Linear(1, 1)),
        lambda: model.set_submodule("0", nn.Linear(2, 2)),
        lambda: model.__setitem__(0, nn.Linear(2, 2)),
        lambda: model.append(nn.Linear(2, 2)),
        lambda: model.extend([nn.Linear(2, 2)]),
        lambda: model.insert(0, nn.Linear(2, 2)),
        lambda: model.__iadd__(nn.Sequential(nn.Linear(2, 2))),
        lambda: setattr(model[0], "x", 1) or setattr(model, "deep", nn.Sequential(nn.Sequential(nn.Linear(1, 1)))),
    ):
        with pytest.raises(
            MisconfigurationException, match=r"DDPStrategy averages .* before fabric.setup.* add it to model.module"
        ):
            add()
    assert not hasattr(net, "late")
    model.append(nn.Identity())
    del model[2]
    model.frozen = nn.Linear(1, 1).requires_grad_(False)
    model.again = model[0]  # is there already
    model.register_buffer("mean", torch.ones(1))
    model.note = "text"
    assert {"frozen.weight", "mean"} <= set(net.state_dict())
    del model.frozen, model.again
    assert len(model) == 2
    model(torch.ones(1, 2)).sum().backward()
    assert net[0].weight.grad is not None
    model.eval()
    assert not model._forward_module.training
    assert not model._forward_module.module.training
    model.train()
    assert model._forward_module.training
    assert model.append(nn.Identity()) is model
    del model[2]
    other = copy.deepcopy(model)
    assert torch.equal(other[0].weight, model[0].weight)
    outer = nn.Sequential(model)
    plain = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    plain[0].register_buffer("mean", torch.ones(1))
    outer.load_state_dict(plain.state_dict())
    assert torch.equal(net[0].weight, plain[0][0].weight)
    model.module.append(nn.Linear(2, 2))  # what the error says: on all ranks before the same step
    model(torch.full((1, 2), 1.0 + run.global_rank)).sum().backward()
    for tensor in (net[-1].weight, net[-1].weight.grad):
        first, second = run.all_gather(tensor)
        assert torch.equal(first, second)
    run.strategy.teardown()


def test_under_ddp() -> None:
    run_in_ranks(_under_ddp)
