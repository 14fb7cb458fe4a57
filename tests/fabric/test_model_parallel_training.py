"""Tests of ``treadle_fabric.strategies.parallelism``, in training: tensor and sequence parallel processes together give
the losses and weights of one, through Fabric and through the Trainer."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # heavy, as the one before; the forks inherit them
from tests.fabric.gpt import GPT, LENGTH, PLAN, SLICED_PLAN, Attention, Block, batches
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from treadle import LightningModule, Trainer
from treadle_fabric import Fabric, MisconfigurationException, ModelParallelStrategy, split_sequence
from treadle_fabric.strategies.parallelism import sequence
from treadle_fabric.strategies.parallelism.sizes import check_sizes, resolve_sizes

STEPS, BATCH = 5, 4


def _data(ignored: int = 0) -> TensorDataset:
    parts = batches(2 * STEPS, BATCH)
    tokens, targets = (torch.cat(each) for each in zip(*parts, strict=True))
    for row, target in enumerate(targets):
        target[len(target) - row % (ignored + 1) :] = -100
    return TensorDataset(tokens, targets)


def _model(**options: Any) -> GPT:
    torch.manual_seed(1)
    return GPT(**options)


def _strategy(sizes: dict[str, int], plan: Any) -> ModelParallelStrategy:
    named = {"data_parallel_size": 1, "tensor_parallel_size": 1, "sequence_parallel_size": 1} | sizes
    plan = {**plan} if named["tensor_parallel_size"] > 1 else None
    return ModelParallelStrategy(tensor_parallel_plan=plan, loss_parallel=plan is not None, **named)


def _train(fabric: Fabric, model: GPT, data: TensorDataset, size: int) -> list[float]:
    """With accumulation, clipping, two parameter groups and a scheduler."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[::2]}, {"params": trained[1::2], "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, 0.1, 0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    wrapped, stepped = fabric.setup(model, optimizer)
    wrapped.mark_forward_method("loss")
    losses = []
    for index, (tokens, targets) in enumerate(fabric.setup_dataloaders(DataLoader(data, batch_size=size))):
        whole = index % 2 == 1
        with fabric.no_backward_sync(wrapped, enabled=not whole):
            loss = wrapped.loss(tokens, targets, label_smoothing=0.1)
            assert type(loss) is Tensor
            fabric.backward(loss / 2)
        losses.append(float(fabric.all_reduce(loss.detach())))
        if whole:
            norm = fabric.clip_gradients(wrapped, stepped, max_norm=0.3)
            losses.append(float(norm))
            stepped.step()
            stepped.zero_grad()
            schedule.step()
    return losses


