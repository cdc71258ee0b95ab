import numpy as np
import pytest
from pictures import noise

from gan.data.contact_sheet import CHECKER, CHECKER_COLOURS, GAP, GAP_COLOUR, MAX_PICTURES, MAX_SIDE, contact_sheet


def test_pictures_stand_in_rows_with_gaps_between():
    pictures = noise(5, 200, 200, 3)
    sheet = contact_sheet(list(pictures)).copy()
    assert sheet.dtype == np.uint8
    assert sheet.shape == (GAP + 2 * (200 + GAP), GAP + 3 * (200 + GAP), 3)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, 3)
        top, left = GAP + row * (200 + GAP), GAP + column * (200 + GAP)
        assert (sheet[top : top + 200, left : left + 200] == picture).all()
        sheet[top : top + 200, left : left + 200] = GAP_COLOUR
    assert (sheet == GAP_COLOUR).all()


def test_small_pictures_are_enlarged_by_whole_factors():
    picture = noise(16, 12)
    sheet = contact_sheet([picture])
    assert sheet.shape == (128 + 2 * GAP, 96 + 2 * GAP, 3)
    assert (sheet[GAP:-GAP, GAP:-GAP] == picture.repeat(8, axis=0).repeat(8, axis=1)[..., None]).all()


@pytest.mark.parametrize("shape", [(1000, 500), (500, 1000, 3), (1000, 1000, 4), (10, 20000, 3)])
def test_large_pictures_are_reduced(shape):
    sheet = contact_sheet([np.full(shape, 255, dtype=np.uint8)])
    height, width = (max(1, round(side * MAX_SIDE / max(shape[:2]))) for side in shape[:2])
    assert sheet.shape == (height + 2 * GAP, width + 2 * GAP, 3)
    assert (sheet[GAP:-GAP, GAP:-GAP] == 255).all()


def test_transparency_is_shown():
    picture = np.zeros((128, 128, 4), dtype=np.uint8)
    picture[64:] = (1, 2, 3, 255)
    shown = contact_sheet([picture])[GAP:-GAP, GAP:-GAP]
    light, dark = CHECKER_COLOURS
    assert (shown[:CHECKER, :CHECKER] == light).all()
    assert (shown[:CHECKER, CHECKER : 2 * CHECKER] == dark).all()
    assert (shown[CHECKER : 2 * CHECKER, :CHECKER] == dark).all()
    assert (shown[64:] == (1, 2, 3)).all()


def test_pictures_of_several_sizes_and_kinds():
    sheet = contact_sheet([np.full((200, 100), 10, np.uint8), np.full((100, 200, 3), 20, np.uint8)])
    assert sheet.shape == (GAP + 200 + GAP, GAP + 2 * (200 + GAP), 3)
    assert (sheet[100 + GAP, 100 + GAP] == 10).all()
    assert (sheet[100 + GAP, 300 + 2 * GAP] == 20).all()
    assert (sheet[100 + GAP, GAP] == GAP_COLOUR).all()  # beside the narrow one


def test_no_more_than_can_be_looked_at():
    few = contact_sheet([np.zeros((64, 64), np.uint8)] * MAX_PICTURES)
    many = contact_sheet([np.zeros((64, 64), np.uint8)] * 1000)
    assert few.shape == many.shape
    assert few.shape[:2] == (GAP + 6 * (128 + GAP), GAP + 8 * (128 + GAP))
