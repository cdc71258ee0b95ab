"""What torch.save wrote, of either layout, read without torch.load; zips that are made to do harm."""

import argparse
import collections
import functools
import io
import struct
import zipfile

import numpy as np
import pytest
import torch
from pickles import zipped

from torch_utils import torch_file, torch_legacy
from torch_utils.safe_pickle import Opaque, StoredStorage, StoredTensor

LAYOUTS = {"zip": True, "legacy": False}


def saved(value, layout="zip", protocol=2):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=LAYOUTS[layout], pickle_protocol=protocol)
    return file.getvalue()


def loaded(data):
    return torch_file.load(io.BytesIO(data))


def entries_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def value():
    network = torch.nn.Linear(3, 4)
    optimiser = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    flat = torch.arange(20.0)
    return {
        "g_ema": network.state_dict(),
        "g_optim": optimiser.state_dict(),
        "args": argparse.Namespace(size=256, channel_multiplier=2),
        "ada_aug_p": 0.25,
        "latent_avg": torch.randn(8, dtype=torch.float16),
        "views": [flat[:5], flat[5:].view(3, 5).t()],
        "bool": torch.tensor([True, False]),
        "brain": torch.arange(3).to(torch.bfloat16),
        "untyped": torch.arange(3.0).untyped_storage(),
        "none": torch.zeros(0, 3),
        "size": torch.Size([1, 2]),
        "array": np.arange(3),
        "dtype": torch.float16,
        "complex": torch.tensor([1 + 2j]),
        "expanded": torch.ones(1).expand(100),
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_torch_saves_is_read(value, layout, protocol):
    data = saved(value, layout, protocol)
    assert torch_legacy.looks_like_one(data[:32]) == (layout == "legacy")
    read = loaded(data)
    assert read.keys() == value.keys()
    assert isinstance(read["args"], Opaque)
    assert (read["args"].global_name, read["args"].state) == ("argparse.Namespace", vars(value["args"]))
    assert read["ada_aug_p"] == 0.25
    assert read["size"] == (1, 2)
    assert read["dtype"].global_name == "torch.float16"
    assert np.asarray(read["array"]).tolist() == [0, 1, 2]
    assert isinstance(read["untyped"], StoredStorage)
    assert read["untyped"].flat().view(torch.float32).tolist() == [0, 1, 2]
    pairs = [(read[name], value[name]) for name in ("latent_avg", "bool", "brain", "none", "complex", "expanded")]
    pairs += list(zip(read["views"], value["views"], strict=True))
    pairs += [(read["g_ema"][name], tensor) for name, tensor in value["g_ema"].items()]
    moments = value["g_optim"]["state"][0]
    pairs += [(read["g_optim"]["state"][0][name], moments[name]) for name in ("step", "exp_avg", "exp_avg_sq")]
    for stored, tensor in pairs:
        assert isinstance(stored, StoredTensor)
        assert (stored.dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(stored.tensor(), tensor)
    first, second = (stored.tensor() for stored in read["views"])
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_a_whole_module_is_inert():
    for layout in LAYOUTS:
        read = loaded(saved({"g_ema": torch.nn.Linear(1, 1)}, layout))["g_ema"]
        assert (type(read), read.global_name) == (Opaque, "torch.nn.modules.linear.Linear")


def test_tensors_may_have_state_and_dicts_more_than_items(value):
    network = torch.nn.Linear(1, 1)
    network.weight.note = "a Python attribute of a parameter"
    odd = collections.OrderedDict(network.state_dict(keep_vars=True))
    odd._metadata = {"": {"version": 1}}
    read = loaded(saved(odd))
    assert type(read) is dict
    assert read.keys() == {"weight", "bias"}


def test_every_cut_of_a_file_is_refused(value):
    for layout in LAYOUTS:
        data = saved(value, layout)
        for size in [*range(100), *range(100, len(data), 97), len(data) - 1]:
            with pytest.raises(ValueError, match=r"cut short|damaged|not a file that torch.save|none that torch.save"):
                loaded(data[:size])


def test_folder_names_are_free_and_old_files_have_no_byte_order():
    entries = entries_of(saved({"a": torch.arange(3.0)}))
    for folder in ("checkpoint", "a b", "網"):
        renamed = {name.replace("archive/", f"{folder}/"): content for name, content in entries.items()}
        renamed.pop(f"{folder}/byteorder")
        assert loaded(zipped(renamed))["a"].tensor().tolist() == [0, 1, 2]


def test_a_zip_with_wide_numbers_is_read():
    """What a file of more than 4 GiB looks like."""
    data = saved({"a": torch.arange(3.0)})
    end = data.rfind(b"PK\x05\x06")
    _, _, _, _, count, _, place, _ = struct.unpack("<4s4H2LH", data[end : end + 22])
    directory = b""
    at = place
    for _ in range(count):
        fields = list(struct.unpack("<4s6H3L5H2L", data[at : at + 46]))
        name = data[at + 46 : at + 46 + fields[10]]
        assert fields[11:13] == [0, 0]
        wide = struct.pack("<2H3Q", 1, 24, fields[9], fields[8], fields[16])
        fields[8] = fields[9] = fields[16] = 2**32 - 1
        fields[11] = len(wide) + 6
        directory += struct.pack("<4s6H3L5H2L", *fields) + name + struct.pack("<2HH", 7, 2, 0) + wide
        at += 46 + len(name)
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), place)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, place + len(directory), 1)
    last = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    wide_file = data[:place] + directory + record + locator + last
    assert zipfile.ZipFile(io.BytesIO(wide_file)).namelist() == torch_file.names_in_zip(io.BytesIO(wide_file))
    assert loaded(wide_file)["a"].tensor().tolist() == [0, 1, 2]


