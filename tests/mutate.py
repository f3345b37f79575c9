"""Breaks the package on purpose, one line at a time, and shows that the suite notices.

    python tests/mutate.py            # all mutants, as many at a time as there are processors
    python tests/mutate.py --only max # those whose description contains "max"

Each mutant is a copy of the package with one line changed, in a temporary folder; a mutant that
the tests let pass is printed as SURVIVED, and the script fails. Tests that compare text (docs) and
whole examples are left out: a number has to be what gives the mutant away.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent import futures

ROOT = pathlib.Path(__file__).parent.parent
TESTS = (  # the quick ones first
    "stages", "exactness", "laws", "guard", "lookahead", "family", "policies", "contract",
    "misuse", "structure", "groups", "optax_parity", "checkpoint", "moving", "combinations",
    "corrections", "tracing", "weight_decay", "successors", "schedule_free", "matrices",
    "modifiers", "averaging", "spikes", "clipping", "residuals", "master_weights", "lr_find",
    "extremes", "low_memory", "one_kernel", "regrouping", "factors", "counts", "converting",
)  # fmt: skip

FIRST = {
    "now": "corrections", "step": "misuse", "memory": "policies", "update": "stages",
    "checks": "contract", "trees": "contract", "bracket": "contract", "headers": "checkpoint",
    "renamed": "weight_decay", "finite": "extremes", "inner_decay": "weight_decay",
    "range_test": "lr_find", "averages": "exactness", "differences": "exactness",
    "codecs": "low_memory", "master_weights": "master_weights", "residuals": "residuals",
    "one_kernel": "one_kernel",
    "factors": "factors", "filling": "regrouping", "tensors": "modifiers",
    "factored": "exactness", "eigenbasis": "exactness",
}  # fmt: skip

# file, what is there (once), what is put in its place, what is wrong then
MUTANTS = [
    ("core/now", "times(x, by=1 - b) + trees.times(old, by=b)",
     "times(x, by=b) + trees.times(old, by=1 - b)",
     "the moving average remembers the new"),
    ("core/now", "return trees.times(x, by=1 - b) + trees", "return x + trees",
     "the moving average is a sum"),
    ("core/now", "trees.times(finite, by=1 - b)",
     "trees.times(finite, by=b)", "an average with a decay that rounding changes"),
    ("core/now", "if isinstance(b, jax.Array) or abs(b - held) <= 1e-6 * (1 - b):", "if True:",
     "an average takes its decay as it is rounded"),
    ("core/now", "jnp.minimum(old, jnp.finfo(old.dtype).max) if jnp.isrealobj(old) else old", "old",
     "an infinite square becomes NaN"),
    ("core/now", "averaged_in_optax if as_in_optax else averaged", "averaged",
     "averages are not optax's where it is asked for"),
    ("core/now", "t = jnp.asarray(count, float)", "t = jnp.asarray(count + 1, float)",
     "bias correction off by one"),
    ("core/now", "series + 1 / math.factorial(n)", "series", "a bias correction of one term"),
    ("core/now", "checks.value_at(hyperparameter, self.count, name)",
     "checks.value_at(hyperparameter, self.count + 1, name)",
     "schedules of stages a step late"),
    ("core/now", "now.clash = WrongOrder(", "_ = WrongOrder(", "two buffers of one name"),
    ("core/step", "known.owes = (*inherited, held[1])", "known.owes = ()",
     "an average owes nothing"),
    ("core/step", "self._known[field] = dataclasses.replace(known, owes=())", "pass",
     "an average is corrected twice"),
    ("core/step", "more = self.memory.remembered and is_read", "more = False",
     "a rate that remembers counts as pure"),
    ("core/step", "x / jnp.where(zero, jnp.inf, y)", "x / y", "0 / 0 is not 0"),
    ("core/memory", "buffers[name] = finite.narrowed(value, dtype)", "buffers[name] = value",
     "buffers change their dtype"),
    ("core/memory", "value = trees.copied(value, old)", "pass",
     "a buffer is the gradient's own array"),
    ("core/update", "now.calculate(scalars_of(lines, leaves[first], of_params[first]))", "pass",
     "leaves do not share their corrections"),
    ("core/checks", "check_returned(name, hyperparameter(count - 1))",
     "check_returned(name, hyperparameter(count))",
     "schedules a step late"),
    ("core/trees", "return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else dtype",
     "return dtype", "arithmetic in 16 bits"),
    ("core/bracket", "count = jnp.asarray(optax.safe_increment(state.count))\n        now",
     "count = jnp.asarray(optax.safe_increment(state.count) + 1)\n        now",
     "the count of a bracket off by one"),
    ("core/bracket", "count = jnp.asarray(optax.safe_increment(state.count))\n        now",
     "count = state.count + 1\n        now", "the count of a bracket overflows"),
    ("stages/moments", "step.direction / c1", "step.direction",
     "no bias correction of the first moment"),
    ("stages/moments", "step.second_moment / c2", "step.second_moment",
     "no bias correction of the second moment"),
    ("stages/moments", "largest = step.remember(name, jnp.maximum,",
     "largest = step.remember(name, jnp.minimum,", "AMSGrad takes the minimum"),
    ("stages/moments", "return step.limit(second_moment=largest)",
     "return step.limit(second_moment=step.second_moment)",
     "AMSGrad's maximum is kept and not used"),
    ("stages/moments", "(x.conj() * x).real", "(x * x).real", "the square of a complex number"),
    ("stages/moments", "b * (m / ahead) + (1 - b) * (g / now)",
     "b * (m / now) + (1 - b) * (g / now)", "Nesterov corrected for the wrong step"),
    ("stages/moments", "t, d = jnp.asarray(step + 1, float) + 1,",
     "t, d = jnp.asarray(step + 1, float),", "NAdam does not look ahead"),
    ("stages/moments", "jnp.maximum(v - finite, 0)", "v",
     "the variance is not centered"),
    ("stages/moments", "summable(mu * w + undamped * d, d)", "summable(mu * w + d, d)",
     "no dampening"),
    ("stages/averages", "step.gradient - step.raw(\"direction\")", "step.gradient",
     "AdaBelief believes nothing"),
    ("stages/rates", "root(v + step.at(eps_root)) + step.at(eps)",
     "root(v + step.at(eps_root) + step.at(eps))", "eps under the root"),
    ("stages/rates", "root(v + step.at(eps_root)) + step.at(eps)",
     "root(v) + step.at(eps)", "eps_root is forgotten"),
    ("stages/rates", "scale = jnp.sqrt(step.correction(\"second_moment\", b2, unseen=unseen))",
     "scale = step.correction(\"second_moment\", b2, unseen=unseen)",
     "no root of the correction in the eps-hat form"),
    ("stages/rates", "step.limit(rate=jnp.minimum(step.rate, rate_ema))",
     "step.limit(rate=jnp.maximum(step.rate, rate_ema))", "AdaMod bounds from below"),
    ("stages/rates", "step.limit(rate=jnp.minimum(step.rate, rate_ema))",
     "step.limit(rate=rate_ema)", "AdaMod follows its average"),
    ("stages/rates", "jnp.where(unseen, jnp.zeros_like(step.rate), step.rate)", "step.rate",
     "nothing is muted"),
    ("stages/rates", "1 - 1 / steps(count)) if callable(steps) else 1 - 1 / steps",
     "1 - 1 / steps(count)) if callable(steps) else 1 - 1 / (steps + 1)",
     "the length of AdaMod's memory is off by one"),
    ("stages/rates", "(1 + 1 / t)", "(1 + 1 / (t + 1))", "AdaBound's upper bound"),
    ("stages/rates", "return length >= value_at(threshold, count, \"threshold\")",
     "return length >= value_at(threshold, count, \"threshold\") + 0.5", "RAdam's threshold"),
    ("stages/rates", "(rho - 4) / (limit - 4) * (rho - 2) / (limit - 2) * limit / rho",
     "(rho - 4) / (limit - 4) * (rho - 2) / (limit - 2)", "RAdam's rectifier lacks a factor"),
    ("stages/rates", "early = t * (1 - 2 * h(jnp.minimum(x, 0.5))) + 2 * h(a)",
     "early = t * (1 - 2 * h(jnp.minimum(x, 0.5)))", "rho off by 1/6 of a"),
    ("stages/directions", "jax.nn.sigmoid(jnp.abs(before - g)),", "jax.nn.sigmoid(before - g),",
     "friction without the absolute value"),
    ("stages/directions", "step.keep(name, g)", "step.keep(name, step.direction)",
     "the direction before in place of the gradient before"),
    ("stages/directions", "jnp.sign(b * before + (1 - b) * d)", "jnp.sign(before)",
     "Lion does not look ahead"),
    ("stages/weight_decay", "u + s * jnp.sign(x)", "u + s * x", "l1 decay is l2"),
    ("stages/weight_decay", "combine_leaves(u, x, s=lr * s)", "combine_leaves(u, x, s=s)",
     "decay without the learning rate"),
    ("stages/weight_decay", "-lr if flip_sign else lr", "lr * u", "uphill"),
    ("stages/weight_decay", '"independent": eta, "constant": None',
     '"independent": learning_rate, "constant": None', "independent decay times the rate"),
    ("stages/weight_decay", "return bracket, uphill, *decays, optax.scale(-1.0)",
     "return bracket, *decays, last", "constant decay times the rate"),
    ("core/renamed", "said |= today", "said |= {}", "the words of earlier versions are not read"),
    ("wrappers/lookahead", "s + a * (x + u - s)", "x + a * (x + u - s)",
     "Lookahead forgets its slow weights"),
    ("wrappers/lookahead", "syncs = count % sync_period == 0",
     "syncs = count % sync_period == 1", "Lookahead syncs a step late"),
    ("wrappers/guard", "functools.reduce(jnp.logical_and, finite, jnp.array(True))",
     "functools.reduce(jnp.logical_or, finite, jnp.array(False))", "one finite leaf is enough"),
    ("core/bracket", "if not _orders_are_known.get():", "if False:",
     "a wrong order of stages is no error before init"),
    ("checkpoints/headers", "if list(old) != list(new) or not alike:", "if False:",
     "shapes are not compared"),
    ("checkpoints/headers", "if differences and follows:", "if follows:",
     "what a recipe is made of is not compared"),
    ("core/finite", "limit = largest_squared(x.dtype)", "limit = 2 * largest_squared(x.dtype)",
     "a square overflows"),
    ("core/finite", "x = _between(x, -largest, largest, x)", "pass",
     "a cast to fewer bits makes an infinity"),
    ("stages/averages", "sign(v - square) * square", "sign(v - square) * v",
     "Yogi moves by itself"),
    ("stages/averages", "second_moment=before).note", "second_moment=now).note",
     "ADOPT divides by today's gradient"),
    ("stages/averages", "step.at(alpha) * squarable(slow)", "squarable(slow)",
     "AdEMAMix's slow average has no weight of its own"),
    ("stages/averages", "direction=step.at(inverse) * weighed", "direction=weighed",
     "LaProp's average is not right at the start"),
    ("stages/differences", "step.at(gamma) * b / (1 - b) * change", "step.at(gamma) * b * change",
     "MARS corrects too little"),
    ("stages/differences", "jnp.where(step.count == 1, 0.0, g - before)", "g - before",
     "Adan's gradient changes at the first step"),
    ("stages/differences", "step.at(ahead) / step.correction_of(b2)", "step.at(ahead)",
     "Adan's average of changes is not corrected"),
    ("stages/tensors", "most / jnp.maximum(norm(step, g, axis_name), most)",
     "most / norm(step, g, axis_name)", "short gradients are lengthened"),
    ("stages/tensors", "jnp.where(v == 0, square, averaged(step.at(b2), v, square))",
     "averaged(step.at(b2), v, square)", "NovoGrad starts at zero"),
    ("stages/tensors", "step.limit(rate=step.rate * factor).note", "step.note",
     "StableAdamW slows nothing down"),
    ("stages/tensors", "of_x = jnp.minimum(of_x, largest)", "pass", "LAMB trusts without a bound"),
    ("stages/inner_decay", "step.direction + strength(step) * step.param", "step.direction",
     "nothing decays inside a bracket"),
    ("stages/factored", "rows / jnp.where(mean == 0, 1, mean) * columns", "rows * columns",
     "Adafactor's product is not normalised"),
    ("stages/factored", "absolute_square(step.gradient) + step.at(eps)",
     "absolute_square(step.gradient)", "Adafactor's eps is forgotten"),
    ("stages/factored", '{"row": 0, "column": axes - 1, "tensor": None}',
     '{"row": axes - 1, "column": 0, "tensor": None}', "rows are columns"),
    ("stages/schedule_free", "lasting * ((t - 1) / t) ** steps.at(step_power)", "lasting",
     "later steps weigh no more"),
    ("stages/schedule_free", "moved, q = -rate * step.direction, (z - step.param) / b",
     "moved, q = -rate * step.direction, z - step.param", "Schedule-Free forgets b1"),
    ("stages/schedule_free", "y - (1 / b1 - 1) * (z - y)", "y - (1 - b1) * (z - y)",
     "the average is calculated otherwise than it was made"),
    ("stages/eigenbasis", "power[:, order])[0][:, jnp.argsort(order)]", "power[:, order])[0]",
     "SOAP's columns change their places"),
    ("stages/eigenbasis", "has_begun = step.count > 1", "has_begun = step.count > 0",
     "SOAP moves at its first step"),
    ("stages/matrices", "b * step.raw(\"direction\") + (1 - b) * step.gradient",
     "step.raw(\"direction\")", "Muon does not look ahead"),
    ("stages/modifiers", "same = (agreement(d, g) > 0).astype(step.width)",
     "same = (agreement(d, g) < 0).astype(step.width)", "caution the other way round"),
    ("stages/modifiers", "jnp.maximum(1, rms / step.at(threshold))", "rms / step.at(threshold)",
     "small updates are enlarged"),
    ("stages/modifiers", "coin < step.at(keep)", "coin > step.at(keep)",
     "Magma keeps what it should leave out"),
    ("stages/weight_decay", "(u - s * x) / (1 + s) if proximal", "u - s * x if proximal",
     "Adan's decay is not proximal"),
    ("wrappers/averaging", "b * e + (1 - b) * x", "(1 - b) * e + b * x",
     "the average of parameters forgets"),
    ("wrappers/spikes", "jnp.sqrt(summable(squares) / (size - 1))",
     "jnp.sqrt(summable(squares) / size)", "not the deviation of a sample"),
    ("wrappers/spikes", "remembered = history.at[seen % window].set(now)",
     "remembered = history.at[(seen + 1) % window].set(now)", "spikes: the wrong norm is replaced"),
    ("wrappers/clipping", "factor = most / jnp.maximum(state.norm, most)",
     "factor = most / state.norm", "short gradients are lengthened by the norm before"),
    ("memory/master_weights", "step = jnp.where(goal == here, -0.0, goal - here)",
     "step = x - here", "updates do not land on the rounding"),
    ("memory/residuals", "return half - (_bits(params) & 1).astype(jnp.int32)", "return half",
     "a residual leads to the next 16-bit number"),
    ("memory/residuals", "(bits >> 10) * gap < rest << 22", "2 * rest >= gap",
     "residuals are rounded to nearest"),
    ("memory/codecs", "code = jnp.floor(127 * _over(view, x, scales) + _uniform(bits))",
     "code = jnp.round(127 * _over(view, x, scales))", "codes of 8 bits are rounded to nearest"),
    ("memory/codecs",
     "jnp.where(jnp.isfinite(x), jnp.clip(code, -127, 127), _NOT_FINITE_INT8)",
     "jnp.clip(code, -127, 127)", "in 8 bits a NaN becomes a number"),
    ("memory/codecs", "jnp.clip(below + above, jnp.where(x > 0, 1, 0), 255)",
     "jnp.clip(below + above, 0, 255)", "in 8 bits a small second moment becomes 0"),
    ("memory/one_kernel", "np.uint32(rows * BLOCK)", "np.uint32(BLOCK)",
     "blocks of a kernel share their noise"),
    ("memory/one_kernel", "bits = noise.bits(hashed[noise.salt])", "bits = hashed[noise.salt]",
     "two buffers of a weight share their noise in a kernel"),
    ("memory/one_kernel", 'frozenset(("max", "min", "clamp"))', "frozenset()",
     "a NaN is lost between two limits in a kernel"),
    ("checkpoints/factors", "return 1 / rate if there else rate",
     "return rate if there else 1 / rate", "the learning rate goes into a velocity twice"),
    ("checkpoints/filling", "of = [paths for paths in there if paths == covered]",
     "of = list(there)", "a number of some parameters moves to others"),
    ("watching/range_test", "(divergence - 1) * abs(lowest)", "divergence * abs(lowest)",
     "the range test diverges late"),
]  # fmt: skip


def run(file: str, tests: pathlib.Path, package: pathlib.Path, cache: str) -> tuple[bool, str]:
    """Whether some test fails, and which; the tests of the file first.

    Programs that a mutant leaves as they were come from the cache of the mutants before.
    """
    name_of_file = file.rpartition("/")[2]
    first = FIRST.get(name_of_file, name_of_file)
    order = sorted(TESTS, key=lambda name: name != first)
    files = [str(tests / f"test_{name}.py") for name in order]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "--no-header", "--tb=no", *files],
        cwd=package,
        env={"PYTHONPATH": str(package), "PATH": "/usr/bin:/bin", "HOME": str(package)}
        | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        capture_output=True,
        text=True,
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1, failed[0][:110] if failed else f"exit code {done.returncode}"


def is_noticed(mutant: tuple[str, str, str, str], cache: str) -> bool:
    """Whether the tests fail on a copy with this change; says so."""
    file, old, new, what = mutant
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("adaptive_opt", "benchmarks", "docs", "examples", "tests"):
            shutil.copytree(ROOT / name, copy / name)
        for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
            shutil.copy(ROOT / name, copy / name)
        path = copy / "adaptive_opt" / f"{file}.py"
        path.write_text(path.read_text().replace(old, new))
        start = time.monotonic()
        noticed, where = run(file, copy / "tests", copy, cache)
    verdict = "killed  " if noticed else "SURVIVED"
    print(f"{verdict} {what}: {where} ({time.monotonic() - start:.0f} s)", flush=True)
    return noticed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the description")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    given = parser.parse_args()
    only, jobs = given.only, given.jobs
    for file, old, _, _ in MUTANTS:
        found = (ROOT / "adaptive_opt" / f"{file}.py").read_text().count(old)
        if found != 1:
            print(f"{file}.py should hold {old!r} once, but does {found} times")
            return 2
    chosen = [mutant for mutant in MUTANTS if only in mutant[3]]
    with tempfile.TemporaryDirectory() as cache, futures.ThreadPoolExecutor(jobs) as pool:
        noticed = list(pool.map(functools.partial(is_noticed, cache=cache), chosen))
    survived = len(chosen) - sum(noticed)
    print(f"{survived} survived" if survived else "all killed")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
