"""On a GPU, every kernel recorded in a CUDA graph, forward and backward."""

import pytest
import torch
from op_checks import noise

from torch_utils.ops import cuda_kernels, kernels
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.noise_bias_act import noise_bias_act
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d
from torch_utils.ops.warp import warp


def call(name, device):
    """A function of tensors, and these, on a device."""
    x = noise(2, 8, 9, 7).to(device, torch.float16).contiguous(memory_format=torch.channels_last)
    per_sample, per_channel = noise(2, 8, seed=1).float().to(device), noise(8, seed=2).float().to(device)
    if name == "bias_act":
        return lambda x, b: bias_act(x, b, act="lrelu", clamp=1), [x, per_channel.half()]
    if name == "noise_bias_act":
        plane, strength = noise(2, 1, 9, 7, seed=3).float().to(device), torch.tensor(0.5, device=device)
        return lambda x, s, q, b: noise_bias_act(x, s, plane, q, b, act="lrelu"), [x, per_sample, strength, per_channel]
    if name == "upfirdn2d":
        f = setup_filter([1, 3, 3, 1], device=device)
        return lambda x: upfirdn2d(x, f, up=2, padding=[2, 1, 2, 1], gain=4), [x]
    rows = [[[0.8, -0.6, 3], [0.6, 0.8, -2], [0, 0, 1]]] * 2
    inverse, taps = torch.tensor(rows, device=device), setup_filter(range(1, 13), device=device)
    return lambda images: warp(images, inverse, taps), [x.float()]


def results(function, inputs):
    leaves = [t.requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.parametrize("name", cuda_kernels.kernels)
def test_both_directions_of_these_calls_are_kernels(name, on_host):
    """Otherwise the test below would record PyTorch's operations."""
    function, inputs = call(name, torch.device("cpu"))
    results(function, inputs)
    assert len(set(on_host[name].launched)) >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", cuda_kernels.kernels)
def test_a_recorded_call_computes_what_a_plain_one_does(name, monkeypatch):
    kernels.prepare("cuda", "cuda")
    kernel, launched = cuda_kernels.kernels[name], []
    launch = kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda entry, *args: launched.append(entry) or launch(entry, *args))
    function, inputs = call(name, torch.device("cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(function, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    launched.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = results(function, inputs)
    assert len(set(launched)) >= 2
    with torch.no_grad():
        for tensor in inputs:
            tensor.mul_(-1.25)
    graph.replay()
    for found, expected in zip(recorded, results(function, inputs), strict=True):
        assert torch.equal(found, expected)
