from __future__ import annotations

import io
import sys

import pytest

from gan.cli.download_bar import download_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("length", "end"), [(4, "100%"), (None, "Downloading")])
def test_a_terminal_shows_a_bar(length: int | None, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with download_bar() as progress:
        for done in (0, 2, 1, 4):  # taken up, begun anew
            progress(done, length)
    assert end in screen.getvalue()


def test_elsewhere_there_is_one_line_and_without_a_download_none(capsys: pytest.CaptureFixture[str]) -> None:
    with download_bar() as progress:
        pass
    assert capsys.readouterr().err == ""
    with download_bar() as progress:
        for done in (0, 10**6):
            progress(done, 2 * 10**6)
    assert capsys.readouterr().err == "Downloading 2.0 MB ...\n"
