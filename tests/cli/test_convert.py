from __future__ import annotations

import builtins
import dataclasses
import errno
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tiny_snapshot import pictures, tiny_snapshot

from gan import models
from gan.cli import main
from gan.models import Snapshot
from gan.models.formats import onnx_file, port, safetensors_file
from gan.networks import Discriminator

FORMATS = ["pkl", "pt", "safetensors"]  # that can be read again
UNUSUAL: dict[str, Any] = {"c_dim": 3, "size": [8, 12], "channels": 4, "architecture": "resnet"}


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(name: str, **options: Any) -> Snapshot:
    """A source `name`.pkl."""
    snapshot = tiny_snapshot(**options)
    models.save(
        f"{name}.pkl",
        G=snapshot.G,
        D=snapshot.D,
        G_ema=snapshot.G_ema,
        training_set_kwargs=snapshot.training_set_kwargs,
    )
    return snapshot


def assert_equal(actual: Snapshot, expected: Snapshot) -> None:
    for name in ("G", "D", "G_ema"):
        theirs, ours = getattr(actual, name).state_dict(), getattr(expected, name).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    for psi in (0.5, 1.0):
        assert torch.equal(pictures(actual.G_ema, psi), pictures(expected.G_ema, psi))
    images = pictures(expected.G)
    c = torch.zeros([len(images), actual.D.c_dim])  # type: ignore[union-attr]
    assert torch.equal(actual.D(images, c, force_fp32=True), expected.D(images, c, force_fp32=True))  # type: ignore[misc]


@pytest.mark.parametrize("there", FORMATS)
@pytest.mark.parametrize("again", FORMATS)
def test_every_format_becomes_every_other_and_a_snapshot_again(there: str, again: str, here: Path) -> None:
    source = save("a")
    for step, (src, dst) in enumerate([("a.pkl", f"b.{there}"), (f"b.{there}", f"c.{again}"), (f"c.{again}", "d.pkl")]):
        result = convert(src, dst)
        assert result.exit_code == 0, result.output
        assert "Pictures: no difference at all" in result.output, step
        assert "Scores of D: no difference at all" in result.output
        assert f"Wrote {dst}: 0." in result.output
    assert_equal(models.load("d.pkl"), source)


def test_labels_alpha_and_odd_sizes_are_carried(here: Path) -> None:
    source = save("a", **UNUSUAL)
    assert convert("a.pkl", "b.safetensors").exit_code == 0
    assert convert("b.safetensors", "c.pkl").exit_code == 0
    assert_equal(models.load("c.pkl"), source)
    assert models.load("c.pkl").training_set_kwargs == {"class_names": ["a", "b", "c"]}


def test_what_the_port_cannot_carry_is_refused(here: Path) -> None:
    save("a", **UNUSUAL)
    result = convert("a.pkl", "b.pt")
    assert result.exit_code == 1
    assert "error: a.pkl: the layout of the PyTorch port cannot carry it" in result.output
    assert [path.name for path in here.iterdir()] == ["a.pkl"]


def test_the_augmentation_is_carried(here: Path) -> None:
    safetensors_file.write(Path("a.safetensors"), tiny_snapshot())
    for src, dst in [("a.safetensors", "b.pkl"), ("b.pkl", "c.pt"), ("c.pt", "d.safetensors")]:
        assert convert(src, dst).exit_code == 0
        assert models.load(dst).augment_p == 0.25


@pytest.mark.parametrize("format", FORMATS)
def test_only_ema_and_fp16_are_small(format: str, here: Path) -> None:
    source = save("a", size=16, channel_base=1024, channel_max=64)
    sizes = {}
    for name, options in {
        "all": [],
        "half": ["--fp16"],
        "ema": ["--only-ema"],
        "both": ["--only-ema", "--fp16"],
    }.items():
        result = convert("a.pkl", f"{name}.{format}", *options)
        assert result.exit_code == 0, result.output
        sizes[name] = Path(f"{name}.{format}").stat().st_size
        if "--fp16" in options:
            assert "Pictures: largest difference" in result.output
            assert "of 255 gray levels" in result.output
    text = 40_000 if format == "pkl" else 0  # of the embedded classes
    assert sizes["half"] - text < 0.56 * (sizes["all"] - text)
    assert sizes["both"] - text < 0.56 * (sizes["ema"] - text)
    assert sizes["ema"] < 0.7 * sizes["all"]
    for name in ("ema", "both"):
        opened = models.load(f"{name}.{format}")
        assert opened.D is None
        assert (opened.G is None) or format == "pt"
        assert opened.G_ema is not None
        assert all(tensor.dtype == torch.float32 for tensor in opened.G_ema.state_dict().values())
        difference = (pictures(opened.G_ema) - pictures(source.G_ema)).abs().max()
        assert difference == 0 if name == "ema" else 0 < difference < 0.05