def changed(change):
    """A zip after a change of its entries."""
    entries = entries_of(saved({"a": torch.arange(300.0), "b": torch.arange(3)}))
    change(entries)
    return zipped(entries)


def patched(data, name, offset, new):
    """Bytes of an entry's line in the directory of a zip replaced."""
    at = data.rfind(name) - 46 + offset
    assert data[data.rfind(name) - 46 :].startswith(b"PK\x01\x02")
    return data[:at] + new + data[at + len(new) :]


@functools.cache
def hostile_zips():
    plain = changed(lambda entries: None)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w") as archive:
        for name, content in entries_of(plain).items():
            packed = zipfile.ZIP_DEFLATED if name.endswith("data/0") else zipfile.ZIP_STORED
            archive.writestr(name, bytes(5_000_000) if packed else content, packed)
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        for name in ("a/data.pkl", "b/data.pkl"):
            archive.writestr(name, b"N.")
    place = plain.rfind(b"archive/data/0") - 46 + 42
    return {
        "a bomb": (bomb.getvalue(), r"no entry archive/data/0 of 1,200 bytes"),
        "a bomb that says otherwise": (patched(bomb.getvalue(), b"archive/data/0", 24, b"\xb0\4\0\0"), "is compressed"),
        "a packed pickle": (zipped(entries_of(plain), zipfile.ZIP_DEFLATED), "is compressed"),
        "two entries of one name": (twice.getvalue().replace(b"b/data", b"a/data"), "two entries"),
        "a lie about a size": (patched(plain, b"archive/data/0", 20, b"\0\0\1\0" * 2), "over another"),
        "a size beyond the end": (patched(plain, b"archive/version", 20, b"\xff\xff\xff\x7f" * 2), "over another"),
        "one entry over another": (patched(plain, b"archive/data/0", 42, plain[place + 100 : place + 104]), "damaged"),
        "a place beyond the end": (patched(plain, b"archive/data/0", 42, b"\xff\xff\xff\x7f"), "damaged|over another"),
        "encrypted": (patched(plain, b"archive/data/0", 8, b"\1\0"), "compressed or encrypted"),
        "too many entries": (plain[:-12] + b"\xff\xff" * 2 + plain[-8:], "cut short|damaged"),
        "no storage": (changed(lambda e: e.pop("archive/data/0")), "no entry archive/data/0"),
        "a short storage": (changed(lambda e: e.update({"archive/data/0": b"1234"})), "no entry archive/data/0"),
        "big-endian": (changed(lambda e: e.update({"archive/byteorder": b"big"})), "big-endian"),
        "TorchScript": (changed(lambda e: e.update({"archive/constants.pkl": b""})), "a TorchScript program"),
        "TorchScript's code": (changed(lambda e: e.update({"archive/code/x.py": b""})), "a TorchScript program"),
        "no pickle": (changed(lambda e: e.pop("archive/data.pkl")), "none that torch.save wrote"),
        "two pickles": (changed(lambda e: e.update({"b/data.pkl": b"N."})), "none that torch.save wrote"),
        "images": (zipped({"a.png": b""}), "none that torch.save wrote"),
        "nothing": (zipped({}), "not a file that torch.save wrote"),
        "a damaged pickle": (changed(lambda e: e.update({"archive/data.pkl": b"\xff"})), "no instruction"),
    }


@pytest.mark.parametrize("name", hostile_zips())
def test_zips_that_are_not_what_they_say_are_refused(name):
    data, said = hostile_zips()[name]
    with pytest.raises(ValueError, match=said):
        loaded(data)


def persistent_id(*values):
    """A pickle of one tensor whose storage is described by these."""
    return b"\x80\x02(" + b"".join(values) + b"tQ."


