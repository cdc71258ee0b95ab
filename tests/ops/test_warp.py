"""warp against its definition and by both routes, and its kernels against it: all derivatives, any matrix."""

import math

import numpy as np
import pytest
import torch
from op_checks import QUICK, assert_at_most_twice_as_wrong, assert_close, derivatives, noise

from gan.augment import AugmentPipe
from torch_utils.ops import cuda_kernels, warp_cuda
from torch_utils.ops import warp as module
from torch_utils.ops.warp import on_both_axes, reflected, sample_ref, warp, warp_ref

LOWPASS = AugmentPipe().Hz_geom


def matrix(xx=1.0, xy=0.0, x=0.0, yx=0.0, yy=1.0, y=0.0):
    return [[xx, xy, x], [yx, yy, y], [0, 0, 1]]


def turned(angle, across=1.0, down=1.0, x=0.0, y=0.0):
    cos, sin = math.cos(angle), math.sin(angle)
    return matrix(across * cos, -across * sin, x, down * sin, down * cos, y)


MATRICES = {
    "identity": matrix(),
    "flips": matrix(xx=-1, yy=-1),
    "a quarter turn": turned(math.pi / 2),
    "another": turned(-math.pi / 2, x=0.5),
    "whole pixels": matrix(x=3, y=-2),
    "parts of pixels": matrix(x=0.37, y=-7.81),
    "turned": turned(0.7, x=1.3),
    "larger": matrix(xx=0.2, yy=0.2),
    "smaller": matrix(xx=5, yy=5, x=0.1),
    "stretched and turned": turned(2.5, 0.3, 2.2, x=-4),
    "far away": turned(-0.3, x=4321.7, y=-1234.5),
    "sheared": matrix(xy=1.7, yx=0.4),
}
BROKEN = {
    "singular": matrix(1, 2, 0.3, 0.5, 1, -0.2),
    "a point": matrix(xx=0, yy=0, x=1.25),
    "nearly singular": matrix(1, 2, 0.3, 0.5, 1.0001, 2),
    "tiny": matrix(xx=1e-20, yy=1e-20),
    "huge": matrix(xx=1e5, yy=3e4, x=17),
    "out of sight": matrix(x=3e8, y=-7e10),
}
LOST = {"lost": matrix(xx=1e7, xy=1e9, yy=-3e15)}  # positions that have lost all digits below pixels


def inverses(*names):
    return torch.tensor([{**MATRICES, **BROKEN, **LOST}[name] for name in names])


def dense_matrix(function, *shape):
    """`[out, in]` of a linear function of one picture of this shape, column by column."""
    basis = torch.eye(math.prod(shape)).reshape(-1, 1, *shape)
    return function(basis).flatten(1).t()


class TestRoutes:
    """PyTorch's operations: matrix products up to a size, FIR passes beyond."""

    @pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 12, 20), (1, 2, 5, 7)], ids=str)
    def test_dense_products_and_fir_passes_agree(self, monkeypatch, shape):
        images = noise(*shape)
        inverse = torch.eye(3, dtype=torch.float64) + 0.2 * noise(shape[0], 3, 3, seed=1)

        def result(limit):
            monkeypatch.setattr(module, "_DENSE_LIMIT", limit)
            x = images.clone().requires_grad_()
            y = warp(x, inverse, LOWPASS.double())
            return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

        for dense, fir in zip(result(10**9), result(0), strict=True):
            torch.testing.assert_close(dense, fir, rtol=1e-10, atol=1e-12)

    def test_the_route_depends_on_the_size(self, monkeypatch):
        seen = []
        monkeypatch.setattr(module, "_DENSE_LIMIT", 8)
        for size in (8, 9):
            on_both_axes(torch.zeros(1, 1, size, 4), lambda rows: seen.append(tuple(rows.shape)) or rows)
        assert seen == [(1, 1, 8, 8), (1, 1, 4, 4), (1, 1, 9, 4), (1, 1, 4, 9)]

    def test_pictures_go_on_by_reflection_however_far(self):
        images = noise(1, 3, 8, 8).float()
        far = torch.tensor([matrix(x=14 * 25, y=-14 * 31)])  # whole periods of 2 * (8 - 1)
        torch.testing.assert_close(warp(images, far, LOWPASS), images, rtol=0, atol=1e-3)

    @pytest.mark.parametrize("index", [-9, -4, -1, 0, 3, 4, 7, 100])
    def test_reflection_turns_at_the_first_and_last_pixel(self, index):
        padded = np.pad(np.arange(4), (120, 120), mode="reflect")
        assert reflected(torch.tensor(index), 4).item() == padded[120 + index]
        assert reflected(torch.tensor(index), 1).item() == 0


