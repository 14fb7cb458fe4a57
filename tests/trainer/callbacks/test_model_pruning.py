"""Pruning: what is set to zero, and when; what files have; and that a pruned run goes on to the last bit.

Tests of ``treadle.callbacks.model_pruning``, ``treadle.callbacks.pruning``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests.trainer.callbacks.averaged import Noted, SavesAt, batches, differing, fit
from tests.trainer.callbacks.scripted import trainer_with
from torch import Tensor, nn
from torch.nn.utils import prune

from treadle import Callback
from treadle.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning
from treadle_fabric import MisconfigurationException

pruning = partial(ModelPruning, "l1_unstructured", use_lottery_ticket_hypothesis=False)


class Net(Noted):
    """Trains by momentum and weight decay, which go on changing pruned entries."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass

    def on_train_epoch_end(self) -> None:
        self.masks.append({k: v.clone() for k, v in self.state_dict().items() if k.endswith("_mask")})

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)

    @property
    def weight(self) -> Tensor:
        return self.head.weight.detach().clone()

    def zeros(self) -> dict[str, int]:
        found = {name: int((p == 0).sum()) for name, p in self.named_parameters()}
        return {name: n for name, n in found.items() if n}


def test_more_is_pruned_from_epoch_to_epoch_and_stays_so() -> None:
    model = Net()
    trainer = fit(model, pruning(parameter_names=["weight"]), ModelCheckpoint("c", save_top_k=-1))
    total = 3 * 4 + 4 + 4  # the layers' weights, batch norm's too
    kept = [int(sum(mask.sum() for mask in masks.values())) for masks in model.masks]
    assert kept == [10, 5, 3] and total == 20  # rounded half to even
    for before, after in zip(model.masks, model.masks[1:]):
        assert all(torch.all(after[k] <= before[k]) for k in before)
    assert sum(model.zeros().values()) == 17 and not any(k.endswith("_mask") for k in model.state_dict())
    saved = torch.load(trainer.checkpoint_callback.last_model_path or trainer.checkpoint_callback.best_model_path)  # type: ignore
    assert {*saved["state_dict"]} == {*model.state_dict()}
    assert Noted.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)  # type: ignore


@pytest.mark.parametrize(
    ("arguments", "zeros"),
    [
        ({"pruning_fn": "random_unstructured", "amount": 6}, {"body.0.weight": 2, "body.1.bias": 3, "head.bias": 1}),
        ({"pruning_fn": prune.L1Unstructured, "amount": 0.5, "use_global_unstructured": False}, {"body.0.weight": 6}),
        ({"pruning_fn": prune.Identity, "use_global_unstructured": False}, {}),
        ({"pruning_fn": "ln_structured", "pruning_dim": 0, "pruning_norm": 2, "amount": 1}, {"body.0.weight": 3}),
        ({"pruning_fn": "random_structured", "pruning_dim": 1, "amount": 1}, {"body.0.weight": 4, "head.weight": 1}),
        ({"pruning_fn": prune.LnStructured, "pruning_dim": 1, "pruning_norm": 1, "amount": 2}, {"head.weight": 2}),
    ],
)
def test_every_method(arguments: Any, zeros: dict[str, int]) -> None:
    model = Net()
    structured = "pruning_dim" in arguments
    if structured:
        arguments = {**arguments, "use_global_unstructured": False}
        if arguments["amount"] == 1 and arguments["pruning_dim"] == 0:
            arguments["parameters_to_prune"] = [(model.body[0], "weight")]
    fit(model, ModelPruning(**arguments, use_lottery_ticket_hypothesis=False), max_epochs=1)
    found = model.zeros()
    if "random_unstructured" == arguments["pruning_fn"]:
        assert sum(found.values()) == sum(zeros.values())
    else:
        assert {name: found.get(name) for name in zeros} == zeros
    assert not zeros or found


