"""Second moments with fewer numbers than weights: rows and columns, blocks.

Adafactor's and Adam-mini's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adaptive_opt.core.checks import (
    Hyperparameter,
    check_decay,
    check_fixed,
    check_nonnegative,
    check_whole,
    choose,
)
from adaptive_opt.core.finite import largest_square
from adaptive_opt.core.stage import OneArray, WholeTree, stage
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.tree import OpenStep
from adaptive_opt.core.trees import Tree, path_of
from adaptive_opt.stages.inner_decay import for_every_leaf
from adaptive_opt.stages.matrices import Axes, Layout, check_whole_arrays
from adaptive_opt.stages.moments import absolute_square

FactoredAxes = Literal["longest", "last"]


@stage
def factored_moment(
    b2: Hyperparameter,
    eps: Hyperparameter = 0.0,
    *,
    min_dim_size_to_factor: int = 128,
    axes: FactoredAxes = "longest",
    axis_name: Axes = None,
    name: str = "nu",
    dtype: DTypeLike | None = None,
) -> OneArray:
    """The second moment of a matrix from averages over its rows and columns: ``v = r c / mean(r)``.

    ``r_t`` and ``c_t`` are moving averages, with the decay ``b2``, of the means of ``|g|^2 + eps``
    over each row and over each column. Two axes are factored, of the others every index has rows
    and columns of its own. Vectors, and arrays with no two axes that are long enough, have the
    average of ``|g|^2 + eps`` of every weight. Reads ``gradient``, sets ``second_moment``.
    Adafactor (Shazeer & Stern 2018, arXiv:1804.04235, Algorithm 4).

    Args:
      b2: decay in [0, 1), or a schedule of it; Adafactor's is ``growing_memory()``.
      eps: added to every square, in the units of a squared gradient; at least 0.
      min_dim_size_to_factor: the shortest axis that is factored, at least 1.
      axes: the two "longest" axes (the authors, optax), or the two "last" (transformers).
      axis_name: ``()`` under ``shard_map`` or ``pmap`` where every device has the whole array.
      name: of its buffers: ``nu_rows`` and ``nu_columns``, real, with an axis of length 1 each; of
        what is not factored, ``nu``.
      dtype: the buffers' dtype; default: the parameter's, float32 for 16-bit parameters. That of
        rows and columns is float32 at least.

    Errors: TypeError for a min_dim_size_to_factor that is an array: it decides which buffers there
      are. ValueError under ``shard_map`` or ``pmap`` for what is factored, unless ``axis_name=()``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, factored_moment, per_weight_rate
    >>> moment = factored_moment(0.0, min_dim_size_to_factor=2)
    >>> rule, x = adaptive(moment, per_weight_rate(0.0)), jnp.array([[1.0, 2.0], [2.0, 4.0]])
    >>> update, state = rule.update(x, rule.init(x))
    >>> print(update.round(4), state.buffers["nu_rows"].ravel(), state.buffers["nu_columns"])
    [[1. 1.]
     [1. 1.]] [ 2.5 10. ] [[ 2.5 10. ]]
    """
    check_decay(b2=b2)
    check_nonnegative(eps=eps)
    check_whole(1, min_dim_size_to_factor=min_dim_size_to_factor)
    check_fixed("which buffers there are", min_dim_size_to_factor=min_dim_size_to_factor)
    choose("axes", axes, {"longest": 0, "last": 0})

    def line(step: AdaptiveStep) -> AdaptiveStep:
        squares = absolute_square(step.gradient) + step.at(eps)
        factored = factored_axes(squares.shape, min_dim_size_to_factor, axes)
        if factored is None:
            return step.set(second_moment=step.average(name, squares, b2, dtype=dtype))
        check_whole_arrays(step, axis_name)
        down, along = factored
        rows, columns = (
            step.average(f"{name}_{which}", _mean(squares, (axis,)), b2, dtype=dtype)
            for which, axis in (("rows", along), ("columns", down))
        )
        mean = jnp.mean(rows, axis=down, keepdims=True)
        # The quotient first: a product of two small squares would be 0.
        v = rows / jnp.where(mean == 0, 1, mean) * columns
        v = jnp.where(jnp.isinf(mean), jnp.inf, v)  # and no NaN where squares overflow
        return step.set(second_moment=step.owing(v, b2))

    return line


def _mean(squares: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean over some axes, finite where all the squares are."""
    most = largest_square(squares.dtype) / max(squares.size, 1)
    bounded = jnp.where(jnp.isfinite(squares), jnp.minimum(squares, most), squares)
    return jnp.mean(bounded, axis=axes, keepdims=True)


