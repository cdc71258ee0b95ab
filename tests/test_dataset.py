"""The packed dataset and its loader: zips and folders, labels, subsets, and what is said of damaged ones."""

import contextlib
import itertools
import json
import os
import pickle
import re
import signal
import sys
import types
import zipfile
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from checks import refusal
from pictures import encoded, noise, raw_png

from gan.data.dataset import ImageDataset
from gan.data.decode import decode
from gan.data.labels import LabelTable
from gan.data.loader import BatchStream
from gan.data.sampler import epoch_order
from gan.errors import GanError

N = 10
PIXELS = noise(N, 8, 8, 3)
NAMES = [f"{i // 4:05d}/img{i:08d}.png" for i in range(N)]


def png_16_bit_rgb():
    """8x8 and black; Pillow reads such files, but writes none."""
    return raw_png(8, 8, 16, 2, zlib.compress(bytes(8 * (1 + 8 * 6))))


def files(pixels=PIXELS, labels=None):
    made = {name: encoded(image) for name, image in zip(NAMES, pixels, strict=True)}
    return made if labels is None else {**made, "dataset.json": json.dumps({"labels": labels}).encode()}


def by_name(labels):
    return [[name, label] for name, label in zip(NAMES, labels, strict=True)]


def write_zip(path, contents):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in reversed(contents.items()):  # the order in the file does not matter
            archive.writestr(name, data)
    return path


def write_folder(path, contents):
    for name, data in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.fixture(params=["zip", "folder"])
def make(request, tmp_path):
    """Writes a dataset both ways."""
    counter = itertools.count()

    def write(contents):
        name = f"pets-{next(counter)}"
        if request.param == "zip":
            return write_zip(tmp_path / f"{name}.zip", contents)
        return write_folder(tmp_path / name, contents)

    return write


def everything(dataset):
    return dataset.images(np.arange(len(dataset)))


