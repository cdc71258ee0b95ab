import json
import random
import time
import unicodedata

import pytest
from checks import refusal
from pictures import save

from gan.data.label_files import choose_labels, labels_from_file
from gan.data.sources import Source, open_source
from gan.errors import GanError

CATS = ["cats/1.png", "cats/2.png", "dogs/1.png", "dogs/3.png"]


class Named(Source):
    """A source of nothing but names."""

    def __init__(self, *names):
        super().__init__("photos", list(names))

    def read(self, index):
        raise AssertionError("labels need no pixels")


def written(tmp_path, content, name="labels.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def labels_of(tmp_path, content, name="labels.csv", names=CATS):
    return choose_labels(Named(*names), written(tmp_path, content, name))


def refused(source, wanted, *said):
    text = refusal(choose_labels, source, wanted)
    for part in said:
        assert part in text


def test_no_labels_are_wanted_or_there(tmp_path):
    assert choose_labels(Named(*CATS), None) is None
    assert choose_labels(Named(*CATS), "none") is None


# Sub-folders


def test_classes_are_the_folders_into_which_the_images_divide():
    labels = choose_labels(Named(*CATS), "folders")
    assert labels.by_name == {"cats/1.png": 0, "cats/2.png": 0, "dogs/1.png": 1, "dogs/3.png": 1}
    assert (labels.class_names, labels.origin, labels.problems) == (["cats", "dogs"], "sub-folders", [])


def test_folders_around_all_of_them_do_not_count():
    names = ["a/b/x/1/1.png", "a/b/x/2/1.png", "a/b/y/1.png", "a/b/loose.png", "a/loose.png"]
    labels = choose_labels(Named(*names), "folders")
    assert labels.class_names == ["x", "y"]
    assert labels.by_name == {"a/b/x/1/1.png": 0, "a/b/x/2/1.png": 0, "a/b/y/1.png": 1}
    assert labels.problems == [f"{name}: is in none of the 2 class folders" for name in names[3:]]


def test_folders_below_the_classes_are_told(tmp_path):
    names = ["train/cat/1.png", "train/dog/1.png", "extra/one.png"]
    labels = choose_labels(Named(*names), "folders")
    assert (labels.class_names, labels.problems) == (["extra", "train"], [])
    assert labels.notes == ["train holds 2 folders (cat, dog), which are not taken as classes"]
    for name in [*names, "extra/a/1.png"]:
        save(tmp_path / "all" / name)
    labels = choose_labels(open_source(str(tmp_path)), "folders")
    assert labels.class_names == ["extra", "train"]
    assert labels.notes == [
        "all/train holds 2 folders (cat, dog), which are not taken as classes; "
        f"for that name --source {tmp_path}/all/train"
    ]
    names = ["a/p/1.png", "a/q/1.png", "a/r/1.png", "a/s/1.png", "b/p/1.png", "b/q/1.png", "c/p/1.png"]
    labels = choose_labels(Named(*names), "folders")
    assert labels.notes == [
        "a holds 4 folders (p, q, r, ...), and 1 more of the classes some, which are not taken as classes"
    ]
    assert choose_labels(Named(*CATS), "folders").notes == []


def test_folders_that_tell_nothing_are_refused():
    for names in (["1.png", "2.png"], ["a/b/1.png"]):
        refused(Named(*names), "folders", "--labels folders", "all images are in one folder")
    for names in (["a/1.png", "a/2.png", "3.png"], ["one/cls/1.png", "one/cls/2.png", "one/1.png"]):
        refused(Named(*names), "folders", "--labels folders", "no two folders with images lie side by side")
    refused(Named(*(f"{number}/1.png" for number in range(10_001))), "folders", "10,001 folders")


# dataset.json


def dataset(folder, rows, **more):
    for name, _ in rows or []:
        save(folder / name)
    (folder / "dataset.json").write_text(json.dumps({"labels": rows, **more}))


def test_a_dataset_brings_its_labels(tmp_path):
    dataset(tmp_path, [["a/1.png", 1], ["2.png", 0]], class_names=["cat", "dog"])
    labels = choose_labels(open_source(str(tmp_path)), None)
    assert labels.by_name == {"a/1.png": 1, "2.png": 0}
    assert (labels.class_names, labels.origin, labels.problems) == (["cat", "dog"], "dataset.json", [])


def test_names_are_relative_to_the_folder_of_the_file(tmp_path):
    dataset(tmp_path / "wrapped", [["a/1.png", 4], ["1.png", 0]])
    content = {"labels": [["a\\1.png", 4], ["./1.png", 0], ["gone.png", 1]]}
    (tmp_path / "wrapped" / "dataset.json").write_text(json.dumps(content))
    labels = open_source(str(tmp_path)).own_labels
    assert labels.by_name == {"wrapped/a/1.png": 4, "wrapped/1.png": 0}
    assert labels.problems == ["wrapped/dataset.json, row 3 (gone.png): no such image"]


def test_datasets_side_by_side_are_one(tmp_path):
    dataset(tmp_path / "a", [["1.png", 0]], class_names=["cat", "dog"])
    dataset(tmp_path / "b", [["1.png", 1], ["x/2.png", 1]], class_names=["cat", "dog"])
    dataset(tmp_path / "b" / "x", [["2.png", 0]])
    dataset(tmp_path / "c", [["1.png", 0]], class_names=["dog", "cat"])
    labels = open_source(str(tmp_path)).own_labels
    assert labels.by_name == {"a/1.png": 0, "b/1.png": 1, "b/x/2.png": 1}
    assert labels.origin == "2 dataset.json files"
    assert labels.problems == [
        "c/dataset.json: its class names are not those of a/dataset.json; its rows do not count",
        "b/x/dataset.json: does not count, because b/dataset.json lies above it",
    ]


@pytest.mark.parametrize("content", ['{"labels": null}', "{}", '{"labels": []}', "[]", '{"labels": {}}'])
def test_a_dataset_may_have_no_labels(tmp_path, content):
    save(tmp_path / "1.png")
    (tmp_path / "dataset.json").write_text(content)
    assert choose_labels(open_source(str(tmp_path)), None) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "dataset.json is not valid JSON"),
        ("[" * 100_000, "dataset.json is not valid JSON"),
        ('{"labels": 3}', '"labels" is not a list'),
        ('{"labels": [["2.png", 1]]}', "labels none of the 1 images (dataset.json, row 1 (2.png): no such image)"),
        ('{"labels": [["1.png"]]}', 'row 1: is ["1.png"]; wanted is ["name.png", label]'),
    ],
)
def test_a_dataset_json_that_is_no_use_can_be_left_out(tmp_path, content, said):
    save(tmp_path / "1.png")
    (tmp_path / "dataset.json").write_text(content)
    source = open_source(str(tmp_path))
    refused(source, None, f"--source {tmp_path}: ", said, "--labels none")
    assert choose_labels(source, "none") is None


