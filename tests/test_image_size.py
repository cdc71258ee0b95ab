import itertools

import numpy as np
import pytest

from gan.image_size import base_size, describe_image, is_trainable, largest_trainable, nominal_resolution

LIMIT = 200
# The rule, written out: bases of at least 4 pixels each way and at most 256 in all, doubled once or more.
TRAINABLE = {
    (a << n, b << n)
    for a, b in itertools.product(range(4, 65), repeat=2)
    for n in range(1, 6)
    if a * b <= 256 and max(a, b) << n <= LIMIT
}


def test_which_sizes_can_be_trained_on():
    every = itertools.product(range(LIMIT + 1), repeat=2)
    assert {size for size in every if is_trainable(size)} == TRAINABLE


def test_the_largest_size_that_fits_is_the_largest_of_all_that_fit():
    areas = np.zeros((LIMIT + 1, LIMIT + 1), dtype=int)
    for width, height in TRAINABLE:
        areas[width, height] = width * height
    most = np.maximum.accumulate(np.maximum.accumulate(areas, axis=0), axis=1)
    for limit in itertools.product(range(8, LIMIT + 1), repeat=2):
        width, height = largest_trainable(limit)
        assert (width, height) in TRAINABLE, limit
        assert width <= limit[0], limit
        assert height <= limit[1], limit
        assert width * height == most[limit], limit


@pytest.mark.parametrize("limit", [(0, 0), (1, 1), (7, 7), (7, 300), (300, 7)])
def test_where_nothing_fits_it_is_the_smallest_there_is(limit):
    assert largest_trainable(limit) == (8, 8)


def test_of_equal_areas_the_one_nearest_to_a_square_is_taken():
    assert largest_trainable((14, 100)) == (14, 72)  # 12x84 has as many pixels


@pytest.mark.parametrize(
    ("size", "base"),
    [
        ((8, 8), (4, 4)),
        ((1024, 1024), (4, 4)),
        ((96, 64), (6, 4)),
        ((64, 96), (4, 6)),
        ((512, 288), (16, 9)),
        ((96, 96), (6, 6)),
        ((640, 8), (320, 4)),
        ((97, 64), (97, 64)),
        ((4, 4), (4, 4)),
    ],
)
def test_the_base_is_halved_while_4_pixels_are_left(size, base):
    assert base_size(size) == base


@pytest.mark.parametrize(
    ("size", "square"),
    [((256, 256), 256), ((96, 64), 64), ((64, 96), 64), ((128, 64), 64), ((192, 96), 128), ((512, 288), 512)],
)
def test_the_nominal_resolution_is_that_of_the_square_nearest_in_area(size, square):
    assert nominal_resolution(size) == square


def test_it_doubles_with_the_size():
    for width, height in TRAINABLE:
        assert nominal_resolution((2 * width, 2 * height)) == 2 * nominal_resolution((width, height))


def test_images_are_described_by_width_height_and_colours():
    assert describe_image(64, 96, 4) == "96x64 RGBA"
