"""Measuring a network: every metric end to end with small detectors, and what may go wrong on the way."""

import dataclasses
import math
import multiprocessing
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
from detectors import write_detectors, write_script
from tiny import write_dataset

from gan.data.dataset import ImageDataset
from gan.errors import DiskFullError, GanError
from gan.metric_names import INCEPTION, METRICS, VGG
from gan.metrics import frechet, measure, reals
from gan.metrics.collected import LostError, by_all
from gan.metrics.detector import Detector
from gan.metrics.detectors import Detectors, prefetch
from gan.metrics.measure import Measurement, Measuring, Reals
from gan.networks import Generator, SynthesisLayer
from torch_utils.distributed import Place
from torch_utils.world import ALONE, World, join

CPU = torch.device("cpu")
NUM_FAKES = 72  # two blocks and a quarter
SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detectors(tmp_path_factory.mktemp("detectors"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_small(monkeypatch.setitem)
    monkeypatch.setattr(measure, "_PORTION_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GAN_DETECTORS", raising=False)


def make_small(set_item: Callable[[Any, str, Any], None]) -> None:
    """The metrics, of few images."""
    for name, metric in METRICS.items():
        most = 30 if name in ("fid50k", "kid50k", "pr50k3") else metric.max_reals
        number = 40 if name == "fid5k_full" else NUM_FAKES
        set_item(METRICS, name, dataclasses.replace(metric, num_fakes=number, max_reals=most))


def make_generator(seed: int = 0, c_dim: int = 0, channels: int = 3) -> Generator:
    torch.manual_seed(seed)
    synthesis = {"channel_base": 64, "channel_max": 8}
    G = Generator(8, c_dim, 8, SIZE, channels, {"num_layers": 1}, synthesis).requires_grad_(False)
    for module in G.modules():
        if isinstance(module, SynthesisLayer):
            module.noise_strength.fill_(0.3)
    return G.eval()


def run(measuring: Measuring, most: int = 5000) -> dict[str, Measurement]:
    for _ in range(most):
        if measuring.done:
            return {measurement.metric: measurement for measurement in measuring.measurements}
        measuring.advance()
    raise AssertionError("it does not end")


def measured(
    G: Any, data: Path, folder: Path | None, metrics: Any, labels: bool = False, **settings: Any
) -> tuple[dict[str, Measurement], list[str]]:
    real = Reals(ImageDataset(data, use_labels=labels), Detectors(folder and str(folder)))
    measuring = Measuring(G, real, list(metrics), device=CPU, **settings)
    found = run(measuring)
    return found, measuring.failures


def numbers(found: dict[str, Measurement]) -> dict[str, float]:
    return {name: value for measurement in found.values() for name, value in measurement.results.items()}


def test_every_metric_gives_its_numbers(tiny_dataset: Path, folder: Path) -> None:
    found, failures = measured(make_generator(), tiny_dataset, folder, METRICS)
    assert failures == []
    assert list(found) == list(METRICS)
    for name, measurement in found.items():
        metric = METRICS[name]
        assert list(measurement.results)[: len(metric.results)] == list(metric.results)
        assert all(math.isfinite(value) for value in measurement.results.values())
        assert measurement.detector == metric.detector
        assert (measurement.detector_sha256 is None) == (metric.detector is None)
        assert measurement.seconds > 0
    assert [found[name].num_reals for name in ("fid50k_full", "fid50k", "is50k", "swd")] == [40, 30, None, 40]
    assert [found[name].num_fakes for name in ("fid50k_full", "fid5k_full", "swd")] == [NUM_FAKES, 40, 40]
    assert set(found["swd"].results) == {"swd", "swd_16"}
    lengths = [found[name].results[name] for name in METRICS if METRICS[name].kind == "ppl"]
    assert len({round(length, 6) for length in lengths}) == len(lengths) == 5  # none is another one


def test_fid_is_that_of_a_plain_implementation(tiny_dataset: Path, folder: Path) -> None:
    G, dataset = make_generator(), ImageDataset(tiny_dataset)
    found, _ = measured(G, tiny_dataset, folder, ["fid50k_full"])
    real = Reals(dataset, Detectors(str(folder)))
    seen: list[torch.Tensor] = []
    detector = real.detectors.load(INCEPTION, CPU)
    measuring = Measuring(G, real, ["kid50k_full"], device=CPU)  # which keeps the features of the same fakes
    with pytest.MonkeyPatch.context() as patch:
        features = Detector.features

        def watched(self: Detector, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return features(self, images)

        patch.setattr(Detector, "features", watched)
        run(measuring)
    fakes = torch.cat(seen)[-NUM_FAKES:]
    every = torch.from_numpy(dataset.images(np.arange(len(dataset))))
    x, y = (detector.features(images).double().numpy() for images in (every, fakes))
    s1, s2 = (np.cov(rows, rowvar=False, bias=True) for rows in (x, y))
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s1 + s2 - 2 * root)
    assert found["fid50k_full"].results["fid50k_full"] == pytest.approx(expected, rel=1e-5)


class Same(torch.nn.Module):
    """A generator of one picture."""

    c_dim, z_dim, img_size = 0, 8, (SIZE, SIZE)

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level

    def mapping(self, z: torch.Tensor, c: torch.Tensor, skip_w_avg_update: bool) -> torch.Tensor:
        assert skip_w_avg_update
        return z[:, None]

    def synthesis(self, ws: torch.Tensor, noise_mode: str, force_fp32: bool) -> torch.Tensor:
        return torch.full([len(ws), 3, SIZE, SIZE], self.level)


@pytest.fixture
def plain_dataset(tmp_path: Path) -> Path:
    """48 pictures of one and the same grey, 128."""
    for i in range(48):
        (tmp_path / "plain").mkdir(exist_ok=True)
        PIL.Image.new("RGB", (SIZE, SIZE), (128, 128, 128)).save(tmp_path / "plain" / f"{i:02d}.png")
    return tmp_path / "plain"


def test_equal_sets_are_at_no_distance(plain_dataset: Path, folder: Path) -> None:
    found, failures = measured(Same(0.0), plain_dataset, folder, set(METRICS) - {"pr50k3", "pr50k3_full"})
    assert failures == [
        "diversity: the images of the dataset are all the same, so there is nothing to compare with",
    ]
    for name, value in numbers(found).items():
        assert value == pytest.approx(int(name == "is50k_mean"), abs=1e-5), name
    other = numbers(measured(Same(0.5), plain_dataset, folder, ["fid50k_full", "kid50k_full"])[0])
    assert min(other.values()) > 0.01


class Copies(Same):
    """A generator that has learnt images by heart."""

    def __init__(self, images: np.ndarray) -> None:
        super().__init__(0)
        self.images, self.place = torch.from_numpy(images), 0

    def synthesis(self, ws: torch.Tensor, noise_mode: str, force_fp32: bool) -> torch.Tensor:
        which = torch.arange(self.place, self.place + len(ws)) % len(self.images)
        self.place += len(ws)
        return (self.images[which] - 127.75) / 127.5


def test_copies_of_the_images_are_as_good_as_the_images(
    tiny_dataset: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["fid5k_full", "pr50k3_full", "diversity"]  # of as many as there are images
    monkeypatch.setitem(METRICS, "pr50k3_full", dataclasses.replace(METRICS["pr50k3_full"], num_fakes=40))
    dataset = ImageDataset(tiny_dataset)
    images = dataset.images(np.arange(40))
    all_of_them = numbers(measured(Copies(images), tiny_dataset, folder, names)[0])
    assert all_of_them["fid5k_full"] == pytest.approx(0, abs=1e-6)
    assert all_of_them["diversity"] == pytest.approx(1)
    assert all_of_them["pr50k3_full_precision"] == all_of_them["pr50k3_full_recall"] == 1
    few = numbers(measured(Copies(images[:4]), tiny_dataset, folder, names)[0])
    assert few["fid5k_full"] > 0.01
    assert few["diversity"] < 0.9
    assert few["pr50k3_full_precision"] == 1
    assert few["pr50k3_full_recall"] < 0.5


def test_how_many_images_at_a_time_changes_nothing(
    tiny_dataset: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    G = make_generator()
    names = ["fid50k_full", "is50k", "ppl_zfull", "swd", "diversity"]
    expected = numbers(measured(G, tiny_dataset, folder, names)[0])
    # 1e-3: path lengths are differences, divided by 1e-8
    assert numbers(measured(G, tiny_dataset, folder, names, images_at_once=5)[0]) == pytest.approx(expected, rel=1e-3)

    monkeypatch.setattr(measure, "_CPU_DETECTOR_IMAGES", 32)
    freed = []
    limits = {"synthesis": 9, "features": 3}
    synthesis, features = type(G.synthesis).forward, Detector.features

    def limited(what: str, call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def guarded(self: Any, images: torch.Tensor, **settings: Any) -> torch.Tensor:
            if len(images) > limits[what] and images.shape[-1] != 64:  # of a detector's trial
                raise torch.OutOfMemoryError("CUDA out of memory")
            return call(self, images, **settings)

        return guarded

    monkeypatch.setattr(type(G.synthesis), "forward", limited("synthesis", synthesis))
    monkeypatch.setattr(Detector, "features", limited("features", features))
    found, failures = measured(G, tiny_dataset, folder, names, free_memory=lambda: freed.append(1))
    assert failures == []
    assert numbers(found) == pytest.approx(expected, rel=1e-3)
    # synthesis 32 -> 16 -> 8, features 32 -> 16 -> 8 -> 4 -> 2, once; paths 16 -> 8
    assert len(freed) == 2 + 4 + 1

    limits["features"] = 0
    found, failures = measured(G, tiny_dataset, folder, names, free_memory=lambda: None)
    assert set(found) == set(names) - {"fid50k_full"}
    assert len(failures) == 1
    assert failures[0].startswith("fid50k_full: out of memory")


def test_nothing_else_is_changed(tiny_dataset: Path, folder: Path) -> None:
    G = make_generator().train()  # in which mode a mapping network keeps a mean
    before = {name: tensor.clone() for name, tensor in G.state_dict().items()}
    real = Reals(ImageDataset(tiny_dataset), Detectors(str(folder)))
    measuring = Measuring(G, real, ["fid50k_full", "ppl_wfull", "swd"], device=CPU)
    random = torch.get_rng_state()
    while not measuring.done:
        measuring.advance()
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.is_grad_enabled()
    after = G.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert measuring.share == 1
    torch.manual_seed(1)  # and what is measured does not depend on it
    again = Measuring(G, real, ["fid50k_full", "ppl_wfull", "swd"], device=CPU)
    assert numbers(run(again)) == numbers({m.metric: m for m in measuring.measurements})


def test_seeds_give_other_fakes(tiny_dataset: Path, folder: Path) -> None:
    found = [measured(make_generator(), tiny_dataset, folder, ["fid50k_full"], seed=seed)[0] for seed in (0, 1)]
    assert numbers(found[0]) != numbers(found[1])


class _Counting(ImageDataset):
    """Notes which images are decoded."""

    decoded: list[int]

    def unflipped(self, row: int) -> np.ndarray:
        self.decoded.append(row)
        return super().unflipped(row)


@pytest.fixture
def counting(tiny_dataset: Path) -> Iterator[Callable[[], _Counting]]:
    def make() -> _Counting:
        dataset = _Counting(tiny_dataset, mirror=True)
        dataset.decoded = []
        return dataset

    return make


def test_what_is_known_of_the_reals_is_kept(counting: Any, folder: Path, tmp_path: Path) -> None:
    names = ["fid50k_full", "fid50k", "kid50k_full", "pr50k3_full"]

    def once(dataset: _Counting) -> dict[str, float]:
        real = Reals(dataset, Detectors(str(folder)), cache=tmp_path / "kept")
        found = run(Measuring(make_generator(), real, names, device=CPU))
        assert real.notes == []
        assert numbers(run(Measuring(make_generator(), real, names, device=CPU))) == numbers(found)
        return numbers(found)

    first = counting()
    expected = once(first)
    assert sorted(first.decoded) == list(range(40))  # each once, no mirror images, for all metrics
    second = counting()
    assert once(second) == expected
    assert second.decoded == []

    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 5
    damaged = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    files[0].write_bytes(b"no zip")
    third = counting()
    assert once(third) == expected
    assert third.decoded

    write_detectors_of_other_weights(folder, tmp_path / "other")
    real = Reals(counting(), Detectors(str(tmp_path / "other")), cache=tmp_path / "kept")
    run(Measuring(make_generator(), real, ["fid50k_full"], device=CPU))
    assert real.dataset.decoded  # type: ignore[attr-defined]


def write_detectors_of_other_weights(folder: Path, dest: Path) -> None:
    """The features of another one."""
    dest.mkdir()
    (dest / INCEPTION).write_bytes((folder / VGG).read_bytes())


def test_a_full_disk_costs_a_note(counting: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, **settings: Any) -> None:
        raise DiskFullError(f"{path}: no space left on the device; free some, or choose another place")

    monkeypatch.setattr(reals, "atomic_path", full)
    real = Reals(counting(), Detectors(str(folder)))
    assert "fid50k_full" in run(Measuring(make_generator(), real, ["fid50k_full"], device=CPU))
    (note,) = real.notes
    assert "not kept" in note
    assert "no space left" in note


def test_without_its_detector_a_metric_is_left_out(tiny_dataset: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / INCEPTION).write_bytes((folder / INCEPTION).read_bytes())
    names = ["pr50k3_full", "fid50k_full", "ppl_zend", "swd"]
    found, failures = measured(make_generator(), tiny_dataset, tmp_path / "one", names)
    assert list(found) == ["fid50k_full", "swd"]
    (line,) = failures
    assert line.startswith(f"pr50k3_full, ppl_zend: {VGG} is not here")


def test_a_damaged_image_costs_what_needs_it(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with zipfile.ZipFile(write_dataset(tmp_path / "data.zip", count=6)) as archive:
        archive.extractall(data)
    damaged = data / "00000" / "img00000003.png"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 255
    damaged.write_bytes(content)
    found, failures = measured(make_generator(), data, folder, ["fid50k_full", "is50k", "swd", "ppl_wend"])
    assert list(found) == ["is50k", "ppl_wend"]
    (line,) = failures
    assert line.startswith("fid50k_full, swd: ")
    assert "img00000003.png" in line


def test_too_few_images_are_said(folder: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.zip", count=1)
    found, failures = measured(make_generator(), data, folder, ["kid50k_full", "pr50k3_full", "diversity", "is50k"])
    assert list(found) == ["is50k"]
    assert [line.partition(":")[0] for line in failures] == ["kid50k_full", "pr50k3_full", "diversity"]
    assert all("at least 2" in line or "more than 3" in line for line in failures)


def test_a_network_that_has_diverged_is_said(tiny_dataset: Path, folder: Path) -> None:
    found, failures = measured(Same(math.nan), tiny_dataset, folder, ["fid50k_full", "swd", "ppl_zend"])
    assert found == {}
    assert failures[0].startswith("fid50k_full, swd: the network makes pictures with values that are no finite")
    assert failures[1].startswith("ppl_zend: ")


def test_labels_are_those_of_the_dataset(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(tmp_path / "data.zip", count=40, classes=4)
    G = make_generator(c_dim=4)
    seen: list[torch.Tensor] = []
    mapping = type(G.mapping).forward

    def watched(self: Any, z: torch.Tensor, c: torch.Tensor, **settings: Any) -> torch.Tensor:
        seen.append(c)
        return mapping(self, z, c, **settings)

    monkeypatch.setattr(type(G.mapping), "forward", watched)
    found, failures = measured(G, data, folder, ["fid50k_full"], labels=True)
    assert failures == []
    assert found
    labels = torch.cat(seen)
    assert labels.sum(1).tolist() == [1.0] * len(labels)
    assert (labels.sum(0) > 0).all()
    _, failures = measured(G, data, folder, ["fid50k_full"], labels=False)
    assert failures == [
        "fid50k_full: the network takes labels of 4 numbers and those of the dataset have 0; give the dataset that it "
        "was trained on"
    ]


def test_whatever_is_raised_becomes_a_failure(
    tiny_dataset: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(frechet, "frechet_distance", broken)
    found, failures = measured(make_generator(), tiny_dataset, folder, ["fid50k_full", "swd"])
    assert list(found) == ["swd"]
    assert failures == ["fid50k_full: ZeroDivisionError: of all things"]
    monkeypatch.setattr(Measuring, "_planned", broken)
    assert measured(make_generator(), tiny_dataset, folder, ["fid50k_full", "swd"])[1] == [
        "fid50k_full, swd: ZeroDivisionError: of all things"
    ]


TOGETHER = ["fid50k_full", "kid50k_full", "pr50k3", "ppl_wfull", "swd", "diversity"]


def _work(rank: int, port: int, data: Path, folder: Path, cache: Path, sending: Any) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    make_small(lambda table, name, value: table.__setitem__(name, value))
    world = join(Place(rank, 2, rank, 2, "127.0.0.1", port), 60)
    dataset = ImageDataset(data)
    if rank == 1:
        cache = cache / "of another machine"
    real = Reals(dataset, Detectors(str(folder)), cache=cache)
    results = []
    for damage in (False, False, True):
        if damage and rank == 1:  # one of them fails: both go on
            type(real.detectors.load(VGG, CPU)).lpips = None  # type: ignore[assignment]
        measuring = Measuring(make_generator(), real, TOGETHER, device=CPU, world=world)
        while not world.agree(int(rank == 0 and measuring.done), "whether it is over"):
            measuring.advance()
        results.append(({m.metric: m for m in measuring.measurements}, measuring.failures))
    sending.send(results)
    world.close()
    os._exit(0)


def test_two_processes_find_what_one_finds(tiny_dataset: Path, folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gan.metrics.measure"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    workers = [
        context.Process(target=_work, args=(rank, store.port, tiny_dataset, folder, tmp_path / "kept", pipes[rank][1]))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    try:
        assert pipes[0][0].poll(90)
        results = pipes[0][0].recv()
        assert pipes[1][0].poll(30)
        assert pipes[1][0].recv() == [({}, [])] * 3
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    expected = numbers(measured(make_generator(), tiny_dataset, folder, TOGETHER, world=ALONE)[0])
    for found, failures in results[:2]:
        assert failures == []
        assert numbers(found) == pytest.approx(expected, rel=1e-9)
    found, failures = results[2]
    assert set(found) == set(TOGETHER) - {"ppl_wfull"}
    (line,) = failures
    assert line.startswith("ppl_wfull: TypeError")


def test_it_can_be_dropped_at_any_moment(tiny_dataset: Path, folder: Path) -> None:
    G, real = make_generator(), Reals(ImageDataset(tiny_dataset), Detectors(str(folder)))
    names, portions = ["fid50k_full", "is50k", "swd", "diversity"], 0
    while True:
        measuring = Measuring(G, real, names, device=CPU)
        for _ in range(portions):
            with torch.no_grad():
                next(measuring._portions, None)
        measuring._portions.close()  # RuntimeError if it goes on
        if len(measuring.measurements) == len(names):
            break
        portions += 7


class _NotFinite(torch.nn.Module):
    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        return (
            img.to(torch.float32).mean([2, 3]) * float("nan") if len(img) != 2 or img.max() > 0 else torch.zeros(2, 4)
        )


def test_a_detector_that_gives_no_numbers_takes_only_its_metrics_with_it(tiny_dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / INCEPTION
    write_script(path, _NotFinite())
    found, failures = measured(make_generator(), tiny_dataset, tmp_path, ["fid50k_full", "kid50k_full", "swd"])
    assert list(found) == ["swd"]
    assert failures[0].startswith(f"fid50k_full, kid50k_full: {path}: gives values that are no finite numbers; ")


def test_a_number_for_which_memory_runs_out_is_tried_again_and_on_the_cpu(
    tiny_dataset: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = measured(make_generator(), tiny_dataset, folder, ["fid50k_full"])
    tried: list[str] = []
    for name in ("eigh", "eigvalsh"):
        real = getattr(torch.linalg, name)

        def full_twice(matrix: torch.Tensor, name: str = name, real: Any = real) -> Any:
            tried.append(name)
            if tried.count(name) < 3:
                raise torch.OutOfMemoryError
            return real(matrix)

        monkeypatch.setattr(torch.linalg, name, full_twice)
    monkeypatch.setattr(Reals, "known", lambda self, key, sha256: self._known.get((key, sha256)))
    freed: list[int] = []
    found, failures = measured(
        make_generator(), tiny_dataset, folder, ["fid50k_full"], free_memory=lambda: freed.append(1)
    )
    assert (failures, numbers(found)) == ([], numbers(expected))
    assert tried == ["eigh"] * 3 + ["eigvalsh"] * 3
    assert len(freed) == 4


def test_work_that_fails_on_one_process_fails_on_all() -> None:
    class Pair(World):
        def gather(self, value: Any, what: str) -> list[Any]:
            return [value, "no memory there"]

    with pytest.raises(LostError, match="no memory there"):
        by_all(Pair(), lambda: 3, "a test")
    with pytest.raises(LostError, match="ZeroDivisionError"):
        by_all(ALONE, lambda: 1 / 0, "a test")
    assert by_all(ALONE, lambda: 3, "a test") == 3


def test_without_a_home_folder_nothing_is_kept(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    detectors = Detectors()
    assert detectors.path(INCEPTION) is None
    assert "no folder" in detectors.missing_line([INCEPTION])
    assert Reals(ImageDataset(tiny_dataset), detectors).folder is None
    found, failures = measured(make_generator(), tiny_dataset, None, ["swd", "fid50k_full"])
    assert list(found) == ["swd"]
    assert len(failures) == 1
    with pytest.raises(GanError, match="XDG_CACHE_HOME"):
        prefetch([INCEPTION])
