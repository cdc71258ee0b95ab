"""Options to configuration: the reference's option sets, the round trip through JSON, and every complaint."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from gan.config import DataInfo, TrainConfig
from gan.errors import GanError, UsageError
from gan.presets import PRESETS, PRETRAINED
from gan.resolve import resolve
from gan.train_options import TrainOptions, check_options, check_resume_name

REFERENCE = json.loads((Path(__file__).parent / "golden" / "train_options.json").read_text())


def info(resolution=256, **changes):
    name = changes.pop("name", "pets")
    values = {"path": f"{name}.zip", "name": name, "num_images": 1000, "channels": 3}
    return DataInfo(**{**values, "height": resolution, "width": resolution, **changes})


def resolved(resolution=256, **options):
    return resolve(TrainOptions(**options), info(resolution))


def problems(resolution=256, **options):
    with pytest.raises(UsageError) as caught:
        resolved(resolution, **options)
    return caught.value.problems


class TestReference:
    @pytest.mark.parametrize("case", REFERENCE, ids=[case["run_desc"] for case in REFERENCE])
    def test_option_sets_resolve_to_the_reference_values(self, case):
        options = dict(case["input"])
        resolution = options.pop("res")
        data = info(resolution, name=f"r{resolution}", label_dim=10 if options.get("cond") else 0)
        ours = resolve(TrainOptions(**options), data).reference_options()
        expected = {key: value for key, value in case.items() if key != "input"}
        assert ours == expected
        assert list(ours) == list(expected)
        assert ours["augment"] is None or list(ours["augment"]) == list(expected["augment"])

    def test_all_of_them_are_there(self):
        assert len(REFERENCE) == 49


class TestOptions:
    @pytest.mark.parametrize("field", dataclasses.fields(TrainOptions), ids=lambda field: field.name)
    def test_each_has_a_help_text(self, field):
        text = field.metadata["help"]
        assert text[0].isupper()
        assert not text.endswith(".")
        assert len(text) <= 100

    def test_defaults_are_valid(self):
        assert check_options(TrainOptions()) == []

    @pytest.mark.parametrize("name", PRESETS)
    def test_every_preset_resolves(self, name):
        config = resolved(cfg=name, gpus=PRESETS[name].ref_gpus or 1)
        assert config.desc.startswith(f"pets-{name}")

    @pytest.mark.parametrize("resolution", [8, 32, 64, 256])
    def test_the_demo_resolves_at_every_size(self, resolution):
        config = resolved(resolution, demo=True)
        assert config.desc == "pets-demo"
        assert config.network.channel_base <= 4096

    @pytest.mark.parametrize(
        ("options", "read", "value"),
        [
            ({"gamma": 0}, lambda c: c.loss.r1_gamma, 0),
            ({"kimg": 7}, lambda c: c.total_kimg, 7),
            ({"batch": 8}, lambda c: c.batch_size, 8),
            ({"batch": 8, "batch_gpu": 4}, lambda c: (c.batch_gpu, c.fit_batch_gpu), (4, False)),
            ({"batch": 8, "gpus": 2, "batch_gpu": "auto"}, lambda c: (c.batch_gpu, c.fit_batch_gpu), (4, True)),
            ({"batch": 12, "batch_gpu": "auto", "mbstd_group": 8}, lambda c: c.batch_gpu, 6),
            ({"aug": "fixed", "p": 0}, lambda c: (c.augment.initial_p, c.augment.target), (0, None)),
            ({"target": 0}, lambda c: c.augment.target, 0),
            ({"p_max": 0.5}, lambda c: c.augment.p_max, 0.5),
            ({"freezed": 4}, lambda c: c.network.freeze_layers, 4),
            ({"snap": 3}, lambda c: c.snap, 3),
            ({"tick": 0.5}, lambda c: c.tick_kimg, 0.5),
            ({"seed": 5}, lambda c: c.seed, 5),
            ({"workers": 0}, lambda c: c.workers, 0),
            ({"glr": 0.1}, lambda c: (c.optim.glr, c.optim.dlr), (0.1, 0.0025)),
            ({"dlr": 0.1}, lambda c: (c.optim.glr, c.optim.dlr), (0.0025, 0.1)),
            ({"cbase": 2048}, lambda c: c.network.channel_base, 2048),
            ({"cmax": 64}, lambda c: c.network.channel_max, 64),
            ({"map_depth": 5}, lambda c: c.network.mapping_layers, 5),
            ({"mbstd_group": 2}, lambda c: c.network.mbstd_group_size, 2),
            ({"subset": 10}, lambda c: (c.data.subset, c.data.shown_images), (10, 10)),
            ({"mirror": True}, lambda c: (c.data.mirror, c.data.shown_images), (True, 2000)),
            ({"subset": 10, "mirror": True}, lambda c: c.data.shown_images, 20),
            ({"device": "cpu"}, lambda c: c.device, "cpu"),
            ({"precision": "bf16"}, lambda c: (c.precision, c.network.num_fp16_res), ("bf16", 4)),
            ({"precision": "fp32"}, lambda c: (c.precision, c.network.num_fp16_res), ("fp32", 0)),
            ({"fp32": True}, lambda c: (c.precision, c.network.conv_clamp), ("fp32", None)),
            ({"tf32": False}, lambda c: c.tf32, False),
            ({"ops": "ref"}, lambda c: c.ops, "ref"),
            ({"resume": "x"}, lambda c: (c.init_from, c.augment.ada_kimg, c.optim.ema_rampup), ("x", 100, None)),
            ({"demo": True, "aug": "ada"}, lambda c: c.augment.target, 0.6),
            ({"desc": "first-try"}, lambda c: c.desc, "pets-auto1-first-try"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
    )  # fmt: skip
    def test_each_reaches_the_configuration(self, options, read, value):
        assert read(resolved(**options)) == value

    def test_labels_of_the_dataset_reach_the_networks(self):
        config = resolve(TrainOptions(cond=True), info(32, label_dim=10, channels=1))
        for kwargs in (config.network.generator_kwargs(config.data), config.network.discriminator_kwargs(config.data)):
            assert (kwargs["c_dim"], kwargs["img_resolution"], kwargs["img_channels"]) == (10, 32, 1)


class TestSizes:
    @pytest.mark.parametrize(
        ("width", "height", "resolution", "to_networks"),
        [(64, 64, 64, 64), (96, 64, 64, [64, 96]), (64, 96, 64, [96, 64]), (96, 96, 128, [96, 96])],
    )
    def test_networks_get_theirs_and_presets_the_square_that_comes_near(self, width, height, resolution, to_networks):
        config = resolve(TrainOptions(batch=32), info(height=height, width=width, channels=4))
        assert config.data.resolution == resolution
        assert config.data.described == f"{width}x{height} RGBA"
        for kwargs in (config.network.generator_kwargs(config.data), config.network.discriminator_kwargs(config.data)):
            assert (kwargs["img_resolution"], kwargs["img_channels"]) == (to_networks, 4)
        square = resolved(resolution, batch=32)
        assert config.network == square.network
        assert config.loss.r1_gamma == pytest.approx(square.loss.r1_gamma * width * height / resolution**2)

    def test_too_few_channels_are_said_with_the_size(self):
        with pytest.raises(UsageError, match="--cbase 63: leaves no channels at 96x64; give at least 64"):
            resolve(TrainOptions(cbase=63), info(height=64, width=96))


class TestJson:
    def test_a_run_of_the_time_of_squares_goes_on(self):
        config = resolved(64)
        values = json.loads(config.to_json())
        del values["data"]["height"], values["data"]["width"]
        values["data"]["resolution"] = 64
        assert TrainConfig.from_json(json.dumps(values), "here") == config

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"cfg": "cifar", "gpus": 2},
            {"aug": "noaug"},
            {"resume": "x.pkl", "subset": 5, "mirror": True},
            {"fp32": True},
        ],
        ids=str,
    )
    def test_a_configuration_comes_back_as_it_was(self, options):
        config = resolved(**options)
        back = TrainConfig.from_json(config.to_json(), "here")
        assert back == config
        assert back.to_json() == config.to_json()
        assert hash(back.optim) == hash(config.optim)  # betas are a tuple again

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[:-10],
            lambda text: "[]",
            lambda text: "{}",
            lambda text: "null",
            lambda text: text.replace('"seed"', '"sead"'),
            lambda text: text.replace('"glr"', '"learning_rate"'),
            lambda text: text.replace('"betas"', '"bettas"'),
            lambda text: json.dumps({**json.loads(text), "optim": 3}),
            lambda text: json.dumps({**json.loads(text), "new_option": 3}),
        ],
        ids=range(9),
    )
    def test_other_files_are_refused_by_name(self, damage):
        with pytest.raises(
            GanError, match=r"^runs/options\.json: not the options of a run that this version can continue"
        ):
            TrainConfig.from_json(damage(resolved().to_json()), "runs/options.json")

    def test_a_configuration_cannot_be_changed(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            resolved().seed = 1


class TestProblems:
    """Each names the flag, the value and what to do about it."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"gpus": 0}, "--gpus 0: must be a whole number from 1 on"),
            ({"kimg": 0}, "--kimg 0: must be a whole number from 1 on"),
            ({"batch": -4}, "--batch -4: must be a whole number from 1 on"),
            ({"batch_gpu": 0}, "--batch-gpu 0: must be a whole number from 1 on"),
            ({"subset": 0}, "--subset 0: must be a whole number from 1 on"),
            ({"snap": 0}, "--snap 0: must be a whole number from 1 on"),
            ({"cbase": 0}, "--cbase 0: must be a whole number from 1 on"),
            ({"cmax": 0}, "--cmax 0: must be a whole number from 1 on"),
            ({"map_depth": 0}, "--map-depth 0: must be a whole number from 1 on"),
            ({"mbstd_group": 0}, "--mbstd-group 0: must be a whole number from 1 on"),
            ({"freezed": -1}, "--freezed -1: must be a whole number from 0 on"),
            ({"seed": -1}, "--seed -1: must be a whole number from 0 on"),
            ({"workers": -1}, "--workers -1: must be a whole number from 0 on"),
            ({"glr": 0.0}, "--glr 0.0: must be greater than 0"),
            ({"dlr": -0.1}, "--dlr -0.1: must be greater than 0"),
            ({"tick": 0.0}, "--tick 0.0: must be greater than 0"),
            ({"glr": float("nan")}, "--glr nan: must be greater than 0"),
            ({"gamma": -1.0}, "--gamma -1.0: must be at least 0"),
            ({"aug": "fixed", "p": 1.5}, "--p 1.5: must be from 0 to 1"),
            ({"p_max": -0.1}, "--p-max -0.1: must be from 0 to 1"),
            ({"target": 1.5}, "--target 1.5: must be from -1 to 1; 0.6 is usual"),
            ({"aug": "fixed"}, "--aug fixed needs a probability; add --p 0.2, for example"),
            ({"p": 0.2}, "--p 0.2 goes with --aug fixed only, not --aug ada; leave it out or add --aug fixed"),
            (
                {"aug": "noaug", "p": 0.2},
                "--p 0.2 goes with --aug fixed only, not --aug noaug; leave it out or add --aug fixed",
            ),
            (
                {"aug": "fixed", "p": 0.2, "target": 0.5},
                "--target 0.5 goes with --aug ada only, not --aug fixed; leave it out",
            ),
            (
                {"aug": "noaug", "augpipe": "bg"},
                "--augpipe bg needs augmentation, but --aug is noaug; change one of them",
            ),
            ({"demo": True, "cfg": "cifar"}, "--demo is a preset of its own; leave out --cfg cifar"),
            ({"fp32": True, "precision": "fp16"}, "--precision fp16 contradicts --fp32; leave one of them out"),
            ({"desc": "a/b"}, "--desc a/b: becomes part of a folder name; leave out the slashes"),
            ({"desc": "a\\b"}, "--desc a\\b: becomes part of a folder name; leave out the slashes"),
            ({"subset": 1001}, "--subset 1001: pets.zip holds 1000 images; give at most that many"),
            ({"cbase": 255}, "--cbase 255: leaves no channels at 256x256; give at least 256"),
            ({"batch": 12, "gpus": 8}, "--batch 12 is not divisible by --gpus 8; try 8 or 16"),
            ({"batch": 3, "gpus": 8, "batch_gpu": "auto"}, "--batch 3 is not divisible by --gpus 8; try 8"),
            ({"batch": 3, "gpus": 8}, "--batch 3 is not divisible by --gpus 8; try 8"),
            (
                {"batch": 12, "batch_gpu": 5},
                "--batch-gpu 5 does not divide --batch 12 / --gpus 1 = 12; try one of 1, 2, 3, 4, 12",
            ),
            (
                {"batch": 16, "gpus": 2, "batch_gpu": 16},
                "--batch-gpu 16 does not divide --batch 16 / --gpus 2 = 8; try one of 1, 2, 4, 8",
            ),
            (
                {"batch": 18, "batch_gpu": 9, "mbstd_group": 4},
                "--batch-gpu 9 is not divisible by --mbstd-group 4; try --batch-gpu 3, or --mbstd-group 3",
            ),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
    )
    def test_one_is_one_line(self, options, message):
        assert problems(**options) == [message]

    @pytest.mark.parametrize(
        "options",
        [
            {"batch": 12, "gpus": 8},
            {"batch": 12, "batch_gpu": 5},
            {"batch": 16, "gpus": 2, "batch_gpu": 16},
            {"batch": 18, "batch_gpu": 9, "mbstd_group": 4},
            {"cbase": 255},
        ],
        ids=str,
    )
    def test_what_is_suggested_is_accepted(self, options):
        """Following one remedy must not lead to the next complaint."""
        (problem,) = problems(**options)
        name = problem.split()[0].removeprefix("--").replace("-", "_")
        remedy = re.split(r"; (?:try|give)", problem)[1]
        suggested = re.split(", or --mbstd-group", remedy)
        for value in map(int, re.findall(r"\d+", suggested[0])):
            resolved(**{**options, name: value})
        for value in map(int, suggested[1:]):
            resolved(**{**options, "mbstd_group": value})

    def test_the_limits_themselves_are_allowed(self):
        for options in (
            {"subset": 1000},
            {"cbase": 256},
            {"gamma": 0.0},
            {"aug": "fixed", "p": 1.0},
            {"p_max": 0.0},
            {"p_max": 1.0},
            {"target": -1.0},
            {"target": 1.0},
            {"fp32": True, "precision": "fp32"},
        ):
            resolved(**options)

    def test_all_are_listed_at_once(self):
        listed = problems(
            gpus=0, gamma=-1.0, p=0.2, aug="ada", target=3.0, desc="a/b", subset=2000, fp32=True, precision="bf16"
        )
        flags = ["--gpus", "--gamma", "--target", "--precision", "--desc", "--p", "--subset"]
        assert [line.split()[0] for line in listed] == flags

    def test_what_does_not_divide_is_listed_with_the_rest(self):
        listed = problems(batch=12, gpus=8, gamma=-1.0, subset=2000, cbase=100)
        assert {line.split()[0] for line in listed} == {"--batch", "--gamma", "--subset", "--cbase"}

    @pytest.mark.parametrize("batch_gpu", [1, 2])
    def test_a_micro_batch_smaller_than_the_group_is_allowed(self, batch_gpu):
        assert resolved(batch=8, batch_gpu=batch_gpu).network.mbstd_group_size == 4


