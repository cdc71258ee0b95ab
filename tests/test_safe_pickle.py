import io
import os
import pickle
import pickletools

import numpy as np
import pytest
import torch
from pickles import Payload

from torch_utils import persistence, safe_pickle, stored_tensor, torch_legacy


def loaded(data):
    return persistence.load(io.BytesIO(data))


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


def test_arrays_with_other_orders_of_axes_are_read():
    array = np.arange(24, dtype="f4").reshape(2, 3, 4)
    for axes in [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)]:
        stored = loaded(pickle.dumps(array.transpose(axes), 5))
        assert stored.shape == array.transpose(axes).shape
        np.testing.assert_array_equal(np.asarray(stored), array.transpose(axes))
    rest = (np.dtype("f4"), (2, 3, 4), "K")
    function = np._core.numeric._frombuffer
    read = loaded(pickle.dumps(Payload(function, array.tobytes(), *rest, (1, 2, 0)), 4))
    np.testing.assert_array_equal(np.asarray(read), array.transpose(1, 2, 0))
    for axes in [(0, 1), (0, 1, 3), (0, 0, 1), ("a", 1, 2), 5, [0, 1, 2]]:
        with pytest.raises(ValueError, match="an array is badly described"):
            loaded(pickle.dumps(Payload(function, array.tobytes(), *rest, axes), 4))


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("value", ["text", np.datetime64("2020-01-01"), np.longdouble(1), 1 + 2j, os.system])
def test_arrays_of_other_things_than_real_numbers_are_inert(value, protocol):
    array = np.array([value, value])
    first, stored, scalar = loaded(pickle.dumps([1, array, array[0]], protocol))
    assert first == 1
    with pytest.raises(ValueError, match="something else than real numbers"):
        np.asarray(stored)
    safe_pickle.check_sizes([stored])
    assert scalar.global_name in ("numpy.core.multiarray.scalar", f"{os.system.__module__}.system")


def test_bad_arrays_are_refused():
    for state in [
        (1, (3,), np.dtype("f4"), False, b"1234"),
        (1, (-1,), np.dtype("f4"), False, b""),
        (1, (10**9, 10**9), np.dtype("f4"), False, b""),
    ]:
        with pytest.raises(ValueError, match=r"an array|damaged"):
            loaded(pickle.dumps(Payload(np.empty(0).__reduce__()[0], np.ndarray, (0,), b"b", state=state), 4))


def test_storages_of_other_devices_are_read_on_the_cpu():
    data = raw_storage(3).replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    flat = torch_legacy.storage_from_bytes(data).flat()
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
    storage = torch_legacy.storage_from_bytes(raw_storage(6))
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
        torch_legacy.storage_from_bytes(data.replace(old, new)).flat()


@pytest.mark.parametrize("size", [-1, 2.0, float("nan"), True, None, "2", 2**62])
def test_sizes_are_whole_numbers(size):
    storage = torch_legacy.storage_from_bytes(raw_storage(6))
    for shape, stride, offset in [((size,), (1,), 0), ((1,), (size,), 0), ((1,), (1,), size)]:
        with pytest.raises(ValueError, match="not made of whole numbers"):
            safe_pickle.StoredTensor(storage, offset, shape, stride)


@pytest.mark.parametrize(("dtype", "often"), [(torch.float32, 3), (torch.float16, 2), (torch.uint8, 1)])
def test_tensors_that_share_too_much_are_refused(dtype, often):
    storage = stored_tensor.StoredStorage(lambda: torch.zeros(800_000, dtype=dtype))
    one = safe_pickle.StoredTensor(storage, 0, (800, 1000), (1000, 1))
    safe_pickle.check_sizes(iter([one] * often))
    with pytest.raises(ValueError, match="larger than what is stored"):
        safe_pickle.check_sizes([one] * (often + 1))


def test_one_content_under_several_names_counts_once():
    data = raw_storage(1_000_000)
    tensors = [safe_pickle.StoredTensor(torch_legacy.storage_from_bytes(data), 0, (1_000_000,), (1,)) for _ in range(4)]
    safe_pickle.check_sizes(tensors[:3])
    with pytest.raises(ValueError, match="larger than what is stored"):
        safe_pickle.check_sizes(tensors)
    array, content = np.zeros(3_000_000, np.uint8), bytes(3_000_000)
    arrays = [safe_pickle.StoredArray() for _ in range(2)]
    for stored in arrays:
        stored.fill(content, loaded(pickle.dumps(array.dtype, 4)), array.shape, "C")
    with pytest.raises(ValueError, match="larger than what is stored"):
        safe_pickle.check_sizes(arrays)


def test_expanded_tensors_are_read_up_to_a_bound():
    storage = torch_legacy.storage_from_bytes(raw_storage(3))
    assert safe_pickle.StoredTensor(storage, 0, (2, 3), (0, 1)).own().tolist() == [[0, 1, 2]] * 2
    assert safe_pickle.StoredTensor(storage, 2, (1000, 1000), (0, 0)).tensor().sum() == 2_000_000
    with pytest.raises(ValueError, match="larger than its data"):
        safe_pickle.StoredTensor(storage, 0, (1001, 1000), (0, 0)).tensor()


def test_a_tensor_of_its_own_is_copied_only_if_others_have_its_memory():
    storage = torch_legacy.storage_from_bytes(raw_storage(6))
    whole = safe_pickle.StoredTensor(storage, 0, (2, 3), (3, 1))
    part = safe_pickle.StoredTensor(storage, 0, (3,), (1,)).own()
    first, second = whole.own(), whole.own()
    assert first.data_ptr() == storage.flat().data_ptr()
    first.zero_()
    assert second.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert part.tolist() == [0, 1, 2]
    turned = safe_pickle.StoredTensor(torch_legacy.storage_from_bytes(raw_storage(6)), 0, (3, 2), (1, 3)).own()
    assert turned.is_contiguous()
    assert turned.tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("made", [torch.nn.Buffer, torch.nn.Parameter, torch.Tensor.clone])
def test_attributes_of_tensors_are_left_out(made):
    tensor = made(torch.arange(3.0))
    tensor.note = [os.system]
    assert loaded(pickle.dumps(tensor, 4)).tensor().tolist() == [0, 1, 2]


@pytest.mark.parametrize("args", [(torch.zeros(1), torch.Tensor, (), {}), (os.system, torch.Tensor, ("ls",), {})])
def test_no_other_function_makes_a_tensor_with_attributes(args):
    read = loaded(pickle.dumps(Payload(torch._tensor._rebuild_from_type_v2, *args), 4))
    assert (type(read), read.global_name) == (safe_pickle.Opaque, "torch._tensor._rebuild_from_type_v2")


@pytest.mark.parametrize("view", [torch._neg_view, torch.Tensor.conj])
def test_tensors_of_the_other_sign_are_inert(view):
    read = loaded(pickle.dumps([view(torch.ones(2, dtype=torch.complex64)), torch.ones(2)], 4))
    assert isinstance(read[0], safe_pickle.Opaque)
    assert read[1].tensor().tolist() == [1, 1]
