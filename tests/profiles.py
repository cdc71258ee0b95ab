"""Small colour profiles (ICC version 2), as cameras, scanners and printers describe their colours with."""

import struct


def _number(value):
    return struct.pack(">i", round(value * 65536))


def _xyz(*values):
    return b"XYZ \0\0\0\0" + b"".join(map(_number, values))


def _gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def _profile(kind, space, connection, tags):
    offset, table, data = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content
    header = struct.pack(">I4sI4s4s4s", offset + len(data), b"\0" * 4, 0x02100000, kind, space, connection)
    header += struct.pack(">6H4s", 2000, 1, 1, 0, 0, 0, b"acsp").ljust(44, b"\0") + _number(0.9642) + _number(1)
    header += _number(0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def rgb(gamma, swapped=False):
    """The primaries of sRGB (red and green swapped, if asked) with a gamma."""
    red, green, blue = _xyz(0.4361, 0.2225, 0.0139), _xyz(0.3851, 0.7169, 0.0971), _xyz(0.1431, 0.0606, 0.7139)
    if swapped:
        red, green = green, red
    tags = {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, b"wtpt": _xyz(0.9642, 1, 0.8249)}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags | {name: _gamma(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")})


def grey(gamma):
    tags = {b"wtpt": _xyz(0.9642, 1, 0.8249), b"kTRC": _gamma(gamma)}
    return _profile(b"mntr", b"GRAY", b"XYZ ", tags)


def cmyk():
    """Inks of which only black shows: L = 100 - K, no colour."""
    identity = bytes(range(256))
    corners = [(255 if k == 0 else 0, 128, 128) for _ in range(8) for k in (0, 1)]
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + b"".join(_number(i == j) for i in range(3) for j in range(3))
    table += identity * 4 + b"".join(map(bytes, corners)) + identity * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(0.9642, 1, 0.8249), b"A2B0": table})
