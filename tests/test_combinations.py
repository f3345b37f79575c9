"""Random lists of stages equal an independent interpreter of the same list in NumPy, float64.

The interpreter knows the stages by name and settings only, as `describe` gives them, and was
written from the papers' formulas.
"""

from __future__ import annotations

import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adaptive_opt as ao
from adaptive_opt import adaptive, describe
from adaptive_opt.core.look import look
from adaptive_opt.core.now import WrongOrder
from adaptive_opt.core.stage import lines_of

STEPS, TOLERANCE = 12, 1e-12
SHAPES = {"a": (3, 2), "b": (4,), "c": ()}


# --- The interpreter ------------------------------------------------------------------------------


class Step:
    """A step of lists of arrays, and the buffers of all the stages, by their place in the list."""

    def __init__(self):
        self.t = 0
        self.memory = {}

    def ema(self, place, decay, new):
        old = self.memory.get(place, [0.0] * len(new))
        self.memory[place] = [decay * o + (1 - decay) * n for o, n in zip(old, new, strict=True)]
        return self.memory[place]


def over(squares, scope, reduce):
    sizes = [np.size(x) for x in squares]
    if scope == "weight":
        return squares
    sums = [np.sum(x) for x in squares]
    if scope == "tree":
        sums, sizes = [sum(sums)] * len(sums), [sum(sizes)] * len(sizes)
    return [s / n if reduce == "mean" else s for s, n in zip(sums, sizes, strict=True)]


def each(function, *lists):
    return [function(*leaves) for leaves in zip(*lists, strict=True)]


def interpret(name, h, place, s):
    t = s.t
    if name == "first_moment":
        s.direction = s.ema(place, h["b1"], s.direction)
    elif name == "heavy_ball":
        old = s.memory.get(place, [0.0] * len(s.direction))
        undamped = 1.0 if t == 1 else 1 - h["dampening"]
        s.memory[place] = each(lambda o, d: h["momentum"] * o + undamped * d, old, s.direction)
        ahead = each(lambda d, w: d + h["momentum"] * w, s.direction, s.memory[place])
        s.direction = ahead if h["nesterov"] else s.memory[place]
    elif name == "second_moment":
        squares = over([g**2 for g in s.gradient], h.get("scope", "weight"), h.get("reduce", "sum"))
        s.v = s.ema(place, h["b2"], squares)
    elif name == "sum_of_squares":
        old = s.memory.get(place, [h.get("initial", 0.0)] * len(s.gradient))
        s.v = s.memory[place] = each(lambda o, g: o + g**2, old, s.gradient)
    elif name == "infinity_moment":
        old = s.memory.get(place, [0.0] * len(s.gradient))
        s.v = s.memory[place] = each(
            lambda o, g: np.maximum(h["b2"] * o, np.abs(g) + h["eps"]), old, s.gradient
        )
    elif name == "centered_moment":
        mean = s.ema(place, h["b2"], s.gradient)
        s.v = each(lambda v, n: np.maximum(v - n**2, 0), s.v, mean)
    elif name == "amsgrad_max":
        s.v = s.memory[place] = each(np.maximum, s.memory.get(place, [0.0] * len(s.v)), s.v)
    elif name == "debias":
        if h["b1"] is not None:
            s.direction = [d / (1 - h["b1"] ** t) for d in s.direction]
        if h["b2"] is not None:
            s.v = [v / (1 - h["b2"] ** t) for v in s.v]
    elif name == "nesterov_moment":
        b = h["b1"]
        s.direction = each(
            lambda m, g: b * m / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t),
            s.direction,
            s.gradient,
        )
    elif name == "nadam_moment":
        now, ahead = (h["b1"] * (1 - 0.5 * 0.96 ** (n * h["momentum_decay"])) for n in (t, t + 1))
        p = s.memory[place] = s.memory.get(place, 1.0) * now
        s.direction = each(
            lambda m, g: ahead * m / (1 - p * ahead) + (1 - now) * g / (1 - p),
            s.direction,
            s.gradient,
        )
    elif name == "per_weight_rate":
        s.rule = lambda v: 1 / (np.sqrt(v + h["eps_root"]) + h["eps"])
    elif name == "inverse_rate":
        s.rule = lambda u: 1 / (u + h["eps"])
    elif name == "uniform_rate":
        s.fixed = [h["learning_rate"]] * len(s.gradient)
    elif name == "apply_rate":
        s.direction = each(lambda d, r: d * r, s.direction, s.rate())
        s.rule = s.fixed = s.v = None
    elif name == "diffgrad_friction":
        before = s.memory.get(place, [0.0] * len(s.gradient))
        s.memory[place] = s.gradient

        def friction(g, b):
            change = {"absolute": abs(b - g), "signed": b - g, "wide": abs(b - g) / 2}[h["kind"]]
            sigmoid = 1 / (1 + np.exp(-change))
            return 9 * sigmoid - 4 if h["kind"] == "wide" else sigmoid

        s.direction = each(lambda d, g, b: d * friction(g, b), s.direction, s.gradient, before)
    else:
        s.fixed = rate_stage(name, h, place, s)