class TestImages:
    def test_come_in_the_order_of_their_names(self, make):
        dataset = ImageDataset(make(files()))
        assert len(dataset) == N
        assert np.array_equal(everything(dataset), PIXELS.transpose(0, 3, 1, 2))
        assert everything(dataset).dtype == np.uint8
        assert dataset.image_shape == (dataset.channels, dataset.height, dataset.width) == (3, 8, 8)

    def test_grey_pictures_have_one_channel(self, make):
        dataset = ImageDataset(make(files(PIXELS[..., 0])))
        assert dataset.image_shape == (1, 8, 8)
        assert np.array_equal(everything(dataset)[:, 0], PIXELS[..., 0])

    @pytest.mark.parametrize("fast", [True, False])
    def test_transparent_pictures_keep_their_alpha_and_hidden_colours(self, make, monkeypatch, fast):
        if not fast:
            monkeypatch.setitem(sys.modules, "pyspng", None)
        pixels = noise(N, 16, 24, 4)
        pixels[:, :8, :, 3] = 0
        dataset = ImageDataset(make(files(pixels)), mirror=True)
        assert (dataset.width, dataset.height, dataset.channels) == (24, 16, 4)
        images = everything(dataset)
        assert np.array_equal(images[:N], pixels.transpose(0, 3, 1, 2))
        assert np.array_equal(images[N:], images[:N, :, :, ::-1])

    @pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (8, 8, 4)])
    def test_a_fast_decoder_that_gives_something_else_is_not_believed(self, monkeypatch, shape):
        pixels = noise(*shape)
        expected = pixels[None] if len(shape) == 2 else pixels.transpose(2, 0, 1)
        for wrong in (pixels[:4], pixels.astype(np.uint16)):
            monkeypatch.setitem(sys.modules, "pyspng", types.SimpleNamespace(load=lambda data, wrong=wrong: wrong))
            assert np.array_equal(decode(encoded(pixels), "here"), expected)

    def test_the_name_is_that_of_the_file(self, make):
        assert ImageDataset(make(files())).name == "pets-0"

    def test_hidden_files_and_other_files_are_no_images(self, make):
        clutter = {"__MACOSX/img.png": b"", ".thumbs/a.png": b"", "00000/._img.png": b"", "readme.txt": b"hello"}
        assert len(ImageDataset(make({**files(), **clutter}))) == N

    def test_any_usual_format_will_do(self, make):
        contents = {
            "a.PNG": encoded(PIXELS[0], optimize=True),
            "b.bmp": encoded(PIXELS[1], "BMP"),
            "c.webp": encoded(PIXELS[2], "WEBP", lossless=True),
            "d.jpg": encoded(np.full([8, 8, 3], 99, dtype=np.uint8), "JPEG", quality=95),
        }
        images = everything(ImageDataset(make(contents)))
        assert np.array_equal(images[:3], PIXELS[:3].transpose(0, 3, 1, 2))
        assert np.abs(images[3].astype(int) - 99).max() <= 1

    def test_pictures_are_the_same_without_the_fast_decoder(self, make, monkeypatch):
        dataset = ImageDataset(make(files()))
        monkeypatch.setitem(sys.modules, "pyspng", None)  # importing it fails
        assert np.array_equal(everything(dataset), PIXELS.transpose(0, 3, 1, 2))

    def test_a_dataset_can_be_sent_to_another_process(self, make):
        dataset = ImageDataset(make(files()), mirror=True)
        expected = everything(dataset)  # it has the zip open
        assert np.array_equal(everything(pickle.loads(pickle.dumps(dataset))), expected)

    def test_a_process_forked_off_opens_the_zip_for_itself(self, tmp_path, monkeypatch):
        """Two processes that read through one open file move each other's position."""
        dataset = ImageDataset(write_zip(tmp_path / "pets.zip", files()))
        opened = []
        real_zip_file = zipfile.ZipFile
        monkeypatch.setattr(zipfile, "ZipFile", lambda *args: opened.append(args) or real_zip_file(*args))
        dataset.image(0)
        assert len(opened) == 0
        monkeypatch.setattr(os, "getpid", lambda: -7)
        dataset.image(0), dataset.image(1)
        assert len(opened) == 1

    def test_mirroring_appends_the_flipped_set(self, make):
        dataset = ImageDataset(make(files()), mirror=True)
        assert len(dataset) == 2 * N
        images = everything(dataset)
        assert np.array_equal(images[:N], PIXELS.transpose(0, 3, 1, 2))
        assert np.array_equal(images[N:], images[:N, :, :, ::-1])


class TestSubset:
    @pytest.mark.parametrize("seed", [0, 1, 7])
    @pytest.mark.parametrize("size", [1, 4, 9])
    def test_is_a_sorted_choice_that_the_seed_decides(self, make, size, seed):
        dataset = ImageDataset(make(files()), subset=size, seed=seed)
        order = np.arange(N)
        np.random.RandomState(seed).shuffle(order)
        chosen = np.sort(order[:size])
        assert np.array_equal(everything(dataset), PIXELS[chosen].transpose(0, 3, 1, 2))

    def test_as_many_as_there_are_is_all(self, make):
        path = make(files())
        assert len(ImageDataset(path, subset=N)) == len(ImageDataset(path, subset=N + 5)) == N

    def test_a_view_is_the_dataset_opened_with_its_choice(self, make, monkeypatch):
        path = make(files(labels=by_name([0, 1] * 5)))
        whole = ImageDataset(path, use_labels=True)
        opened = ImageDataset(path, use_labels=True, subset=4, mirror=True, seed=3)
        monkeypatch.setattr(ImageDataset, "_check_images", lambda self: pytest.fail("looked again"))
        view = whole.view(subset=4, mirror=True, seed=3)
        assert np.array_equal(everything(view), everything(opened))
        for mine, theirs in zip(view.label_table(), opened.label_table(), strict=True):
            assert np.array_equal(mine, theirs)
        assert len(whole) == N

    def test_goes_before_mirroring(self, make):
        path = make(files())
        half, both = ImageDataset(path, subset=4), ImageDataset(path, subset=4, mirror=True)
        assert len(both) == 8
        assert np.array_equal(everything(both)[:4], everything(half))
        assert np.array_equal(everything(both)[4:], everything(half)[:, :, :, ::-1])


