"""The Trainer under DeepSpeed: what its loops, callbacks and checkpoints do there as everywhere.

Tests of ``treadle_fabric.strategies.zero.state``, ``treadle_fabric.strategies.zero.engine``,
``treadle_fabric.strategies.deepspeed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, IterableDataset

import treadle as L
from tests.processes import run_in_ranks
from treadle.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from treadle_fabric import Fabric, MisconfigurationException
from treadle_fabric.strategies import DeepSpeedStrategy

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(150)]

DATA = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


class Net(L.LightningModule):
    """Two layers, the first of which may be frozen."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        if frozen:
            self.layers[0].requires_grad_(False)
        self.seen: list[float] = []

    def forward(self, batch: Tensor) -> Tensor:
        return self.layers(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self(batch).square().mean()
        self.seen.append(loss.item())
        self.log("val_loss", loss, sync_dist=True, batch_size=len(batch))

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        return AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)


def trainer_of(strategy: Any, devices: int = 2, **arguments: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    arguments = {**quiet, "enable_checkpointing": False, "max_epochs": 1, **arguments}
    return L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, **arguments)


def loader(trainer: L.Trainer) -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=4 // trainer.world_size)  # type: ignore[arg-type]


def whole(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Tensor]:
    """The whole weights, on rank 0."""
    return {name: value.clone() for name, value in trainer.strategy.get_module_state_dict(module).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not found[name].is_meta:  # of ranks other than the first
            torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0, msg=name)


def trained_by_one(module: Net, **arguments: Any) -> Net:
    trainer = trainer_of("auto", 1, **arguments)
    trainer.fit(module, loader(trainer), loader(trainer))
    return module


class Manual(Net):
    """Steps at every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if batch_idx % 2 == 0:
            optimizer.zero_grad()
        self.manual_backward(self(batch).square().mean() / 2)
        if batch_idx % 2:
            optimizer.step()


@pytest.mark.parametrize("stage", [2, 3])
def test_manual_optimization(stage: int) -> None:
    one = trained_by_one(Manual(), max_epochs=2)

    def fit() -> None:
        trainer, module = trainer_of(DeepSpeedStrategy(stage=stage), max_epochs=2), Manual()
        trainer.fit(module, loader(trainer), loader(trainer))
        assert trainer.global_step == 2
        assert_same(whole(trainer, module), one.state_dict())

    run_in_ranks(fit)


class Uneven(IterableDataset[Tensor]):
    """Some samples on each rank."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[Tensor]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        yield from DATA[: self.numbers[rank]]


class Other(Net):
    """Evaluates another part of the model than it trains."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(self.layers[0](batch).mean().item())

    test_step = validation_step


@pytest.mark.parametrize("kind", [Net, Other])
def test_ranks_with_unequal_numbers_of_batches_evaluate_them_all(kind: type[Net]) -> None:
    def evaluate() -> None:
        trainer, module = trainer_of(DeepSpeedStrategy(stage=3), num_sanity_val_steps=0), kind()
        rank = trainer.global_rank
        trainer.fit(module, loader(trainer), DataLoader(Uneven(3, 0)))  # rank 1 has a batch of training only
        assert len(module.seen) == (3, 0)[rank]
        trainer.test(module, DataLoader(Uneven(1, 3)), verbose=False)
        assert len(module.seen) == (4, 3)[rank]
        predictions = trainer.predict(module, DataLoader(Uneven(2, 1)))
        trainer.strategy.barrier()  # rank 0 has the store
        assert predictions is not None and len(predictions) == (2, 1)[rank]

    run_in_ranks(evaluate)


def test_a_rank_that_never_had_a_batch_says_so() -> None:
    def evaluate() -> None:
        trainer = trainer_of(DeepSpeedStrategy(stage=3))
        error = r"Rank 1 has no batch at all.*Give every rank a batch" if trainer.global_rank else "."
        with pytest.raises(Exception, match=error):  # rank 1 ends, and with it the pass of rank 0
            trainer.test(Net(), DataLoader(Uneven(2, 0)), verbose=False)

    run_in_ranks(evaluate)


class Idle(Net):
    """Learns from the first batch, on no rank from the second, and from the third on one rank."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self(batch).square().mean()
        weight = whole(self.trainer, self)["layers.0.weight"]
        if self.trainer.is_global_zero:
            self.seen.append(weight.sum().item())
        return loss if batch_idx == 0 or (batch_idx == 2 and self.trainer.is_global_zero) else None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_no_rank_has_a_loss_for_changes_nothing(stage: int) -> None:
    """The optimizer would decay the weights."""

    def fit() -> None:
        config = {"zero_optimization": {"stage": stage}}
        trainer, module = trainer_of(DeepSpeedStrategy(config=config)), Idle()
        data = DataLoader(DATA[:6], batch_size=1)  # type: ignore[arg-type]
        trainer.fit(module, data)
        found = whole(trainer, module)["layers.0.weight"]
        if trainer.is_global_zero:
            first, second, third = module.seen
            assert first != second
            assert second == third != found.sum().item()

    run_in_ranks(fit)


