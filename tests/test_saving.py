"""Any tree is saved, and comes back as it was: containers, dtypes, keys, numbers; or is refused."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import stat
import subprocess
import sys
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec
from saved import FORMAT_2, trees_of_format_2

from adaptive_opt import (
    CheckpointMismatch,
    Packing,
    adam,
    adamod,
    check_checkpoint,
    checkpoint_header,
    from_bytes,
    lookahead,
    low_memory,
    read_checkpoint,
    sgd,
    skip_nonfinite,
    to_bytes,
    write_checkpoint,
)
from adaptive_opt.checkpoints import saving

SGD = sgd(1e-2)
X = np.arange(3, dtype=np.float32)


class Pair(NamedTuple):
    a: Any
    count: Any  # hides tuple.count, as in optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    a: Any
    b: Any


@chex.dataclass
class OfChex:
    a: Any
    b: Any


@flax.struct.dataclass
class OfFlax:
    a: Any
    name: str = flax.struct.field(pytree_node=False)


class Unnamed:
    """A container that does not say what its children are called."""

    def __init__(self, *children):
        self.children = children


jax.tree_util.register_pytree_node(Unnamed, lambda x: (x.children, None), lambda _, c: Unnamed(*c))


class Tied(nnx.Module):
    """One layer in two places."""

    def __init__(self, rngs):
        self.one = nnx.Linear(2, 2, rngs=rngs)
        self.other = self.one
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


class Opaque(nnx.Module, pytree=False):
    """Of which JAX's functions of trees see nothing."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(2, 2, rngs=rngs)


def nnx_optimizer(seed=0):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
    return nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


TREES = {
    "an array": X,
    "dicts": {"a": {"b": X}, "c": {1: X + 1, 10: X + 2, -1: X}, "b": {(0, "x"): X}},
    "lists and tuples": [X, (X + 1, [X + 2]), ()],
    "an OrderedDict": collections.OrderedDict(z=X, a=X + 1),
    "a defaultdict": collections.defaultdict(list, a=X),
    "a NamedTuple": Pair(X, np.int64(3)),
    "a registered dataclass": Registered(X, {"c": 1}),
    "a dataclass of chex": OfChex(a=X, b=2.5),
    "a dataclass of flax": OfFlax(X, "name"),
    "a FrozenDict": flax.core.FrozenDict(a=X),
    "a container without names": Unnamed(X, X + 1),
    "an Equinox module": eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0)),
    "a module with a string": eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch"),
    "a module with a partial": eqx.nn.Lambda(functools.partial(jax.nn.gelu, approximate=False)),
    "an nnx.State": nnx.state(nnx.Linear(2, 1, rngs=nnx.Rngs(0))),
    "a TrainState": TrainState.create(apply_fn=None, params={"a": X}, tx=adam(1e-3)),
    "8-bit blocks": low_memory(adamod(1e-2), "8-bit").init({"a": jnp.ones(5000)}),
    "nothing": {"a": None, "b": (), "c": {}},
    "no elements": [np.zeros((0, 3)), np.zeros((2, 0), np.int8), jnp.zeros((0,), jnp.bfloat16)],
    "0-d arrays": [np.ones((), np.int16), jnp.float32(2), np.bool_(True), np.float64(0.1)],
    "Python's numbers": {"a": 3, "b": True, "c": 0.1, "d": 1j, "e": -(2**63), "f": float("inf")},
    "keys": [jax.random.key(3), jax.random.split(jax.random.key(4), (2, 2))],
    "keys of rbg": jax.random.key(3, impl="rbg"),
    "keys of unsafe_rbg": jax.random.split(jax.random.key(3, impl="unsafe_rbg"), 3),
    "a noise's state": optax.add_noise(0.1, 0.5, jax.random.key(0)).init({"a": X}),
    "a transposed view": np.arange(6.0).reshape(2, 3).T[::-1],
    "another byte order": np.arange(3, dtype=">f4"),
}  # fmt: skip


def numbers(x):
    """A leaf as plain data: its kind, shape, dtype and bits."""
    if isinstance(x, (bool, int, float, complex)) and not isinstance(x, np.generic):
        return type(x), repr(x)
    if not hasattr(x, "dtype"):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(x.dtype), x.shape, np.asarray(jax.random.key_data(x)).tobytes()
    return x.dtype, np.shape(x), np.asarray(x).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert list(map(numbers, jax.tree.leaves(a))) == list(map(numbers, jax.tree.leaves(b)))


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_back_as_it_was(name):
    tree = TREES[name]
    data = to_bytes(SGD, tree)
    found = from_bytes(SGD, tree, data)
    assert_same(found, tree)
    check_checkpoint(checkpoint_header(SGD, tree), SGD, found)
    assert to_bytes(SGD, found) == data


