from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner, Result
from runs import interrupted, run_train
from tiny import TINY, write_dataset

from gan import models
from gan.cli.train import train
from gan.config import DataInfo
from gan.resolve import resolve
from gan.train_options import TrainOptions
from torch_utils.ops import kernels

SURFACE = """
--data --outdir --gpus --cfg --demo --cond --mirror --subset --gamma --kimg --batch --batch-gpu --aug --p --target
--augpipe --p-max --resume --at --freezed --snap --keep --keep-every --save-every --keep-states --on-divergence --tick
--metrics --detectors --metrics-budget --seed --fp32 --workers --cache --cache-dir --desc --glr --dlr
--cbase --cmax --map-depth --mbstd-group --device --precision --tf32 --cuda-graphs --ops --allow-partial
--list-tensors --max-restarts --dist-timeout --pretrained-base --dry-run --json --help
"""

pytestmark = pytest.mark.usefixtures("light_runs")


def problems(result: Result) -> list[str]:
    return [line.removeprefix("error: ") for line in result.output.splitlines() if line.startswith("error: ")]


def test_the_command_line_is_frozen() -> None:
    text = run_train("--help").output
    shown = re.findall(r"^ {2}(?:-\w, )?(--[\w-]+)", text, flags=re.MULTILINE)
    assert sorted(shown) == sorted(SURFACE.split())


