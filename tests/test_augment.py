"""The augmentation pipeline: golden pictures, each transform's definition and frequency, and its derivatives."""

import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gan import augment
from gan.augment import AugmentPipe
from gan.presets import AUGMENT_PIPES
from torch_utils.ops.warp import reflected

with np.load(Path(__file__).parent / "golden" / "augment.npz") as file:
    GOLDEN = {name: torch.as_tensor(file[name]) for name in file.files if name != "meta"}
    CASES = json.loads(str(file["meta"]))
EVERYTHING = dict.fromkeys(AUGMENT_PIPES["bgcfnc"], 1)
GEOMETRY = dict.fromkeys(AUGMENT_PIPES["bg"], 1)


def pipe(p=1.0, **multipliers):
    made = AugmentPipe(**multipliers)
    made.p.fill_(p)
    return made


def pictures(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def erfinv(x):
    return torch.erfinv(torch.tensor(x)).item()


NORMAL, COS, SIN = erfinv(0.4), math.cos(0.2 * math.pi), math.sin(0.2 * math.pi)  # at the percentile 0.7


class TestGolden:
    @pytest.mark.parametrize("i", range(len(CASES)))
    def test_pictures_equal_the_golden_ones(self, i):
        case = CASES[i]
        y = AugmentPipe(**case["kwargs"])(GOLDEN[case["input"]], debug_percentile=case["percentile"])
        expected = GOLDEN[f"{i}.y"]
        assert y.shape == expected.shape
        assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_the_cuda_kernels_make_the_golden_pictures_too(self, kernel_device):
        for i, case in enumerate(CASES):
            augmented = AugmentPipe(**case["kwargs"]).to(kernel_device)
            y = augmented(GOLDEN[case["input"]].to(kernel_device), debug_percentile=case["percentile"]).cpu()
            assert (y - GOLDEN[f"{i}.y"]).abs().max() <= 1e-5 * GOLDEN[f"{i}.y"].abs().max(), case

    @pytest.mark.parametrize("name", ["Hz_geom", "Hz_fbank"])
    def test_filters_equal_the_golden_ones(self, name):
        torch.testing.assert_close(AugmentPipe().state_dict()[name], GOLDEN[name], rtol=1e-6, atol=1e-7)


class TestIdentity:
    @pytest.mark.parametrize(
        "shape", [(3, 3, 32, 32), (2, 3, 4, 4), (2, 1, 8, 8), (1, 3, 16, 64), (2, 4, 32, 48)], ids=str
    )
    def test_probability_zero_changes_nothing(self, shape):
        images = pictures(*shape).clamp(-1, 1)
        torch.testing.assert_close(pipe(p=0, **EVERYTHING)(images), images, rtol=0, atol=1e-5)

    def test_without_multipliers_nothing_happens_at_all(self):
        images = pictures(2, 3, 8, 8)
        assert pipe()(images) is images

    def test_every_transform_is_off_unless_asked_for(self):
        defaults = {name: p.default for name, p in inspect.signature(AugmentPipe).parameters.items()}
        assert {defaults[name] for name in EVERYTHING} == {0}

    @pytest.mark.parametrize("name", AUGMENT_PIPES)
    def test_every_named_pipe_is_made_of_constructor_arguments(self, name):
        multipliers = dict.fromkeys(AUGMENT_PIPES[name], 1)
        assert multipliers.keys() <= inspect.signature(AugmentPipe).parameters.keys()
        images = pictures(2, 3, 8, 8)
        assert not torch.allclose(AugmentPipe(**multipliers)(images, debug_percentile=0.7), images)


class TestDefinitions:
    """What each transform does at a given percentile of its distribution."""

    images = pictures(2, 3, 16, 16)

    def at(self, percentile, images=None, **kwargs):
        return AugmentPipe(**kwargs)(self.images if images is None else images, debug_percentile=percentile)

    def assert_equal(self, actual, expected):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)

    def assert_similar(self, actual, expected):
        """The lookup is bilinear and sym6 leans a little: only smooth pictures come out as calculated."""
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.02)

    @staticmethod
    def smooth(position=lambda x, y: (x, y)):
        """A picture without symmetries as a function of the position, in pixels from its centre."""
        y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
        x, y = position(x * 1.0, y * 1.0)
        image = torch.sin(2 * math.pi * x / 64 + 0.4) + 0.5 * torch.cos(2 * math.pi * (0.6 * y - 0.3 * x) / 64)
        return image[None, None]

    def test_xflip_mirrors(self):
        self.assert_equal(self.at(0.4, xflip=1), self.images)
        self.assert_similar(self.at(0.6, self.smooth(), xflip=1), self.smooth().flip(3))

    @pytest.mark.parametrize("quarters", range(4))
    def test_rotate90_turns_by_quarters(self, quarters):
        turned = self.at((quarters + 0.5) / 4, self.smooth(), rotate90=1)
        self.assert_similar(turned, torch.rot90(self.smooth(), -quarters, dims=[3, 2]))

    def test_flips_come_before_turns(self):
        self.assert_similar(
            self.at(0.9, self.smooth(), xflip=1, rotate90=1), torch.rot90(self.smooth().flip(3), -3, dims=[3, 2])
        )

    @pytest.mark.parametrize(("percentile", "pixels"), [(0.1, -6), (0.5, 0), (0.7, 3), (0.99, 8)])
    def test_xint_shifts_by_whole_pixels_and_reflects(self, percentile, pixels):
        shifted = self.at(percentile, xint=1, xint_max=0.5)
        index = reflected(torch.arange(16) - pixels, 16)
        self.assert_equal(shifted, self.images[:, :, index][:, :, :, index])

    def test_xint_is_a_share_of_width_and_of_height(self):
        images = pictures(1, 1, 16, 64)
        rows, columns = reflected(torch.arange(16) - 2, 16), reflected(torch.arange(64) - 8, 64)
        self.assert_equal(self.at(1, images, xint=1), images[:, :, rows][:, :, :, columns])

    @pytest.mark.parametrize(
        ("kwargs", "inverse"),
        [
            ({"scale": 1, "scale_std": 0.8}, lambda x, y: (x / 2 ** (0.8 * NORMAL), y / 2 ** (0.8 * NORMAL))),
            ({"aniso": 1, "aniso_std": 0.8}, lambda x, y: (x / 2 ** (0.8 * NORMAL), y * 2 ** (0.8 * NORMAL))),
            ({"xfrac": 1, "xfrac_std": 0.2}, lambda x, y: (x - 0.2 * NORMAL * 64, y - 0.2 * NORMAL * 64)),
            # 0.7 of the way from -pi/2 to pi/2; turning the picture turns the lookup the other way
            ({"rotate": 1, "rotate_max": 0.5}, lambda x, y: (x * COS - y * SIN, x * SIN + y * COS)),
        ],
        ids=["scale", "aniso", "xfrac", "rotate"],
    )
    def test_continuous_geometry_looks_up_the_inverse_position(self, kwargs, inverse):
        inner = (slice(None), slice(None), slice(24, 40), slice(24, 40))  # never looks over the border
        actual = self.at(0.7, self.smooth(), **kwargs)[inner]
        self.assert_similar(actual, self.smooth(inverse)[inner])
        assert (actual - self.smooth()[inner]).abs().max() > 0.1

    def test_brightness_adds(self):
        self.assert_equal(self.at(0.8, brightness=1), self.images + 0.2 * erfinv(0.6))

    def test_contrast_multiplies(self):
        self.assert_equal(self.at(0.8, contrast=1), self.images * 2 ** (0.5 * erfinv(0.6)))

    def test_lumaflip_reflects_the_luma(self):
        self.assert_equal(self.at(0.4, lumaflip=1), self.images)
        self.assert_equal(self.at(0.6, lumaflip=1), self.images - 2 * self.images.mean(dim=1, keepdim=True))

    def test_hue_turns_about_the_luma_axis(self):
        """By a third of a turn, it moves red to green, green to blue, blue to red."""
        self.assert_equal(self.at(5 / 6, hue=1), self.images.roll(1, dims=1))
        self.assert_equal(self.at(1 / 6, hue=1), self.images.roll(-1, dims=1))

    def test_saturation_scales_the_distance_from_grey(self):
        grey = self.images.mean(dim=1, keepdim=True)
        self.assert_equal(self.at(0.7, saturation=1), grey + (self.images - grey) * 2**NORMAL)

    def test_imgfilter_scales_constant_pictures_by_the_gain_of_the_lowest_band(self):
        t = 2**NORMAL
        # Four draws amplify one band each, and keep the power of a picture with 10/13 of it in the lowest band.
        gain = t / math.sqrt((10 * t**2 + 3) / 13) / math.sqrt((12 + t**2) / 13) ** 3
        image = torch.full([1, 3, 32, 32], 0.5)
        # Once per axis, as the filter is separable.
        self.assert_equal(self.at(0.7, image, imgfilter=1), image * gain**2)

    @pytest.mark.parametrize(("bands", "sign"), [([1, 0, 0, 0], -1), ([0, 1, 0, 0], 0), ([0, 0, 0, 1], 1)])
    def test_imgfilter_bands_choose_what_is_amplified(self, bands, sign):
        """A checkerboard is the highest frequency, a constant the lowest."""

        def factor(image):
            torch.manual_seed(0)
            return (pipe(imgfilter=1, imgfilter_bands=bands)(image) / image)[:, 0, 16, 16]

        checkerboard = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2) * 2.0 - 1
        octaves = factor(checkerboard.expand(500, 1, 32, 32)).log2() - factor(torch.ones(500, 1, 32, 32)).log2()
        drawn = octaves / 2  # once per axis
        if sign == 0:
            torch.testing.assert_close(drawn, torch.zeros(500), rtol=0, atol=1e-4)
        else:
            assert abs(drawn.mean()) < 4 / math.sqrt(500)
            assert drawn.std().item() == pytest.approx(1, rel=0.13)

    def test_noise_has_the_standard_deviation_that_was_drawn(self):
        noise = self.at(0.9, torch.zeros(1, 3, 128, 128), noise=1)
        assert noise.std().item() == pytest.approx(0.1 * erfinv(0.9), rel=0.02)
        assert abs(noise.mean().item()) < 0.005

    def test_cutout_sets_a_rectangle_to_zero(self):
        ones = torch.ones(1, 3, 16, 32)
        y = self.at(0.25, ones, cutout=1)
        expected = ones.clone()
        expected[:, :, :8, :16] = 0  # half of width and height about a quarter of both
        assert torch.equal(y, expected)
        y = self.at(0.5, ones, cutout=1, cutout_size=0.25)
        assert (y[:, :, 6:10, 12:20] == 0).all()
        assert y.sum() == 3 * (16 * 32 - 4 * 8)

    def test_strengths_can_be_set(self):
        self.assert_equal(self.at(0.8, brightness=1, brightness_std=2), self.images + 2 * erfinv(0.6))
        assert AugmentPipe(brightness_std=2)._init_kwargs["brightness_std"] == 2