class TestLabels:
    classes = (3, 0, 1, 1, 2, 3, 0, 0, 3, 3)

    def table(self, dataset):
        rows, index = dataset.label_table()
        assert rows.dtype == np.float32
        assert index.dtype == np.int64
        assert len(index) == len(dataset)
        return rows[index]

    def test_classes_become_one_hot(self, make):
        dataset = ImageDataset(make(files(labels=by_name(self.classes))), use_labels=True)
        assert dataset.label_dim == 4
        assert np.array_equal(self.table(dataset), np.eye(4)[list(self.classes)])

    def test_classes_that_never_occur_have_a_column(self, make):
        dataset = ImageDataset(make(files(labels=by_name([5] * N))), use_labels=True)
        assert dataset.label_dim == 6

    def test_vectors_stay_what_they_are(self, make):
        vectors = [[i / 4, -1.5, float(i % 2)] for i in range(N)]
        dataset = ImageDataset(make(files(labels=by_name(vectors))), use_labels=True)
        assert dataset.label_dim == 3
        assert np.array_equal(self.table(dataset), np.array(vectors, dtype=np.float32))

    def test_equal_vectors_share_a_row(self, make):
        vectors = [[float(i % 2), 1] for i in range(N)]
        rows, _ = ImageDataset(make(files(labels=by_name(vectors))), use_labels=True).label_table()
        assert sorted(rows.tolist()) == [[0, 1], [1, 1]]

    def test_follow_their_images_into_subsets_and_mirrors(self, make):
        path = make(files(labels=by_name(self.classes)))
        dataset = ImageDataset(path, use_labels=True, subset=4, mirror=True, seed=1)
        images, labels = everything(dataset), self.table(dataset).argmax(axis=1)
        for image, label in zip(images[:4], labels[:4], strict=True):
            i = next(i for i in range(N) if np.array_equal(PIXELS[i].transpose(2, 0, 1), image))
            assert label == self.classes[i]
        assert np.array_equal(labels[4:], labels[:4])

    def test_labels_are_found_by_name_not_by_place(self, make):
        backwards = [[name.replace("/", "\\"), label] for name, label in reversed(by_name(self.classes))]
        dataset = ImageDataset(make(files(labels=backwards)), use_labels=True)
        assert np.array_equal(self.table(dataset).argmax(axis=1), self.classes)

    def test_are_not_read_unless_asked_for(self, make):
        dataset = ImageDataset(make(files(labels="nonsense")))
        assert dataset.label_dim == 0
        assert self.table(dataset).shape == (N, 0)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (None, "has no labels; leave out --cond, or pack the images with labels"),
            ([], "has no labels"),
            (by_name([0] * N)[:-2], f"2 bad labels: {NAMES[-2]} has no label; {NAMES[-1]} has no label; mend them"),
            (by_name([0] * N)[:-1], f"1 bad label: {NAMES[-1]} has no label; mend them, or pack the images again"),
            (
                [["other.png", 0]],
                f"10 bad labels: {NAMES[0]} has no label; .*{NAMES[4]} has no label; and 5 more; mend",
            ),
            (by_name([0] * (N - 1) + [-1]), f"{NAMES[-1]} is -1, not a class number from 0 on"),
            (by_name([0] * (N - 1) + [True]), f"{NAMES[-1]} is true, not a class number"),
            (by_name([0] * (N - 1) + [float("nan")]), f"{NAMES[-1]} is NaN, not a class number"),
            (by_name([0] * (N - 1) + [1.5]), f"{NAMES[-1]} is 1.5, not a class number"),
            (by_name([[1.0]] + [0] * (N - 1)), rf"1 bad label: {NAMES[0]} is \[1.0\], not a class number from 0 on"),
            ([*by_name([0] * N), [NAMES[2], 0], [NAMES[2], 1]], f"1 bad label: {NAMES[2]} has more than one"),
            (by_name([2] + [[1.0]] * (N - 1)), f"1 bad label: {NAMES[0]} is 2, not a list of numbers"),
            (by_name([[1.0]] * (N - 1) + [["a"]]), r'is \["a"\], not a list of numbers'),
            (by_name([[1.0]] * (N - 1) + [[True]]), r"is \[true\], not a list of numbers"),
            (by_name([[1.0]] * (N - 1) + [[float("nan")]]), r"is \[NaN\], not a list of finite numbers"),
            (by_name([[1.0]] * (N - 1) + [[1e39]]), r"is \[1e\+39\], not a list of finite numbers"),
            (by_name([[1.0]] * (N - 1) + [[10**400]]), r"is \[1000.*\.\.\., not a list of finite numbers"),
            (by_name([[]] * N), r"10 bad labels: .* is \[\], not a list of numbers"),
            (by_name(["cat"] * N), '10 bad labels: .* is "cat", not a class number'),
            (by_name([[1.0]] + [[1.0, 2]] * (N - 1)), f"1 bad label: {NAMES[0]} has 1 number, not 2"),
            ("cats", r'"labels" is not a list of \[file name, label\]'),
            ([1, *by_name([0] * N)], r"1 bad label: row 0 is 1, not \[file name, label\]"),
        ],
    )
    def test_bad_ones_are_named(self, make, labels, message):
        contents = {**files(), "dataset.json": json.dumps({"labels": labels}).encode()}
        path = make(contents)
        text = refusal(lambda: ImageDataset(path, use_labels=True))
        assert re.search(message, text)
        assert text.startswith(f"{path}: dataset.json: ")

    def test_rows_of_files_that_are_not_there_do_not_matter(self, make):
        rows = [["gone.png", -1], *by_name(self.classes), ["gone.png", "x"], ["__MACOSX/a.png", [1.0]]]
        dataset = ImageDataset(make(files(labels=rows)), use_labels=True)
        assert np.array_equal(self.table(dataset), np.eye(4)[list(self.classes)])

    def named(self, make, labels, class_names):
        content = {"labels": by_name(labels), "class_names": class_names}
        return ImageDataset(make({**files(), "dataset.json": json.dumps(content).encode()}), use_labels=True)

    def test_named_classes_have_a_column_each(self, make):
        dataset = self.named(make, [2, 0] * 5, ["ant", "bee", "cat", "dog", "eel"])
        assert (dataset.label_dim, dataset.class_names) == (5, ["ant", "bee", "cat", "dog", "eel"])
        assert dataset.view(subset=3).class_names == dataset.class_names
        assert ImageDataset(dataset.path).class_names is None

    @pytest.mark.parametrize(("empty", "labels"), [(None, [0] * N), ([], [1] * N)])
    def test_without_names_there_are_none(self, make, empty, labels):
        assert self.named(make, labels, empty).class_names is None

    @pytest.mark.parametrize(
        ("labels", "class_names", "message"),
        [
            ([0] * (N - 1) + [2], ["a", "b"], f"1 bad label: {NAMES[-1]} is class 2, but class_names has 2"),
            ([[0.5, 1, 0]] * N, ["a", "b"], "10 bad labels: .* has 3 numbers, not 2"),
            ([0] * N, ["a", 2], r'"class_names" is \["a", 2\], not a list of texts'),
            ([0] * N, {"a": 0}, '"class_names" is .*, not a list of texts'),
            ([0] * N, ["a"] * 10001, '"class_names" has 10001 names; 10000 are the most'),
        ],
    )
    def test_names_that_do_not_fit_are_named(self, make, labels, class_names, message):
        with pytest.raises(GanError, match=message):
            self.named(make, labels, class_names)

    @pytest.mark.parametrize(
        ("labels", "kind"),
        [([0, 1] * 5, "classes"), ([[0, 1], [1.0, 1]] * 5, "multi-hot"), ([[0, 0.5]] * N, "vectors")],
    )
    def test_their_kind_is_known(self, make, labels, kind):
        assert ImageDataset(make(files(labels=by_name(labels))), use_labels=True).label_kind == kind
        assert ImageDataset(make(files(labels=by_name(labels)))).label_kind is None

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"{", r"dataset\.json is not valid JSON"),
            (b"[]", r"dataset\.json is not a JSON object"),
            (b"\xff\xfe{", r"dataset\.json is not valid JSON"),
        ],
    )
    def test_a_damaged_list_of_labels_is_named(self, make, text, message):
        with pytest.raises(GanError, match=message):
            ImageDataset(make({**files(), "dataset.json": text}), use_labels=True)

    def test_one_class_number_that_is_an_id_does_not_take_all_memory(self, make):
        """Class numbers make one column each; a product number of eight digits is a mistake to be told of."""
        with pytest.raises(GanError, match="label"):
            ImageDataset(make(files(labels=by_name([31415926] * N))), use_labels=True)