class TestDescription:
    def test_names_every_setting_that_shapes_the_run(self):
        options = {
            "cond": True,
            "mirror": True,
            "subset": 10,
            "gamma": 1.5,
            "kimg": 20,
            "batch": 8,
            "aug": "fixed",
            "p": 0.25,
        }
        config = resolve(TrainOptions(**options, augpipe="bg", resume="x.pkl", freezed=2, desc="v2"), info(label_dim=3))
        expected = "pets-cond-mirror-subset10-auto1-gamma1.5-kimg20-batch8-fixed-p0.25-bg-resumecustom-freezed2-v2"
        assert config.desc == expected

    def test_settings_that_do_not_shape_it_are_left_out(self):
        assert resolved(snap=1, seed=3, workers=0, device="cpu", tick=1, outdir="x", batch_gpu=8).desc == "pets-auto1"


class TestResumeNames:
    @pytest.mark.parametrize("name", [*PRETRAINED, "https://example.org/net.pkl"])
    def test_pretrained_names_and_addresses_are_fine(self, name):
        assert check_resume_name(name) is None

    def test_files_and_folders_are_fine(self, tmp_path):
        (tmp_path / "net.pkl").touch()
        assert check_resume_name(str(tmp_path)) is None
        assert check_resume_name(str(tmp_path / "net.pkl")) is None

    def test_a_slip_of_the_pen_is_met_with_a_suggestion(self):
        assert check_resume_name("ffhq1042") == "--resume ffhq1042: no such file or folder; did you mean ffhq1024?"

    def test_anything_else_gets_the_list(self):
        problem = check_resume_name("missing.pkl")
        assert problem.startswith(
            "--resume missing.pkl: no such file or folder; give a run folder, a snapshot, or one of "
        )
        assert all(name in problem for name in PRETRAINED)