class Early(Net):
    """Has no loss for the second batch, after a part of the model has run."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == 1:
            self.layers[0](batch)
            return None
        return self(batch).square().mean()


def test_a_step_that_ends_between_layers_is_told() -> None:
    def fit() -> None:
        trainer, module = trainer_of(DeepSpeedStrategy(stage=3)), Early()
        with pytest.raises(MisconfigurationException, match=r"returned None on rank \d after 1 of 2 layers"):
            trainer.fit(module, loader(trainer), loader(trainer))

    run_in_ranks(fit)


class WithoutOptimizer(Net):
    """Leaves the optimizer to the config."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def configure_optimizers(self) -> None:
        return None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


CONFIG = {
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 4, "warmup_type": "linear"}},
}


@pytest.mark.parametrize("stage", [1, 3])
def test_the_configs_own_optimizer_and_scheduler(stage: int, tmp_path: Path) -> None:
    def fit() -> None:
        def trainer(epochs: int) -> L.Trainer:
            config = {**CONFIG, "zero_optimization": {"stage": stage}}
            return trainer_of(DeepSpeedStrategy(config=config), max_epochs=epochs)

        whole_run, module = trainer(3), WithoutOptimizer()
        whole_run.fit(module, loader(whole_run))
        assert module.rates == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1, 0.1]), module.rates
        first, begun = trainer(1), WithoutOptimizer()
        first.fit(begun, loader(first))
        first.save_checkpoint(tmp_path / "one.ckpt")
        second, resumed = trainer(3), WithoutOptimizer()
        second.fit(resumed, loader(second), ckpt_path=tmp_path / "one.ckpt")
        assert resumed.rates == module.rates[2:]
        assert_same(whole(second, resumed), whole(whole_run, module), 0)

    run_in_ranks(fit)


def test_a_fit_without_an_optimizer() -> None:
    def fit() -> None:
        trainer, module = trainer_of(DeepSpeedStrategy(stage=2)), WithoutOptimizer()
        module.on_train_batch_end = lambda *_: None  # type: ignore[method-assign]
        trainer.fit(module, loader(trainer))
        assert_same(whole(trainer, module), Net().state_dict(), 0)

    run_in_ranks(fit)


def averaged(trainer: L.Trainer, module: Net) -> dict[str, Tensor]:
    """The weights that the module is left with after a second fit."""
    trainer.fit(module, loader(trainer), loader(trainer))
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(trainer), loader(trainer))
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("make", [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(0.01, 1)])
def test_weights_are_averaged_up_to_stage_2_and_not_in_stage_3(make: Callable[[], Any]) -> None:
    module = Net()
    one = averaged(trainer_of("auto", 1, callbacks=make(), max_epochs=2), module)

    def fit() -> None:
        for stage in (1, 2):
            trainer, module_of_two = trainer_of(DeepSpeedStrategy(stage=stage), callbacks=make(), max_epochs=2), Net()
            assert_same(averaged(trainer, module_of_two), one, 1e-5)
        trainer = trainer_of(DeepSpeedStrategy(stage=3), callbacks=make(), max_epochs=2)
        with pytest.raises(MisconfigurationException, match=r"in stage 3.*Use stage 2"):
            trainer.fit(Net(), loader(trainer))

    run_in_ranks(fit)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_are_left_out_and_kept(stage: int, tmp_path: Path) -> None:
    def fit() -> None:
        strategy = DeepSpeedStrategy(stage=stage, exclude_frozen_parameters=True)
        trainer, module = trainer_of(strategy), Net(frozen=True)
        trainer.fit(module, loader(trainer))
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        other, again = trainer_of(DeepSpeedStrategy(stage=stage, exclude_frozen_parameters=True)), Net(frozen=True)
        other.fit(again, loader(other), ckpt_path=tmp_path / "x.ckpt")
        assert_same(whole(other, again), whole(trainer, module))

    run_in_ranks(fit)
    with pytest.raises(RuntimeError, match=r"layers\.0\.weight"):
        Net.load_from_checkpoint(tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match=r"in the model state dict but not in the checkpoint.*layers\.0\.weight"):
        Net.load_from_checkpoint(tmp_path / "x.ckpt", strict=False)


def fit_at(processes: int, stage: int, path: Path, ckpt_path: Path | None, epochs: int) -> None:
    trainer, module = trainer_of(DeepSpeedStrategy(stage=stage), processes, max_epochs=epochs), Net()
    trainer.fit(module, loader(trainer), ckpt_path=ckpt_path)
    trainer.save_checkpoint(path)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