class TestRefusals:
    def refuses(self, path, message):
        text = refusal(ImageDataset, path)
        assert re.search(message, text)
        assert str(path) in text

    def test_nothing_there(self, tmp_path):
        self.refuses(tmp_path / "missing.zip", "no such file or folder; pack your images with dataset_tool.py first")

    def test_no_images(self, make):
        self.refuses(make({"readme.txt": b"hello"}), r"holds no images \(png, jpg, jpeg, webp, bmp\)")

    def test_not_a_zip(self, tmp_path):
        path = tmp_path / "pets.zip"
        path.write_bytes(b"this is no zip")
        self.refuses(path, "not a readable zip file")

    @pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
    def test_a_truncated_zip(self, tmp_path, share):
        path = write_zip(tmp_path / "pets.zip", files())
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        self.refuses(path, "not a readable zip file")

    def test_differing_sizes(self, make):
        contents = {**files(), NAMES[6]: encoded(np.zeros([16, 16, 3], dtype=np.uint8))}
        message = f"{NAMES[6]} is 16x16 RGB, but {NAMES[0]} is 8x8 RGB; pack it with: .* --resolution 8x8$"
        self.refuses(make(contents), message)

    def test_differing_modes(self, make):
        contents = {**files(), NAMES[6]: encoded(PIXELS[6, ..., 0])}
        message = f"{NAMES[6]} is 8x8 grey, but {NAMES[0]} is 8x8 RGB; pack it with: .*packed.zip$"
        self.refuses(make(contents), message)

    @pytest.mark.parametrize(
        ("width", "height", "nearest"),
        [(9, 8, "8x8"), (99, 66, "96x64"), (4, 4, "8x8"), (1, 1, "8x8"), (8, 640, "8x128")],
    )
    def test_sizes_that_cannot_be_trained_on(self, make, width, height, nearest):
        image = encoded(np.zeros([height, width, 3], dtype=np.uint8))
        message = f"a.png and all others are {width}x{height}; training takes .* --resolution {nearest}$"
        self.refuses(make({"a.png": image, "b.png": image}), message)

    @pytest.mark.parametrize(
        ("image", "said"),
        [
            (encoded(np.zeros([8, 8], dtype=np.uint16)), "of 16 bits"),
            (png_16_bit_rgb(), "of 16 bits"),
            (encoded(np.zeros([8, 8, 2], dtype=np.uint8)), "grey with transparency"),
            (
                encoded(np.zeros([8, 8], dtype=np.uint8), transparency=0),
                "partly transparent by its palette or by a colour",
            ),
            (encoded(PIL.Image.new("P", (8, 8)), transparency=0), "partly transparent by its palette or by a colour"),
            (encoded(PIL.Image.new("CMYK", (8, 8)), "JPEG"), "CMYK"),
        ],
        ids=["16 bit", "16 bit RGB", "grey and alpha", "grey but one", "palette", "CMYK"],
    )
    def test_pixels_that_would_be_trained_as_something_else(self, make, image, said):
        """Else it would be found out by the first step of training, or never."""
        message = f"{NAMES[4]} is {said}; training takes 8-bit grey, RGB and RGBA; pack it with: python dataset_tool.py"
        self.refuses(make({**files(), NAMES[4]: image}), message)
        with pytest.raises(GanError, match=f"here is {said}; pack it again"):
            decode(image, "here")

    @pytest.mark.parametrize(
        "data", [b"", b"this is no image", encoded(PIXELS[0])[:20]], ids=["empty", "text", "short"]
    )
    def test_a_file_that_is_no_image(self, make, data):
        self.refuses(make({**files(), NAMES[3]: data}), f"{NAMES[3]} is not a readable image")


