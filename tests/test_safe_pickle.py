import io
import os
import pickle
import pickletools

import numpy as np
import pytest
import torch

from torch_utils import persistence, safe_pickle, stored_tensor


def loaded(data):
    return persistence.load(io.BytesIO(data))


class Payload:
    """Pickles into a call of `function`."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_numpy_values_are_read(protocol):
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    data = pickle.dumps({"a": array, "f": np.asfortranarray(array), "s": np.float64(1.5), "i": np.int32(-2)}, protocol)
    variants = [data]
    if protocol == 3:  # the later ones store the lengths of names
        variants += [data.replace(b"numpy._core", b"numpy.core"), data.replace(b"numpy.core", b"numpy._core")]
    for variant in variants:
        read = loaded(variant)
        assert (read["s"], read["i"]) == (1.5, -2)
        np.testing.assert_array_equal(np.asarray(read["a"]), array)
        np.testing.assert_array_equal(np.asarray(read["f"]), array)


def test_bad_arrays_are_refused():
    for state in [
        (1, (3,), np.dtype("f4"), False, b"1234"),
        (1, (-1,), np.dtype("f4"), False, b""),
        (1, (1,), np.dtype("O"), False, [os.system]),
        (1, (10**9, 10**9), np.dtype("f4"), False, b""),
    ]:
        with pytest.raises(ValueError, match=r"an array|damaged"):
            loaded(pickle.dumps(Payload(np.empty(0).__reduce__()[0], np.ndarray, (0,), b"b", state=state), 4))


def test_storages_of_other_devices_are_read_on_the_cpu():
    data = raw_storage(3).replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    flat = stored_tensor.storage_from_bytes(data).flat()
    assert flat.device.type == "cpu"
    assert flat.tolist() == [0, 1, 2]


def test_dict_subclasses_of_the_public_generation_are_dicts():
    easy = b"\x80\x03cdnnlib.util\nEasyDict\n)\x81}X\x01\x00\x00\x00aK\x01sbX\x01\x00\x00\x00bK\x02s."
    assert loaded(easy) == {"b": 2}


def test_stand_ins_cannot_be_altered():
    """A BUILD instruction sets attributes; on functions and classes that would outlive the reading."""
    set_defaults = b"N}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    set_dict = b"}X\x04\x00\x00\x00callK\x01sb."
    for module, name in [*safe_pickle.SAFE_GLOBALS, *persistence._READ_GLOBALS, ("os", "system"), ("builtins", "set")]:
        for opcodes in (set_defaults, set_dict, b"K\x01a.", b"K\x01K\x01s.", b"(K\x01\x90."):
            with pytest.raises(ValueError, match=rf"{name} (cannot be set|has no items)|appended to .*{name}"):
                loaded(b"\x80\x03c%s\n%s\n" % (module.encode(), name.encode()) + opcodes)


def test_bad_tensors_are_refused():
    storage = stored_tensor.storage_from_bytes(raw_storage(6))
    good = safe_pickle.StoredTensor(storage, 0, (2, 3), (3, 1))
    assert good.tensor().tolist() == [[0, 1, 2], [3, 4, 5]]
    for offset, shape, stride in [
        (1, (2, 3), (3, 1)),
        (0, (7,), (1,)),
        (0, (2, 3), (4, 1)),
        (0, (10**6, 10**6), (0, 0)),
    ]:
        with pytest.raises(ValueError, match="larger than its data"):
            safe_pickle.StoredTensor(storage, offset, shape, stride).tensor()
    for offset, shape, stride in [
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2.0,), (1,)),
        (0, (2,), ()),
        (0, [1] * 9, [1] * 9),
    ]:
        with pytest.raises(ValueError):
            safe_pickle.StoredTensor(storage, offset, shape, stride)


def raw_storage(n):
    data = pickle.dumps(torch.arange(float(n)), 4)
    return next(argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, bytes))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"PK\x03\x04rest", "zip"),
        (b"<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"\x89PNG\r\n", "not a pickle"),
        (b"cos\nsystem\n(S'true'\ntR.", "not a pickle"),
        (b"\x80\x04", "cut short"),
        (b"\x80\x04\xff\xff", "damaged"),
        (b"\x80\x04K\x01\x85Q.", "damaged"),
    ],
)
def test_foreign_files_are_refused_in_a_word(content, words):
    with pytest.raises(ValueError, match=words):
        loaded(content)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "tensor",
    [
        *(torch.arange(5).to(dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)),
        *(torch.arange(5).to(dtype) for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)),
        torch.tensor([True, False]),
        torch.randn(3, 4).t(),
        torch.arange(10.0)[3:7],
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.zeros(1).expand(1, 1),
        torch.nn.Parameter(torch.randn(2, 2)),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
def test_tensors_are_read_as_they_were(tensor, protocol):
    read = loaded(pickle.dumps(tensor, protocol))
    assert read.dtype == tensor.dtype
    assert read.shape == tensor.shape
    assert torch.equal(read.tensor(), tensor)
    assert read.tensor().data_ptr() % 16 == 0 or read.tensor().storage_offset() > 0


def test_a_bool_is_0_or_1_whatever_is_stored():
    data = pickle.dumps(torch.tensor([True, False, True]), 4)
    assert loaded(data.replace(b"\x01\x00\x01", b"\x02\x00\xff")).tensor().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"FloatStorage", b"DoubleStorag"),
        (b"FloatStorage", b"DoubleStorage"),
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        (b"K\x06Ntq\x04Q", b"K\x07Ntq\x04Q"),
        (b"K\x06Ntq\x04Q", b"J\xff\xff\xff\xffNtq\x04Q"),
        (b"K\x06Ntq\x04Q", b"\x88Ntq\x04Q"),
        (b"K\x06Ntq\x04Q", b"G\x7f\xf8\x00\x00\x00\x00\x00\x00Ntq\x04Q"),
        (b"K\x06Ntq\x04Q", b"\x8a\x08" + b"\xff" * 7 + b"\x0fNtq\x04Q"),
        (b"K\x06Ntq\x04Q", b"K\x06)tq\x04Q"),
        (b"\x06\x00\x00\x00\x00\x00\x00\x00\x00\x00", b"\x05\x00\x00\x00\x00\x00\x00\x00\x00\x00"),
        (b"\x06\x00\x00\x00\x00\x00\x00\x00\x00\x00", b"\x06\x00\x00\x00\x00\x00\x00"),
        (b"l\xfc\x9cF", b"l\xfc\x9cG"),
        (b"M\xe9\x03.", b"M\xe8\x03."),
    ],
)
def test_damaged_storages_are_refused(old, new):
    data = raw_storage(6)
    assert old in data
    with pytest.raises(ValueError, match=r"damaged|badly described|unsupported|big-endian|not a file"):
        stored_tensor.storage_from_bytes(data.replace(old, new)).flat()


@pytest.mark.parametrize("size", [-1, 2.0, float("nan"), True, None, "2", 2**62])
def test_sizes_are_whole_numbers(size):
    storage = stored_tensor.storage_from_bytes(raw_storage(6))
    for shape, stride, offset in [((size,), (1,), 0), ((1,), (size,), 0), ((1,), (1,), size)]:
        with pytest.raises(ValueError, match="not made of whole numbers"):
            safe_pickle.StoredTensor(storage, offset, shape, stride)


def test_tensors_that_share_too_much_are_refused():
    storage = stored_tensor.StoredStorage(lambda: torch.zeros(600_000))
    one = safe_pickle.StoredTensor(storage, 0, (600, 1000), (1000, 1))
    safe_pickle.check_sizes([one, one])
    with pytest.raises(ValueError, match="larger than what is stored"):
        safe_pickle.check_sizes([one] * 3)
