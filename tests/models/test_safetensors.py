from __future__ import annotations

import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_snapshot import pictures, tiny_snapshot

from gan import models
from gan.errors import GanError
from gan.models import Snapshot
from gan.models.formats import safetensors_file


def write(path: Path, **kwargs: Any) -> Path:
    snapshot = tiny_snapshot()
    safetensors_file.write(
        path, Snapshot(**{"G": None, "D": None, "G_ema": snapshot.G_ema, "augment_p": None, **kwargs})
    )
    return path


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and config of a file."""
    with safetensors.safe_open(path, framework="pt") as opened:
        config = json.loads(opened.metadata()["config"])
    return safetensors.torch.load_file(path), config


def rewrite(path: Path, tensors: dict[str, torch.Tensor], config: object) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    safetensors.torch.save_file(tensors, path, metadata={"config": text})
    return path


def test_other_programs_find_what_they_need(tmp_path: Path) -> None:
    snapshot = tiny_snapshot(c_dim=2)
    safetensors_file.write(tmp_path / "a.safetensors", snapshot)
    tensors, config = parts(tmp_path / "a.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"G", "D", "G_ema"}
    assert snapshot.G_ema is not None
    assert torch.equal(tensors["G_ema.synthesis.b4.const"], snapshot.G_ema.synthesis.b4.const)
    assert config["format"] == "stylegan2-ada-trainer"
    assert config["augment_p"] == 0.25
    assert config["networks"]["D"]["class"] == "Discriminator"
    assert config["networks"]["G_ema"]["kwargs"]["synthesis_kwargs"]["num_fp16_res"] == 4
    assert config == json.loads(safetensors_file.config_text(snapshot))


def test_only_matrices_are_halved(tmp_path: Path) -> None:
    safetensors_file.write(tmp_path / "a.safetensors", tiny_snapshot(), half=True)
    tensors, config = parts(tmp_path / "a.safetensors")
    assert tensors["G.synthesis.b8.conv0.weight"].dtype == torch.float16
    assert tensors["G.mapping.w_avg"].dtype == tensors["G.synthesis.b8.conv0.noise_strength"].dtype == torch.float32
    assert config["fp16"] is True


def test_every_tensor_begins_where_memory_maps_want_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.ones(1, 3).half(), "b": torch.ones(2), "c": torch.ones([]), "d": torch.ones(0, 3)}
    for length in range(1, 9):  # headers of all lengths
        safetensors_file._save(path, tensors, {"x": "x" * length})
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        assert size % 8 == 0
        assert all(header[name]["data_offsets"][0] % tensors[name].element_size() == 0 for name in tensors)
        opened = safetensors.torch.load_file(path)
        assert all(torch.equal(opened[name], tensors[name]) for name in tensors)


def test_one_network_in_two_places_is_written_twice(tmp_path: Path) -> None:
    G = tiny_snapshot().G
    opened = models.load(write(tmp_path / "a.safetensors", G=G, G_ema=G))
    assert opened.G is not None
    assert torch.equal(pictures(opened.G), pictures(opened.G_ema))


def test_what_json_cannot_say_is_left_out_and_told(tmp_path: Path) -> None:
    kwargs = {"shape": np.array([3, 8]), "path": "x", "odd": {1, 2}, "nan": float("nan")}
    snapshot = Snapshot(None, None, tiny_snapshot().G_ema, None, kwargs)
    notes = safetensors_file.write(tmp_path / "a.safetensors", snapshot)
    assert notes == ["training_set_kwargs: odd, nan left out, no plain values"]
    assert models.load(tmp_path / "a.safetensors").training_set_kwargs == {"shape": [3, 8], "path": "x"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_usual_precisions_open_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    tensors, config = parts(path)
    rewrite(path, {name: tensor.to(dtype) for name, tensor in tensors.items()}, config)
    opened = models.load(path).G_ema
    assert opened is not None
    assert {tensor.dtype for tensor in opened.state_dict().values()} == {torch.float32}
    assert (pictures(opened) - pictures(tiny_snapshot().G_ema)).abs().max() < 0.2


NESTED: dict[str, Any] = {}
for _ in range(500):
    NESTED = {"a": NESTED}
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
CHANGES = {
    "of another program": (lambda t, c: {"format": "pt"}, "it is another program's safetensors file with tensors such"),
    "no JSON": (lambda t, c: "{", "it is another program's safetensors file"),
    "too deep": (lambda t, c: DEEP, "it is another program's safetensors file"),
    "deep": (lambda t, c: c["networks"]["G_ema"]["kwargs"].update(NESTED), "it is another program's safetensors file"),
    "too long": (lambda t, c: {**c, "more": "x" * 2**23}, "it is another program's safetensors file"),
    "newer": (lambda t, c: {**c, "version": 2}, "it has version 2 of this format; update this program"),
    "no networks": (lambda t, c: {**c, "networks": []}, "its metadata is damaged"),
    "unknown network": (lambda t, c: {**c, "networks": {"E": c["networks"]["G_ema"]}}, "its metadata is damaged"),
    "another class": (
        lambda t, c: c["networks"]["G_ema"].update({"class": "Discriminator"}),
        "its metadata is damaged",
    ),
    "bad p": (lambda t, c: {**c, "augment_p": "much"}, "its augmentation probability is 'much'"),
    "huge p": (lambda t, c: {**c, "augment_p": 10**400}, "its augmentation probability is 1"),
    "unknown option": (
        lambda t, c: c["networks"]["G_ema"]["kwargs"].update(x=1),
        "it cannot be built from its options",
    ),
    "huge": (lambda t, c: c["networks"]["G_ema"]["kwargs"].update(w_dim=10**12), "its option w_dim is too large"),
    "large": (lambda t, c: c["networks"]["G_ema"]["kwargs"].update(w_dim=10**6), "its tensors do not fit"),
    "infinite": (lambda t, c: c["networks"]["G_ema"]["kwargs"].update(w_dim=float("inf")), "it is another program's"),
    "missing tensor": (lambda t, c: [c, t.pop("G_ema.mapping.w_avg")][0], "'mapping.w_avg' is missing"),
    "extra tensor": (lambda t, c: t.update({"G_ema.x": torch.zeros(1)}), "'x' has no place"),
    "stray tensor": (lambda t, c: t.update(x=torch.zeros(1)), "its tensor 'x' belongs to none of its networks"),
    "whole numbers": (
        lambda t, c: t.update({"G_ema.x": torch.zeros(1, dtype=torch.int32)}),
        "'G_ema.x' is I32, not one of F32",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, words = CHANGES[name]
    path = write(tmp_path / "a.safetensors")
    tensors, config = parts(path)
    rewrite(path, tensors, change(tensors, config) or config)
    with pytest.raises(GanError) as caught:
        models.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**39) + b"{",
        struct.pack("<Q", 2**23) + b"{",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 3) + b"{}}" + b"0" * 8,
    ],
)
def test_what_only_begins_like_one_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(GanError, match=r"a\.safetensors: it"):
        models.load(tmp_path / "a.safetensors")


def test_a_size_beyond_all_numbers_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    header = {
        "__metadata__": {"config": json.dumps(parts(path)[1])},
        "G_ema.x": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(GanError, match=r"its tensor 'G_ema\.x' is larger than any that is known"):
        models.load(path)


def test_a_header_is_read_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.safetensors")
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    monkeypatch.setattr(safetensors_file, "_MAX_HEADER", size)
    assert models.load(path).G_ema is not None
    monkeypatch.setattr(safetensors_file, "_MAX_HEADER", size - 1)
    with pytest.raises(GanError, match="its header is too large"):
        models.load(path)


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    valid = write(tmp_path / "a.safetensors").read_bytes()
    header = 8 + int.from_bytes(valid[:8], "little")
    path, errors, rng = tmp_path / "b.safetensors", [], random.Random(0)
    for i in range(250):
        content = bytearray(valid)
        for _ in range(rng.choice([1, 1, 2, 8])):
            content[rng.randrange(header)] = rng.choice([*b'0129{}[]",:-.eE\\', 0, 255, rng.randrange(256)])
        path.write_bytes(content[: rng.randrange(len(content))] if i % 4 == 0 else content)
        try:
            models.load(path)
        except GanError as error:
            errors.append(str(error))
    assert len(errors) > 120
    assert all(len(error.splitlines()) == 1 and error.startswith(f"{path}: ") for error in errors)


def test_the_library_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(GanError, match="pip install safetensors"):
        models.load(path)
