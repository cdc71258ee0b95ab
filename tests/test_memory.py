"""How much memory a process may still take: what is free on the machine, or less where it is limited."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gan import memory


@pytest.mark.parametrize(
    ("own", "folder", "names"),
    [
        ("0::/jobs/one\n", "jobs/one", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:cpu:/x\n4:memory:/jobs/one\n",
            "memory/jobs/one",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["v2", "v1"],
)
def test_the_limits_of_control_groups_count(own: str, folder: str, names: tuple[str, str, str], tmp_path: Path) -> None:
    (tmp_path / "own").write_text(own)
    group = tmp_path / "mounted" / folder
    group.mkdir(parents=True)

    def write(at: Path, limit: str, used: int, cached: int) -> None:
        (at / names[0]).write_text(f"{limit}\n")
        (at / names[1]).write_text(f"{used}\n")
        (at / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")

    write(group, "1000", used=700, cached=200)
    write(group.parent, "max", used=900, cached=0)
    assert memory._left_in_cgroups(tmp_path / "mounted", tmp_path / "own") == [500]
    write(group.parent, "1200", used=900, cached=0)
    assert memory._left_in_cgroups(tmp_path / "mounted", tmp_path / "own") == [500, 300]
    assert memory._left_in_cgroups(tmp_path / "mounted", tmp_path / "missing") == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit of memory that is kept")
def test_the_limit_of_the_address_space_counts() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    free = memory.available_bytes()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
    try:
        limited = memory.available_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert 0.4 < limited / 2**30 <= 0.5 < free / 2**30


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere all that there is counts as free")
def test_without_psutil_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    expected = psutil.virtual_memory().available
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert memory._free_on_machine() == pytest.approx(expected, rel=0.2)
