"""Train a StyleGAN2-ADA on your own images and work with the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gan.models.snapshot import Generator, Where

__all__ = ["load"]


def load(where: Where) -> Generator:
    """The generator of a model file or address, on the CPU, to sample from: the moving average if there is one.

    Everything that `gan.models.load` opens; nothing in the file is executed. docs/python.md shows what to do with it.

    Raises GanError, naming the file, if it cannot be read or holds no generator.
    """
    from gan.models.opening import load as open_models  # here, so that importing the package takes no time

    return open_models(where).require_generator()