# CSV and JSON


@pytest.mark.parametrize(
    "content",
    [
        "cats/1.png,1\ndogs/1.png,0\n",
        "file,label\ncats/1.png,1\ndogs/1.png,0",
        "foto;klasse\r\ncats/1.png;1\r\ndogs/1.png;0\r\n",
        "\ufefffile\tlabel\rcats/1.png\t1.0\rdogs/1.png\t0.0",
        '"cats/1.png", "1",,\n\n"dogs/1.png", "0",,\n',
        ",0\ncats\\1.png,1\n./dogs//1.png,0\n",
        "/home/me/photos/cats/1.png,1\n/home/me/photos/dogs/1,0\n",
        "cats/1,1\ndogs/1,0",
        "file,label\ncats/1.png,1\ndogs/1.png,0\n".encode("utf-16"),
    ],
)
def test_csv_files_of_all_kinds(tmp_path, content):
    labels = labels_of(tmp_path, content)
    assert labels.by_name == {"cats/1.png": 1, "dogs/1.png": 0}
    assert (labels.class_names, labels.origin, labels.problems) == (None, "labels.csv", [])


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ('{"labels": [["cats/1.png", 1], ["3", 0]]}', "labels.json"),
        ('{"labels": {"cats/1.png": 1, "dogs/3.png": 0}}', "labels"),
        (' [["cats/1.png", 1.0], ["3.png", 0]]', "labels.json"),
    ],
)
def test_json_files_of_all_kinds(tmp_path, content, name):
    assert labels_of(tmp_path, content, name).by_name == {"cats/1.png": 1, "dogs/3.png": 0}


