"""What snapshots take: bytes, memory, precision; and `gan.load`."""

import copy
import io
import pickle
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch

import gan
from gan import augment, models, networks
from gan.errors import GanError
from gan.models import embedded_networks
from torch_utils import persistence

PLAIN = {"training_set_kwargs": {}}


def pair(channel_base=64, channel_max=8, resolution=16):
    torch.manual_seed(0)
    width = {"channel_base": channel_base, "channel_max": channel_max}
    size = {"img_resolution": resolution, "img_channels": 3, "c_dim": 0}
    G = networks.Generator(z_dim=8, w_dim=8, **size, mapping_kwargs={"num_layers": 2}, synthesis_kwargs=width)
    return {"G": G, "D": networks.Discriminator(**size, **width), "G_ema": copy.deepcopy(G)}


def tensors(*nets):
    return [tensor for network in nets for tensor in network.state_dict().values()]


def size_of(found):
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def plainly(path):
    with open(path, "rb") as file:
        return pickle.load(file)


@pytest.mark.parametrize("wide", [False, True])
def test_a_file_takes_what_its_tensors_take(wide, tmp_path):
    nets = pair(*((2048, 256) if wide else (64, 8)))
    models.save(tmp_path / "a.pkl", **nets, **PLAIN)
    found = tensors(*nets.values())
    text = len(Path(embedded_networks.__file__).read_bytes())
    size = (tmp_path / "a.pkl").stat().st_size
    assert size_of(found) + text < size < size_of(found) + text + 400 * len(found)
    models.save(tmp_path / "half.pkl", **nets, **PLAIN, half=True)
    half = (tmp_path / "half.pkl").stat().st_size
    named = len("Float") - len("Half")
    assert size - half == sum(2 * tensor.numel() + named for tensor in found if tensor.ndim > 1)


def test_the_text_is_in_it_once_and_is_the_plain_one(tmp_path):
    models.save(tmp_path / "a.pkl", **pair(), augment_pipe=augment.AugmentPipe(), **PLAIN)
    text = Path(embedded_networks.__file__).read_bytes()
    data = (tmp_path / "a.pkl").read_bytes()
    assert data.count(text) == data.count(b"class Generator(") == 1
    assert "module_src" in data.decode("latin1")


def test_saving_takes_the_memory_of_a_tensor_at_most(tmp_path):
    nets = pair(1024, 128)
    nets["G"].synthesis.b16.conv1.weight.data = torch.randn(2**21, 1, 1, 1)  # 8 MiB
    content = {**nets, "training_set_kwargs": {}}

    class Counter(io.RawIOBase):
        size = 0

        def writable(self):
            return True

        def write(self, data):
            self.size += memoryview(data).nbytes
            return memoryview(data).nbytes

    written = Counter()
    persistence.dump({}, written, source_of=persistence.source_text)
    tracemalloc.start()
    persistence.dump(content, written, source_of=persistence.source_text)
    _, peak = tracemalloc.get_traced_memory()  # of Python's own objects, where the pickler kept everything
    tracemalloc.stop()
    assert written.size > 2**23
    assert peak < 2**20


def test_half_is_a_way_of_storing(tmp_path):
    nets = pair()
    pipe = augment.AugmentPipe()
    pipe.p.fill_(0.123456)
    models.save(tmp_path / "a.pkl", **nets, augment_pipe=pipe, **PLAIN, half=True)
    opened, snapshot = plainly(tmp_path / "a.pkl"), models.load(tmp_path / "a.pkl")
    assert float(opened["augment_pipe"].p) == snapshot.augment_p == pytest.approx(0.123456)
    for name, live in nets.items():
        for network in (opened[name], getattr(snapshot, name)):
            assert type(network) is type(live)
            for key, tensor in live.state_dict().items():
                stored = network.state_dict()[key]
                assert stored.dtype == torch.float32
                assert torch.equal(stored, tensor.half().float() if tensor.ndim else tensor)
            assert not any(p.requires_grad for p in network.parameters())


def test_a_tensor_with_a_number_beyond_float16_is_stored_as_float32(tmp_path):
    nets = pair()
    nets["D"].b16.conv0.weight.data[0, 0, 0, 0] = -70000
    models.save(tmp_path / "a.pkl", **nets, **PLAIN, half=True)
    stored = models.load(tmp_path / "a.pkl").D.state_dict()
    for name, tensor in nets["D"].state_dict().items():
        half = tensor.ndim > 1 and name != "b16.conv0.weight"
        assert torch.equal(stored[name], tensor.half().float() if half else tensor), name


