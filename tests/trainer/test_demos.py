"""The demo models and data: numbers are those of Lightning 2.6.6, to the last bit of what is compared.

Tests of ``treadle.demos``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from treadle import Trainer, seed_everything
from treadle.demos import boring_classes, lstm, transformer
from treadle.demos.logo import cli_lightning_logo
from treadle.demos.mnist_datamodule import MNISTDataModule
from treadle.demos.torchvision_models import get_torchvision_model
from treadle_fabric import MisconfigurationException, MissingPackageError

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def total(tensor: torch.Tensor) -> Any:
    """The sum, which processors round in the last digit."""
    return pytest.approx(tensor.detach().double().sum().item(), abs=3e-6)


def test_the_boring_model_has_the_weights_and_losses_of_lightnings() -> None:
    seed_everything(7, verbose=False)
    model = boring_classes.BoringModel()
    assert {name: (tuple(v.shape), total(v)) for name, v in model.state_dict().items()} == {
        "layer.weight": ((2, 32), 0.540656),
        "layer.bias": ((2,), -0.053013),
    }
    batch = torch.randn(4, 32)
    assert total(model(batch)) == -0.454975
    assert total(model.loss(model(batch), torch.zeros(4, 2))) == 0.162401
    for step, key in ((model.training_step, "loss"), (model.validation_step, "x"), (model.test_step, "y")):
        returned: Any = step(batch, 0)
        assert list(returned) == [key] and total(returned[key]) == 1.276145
    (sgd,), (scheduler,) = model.configure_optimizers()
    assert type(sgd) is torch.optim.SGD and sgd.param_groups[0]["lr"] == 0.1
    assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR) and (scheduler.step_size, scheduler.gamma) == (1, 0.1)
    loaders = model.train_dataloader(), model.val_dataloader(), model.test_dataloader(), model.predict_dataloader()
    assert [(len(loader), tuple(next(iter(loader)).shape)) for loader in loaders] == [(64, (1, 32))] * 4


@pytest.mark.parametrize(
    "make", [boring_classes.BoringModel, boring_classes.ManualOptimBoringModel], ids=["automatic", "manual"]
)
def test_every_stage_of_a_boring_model_runs(make: Any, tmp_path: Path) -> None:
    model = make()
    before = model.layer.weight.detach().clone()
    trainer = Trainer(**QUIET, max_epochs=1, limit_train_batches=2, limit_val_batches=2, default_root_dir=tmp_path)
    trainer.fit(model)
    assert trainer.global_step == 2 and not torch.equal(before, model.layer.weight)
    trainer.validate(model, verbose=False)
    trainer.test(model, verbose=False)
    assert len(trainer.predict(model) or ()) == 64


@pytest.mark.parametrize(
    ("make", "stage", "loader", "sizes"),
    [
        (boring_classes.BoringDataModule, "fit", "train_dataloader", [64]),
        (boring_classes.BoringDataModule, "validate", "val_dataloader", [64]),
        (boring_classes.BoringDataModule, "test", "test_dataloader", [64]),
        (boring_classes.BoringDataModule, "predict", "predict_dataloader", [64]),
        (boring_classes.BoringDataModuleNoLen, "fit", "train_dataloader", [512]),
        (boring_classes.BoringDataModuleNoLen, "fit", "val_dataloader", [128]),
        (boring_classes.BoringDataModuleNoLen, "test", "test_dataloader", [256]),
        (boring_classes.BoringDataModuleNoLen, "predict", "predict_dataloader", [64]),
        (boring_classes.IterableBoringDataModule, "fit", "train_dataloader", [16, 16]),
        (boring_classes.IterableBoringDataModule, "validate", "val_dataloader", [32, 32]),
        (boring_classes.IterableBoringDataModule, "test", "test_dataloader", [64, 64]),
        (boring_classes.IterableBoringDataModule, "predict", "predict_dataloader", [128, 128]),
    ],
)
def test_the_data_of_a_stage(make: Any, stage: str, loader: str, sizes: list[int]) -> None:
    module = make()
    module.setup(stage)
    loaders = getattr(module, loader)()
    loaders = loaders if isinstance(loaders, list) else [loaders]
    assert [sum(1 for _ in each) for each in loaders] == sizes and all(isinstance(each, DataLoader) for each in loaders)


def test_datasets() -> None:
    seed_everything(2, verbose=False)
    sample = boring_classes.RandomDictDataset(3, 5)[1]
    assert (total(sample["a"]), total(sample["b"])) == (-0.793801, 5.206199)
    for make in (boring_classes.RandomIterableDataset, boring_classes.RandomIterableDatasetWithLen):
        assert [tuple(each.shape) for each in make(3, 5)] == [(3,)] * 5
    assert len(boring_classes.RandomIterableDatasetWithLen(3, 5)) == 5


def test_the_demo_models() -> None:
    seed_everything(1, verbose=False)
    model = boring_classes.DemoModel()
    assert tuple(model.l1.weight.shape) == (10, 32) and model.learning_rate == 0.02
    assert total(model(torch.ones(2, 32))) == 5.014768
    seed_everything(1, verbose=False)
    assert boring_classes.Net()(torch.ones(2, 1, 28, 28)).shape == (2, 10)


def test_the_transformer() -> None:
    seed_everything(5, verbose=False)
    model = transformer.Transformer(vocab_size=50).eval()
    words, target = torch.randint(0, 50, (2, 7)), torch.randint(0, 50, (2, 7))
    found = model(words, target)
    assert found.shape == (14, 50) and abs(found.sum().item() + 2843.070969) < 1e-3
    assert torch.equal(found, model(words, target, model.generate_square_subsequent_mask(7)))
    seed_everything(5, verbose=False)
    whole = transformer.LightningTransformer(vocab_size=40).eval()
    assert whole.training_step((words % 40, target % 40), 0).item() == pytest.approx(3.681597, abs=1e-4)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_the_lstm_goes_on_from_batch_to_batch() -> None:
    assert list(lstm.SequenceSampler(range(23), 4)) == [[i, i + 5, i + 10, i + 15] for i in range(5)]
    assert len(lstm.SequenceSampler(range(3), 4)) == 0
    model = lstm.LightningLSTM(vocab_size=30)
    model.model = lstm.SimpleLSTM(vocab_size=30, ninp=8, nhid=8, nlayers=2)
    words = torch.randint(0, 30, (4, 5))
    loss = model.training_step((words, words), 0)
    loss.backward()
    assert model.hidden is not None and [tuple(each.shape) for each in model.hidden] == [(2, 4, 8)] * 2
    model.training_step((words, words), 1).backward()  # the state is cut off from the batch before
    model.on_train_epoch_end()
    assert model.hidden is None


def test_the_words_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"curl -L --create-dirs -o data/wikitext-2.txt https://"):
        transformer.LightningTransformer(vocab_size=5).prepare_data()
    Path("data").mkdir()
    Path("data/wikitext-2.txt").write_text("the cat sat\n\n on the mat \n" * 40)
    numbers, dictionary = transformer.tokenize(Path("data/wikitext-2.txt"))
    assert numbers[:8].tolist() == [0, 1, 2, 3, 3, 4, 0, 5] and len(dictionary) == 6 and len(numbers) == 360
    dataset = transformer.WikiText2(block_size=4)
    assert len(dataset) == 89 and dataset.vocab_size == 6
    assert [each.tolist() for each in dataset[1]] == [[3, 4, 0, 5], [4, 0, 5, 3]]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed here")
def test_what_needs_torchvision_says_so() -> None:
    for call in (MNISTDataModule().prepare_data, lambda: get_torchvision_model("resnet18")):
        with pytest.raises(MissingPackageError, match="pip install torchvision"):
            call()
    assert MNISTDataModule(batch_size=3).num_classes == 10 and MNISTDataModule().default_transforms is None


def test_the_logo(capsys: pytest.CaptureFixture[str]) -> None:
    cli_lightning_logo()
    assert capsys.readouterr().out == "Treadle\n"
