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
)  # fmt: skip

FIRST = {"policies": "contract", "bracket": "contract", "step": "policies"}

# file, what is there (once), what is put in its place, what is wrong then
MUTANTS = [
    ("moments", "return (1 - decay) * new + decay * average",
     "return decay * new + (1 - decay) * average",
     "the moving average remembers the new"),
    ("moments", "return (1 - decay) * new + decay * average", "return new + decay * average",
     "the moving average is a sum"),
    ("moments", "return 1 - step.at(decay) ** jnp.asarray(count, float)",
     "return 1 - step.at(decay) ** jnp.asarray(count + 1, float)", "bias correction off by one"),
    ("moments", "step.map(divided, step.direction, by=c1)", "step.direction",
     "no bias correction of the first moment"),
    ("moments", "step.map(divided, step.second_moment, by=c2)", "step.second_moment",
     "no bias correction of the second moment"),
    ("moments", "step.map(jnp.maximum, nu_max, step.second_moment)",
     "step.map(jnp.minimum, nu_max, step.second_moment)", "AMSGrad takes the minimum"),
    ("moments", "return step.replace(second_moment=nu_max), nu_max",
     "return step.replace(second_moment=step.second_moment), nu_max",
     "AMSGrad's maximum is kept and not used"),
    ("moments", "(x.conj() * x).real", "(x * x).real", "the square of a complex number"),
    ("moments", "b * (m / next) + (1 - b) * (g / now)", "b * (m / now) + (1 - b) * (g / now)",
     "Nesterov corrected for the wrong step"),
    ("moments", "for n in (t, t + 1))", "for n in (t, t))", "NAdam does not look ahead"),
    ("moments", "jnp.maximum(v - absolute_square(n), 0)", "v", "the variance is not centered"),
    ("moments", "lambda d, w, *, mu, undamped: mu * w + undamped * d",
     "lambda d, w, *, mu, undamped: mu * w + d", "no dampening"),
    ("rates", "lambda v, *, eps, eps_root: jnp.sqrt(v + eps_root) + eps",
     "lambda v, *, eps, eps_root: jnp.sqrt(v + eps_root + eps)", "eps under the root"),
    ("rates", "lambda v, *, eps, eps_root: jnp.sqrt(v + eps_root) + eps",
     "lambda v, *, eps, eps_root: jnp.sqrt(v) + eps", "eps_root is forgotten"),
    ("rates", "root = jnp.sqrt(bias_correction(b2, step))", "root = bias_correction(b2, step)",
     "no root of the correction in the eps-hat form"),
    ("rates", "(lambda r, s: (r + s) / 2) if average else jnp.minimum",
     "(lambda r, s: (r + s) / 2) if average else jnp.maximum", "AdaMod bounds from below"),
    ("rates", "return step.replace(rate=step.map(bounded, step.rate, rate_ema)), rate_ema",
     "return step.replace(rate=rate_ema), rate_ema", "AdaMod follows its average"),
    ("rates", "jnp.where(v == 0, jnp.zeros_like(r), r)", "r", "nothing is muted"),
    ("rates", "1 - 1 / steps(count)) if callable(steps) else 1 - 1 / steps",
     "1 - 1 / steps(count)) if callable(steps) else 1 - 1 / (steps + 1)",
     "the length of AdaMod's memory is off by one"),
    ("rates", '"high": final * (1 + 1 / t)', '"high": final * (1 + 1 / (t + 1))',
     "AdaBound's upper bound"),
    ("rates", "reliable = rho >= step.at(threshold)",
     "reliable = rho >= step.at(threshold) + 0.5",
     "RAdam's threshold"),
    ("rates", "(rho - 4) / (limit - 4) * (rho - 2) / (limit - 2) * limit / rho",
     "(rho - 4) / (limit - 4) * (rho - 2) / (limit - 2)", "RAdam's rectifier lacks a factor"),
    ("rates", "early = t * (1 - 2 * h(jnp.minimum(x, 0.5))) + 2 * h(a)",
     "early = t * (1 - 2 * h(jnp.minimum(x, 0.5)))", "rho off by 1/6 of a"),
    ("friction", "jax.nn.sigmoid(jnp.abs(before - g)),", "jax.nn.sigmoid(before - g),",
     "friction without the absolute value"),
    ("friction", "return friction(gradient, before)", "return jnp.ones_like(gradient)",
     "friction is forgotten"),
    ("friction", "step.map(copied, step.gradient, before)",
     "step.map(copied, step.direction, before)",
     "the direction before in place of the gradient before"),
    ("weight_decay", "u + s * jnp.sign(x)", "u + s * x", "l1 decay is l2"),
    ("weight_decay", "combine_leaves(u, x, s=lr * s)", "combine_leaves(u, x, s=s)",
     "decay without the learning rate"),
    ("weight_decay", "sign * lr * u", "lr * u", "uphill"),
    ("policies", "return hyperparameter(count - 1)", "return hyperparameter(count)",
     "schedules a step late"),
    ("policies", 'return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else dtype',
     "return dtype", "arithmetic in 16 bits"),
    ("policies", "return new_leaf.astype(dtype_of(old_leaf))", "return new_leaf",
     "buffers change their dtype"),
    ("step", "x / jnp.where(zero, jnp.inf, y)", "x / y",
     "0 / 0 is not 0"),
    ("bracket", "count = jnp.asarray(optax.safe_increment(state.count))\n        step =",
     "count = jnp.asarray(optax.safe_increment(state.count) + 1)\n        step =",
     "the count of a bracket off by one"),
    ("bracket", "count = jnp.asarray(optax.safe_increment(state.count))\n        step =",
     "count = state.count + 1\n        step =", "the count of a bracket overflows"),
    ("lookahead", "s + a * (x + u - s)", "x + a * (x + u - s)",
     "Lookahead forgets its slow weights"),
    ("lookahead", "syncs = count % sync_period == 0", "syncs = count % sync_period == 1",
     "Lookahead syncs a step late"),
    ("guard", "finite = jnp.all(jnp.stack(leaves))", "finite = jnp.any(jnp.stack(leaves))",
     "one finite leaf is enough"),
    ("checkpoint", "elif list(saved[path]) != list(now[path]):", "elif False:",
     "shapes are not compared"),
]  # fmt: skip


def run(file: str, tests: pathlib.Path, package: pathlib.Path) -> tuple[bool, str]:
    """Whether some test fails, and which; the tests of the file first."""
    first = FIRST.get(file, file)
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
            for name in ("adaptive_opt", "benchmarks", "examples", "tests"):
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
