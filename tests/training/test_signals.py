from __future__ import annotations

import signal

import pytest

from gan.training.signals import Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_and_the_second_stops_at_once(number: int) -> None:
    before = signal.getsignal(number)
    with Signals() as signals:
        signal.raise_signal(number)
        assert signals.stop_requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has none")
def test_sigusr1_asks_for_a_state_once() -> None:
    with Signals() as signals:
        signal.raise_signal(signal.SIGUSR1)
        assert signals.take_save_request()
        assert not signals.take_save_request()
        assert not signals.stop_requested


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.stop_requested
    finally:
        signal.signal(signal.SIGHUP, before)
