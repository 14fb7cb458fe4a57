"""Mixed precision: weights stay in single precision, and each operation picks its dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision.precision import Precision, _Scaling, cast_floating
from treadle_fabric.rank_zero import rank_zero_warn

__all__ = ["MixedPrecision"]

_DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class MixedPrecision(Precision):
    """Mixed precision: ``torch.autocast`` around the forward pass.

    Args:
        precision: ``"16-mixed"`` or ``"bf16-mixed"``.
        device: The device type, such as ``"cuda"``. Default: that of the run.
        scaler: Keeps small float16 gradients from vanishing. Default: a new ``GradScaler`` for ``"16-mixed"``.

    Raises:
        MisconfigurationException: The name is another one, or ``"bf16-mixed"`` comes with a scaler.
    """

    converts = True
    autocasts = True

    def __init__(
        self,
        precision: Literal["16-mixed", "bf16-mixed"],
        device: str | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__()
        if precision not in _DTYPES:
            raise MisconfigurationException(
                f"MixedPrecision(precision={precision!r}): must be one of {', '.join(map(repr, _DTYPES))}."
            )
        self.device = "cpu" if device is None else torch.device(device).type
        self._follows, self._own_scaler = device is None, scaler is None
        if scaler is not None and precision == "bf16-mixed":
            raise MisconfigurationException(
                "precision='bf16-mixed' with a scaler: bfloat16 has the range of float32 and needs no scaling. "
                "Leave the scaler out, or use '16-mixed'."
            )
        if scaler is None and precision == "16-mixed":
            scaler = torch.amp.GradScaler(self.device)
        self.precision = precision
        self._dtype = _DTYPES[precision]
        self._scaling = _Scaling(scaler)

    def place(self, device: str) -> None:
        """Take over the type of the run's devices, unless the constructor was given one."""
        if device == self.device:
            return
        if not self._follows:
            rank_zero_warn(
                f"MixedPrecision(device={self.device!r}) autocasts nothing on {device!r}, where the run is: leave"
                " device= out."
            )
            return
        self.device = device
        if self._own_scaler and self._scaling.scaler is not None:
            self._scaling = _Scaling(torch.amp.GradScaler(device))

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the autocast context in the lower precision; it keeps casts of weights unless it is in one that does
        not, such as :meth:`step_context`.
        """
        return torch.autocast(self.device, dtype=self._dtype, cache_enabled=torch.is_autocast_cache_enabled())

    def convert_input(self, data: Any) -> Any:
        """Cast floating-point tensors to the lower precision."""
        return cast_floating(data, self._dtype)

    def convert_output(self, data: Any) -> Any:
        """Cast floating-point tensors to torch's default dtype."""
        return cast_floating(data, torch.get_default_dtype())
