"""predict: what comes back, in which order, and where it is.

Tests of ``treadle.loops.predict``.
"""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

import treadle as L

Pair = namedtuple("Pair", "batch_idx first")


class Firsts(Net):
    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return Pair(batch_idx, batch[:, 0] + 100 * dataloader_idx)


def test_predictions_come_in_order_one_for_each_batch(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    found = run.predict(Firsts(), loader(5))
    assert [(p.batch_idx, p.first.tolist()) for p in found] == [(0, [0, 1]), (1, [2, 3]), (2, [4])]
    assert all(type(p) is Pair and p.first.device.type == "cpu" for p in found)
    assert run.num_predict_batches == [3]
    assert run.state.fn == "predict"


def test_several_loaders_give_a_list_each(tmp_path: Path) -> None:
    found = trainer(tmp_path).predict(Firsts(), [loader(3), loader(2)])
    assert [[p.first.tolist() for p in part] for part in found] == [[[0, 1], [2]], [[100, 101]]]


class Pairs(BatchSampler):
    """A batch sampler of the user's, which tells its own length."""

    def __len__(self) -> int:
        return super().__len__()


@pytest.mark.parametrize("own", [False, True])
def test_the_samples_that_drop_last_leaves_out_are_predicted(tmp_path: Path, own: bool) -> None:
    data = loader(5).dataset
    dropping = DataLoader(data, batch_sampler=Pairs(range(5), 2, True)) if own else DataLoader(data, 2, drop_last=True)
    run = trainer(tmp_path)
    assert [p.first.tolist() for p in run.predict(Firsts(), dropping)] == [[0, 1], [2, 3], [4]]
    assert run.num_predict_batches == [3]
    assert len(dropping) == 2, "the loader is as it was"
    run.validate(Net(), dropping, verbose=False)
    assert run.num_val_batches == [2]


def test_limits(tmp_path: Path) -> None:
    assert len(trainer(tmp_path, limit_predict_batches=2).predict(Firsts(), loader(8))) == 2
    assert len(trainer(tmp_path, fast_dev_run=1).predict(Firsts(), loader(8))) == 1
    assert trainer(tmp_path, limit_predict_batches=0).predict(Firsts(), loader(8)) == []


def test_nothing_is_kept_where_that_is_not_wanted(tmp_path: Path) -> None:
    seen: list[list[float]] = []

    class Writing(L.Callback):
        def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            seen.append(outputs.first.tolist())

    run = trainer(tmp_path, callbacks=Writing())
    assert run.predict(Firsts(), loader(4), return_predictions=False) is None
    assert seen == [[0, 1], [2, 3]]


def test_streaming_computes_a_batch_when_it_is_asked_for(tmp_path: Path) -> None:
    computed: list[int] = []
    ended: list[str] = []

    class Lazy(Firsts):
        def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            computed.append(batch_idx)
            assert not self.training and not torch.is_grad_enabled()
            return super().predict_step(batch, batch_idx, dataloader_idx)

        def on_predict_end(self) -> None:
            ended.append("predict")

        def teardown(self, stage: str) -> None:
            ended.append(stage)

    model, run = Lazy(), trainer(tmp_path)
    stream = run.predict(model, [loader(5), loader(2)], return_predictions="stream")
    assert computed == []
    assert next(stream).first.tolist() == [0, 1]
    assert computed == [0]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), "whoever asks is not touched"
    with pytest.raises(L.MisconfigurationException, match="make another Trainer"):
        run.fit(model, loader(2))
    assert [p.first.tolist() for p in stream] == [[2, 3], [4], [100, 101]]
    assert ended == ["predict", "predict"] and run.state.status == "finished" and model.training
    stream = run.predict(model, loader(8), return_predictions="stream")
    next(stream)
    stream.close()  # enough
    assert run.state.status == "finished" and computed == [0, 1, 2, 0, 0]
    assert len(run.predict(model, loader(4))) == 2, "the trainer is free again"


def test_streaming_keeps_one_batch_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    class Wide(Net):
        def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return bytes(1_000_000)

    def peak(**kwargs: Any) -> int:
        tracemalloc.start()
        for _ in trainer(tmp_path).predict(Wide(), loader(60), **kwargs):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak() > 30_000_000
    assert peak(return_predictions="stream") < 5_000_000


def test_what_predict_cannot_return(tmp_path: Path) -> None:
    with pytest.raises(L.MisconfigurationException, match=r"return_predictions='streams' must be True, False or 'str"):
        trainer(tmp_path).predict(Firsts(), loader(2), return_predictions="streams")
    run = trainer(tmp_path, devices=2, strategy="ddp_spawn")
    with pytest.raises(L.MisconfigurationException, match="cannot reach out of the processes"):
        run.predict(Firsts(), loader(2), return_predictions="stream")
    with pytest.raises(Exception, match="nowhere.ckpt"):  # said at once, not at the first batch
        trainer(tmp_path).predict(Firsts(), loader(2), return_predictions="stream", ckpt_path="nowhere.ckpt")


def test_forward_is_the_default_step(tmp_path: Path) -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = Plain()
    (found,) = trainer(tmp_path).predict(model, loader(2))
    assert torch.equal(found, model(next(iter(loader(2)))))


@pytest.mark.parametrize("inference_mode", [True, False])
def test_predictions_need_no_gradient_and_modes_come_back(tmp_path: Path, inference_mode: bool) -> None:
    class Layers(Net):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            assert not self.drop.training
            assert torch.is_inference_mode_enabled() is inference_mode
            return self(self.drop(batch))

    model = Layers()
    (found,) = trainer(tmp_path, inference_mode=inference_mode).predict(model, loader(2))
    assert not found.requires_grad
    assert model.training and model.drop.training


def test_a_step_may_return_anything(tmp_path: Path) -> None:
    class Mixed(Net):
        def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return None if batch_idx else {"names": ["a", "b"], "x": batch[0]}

    first, second = trainer(tmp_path).predict(Mixed(), loader(4))
    assert first["names"] == ["a", "b"] and first["x"].tolist() == [0, 0, 0, 0]
    assert second is None


def test_a_step_that_draws_its_batches_itself(tmp_path: Path) -> None:
    class Drawing(Net):
        def predict_step(self, dataloader_iter: Any) -> Any:
            batch, batch_idx, _ = next(dataloader_iter)
            return batch_idx, batch[0, 0].item()

    class Counting(L.Callback):
        def on_predict_batch_start(self, *args: Any) -> None:
            seen.append("start")

        def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            seen.append(outputs)

    seen: list[Any] = []
    expected = [(0, 0.0), (1, 2.0)]
    assert trainer(tmp_path, callbacks=Counting()).predict(Drawing(), loader(4)) == expected
    assert seen == ["start", expected[0], "start", expected[1]]


def test_the_data_module_and_the_last_model(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        def predict_dataloader(self) -> Any:
            return loader(2)

    run = trainer(tmp_path)
    run.fit(model := Firsts(), loader(4))
    assert [p.first.tolist() for p in run.predict(datamodule=Data())] == [[0, 1]]
    assert run.lightning_module is model
    assert run.global_step == 2


def test_weights_of_a_checkpoint(tmp_path: Path) -> None:
    class Plain(Net):
        def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.layer.bias.clone()

    run = trainer(tmp_path)
    run.fit(model := Plain(), loader(4))
    run.save_checkpoint(tmp_path / "a.ckpt")
    trained = model.layer.bias.detach().clone()
    (found,) = run.predict(Plain(), loader(2), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(found, trained)
    (found,) = trainer(tmp_path).predict(Plain(), loader(2))
    assert not torch.equal(found, trained)
