import time

import numpy as np

from gan.data.demo import demo_images, draw


def test_a_picture_is_a_pure_function_of_its_number():
    first, again, other = draw(7), draw(7), draw(8)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (first != other).any()


def test_any_size_shows_the_same_picture():
    large = draw(3, size=128).astype(float)
    halved = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - draw(3)).mean() < 4


def test_pictures_vary_in_colour_and_arrangement():
    pictures = np.stack(list(demo_images(64))).astype(float)
    assert len({picture.tobytes() for picture in pictures}) == 64
    means = pictures.mean(axis=(1, 2))  # [64, 3]
    assert (means.std(axis=0) > 25).all()
    layout = pictures - means[:, None, None]
    assert layout.std(axis=0).mean() > 25


def test_pictures_hold_large_shapes_rather_than_texture():
    pictures = np.stack(list(demo_images(32))).astype(float)
    coarse = pictures.reshape(32, 16, 4, 16, 4, 3).mean(axis=(2, 4))
    assert coarse.var() > 0.9 * pictures.var()


def test_drawing_is_fast():
    list(demo_images(5))
    start = time.process_time()
    list(demo_images(100))
    assert (time.process_time() - start) / 100 < 0.01  # seconds; about 0.0004 when the machine is idle