@pytest.mark.parametrize("name", trees_of_format_2())
def test_what_was_saved_in_format_2_is_read(name):
    """This file stays. If this fails, saved runs can no longer be read."""
    tree = trees_of_format_2()[name]
    with np.load(FORMAT_2) as recorded:
        assert_same(from_bytes(SGD, tree, recorded[name].tobytes()), tree)


def test_shapes_are_target_enough():
    for name in ("keys", "keys of rbg", "8-bit blocks", "a noise's state", "an Equinox module"):
        tree = TREES[name]
        target = eqx.filter_eval_shape(lambda tree=tree: tree)
        assert_same(from_bytes(SGD, target, to_bytes(SGD, tree)), tree)


DTYPES = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16",
    "float32", "float64", "complex64", "complex128", "longdouble", "bfloat16", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e8m0fnu", "int4", "uint4",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit_and_fits_no_other(dtype):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    data = to_bytes(SGD, {"a": array})
    assert_same(from_bytes(SGD, {"a": array}, data), {"a": array})
    assert checkpoint_header(SGD, array)["leaves"]["."] == [[2, 3], array.dtype.name]
    other = np.zeros((2, 3), np.int16 if dtype == "int8" else np.int8)
    with pytest.raises(CheckpointMismatch, match=rf"\['a'\] was {array.dtype.name}\[2, 3\]"):
        from_bytes(SGD, {"a": other}, data)


def test_what_comes_back_may_be_written_to_and_is_its_own():
    tree = {"a": np.zeros(3), "b": np.zeros(3)}
    data = to_bytes(SGD, tree)
    found = from_bytes(SGD, tree, data)
    found["a"] += 1
    assert_same(from_bytes(SGD, tree, data), tree)
    assert found["a"].flags.aligned


def test_a_container_of_another_type_with_the_same_paths_fits():
    tree = collections.OrderedDict(z=X, a=X + 1)
    for target in ({"a": X, "z": X}, flax.core.FrozenDict(a=X, z=X)):
        found = from_bytes(SGD, target, to_bytes(SGD, tree))
        assert type(found) is type(target)
        assert_same([found["z"], found["a"]], [X, X + 1])


def test_a_python_number_goes_where_jaxs_array_of_it_is_and_no_further():
    data = to_bytes(SGD, {"step": 7})
    assert_same(from_bytes(SGD, {"step": jnp.int32(0)}, data), {"step": np.array(7, np.int32)})
    data = to_bytes(SGD, {"step": jnp.int32(7)})
    assert_same(from_bytes(SGD, {"step": 0}, data), {"step": np.array(7, np.int32)})
    for number, other in ((1, 1.0), (1, True), (1.0, 1), (1, np.int64(1)), (0.1, np.float64(0.1))):
        with pytest.raises(CheckpointMismatch, match=r"was Python .*, is "):
            from_bytes(SGD, other, to_bytes(SGD, number))
    with pytest.raises(CheckpointMismatch, match=r"fit: \. was 1099511627776, which is no int32"):
        from_bytes(SGD, jnp.int32(0), to_bytes(SGD, 2**40))
    with pytest.raises(TypeError, match=r"the Python int at \['a'\] has more than 64 bits"):
        to_bytes(SGD, {"a": 2**64})


def test_keys_of_another_implementation_and_raw_keys_are_refused():
    saved = {"key": jax.random.key(0)}
    for other, said in ((jax.random.key(0, impl="rbg"), r"key<rbg>\[\]"),
                        (jax.random.PRNGKey(0), r"uint32\[2\]")):  # fmt: skip
        with pytest.raises(CheckpointMismatch, match=rf"\['key'\] was key<fry>\[\], is {said}"):
            from_bytes(SGD, {"key": other}, to_bytes(SGD, saved))
        with pytest.raises(CheckpointMismatch, match=rf"\['key'\] was key<fry>\[\], is {said}"):
            check_checkpoint(checkpoint_header(SGD, saved), SGD, {"key": other})