def damaged(data):
    """Pixels changed behind an intact header."""
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 255 for byte in data[middle : middle + 4]) + data[middle + 4 :]


class TestDamagedImages:
    @pytest.mark.parametrize(
        "data",
        [
            damaged(encoded(PIXELS[3])),
            encoded(PIXELS[3])[:-30],
            encoded(PIXELS[3])[:-12],
            encoded(PIXELS[3], "JPEG")[:-20],
        ],
        ids=["changed", "cut", "without its end", "cut JPEG"],
    )
    @pytest.mark.parametrize("fast", [True, False])
    def test_are_named_when_they_are_read(self, make, monkeypatch, data, fast):
        if not fast:
            monkeypatch.setitem(sys.modules, "pyspng", None)
        path = make({**files(), NAMES[3]: data})
        dataset = ImageDataset(path)
        assert np.array_equal(dataset.image(2), PIXELS[2].transpose(2, 0, 1))
        with pytest.raises(GanError, match=NAMES[3]) as caught:
            dataset.image(3)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_are_named_when_the_zip_notices(self, tmp_path):
        pixels = noise(64, 64, 3)
        path = write_zip(tmp_path / "pets.zip", {"a.png": encoded(pixels), "b.png": encoded(pixels[::-1])})
        path.write_bytes(path.read_bytes().replace(encoded(pixels), damaged(encoded(pixels))))
        dataset = ImageDataset(path)
        dataset.image(1)
        with pytest.raises(GanError, match=r"pets\.zip: a\.png cannot be read \(Bad CRC-32"):
            dataset.image(0)

    def test_a_header_that_lies_is_noticed(self):
        lying = bytearray(encoded(PIXELS[0]))
        lying[16:24] = (16).to_bytes(4, "big") * 2  # claims to be 16x16
        with pytest.raises(GanError, match="here"):
            decode(bytes(lying), "here")

    def test_a_file_that_changed_its_size_since_it_was_opened_is_noticed(self, tmp_path):
        dataset = ImageDataset(write_folder(tmp_path / "pets", files()))
        (tmp_path / "pets" / NAMES[3]).write_bytes(encoded(np.zeros([16, 16, 3], dtype=np.uint8)))
        with pytest.raises(GanError, match=f"{NAMES[3]} is 16x16 RGB, not 8x8 RGB"):
            dataset.image(3)

    def test_a_file_that_vanished_is_named(self, tmp_path):
        dataset = ImageDataset(write_folder(tmp_path / "pets", files()))
        (tmp_path / "pets" / NAMES[3]).unlink()
        with pytest.raises(GanError, match=f"{NAMES[3]} cannot be read"):
            dataset.image(3)