def _alone(options: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and weights of one process."""
    model = _model(**options)
    torch.manual_seed(2)
    return _train(Fabric(accelerator="cpu", devices=1), model, _data(), BATCH), model.state_dict()


def _fabric(sizes: dict[str, int], plan: Any, options: dict[str, Any], expected: Any) -> None:
    devices = math.prod(sizes.values())
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=_strategy(sizes, plan))
    fabric.launch()
    model = _model(**options)
    if fabric.global_rank:  # the ranks begin apart, and follow the first
        nn.init.ones_(model.positions.weight)
    torch.manual_seed(2 + fabric.global_rank)
    losses = _train(fabric, model, _data(), BATCH // sizes.get("data_parallel_size", 1))
    torch.testing.assert_close(losses, expected[0], atol=1e-5, rtol=0)
    state = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.state_dict().items()}
    torch.testing.assert_close(state, expected[1], atol=1e-5, rtol=0)
    fabric.strategy.teardown()


def _runs_with_fabric(sizes: dict[str, int], plan: Any, **options: Any) -> None:
    run_in_ranks(_fabric, sizes, plan, options, _alone(options), devices=math.prod(sizes.values()))


def test_tensor_parallel_with_fabric() -> None:
    _runs_with_fabric({"tensor_parallel_size": 2}, PLAN, dropout=0.1)


def test_sequence_parallel_with_fabric() -> None:
    _runs_with_fabric({"sequence_parallel_size": 2}, PLAN)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("sizes", "plan"),
    [
        ({"tensor_parallel_size": 2, "sequence_parallel_size": 2}, PLAN),
        ({"tensor_parallel_size": 2, "data_parallel_size": 2}, SLICED_PLAN),
        ({"sequence_parallel_size": 2, "data_parallel_size": 2}, PLAN),
    ],
)
def test_four_ranks_with_fabric(sizes: dict[str, int], plan: Any) -> None:
    _runs_with_fabric(sizes, plan)


def _with_tensor(fabric: Fabric) -> None:
    with pytest.raises(MisconfigurationException, match="tensor_parallel_size=2, and no layer of Linear is shared out"):
        Fabric.setup(_fabric_of(fabric, ModelParallelStrategy()), nn.Linear(4, 4))
    # from the meta device: the values that the seed gives without it
    torch.manual_seed(3)
    whole = GPT(tied=False)
    torch.manual_seed(3)
    with fabric.init_module(empty_init=True):
        late = GPT(tied=False)
    wrapped = fabric.setup(late)
    drawn = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in late.state_dict().items()}
    torch.testing.assert_close(drawn, whole.state_dict(), atol=0, rtol=0)
    logits = wrapped(torch.zeros(1, LENGTH, dtype=torch.long))
    assert type(logits).__name__ == "DTensor"
    # what goes wrong in a model is told with its names
    with pytest.raises(MisconfigurationException, match=r"met in one operation in GPT, line \d+ .*targets is plain"):
        wrapped.mark_forward_method("difference")
        wrapped.difference(*batches(1)[0])
    # what goes apart without a word: other samples, and a dropout of other random numbers
    other = fabric.setup(GPT())
    with pytest.raises(MisconfigurationException, match="2 ranks of tensor_parallel work on the same samples"):
        other(batches(2)[fabric.global_rank][0])
    plan = {"0": "colwise_gathered"}
    halves = _fabric_of(fabric, ModelParallelStrategy(tensor_parallel_plan=plan), precision="bf16-true")
    layers = halves.setup(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(MisconfigurationException, match="work on the same samples"):
        layers(torch.tensor([[100.0, 80.0 + fabric.global_rank / 2]]))  # 180.5 rounds to 180 in bfloat16
    drops = GPT(dropout=0.5)
    dropping, optimizer = fabric.setup(drops, torch.optim.SGD(drops.parameters(), 0.1))
    dropping.mark_forward_method("loss")
    torch.manual_seed(fabric.global_rank)
    fabric.backward(dropping.loss(*batches(1)[0]))
    with pytest.raises(MisconfigurationException, match="differ between the ranks: .*norm.weight"):
        optimizer.step()


def _fabric_of(fabric: Fabric, strategy: ModelParallelStrategy, **options: Any) -> Fabric:
    """In processes that have met."""
    made = Fabric(accelerator="cpu", devices=fabric.world_size, strategy=strategy, **options)
    made.launch()
    return made


def _with_sequences(fabric: Fabric) -> None:
    # dropout is drawn again as it was, where the forward pass runs again
    gradients = []
    for policy in (None, {Block}, {Attention}):
        options = {} if policy is None else {"activation_checkpointing_policy": policy}
        alike = _fabric_of(fabric, ModelParallelStrategy(None, 1, 1, sequence_parallel_size=2, **options))
        torch.manual_seed(4)
        model = GPT(dropout=0.3)
        wrapped = alike.setup(model)
        wrapped.mark_forward_method("loss")
        tokens, targets = split_sequence(batches(1)[0])
        alike.backward(wrapped.loss(tokens, targets))
        gradients.append({n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    # batches of any loader are sliced, once
    rank, whole = fabric.global_rank, torch.arange(32).view(4, 8)
    mine = whole.chunk(2, dim=1)[rank]
    loaders = [DataLoader(whole, batch_size=4), [whole], DataLoader(whole, batch_size=4, num_workers=1)]
    for loader in alike.setup_dataloaders(*loaders):
        assert [batch.tolist() for batch in loader] == [mine.tolist()] and len(loader) == 1
    twice = alike.setup_dataloaders(alike.strategy.process_dataloader(loaders[0]))
    assert next(iter(twice)).equal(mine) and next(iter(loaders[0])).equal(whole)
    resumable = alike.setup_dataloaders(DataLoader(whole, batch_size=2), resumable=True)
    assert [batch.tolist() for batch in resumable] == [mine[:2].tolist(), mine[2:].tolist()]
    expected = pytest.warns(UserWarning, match="no F.scaled_dot_product_attention ran in Linear")
    with expected if rank == 0 else nullcontext():
        _without_attention(fabric)


def _without_attention(fabric: Fabric) -> None:
    made = _fabric_of(fabric, ModelParallelStrategy(None, 1, 1, sequence_parallel_size=2))
    model, optimizer = made.setup(layer := nn.Linear(2, 2), torch.optim.SGD(layer.parameters(), 0.1))
    made.backward(model(torch.ones(1, 2)).sum())
    sequence._running.attentions = 0
    optimizer.step()


def _errors_and_values(sizes: dict[str, int], check: Any) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=_strategy(sizes, PLAN))
    fabric.launch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(fabric)
    fabric.strategy.teardown()


def test_errors_and_values_of_layers() -> None:
    run_in_ranks(_errors_and_values, {"tensor_parallel_size": 2}, _with_tensor)


def test_loaders_and_recomputation_of_slices() -> None:
    run_in_ranks(_errors_and_values, {"sequence_parallel_size": 2}, _with_sequences)


class Language(LightningModule):
    """Returns the mean over the targets that count in what it got, and how many these are."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = _model()
        self.logged: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.gpt.loss(*batch)
        assert type(loss) is Tensor
        self.log("loss", loss)
        weight = self.gpt.head.weight  # of uneven parts, torch 2.9 computes another mean
        self.log("scale", weight.square().sum() / weight.numel(), on_step=False, on_epoch=True)
        return {"loss": loss, "weight": (batch[1] != -100).sum()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        tokens, targets = batch
        logits = self.gpt(tokens)
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
        self.log("accuracy", (logits.argmax(-1) == targets).float().mean())
        self.log("val_loss", self.gpt.loss(tokens, targets, reduction="sum") / targets.numel())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, 0.9)


def _fit(strategy: Any, devices: int, share: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    torch.manual_seed(2)
    module = Language()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=0.3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = (DataLoader(_data(ignored), batch_size=BATCH // share) for ignored in (3, 0))
    trainer.fit(module, *loaders)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "loss"}
    assert "scale" in metrics
    state = module.gpt.state_dict()
    return metrics, {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in state.items()}


def _with_trainer(sizes: dict[str, int], plan: Any, expected: Any) -> None:
    plan = {f"gpt.{pattern}": style for pattern, style in plan.items()}
    metrics, state = _fit(_strategy(sizes, plan), math.prod(sizes.values()), sizes.get("data_parallel_size", 1))
    torch.testing.assert_close(metrics, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(state, expected[1], atol=1e-5, rtol=0)


def _runs_with_trainer(sizes: dict[str, int], plan: Any) -> None:
    run_in_ranks(_with_trainer, sizes, plan, _fit("auto", 1, 1), devices=math.prod(sizes.values()))


def test_tensor_parallel_with_trainer() -> None:
    _runs_with_trainer({"tensor_parallel_size": 2}, SLICED_PLAN)


def test_sequence_parallel_with_trainer() -> None:
    _runs_with_trainer({"sequence_parallel_size": 2}, PLAN)


@pytest.mark.faults
def test_four_ranks_with_trainer() -> None:
    _runs_with_trainer({"tensor_parallel_size": 2, "sequence_parallel_size": 2}, PLAN)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data_replicate_size": "auto"}, "data_replicate_size='auto' must be an integer of at least 1"),
        ({"sequence_parallel_size": "auto"}, "sequence_parallel_size='auto' must be"),
        ({"data_shard_size": 0}, r"data_shard_size=0 must be an integer of at least 1 \(or 'auto'\)"),
        ({"tensor_parallel_size": "all"}, "tensor_parallel_size='all' must be"),
    ],
)
def test_sizes_are_checked_before_any_process_starts(sizes: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        ModelParallelStrategy(**sizes)


def test_sizes_that_contradict_each_other() -> None:
    given: Any = check_sizes(
        data_parallel_size="auto",
        tensor_parallel_size="auto",
        data_replicate_size=1,
        data_shard_size="auto",
        sequence_parallel_size=1,
        pipeline_parallel_size=1,
    )
    assert resolve_sizes(2, 1, **{**given, "tensor_parallel_size": 4})["data_shard"] == 1  # nothing divides by it
    with pytest.raises(MisconfigurationException, match=r"2 shares.*data_replicate_size=4 does not divide\. Give"):
        resolve_sizes(2, 1, **{**given, "data_parallel_size": 2, "data_replicate_size": 4})
    with pytest.raises(MisconfigurationException, match=r"data_parallel_size=2 is not .*=1 times data_shard_size=4"):
        resolve_sizes(4, 1, **{**given, "data_parallel_size": 2, "data_shard_size": 4})
