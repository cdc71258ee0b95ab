"""Files made to do harm, and files that came to harm: one clear error each, soon, and nothing runs."""

import builtins
import collections
import contextlib
import functools
import io
import json
import multiprocessing
import os
import pickle
import pickletools
import random
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from pickles import Payload, zipped

from gan import models, networks
from gan.errors import GanError
from gan.models import rebuild
from gan.models.description import Description
from gan.models.formats import port
from torch_utils import persistence

ROOT = Path(__file__).parents[2]
GENERATOR = {
    "z_dim": 8,
    "c_dim": 0,
    "w_dim": 8,
    "img_resolution": 8,
    "img_channels": 3,
    "mapping_kwargs": {"num_layers": 2},
    "synthesis_kwargs": {"channel_base": 64, "channel_max": 8},
}
DEEP = {**GENERATOR, "z_dim": 512, "w_dim": 512, "mapping_kwargs": {"num_layers": 100}}


def hostile(canary):
    command = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    system = Payload(os.system, command)
    return {
        "system": system,
        "subprocess": Payload(subprocess.check_call, ["touch", str(canary)]),
        "eval": Payload(builtins.eval, code),
        "exec": Payload(builtins.exec, code),
        "open": Payload(builtins.open, str(canary), "w"),
        "getattr": Payload(Payload(getattr, Payload(__import__, "builtins"), "eval"), code),
        "nested": Payload(builtins.list, Payload(builtins.map, os.system, [command])),
        "in an OrderedDict": Payload(collections.OrderedDict, [("a", system)]),
        "as a state": Payload(Namespace, state={"a": system}),
        "in a storage": Payload(torch.storage._load_from_bytes, legacy(system)),
        "in a list in a storage": Payload(torch.storage._load_from_bytes, legacy([torch.zeros(1), system])),
        "pickle in pickle": Payload(pickle.loads, pickle.dumps(system)),
        "torch.load": Payload(functools.partial(torch.load, weights_only=False), Payload(io.BytesIO, legacy(system))),
    }


def legacy(value):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("name", hostile("x"))
def test_payloads_would_do_something(name, tmp_path):
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(hostile(tmp_path / "executed")[name]))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", hostile("x"))
@pytest.mark.parametrize("place", ["alone", "G", "state", "init", "tensor", "p", "training_set", "port", "tuple"])
def test_payloads_do_nothing(name, place, tmp_path):
    canary = tmp_path / "executed"
    payload = hostile(canary)[name]
    meta = {"type": "class", "version": 6, "module_src": f"open({str(canary)!r}, 'w')", "class_name": "Generator"}
    state = {
        "_init_args": (),
        "_init_kwargs": payload if place == "init" else GENERATOR,
        "_parameters": {"weight": payload} if place == "tensor" else {},
        "_buffers": {},
        "_modules": {"mapping": payload} if place == "state" else {},
    }
    stored = Payload(persistence._reconstruct_persistent_obj, {**meta, "state": state})
    pipe = {"type": "class", "version": 6, "module_src": "", "class_name": "P", "state": {"_buffers": {"p": payload}}}
    file = tmp_path / "hostile.pkl"
    value = {
        "G": payload if place == "G" else stored,
        "augment_pipe": Payload(persistence._reconstruct_persistent_obj, pipe) if place == "p" else None,
        "training_set_kwargs": payload if place == "training_set" else {},
    }
    if place == "port":
        torch.save({"g_ema": {"input.input": payload}}, file, pickle_protocol=4)
    else:
        whole = {"alone": payload, "tuple": (payload, payload, payload)}.get(place, value)
        file.write_bytes(pickle.dumps(whole, protocol=4))
    with pytest.raises(GanError) as caught:
        models.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not canary.exists()


# What no program would write: instructions of pickles, one by one.

PERSISTENT = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
NETWORK = b"cdnnlib.tflib.network\nNetwork\n"


def plain(value):
    """The instructions for a plain value; what they memorise does not last."""
    return pickle.dumps(value, 2)[2:-1]


