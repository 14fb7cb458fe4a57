"""Layers shared out over ranks by a plan: the losses and weights of one process, and errors before anything changes."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor.parallel  # heavy; the forks inherit it
import torch.nn.functional as F
from tests.fabric.gpt import GPT, PLAN, SLICED_PLAN, batches
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from treadle_fabric import MisconfigurationException
from treadle_fabric.strategies.parallelism.explain import explain_mixed
from treadle_fabric.strategies.parallelism.loss import loss_functions, plain_scalars, sharded_cross_entropy
from treadle_fabric.strategies.parallelism.plans import apply_tensor_parallel, check_plan
from treadle_fabric.strategies.parallelism.replicas import align_random_state, check_gradients_alike, whole_over
from treadle_fabric.strategies.parallelism.substitution import Substitution

STEPS = 5


def _in_mesh(function: Callable[..., None], *arguments: Any, devices: int = 2) -> None:
    def run() -> None:
        dist.init_process_group("gloo", rank=int(__import__("os").environ["LOCAL_RANK"]), world_size=devices)
        try:
            function(init_device_mesh("cpu", (devices,), mesh_dim_names=("tensor_parallel",)), *arguments)
        finally:
            dist.destroy_process_group()

    run_in_ranks(run, devices=devices)


def _train(model: nn.Module, seed: int = 3) -> list[float]:
    """Five steps of one micro-batch, and one of two."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, 0.9, foreach=False)
    losses = []
    for index, (tokens, targets) in enumerate(batches(STEPS + 1)):
        loss = model.loss(tokens, targets, label_smoothing=0.1) / 2
        assert type(loss) is Tensor
        loss.backward()
        losses.append(loss.item())
        if index:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def _whole(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.state_dict().items()}