def test_names_of_classes_get_numbers_in_sorted_order(tmp_path):
    content = "image,animal\n3.png,dog\ncats/1.png,cat\ncats/2.png,cat\nelsewhere.png,bird"
    labels = labels_of(tmp_path, content)
    assert labels.by_name == {"dogs/3.png": 2, "cats/1.png": 1, "cats/2.png": 1}
    assert labels.class_names == ["bird", "cat", "dog"]
    assert labels.problems == ["labels.csv, row 5 (elsewhere.png): no such image"]
    content = '{"labels": [["3", "dog"], ["2", "cow"]], "class_names": ["dog", "cat"]}'
    labels = labels_of(tmp_path, content, "labels.json")
    assert (labels.by_name, labels.class_names) == ({"dogs/3.png": 0}, ["dog", "cat"])
    assert labels.problems == ['labels.json, row 2 (2): "cow" is none of the class names']
    many = "".join(f"{number}.png,a caption of number {number}\n" for number in range(10_001))
    refused(Named(*CATS), written(tmp_path, many), "10,001 different class names")


def test_vectors(tmp_path):
    labels = labels_of(tmp_path, "file,smile,hat\ncats/1.png,0,1\n3.png,1,1\n")
    assert labels.by_name == {"cats/1.png": [0, 1], "dogs/3.png": [1, 1]}
    assert labels.class_names == ["smile", "hat"]
    labels = labels_of(tmp_path, "file,x,y\ncats/1.png,-0.5,1e2\n3.png,1,1\n")
    assert labels.by_name == {"cats/1.png": [-0.5, 100.0], "dogs/3.png": [1, 1]}
    assert labels.class_names is None
    assert labels_of(tmp_path, "cats/1.png,0.5\n3.png,2").by_name == {"cats/1.png": [0.5], "dogs/3.png": [2]}
    content = '{"labels": [["3", [0, 1]]], "class_names": ["a", "b", "c"]}'
    labels = labels_of(tmp_path, content, "labels.json")
    assert (labels.by_name, labels.class_names) == ({"dogs/3.png": [0, 1]}, None)
    assert labels.problems == ["labels.json: has 3 class names, but the usual label is a list of 2 numbers"]


def test_one_fraction_shows_that_no_number_is_a_class(tmp_path):
    labels = labels_of(tmp_path, "file,score\ncats/1.png,1\ncats/2.png,0\ndogs/1.png,2\n3.png,0.5\n")
    assert labels.by_name == {"cats/1.png": [1], "cats/2.png": [0], "dogs/1.png": [2], "dogs/3.png": [0.5]}
    assert (labels.class_names, labels.problems) == (None, [])
    content = '{"labels": [["3", 0.5], ["2", 1.5], ["cats/1", 1]], "class_names": ["a", "b", "c"]}'
    labels = labels_of(tmp_path, content, "labels.json")
    assert labels.by_name == {"dogs/3.png": [0.5], "cats/2.png": [1.5], "cats/1.png": [1]}
    assert labels.class_names is None
    assert labels.problems == ["labels.json: has 3 class names, but the usual label is a number"]
    labels = labels_of(tmp_path, '{"labels": [["3", 0.5]], "class_names": ["smile"]}', "labels.json")
    assert (labels.by_name, labels.class_names, labels.problems) == ({"dogs/3.png": [0.5]}, ["smile"], [])
    content = '{"labels": [["3", 0.5], ["2", 1], ["cats/1", 1]], "class_names": ["a", "b"]}'
    labels = labels_of(tmp_path, content, "labels.json")
    assert (labels.by_name, labels.class_names) == ({"cats/2.png": 1, "cats/1.png": 1}, ["a", "b"])
    assert labels.problems == [
        "labels.json, row 1 (3): 0.5 is a number, but the usual one here is a class number",
    ]


def test_every_bad_row_is_named(tmp_path):
    names = [f"{number}.png" for number in range(30)]
    rows = [[f"{number}.png", number % 2] for number in range(10)]
    bad = [
        (["gone.png", 0], "no such image"),
        (["10.png", -1], "class -1 is negative"),
        (["11.png", 10_000], "class 10000 is out of range"),
        (["12.png", [0.5]], "[0.5] is a list of 1 number, but the usual one here is a class number"),
        (["13.png", float("nan")], "NaN is not a finite number"),
        (["14.png", 1e39], "1e+39 is not a finite number"),
        (["15.png", "cat"], '"cat" is a class name, but'),
        (["16.png", [0, 1]], "[0, 1] is a list of 2 numbers, but"),
        (["17.png", True], "true is not a number"),
        (["18.png", None], "null is not a number"),
        (["19.png", []], "its list is empty"),
        (["20.png", ""], "has no label"),
        (["21.png", [1, "x"]], '"x" is not a number'),
        (["1.png", 0], "is 0 here, but 1 in row 2"),
        (["gone2.png", -1], "no such image, and class -1 is negative"),
        (["22.png", 10**400], "is not a finite number"),
        (["23.png", {"a": 1}], '{"a": 1} is not a number'),
    ]
    labels = labels_of(tmp_path, json.dumps(rows + [row for row, _ in bad]), "labels.json", names)
    assert labels.by_name == {name: label for name, label in rows if name != "1.png"}
    assert len(labels.problems) == len(bad)
    for number, (line, (row, said)) in enumerate(zip(labels.problems, bad, strict=True), start=11):
        assert line.startswith(f"labels.json, row {number} ({row[0]}): ")
        assert said in line
        assert "\n" not in line


