"""Random numbers of a batch in parts: those of the whole batch, dealt."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from torch_utils import draws

CPU = torch.device("cpu")


def dealt(draw: Callable[[int], torch.Tensor], parts: int, dim: int = 0) -> torch.Tensor:
    """What `draw(samples)` gives to all parts of a batch of 12, put together again."""
    found = None
    for index in range(parts):
        torch.manual_seed(5)
        with draws.part(index, parts):
            own = draw(12 // parts).movedim(dim, 0)
        found = own.new_zeros([12, *own.shape[1:]]) if found is None else found
        found[index::parts] = own
    assert found is not None
    return found.movedim(0, dim)


@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_parts_draw_what_the_whole_batch_draws(parts: int) -> None:
    torch.manual_seed(5)
    noise, uniform = torch.randn([12, 1, 3, 2]), torch.rand([32, 12])
    after = torch.randn(2)

    def noise_of(n: int) -> torch.Tensor:
        return draws.randn([n, 1, 3, 2], CPU)

    def uniform_of(n: int) -> torch.Tensor:
        draws.randn([n, 1, 3, 2], CPU)
        own = draws.rand([32, n], CPU, dim=1)
        assert torch.equal(torch.randn(2), after)  # all parts leave the generator where the whole batch does
        return own

    assert torch.equal(dealt(noise_of, parts), noise)
    assert torch.equal(dealt(uniform_of, parts, dim=1), uniform)


@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_what_is_large_is_drawn_in_blocks_that_are_the_same_for_all_parts(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "_BLOCK", 80)  # 5 of the 12 samples of noise, 2 of the other draw
    torch.manual_seed(5)
    noise = torch.randn([12, 1, 4, 4])
    torch.manual_seed(5)
    uniform = torch.cat([torch.rand([32, 2]) for _ in range(6)], dim=1)
    after = torch.randn(2)
    sizes: list[int] = []

    def counted(size: list[int], draw: Callable[..., torch.Tensor] = torch.randn, **kwargs: Any) -> torch.Tensor:
        sizes.append(math.prod(size))
        return draw(size, **kwargs)

    def uniform_of(n: int) -> torch.Tensor:
        own = draws.rand([32, n], CPU, dim=1)
        assert torch.equal(torch.randn(2), after)
        return own

    assert torch.equal(dealt(uniform_of, parts, dim=1), uniform)
    monkeypatch.setattr(torch, "randn", counted)
    assert torch.equal(dealt(lambda n: draws.randn([n, 1, 4, 4], CPU), parts), noise)
    assert sizes == [80, 80, 32] * parts


def test_the_precision_is_the_one_asked_for() -> None:
    torch.manual_seed(1)
    expected = torch.randn([4, 3], dtype=torch.float64)
    torch.manual_seed(1)
    with draws.part(1, 2):
        assert torch.equal(draws.randn([2, 3], CPU, torch.float64), expected[1::2])


def test_parts_end_with_the_block_also_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="broken"), draws.part(1, 2):
        raise RuntimeError("broken")
    torch.manual_seed(0)
    own = draws.randn([4], CPU)
    torch.manual_seed(0)
    assert torch.equal(own, torch.randn([4]))