def test_the_run_goes_on_with_another_number_of_processes(stage: int, before: int, after: int, tmp_path: Path) -> None:
    one = trained_by_one(Net(), max_epochs=2)
    run_in_ranks(fit_at, before, stage, tmp_path / "a.ckpt", None, 1, devices=before)
    run_in_ranks(fit_at, after, stage, tmp_path / "b.ckpt", tmp_path / "a.ckpt", 2, devices=after)
    assert_same(Net.load_from_checkpoint(tmp_path / "b.ckpt").state_dict(), one.state_dict())


@pytest.mark.parametrize("stage", [2, 3])
def test_the_folders_of_model_checkpoint(stage: int, tmp_path: Path) -> None:
    one = trained_by_one(Net(), max_epochs=2)

    def fit() -> None:
        saves = ModelCheckpoint(tmp_path, save_last=True, monitor="val_loss", save_top_k=1)
        trainer = trainer_of(DeepSpeedStrategy(stage=stage), max_epochs=2, callbacks=saves, enable_checkpointing=True)
        trainer.fit(Net(), loader(trainer), loader(trainer))
        module = Net()
        trainer.fit(module, loader(trainer), ckpt_path="last")  # nothing is left to train
        assert_same(whole(trainer, module), one.state_dict())
        trainer.test(module, loader(trainer), ckpt_path="best", verbose=False)
        raw = Net()
        fabric = Fabric(accelerator="cpu", devices=2, strategy=DeepSpeedStrategy(stage=stage))
        fabric.launch()
        engine, optimizer = fabric.setup(raw, raw.configure_optimizers())
        if fabric.is_global_zero:
            torch.save(one.state_dict(), tmp_path / "raw.pt")
        fabric.barrier()
        fabric.load_raw(tmp_path / "raw.pt", engine)
        assert_same(fabric.strategy.get_module_state_dict(engine), one.state_dict())

    run_in_ranks(fit)
    assert_same(Net.load_from_checkpoint(tmp_path / "last.ckpt").state_dict(), one.state_dict())


def test_modules_are_made_in_parts() -> None:
    one = trained_by_one(Net())

    def fit() -> None:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=DeepSpeedStrategy(stage=3))
        fabric.launch()
        with fabric.init_module():
            module = Net()
        assert all(p.ds_numel > p.numel() for p in module.parameters())
        model, optimizer = fabric.setup(module, module.configure_optimizers())
        for batch in fabric.setup_dataloaders(DataLoader(DATA, batch_size=2)):  # type: ignore[arg-type]
            fabric.backward(model(batch).square().mean())
            optimizer.step()
        assert_same(fabric.strategy.get_module_state_dict(model), one.state_dict())

    run_in_ranks(fit)


class Loud(Net):
    """Has gradients that clipping would change."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return 100 * self(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=1e-4)


@pytest.mark.parametrize("clip", [None, 0, 0.5])
def test_the_engine_clips_as_the_trainer_was_asked_to(clip: float | None) -> None:
    one = trained_by_one(Loud(), gradient_clip_val=clip)

    def fit() -> None:
        trainer, module = trainer_of(DeepSpeedStrategy(stage=2), gradient_clip_val=clip), Loud()
        trainer.fit(module, loader(trainer))
        assert_same(whole(trainer, module), one.state_dict())

    run_in_ranks(fit)


@pytest.mark.parametrize(("asked", "samples"), [("auto", 2), (7, 7)])
def test_deepspeed_knows_the_samples_of_a_batch(asked: Any, samples: int) -> None:
    def fit() -> None:
        trainer = trainer_of(DeepSpeedStrategy(stage=2, logging_batch_size_per_gpu=asked))
        trainer.fit(Net(), loader(trainer))
        engine = trainer.strategy.engine  # type: ignore[attr-defined]
        assert engine.train_micro_batch_size_per_gpu() == samples
        assert engine.tput_timer.batch_size == engine.train_batch_size() == 2 * samples

    run_in_ranks(fit)


class Clips(Net):
    """Clips in the hook for it."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the engine clips")


def test_a_hook_that_would_clip_is_told_that_it_is_not_called() -> None:
    def fit() -> None:
        trainer = trainer_of(DeepSpeedStrategy(stage=2))
        with pytest.warns(UserWarning, match="`configure_gradient_clipping` is overridden, and is not called"):
            trainer.fit(Clips(), loader(trainer), loader(trainer))

    run_in_ranks(fit, devices=1)


class Fine(Net):
    """Has a backbone."""

    backbone = property(lambda self: self.layers[0])