class TestKernels:
    """The lookup and its transpose, on the host and on GPUs, against float64 with the same float32 matrices."""

    def on(self, device, images, inverse):
        """The derivatives, by the kernels."""
        inverse, lowpass = inverse.to(device), LOWPASS.to(device)
        assert module._takes(images.to(device), inverse, lowpass)
        return [t.cpu() for t in derivatives(lambda x: warp(x, inverse, lowpass), images.to(device))]

    @staticmethod
    def expected(images, inverse):
        return derivatives(lambda x: warp_ref(x, inverse.double(), LOWPASS.double()), images.double())

    @pytest.mark.parametrize("names", [list(MATRICES)[:6], list(MATRICES)[6:]], ids=["plain", "skewed"])
    @pytest.mark.parametrize(("channels", "size"), [(1, (4, 4)), (3, (5, 7)), (4, (16, 9)), (2, (8, 33))], ids=str)
    def test_output_and_derivatives_equal_those_of_ref(self, kernel_device, names, channels, size):
        images, inverse = noise(len(names), channels, *size).float(), inverses(*names)
        actual, expected = self.on(kernel_device, images, inverse), self.expected(images, inverse)
        assert_close([a.double() for a in actual], expected, tolerance=3e-5)

    def test_pictures_that_are_not_square(self, kernel_device):
        images, inverse = noise(2, 3, 64, 96).float(), inverses("turned", "stretched and turned")
        actual, expected = self.on(kernel_device, images, inverse), self.expected(images, inverse)
        assert_close([a.double() for a in actual], expected, tolerance=5e-5)

    def test_positions_are_as_exact_as_float_allows(self, kernel_device):
        """Many periods away nothing is lost but what the shift itself has lost."""
        images = noise(1, 3, 16, 12).float().to(kernel_device)
        near = inverses("turned").to(kernel_device)
        near[:, :2, 2] = torch.tensor([0.25, -1.5])
        far = near.clone()
        far[:, :2, 2] += torch.tensor([22 * 3000.0, -30 * 40000.0], device=near.device)  # 2 * (12 - 1), 2 * (16 - 1)
        lowpass = LOWPASS.to(kernel_device)
        assert_close(
            *(derivatives(lambda x, m=m: warp_cuda.sample(x, m, lowpass), images) for m in (far, near)), tolerance=1e-6
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_is_at_most_twice_as_wrong_as_ref(self, kernel_device, dtype):
        """ref with float32 positions, as they are computed here, and values of the dtype."""
        inverse, lowpass = inverses("turned", "smaller").to(kernel_device), LOWPASS.to(kernel_device)

        def ours(x):
            if x.dtype == torch.float64:
                return plain(x)
            return warp_cuda.sample(x, inverse, lowpass)

        def plain(x):
            wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
            return sample_ref(wide, inverse.to(wide.dtype), lowpass.to(wide.dtype)).to(x.dtype)

        assert_at_most_twice_as_wrong(ours, plain, [noise(2, 3, 19, 21).to(kernel_device)], dtype)

    @pytest.mark.parametrize("size", [(3, 4), (7, 2)], ids=str)
    @pytest.mark.parametrize("name", [*MATRICES, *BROKEN, *LOST])
    def test_both_kernels_are_the_same_matrix(self, kernel_device, name, size):
        """Column by column: what a sample sees of a pixel is what the pixel gives to it, whatever the matrix."""
        inverse, lowpass = inverses(name).to(kernel_device), LOWPASS.to(kernel_device)

        def with_kernel(operator):
            def run(basis):
                return operator(basis.to(kernel_device), inverse.expand(len(basis), -1, -1), lowpass).cpu()

            return run

        samples = [2 * (side + 6) for side in size]
        forward = dense_matrix(with_kernel(warp_cuda.sample), *size)
        some = torch.randperm(forward.shape[0], generator=torch.Generator().manual_seed(0))[:40]
        rows = torch.zeros(len(some), forward.shape[0])
        rows[range(len(some)), some] = 1
        transposed = with_kernel(warp_cuda.sample_transposed)(rows.reshape(-1, 1, *samples)).flatten(1)
        torch.testing.assert_close(transposed, forward[some], rtol=0, atol=1e-6)
        assert forward.abs().max() > 0.1

    @pytest.mark.parametrize("seed", range(3))
    def test_the_gradient_is_the_adjoint_for_random_matrices(self, kernel_device, seed):
        inverse = (noise(16, 3, 3, seed=seed) * torch.tensor([1.0, 1, 20])).float().to(kernel_device)
        lowpass = LOWPASS.to(kernel_device)
        x, y = (noise(*shape, seed=9).float().to(kernel_device) for shape in ((16, 1, 11, 8), (16, 1, 34, 28)))
        forward = (warp_cuda.sample(x, inverse, lowpass).double() * y).sum(dim=[1, 2, 3])
        backward = (warp_cuda.sample_transposed(y, inverse, lowpass).double() * x).sum(dim=[1, 2, 3])
        torch.testing.assert_close(forward, backward, rtol=0, atol=2e-6 * y[0].numel())

    def test_positions_far_apart_keep_their_place(self, kernel_device):
        """Those here are whole numbers of half pixels, up to the 24 bits that float has."""
        images, inverse = noise(1, 2, 4, 5).float(), torch.tensor([matrix(xx=2**20 + 1, yy=-(2**20) - 3)])
        samples = warp_cuda.sample(images.to(kernel_device), inverse.to(kernel_device), LOWPASS.to(kernel_device))
        assert_close(samples.cpu().double(), sample_ref(images.double(), inverse.double(), LOWPASS.double()), 1e-6)

    def test_samples_are_bounded_by_the_picture_however_far(self, kernel_device):
        """Both kernels look positions up in the same way, so comparing them does not show what is lost."""
        sizes = 2 ** torch.linspace(0, 120, 241)
        inverse = torch.zeros(241, 3, 3)
        inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1], inverse[:, 1, 0] = 1.1 * sizes, sizes, -1.3 * sizes, 0.7
        inverse, lowpass = inverse.to(kernel_device), LOWPASS.to(kernel_device)
        samples = warp_cuda.sample(noise(241, 1, 4, 3).sign().float().to(kernel_device), inverse, lowpass)
        assert samples.abs().max() <= (2 * LOWPASS.abs().sum()) ** 2

    @pytest.mark.parametrize("name", BROKEN)
    def test_matrices_without_an_inverse_are_slow_but_not_wrong(self, kernel_device, name):
        images, inverse = noise(1, 1, 6, 5).float(), inverses(name)
        actual, expected = self.on(kernel_device, images, inverse), self.expected(images, inverse)
        assert_close([a.double() for a in actual], expected, tolerance=3e-5)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
    @pytest.mark.parametrize("place", [(0, 0), (0, 2), (1, 1)], ids=str)
    def test_matrices_that_are_not_finite_end_and_touch_nothing_else(self, kernel_device, value, place):
        inverse = inverses("identity", "turned", "identity")
        inverse[1][place] = value
        images, samples = noise(3, 1, 5, 4).float(), noise(3, 1, 22, 20).float()
        inverse, lowpass = inverse.to(kernel_device), LOWPASS.to(kernel_device)
        y = warp_cuda.sample(images.to(kernel_device), inverse, lowpass).cpu()
        dx = warp_cuda.sample_transposed(samples.to(kernel_device), inverse, lowpass).cpu()
        for result in (y, dx):
            assert result[[0, 2]].isfinite().all()
            assert math.isfinite(value) or result[1].isnan().all()

    def test_gradients_that_are_one_number_are_read_as_such(self, kernel_device):
        images = noise(2, 4, 6, 5).float().to(kernel_device).requires_grad_()
        inverse, lowpass = inverses("turned", "singular").to(kernel_device), LOWPASS.to(kernel_device)
        samples = warp_cuda.sample(images, inverse, lowpass)
        (dx,) = torch.autograd.grad(samples.sum(), images, retain_graph=True)  # in memory a single one
        (expected,) = torch.autograd.grad((samples * 1).sum(), images)
        assert torch.equal(dx, expected)

    @pytest.mark.parametrize("tensor", ["images", "inverse", "lowpass"])
    def test_the_operators_take_what_their_kernels_read(self, kernel_device, tensor):
        """Called past `warp`, as anybody may, they refuse what would be misread."""
        args = {
            "images": noise(2, 3, 6, 5).float(),
            "inverse": inverses("turned", "flips"),
            "lowpass": LOWPASS,
        }
        wrong = {"images": args["images"][:, :, :1], "inverse": args["inverse"][:1], "lowpass": LOWPASS[:8]}
        for value in (wrong[tensor], args[tensor].double()):
            given = {**args, tensor: value}
            with pytest.raises((AssertionError, KeyError)):
                torch.ops.gan.warp_sample(*(t.to(kernel_device) for t in given.values()))

    @pytest.mark.parametrize("layout", ["channels_last", "strided"])
    def test_any_layout_is_read_and_channels_last_kept(self, kernel_device, layout):
        x = noise(4, 6, 8, 9).float().to(kernel_device)
        x = x[::2, 1::2, ::2, ::3] if layout == "strided" else x[:2, :3].contiguous(memory_format=torch.channels_last)
        inverse, lowpass = inverses("turned", "flips").to(kernel_device), LOWPASS.to(kernel_device)
        expected = derivatives(lambda x: warp_cuda.sample(x, inverse, lowpass), x.contiguous())
        found = derivatives(lambda x: warp_cuda.sample(x, inverse, lowpass), x)
        assert_close(found, expected, tolerance=0)
        y = warp_cuda.sample(x, inverse, lowpass)
        assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")

    def test_the_operators_are_registered_as_they_should(self, kernel_device):
        inverse, lowpass = inverses("turned", "flips").to(kernel_device), LOWPASS.to(kernel_device)
        images = noise(2, 3, 2, 3).float().to(kernel_device).requires_grad_()
        torch.library.opcheck(warp_cuda.sample.op, (images, inverse, lowpass))
        samples = noise(2, 3, 16, 18).float().to(kernel_device).contiguous(memory_format=torch.channels_last)
        args = samples.requires_grad_(), inverse, lowpass
        torch.library.opcheck(warp_cuda.sample_transposed.op, args, test_utils=QUICK)

    def test_twice_the_same_is_the_same(self, kernel_device):
        images, inverse = noise(2, 3, 9, 12).float(), inverses("turned", "singular")
        for once, again in zip(*(self.on(kernel_device, images, inverse) for _ in range(2)), strict=True):
            assert torch.equal(once, again)

    def test_the_check_passes_and_notices_what_is_wrong(self, kernel_device, monkeypatch):
        assert cuda_kernels.kernels["warp"].check(kernel_device) is None
        transposed = warp_cuda.sample_transposed
        monkeypatch.setattr(warp_cuda, "sample_transposed", lambda *args: transposed(*args) * 1.01)
        assert cuda_kernels.kernels["warp"].check(kernel_device).startswith("in f32: dimages is off by ")