def test_a_module_with_another_function_or_string_is_refused():
    norms = (
        eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, name, mode="batch") for name in ("batch", "b")
    )
    saved = to_bytes(SGD, next(norms))
    with pytest.raises(CheckpointMismatch, match=r"axis_name was string 'batch', is string 'b'"):
        from_bytes(SGD, next(norms), saved)
    mlp = functools.partial(eqx.nn.MLP, 2, 1, 3, 1, key=jax.random.key(0))
    with pytest.raises(CheckpointMismatch, match=r"\.activation was function relu, is .* gelu"):
        from_bytes(SGD, mlp(activation=jax.nn.gelu), to_bytes(SGD, mlp()))
    exact, quick = (
        eqx.nn.Lambda(functools.partial(jax.nn.gelu, approximate=a)) for a in (False, True)
    )
    with pytest.raises(CheckpointMismatch, match=r"gelu with False, is function gelu with True"):
        from_bytes(SGD, quick, to_bytes(SGD, exact))


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (b"text", "bytes"), (object(), "object"), (np.array([None]), "ndarray of object"),
        (np.array(["a"]), "ndarray of <U1"), (np.zeros(2, "i4,f4"), "ndarray of .*f0"),
        (np.array(["2020-01-01"], "M8[D]"), "ndarray of datetime64"),
        (np.ma.masked_array([1.0], [True]), "MaskedArray of float64"),
        (functools.partial(jax.nn.gelu, np.ones(3)), "partial"),
    ],
)  # fmt: skip
def test_a_leaf_that_is_no_data_is_refused_by_its_path(leaf, kind):
    for use in (to_bytes, checkpoint_header):
        with pytest.raises(TypeError, match=rf"the leaf at \['a'\]\[1\] is {kind}"):
            use(SGD, {"a": [X, leaf]})


def test_shapes_and_traced_arrays_have_a_header_and_no_bytes():
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    assert checkpoint_header(SGD, shape)["leaves"] == {".": [[3], "float32"]}
    with pytest.raises(TypeError, match=r"at \. has a shape and no numbers \(ShapeDtypeStruct\)"):
        to_bytes(SGD, shape)
    with pytest.raises(TypeError, match=r"\['a'\] has a shape and no numbers .*outside of jit"):
        jax.jit(lambda x: to_bytes(SGD, {"a": x}))(X)


def test_two_leaves_of_one_path_are_refused():
    class Key:
        def __init__(self, order):
            self.order = order

        def __lt__(self, other):
            return self.order < other.order

        def __repr__(self):
            return "same"

    with pytest.raises(ValueError, match=r"two leaves have the path \[same\]"):
        to_bytes(SGD, {Key(0): X, Key(1): X})


def test_arrays_split_over_devices_are_gathered():
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.device_put(np.arange(16.0), NamedSharding(mesh, PartitionSpec("data")))
    keys = jax.device_put(jax.random.split(jax.random.key(0), 8), split.sharding)
    tree = {"split": split, "keys": keys}
    whole = {"split": np.asarray(split), "keys": jax.random.split(jax.random.key(0), 8)}
    assert_same(from_bytes(SGD, tree, to_bytes(SGD, tree)), whole)


def test_a_small_tree_of_an_optimizer_with_a_long_config_is_read(monkeypatch):
    monkeypatch.setattr(saving, "SPARE_VALUES", 0)
    steps = {step: 0.999 for step in range(1, 80)}
    optimizer = sgd(optax.piecewise_constant_schedule(1e-2, steps))
    header = checkpoint_header(optimizer, X)
    without = {name: header[name] for name in ("state_format", "optimizer", "leaves")}
    assert saving._cost(json.dumps(header).encode()) > saving._most(without)
    data = to_bytes(optimizer, X)
    assert_same(from_bytes(optimizer, X, data), X)


# --- Flax nnx -------------------------------------------------------------------------------------


def test_an_nnx_optimizer_is_saved_as_it_is_and_goes_on_bit_for_bit():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sgd(1e-2, momentum=0.9), wrt=nnx.Param)

    def train(model, optimizer):
        gradients = nnx.grad(lambda m: jnp.sum(m(jnp.ones((4, 3))) ** 2))(model)
        optimizer.update(model, gradients)

    train(model, optimizer)
    data = to_bytes(optimizer.tx, (model, optimizer))
    other = nnx.Linear(3, 2, rngs=nnx.Rngs(9))
    fresh = nnx.Optimizer(other, sgd(1e-2, momentum=0.9), wrt=nnx.Param)
    before = np.asarray(other.kernel[...])
    found, resumed = from_bytes(fresh.tx, (other, fresh), data)
    assert type(found) is nnx.Linear
    assert type(resumed) is nnx.Optimizer
    assert resumed.tx is fresh.tx
    np.testing.assert_array_equal(other.kernel[...], before)  # the target is left as it is
    train(model, optimizer)
    train(found, resumed)
    assert_same(nnx.state((found, resumed)), nnx.state((model, optimizer)))


def test_an_nnx_object_and_its_state_have_the_same_paths():
    optimizer = nnx_optimizer()
    state = nnx.state(optimizer)
    assert to_bytes(optimizer.tx, optimizer) == to_bytes(optimizer.tx, state)
    abstract = nnx.eval_shape(nnx_optimizer)
    found = from_bytes(optimizer.tx, abstract, to_bytes(optimizer.tx, state))
    assert_same(nnx.state(found), state)


