"""Images in: `pack` makes datasets of pictures, `packing.scan` only looks at them, training reads datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gan.data.packing import pack

__all__ = ["pack"]


def __getattr__(name: str) -> Any:
    """Packing is loaded when it is asked for: training does not need it."""
    if name == "pack":
        from gan.data.packing import pack

        return pack
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
