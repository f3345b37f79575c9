"""From the state of one optimizer to that of another."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import jax
import optax

from adaptive_opt.checkpoints.buffers import put_together
from adaptive_opt.checkpoints.counting import number_of_gradients
from adaptive_opt.checkpoints.found import found_in
from adaptive_opt.core.describe import describe
from adaptive_opt.core.observe import Observation
from adaptive_opt.core.trees import Tree


def convert_state(
    state: Any,
    source: optax.GradientTransformation,
    target: optax.GradientTransformation,
    params: Tree,
    *,
    count: int | None = None,
    drop: Collection[str] = (),
) -> Any:
    """The state with which ``target`` goes on where ``source`` stopped.

    Both are optimizers of this library or of optax, in any nest of wrappers: ``skip_nonfinite``,
    ``lookahead``, ``low_memory``, ``ParameterGroups``, ``optax.MultiSteps``,
    ``inject_hyperparams``, ``apply_if_finite``, ``masked``, ``partition``, chains. Between two that
    compute the same the next steps are those of an uninterrupted run.

    A buffer is found by its name, of every parameter, and asked what it means: the lines that make
    it are run on made-up numbers. Where the meaning is another, it is converted if that is exact
    (Keras's velocity is PyTorch's times a constant learning rate; optax's RMSprop keeps the
    negative), and refused otherwise. Of the hyperparameters of ``source`` nothing is taken over.

    Where ``target`` remembers more than ``source``:

    * the maximum of AMSGrad (``nu_max``) starts at the present second moment;
    * the average of rates of AdaMod and DiffMod (``rate_ema``) starts at the present rate of each
      weight, as if it had been that for ever, and at 0 where no gradient has been seen;
    * the gradient before (``previous_gradient``) of diffGrad and DiffMod is the first moment;
    * slow weights start at the parameters, and a wrapper that ``source`` has not got at its
      beginning: a new ``lookahead`` pulls after a whole period. One that both have stays where it
      was.

    What several parameters have together (a number of the tree, the count and the product of a
    group, what ``MultiSteps`` has added up, what a plateau has seen) goes to the same parameters,
    whatever their group is called, and is refused for others.

    A count is that of the same thing in ``source``: what is inside of a guard or of ``MultiSteps``
    counts other gradients than what is outside. Parameters that ``target`` freezes lose what was
    remembered of them; a group of parameters that ``source`` had frozen starts anew. A state of
    ``low_memory`` is decoded, and encoded as it would be after the last step; what the parameters
    of ``master_weights`` leave out goes from one kind of residual to another, to the nearest.

    Args:
      state: a state of ``source``; an ``nnx.Optimizer`` with its transformation as ``source``, or
        its ``nnx.state``. What comes back is a plain state, as ``target.init`` makes it:
        ``nnx.update(optimizer.opt_state, nnx.state(state))`` puts it into another one.
      source: the optimizer that made it.
      target: the optimizer that is to go on.
      params: the parameters at this point; ``nnx.state(model, nnx.Param)`` with nnx.
      count: how many gradients ``state`` has seen, a whole number; needed only where it does not
        say (sgd and rmsprop of optax), or where its counts differ and ``target`` has one for them
        all: one of those then. It may not contradict the state.
      drop: the names of buffers that may be lost: ``drop={"rate_ema"}`` from AdaMod back to Adam.
        What ``target`` needs of them is derived, if it can be.

    Raises:
      ValueError: a buffer has no place in the new state (it would be lost), or cannot be derived,
        or means something else there, or the source is in the middle of an accumulation; or
        ``count`` and ``drop`` do not fit. The message says all of it, by the paths of ``params``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adamod, convert_state
    >>> x = jnp.array([1.0, -2.0])
    >>> adam = optax.adam(1e-3)
    >>> _, state = adam.update(x, adam.init(x), x)
    >>> state = convert_state(state, adam, adamod(1e-3), x)
    >>> print(state[0].count, state[0].buffers["rate_ema"])
    1 [0.01  0.005]
    """
    params = _plain(params)
    if count is not None:
        count = number_of_gradients(count, "count=")
    expected = jax.eval_shape(source.init, params)
    state = _plain(state, expected)
    there, wanted = _paths(state), _paths(expected)
    if there != wanted:  # structures may differ: a named_chain makes an OrderedDict of a dict
        raise ValueError(
            f"the state is not one of the source, {describe(source).name}, for these parameters:"
            f" {_told_apart(there, wanted)}."
        )
    found = found_in(source, state, params)
    return put_together(target, params, found, count, drop=drop)


def _plain(tree: Any, expected: Any = None) -> Any:
    """What nnx keeps in variables, as optax made it; anything else as it is."""
    nnx: Any = sys.modules.get("flax.nnx")  # who has not imported it has none of its objects
    if nnx is None:
        return tree
    if isinstance(tree, nnx.Optimizer):
        tree = tree.opt_state
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    if any(isinstance(x, nnx.Variable) for x in leaves):
        tree = nnx.as_pure(tree)
    if expected is None or not isinstance(tree, nnx.State) or "opt_state" not in tree:
        return tree
    with_paths, structure = jax.tree_util.tree_flatten_with_path(expected)
    there = {_simple(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree["opt_state"])[0]}
    if {_simple(path) for path, _ in with_paths} != set(there):
        return tree
    return structure.unflatten([there[_simple(path)] for path, _ in with_paths])


def _paths(tree: Any) -> list[str]:
    """Of all arrays, but for what observers saw: it is not moved, and may be of another version."""
    with_paths = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, Observation)
    )[0]
    return [jax.tree_util.keystr(path) for path, _ in with_paths]


def _told_apart(there: list[str], wanted: list[str]) -> str:
    """What one state has and the other has not."""
    said = [
        f"{whose} {', '.join(few[:4])}{f' and {len(few) - 4} more' if len(few) > 4 else ''}"
        for whose, some, others in (("it has no", wanted, there), ("it has besides", there, wanted))
        if (few := [path or "array that is all of it" for path in some if path not in {*others}])
    ]
    return "; ".join(said) or "it has its parts in another order"


def _simple(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
