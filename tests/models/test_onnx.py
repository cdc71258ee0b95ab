"""ONNX files, computed by onnxruntime. Two are exported for all tests, as that takes seconds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from tiny_snapshot import labels, pictures, tiny_snapshot

from gan import models
from gan.cli import main
from gan.models.formats import onnx_file


class Exported:
    """A file of G_ema, and G_ema."""

    def __init__(self, folder: Path, noise: str, **options: Any) -> None:
        self.snapshot = tiny_snapshot(**options)
        self.G: Any = self.snapshot.G_ema
        self.folder, self.path = folder, folder / "b.onnx"
        networks = {name: getattr(self.snapshot, name) for name in ("G", "D", "G_ema")}
        models.save(folder / "a.pkl", **networks, training_set_kwargs=self.snapshot.training_set_kwargs)
        arguments = ["convert", str(folder / "a.pkl"), str(self.path), "--noise", noise]
        self.result = CliRunner().invoke(main, arguments)
        assert self.result.exit_code == 0, self.result.output
        self.session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])

    def consts(self, number: int) -> torch.Tensor:
        """The stored noise as an input, `[number, num_noise]`."""
        noise = [const.flatten() for const in onnx_file.noise_layers(self.G).values()]
        return torch.cat(noise).expand(number, -1)

    def __call__(self, psi: float, seeds: range, noise: torch.Tensor | None = None) -> torch.Tensor:
        """As `pictures`."""
        draws = [torch.randn([1, self.G.z_dim], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        feed = {"z": torch.cat(draws), "truncation_psi": torch.tensor(float(psi))}
        if self.G.c_dim:
            feed["c"] = labels(self.G, seeds)
        if noise is not None:
            feed["noise"] = noise
        (images,) = self.session.run(None, {name: value.numpy() for name, value in feed.items()})
        return torch.from_numpy(images)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("plain")
        patch.chdir(folder)
        yield Exported(folder, "const")


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("unusual")
    return Exported(folder, "input", c_dim=2, size=[8, 12], channels=4, architecture="resnet")


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("psi", [0.5, 1.0])
def test_any_number_of_pictures_equals_ours(number: int, psi: float, plain: Exported) -> None:
    images = plain(psi, range(number))
    assert list(images.shape) == [number, 3, 8, 8]
    assert (images - pictures(plain.G, psi, range(number))).abs().max() < 1e-5
    assert images.std() > 0.1


@pytest.mark.parametrize("psi", [0.0, 0.5, 1.0])
def test_noise_as_an_input_equals_the_stored_one(psi: float, unusual: Exported) -> None:
    images = unusual(psi, range(3), unusual.consts(3))
    assert list(images.shape) == [3, 4, 8, 12]
    assert (images - pictures(unusual.G, psi)).abs().max() < 1e-5


def test_the_noise_of_each_picture_is_its_own_and_each_layer_s_in_its_place(unusual: Exported) -> None:
    meta = {entry.key: entry.value for entry in onnx.load(unusual.path).metadata_props}
    layers = json.loads(meta["noise_layers"])
    assert layers == [["b4.conv1", 4, 6], ["b8.conv0", 8, 12], ["b8.conv1", 8, 12]]
    noise, first = unusual.consts(3).clone(), 0
    for i, (name, height, width) in enumerate(layers):  # another noise in a layer of its own for each picture
        other = torch.randn([height, width], generator=torch.Generator().manual_seed(i))
        noise[i, first : first + height * width] = other.flatten()
        G = tiny_snapshot(c_dim=2, size=[8, 12], channels=4, architecture="resnet").G_ema
        assert G is not None
        G.synthesis.get_submodule(name).noise_const.copy_(other)
        expected = pictures(G)[i]
        assert (unusual(1, range(3), noise)[i] - expected).abs().max() < 1e-5
        assert (pictures(unusual.G)[i] - expected).abs().max() > 1e-3
        first += height * width
    assert first == noise.shape[1]


def test_what_the_files_take_and_say_of_themselves(plain: Exported, unusual: Exported) -> None:
    assert [(entry.name, entry.shape) for entry in plain.session.get_inputs()] == [
        ("z", ["N", 16]),
        ("truncation_psi", []),
    ]
    assert [(entry.name, entry.shape) for entry in unusual.session.get_inputs()] == [
        ("z", ["N", 16]),
        ("c", ["N", 2]),
        ("truncation_psi", []),
        ("noise", ["N", 4 * 6 + 2 * 8 * 12]),
    ]
    assert [(entry.name, entry.shape) for entry in unusual.session.get_outputs()] == [("img", ["N", 4, 8, 12])]
    meta = {entry.key: entry.value for entry in onnx.load(unusual.path).metadata_props}
    assert json.loads(meta["class_names"]) == ["a", "b"]
    assert (meta["img_height"], meta["img_width"], meta["img_channels"], meta["noise"]) == ("8", "12", "4", "input")
    assert "class_names" not in {entry.key for entry in onnx.load(plain.path).metadata_props}


def test_the_file_is_sound_alone_and_tells_nothing_of_this_machine(plain: Exported) -> None:
    model = onnx.load(plain.path)
    onnx.checker.check_model(model, full_check=True)
    assert sorted(path.name for path in plain.folder.iterdir()) == ["a.pkl", "b.onnx"]
    content = plain.path.read_bytes()
    assert not re.search(rb"\.py\b|site-packages|embedded_networks", content)
    tensors = sum(tensor.numel() * 4 for tensor in plain.G.state_dict().values())
    assert len(content) < tensors + 40_000


def test_the_exporter_is_not_heard(plain: Exported) -> None:
    lines = plain.result.output.splitlines()
    assert [line.split(":")[0].split()[0] for line in lines] == ["Read", "Exporting", "Comparing", "Pictures", "Wrote"]
    assert re.search(r"largest difference \d(\.\d)?e-0[67] where black is -1 and white 1", lines[3])


def test_a_file_that_computes_something_else_is_not_kept(
    plain: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(path: Path, *_: object) -> None:
        model = onnx.load(plain.path)
        for tensor in model.graph.initializer:
            if tensor.name.endswith("b8.conv1.weight"):
                tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * np.float32(0.9) + np.float32(0.01)).tobytes()
        onnx.save(model, path)

    monkeypatch.setattr(onnx_file, "write", lie)
    result = CliRunner().invoke(main, ["convert", str(plain.folder / "a.pkl"), str(tmp_path / "b.onnx")])
    assert result.exit_code == 1
    assert "b.onnx: nothing was written, as onnxruntime makes other pictures of it (largest difference" in result.output
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(onnx_file, "write", lambda path, *_: path.write_bytes(b"not ONNX"))
    result = CliRunner().invoke(main, ["convert", str(plain.folder / "a.pkl"), str(tmp_path / "b.onnx")])
    assert result.exit_code == 1
    assert "b.onnx: nothing was written, as onnxruntime cannot compute it: " in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("advice") from ValueError("no such\noperator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match=r"^PyTorch \S+ could not export it as ONNX \(no such operator\)"):
        onnx_file.write(tmp_path / "b.onnx", tiny_snapshot().G, noise_input=False)  # type: ignore[arg-type]


def test_noise_that_is_not_there_cannot_be_an_input(tmp_path: Path) -> None:
    G = tiny_snapshot(use_noise=False).G
    models.save(tmp_path / "a.pkl", G=G, D=None, G_ema=None, training_set_kwargs={})
    arguments = ["convert", str(tmp_path / "a.pkl"), str(tmp_path / "b.onnx"), "--noise", "input"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "its generator has no noise; leave out --noise input" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["a.pkl"]
