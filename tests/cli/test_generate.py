from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner, Result

from gan import models
from gan.cli.generate import generate
from gan.networks import Discriminator, Generator
from torch_utils.ops import kernels


def run(*arguments: object) -> Result:
    return CliRunner().invoke(generate, [str(a) for a in arguments])


def save_network(path: Path, c_dim: int = 0, channels: int = 3, **training_set_kwargs: object) -> Generator:
    torch.manual_seed(0)
    small = {"channel_base": 64, "channel_max": 8, "num_fp16_res": 4, "conv_clamp": 256}
    G = Generator(16, c_dim, 16, 16, channels, mapping_kwargs={"num_layers": 2}, synthesis_kwargs=small).eval()
    G.mapping.w_avg.normal_()
    D = Discriminator(c_dim, 16, channels, channel_base=64, channel_max=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    models.save(path, G=G, D=D, G_ema=G, training_set_kwargs=training_set_kwargs)
    return G.requires_grad_(False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(PIL.Image.open(path)).astype(int)


def test_seeds_give_the_pictures_that_their_latents_define(here: Path) -> None:
    G = save_network(here / "net.pkl")
    result = run("--network", "net.pkl", "--seeds", "0-2,7", "--trunc", 0.7, "--batch", 3, "--device", "cpu")
    assert result.exit_code == 0, result.output
    names = sorted(p.name for p in (here / "out").iterdir())
    assert names == ["grid.png", "seed0000.png", "seed0001.png", "seed0002.png", "seed0007.png"]
    z = torch.from_numpy(np.random.RandomState(7).randn(1, 16))
    image = G(z, truncation_psi=0.7, noise_mode="const", force_fp32=True)[0]
    expected = (image * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(pixels(here / "out/seed0007.png") - expected).max() <= 1  # batches of another size round otherwise
    grid = pixels(here / "out/grid.png")
    assert grid.shape == (32, 32, 3)
    assert np.array_equal(grid[16:, 16:], pixels(here / "out/seed0007.png"))


def test_the_newest_snapshot_is_the_default(here: Path) -> None:
    save_network(here / "training-runs/00000-a/network-snapshot-000900.pkl")
    save_network(here / "training-runs/00001-a/network-snapshot-000100.pkl")
    save_network(here / "training-runs/00001-a/network-snapshot-000200.pkl")
    result = run("--seeds", "3")
    assert result.exit_code == 0, result.output
    assert "00001-a/network-snapshot-000200.pkl" in result.output


def test_a_name_is_looked_up_below_the_base(here: Path) -> None:
    save_network(here / "zoo" / "ffhq-res256-mirror-paper256-noaug.pkl")
    result = run("--network", "ffhq256", "--pretrained-base", "zoo", "--seeds", 0, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "pictures of ffhq256" in result.output
    result = run("--network", "ffhq512", "--pretrained-base", "zoo", "--seeds", 0)
    assert result.exit_code == 2
    assert "error: --network ffhq512: zoo/transfer-learning-source-nets/ffhq-res512" in result.output
    assert "no such file" in result.output


def test_what_had_to_be_assumed_of_a_file_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_network(here / "net.pkl")
    snapshot = dataclasses.replace(models.load(here / "net.pkl"), notes=["w_avg was estimated"])
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: snapshot)
    assert "net.pkl: w_avg was estimated\n" in run("--network", "net.pkl", "--seeds", 0).output


def test_classes_change_the_picture_and_are_asked_for(here: Path) -> None:
    save_network(here / "net.pkl", c_dim=3, channels=1)
    result = run("--network", "net.pkl", "--seeds", 0)
    assert result.exit_code == 2
    assert "--class: is missing; net.pkl has classes 0 to 2" in result.output
    assert run("--network", "net.pkl", "--seeds", 0, "--class", 3).exit_code == 2
    for chosen in (0, 1):
        assert run("--network", "net.pkl", "--seeds", 0, "--class", chosen, "--outdir", f"c{chosen}").exit_code == 0
    assert PIL.Image.open(here / "c0/seed0000.png").mode == "L"
    assert not np.array_equal(pixels(here / "c0/seed0000.png"), pixels(here / "c1/seed0000.png"))


def labels_of(result: Result, here: Path, G: Generator) -> list[list[float]]:
    """The labels that give the picture of seed 0 in out/: multiples of each other do."""
    assert result.exit_code == 0, result.output
    z = torch.from_numpy(np.random.RandomState(0).randn(1, G.z_dim))
    found = []
    for numbers in itertools.product([0.0, 1.0, 0.25], repeat=G.c_dim):
        image = G(z, torch.tensor([numbers]), force_fp32=True)[0]
        expected = (image * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy().astype(int)
        if np.array_equal(pixels(here / "out/seed0000.png"), expected):
            found.append(list(numbers))
    return found


@pytest.mark.parametrize(
    ("kind", "names", "arguments", "label"),
    [
        ("classes", ["ant", "bee"], ["--class", "bee"], [0, 1]),
        ("classes", ["ant", "bee"], ["--class", 0], [1, 0]),
        ("classes", ["1", "2"], ["--class", 1], [1, 0]),
        ("classes", None, ["--class", 1], [0, 1]),
        (None, None, ["--class", 1], [0, 1]),
        ("classes", ["ant", "bee"], ["--label", "0.25,1"], [0.25, 1]),
        ("multi-hot", ["ant", "bee"], ["--class", "bee", "--class", "ant"], [1, 1]),
        ("multi-hot", None, ["--label", "0,0"], [0, 0]),
        ("vectors", None, ["--label", "0,0.25"], [0, 0.25]),
    ],
)
def test_what_the_pictures_show_is_chosen_by_class_or_label(
    kind: str | None, names: list[str] | None, arguments: list[object], label: list[float], here: Path
) -> None:
    kwargs = {"label_kind": kind, "class_names": names}
    G = save_network(here / "net.pkl", 2, **{key: value for key, value in kwargs.items() if value})
    result = run("--network", "net.pkl", "--seeds", 0, "--device", "cpu", *arguments)
    found = labels_of(result, here, G)
    assert label in found
    assert len(found) <= 2


@pytest.mark.parametrize(
    ("kind", "names", "arguments", "problem"),
    [
        ("classes", ["ant", "bee"], [], "--class: is missing; net.pkl has the classes 0 ant, 1 bee"),
        ("classes", ["ant", "bee"], ["--class", "Ants"], "--class Ants: did you mean ant? net.pkl has the classes 0 a"),
        ("classes", ["ant", "bee"], ["--class", 2], "--class 2: is not one of them; net.pkl has the classes 0 ant"),
        ("classes", ["1", "2"], ["--class", 0], "--class 0: is not one of them; net.pkl has the classes 1, 2"),
        ("classes", None, ["--class", "ant"], "--class ant: is not one of them; net.pkl has classes 0 to 1"),
        ("classes", None, ["--class", -1], "--class -1: is not one of them; net.pkl has classes 0 to 1"),
        ("classes", None, ["--class", 0, "--class", 1], "--class: was given 2 times; a picture of net.pkl has one"),
        ("classes", None, ["--class", 0, "--label", "0,1"], "--class and --label: both say what the pictures show"),
        ("vectors", None, ["--class", 0], "--class 0: net.pkl has vectors for labels, no classes; give --label 0,0"),
        ("vectors", None, [], "--label: is missing; net.pkl takes 2 numbers, like --label 0,0"),
        ("vectors", None, ["--label", "1"], "--label: has 1 number; net.pkl takes 2"),
        ("vectors", None, ["--label", "1,nan"], "--label 1,nan: is not a list of numbers; write it like 0.5,1,0"),
    ],
)
def test_a_class_or_label_that_is_not_there_is_one_clear_line(
    kind: str, names: list[str] | None, arguments: list[object], problem: str, here: Path
) -> None:
    save_network(here / "net.pkl", 2, label_kind=kind, class_names=names or [])
    result = run("--network", "net.pkl", "--seeds", 0, *arguments)
    assert result.exit_code == 2
    assert [line for line in result.output.splitlines() if line.startswith(f"error: {problem}")], result.output
    assert len(result.output.splitlines()) == 1
    assert not (here / "out").exists()


def test_what_a_stranger_named_does_not_reach_the_terminal_as_it_is(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_network(here / "net.pkl", 2, class_names=["\x1b[31mred", "b\ne"])
    result = run("--network", "net.pkl", "--seeds", 0, "--class", "red")
    assert result.output == "error: --class red: is not one of them; net.pkl has the classes 0 ?[31mred, 1 b?e\n"
    snapshot = dataclasses.replace(models.load(here / "net.pkl"), notes=["w_avg\x1b[31m was estimated"])
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: snapshot)
    result = run("--network", "net.pkl", "--seeds", 0, "--class", 1, "--device", "cpu")
    assert result.output.startswith("net.pkl: w_avg?[31m was estimated\n")


def test_many_classes_are_not_all_listed(here: Path) -> None:
    save_network(here / "net.pkl", 30, class_names=[f"kind {i}" for i in range(30)])
    result = run("--network", "net.pkl", "--seeds", 0)
    assert "10 kind 10, 11 kind 11 and 18 more" in result.output
    save_network(here / "net.pkl", 30, label_kind="vectors")
    result = run("--network", "net.pkl", "--seeds", 0)
    assert "takes 30 numbers, like --label 0,0,..." in result.output


def test_a_projected_w_is_rendered(here: Path) -> None:
    G = save_network(here / "net.pkl")
    ws = G.mapping(torch.from_numpy(np.random.RandomState(5).randn(1, 16)), None)
    np.savez(here / "w.npz", w=ws.numpy())
    assert run("--network", "net.pkl", "--projected-w", "w.npz").exit_code == 0
    assert run("--network", "net.pkl", "--seeds", 5).exit_code == 0
    assert np.array_equal(pixels(here / "out/proj00.png"), pixels(here / "out/seed0005.png"))
    np.savez(here / "bad.npz", w=np.zeros([1, 3, 16]))
    result = run("--network", "net.pkl", "--projected-w", "bad.npz")
    assert result.exit_code == 2
    assert "w is [1, 3, 16], this network takes [N, 6, 16]" in result.output


def test_noise_modes_differ(here: Path) -> None:
    save_network(here / "net.pkl")
    for mode in ("const", "none", "random"):
        assert run("--network", "net.pkl", "--seeds", 0, "--noise-mode", mode, "--outdir", mode).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--seeds: is missing"),
        (["--seeds", "5-2"], "5-2 is not a range of seeds"),
        (["--seeds", "a"], "--seeds a: is not a list of numbers and ranges"),
        (["--seeds", "0", "--network", "missing.pkl"], "--network missing.pkl: cannot be read"),
        (["--seeds", "0", "--batch", "0"], "--batch 0: must be a whole number from 1 on"),
        (["--seeds", "0"], "training-runs: holds no snapshot yet"),
        (["--seeds", "0", "--class", "1", "--network", "net.pkl"], "--class 1: net.pkl was trained without classes"),
        (["--seeds", "0", "--label", "1", "--network", "net.pkl"], "--label: net.pkl was trained without classes"),
        (["--projected-w", "w.npz", "--class", "1", "--network", "net.pkl"], "leave out --class and --label"),
    ],
)
def test_a_bad_setting_is_one_clear_line(arguments: list[str], problem: str, here: Path) -> None:
    save_network(here / "net.pkl")
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert problem in result.output
    assert "Traceback" not in result.output
    assert not (here / "out").exists()


def test_an_outdir_that_is_a_file_is_named(here: Path) -> None:
    save_network(here / "net.pkl")
    (here / "out").write_text("in the way")
    result = run("--network", "net.pkl", "--seeds", 0)
    assert result.exit_code == 1
    assert "a part of this path is a file" in result.output


def test_kernels_that_cannot_be_had_are_a_must_before_anything_is_opened(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gan.cli.generate.opened", lambda *args: pytest.fail("opened"))
    result = run("--network", "net.pkl", "--seeds", 0, "--device", "cpu", "--ops", "cuda", "--batch", 0)
    assert result.exit_code == 2
    assert [line for line in result.output.splitlines() if line.startswith("error")] == [
        "error: --batch 0: must be a whole number from 1 on",
        "error: --ops cuda: is for NVIDIA GPUs, and the device is cpu; leave it out, or see python -m gan doctor",
    ]


@pytest.mark.parametrize("ops", ["auto", "ref"])
def test_ops_reach_the_kernels(ops: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(kernels, "prepare", lambda *args: asked.append(args))
    save_network(here / "net.pkl")
    result = run("--network", "net.pkl", "--seeds", 0, "--device", "cpu", "--ops", ops)
    assert result.exit_code == 0, result.output
    assert asked == [(torch.device("cpu"), ops)]
