"""The machine that carries out pickles: what it reads as Python does, and what it refuses, in bounded time."""

import argparse
import collections
import fractions
import io
import math
import pickle
import random
import resource
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from torch_utils import pickle_machine
from torch_utils.stand_ins import Global, Opaque, plain_dict

ROOT = Path(__file__).parents[1]
PROTOCOLS = range(6)


def run(data, known=(), **kwargs):
    return pickle_machine.run(io.BytesIO(data), dict(known), **kwargs)


def text(value):
    """As an instruction."""
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def random_value(rng, depth=0):
    kinds = [
        lambda: rng.choice([None, True, False, 0, 1, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**70, -(2**200)]),
        lambda: rng.choice([0.0, -1.5, 1e300, math.inf, 5e-324]),
        lambda: rng.choice(["", "a", "é\n\\'\"", "\ud800", "x" * 300, "\U0001f600", "\x00"]),
        lambda: rng.choice([b"", b"a", bytes(range(256)), b"\n" * 300]),
    ]
    if depth < 4:
        several = lambda: [random_value(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 3, 5]))]  # noqa: E731
        kinds += [
            several,
            lambda: tuple(several()),
            lambda: dict(zip(["a", 1, 2.5, None, True, b"k"], several(), strict=False)),
            lambda: {1, "x", 2.5},
            lambda: frozenset([b"y", 4]),
            lambda: [several()] * 3,
        ]
    return rng.choice(kinds)()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_are_read_as_python_reads_them(protocol):
    rng = random.Random(protocol)
    for _ in range(150):
        data = pickle.dumps(random_value(rng), protocol)
        file = io.BytesIO(data + b"what follows")
        assert pickle_machine.run(file, {}) == pickle.loads(data)
        assert file.read() == b"what follows"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_shared_stays_shared_and_cycles_are_cycles(protocol):
    shared = ["x"]
    cycle = [shared, shared]
    cycle.append(cycle)
    read = run(pickle.dumps(cycle, protocol))
    assert read[0] is read[1]
    assert read[2] is read


def test_text_of_python_2_is_latin_1():
    assert run(b"(S'a\\xe9\\n'\nU\x02\xe9bT\x01\x00\x00\x00\xff(lp0\nt.") == ("aé\n", "éb", "ÿ", [])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dicts_sets_and_bytes_of_every_protocol(protocol):
    value = [collections.OrderedDict([("b", 1), ("a", 2)]), {1, 2}, frozenset([3]), b"\x00\xff", bytearray(b"x"), b""]
    read = run(pickle.dumps(value, protocol))
    assert read == [{"b": 1, "a": 2}, {1, 2}, frozenset([3]), b"\x00\xff", b"x", b""]
    assert list(read[0]) == ["b", "a"]
    assert type(read[0]) is dict


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_of_unknown_classes_are_recorded(protocol):
    values = [argparse.Namespace(size=256), fractions.Fraction(1, 3), uuid.UUID(int=5), random.Random, len]
    namespace, fraction, identifier, cls, function = run(pickle.dumps(values, protocol))
    assert isinstance(namespace, Opaque)
    assert (namespace.global_name, namespace.args, namespace.state) == ("argparse.Namespace", (), {"size": 256})
    assert fraction.global_name == "fractions.Fraction"
    assert identifier.state["int"] == 5
    assert (type(cls), cls.global_name) == (Global, "random.Random")
    assert function.global_name.endswith(".len")


class Sizes(list):
    pass


class Options(dict):
    pass


class Named:
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (1,), {"width": 2}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_of_unknown_classes_keep_their_items(protocol):
    sizes, options = run(pickle.dumps([Sizes([1, 2]), Options(a=1)], protocol))
    assert sizes.items + [item for arg in sizes.args for item in arg] == [1, 2]
    assert dict(options.items + [pair for arg in options.args for pair in arg.items()]) == {"a": 1}
    known = {(__name__, "Options"): plain_dict}
    assert run(pickle.dumps(Options(a=1), protocol), known) == {"a": 1}


@pytest.mark.parametrize("protocol", [4, 5])
def test_arguments_by_name_are_recorded(protocol):
    read = run(pickle.dumps(Named(), protocol))
    assert (read.global_name, read.args, read.kwargs) == (f"{__name__}.Named", (1,), {"width": 2})


def test_names_lead_to_what_the_caller_says_and_nothing_else():
    known = {("a.b", "double"): lambda number: 2 * number}
    assert run(b"ca.b\ndouble\nK\x04\x85R.", known) == 8
    assert run(b"\x8c\x03a.b\x8c\x06double\x93K\x04\x85R.", known) == 8
    assert run(b"(K\x04ia.b\ndouble\n.", known) == 8
    assert run(b"(ca.b\ndouble\nK\x04o.", known) == 8
    assert run(b"\x8c\x01a\x8c\x08b.double\x93K\x04\x85R.", known).global_name == "a.b.double"  # another name
    assert isinstance(run(b"ca.b\ndouble\nK\x04\x85R.", known), int)
    with pytest.raises(ValueError, match=r"asks for os\.system, which no data needs"):
        run(b"cos\nsystem\n.", known, others=False)


