"""A block of images computed in parts, and in more of them from where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch

from torch_utils.memory import is_out_of_memory

BLOCK = 32
"""images whose random numbers are drawn together: results depend on it"""


class Parts:
    """How many parts a block is computed in: a power of 2, which grows where memory runs out and stays so.

    Args:
        images_at_once: at most in a part, to begin with.
        free_memory: called when memory has run out, before fewer images are tried.
    """

    def __init__(self, images_at_once: int, free_memory: Callable[[], None]) -> None:
        self.number = 1
        while self.number < BLOCK and BLOCK // self.number > images_at_once:
            self.number *= 2
        self._free_memory = free_memory

    def of(self, images: int, compute: Callable[[int, int], torch.Tensor]) -> Generator[None, None, torch.Tensor]:
        """What `compute(part, parts)` gives for images part, part + parts, ... of a block, for all of them in order."""
        while True:
            try:
                return (yield from self._attempt(images, compute))
            except Exception as error:
                if self.number >= BLOCK or not is_out_of_memory(error):
                    raise
            # Here the error is gone, and with it the last that referred to the tensors of the attempt.
            self.number *= 2
            self._free_memory()

    def _attempt(self, images: int, compute: Callable[[int, int], torch.Tensor]) -> Generator[None, None, torch.Tensor]:
        parts, whole = min(self.number, images), None
        for part in range(parts):
            found = compute(part, parts)
            if parts == 1:
                return found
            if whole is None:
                whole = found.new_empty([images, *found.shape[1:]])
            whole[part::parts] = found
            if part < parts - 1:
                yield
        assert whole is not None
        return whole
