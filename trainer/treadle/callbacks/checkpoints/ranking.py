"""Which checkpoints are kept: a frozen value, and pure functions that give the next one."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from treadle.callbacks.monitoring.monitored_metric import worst_value

__all__ = ["Ranking"]


@dataclass(frozen=True)
class Ranking:
    """The checkpoints that are kept and the scores they have.

    The fields from ``best_k_models`` on have the names of ModelCheckpoint's public attributes. Each of them can be set
    from outside without the others, so none is computed from another one when it is read.
    """

    mode: str
    """"min" or "max", whichever score is better."""
    save_top_k: int
    """How many checkpoints are kept: -1 for all, 0 for none."""
    kth_value: Tensor
    """The worst score that is kept; the worst value there is while there is room for another checkpoint."""
    best_k_models: dict[str, Tensor]
    """The score of each checkpoint that is kept, by path, in the order of the saves."""
    kth_best_model_path: str = ""
    """The checkpoint with the worst score; empty while there is room for another checkpoint."""
    best_model_path: str = ""
    """The checkpoint with the best score or, without a metric, the newest one."""
    best_model_score: Tensor | None = None
    """The best score."""
    current_score: Tensor | None = None
    """The score of the newest checkpoint that was ranked."""
    last_model_path: str = ""
    """The file that has the newest state under the name ``last``."""

    @classmethod
    def empty(cls, mode: str, save_top_k: int) -> Ranking:
        """Return the ranking of a run that has saved nothing."""
        return cls(mode, save_top_k, torch.tensor(worst_value(mode), device="cpu"), {})

    def has_room_for(self, score: Tensor) -> bool:
        """Tell whether a score is among the best ``save_top_k``. A score that equals the worst one kept is not."""
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        return self.save_top_k > 0 and self._badness(score) < max(map(self._badness, self.best_k_models.values()))

    def surplus(self, path: str = "") -> list[str]:
        """Return the paths that go when one more checkpoint is kept, the worst first and of equal ones the earliest.

        Args:
            path: where the new checkpoint is written. If it replaces a checkpoint that is kept, it needs no more room.
        """
        if self.save_top_k == -1:
            return []
        others = [each for each in self.best_k_models if each != path]
        others.sort(key=lambda each: self._badness(self.best_k_models[each]), reverse=True)
        return others[: max(0, len(others) + 1 - self.save_top_k)]

    def with_candidate(self, score: Tensor, path: str) -> tuple[Ranking, list[str]]:
        """Return the ranking with one more checkpoint, and the paths of the checkpoints that it replaces.

        A score that there is no room for changes nothing. NaN counts as the worst value.
        """
        if not self.has_room_for(score):
            return self, []
        score = torch.full_like(score, worst_value(self.mode)) if torch.isnan(score) else score
        gone = self.surplus(path)
        return self._of({**self._without([*gone, path]), path: score}, score), gone

    def with_newest(self, path: str) -> tuple[Ranking, list[str]]:
        """Return the ranking with ``path`` as the newest checkpoint, without a metric, and the path it replaces."""
        gone = [self.best_model_path] if self.save_top_k == 1 and self.best_model_path not in ("", path) else []
        return replace(self, best_model_path=path), gone

    def without_files(self, gone: Collection[str]) -> Ranking:
        """Return the ranking without the paths at which there is no file any more."""
        ranking = self
        if not self.best_k_models.keys().isdisjoint(gone):
            ranking = self._of(self._without(gone), self.current_score)
        elif self.best_model_path in gone:
            ranking = replace(ranking, best_model_path="")
        return replace(ranking, last_model_path="") if self.last_model_path in gone else ranking

    def restored(self, state: dict[str, Any]) -> Ranking:
        """Return the ranking with the values that a checkpoint has; those it does not have stay."""
        names = ("best_model_path", "kth_best_model_path", "kth_value", "best_k_models", "last_model_path")
        found = {name: state[name] for name in names if name in state}
        return replace(self, best_model_score=state.get("best_model_score"), **found)

    def as_yaml(self) -> str:
        """Return ``best_k_models`` as a YAML document of paths and scores."""
        lines = (f"{json.dumps(path)}: {_yaml(float(score))}\n" for path, score in self.best_k_models.items())
        return "".join(lines) or "{}\n"

    def _badness(self, score: Tensor) -> float:
        """Return a number that is the greater the worse the score is, with NaN as the worst."""
        value = float(score) if self.mode == "min" else -float(score)
        return math.inf if math.isnan(value) else value

    def _without(self, gone: Collection[str]) -> dict[str, Tensor]:
        return {path: score for path, score in self.best_k_models.items() if path not in gone}

    def _of(self, kept: dict[str, Tensor], current_score: Tensor | None) -> Ranking:
        """Return the ranking of ``kept``; of several best scores, and of several worst ones, the earliest counts."""
        full = bool(kept) and (self.save_top_k == -1 or len(kept) >= self.save_top_k)
        best = min(kept, key=lambda path: self._badness(kept[path])) if kept else ""
        worst = max(kept, key=lambda path: self._badness(kept[path])) if full else ""
        return replace(
            self,
            best_k_models=kept,
            best_model_path=best,
            best_model_score=kept.get(best),
            current_score=current_score,
            kth_best_model_path=worst,
            kth_value=kept.get(worst, torch.tensor(worst_value(self.mode), device="cpu")),
        )


def _yaml(value: float) -> str:
    """Write a float so that every YAML reader takes it for one."""
    if math.isnan(value):
        return ".nan"
    if math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    text = repr(value)
    return text if "." in text else text.replace("e", ".0e")