class TestDispatch:
    def test_the_kernels_run_in_both_directions_of_the_whole_pipe(self, on_host):
        pipe = AugmentPipe(xflip=1, rotate=1, scale=1)
        x = noise(2, 3, 8, 8).float().requires_grad_()
        torch.manual_seed(0)
        y = pipe(x)
        assert on_host["warp"].launched == ["warp_sample_f32"]
        y.square().sum().backward()
        assert on_host["warp"].launched == ["warp_sample_f32", "warp_sample_transposed_f32"]

    @pytest.mark.parametrize(
        ("images", "taps"),
        [(noise(1, 3, 6, 6), 12), (noise(1, 3, 6, 6).float(), 8), (noise(0, 3, 6, 6).float(), 12)],
        ids=["float64", "another filter", "no images"],
    )
    def test_whatever_the_kernels_do_not_do_is_left_to_pytorch(self, on_host, images, taps):
        lowpass = torch.ones(taps, dtype=images.dtype) / taps
        inverse = torch.eye(3, dtype=images.dtype).expand(len(images), 3, 3)
        assert torch.equal(warp(images, inverse, lowpass), warp_ref(images, inverse, lowpass))
        assert on_host["warp"].launched == []

    def test_without_prepare_there_is_no_kernel(self):
        images, inverse = noise(2, 3, 6, 6).float(), inverses("turned", "flips")
        assert torch.equal(warp(images, inverse, LOWPASS), warp_ref(images, inverse, LOWPASS))