def running(pids):
    """Those that there are, even if only to be waited for."""
    found = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            found.append(pid)
    return found


class TestLoader:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("start", [0, 7, 33])
    def test_batches_are_the_images_of_the_stream(self, make, workers, start):
        dataset = ImageDataset(make(files()), mirror=True)
        order = np.concatenate([epoch_order(2 * N, 5, epoch) for epoch in range(4)])[start:]
        stream = BatchStream(dataset, batch=6, seed=5, start=start, workers=workers)
        pids = stream.worker_pids
        assert len(running(pids)) == workers
        for i, (images, indices) in enumerate(itertools.islice(stream, 6)):
            assert images.shape == (6, 3, 8, 8)
            assert images.dtype == torch.uint8
            assert np.array_equal(indices, order[i * 6 : i * 6 + 6])
            assert np.array_equal(images, dataset.images(indices.numpy()))
        stream.close()
        assert running(pids) == []

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_damaged_image_ends_it_with_one_line_that_names_it(self, make, workers):
        dataset = ImageDataset(make({**files(), NAMES[3]: damaged(encoded(PIXELS[3]))}))
        stream = BatchStream(dataset, batch=2, seed=0, start=0, workers=workers)
        pids = stream.worker_pids
        with pytest.raises(GanError, match=NAMES[3]) as caught:
            list(itertools.islice(stream, N))
        assert "Traceback" not in str(caught.value)
        assert "\n" not in str(caught.value)
        assert running(pids) == []

    def test_what_comes_before_the_damaged_image_is_still_delivered(self, make):
        dataset = ImageDataset(make({**files(), NAMES[3]: damaged(encoded(PIXELS[3]))}))
        place = epoch_order(N, 0, 0).tolist().index(3)
        stream = BatchStream(dataset, batch=1, seed=0, start=0, workers=2)
        assert len(list(itertools.islice(stream, place))) == place
        with pytest.raises(GanError, match=NAMES[3]):
            next(stream)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_workers_leave_signals_to_the_run_and_end_with_the_stream(self, make, number):
        stream = BatchStream(ImageDataset(make(files())), batch=2, seed=0, start=0, workers=2)
        pids = stream.worker_pids
        for pid in pids:
            os.kill(pid, number)
        for _ in range(10):
            next(stream)
        assert stream.worker_pids == running(pids) == pids
        stream.close()
        assert running(pids) == []