def looked_up(image, inverse, lowpass):
    """`warp` of one channel `[H, W]` by its definition: no periods, but a picture that was padded by far enough."""
    pad = 100
    plane = np.pad(image, pad, mode="reflect")
    for axis in (0, 1):
        stuffed = np.insert(plane, np.arange(plane.shape[axis]) + 1, 0, axis=axis)
        plane = np.apply_along_axis(lambda line: np.convolve(line, 2 * lowpass), axis, stuffed)  # sample 5 is the first
    first = 2 * pad + 5
    (height, width), taps = image.shape, len(lowpass)
    rows, columns = np.mgrid[-5 : 2 * height + taps, -5 : 2 * width + taps]  # in half pixels
    x, y = (columns + 1) / 2 - width / 2, (rows + 1) / 2 - height / 2  # in pixels from the centre
    u, v = (row[0] * x + row[1] * y + row[2] for row in inverse)
    u, v = 2 * (u + width / 2) - 1 + first, 2 * (v + height / 2) - 1 + first
    i, j = np.floor(v).astype(int), np.floor(u).astype(int)
    down, right = v - i, u - j
    above = plane[i, j] * (1 - right) + plane[i, j + 1] * right
    below = plane[i + 1, j] * (1 - right) + plane[i + 1, j + 1] * right
    sampled = above * (1 - down) + below * down
    for axis in (0, 1):
        filtered = np.apply_along_axis(lambda line: np.correlate(line, lowpass), axis, sampled)
        sampled = filtered.take(np.arange(image.shape[axis]) * 2, axis=axis)
    return sampled