STORAGE, FLOAT, KEY, DEVICE = (
    b"X\x07\x00\x00\x00storage",
    b"ctorch\nFloatStorage\n",
    b"X\x01\x00\x00\x000",
    b"X\0\0\0\0",
)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ((STORAGE, FLOAT, KEY, DEVICE, b"M\x2c\x01"), None),
        ((STORAGE, FLOAT, KEY, DEVICE, b"M\x2c\x01", b"N"), None),
        ((STORAGE, b"ctorch\nQInt32Storage\n", KEY, DEVICE, b"M\x2c\x01"), None),
        ((STORAGE, b"ctorch.storage\nUntypedStorage\n", KEY, DEVICE, b"M\xb0\x04"), None),
        ((STORAGE, FLOAT, KEY, DEVICE, b"M\x2c\x02"), "no entry"),
        ((STORAGE, FLOAT, KEY, DEVICE, b"J\xff\xff\xff\xff"), "badly described"),
        ((STORAGE, FLOAT, KEY, DEVICE, b"\x88"), "badly described"),
        ((STORAGE, FLOAT, KEY, DEVICE, b"G\x7f\xf8\x00\x00\x00\x00\x00\x00"), "badly described"),
        ((STORAGE, FLOAT, KEY, DEVICE, b"\x8a\x09" + b"\xff" * 8 + b"\x00"), "badly described"),
        ((STORAGE, FLOAT, KEY, DEVICE, b"M\x2c\x01", b"("), "no storage"),
        ((STORAGE, FLOAT, b"K\x00", DEVICE, b"M\x2c\x01"), "badly described"),
        ((STORAGE, FLOAT, b"X\x0d\x00\x00\x00../../version", DEVICE, b"K\x00"), "no entry"),
        ((STORAGE, b"cos\nsystem\n", KEY, DEVICE, b"M\x2c\x01"), "os.system"),
        ((STORAGE, b"X\x05\x00\x00\x00torch", KEY, DEVICE, b"M\x2c\x01"), "badly described"),
        ((STORAGE, FLOAT, KEY, DEVICE, b"M\x2c\x01", b"K\x01"), "unsupported"),
        ((b"X\x06\x00\x00\x00module", FLOAT, KEY, DEVICE, b"M\x2c\x01"), "no storage"),
        ((STORAGE,), "no storage"),
    ],
)
def test_storages_are_only_what_the_zip_holds(described, said):
    data = changed(lambda entries: entries.update({"archive/data.pkl": persistent_id(*described)}))
    if said is None:
        assert loaded(data).flat().view(torch.float32)[299] == 299
        return
    with pytest.raises(ValueError, match=said):
        loaded(data)


def test_a_storage_has_one_type():
    as_bytes = (STORAGE, b"ctorch\nByteStorage\n", KEY, DEVICE, b"M\xb0\x04")
    first, second = persistent_id(STORAGE, FLOAT, KEY, DEVICE, b"M\x2c\x01"), persistent_id(*as_bytes)
    data = changed(lambda entries: entries.update({"archive/data.pkl": first[:-1] + second}))
    with pytest.raises(ValueError, match="archive/data/0 is described in two ways"):
        loaded(data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x06Ntq", b"K\x07Ntq"),
        (b"\x06" + bytes(7), b"\x05" + bytes(7)),
        (b"\x06" + bytes(7), b"\xff" * 8),
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        (b"M\xe9\x03.", b"M\xe8\x03."),
        (b"FloatStorage", b"DoubleStorage"),
        (b"]q\x00X", b"]q\x00C"),
    ],
)
def test_damaged_files_of_the_older_layout_are_refused(old, new):
    data = saved({"a": torch.arange(6.0)}, "legacy")
    assert old in data
    with pytest.raises(ValueError, match=r"damaged|big-endian|not a file|cut short"):
        loaded(data.replace(old, new))


def test_other_files_are_refused():
    for data in (b"", b"PK", b"\x80\x02N.", b"<html>", b"\x80\x04\x95"):
        assert not torch_legacy.looks_like_one(data)
        with pytest.raises(ValueError, match=r"not a file that torch\.save wrote"):
            loaded(data)


def test_a_large_file_is_in_memory_once(tmp_path):
    tensors = {str(index): torch.zeros(1_000_000) for index in range(8)}
    for layout in LAYOUTS:
        path = tmp_path / layout
        path.write_bytes(saved(tensors, layout))
        with open(path, "rb") as file:
            read = torch_file.load(file)
        first = {name: stored.tensor() for name, stored in read.items()}
        for name, stored in read.items():
            assert stored.tensor().data_ptr() == first[name].data_ptr()
            assert stored.tensor().data_ptr() % 16 == 0
