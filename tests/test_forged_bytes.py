"""Bytes that nobody saved: cut, changed, or made by somebody who knows the format.

Without the right checksum every change is refused. With it, a change of a number is another
checkpoint; whatever else is changed is refused, or what comes back is of the target's paths, shapes
and dtypes to the last.
"""

from __future__ import annotations

import collections
import hashlib
import json
import pickle
import random
import tracemalloc
import zlib

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved import FORMAT_1, SAVED_BY_FORMAT_1, small_tree

from adaptive_opt import (
    CheckpointMismatch,
    adam,
    checkpoint_header,
    from_bytes,
    one_cycle,
    sgd,
    to_bytes,
)

DIGEST = 32
SPARE = 300_000
"""Bytes that reading may take beside twice those of the file: the target's header, and messages."""


def first_tree():
    return {
        "kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3),
        "half": np.ones(4, jnp.bfloat16),
        "key": jax.random.key(7),
        "step": 3,
        "on": np.array([True, False]),
        "nothing": np.zeros((0, 5), np.int32),
        "rate": np.float32(0.5),
    }


def second_tree():
    return collections.OrderedDict(z=np.arange(5, dtype=np.int8), a=[1.5, np.ones((), np.int64)])


CASES = [(sgd(1e-2), first_tree()), (adam(1e-2), second_tree())]
SAVED = [(optimizer, tree, to_bytes(optimizer, tree)) for optimizer, tree in CASES]


def saved_by_format_1():
    with np.load(FORMAT_1) as recorded:
        for name in ("sgd", "lookahead" if "lookahead" in SAVED_BY_FORMAT_1 else "ranger"):
            optimizer = SAVED_BY_FORMAT_1[name]
            target = small_tree(), optimizer.init(small_tree())
            yield optimizer, target, recorded[f"{name}/saved"].tobytes()


SAVED_1 = list(saved_by_format_1())


DIGITS = "a number of 5,000 digits"
"""Which JSON holds, and Python neither reads nor prints."""


def signed(content: bytes) -> bytes:
    """With the checksum that belongs to it."""
    return content + hashlib.sha256(content).digest()