class TestNonSquarePictures:
    """Geometry is that of pixels: nothing is stretched, and shares are those of each side."""

    images = pictures(2, 4, 64, 96)
    aniso, share = 2 ** (0.2 * NORMAL), 0.125 * NORMAL

    @pytest.mark.parametrize(
        ("percentile", "kwargs", "inverse"),
        [
            (0.6, {"xflip": 1}, [[-1, 0, 0], [0, 1, 0]]),
            (0.3, {"rotate90": 1}, [[0, -1, 0], [1, 0, 0]]),
            (0.6, {"rotate90": 1}, [[-1, 0, 0], [0, -1, 0]]),
            (0.9, {"rotate90": 1}, [[0, 1, 0], [-1, 0, 0]]),
            (0.9, {"rotate90": 1, "xflip": 1}, [[0, -1, 0], [-1, 0, 0]]),
            (0.99, {"xint": 1}, [[1, 0, -12], [0, 1, -8]]),  # 0.1225 of 96 and of 64, rounded
            (0.7, {"rotate": 1, "rotate_max": 0.5}, [[COS, -SIN, 0], [SIN, COS, 0]]),
            (0.7, {"scale": 1}, [[1 / aniso, 0, 0], [0, 1 / aniso, 0]]),
            (0.7, {"aniso": 1}, [[1 / aniso, 0, 0], [0, aniso, 0]]),
            (0.7, {"xfrac": 1}, [[1, 0, -96 * share], [0, 1, -64 * share]]),
        ],
        ids=str,
    )
    def test_geometry_equals_a_lookup_pixel_by_pixel(self, percentile, kwargs, inverse):
        y = AugmentPipe(**kwargs)(self.images, debug_percentile=percentile)
        lowpass = AugmentPipe().Hz_geom.double().numpy()
        for channel in (0, 3):
            expected = torch.from_numpy(looked_up(self.images[1, channel].double().numpy(), inverse, lowpass))
            torch.testing.assert_close(y[1, channel].double(), expected, rtol=0, atol=2e-4)

    def test_half_a_turn_is_both_flips(self):
        y, x = torch.meshgrid(torch.arange(64), torch.arange(96), indexing="ij")
        smooth = torch.sin(2 * math.pi * x / 96 + 0.4) + 0.5 * torch.cos(2 * math.pi * (0.6 * y - 0.3 * x) / 64)
        smooth = smooth[None, None].expand(1, 4, -1, -1)
        turned = AugmentPipe(rotate90=1)(smooth, debug_percentile=0.6)
        torch.testing.assert_close(turned, smooth.flip([2, 3]), rtol=0, atol=0.02)

    def test_a_quarter_of_a_turn_neither_stretches_nor_cuts_off_the_middle(self):
        disc = torch.zeros(1, 1, 64, 96)
        y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(96) - 47.5, indexing="ij")
        disc[0, 0] = (-((x - 10) ** 2 + y**2) / 50).exp()  # right of the middle
        turned = AugmentPipe(rotate90=1)(disc, debug_percentile=0.3)
        expected = (-(x**2 + (y + 10) ** 2) / 50).exp()  # looked up at (-y, x): above the middle
        torch.testing.assert_close(turned[0, 0], expected, rtol=0, atol=0.03)

    @pytest.mark.parametrize(("percentile", "columns", "rows"), [(0.99, 12, 8), (0.4, -2, -2), (0.8, 7, 5)])
    def test_whole_pixels_are_shifted_exactly(self, percentile, columns, rows):
        y = AugmentPipe(xint=1)(self.images, debug_percentile=percentile)
        rows, columns = (reflected(torch.arange(size) - shift, size) for size, shift in ((64, rows), (96, columns)))
        torch.testing.assert_close(y, self.images[:, :, rows][:, :, :, columns], rtol=0, atol=5e-5)