def test_a_clamp_that_the_port_lacks_is_told_by_the_difference(here: Path) -> None:
    save("a", conv_clamp=0.5)
    result = convert("a.pkl", "b.pt")
    assert result.exit_code == 0, result.output
    assert "Note: the clamp of activations (conv_clamp) is not stored" in result.output
    assert "Pictures: largest difference" in result.output


def test_what_is_beside_a_safetensors_is_for_everyone(here: Path) -> None:
    save("a", **UNUSUAL)
    convert("a.pkl", "b.safetensors", "--only-ema", "--fp16")
    assert sorted(path.name for path in here.iterdir()) == ["a.pkl", "b.json", "b.safetensors"]
    config = json.loads(Path("b.json").read_text(encoding="utf-8"))
    assert list(config["networks"]) == ["G_ema"]
    assert config["networks"]["G_ema"]["kwargs"]["img_resolution"] == [8, 12]
    assert config["training_set_kwargs"]["class_names"] == ["a", "b", "c"]
    assert config["fp16"] is True
    Path("b.json").unlink()
    assert models.load("b.safetensors").G_ema is not None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "SRC DST: are two files, not 0"),
        (["a.pkl"], "SRC DST: are two files, not 1"),
        (["a.pkl", "b.pkl", "c.pkl"], "SRC DST: are two files, not 3"),
        (["a.pkl", "b.pt", "--only_ema"], "--only_ema: no such option; did you mean --only-ema?"),
        (["a.pkl", "b.onnx", "--noise", "none"], "--noise none: "),
        (["a.pkl", "b.pt", "--noise", "input"], "--noise: only an .onnx has a choice of noise; leave it out"),
        (["a.pkl", "b.onnx", "--fp16"], "--fp16: an .onnx holds float32; a small file is a .safetensors"),
        (["a.pkl", "b.npz"], "b.npz: the name must end in its format, one of .pkl, .pt, .pth, .safetensors, .onnx"),
        (["a.pkl", "a.pkl", "--force"], "a.pkl: is the file to be converted; name another one"),
        (["a.pkl", "there.pt"], "there.pt: is there already; name another file, or give --force to replace it"),
        (["a.pkl", "there.safetensors"], "there.json: is there already"),
        (["a.pkl", "folder"], "folder: is a folder; name a file in it, such as folder/a.safetensors"),
        (["missing.pkl", "b.pkl"], "missing.pkl: cannot be read"),
        (["there.pt", "b.pkl"], "there.pt: "),
        (["a.pkl", "there.pt/b.pkl"], "there.pt/b.pkl: a part of this path is a file"),
        (["a.pkl", "there.pt/b.safetensors"], "there.pt/b.safetensors: a part of this path is a file"),
        (["there.pt", "new/folder/b.pkl"], "there.pt: "),
        (["labels.pkl", "new/folder/b.pt"], "labels.pkl: the layout of the PyTorch port cannot carry it"),
    ],
)
def test_a_bad_request_is_one_clear_line(arguments: list[str], problem: str, here: Path) -> None:
    save("a")
    save("labels", c_dim=2)
    Path("folder").mkdir()
    for name in ("there.pt", "there.json"):
        Path(name).write_text("something else")
    before = sorted(here.rglob("*"))
    result = convert(*arguments)
    assert result.exit_code in (1, 2)
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {problem}")
    assert "Traceback" not in result.output
    assert sorted(here.rglob("*")) == before
    assert Path("there.pt").read_text() == "something else"


def test_all_problems_are_told_at_once(here: Path) -> None:
    Path("b.onnx").write_text("something else")
    result = convert("a.pkl", "b.onnx", "--fp16")
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 2


