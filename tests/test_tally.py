"""What telemetry counts: exact for any size and grouping, and next to no memory or programs."""

from __future__ import annotations

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import RECIPES, broadly
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive_opt import (
    AdaptiveStep,
    adam,
    adamod,
    adaptive,
    observer,
    rate_histograms,
    read_telemetry,
    rmsprop,
    stage,
    telemetry,
)
from adaptive_opt.core import observe, waves
from adaptive_opt.core.now import Correction
from adaptive_opt.watching import telemetry as of_telemetry
from adaptive_opt.watching.tally import _FIRST_KEYS, KEYS, QUANTILES, Counted, Tally, Weights


@functools.partial(jax.jit, static_argnames="carries")
def merged_with(tally, rate, group, carries=True):
    number = tally.friction.size
    weights = Weights(rate, None, (rate, None, rate), (rate > 1,))
    return tally.merged(Tally.nothing(number, 1).adding(weights, group, carries=carries))


def counted(rates, groups, number, carries=True):
    """What was counted of arrays of rates, each in a group."""
    tally = Tally.nothing(number, 1)
    for rate, group in zip(rates, groups, strict=True):
        tally = merged_with(tally, jnp.asarray(rate, jnp.float32), jnp.int32(group), carries)
    return [Counted.of(jax.device_get(tally), group) for group in range(number)]


def by_tensor(learning_rate, **settings):
    """A line of it sees more than one weight."""
    return rmsprop(learning_rate, scope="tensor", **settings)


