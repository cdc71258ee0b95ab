import copy
import io
import pickle
import pickletools
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from gan import networks
from gan.models import embedded_networks
from gan.models.formats import snapshot_pickle
from torch_utils import persistence
from torch_utils.pickle_writer import halved

GENERATOR = {
    "z_dim": 8,
    "c_dim": 3,
    "w_dim": 8,
    "img_resolution": 8,
    "img_channels": 3,
    "mapping_kwargs": {"num_layers": 2},
    "synthesis_kwargs": {"channel_base": 64, "channel_max": 8, "num_fp16_res": 1, "conv_clamp": 256},
}

# Everything that a file of ours may name.
WRITTEN_GLOBALS = frozenset(
    {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.storage", "_load_from_bytes"),
        ("collections", "OrderedDict"),
    }
)


@pytest.fixture(scope="module")
def G():
    torch.manual_seed(0)
    return networks.Generator(**GENERATOR)


@pytest.fixture(scope="module")
def data(G):
    return dumped({"G": G, "augment_pipe": None, "training_set_kwargs": {"path": "x.zip"}})


def dumped(value, **kwargs):
    file = io.BytesIO()
    source_of = kwargs.pop("source_of", lambda cls: persistence.source_text(embedded_networks.Generator))
    persistence.dump(value, file, source_of=source_of, **kwargs)
    return file.getvalue()


def loaded(data):
    return persistence.load(io.BytesIO(data))


def image(G, z, c=None):
    return G(z, c, noise_mode="const", force_fp32=True)


def inputs(n=2):
    return torch.randn([n, 8], generator=torch.Generator().manual_seed(1)), torch.eye(3)[:n]


def stored_globals(data):
    """(module, name) of every global that a pickle names."""
    found = set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module, name):
            found.add((module, name))
            return super().find_class(module, name)

    Recorder(io.BytesIO(data)).load()
    return found


def walk(stored, prefix=""):
    yield prefix, stored
    for name, child in stored.state["_modules"].items():
        if child is not None:
            yield from walk(child, f"{prefix}.{name}")


def test_layout(G, data):
    documented = {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.storage", "_load_from_bytes"),
        ("collections", "OrderedDict"),
    }
    assert stored_globals(data) == documented
    texts = {argument for opcode, argument, _ in pickletools.genops(data) if "UNICODE" in opcode.name}
    assert {part for pair in documented for part in pair} <= texts
    source = Path(embedded_networks.__file__).read_text()
    by_pytorch = torch.nn.Module().__dict__.keys() - {"training", "_parameters", "_buffers", "_modules"}
    by_name = dict(G.named_modules())
    for name, stored in walk(loaded(data)["G"]):
        live = by_name[name[1:]]
        assert stored.class_name == type(live).__name__
        assert stored.module_src == source
        assert stored.state.keys() == live.__dict__.keys() - by_pytorch
        assert stored.state["training"] is False
        assert (stored.state["_init_args"], stored.state["_init_kwargs"]) == (live._init_args, live._init_kwargs)
    described = [op for op, argument, _ in pickletools.genops(data) if argument == "module_src"]
    assert len(described) == 1  # later ones refer to the first
    assert data.count(source.encode()) == 1


def test_file_is_little_larger_than_its_tensors(G, data):
    state = G.state_dict()
    content = sum(t.numel() * t.element_size() for t in state.values())
    content += len(Path(embedded_networks.__file__).read_bytes())
    assert content < len(data) < content + 500 * len(state)


def test_plain_pickle_builds_registered_classes(data, G, monkeypatch):
    z, c = inputs()
    opened = pickle.loads(data)["G"]
    assert type(opened) is networks.Generator
    assert torch.equal(image(opened, z, c), image(copy.deepcopy(G).eval(), z, c))
    monkeypatch.setattr(persistence, "_registry", {})
    with pytest.raises(pickle.UnpicklingError, match="is not known"):
        pickle.loads(data)


def test_plain_pickle_needs_no_import(data, tmp_path):
    (tmp_path / "a.pkl").write_bytes(data)
    code = "import pickle, sys; print(type(pickle.load(open(sys.argv[1], 'rb'))['G']))"
    command = [sys.executable, "-c", code, str(tmp_path / "a.pkl")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=60)
    assert (result.stdout, result.stderr) == ("<class 'gan.networks.Generator'>\n", "")


def test_plain_pickle_does_not_execute_the_source(G, tmp_path):
    canary = tmp_path / "executed"
    data = dumped({"G": G}, source_of=lambda cls: f"open({str(canary)!r}, 'w')")
    pickle.loads(data)
    loaded(data)
    assert not canary.exists()


def test_tensors_round_trip(G, data):
    tensors = snapshot_pickle.stored_tensors(loaded(data)["G"])
    state = G.state_dict()
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensors[name].tensor(), tensor)


