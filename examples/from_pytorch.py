"""Go on in JAX where a run of PyTorch stopped: weights, moments, groups, step for step the same.

    python examples/from_pytorch.py

``torch_run.npz`` holds what PyTorch saved after 30 steps of AdamW with two parameter groups, as
arrays, so that PyTorch is not needed here: ``model.state_dict()``, ``optimizer.state_dict()``, the
order of the parameters, and, to compare with, gradients and weights of 100 steps that followed
there. Prints the groups as they are here, and the largest difference from PyTorch's weights after
1 to 100 more steps, in float64; draws it. With a file of ``torch.save`` only ``load`` is another:
docs/move_a_pytorch_run.md.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from helpers import look, parsed, parser_of, picture, table

from adaptive_opt import Group, ParameterGroups, adamw, import_torch_params, import_torch_state

FILE = pathlib.Path(__file__).parent / "torch_run.npz"
COMPARED = (1, 2, 5, 10, 30, 100)
"""After which steps there PyTorch's weights were kept."""


class Model(nnx.Module):
    """That of the run: in PyTorch two ``nn.Linear(2, 3)`` and a scale."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.body = nnx.Linear(2, 3, param_dtype=float, rngs=rngs)
        self.head = nnx.Linear(2, 3, param_dtype=float, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(2))


NAMES = {
    "body/kernel": "body.weight",
    "body/bias": "body.bias",
    "head/kernel": "head.weight",
    "head/bias": "head.bias",
    "scale": "scale",
}
"""What each parameter here is called in PyTorch."""


def load(path: pathlib.Path) -> dict[str, Any]:
    """The run: what ``torch.load`` returns for ``{"model": ..., "optimizer": ..., "order": ...}``,
    and beside it what happened there afterwards."""
    with np.load(path) as file:
        arrays = dict(file)

    def restored(x: Any) -> Any:
        if isinstance(x, dict):
            found = [(key, restored(value)) for key, value in x.get("dict", [])]
            return arrays[f"array|{x['array']}"] if "array" in x else dict(found)
        return [restored(item) for item in x] if isinstance(x, list) else x

    def named(kind: str) -> dict[str, np.ndarray]:
        return {name: arrays[f"{kind}|{name}"] for name in NAMES.values()}

    return {
        "model": named("before"),
        "optimizer": restored(json.loads(str(arrays["state_dict"]))),
        "order": [str(name) for name in arrays["order"]],
        "gradients": named("gradients"),
        "after": named("after"),
    }


def move(run: dict[str, Any]) -> tuple[optax.GradientTransformationExtraArgs, Any, Any, str]:
    """The optimizer here, the parameters and its state, and the table of its groups."""
    params = import_torch_params(run["model"], nnx.state(Model(nnx.Rngs(0)), nnx.Param), NAMES)
    groups = ParameterGroups(
        [Group("^head", learning_rate=10.0, weight_decay=0.0)], default=Group()
    )
    optimizer = groups.optimizer(adamw, learning_rate=1e-2, weight_decay=0.1)
    state = import_torch_state(run["optimizer"], optimizer, params, NAMES, order=run["order"])
    return optimizer, params, state, str(groups.report(params))


def draw(worst: Sequence[float], path: str) -> None:
    """How far the weights are from PyTorch's, and the 1e-12 that the tests allow."""
    title = f"Moved here, the run stays within {max(worst):.0e} of PyTorch's"
    with picture(path, title, figsize=(6, 3.2)) as axes:
        axes.plot(COMPARED[: len(worst)], np.maximum(worst, 1e-17), marker="o", **look(0))
        axes.axhline(1e-12, color="0.5", linewidth=0.8)
        axes.text(1, 1.3e-12, "what the tests allow", size=8.5, color="0.3")
        axes.set(xscale="log", yscale="log", ylim=(1e-17, 1e-11), xlabel="steps after the move")
        axes.set(ylabel="largest difference of a weight")


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=100, help="steps to go on, up to 100 (100)")
    parser.add_argument("--output", default="from_pytorch.png", help="(from_pytorch.png)")
    options = parsed(parser, arguments)
    with jax.enable_x64(True):
        run = load(FILE)
        optimizer, params, state, report = move(run)
        print(report, "\n")
        update, rows, worst = jax.jit(optimizer.update), [], []
        for step in range(1, min(options.steps, 100) + 1):
            there = {name: array[step - 1] for name, array in run["gradients"].items()}
            gradients = import_torch_params(there, params, NAMES)
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            if step in COMPARED:
                index = COMPARED.index(step)
                there = {name: array[index] for name, array in run["after"].items()}
                expected = import_torch_params(there, params, NAMES)
                pairs = zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True)
                worst.append(max(float(jnp.abs(a - b).max()) for a, b in pairs))
                rows.append({"steps here": str(step), "from PyTorch": f"{worst[-1]:.1e}"})
    print(table(rows))
    draw(worst, options.output)
    print(f"The picture is in {options.output}.")
    return worst


if __name__ == "__main__":
    main()
