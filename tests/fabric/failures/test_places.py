"""Where a rank was when a collective failed.

Tests of ``treadle_fabric.failures.places``.
"""

from __future__ import annotations

import pytest

from treadle_fabric.failures.places import place_of

LOST = "[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:48793"


def exchange() -> None:
    raise RuntimeError(LOST)


def exchange_again() -> None:
    try:
        exchange()
    except RuntimeError:
        exchange()  # an error while another one is handled


def exchange_explained() -> None:
    try:
        exchange_again()
    except RuntimeError as error:
        raise ValueError("The others are gone.") from error


@pytest.mark.parametrize("calls", [exchange, exchange_again, exchange_explained])
def test_all_calls_are_told_whatever_was_caught_on_the_way(calls: object) -> None:
    def training_loop() -> None:
        calls()  # type: ignore[operator]

    with pytest.raises((RuntimeError, ValueError)) as raised:
        training_loop()
    stack = place_of(raised.value).stack
    assert [stack.count(f"in {name}\n") for name in ("training_loop", "exchange")] == [1, 1]
    assert stack.index("training_loop") < stack.index("in exchange\n")