def test_every_bad_row_of_a_csv_is_named(tmp_path):
    content = (
        "file,a,b\n1.png,1,2\n2.png,1\n3.png,1,x\n4.png,inf,0\n5.png,,\n6.png,3,4\n7.png\n8.png,1_0,2\n1.png,1,2.5\n"
    )
    labels = labels_of(tmp_path, content, names=[f"{number}.png" for number in range(9)])
    assert labels.by_name == {"6.png": [3, 4]}
    assert labels.problems == [
        "labels.csv, row 3 (2.png): 1 is a class number, but the usual one here is a list of 2 numbers",
        'labels.csv, row 4 (3.png): "x" is not a number',
        "labels.csv, row 5 (4.png): Infinity is not a finite number",
        "labels.csv, row 6 (5.png): has no label",
        "labels.csv, row 8 (7.png): has no label",
        'labels.csv, row 9 (8.png): "1_0" is not a number',
        "labels.csv, row 10 (1.png): is [1, 2.5] here, but [1, 2] in row 2",
    ]


def test_a_name_means_the_only_image_that_it_fits(tmp_path):
    labels = labels_of(tmp_path, "1.png,0\n2.png,1\n3,1\n")
    assert labels.by_name == {"cats/2.png": 1, "dogs/3.png": 1}
    assert labels.problems == ["labels.csv, row 1 (1.png): could mean several images; write its whole path"]
    # What is another image's own name does not stand for a similar one, and folders that are there tell files apart.
    labels = labels_of(tmp_path, "a.png,0\na.jpg,1\nx/b.png,1\ny/c.png,1\n", names=["a.png", "x/b.png", "x/c.png"])
    assert labels.by_name == {"a.png": 0, "x/b.png": 1}
    assert [line.split(": ")[1] for line in labels.problems] == ["no such image", "no such image"]
    # Where no folder agrees, they are passed over, and that is said.
    labels = labels_of(tmp_path, "old/b.png,0\nold/c.png,1\n", names=["a.png", "x/b.png", "x/c.png"])
    assert labels.by_name == {"x/b.png": 0, "x/c.png": 1}
    assert labels.problems == [
        "labels.csv: 2 rows name other folders (old/b.png is taken for x/b.png); matched by file name alone"
    ]
    labels = labels_of(tmp_path, "/home/old/x/b.png,0\nc.png,1\nold/a.png,1\n", names=["a.png", "x/b.png", "x/c.png"])
    assert (len(labels.by_name), labels.problems) == (3, [])


def test_rows_of_another_split_label_nothing_in_silence(tmp_path):
    labels = labels_of(tmp_path, "train/1.png,0\ntrain/2.png,1\n", names=["val/1.png", "val/2.png"])
    assert labels.by_name == {"val/1.png": 0, "val/2.png": 1}
    assert labels.problems == [
        "labels.csv: 2 rows name other folders (train/1.png is taken for val/1.png); matched by file name alone"
    ]
    # The source is one of the splits itself: the rows that name it count.
    rows = "val/1.png,1\ntrain/1.png,0\ntrain/2,1\nval/3.png,1\nother/train/4.png,0\n"
    for name in ("train", "train.zip"):
        source = Named("1.png", "2.png", "3.png", "4.png")
        source.name = str(tmp_path / name)
        labels = choose_labels(source, written(tmp_path, rows))
        assert labels.by_name == {"1.png": 0, "2.png": 1, "4.png": 0}
        assert labels.problems == [
            "labels.csv, row 1 (val/1.png): no such image",
            "labels.csv, row 4 (val/3.png): no such image",
        ]
    source.name = str(tmp_path / "elsewhere")
    labels = choose_labels(source, written(tmp_path, rows))
    assert "1.png" not in labels.by_name
    assert labels.problems == ["labels.csv, row 2 (train/1.png): is 0 here, but 1 in row 1"]