def rate_stage(name, h, place, s):
    rate, t = s.rate(), s.t
    if name == "scale_rate":
        return [r * h["factor"] for r in rate]
    if name == "mute_unseen":
        return each(lambda r, v: np.where(v == 0, 0.0, r), rate, s.v)
    if name == "debias_rate":
        factor = math.sqrt(1 - h["b2"] ** t) if h["b2"] is not None else 1.0
        factor /= 1 - h["b1"] ** t if h["b1"] is not None else 1.0
        return [r * factor for r in rate]
    if name == "adamod_momental_bound":
        average = s.ema(place, h["b3"], rate)
        if h["average"]:
            return each(lambda r, a: (r + a) / 2, rate, average)
        return each(np.minimum, rate, average)
    if name == "adabound_dynamic_bound":
        f, gamma = h["final_learning_rate"], h["gamma"]
        low, high = f * (1 - 1 / (gamma * t + 1)), f * (1 + 1 / (gamma * t))
        return [np.clip(r, low, high) for r in rate]
    if name == "adadelta_units":
        old = s.memory.get(place, [0.0] * len(rate))
        new = each(lambda r, o: r * np.sqrt(o + h["eps"]), rate, old)
        s.ema(place, h["b2"], each(lambda d, r: (d * r) ** 2, s.direction, new))
        return new
    assert name == "radam_rectifier", name
    limit = 2 / (1 - h["b2"]) - 1
    rho = limit - 2 * t * h["b2"] ** t / (1 - h["b2"] ** t)
    if rho < h["threshold"]:
        return [np.full_like(r, h["unrectified_rate"]) for r in rate]
    r = math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
    return [r * x for x in rate]


def run_interpreter(stages, gradients):
    s = Step()
    updates = []
    for gradient in gradients:
        s.t += 1
        s.gradient = s.direction = gradient
        s.v = s.rule = s.fixed = None
        s.rate = lambda: s.fixed if s.fixed is not None else [s.rule(v) for v in s.v]
        for place, part in enumerate(stages):
            interpret(part.name, part.settings, place, s)
        has_rate = s.fixed is not None or s.rule is not None
        rate = s.rate() if has_rate else [1.0] * len(gradient)
        updates.append(each(lambda d, r: d * r, s.direction, rate))
    return updates


# --- Random lists ---------------------------------------------------------------------------------


def decay():
    return st.sampled_from([0.0, 0.5, 0.9, 0.99])


