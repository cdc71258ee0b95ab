"""What the snapshots of a run are called. No torch."""

from __future__ import annotations

import re

BEST = "network-snapshot-best.pkl"
"""the best one once more"""
_NAME = re.compile(r"network-snapshot-(\d{6,})\.pkl")


def name_of(kimg: int) -> str:
    """The snapshot at so many thousand images, cut to whole ones."""
    return f"network-snapshot-{kimg:06d}.pkl"


def kimg_of(name: str) -> int | None:
    """What the name of a snapshot says; None for a file of another name, that of the best among them."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None