def factored_axes(shape: tuple[int, ...], least: int, axes: FactoredAxes) -> tuple[int, int] | None:
    """The two axes that are factored, in their order; None where there are none."""
    if len(shape) < 2 or math.prod(shape) == 0:
        return None
    order = range(len(shape)) if axes == "last" else np.argsort(shape, kind="stable").tolist()
    down, along = sorted(order[-2:])
    return None if min(shape[down], shape[along]) < least else (down, along)


BLOCKS = ("weight", "row", "column", "head", "tensor")
"""What has one second moment, in ``block_moment``."""

Blocks = Tree | Callable[[Tree], Tree]
"""A tree of words of BLOCKS like the parameters, a prefix of it, or a function that makes one."""


@stage
def block_moment(
    b2: Hyperparameter,
    blocks: Blocks = "tensor",
    *,
    head_size: int | None = None,
    layout: Layout = "in-out",
    axis_name: Axes = None,
    name: str = "nu",
    dtype: DTypeLike | None = None,
) -> WholeTree:
    """One second moment for each block of weights: the average of the mean of ``|g_t|^2`` in it.

    The blocks of a parameter, by a word:

    * ``"weight"``: every weight by itself, as in ``second_moment``;
    * ``"row"``, ``"column"``: every index of the first axis, or of the last;
    * ``"head"``: every ``head_size`` outputs that follow one another;
    * ``"tensor"``: the whole parameter.

    Reads ``gradient``, sets ``second_moment``. Adam-mini (Zhang et al. 2024, arXiv:2406.16793,
    Algorithm 1).

    Args:
      b2: decay in [0, 1), or a schedule of it.
      blocks: a word, a tree of words like the parameters, or a function that makes one of them:
        ``blocks_by_name``.
      head_size: outputs of an attention head, at least 1; a divisor of a parameter's outputs.
      layout: where the outputs are: "in-out", on all axes but the first, as in kernels of Flax, or
        "out-in", on the first, as in weights of PyTorch and Equinox.
      axis_name: ``()`` under ``shard_map`` or ``pmap`` where every device has the whole array.
      name: of its buffer ``nu``: real, of the shape of a parameter with 1 in place of the lengths
        that are averaged over; of heads, a vector.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    Errors: ValueError for a word that is none, for a tree unlike the parameters, for outputs that
      head_size does not divide, and under ``shard_map`` or ``pmap``, unless ``axis_name=()``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, block_moment, per_weight_rate
    >>> rule, x = adaptive(block_moment(0.0, "row"), per_weight_rate(0.0)), jnp.zeros((2, 2))
    >>> update, state = rule.update(jnp.array([[1.0, 7.0], [2.0, 2.0]]), rule.init(x))
    >>> print(update * 5, state.buffers["nu"].ravel())
    [[1. 7.]
     [5. 5.]] [25.  4.]
    """
    check_decay(b2=b2)
    choose("layout", layout, {"in-out": 0, "out-in": 0})
    if head_size is not None:
        check_whole(1, head_size=head_size)
        check_fixed("the shape of buffers", head_size=head_size)
    if isinstance(blocks, str):
        choose("blocks", blocks, dict.fromkeys(BLOCKS))

    def line(steps: OpenStep) -> OpenStep:
        words = _words(blocks, steps)
        for i, (step, word) in enumerate(zip(steps.steps, words, strict=True)):
            if step is None:
                continue
            squares = absolute_square(step.gradient)
            if word != "weight":
                check_whole_arrays(step, axis_name)
            if word == "head":
                means, shape = _of_heads(squares, head_size, layout, steps.where(i))
                of_heads = step.average(name, means, b2, dtype=dtype)
                v = jnp.repeat(of_heads, math.prod(shape) // max(means.size, 1)).reshape(shape)
                step.set(second_moment=step.owing(v, b2))
            elif word == "weight":
                step.set(second_moment=step.average(name, squares, b2, dtype=dtype))
            else:
                means = _mean(squares, _averaged(squares.ndim, word))
                step.set(second_moment=step.average(name, means, b2, dtype=dtype))
        return steps

    return WholeTree(line)


def _words(blocks: Blocks, steps: OpenStep) -> list[str]:
    """The word for every leaf."""
    like = steps.gradient if steps.params is None else steps.params
    given = blocks(like) if callable(blocks) else blocks
    words = for_every_leaf(given, steps, like, "the blocks", "words")
    for i, word in enumerate(words):
        if steps.steps[i] is not None:
            choose(f"{steps.now.stage}: the block{steps.where(i)}", word, dict.fromkeys(BLOCKS))
    return words


def _averaged(axes: int, word: str) -> tuple[int, ...]:
    """The axes over which a block reaches."""
    kept = {"row": 0, "column": axes - 1, "tensor": None}[word]
    return tuple(i for i in range(axes) if i != kept)


def _of_heads(x: jax.Array, head_size: int | None, layout: Layout, at: str) -> tuple[Any, Any]:
    """The mean of every head, and the shape of one number for each output."""
    outputs = x.shape[:1] if layout == "out-in" else x.shape[1:]
    if x.ndim < 2 or head_size is None or math.prod(outputs) % head_size:
        raise ValueError(
            f"block_moment: the array{at} of shape {x.shape} has {math.prod(outputs)} outputs in"
            f" the layout {layout!r}, which head_size={head_size} must divide. Give head_size, or"
            ' another word than "head" for its blocks.'
        )
    if layout == "out-in":
        heads = x.reshape(outputs[0] // head_size, -1)
        return _mean(heads, (1,)).ravel(), (*outputs, *[1] * (x.ndim - 1))
    heads = x.reshape(x.shape[0], math.prod(outputs) // head_size, head_size)
    return _mean(heads, (0, 2)).ravel(), (1, *outputs)


_BIAS = re.compile("bias")
_EMBEDDING = re.compile("embed|embd|wte")
_HEADS = re.compile("k_proj|q_proj|wq|wk|query|key")
_NEURONS = re.compile(
    r"lm_head|output|final_layer|v_proj|wv|value|o_proj|wo|attn\.proj|feed_forward|linear|mlp"
)


def blocks_by_name(params: Tree, layout: Layout = "in-out") -> Tree:
    """The blocks of a Transformer for ``block_moment``, by the names that Adam-mini's authors know.

    Biases by weight, queries and keys by head, embeddings by token, values, projections, layers of
    an MLP and the output by neuron, and all other parameters by tensor, as in the authors'
    repository zyushun/Adam-mini. What else has fewer than two axes goes by tensor.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import blocks_by_name
    >>> x = jnp.zeros((2, 2))
    >>> blocks_by_name({"wte": x, "query": {"kernel": x, "bias": x[0]}, "mlp": x, "norm": x[0]})
    {'mlp': 'column', 'norm': 'tensor', 'query': {'bias': 'weight', 'kernel': 'head'}, 'wte': 'row'}
    """

    def word(path: Any, x: Any) -> str:
        name = path_of(path).replace("/", ".").lower()
        if _BIAS.search(name):
            return "weight"
        if jnp.ndim(x) < 2:
            return "tensor"
        if _HEADS.search(name):
            return "head"
        if _EMBEDDING.search(name):
            return "row"
        if _NEURONS.search(name):
            return "row" if layout == "out-in" else "column"
        return "tensor"

    return jax.tree_util.tree_map_with_path(word, params)