def test_force_replaces(here: Path) -> None:
    source = save("a")
    Path("b.safetensors").write_text("old")
    Path("b.json").write_text("old")
    assert convert("a.pkl", "b.safetensors", "--force").exit_code == 0
    assert_equal(models.load("b.safetensors"), source)
    assert json.loads(Path("b.json").read_text())["version"] == 1


def test_a_library_that_is_not_there_is_named_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = convert("missing.pkl", "b.onnx")
    assert result.exit_code == 2
    assert "b.onnx: .onnx files need onnx and onnxscript and onnxruntime" in result.output
    assert "pip install onnx onnxscript onnxruntime" in result.output


def test_a_source_without_a_generator_has_nothing_to_share(here: Path) -> None:
    models.save("a.pkl", G=None, D=tiny_snapshot().D, G_ema=None, training_set_kwargs={})
    for arguments in (["b.pkl", "--only-ema"], ["b.onnx"]):
        result = convert("a.pkl", *arguments)
        assert result.exit_code == 1
        assert "error: a.pkl: holds no generator" in result.output
    result = convert("a.pkl", "b.pkl")
    assert "Scores of D: no difference at all" in result.output
    assert "Pictures" not in result.output


def test_a_source_with_g_alone_gives_that(here: Path) -> None:
    G = tiny_snapshot().G
    models.save("a.pkl", G=G, D=None, G_ema=None, training_set_kwargs={})
    result = convert("a.pkl", "b.pkl", "--only-ema")
    assert "Note: there is no G_ema in it, so G is taken for it" in result.output
    assert torch.equal(pictures(models.load("b.pkl").G_ema), pictures(G))


def test_a_broken_source_is_told_as_one(here: Path) -> None:
    G = tiny_snapshot().G
    assert G is not None
    G.synthesis.b4.const[0] = float("nan")
    models.save("a.pkl", G=G, D=None, G_ema=None, training_set_kwargs={})
    result = convert("a.pkl", "b.pkl")
    assert result.exit_code == 1
    assert "error: a.pkl: G.synthesis.b4.const holds NaN or infinity" in result.output


def lie_in_a_tensor(snapshot: Snapshot, half: bool) -> Snapshot:
    assert snapshot.G is not None
    snapshot.G.synthesis.b4.const[0, 0, 0] += 0.01
    return snapshot


def lie_in_an_option(snapshot: Snapshot, half: bool) -> Snapshot:
    other = tiny_snapshot(activation="relu").G_ema
    assert snapshot.G_ema is not None
    assert other is not None
    other.load_state_dict(snapshot.G_ema.state_dict())
    return Snapshot(snapshot.G, snapshot.D, other, None)


