"""The tuner: a search finds what it is to find, and leaves everything else as it was, to the last bit.

Tests of ``treadle.tuner``, ``treadle.trainer.trials``, ``treadle.callbacks.lr_finder``,
``treadle.callbacks.batch_size_finder``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import Net, loader
from tests.trainer.searches.models import Random, Stateful, files, held, trainer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import treadle as L
from treadle.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from treadle.tuner import Tuner
from treadle_fabric import MisconfigurationException
from treadle_fabric.loggers import CSVLogger

Search = Callable[[Tuner, L.LightningModule], Any]


def fitted(search: Search | None, folder: str, **settings: Any) -> tuple[dict[str, Any], str]:
    """All that a fit leaves, and the rows that it logs, after a search."""
    L.seed_everything(7, verbose=False)
    module = Stateful()
    made = trainer(logger=CSVLogger(folder, name=""), log_every_n_steps=1, enable_checkpointing=True, **settings)
    if search is not None:
        before, rng, written = held(module), Random(), files()
        parts = {name: module.get_submodule(name) for name, _ in module.named_modules()}
        weights = dict(module.named_parameters())
        of_trainer = {name: vars(value) if name == "_runner" else value for name, value in vars(made).items()}
        of_trainer = {name: dict(value) if isinstance(value, dict) else value for name, value in of_trainer.items()}
        callbacks = [dict(vars(callback)) for callback in made.callbacks]
        search(Tuner(made), module)
        assert held(module) == before and rng.is_unchanged() and files() == written
        assert all(part is module.get_submodule(name) for name, part in parts.items())
        assert all(weight is module.get_parameter(name) for name, weight in weights.items())
        assert {n: vars(v) if n == "_runner" else v for n, v in vars(made).items()} == of_trainer
        assert [vars(callback) for callback in made.callbacks] == callbacks
        assert module._trainer is None
    made.fit(module)
    rng_after = torch.rand(3).tolist()
    rows = next(Path(folder).rglob("metrics.csv")).read_text()
    optimizer = made.optimizers[0].state_dict()
    state = [v.tolist() for each in optimizer["state"].values() for v in each.values()]
    groups = [dict(group) for group in optimizer["param_groups"]]
    module.__dict__.pop("_trainer"), module.__dict__.pop("_fabric")
    weights_after = {name: each.tolist() for name, each in module.state_dict().items()}
    plain = (module.calls, [each.item() for each in module.losses], module.nested, module.mean.tolist())
    return {"w": weights_after, "p": plain, "o": (state, groups), "rng": rng_after, "step": made.global_step}, rows


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return fitted(None, str(tmp_path_factory.mktemp("untouched")), default_root_dir=tmp_path_factory.mktemp("root"))


def raising(error: BaseException, call: int) -> Callable[[int, int], BaseException | None]:
    return lambda size, calls: error if calls >= call else None


def fails(search: Search, error: type[BaseException], message: str | None, fault: Any) -> Search:
    def failing(tuner: Tuner, module: L.LightningModule) -> None:
        Stateful.error = staticmethod(fault)
        try:
            with pytest.raises(error, match=message):
                search(tuner, module)
        finally:
            Stateful.error = None

    return failing


def lr_find(tuner: Tuner, module: L.LightningModule) -> None:
    found = tuner.lr_find(module, num_training=15, update_attr=False, early_stop_threshold=None)
    assert len(found.results["lr"]) == 15


def scale(method: str = "fit", mode: str = "power") -> Search:
    def search(tuner: Tuner, module: Any) -> None:
        Stateful.error = staticmethod(lambda size, calls: torch.OutOfMemoryError("full") if size > 9 else None)
        try:
            assert tuner.scale_batch_size(module, method=method, mode=mode, margin=0) == (8 if mode == "power" else 9)
        finally:
            Stateful.error = None
        assert module.batch_size == module.hparams.batch_size
        module.batch_size = module.hparams.batch_size = 4

    return search


SEARCHES: dict[str, Search] = {
    "lr_find": lr_find,
    "an error": fails(lr_find, ValueError, "mine", raising(ValueError("mine"), 6)),
    "Ctrl-C": fails(lr_find, KeyboardInterrupt, None, raising(KeyboardInterrupt(), 6)),
    "out of memory": fails(lr_find, RuntimeError, "out of memory", raising(RuntimeError("MPS out of memory"), 6)),
    "batch size": scale(),
    "binsearch": scale(mode="binsearch"),
    "validate": scale("validate"),
    "predict": scale("predict"),
    "Ctrl-C in a batch-size trial": fails(
        lambda tuner, module: tuner.scale_batch_size(module),
        KeyboardInterrupt,
        None,
        lambda size, calls: KeyboardInterrupt() if size == 8 and calls == 2 else None,
    ),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_after_a_search_a_fit_is_that_of_an_untouched_trainer(
    untouched: tuple[dict[str, Any], str], name: str, tmp_path: Path
) -> None:
    found, rows = fitted(SEARCHES[name], str(tmp_path / "logs"), default_root_dir=tmp_path)
    assert found == untouched[0]
    assert rows == untouched[1]


class AtMilestones(LearningRateFinder):
    def __init__(self, milestones: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.milestones = milestones

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch in self.milestones:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("milestones", [None, (0, 1)])
def test_inside_a_fit_a_search_changes_nothing_but_what_it_sets(
    untouched: tuple[dict[str, Any], str], milestones: tuple[int, ...] | None, tmp_path: Path
) -> None:
    options = {"num_training_steps": 15, "update_attr": False, "early_stop_threshold": None}
    finder = LearningRateFinder(**options) if milestones is None else AtMilestones(milestones, **options)
    found, rows = fitted(None, str(tmp_path / "logs"), default_root_dir=tmp_path, callbacks=[finder])
    assert len(finder.optimal_lr.results["loss"]) == 15
    assert found == untouched[0]
    assert rows == untouched[1]


def weights_after(module: L.LightningModule, **settings: Any) -> dict[str, Any]:
    trainer(**settings).fit(module)
    return {name: each.tolist() for name, each in module.state_dict().items()}


OPTIONS: dict[str, Any] = {"early_stop_threshold": None, "max_lr": 0.1}


def test_a_finder_in_fit_is_the_tuner_before_fit() -> None:
    found = []
    for inside in (True, False):
        L.seed_everything(7, verbose=False)
        module, finder = Stateful(), LearningRateFinder(num_training_steps=20, **OPTIONS)
        if not inside:
            assert Tuner(trainer()).lr_find(module, num_training=20, **OPTIONS).suggestion() == module.lr
        found.append((weights_after(module, callbacks=[finder] if inside else None), module.lr, module.hparams.lr))
    assert found[0] == found[1]
    assert found[0][1] == found[0][2] != 0.05


def test_a_batch_size_finder_in_fit_is_the_tuner_before_fit() -> None:
    found = []
    for inside in (True, False):
        L.seed_everything(7, verbose=False)
        module = Stateful()
        if not inside:
            Tuner(trainer()).scale_batch_size(module, max_val=6, steps_per_trial=1)
        finder = BatchSizeFinder(max_val=6, steps_per_trial=1)
        found.append((weights_after(module, callbacks=[finder] if inside else None), module.batch_size, module.calls))
    assert found[0] == found[1]
    assert found[0][1:] == (6, 16)


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_a_batch_size_finder_in_an_evaluation_gives_it_larger_batches(method: str) -> None:
    module, finder = Stateful(), BatchSizeFinder(max_val=12, steps_per_trial=1)
    made = trainer(callbacks=[finder])
    getattr(made, method)(module)
    assert (finder.optimal_batch_size, module.batch_size) == (12, 12)
    assert module.nested["sizes"] == {12: 2}


class Shuffled(Net):
    batch_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self) -> Any:
        return loader(24, self.batch_size, shuffle=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), "interval": "step"}]


@pytest.mark.parametrize("kind", ["fit", "milestones", "batch size"])
def test_a_run_that_is_resumed_in_mid_epoch_does_not_search_again(kind: str, tmp_path: Path) -> None:
    def run(**settings: Any) -> tuple[dict[str, Any], Any, Any]:
        L.seed_everything(7, verbose=False)
        module: Any = Shuffled()
        options = {"num_training_steps": 14, **OPTIONS}
        finder: Any = {
            "fit": lambda: LearningRateFinder(**options),
            "milestones": lambda: AtMilestones((0, 1), **options),
            "batch size": lambda: BatchSizeFinder(max_val=6, steps_per_trial=1),
        }[kind]()
        path = settings.pop("ckpt_path", None)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        made = trainer(callbacks=[finder, saver], enable_checkpointing=True, **settings)
        made.fit(module, ckpt_path=path)
        weights = {name: each.tolist() for name, each in module.state_dict().items()}
        return weights, (module.lr, module.batch_size), finder.state_dict()

    whole = run()
    step = 5 if kind == "batch size" else 8
    assert run(ckpt_path=tmp_path / f"step={step}.ckpt") == whole
    assert whole[1] != (0.01, 4)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from Stateful().data


def test_loaders_of_any_kind_begin_again_where_they_are_short() -> None:
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), batch_size=4)
    for batches in (data, [next(iter(data))], DataLoader(Stream(), batch_size=8)):
        found = Tuner(trainer()).lr_find(Stateful(), batches, num_training=12, **OPTIONS)
        assert len(found.results["lr"]) == 12
    with pytest.raises(MisconfigurationException, match="an iterator as loader"):
        Tuner(trainer()).lr_find(Stateful(), iter(data))


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"barebones": True}])
def test_settings_of_the_trainer_hold(settings: dict[str, Any]) -> None:
    module = Stateful()
    made = L.Trainer(accelerator="cpu", max_epochs=1, **settings) if "barebones" in settings else trainer(**settings)
    rates: list[float] = []

    def step(*args: Any, **kwargs: Any) -> None:
        rates.append(module.trainer.optimizers[0].param_groups[0]["lr"])

    module.on_before_optimizer_step = step  # type: ignore[method-assign]
    found = Tuner(made).lr_find(module, num_training=12, **OPTIONS)
    assert rates == found.results["lr"]
    assert (rates[0], rates[-1]) == (1e-8, 0.1)


def test_a_module_that_steps_its_optimizer_itself_is_searched_too() -> None:
    class Manual(Stateful):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = (self(batch[0]) - batch[1]).square().mean()
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return loss if self.returns else None

        returns = True

    found = Tuner(trainer()).lr_find(Manual(), num_training=12, **OPTIONS)
    assert found.results["lr"][-1] == 0.1
    assert len(set(found.results["loss"])) == 12
    Manual.returns = False
    with pytest.raises(MisconfigurationException, match="return the loss, also in manual optimization"):
        Tuner(trainer()).lr_find(Manual(), num_training=12)


def test_a_test_ends_where_the_loss_is_not_finite(tmp_path: Path) -> None:
    Stateful.error = None

    class Exploding(Stateful):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.calls > 15 else loss

    module = Exploding()
    found = Tuner(trainer(on_nonfinite="raise")).lr_find(module, num_training=30)
    assert len(found.results["lr"]) == 16
    assert found.suggestion() == module.lr
    assert files() == set()


def test_a_flag_is_not_proposed_as_a_learning_rate() -> None:
    class Plain(Stateful):
        def __init__(self) -> None:
            super().__init__()
            self.adapts = True

    with pytest.raises(MisconfigurationException, match="no attribute 'rate'") as refused:
        Tuner(trainer()).lr_find(Plain(), attr_name="rate")
    assert not {"adapts", "training"} & {*str(refused.value).replace(",", "").replace(".", "").split()}


def test_wrong_arguments_are_refused_before_any_work() -> None:
    module, tuner = Stateful(), Tuner(trainer())
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: tuner.lr_find(module, method="test"), "lr_find trains"),
        (lambda: tuner.lr_find(torch.nn.Linear(1, 1)), "a plain nn.Module"),
        (lambda: tuner.lr_find(module, method="tset"), "Did you mean 'test'"),
        (lambda: tuner.lr_find(module, dataloaders=[1]), "pass `train_dataloaders`"),
        (lambda: tuner.lr_find(module, mode="log"), "'exponential' or 'linear'"),
        (lambda: tuner.lr_find(module, min_lr=1, max_lr=0.1), "must be smaller"),
        (lambda: tuner.lr_find(module, min_lr=0), "above 0"),
        (lambda: tuner.lr_find(module, num_training=0), "num_training"),
        (lambda: tuner.lr_find(module, early_stop_threshold=0.5), "above 1"),
        (lambda: tuner.lr_find(module, attr_name="rate"), "no attribute 'rate'"),
        (lambda: tuner.scale_batch_size(module, mode="binary"), "'power' or 'binsearch'"),
        (lambda: tuner.scale_batch_size(module, margin=1), "margin"),
        (lambda: tuner.scale_batch_size(module, [1]), "do not pass loaders"),
        (lambda: tuner.scale_batch_size(module, [1], method="test"), "pass `dataloaders`"),
        (lambda: tuner.scale_batch_size(module, batch_arg_name="size"), "no attribute 'size'"),
        (lambda: Tuner(trainer(callbacks=[LearningRateFinder()])).lr_find(module), "has a LearningRateFinder"),
        (lambda: trainer(callbacks=[BatchSizeFinder()]).fit(module, [1]), "do not pass loaders"),
    ]
    for call, message in wrong:
        with pytest.raises(MisconfigurationException, match=message):
            call()
    assert module.calls == 0
    with pytest.warns(UserWarning, match="Skipping learning rate finder since `fast_dev_run` is enabled"):
        assert Tuner(trainer(fast_dev_run=True)).lr_find(module) is None
    with pytest.warns(UserWarning, match="Skipping batch size scaler since `fast_dev_run` is enabled"):
        assert Tuner(trainer(fast_dev_run=True)).scale_batch_size(module) is None


def test_what_makes_a_search_useless_is_told() -> None:
    class Ignoring(Stateful):
        def configure_optimizers(self) -> Any:
            made = [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(self.count)]
            return made if self.count > 1 else made[0]

        count = 1

        def train_dataloader(self) -> Any:
            return DataLoader(self.data, batch_size=3)

    with pytest.warns(UserWarning, match="makes the same optimizer whatever its value is"):
        Tuner(trainer()).lr_find(Ignoring(), num_training=12, early_stop_threshold=None)
    with pytest.raises(MisconfigurationException, match=r"Ignoring.batch_size to 2 and to 4.* batches of 3"):
        Tuner(trainer()).scale_batch_size(Ignoring())
    Ignoring.count, Ignoring.automatic_optimization = 2, False
    with pytest.raises(MisconfigurationException, match="returned 2: return one"):
        Tuner(trainer()).lr_find(Ignoring())


def test_a_data_module_gets_the_batch_size_with_its_hparams() -> None:
    class Data(L.LightningDataModule):
        def __init__(self, batch_size: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return DataLoader(Stateful().data, batch_size=self.hparams.batch_size)

    data, module = Data(), Stateful()
    del module.batch_size, module.hparams["batch_size"]
    assert Tuner(trainer()).scale_batch_size(module, datamodule=data, init_val=16) == 24  # all samples
    assert data.hparams.batch_size == 24
    assert data.trainer is None
    assert "batch_size" not in vars(data)


def search_in_rank(folder: Path) -> None:
    found: dict[str, Any] = {}
    rank = 0

    def fault(size: int, calls: int) -> BaseException | None:
        return RuntimeError("CUDA error: out of memory") if size > (3 if rank else 9) else None

    for name in ("untouched", "searched"):
        L.seed_everything(7, verbose=False)
        made, module = trainer(devices=2, strategy="ddp", max_epochs=1), Stateful()
        if name == "searched":
            found["lr"] = (
                Tuner(made).lr_find(module, num_training=12, early_stop_threshold=None, update_attr=False).results
            )
            rank, Stateful.error = made.global_rank, staticmethod(fault)
            found["sizes"] = [Tuner(made).scale_batch_size(module, method=m, margin=0) for m in ("fit", "test")]
            module.batch_size = module.hparams.batch_size = 4
            Stateful.error = None
        found[name] = weights_after(module, devices=2, strategy="ddp", max_epochs=1)
    torch.save(found, folder / f"{made.global_rank}.pt")


@pytest.mark.faults  # takes long
def test_two_ranks_find_the_same(tmp_path: Path) -> None:
    run_in_ranks(search_in_rank, tmp_path)
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert zero["lr"] == one["lr"] and len(zero["lr"]["lr"]) == 12
    assert zero["sizes"] == one["sizes"] == [2, 2]
    assert zero["searched"] == zero["untouched"] == one["searched"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine")])
def test_an_error_in_a_search_inside_a_fit_leaves_the_module_as_it_was(error: BaseException) -> None:
    module = Stateful()
    module.setup("fit")
    before, made = held(module), trainer(callbacks=[LearningRateFinder(num_training_steps=12)])
    Stateful.error = staticmethod(raising(error, 6))
    try:
        with pytest.raises(ValueError if isinstance(error, ValueError) else SystemExit):
            made.fit(module)
    finally:
        Stateful.error = None
    assert made.interrupted
    left = held(module)
    for name in ("_trainer", "_fabric", "_metrics"):
        before[""].pop(name), left[""].pop(name)
    assert left == before
    assert module.trainer is made