def _assert_like(model: nn.Module, reference: nn.Module, losses: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(_whole(model), reference.state_dict(), atol=1e-5, rtol=0)


def _equals_one_process(mesh: Any) -> None:
    for plan, dropout, tied in ((PLAN, 0.2, True), (SLICED_PLAN, 0.0, False)):
        torch.manual_seed(1)
        reference = GPT(dropout=dropout, tied=tied)
        expected = _train(copy.deepcopy(reference).train())
        torch.manual_seed(1 + mesh.get_local_rank())  # the ranks begin apart, and follow the first
        model = GPT(dropout=dropout, tied=tied)
        model.blocks[1].up.weight.note = "kept"
        apply_tensor_parallel(model, mesh, plan)
        assert list(model.state_dict()) == list(reference.state_dict())
        assert model.blocks[1].up.weight.note == "kept"
        assert (model.head.weight is model.embed.weight) == tied
        sharded = model.blocks[0].up
        assert sharded.weight.to_local().shape == (32, 16) and not sharded.bias.requires_grad
        assert not model.norm.bias.requires_grad
        torch.testing.assert_close(_whole(model), reference.state_dict(), atol=0, rtol=0)
        with Substitution(loss_functions()):
            losses = _train(model)
        trained = copy.deepcopy(reference)
        assert _train(trained) == expected
        _assert_like(model, trained, losses, expected)
        # gradients lie as their parameters do, and those that each rank has whole are the same
        with Substitution(loss_functions()):
            model.loss(*batches(1)[0]).backward()
        for name, p in model.named_parameters():
            if p.requires_grad and isinstance(p, DTensor):
                assert p.grad.placements == p.placements, name
        check_gradients_alike(whole_over(dict(model.named_parameters()), "tensor_parallel"), mesh)
    forgotten = GPT()
    apply_tensor_parallel(forgotten, mesh, {k: v for k, v in SLICED_PLAN.items() if k != "blocks.*.norm?"})
    forgotten.loss(*batches(1)[0]).backward()
    with pytest.raises(MisconfigurationException, match=r"differ between the ranks: blocks.0.norm1.weight"):
        check_gradients_alike(whole_over(dict(forgotten.named_parameters()), "tensor_parallel"), mesh)


def test_equals_one_process() -> None:
    _in_mesh(_equals_one_process)


def _cross_entropies(mesh: Any) -> None:
    group_rank = mesh.get_local_rank()
    for classes, shape in ((8, ()), (7, (3,)), (3, (2, 2)), (1, ())):  # 1: a rank without any
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(5, classes, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            target = torch.randint(classes, (5, *shape), generator=torch.Generator().manual_seed(1))
            target[0] = -100
            weight = torch.rand(classes, generator=torch.Generator().manual_seed(2)) + 0.5
            likely = torch.softmax(torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)), dim=1)
            for wanted in (target, likely.to(dtype)):
                for weights in (None, weight.to(dtype)):
                    for smoothing in (0.0, 0.2):
                        for reduction in ("mean", "sum", "none"):
                            options = {"weight": weights, "label_smoothing": smoothing, "reduction": reduction}
                            _assert_same_loss(mesh, logits, wanted, options, dtype)
    logits, target = torch.randn(6, generator=torch.Generator().manual_seed(0)), torch.tensor(2)
    _assert_same_loss(mesh, logits, target, {"reduction": "none"}, torch.float32)
    sharded = distribute_tensor(logits[None], mesh, [Shard(1)])
    replicated = distribute_tensor(logits[None], mesh, [Replicate()])
    expected = F.cross_entropy(logits[None], target[None])
    torch.testing.assert_close(sharded_cross_entropy(replicated, target[None]), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert sharded_cross_entropy(sharded.bfloat16(), target[None]).dtype is torch.float32
    with Substitution(loss_functions()):
        loss = nn.CrossEntropyLoss(ignore_index=2)(sharded.expand(2, -1), torch.tensor([2, 4]))
    torch.testing.assert_close(loss, F.cross_entropy(logits[None], torch.tensor([4])))
    with pytest.raises(MisconfigurationException, match="size_average=False"):
        sharded_cross_entropy(sharded, target[None], size_average=False)
    with pytest.raises(IndexError, match="there are 6 classes"):
        sharded_cross_entropy(sharded, torch.tensor([6]))
    result = plain_scalars({"loss": sharded.sum(), "logits": sharded})
    torch.testing.assert_close(result["loss"], logits.sum())
    assert result["logits"] is sharded and type(result["loss"]) is not DTensor and group_rank in (0, 1)


def _assert_same_loss(mesh: Any, logits: Tensor, target: Tensor, options: dict[str, Any], dtype: torch.dtype) -> None:
    whole = logits.clone().requires_grad_()
    mine = distribute_tensor(logits.clone(), mesh, [Shard(1 if logits.dim() > 1 else 0)]).requires_grad_()
    expected, loss = F.cross_entropy(whole, target, **options), sharded_cross_entropy(mine, target, **options)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(loss, expected, **tolerance)
    (expected.sum() * 3).backward()
    (loss.sum() * 3).backward()
    if mine.shape[-1 if mine.dim() == 1 else 1] % mesh.size() == 0:  # torch 2.9 gathers the gradient of uneven parts
        assert mine.grad.placements == mine.placements
    torch.testing.assert_close(mine.grad.full_tensor(), whole.grad, **tolerance)


class Wide(nn.Module):
    """What may go wrong in a plan."""

    def __init__(self, bins: int = 6) -> None:
        super().__init__()
        self.n_heads = 3
        self.q = nn.Linear(6, 6)
        self.odd = nn.Linear(5, 7)
        self.c_attn = nn.Linear(6, 18)
        self.table = nn.Embedding(bins, 6, padding_idx=1)
        self.limited = nn.Embedding(6, 6, max_norm=1.0)
        self.multi = nn.MultiheadAttention(6, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.inner = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6))
        self.tied = nn.Linear(6, bins)
        self.tied.weight = self.table.weight