def put(number):
    return b"r" + (1000 + number).to_bytes(4, "little")


def get(number):
    return b"j" + (1000 + number).to_bytes(4, "little")


def mapping(**values):
    """A dict of instructions."""
    return b"}(" + b"".join(plain(name) + value for name, value in values.items()) + b"u"


def module(class_name="Generator", version=None, **state):
    meta = {"type": plain("class"), "version": version or plain(6), "module_src": plain("")}
    return PERSISTENT + mapping(**meta, class_name=plain(class_name), state=mapping(**state)) + b"\x85R"


def described(shape=(1,), stride=(1,), offset=0, storage=None):
    """A tensor, of which any part may be instructions."""
    numbers = [part if isinstance(part, bytes) else plain(part) for part in (offset, shape, stride)]
    storage = storage or storage_of(STORAGE)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"".join(numbers) + b"\x89}tR"


def stored(tensor):
    """The bytes of its storage, as they are in a pickle."""
    return next(arg for _, arg, _ in pickletools.genops(pickle.dumps(tensor, 4)) if isinstance(arg, bytes))


def storage_of(data):
    return b"ctorch.storage\n_load_from_bytes\nB" + len(data).to_bytes(4, "little") + data + b"\x85R"


STORAGE = stored(torch.zeros(4))
NOTHINGS = b"}(" + b"".join(plain(f"h{number}") + b"N" for number in range(60_000)) + b"u"
MODULE = plain({"type": "class", "version": 6, "module_src": "", "class_name": "Generator"}) + plain("state")
LONG_NAME = plain("_modules") + b"}" + plain("a" * 300_000)
DOUBLED = b")" + b"2\x86" * 60  # a tuple of itself twice, sixty times over: endless to hash, show or copy


