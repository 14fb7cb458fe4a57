"""The search for the largest batch size that memory has room for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from treadle.module import LightningDataModule, LightningModule
from treadle.searches.attributes import Attribute, find_attribute
from treadle.searches.status import StatusLine
from treadle.searches.trials import Trials
from treadle_fabric import MisconfigurationException, check_integer, is_number, near_names, rank_zero_info

__all__ = ["BatchSizeSearch", "largest_that_fits"]

_MODES: Final = ("power", "binsearch")


@dataclass
class _Bracket:
    """The largest batch size that fits so far, and the smallest that does not; 0: none yet."""

    fits: int = 0
    fails: int = 0
    tried: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BatchSizeSearch:
    """A search for the largest batch size.

    Args:
        mode: "power" doubles the batch size until memory is full; "binsearch" then halves the interval between the
            largest that fits and the smallest that does not.
        steps_per_trial: The number of batches to run with each size.
        init_val: The size to begin with.
        max_trials: The largest number of sizes to try.
        batch_arg_name: The attribute or hyper-parameter of module or data module with the batch size.
        margin: What "binsearch" takes off the size that it found, as a fraction: room for batches that need more.
        max_val: The largest size to try.

    Raises:
        MisconfigurationException: an argument is wrong.
    """

    mode: str = "power"
    steps_per_trial: int = 3
    init_val: int = 2
    max_trials: int = 25
    batch_arg_name: str = "batch_size"
    margin: float = 0.05
    max_val: int = 8192

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise MisconfigurationException(
                f"scale_batch_size: mode={self.mode!r} must be 'power' or 'binsearch'."
                f" {near_names(str(self.mode), _MODES)}"
            )
        for name in ("steps_per_trial", "init_val", "max_trials", "max_val"):
            check_integer(f"scale_batch_size: {name}", getattr(self, name), minimum=1)
        margin = self.margin
        if not is_number(margin) or not 0 <= margin < 1:
            raise MisconfigurationException(f"scale_batch_size: margin={margin!r} must be a number from 0 to below 1.")

    def attribute(self, module: LightningModule, datamodule: LightningDataModule | None) -> Attribute:
        """Find what the search sets.

        Raises:
            MisconfigurationException: neither module nor data module has such an attribute.
        """
        remedy = "set it in `__init__`, and make the loaders with it; or name another one with `batch_arg_name`."
        return find_attribute([self.batch_arg_name], [module, datamodule], remedy)

    def check_loaders(self, given: Any) -> None:
        """Refuse loaders that the user passed: they have a batch size already.

        Raises:
            MisconfigurationException: there are some.
        """
        if given is not None:
            raise MisconfigurationException(
                "scale_batch_size needs loaders that are made anew for each batch size, and got loaders: define"
                " `train_dataloader`, or that of the stage, in the module or a data module, with"
                f" `batch_size=self.{self.batch_arg_name}`, and do not pass loaders."
            )

    def run(self, trials: Trials) -> int:
        """Run the search; see :class:`Trials`.

        Raises:
            MisconfigurationException: the loaders do not depend on the attribute.
        """
        attribute = self.attribute(trials.module, trials.datamodule)
        self.check_loaders(trials.given_loaders)
        status, seen = StatusLine(trials.shows_progress), dict[int, int]()

        def fits(size: int) -> bool:
            status.show(f"scale_batch_size: trying {size}")
            attribute.set(size)
            fitted = trials.fits(self.steps_per_trial)
            known = trials.loader_batch_size
            if known is not None and known in seen.values() and seen.get(size) != known:
                other = next(tried for tried, made in seen.items() if made == known)
                raise MisconfigurationException(
                    f"scale_batch_size set {attribute.where} to {other} and to {size}, and both times the loader has"
                    f" batches of {known}: make a new loader with `batch_size=self.{attribute.name}` whenever it is"
                    " asked for."
                )
            if known is not None:
                seen[size] = known
            return fitted

        bracket = _Bracket()
        try:
            return largest_that_fits(self, fits, lambda: trials.samples, bracket)
        finally:
            status.clear()
            if bracket.tried:
                rank_zero_info(f"scale_batch_size: {', '.join(bracket.tried)}.")

    def apply(self, size: int, module: LightningModule, datamodule: LightningDataModule | None) -> None:
        """Set the batch size, and tell the user."""
        attribute = self.attribute(module, datamodule)
        attribute.set(size)
        rank_zero_info(f"scale_batch_size: set {attribute.where} to {size}.")


def largest_that_fits(
    search: BatchSizeSearch,
    fits: Callable[[int], bool],
    samples: Callable[[], int | None],
    bracket: _Bracket | None = None,
) -> int:
    """Search the largest batch size.

    Args:
        search: The options.
        fits: Tries a size.
        samples: The number of samples in the dataset, which no batch can exceed, once a size was tried; or None.
        bracket: Gets what was tried.

    Raises:
        MisconfigurationException: no size fits.
    """
    known = bracket or _Bracket()
    size = min(search.init_val, search.max_val)
    for _ in range(search.max_trials):
        fitted = fits(size)
        known.tried.append(f"{size} {'fits' if fitted else 'does not fit'}")
        most = min(search.max_val, samples() or search.max_val)
        if fitted:
            known.fits = min(size, most)  # a loader with fewer samples has made a smaller batch
        else:
            known.fails = size
        next_size = _next(search.mode, known.fits, known.fails, most)
        if next_size is None:
            break
        size = next_size
    if not known.fits:
        raise MisconfigurationException(
            f"scale_batch_size found no batch size that fits; the smallest that was tried is {known.fails}. Use a"
            " smaller model, a precision of fewer bits, or a device with more memory"
            + ("." if known.fails == 1 else "; or lower init_val, or raise max_trials.")
        )
    return max(1, math.floor(known.fits * (1 - search.margin))) if search.mode == "binsearch" else known.fits


def _next(mode: str, fits: int, fails: int, most: int) -> int | None:
    """The next size to try; None where the search is over."""
    if not fails:
        return min(2 * fits, most) if fits < most else None
    if not fits:
        return fails // 2 if fails > 1 else None
    return (fits + fails) // 2 if mode == "binsearch" and fails - fits > 1 else None