def test_persistent_ids_are_asked_of_the_caller():
    assert run(b"X\x01\x00\x00\x00aQ.", persistent=lambda key: key * 2) == "aa"
    assert run(b"Pname\n.", persistent=lambda key: key * 2) == "namename"
    with pytest.raises(ValueError, match="outside of it"):
        run(b"Pname\n.")


NESTED = b")" + b"\x85" * 20  # a tuple in a tuple ...
DOUBLED = b")" + b"2\x86" * 60  # a tuple of itself twice, sixty times over: endless to hash, show or compare
BIG = b"(" + b"K\x01" * 100_000 + b"l"
LONG = b"X\x00\x00\x10\x00" + b"a" * 2**20


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cut short"),
        (b".", "damaged"),
        (b"\x80\x06N.", "newer protocol"),
        (b"\x80\x04N", "cut short"),
        (b"\xff.", "no instruction"),
        (b"\x82\x01.", "no instruction"),
        (b"\x97.", "no instruction"),
        (b"X\xff\xff\xff\xff.", "cut short"),
        (b"T\xff\xff\xff\x7f.", "cut short"),
        (b"T\xff\xff\xff\xff.", "cut short"),
        (b"B\xff\xff\xff\xff.", "cut short"),
        (b"\x8e" + (2**60).to_bytes(8, "little") + b".", "cut short"),
        (b"\x96" + (2**60).to_bytes(8, "little") + b".", "cut short"),
        (b"\x8d" + b"\xff" * 8 + b".", "cut short"),
        (b"\x95" + b"\xff" * 8 + b".", "cut short"),
        (b"\x8b\xff\xff\xff\x7f.", "number of"),
        (b"\x8a\xff" + b"\x01" * 255 + b".", "number of 255 bytes"),
        (b"\x8b\xff\xff\xff\xff.", "cut short"),
        (b"L" + b"9" * 500 + b"L\n.", "a number that is none"),
        (b"L" + b"9" * 5000 + b"L\n.", "too long"),
        (b"Inan\n.", "a number that is none"),
        (b"Fx\n.", "damaged"),
        (b"S'abc\n.", "without quotes"),
        (b"S'a\\x'\n.", "escape"),
        (b"X\x01\x00\x00\x00\xff.", "damaged"),
        (b"V\\u12\n.", "damaged"),
        (b"N" * 3_000_000, "more steps"),
        (b"(" * 3_000_000, "more steps"),
        (b"]" * 3_000_000, "more steps"),
        (b"j\x00\x00\x00\x00.", "damaged"),
        (b"Np-1\n.", "damaged"),
        (b"Np" + b"9" * 40 + b"\n.", "damaged"),
        (b"}" + NESTED + b"Ns.", "a key is neither text"),
        (b"}" + DOUBLED + b"Ns.", "a key is neither text"),
        (b"}]Ns.", "a key is neither text"),
        (b"}\x8a\x09" + b"\x01" * 9 + b"Ns.", "a key is neither text"),
        (b"\x8f(" + DOUBLED + b"\x90.", "a key is neither text"),
        (b"(" + DOUBLED + b"\x91.", "a key is neither text"),
        (b"cbuiltins\nset\n(" + DOUBLED + b"l\x85R.", "a key is neither text"),
        (b"ccollections\nOrderedDict\n(" + DOUBLED + b"N\x86l\x85R.", "a key is neither text"),
        (b"}(K\x01K\x02\x86Nu.", "a key is neither text"),
        (b"cbuiltins\nset\n](K\x01K\x02\x86e\x85R.", "a key is neither text"),
        (b"cbuiltins\nset\n](" + b"K\x01" * 1001 + b"e\x85R.", "too many keys are numbers"),
        (b"(" + b"K\x01" * 30_000 + b"\x91.", "more steps"),
        (b"N2a.", "damaged"),
        (b"NNb.", "damaged"),
        (b"]Nb.", "damaged"),
        (b"NN\x85R.", "damaged"),
        (b"cos\nsystem\nNR.", "damaged"),
        (b"cos\nsystem\n)NN\x92.", "damaged"),
        (b"cos\nsystem\n)}\x92K\x01)R.", "damaged"),
        (b"cos\nsystem\n)R)R.", "damaged"),
        (b"(K\x01o.", "damaged"),
        (b"(o.", "damaged"),
        (DOUBLED + b"N\x93.", "damaged"),
        (b"(NNNd.", "damaged"),
        (b"\x86.", "damaged"),
        (b"u.", "damaged"),
        (b"ccopyreg\n__newobj__\np0\n(" + b"g0\n" * 1000 + b"tR.", "damaged"),
        (b"ccopyreg\n_reconstructor\nNNN\x87R.", "damaged"),
        (b"ccopyreg\n_reconstructor\n)R.", "damaged"),
        (b"ccollections\nOrderedDict\n(NNNl\x85R.", "badly described"),
        (b"ccollections\nOrderedDict\n(NNN\x87l\x85R.", "badly described"),
        (b"c_codecs\nencode\nX\x03\x00\x00\x00\xe2\x82\xacX\x06\x00\x00\x00latin1\x86R.", "badly described"),
        (b"c_codecs\nencode\nNN\x86R.", "badly described"),
        (BIG + b"p0\n0(" + b"cbuiltins\nlen\ng0\n\x85R" * 100 + b"l.", "more steps"),
        (b"B\x00\x00\x10\x00" + bytes(2**20) + b"p0\n0" + b"cbuiltins\nlen\ng0\n\x85R" * 20 + b".", "again and again"),
        (b"(" + b"K\x01" * 100_000 + b"tp0\n0" + b"cbuiltins\nlen\ng0\nR" * 100 + b".", "more steps"),
        (b"(" + b"K\x01" * 100_000 + b"tp0\n0" + b"cbuiltins\nlen\n)Rg0\nb" * 100 + b".", "more steps"),
        (b"cbuiltins\nlen\np1\n0}p2\nX\x05\x00\x00\x00items" + BIG + b"s0" + b"g1\n)g2\n\x92" * 100, "more steps"),
        (b"cbuiltins\nset\n" + LONG + b"\x85R.", "badly described"),
        (b"ccollections\nOrderedDict\n" + LONG + b"\x85R.", "badly described"),
        (LONG + LONG + b"\x93.", "name is too long"),
        (LONG + b"p0\n0" + b"cbuiltins\nbytes\ng0\n\x85R" * 20 + b".", "again and again"),
        (b"c" + b"a" * 2000 + b"\nb\n.", "too long"),
        (b"PX\n.", "outside of it"),
        (b"NQ.", "outside of it"),
    ],
    ids=lambda value: str(value[:24]) if isinstance(value, bytes) else None,
)
def test_what_is_damaged_or_without_bounds_is_refused_soon(data, said):
    started = time.process_time()
    with pytest.raises(ValueError, match=said) as caught:
        run(data)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_a_huge_index_of_the_memo_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run(b"Nr\xff\xff\xff\x7f0j\xff\xff\xff\x7f.") is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("step", [b"]" * 100_000 + b"a" * 99_999, b")" + b"\x85" * 200_000, b"}" + b"Nq\x000"])
