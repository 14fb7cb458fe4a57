"""What training gives: losses, weights and files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoke.place import Model, Place, Saves, batches, check, made, network, same, values
from treadle_fabric import NonFiniteError, TorchCheckpointIO


def trains(precision: str) -> Callable[[Place], str]:
    def run(at: Place) -> str:
        model = made(Model)
        at.trainer(precision=precision, max_epochs=6).fit(model, batches())
        losses = values(model.losses)
        weights = next(model.parameters())
        dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
        assert weights.dtype == dtype or weights.dtype == torch.float32, weights.dtype
        assert sum(losses[-10:]) < sum(losses[:10]), losses
        return f"loss {sum(losses[:10]) / 10:.3f} -> {sum(losses[-10:]) / 10:.3f}"

    return run


for each in ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true"):
    check(f"trains in {each}", card="losses are scaled on cards only" if each == "16-mixed" else "")(trains(each))


def raw_losses(at: Place, steps: Any) -> list[float]:
    net = made(network, 32, 0.1).to(at.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for x, y in steps:
        x, y = x.to(at.device), y.to(at.device)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return values(losses)


@check("losses of a Fabric loop are those of a raw loop")
def fabric_losses(at: Place) -> str:
    raw = raw_losses(at, batches())
    fabric, net = at.fabric(), made(network, 32, 0.1)
    net, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=1e-2))
    losses = []
    for x, y in fabric.setup_dataloaders(batches()):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    assert values(losses) == raw, [a - b for a, b in zip(values(losses), raw, strict=True)]
    return f"{len(raw)} of {len(raw)} equal"


@check("a resume in mid-epoch is exact, with dropout")
def resume(at: Place) -> str:
    path = at.folder / "a.ckpt"
    whole = made(Model, 0.5)
    at.trainer(max_steps=15).fit(whole, batches(shuffle=True))
    at.trainer(max_steps=6, callbacks=[Saves(path, 6)]).fit(first := made(Model, 0.5), batches(shuffle=True))
    torch.rand(10, device=at.device)  # the random state is to be that of the file
    second = Model(0.5)
    at.trainer(max_steps=15).fit(second, batches(shuffle=True), ckpt_path=path)
    assert values(first.losses + second.losses) == values(whole.losses)
    assert same(whole.state_dict(), second.state_dict())
    return "9 of 9 losses and all weights equal"


@check("a file goes from the device to the CPU and back")
def files(at: Place) -> str:
    path, back = at.folder / "a.ckpt", at.folder / "b.ckpt"
    model = made(Model)
    run = at.trainer(max_steps=3)
    run.fit(model, batches())
    run.save_checkpoint(path)
    saved = TorchCheckpointIO().load_checkpoint(path)["state_dict"]
    on_cpu = Model.load_from_checkpoint(path, map_location="cpu")
    assert next(on_cpu.parameters()).device.type == "cpu" and same(saved, on_cpu.state_dict())
    later = at.trainer(accelerator="cpu", max_steps=5)
    later.fit(on_cpu, batches(), ckpt_path=path)
    later.save_checkpoint(back)
    again = Model()
    at.trainer(max_steps=7).fit(again, batches(), ckpt_path=back)
    assert len(again.losses) == 2
    return f"{path.stat().st_size / 1e3:.0f} kB"


@check("torch.compile of a module")
def compiled(at: Place) -> str:
    plain, model = made(Model), made(Model)
    at.trainer(max_steps=4).fit(plain, batches())
    start = time.perf_counter()
    at.trainer(max_steps=4).fit(torch.compile(model, backend="eager" if at.cpu else "inductor"), batches())
    seconds = time.perf_counter() - start
    far = max(abs(a - b) for a, b in zip(values(plain.losses), values(model.losses), strict=True))
    assert far < 1e-3, far
    return f"{seconds:.1f} s, losses within {far:.1e}"


@check("fused and capturable Adam go on from a file")
def adam(at: Place) -> str:
    kinds = {"fused": {"fused": True}} | ({} if at.cpu else {"capturable": {"capturable": True}})
    for name, options in kinds.items():

        def run(
            steps: int, load: Path | None, save: Path | None, options: dict[str, Any] = options
        ) -> dict[str, Tensor]:
            fabric, net = at.fabric(), made(network)
            net, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=1e-2, **options))
            if load is not None:
                fabric.load(load, {"net": net, "optimizer": optimizer})
            for x, y in list(fabric.setup_dataloaders(batches()))[3 if load is not None else 0 :][:steps]:
                optimizer.zero_grad()
                fabric.backward(nn.functional.mse_loss(net(x), y))
                optimizer.step()
            if save is not None:
                fabric.save(save, {"net": net, "optimizer": optimizer})
            return dict(net.state_dict())

        path = at.folder / f"{name}.ckpt"
        whole = run(6, None, None)
        run(3, None, path)
        assert same(whole, run(3, path, None)), name
    return ", ".join(kinds)


class Manual(Model):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self.net(x), y))
        optimizer.step()
        after = self.net(x)
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            fresh = self.net(x)
        assert torch.equal(after, fresh), "the forward after the step used the weights before it"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@check("autocast casts the weights again after optimizer.step")
def autocast(at: Place) -> str:
    at.trainer(precision="bf16-mixed", max_steps=3).fit(made(Manual), batches())
    return "3 steps"


class Bad(Model):
    """The loss of one batch is infinite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.before = [p.detach().clone() for p in self.parameters()]
        return loss * float("inf") if batch_idx == 2 else loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        changed = any(not torch.equal(a, b) for a, b in zip(self.before, self.parameters(), strict=True))
        assert changed == (batch_idx != 2), f"batch {batch_idx}: weights changed: {changed}"


