"""What a checkpoint keeps of the loggers, and how they go on from it: in the same run, or in a branch of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from treadle_fabric.checkpoint import read_quickly
from treadle_fabric.loggers import Logger

__all__ = ["go_on_logging", "logger_states", "read_logger_states"]


def logger_states(loggers: Sequence[Logger]) -> dict[str, Any]:
    """Write what the loggers hold in memory, and return their states by type and name; rank 0 calls this function."""
    found: dict[str, Any] = {}
    for logger in loggers:
        logger.save()  # a run that is resumed does not log again what came before the checkpoint
        if state := logger.state_dict():
            kind, number = _kind(logger), 1
            while (key := kind if number == 1 else f"{kind} #{number}") in found:
                number += 1
            found[key] = {"kind": kind, "save_dir": _text(logger.save_dir), "state": state}
    return found


def read_logger_states(path: str) -> dict[str, Any]:
    """Read the states of the loggers from a checkpoint, and nothing large.

    Returns:
        ``loggers``: what :func:`logger_states` returned; ``global_step``. Empty where the checkpoint has no such
        states, or cannot be read: the fit then reads it anyway, and says why not.
    """
    found = read_quickly(path)
    own = found.get("treadle")
    states = own.get("loggers") if isinstance(own, Mapping) else None
    if not isinstance(states, Mapping) or not all(map(_is_entry, states.values())):
        return {}
    return {"loggers": dict(states), "global_step": found.get("global_step")} if states else {}


def go_on_logging(loggers: Sequence[Logger], saved: Mapping[str, Any], path: str, *, same_run: bool) -> None:
    """Have each logger that the checkpoint knows go on in its run, or begin a branch of it; every rank calls this.

    Args:
        loggers: the loggers.
        saved: what :func:`read_logger_states` returned.
        path: of the checkpoint.
        same_run: whether the run goes on that was saved, and not a branch of it.
    """
    told = {"checkpoint": path, "global_step": saved["global_step"]}
    for logger, state in _matched(loggers, saved["loggers"]):
        (logger.resume if same_run else logger.branch)({**state, **told})


def _matched(loggers: Sequence[Logger], saved: Mapping[str, Any]) -> Iterator[tuple[Logger, dict[str, Any]]]:
    """Give the loggers that have a state: of the same type and name, and of several such ones in the same folder."""
    left = dict(saved)
    for exactly in (True, False):
        for logger in list(loggers):
            for key, entry in left.items():
                same = entry["kind"] == _kind(logger)
                if same and (not exactly or entry["save_dir"] == _text(logger.save_dir)):
                    loggers = [other for other in loggers if other is not logger]
                    yield logger, left.pop(key)["state"]
                    break


def _is_entry(value: Any) -> bool:
    return isinstance(value, Mapping) and {"kind", "save_dir", "state"} <= value.keys()


def _kind(logger: Logger) -> str:
    return f"{type(logger).__qualname__} {logger.name}"


def _text(path: Any) -> str:
    return "" if path is None else str(path)