class TestProbability:
    """Within four standard deviations of what is expected, with fixed seeds."""

    N = 1000

    def share_changed(self, p, channels=3, **kwargs):
        torch.manual_seed(0)
        images = pictures(self.N, channels, 8, 8)
        changed = (pipe(p=p, **kwargs)(images) - images).abs().flatten(1).amax(dim=1) > 1e-4
        return changed.float().mean().item()

    def assert_share(self, share, expected):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / self.N)

    @pytest.mark.parametrize(
        ("kwargs", "share"),
        [
            ({"xflip": 1}, 1 / 2),  # half of the draws are the neutral one
            ({"rotate90": 1}, 3 / 4),
            ({"xint": 1, "xint_max": 50}, 1),
            ({"scale": 1}, 1),
            ({"rotate": 1}, 1),
            ({"aniso": 1}, 1),
            ({"xfrac": 1}, 1),
            ({"brightness": 1}, 1),
            ({"contrast": 1}, 1),
            ({"lumaflip": 1}, 1 / 2),
            ({"hue": 1}, 1),
            ({"saturation": 1}, 1),
            ({"imgfilter": 1, "imgfilter_bands": [0, 1, 0, 0]}, 1),
            ({"noise": 1}, 1),
            ({"cutout": 1}, 1),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
    )
    def test_each_transform_happens_to_half_of_the_images_at_one_half(self, kwargs, share):
        self.assert_share(self.share_changed(0.5, **kwargs), share / 2)
        halved = {name: value / 2 if value == 1 else value for name, value in kwargs.items()}
        self.assert_share(self.share_changed(0.5, **halved), share / 4)
        assert self.share_changed(1, **kwargs) == pytest.approx(share, abs=0.07)

    def test_transforms_are_drawn_independently(self):
        self.assert_share(self.share_changed(0.5, brightness=1, cutout=1), 3 / 4)
        self.assert_share(self.share_changed(0.5, imgfilter=1), 15 / 16)  # one draw for each of four bands

    def test_the_two_rotations_together_happen_as_often_as_asked(self):
        self.assert_share(self.share_changed(0.9, rotate=1), 0.9)
        assert self.share_changed(1, rotate=1) == 1

    def test_parameters_follow_their_distributions(self):
        torch.manual_seed(0)
        added = pipe(brightness=1)(torch.zeros(4000, 1, 4, 4))[:, 0, 0, 0]
        assert abs(added.mean().item()) < 4 * 0.2 / math.sqrt(4000)
        assert added.std().item() == pytest.approx(0.2, rel=0.06)
        factor = pipe(contrast=1)(torch.ones(4000, 1, 4, 4))[:, 0, 0, 0].log2()
        assert abs(factor.mean().item()) < 4 * 0.5 / math.sqrt(4000)
        assert factor.std().item() == pytest.approx(0.5, rel=0.06)
        holes = pipe(cutout=1)(torch.ones(4000, 1, 4, 64))[:, 0].amin(dim=1)  # [N, 64]
        centre = 31.5 + ((holes == 0) * (torch.arange(64) - 31.5)).sum(dim=1) / (holes == 0).sum(dim=1)
        assert centre.mean().item() == pytest.approx(31.5, abs=1)

    @pytest.mark.parametrize("kwargs", [{"xint": 1}, {"xfrac": 1}, {"cutout": 1, "cutout_size": 0.1}], ids=str)
    def test_positions_are_drawn_for_each_axis(self, kwargs):
        torch.manual_seed(0)
        image = torch.zeros(200, 1, 32, 32) if "cutout" not in kwargs else torch.ones(200, 1, 32, 32)
        image[:, :, 16, 16] += 1
        changed = (pipe(**kwargs)(image) - image)[:, 0].abs()
        changed[:, 16, 16] = 0
        rows, columns = changed.amax(dim=2).argmax(dim=1), changed.amax(dim=1).argmax(dim=1)
        assert len(set(rows.tolist())) >= 8
        assert len(set(columns.tolist())) >= 8
        assert (rows != columns).float().mean() > 0.7

    def test_noise_is_new_for_every_image_and_channel(self):
        torch.manual_seed(0)
        noise = pipe(noise=1)(torch.zeros(3, 3, 64, 64)).flatten(0, 1).flatten(1)
        others = torch.corrcoef(noise) - torch.eye(9)
        assert others.abs().max() < 5 / 64


class TestRandomness:
    def test_the_same_seed_gives_the_same_pictures(self):
        images, augmented = pictures(4, 3, 16, 16), pipe(p=0.7, **EVERYTHING)
        torch.manual_seed(3)
        first = augmented(images)
        assert not torch.equal(augmented(images), first)
        torch.manual_seed(3)
        assert torch.equal(augmented(images), first)

    def test_the_percentile_needs_no_luck(self):
        images, multipliers = pictures(4, 3, 16, 16), {**EVERYTHING, "noise": 0}
        assert torch.equal(pipe(**multipliers)(images, 0.3), pipe(p=0.1, **multipliers)(images, 0.3))

    def test_images_of_a_batch_are_transformed_differently(self):
        torch.manual_seed(0)
        image = pictures(1, 3, 16, 16).expand(8, -1, -1, -1)
        out = pipe(**EVERYTHING)(image)
        assert len({tuple(row) for row in out.flatten(1).tolist()}) == 8


class TestChannels:
    @pytest.mark.parametrize("name", AUGMENT_PIPES)
    def test_grey_pictures_go_through_every_pipe(self, name):
        images = pictures(2, 1, 16, 16)
        y = pipe(**dict.fromkeys(AUGMENT_PIPES[name], 1))(images)
        assert y.shape == images.shape
        assert torch.isfinite(y).all()

    def test_hue_and_saturation_leave_grey_pictures_alone(self):
        images = pictures(2, 1, 8, 8)
        torch.testing.assert_close(pipe(hue=1, saturation=1)(images), images)

    def test_brightness_and_contrast_of_grey_pictures_are_those_of_rgb(self):
        grey, kwargs = pictures(2, 1, 8, 8), {"brightness": 1, "contrast": 1, "lumaflip": 1}
        rgb = AugmentPipe(**kwargs)(grey.expand(-1, 3, -1, -1), debug_percentile=0.8)
        torch.testing.assert_close(AugmentPipe(**kwargs)(grey, debug_percentile=0.8), rgb[:, :1])

    @pytest.mark.parametrize("name", AUGMENT_PIPES)
    def test_pictures_with_alpha_go_through_every_pipe(self, name):
        images = pictures(2, 4, 8, 12)
        y = pipe(**dict.fromkeys(AUGMENT_PIPES[name], 1))(images)
        assert y.shape == images.shape
        assert torch.isfinite(y).all()
        assert not torch.equal(y[:, :3], images[:, :3])

    def test_colours_change_those_of_rgb_and_no_alpha(self):
        images, kwargs = pictures(2, 4, 8, 12), dict.fromkeys(AUGMENT_PIPES["color"], 1)
        y = AugmentPipe(**kwargs)(images, debug_percentile=0.7)
        assert torch.equal(y[:, 3], images[:, 3])
        torch.testing.assert_close(y[:, :3], AugmentPipe(**kwargs)(images[:, :3], debug_percentile=0.7))

    @pytest.mark.parametrize("names", [AUGMENT_PIPES["bg"], ("imgfilter",), ("cutout",)], ids=lambda names: names[-1])
    def test_all_else_changes_alpha_as_it_does_colours(self, names):
        images, augmented = pictures(2, 4, 8, 12), AugmentPipe(**dict.fromkeys(names, 1))
        y = augmented(images, debug_percentile=0.7)
        for channel in range(4):
            alone = augmented(images[:, channel : channel + 1], debug_percentile=0.7)
            torch.testing.assert_close(y[:, channel : channel + 1], alone, rtol=0, atol=1e-5)

    def test_other_numbers_of_channels_have_no_colours(self):
        with pytest.raises(ValueError, match="colour transforms take images of 1, 3 or 4 channels, not 2"):
            pipe(brightness=1)(torch.zeros(1, 2, 8, 8))
        assert pipe(**GEOMETRY)(torch.zeros(1, 2, 8, 8)).shape == (1, 2, 8, 8)


class TestFilter:
    def test_each_image_is_filtered_by_its_own_taps_with_reflected_borders(self):
        images, filters = pictures(2, 3, 6, 9, dtype=torch.float64), pictures(2, 7, seed=1, dtype=torch.float64)
        filters = filters + filters.flip(1)
        expected = np.zeros([2, 3, 6, 9])
        for n in range(2):
            f2d = np.outer(filters[n], filters[n])
            for channel in range(3):
                padded = np.pad(images[n, channel].numpy(), 3, mode="reflect")
                for i, j in np.ndindex(6, 9):
                    expected[n, channel, i, j] = (padded[i : i + 7, j : j + 7] * f2d).sum()
        torch.testing.assert_close(augment.filter_reflected(images, filters), torch.from_numpy(expected))

    @pytest.mark.parametrize("size", [1, 2, 3, 16, 32, 33])
    def test_the_taps_may_see_a_pixel_many_times(self, size):
        taps = pictures(2, 43)
        matrix = augment._filter_matrix(taps, size)
        assert matrix.shape == (2, size, size)
        expected = torch.zeros_like(matrix)
        seen = np.pad(np.arange(size), 21, mode="reflect")
        for i in range(size):
            for t in range(43):
                expected[:, i, seen[i + t]] += taps[:, t]
        torch.testing.assert_close(matrix, expected, rtol=1e-5, atol=1e-5)
        assert size < 32 or torch.equal(matrix, expected)  # no pixel more than twice

    def test_the_bank_adds_up_to_the_identity(self):
        bank = augment.wavelet_bank()
        identity = np.zeros(bank.shape[1])
        identity[bank.shape[1] // 2] = 1
        np.testing.assert_allclose(bank.sum(axis=0), identity, atol=1e-12)
        np.testing.assert_allclose(bank, bank[:, ::-1], atol=1e-12)


class TestDerivatives:
    """R1 differentiates the pipeline twice."""

    x = pictures(2, 3, 5, 4, dtype=torch.float64)

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: augment.warp(x, AFFINE, AugmentPipe().Hz_geom.double()),
            lambda x: augment.apply_colour(x, pictures(2, 4, 4, seed=2, dtype=torch.float64)),
            lambda x: augment.apply_colour(
                torch.cat([x, x[:, :1].square()], dim=1), pictures(2, 4, 4, seed=2, dtype=torch.float64)
            ),
            lambda x: augment.filter_reflected(x, pictures(2, 9, seed=3, dtype=torch.float64)),
        ],
        ids=["warp", "apply_colour", "apply_colour with alpha", "filter_reflected"],
    )
    def test_first_and_second_derivatives_equal_finite_differences(self, function):
        x = self.x[:, :, :, :3].clone().requires_grad_()
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)

    @pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 4, 8, 12)], ids=str)
    def test_the_second_derivative_of_the_whole_pipe_is_there_and_right(self, shape):
        """For a pipeline that is affine in x, f(y)'' = A' f''(y) A: here twice the Gram matrix, applied to v."""
        torch.manual_seed(0)
        augmented, percentile = AugmentPipe(**{**EVERYTHING, "noise": 0}), 0.7
        x, v = pictures(*shape).requires_grad_(), pictures(*shape, seed=1)
        (first,) = torch.autograd.grad(augmented(x, percentile).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * v).sum(), x)
        linear = augmented(x + v, percentile) - augmented(x, percentile)
        (gram,) = torch.autograd.grad(augmented(x, percentile), x, 2 * linear.detach())
        torch.testing.assert_close(second, gram, rtol=1e-4, atol=1e-4)
        assert second.abs().max() > 0.1