class TestLabelTable:
    def test_labels_are_taken_by_image(self, make):
        dataset = ImageDataset(make(files(labels=by_name([3, 0, 1, 1, 2, 3, 0, 0, 3, 3]))), use_labels=True)
        table = LabelTable.of(dataset, torch.device("cpu"))
        assert table.take(torch.tensor([0, 4, 0])).tolist() == [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]

    def test_labels_are_drawn_as_often_as_they_occur(self):
        table = LabelTable(torch.eye(2), torch.tensor([0, 1, 1, 1]))
        torch.manual_seed(0)
        assert table.draw(4000).mean(dim=0).tolist() == pytest.approx([0.25, 0.75], abs=0.03)

    def test_without_labels_they_have_no_columns(self, make):
        table = LabelTable.of(ImageDataset(make(files())), torch.device("cpu"))
        assert table.draw(5).shape == table.take(torch.arange(5)).shape == (5, 0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"labels": null, "packed": {"resize_filter": "lanczos"}}', "lanczos"),
        ('{"packed": {"resize_filter": null}}', None),
        ('{"packed": {"resize_filter": 5}}', None),
        ('{"packed": "box"}', None),
        ("{", None),
        (None, None),
    ],
)
def test_what_images_were_scaled_with_is_in_the_dataset(tmp_path, content, expected):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", encoded(noise(8, 8)))
        if content is not None:
            archive.writestr("dataset.json", content)
    dataset = ImageDataset(tmp_path / "x.zip")
    assert dataset.resize_filter == dataset.view(mirror=True).resize_filter == expected
