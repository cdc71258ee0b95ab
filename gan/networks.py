"""StyleGAN2 generator and discriminator (arXiv 1912.04958, with the changes of StyleGAN2-ADA, arXiv 2006.06676).

Constructor arguments, parameter names and buffer names are a file format: snapshots are exchanged with other programs
by them; `gan/models/embedded_networks.py` repeats them for programs that only use what was trained.

Shapes: N batch, C channels, L = num_ws style inputs of the synthesis network, D = w_dim.

Images are H x W, a small base doubled at each level of the networks. The block of the base is called b4, the next one
b8, and so on, which for a square of a power of two are the resolutions themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from gan.image_size import MAX_BASE_AREA, MIN_BASE, base_size, is_trainable, nominal_resolution
from torch_utils import draws
from torch_utils.ops import bias_act, conv2d_resample, noise_bias_act, upfirdn2d

# What "half precision" means where nobody said: a network out of a file draws the same picture on every CPU.
_HALF_DTYPE = {"cuda": torch.float16}
# A resolution: the side of a square, or [height, width].
Resolution = int | Sequence[int]
_ACTIVATIONS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")


def normalize_2nd_moment(x: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Scale each row of `[N, features]` to a mean square of 1."""
    return x * (x.square().mean(dim=1, keepdim=True) + eps).rsqrt()


def modulated_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    noise: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int = 0,
    resample_filter: torch.Tensor | None = None,
    demodulate: bool = True,
    flip_weight: bool = True,
) -> torch.Tensor:
    """Convolve each sample with its own weights, `w' = weight * styles`, normalised per output channel if demodulating.

    The per-sample weights are never built. With `s` the styles, conv(x, w * s) = conv(x * s, w), and the factor of the
    normalisation is `d = rsqrt(s^2 @ sum_k(w^2) + 1e-8)`: a matrix product (arXiv 1912.04958, eq. 1 and 3).

    Args:
        x: `[N, I, H, W]`, float16, bfloat16, float32 or float64.
        weight: `[O, I, k, k]`, float32 or float64.
        styles: `[N, I]`, of weight's dtype.
        noise: broadcastable to the output, added after demodulation, or None.
        up, down, padding, resample_filter, flip_weight: as in `conv2d_resample`.

    Returns:
        `[N, O, H', W']` of x's dtype.
    """
    value, factor = scaled_weight(weight, x.dtype, demodulate=demodulate)
    energy = weight_energy(weight, factor) if demodulate else None
    x, d = _modulated(x, value, energy, styles, up, down, padding, resample_filter, flip_weight)
    return noise_bias_act.noise_bias_act(x, d, noise)


