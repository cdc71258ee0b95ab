"""StyleGAN2 generator and discriminator (arXiv 1912.04958, 2006.06676) in plain PyTorch, to be used, not trained.

This text is embedded in every network snapshot, so that programs that know nothing of the one that trained it can open
it by executing the text. It needs torch alone (tried from 1.13 on), and makes the same images and scores as the
training code, whose classes, arguments, attributes, parameters and buffers have the same names. Ordinary autograd goes
through all of it. Copyright: the authors of stylegan2-ada-trainer; licence: Apache-2.0.

Shapes: N batch, C channels, L = num_ws style inputs of the synthesis network, D = w_dim.

Images are H x W, a small base doubled at each level of the networks. The block of the base is called b4, the next one
b8, and so on, which for a square of a power of two are the resolutions themselves.
"""

# mypy: allow-untyped-defs
# Types would make a fifth more of a text that every file carries.

import math

import torch
import torch.nn.functional as F

_HALF_DEVICES = ("cuda",)  # where float16 is fast
# {name: (function, the gain that keeps the variance)}
_ACTIVATIONS = {
    "linear": (lambda x: x, 1.0),
    "relu": (F.relu, 2**0.5),
    "lrelu": (lambda x: F.leaky_relu(x, 0.2), 2**0.5),
    "tanh": (torch.tanh, 1.0),
    "sigmoid": (torch.sigmoid, 1.0),
    "elu": (F.elu, 1.0),
    "selu": (F.selu, 1.0),
    "softplus": (F.softplus, 1.0),
    "swish": (lambda x: torch.sigmoid(x) * x, 2**0.5),
}


class _Module(torch.nn.Module):
    """Remembers the arguments of its constructor, and comes to life out of a file."""

    def __new__(cls, *args, **kwargs):
        module = super().__new__(cls)
        torch.nn.Module.__init__(module)  # files leave out what PyTorch wants of every module: hooks, and the like
        module.__dict__.update(_init_args=args, _init_kwargs=kwargs)
        return module

    def __setstate__(self, state):
        """float16 in a file is a way of storing: what is computed with is float32."""
        state = dict(state)
        for kind in ("_parameters", "_buffers"):
            state[kind] = {name: _float32(tensor) for name, tensor in state.get(kind, {}).items()}
        super().__setstate__(state)


def _float32(tensor):
    if tensor is None or tensor.dtype != torch.float16:
        return tensor
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(tensor.detach().float(), requires_grad=tensor.requires_grad)
    return tensor.float()


