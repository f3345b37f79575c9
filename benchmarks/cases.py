"""The models whose parameters are stepped: shapes only, no computation."""

from __future__ import annotations

import numpy as np

Shapes = dict[str, tuple[int, ...]]


def leaf(elements: int) -> Shapes:
    """One large array."""
    return {"weight": (elements,)}


def transformer(width: int, layers: int = 12) -> Shapes:
    """A GPT of 12 leaves a layer, embeddings and a last norm: 148 leaves."""
    shapes: Shapes = {"tokens": (32 * width, width), "positions": (512, width)}
    for i in range(layers):
        block = {
            "attention/in": (width, 3 * width),
            "attention/out": (width, width),
            "mlp/in": (width, 4 * width),
            "mlp/out": (4 * width, width),
        }
        for name, (rows, columns) in block.items():
            shapes[f"{i}/{name}/kernel"] = (rows, columns)
            shapes[f"{i}/{name}/bias"] = (columns,)
        for norm in ("norm1", "norm2"):
            shapes[f"{i}/{norm}/scale"] = shapes[f"{i}/{norm}/bias"] = (width,)
    return shapes | {"norm/scale": (width,), "norm/bias": (width,)}


def small(leaves: int) -> Shapes:
    """Many vectors of 64 to 4096 numbers, of all sizes alike on a logarithmic scale."""
    sizes = 2 ** np.random.default_rng(0).uniform(6, 12, leaves)
    return {f"{i:05d}": (int(size),) for i, size in enumerate(sizes)}


def elements(shapes: Shapes) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


def arrays(shapes: Shapes, seed: int, scale: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()
    }
