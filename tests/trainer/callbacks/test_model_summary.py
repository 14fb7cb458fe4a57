"""The table of layers.

Tests of ``treadle.callbacks.model_summary``, ``treadle.callbacks.summary.layers``,
``treadle.callbacks.summary.formatting``, ``treadle.callbacks.summary.fitting``.
"""

from __future__ import annotations

import re
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import treadle as tr
from treadle.callbacks import ModelSummary as SummaryCallback
from treadle.callbacks import RichModelSummary
from treadle.callbacks.summary.fitting import fit_columns
from treadle.callbacks.summary.formatting import get_formatted_model_size, get_human_readable_count
from treadle.callbacks.summary.layers import LayerSummary, ModelSummary, parse_batch_shape, summarize


class Model(tr.LightningModule):
    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 2))
        self.head = nn.Linear(2, 3)
        self.head.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(5))
        self.example_input_array = example

    def forward(self, x: Any, factor: Any = 1.0) -> Any:
        return self.head(self.net(x)) * factor

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


NET, HEAD = 8 * 16 + 16 + 32 + 16 * 2 + 2, 9


def test_parameters_and_modes() -> None:
    model = Model()
    model.net[1].eval()
    summary = summarize(model)
    assert summary.layer_names == ["net", "head"]
    assert summary.layer_types == ["Sequential", "Linear"]
    assert summary.param_nums == [NET, HEAD]
    assert summary.training_modes == [True, True]
    assert summary.total_training_modes == {"train": 5, "eval": 1}
    assert summary.total_parameters == NET + HEAD + 5
    assert summary.total_layer_params == NET + HEAD
    assert summary.trainable_parameters == NET + 5
    assert summary.model_size == pytest.approx((NET + HEAD + 5) * 4 / 1e6)
    assert summary.in_sizes == summary.out_sizes == ["?", "?"]
    assert summary.total_flops == 0 and summary.flop_counts == {"net": {}, "head": {}}


def test_the_table() -> None:
    assert str(summarize(Model())).splitlines() == [
        "  | Name         | Type       | Params | Mode",
        "----------------------------------------------",
        "0 | net          | Sequential | 210    | train",
        "1 | head         | Linear     | 9      | train",
        "  | other params | n/a        | 5      | n/a",
        "----------------------------------------------",
        "215       Trainable params",
        "9         Non-trainable params",
        "224       Total params",
        "0.001     Total estimated model params size (MB)",
        "6         Modules in train mode",
        "0         Modules in eval mode",
    ]


@pytest.mark.parametrize(
    ("example", "shape"),
    [
        (torch.ones(4, 8), [4, 8]),
        ((torch.ones(4, 8), torch.ones(3)), [4, 8]),
        ({"x": torch.ones(4, 8), "factor": 2.0}, [4, 8]),
    ],
)
def test_an_example_gives_sizes_and_flops(example: Any, shape: list[int]) -> None:
    summary = summarize(Model(example), max_depth=-1)
    assert summary.in_sizes == [shape, shape, [4, 16], [4, 16], [4, 16], [4, 2]]
    assert summary.out_sizes == [[4, 2], [4, 16], [4, 16], [4, 16], [4, 2], [4, 3]]
    flops = {name: sum(ops.values()) for name, ops in summary.flop_counts.items()}
    assert flops["net.0"] == 2 * 4 * 8 * 16  # a multiplication and an addition each
    assert flops["net"] == 2 * 4 * (8 * 16 + 16 * 2)
    assert summary.total_flops == flops["net"] + flops["head"] == 2 * 4 * (8 * 16 + 16 * 2 + 2 * 3)
    assert "FLOPs | In sizes | Out sizes" in str(summary) and "Total FLOPs" in str(summary)


def test_the_example_leaves_no_trace() -> None:
    model = Model(torch.randn(4, 8))
    model.net[2].eval()
    modes = [m.training for m in model.modules()]
    state, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    summarize(model)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())


def test_an_example_that_fails_leaves_no_hook() -> None:
    model = Model(torch.randn(4, 9))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        summarize(model)
    assert model.training and all(not m._forward_hooks for m in model.modules())


@pytest.mark.filterwarnings("error")
def test_a_compiled_layer_is_not_compiled_for_the_table() -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("compiled")

    plain, model = (Model(torch.randn(4, 8)) for _ in range(2))
    model.net = torch.compile(model.net, backend=refuse)  # type: ignore[assignment]
    model.head = torch.compile(model.head, backend=refuse)  # type: ignore[assignment]
    for depth in (1, 2, -1):
        assert str(summarize(model, depth)) == str(summarize(plain, depth)), "the table of the module inside"


@pytest.mark.parametrize(
    ("depth", "names"),
    [
        (0, []),
        (1, ["a", "tail"]),
        (2, ["a", "a.b", "tail"]),
        (-1, ["a", "a.b", "a.b.0", "tail"]),
    ],
)
def test_max_depth(depth: int, names: list[str]) -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Sequential(nn.Linear(1, 1))}), "tail": nn.Linear(1, 1)})
    summary = ModelSummary(model, max_depth=depth)
    assert summary.layer_names == names
    assert [name for name, _ in summary.named_modules] == names
    assert summary.total_parameters == 4
    assert "Total params" in str(summary)