def signed_1(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(4, "little")


def in_parts(data: bytes) -> tuple[dict, bytes]:
    """The header and the leaves of a file of format 2."""
    length = int.from_bytes(data[8:16], "little")
    return json.loads(data[16 : 16 + length]), data[16 + length : -DIGEST]


def together(data: bytes, header: str | bytes, leaves: bytes) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    text = text.replace(json.dumps(DIGITS).encode(), b"1" * 5000)
    return signed(data[:8] + len(text).to_bytes(8, "little") + text + leaves)


# --- damage -------------------------------------------------------------------------------------


def flipped(pick, data):
    changed = bytearray(data)
    for _ in range(pick.choice((1, 1, 2, 10))):
        changed[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
    return bytes(changed)


def cut(pick, data):
    return data[: pick.randrange(len(data))]


def extended(pick, data):
    more = pick.randbytes(pick.randint(1, 40))
    return pick.choice((data + more, more + data, data + data))


def with_a_hole(pick, data):
    a, b = sorted(pick.randrange(len(data) + 1) for _ in range(2))
    return data[:a] + data[b:] if pick.random() < 0.5 else data[:a] + bytes(b - a) + data[b:]


def swapped(pick, data):
    a, b, c = sorted(pick.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def overwritten(pick, data):
    a = pick.randrange(len(data))
    new = pick.choice((b"\xff" * 8, bytes(8), pick.randbytes(4), b"[" * 9, b'"', b"\xc1", b"\xdd"))
    return data[:a] + new + data[a + len(new) :]


DAMAGES = (flipped, cut, extended, with_a_hole, swapped, overwritten)

HOSTILE = (
    None, True, False, -1, 0, 1.5, 2**63, 10**400, 10**12, "", "x" * 1000, [], {}, [[]], "object",
    "Python int", "key<fry>", "float64", "<f4", "V8", [10**12, 10**12], [-3], [2.0, 3], [True, 3],
    {"schedule": "s", "values": []}, {"schedule": "s", "values": [10**400] * 12},
    DIGITS,
)  # fmt: skip


def nodes(data, found):
    """Every dict and list of a header, so that what is in it can be changed in place."""
    if isinstance(data, (dict, list)):
        found.append(data)
        for value in data.values() if isinstance(data, dict) else data:
            nodes(value, found)
    return found


def edited(pick, header):
    """One place of a header is another, or two are exchanged, or one is left out."""
    header = json.loads(json.dumps(header))
    node = pick.choice([node for node in nodes(header, []) if node])
    keys = list(node) if isinstance(node, dict) else range(len(node))
    one, other = pick.choice(keys), pick.choice(keys)
    way = pick.randrange(4)
    if way == 0:
        node[one], node[other] = node[other], node[one]
    elif way == 1:
        del node[one]
    elif way == 2 and isinstance(node, dict):
        node[pick.choice(("x", "name", "['kernel']", one + "x"))] = node.pop(one)
    else:
        node[one] = pick.choice(HOSTILE)
    return header


def with_a_header(pick, data):
    header, leaves = in_parts(data)
    text = json.dumps(edited(pick, header))
    way = pick.randrange(8)
    if way == 0:  # numbers that JSON has not
        text = text.replace("0.", pick.choice(("NaN0.", "Infinity, 0.", "1e999, 0.", "-0.")), 1)
    elif way == 1:  # a name twice
        text = '{"leaves": {}, ' + json.dumps(header)[1:]
    elif way == 2:
        depth = pick.choice((50, 150, 1000, 100_000))
        header["optimizer"]["settings"]["deep"] = 0
        text = json.dumps(header).replace('"deep": 0', '"deep": ' + "[" * depth + "]" * depth)
    elif way == 3:
        header["leaves"] = dict(pick.sample(list(header["leaves"].items()), len(header["leaves"])))
        text = json.dumps(header)
    return together(data, text, pick.choice((leaves, leaves, leaves + bytes(4), leaves[:-1])))


def with_a_length(pick, data):
    length = pick.choice((0, 1, 2**63, 2**64 - 1, len(data), len(data) - 48, pick.getrandbits(64)))
    return signed(data[:8] + length.to_bytes(8, "little") + data[16:-DIGEST])


def forged(pick, data):
    way = pick.randrange(6)
    if way < 2:
        return with_a_header(pick, data)
    if way == 2:
        return with_a_length(pick, data)
    return signed(pick.choice(DAMAGES)(pick, data[:-DIGEST]))


def forged_1(pick, data):
    if pick.random() < 0.5:
        return signed_1(pick.choice(DAMAGES)(pick, data[:-4]))
    content = flax.serialization.msgpack_restore(data[:-4])
    if pick.random() < 0.5:
        content["header"] = edited(pick, content["header"])
    else:
        node = pick.choice([node for node in nodes(content["tree"], []) if node])
        key = pick.choice(list(node))
        node[key] = pick.choice((
            np.zeros(3), np.zeros((3, 2), np.int64), np.zeros((2, 3), np.float32), 3, 1.5, None,
            {}, "x", [1], node[key], {"__msgpack_chunked_array__": True, "shape": {}, "chunks": {}},
        ))  # fmt: skip
    try:
        return signed_1(flax.serialization.msgpack_serialize(content))
    except (OverflowError, ValueError):  # msgpack has no 10**400
        return signed_1(data[:-4] + b"\xc0")


# --- what is to be true ---------------------------------------------------------------------------


def forms(tree):
    """Structure, paths, shapes, dtypes and kinds of what is in it."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return structure, [(path, np.shape(x), str(getattr(x, "dtype", type(x)))) for path, x in leaves]


def same(a, b):
    def data(x):
        is_key = jnp.issubdtype(getattr(x, "dtype", np.int32), jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x).tobytes()

    return list(map(data, jax.tree.leaves(a))) == list(map(data, jax.tree.leaves(b)))


def read(case, data):
    """What comes back, or None if it was refused; and the memory that took."""
    optimizer, target, _ = case
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        found = from_bytes(optimizer, target, data)
    except CheckpointMismatch:
        found = None
    return found, tracemalloc.get_traced_memory()[1] - before


@pytest.fixture
def watched(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("number", [4_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_every_damaged_file_is_refused(number, watched):
    pick = random.Random(number)
    cases = SAVED + SAVED_1
    for i in range(number):
        case = cases[i % len(cases)]
        data = pick.choice(DAMAGES)(pick, case[2])
        found, memory = read(case, data)
        assert memory <= 2 * len(data) + SPARE
        assert found is None or data == case[2]


@pytest.mark.parametrize("number", [200, pytest.param(12_000, marks=pytest.mark.slow)])
def test_a_file_with_a_forged_checksum_is_refused_or_has_the_forms_of_the_target(number, watched):
    pick = random.Random(number)
    read_back = collections.Counter()
    for i in range(number):
        case = (SAVED + SAVED_1)[i % 4]
        data = (forged if i % 4 < 2 else forged_1)(pick, case[2])
        found, memory = read(case, data)
        assert memory <= 2 * len(data) + SPARE
        assert found is None or forms(found) == forms(case[1])
        read_back[i % 4, found is not None] += 1
    assert len(read_back) == 8, read_back  # of each file some were read, and some refused


def test_the_intact_files_are_read():
    for optimizer, tree, data in SAVED + SAVED_1:
        found = from_bytes(optimizer, tree, data)
        assert forms(found) == forms(tree)
    for optimizer, tree, data in SAVED:
        assert same(from_bytes(optimizer, tree, data), tree)


def test_format_1_holds_arrays_in_parts_and_all_that_flax_wrote(monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 16)
    optimizer = sgd(1e-2)
    tree = {
        "large": np.arange(12.0, dtype=np.float32).reshape(4, 3),
        "list": [jnp.ones((2, 2), jnp.bfloat16), np.float32(3), np.zeros((0, 2), np.int32)],
        "double": np.array([0.1]),
        "numbers": (3, True, 0.1, 1 - 2j, -(2**40), 300, -100),
        "none": None,
    }
    header = checkpoint_header(optimizer, tree) | {"state_format": 1}
    for path, (shape, name) in header["leaves"].items():  # as format 1 said it
        jax_takes = {"Python int": "int32", "Python bool": "bool", "Python float": "float32",
                     "Python complex": "complex64", "float64": "float32"}  # fmt: skip
        header["leaves"][path] = [shape, jax_takes.get(name, name)]
    content = {"header": header, "tree": flax.serialization.to_state_dict(jax.device_get(tree))}
    data = signed_1(flax.serialization.msgpack_serialize(content))
    assert b"__msgpack_chunked_array__" in data
    found = from_bytes(optimizer, tree, data)
    assert forms(found) == forms(tree)
    assert same(found, tree)
    wrong = data[:-4].replace(b"chunks", b"chunkz")
    with pytest.raises(CheckpointMismatch, match="an array in parts misses some"):
        from_bytes(optimizer, tree, signed_1(wrong))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (b"\x93\x92\x03\x05\xa7float32", "more or fewer numbers than its shape"),
        (b"\x93\x92\x02\x03\xa7float32", r"is float32\[2, 3\] in the bytes, not as their header"),
        (b"\x93\x92\xff\xfa\xa7float32", "an array has no shape"),
        (b"\x93\x92\x03\x02\xa7float99", "an array of no dtype"),
        (b"\x93\x92\x03\x02\xa7>f4,>f4", "an array that is not of numbers"),
        (b"\x93\x92\x03\x02\xa7float64", "more or fewer numbers than its shape"),
        (b"\x93\x92\x03\x02\xa7uint32 ", "no dtype|in the bytes, not as their header"),
        (b"\x93\x92\x03\x02\xc1float32", "a byte that means nothing"),
        (b"\x93\x92\x03\x02\xbffloat32", "is no array|decode"),
    ],
)
def test_what_is_wrong_with_a_forged_array_of_format_1_is_said(new, message):
    optimizer, target, data = SAVED_1[0]
    old = b"\x93\x92\x03\x02\xa7float32"
    assert old in data
    with pytest.raises(CheckpointMismatch, match=message):
        from_bytes(optimizer, target, signed_1(data[:-4].replace(old, new, 1)))


# --- one by one -----------------------------------------------------------------------------------


def refused(data, message):
    optimizer, tree, _ = SAVED[0]
    with pytest.raises(CheckpointMismatch, match=message):
        from_bytes(optimizer, tree, data)


def test_what_is_wrong_with_a_forged_header_is_said():
    data = SAVED[0][2]
    header, leaves = in_parts(data)

    def with_entry(entry, path="['kernel']"):
        return json.dumps(header | {"leaves": header["leaves"] | {path: entry}})

    def replaced(old, new):
        text = json.dumps(header)
        assert old in text
        return text.replace(old, new)

    for text, message in [
        (with_entry([[True, 3], "float32"]), "not a shape and a dtype"),
        (with_entry([[-2, -3], "float32"]), "not a shape and a dtype"),
        (with_entry([[2.0, 3], "float32"]), "not a shape and a dtype"),
        (with_entry([[10**15], "float32"]),
         r"\['kernel'\] was float32\[1000000000000000\], is float32\[2, 3\]"),
        (with_entry([[2, 3], "object"]), r"was object\[2, 3\]"),
        (with_entry([[], "float32"], "['step']"), r"was float32\[\], is Python int"),
        (with_entry([[], "key<rbg>"], "['key']"), r"was key<rbg>\[\], is key<fry>\[\]"),
        (replaced('"learning_rate": 0.01', '"learning_rate": NaN'), "NaN for a number"),
        (replaced('"learning_rate": 0.01', '"learning_rate": 1e999'), "of plain data"),
        (replaced('"learning_rate": 0.01', f'"learning_rate": {10**400}'), "number of 401 digits"),
        (replaced('"learning_rate": 0.01', f'"learning_rate": {3 * 10**19}'), "of plain data"),
        (replaced('"state_format": 2', f'"state_format": "{DIGITS}"'), "number of 5000 digits"),
        (replaced('"learning_rate": 0.01', '"learning_rate": 0.01, "learning_rate": 0.01'),
         "a name twice"),
        (replaced('"state_format": 2', '"state_format": true'), "no whole number"),
        (replaced('"state_format": 2', '"state_format": 3'), "this version .* reads 1 and 2"),
        ("[" * 2_000, "nested without end|Expecting value"),  # as deep as Python goes
        ("[" * 100_000, "has 100000 bytes, far more than is called for"),
        (replaced('"learning_rate": 0.01', f'"x": {"[" * 300}{"]" * 300}'), "of plain data"),
        ("[]", "it is a list and no dict"), ("{}", "it has no leaves, optimizer, state_format"),
        ("", "Expecting value"), (b"\xff", "can't decode"), (json.dumps(header) + "}", "Extra"),
    ]:  # fmt: skip
        refused(together(data, text, leaves), message)


@pytest.mark.parametrize("values", [[], [0.1] * 11, [10**400] * 12, ["x"] * 12, [[]] * 12, 3, None])
def test_a_schedule_with_other_values_than_numbers_is_another_setting(values):
    optimizer, x = adam(one_cycle(0.1, 10).learning_rate), jnp.zeros(2)
    data = to_bytes(optimizer, x)
    header, leaves = in_parts(data)
    header["optimizer"]["settings"]["learning_rate"]["values"] = values
    with pytest.raises(CheckpointMismatch, match=r"learning_rate of adam was|401 digits"):
        from_bytes(optimizer, x, together(data, json.dumps(header), leaves))


def test_leaves_of_another_length_are_refused():
    data = SAVED[0][2]
    header, leaves = in_parts(data)
    text = json.dumps(header)
    for other in (leaves[:-1], leaves + b"\0", b"", leaves * 2):
        refused(together(data, text, other), f"they hold {len(other)} bytes of leaves, not 54")
    refused(signed(data[:8] + (10**9).to_bytes(8, "little") + data[16:-DIGEST]), "end inside")


def test_bytes_that_are_no_bools_are_refused():
    optimizer, x = sgd(1e-2), np.array([True, False])
    data = to_bytes(optimizer, x)
    with pytest.raises(CheckpointMismatch, match=r"the bytes of \. are no bools"):
        from_bytes(optimizer, x, signed(data[: -DIGEST - 1] + b"\2"))


def test_leaves_in_another_order_are_read_by_their_paths():
    """The order of an OrderedDict is its own, so it says nothing; what is where its path says."""
    optimizer = sgd(1e-2)
    one = collections.OrderedDict(b=np.arange(3), a=np.arange(4) + 7)
    found = from_bytes(optimizer, dict(one), to_bytes(optimizer, one))
    assert type(found) is dict
    assert same(found, dict(one))


HOSTILE_HEADERS = {
    "lists": lambda size: b"[" + b"[]," * (size // 3) + b"[]]",
    "numbers": lambda size: b"[" + b"1.5," * (size // 4) + b"1]",
    "nested": lambda size: b"[" * size,
    "dicts": lambda size: b"[" + b"{}," * (size // 3) + b"{}]",
    "a string": lambda size: b'"' + b"x" * size + b'"',
    "wide characters": lambda size: ('"\U0001f600' + "x" * size + '"').encode(),
    "names": lambda size: b"{" + b",".join(b'"%d":0' % i for i in range(size // 10)) + b"}",
}


@pytest.mark.parametrize("kind", HOSTILE_HEADERS)
@pytest.mark.parametrize("size", [10_000, 3_000_000])
def test_a_hostile_header_takes_no_more_memory_than_twice_the_file(kind, size, watched):
    case = SAVED[0]
    header, leaves = in_parts(case[2])
    hostile = HOSTILE_HEADERS[kind](size)
    settings = json.dumps(header).replace('"learning_rate": 0.01', '"learning_rate": HERE').encode()
    for text in (hostile, settings.replace(b"HERE", hostile)):
        data = together(case[2], text, leaves)
        found, memory = read(case, data)
        assert found is None
        assert memory <= 2 * len(data) + SPARE


def test_a_large_file_is_read_in_its_own_size_once_more(watched):
    optimizer, tree = sgd(1e-2), {"w": np.ones(2**21, np.float32), "k": np.ones(2**20, np.int8)}
    data = to_bytes(optimizer, tree)
    found, memory = read((optimizer, tree, data), data)
    assert same(found, tree)
    assert memory <= len(data) + SPARE


@pytest.mark.parametrize(
    "content",
    [
        b"\xdd" + (2**32 - 1).to_bytes(4, "big") + b"\xc0" * 3_000_000,  # a list of nothing
        (b"\xdd" + (10**6).to_bytes(4, "big")) * 300_000,  # long lists inside one another
        b"\xc6" + (2**32 - 1).to_bytes(4, "big"),
        b"\x81\xa1a" * 100_000,
        b"\xc7\x02\x01\x90\x90" * 1000,
        b"".join(b"\xc8" + n.to_bytes(2, "big") + b"\x01" for n in range(60_000, 0, -4)),
    ],
    ids=["nothings", "nested lists", "bytes", "nested dicts", "extensions", "nested extensions"],
)
def test_hostile_msgpack_takes_no_more_memory_than_twice_the_file(content, watched):
    data = signed_1(content)
    found, memory = read(SAVED_1[0], data)
    assert found is None
    assert memory <= 2 * len(data) + SPARE