class Changing(Fine):
    """Freezes its first layer before the second batch, or unfreezes it."""

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 1:
            self.layers[0].requires_grad_(self.hparams.frozen)


class Growing(Changing):
    """Gives its optimizer another parameter group before the second batch."""

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 1:
            self.optimizers().add_param_group({"params": list(self.layers[0].parameters())})

    def configure_optimizers(self) -> Any:
        return SGD(self.layers[2].parameters(), lr=0.1)


def test_what_is_trained_is_fixed_where_the_engine_steps_copies() -> None:
    """A layer that is unfrozen later would not learn, and a frozen one would decay."""

    def fit() -> None:
        for stage in (1, 2, 3):
            for change in (BackboneFinetuning(1), ModelPruning("l1_unstructured")):
                trainer = trainer_of(DeepSpeedStrategy(stage=stage), callbacks=change)
                with pytest.raises(MisconfigurationException, match="DeepSpeedStrategy.*(engine|copies)"):
                    trainer.fit(Changing(), loader(trainer))
            for module, said in (
                (Changing(True), r"layers\.0\.weight can be trained now, and 1 more parameters"),
                (Changing(False), r"layers\.0\.weight is frozen now"),
                (Growing(), "another number of parameter groups"),
            ):
                trainer = trainer_of(DeepSpeedStrategy(stage=stage))
                with pytest.raises(MisconfigurationException, match=said):
                    trainer.fit(module, loader(trainer))
            module = Net(frozen=True)
            trainer = trainer_of(DeepSpeedStrategy(stage=stage))
            trainer.fit(module, loader(trainer))
            before = whole(trainer, module)["layers.0.weight"]
            module.requires_grad_(True)  # another fit sets up anew
            trainer.fit_loop.max_epochs = 2
            trainer.fit(module, loader(trainer))
            after = whole(trainer, module)["layers.0.weight"]
            assert before.is_meta or not torch.equal(before, after)

    run_in_ranks(fit)


def test_without_copies_the_backbone_is_trained_as_by_one() -> None:
    one = trained_by_one(Fine(), max_epochs=2, callbacks=BackboneFinetuning(1))

    def fit() -> None:
        trainer, module = trainer_of(DeepSpeedStrategy(stage=0), max_epochs=2, callbacks=BackboneFinetuning(1)), Fine()
        trainer.fit(module, loader(trainer), loader(trainer))
        assert_same(whole(trainer, module), one.state_dict())

    assert "no optimizer has them" not in run_in_ranks(fit)


class Normed(Net):
    """Normalizes by running statistics, and adds a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, batch: Tensor) -> Tensor:
        return self.layers(self.norm(batch) + self.shift.to(batch.dtype))


@pytest.mark.parametrize(("precision", "kept"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_buffers_in_16_bits(precision: Any, kept: torch.dtype) -> None:
    """DeepSpeed casts parameters only, and torch normalizes in one dtype."""

    def fit() -> None:
        for stage in (2, 3):
            trainer, module = trainer_of(DeepSpeedStrategy(stage=stage), precision=precision), Normed()
            trainer.fit(module, loader(trainer), loader(trainer))
            assert module.norm.running_mean.dtype is torch.bfloat16 and module.norm.running_mean.any()
            assert module.shift.dtype is kept

    run_in_ranks(fit)


def test_without_zero_in_16_bits_weights_are_loaded_into_the_copies_too(tmp_path: Path) -> None:
    """The optimizer would step those that the module was set up with, and write them over the loaded ones."""

    def fit() -> None:
        def trainer(epochs: int) -> L.Trainer:
            return trainer_of(DeepSpeedStrategy(stage=0), precision="bf16-mixed", max_epochs=epochs)

        first = trainer(4)
        first.fit(Net(), loader(first))
        first.save_checkpoint(tmp_path / "x.ckpt")
        straight, resumed = Net(), Net()
        whole_run, second = trainer(5), trainer(5)
        whole_run.fit(straight, loader(whole_run))
        second.fit(resumed, loader(second), ckpt_path=tmp_path / "x.ckpt")
        assert_same(whole(second, resumed), whole(whole_run, straight), 4e-3)  # the copies are rounded

    run_in_ranks(fit)


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_float16_is_trained_or_refused(precision: Any) -> None:
    """CPUs differ in whether they can."""

    def fit() -> None:
        from deepspeed.accelerator import get_accelerator

        trainer, module = trainer_of(DeepSpeedStrategy(stage=2), precision=precision), Net()
        if get_accelerator().is_fp16_supported():
            trainer.fit(module, loader(trainer))
        else:
            with pytest.raises(MisconfigurationException, match="does not train in float16 on this 'cpu'.*bf16-mixed"):
                trainer.fit(module, loader(trainer))

    run_in_ranks(fit)
