"""The CUDA kernels of upfirdn2d, on the host and on GPUs, against `_ref` in every derivative."""

import struct

import pytest
import torch
from op_checks import QUICK, assert_at_most_twice_as_wrong, assert_close, derivatives, noise
from test_upfirdn2d import CASES, LONG, WIDE

from torch_utils.ops import upfirdn2d_cuda
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.upfirdn2d import _check_kernel, _kernel, downsample2d, setup_filter, upfirdn2d, upfirdn2d_ref

SMOOTH = [1, 3, 3, 1]
TWELVE = [0.1, -0.3, 0.2, 0.9, 1.1, -0.4, 0.3, 0.05, 0.7, -0.2, 0.4, 0.6]
HALF = [torch.float16, torch.bfloat16]
CALLS = {
    "filter4": {"f": SMOOTH, "padding": [2, 2, 1, 2], "gain": 4},
    "up4": {"f": SMOOTH, "up": 2, "padding": [2, 1, 2, 1], "gain": 4},
    "down4": {"f": SMOOTH, "down": 2, "padding": [2, 1, 2, 2]},
    "up12": {"f": TWELVE, "up": 2, "padding": [6, 5, 6, 5], "flip_filter": True},
    "down12": {"f": TWELVE, "down": 2, "padding": [6, 6, 6, 8], "gain": 0.7},
}
ENTRIES = [(entry, torch.float32, channels) for entry in CALLS for channels in (3, 5)]
ENTRIES += [(entry, dtype, channels) for entry in ("filter4", "up4", "down4") for dtype in HALF for channels in (8, 24)]


def both(device, f, **kwargs):
    """The op, on a device from and to the CPU, and its reference."""
    taps = None if f is None else setup_filter(f)

    def op(x):
        return upfirdn2d(x.to(device), None if taps is None else taps.to(device), **kwargs).cpu()

    def ref(x):
        return upfirdn2d_ref(x, None if taps is None else taps.to(torch.promote_types(x.dtype, taps.dtype)), **kwargs)

    return op, ref


def assert_right(op, ref, x, dtype):
    """Output, gradient and what a second derivative computes, from and rounded to `dtype`, but for some last digits."""
    x = x.to(dtype)
    found, exact = derivatives(op, x, rounding=dtype), derivatives(ref, x.double(), rounding=dtype)
    assert all(y.dtype == dtype for y in found)
    assert_close([y.double() for y in found], exact, 4 * torch.finfo(dtype).eps)


def launched(on_host):
    return list(dict.fromkeys(entry.removeprefix("upfirdn2d_") for entry in on_host["upfirdn2d"].launched))


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 2), (129, 3), (2, 151)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_any_call_and_its_gradients_equal_those_of_ref(case, size, kernel_device):
    op, ref = both(kernel_device, **CASES[case])
    assert_right(op, ref, noise(2, 3, *size), torch.float32)


@pytest.mark.parametrize("size", [(1, 1), (129, 3), (2, 151), (6, 8)], ids=str)
@pytest.mark.parametrize(("entry", "dtype", "channels"), ENTRIES, ids=str)
def test_calls_of_training_and_their_gradients_equal_those_of_ref(entry, dtype, channels, size, kernel_device):
    op, ref = both(kernel_device, **CALLS[entry])
    x = noise(2, channels, *size).contiguous(memory_format=torch.channels_last)
    assert_right(op, ref, x, dtype)


@pytest.mark.parametrize("size", [(1, 1), (6, 8), (7, 5)], ids=str)
@pytest.mark.parametrize("entry", CALLS)
def test_calls_of_training_in_nchw_equal_those_of_ref(entry, size, kernel_device):
    op, ref = both(kernel_device, **CALLS[entry])
    for dtype in (torch.float32, torch.float16):
        assert_right(op, ref, noise(2, 3, *size), dtype)


@pytest.mark.parametrize("padding", [[-1, -2, -3, -1], [-1, 2, 3, -2], [4, -3, -2, 5], [5, 12, -4, 13]], ids=str)
@pytest.mark.parametrize("entry", CALLS)
def test_any_padding_is_right(entry, padding, kernel_device):
    op, ref = both(kernel_device, **{**CALLS[entry], "padding": padding})
    assert_right(op, ref, noise(1, 2, 17, 18), torch.float32)
    if "4" in entry:
        assert_right(op, ref, noise(1, 8, 17, 18).contiguous(memory_format=torch.channels_last), torch.float16)


