"""The ranking of checkpoints as a table: pure functions, so no file is written here."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
import torch

from treadle.callbacks.checkpoints.ranking import Ranking

NAN, INF = float("nan"), float("inf")


def ranked(mode: str, k: int, *scores: float, first: int = 0) -> tuple[Ranking, list[str]]:
    """The ranking after checkpoints "0", "1", ... of these scores, and all paths that it gave up on the way."""
    ranking, gone = Ranking.empty(mode, k), []
    for i, score in enumerate(scores, start=first):
        ranking, replaced = ranking.with_candidate(torch.tensor(float(score)), str(i))
        gone += replaced
    return ranking, gone


@pytest.mark.parametrize(
    ("mode", "k", "scores", "kept", "best", "kth", "gone"),
    [
        # fewer than k: all are kept, and there is no k-th best
        ("min", 3, [3, 1], "0 1", "1", "", ""),
        ("max", 3, [3, 1], "0 1", "0", "", ""),
        # k = 1: the best, the earlier one where scores are equal
        ("min", 1, [3, 1, 2], "1", "1", "1", "0"),
        ("max", 1, [3, 1, 4], "2", "2", "2", "0"),
        ("min", 1, [2, 2, 2], "0", "0", "0", ""),
        ("max", 1, [2, 2, 2], "0", "0", "0", ""),
        # the worst one goes; of equal ones the earliest is the worst, and the earliest is the best
        ("min", 2, [3, 4, 1, 2, 5], "2 3", "2", "3", "1 0"),
        ("max", 2, [3, 4, 1, 2, 5], "1 4", "4", "1", "0"),
        ("min", 2, [3, 3, 1], "1 2", "2", "1", "0"),
        ("max", 2, [3, 3, 5], "1 2", "2", "1", "0"),
        ("min", 3, [1, 2, 1, 2, 1], "0 2 4", "0", "0", "1"),
        ("max", 3, [2, 2, 2], "0 1 2", "0", "0", ""),
        # -1: all are kept, and the worst of them is the k-th best
        ("min", -1, [3, 4, 1], "0 1 2", "2", "1", ""),
        ("max", -1, [3, 4, 1], "0 1 2", "1", "2", ""),
        # 0: nothing is kept
        ("min", 0, [3, 1], "", "", "", ""),
        # infinity is a score like others
        ("min", 2, [INF, -INF, 0], "1 2", "1", "2", "0"),
        ("max", 2, [INF, -INF, 0], "0 2", "0", "2", "1"),
        # NaN counts as the worst value: it is kept while there is room, and never replaces anything
        ("min", 2, [NAN, 3, 1], "1 2", "2", "1", "0"),
        ("max", 2, [NAN, 3, 1], "1 2", "1", "2", "0"),
        ("min", 1, [3, NAN], "0", "0", "0", ""),
        ("max", 1, [NAN, NAN], "0", "0", "0", ""),
        ("min", 1, [INF, NAN], "0", "0", "0", ""),
    ],
)
def test_what_is_kept(mode: str, k: int, scores: list[float], kept: str, best: str, kth: str, gone: str) -> None:
    ranking, replaced = ranked(mode, k, *scores)
    assert list(ranking.best_k_models) == kept.split()
    assert ranking.best_model_path == best
    assert ranking.kth_best_model_path == kth
    assert replaced == gone.split()


@pytest.mark.parametrize(("mode", "worst"), [("min", INF), ("max", -INF)])
def test_values(mode: str, worst: float) -> None:
    empty = Ranking.empty(mode, 2)
    assert float(empty.kth_value) == worst
    assert empty.best_model_score is None and empty.current_score is None and empty.best_model_path == ""
    ranking, _ = ranked(mode, 2, 3)
    assert float(ranking.kth_value) == worst  # there is room for another one
    ranking, _ = ranked(mode, 2, 3, NAN)
    assert float(ranking.best_k_models["1"]) == float(ranking.kth_value) == worst
    assert float(ranking.current_score) == worst  # type: ignore[arg-type]
    assert float(ranking.best_model_score) == 3.0  # type: ignore[arg-type]


def test_a_ranking_is_never_changed_in_place() -> None:
    before, _ = ranked("min", 1, 2)
    after, gone = before.with_candidate(torch.tensor(1.0), "better")
    assert (list(before.best_k_models), before.best_model_path) == (["0"], "0")
    assert (list(after.best_k_models), after.best_model_path, gone) == (["better"], "better", ["0"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.best_model_path = "x"  # type: ignore[misc]
    same, gone = after.with_candidate(torch.tensor(1.0), "equal")
    assert same is after and gone == []


@pytest.mark.parametrize(
    ("k", "score", "expected"), [(2, 1.0, True), (2, 2.0, False), (2, NAN, False), (3, NAN, True), (-1, 9.0, True)]
)
def test_room_for_a_score(k: int, score: float, expected: bool) -> None:
    ranking, _ = ranked("min", k, 0, 2)
    assert ranking.has_room_for(torch.tensor(score)) is expected


def test_a_file_that_is_written_again_needs_no_more_room() -> None:
    ranking, _ = ranked("min", 2, 1, 2)
    assert ranking.surplus() == ["1"]
    assert ranking.surplus("1") == ranking.surplus("0") == []
    for path, kept in (("1", ["0", "1"]), ("0", ["1", "0"])):
        after, gone = ranking.with_candidate(torch.tensor(0.5), path)
        assert (list(after.best_k_models), after.best_model_path, gone) == (kept, path, [])


def test_what_is_too_much_after_a_resume_with_a_smaller_k_goes() -> None:
    ranking = dataclasses.replace(ranked("min", 4, 1, 2, 3)[0], save_top_k=2)
    assert not ranking.has_room_for(torch.tensor(4.0))
    after, gone = ranking.with_candidate(torch.tensor(0.0), "new")
    assert list(after.best_k_models) == ["0", "new"]
    assert gone == ["2", "1"]


@pytest.mark.parametrize(("k", "gone"), [(1, [["a"], []]), (-1, [[], []])])
def test_without_a_metric_the_newest_counts(k: int, gone: list[list[str]]) -> None:
    first, replaced = Ranking.empty("min", k).with_newest("a")
    assert first.best_model_path == "a" and first.best_model_score is None and replaced == []
    assert [first.with_newest(path)[1] for path in ("b", "a")] == gone


def test_files_that_are_gone() -> None:
    ranking = dataclasses.replace(ranked("min", 2, 1, 2)[0], last_model_path="last")
    without = ranking.without_files(["0"])
    assert (list(without.best_k_models), without.best_model_path, without.kth_best_model_path) == (["1"], "1", "")
    assert without.last_model_path == "last" and without.current_score is ranking.current_score
    assert ranking.without_files(["last"]).last_model_path == ""
    assert ranking.without_files(["other"]) is ranking
    newest = Ranking.empty("min", 1).with_newest("a")[0].without_files(["a"])
    assert newest.best_model_path == ""


@pytest.mark.parametrize(("mode", "k"), [*itertools.product(("min", "max"), (1, 2, 3, 5))])
def test_against_sorting(mode: str, k: int) -> None:
    """The k best of many scores, however they came; where the k-th and the next are equal, the earlier one counts."""
    draw = random.Random(k)
    for _ in range(50):
        scores = [draw.choice([0, 1, 2, 3, 4, NAN, INF, -INF]) for _ in range(draw.randrange(1, 12))]
        ranking, gone = ranked(mode, k, *scores)
        sign = 1 if mode == "min" else -1
        keys = [INF if math.isnan(score) else sign * score for score in scores]
        assert sorted(sign * float(v) for v in ranking.best_k_models.values()) == sorted(keys)[:k]
        assert len({*ranking.best_k_models, *gone}) == len(ranking.best_k_models) + len(gone)
        assert float(ranking.best_model_score) == sign * min(keys)  # type: ignore[arg-type]


def test_yaml() -> None:
    ranking, _ = ranked("min", -1, 0.5, 2.0**-60, -INF, NAN)
    assert ranking.as_yaml() == f'"0": 0.5\n"1": {2.0**-60}\n"2": -.inf\n"3": .inf\n'
    assert ranked("min", 1, 2e20)[0].as_yaml() == f'"0": {float(torch.tensor(2e20))}\n'
    large = Ranking.empty("min", 1).with_candidate(torch.tensor(1e30, dtype=torch.float64), "large")[0]
    assert large.as_yaml() == '"large": 1.0e+30\n'  # without the point, YAML takes it for a string
    assert Ranking.empty("min", 1).as_yaml() == "{}\n"