AFFINE = torch.tensor(
    [[[0.9, 0.3, 0.7], [-0.2, 1.1, -1.3], [0, 0, 1]], [[1, 0, 2.5], [0, -1, 0.25], [0, 0, 1]]]
).double()


class NoReading(TorchDispatchMode):
    """Fails on operations whose result is needed on the host, or whose shape depends on values."""

    forbidden = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(self.forbidden), f"{name} reads from the device"
        masks = [t for arg in args[1:2] if isinstance(arg, (list, tuple)) for t in arg if isinstance(t, torch.Tensor)]
        assert not (name.startswith("index") and any(t.dtype == torch.bool for t in masks)), (
            "a mask has a shape of its own"
        )
        return func(*args, **(kwargs or {}))


class TestStaticness:
    @staticmethod
    def run(device, shape):
        x = pictures(*shape).to(device).requires_grad_()
        y = pipe(p=0.5, **EVERYTHING).to(device)(x)
        assert y.shape == x.shape
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), x)
        assert ddx.shape == x.shape

    @pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 4, 8, 12)], ids=str)
    def test_nothing_is_read_from_the_device(self, shape):
        with NoReading():
            self.run("cpu", shape)

    @pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 4, 8, 12)], ids=str)
    def test_shapes_are_known_without_any_values(self, shape):
        """Meta tensors have shapes only: whatever asks for a value fails."""
        self.run("meta", shape)

    @pytest.mark.parametrize(
        "read",
        [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool(x.sum() > 0)],
        ids=["item", "nonzero", "mask", "bool"],
    )
    def test_the_guard_notices(self, read):
        with NoReading(), pytest.raises(AssertionError):
            read(torch.ones(3))
        with pytest.raises((NotImplementedError, RuntimeError)):
            read(torch.ones(3, device="meta"))
