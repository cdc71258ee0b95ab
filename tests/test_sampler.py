"""Which images come next."""

import itertools

import numpy as np
import pytest

from gan.data.sampler import batches, epoch_order


def stream(num_images, batch, seed, start, length):
    """The first `length` images of a stream, whatever its batches."""
    taken = itertools.islice(batches(num_images, batch, seed, start), -(-length // batch))
    return np.concatenate(list(taken))[:length]


@pytest.mark.parametrize(("num_images", "batch"), [(1, 3), (7, 1), (10, 4), (12, 5), (100, 32), (64, 64)])
def test_every_image_is_shown_once_an_epoch(num_images, batch):
    epochs = stream(num_images, batch, 0, 0, 5 * num_images).reshape(5, num_images)
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_images))


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
@pytest.mark.parametrize("start", [0, 1, 8, 16, 17, 34, 51, 1000])
def test_starting_later_equals_dropping_the_images_before(start, batch):
    whole = stream(17, 5, 3, 0, start + 200)
    assert np.array_equal(stream(17, batch, 3, start, 200), whole[start:])


@pytest.mark.parametrize("start", [0, 17, 120])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 12])
def test_the_shares_of_all_processes_are_the_batch_of_one(processes, start):
    """So any number of them sees each image as often, and may be followed by any other number."""
    shares = [batches(17, 12, 3, start, rank, processes) for rank in range(processes)]
    for whole in itertools.islice(batches(17, 12, 3, start), 10):
        parts = [next(share) for share in shares]
        assert {len(part) for part in parts} == {12 // processes}
        assert np.array_equal(np.stack(parts, axis=1).reshape(-1), whole)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert tuple(epoch_order(50, 1, 2)) == tuple(epoch_order(50, 1, 2))


def test_an_epoch_is_well_shuffled():
    """Neighbours do not stay neighbours, and no place in the epoch is reserved."""
    orders = np.stack([epoch_order(20, 0, epoch) for epoch in range(2000)])
    assert np.mean(np.abs(np.diff(orders, axis=1)) == 1) == pytest.approx(0.1, abs=0.01)  # 2 * 19 / (20 * 19)
    counts = np.stack([np.bincount(column, minlength=20) for column in orders.T])
    assert np.abs(counts - 100).max() < 5 * np.sqrt(95)


def test_batches_are_indices_of_the_size_asked_for():
    for indices in itertools.islice(batches(5, 8, 0), 4):
        assert indices.shape == (8,)
        assert indices.dtype == np.int64


def test_the_order_stays_what_it_is_so_that_runs_can_continue_under_a_new_version():
    assert stream(10, 4, 0, 0, 12).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1, 9, 1]
