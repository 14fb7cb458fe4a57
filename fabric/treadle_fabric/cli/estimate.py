"""``treadle-fabric estimate``: which layouts of a model fit a number of devices."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import re
import sys
import traceback
from typing import Any

from treadle_fabric.errors import MisconfigurationException, TreadleError

__all__ = ["add_estimate_command"]

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY_UNITS = {"KI": 1024, "MI": 1024**2, "GI": 1024**3, "TI": 1024**4}


def add_estimate_command(commands: Any) -> None:
    """Add ``estimate`` to the commands of a parser."""
    about = (
        "Print what memory each rank needs and what it exchanges in a training step, for several strategies, and which"
        " of them fit the devices. The step runs on this machine with tensors that have no memory, so neither the"
        " devices nor room for the model are needed. The exit status is 0 where a layout fits, 1 where none does, and 2"
        " where the question is wrong."
    )
    parser = commands.add_parser("estimate", help="which layouts of a model fit N devices", description=about)
    parser.add_argument(
        "model", metavar="MODEL", help="module:function that makes the model, module:Class, or package.module.Class"
    )
    parser.add_argument("--init-args", "--init_args", default="{}", metavar="JSON", help="arguments for MODEL")
    parser.add_argument(
        "--batch", required=True, metavar="MODULE:FUNCTION", help="makes the micro-batch of one rank; or a tensor in it"
    )
    parser.add_argument(
        "--optimizer",
        help="a class of torch.optim such as AdamW, or module:function of the parameters; default: the model's"
        " configure_optimizers",
    )
    parser.add_argument(
        "--optimizer-args", "--optimizer_args", default="{}", metavar="JSON", help="arguments for the optimizer"
    )
    parser.add_argument("--loss", metavar="MODULE:FUNCTION", help="the loss, of the model's output and the batch")
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="the number of devices in all")
    parser.add_argument("--num-nodes", "--num_nodes", type=int, help="machines; default: eight devices each")
    parser.add_argument("--memory", metavar="M", help="the memory of a device, such as 80GiB; default: it is not asked")
    parser.add_argument("--strategies", metavar="NAMES", help="ddp,fsdp,... ; default: those that come into question")
    parser.add_argument("--precision", default="32-true", help="as for Fabric; default: 32-true")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step; default: 1")
    parser.add_argument("--details", action="store_true", help="print each layout's whole table, too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_estimate)


def _estimate(given: argparse.Namespace) -> int:
    try:
        memory = None if given.memory is None else _bytes(given.memory)
        rows = _rows(given)
    except (TreadleError, ImportError, AttributeError) as e:
        print(f"treadle-fabric: {e}", file=sys.stderr)
        return 2
    except Exception:  # of the user's program; Python's own status for it would say that no layout fits
        traceback.print_exc()
        return 2
    if given.json:
        print(json.dumps([_plain(*row, memory) for row in rows], indent=2))
    else:
        _print(given, rows, memory)
    found = [each for _, each, _ in rows if each is not None]
    if not found:
        return 2
    return 0 if memory is None or any(each.fits(memory) for each in found) else 1


def _rows(given: argparse.Namespace) -> list[tuple[Any, Any, str]]:
    """Each layout, its estimate or None, and why there is none."""
    from treadle_fabric.estimating import layouts, planned_nodes, without_memory  # heavy

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    make = _found(given.model, "MODEL")
    arguments = _json("--init-args", given.init_args)
    batch = _found(given.batch, "--batch")
    optimizer = _optimizer(given.optimizer, _json("--optimizer-args", given.optimizer_args))
    loss = None if given.loss is None else _found(given.loss, "--loss")
    nodes = planned_nodes(given.num_nodes, given.devices)
    names = None if given.strategies is None else [name for name in given.strategies.split(",") if name]
    rows = []
    module = make if _is_module(make) else without_memory(functools.partial(make, **arguments))
    if not _is_module(module):
        raise MisconfigurationException(
            f"MODEL={given.model!r} made {type(module).__name__}, which is no torch module."
        )
    known: dict[str, Any] = {}  # what several layouts share
    for layout in layouts(module, given.devices, nodes, names):
        result, reason = _one(given, layout, nodes, known, module=module, optimizer=optimizer, batch=batch, loss=loss)
        rows.append((layout, result, reason))
    return rows


def _one(
    given: argparse.Namespace, layout: Any, nodes: int, known: dict[str, Any], **arguments: Any
) -> tuple[Any, str]:
    from treadle_fabric.estimating import estimate_with  # heavy

    ranks = layout.ranks or given.devices
    try:
        result = estimate_with(
            known,
            strategy=layout.make(),
            world_size=ranks,
            num_nodes=nodes if ranks == given.devices else 1,
            precision=given.precision,
            accumulate=given.accumulate,
            **arguments,
        )
    except TreadleError as e:
        return None, str(e)
    return result, ""


def _print(given: argparse.Namespace, rows: list[tuple[Any, Any, str]], memory: int | None) -> None:
    from treadle_fabric.estimating import in_bytes, table  # heavy

    head = ["layout", "ranks", "parameters", "gradients", "optimizer", "activations", "gathered", "peak"]
    head += ["host", "sent a step", "to other machines", *(["fits"] if memory is not None else [])]
    lines = []
    for layout, result, _ in rows:
        if result is None:
            lines.append([layout.name, *("-" for _ in head[1:])])
            continue
        own = result.memory
        parts = (own.parameters, own.gradients, own.optimizer_state, own.activations, own.communication, own.peak)
        sizes = [in_bytes(size) for size in (*parts, own.host, result.wire, result.between_machines)]
        fits = [] if memory is None else ["yes" if result.fits(memory) else "no"]
        lines.append([layout.name, f"{result.world_size:,}", *sizes, *fits])
    sample = next((result for _, result, _ in rows if result is not None), None)
    if sample is not None:
        limit = f" of {in_bytes(memory)}" if memory is not None else ""
        print(f"{sample.parameters:,} parameters, {sample.precision}, {given.devices:,} devices{limit}\n")
    print("\n".join(table(head, lines)))
    for layout, result, reason in rows:
        if result is None:
            print(f"\n{layout.name}: {reason}")
    notes = dict.fromkeys(note for _, result, _ in rows if result is not None for note in result.notes)
    print("".join(f"\nNote: {note}" for note in notes), end="\n" if notes else "")
    if given.details:
        for _, result, _ in rows:
            if result is not None:
                print(f"\n{result}")


def _plain(layout: Any, result: Any, reason: str, memory: int | None) -> dict[str, Any]:
    if result is None:
        return {"layout": layout.name, "refused": reason}
    fits = {} if memory is None else {"fits": result.fits(memory)}
    return {"layout": layout.name, **fits, **result.as_dict()}


def _found(where: str, what: str) -> Any:
    """What a name such as ``module:attribute`` means.

    Raises:
        MisconfigurationException: There is no such thing.
    """
    module, _, attribute = where.partition(":")
    if not attribute:
        module, _, attribute = where.rpartition(".")
    if not module or not attribute:
        raise MisconfigurationException(f"{what}={where!r}: give module:name, such as my_module:make_model.")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name != module and not module.startswith(f"{e.name}."):
            raise
        raise MisconfigurationException(
            f"{what}={where!r}: there is no module {e.name!r}, neither installed nor in {os.getcwd()}."
        ) from None
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise MisconfigurationException(f"{what}={where!r}: {module} has no {name!r}.")
        found = getattr(found, name)
    return found


def _optimizer(name: str | None, arguments: dict[str, Any]) -> Any:
    if name is None:
        return None
    import torch  # heavy

    found = _found(name, "--optimizer") if ":" in name or "." in name else getattr(torch.optim, name, None)
    if not callable(found):
        raise MisconfigurationException(
            f"--optimizer={name!r}: torch.optim has no such class. Give one such as AdamW, or module:function."
        )
    return functools.partial(found, **arguments)


def _is_module(value: Any) -> bool:
    import torch  # heavy

    return isinstance(value, torch.nn.Module)


def _json(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise MisconfigurationException(f"{option}={text!r} is no JSON: {e}.") from None
    if not isinstance(value, dict):
        raise MisconfigurationException(f'{option}={text!r} must be an object, such as {{"width": 1024}}.')
    return value


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    unit = {**_UNITS, **_BINARY_UNITS}.get(match[2]) if match else None
    if match is None or unit is None or not float(match[1]):
        raise MisconfigurationException(f"--memory={text!r} is no size: give one such as 80GiB, 80GB or 512MiB.")
    return int(float(match[1]) * unit)
