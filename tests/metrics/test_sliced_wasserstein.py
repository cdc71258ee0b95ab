"""Sliced Wasserstein distances: as their definition has them, level by level, the same however images are dealt."""

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from portions import finished, in_portions

from gan.metrics import sliced_wasserstein as module
from gan.metrics.sliced_wasserstein import descriptors, distances, heights


def noise(number, *size, channels=3, seed=0):
    """Pictures with structure of every scale, as photographs have."""
    random = torch.Generator().manual_seed(seed)
    total = torch.zeros(number, channels, *size)
    for side in (2, 4, 8, 16, 32, 64):
        coarse = torch.randn(number, channels, min(side, size[0]), min(side, size[1]), generator=random)
        total += F.interpolate(coarse, size=size, mode="bilinear") / side**0.5
    return (total * 40 + 128).clamp(0, 255).to(torch.uint8)


def between(a, b, **options):
    return finished(distances(descriptors(a, range(len(a))), descriptors(b, range(len(b))), **options))


class TestLevels:
    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            ((4, 4), [4]),
            ((16, 16), [16]),
            ((30, 30), [30]),
            ((31, 31), [31, 16]),
            ((32, 32), [32, 16]),
            ((256, 256), [256, 128, 64, 32, 16]),
            ((96, 64), [96, 48, 24]),
            ((20, 100), [20]),
            ((100, 20), [100]),
        ],
    )
    def test_down_to_16_pixels(self, size, expected):
        assert heights(*size) == expected
        found = descriptors(noise(2, *size), range(2))
        assert list(found) == expected
        side = min(7, *size)
        assert {tuple(patches.shape) for patches in found.values()} == {(2, 64, 3, side * side)}

    @pytest.mark.parametrize("size", [(64, 64), (67, 45)])
    def test_the_pyramid_is_of_binomial_filters_with_mirrored_edges(self, size):
        image = noise(1, *size, channels=1).double().numpy()[0, 0]
        taps = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
        expected = []
        for _ in range(len(heights(*size)) - 1):
            smaller = scipy.ndimage.convolve(image, taps, mode="mirror")[::2, ::2]
            spread = np.zeros_like(image)
            spread[::2, ::2] = smaller
            expected.append(image - scipy.ndimage.convolve(spread, 4 * taps, mode="mirror"))
            image = smaller
        found = list(module._pyramid(noise(1, *size, channels=1).float(), len(heights(*size))))
        for level, picture in zip([*expected, image], found, strict=True):
            assert np.allclose(level, picture[0, 0], atol=1e-3)

    def test_a_plain_picture_has_only_its_last_level(self):
        found = descriptors(torch.full((2, 3, 64, 64), 200, dtype=torch.uint8), range(2))
        assert all(found[height].abs().max() < 1e-3 for height in (64, 32))
        assert torch.allclose(found[16].float(), torch.tensor(200.0), atol=0.2)


class TestPatches:
    def test_are_cut_out_of_their_level(self):
        picture = torch.arange(15 * 15).reshape(1, 1, 15, 15).to(torch.uint8)
        patches = descriptors(picture, [5])[15]
        for patch in patches[0, :, 0].reshape(-1, 7, 7):
            y, x = divmod(int(patch[0, 0]), 15)
            assert torch.equal(patch.to(torch.uint8), picture[0, 0, y : y + 7, x : x + 7])

    def test_are_found_everywhere(self):
        picture = torch.arange(15 * 15).reshape(1, 1, 15, 15).to(torch.uint8).expand(20, -1, -1, -1)
        corners = descriptors(picture, range(20))[15][:, :, 0, 0].unique()
        assert len(corners) == 81  # of 9 x 9 places
        assert corners.max() == 8 * 15 + 8

    def test_do_not_depend_on_other_images(self):
        pictures = noise(9, 32, 32)
        together = descriptors(pictures, range(9))
        for some in ([0, 1, 2], [3], [8, 4]):
            apart = descriptors(pictures[some], some)
            for height, patches in apart.items():
                assert torch.allclose(patches.float(), together[height][some].float(), atol=0.1)

    def test_follow_from_the_seed(self):
        pictures = noise(2, 32, 32)
        first, second, other = (descriptors(pictures, range(2), seed)[32] for seed in (0, 0, 1))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)

    def test_of_two_images_are_at_different_places(self):
        twice = noise(1, 32, 32).expand(2, -1, -1, -1)
        patches = descriptors(twice, range(2))[32]
        assert not torch.equal(patches[0], patches[1])


def by_definition(real, fake, directions):
    """One direction at a time, in float64."""
    sets = []
    for patches in (real, fake):
        rows = patches.double().numpy()
        rows = (rows - rows.mean((0, 1, 3), keepdims=True)) / rows.std((0, 1, 3), keepdims=True)
        sets.append(rows.reshape(len(rows) * rows.shape[1], -1))
    total = 0.0
    for direction in directions.double().numpy():
        a, b = (np.sort(rows @ direction) for rows in sets)
        total += np.abs(a - b).mean()
    return 1000 * total / len(directions)