def _full_dtype(parameter):
    """What is computed in where float16 is not asked for."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def normalize_2nd_moment(x, eps=1e-8):
    """Scale each row of [N, features] to a mean square of 1."""
    return x * (x.square().mean(dim=1, keepdim=True) + eps).rsqrt()


def bias_act(x, b=None, act="linear", gain=None, clamp=None):
    """clamp(gain * act(x + b)) of [N, C] or [N, C, H, W]."""
    function, default_gain = _ACTIVATIONS[act]
    gain = default_gain if gain is None else gain
    if b is not None:
        x = x + b.to(x.dtype).reshape([1, -1] + [1] * (x.ndim - 2))
    x = function(x)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def setup_filter(taps):
    """A FIR filter whose taps sum to 1: [taps] if it is a list of 8 or more, else [height, width]."""
    f = torch.as_tensor([1] if taps is None else taps, dtype=torch.float32)
    if f.ndim == 1 and f.numel() < 8:
        f = f[:, None] * f[None, :]
    return f / f.sum()


def upfirdn2d(x, f, up=1, down=1, pads=(0, 0, 0, 0), gain=1):
    """Put up - 1 zeros after every pixel, pad by (x0, x1, y0, y1), convolve with f, keep every down-th pixel."""
    channels = x.shape[1]
    f = f if f.ndim == 2 else f[:, None] * f[None, :]
    weight = (f * gain).to(x.dtype).expand(channels, 1, f.shape[0], f.shape[1])
    if up > 1:  # a transposed convolution, which pads by size - 1 before and by size - up behind
        (fh, fw), (x0, x1, y0, y1) = f.shape, pads
        pads = (x0 - fw + 1, x1 - fw + up, y0 - fh + 1, y1 - fh + up)
        if pads[0] == pads[1] <= 0 and pads[2] == pads[3] <= 0:
            return F.conv_transpose2d(x, weight, stride=up, padding=(-pads[2], -pads[0]), groups=channels)
        return F.pad(F.conv_transpose2d(x, weight, stride=up, groups=channels), pads)  # negative ones crop
    padding = (0, 0)
    if pads[0] == pads[1] >= 0 and pads[2] == pads[3] >= 0:
        padding = (pads[2], pads[0])
    else:
        x = F.pad(x, pads)
    return F.conv2d(x, weight.flip([2, 3]), stride=down, padding=padding, groups=channels)


def _resampling_pads(f, up, down, padding=0):
    """What keeps an image centred that is upsampled or downsampled with f, and padding."""
    pads = []
    for size in (f.shape[-1], f.shape[0]):
        if up > 1:
            pads += [padding + (size + up - 1) // 2, padding + (size - up) // 2]
        else:
            pads += [padding + (size - down + 1) // 2, padding + (size - down) // 2]
    return tuple(pads)


def upsample2d(x, f, up=2):
    """[N, C, H, W] -> [N, C, up * H, up * W]."""
    return upfirdn2d(x, f, up=up, pads=_resampling_pads(f, up, 1), gain=up**2)


def downsample2d(x, f, down=2):
    """[N, C, H, W] -> [N, C, H / down, W / down]."""
    return upfirdn2d(x, f, down=down, pads=_resampling_pads(f, 1, down))


def conv2d_resample(x, w, f, up=1, down=1, padding=0):
    """Upsample with f, convolve with w [O, I, k, k], downsample with f; when upsampling, w is flipped."""
    size = w.shape[2]
    if size == 1 and up > 1:
        return upsample2d(F.conv2d(x, w), f, up)
    if size == 1 and down > 1:
        return F.conv2d(downsample2d(x, f, down), w)
    if up > 1:  # convolving an image full of zeros is a transposed convolution; the filter commutes and comes after it
        x0, x1, y0, y1 = _resampling_pads(f, up, 1, padding)
        x = F.conv_transpose2d(x, w.transpose(0, 1), stride=up)
        return upfirdn2d(x, f, pads=(x0 - size + 1, x1 - size + up, y0 - size + 1, y1 - size + up), gain=up**2)
    if down > 1:
        return F.conv2d(upfirdn2d(x, f, pads=_resampling_pads(f, 1, down, padding)), w, stride=down)
    return F.conv2d(x, w, padding=padding)


def modulated_conv2d(x, weight, styles, f=None, up=1, padding=0, demodulate=True):
    """Convolve each sample with its own weights, weight * styles, normalised per output channel if demodulating.

    conv(x, weight * styles) = conv(x * styles, weight), so all samples share a weight [O, I, k, k]; styles [N, I].
    """
    weight = weight.to(styles.dtype)
    if demodulate and x.dtype == torch.float16:  # keep far from its largest number; demodulation cancels both factors
        in_size = weight.shape[1] * weight.shape[2] * weight.shape[3]
        weight = weight * (in_size**-0.5 / weight.detach().abs().amax(dim=[1, 2, 3], keepdim=True))
        styles = styles / styles.abs().amax(dim=1, keepdim=True)
    x = x * styles.to(x.dtype)[:, :, None, None]
    x = conv2d_resample(x, weight.to(x.dtype), f, up=up, down=1, padding=padding)
    if demodulate:
        energy = weight.square().sum(dim=[2, 3])  # [O, I]
        x = x * (styles.square() @ energy.t() + 1e-8).rsqrt().to(x.dtype)[:, :, None, None]
    return x


class FullyConnectedLayer(_Module):
    """Linear layer with equalised learning rate: [N, in] -> [N, out]."""

    def __init__(self, in_features, out_features, bias=True, activation="linear", lr_multiplier=1, bias_init=0):
        super().__init__()
        self.activation = activation
        self.weight = torch.nn.Parameter(torch.randn([out_features, in_features]) / lr_multiplier)
        self.bias = torch.nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x):
        x = F.linear(x * self.weight_gain, self.weight.to(x.dtype))
        b = None if self.bias is None else self.bias.to(x.dtype) * self.bias_gain
        return bias_act(x, b, self.activation)


class Conv2dLayer(_Module):
    """Convolution with equalised learning rate, optional resampling, bias and activation."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        bias=True,
        activation="linear",
        up=1,
        down=1,
        resample_filter=(1, 3, 3, 1),
        conv_clamp=None,
        trainable=True,
    ):
        super().__init__()
        self.activation, self.up, self.down, self.conv_clamp = activation, up, down, conv_clamp
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.act_gain = _ACTIVATIONS[activation][1]
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        weight = torch.randn([out_channels, in_channels, kernel_size, kernel_size])
        for name, tensor in (("weight", weight), ("bias", torch.zeros([out_channels]) if bias else None)):
            if trainable or tensor is None:
                self.register_parameter(name, None if tensor is None else torch.nn.Parameter(tensor))
            else:  # frozen layers hold buffers
                self.register_buffer(name, tensor)

    def forward(self, x, gain=1):
        w = (self.weight.to(_full_dtype(self.weight)) * self.weight_gain).to(x.dtype)
        x = conv2d_resample(x, w, self.resample_filter, up=self.up, down=self.down, padding=self.padding)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, self.bias, self.activation, gain=self.act_gain * gain, clamp=clamp)


