"""Training on one device of XLA: checkpoints, exact resume, what is logged, profiles, and what is refused.

Tests of ``treadle_fabric.accelerators.xla``, ``treadle_fabric.checkpoint.host.xla_io``, ``treadle_fabric.randomness``,
``treadle.profilers.xla``: `make test-xla`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from tests.processes import run_in_ranks
from treadle.callbacks import ModelCheckpoint
from treadle.profilers import XLAProfiler
from treadle_fabric import DeviceUnavailableError, Fabric
from treadle_fabric.plugins import XLACheckpointIO

pytestmark = [pytest.mark.xla, pytest.mark.timeout(600)]


class Net(L.LightningModule):
    """Two layers with dropout, whose masks the device draws."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.layers(batch[0]).square().mean()
        self.log("loss", loss)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layers(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(samples: int = 24) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.linspace(-1, 1, samples * 4).view(samples, 4)), batch_size=4)


def fit(folder: Path, ckpt_path: str | None = None, **arguments: Any) -> tuple[L.Trainer, list[float]]:
    L.seed_everything(3, verbose=False)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = L.Trainer(accelerator="tpu", devices=1, callbacks=saver, **{"max_epochs": 2, **quiet, **arguments})
    module = Net()
    trainer.fit(module, loader(), loader(8), ckpt_path=ckpt_path)
    return trainer, [float(loss) for loss in module.losses]


def resume(folder: Path) -> None:
    trainer, losses = fit(folder)
    assert trainer.strategy.root_device.type == "xla"
    assert len(losses) == 12
    for step in (2, 8):
        path = folder / f"step={step}.ckpt"
        content = torch.load(path, weights_only=True)
        assert {tensor.device.type for tensor in content["state_dict"].values()} == {"cpu"}
        _, rest = fit(folder / "again", str(path))
        assert rest == losses[step:]


def test_a_resumed_run_draws_the_same_masks(tmp_path: Path) -> None:
    run_in_ranks(resume, tmp_path, devices=1, timeout=500)


def count_transfers(folder: Path) -> None:
    import torch_xla.debug.metrics as metrics

    class Counts(L.Callback):
        seen: tuple[int, ...] = ()

        def on_train_batch_end(self, *args: Any) -> None:
            data = metrics.metric_data("TransferFromDeviceTime")
            self.seen += (data[0] if data else 0,)

    counts, quiet = Counts(), {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(
        accelerator="tpu", max_epochs=1, callbacks=counts, enable_checkpointing=False, limit_val_batches=0, **quiet
    )
    trainer.fit(Net(), loader(40))
    assert len(counts.seen) == 10
    assert counts.seen[-1] == counts.seen[2], f"each step waits for the device: {counts.seen}"


def test_what_is_logged_stays_on_the_device(tmp_path: Path) -> None:
    run_in_ranks(count_transfers, tmp_path, devices=1, timeout=300)


class Scheduled(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def count_graphs(folder: Path) -> None:
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as metrics

    class Counts(L.Callback):
        compiled: tuple[int, ...] = ()
        ran: tuple[int, ...] = ()

        def on_train_batch_end(self, *args: Any) -> None:
            xm.wait_device_ops()  # a graph is counted when it has run
            compiled, ran = (metrics.metric_data(name) or (0,) for name in ("CompileTime", "ExecuteTime"))
            self.compiled += (compiled[0],)
            self.ran += (ran[0],)

    counts: Any = Counts()
    quiet: Any = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="tpu", max_epochs=1, callbacks=counts, limit_val_batches=0, **quiet)
    trainer.fit(Scheduled(), loader(48))
    assert counts.compiled[5] == counts.compiled[-1], f"steps are compiled anew: {counts.compiled}"
    runs = [after - before for before, after in zip(counts.ran[5:-1:2], counts.ran[7::2], strict=True)]
    assert set(runs) == {2}, f"a batch is a graph, and not {runs} graphs two batches"


def test_the_graphs_of_a_loop_are_few(tmp_path: Path) -> None:
    run_in_ranks(count_graphs, tmp_path, devices=1, timeout=300)


def profile(folder: Path) -> None:
    fit(folder / "run", max_epochs=1, profiler=XLAProfiler(dirpath=folder / "trace"))
    assert [path for path in (folder / "trace").rglob("*") if path.name.endswith(".xplane.pb")]
    profiler = XLAProfiler(port=9123)  # with the server
    with profiler.profile("forward"):
        torch.zeros(2, device="xla").add(1).cpu()
    profiler.teardown(None)


def test_a_profile_is_written(tmp_path: Path) -> None:
    run_in_ranks(profile, tmp_path, devices=1, timeout=300)


def write_and_read(folder: Path) -> None:
    fabric = Fabric(accelerator="tpu", devices=1)
    model = fabric.setup(nn.Linear(2, 1))
    files = XLACheckpointIO()
    files.save_checkpoint({"model": model.state_dict(), "step": 3}, folder / "a.ckpt")
    found = files.load_checkpoint(folder / "a.ckpt")
    assert found["step"] == 3
    assert found["model"]["weight"].device.type == "cpu"
    assert torch.equal(found["model"]["weight"], model.weight.cpu())
    assert fabric.strategy.accelerator is not None
    assert isinstance(fabric.strategy.accelerator.get_device_stats(fabric.device), dict)
    files.remove_checkpoint(folder / "a.ckpt")
    assert not (folder / "a.ckpt").exists()


def test_files_of_xla_are_read_anywhere(tmp_path: Path) -> None:
    run_in_ranks(write_and_read, tmp_path, devices=1, timeout=300)


def set_up_late() -> None:
    nn.Linear(1, 1)(torch.zeros(1, 1)).sum().backward()
    with pytest.raises(DeviceUnavailableError, match=r"A backward pass ran in this process before accelerator='tpu'"):
        Fabric(accelerator="tpu", devices=1).launch()


def test_a_backward_pass_before_is_told() -> None:
    run_in_ranks(set_up_late, devices=1, timeout=300)