@st.composite
def stage_lists(draw):
    """A valid list: some stages, each with random settings, in a random order that is accepted."""
    b1, b2, momentum = draw(decay()), draw(st.sampled_from([0.5, 0.9, 0.99])), draw(decay())
    eps = draw(st.sampled_from([1e-8, 1e-3, 1.0]))
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    scope, reduce = pick("weight", "weight", "tensor", "tree"), pick("sum", "mean")
    first = pick("none", "average", "nesterov", "nadam", "ball", "raw")
    second = pick("average", "average", "average", "sum", "infinity", "none")
    stages = {
        "none": [],
        "average": [ao.first_moment(b1), ao.debias(b1=b1)],
        "raw": [ao.first_moment(b1)],
        "nesterov": [ao.first_moment(b1), ao.nesterov_moment(b1)],
        "nadam": [ao.first_moment(b1), ao.nadam_moment(b1, 0.1)],
        "ball": [ao.heavy_ball(momentum, dampening=pick(0.0, 0.3), nesterov=pick(False, True))],
    }[first]
    corrected = pick("v", "rate", "none") if second == "average" else "none"
    if second == "average":
        stages += [
            ao.second_moment(b2, scope=scope, reduce=reduce),
            ao.per_weight_rate(eps, pick(0.0, 0.1)),
        ]
        stages += [ao.centered_moment(b2)] * (scope == "weight" and pick(False, True))
        stages += {"v": [ao.debias(b2=b2)], "rate": [ao.debias_rate(b2=b2)], "none": []}[corrected]
    elif second == "sum":
        stages += [ao.sum_of_squares(initial=pick(0.0, 0.5)), ao.per_weight_rate(eps)]
    elif second == "infinity":
        stages += [ao.infinity_moment(b2, pick(0.0, 0.1)), ao.inverse_rate(eps)]
    else:
        stages += [ao.uniform_rate(0.3)]
    if second != "none":
        stages += [ao.amsgrad_max()] * pick(False, True)
        stages += [ao.mute_unseen()] * pick(False, True)
        stages += [ao.radam_rectifier(b2)] * pick(False, True)
        stages += [ao.adadelta_units(b2, 1e-3)] * (scope == "weight" and pick(False, True))
    stages += [ao.scale_rate(0.1)] * pick(False, True)
    stages += [ao.adamod_momental_bound(0.8, average=pick(False, True))] * pick(False, True)
    stages += [ao.adabound_dynamic_bound(0.5, 0.1)] * pick(False, True)
    stages += [ao.diffgrad_friction(pick("absolute", "signed", "wide"))] * pick(False, True)
    tail = [ao.apply_rate(), ao.heavy_ball(0.9, name="last")] * pick(False, False, True)
    shuffle = random.Random(draw(st.integers(0, 2**32)))
    order: list = []
    for made in stages:
        places = list(range(len(order) + 1))
        shuffle.shuffle(places)
        accepted = (o for p in places if is_accepted(o := [*order[:p], made, *order[p:]]))
        order = next(accepted, None)
        assert order is not None, f"no order is accepted: {[describe(s).name for s in stages]}"
    adaptive(*order, *tail)
    return (*order, *tail)


def is_accepted(stages):
    """Whether the stages make sense in this order, though some may still be missing."""
    lines = [line for made in stages for line in lines_of(made)]
    try:
        look(lines, jax.ShapeDtypeStruct((3, 2), np.float32))
    except WrongOrder:
        return False
    return True


@pytest.fixture
def gradients():
    rng = np.random.default_rng(3)
    return [
        [rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 2) for shape in SHAPES.values()]
        for _ in range(STEPS)
    ]


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(stages=stage_lists())
def test_a_random_list_equals_its_interpreter(stages, gradients):
    with jax.enable_x64(True):
        rule = adaptive(*stages)
        state = rule.init(dict(zip(SHAPES, map(jnp.asarray, gradients[0]), strict=True)))
        update = jax.jit(rule.update)
        expected = run_interpreter(describe(rule).stages(), gradients)
        largest = [0.0] * len(SHAPES)
        for gradient, wanted in zip(gradients, expected, strict=True):
            actual, state = update(dict(zip(SHAPES, gradient, strict=True)), state)
            for i, (a, b) in enumerate(zip(actual.values(), wanted, strict=True)):
                largest[i] = np.maximum(largest[i], np.abs(b))
                assert np.all(np.abs(a - b) <= TOLERANCE * largest[i]), describe(rule)


@pytest.mark.broad
def test_the_random_lists_reach_every_stage():
    seen = set()

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(stages=stage_lists())
    def collect(stages):
        seen.update(part.name for stage in stages for part in describe(stage).stages())

    collect()
    named = {"first_moment", "heavy_ball", "second_moment", "sum_of_squares", "infinity_moment"}
    named |= {"centered_moment", "amsgrad_max", "debias", "nesterov_moment", "nadam_moment"}
    named |= {"per_weight_rate", "inverse_rate", "uniform_rate", "debias_rate", "scale_rate"}
    named |= {"adadelta_units", "radam_rectifier", "adamod_momental_bound", "apply_rate"}
    named |= {"adabound_dynamic_bound", "diffgrad_friction", "mute_unseen"}
    assert seen == named