class MappingNetwork(_Module):
    """Latents z [N, z_dim] and labels c [N, c_dim] to ws [N, L, D]; with num_ws None to [N, D]."""

    def __init__(
        self,
        z_dim,
        c_dim,
        w_dim,
        num_ws,
        num_layers=8,
        embed_features=None,
        layer_features=None,
        activation="lrelu",
        lr_multiplier=0.01,
        w_avg_beta=0.995,
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, c_dim, w_dim, num_ws
        self.num_layers, self.w_avg_beta = num_layers, w_avg_beta
        embed = 0 if c_dim == 0 else embed_features or w_dim
        features = [z_dim + embed, *[layer_features or w_dim] * (num_layers - 1), w_dim]
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed)
        for i in range(num_layers):
            layer = FullyConnectedLayer(
                features[i], features[i + 1], activation=activation, lr_multiplier=lr_multiplier
            )
            setattr(self, f"fc{i}", layer)
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros([w_dim]))

    def forward(self, z, c=None, truncation_psi=1, truncation_cutoff=None, skip_w_avg_update=False, update_emas=None):
        """In training mode w_avg follows, unless a caller of either generation says that it is not to."""
        dtype = _full_dtype((self.fc0 if self.num_layers > 0 else self.embed).weight)
        inputs = []
        if self.z_dim > 0:
            inputs.append(normalize_2nd_moment(z.to(dtype)))
        if self.c_dim > 0:
            if c is None:
                raise ValueError(f"this network is conditional: give labels c of shape [N, {self.c_dim}]")
            inputs.append(normalize_2nd_moment(self.embed(c.to(dtype))))
        x = torch.cat(inputs, dim=1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)

        follow = self.training and not skip_w_avg_update if update_emas is None else update_emas
        if follow and self.num_ws is not None and self.w_avg_beta is not None:
            mean = x.detach().mean(dim=0).to(self.w_avg.dtype)
            self.w_avg.copy_(mean + self.w_avg_beta * (self.w_avg - mean))
        if self.num_ws is None:
            return x
        x = x[:, None].expand(-1, self.num_ws, -1)
        if isinstance(truncation_psi, torch.Tensor) or truncation_psi != 1:
            if self.w_avg_beta is None:
                raise ValueError("truncation needs the mean of w, which this network does not track")
            near = self.w_avg + truncation_psi * (x[:, :truncation_cutoff] - self.w_avg)
            x = near if truncation_cutoff is None else torch.cat([near, x[:, truncation_cutoff:]], dim=1)
        return x


