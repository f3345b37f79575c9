"""What takes parameters takes them from every home: nnx, linen, Equinox, plain dicts.

A matrix, container by feature: a model of two layers, and two steps that are compared with the same
two written as the container's own users write them. A new container is a class in ``HOMES``; a new
feature is a test over ``EACH``.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import flax.core
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from adaptive_opt import (
    CheckpointMismatch,
    Group,
    Packing,
    ParameterGroups,
    adam,
    adamod,
    adamw,
    check_checkpoint,
    checkpoint_header,
    convert_state,
    decay_mask,
    decay_report,
    from_bytes,
    gradual_unfreezing,
    layerwise_learning_rates,
    low_memory,
    rate_histograms,
    read_telemetry,
    sweep,
    telemetry,
    to_bytes,
    train_step,
)
from adaptive_opt.memory.codecs import Blocks
from adaptive_opt.watching.plots import Recorder

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.sin(X).sum(axis=1, keepdims=True)
BATCH = {"x": X, "y": Y}


class Nnx:
    """Flax nnx: a module with batch statistics and dropout, and ``nnx.Optimizer``."""

    names = frozenset(
        {"body/bias", "body/kernel", "norm/bias", "norm/scale", "head/bias", "head/kernel"}
    )

    class Model(nnx.Module):
        def __init__(self, key):
            rngs = nnx.Rngs(key)
            self.body = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.25, rngs=rngs)
            self.head = nnx.Linear(4, 1, rngs=rngs)

    @classmethod
    def make(cls, key):
        return cls.Model(key)

    @staticmethod
    def loss(model, batch):
        hidden = model.dropout(model.norm(jnp.tanh(model.body(batch["x"]))))
        return jnp.mean((model.head(hidden) - batch["y"]) ** 2)

    @staticmethod
    def params(model):
        return nnx.state(model, nnx.Param)

    @staticmethod
    def all_arrays(model):
        """What the steps may change: parameters, and what the model carries along."""
        arrays = jax.tree.leaves(nnx.state(model))
        return [
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in arrays
        ]

    @staticmethod
    def rebuilt(model, params):
        graph, _, rest = nnx.split(model, nnx.Param, ...)
        return nnx.merge(graph, params, nnx.as_pure(rest))

    @classmethod
    def trained(cls, model, tx, steps=2):
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(cls.loss)(model, BATCH))

        for _ in range(steps):
            step(model, optimizer)
        return model, optimizer.opt_state

    @staticmethod
    def as_held(model, tx):
        """What ``train_step``'s step takes before the batch."""
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


