"""SpikeDetection: end a run whose loss jumps, and name the batches to leave out."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from treadle_fabric.checks import check_flag, check_integer, is_number
from treadle_fabric.errors import MisconfigurationException, TrainingSpikeException, describe_error
from treadle_fabric.fabric import Fabric
from treadle_fabric.rank_zero import rank_zero_warn
from treadle_fabric.strategies import Strategy
from treadle_fabric.types import PathLike

__all__ = ["SpikeDetection"]


class SpikeDetection:
    """End a run whose loss is far worse than the mean of the last ones. Give it to Fabric as a callback.

    The loss of a batch is a spike where it is worse than that of the batch before, and differs from the mean of the
    last ``window`` losses by ``atol`` or more and by ``rtol`` times that mean or more. On several ranks the worst loss
    of them counts, so that all ranks decide alike. Each batch costs one wait for the device, and a collective where
    there are several ranks.

    The numbers, in their epoch, of the batch with the spike and of the one before are written to a JSON file, a list,
    which keeps what an earlier run has written. A spike is no reason to save: go on from an earlier checkpoint, and
    leave these batches out.

    Args:
        mode: "min" (default) where a smaller loss is a better one, "max" where a larger one is.
        window: The number of losses whose mean is compared. Default: 10.
        warmup: The number of batches at the beginning that are no spikes whatever their loss. Default: 1.
        atol: The smallest difference of a spike. Default: None, any.
        rtol: The same as a multiple of the mean. Default: 2.0; None: any.
        exclude_batches_path: The JSON file, or a folder for ``skip_batches.json``. Default: the working directory.
        finite_only: Whether a loss that is NaN or infinite is a spike. Default: True. False: it is passed over.

    Raises:
        MisconfigurationException: An argument is out of range, or both tolerances are None.

    Example:
        >>> fabric = Fabric(callbacks=SpikeDetection(window=20))
        >>> fabric.call("on_train_batch_end", fabric=fabric, loss=loss, batch=batch, batch_idx=batch_idx)
    """

    def __init__(
        self,
        mode: Literal["min", "max"] = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: PathLike | None = None,
        finite_only: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise MisconfigurationException(f"SpikeDetection(mode={mode!r}): it must be 'min' or 'max'.")
        for name, value in (("atol", atol), ("rtol", rtol)):
            if value is not None and not (is_number(value) and value >= 0):
                raise MisconfigurationException(
                    f"SpikeDetection({name}={value!r}): it must be a number from 0, or None."
                )
        if atol is None and rtol is None:
            raise MisconfigurationException("SpikeDetection: atol and rtol are None, so any loss could be a spike.")
        self.mode = mode
        self.window = check_integer("SpikeDetection: window", window, minimum=1)
        self.warmup = check_integer("SpikeDetection: warmup", warmup, minimum=0)
        check_flag("finite_only", finite_only)
        self.atol, self.rtol, self.finite_only = atol, rtol, finite_only
        self.exclude_batches_path = exclude_batches_path
        self.bad_batches: list[int] = []
        """The numbers of the batches that the JSON file is to have."""
        self._losses: deque[float] = deque(maxlen=self.window)
        self._seen = 0

    def on_train_batch_end(self, fabric: Fabric, loss: Tensor, batch: Any, batch_idx: int) -> None:
        """Look at the loss of a batch; every rank calls this.

        Args:
            fabric: The Fabric object.
            loss: The loss of the batch on this rank.
            batch: The batch.
            batch_idx: The number of the batch in its epoch.

        Raises:
            TrainingSpikeException: The loss is a spike; on every rank.
        """
        self.check(fabric.strategy, loss, batch_idx)

    def check(self, strategy: Strategy, loss: Tensor | float | None, batch_idx: int) -> None:
        """The same for any strategy; ``loss`` is None on a rank whose step had none."""
        worst = self._worst(strategy, loss)
        if math.isnan(worst):  # no rank had a loss
            return
        spikes = self._seen >= self.warmup and (self._is_spike(worst) if math.isfinite(worst) else self.finite_only)
        self._seen += 1
        if spikes:
            self.bad_batches += [n for n in (batch_idx - 1, batch_idx) if n >= 0 and n not in self.bad_batches]
            if strategy.is_global_zero:
                self._write()
            raise TrainingSpikeException(batch_idx, worst, list(self._losses))
        if math.isfinite(worst):
            self._losses.append(worst)

    def _worst(self, strategy: Strategy, loss: Tensor | float | None) -> float:
        """The worst loss of all ranks, infinite where one is not finite; NaN where no rank has a loss."""
        sign, device = 1.0 if self.mode == "min" else -1.0, strategy.root_device
        value = torch.full((), -math.inf, device=device)
        if loss is not None:
            mine = torch.as_tensor(loss, device=device).detach().float().mean()
            value = torch.nan_to_num(sign * mine, nan=math.inf, posinf=math.inf, neginf=math.inf)
        worst = float(strategy.all_reduce(value, None, "max"))
        return math.nan if worst == -math.inf else sign * worst

    def _is_spike(self, loss: float) -> bool:
        if not self._losses:
            return False
        change, mean = loss - self._losses[-1], sum(self._losses) / len(self._losses)
        if change <= 0 if self.mode == "min" else change >= 0:
            return False
        difference = abs(loss - mean)
        return (self.atol is None or difference >= self.atol) and (
            self.rtol is None or difference >= abs(self.rtol * mean)
        )

    def _write(self) -> None:
        path = Path.cwd() if self.exclude_batches_path is None else Path(self.exclude_batches_path)
        path = path if path.suffix == ".json" else path / "skip_batches.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            before = json.loads(path.read_text()) if path.exists() else []
            path.write_text(json.dumps([*before, *(n for n in self.bad_batches if n not in before)], indent=4))
        except (OSError, ValueError) as error:  # the spike is the error to report
            rank_zero_warn(
                f"SpikeDetection could not write {str(path)!r} ({describe_error(error)}). The batches to leave out are"
                f" {self.bad_batches}."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the last losses and the batches to be left out."""
        return {"losses": list(self._losses), "seen": self._seen, "bad_batches": list(self.bad_batches)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._losses = deque(state_dict.get("losses", ()), maxlen=self.window)
        self._seen = state_dict.get("seen", 0)
        self.bad_batches = list(state_dict.get("bad_batches", ()))