class SynthesisLayer(_Module):
    """Modulated 3x3 convolution with noise, bias and activation."""

    def __init__(
        self,
        in_channels,
        out_channels,
        w_dim,
        resolution,
        kernel_size=3,
        up=1,
        use_noise=True,
        activation="lrelu",
        resample_filter=(1, 3, 3, 1),
        conv_clamp=None,
    ):
        super().__init__()
        self.resolution, self.up, self.use_noise = resolution, up, use_noise
        self.activation, self.conv_clamp, self.padding = activation, conv_clamp, kernel_size // 2
        self.act_gain = _ACTIVATIONS[activation][1]
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = torch.nn.Parameter(torch.randn([out_channels, in_channels, kernel_size, kernel_size]))
        if use_noise:
            self.register_buffer("noise_const", torch.randn(height_width(resolution)))
            self.noise_strength = torch.nn.Parameter(torch.zeros([]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))

    def forward(self, x, w, noise_mode="random", fused_modconv=None, gain=1):
        """fused_modconv, a choice between two ways to the same numbers, makes no difference: there is one here."""
        if noise_mode not in ("random", "const", "none"):
            raise ValueError(f"noise_mode must be random, const or none, not {noise_mode!r}")
        x = modulated_conv2d(x, self.weight, self.affine(w), self.resample_filter, self.up, self.padding)
        if self.use_noise and noise_mode != "none":
            noise = self.noise_const.to(_full_dtype(self.noise_const))
            if noise_mode == "random":
                noise = torch.randn([x.shape[0], 1, *height_width(self.resolution)], device=x.device)
            x = x + (noise * self.noise_strength).to(x.dtype)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, self.bias, self.activation, gain=self.act_gain * gain, clamp=clamp)


class ToRGBLayer(_Module):
    """Modulated 1x1 convolution to image channels, without demodulation."""

    def __init__(self, in_channels, out_channels, w_dim, kernel_size=1, conv_clamp=None):
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = torch.nn.Parameter(torch.randn([out_channels, in_channels, kernel_size, kernel_size]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x, w, fused_modconv=None):
        x = modulated_conv2d(x, self.weight, self.affine(w) * self.weight_gain, demodulate=False)
        return bias_act(x, self.bias, clamp=self.conv_clamp)


class _Block(_Module):
    """What the blocks of both networks share: the precision they compute in."""

    def enter(self, x, force_fp32):
        """x in the precision of this block: float16 on GPUs if it was trained so, and on CPUs float32."""
        full = _full_dtype(self.conv1.weight)
        half = self.use_fp16 and not force_fp32 and x.device.type in _HALF_DEVICES
        layout = torch.channels_last if half and self.channels_last else torch.contiguous_format
        return x.to(dtype=torch.float16 if half else full, memory_format=layout)


class SynthesisBlock(_Block):
    """All layers of the synthesis network at one level."""

    def __init__(
        self,
        in_channels,
        out_channels,
        w_dim,
        resolution,
        img_channels,
        is_last,
        architecture="skip",
        resample_filter=(1, 3, 3, 1),
        conv_clamp=None,
        use_fp16=False,
        fp16_channels_last=False,
        **layer_kwargs,
    ):
        super().__init__()
        _check_architecture(architecture)
        self.in_channels, self.resolution, self.is_last = in_channels, resolution, is_last
        self.architecture, self.use_fp16 = architecture, use_fp16
        self.channels_last = use_fp16 and fp16_channels_last
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        layer = {"w_dim": w_dim, "resolution": resolution, "resample_filter": resample_filter}
        layer.update(conv_clamp=conv_clamp, **layer_kwargs)
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
                in_channels, out_channels, kernel_size=1, bias=False, up=2, resample_filter=resample_filter
            )

    def forward(self, x, img, ws, force_fp32=False, fused_modconv=None, noise_mode="random", update_emas=False):
        """Features and image of the previous block (None in the first) and ws -> features and image.

        Of the arguments that other programs pass, fused_modconv (see SynthesisLayer) and update_emas (there are no
        moving averages in here) make no difference.
        """
        w = iter(ws.unbind(dim=1))
        if x is None:
            x = self.enter(self.const.expand(ws.shape[0], -1, -1, -1), force_fp32)
            x = self.conv1(x, next(w), noise_mode=noise_mode)
        else:
            x = self.enter(x, force_fp32)
            y = self.skip(x, gain=math.sqrt(0.5)) if self.architecture == "resnet" else None
            x = self.conv0(x, next(w), noise_mode=noise_mode)
            x = self.conv1(x, next(w), noise_mode=noise_mode, gain=1 if y is None else math.sqrt(0.5))
            x = x if y is None else y + x
        if img is not None:
            img = upsample2d(img, self.resample_filter)
        if self.num_torgb:
            rgb = self.torgb(x, next(w)).to(_full_dtype(self.conv1.weight))
            img = rgb if img is None else img + rgb
        return x, img


