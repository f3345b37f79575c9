"""Breaks the package on purpose, one line at a time, and shows that the suite notices.

    python tests/mutate.py            # all mutants, one after the other
    python tests/mutate.py --only max # those whose description contains "max"

Each mutant is a copy of the package with one line changed, in a temporary folder; a mutant that
the tests let pass is printed as SURVIVED, and the script fails. Tests that compare text (docs) and
whole examples are left out: a number has to be what gives the mutant away.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
TESTS = (  # the quick ones first
    "stages", "exactness", "laws", "guard", "lookahead", "family", "policies", "contract",
    "misuse", "structure", "groups", "optax_parity", "checkpoint", "moving", "combinations",
    "corrections", "tracing", "weight_decay",
)  # fmt: skip

FIRST = {
    "now": "corrections", "step": "misuse", "memory": "policies", "update": "stages",
    "checks": "contract", "trees": "contract", "bracket": "contract", "headers": "checkpoint",
    "renamed": "weight_decay",
}  # fmt: skip

# file, what is there (once), what is put in its place, what is wrong then
MUTANTS = [
    ("core/now", "return (1 - b) * x + b * old", "return b * x + (1 - b) * old",
     "the moving average remembers the new"),
    ("core/now", "return (1 - b) * x + b * old", "return x + b * old",
     "the moving average is a sum"),
    ("core/now", "t = jnp.asarray(count, float)", "t = jnp.asarray(count + 1, float)",
     "bias correction off by one"),
    ("core/now", "- power * (t * rest)", "", "the logarithm of a decay is rounded"),
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
    ("stages/weight_decay", "sign * lr * u", "lr * u", "uphill"),
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
    ("checkpoints/headers", "if list(old) != list(new) or not alike:", "if False:",
     "shapes are not compared"),
    ("checkpoints/headers", "if differences and follows:", "if follows:",
     "what a recipe is made of is not compared"),
]  # fmt: skip


def run(file: str, tests: pathlib.Path, package: pathlib.Path) -> tuple[bool, str]:
    """Whether some test fails, and which; the tests of the file first."""
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
        env={"PYTHONPATH": str(package), "PATH": "/usr/bin:/bin", "HOME": str(package)},
        capture_output=True,
        text=True,
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1, failed[0][:110] if failed else f"exit code {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the description")
    only = parser.parse_args().only
    for file, old, _, _ in MUTANTS:
        found = (ROOT / "adaptive_opt" / f"{file}.py").read_text().count(old)
        if found != 1:
            print(f"{file}.py should hold {old!r} once, but does {found} times")
            return 2
    survived = 0
    for file, old, new, what in MUTANTS:
        if only not in what:
            continue
        with tempfile.TemporaryDirectory() as folder:
            copy = pathlib.Path(folder)
            for name in ("adaptive_opt", "benchmarks", "docs", "examples", "tests"):
                shutil.copytree(ROOT / name, copy / name)
            for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
                shutil.copy(ROOT / name, copy / name)
            path = copy / "adaptive_opt" / f"{file}.py"
            path.write_text(path.read_text().replace(old, new))
            start = time.monotonic()
            noticed, where = run(file, copy / "tests", copy)
        survived += not noticed
        verdict = "killed  " if noticed else "SURVIVED"
        print(f"{verdict} {what}: {where} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{survived} survived" if survived else "all killed")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