@pytest.mark.parametrize("flip_filter", [False, True])
@pytest.mark.parametrize(
    "f",
    [
        [1, 2, 5, 3],
        [[1, 2, 5, 3], [-2, -4, -10, -6], [3, 6, 15, 9], [0, 0, 0, 0]],  # a product
        [[1, 2, 5, 3], [2, 1, 0, 4], [6, 2, -1, 2], [3, 0, 2, 7]],  # none
        [[0, 0, 1, 0], [0, 0, 0, 2], [3, 0, 0, 0], [0, 4, 0, 0]],  # none, and 0 in the middle
        LONG,
        WIDE,
    ],
    ids=["product", "signed product", "full", "sparse", "long", "wide"],
)
def test_any_filter_is_right_and_flips(f, flip_filter, kernel_device):
    for call in ({}, {"up": 2}, {"down": 2}):
        op, ref = both(kernel_device, f, padding=[3, 4, 6, 5], flip_filter=flip_filter, gain=-1.5, **call)
        if f is LONG:
            op, ref = both(kernel_device, f, padding=[3, 4, 6, 5], flip_filter=flip_filter, gain=1.5, **call)
        assert_right(op, ref, noise(1, 2, 5, 6), torch.float32)
        assert_right(op, ref, noise(1, 8, 5, 6).contiguous(memory_format=torch.channels_last), torch.float16)


def test_a_filter_of_few_taps_may_be_separable(kernel_device):
    f, x = setup_filter([1, 2, 5, 3], separable=True), noise(1, 2, 5, 6).float()
    y = upfirdn2d(x.to(kernel_device), f.to(kernel_device), padding=2).cpu()
    assert_close(y, upfirdn2d_ref(x, f, padding=2), 1e-6)


def laid_out(layout, device, n, c, h, w):
    if layout == "strided":
        return noise(n, 2 * c, 2 * h, 3 * w).float().to(device)[:, ::2, 1::2, ::3]
    if layout == "transposed":
        return noise(n, c, w, h).float().to(device).transpose(2, 3)
    if layout == "expanded":
        return noise(1, c, 1, 1).float().to(device).expand(n, c, h, w)
    return noise(n, c, h, w).float().to(device).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded", "channels_last"])
@pytest.mark.parametrize("case", ["up", "filter", "separable"])
def test_the_layouts_of_images_and_gradients_change_nothing(case, layout, kernel_device):
    _, ref = both(kernel_device, **CASES[case])
    call = {**CASES[case], "f": setup_filter(CASES[case]["f"]).to(kernel_device)}
    x = laid_out(layout, kernel_device, 2, 3, 7, 5).requires_grad_()
    y = upfirdn2d(x, **call)
    dy = laid_out(layout, kernel_device, *y.shape)
    found = [y, *torch.autograd.grad(y, x, dy)]
    assert not x.is_contiguous()
    assert not dy.is_contiguous()
    exact_x = x.detach().cpu().double().requires_grad_()
    exact_y = ref(exact_x)
    exact = [exact_y, *torch.autograd.grad(exact_y, exact_x, dy.cpu().double())]
    assert_close([t.detach().cpu().double() for t in found], [t.detach() for t in exact], 1e-6)


@pytest.mark.parametrize("call", [{"up": 2}, {"down": 2}], ids=str)
def test_a_filter_as_large_as_the_separable_ones_need_not_be_a_product(call, kernel_device):
    op, ref = both(kernel_device, noise(12, 12), padding=[6, 7, 5, 6], **call)
    assert_right(op, ref, noise(1, 2, 9, 8), torch.float32)


