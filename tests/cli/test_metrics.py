"""`gan metrics` as people type it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from click.testing import CliRunner, Result
from tiny import write_dataset

from gan import models
from gan.cli.metrics import metrics
from gan.config import DataInfo
from gan.data.dataset import ImageDataset
from gan.metric_names import INCEPTION, METRICS, VGG
from gan.metrics.measure import Measuring
from gan.networks import Discriminator, Generator
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training import run_folder

ROOT = Path(__file__).parents[2]
NAMES = [f"network-snapshot-{kimg:06d}.pkl" for kimg in (0, 4, 12)]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(metrics, ["--device", "cpu", *map(str, arguments)])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def errors(result: Result) -> list[str]:
    return [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]


def lines(run_dir: Path, metric: str = "swd") -> list[dict[str, Any]]:
    path = run_dir / f"metric-{metric}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(result: Result) -> list[float]:
    """The swd of each file of a call with --json."""
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["snapshots"]
    return [record["results"]["swd"] for file in found for record in file["measurements"] if record["metric"] == "swd"]


def save_network(path: Path, contrast: float = 1.0, c_dim: int = 0, size: int = 16) -> None:
    torch.manual_seed(0)
    small = {"channel_base": 64, "channel_max": 8}
    G = Generator(16, c_dim, 16, size, 3, mapping_kwargs={"num_layers": 1}, synthesis_kwargs=small).eval()
    with torch.no_grad():
        for name, parameter in G.named_parameters():
            if name.endswith("torgb.weight"):
                parameter.mul_(contrast)
    models.save(path, G=G, D=Discriminator(c_dim, size, 3, **small), G_ema=G, training_set_kwargs={})


def make_run(folder: Path, data: Path, cond: bool = False, **options: Any) -> Path:
    """The folder of a run as training leaves it, of networks that nobody has trained."""
    dataset = ImageDataset(data, use_labels=cond)
    info = DataInfo(str(data), "tiny", len(dataset), 16, 16, 3, dataset.label_dim)
    config = resolve(TrainOptions(data=str(data), device="cpu", cond=cond, **options), info)
    run_dir = run_folder.create(folder, config)
    for contrast, name in enumerate(NAMES):
        save_network(run_dir / name, 0.2 + contrast, dataset.label_dim)
    return run_dir


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; no detector is anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GAN_DETECTORS", raising=False)
    monkeypatch.delenv("GAN_PRETRAINED_BASE", raising=False)
    return tmp_path


@pytest.fixture
def run_dir(here: Path, tiny_dataset: Path) -> Path:
    return make_run(here / "training-runs", tiny_dataset)


@pytest.fixture
def unmeasurable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gan.cli.metrics_work.Measuring", lambda *args, **kwargs: pytest.fail("measured"))


def test_all_snapshots_of_the_newest_run_are_measured(run_dir: Path) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("Metrics:   swd, diversity (no detector here: python -m gan metrics --prefetch)\n")
    assert [line["snapshot_pkl"] for line in lines(run_dir)] == NAMES
    assert {(line["num_reals"], line["seed"], line["detector"]) for line in lines(run_dir)} == {(40, 0, None)}
    assert [line["nimg"] for line in lines(run_dir)] == [0, 4000, 12000]
    assert {line["snapshot_pkl"] for line in lines(run_dir, "diversity")} == set(NAMES)
    header, *rows, best, curves = result.stdout.splitlines()
    assert header.split() == ["swd", "diversity"]
    assert [row.split()[0] for row in rows] == NAMES
    found = [line["results"]["swd"] for line in lines(run_dir)]
    winner = found.index(min(found))
    assert rows[winner].split()[1] == f"{min(found):.4g}*"
    assert "".join(rows).count("*") == 1
    assert best == f"Best:      {NAMES[winner]} by swd {min(found):.4g} (network-snapshot-best.pkl)"
    assert os.path.samefile(run_dir / "network-snapshot-best.pkl", run_dir / NAMES[winner])
    assert Path(curves.removeprefix("Curves:    ")).resolve() == (run_dir / "metrics.png").resolve()
    with PIL.Image.open(run_dir / "metrics.png") as picture:
        picture.load()
        assert picture.width > picture.height


def test_what_is_there_already_is_not_measured_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(run_dir / NAMES[0], run_dir / NAMES[1], "--metrics", "swd")
    with monkeypatch.context() as unmeasurable:
        unmeasurable.setattr("gan.cli.metrics_work.Measuring", lambda *args, **kwargs: pytest.fail("measured"))
        again = run(run_dir / NAMES[0], run_dir / NAMES[1], "--metrics", "swd")
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert again.stderr == "2 of 2 files were measured before (--force: again)\n"
    more = run(run_dir / NAMES[0], run_dir / NAMES[1], "--metrics", "swd,diversity")
    assert [row.split()[:2] for row in more.stdout.splitlines()[1:3]] == [
        row.split()[:2] for row in first.stdout.splitlines()[1:3]
    ]
    assert "1 of 2 files were measured before" in run(run_dir / NAMES[1], run_dir / NAMES[2], "--metrics", "swd").stderr
    assert [line["snapshot_pkl"] for line in lines(run_dir)] == NAMES
    forced = run(run_dir / NAMES[0], "--metrics", "swd", "--force")
    assert forced.exit_code == 0, forced.output
    other = run(run_dir / NAMES[0], "--metrics", "swd", "--seed", 7)
    assert other.exit_code == 0, other.output
    old, *_, new, seeded = (line["results"] for line in lines(run_dir))
    assert old == new != seeded


def test_a_file_of_no_run_needs_data_and_is_only_shown(here: Path, tiny_dataset: Path) -> None:
    save_network(here / "net.pkl")
    result = run("net.pkl")
    assert result.exit_code == 2
    assert errors(result) == ["--data: is missing; net.pkl is in no run folder, so name the images to compare with"]
    Path("link.pkl").symlink_to("net.pkl")
    result = run("net.pkl", "link.pkl", "--data", tiny_dataset, "--json")
    (file,) = json.loads(result.stdout)["snapshots"]
    assert (file["network"], file["run_dir"]) == ("net.pkl", None)
    assert {record["metric"] for record in file["measurements"]} == {"swd", "diversity"}
    assert {path.name for path in here.iterdir()} <= {"net.pkl", "link.pkl", "cache"}


def test_several_files_are_compared_in_one_plot(run_dir: Path, tiny_dataset: Path) -> None:
    save_network(Path("net.pkl"))
    result = run("net.pkl", run_dir / NAMES[2], "--data", tiny_dataset, "--plot", "plots/all.png", "--metrics", "swd")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].startswith("net.pkl ")
    assert "Curves:    plots/all.png" in result.stdout
    with PIL.Image.open("plots/all.png") as picture:
        assert picture.format == "PNG"


def test_numbers_of_other_images_are_not_those_of_the_run(run_dir: Path, tiny_dataset: Path, here: Path) -> None:
    other = write_dataset(here / "other.zip", count=24)
    result = run(run_dir / NAMES[2], "--data", other, "--metrics", "swd", "--json")
    assert len(numbers(result)) == 1
    assert lines(run_dir) == []
    copied = shutil.copy(tiny_dataset, here / "moved.zip")
    options = run_dir / run_folder.OPTIONS_FILE
    options.write_text(options.read_text().replace(str(tiny_dataset), str(here / "gone.zip")))
    result = run(run_dir / NAMES[2], "--metrics", "swd")
    assert result.exit_code == 2
    assert errors(result) == [
        f"--data: {here / 'gone.zip'}, with the images of {run_dir}, is not there; name the dataset where it is now"
    ]
    assert run(run_dir / NAMES[2], "--metrics", "swd", "--data", copied).exit_code == 0
    assert [line["snapshot_pkl"] for line in lines(run_dir)] == [NAMES[2]]


def test_a_dataset_with_a_relative_path_may_be_another_one_elsewhere(
    here: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch, unmeasurable: None
) -> None:
    shutil.copy(tiny_dataset, "my.zip")
    run_dir = make_run(here / "runs", Path("my.zip"))
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (line,) = errors(run(run_dir, "--metrics", "swd"))
    assert line == (
        f"--data: my.zip (a path from where the run was started), with the images of {run_dir}, is not there; "
        "name the dataset where it is now"
    )
    write_dataset(elsewhere / "my.zip", count=24)
    (line,) = errors(run(run_dir, "--metrics", "swd"))
    assert line == (
        "--data: my.zip (a path from where the run was started) has other images (24 images, 16x16 RGB) than when "
        f"{run_dir} was started; name the dataset with --data, this one if it is meant"
    )


@pytest.mark.parametrize("link", [True, False])
def test_the_best_snapshot_is_the_snapshot_that_it_is(link: bool, run_dir: Path) -> None:
    best = run_dir / "network-snapshot-best.pkl"
    best.symlink_to(NAMES[1]) if link else shutil.copy2(run_dir / NAMES[1], best)
    assert run(best, run_dir / NAMES[1], "--metrics", "swd").exit_code == 0
    assert [line["snapshot_pkl"] for line in lines(run_dir)] == [NAMES[1]]


def test_labels_are_those_of_the_images(here: Path) -> None:
    data = write_dataset(here / "classes.zip", classes=3)
    run_dir = make_run(here / "runs", data, cond=True)
    inside = numbers(run(run_dir / NAMES[2], "--metrics", "swd", "--json"))
    shutil.copy(run_dir / NAMES[2], here / "net.pkl")
    assert numbers(run("net.pkl", "--data", data, "--metrics", "swd", "--json")) == inside


def test_a_file_that_fails_does_not_keep_the_others_from_being_measured(run_dir: Path) -> None:
    (run_dir / NAMES[0]).write_bytes(b"<html>")
    save_network(run_dir / NAMES[1], size=8)
    result = run(run_dir, "--metrics", "swd")
    assert result.exit_code == 1
    web, size = errors(result)
    assert web.endswith("it is a web page, not a model; the download went wrong, so fetch the file itself")
    assert size.startswith(f"{NAMES[1]}: makes 8x8 RGB")
    assert [line["snapshot_pkl"] for line in lines(run_dir)] == [NAMES[2]]


def test_a_missing_detector_is_one_line_and_the_rest_is_measured(run_dir: Path) -> None:
    result = run(run_dir / NAMES[0], "--metrics", "fid5k_full,swd,is50k,pr50k3")
    assert result.exit_code == 1
    inception, vgg = errors(result)
    assert inception.startswith(f"fid5k_full, is50k left out: {INCEPTION} is not here")
    assert vgg.startswith(f"pr50k3 left out: {VGG} is not here")
    assert "--prefetch" in vgg
    assert len(lines(run_dir)) == 1
    result = run(run_dir, "--metrics", "fid5k_full")
    assert (result.exit_code, len(errors(result)), result.stdout) == (1, 1, "")


def test_a_damaged_detector_is_as_good_as_none(run_dir: Path, here: Path) -> None:
    (here / INCEPTION).write_bytes(b"<html>")
    result = run(run_dir / NAMES[0], "--detectors", here)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"Metrics:   swd, diversity ({here / INCEPTION}: it is a web page")


def test_a_run_is_measured_by_its_own_metrics(here: Path, tiny_dataset: Path) -> None:
    run_dir = make_run(here / "runs", tiny_dataset, metrics="diversity")
    result = run(run_dir / NAMES[0])
    assert result.exit_code == 0
    assert [path.name for path in run_dir.glob("metric*")] == ["metric-diversity.jsonl"]  # a point is no curve
    assert "*" not in result.stdout


def test_one_of_several_numbers_is_the_best(run_dir: Path) -> None:
    assert "*" not in run(run_dir / NAMES[0], "--metrics", "swd").stdout


def test_what_was_typed_says_how_it_is_measured(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def noted(*args: object, **settings: Any) -> Measuring:
        told.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("gan.cli.metrics_work.Measuring", noted)
    assert run(run_dir / NAMES[0], "--batch", 5, "--seed", 3).exit_code == 130
    assert (told["images_at_once"], told["seed"], told["force_fp32"]) == (5, 3, True)


def test_interrupted_work_is_kept(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Measuring):
        def advance(self) -> None:
            if len(lines(run_dir)) == 1:
                raise KeyboardInterrupt
            super().advance()

    monkeypatch.setattr("gan.cli.metrics_work.Measuring", Interrupted)
    result = run(run_dir, "--metrics", "swd")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert [line["snapshot_pkl"] for line in lines(run_dir)] == [NAMES[0]]


def test_everything_that_is_wrong_is_said_at_once(run_dir: Path, unmeasurable: None) -> None:
    arguments = ["x.pkl", "--metrics", "fid5k,swd", "--batch", 0, "--seed", -1, "--gpus", 0, "--plot", "x.jpg"]
    result = run(*arguments, "--dat", "my.zip", "--detectors", "nowhere", "--network", run_dir.parent)
    assert result.exit_code == 2
    assert errors(result) == [
        "--dat: no such option; did you mean --data?",
        "--gpus 0: must be a whole number from 1 on",
        "--metrics fid5k: no such metric; did you mean fid50k?",
        "--detectors nowhere: no such folder; name the one that holds the detectors, or leave it out",
        "--batch 0: must be a whole number from 1 on",
        "--seed -1: must be a whole number from 0 on",
        "--plot x.jpg: is written as a PNG; let the name end in .png",
        "--network x.pkl: cannot be read (no such file)",
        f"--network {run_dir.parent}: not a run folder (training_options.json cannot be read)",
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--metrics", "none"], "--metrics none: there is nothing to do then"),
        (["--data", "gone.zip"], "--data gone.zip: "),
        (["--network", "ffhq255"], "--network ffhq255: cannot be read (no such file); did you mean ffhq256?"),
        (["--ops", "cuda"], "--ops cuda: is for NVIDIA GPUs"),
        (["--network", "empty"], "--network empty: holds no snapshot yet"),
        (["--network", "nothing", "--prefetch"], "--prefetch: only fetches"),
        (["--metrics", "fid", "--prefetch"], "--metrics fid: no such metric"),
    ],
)
def test_a_bad_setting_is_one_clear_line(arguments: list[str], problem: str, run_dir: Path, unmeasurable: None) -> None:
    Path("empty").mkdir()
    shutil.copy(run_dir / run_folder.OPTIONS_FILE, "empty")
    result = run(*arguments)
    assert result.exit_code == 2
    (line,) = errors(result)
    assert line.startswith(problem)


def test_without_a_home_folder_nothing_is_kept(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert run(run_dir / NAMES[0], "--metrics", "swd").exit_code == 0
    (line,) = errors(run("--prefetch"))
    assert "XDG_CACHE_HOME" in line


def test_help_says_which_metrics_there_are() -> None:
    said = run("--help").stdout
    assert all(f"\n  {name} " in said for name in METRICS)
    assert "Frechet inception distance, 5k fakes against all reals" in said


def test_without_any_run_there_is_nothing_to_measure(here: Path) -> None:
    result = run()
    assert result.exit_code == 2
    assert errors(result) == [
        "--network: is missing, and training-runs holds no run; name a snapshot or the folder of a run"
    ]


def test_a_plot_that_cannot_be_written_is_found_out_before_anything_is_measured(
    run_dir: Path, here: Path, unmeasurable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("in_the_way").write_text("")
    Path("folder.png").mkdir()
    for plot, problem in (
        ("in_the_way/plots/x.png", f"{here / 'in_the_way'} is a file, not a folder; choose another place"),
        ("folder.png", "is a folder; name a file in it"),
    ):
        assert errors(run("--plot", plot)) == [f"--plot {plot}: {problem}"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (line,) = errors(run("--plot", "new/x.png"))
    assert line == f"--plot new/x.png: {here} cannot be written to; choose another place"


def test_a_plot_that_fails_loses_no_number(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gan.metrics.plot.draw", full)
    result = run(run_dir / NAMES[0], "--metrics", "swd", "--plot", "plot.png")
    assert result.exit_code == 1
    assert errors(result) == ["plot.png: no space left on the device; free some, or choose another place"]
    assert "Curves" not in result.stdout
    assert len(lines(run_dir)) == 1


def test_without_matplotlib_there_is_a_line_in_place_of_curves(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    result = run(run_dir, "--metrics", "swd")
    assert "drawing it needs matplotlib: python -m pip install" in errors(result)[0]
    assert len(lines(run_dir)) == 3
    assert "Best:" in result.stdout


def test_detectors_are_fetched_from_a_folder_or_not_needed(here: Path) -> None:
    base = here / "base" / "metrics"
    base.mkdir(parents=True)
    for name in (INCEPTION, VGG):
        with zipfile.ZipFile(base / name, "w") as archive:
            archive.writestr("net/constants.pkl", b"")
            archive.writestr("net/code/__torch__.py", "")
    result = run("--prefetch", "--metrics", "is50k,swd", "--pretrained-base", here / "base", "--detectors", "usb")
    assert (result.exit_code, result.stdout) == (0, f"Detector:  usb/{INCEPTION}\n"), result.output
    assert [path.name for path in Path("usb").iterdir()] == [INCEPTION]
    result = run("--prefetch", "--pretrained-base", here / "base")
    assert result.exit_code == 0
    cached = here / "cache" / "stylegan2-ada-trainer" / "detectors"
    assert {path.name for path in cached.iterdir()} == {INCEPTION, VGG}
    (cached / VGG).write_bytes(b"<html>")
    assert run("--prefetch", "--pretrained-base", here / "base").exit_code == 0
    assert zipfile.is_zipfile(cached / VGG)
    for nothing in ("swd", "none"):
        said = run("--prefetch", "--metrics", nothing).stdout
        assert said == f"{nothing}: needs no detector, so there is nothing to fetch\n"
    result = run("--prefetch", "--pretrained-base", here / "nowhere", "--detectors", "usb2", "--metrics", "fid50k_full")
    assert result.stdout == f"Detector:  usb2/{INCEPTION}\n"  # what is here already is copied, not fetched
    shutil.rmtree(cached)
    result = run("--prefetch", "--pretrained-base", here / "nowhere")
    assert (result.exit_code, len(errors(result))) == (1, 1)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_measure_what_one_does(run_dir: Path) -> None:
    (run_dir / NAMES[0]).unlink()
    (run_dir / NAMES[1]).write_bytes(b"<html>")
    alone = run(run_dir, "--metrics", "swd", "--json")
    words = [sys.executable, "-m", "gan", "metrics", run_dir, "--metrics", "swd", "--json", "--force"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GAN_CPU_KERNELS": "0"}
    pair = subprocess.run(
        [*map(str, words), "--gpus", "2", "--device", "cpu"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (alone.exit_code, pair.returncode) == (1, 1), pair.stderr
    assert pair.stderr.count("it is a web page") == 1
    (one, two) = (json.loads(said)["snapshots"][1]["measurements"][0] for said in (alone.stdout, pair.stdout))
    assert two["results"] == pytest.approx(one["results"], rel=1e-6)
    assert [line["num_gpus"] for line in lines(run_dir)] == [1, 2]