def test_a_method_of_the_users_own() -> None:
    class Largest(prune.BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            return default_mask * (t.abs() < t.abs().max())

    model = Net()
    callback = ModelPruning(
        Largest, [(model.head, "weight")], use_global_unstructured=False, use_lottery_ticket_hypothesis=False
    )
    fit(model, callback, max_epochs=2)
    assert model.zeros() == {"head.weight": 2}


def test_functions_of_the_epoch_decide(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    callback = ModelPruning(
        "l1_unstructured",
        parameter_names=["weight"],
        amount=lambda epoch: 0.2 if epoch else 4,
        apply_pruning=lambda epoch: epoch != 1,
        use_lottery_ticket_hypothesis=lambda epoch: epoch == 2,
        verbose=2,
    )
    fit(model, callback)
    assert [int(sum((m == 0).sum() for m in masks.values())) for masks in model.masks] == [4, 4, 7]
    assert "L1Unstructured pruned 7/20 entries (35.00%), before 4/20 (20.00%)." in caplog.text
    assert "of `Linear(in_features=4, out_features=1, bias=True).weight`" in caplog.text
    initial = Noted()
    left = model.head.weight != 0
    assert torch.equal(model.head.weight[left], initial.head.weight[left]) and left.any()  # the winning ticket
    with pytest.raises(MisconfigurationException, match=r"amount\(0\) is 2.0"):
        fit(Net(), pruning(amount=lambda epoch: 2.0))


def test_parameters_are_drawn_anew() -> None:
    model, initial = Net(), Noted()
    given = [(model.head, "weight"), (model.body[0], "weight")]
    fit(model, ModelPruning("l1_unstructured", given, resample_parameters=True), max_epochs=1)
    left = model.body[0].weight != 0
    assert left.sum() + (model.head.weight != 0).sum() == 8
    assert not torch.any(model.body[0].weight[left] == initial.body[0].weight[left])  # type: ignore
    assert not torch.equal(model.head.bias, initial.head.bias)  # trained, and not touched


def test_it_prunes_after_validations_or_leaves_the_masks() -> None:
    model = Net()
    fit(
        model,
        pruning(prune_on_train_epoch_end=False, make_pruning_permanent=False),
        num_sanity_val_steps=1,
        max_epochs=1,
    )
    assert int((model.state_dict()["head.weight_mask"] == 0).sum()) and isinstance(model.head.weight_orig, nn.Parameter)
    pruning().make_pruning_permanent(model)
    assert isinstance(model.head.weight, nn.Parameter) and model.zeros()


@pytest.mark.parametrize(
    ("hook", "step", "arguments", "more"),
    [
        ("on_train_batch_end", 2, {}, {}),  # nothing is pruned yet
        ("on_train_batch_end", 6, {}, {}),
        ("on_train_batch_end", 3, {}, {"accumulate_grad_batches": 3}),
        ("on_train_batch_end", 7, {"use_lottery_ticket_hypothesis": True}, {}),
        ("on_train_batch_end", 7, {"use_lottery_ticket_hypothesis": True, "resample_parameters": True,
                                   "parameters_to_prune": "layers"}, {}),
        ("on_train_batch_end", 7, {"make_pruning_permanent": False}, {}),
        ("on_train_batch_end", 7, {"pruning_fn": "random_structured", "pruning_dim": 0, "amount": 1,
                                   "use_global_unstructured": False, "parameters_to_prune": "body"}, {}),
        ("on_validation_batch_end", 8, {"prune_on_train_epoch_end": False}, {}),
        ("on_train_epoch_end", 8, {}, {}),
    ],
)  # fmt: skip
def test_a_resumed_run_is_the_run_that_went_on_to_the_last_bit(hook: str, step: int, arguments: Any, more: Any) -> None:
    def run(name: str, *callbacks: Callback, **given: Any) -> Net:
        model = Net()
        if given:
            with torch.no_grad():  # what the program begins with does not matter
                model.head.weight.fill_(1.0)
        chosen = {"layers": [(model.head, "weight"), (model.body[0], "bias")], "body": [(model.body[0], "weight")]}
        which = chosen.get(arguments.get("parameters_to_prune"), ())
        options = {"pruning_fn": "l1_unstructured", "use_lottery_ticket_hypothesis": False, **arguments}
        callback = ModelPruning(**{**options, "parameters_to_prune": which, "make_pruning_permanent": False})
        callback._permanent = arguments.get("make_pruning_permanent", True)
        last = SavesAt("on_train_epoch_end", 12 if not more else 6, f"{name}.ckpt")
        fit(model, callback, last, *callbacks, **more, **given)
        return model

    whole, other = run("whole", SavesAt(hook, step, "at.ckpt")), run("other", ckpt_path="at.ckpt")
    one, two = torch.load("whole.ckpt"), torch.load("other.ckpt")
    assert one["callbacks"]["ModelPruning"]["masks"] and any(
        t.any() for t in one["callbacks"]["ModelPruning"]["pruned"].values()
    )
    assert not differing(one, two)
    assert not differing(whole.state_dict(), other.state_dict())


def test_a_stop_in_mid_epoch_prunes_nothing_and_a_second_fit_goes_on() -> None:
    whole, model = Net(), Net()
    fit(whole, pruning())
    trainer = fit(model, pruning(), max_steps=6)
    assert sum(model.zeros().values()) == sum(m.numel() - int(m.sum()) for m in whole.masks[0].values())
    trainer.save_checkpoint("stopped.ckpt")
    trainer.max_steps = -1
    trainer.fit(model, batches(), batches(1))
    assert len(model.masks) == 4 and [*model.masks[2]] == [*whole.masks[1]]
    resumed = Net()
    fit(resumed, pruning(), ckpt_path="stopped.ckpt")
    assert not differing(resumed.state_dict(), whole.state_dict())


def test_after_an_error_the_module_fits_its_checkpoints() -> None:
    class Fails(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 6:
                raise KeyboardInterrupt

    whole, model = Net(), Net()
    fit(whole, pruning())
    trainer = trainer_with(pruning(), Fails(), SavesAt("on_train_batch_end", 6, "at.ckpt"), num_sanity_val_steps=0)
    torch.manual_seed(3)
    with pytest.raises(SystemExit):
        trainer.fit(model, batches(), batches(1))
    assert trainer.interrupted and model.zeros()
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, Fails)]
    trainer.validate(model, batches(1), ckpt_path="at.ckpt", verbose=False)
    trainer.fit(model, batches(), batches(1), ckpt_path="at.ckpt")
    assert not differing(model.state_dict(), whole.state_dict())


def test_in_another_trainer_it_begins_anew() -> None:
    callback = ModelPruning("l1_unstructured", amount=lambda epoch: 0 if epoch else 5)
    fit(Net(), callback, max_epochs=1)
    model = Net()
    with torch.no_grad():
        model.head.bias.fill_(5.0)
    fit(model, callback, max_epochs=1)
    assert sum(model.zeros().values()) == 5 and model.head.bias == 5.0


def test_files_with_weights_only_have_no_masks() -> None:
    fit(Net(), pruning(), ModelCheckpoint("c", filename="w", save_weights_only=True, every_n_train_steps=6))
    saved = torch.load("c/w.ckpt")
    assert "callbacks" not in saved and not any("_mask" in name for name in saved["state_dict"])
    Net().load_state_dict(saved["state_dict"])


def test_a_compiled_part_is_pruned() -> None:
    model = Net()
    model.body = torch.compile(model.body, backend="eager")  # type: ignore
    fit(model, pruning(), SavesAt("on_train_batch_end", 6, "at.ckpt"), max_epochs=2)
    saved = torch.load("at.ckpt")
    assert "body.0.weight" in saved["state_dict"] and "body.0.weight" in saved["callbacks"]["ModelPruning"]["masks"]
    plain = Net()
    fit(plain, pruning(), ckpt_path="at.ckpt", max_epochs=2)
    assert torch.equal(plain.head.weight, model.head.weight) and plain.zeros()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"pruning_fn": "l1_unstructred"}, "l1_unstructured"),
        ({"pruning_fn": 3}, "pruning_fn=3"),
        ({"pruning_fn": prune.L1Unstructured(0.5)}, "not an instance"),
        ({"pruning_fn": prune.CustomFromMask}, "compute_mask"),
        ({"pruning_fn": "ln_structured"}, "use_global_unstructured=False"),
        ({"pruning_fn": "ln_structured", "use_global_unstructured": False}, "pruning_dim"),
        ({"pruning_fn": "ln_structured", "use_global_unstructured": False, "pruning_dim": 0}, "pruning_norm"),
        ({"amount": 1.5}, "amount"),
        ({"amount": -1}, "amount"),
        ({"amount": "half"}, "amount"),
        ({"amount": True}, "amount"),
        ({"parameter_names": ["kernel"]}, "parameter_names"),
        ({"apply_pruning": 1}, "apply_pruning"),
        ({"use_lottery_ticket_hypothesis": "yes"}, "use_lottery_ticket_hypothesis"),
        ({"verbose": 3}, "verbose"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        ModelPruning(**{"pruning_fn": "l1_unstructured", **arguments})


def test_what_does_not_fit_the_module_is_refused_before_training() -> None:
    model = Net()
    flat = [(model.body[1], "weight")]
    structured = {"pruning_fn": "ln_structured", "use_global_unstructured": False, "pruning_dim": 0, "pruning_norm": 2}
    for callback, match in (
        (ModelPruning("l1_unstructured", [(nn.Linear(2, 2), "weight")]), "no submodule of Net"),
        (ModelPruning("l1_unstructured", [(model.head, "kernel")]), "no parameter 'kernel'"),
        (ModelPruning("l1_unstructured", ["head.weight"]), "pairs"),  # type: ignore
        (ModelPruning(parameters_to_prune=flat, **structured), "one dimension"),  # type: ignore
        (ModelPruning("l1_unstructured", amount=99), "more than the 29 entries"),
        (ModelPruning(amount=3, **structured), "more than the 1 channels"),  # type: ignore
    ):
        with pytest.raises(MisconfigurationException, match=match):
            fit(model, callback)
    with pytest.raises(MisconfigurationException, match="keep one"):
        fit(model, pruning(), EMAWeightAveraging())