def test_an_odd_address_and_a_view_of_a_filter_are_right(kernel_device):
    storage = torch.zeros(1 + 8 * 9 * 7, dtype=torch.float16, device=kernel_device)
    x = storage[1:].view(1, 9, 7, 8).permute(0, 3, 1, 2).copy_(noise(1, 8, 9, 7))
    assert x.is_contiguous(memory_format=torch.channels_last)
    f = setup_filter([[3, 6, 12, 9], [1, 2, 4, 3], [2, 4, 8, 6], [2, 4, 8, 6]]).to(kernel_device).t()
    for call in ({}, {"up": 2}, {"down": 2}):
        y, exact = upfirdn2d(x, f, padding=2, **call), upfirdn2d_ref(x.double(), f.double(), padding=2, **call)
        assert_close(y.double(), exact, 4 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("call", [{}, {"up": 2}, {"down": 2}], ids=str)
def test_a_product_but_for_rounding_is_computed_as_a_product(call, kernel_device):
    product = setup_filter(SMOOTH)
    f = product.clone()
    f[0, 0] *= 1 + 3 * 2**-23
    one = torch.zeros(1, 1, 5, 5)
    one[0, 0, 1, 1] = 1
    y = upfirdn2d(one.to(kernel_device), f.to(kernel_device), padding=2, **call).cpu()
    as_product, as_it_is = (upfirdn2d_ref(one, taps, padding=2, **call) for taps in (product, f))
    assert not torch.equal(as_product, as_it_is)
    assert (y - as_product).abs().max() < (y - as_it_is).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", ["up and down", *CALLS])
def test_low_precision_is_at_most_twice_as_wrong_as_plain_pytorch(case, dtype, kernel_device):
    x = noise(2, 8, 17, 29).contiguous(memory_format=torch.channels_last)
    assert_at_most_twice_as_wrong(*both(kernel_device, **{**CASES, **CALLS}[case]), [x], dtype)


@pytest.mark.parametrize("enough", [1, 1000, 2**30])
@pytest.mark.parametrize("entry", ["filter4", "up4", "down4"])
def test_however_the_work_is_divided_it_is_all_done(entry, enough, on_host, monkeypatch):
    monkeypatch.setattr(upfirdn2d_cuda, "_ENOUGH_THREADS", enough)
    op, ref = both("cpu", **CALLS[entry])
    for channels, dtype in ((128, torch.float16), (88, torch.float16), (37, torch.float32)):
        x = noise(1, channels, 75, 3).contiguous(memory_format=torch.channels_last)
        assert_right(op, ref, x, dtype)


def test_numbers_that_are_not_finite_spread_as_in_pytorch(kernel_device):
    x = noise(1, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    x[0, 0, 2, 3], x[0, 1, 5, 5], x[0, 2, 7, 1] = float("nan"), float("inf"), 7e4
    for entry in ("filter4", "down4"):
        op, ref = both(kernel_device, **CALLS[entry])
        for dtype in (torch.float32, torch.float16):
            found, expected = op(x.to(dtype)), ref(x.to(dtype))
            assert expected.isnan().any() or expected.isinf().any()
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.isinf(), expected.isinf())


RGB, NCHW, LAST = (2, 3, 8, 8), torch.contiguous_format, torch.channels_last
UP_CONV = {"up": 2, "padding": 1}


@pytest.mark.parametrize(
    ("call", "shape", "dtype", "layout", "entries"),
    [
        ("conv up", (2, 16, 8, 8), torch.float16, LAST, ["filter4_f16"]),
        ("conv up", (2, 16, 8, 8), torch.float32, NCHW, ["filter4_f32"]),
        ("conv down", (2, 16, 8, 8), torch.float16, LAST, ["filter4_f16"]),
        ("conv down", (2, 16, 8, 8), torch.float32, NCHW, ["filter4_f32"]),
        ("skip", (2, 16, 8, 8), torch.float16, LAST, ["down4_f16", "up4_f16"]),
        ("skip", (2, 16, 8, 8), torch.bfloat16, LAST, ["down4_bf16", "up4_bf16"]),
        ("skip", (2, 16, 8, 8), torch.float32, NCHW, ["down4_f32", "up4_f32"]),
        ("image up", RGB, torch.float32, NCHW, ["up4_f32", "down4_f32"]),
        ("image up", RGB, torch.float32, LAST, ["up4_f32", "down4_f32"]),
        ("warp down", RGB, torch.float32, NCHW, ["down12_f32", "up12_f32"]),
        ("warp down", RGB, torch.float32, LAST, ["down12_f32", "up12_f32"]),
    ],
)
def test_training_runs_on_kernels_of_its_own(call, shape, dtype, layout, entries, on_host):
    f, twelve = setup_filter(SMOOTH), setup_filter(TWELVE)
    calls = {
        "conv up": lambda x: conv2d_resample(x, weight(x, 3), f, up=2, padding=1, flip_weight=False),
        "conv down": lambda x: conv2d_resample(x, weight(x, 3), f, down=2, padding=1),
        "skip": lambda x: conv2d_resample(x, weight(x, 1), f, down=2),
        "image up": lambda x: upfirdn2d(x, f, up=2, padding=[2, 1, 2, 1], gain=4),
        "warp down": lambda x: downsample2d(x, twelve, padding=-1, flip_filter=True),
    }
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    y = calls[call](x)
    (dx,) = torch.autograd.grad(y, x, torch.zeros_like(y), create_graph=True)
    assert launched(on_host) == entries
    assert dx.is_contiguous(memory_format=layout)


def weight(x, size):
    return torch.zeros(16, x.shape[1], size, size, dtype=x.dtype)


@pytest.mark.parametrize(
    ("x", "f", "kwargs"),
    [
        (torch.zeros(1, 1, 4, 4, dtype=torch.float64), setup_filter(SMOOTH), {}),
        (torch.zeros(1, 1, 4, 4), setup_filter(SMOOTH).double(), {}),
    ],
    ids=["images in double", "taps in double"],
)
def test_what_the_kernel_does_not_take_is_computed_all_the_same(x, f, kwargs, on_host):
    assert upfirdn2d(x, f, padding=2, **kwargs).shape == (1, 1, 5, 5)
    assert launched(on_host) == []


def test_a_result_without_pixels_is_refused_as_without_the_kernel(on_host):
    with pytest.raises(RuntimeError, match="size"):
        upfirdn2d(torch.zeros(1, 1, 2, 2), setup_filter(SMOOTH))


@pytest.mark.parametrize(
    ("f", "up", "down", "padding", "dtype", "layout", "dynamic"),
    [
        (SMOOTH, [1, 1], [1, 1], [1, 2, 2, 1], torch.float16, LAST, True),
        (WIDE, [2, 1], [1, 3], [3, 2, 1, 4], torch.bfloat16, NCHW, False),
        (TWELVE, [1, 1], [2, 2], [5, 5, 5, 5], torch.float32, NCHW, False),
    ],
    ids=["filter", "any", "separable"],
)
def test_the_operator_is_registered_as_pytorch_wants_it(f, up, down, padding, dtype, layout, dynamic, kernel_device):
    x = noise(2, 8, 9, 7).to(kernel_device, dtype).contiguous(memory_format=layout).requires_grad_()
    args = (x, setup_filter(f).to(kernel_device), up, down, padding, False, 2.0)
    tests = [*QUICK, "test_aot_dispatch_dynamic"] if dynamic else QUICK
    torch.library.opcheck(upfirdn2d_cuda.upfirdn2d.op, args, test_utils=tests)


@pytest.mark.parametrize("entry", CALLS)
def test_equal_calls_give_equal_bits(entry, kernel_device):
    op, _ = both(kernel_device, **CALLS[entry])
    x = noise(2, 8, 17, 9).float()
    assert all(map(torch.equal, derivatives(op, x), derivatives(op, x)))


def test_the_check_before_use_passes_and_takes_milliseconds(kernel_device):
    assert _check_kernel(kernel_device) is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("down4_f32", "up 2 in f32: dx is off by "),
        ("up4_f16", "up 2 in f16: y is off by "),
        ("up12_f32", "long filter, up 2 in f32: y is off by "),
        ("any_bf16", "filter in bf16: y is off by "),
    ],
)
def test_the_check_before_use_names_what_is_wrong(broken, message, on_host, monkeypatch):
    launch, gain = _kernel.launch, struct.calcsize("3P15i")

    def wrong(entry, grid, block, params, device):
        if entry == f"upfirdn2d_{broken}":
            params = params[:gain] + struct.pack("f", 1.1) + params[gain + 4 :]
        launch(entry, grid, block, params, device)

    monkeypatch.setattr(_kernel, "launch", wrong)
    assert _check_kernel(torch.device("cpu")).startswith(message)