def test_what_a_snapshot_tells_of_its_networks():
    nets = pair()
    snapshot = models.Snapshot(nets["G"], None, nets["G_ema"], None)
    assert list(snapshot.networks) == ["G", "G_ema"]
    assert snapshot.networks["G"] is nets["G"]
    assert list(models.Snapshot(**nets, augment_p=None).networks) == ["G", "D", "G_ema"]
    D = networks.Discriminator(2, 8, 3, channel_base=64, channel_max=8)
    for names, told in (
        (["a", "b"], ["a", "b"]),
        (("a", "b"), ["a", "b"]),
        (["a"], None),
        ("ab", None),
        ([1, 2], None),
    ):
        assert models.Snapshot(None, D, None, None, {"class_names": names}).class_names == told
    assert models.Snapshot(None, D, None, None).class_names is None
    assert models.Snapshot(nets["G"], None, None, None, {"class_names": []}).class_names is None


def test_other_networks_are_refused(tmp_path):
    nets = pair()
    for name, network in (("G", nets["D"]), ("D", nets["G"]), ("G_ema", torch.nn.Linear(2, 2))):
        with pytest.raises(ValueError, match=f"{name} must be a .*ator of .* not a {type(network).__name__}"):
            models.save(tmp_path / "a.pkl", **{**nets, name: network}, **PLAIN)
    assert list(tmp_path.iterdir()) == []


def test_what_is_opened_shares_no_memory_and_works_like_new(tmp_path):
    nets = pair()
    models.save(tmp_path / "a.pkl", **nets, **PLAIN)
    opened = plainly(tmp_path / "a.pkl")
    found = tensors(*(opened[name] for name in nets))
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == len(found)
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() for tensor in found)
    G = opened["G_ema"]
    assert G.__dict__.keys() == nets["G_ema"].__dict__.keys()
    calls = []
    handle = G.mapping.register_forward_hook(lambda *args: calls.append(args))
    z = torch.randn(2, 8)
    assert torch.equal(G(z, noise_mode="const"), nets["G_ema"].eval()(z, noise_mode="const"))
    handle.remove()
    copy.deepcopy(G).train()(z)
    assert len(calls) == 1
    models.save(tmp_path / "b.pkl", G=opened["G"], D=opened["D"], G_ema=G, **PLAIN)
    assert (tmp_path / "b.pkl").read_bytes() == (tmp_path / "a.pkl").read_bytes()


def test_numbers_of_all_sizes_and_other_plain_values(tmp_path):
    kwargs = {"n": [0, 255, 256, -1, 2**31 - 1, -(2**31), 2**31, -(2**70)], "f": [0.1, float("inf"), -0.0]}
    kwargs.update(text="ä" * 300, odd="\udcff", data=b"x" * 300, none=None, yes=True, no=False, t=(1, (2,), ()))
    kwargs.update(s={1, 2}, nothing={}, many={str(i): [str(i)] for i in range(400)})
    models.save(tmp_path / "a.pkl", **pair(), training_set_kwargs=kwargs)
    assert plainly(tmp_path / "a.pkl")["training_set_kwargs"] == kwargs
    assert models.load(tmp_path / "a.pkl").training_set_kwargs == kwargs


def test_tensors_of_all_kinds_are_stored_as_torch_stores_them():
    values = [torch.arange(6).reshape(2, 3).t(), torch.tensor(True), torch.zeros(2, 0), torch.tensor(2.5)]
    values += [torch.arange(3, dtype=dtype) for dtype in (torch.uint8, torch.int16, torch.int32, torch.float64)]
    values += [torch.nn.Parameter(torch.ones(3)), torch.ones(2, 2, dtype=torch.bfloat16)]
    file = io.BytesIO()
    persistence.dump({"all": values}, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pickle.loads(file.getvalue())["all"]
    read = [stored.tensor() for stored in persistence.load(io.BytesIO(file.getvalue()))["all"]]
    for tensor, a, b in zip(values, found, read, strict=True):
        expected = tensor.detach().float() if tensor.is_floating_point() else tensor
        assert a.dtype == b.dtype == expected.dtype
        assert torch.equal(a, expected)
        assert torch.equal(b, expected)
    assert [type(tensor) for tensor in found] == [type(tensor) for tensor in values]


def test_gan_load_gives_the_generator_to_sample_from(tmp_path):
    nets = pair()
    nets["G"].mapping.w_avg.fill_(1)
    models.save(tmp_path / "a.pkl", **nets, **PLAIN)
    models.save(tmp_path / "only_G.pkl", **{**nets, "G_ema": None}, **PLAIN)
    models.save(tmp_path / "only_D.pkl", **{**nets, "G": None, "G_ema": None}, **PLAIN)
    z = torch.randn(2, 8)
    assert gan.load(str(tmp_path / "a.pkl"))(z).shape == (2, 3, 16, 16)
    assert gan.load(tmp_path / "a.pkl").mapping.w_avg.sum() == 0
    assert gan.load(tmp_path / "only_G.pkl").mapping.w_avg.sum() == 8
    with pytest.raises(GanError, match=r"only_D\.pkl: holds no generator, only a discriminator"):
        gan.load(tmp_path / "only_D.pkl")