@pytest.mark.parametrize("kind", [Tied, Opaque])
def test_a_variable_in_two_places_is_one_leaf_and_one_variable_again(kind):
    model = kind(nnx.Rngs(0))
    tree = {"model": model, "step": 3}
    leaves = checkpoint_header(SGD, tree)["leaves"]
    assert sum(path.endswith("['kernel'].value") for path in leaves) == 1
    fresh = {"model": kind(nnx.Rngs(1)), "step": 0}
    found = from_bytes(SGD, fresh, to_bytes(SGD, tree))
    assert found["step"] == 3
    assert_same(nnx.state(found["model"]), nnx.state(model))
    assert isinstance(jax.tree.leaves(nnx.state(found["model"]))[0], jax.Array)
    if kind is Tied:
        assert found["model"].one is found["model"].other
        assert leaves["['model']['dropout']['rngs']['key'].value"] == [[], "key<fry>"]


# --- Keys in states -------------------------------------------------------------------------------


def test_wrappers_take_an_optimizer_with_a_key_in_its_state():
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), adam(1e-3))
    params = {"a": X, "b": jnp.ones(300)}
    for optimizer in (skip_nonfinite(noisy), lookahead(noisy), low_memory(noisy, min_size=1)):
        state = optimizer.init(params)
        assert_same(from_bytes(optimizer, state, to_bytes(optimizer, state)), state)
    jax.eval_shape(optimizer.update, params, state, params)


def test_packing_leaves_keys_alone():
    tree = {"a": X, "b": X + 1, "c": X + 2, "key": jax.random.key(0), "other": jax.random.key(1)}
    packed = Packing(tree).pack(tree)
    assert sorted(packed) == ["a", "key", "other"]  # b and c share the buffer of a
    assert_same(Packing(tree).unpack(packed), jax.tree.map(jnp.asarray, tree))


def test_a_key_among_the_parameters_is_refused_by_its_path():
    params = {"w": X, "key": jax.random.key(0)}
    with pytest.raises(TypeError, match=r"\['key'\]: a leaf of dtype key<fry> cannot be optimized"):
        adam(1e-3).init(params)
    with pytest.raises(TypeError, match="learning_rate must be a number"):
        adam(jax.random.key(0))


# --- Files ----------------------------------------------------------------------------------------


def test_a_file_is_written_and_read(tmp_path):
    optimizer = adam(1e-3)
    training = {"params": X, "state": optimizer.init(X)}
    for path in (tmp_path / "run", str(tmp_path / "other")):
        write_checkpoint(path, optimizer, training)
        assert_same(read_checkpoint(path, optimizer, training), training)
    slower = adam(1e-4)
    with pytest.raises(CheckpointMismatch, match=r"run: the checkpoint does not fit: learn"):
        read_checkpoint(tmp_path / "run", slower, training)
    read_checkpoint(tmp_path / "run", slower, training, allow={"learning_rate"})
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none", optimizer, training)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "run"]


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_beside(tmp_path, monkeypatch):
    path = tmp_path / "run"
    write_checkpoint(path, SGD, X)
    with pytest.raises(TypeError, match="bytes"):
        write_checkpoint(path, SGD, {"a": b"text"})

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(path, SGD, X + 1)
    assert_same(read_checkpoint(path, SGD, X), X)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_a_file_keeps_its_permissions_and_a_link_stays_one(tmp_path):
    path, link = tmp_path / "run", tmp_path / "link"
    write_checkpoint(path, SGD, X)
    created = tmp_path / "created"
    created.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(created.stat().st_mode)
    path.chmod(0o640)
    link.symlink_to(path)
    write_checkpoint(link, SGD, X + 1)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert_same(read_checkpoint(path, SGD, X), X + 1)


def test_saving_needs_no_flax():
    program = """
import sys
for name in ("flax", "msgpack", "orbax", "equinox"):
    sys.modules[name] = None
import jax.numpy as jnp, numpy as np
from adaptive_opt import from_bytes, sgd, to_bytes
from saved import FORMAT_1, SAVED_BY_FORMAT_1, small_tree
tree = {"a": jnp.ones(2)}
print(from_bytes(sgd(1e-2), tree, to_bytes(sgd(1e-2), tree)))
optimizer = SAVED_BY_FORMAT_1["sgd"]
with np.load(FORMAT_1) as recorded:
    data = recorded["sgd/saved"].tobytes()
print(len(from_bytes(optimizer, (small_tree(), optimizer.init(small_tree())), data)))
"""
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["{'a':", "array([1.,", "1.],", "dtype=float32)}", "2"]