def corpus(canary):
    """Name of a file -> its content."""
    run = b"cos\nsystem\n" + plain(f"touch {canary}") + b"\x85R"
    snapshots = {
        "INST": b"(" + plain(f"touch {canary}") + b"ios\nsystem\n",
        "OBJ": b"(cos\nsystem\n" + plain(f"touch {canary}") + b"o",
        "NEWOBJ": b"cos\nsystem\n" + plain(f"touch {canary}") + b"\x85\x81",
        "reconstructor": b"ccopyreg\n_reconstructor\ncos\nsystem\nN" + plain(f"touch {canary}") + b"\x87R",
        "dotted": plain("os") + plain("system.__call__") + b"\x93" + plain(f"touch {canary}") + b"\x85R",
        "dotted builtins": plain("torch") + plain("os.system") + b"\x93" + plain(f"touch {canary}") + b"\x85R",
        "attribute of a stand-in": b"ctorch\nSize\n" + mapping(__call__=run) + b"b",
        "extension": b"\x82\x01",
        "persistent id": plain("x") + b"Q",
        "persistent line": b"Pos.system\n",
        "memo": b"Nr\xff\xff\xff\x7f",
        "string": b"\x8e" + (2**60).to_bytes(8, "little") + b"abc",
        "text": b"\x8d" + (2**60).to_bytes(8, "little") + b"abc",
        "number": b"\x8b\xff\xff\xff\x7f",
        "laughs": DOUBLED,
        "laughs as a key": b"}" + DOUBLED + b"Ns",
        "laughs as a version": module(version=DOUBLED),
        "laughs as options": module(_init_kwargs=mapping(z_dim=DOUBLED)),
        "laughs as a size": module(_init_kwargs=plain(GENERATOR) + plain("img_resolution") + DOUBLED + b"s"),
        "laughs as a parameter": module(_parameters=mapping(weight=DOUBLED)),
        "laughs as a class": module(class_name="x" * 1_000_000),
        "list in itself": b"]" + put(0) + get(0) + b"a",
        "dict in itself": b"}" + put(0) + plain("a") + get(0) + b"s",
        "state of itself": b"ca\nb\n)R" + put(0) + get(0) + b"b",
        "module in itself": PERSISTENT
        + MODULE
        + b"}"
        + put(0)
        + b"s\x85R"
        + put(1)
        + get(0)
        + LONG_NAME
        + get(1)
        + b"ss0",
        "nested lists": b"]" * 100_000 + b"a" * 99_999,
        "nested tuples": b")" + b"\x85" * 100_000,
        "nested options": module(_init_kwargs=b"]" * 100_000 + b"a" * 99_999),
        "much of nothing": NOTHINGS
        + put(0)
        + b"0"
        + module(
            _modules=b"}("
            + b"".join(plain(f"m{number}") + module(_buffers=get(0), _parameters=get(0)) for number in range(1500))
            + b"u"
        ),
        "much of nothing, within the limits": plain({f"h{number}": None for number in range(4096)})
        + put(0)
        + b"0"
        + module(
            _modules=b"}("
            + b"".join(plain(f"m{number}") + module(_buffers=get(0), _parameters=get(0)) for number in range(4000))
            + b"u"
        ),
        "hidden buffers": module(
            _non_persistent_buffers_set=b"](" + plain("a") * 100_000 + b"e",
            _buffers=b"}(" + b"".join(plain(f"b{number}") + described() for number in range(2000)) + b"u",
        ),
        "bomb of numbers": b"](" + b"L" + b"9" * 900 + b"L\n" + b"e",
        "one tensor for all": module(_init_kwargs=plain(DEEP), _parameters=tensors_of_one_storage()),
        "NaN size": module(_parameters=mapping(weight=described(b"G\x7f\xf8" + bytes(6) + b"\x85"))),
        "endless size": module(_parameters=mapping(weight=described(b"\x8a\x20" + b"\x7f" * 32 + b"\x85"))),
        "huge options": module(_init_kwargs=plain({**GENERATOR, "mapping_kwargs": {"num_layers": 10**7}})),
        "huge network": module(
            _init_kwargs=plain({**GENERATOR, "z_dim": 2**24, "w_dim": 2**24}),
            _parameters=mapping(a=described(), b=described()),
        ),
    }
    files = {f"{name}.pkl": b"\x80\x04" + mapping(G_ema=content) + b"." for name, content in snapshots.items()}
    files |= {f"{name}, alone.pkl": b"\x80\x04" + content + b"." for name, content in snapshots.items()}
    huge_storage = STORAGE.replace(b"K\x04N", b"\x8a\x08" + bytes(7) + b"\x10N")
    for name, p in {
        "beyond the end": described((), (), 4),
        "far beyond": described((), (), 2**60),
        "a tensor larger than its storage": described((10**6, 10**6), (0, 0)),
        "huge storage": described((), (), storage=storage_of(huge_storage)),
        "storage cut short": described((), (), storage=storage_of(STORAGE[:-1])),
        "storage of another kind": described((), (), storage=storage_of(STORAGE.replace(b"Float", b"FlOat"))),
        "state in a storage": described((), (), storage=storage_of(b"\x80\x02" + run + b".")),
    }.items():
        pipe = module("AugmentPipe", _buffers=mapping(p=p))
        files[f"{name}.pkl"] = b"\x80\x04" + mapping(G_ema=module(), augment_pipe=pipe) + b"."
    kwargs = b"}(" + b"".join(plain(f"k{number}") + get(0) for number in range(50_000)) + b"u"
    files["training_set_kwargs.pkl"] = (
        b"\x80\x04" + plain([["x"] * 100] * 100) + put(0) + mapping(G_ema=module(), training_set_kwargs=kwargs) + b"."
    )
    numbers = plain([float(2**61) ** n for n in range(16)] + [2**61 * n for n in range(1, 8)])  # of few hashes
    calls = (get(0) + get(1) + b"R0") * 18_000
    files["sets.pkl"] = b"\x80\x04cbuiltins\nset\n" + put(0) + b"0" + numbers + b"\x85" + put(1) + b"0" + calls + b"N."
    for name in ("laughs", "nested lists", "list in itself", "state of itself"):
        content = b"(" + (NETWORK + b")R" + snapshots[name] + b"b") * 3 + b"t"
        files[f"{name}, tuple.pkl"] = b"\x80\x04" + content + b"."
        state = mapping(version=plain(4), static_kwargs=snapshots[name], variables=snapshots[name])
        files[f"{name}, variables.pkl"] = b"\x80\x04(" + (NETWORK + b")R" + state + b"b") * 3 + b"t."
        files[f"{name}.pt"] = zipped({"a/data.pkl": b"\x80\x02" + mapping(g_ema=snapshots[name]) + b"."})
    files["components.pkl"] = (
        b"\x80\x04" + NETWORK + b")R" + put(0)
        + mapping(version=plain(4), variables=b"]", components=mapping(**{"a" * 1000: get(0), "b": get(0)}))
        + b"b0(" + get(0) * 3 + b"t."
    )  # fmt: skip
    persistent_id = b"(" + plain("storage") + b"ctorch\nFloatStorage\n" + plain("0") + plain("cpu") + b"%btQ"
    for name, numel, content in [
        ("bomb", plain(2_500_000_000), b""),
        ("missing", plain(10), None),
        ("too short", plain(10), bytes(36)),
        ("NaN", plain(float("nan")), bytes(4)),
        ("negative", plain(-1), bytes(4)),
    ]:
        pickled = b"\x80\x02" + mapping(g_ema=mapping(weight=described(storage=persistent_id % numel))) + b"."
        entries = {"a/data.pkl": pickled} | ({} if content is None else {"a/data/0": content})
        files[f"{name}.pt"] = bomb_of(entries) if name == "bomb" else zipped(entries)
    port_names = [plain(name) for name in ("style.1.weight", "input.input", "conv1.conv.weight")]
    for name, odd in {
        "a name that is none": plain((1,)) + described(),
        "no tensor": plain("a") + run,
        "nothing of something": plain("a") + described((0, 2**24), (1, 1)),
        "too many blocks": b"".join(plain(f"convs.{i}.conv.weight") + described((1,) * 5, (1,) * 5) for i in range(99)),
    }.items():
        shape = ((0, 2**24), (1, 1)) if name == "nothing of something" else ((1, 1), (1, 1))
        tensors = b"}(" + b"".join(part + described(*shape) for part in port_names) + odd + b"u"
        files[f"{name}, port.pkl"] = b"\x80\x04" + mapping(g_ema=tensors) + b"."
    files["many entries.pt"] = zipped({"a/data.pkl": b"N."} | {f"a/{number}": b"" for number in range(3000)})
    files["TorchScript.pt"] = zipped({"a/data.pkl": b"N.", "a/constants.pkl": b"", "a/code/x.py": b"import os"})
    files["payload.pt"] = zipped({"a/data.pkl": b"\x80\x02" + mapping(g_ema=run) + b"."})
    files["legacy payload.pt"] = legacy({"g_ema": Payload(os.system, f"touch {canary}")})
    files["many steps.pkl"] = b"\x80\x04" + b"N0" * 1_100_000 + b"."
    files["many marks.pkl"] = b"\x80\x04" + b"(" * 1_100_000
    files["many sets.pkl"] = b"\x80\x04" + b"\x8f" * 1_100_000
    return files