def test_views_of_a_flat_buffer_are_written_alone(G, data):
    flattened = copy.deepcopy(G)
    parameters = list(flattened.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    gradient = torch.ones_like(flat)
    offset = 0
    for p in parameters:
        p.data = flat[offset : offset + p.numel()].view(p.shape)
        p.grad = gradient[offset : offset + p.numel()].view(p.shape)
        offset += p.numel()
    written = dumped({"G": flattened, "augment_pipe": None, "training_set_kwargs": {"path": "x.zip"}})
    assert abs(len(written) - len(data)) < 2000
    stored = snapshot_pickle.stored_tensors(loaded(written)["G"])
    for name, tensor in G.state_dict().items():
        assert torch.equal(stored[name].tensor(), tensor)
    assert parameters[0].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()  # left as it was


def test_what_is_of_the_moment_is_not_written(G):
    live = copy.deepcopy(G).train()
    networks.set_half_dtype(live, torch.float16)
    live.mapping.register_forward_hook(lambda *args: None)
    live.mapping.fc0.weight.grad = torch.ones_like(live.mapping.fc0.weight)
    live.mapping.fc0.weight.note = "a Python attribute of a parameter"
    live.synthesis.b4.conv1.weight.data = live.synthesis.b4.conv1.weight.data.contiguous(
        memory_format=torch.channels_last
    )
    live.synthesis.b8.to(torch.float64)
    data = dumped({"G": live}, transient=["half_dtype"])
    assert stored_globals(data) == WRITTEN_GLOBALS
    for _, stored in walk(loaded(data)["G"]):
        assert "half_dtype" not in stored.state
        assert "_forward_hooks" not in stored.state
    for stored in snapshot_pickle.stored_tensors(loaded(data)["G"]).values():
        tensor = stored.tensor()
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()
    assert live.training
    assert live.mapping._forward_hooks
    assert live.mapping.fc0.weight.requires_grad


def test_only_plain_values_are_written(G):
    value = {
        "path": Path("x"),
        "n": np.int64(3),
        "f": np.float32(0.5),
        "ok": np.bool_(True),
        "size": torch.Size([2]),
        "odd": OrderedDict(a=(1, None)),
        "s": {1},
        "t": torch.arange(3),
    }
    data = dumped(value)
    assert stored_globals(data) <= WRITTEN_GLOBALS
    read = loaded(data)
    assert read.pop("t").tensor().tolist() == [0, 1, 2]
    assert read == {"path": "x", "n": 3, "f": 0.5, "ok": True, "size": (2,), "odd": {"a": (1, None)}, "s": {1}}
    with pytest.raises(ValueError, match=r"builtins\.object"):
        dumped({"x": object()})
    with pytest.raises(ValueError, match="does not record"):
        dumped({"x": torch.nn.Linear(1, 1)})
    odd = copy.deepcopy(G)
    odd.dtype = torch.float16
    with pytest.raises(ValueError, match=r"Generator\.dtype: .*torch\.dtype"):
        dumped({"x": odd})
    cycle: list = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="nested"):
        dumped({"x": cycle})
    bomb: list = []
    for _ in range(30):
        bomb = [bomb, bomb]
    with pytest.raises(ValueError, match="too many"):
        dumped({"x": bomb})


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        (torch.full([2, 2], 65504.0), torch.float16),
        (torch.full([2, 2], 65521.0), torch.float32),  # the first that rounds to infinity
        (torch.tensor([[0.0, torch.nan]]), torch.float32),
        (torch.ones(5), torch.float32),
        (torch.tensor(0.5), torch.float32),
        (torch.ones(2, 2, dtype=torch.float64), torch.float16),
        (torch.ones(2, 2, dtype=torch.bfloat16), torch.float16),
    ],
)
def test_what_takes_room_and_fits_is_halved(tensor, dtype):
    assert halved(tensor).dtype == dtype
    assert torch.equal(halved(tensor).nan_to_num(), tensor.float().nan_to_num())
    assert loaded(dumped({"x": tensor}, half=True))["x"].dtype == dtype


def test_many_values_share_one_bound():
    many = [0] * 60_000
    assert persistence.plain_entries({"a": many, 1: "b", "odd": object(), "c": {"d": 1}}) == {"a": many, "c": {"d": 1}}
    assert persistence.plain_entries({"a": many, "b": many, "c": 1}) == {"a": many}


@pytest.mark.parametrize("value", [{(1, 2): "x"}, {(1,)}, frozenset([()])])
def test_tuples_are_no_keys_of_plain_values(value):
    with pytest.raises(ValueError, match=r"a key of the type builtins\.tuple is not a plain value"):
        persistence.plain(value)


def test_unknown_version_is_refused():
    meta = {"type": "class", "version": 7, "module_src": "", "class_name": "Generator", "state": {}}

    class Call:
        def __reduce__(self):
            return persistence._reconstruct_persistent_obj, (meta,)

    with pytest.raises(ValueError, match="version 7"):
        loaded(pickle.dumps(Call()))
    with pytest.raises(pickle.UnpicklingError, match="version 7"):
        pickle.loads(pickle.dumps(Call()))


def test_a_cut_file_is_refused_wherever_it_is_cut(data):
    for size in [*range(0, 200), *range(200, len(data), len(data) // 300), len(data) - 1]:
        with pytest.raises(ValueError, match=r"cut short|empty|damaged|not a pickle"):
            loaded(data[:size])