def lose_a_network(snapshot: Snapshot, half: bool) -> Snapshot:
    return Snapshot(snapshot.G, None, snapshot.G_ema, None)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (lie_in_a_tensor, "G.synthesis.b4.const is another tensor in it"),
        (lie_in_an_option, "opened again, its G_ema makes other pictures (largest difference"),
        (lose_a_network, "D is not in it"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--fp16"]])
def test_a_file_that_opens_as_something_else_is_not_kept(
    lie: Any, words: str, options: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("a")
    Path("b.safetensors").write_text("old")
    before = sorted(here.iterdir())
    write = safetensors_file.write
    monkeypatch.setattr(
        safetensors_file, "write", lambda path, snapshot, half: write(path, lie(models.load("a.pkl"), half), half)
    )
    result = convert("a.pkl", "b.safetensors", "--force", *options)
    assert result.exit_code == 1
    assert f"error: b.safetensors: nothing was written, as {words}" in result.output
    assert sorted(here.iterdir()) == before
    assert Path("b.safetensors").read_text() == "old"


def test_a_file_that_does_not_open_is_not_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("a")
    monkeypatch.setattr(port, "write", lambda path, snapshot, half: path.write_bytes(b"PK") and [])
    result = convert("a.pkl", "b.pt")
    assert result.exit_code == 1
    assert "error: b.pt: nothing was written, as it is a zip file that is cut short or damaged" in result.output
    assert ".tmp" not in result.output
    assert [path.name for path in here.iterdir()] == ["a.pkl"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_one_clear_line(format: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("a")

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = builtins.open

    def fill(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Full(file, mode) if mode == "wb" else opened(file, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", fill)
        patch.setattr(torch, "save", lambda content, path: fill(path, "wb").write(b""))
        result = convert("a.pkl", f"new/b.{format}")
    assert result.exit_code == 1
    assert f"error: new/b.{format}: no space left on the device" in result.output
    assert [path.name for path in here.rglob("*")] == ["a.pkl"]


@pytest.mark.parametrize("path", ["/home/me/My cats.zip", "/home/me/My cats.zip/", "C:\\Users\\me\\My cats.zip"])
def test_what_is_shared_does_not_tell_where_the_data_were(path: str, here: Path) -> None:
    snapshot = tiny_snapshot()
    kwargs = {"path": path, "class_names": ["a"]}
    models.save("a.pkl", G=snapshot.G, D=None, G_ema=snapshot.G_ema, training_set_kwargs=kwargs)
    for dst in ("b.pkl", "b.safetensors"):
        assert convert("a.pkl", dst, "--only-ema").exit_code == 0
        assert models.load(dst).training_set_kwargs == {"path": "My cats.zip", "class_names": ["a"]}
        assert b"me" not in Path("b.json").read_bytes().split() if Path("b.json").exists() else True
        assert b"Users" not in Path(dst).read_bytes()
        assert b"home/me" not in Path(dst).read_bytes()
    assert convert("a.pkl", "c.pkl").exit_code == 0
    assert models.load("c.pkl").training_set_kwargs == kwargs


def test_what_a_file_says_is_printed_as_text(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    G = tiny_snapshot().G
    kwargs = {"\x1b]0;x\x07\nWrote \ud800" + "x" * 5000: float("nan")}
    models.save("a.pkl", G=G, D=None, G_ema=None, training_set_kwargs=kwargs)
    result = convert("a.pkl", "b.safetensors")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert all(line.isprintable() and len(line) < 500 for line in lines)
    words = ["Read", "Comparing", "Note", "Pictures", "Wrote"]
    assert [line.split(":")[0].split()[0] for line in lines] == words
    noted = dataclasses.replace(models.load("a.pkl"), training_set_kwargs={}, notes=["\x1b\nWrote \ud800" + "x" * 5000])
    monkeypatch.setattr(models, "load", lambda *_, **__: noted)
    lines = convert("a.pkl", "b.safetensors", "--force").output.splitlines()
    assert [line.split(":")[0].split()[0] for line in lines] == words
    assert all(line.isprintable() and len(line) < 1100 for line in lines)


@pytest.mark.parametrize(
    ("class_names", "told"), [(["x", "y"], ["x", "y"]), (5, []), ("ab", []), ([1, 2], []), (["x"], [])]
)
def test_only_sound_class_names_go_into_an_onnx(
    class_names: object, told: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, G: object, noise_input: bool, names: Sequence[str]) -> None:
        raise ValueError(f"{list(names)} {noise_input}")

    kwargs = {"class_names": class_names}
    models.save("a.pkl", G=tiny_snapshot(c_dim=2).G, D=None, G_ema=None, training_set_kwargs=kwargs)
    monkeypatch.setattr(onnx_file, "write", write)
    for noise in ("const", "input"):
        result = convert("a.pkl", "b.onnx", "--noise", noise)
        assert f"error: b.onnx: {told} {noise == 'input'}" in result.output


def test_a_discriminator_of_any_group_is_compared(here: Path) -> None:
    snapshot = tiny_snapshot()
    for group in (3, None, 1):
        D = Discriminator(0, 8, 3, channel_base=64, channel_max=8, epilogue_kwargs={"mbstd_group_size": group})
        models.save("a.pkl", G=snapshot.G, D=D.eval(), G_ema=None, training_set_kwargs={})
        result = convert("a.pkl", "b.safetensors", "--force")
        assert "Scores of D: no difference at all" in result.output


def test_numbers_too_large_for_float16_stay_what_they_are(here: Path) -> None:
    snapshot = tiny_snapshot()
    assert snapshot.G_ema is not None
    snapshot.G_ema.mapping.fc0.weight[0, 0] = 1e6
    models.save("a.pkl", G=None, D=None, G_ema=snapshot.G_ema, training_set_kwargs={})
    for dst in ("b.safetensors", "b.pt", "b.pkl"):
        assert convert("a.pkl", dst, "--fp16").exit_code == 0
        opened = models.load(dst).G_ema
        assert opened is not None
        assert opened.mapping.fc0.weight[0, 0] == 1e6