class Linen:
    """Flax linen: a FrozenDict in a TrainState."""

    names = frozenset({f"params/{name}" for name in Nnx.names})

    class Network(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            hidden = flax.linen.LayerNorm(name="norm")(flax.linen.Dense(4, name="body")(x))
            return flax.linen.Dense(1, name="head")(jnp.tanh(hidden))

    @classmethod
    def make(cls, key):
        return flax.core.freeze(cls.Network().init(key, X))

    @classmethod
    def loss(cls, params, batch):
        return jnp.mean((cls.Network().apply(params, batch["x"]) - batch["y"]) ** 2)

    @staticmethod
    def params(model):
        return model

    all_arrays = staticmethod(jax.tree.leaves)

    @staticmethod
    def rebuilt(model, params):
        return params

    @classmethod
    def trained(cls, model, tx, steps=2):
        (state,) = cls.as_held(model, tx)
        gradient = jax.grad(cls.loss)
        step = jax.jit(lambda s: s.apply_gradients(grads=gradient(s.params, BATCH)))
        for _ in range(steps):
            state = step(state)
        return state.params, state.opt_state

    @classmethod
    def as_held(cls, model, tx):
        return (TrainState.create(apply_fn=cls.Network().apply, params=model, tx=tx),)


class Equinox:
    """Equinox: a function and a static field in the module, and an attribute called value."""

    names = frozenset(
        {"body/weight", "body/bias", "norm/weight", "norm/bias", "value", "scaled/value"}
    )

    class Scaled(eqx.Module):
        value: jax.Array

    class Model(eqx.Module):
        body: eqx.nn.Linear
        norm: eqx.nn.LayerNorm
        scaled: Equinox.Scaled
        value: jax.Array
        width: int = eqx.field(static=True)
        activation: object
        seen: jax.Array

        def __init__(self, key):
            self.width = 4
            self.body = eqx.nn.Linear(3, self.width, key=key)
            self.norm = eqx.nn.LayerNorm(self.width)
            self.scaled = Equinox.Scaled(jnp.ones(self.width))
            self.value = jax.random.normal(key, (self.width, 1))
            self.activation = jnp.tanh
            self.seen = jnp.arange(3)

        def __call__(self, x):
            hidden = self.activation(self.norm(self.body(x)))
            return (self.scaled.value * hidden) @ self.value

    @classmethod
    def make(cls, key):
        return cls.Model(key)

    @staticmethod
    def loss(model, batch):
        return jnp.mean((jax.vmap(model)(batch["x"]) - batch["y"]) ** 2)

    @staticmethod
    def params(model):
        return eqx.filter(model, eqx.is_inexact_array)

    @staticmethod
    def all_arrays(model):
        return jax.tree.leaves(eqx.filter(model, eqx.is_array))

    @staticmethod
    def rebuilt(model, params):
        return eqx.combine(params, model)

    @classmethod
    def trained(cls, model, tx, steps=2):
        model, state = cls.as_held(model, tx)

        @eqx.filter_jit
        def step(model, state):
            gradients = eqx.filter_grad(cls.loss)(model, BATCH)
            updates, state = tx.update(gradients, state, cls.params(model))
            return eqx.apply_updates(model, updates), state

        for _ in range(steps):
            model, state = step(model, state)
        return model, state

    @classmethod
    def as_held(cls, model, tx):
        return model, tx.init(cls.params(model))


class Haiku:
    """A dict of dicts with slashes in its keys, as dm-haiku makes it."""

    names = frozenset(["mlp/~/body/w", "mlp/~/body/b", "mlp/~/head/w", "mlp/~/head/b"])

    @staticmethod
    def make(key):
        keys = jax.random.split(key)
        sizes = {"body": (3, 4), "head": (4, 1)}
        return {
            f"mlp/~/{name}": {"w": jax.random.normal(k, size), "b": jnp.zeros(size[1])}
            for k, (name, size) in zip(keys, sizes.items(), strict=True)
        }

    @staticmethod
    def loss(params, batch):
        hidden = batch["x"]
        for name in ("body", "head"):
            layer = params[f"mlp/~/{name}"]
            hidden = hidden @ layer["w"] + layer["b"]
            hidden = jnp.tanh(hidden) if name == "body" else hidden
        return jnp.mean((hidden - batch["y"]) ** 2)

    params, rebuilt, all_arrays = Linen.params, Linen.rebuilt, Linen.all_arrays

    @classmethod
    def trained(cls, model, tx, steps=2):
        state = tx.init(model)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(cls.loss)(params, BATCH), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(steps):
            model, state = step(model, state)
        return model, state

    @staticmethod
    def as_held(model, tx):
        return model, tx.init(model)


HOMES = {home.__name__: home for home in (Nnx, Linen, Equinox, Haiku)}
EACH = pytest.mark.parametrize("home", HOMES.values(), ids=HOMES)
KEY = 0


def made(home):
    return home.make(jax.random.key(KEY))


def by_name(home, model):
    """A copy of every parameter, by its name in the patterns."""
    report = ParameterGroups([], default=Group()).report(model)
    leaves = jax.tree.leaves(home.params(model))
    return {line.path: np.array(x) for line, x in zip(report, leaves, strict=True)}


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@EACH
def test_groups_take_the_model_and_the_optimizer_its_parameters(home):
    model = made(home)
    before = by_name(home, model)
    assert set(before) == home.names
    groups = ParameterGroups([Group("body", freeze=True), Group(".")])
    labels = jax.tree.leaves(groups.labels(model))
    assert labels == ["body" if "body" in name else "." for name in before]
    model, _ = home.trained(model, groups.optimizer(adamw, 1e-2, weight_decay=0.1))
    for name, value in by_name(home, model).items():
        assert np.any(value != before[name]) == ("body" not in name), name


@EACH
def test_layers_are_found_and_thawed(home):
    model = made(home)
    first, second = ("body", "head") if home is not Equinox else ("body", "value")
    layers = [rf"mlp/~/{name}" if home is Haiku else name for name in (first, second)]
    for groups in (layerwise_learning_rates(layers, 0.5), gradual_unfreezing(layers, 1, decay=0.5)):
        report = ParameterGroups(groups, default=Group(freeze=True)).report(model)
        rates = {line.path: line.settings.split(",")[0] for line in report}
        for name, settings in rates.items():
            found = first in name.split("/"), second in name.split("/")
            assert settings == {(1, 0): "learning_rate x 0.5", (0, 1): "as given"}.get(
                found, "frozen"
            ), name


@EACH
def test_the_mask_of_decay_is_that_of_the_trained_parameters(home):
    model = made(home)
    decayed = {line.path for line in decay_report(model) if line.decayed}
    expected = {n for n in home.names if n.split("/")[-1] in ("kernel", "weight", "w", "value")}
    assert decayed == expected - {"norm/weight", "scaled/value"}
    mask = decay_mask(model)
    assert jax.tree.structure(mask) == jax.tree.structure(home.params(model))
    plain, _ = home.trained(made(home), adamw(1e-2, weight_decay=0.0))
    plain = by_name(home, plain)
    masked, _ = home.trained(model, adamw(1e-2, weight_decay=0.5, mask=decay_mask))
    for name, value in by_name(home, masked).items():
        assert np.allclose(value, plain[name], rtol=1e-3, atol=1e-4) == (name not in decayed), name


@EACH
def test_a_step_made_by_train_step_is_that_of_the_container(home):
    tx = adamw(1e-2, weight_decay=0.1)
    expected, state = home.trained(made(home), tx)
    held = home.as_held(made(home), tx)
    step = train_step(home.loss, tx)
    for _ in range(2):
        *held, loss = step(*held, BATCH)
    assert loss.shape == ()
    assert step._cache_size() == 1
    model, own = (held[0].params, held[0].opt_state) if home is Linen else held
    own = own.opt_state if home is Nnx else own
    assert_close(home.all_arrays(model), home.all_arrays(expected))
    assert_close(*map(jax.tree.leaves, (own, state)))
    assert jax.tree.structure(own) == jax.tree.structure(state)
    if home is Linen:
        assert held[0].step == 2


@pytest.mark.broad
@EACH
def test_a_member_of_a_sweep_is_trained_as_it_would_be_alone(home):
    rates = [1e-2, 1e-1]
    found = sweep(
        adamw, {"learning_rate": rates}, loss=home.loss, init=home.make, data=BATCH, steps=2,
        seeds=[KEY], evaluate=lambda model: home.loss(model, BATCH),
    )  # fmt: skip
    for member, rate in enumerate(rates):
        alone, _ = home.trained(made(home), adamw(rate))
        of_member = [x[member] for x in home.all_arrays(found.params)]
        assert_close(of_member, home.all_arrays(alone))
        np.testing.assert_allclose(found.results[member], home.loss(alone, BATCH), rtol=1e-4)


@EACH
def test_packed_parameters_take_the_same_steps(home):
    model, tx = made(home), adam(1e-2)
    packing = Packing(model)
    params = home.params(model)

    def after_two(optimizer, params, unpacked):
        state = optimizer.init(params)
        loss = jax.grad(lambda p: home.loss(home.rebuilt(model, unpacked(p)), BATCH))
        for _ in range(2):
            updates, state = optimizer.update(loss(params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    expected = jax.jit(lambda p: after_two(tx, p, lambda p: p))(params)
    packed = packing.pack(model)
    assert {name for name in packed} < home.names
    result = jax.jit(lambda p: after_two(packing.optimizer(tx), p, packing.unpack))(packed)
    result = packing.unpack(result)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    assert_close(*map(jax.tree.leaves, (result, expected)))
    assert_close(*(jax.tree.leaves(packing.pack(tree)) for tree in (result, expected)))


@pytest.mark.broad
@EACH
def test_a_state_in_8_bits_stays_so(home):
    tx = low_memory(adam(1e-2), "8-bit", min_size=1)
    one, state = home.trained(made(home), tx, steps=1)
    before = jax.tree.structure(nnx.as_pure(state))
    model, state = home.trained(made(home), tx, steps=3)
    assert jax.tree.structure(nnx.as_pure(state)) == before
    blocks = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Blocks))
    assert sum(isinstance(x, Blocks) for x in blocks) == 2 * len(home.names)
    plain, _ = home.trained(made(home), adam(1e-2), steps=3)
    assert_close(*(by_name(home, m).values() for m in (model, plain)), rtol=0, atol=1e-2)
    assert all(
        np.any(a != b)
        for a, b in zip(by_name(home, one).values(), by_name(home, model).values(), strict=True)
    )


@EACH
def test_what_is_held_is_saved_checked_and_goes_on_bit_for_bit(home):
    tx = adamw(1e-2, weight_decay=0.1)
    step = train_step(home.loss, tx)

    def go_on(held, steps):
        for _ in range(steps):
            *held, _ = step(*held, BATCH)
        return tuple(held)

    def arrays(held):
        state = nnx.state(held[1]) if home is Nnx else held
        model = home.all_arrays(held[0]) if home in (Nnx, Equinox) else []
        return [*model, *(x for x in jax.tree.leaves(state) if hasattr(x, "dtype"))]

    held = go_on(home.as_held(made(home), tx), 2)
    data, header = to_bytes(tx, held), checkpoint_header(tx, held)
    fresh = home.as_held(home.make(jax.random.key(7)), tx)
    check_checkpoint(header, tx, fresh)
    with pytest.raises(CheckpointMismatch, match=r"b2 of adamw was 0\.999, is 0\.9"):
        check_checkpoint(header, adamw(1e-2, b2=0.9, weight_decay=0.1), fresh)
    expected, resumed = go_on(held, 2), go_on(from_bytes(tx, fresh, data), 2)
    assert len(arrays(expected)) > len(home.names)
    for a, b in zip(arrays(expected), arrays(resumed), strict=True):
        np.testing.assert_array_equal(*(np.asarray(_bits(x)) for x in (a, b)))


def _bits(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


@EACH
def test_telemetry_is_read_off_what_is_held(home):
    tx = adamod(1e-2, observers=telemetry(every=1))
    held = home.as_held(made(home), tx)
    *held, _ = train_step(home.loss, tx)(*held, BATCH)
    recorder, optimizer = Recorder(), held[-1]
    recorder.record(optimizer)
    seen = read_telemetry(optimizer)
    assert seen["step"] == 1 == recorder.steps[-1]
    assert seen["learning_rate"] == pytest.approx(1e-2)
    assert rate_histograms(optimizer)["all"].sum() == pytest.approx(1.0)


@pytest.mark.broad
@EACH
def test_the_state_of_optax_moves_in(home):
    model, state = home.trained(made(home), optax.adam(1e-2))
    params = home.params(model)
    moved = convert_state(state, optax.adam(1e-2), adamod(1e-2), params)
    assert int(jax.tree.leaves(moved[0].count)[0]) == 2
    mine, theirs = (jax.tree.leaves(t) for t in (moved[0].buffers["mu"], state[0].mu))
    assert_close(mine, theirs, rtol=0, atol=0)


# --- What only one of them has ------------------------------------------------------------------


def test_an_nnx_optimizer_of_another_transformation_is_refused():
    model = made(Nnx)
    step = train_step(Nnx.loss, adam(1e-2))
    other = nnx.Optimizer(model, adam(1e-3), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"Optimizer was made with another transformation .*\.tx"):
        step(model, other, BATCH)
    held = Linen.as_held(made(Linen), adam(1e-3))
    with pytest.raises(ValueError, match="TrainState was made with another transformation"):
        step(*held, BATCH)
    with pytest.raises(TypeError, match=r"step\(params, state, \*args\)"):
        step(model)


def test_an_nnx_optimizer_says_itself_what_is_trained():
    class Tuned(nnx.Param):
        pass

    model = made(Nnx)
    model.head.kernel = Tuned(model.head.kernel[...])
    before = {name: np.array(x) for name, x in by_name(Nnx, model).items()}
    optimizer = nnx.Optimizer(model, adam(1e-2), wrt=Tuned)
    train_step(Nnx.loss, optimizer)(model, optimizer, BATCH)
    moved = {name for name, x in by_name(Nnx, model).items() if np.any(x != before[name])}
    assert moved == {"head/kernel"}
    assert optimizer.step[...] == 1


def test_the_state_of_nnx_variables_stays_one():
    model, tx = made(Nnx), adam(1e-2)
    state = tx.init(nnx.state(model, nnx.Param))
    before = jax.tree.structure(state)
    _, state, _ = train_step(Nnx.loss, tx)(model, state, BATCH)
    assert jax.tree.structure(state) == before
    expected, _ = Nnx.trained(made(Nnx), tx, steps=1)
    assert_close(Nnx.all_arrays(model), Nnx.all_arrays(expected))


def test_the_state_of_an_nnx_optimizer_is_packed_and_put_back():
    model, tx = made(Nnx), adam(1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    packing = Packing(model)
    params, state = packing.pack((model, optimizer))
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    gradients = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(gradients, state, params)
    nnx.update(optimizer.opt_state, nnx.state(packing.unpack(state)))
    assert optimizer.opt_state[0].count[...] == 1
    moved = jax.tree.leaves(nnx.as_pure(optimizer.opt_state)[0].mu)
    assert all(np.all(x == np.float32(0.1)) for x in moved)


def test_an_attribute_called_value_keeps_its_name_and_a_variable_of_nnx_adds_none():
    names = [line.path for line in ParameterGroups([], default=Group()).report(made(Equinox))]
    assert {"value", "scaled/value"} < set(names)
    groups = ParameterGroups([Group("^value$", freeze=True)], default=Group())
    frozen = [line.path for line in groups.report(made(Equinox)) if line.settings == "frozen"]
    assert frozen == ["value"]

    class Attention(nnx.Module):
        def __init__(self):
            self.value = nnx.Param(jnp.ones(2))

    report = ParameterGroups([], default=Group()).report(Attention())
    assert [line.path for line in report] == ["value"]


def test_without_flax_and_equinox_a_tree_is_a_tree():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        value: jax.Array

    report = ParameterGroups([], default=Group()).report({"a": Layer(jnp.ones(2))})
    assert [line.path for line in report] == ["a/value"]