class TestDistances:
    def test_definition(self):
        real, fake = (descriptors(pictures, range(8)) for pictures in (noise(8, 32, 32), noise(8, 32, 32, seed=1)))
        found = finished(distances(real, fake, seed=3))
        for height in (32, 16):
            directions = module._directions(147, (3, height))
            assert torch.allclose(directions.norm(dim=1), torch.ones(512))
            assert found[height] == pytest.approx(by_definition(real[height], fake[height], directions), rel=1e-4)

    def test_equal_sets_are_0_apart_in_any_order(self):
        patches = descriptors(noise(10, 32, 32), range(10))
        mixed = {height: each.flip(0) for height, each in patches.items()}
        # Sums over patches in another order give means that differ in their last bits.
        assert finished(distances(patches, mixed)) == pytest.approx({32: 0, 16: 0}, abs=1e-2)
        assert finished(distances(patches, patches)) == {32: 0, 16: 0}

    def test_other_images_of_the_same_kind_are_near_and_other_kinds_far(self):
        real, same = noise(60, 32, 32), noise(60, 32, 32, seed=1)
        random = torch.Generator().manual_seed(2)
        static = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=random)
        plain = F.interpolate(noise(60, 4, 4, seed=3).float(), size=(32, 32)).to(torch.uint8)
        near, far = between(real, same), [between(real, static), between(real, plain)]
        for other in far:
            assert all(other[height] > near[height] for height in (32, 16))
            assert sum(other.values()) > 1.5 * sum(near.values())

    def test_blur_shows_on_the_level_of_its_size(self):
        real, same = noise(60, 64, 64), noise(60, 64, 64, seed=1)
        blurred = F.avg_pool2d(F.pad(same.float(), [1, 1, 1, 1], mode="reflect"), 3, stride=1).to(torch.uint8)
        near, found = between(real, same), between(real, blurred)
        assert found[64] > 2 * near[64]
        assert found[16] < 1.1 * near[16]

    def test_more_is_further(self):
        real, same = noise(40, 32, 32), noise(40, 32, 32, seed=1).float()
        random = torch.randn(same.shape, generator=torch.Generator().manual_seed(2))
        found = [between(real, (same + random * sigma).clamp(0, 255).to(torch.uint8))[32] for sigma in (0, 20, 60)]
        assert found == sorted(found)

    def test_brightness_and_contrast_of_a_channel_do_not_count(self):
        # Each is normalised over its set.
        patches = descriptors(noise(10, 32, 32), range(10))
        brighter = {height: each.float() * 0.5 + 40 for height, each in patches.items()}
        assert all(value < 1 for value in finished(distances(patches, brighter)).values())

    def test_a_set_of_one_colour_is_far_and_finite(self):
        plain = torch.full((10, 3, 32, 32), 77, dtype=torch.uint8)
        assert all(100 < value < 2000 for value in between(noise(10, 32, 32), plain).values())

    def test_a_channel_that_hardly_varies_does_not_decide(self):
        # An alpha channel of 255, in one set with some pixels of 254.
        random = torch.Generator().manual_seed(3)
        real, fake = noise(40, 32, 32, channels=4), noise(40, 32, 32, channels=4, seed=1)
        real[:, 3], fake[:, 3] = 255, 255
        full = between(real, fake)
        real[:, 3] -= (torch.rand(40, 32, 32, generator=random) < 0.001).to(torch.uint8)
        assert between(real, fake) == pytest.approx(full, abs=0.5)

    def test_a_deviation_counts_as_one_level_at_least(self):
        drawn = torch.randn(50, 64, 2, 49, generator=torch.Generator().manual_seed(0))
        rows = module._normalised(drawn * torch.tensor([0.5, 3.0])[:, None] + 80).unflatten(1, (2, 49))
        assert [float(rows[:, channel].std()) for channel in (0, 1)] == pytest.approx([0.5, 1], rel=0.01)
        assert rows.mean((0, 2)).abs().max() < 1e-4

    def test_directions_follow_from_the_seed(self):
        real, fake = (descriptors(noise(6, 16, 16, seed=seed), range(6)) for seed in (0, 1))
        first, second, other = (finished(distances(real, fake, seed))[16] for seed in (0, 0, 1))
        assert first == second
        assert first != other
        assert first == pytest.approx(other, rel=0.2)

    def test_grey_pictures_of_4_pixels(self):
        small, other = noise(40, 4, 4, channels=1), noise(40, 4, 4, channels=1, seed=1)
        assert 0 < between(small, other)[4] < between(small, other // 64 * 64)[4] + 100

    def test_portions(self):
        real = descriptors(noise(4, 32, 32), range(4))
        assert in_portions(distances(real, real))[1] == 2 * (2 + 512 // 16)

    def test_what_is_given_stays_as_it_is(self):
        patches = {height: each.float() for height, each in descriptors(noise(4, 32, 32), range(4)).items()}
        before = {height: each.clone() for height, each in patches.items()}
        finished(distances(patches, patches))
        assert all(torch.equal(before[height], each) for height, each in patches.items())

    def test_sets_of_unequal_size_are_a_mistake(self):
        with pytest.raises(ValueError, match="as many images"):
            between(noise(4, 16, 16), noise(5, 16, 16))


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    real, fake = noise(20, 64, 64), noise(20, 64, 64, seed=1)
    assert between(real.cuda(), fake.cuda()) == pytest.approx(between(real, fake), rel=1e-2)
    assert between(real, fake, device=torch.device("cuda")) == pytest.approx(between(real, fake), rel=1e-4)
