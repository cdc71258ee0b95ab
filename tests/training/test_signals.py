from __future__ import annotations

import signal

import pytest

from gan.training import signals
from gan.training.signals import Signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_asks_and_a_second_one_that_is_meant_stops_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip("Windows has none")
    seconds = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: seconds)
    before = signal.signal(number, signal.default_int_handler)  # whoever runs the tests may have it ignored
    try:
        with Signals() as asked:
            signal.raise_signal(number)
            assert asked.stop_requested
            if name != "SIGINT":
                signal.raise_signal(number)  # to the process and to its group
                seconds += 10
            if name == "SIGHUP":
                signal.raise_signal(number)  # nobody is there to mean it
            else:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has none")
def test_sigusr1_asks_for_a_state_once() -> None:
    with Signals() as asked:
        signal.raise_signal(signal.SIGUSR1)
        assert asked.take_save_request()
        assert not asked.take_save_request()
        assert not asked.stop_requested


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked.stop_requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_job_in_the_background_can_be_told_to_stop() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked.stop_requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