class SynthesisNetwork(_Module):
    """Intermediate latents to images: ws [N, L, D] -> [N, img_channels, H, W] float32, about [-1, 1]."""

    def __init__(
        self,
        w_dim,
        img_resolution,
        img_channels,
        channel_base=32768,
        channel_max=512,
        num_fp16_res=0,
        **block_kwargs,
    ):
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

    def forward(self, ws, **block_kwargs):
        """block_kwargs: noise_mode 'random' (fresh noise), 'const' (the stored noise) or 'none'; force_fp32."""
        if ws.ndim != 3 or list(ws.shape[1:]) != [self.num_ws, self.w_dim]:
            raise ValueError(f"ws must be [N, {self.num_ws}, {self.w_dim}], not {list(ws.shape)}")
        ws = ws.to(_full_dtype(self.b4.conv1.weight))
        x = img = None
        first = 0
        for level in self.block_resolutions:
            block = getattr(self, f"b{level}")
            # The w of a block's torgb is shared with the first convolution of the next block.
            x, img = block(x, img, ws[:, first : first + block.num_conv + block.num_torgb], **block_kwargs)
            first += block.num_conv
        return img


class Generator(_Module):
    """Latents and labels to images: [N, z_dim], [N, c_dim] -> [N, img_channels, H, W] float32, about [-1, 1]."""

    def __init__(self, z_dim, c_dim, w_dim, img_resolution, img_channels, mapping_kwargs=None, synthesis_kwargs=None):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, **(synthesis_kwargs or {}))
        self.img_resolution, self.img_channels = self.synthesis.img_resolution, img_channels
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, num_ws=self.num_ws, **(mapping_kwargs or {}))

    def forward(self, z, c=None, truncation_psi=1, truncation_cutoff=None, update_emas=None, **synthesis_kwargs):
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff, update_emas=update_emas)
        return self.synthesis(ws, **synthesis_kwargs)


class DiscriminatorBlock(_Block):
    """All layers of the discriminator at one level, whose size it halves."""

    def __init__(
        self,
        in_channels,
        tmp_channels,
        out_channels,
        resolution,
        img_channels,
        first_layer_idx,
        architecture="resnet",
        activation="lrelu",
        resample_filter=(1, 3, 3, 1),
        conv_clamp=None,
        use_fp16=False,
        fp16_channels_last=False,
        freeze_layers=0,
    ):
        super().__init__()
        _check_architecture(architecture)
        self.in_channels, self.resolution, self.architecture = in_channels, resolution, architecture
        self.use_fp16, self.channels_last = use_fp16, use_fp16 and fp16_channels_last
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        self.num_layers = 0

        def layer(inputs, outputs, kernel_size, **kwargs):
            trainable = first_layer_idx + self.num_layers >= freeze_layers
            self.num_layers += 1
            return Conv2dLayer(
                inputs, outputs, kernel_size, resample_filter=resample_filter, trainable=trainable, **kwargs
            )

        active = {"activation": activation, "conv_clamp": conv_clamp}
        if in_channels == 0 or architecture == "skip":
            self.fromrgb = layer(img_channels, tmp_channels, 1, **active)
        self.conv0 = layer(tmp_channels, tmp_channels, 3, **active)
        self.conv1 = layer(tmp_channels, out_channels, 3, down=2, **active)
        if architecture == "resnet":
            self.skip = layer(tmp_channels, out_channels, 1, bias=False, down=2)

    def forward(self, x, img, force_fp32=False):
        """Features of the previous block (None in the first) and the image at this resolution -> the next's."""
        x = None if x is None else self.enter(x, force_fp32)
        if self.in_channels == 0 or self.architecture == "skip":
            y = self.fromrgb(self.enter(img, force_fp32))
            x = y if x is None else x + y
            img = downsample2d(img, self.resample_filter) if self.architecture == "skip" else None
        if self.architecture == "resnet":
            y = self.skip(x, gain=math.sqrt(0.5))
            return y + self.conv1(self.conv0(x), gain=math.sqrt(0.5)), img
        return self.conv1(self.conv0(x)), img