class Heads(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.q = heads, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        return y.view(*x.shape[:-1], self.heads, 3)


class Loose(nn.Module):
    """Uses a weight past its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x) @ self.table.weight.T


def _plans(mesh: Any) -> None:
    for plan, message in (
        ({"quer*": "colwise"}, "'quer\\*' matches no layer of Wide"),
        ({"c_atn": "colwise"}, "Did you mean 'c_attn'"),
        ({"q": "colwise", re.compile("[q]"): "colwise"}, "Two patterns .* match 'q' .Linear.*'\\[q\\]'"),
        ({"inner": "colwise"}, "matches 'inner' .Sequential.*Name the layers in it: 0, 2"),
        ({"inner.1": "rowwise"}, "'inner.1' .ReLU.*replicate"),
        ({"q": "colwise"}, "Wide.n_heads=3: 3 heads cannot be shared evenly"),
        ({"odd": "colwise"}, "'odd' .Linear. has out_features=7, which 2 .*8 say"),
        ({"odd": "rowwise"}, "in_features=5"),
        ({"limited": "rowwise"}, "max_norm=1.0"),
        ({"multi.out_proj": "rowwise"}, "a part of torch.nn.MultiheadAttention"),
        ({"normed": ColwiseParallel()}, "has a parametrization"),
        ({"table": "rowwise"}, "table.weight: sharded in dimension 0; tied.weight: not sharded.*'rowwise' where"),
        ({"table": "colwise", "tied": "colwise_gathered"}, "share a weight.*dimension 1.*dimension 0"),
    ):
        model = Wide()
        before = dict(model.named_parameters())
        with pytest.raises(MisconfigurationException, match=message):
            apply_tensor_parallel(model, mesh, plan)
        assert all(p is before[name] for name, p in model.named_parameters())
    with pytest.raises(MisconfigurationException, match="'0.weight' has no shape yet"):
        apply_tensor_parallel(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), mesh, {"1": "colwise"})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = Wide()
        model.n_heads = 2
        apply_tensor_parallel(model, mesh, {"c_attn": "colwise"})
    assert dist.get_rank() or any("several things at once" in str(each.message) for each in told)
    _layers(mesh)
    _errors_of_models(mesh)
    # a meta module is distributed as it is, and is filled later
    with torch.device("meta"):
        late = GPT()
    apply_tensor_parallel(late, mesh, PLAN)
    assert late.head.weight is late.embed.weight and late.head.weight.is_meta
    assert late.head.weight.to_local().shape == (7 - mesh.get_local_rank(), 16)
    late.to_empty(device="cpu")
    assert late.blocks[0].up.weight.to_local().shape == (32, 16)


def _layers(mesh: Any) -> None:
    """Styles that the transformer does not need, and uneven numbers of entries."""
    torch.manual_seed(0)
    whole = Wide(bins=5)
    model = copy.deepcopy(whole)
    plan = {"table": "rowwise", "tied": "colwise_gathered", re.compile(r"inner\.0"): ColwiseParallel()}
    plan |= {"inner.2": RowwiseParallel(), "q": "replicate"}
    apply_tensor_parallel(model, mesh, plan)
    index = torch.tensor([[0, 1, 4], [3, 1, 1]])
    for each in (whole, model):
        out = each.tied(each.q(each.inner(each.table(index)).tanh()))
        assert out.shape == (2, 3, 5) and type(out) is not DTensor
        out.square().mean().backward()
    named = dict(model.named_parameters())
    for name, p in whole.named_parameters():
        if p.grad is not None:
            grad = named[name].grad
            torch.testing.assert_close(grad.full_tensor() if isinstance(grad, DTensor) else grad, p.grad, msg=name)
    assert isinstance(named["q.weight"], DTensor)


def _errors_of_models(mesh: Any) -> None:
    heads = apply_tensor_parallel(Heads(), mesh, {"q": "colwise"})
    with pytest.raises(RuntimeError) as raised:
        heads(torch.zeros(2, 5, 6))
    explained = explain_mixed(raised.value, nn.ModuleDict({"attention": heads}), 2)
    told = r"'attention' \(Heads\), line \d+ \(`return y.view.*\[2, 5, 2, 3\].*x.view\(b, t, -1, head_dim\)"
    assert re.search(told, str(explained)), explained
    assert explain_mixed(raised.value, heads, 1) is None
    with pytest.raises(RuntimeError) as raised:
        Heads(4)(torch.zeros(2, 5, 6))
    assert explain_mixed(raised.value, heads, 2) is None
    loose = apply_tensor_parallel(Loose(), mesh, {"table": "rowwise"})
    with pytest.raises(RuntimeError) as raised:
        loose(torch.zeros(1, 2, dtype=torch.long))
    told = r"in Loose, line \d+ \(`return self.table.*x is plain.*Sharded parameters of this layer: table.weight"
    explained = explain_mixed(raised.value, loose)
    assert re.search(told, str(explained)), explained
    assert explain_mixed(RuntimeError("another"), loose) is None
    sliced = apply_tensor_parallel(GPT(), mesh, SLICED_PLAN)
    with pytest.raises(MisconfigurationException, match=r"'embed'.*sequences of 7 positions.*Pad them to 8"):
        sliced(torch.zeros(1, 7, dtype=torch.long))
    rank = mesh.get_local_rank()
    torch.manual_seed(rank)
    align_random_state([mesh])
    drawn = [torch.empty(3) for _ in range(2)]
    dist.all_gather(drawn, torch.rand(3))
    torch.manual_seed(0)
    assert drawn[0].equal(drawn[1]) and drawn[0].equal(torch.rand(3))


def test_cross_entropies() -> None:
    _in_mesh(_cross_entropies)


def test_plans() -> None:
    _in_mesh(_plans)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([], "must be a dict of patterns"),
        ({}, "must be a dict"),
        ({3: "colwise"}, "the pattern 3 is a int"),
        ({"a": "colwise_gather"}, "'colwise_gather' of 'a' is unknown. Did you mean 'colwise_gathered'"),
        ({"a": "ColwiseParallel"}, r"as objects, such as ColwiseParallel\(\). Did you mean 'colwise'|There is"),
        ({"a": ColwiseParallel}, r"call it, ColwiseParallel\(\)"),
        ({"a": 7}, "the style 7 of 'a' is neither"),
    ],
)
def test_no_plans(plan: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        check_plan(plan)