@settings(deadline=None, max_examples=25, database=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([1, 7, 40]), st.integers(0, 2**32 - 1)),
        max_size=4,
    ),
    st.booleans(),
)
def test_counts_and_quantiles_are_those_of_numpy(leaves, carries):
    """Floats of any bits, NaN, infinity and zero among them."""
    groups = [g for g, _, _ in leaves]
    rates = [
        np.abs(np.random.default_rng(seed).integers(0, 2**32, n, np.uint32).view(np.float32))
        for _, n, seed in leaves
    ]
    for group, seen in enumerate(counted(rates, groups, 2, carries)):
        own = [r for r, g in zip(rates, groups, strict=True) if g == group]
        assert seen.size == sum(map(np.size, own))
        if not own:
            assert not seen.histogram.any()
            continue
        rate = np.concatenate(own)
        bins = np.searchsorted(_FIRST_KEYS, rate.view(np.uint32) >> 16, side="right")
        expected = np.bincount(bins, minlength=len(_FIRST_KEYS) + 1)
        np.testing.assert_array_equal(seen.histogram, expected)
        assert seen.limited == [np.sum(rate > 1)]
        ordered = np.sort(rate)
        for q, found in zip(QUANTILES, seen.quantiles, strict=True):
            exact = ordered[max(1, -(-round(100 * q) * rate.size // 100)) - 1]
            if exact > 1e-37 or not exact < np.inf:  # not among the denormals
                np.testing.assert_allclose(found, exact, rtol=2.0**-8)


def with_counts(key, number):
    return Tally.nothing(1, 1)._replace(
        counts=jnp.zeros((2, 1, KEYS + 1), jnp.uint32).at[0, 0, key].set(number),
        largest=jnp.full((1, 5), jnp.inf),
    )


def test_the_weights_of_small_leaves_count_beside_a_large_one():
    """In float32 one more than 2^24 is 2^24."""
    tally = with_counts(100, 2**24)
    for _ in range(40):
        tally = merged_with(tally, jnp.full(1, 2.0), jnp.int32(0))
    seen = Counted.of(jax.device_get(tally), 0)
    assert sorted(seen.histogram)[-2:] == [40, 2**24]
    assert seen.limited == [40]


def test_counts_of_more_than_32_bits_are_exact():
    """2^33 + 8 weights in five parts of which none is larger than 2^31, then two at a time."""
    parts = [2**31 - 1] * 4 + [12]
    tally = with_counts(16000, parts[0])
    for i, size in enumerate(parts[1:], 1):
        tally = tally.merged(with_counts(16000 + 256 * (i // 4), size))
    assert sum(parts) == 2**33 + 8
    seen = Counted.of(jax.device_get(tally), 0)
    assert sorted(seen.histogram)[-2:] == [12, 2**33 - 4]
    bits = np.float32(seen.quantiles).view(np.uint32) >> 16
    assert bits.tolist() == [16000] * 5

    full = with_counts(int(np.float32(2).view(np.uint32) >> 16), 2**32 - 1)
    rate = jnp.full(2, 2.0)
    weights = Weights(rate, None, (rate, None, rate), (rate > 1,))
    for where, more in ((None, 2), (jnp.array([True, False]), 1)):
        seen = Counted.of(jax.device_get(full.adding(weights, 0, where)), 0)
        assert seen.size == 2**32 - 1 + more
        assert seen.limited == [more]


@pytest.mark.parametrize(
    "shapes",
    [
        {"one": (2**33,)},
        {"rows": (2**20, 2**13), "bias": (7,)},
        {"half": (2**31 + 2,), "b": (2**32,)},
    ],
)
@pytest.mark.parametrize("make", [adamod, by_tensor])
def test_a_group_of_billions_of_weights_is_traced(shapes, make):
    params = {k: jax.ShapeDtypeStruct(shape, np.float32) for k, shape in shapes.items()}
    optimizer = make(1e-3, observers=telemetry())
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert updates.keys() == params.keys()


def test_a_schedule_that_only_some_leaves_ask_for_can_be_observed():
    """And a bound that only some leaves have is counted, whichever leaf comes last."""

    @stage
    def of_matrices(rate):
        def line(step: AdaptiveStep) -> AdaptiveStep:
            if step.gradient.ndim == 2:
                bound = step.at(rate) * jnp.ones_like(step.direction)
                return step.limit(direction=jnp.minimum(step.direction, bound))
            return step

        return line

    shapes = {"a_bias": (3,), "k1": (2, 3), "k2": (4, 5), "k3": (2, 3), "z_bias": (7,)}
    params = {k: jnp.ones(shape) for k, shape in shapes.items()}
    optimizer = adaptive(of_matrices(lambda count: 0.25 / (count + 1)), telemetry())
    _, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    limited = read_telemetry(state)["limited/of_matrices/all"]
    assert limited == pytest.approx(32 / 42)


def drawn(shapes, scale=1.0):
    rng = np.random.default_rng(0)
    return {
        k: jnp.asarray(scale * rng.lognormal(0, 3, shape), jnp.float32)
        for k, shape in shapes.items()
    }


SHAPES = {
    "a": (9, 100),
    "b": (4096,),
    "c": (),
    "d": (3, 5000),
    "e": (2, 3),
    "f": (1,),
    "g": (12289,),
}


@pytest.mark.broad
def test_waves_see_what_a_look_at_the_whole_sees(monkeypatch):
    """Large leaves in parts, small ones together; also where counts may need two words, where a
    wave is a leaf, and where the directions of all leaves are there already."""
    monkeypatch.setattr(waves, "LONGEST", waves.SHORTEST)
    params, groups = drawn(SHAPES, 1e-3), {"some": "a|d|f", "never": "x"}
    optimizer = adamod(1e-3, observers=telemetry(every=1, groups=groups))

    def after_two():
        state = optimizer.init(params)
        for _ in range(2):
            _, state = jax.jit(lambda g, s: optimizer.update(g, s, params))(params, state)
        return state

    in_waves = after_two()
    monkeypatch.setattr(waves, "SEGMENT", 3 * waves.SHORTEST + 1)
    monkeypatch.setattr(of_telemetry, "SEGMENT", 3 * waves.SHORTEST + 1)
    with_carries = after_two()
    monkeypatch.setattr(waves, "_fits", lambda *_: False)
    by_leaf = after_two()
    monkeypatch.setattr(observe, "waves_of", lambda *_: None)
    at_once = after_two()
    expected = read_telemetry(by_leaf)
    assert 0 < expected["limited/adamod_momental_bound/some"] <= 1
    for other in (in_waves, with_carries, at_once):
        for group, histogram in rate_histograms(by_leaf).items():
            np.testing.assert_array_equal(rate_histograms(other)[group], histogram)
        assert read_telemetry(other) == pytest.approx(expected, rel=1e-6)


def test_a_line_that_looks_at_a_shape_or_at_other_weights_does_not_go_through_waves():
    @stage
    def scaled(how):
        def line(step: AdaptiveStep) -> AdaptiveStep:
            factor = {"size": step.gradient.size, "mean": jnp.mean(step.gradient)}[how]
            return step.set(rate=jnp.full(step.gradient.shape, factor))

        return line

    params = drawn({"a": (3, 4), "b": (5,)})
    for how in ("size", "mean"):
        optimizer = adaptive(scaled(how), telemetry(groups={"a": "a"}))
        _, state = optimizer.update(params, optimizer.init(params), params)
        seen = read_telemetry(state)
        for group, leaf in (("a", "a"), ("other", "b")):
            exact = params[leaf].size if how == "size" else params[leaf].mean()
            assert seen[f"rate/{group}/q50"] == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("chosen", ["a schedule", "a correction", "a buffer", "what is dropped"])
def test_a_line_that_chooses_by_a_shape_does_not_go_through_waves(chosen):
    """One that a look cannot tell from another."""

    @stage
    def choosing():
        schedules = [lambda t: 5.0 + 0 * t, lambda t: 2.0 + 0 * t]

        def line(step: AdaptiveStep) -> AdaptiveStep:
            is_matrix = step.gradient.ndim == 2
            if chosen == "a schedule":
                factor = step.at(schedules[is_matrix])
            elif chosen == "a correction":
                factor = step.now.correction((0.5, 0.9)[is_matrix], Correction())
            elif chosen == "a buffer":
                kept = [
                    step.remember(name, lambda old, x: old + x, step.gradient, initial=start)
                    for name, start in (("a", 1.0), ("b", 2.0))
                ]
                factor = kept[is_matrix]
            else:
                factor = [step.gradient * 5.0, step.gradient * 2.0][is_matrix]
            return step.set(direction=step.direction * factor)

        return line

    params = drawn({"a": (30, 40), "b": (5000,)})
    update_norm, gradient_norm = [], []
    for leaves in (params, {"a": params["a"]}):
        optimizer = adaptive(choosing(), telemetry(groups={"a": "a"}, learning_rate=1.0))
        updates, state = jax.jit(optimizer.update)(leaves, optimizer.init(leaves), leaves)
        seen = read_telemetry(state)
        update_norm.append(seen["update_norm/a"])
        gradient_norm.append(seen["gradient_norm/a"])
        exact = np.linalg.norm(np.asarray(updates["a"], np.float64))
        assert seen["update_norm/a"] == pytest.approx(exact, rel=1e-6)
    assert update_norm[0] == pytest.approx(update_norm[1], rel=1e-6)
    assert gradient_norm[0] == pytest.approx(gradient_norm[1], rel=1e-6)


@pytest.mark.parametrize("recipe", broadly(("adamod", "adafactor", "lamb", "ranger")))
def test_looks_at_our_lines_tell_what_their_programs_tell(recipe, monkeypatch):
    """Whether they are one program for every shape; traced for each, as those of others are."""
    shapes = {"a": (5, 7), "b": (6,), "c": (2, 3, 4), "d": (70,), "e": (130, 140)}
    params = {k: jax.ShapeDtypeStruct(shape, np.float32) for k, shape in shapes.items()}
    decide, decided = waves._by_program, []

    def noted(lines, *rest):
        kinds = decide(lines, *rest)
        decided.append(kinds)
        assert waves.are_ours(lines)
        with monkeypatch.context() as patch:
            patch.setattr(waves, "are_ours", lambda _: False)
            decided.append(decide(lines, *rest))
        return kinds

    monkeypatch.setattr(waves, "_by_program", noted)
    optimizer = RECIPES[recipe](1e-3, observers=telemetry())
    state = jax.eval_shape(optimizer.init, params)
    jax.eval_shape(lambda g, s: optimizer.update(g, s, g, value=1.0), params, state)
    assert decided[::2] == decided[1::2]


def test_norms_are_right_for_gradients_whose_squares_are_not_numbers():
    rng = np.random.default_rng(0)
    for scale in (1e-35, 1.0, 1e35):
        gradient = {"a": jnp.asarray(scale * rng.normal(size=(40, 3)), jnp.float32)}
        optimizer = adam(1e-3, observers=telemetry())
        _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
        exact = np.linalg.norm(np.asarray(gradient["a"], np.float64))
        assert read_telemetry(state)["gradient_norm/all"] == pytest.approx(exact, rel=1e-6)
        assert read_telemetry(state)["param_norm/all"] == pytest.approx(exact, rel=1e-6)


def test_gradient_and_parameter_may_be_split_differently():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    x = drawn({"x": (8, 4)}, 1e-3)["x"]
    optimizer = adam(1e-3, observers=telemetry(every=1))
    with jax.set_mesh(mesh):
        gradient = jax.device_put(x, NamedSharding(mesh, P()))
        param = jax.device_put(x, NamedSharding(mesh, P("x")))
        _, state = jax.jit(optimizer.update)(gradient, optimizer.init(gradient), param)
        exact = np.linalg.norm(np.asarray(x, np.float64))
        assert read_telemetry(state)["gradient_norm/all"] == pytest.approx(exact, rel=1e-6)
        assert read_telemetry(state)["param_norm/all"] == pytest.approx(exact, rel=1e-6)


def test_a_stage_after_the_observer_has_no_count():
    @stage
    def bound():
        return lambda step: step.limit(direction=jnp.minimum(step.direction, 1.0))

    optimizer, x = adaptive(telemetry(), bound()), jnp.array([0.5, 2.0])
    _, state = optimizer.update(x, optimizer.init(x), x)
    assert not [key for key in read_telemetry(state) if key.startswith("limited")]


def explicit(shape, spec, mesh):
    return jax.device_put(drawn({"x": shape}, 1e-3)["x"], NamedSharding(mesh, spec))


@pytest.mark.parametrize("kind", broadly([AxisType.Explicit], [AxisType.Auto, AxisType.Explicit]))
def test_on_a_mesh_of_either_kind_the_counts_are_those_of_one_device(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    specs = {"w": P("x", "y"), "v": P(None, "y"), "b": P()}
    alone = drawn({"w": (4, 8), "v": (2, 4), "b": (3,)}, 1e-3)
    optimizer = adamod(1e-3, observers=telemetry(every=1))
    _, expected = jax.jit(optimizer.update)(alone, optimizer.init(alone), alone)
    with jax.set_mesh(mesh):
        params = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in alone.items()}
        _, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        np.testing.assert_array_equal(
            rate_histograms(state)["all"], rate_histograms(expected)["all"]
        )
        assert read_telemetry(state) == pytest.approx(read_telemetry(expected), rel=1e-6)


# --- What it costs --------------------------------------------------------------------------------

MANY = {f"w{i:03d}": jax.ShapeDtypeStruct((i % 4 + 61, 400), np.float32) for i in range(120)}
LAYERS = {f"w{i:03d}": jax.ShapeDtypeStruct((20, 5 * (i % 4 + 2)), np.float32) for i in range(96)}
GIANT = {"w": jax.ShapeDtypeStruct((2**12, 2**11), np.float32)}


def temporaries(optimizer, params):
    state = jax.eval_shape(optimizer.init, params)
    compiled = jax.jit(optimizer.update).lower(params, state, params).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("make", "params"),
    [
        (adamod, GIANT),
        pytest.param(adamod, MANY, marks=pytest.mark.broad),
        pytest.param(by_tensor, MANY, marks=pytest.mark.broad),
    ],
    ids=["a giant", "many leaves", "many leaves, by tensor"],
)
def test_temporaries_are_at_most_a_byte_for_each_weight(make, params):
    size = sum(x.size for x in params.values())
    observed, alone = make(1e-3, observers=telemetry()), make(1e-3)
    assert temporaries(observed, params) - temporaries(alone, params) <= size


@pytest.mark.compiles
def test_a_step_at_which_nobody_looks_pays_for_comparisons_and_copies_no_buffer():
    """What is donated stays where it is, and all that is calculated of weights is in loops."""
    optimizer, alone = adam(1e-3, observers=telemetry()), adam(1e-3)
    texts = []
    for each in (optimizer, alone):
        state = jax.eval_shape(each.init, LAYERS)
        jitted = jax.jit(each.update, donate_argnums=1)
        texts.append(jitted.lower(LAYERS, state, LAYERS).compile().as_text())
    entries = [text[text.index("ENTRY ") :] for text in texts]
    of_weights = re.compile(r"= f32\[20,\d+\]\S* (\w+)\(")
    watched, plain = (Counter(of_weights.findall(entry)) for entry in entries)
    assert watched["fusion"] == plain["fusion"] == 3 * len(LAYERS)
    assert watched["copy"] <= plain["copy"]
    assert "scatter" not in entries[0]


@pytest.mark.broad
@pytest.mark.compiles
def test_temporaries_of_leaves_of_different_shapes_are_those_of_the_largest():
    """Where a line sees more than one weight."""
    params = {f"w{i}": jax.ShapeDtypeStruct((i + 40, 400), np.float32) for i in range(40)}
    largest = max(x.size for x in params.values())
    assert temporaries(by_tensor(1e-3, observers=telemetry()), params) <= 25 * largest


@pytest.mark.parametrize("sees", ["a weight", "a leaf"])
def test_lines_are_traced_for_each_shape_and_not_for_each_leaf(sees):
    runs = []

    @stage
    def noted():
        def line(step: AdaptiveStep) -> AdaptiveStep:
            runs.append(step.gradient.shape)
            factor = 2 if sees == "a weight" else jnp.mean(step.direction)
            return step.set(direction=factor * step.direction)

        return line

    def traced(number, *observers):
        x = {f"w{i}": jnp.ones((i % 3 + 2, 5)) for i in range(number)}
        optimizer = adaptive(noted(), *observers)
        state = optimizer.init(x)
        runs.clear()
        jaxpr = jax.make_jaxpr(optimizer.update)(x, state, x)
        return len(runs), str(jaxpr).count("scatter-add")

    alone, _ = traced(30)
    few, _ = traced(6, telemetry())
    many, scatters = traced(30, telemetry())
    assert few == many
    assert many <= 2 * alone + 3  # a wave is a shape too, and the loop is traced with its first
    assert scatters < 10


def test_a_state_is_fetched_in_one_go(monkeypatch):
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(1) or get(x))
    norm = observer(lambda s: {"n": s.count}, {"n": ()}, name="mine")
    optimizer, x = adam(1e-2, observers=[norm, telemetry(groups={"a": "a"})]), {"a": jnp.ones(2)}
    _, state = optimizer.update(x, optimizer.init(x), x)
    assert read_telemetry(state)["mine/n"] == 1
    assert len(fetched) == 1


def test_the_state_is_as_large_as_the_text_says():
    x = {"a": jnp.ones(2)}
    for groups, number in ((None, 1), ({"b": "b", "c": "c"}, 3)):
        state = adamod(1e-2, observers=telemetry(groups=groups)).init(x)
        kept = jax.tree.leaves(state[0].buffers["telemetry"].values)
        assert sum(k.size for k in kept) == number * (2**16 + 2 + 10) + 7
        assert {k.dtype.itemsize for k in kept} == {4}
