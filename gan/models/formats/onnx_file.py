"""ONNX files: a generator for programs without PyTorch.

Inputs: `z` [N, z_dim], `c` [N, c_dim] if the network has labels, `truncation_psi` [], and with noise as an input
`noise` [N, num_noise]: the noise of all layers, one behind the other in the order that the metadata gives. Output:
`img` [N, C, H, W], about [-1, 1]. All are float32, and N is whatever is given.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gan.errors import one_line
from gan.models import embedded_networks
from gan.models.comparison import Images
from gan.networks import Generator

if TYPE_CHECKING:
    import onnx

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")  # written with the first two, checked with the third
_OPSET = 18  # of ONNX's operators, of the end of 2022: what the exporter of PyTorch 2.11 begins with
_MAX_BYTES = 2**31 - 2**20  # a protobuf message, which such a file is, ends there


def write(path: Path, G: Generator, noise_input: bool, class_names: Sequence[str] = ()) -> None:
    """Write a generator, in float32, to `path`.

    Args:
        noise_input: the file takes the noise as an input; otherwise the stored noise is in it.
        class_names: of the labels, for the metadata.

    Raises ValueError if PyTorch cannot export it, or it is too large.
    """
    import onnx

    if sum(tensor.numel() * 4 for tensor in G.state_dict().values()) > _MAX_BYTES:
        raise ValueError("an .onnx holds 2 GB at most, and this network is larger; choose another format")
    try:
        with _silent():
            model = _export(G, noise_input)
            model.producer_name, model.producer_version = "stylegan2-ada-trainer", ""
            onnx.helper.set_model_props(model, _metadata(G, noise_input, class_names))
            onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the exporter fails in any way there is
        raise ValueError(f"PyTorch {torch.__version__} could not export it as ONNX ({_reason(error)})") from error
    path.write_bytes(model.SerializeToString())


def noise_layers(G: torch.nn.Module) -> dict[str, torch.Tensor]:
    """{name: noise_const [H, W]} of the layers that have noise, in the order of the input `noise`."""
    synthesis: Any = G.synthesis
    return {name: buffer for name, buffer in synthesis.named_buffers() if name.endswith(".noise_const")}


def images(path: Path, G: Generator) -> Images:
    """The images of a written file with the noise of G, computed by onnxruntime on the CPU.

    It and what it returns raise ValueError if onnxruntime cannot.
    """
    import onnxruntime

    consts = noise_layers(G).values()
    noise = torch.cat([const.flatten() for const in consts]) if consts else torch.zeros([0])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    with _understood():
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def compute(z: torch.Tensor, c: torch.Tensor, psi: float) -> torch.Tensor:
        values = {"z": z, "c": c, "truncation_psi": torch.tensor(psi), "noise": noise.expand(len(z), -1)}
        with _understood():
            feed = {entry.name: values[entry.name].float().numpy() for entry in session.get_inputs()}
            return torch.from_numpy(session.run(["img"], feed)[0])

    return compute


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime has errors of its own
        raise ValueError(f"onnxruntime cannot compute it: {one_line(error)}") from error


class _Exported(torch.nn.Module):
    """What is traced: named inputs to images."""

    def __init__(self, G: Any) -> None:
        super().__init__()
        self.G = G

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        psi = inputs.get("truncation_psi", 1)
        ws = self.G.mapping(inputs["z"], inputs.get("c"), truncation_psi=psi)
        noise = {}
        if "noise" in inputs:
            consts = noise_layers(self.G)
            parts = inputs["noise"].split([const.numel() for const in consts.values()], dim=1)
            for (name, const), part in zip(consts.items(), parts, strict=True):
                noise[name] = part.reshape(-1, 1, *const.shape)  # [N, 1, H, W]
        options = {"noise_mode": "const", "force_fp32": True}
        images: torch.Tensor = torch.func.functional_call(self.G.synthesis, noise, (ws,), options)
        return images


def _export(G: Any, noise_input: bool) -> onnx.ModelProto:
    plain = embedded_networks.Generator(*G._init_args, **G._init_kwargs)
    plain.load_state_dict(G.state_dict())
    inputs = {"z": torch.zeros([2, G.z_dim])}
    if G.c_dim > 0:
        inputs["c"] = torch.zeros([2, G.c_dim])
    if G.mapping.w_avg_beta is not None:
        inputs["truncation_psi"] = torch.tensor(0.5)
    consts = noise_layers(G)
    if noise_input and consts:
        inputs["noise"] = torch.zeros([2, sum(const.numel() for const in consts.values())])
    batch = torch.export.Dim("N")
    program: Any = torch.onnx.export(
        _Exported(plain.eval().requires_grad_(False)),
        kwargs={"inputs": inputs},
        dynamo=True,  # the older exporter is deprecated, and fails at padding images of any number
        opset_version=_OPSET,
        input_names=list(inputs),
        output_names=["img"],
        dynamic_shapes={"inputs": {name: {0: batch} if value.ndim else {} for name, value in inputs.items()}},
        verbose=False,
    )
    model = program.model_proto
    # What the exporter notes of each part is for its developers: lines of source, with the paths of this machine.
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del part.metadata_props[:]
    return model


def _metadata(G: Generator, noise_input: bool, class_names: Sequence[str]) -> dict[str, str]:
    height, width = G.img_size
    content: dict[str, object] = {
        "img": f"[N, {G.img_channels}, {height}, {width}], about -1 (black) to 1 (white)",
        "img_height": height,
        "img_width": width,
        "img_channels": G.img_channels,
        "z": f"[N, {G.z_dim}], normally distributed: mean 0, variance 1",
    }
    if G.c_dim > 0:
        content["c"] = f"[N, {G.c_dim}], a class is 1 in its place and 0 elsewhere"
        content["class_names"] = list(class_names)
    if G.mapping.w_avg_beta is not None:
        content["truncation_psi"] = "a number, 1 for the whole variety, less for safer pictures"
    content["noise"] = "input" if noise_input else "const"
    if noise_input:
        layers = [[name.removesuffix(".noise_const"), *const.shape] for name, const in noise_layers(G).items()]
        content["noise_layers"] = layers  # of each its name, height and width
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in content.items()}


def _reason(error: BaseException) -> str:
    """What went wrong in the end: the exporter wraps it in advice for its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter speaks of its own affairs."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