@pytest.mark.parametrize("depth", [-2, 1.5])
def test_a_wrong_depth_is_refused(depth: Any) -> None:
    with pytest.raises(tr.MisconfigurationException, match=f"max_depth={depth}"):
        ModelSummary(nn.Linear(1, 1), max_depth=depth)
    with pytest.raises(tr.MisconfigurationException, match=f"max_depth={depth}"):
        SummaryCallback(depth)


def test_shared_parameters_count_once_in_the_total() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    summary = ModelSummary(model)
    assert summary.param_nums == [16, 16]
    assert summary.total_parameters == summary.total_layer_params == summary.trainable_parameters == 16


def test_lazy_parameters_are_not_counted_and_said_so() -> None:
    summary = ModelSummary(nn.ModuleDict({"known": nn.Linear(2, 2), "lazy": nn.LazyLinear(3)}))
    with pytest.warns(UserWarning, match="The total number of parameters detected may be inaccurate"):
        assert summary.param_nums == [6, 0] and summary.total_parameters == 6
        text = str(summary)
    assert re.search(r"lazy +\| LazyLinear \| \? ", text)
    assert text.endswith("2         Uninitialized parameters, not counted: their shape comes from the first batch")


def test_size_follows_the_dtype() -> None:
    model = nn.ModuleDict({"two": nn.Linear(100, 10, bias=False).half(), "four": nn.Linear(100, 10, bias=False)})
    assert ModelSummary(model).model_size == pytest.approx(1000 * (2 + 4) / 1e6)


def test_layer_summary() -> None:
    layer = nn.Linear(3, 2)
    summary = LayerSummary(layer)
    assert (summary.layer_type, summary.num_parameters, summary.training) == ("Linear", 8, True)
    assert summary.in_size == summary.out_size == "?"
    layer(torch.ones(5, 3))
    assert (summary.in_size, summary.out_size) == ([5, 3], [5, 2])
    waiting = LayerSummary(layer)
    waiting.detach_hook()
    layer(torch.ones(5, 3))
    assert waiting.in_size == "?"


def test_scripted_modules() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.jit.script(nn.Linear(2, 2))
            self.example_input_array = torch.ones(1, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, since torch 2.10
        model = Outer()
    summary = ModelSummary(model)
    assert summary.layer_types == ["Linear"] and summary.in_sizes == ["?"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0  "), (123, "123  "), (999, "999  "), (1000, "1.0 K"), (1234, "1.2 K"), (123456, "123 K"),
        (2 * 10**6, "2.0 M"), (3 * 10**9, "3.0 B"), (4 * 10**14, "400 T"), (5 * 10**15, "5,000 T"),
    ],
)  # fmt: skip
def test_readable_counts(number: int, text: str) -> None:
    assert get_human_readable_count(number) == text


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(tr.MisconfigurationException, match="-1"):
        get_human_readable_count(-1)


def test_formatting() -> None:
    assert get_formatted_model_size(1234.5678) == "1,234.568"
    assert parse_batch_shape(torch.ones(2, 3)) == [2, 3]
    assert parse_batch_shape((torch.ones(1), [torch.ones(2)])) == [[1], [[2]]]
    assert parse_batch_shape({"a": 1}) == parse_batch_shape(3) == "?"


# ---------------------------------------------------------------------------------------------------- the callbacks


def fit(model: Model, *callbacks: tr.Callback, **arguments: Any) -> tr.Trainer:
    trainer = tr.Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=list(callbacks), **arguments,
    )  # fmt: skip
    trainer.fit(model, DataLoader(torch.randn(8, 8), batch_size=4))  # type: ignore[arg-type]
    return trainer


def test_fit_prints_the_table(caplog: pytest.LogCaptureFixture) -> None:
    trainer = fit(Model())
    assert [type(c) for c in trainer.callbacks if isinstance(c, SummaryCallback)] == [SummaryCallback]
    assert str(summarize(Model())) in caplog.text