@check("the gradient scaler leaves out a step that overflows", card="16-mixed needs a card")
def scaler(at: Place) -> str:
    from torch.amp import GradScaler

    from treadle.plugins import MixedPrecision

    scale = GradScaler("cuda", init_scale=2.0**10)
    run = at.trainer(plugins=MixedPrecision("16-mixed", "cuda", scaler=scale), max_epochs=1)
    run.fit(made(Bad), batches(32))
    assert scale.get_scale() == 2.0**9, scale.get_scale()
    return "scale 1024 -> 512"


@check("on_nonfinite skips or raises")
def nonfinite(at: Place) -> str:
    model = made(Bad)
    at.trainer(on_nonfinite="skip", max_epochs=1).fit(model, batches(32))
    try:
        at.trainer(on_nonfinite="raise", max_epochs=1).fit(made(Bad), batches(32))
    except NonFiniteError:
        return f"skipped 1 of {len(model.losses)}, raised at batch 2"
    raise AssertionError("no NonFiniteError")


@check("predict gives what the module gives")
def predict(at: Place) -> str:
    model = made(Model).eval()
    with torch.inference_mode():
        expected = torch.cat([model.to(at.device).net(x.to(at.device)).cpu() for x, _ in batches()])
    found = torch.cat([each.cpu() for each in at.trainer().predict(model, batches())])
    assert torch.equal(found, expected)
    return f"{len(found)} rows"


class Large(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 3:
            torch.empty(2**50, device=batch[0].device)
        return super().training_step(batch, batch_idx)


@check("running out of memory is said clearly, and a checkpoint stays whole")
def out_of_memory(at: Place) -> str:
    path = at.folder / "a.ckpt"

    try:
        at.trainer(callbacks=[Saves(path, 2)], max_steps=6).fit(made(Large), batches())
    except RuntimeError as error:
        assert at.cpu or isinstance(error, torch.OutOfMemoryError), error
        assert "memory" in str(error), error
    else:
        raise AssertionError("no error")
    model = Model()
    at.trainer(max_steps=6).fit(model, batches(), ckpt_path=path)
    assert len(model.losses) == 4
    return "4 steps after it"


@check("devices=[0]", card="a list of devices means cards")
def devices(at: Place) -> str:
    model = made(Model)
    run = at.trainer(devices=[0], max_steps=2)
    run.fit(model, batches())
    assert run.strategy.root_device == torch.device("cuda", 0)
    return "cuda:0"