def tensors_of_one_storage():
    """Instructions for a whole network of 100 MB, all of whose tensors are views of 1 MB."""
    outline = rebuild.outline(Description(networks.Generator, DEEP, dict.fromkeys(map(str, range(1000)))))
    parts = [storage_of(stored(torch.zeros(512 * 512))) + put(2) + b"0}("]
    for name, tensor in outline.state_dict().items():
        parts += [plain(name), described(tuple(tensor.shape), tensor.stride(), storage=get(2))]
    return b"".join(parts) + b"u"


def bomb_of(entries):
    """The last entry is packed and says that it unpacks to 10 GB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content or bytes(1_000_000), zipfile.ZIP_STORED if content else zipfile.ZIP_DEFLATED)
    data = bytearray(file.getvalue())
    at = data.rfind(b"PK\x01\x02")
    data[at + 24 : at + 28] = (2**32 - 2).to_bytes(4, "little")
    return bytes(data)


# Each file in turn in a process that may take little more memory than it has, and 10 seconds for each.
READER = """
import json, pathlib, resource, signal, sys, time
from gan import models
from gan.errors import GanError
from gan.models import rebuild
from gan.models.description import Description
from gan.models.formats import port

pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 1_000_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    signal.alarm(10)
    started = time.process_time()
    try:
        models.load(path)
        found = ["opened", ""]
    except BaseException as error:
        found = [type(error).__name__, str(error)]
    signal.alarm(0)
    print(json.dumps([path.name, *found, time.process_time() - started]), flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited as on Linux")
def test_a_corpus_of_attacks_is_refused_soon_and_in_little_memory(tmp_path):
    canary, folder = tmp_path / "executed", tmp_path / "files"
    folder.mkdir()
    files = corpus(canary)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", READER, str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert (result.returncode, result.stderr) == (0, ""), f"after {len(lines)} of {len(files)}: {lines[-1:]}"
    assert {name for name, *_ in lines} == files.keys()
    for name, kind, said, seconds in lines:
        assert kind == "GanError", f"{name}: {kind} {said}"
        assert said.startswith(f"{folder / name}: ")
        assert said.isprintable()
        assert len(said) < 1000 + len(str(folder))
        assert seconds < 5, name
    assert not canary.exists()


def test_generate_refuses_a_hostile_file_in_one_line(tmp_path):
    file = tmp_path / "payload.pt"
    file.write_bytes(corpus(tmp_path / "executed")[file.name])
    command = [sys.executable, "generate.py", "--network", str(file), "--seeds", "0", "--outdir", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode in (1, 2)
    assert str(file) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "executed").exists()


# Fuzzing: whatever comes of a valid file, the answer is a snapshot or one clear error.

MUTATIONS = 10_000
OPCODES = b"()012IJKMNQRUXabcdehijlqrstu]}\x80\x81\x85\x86\x87\x88\x89\x8a\x8c\x8e\x8f\x90\x92\x93\x94."


class Network:
    """Pickles into the name and state of a network of the TensorFlow generation."""

    def __init__(self, state):
        self.state = state

    def __reduce_ex__(self, protocol):
        return Payload, (), self.state


def valid_files(folder):
    """Small files of all kinds that open."""
    torch.manual_seed(0)
    small = {"channel_base": 8, "channel_max": 1}
    short = {**small, "architecture": "orig"}
    G = networks.Generator(1, 0, 1, 8, 1, mapping_kwargs={"num_layers": 1}, synthesis_kwargs=short)
    D = networks.Discriminator(0, 8, 1, **short)
    files = {}
    for name, network in (("G_ema", G), ("D", D)):
        file = io.BytesIO()
        content = {"G": None, "D": None, "G_ema": None, "training_set_kwargs": {"path": "x"}, name: network}
        persistence.dump(content, file, source_of=lambda cls: "")
        files[name] = file.getvalue()
    theirs = {"b4.conv": "4x4/Conv", "b4.fc": "4x4/Dense0", "b4.out": "Output", "b8.fromrgb": "8x8/FromRGB"}
    theirs |= {"b8.conv0": "8x8/Conv0", "b8.conv1": "8x8/Conv1_down"}
    variables = []
    for name, tensor in D.state_dict().items():
        layer, kind = name.rsplit(".", 1)
        if layer in theirs and kind != "resample_filter":
            order = (2, 3, 1, 0) if tensor.ndim == 4 else tuple(reversed(range(tensor.ndim)))
            variables.append((f"{theirs[layer]}/{kind}", np.ascontiguousarray(tensor.numpy().transpose(order))))
    options = {"resolution": 8, "num_channels": 1, "fmap_base": 4, "fmap_max": 1, "architecture": "orig"}
    state = {"version": 4, "static_kwargs": options, "components": {}, "variables": variables}
    data = pickle.dumps((None, Network(state), None), 2)
    files["TensorFlow"] = data.replace(f"c{Payload.__module__}\nPayload\n".encode(), NETWORK)
    G = networks.Generator(1, 0, 1, 8, 3, mapping_kwargs={"num_layers": 1}, synthesis_kwargs=small)
    port.write(folder / "port.pt", models.Snapshot(None, None, G, None))
    checkpoint = torch.load(folder / "port.pt", weights_only=True)
    checkpoint["args"] = Namespace(size=8, channel_multiplier=1)
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return {**files, "port": file.getvalue(), "legacy": legacy(checkpoint)}


def mutated(data, others, rng):
    """A copy with one to three changes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(data) or 1)
        kind = rng.randrange(8)
        if not data:
            break
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:  # another instruction, where there is one
            places = [i for i in range(at, min(at + 50, len(data))) if data[i] in OPCODES]
            data[places[0] if places else at] = rng.choice(OPCODES)
        elif kind == 3:
            del data[at : rng.choice([len(data), at + 1, at + 1, at + rng.randrange(40)])]
        elif kind == 4:  # another length or size
            data[at : at + 4] = rng.choice([0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1, len(data)]).to_bytes(4, "little")
        elif kind == 5:
            data[at] = rng.choice([0, 1, 127, 255, (data[at] + 1) % 256, (data[at] - 1) % 256])
        else:  # a piece from elsewhere
            source = rng.choice([bytes(data), *others])
            start, length = rng.randrange(len(source)), rng.randrange(1, 60)
            data[at : at + rng.choice([0, length])] = source[start : start + length]
    return bytes(data)


def mutated_zip(data, others, rng):
    """The same, half of the time in the pickle or in the name or content of another entry."""
    if rng.random() < 0.5:
        return mutated(data, others, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(["archive/data.pkl"] * 8 + list(entries))
    entries[name] = mutated(entries[name], others, rng)
    return zipped(entries)


def fuzzed(folder, seed, mutations):
    """Open so many mutants of the files. Returns how many came how far, and the seconds of the slowest."""
    reached = collections.Counter()
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    path = folder.with_name(f"fuzzed{seed}")
    rng, slowest, build = random.Random(seed), 0.0, rebuild.build

    def counting(description):
        reached["built"] += 1
        return build(description)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rebuild, "build", counting)
        for number in range(mutations):
            name = list(files)[number % len(files)]
            path.write_bytes((mutated_zip if name == "port" else mutated)(files[name], list(files.values()), rng))
            started, said = time.process_time(), ""
            try:
                models.load(path)
                reached["opened"] += 1
            except GanError as error:
                said = str(error)
            slowest = max(slowest, time.process_time() - started)
            if said:
                assert said.startswith(f"{path}: ")
                assert said.isprintable()
                reached["read"] += not any(word in said for word in ("damaged", "cut short"))
    return reached, slowest


def test_fuzzed_files_are_read_or_refused(tmp_path):
    folder = tmp_path / "valid"
    folder.mkdir()
    for name, data in valid_files(tmp_path).items():
        (folder / name).write_bytes(data)
        opened = models.load(folder / name)
        assert any(network is not None for network in (opened.G, opened.D, opened.G_ema)), name
    with multiprocessing.get_context("fork").Pool(2) as pool:  # this thread is the only one that has computed
        results = pool.starmap(fuzzed, [(folder, seed, MUTATIONS // 2) for seed in range(2)])
    reached = sum((counts for counts, _ in results), collections.Counter())
    assert max(slowest for _, slowest in results) < 2
    # The changes are small enough to come through to everything behind the pickle.
    assert reached["opened"] > MUTATIONS / 20
    assert reached["read"] > MUTATIONS / 20
    assert reached["built"] > MUTATIONS / 10