@pytest.mark.parametrize("arguments", [{"callbacks": [SummaryCallback(max_depth=0)]}, {"enable_model_summary": False}])
def test_the_table_can_be_turned_off(arguments: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    fit(Model(), *arguments.pop("callbacks", []), **arguments)
    assert "max_steps" in caplog.text and "params" not in caplog.text


def test_depth_precision_and_lazy_layers(caplog: pytest.LogCaptureFixture) -> None:
    class Lazy(Model):
        def __init__(self) -> None:
            super().__init__(torch.randn(4, 8))
            self.unused = nn.LazyLinear(2)

    with pytest.warns(UserWarning, match="contains 2 `UninitializedParameter`s"):
        fit(Lazy(), SummaryCallback(max_depth=2), precision="bf16-true")
    err = caplog.text
    assert re.search(r"net\.3 .*Linear .*\[4, 16\] +\| \[4, 2\]", err)
    assert re.search(r"0\.000 +Total estimated", err)  # 224 parameters of two bytes


def test_summarize_can_be_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    class Short(SummaryCallback):
        @staticmethod
        def summarize(summary_data: Any, total_parameters: int, *args: Any, **kwargs: Any) -> None:
            print(dict(summary_data)["Name"], total_parameters, kwargs)

    fit(Model(), Short(unit="parameters"))
    assert capsys.readouterr().out.splitlines() == ["['net', 'head', 'other params'] 224 {'unit': 'parameters'}"]


def test_the_rich_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    trainer = fit(Model(torch.randn(4, 8)), RichModelSummary(max_depth=2, header_style="bold"))
    assert [type(c) for c in trainer.callbacks if isinstance(c, SummaryCallback)] == [RichModelSummary]
    out = capsys.readouterr().out
    assert re.search(r"│ net\.0 +│ Linear +│ +144 │ train │ +1\.0 K │ +\[4, 8\] │ +\[4, 16\] │", out)
    assert re.search(r"Non-trainable params: +9", out) and re.search(r"Total FLOPs: +1\.3 K", out)
    assert max(map(len, out.splitlines())) <= 100


# ------------------------------------------------------------------------------------------------ a narrow terminal


class AttentionWithRotaryPositionEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value_projection = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        y = self.query_key_value_projection(x)
        return {"hidden": y[..., :8], "cache": (y, y)}


class Deep(nn.Module):
    """A layer in a layer in a layer ..., with inputs and outputs of several kinds."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.self_attention = AttentionWithRotaryPositionEmbeddings()
        self.next_encoder_layer = Deep(levels - 1) if levels else nn.Linear(8, 8)

    def forward(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            batch = self.self_attention(batch["hidden"], batch["mask"])["hidden"]
        inner: Any = batch
        return self.next_encoder_layer({"hidden": inner, "mask": inner} if hasattr(self, "more") else inner)


def deep(levels: int, example: bool) -> tr.LightningModule:
    model = Model()
    model.net = Deep(levels)  # type: ignore[assignment]
    model.head = nn.Linear(8, 8)
    for module in model.modules():
        if isinstance(module, Deep) and isinstance(module.next_encoder_layer, Deep):
            module.more = True  # type: ignore[assignment]
    if example:
        model.example_input_array = ({"hidden": torch.ones(4, 16, 8), "mask": torch.ones(4, 16)},)
    return model


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("columns", [80, 100, 132])
def test_the_table_fits_into_the_terminal(columns: int, example: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    summary = ModelSummary(deep(6, example), max_depth=-1)
    lines = str(summary).splitlines()
    assert max(map(len, lines)) <= columns
    numbers = [line.partition(" | ")[0].strip() for line in lines if " | " in line]
    assert [number for number in numbers if number] == [str(i) for i in range(len(summary.layer_names))]
    for line in lines:
        if " | " in line:
            assert line.count("[") - line.count("]") in range(-3, 4) and not re.search(r"\[\d+,$|^\d+\]", line)
    if example:
        text = str(summary)
        assert "hidden:" in text and "-> [4, 16, 24]" in text
        assert summary.in_sizes[0] == "?", "as in Lightning, where code asks for the size of a mapping"


@pytest.mark.parametrize("example", [False, True])
def test_the_rich_table_fits_into_the_terminal(
    example: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    summary = ModelSummary(deep(4, example), max_depth=-1)
    RichModelSummary.summarize(summary.columns(), *summary.totals())
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert len(re.findall(r"^│ \d+ +│", out, re.MULTILINE)) == len(summary.layer_names)
    assert "…" not in out, "what does not fit is cut by us, in the middle"


def test_in_a_wide_terminal_names_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    summary = ModelSummary(deep(3, True), max_depth=-1)
    text = str(summary)
    assert all(name in text for name in summary.layer_names) and "..." not in text
    assert "[[4, 16, 8], [4, 16]]" in text and "{hidden: [4, 16, 8], mask: [4, 16]}" in text


@pytest.mark.parametrize(
    ("columns", "width", "fitted"),
    [
        ([("Name", ["a", "a.bcd"]), ("Type", ["A", "B"])], 8, [("Name", ["a", "  bcd"]), ("Type", ["A", "B"])]),
        ([("Name", ["x.a", "x.b"])], 1, [("Name", ["x.a", "x.b"])]),
        ([("Name", ["a"]), ("Mine", ["x" * 50])], 20, [("Name", ["a"]), ("Mine", ["x" * 50])]),
        ([("Type", ["A" + "b" * 38 + "C"])], 21, [("Type", ["Abbbbbbbb...bbbbbbbbC"])]),
    ],
)
def test_only_as_much_as_is_needed(columns: Any, width: int, fitted: Any) -> None:
    assert fit_columns(columns, width, between=3) == fitted