class MinibatchStdLayer(_Module):
    """Append channels with the standard deviation over a group of samples: sample i is in group i mod (N / size)."""

    def __init__(self, group_size, num_channels=1):
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def forward(self, x):
        n, c, h, w = x.shape
        group = n if self.group_size is None else min(self.group_size, n)
        if n % group != 0:
            raise ValueError(f"a batch of {n} does not divide into minibatch-stddev groups of {group}")
        features = self.num_channels
        y = x.reshape(group, -1, features, c // features, h, w)  # [G, n, F, c, H, W]
        y = (y - y.mean(dim=0)).square().mean(dim=0)  # [n, F, c, H, W]
        y = (y + 1e-8).sqrt().mean(dim=[2, 3, 4])  # [n, F]
        return torch.cat([x, y.reshape(-1, features, 1, 1).repeat(group, 1, h, w)], dim=1)


class DiscriminatorEpilogue(_Module):
    """The last layers of the discriminator, at the base, in full precision."""

    def __init__(
        self,
        in_channels,
        cmap_dim,
        resolution,
        img_channels,
        architecture="resnet",
        mbstd_group_size=4,
        mbstd_num_channels=1,
        activation="lrelu",
        conv_clamp=None,
    ):
        super().__init__()
        _check_architecture(architecture)
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

    def forward(self, x, img, cmap, force_fp32=False):
        dtype = _full_dtype(self.out.weight)
        x = x.to(dtype=dtype, memory_format=torch.contiguous_format)
        if self.architecture == "skip":
            x = x + self.fromrgb(img.to(dtype))
        if self.mbstd is not None:
            x = self.mbstd(x)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if cmap is not None and self.cmap_dim > 0:
            x = (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x


class Discriminator(_Module):
    """Images and labels to realness: [N, img_channels, H, W], [N, c_dim] -> logits [N, 1] float32."""

    def __init__(
        self,
        c_dim,
        img_resolution,
        img_channels,
        architecture="resnet",
        channel_base=32768,
        channel_max=512,
        num_fp16_res=0,
        conv_clamp=None,
        cmap_dim=None,
        block_kwargs=None,
        mapping_kwargs=None,
        epilogue_kwargs=None,
    ):
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
        common = {"img_channels": img_channels, "architecture": architecture, "conv_clamp": conv_clamp}
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
            base_channels, cmap_dim=cmap_dim, resolution=levels[4], **(epilogue_kwargs or {}), **common
        )

    def forward(self, img, c=None, update_emas=False, force_fp32=False):
        """update_emas makes no difference: there are no moving averages in here."""
        x = None
        for level in self.block_resolutions:
            x, img = getattr(self, f"b{level}")(x, img, force_fp32=force_fp32)
        cmap = self.mapping(None, c) if self.c_dim > 0 else None
        return self.b4(x, img, cmap)


class AugmentPipe(_Module):
    """The augmentation that the networks were trained with: its overall probability `p` and its options."""

    def __init__(self, **options):
        super().__init__()
        self.__dict__.update(options)
        self.register_buffer("p", torch.ones([]))

    def forward(self, images, debug_percentile=None):
        raise NotImplementedError(
            "this file keeps p and the options of the augmentation, not the transforms: "
            "train with the program that wrote it, stylegan2-ada-trainer, or with an augmentation of your own"
        )


def height_width(resolution):
    """Height and width in pixels of a resolution, which is the side of a square or [height, width]."""
    return (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)


def _check_architecture(architecture):
    if architecture not in ("orig", "skip", "resnet"):
        raise ValueError(f"architecture must be orig, skip or resnet, not {architecture!r}")


def _levels(img_resolution):
    """{name: resolution} of the levels, from the base, which is called 4, to the image."""
    height, width = base = height_width(img_resolution)
    if height == width and height >= 8 and height & (height - 1) == 0:
        return {2**i: 2**i for i in range(2, height.bit_length())}
    num_doublings = 0
    while base[0] % 2 == base[1] % 2 == 0 and min(base) >= 8:
        base, num_doublings = (base[0] // 2, base[1] // 2), num_doublings + 1
    if num_doublings == 0 or base[0] * base[1] > 256:
        raise ValueError(f"no network can be built for img_resolution {[height, width]}")
    return {4 * 2**i: [base[0] * 2**i, base[1] * 2**i] for i in range(num_doublings + 1)}


def _nominal_resolution(resolution):
    """The side of the square of a power of two that is nearest in area: it sets the number of channels."""
    height, width = height_width(resolution)
    return int(2 ** ((height * width - 1).bit_length() // 2))


def _channels(nominal_resolution, channel_base, channel_max):
    return min(channel_base // nominal_resolution, channel_max)


def _first_half_level(top, num_fp16_res):
    """The lowest level that computes in half precision; the base never does. Higher than the top: none does."""
    if num_fp16_res == 0:
        return top + 1
    return max(2 ** (top.bit_length() - num_fp16_res), 8)