@pytest.mark.usefixtures("full_runs")
def test_a_tiny_run_writes_exactly_these_files(
    tiny_dataset: Path, outdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # without detectors
    monkeypatch.delenv("GAN_DETECTORS", raising=False)
    result = run_train("--data", tiny_dataset, *TINY, "--batch-gpu", 25, "--tick", 0.5, "--snap", 2)
    assert result.exit_code == 0, result.output
    (run_dir,) = outdir.glob("0*")
    assert run_dir.name == "00000-tiny-auto1-kimg1-batch125"
    assert sorted(p.name for p in run_dir.iterdir()) == [
        "fakes000000.png",
        "fakes000001.png",
        "fakes_init.png",
        "log.txt",
        "metric-diversity.jsonl",
        "metric-swd.jsonl",
        "mlflow-run.json",
        "network-snapshot-000000.pkl",
        "network-snapshot-000001.pkl",
        "network-snapshot-best.pkl",
        "reals.png",
        "run.lock",
        "stats.jsonl",
        "training-state-000000.125.pt",
        "training-state.pt",
        "training_options.json",
    ]
    log = (run_dir / "log.txt").read_text()
    assert re.search(r"^Computing: CPU with .*\nKernels:   CPU kernels: ", log, re.MULTILINE)
    line = re.compile(
        r"^tick \d+ +kimg [\d.]+ +time [\dsmhd ]+ sec/tick [\d.]+ sec/kimg [\d.]+ maintenance [\d.]+ "
        r"(?:metrics [\d.]+ )?cpumem [\d.]+ gpumem [\d.]+ augment [\d.]+( eta [\dsmhd ]+)?( health .+)?$",
        re.MULTILINE,
    )
    assert len(line.findall(log)) == 3
    assert log.count(" eta ") == 2
    records = [json.loads(text) for text in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert [r["Progress/kimg"]["mean"] for r in records] == [0.125, 0.625, 1.0]
    last = records[-1]
    expected = ["scores/real", "signs/real", "scores/fake", "signs/fake", "G/loss", "D/loss"]
    assert all(f"Loss/{name}" in last for name in expected)
    assert {"Loss/G/reg", "Loss/D/reg", "Loss/pl_penalty", "Loss/r1_penalty"} <= set(records[0])
    assert {"Timing/Gmain", "Timing/Dmain", "Timing/sec_per_kimg", "Timing/data_wait", "timestamp"} <= set(last)
    assert last["Loss/scores/real"]["num"] == 3 * 125
    assert PIL.Image.open(run_dir / "reals.png").size == (32 * 16, 32 * 16)


def test_a_kernel_that_breaks_the_device_leaves_no_run_behind(
    tiny_dataset: Path, outdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*args: object) -> str:
        raise kernels.KernelError("warp: the device fails; type the same command again")

    monkeypatch.setattr(kernels, "prepare", breaks)
    result = run_train("--data", tiny_dataset, *TINY)
    assert (result.exit_code, problems(result)) == (1, ["warp: the device fails; type the same command again"])
    assert list(outdir.glob("0*")) == []


def test_the_number_of_a_new_run_is_the_next_free_one(tiny_dataset: Path, outdir: Path) -> None:
    (outdir / "00041-something").mkdir()
    assert run_train("--data", tiny_dataset, *TINY).exit_code == 0
    assert (outdir / "00042-tiny-auto1-kimg1-batch125").is_dir()


def test_conditional_grey_mirrored_fixed_augmentation_without_path_length(tmp_path: Path, outdir: Path) -> None:
    data = write_dataset(tmp_path / "grey.zip", channels=1, classes=3)
    arguments = ["--data", data, "--cfg=cifar", *TINY, "--cond=1", "--mirror=true", "--aug=fixed", "--p=0.3"]
    result = run_train(*arguments, "--augpipe=bgcfnc", "--freezed=2", "--batch-gpu=125", "--desc=odd")
    assert result.exit_code == 0, result.output
    (run_dir,) = outdir.glob("0*")
    assert run_dir.name == "00000-grey-cond-mirror-cifar-kimg1-batch125-fixed-p0.3-bgcfnc-freezed2-odd"
    assert PIL.Image.open(run_dir / "fakes000001.png").mode == "L"
    last = json.loads((run_dir / "stats.jsonl").read_text().splitlines()[-1])
    assert last["Progress/augment"]["mean"] == pytest.approx(0.3)
    assert "Loss/G/reg" not in last


def test_bfloat16_trains_on_a_cpu(tiny_dataset: Path, outdir: Path) -> None:
    result = run_train("--data", tiny_dataset, *TINY, "--precision", "bf16", "--aug", "noaug")
    assert result.exit_code == 0, result.output
    assert "bfloat16 from 8x8 on" in result.output
    (run_dir,) = outdir.glob("0*")
    last = json.loads((run_dir / "stats.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(last["Loss/D/loss"]["mean"])
    assert last["Health/nonfinite_gradients"]["mean"] == 0


def test_dry_run_creates_nothing_and_prints_the_plan(tiny_dataset: Path, outdir: Path) -> None:
    before = sorted(p.name for p in outdir.iterdir())
    result = run_train("--data", tiny_dataset, "--gpus", 8, "--dry-run")
    assert result.exit_code == 0
    assert "Plan" in result.output
    assert "GB a process (estimated)" in result.output
    assert "64 on 8 processes, 8 at a time in 1 round" in result.output
    assert "it would not start" not in result.output  # a CPU has room for any number
    assert sorted(p.name for p in outdir.iterdir()) == before


def test_batch_gpu_auto_is_planned_and_other_words_are_refused(tiny_dataset: Path, outdir: Path) -> None:
    result = run_train("--data", tiny_dataset, "--batch", 24, "--batch-gpu", "auto", "--dry-run")
    assert result.exit_code == 0, result.output
    assert '"fit_batch_gpu": true' in result.output
    assert "24 on 1 process, as many at a time as fit, at most 24" in result.output
    result = run_train("--data", tiny_dataset, "--batch-gpu", "most", "--dry-run")
    assert result.exit_code == 2
    assert problems(result) == ["--batch-gpu most: is neither a whole number nor auto"]


def test_dry_run_json_is_one_object_with_the_reference_s_keys(tiny_dataset: Path) -> None:
    result = CliRunner().invoke(train, ["--data", str(tiny_dataset), "--gpus", "2", "--dry-run", "--json"])
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    config = resolve(TrainOptions(data="x", gpus=2), DataInfo("x", "tiny", 40, 16, 16, 3))
    assert printed == config.reference_options()
    case = json.loads((Path(__file__).parents[1] / "golden/train_options.json").read_text())[0]
    assert set(printed) == set(case) - {"input"}


def test_every_problem_is_listed_at_once_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_train(
        "--data", "missing.zip", "--kimg", "x", "--gpus", 0, "--p", 0.1, "--bacth", 3, "--cfg", "best", "stray"
    )
    assert result.exit_code == 2
    listed = "\n".join(problems(result))
    for part in (
        "--kimg x: is not a valid integer",
        "--cfg best: is not one of 'auto'",
        "--bacth: no such option; did you mean --batch?",
        "stray: unexpected",
        "--data missing.zip: no such file or folder; pack your images with dataset_tool.py first",
        "--gpus 0: must be a whole number from 1 on",
        "--p 0.1 goes with --aug fixed only",
    ):
        assert part in listed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--batch", 12, "--gpus", 8], "--batch 12 is not divisible by --gpus 8; try 8 or 16"),
        (["--batch", 32, "--batch-gpu", 5], "--batch-gpu 5 does not divide --batch 32 / --gpus 1 = 32; try one of"),
        (
            ["--batch", 12, "--mbstd-group", 8],
            "--batch-gpu 12 is not divisible by --mbstd-group 8; try --batch-gpu 6, or --mbstd-group 6",
        ),
        (["--cbase", 8], "--cbase 8: leaves no channels at 16x16; give at least 16"),
        (["--cond"], "has no labels; leave out --cond"),
        (["--subset", 41], "--subset 41: "),
        (["--resume", "ffhq265"], "--resume ffhq265: no such file or folder; did you mean ffhq256?"),
        (
            ["--resume", "ffhq256", "--pretrained-base", "."],
            "--resume ffhq256: transfer-learning-source-nets/ffhq-res25",
        ),
        (["--resume", "x" * 5000], "x: no such file or folder; give a run folder, a snapshot, or one of ffhq256"),
        (["--allow-partial"], "--allow-partial goes with --resume FILE; add it, or leave --allow-partial out"),
        (["--list-tensors"], "--list-tensors goes with --resume FILE; add it, or leave --list-tensors out"),
        (["--gpus", 2, "--device", "mps"], "--device mps: "),
        (["--max-restarts", -1], "--max-restarts -1: must be a whole number from 0 on"),
        (["--dist-timeout", 0], "--dist-timeout 0.0: must be greater than 0"),
        (["--dist-timeout", "inf"], "--dist-timeout inf: must be greater than 0 and at most 1000000 seconds"),
        (["--device", "cpu", "--precision", "fp16"], "--precision fp16: CPUs have no fast float16"),
        (["--device", "cpu", "--cuda-graphs", "on"], "--cuda-graphs on: cpu has none; leave it out"),
        (
            ["--device", "cpu", "--ops", "cuda"],
            "--ops cuda: is for NVIDIA GPUs, and the device is cpu; leave it out",
        ),
        (["--ops", "triton"], "--ops triton: is not one of 'auto', 'cuda', 'ref'"),
        (["--metrics", "fid50k_ful,swd"], "--metrics fid50k_ful: no such metric; did you mean fid50k_full?"),
        (["--metrics", "auto,swd"], "--metrics auto: no such metric; auto goes alone"),
        (["--metrics-budget", 0], "--metrics-budget 0: must be above 0, and at most 100 percent"),
        (["--metrics-budget", 101], "--metrics-budget 101: must be above 0, and at most 100 percent"),
        (["--detectors", "nowhere"], "--detectors nowhere: no such folder; name the one that holds the detectors"),
        (["--json"], "--json goes with --dry-run only"),
    ],
)
def test_a_bad_setting_is_one_clear_line(
    arguments: list[object], problem: str, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_train("--data", tiny_dataset, *arguments)
    assert result.exit_code == 2, result.output
    assert any(problem in line for line in problems(result)), result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off here", b"not a zip at all"])
def test_a_dataset_that_is_no_zip_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.zip"
    path.write_bytes(content)
    result = run_train("--data", path)
    assert result.exit_code == 2
    assert any("broken.zip: not a readable zip file" in line for line in problems(result))


def test_an_unwritable_outdir_is_named(tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run_train("--data", tiny_dataset, *TINY, "--outdir", tmp_path / "file")
    assert result.exit_code == 1
    assert len(problems(result)) == 1
    assert "a part of this path is a file" in result.output


def test_a_truncated_snapshot_is_named_with_all_else_before_a_run_folder_is_made(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "net.pkl"
    broken.write_bytes(b"\x80\x04\x95 cut")
    runs = tmp_path / "runs"
    result = run_train("--data", tiny_dataset, *TINY, "--outdir", runs, "--resume", broken, "--gamma", -1)
    assert result.exit_code == 2
    named, other = problems(result)
    assert named.startswith(f"--resume {broken}: ")
    assert other.startswith("--gamma -1")
    assert not runs.exists()


def test_a_file_without_a_generator_is_named(tiny_dataset: Path, whole: Path, tmp_path: Path) -> None:
    D = models.load(whole / "network-snapshot-000001.pkl").D
    models.save(tmp_path / "d.pkl", G=None, D=D, G_ema=None, training_set_kwargs={})
    result = run_train("--data", tiny_dataset, "--resume", tmp_path / "d.pkl", "--outdir", tmp_path / "runs")
    assert problems(result) == [
        f"--resume {tmp_path / 'd.pkl'}: holds no generator, only a discriminator; give a file with G_ema or G"
    ]


def test_nothing_is_fetched_for_a_command_line_that_will_not_do(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gan.cli.order.opened", lambda *args, **kwargs: pytest.fail("opened"))
    for arguments in (["--data", tiny_dataset, "--gamma", -1], ["--data", tmp_path / "gone.zip"], [], ["--bacth", 3]):
        result = run_train(*arguments, "--resume", "https://example.invalid/net.pkl")
        assert result.exit_code == 2
        assert len(problems(result)) == 1 + ("--bacth" in arguments)


def test_the_networks_of_a_file_need_no_flags(tiny_dataset: Path, whole: Path, outdir: Path) -> None:
    file = whole / "network-snapshot-000001.pkl"
    arguments = ["--batch=125", "--mbstd-group=5", "--kimg=1", "--workers=0", "--device=cpu", "--fp32", "--snap=2"]
    result = interrupted(1, "--data", tiny_dataset, "--resume", file, *arguments)
    (run_dir,) = outdir.glob("0*")
    assert re.search(rf"^Weights:   from {file}.*: all \d+ tensors loaded$", result.output, re.M)
    assert (run_dir / "fakes_init.png").read_bytes() == (whole / "fakes000001.png").read_bytes()
    result = run_train("--resume", "--allow-partial", "--list-tensors")
    assert result.exit_code == 2
    assert [line.split()[0] for line in problems(result)] == ["--list-tensors", "--allow-partial"]


def test_a_file_that_fits_in_part_is_refused_with_a_table_and_taken_when_told_to(
    tiny_dataset: Path, whole: Path, tmp_path: Path, outdir: Path
) -> None:
    data = write_dataset(tmp_path / "large.zip", size=32)
    file = whole / "network-snapshot-000001.pkl"
    command = ["--data", data, "--resume", file, "--batch=125", "--mbstd-group=5", "--kimg=1", "--device=cpu", "--fp32"]
    result = run_train(*command, "--list-tensors")
    assert result.exit_code == 2
    assert re.search(r"^G +b32 +0 +0 +19 +0  not in the file; begins so that nothing changes$", result.output, re.M)
    assert re.search(r"^D\.b32\.conv0\.weight +new +not in the file$", result.output, re.M)
    (problem,) = problems(result)
    assert problem.startswith(f"--resume {file}: fits only in part (")
    assert "its images are 16x16, the dataset's 32x32: use a dataset of --width=16 --height=16" in problem
    assert problem.endswith("; or start from what fits: --allow-partial")
    assert list(outdir.glob("0*")) == []
    result = run_train(*command, "--dry-run")
    assert (result.exit_code, problems(result)) == (2, [problem])
    assert re.search(r"^  weights    from .*000001\.pkl.*: \d+ tensors loaded, 0 adapted", result.output, re.M)
    assert result.output.count("tensors loaded, 0 adapted") == 2  # in the table and in the error
    result = run_train(*command, "--dry-run", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["batch_size"] == 125
    assert re.search(r"^G +b32 +0 +0 +19", result.stderr, re.M)
    result = run_train(*command, "--allow-partial", "--freezed=2", "--dry-run")
    assert result.exit_code == 2
    assert problems(result) == ["--freezed 2: D's layers b32.fromrgb, b32.conv0 are not in the file; leave it out"]
    interrupted(1, *command, "--allow-partial")
    (run_dir,) = outdir.glob("0*")
    assert f"Weights:   from {file}" in (run_dir / "log.txt").read_text()
    small = np.asarray(PIL.Image.open(whole / "fakes000001.png").convert("L")).astype(float)
    large = np.asarray(PIL.Image.open(run_dir / "fakes_init.png").convert("L")).astype(float)
    assert large.shape == (2 * small.shape[0], 2 * small.shape[1])
    halved = large.reshape(small.shape[0], 2, small.shape[1], 2).mean(axis=(1, 3))
    assert np.corrcoef(halved.ravel(), small.ravel())[0, 1] > 0.95
    config = json.loads((run_dir / "training_options.json").read_text())
    assert config["allow_partial"]
    assert config["network"]["channel_base"] == 64


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    result = run_train("--outdir", tmp_path, "--resume")
    assert result.exit_code == 2
    assert "holds no run to continue" in result.output
    result = run_train("--resume", tmp_path)
    assert result.exit_code == 2
    assert "not a run folder" in result.output


def test_a_finished_run_can_be_made_longer_but_not_another_run(whole: Path, outdir: Path) -> None:
    run_dir = shutil.copytree(whole, outdir / whole.name)
    result = run_train("--resume")
    assert result.exit_code == 0
    assert "There is nothing left to train; --kimg N makes the run longer" in result.output
    result = run_train("--resume", "--gamma", 3, "--mirror")
    assert result.exit_code == 2
    assert [line.split()[0] for line in problems(result)] == ["--mirror", "--gamma"]
    result = run_train("--resume", "--kimg", 2, "--batch-gpu", 25)
    assert result.exit_code == 0, result.output
    assert (run_dir / "network-snapshot-000002.pkl").exists()
    assert json.loads((run_dir / "training_options.json").read_text())["batch_gpu"] == 25


def test_a_damaged_image_in_the_middle_ends_the_run_by_name(tmp_path: Path, outdir: Path) -> None:
    import zipfile

    good = write_dataset(tmp_path / "good.zip", count=8)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(tmp_path / "bad.zip", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("5.png"):
                data = data[:60] + bytes(len(data) - 72) + data[-12:]
            target.writestr(name, data)
    result = run_train("--data", tmp_path / "bad.zip", *TINY)
    assert result.exit_code == 1
    assert any("img00000005.png is damaged" in line for line in problems(result)), result.output
    assert result.output.count("img00000005.png") == 1
    (run_dir,) = outdir.glob("0*")
    assert "img00000005.png is damaged" in (run_dir / "log.txt").read_text()