def test_a_second_row_of_an_image_says_which_has_it(tmp_path):
    content = (
        "dogs/3,1\ncats/1.png,0\ndogs/3.png,1\ncats/1.png,0\nold/cats/2.png,x\ncats/2.png,1\n./cats/1,-1\n1.gif,1\n"
    )
    labels = labels_of(tmp_path, content)
    assert labels.by_name == {"cats/1.png": 0, "dogs/3.png": 1, "cats/2.png": 1}
    assert labels.problems == [
        "labels.csv, row 1 (dogs/3): dogs/3.png is there already, in row 3",
        "labels.csv, row 4 (cats/1.png): cats/1.png is there already, in row 2",
        "labels.csv, row 5 (old/cats/2.png): cats/2.png is there already, in row 6, "
        'and "x" is a class name, but the usual one here is a class number',
        "labels.csv, row 7 (./cats/1): cats/1.png is there already, in row 2, and class -1 is negative",
        "labels.csv, row 8 (1.gif): could mean several images; write its whole path",
    ]
    # Rows none of which has the image's own name: the first has it, and labels that differ count for nothing.
    labels = labels_of(tmp_path, "dogs/3,1\n./dogs/3,1\ncats/1,0\n./cats/1,1\n")
    assert labels.by_name == {"dogs/3.png": 1}
    assert labels.problems == [
        "labels.csv, row 2 (./dogs/3): dogs/3.png is there already, in row 1",
        "labels.csv, row 4 (./cats/1): is 1 here, but 0 in row 3",
    ]


def test_names_with_odd_letters(tmp_path):
    decomposed = unicodedata.normalize("NFD", "é.png")
    names = [decomposed, "\udcff.png", "a,b;c.png", "[1].png"]
    content = b'\xc3\xa9.png;0\n\xff.png;1\n"a,b;c.png";0\n[1].png;1\n'
    assert labels_of(tmp_path, content, names=names).by_name == dict(zip(names, [0, 1, 0, 1], strict=True))
    labels = labels_of(tmp_path, b"\xc3\xa9.png,0\n\xfe\x1b.png,1\n", names=names)
    for line in labels.problems:
        assert line.encode().decode().isprintable()
    assert len(labels.problems) == 1


def test_a_file_that_cannot_be_read_at_all_is_an_error(tmp_path, monkeypatch):
    source = Named(*CATS)
    for content, name, said in [
        ("", "a.csv", "labels none of the 4 images"),
        ("cats/9.png,1", "a.csv", "labels none of the 4 images (a.csv, row 1 (cats/9.png): no such image)"),
        ('{"a.png": 1}', "a.json", 'has no "labels"'),
        ('{"labels": "x"}', "a.json", '"labels" is not a list'),
        ("cats/1.png,1", "a.json", "is not valid JSON"),
        ("x" * 200_000, "a.csv", "is neither CSV nor JSON"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9, "a.png", "a.png"),
    ]:
        path = written(tmp_path, content, name)
        refused(source, path, f"--labels {path}", said)
    refused(source, str(tmp_path / "gone.csv"), "no such file", "give a CSV or JSON file, folders, or none")
    refused(source, str(tmp_path), "is not a file")
    monkeypatch.setattr("gan.data.label_files.MAX_LABEL_FILE", 3)
    refused(source, written(tmp_path, "1.png,1"), "is no list of labels")


def test_random_files_end_in_labels_or_one_line(tmp_path):
    rng = random.Random(0)
    pieces = [
        *CATS,
        "1",
        ",",
        ";",
        "\t",
        "\n",
        '"',
        "{",
        "[",
        "]",
        "}",
        ":",
        "nan",
        "-1",
        "0.5",
        "\0",
        "é",
        '"labels"',
        " ",
    ]
    for attempt in range(400):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 40)))
        path = written(tmp_path, text, rng.choice(["a.csv", "a.json", "a"]))
        try:
            labels = labels_from_file(path, CATS)
        except GanError as error:
            labels, line = None, str(error)
            assert "\n" not in line, (attempt, text)
        if labels is not None:
            assert set(labels.by_name) <= set(CATS)
            assert not any("\n" in line for line in labels.problems)


def test_many_labels_take_no_time(tmp_path):
    names = [f"{number // 1000:03d}/{number:06d}.png" for number in range(50_000)]
    source = Named(*names)
    content = "".join(f"{name.rpartition('/')[2][:-4]},{number % 10}\n" for number, name in enumerate(names))
    path = written(tmp_path, content)
    start = time.perf_counter()
    labels = choose_labels(source, path)
    assert len(labels.by_name) == 50_000
    assert time.perf_counter() - start < 10  # one second where nothing else runs
