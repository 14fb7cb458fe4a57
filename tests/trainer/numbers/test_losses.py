"""Losses with weights, batches without a loss, batches without samples: on one process, and on two.

Tests of ``treadle.numbers.losses``, ``treadle.run.loss``.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import Net, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from treadle import Callback, MisconfigurationException
from treadle_fabric import MixedPrecision

pytestmark = pytest.mark.timeout(110)

WORLD = 2
WIDTH = 4
TOKENS = [5, 1, 3, 8, 2, 2, 7]  # of the batches of an epoch
ACCUMULATE = 3  # so that the epoch ends with an accumulation of one batch


def batches(tokens: list[int] = TOKENS) -> list[Tensor]:
    """Batches of ``(tokens, WIDTH)``, all of them parts of the same samples."""
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(sum(tokens), WIDTH, generator=generator).split(tokens))


class Weighted(Net):
    """Returns the mean over the tokens of a batch, and how many there are."""

    def __init__(self, as_tensor: bool = False) -> None:
        super().__init__()
        self.as_tensor = as_tensor
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        weight = torch.tensor(len(batch)) if self.as_tensor else len(batch)
        return {"loss": self.loss(batch), "weight": weight}

    def on_before_backward(self, loss: Tensor) -> None:
        self.seen.append(loss.item())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Unweighted(Weighted):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)


def weights(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()]).tolist()


def fit(folder: Path, model: Any, data: Any, **arguments: Any) -> Any:
    run = trainer(folder, **arguments)
    run.fit(model, data)
    return run


def concatenated(folder: Path, **arguments: Any) -> list[float]:
    """What one step on the whole of each accumulation makes of the weights."""
    model = Unweighted()
    whole = [torch.cat(batches()[i : i + ACCUMULATE]) for i in range(0, len(TOKENS), ACCUMULATE)]
    fit(folder, model, whole, max_epochs=2, **arguments)
    return weights(model)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("sized", [True, False])
def test_an_accumulation_is_one_step_on_all_of_its_tokens(
    tmp_path: Path, as_tensor: bool, clip: float | None, sized: bool
) -> None:
    model = Weighted(as_tensor)
    data: Any = batches() if sized else Endless()
    run = fit(tmp_path, model, data, max_epochs=2, accumulate_grad_batches=ACCUMULATE, gradient_clip_val=clip)
    assert run.global_step == 6
    assert weights(model) == pytest.approx(concatenated(tmp_path, gradient_clip_val=clip), rel=1e-5)
    plain = Unweighted()
    fit(tmp_path, plain, batches(), max_epochs=2, accumulate_grad_batches=ACCUMULATE, gradient_clip_val=clip)
    assert weights(plain) != pytest.approx(weights(model), rel=1e-3)


class Endless:
    """The batches, of unknown number."""

    def __iter__(self) -> Any:
        return iter(batches())


def test_weights_are_relative(tmp_path: Path) -> None:
    """Weights that are all the same change nothing but rounding, however large or small they are."""
    found = []
    for weight in (1e-30, 0.3, 1e30):

        class Constant(Weighted):
            def training_step(self, batch: Tensor, batch_idx: int) -> Any:
                return {"loss": self.loss(batch), "weight": weight}  # noqa: B023

        model = Constant()
        fit(tmp_path, model, batches(), accumulate_grad_batches=ACCUMULATE)
        found.append(weights(model))
    model = Unweighted()
    fit(tmp_path, model, batches(), accumulate_grad_batches=ACCUMULATE)
    for each in found:
        assert each == pytest.approx(weights(model), rel=1e-5)


def test_hooks_see_the_loss_times_its_weight_over_a_power_of_two_and_outputs_the_loss(tmp_path: Path) -> None:
    model, outputs = Weighted(), []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, out: Any, batch: Any, batch_idx: int) -> None:
            outputs.append((out["loss"].item(), out["weight"]))

    fit(tmp_path, model, batches(), limit_train_batches=2, accumulate_grad_batches=2, callbacks=Keep())
    losses = [Net().loss(b).item() for b in batches()[:2]]
    assert model.seen == pytest.approx([losses[0] * 5 / 8, losses[1] * 1 / 8])
    assert [w for _, w in outputs] == [5, 1]
    assert [loss for loss, _ in outputs] == pytest.approx([loss / 2 for loss in losses])


def test_an_optimizer_that_searches_along_a_line_sees_the_loss_of_its_gradients(tmp_path: Path) -> None:
    def searches(model: Any) -> Any:
        arguments: Any = {"max_iter": 2, "line_search_fn": "strong_wolfe"}
        model.configure_optimizers = lambda: torch.optim.LBFGS(model.parameters(), **arguments)
        fit(tmp_path, model, batches([1, 40]))
        return weights(model)

    assert searches(Weighted()) == pytest.approx(searches(Unweighted()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:The weights of an optimizer step are 0")
@pytest.mark.parametrize("nothing", [None, {"weight": 0}])
def test_an_optimizer_that_evaluates_several_times_needs_a_loss_for_every_batch(tmp_path: Path, nothing: Any) -> None:
    class Skips(Weighted):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            return output if batch_idx != 1 else nothing and output | nothing

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(MisconfigurationException, match="at batch_idx 1 .* LBFGS evaluates the loss several times"):
        fit(tmp_path, Skips(), batches())


class Zeroes(Weighted):
    """Batches of no tokens that count, whose mean is 0 / 0."""

    def __init__(self, zero: set[int]) -> None:
        super().__init__()
        self.zero = zero

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx in self.zero:
            return {"loss": self.loss(batch[:0]), "weight": 0}
        return {"loss": self.loss(batch), "weight": len(batch)}


def test_a_total_of_zero_is_no_step_and_a_single_zero_counts_for_nothing(tmp_path: Path) -> None:
    model = Zeroes({1, 3, 4, 5})
    with pytest.warns(UserWarning, match="weights of an optimizer step are 0 in total") as told:
        run = fit(tmp_path, model, batches(), max_epochs=2, accumulate_grad_batches=ACCUMULATE)
    assert sum("0 in total" in str(w.message) for w in told) == 1
    assert run.global_step == 4
    expected = Unweighted()
    parts = batches()
    fit(tmp_path, expected, [torch.cat([parts[0], parts[2]]), parts[6]], max_epochs=2)
    assert weights(model) == pytest.approx(weights(expected), rel=1e-5)


class Answers(Weighted):
    """Returns what it is told."""

    def __init__(self, *answers: Any) -> None:
        super().__init__()
        self.answers = answers

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss, answer = self.loss(batch), self.answers[batch_idx]
        return loss if answer is None else None if answer == "skip" else {"loss": loss, "weight": answer}


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ((3, None), "no weight"),
        ((None, 3), "the weight 3"),
        (("skip", 3, None), "no weight"),
        ((-1,), "weight=-1"),
        ((float("nan"),), "weight=nan"),
        (("many",), "weight='many'"),
        ((torch.ones(3),), r"shape \(3,\)"),
    ],
)
def test_what_is_no_weight_and_a_mixture_are_errors(tmp_path: Path, answers: Any, words: str) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        fit(tmp_path, Answers(*answers), batches(), limit_train_batches=3, accumulate_grad_batches=3)


def test_sixteen_bits_are_unscaled_and_normalized_before_clipping(tmp_path: Path) -> None:
    def arguments() -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        return {"plugins": MixedPrecision("16-mixed", "cpu", scaler), "gradient_clip_val": 0.05}

    model = Weighted()
    fit(tmp_path, model, batches(), max_epochs=2, accumulate_grad_batches=ACCUMULATE, **arguments())
    assert weights(model) == pytest.approx(concatenated(tmp_path, **arguments()), rel=1e-2)
    assert weights(model) != pytest.approx(weights(Net()), rel=2e-2)


@pytest.mark.parametrize("saved_at", [1, 4, 6])
def test_a_checkpoint_within_an_accumulation_resumes_to_the_last_bit(tmp_path: Path, saved_at: int) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, out: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 0 and batch_idx == saved_at:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    whole, resumed = Weighted(), Weighted()
    fit(tmp_path, whole, batches(), max_epochs=2, accumulate_grad_batches=ACCUMULATE, callbacks=Save())
    run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=ACCUMULATE)
    run.fit(resumed, batches(), ckpt_path=tmp_path / "saved.ckpt")
    assert weights(resumed) == weights(whole)
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["treadle"]["ranks"][0]["weights"]
    assert saved == {
        "reference": 16.0,
        "total": {1: 6.0, 4: 10.0, 6: 7.0}[saved_at],
        "count": {1: 2, 4: 2, 6: 1}[saved_at],
    }


# ---------------------------------------------------------------------------------------------- nothing to learn from


def test_an_epoch_of_none_is_told_of_once(tmp_path: Path) -> None:
    class Nothing(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None

    model = Nothing()
    with pytest.warns(UserWarning, match="or no loss, for all 7 batches of epoch 0") as told:
        fit(tmp_path, model, batches(), max_epochs=3)
    assert sum("or no loss, for all" in str(w.message) for w in told) == 1
    assert weights(model) == weights(Net())


class Logs(Unweighted):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.loss(batch))
        self.log("val_count", len(batch), reduce_fx="sum")


EMPTY = [3, 0, 2]


def test_a_batch_of_no_samples_changes_neither_weights_nor_means(tmp_path: Path) -> None:
    with_empty, without, found = Logs(), Logs(), []
    for model, tokens in ((with_empty, EMPTY), (without, [3, 2])):
        run = trainer(tmp_path, max_epochs=2)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run.fit(model, batches(tokens), batches(tokens))
        said = [str(w.message) for w in told if "0 samples" in str(w.message)]
        assert len(said) == (1 if tokens is EMPTY else 0)
        assert all("epoch 0, batch 1" in text for text in said)
        found.append({k: v.item() for k, v in run.callback_metrics.items() if k != "train_loss_step"})
    assert weights(with_empty) == weights(without)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0]["val_count"] == 5
    alone = trainer(tmp_path).validate(Logs(), batches([0]), verbose=False)[0]
    assert alone["val_loss"] != alone["val_loss"]  # a mean over nothing


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, len(x)),
        lambda x: [[x], "names"],
        lambda x: {"name": "a", "x": x},
        lambda x: UserDict(x=x),
        lambda x: SimpleNamespace(name="a", x=x),
    ],
)
def test_a_batch_of_no_samples_is_seen_in_what_it_is_wrapped_in(tmp_path: Path, wrap: Any) -> None:
    class Unwraps(Unweighted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            while not isinstance(batch, Tensor):
                batch = (
                    batch[0]
                    if isinstance(batch, (list, tuple))
                    else batch.x
                    if isinstance(batch, SimpleNamespace)
                    else batch["x"]
                )
            return self.loss(batch)

    model, without = Unwraps(), Unwraps()
    with pytest.warns(UserWarning, match="0 samples"):
        fit(tmp_path, model, DataLoader([wrap(b) for b in batches(EMPTY)], batch_size=None, collate_fn=lambda x: x))
    fit(tmp_path, without, batches([3, 2]))
    assert weights(model) == weights(without)


# ------------------------------------------------------------------------------------------------------ two processes


class Normalized(Unweighted):
    """Has buffers, which are the same on all ranks before each forward; adds to its momentum also where nothing is."""

    def __init__(self, skip: Any) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.BatchNorm1d(WIDTH), self.layer)
        self.skip = skip

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return None if (self.global_rank, batch_idx) in self.skip else loss


def together(folder: Path, model: Any, mine: Any, **arguments: Any) -> list[float]:
    run = fit(folder, model, mine, devices=WORLD, use_distributed_sampler=False, **arguments)
    return [*weights(model), run.global_step]


def run_two(folder: Path) -> None:
    """Writes down what a rank finds out."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    out: dict[str, Any] = {}
    parts = batches([5, 2, 3, 8, 2, 2, 7, 4, 6, 2, 3, 2])
    arguments: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2}
    for kind in (False, True):
        out[f"weighted {kind}"] = together(folder, Weighted(kind), parts[rank::2], **arguments)
    out["unweighted"] = together(folder, Unweighted(), parts[rank::2], **arguments)
    try:
        together(folder, Answers(*[3 if rank else None] * 6), parts[rank::2])
    except MisconfigurationException as error:
        out["mixed"] = str(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zeroes = Zeroes({4, 5} | ({0, 1} if rank else set()))
        out["zero"] = together(folder, zeroes, parts[rank::2], **arguments)
        one = {(1, 0), (0, 1), (1, 3), (0, 4), (1, 4), (1, 5)}
        for name, strategy in (("none", "ddp"), ("none, search", "ddp_find_unused_parameters_true")):
            out[name] = together(folder, Normalized(one), parts[rank::2], strategy=strategy)
            out[f"{name}, accumulating"] = together(
                folder, Normalized(one), parts[rank::2], strategy=strategy, **arguments
            )
        mine = batches([3, 2, 4, 2])
        mine[1] = mine[1][:0] if rank else mine[1]
        model = Logs()
        run = trainer(folder, devices=WORLD, use_distributed_sampler=False)
        run.fit(model, mine, mine)
        out["empty"] = weights(model)
        out["logged"] = {k: v.item() for k, v in run.callback_metrics.items() if k != "train_loss_step"}
    (folder / f"out{rank}.json").write_text(json.dumps(out))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found out."""
    folder = tmp_path_factory.mktemp("weights")
    run_in_ranks(run_two, folder)
    return [json.loads((folder / f"out{rank}.json").read_text()) for rank in range(WORLD)]


def expected(folder: Path, model: Any, *steps: list[int]) -> list[float]:
    """One process with each step's batches, by their number, in one."""
    parts = batches([5, 2, 3, 8, 2, 2, 7, 4, 6, 2, 3, 2])
    fit(folder, model, [torch.cat([parts[i] for i in each]) for each in steps], max_epochs=2)
    return weights(model)


def test_two_ranks_weigh_the_tokens_of_both(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    wanted = expected(tmp_path, Unweighted(), [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11])
    for found in ranks:
        assert found["weighted False"] == found["weighted True"]
        assert found["weighted False"] == pytest.approx([*wanted, 6], rel=1e-5)
        assert found["unweighted"] != pytest.approx([*wanted, 6], rel=1e-3)
        assert "with a weight on rank 1, and without one on rank 0" in found["mixed"]
    assert ranks[0]["weighted False"] == ranks[1]["weighted False"]


def test_a_rank_without_weight_counts_for_nothing_and_a_total_of_zero_is_no_step(
    ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Rank 1 has nothing in the first accumulation, nobody has in the third."""
    wanted = expected(tmp_path, Unweighted(), [0, 2], [4, 5, 6, 7])
    for found in ranks:
        assert found["zero"] == pytest.approx([*wanted, 4], rel=1e-5)


@pytest.mark.parametrize("how", ["none", "none, search", "none, accumulating", "none, search, accumulating"])
def test_a_rank_that_returns_none_keeps_in_step(ranks: list[dict[str, Any]], how: str) -> None:
    assert ranks[0][how] == ranks[1][how]
    assert ranks[0][how] == pytest.approx(ranks[0][how.replace(", search", "")], rel=1e-6)


def test_what_ranks_that_return_none_learn(ranks: list[dict[str, Any]]) -> None:
    """Half of the gradient of the other rank; nothing, and no momentum either, where both return None."""
    parts = batches([5, 2, 3, 8, 2, 2, 7, 4, 6, 2, 3, 2])
    skip = {(1, 0), (0, 1), (1, 3), (0, 4), (1, 4), (1, 5)}
    model = Normalized(set())
    replicas = [model, Normalized(set())]
    optimizer = model.configure_optimizers()
    for batch_idx in range(6):
        optimizer.zero_grad()
        replicas[1].load_state_dict(model.state_dict())  # buffers are rank 0's
        for rank, replica in enumerate(replicas):
            replica.zero_grad()
            loss = replica.loss(parts[2 * batch_idx + rank])
            if (rank, batch_idx) not in skip:
                (loss / 2).backward()
        for p, q in zip(model.parameters(), replicas[1].parameters(), strict=True):
            if p.grad is not None or q.grad is not None:
                p.grad = (0 if p.grad is None else p.grad) + (0 if q.grad is None else q.grad)
        optimizer.step()
    assert ranks[0]["none"] == pytest.approx([*weights(model), 6], rel=1e-5)


def test_a_rank_with_an_empty_batch_keeps_in_step_and_means_stay_means(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["empty"] == ranks[1]["empty"]
    assert all(v == v for v in ranks[0]["empty"])
    assert ranks[0]["logged"] == ranks[1]["logged"]
    assert ranks[0]["logged"]["val_count"] == 11 + 9
    model, parts = Logs(), batches([3, 2, 4, 2])
    with torch.no_grad():
        for p, value in zip(model.parameters(), torch.tensor(ranks[0]["empty"]).split([8, 2]), strict=True):
            p.copy_(value.view_as(p))
    wanted = [model.loss(p).item() * len(p) for p in (*parts, parts[0], *parts[2:])]
    assert ranks[0]["logged"]["val_loss"] == pytest.approx(sum(wanted) / 20, rel=1e-5)