def test_values_nested_without_end_can_be_made_and_freed(step):
    value = run(step + b".")
    del value  # a recursion in C would end the process


def test_an_object_can_be_its_own_state():
    read = run(b"cos\nsystem\n)Rq\x00h\x00b.")
    assert read.state is read
    read = run(b"cos\nsystem\n)Rq\x00h\x00ah\x00K\x01s.")
    assert [read.items[0], *read.items[1]] == [read, read, 1]


def test_names_in_errors_are_cut_and_printable():
    name = "\x1b[2J" + "a" * 500
    with pytest.raises(ValueError, match="asks for") as caught:
        run(text("x") + text(name) + b"\x93.", others=False)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200
    assert run(text("x") + text(name) + b"\x93.").global_name.endswith("...")


def test_a_stand_in_that_fails_is_told_without_its_words():
    def wrong(_):
        raise TypeError("endless")

    with pytest.raises(ValueError, match=r"^it is damaged \(a.b is badly described\)$"):
        run(b"ca\nb\n" + DOUBLED + b"\x85R.", {("a", "b"): wrong})
    with pytest.raises(ValueError, match="as it says"):
        run(b"ca\nb\n)R.", {("a", "b"): lambda: (_ for _ in ()).throw(ValueError("as it says"))})


def test_it_needs_no_torch():
    code = "import sys, gan.data.sources.plain_pickle; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "False", "")


def test_any_string_of_instructions_is_a_value_or_an_error():
    rng = random.Random(0)
    codes = [code for code in pickle_machine._INSTRUCTIONS if code not in b"cPiSVILFTBX\x8b\x8d\x8e\x96\x95\x8c"]
    pieces = [text("a"), b"K\x01", b"cos\nsystem\n", b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n", b"U\x01b"]
    values = 0
    for _ in range(5000):
        data = b"".join(rng.choice(pieces if rng.random() < 0.5 else codes) for _ in range(rng.randrange(1, 20)))
        try:
            run(data + b".", persistent=lambda key: [key])
            values += 1
        except ValueError:
            pass
    assert values > 300