def _modulated(
    x: torch.Tensor,
    weight: torch.Tensor,
    energy: torch.Tensor | None,
    styles: torch.Tensor,
    up: int,
    down: int,
    padding: int,
    resample_filter: torch.Tensor | None,
    flip_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`modulated_conv2d` without noise, with the weight in x's dtype, and the factor of the normalisation `[N, O]` that
    is still to be applied; energy `[O, I]` and the factor are None without demodulation."""
    if x.dtype == torch.float16 and energy is not None:
        styles = _with_largest_of_1(styles)
    x = noise_bias_act.noise_bias_act(x, styles)
    x = conv2d_resample.conv2d_resample(
        x, weight, f=resample_filter, up=up, down=down, padding=padding, flip_weight=flip_weight
    )
    return x, None if energy is None else (styles.square() @ energy.t() + 1e-8).rsqrt()


def _with_largest_of_1(styles: torch.Tensor) -> torch.Tensor:
    """Each row of `[N, I]` divided by a factor that demodulation cancels (see `_weight_factor`), as by a constant: what
    the factor adds to derivatives of the outcome is zero."""
    return styles / torch.linalg.vector_norm(styles.detach(), torch.inf, dim=1, keepdim=True)


def scaled_weight(
    weight: torch.Tensor, dtype: torch.dtype, gain: float = 1, demodulate: bool = False
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """A convolution's weight `[O, I, k, k]`, scaled and cast, and the factor that it was scaled by."""
    factor = _weight_factor(weight, dtype, gain, demodulate)
    return (weight if _is_one(factor) else weight * factor).to(dtype), factor


def weight_energy(weight: torch.Tensor, factor: torch.Tensor | float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over the kernel of the squared weight, times factor^2: `[O, I, k, k]` -> `[O, I]`."""
    if _is_one(factor):
        return torch.sum(weight.square(), dim=[2, 3], out=out)
    square = factor.square()[:, :, 0, 0] if isinstance(factor, torch.Tensor) else factor**2
    return torch.mul(weight.square().sum(dim=[2, 3]), square, out=out)


def _weight_factor(weight: torch.Tensor, dtype: torch.dtype, gain: float, demodulate: bool) -> torch.Tensor | float:
    """What a weight `[O, I, k, k]` is scaled by: a number, or `[O, 1, 1, 1]`.

    Demodulation cancels any factor per output channel. float16 makes use of that: it scales weights (and styles) to
    keep intermediate values far from its largest.
    """
    if not (demodulate and dtype == torch.float16):
        return gain
    largest = torch.linalg.vector_norm(weight.detach(), torch.inf, dim=[1, 2, 3], keepdim=True)
    factor = weight[0].numel() ** -0.5 / largest
    return factor if gain == 1 else factor * gain


def _is_one(factor: torch.Tensor | float) -> bool:
    return isinstance(factor, (int, float)) and factor == 1


_Module = TypeVar("_Module", bound="_Recorded")


class _Recorded(torch.nn.Module):
    """A module that remembers its constructor arguments, which a snapshot stores beside the tensors."""

    def __new__(cls: type[_Module], *args: Any, **kwargs: Any) -> _Module:
        module = super().__new__(cls)
        module.__dict__["_init_args"] = args
        module.__dict__["_init_kwargs"] = kwargs
        return module

    def arguments(self, defaults: bool = False) -> dict[str, Any]:
        """Those of the constructor's call by name; with `defaults` also those that it left out."""
        parameters = list(inspect.signature(type(self).__init__).parameters.values())[1:]
        given = dict(zip((p.name for p in parameters), self.__dict__["_init_args"], strict=False))
        left_out = {p.name: p.default for p in parameters if p.default is not p.empty} if defaults else {}
        return {**left_out, **given, **self.__dict__["_init_kwargs"]}


class _Prepared(NamedTuple):
    """The weight of a convolution as it is computed with."""

    dtype: torch.dtype
    device: torch.device
    layout: torch.memory_format
    value: torch.Tensor
    """`[O, I, k, k]` scaled and cast"""
    energy: torch.Tensor | None
    """`[O, I]` for demodulation"""
    factor: torch.Tensor | float
    """what it was scaled by"""


class _Convolution(_Recorded):
    """A layer whose weight is scaled, cast and laid out for the convolution: see `prepare_weights`."""

    weight: torch.Tensor
    weight_gain: float = 1
    up: int = 1
    demodulate: bool = False

    def convolution_weight(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """For input x: the weight `[O, I, k, k]` in its dtype, and its energy `[O, I]` if this layer demodulates."""
        if "prepared" not in self.__dict__:
            value, factor = scaled_weight(self.weight, x.dtype, self.weight_gain, self.demodulate)
            return value, weight_energy(self.weight, factor) if self.demodulate else None
        prepared: _Prepared | None = self.__dict__["prepared"]
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and self.weight.shape[2] > 1
        layout = torch.channels_last if channels_last else torch.contiguous_format
        if prepared is None or prepared[:3] != (x.dtype, x.device, layout):
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a weight is asked for in a form that it was not asked for before recording")
            prepared = self.__dict__["prepared"] = self._prepare(x.dtype, layout)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return _PreparedWeight.apply(self.weight, prepared.value, prepared.energy, prepared.factor)
        return prepared.value, prepared.energy

    @torch.no_grad()
    def prepare(self, in_place: bool) -> None:
        """See `prepare_weights`."""
        old: _Prepared | None = self.__dict__.get("prepared")
        if not in_place or old is None or old.device != self.weight.device:
            self.__dict__["prepared"] = None  # filled by the next call, which knows dtype and layout
            return
        weight = self.weight.detach()
        factor = _weight_factor(weight, old.dtype, self.weight_gain, self.demodulate)
        if isinstance(old.factor, torch.Tensor) and isinstance(factor, torch.Tensor):
            old.factor.copy_(factor)
        if old.value.data_ptr() != weight.data_ptr():  # else it is the parameter itself
            torch.mul(weight, factor, out=old.value)
        if old.energy is not None:
            weight_energy(weight, factor, out=old.energy)

    @torch.no_grad()
    def _prepare(self, dtype: torch.dtype, layout: torch.memory_format) -> _Prepared:
        weight = self.weight.detach()
        value, factor = scaled_weight(weight, dtype, self.weight_gain, self.demodulate)
        if self.up > 1 and value.shape[2] > 1:  # a transposed convolution exchanges inputs and outputs
            value = value.transpose(0, 1).contiguous(memory_format=layout).transpose(0, 1)
        else:
            value = value.contiguous(memory_format=layout)
        energy = weight_energy(weight, factor) if self.demodulate else None
        return _Prepared(dtype, weight.device, layout, value, energy, factor)


class _PreparedWeight(torch.autograd.Function):
    """Connects prepared values to the parameter that they were made of."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        value: torch.Tensor,
        energy: torch.Tensor | None,
        factor: torch.Tensor | float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.save_for_backward(weight)
        ctx.factor = factor
        ctx.set_materialize_grads(False)
        return value.detach(), None if energy is None else energy.detach()

    @staticmethod
    def backward(ctx: Any, d_value: torch.Tensor | None, d_energy: torch.Tensor | None) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        factor = ctx.factor
        d_weight = None
        if d_value is not None:
            d_weight = d_value.to(weight.dtype)
            if not _is_one(factor):
                d_weight = d_weight * factor
        if d_energy is not None:
            slope = d_energy[:, :, None, None]
            if not _is_one(factor):
                slope = slope * (factor * factor)
            d_weight = 2 * weight * slope if d_weight is None else torch.addcmul(d_weight, weight, slope, value=2)
        return d_weight, None, None, None


class FullyConnectedLayer(_Recorded):
    """Linear layer with equalised learning rate (arXiv 1710.10196, section 4.1). `[N, in]` -> `[N, out]`."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "linear",
        lr_multiplier: float = 1,
        bias_init: float = 0,
    ) -> None:
        super().__init__()
        _check_activation(activation)
        self.activation = activation
        self.weight = torch.nn.Parameter(torch.randn([out_features, in_features]) / lr_multiplier)
        self.bias = torch.nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.weight_gain = lr_multiplier / np.sqrt(in_features).item()
        self.bias_gain = lr_multiplier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.weight_gain  # fewer numbers than weights
        w = self.weight.to(x.dtype)
        b: torch.Tensor | None = self.bias
        if b is not None:
            b = (b * self.bias_gain if self.bias_gain != 1 else b).to(x.dtype)
        if self.activation == "linear":
            return F.linear(x, w, b)
        return bias_act.bias_act(F.linear(x, w), b, act=self.activation)


class Conv2dLayer(_Convolution):
    """Convolution with equalised learning rate, optional resampling, bias and activation."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str = "linear",
        up: int = 1,
        down: int = 1,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        conv_clamp: float | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        self.activation, self.up, self.down, self.conv_clamp = activation, up, down, conv_clamp
        self.padding = kernel_size // 2
        self.weight_gain = 1 / np.sqrt(in_channels * kernel_size**2).item()
        self.act_gain = _activation_gain(activation)
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        weight = torch.randn([out_channels, in_channels, kernel_size, kernel_size])
        tensors = {"weight": weight, "bias": torch.zeros([out_channels]) if bias else None}
        for name, tensor in tensors.items():
            if trainable or tensor is None:
                self.register_parameter(name, None if tensor is None else torch.nn.Parameter(tensor))
            else:  # Freeze-D (arXiv 2002.10964)
                self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor, gain: float = 1) -> torch.Tensor:
        w, _ = self.convolution_weight(x)
        only_gain = self.activation == "linear" and self.bias is None and self.conv_clamp is None
        # A kernel of the filter multiplies in passing. PyTorch's operations go on doing it last, rounding as ever.
        early = only_gain and max(self.up, self.down) > 1 and upfirdn2d.has_kernel(x)
        x = conv2d_resample.conv2d_resample(
            x,
            w,
            f=self.resample_filter,
            up=self.up,
            down=self.down,
            padding=self.padding,
            flip_weight=self.up == 1,
            gain=self.act_gain * gain if early else 1,
        )
        if early:
            return x
        b = self.bias.to(x.dtype) if self.bias is not None else None
        clamp = self.conv_clamp * gain if self.conv_clamp is not None else None
        return bias_act.bias_act(x, b, act=self.activation, gain=self.act_gain * gain, clamp=clamp)


class MappingNetwork(_Recorded):
    """Latents z and labels c to intermediate latents: `[N, z_dim]`, `[N, c_dim]` -> `[N, L, D]`.

    With num_ws None the result is not broadcast: `[N, D]`. Either input may have zero columns.
    """

    fc0: FullyConnectedLayer
    embed: FullyConnectedLayer
    w_avg: torch.Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        num_layers: int = 8,
        embed_features: int | None = None,
        layer_features: int | None = None,
        activation: str = "lrelu",
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.995,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, c_dim, w_dim, num_ws
        self.num_layers, self.w_avg_beta = num_layers, w_avg_beta
        embed = 0 if c_dim == 0 else embed_features or w_dim
        hidden = layer_features or w_dim
        features = [z_dim + embed, *[hidden] * (num_layers - 1), w_dim]
        if num_layers == 0 and (c_dim == 0 or features[0] != w_dim):
            raise ValueError("a mapping network of num_layers=0 needs labels, and z_dim + embed_features = w_dim")
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed)
        for i in range(num_layers):
            layer = FullyConnectedLayer(
                features[i], features[i + 1], activation=activation, lr_multiplier=lr_multiplier
            )
            setattr(self, f"fc{i}", layer)
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros([w_dim]))

    def forward(
        self,
        z: torch.Tensor | None,
        c: torch.Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        skip_w_avg_update: bool = False,
    ) -> torch.Tensor:
        """Map, track the mean in training mode unless told not to, broadcast, truncate (arXiv 1812.04948, app. B)."""
        inputs = []
        dtype = (self.fc0 if self.num_layers > 0 else self.embed).weight.dtype
        if self.z_dim > 0 and z is not None:
            inputs.append(normalize_2nd_moment(z.to(dtype)))
        if self.c_dim > 0:
            if c is None:
                raise ValueError(f"this network is conditional: give labels c of shape [N, {self.c_dim}]")
            inputs.append(normalize_2nd_moment(self.embed(c.to(dtype))))
        x = torch.cat(inputs, dim=1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)

        if self.training and not skip_w_avg_update:
            self.track_w_avg(x.detach().mean(dim=0))
        if self.num_ws is not None:
            x = x[:, None].expand(-1, self.num_ws, -1)
        if truncation_psi != 1:
            if self.w_avg_beta is None or self.num_ws is None:
                raise ValueError("truncation needs the mean of w, which this network does not track")
            if truncation_cutoff is None:
                return self.w_avg.lerp(x, truncation_psi)
            near = self.w_avg.lerp(x[:, :truncation_cutoff], truncation_psi)
            x = torch.cat([near, x[:, truncation_cutoff:]], dim=1)
        return x

    @torch.no_grad()
    def track_w_avg(self, w_mean: torch.Tensor) -> None:
        """Move w_avg towards a batch's mean w `[D]`."""
        if self.num_ws is not None and self.w_avg_beta is not None:
            self.w_avg.copy_(w_mean.lerp(self.w_avg, self.w_avg_beta))


class SynthesisLayer(_Convolution):
    """Modulated 3x3 convolution with noise, bias and activation."""

    noise_const: torch.Tensor
    resample_filter: torch.Tensor
    demodulate = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: Resolution,
        kernel_size: int = 3,
        up: int = 1,
        use_noise: bool = True,
        activation: str = "lrelu",
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.resolution, self.up, self.use_noise = resolution, up, use_noise
        self.activation, self.conv_clamp, self.padding = activation, conv_clamp, kernel_size // 2
        self.act_gain = _activation_gain(activation)
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = torch.nn.Parameter(torch.randn([out_channels, in_channels, kernel_size, kernel_size]))
        if use_noise:
            self.register_buffer("noise_const", torch.randn(height_width(resolution)))
            self.noise_strength = torch.nn.Parameter(torch.zeros([]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))

    def forward(self, x: torch.Tensor, w: torch.Tensor, noise_mode: str = "random", gain: float = 1) -> torch.Tensor:
        noise = None
        if self.use_noise and noise_mode == "random":
            noise = draws.randn([x.shape[0], 1, *height_width(self.resolution)], x.device)
        elif self.use_noise and noise_mode == "const":
            noise = self.noise_const
        weight, energy = self.convolution_weight(x)
        x, d = _modulated(
            x,
            weight,
            energy,
            self.affine(w),
            up=self.up,
            down=1,
            padding=self.padding,
            resample_filter=self.resample_filter,
            flip_weight=self.up == 1,
        )
        return noise_bias_act.noise_bias_act(
            x,
            d,
            noise,
            None if noise is None else self.noise_strength,
            self.bias,
            act=self.activation,
            gain=self.act_gain * gain,
            clamp=self.conv_clamp * gain if self.conv_clamp is not None else None,
        )


class ToRGBLayer(_Recorded):
    """Modulated 1x1 convolution to image channels, without demodulation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        kernel_size: int = 1,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = torch.nn.Parameter(torch.randn([out_channels, in_channels, kernel_size, kernel_size]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))
        self.weight_gain = 1 / np.sqrt(in_channels * kernel_size**2).item()

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = modulated_conv2d(x, self.weight, self.affine(w) * self.weight_gain, demodulate=False)
        return bias_act.bias_act(x, self.bias.to(x.dtype), clamp=self.conv_clamp)


class _Block(_Recorded):
    """What the blocks of both networks share: the precision they compute in."""

    use_fp16: bool
    channels_last: bool
    conv1: SynthesisLayer | Conv2dLayer
    resample_filter: torch.Tensor
    half_dtype: torch.dtype | None = None  # None: by device

    @property
    def full_dtype(self) -> torch.dtype:
        """Full precision: that of the parameters, float32 unless a caller made them float64."""
        return self.conv1.weight.dtype

    def compute_dtype(self, device: torch.device, force_fp32: bool) -> torch.dtype:
        """The dtype of this block's convolutions on `device`."""
        if force_fp32 or not self.use_fp16:
            return self.full_dtype
        return self.half_dtype or _HALF_DTYPE.get(device.type, self.full_dtype)

    def memory_format(self, device: torch.device, dtype: torch.dtype) -> torch.memory_format:
        """The layout of this block's activations: on a CPU the one that its convolutions are fastest in."""
        if device.type == "cpu" or (self.channels_last and dtype != self.full_dtype):
            return torch.channels_last
        return torch.contiguous_format


class SynthesisBlock(_Block):
    """All layers of the synthesis network at one level."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: Resolution,
        img_channels: int,
        is_last: bool,
        architecture: str = "skip",
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        conv_clamp: float | None = None,
        use_fp16: bool = False,
        fp16_channels_last: bool = False,
        **layer_kwargs: Any,
    ) -> None:
        super().__init__()
        _check_architecture(architecture)
        self.in_channels, self.resolution, self.is_last = in_channels, resolution, is_last
        self.architecture, self.use_fp16 = architecture, use_fp16
        self.channels_last = use_fp16 and fp16_channels_last
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        layer = {
            "w_dim": w_dim,
            "resolution": resolution,
            "resample_filter": resample_filter,
            "conv_clamp": conv_clamp,
            **layer_kwargs,
        }
        if in_channels == 0:
            self.const = torch.nn.Parameter(torch.randn([out_channels, *height_width(resolution)]))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, up=2, **layer)
        self.conv1 = SynthesisLayer(out_channels, out_channels, **layer)
        self.num_conv = 1 if in_channels == 0 else 2
        self.num_torgb = int(is_last or architecture == "skip")
        if self.num_torgb:
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim=w_dim, conv_clamp=conv_clamp)
        if in_channels != 0 and architecture == "resnet":
            self.skip = Conv2dLayer(
                in_channels,
                out_channels,
                kernel_size=1,
                bias=False,
                up=2,
                resample_filter=resample_filter,
            )

    def forward(
        self,
        x: torch.Tensor | None,
        img: torch.Tensor | None,
        ws: torch.Tensor,
        force_fp32: bool = False,
        noise_mode: str = "random",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features and image of the previous block, ws `[N, num_conv + num_torgb, D]` -> features and image."""
        w = iter(ws.unbind(dim=1))
        dtype = self.compute_dtype(ws.device, force_fp32)
        layout = self.memory_format(ws.device, dtype)
        if x is None:
            x = self.const.to(dtype).expand(ws.shape[0], -1, -1, -1).contiguous(memory_format=layout)
            x = self.conv1(x, next(w), noise_mode=noise_mode)
        else:
            x = x.to(dtype=dtype, memory_format=layout)
            if self.architecture == "resnet":
                y = self.skip(x, gain=np.sqrt(0.5).item())
                x = self.conv0(x, next(w), noise_mode=noise_mode)
                x = self.conv1(x, next(w), noise_mode=noise_mode, gain=np.sqrt(0.5).item())
                x = y + x
            else:
                x = self.conv0(x, next(w), noise_mode=noise_mode)
                x = self.conv1(x, next(w), noise_mode=noise_mode)

        if img is not None:
            img = upfirdn2d.upsample2d(img, self.resample_filter)
        if self.num_torgb:
            rgb = self.torgb(x, next(w)).to(self.full_dtype)
            img = rgb if img is None else img + rgb
        return x, img


class SynthesisNetwork(_Recorded):
    """Intermediate latents to images: ws `[N, L, D]` -> `[N, img_channels, H, W]` float32, about [-1, 1].

    Args:
        img_resolution: the side of a square of a power of two, otherwise [height, width].
    """

    b4: SynthesisBlock

    def __init__(
        self,
        w_dim: int,
        img_resolution: Resolution,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        **block_kwargs: Any,
    ) -> None:
        super().__init__()
        levels = _levels(img_resolution)
        top = max(levels)
        self.w_dim, self.img_resolution, self.img_channels = w_dim, levels[top], img_channels
        self.block_resolutions = list(levels)
        self.num_ws = 0
        for level, resolution in levels.items():
            nominal = _nominal_resolution(resolution)
            block = SynthesisBlock(
                _channels(nominal // 2, channel_base, channel_max) if level > 4 else 0,
                _channels(nominal, channel_base, channel_max),
                w_dim=w_dim,
                resolution=resolution,
                img_channels=img_channels,
                is_last=level == top,
                use_fp16=level >= _first_half_level(top, num_fp16_res),
                **block_kwargs,
            )
            self.num_ws += block.num_conv + (block.num_torgb if block.is_last else 0)
            setattr(self, f"b{level}", block)

    def forward(self, ws: torch.Tensor, force_fp32: bool = False, noise_mode: str = "random") -> torch.Tensor:
        """Synthesise. noise_mode: 'random' (fresh noise), 'const' (the stored noise) or 'none'."""
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"ws must be [N, {self.num_ws}, {self.w_dim}], not {list(ws.shape)}")
        if noise_mode not in ("random", "const", "none"):
            raise ValueError(f"noise_mode must be random, const or none, not {noise_mode!r}")
        ws = ws.to(self.b4.full_dtype)
        x = img = None
        first = 0
        for res in self.block_resolutions:
            block = getattr(self, f"b{res}")
            # The w of a block's torgb is shared with the first convolution of the next block.
            block_ws = ws.narrow(1, first, block.num_conv + block.num_torgb)
            x, img = block(x, img, block_ws, force_fp32=force_fp32, noise_mode=noise_mode)
            first += block.num_conv
        assert img is not None
        return img


class Generator(_Recorded):
    """Latents and labels to images: `[N, z_dim]`, `[N, c_dim]` -> `[N, img_channels, H, W]` float32, about [-1, 1].

    Args:
        img_resolution: the side of a square of a power of two, otherwise [height, width].
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: Resolution,
        img_channels: int,
        mapping_kwargs: Mapping[str, Any] | None = None,
        synthesis_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, **(synthesis_kwargs or {}))
        self.img_resolution, self.img_channels = self.synthesis.img_resolution, img_channels
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, num_ws=self.num_ws, **(mapping_kwargs or {}))

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return height_width(self.img_resolution)

    def forward(
        self,
        z: torch.Tensor,
        c: torch.Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        **synthesis_kwargs: Any,
    ) -> torch.Tensor:
        ws = self.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        return self.synthesis(ws, **synthesis_kwargs)


class DiscriminatorBlock(_Block):
    """All layers of the discriminator at one level, whose size it halves."""

    def __init__(
        self,
        in_channels: int,
        tmp_channels: int,
        out_channels: int,
        resolution: Resolution,
        img_channels: int,
        first_layer_idx: int,
        architecture: str = "resnet",
        activation: str = "lrelu",
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        conv_clamp: float | None = None,
        use_fp16: bool = False,
        fp16_channels_last: bool = False,
        freeze_layers: int = 0,
    ) -> None:
        super().__init__()
        _check_architecture(architecture)
        self.in_channels, self.resolution, self.architecture = in_channels, resolution, architecture
        self.use_fp16, self.channels_last = use_fp16, use_fp16 and fp16_channels_last
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.num_layers = 0

        def layer(inputs: int, outputs: int, kernel_size: int, **kwargs: Any) -> Conv2dLayer:
            trainable = first_layer_idx + self.num_layers >= freeze_layers
            self.num_layers += 1
            return Conv2dLayer(
                inputs,
                outputs,
                kernel_size=kernel_size,
                resample_filter=resample_filter,
                trainable=trainable,
                **kwargs,
            )

        active: dict[str, Any] = {"activation": activation, "conv_clamp": conv_clamp}
        if in_channels == 0 or architecture == "skip":
            self.fromrgb = layer(img_channels, tmp_channels, 1, **active)
        self.conv0 = layer(tmp_channels, tmp_channels, 3, **active)
        self.conv1 = layer(tmp_channels, out_channels, 3, down=2, **active)
        if architecture == "resnet":
            self.skip = layer(tmp_channels, out_channels, 1, bias=False, down=2)

    def forward(
        self, x: torch.Tensor | None, img: torch.Tensor | None, force_fp32: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features of the previous block (None in the first) and the image at this resolution -> the next's."""
        device = img.device if x is None and img is not None else x.device  # type: ignore[union-attr]
        dtype = self.compute_dtype(device, force_fp32)
        layout = self.memory_format(device, dtype)
        if x is not None:
            x = x.to(dtype=dtype, memory_format=layout)
        if self.in_channels == 0 or self.architecture == "skip":
            assert img is not None
            y = self.fromrgb(img.to(dtype=dtype, memory_format=layout))
            x = y if x is None else x + y
            img = upfirdn2d.downsample2d(img, self.resample_filter) if self.architecture == "skip" else None
        assert x is not None
        if self.architecture == "resnet":
            y = self.skip(x, gain=np.sqrt(0.5).item())
            x = self.conv1(self.conv0(x), gain=np.sqrt(0.5).item())
            return y + x, img
        return self.conv1(self.conv0(x)), img


class MinibatchStdLayer(_Recorded):
    """Append channels with the standard deviation over a group of samples (arXiv 1710.10196, section 3).

    `[N, C, H, W]` -> `[N, C + num_channels, H, W]`; sample i belongs to group i mod (N / group size).
    """

    def __init__(self, group_size: int | None, num_channels: int = 1) -> None:
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def forward(self, x: torch.Tensor, num_batches: int = 1) -> torch.Tensor:
        """`num_batches`: x is that many batches one after the other, whose groups are kept apart."""
        n, c, h, w = x.shape
        batch = n // num_batches
        group = min(self.group_size or batch, batch)
        if batch % group != 0:
            raise ValueError(f"a batch of {batch} does not divide into minibatch-stddev groups of {group}")
        features = self.num_channels
        y = x.reshape(num_batches, group, -1, features, c // features, h, w)  # [B, G, n, F, c, H, W]
        y = (y - y.mean(dim=1, keepdim=True)).square().mean(dim=1)  # [B, n, F, c, H, W]
        y = (y + 1e-8).sqrt().mean(dim=[3, 4, 5])  # [B, n, F]
        y = y[:, None].expand(-1, group, -1, -1).reshape(n, features, 1, 1).expand(-1, -1, h, w)
        return torch.cat([x, y], dim=1)


class DiscriminatorEpilogue(_Recorded):
    """The last layers of the discriminator, at the base, in full precision."""

    def __init__(
        self,
        in_channels: int,
        cmap_dim: int,
        resolution: Resolution,
        img_channels: int,
        architecture: str = "resnet",
        mbstd_group_size: int | None = 4,
        mbstd_num_channels: int = 1,
        activation: str = "lrelu",
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        _check_architecture(architecture)
        if mbstd_num_channels > 0 and in_channels % mbstd_num_channels != 0:
            raise ValueError(f"mbstd_num_channels={mbstd_num_channels} does not divide the {in_channels} channels")
        self.cmap_dim, self.resolution, self.architecture = cmap_dim, resolution, architecture
        if architecture == "skip":
            self.fromrgb = Conv2dLayer(img_channels, in_channels, kernel_size=1, activation=activation)
        self.mbstd = MinibatchStdLayer(mbstd_group_size, mbstd_num_channels) if mbstd_num_channels > 0 else None
        self.conv = Conv2dLayer(
            in_channels + mbstd_num_channels, in_channels, kernel_size=3, activation=activation, conv_clamp=conv_clamp
        )
        height, width = height_width(resolution)
        self.fc = FullyConnectedLayer(in_channels * height * width, in_channels, activation=activation)
        self.out = FullyConnectedLayer(in_channels, cmap_dim or 1)

    def forward(
        self, x: torch.Tensor, img: torch.Tensor | None, cmap: torch.Tensor | None, num_batches: int = 1
    ) -> torch.Tensor:
        dtype = self.out.weight.dtype
        x = x.to(dtype=dtype, memory_format=torch.contiguous_format)
        if self.architecture == "skip":
            assert img is not None
            x = x + self.fromrgb(img.to(dtype))
        if self.mbstd is not None:
            x = self.mbstd(x, num_batches)
        x = self.fc(self.conv(x).flatten(1))
        x = self.out(x)
        if cmap is not None and self.cmap_dim > 0:  # projection discriminator (arXiv 1802.05637)
            x = (x * cmap).sum(dim=1, keepdim=True) * (1 / np.sqrt(self.cmap_dim).item())
        return x


class Discriminator(_Recorded):
    """Images and labels to realness: `[N, img_channels, H, W]`, `[N, c_dim]` -> logits `[N, 1]` float32.

    Args:
        img_resolution: the side of a square of a power of two, otherwise [height, width].
    """

    def __init__(
        self,
        c_dim: int,
        img_resolution: Resolution,
        img_channels: int,
        architecture: str = "resnet",
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        conv_clamp: float | None = None,
        cmap_dim: int | None = None,
        block_kwargs: Mapping[str, Any] | None = None,
        mapping_kwargs: Mapping[str, Any] | None = None,
        epilogue_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        levels = _levels(img_resolution)
        top = max(levels)
        self.c_dim, self.img_resolution, self.img_channels = c_dim, levels[top], img_channels
        self.block_resolutions = list(levels)[:0:-1]  # top, ..., 8
        base_channels = _channels(_nominal_resolution(levels[4]), channel_base, channel_max)
        if cmap_dim is None:
            cmap_dim = base_channels
        if c_dim == 0:
            cmap_dim = 0
        common: dict[str, Any] = {
            "img_channels": img_channels,
            "architecture": architecture,
            "conv_clamp": conv_clamp,
        }
        first_layer_idx = 0
        for level in self.block_resolutions:
            nominal = _nominal_resolution(levels[level])
            channels = _channels(nominal, channel_base, channel_max)
            block = DiscriminatorBlock(
                channels if level < top else 0,
                channels,
                _channels(nominal // 2, channel_base, channel_max),
                resolution=levels[level],
                first_layer_idx=first_layer_idx,
                use_fp16=level >= _first_half_level(top, num_fp16_res),
                **(block_kwargs or {}),
                **common,
            )
            setattr(self, f"b{level}", block)
            first_layer_idx += block.num_layers
        if c_dim > 0:
            self.mapping = MappingNetwork(
                z_dim=0, c_dim=c_dim, w_dim=cmap_dim, num_ws=None, w_avg_beta=None, **(mapping_kwargs or {})
            )
        self.b4 = DiscriminatorEpilogue(
            base_channels,
            cmap_dim=cmap_dim,
            resolution=levels[4],
            **(epilogue_kwargs or {}),
            **common,
        )

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return height_width(self.img_resolution)

    def forward(
        self,
        img: torch.Tensor,
        c: torch.Tensor | None = None,
        force_fp32: bool = False,
        num_batches: int = 1,
    ) -> torch.Tensor:
        """Judge images. `num_batches`: img is that many batches one after the other, judged as if one at a time."""
        shape = [self.img_channels, *self.img_size]
        if img.ndim != 4 or list(img.shape[1:]) != shape:  # pixels of height and width exchanged would also do
            raise ValueError(f"images must be [N, {', '.join(map(str, shape))}], not {list(img.shape)}")
        x: torch.Tensor | None = None
        rgb: torch.Tensor | None = img
        for res in self.block_resolutions:
            x, rgb = getattr(self, f"b{res}")(x, rgb, force_fp32=force_fp32)
        cmap = self.mapping(None, c) if self.c_dim > 0 else None
        return self.b4(x, rgb, cmap, num_batches)


def set_half_dtype(network: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Choose what the half-precision blocks of a network compute in; None restores the default of the device."""
    for module in network.modules():
        if isinstance(module, _Block):
            module.__dict__.pop("half_dtype", None)
            if dtype is not None:
                module.half_dtype = dtype


@torch.no_grad()
def prepare_weights(network: torch.nn.Module, in_place: bool = False) -> None:
    """Have the convolutions of a network keep their weights scaled and cast, as they are now, for all calls to come.

    Between two steps of its optimiser a network runs several times. Call this again after every change of the weights
    (nothing tells a layer of one: fused optimisers leave no trace), or `forget_weights` before it.

    Args:
        in_place: renew what was kept in the memory that it has, which is what a recorded step (CUDA graph) reads.
    """
    for module in network.modules():
        if isinstance(module, _Convolution):
            module.prepare(in_place)


def forget_weights(network: torch.nn.Module) -> None:
    """Undo `prepare_weights`: every call computes with the weights as they are."""
    for module in network.modules():
        module.__dict__.pop("prepared", None)


def _check_activation(activation: str) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(_ACTIVATIONS)}")


def _activation_gain(activation: str) -> float:
    """The gain after an activation that keeps the variance."""
    _check_activation(activation)
    return 2**0.5 if activation in ("relu", "lrelu", "swish") else 1.0


def _check_architecture(architecture: str) -> None:
    if architecture not in ("orig", "skip", "resnet"):
        raise ValueError(f"architecture must be orig, skip or resnet, not {architecture!r}")


def height_width(resolution: Resolution) -> tuple[int, int]:
    """Height and width in pixels of a resolution: of a network's images, or of one of its blocks or layers."""
    if isinstance(resolution, int):
        return resolution, resolution
    height, width = resolution
    return height, width


def _levels(img_resolution: Resolution) -> dict[int, int | list[int]]:
    """{name: resolution} of the levels, from the base, which is called 4, to the image.

    An int stands for a square of a power of two, whichever way it was given; [height, width] for everything else.
    """
    height, width = _sides(img_resolution)
    if height == width and height >= 2 * MIN_BASE and height & (height - 1) == 0:
        return {2**i: 2**i for i in range(2, height.bit_length())}
    if isinstance(img_resolution, int):
        raise ValueError(
            f"img_resolution must be a power of two of at least {2 * MIN_BASE}, not {img_resolution}; "
            "other sizes are given as [height, width]"
        )
    if not is_trainable((width, height)):
        raise ValueError(
            f"no network can be built for img_resolution {[height, width]}: height and width must be a * 2**n and "
            f"b * 2**n with n >= 1, a and b at least {MIN_BASE}, and a * b at most {MAX_BASE_AREA}"
        )
    base = base_size((width, height))
    return {4 << i: [base[1] << i, base[0] << i] for i in range((width // base[0]).bit_length())}


def _sides(img_resolution: Any) -> list[int]:
    """`height_width` of what somebody may have given."""
    if isinstance(img_resolution, int):
        return [img_resolution, img_resolution]
    pair = list(img_resolution) if isinstance(img_resolution, Sequence) else []
    if len(pair) != 2 or not all(isinstance(side, int) for side in pair):
        raise ValueError(f"img_resolution must be an int or [height, width] in pixels, not {img_resolution!r}")
    return pair


def _nominal_resolution(resolution: Resolution) -> int:
    """What the resolution of a block counts as: it sets the channels."""
    height, width = height_width(resolution)
    return nominal_resolution((width, height))


def _channels(nominal_resolution: int, channel_base: int, channel_max: int) -> int:
    return min(channel_base // nominal_resolution, channel_max)


def _first_half_level(top: int, num_fp16_res: int) -> int:
    """The lowest level that computes in half precision; the base never does. Higher than the top: none does."""
    if num_fp16_res == 0:
        return top + 1
    return max(2 ** (top.bit_length() - num_fp16_res), 8)
