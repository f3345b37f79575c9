"""A training step that goes through deep models one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax

from adaptive_opt.core.apply import update_and_apply
from adaptive_opt.core.checks import check_optimizer
from adaptive_opt.core.describe import check_order
from adaptive_opt.core.reach import reach
from adaptive_opt.core.trees import Tree, downhill


class Layered(NamedTuple):
    """Parameters of a model in layers, or the state of an optimizer for each of its parts.

    ``layers`` is a list of trees, alike in structure and shapes; ``first`` and ``last`` are ()
    where nothing is to be trained.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import Layered
    >>> params = Layered(first=(), layers=[jnp.eye(2)] * 3, last=jnp.ones(2))
    >>> len(jax.tree.leaves(params))
    4
    """

    first: Tree
    layers: Sequence[Tree]
    last: Tree


def step_by_layer(
    first: Callable[..., Any],
    layer: Callable[..., Any],
    last: Callable[..., Any],
    optimizer: optax.GradientTransformation,
) -> StepByLayer:
    """A training step of one program for each kind of layer, which never holds all gradients.

    For models that are deep and of equal layers, which people put under ``jax.lax.scan`` because
    compiling them one by one takes too long. Under ``scan`` all gradients are there at once: XLA
    plans temporaries of more than the size of the parameters. Here the layers are separate arrays,
    and one compiled program takes all of them in turn: forwards, keeping what goes into each layer;
    then backwards, where it calculates the layer once more, its gradient, and the update at once,
    in place. Temporaries are what goes into the layers, and one layer's gradient.

    It costs time: each layer is calculated forwards twice, as under ``jax.checkpoint``, and two
    programs are started for each.

    The loss is ``last(params.last, h, *args)``, where ``h`` has gone through ``first(params.first,
    *args)`` and through ``layer(p, h)`` for each ``p`` of ``params.layers``.

    Args:
      first: from the first parameters and the step's arguments to what goes into the first layer;
        an embedding, say.
      layer: from the parameters of a layer and what goes in to what comes out, alike in shape.
      last: from the last parameters, what comes out of the last layer, and the step's arguments to
        the loss, a scalar.
      optimizer: any optax optimizer whose updates are for each weight or tensor by itself. It sees
        the parameters of each part alone, so masks and groups go by paths within a layer.

    Returns:
      ``step``, where ``step(params, state, *args) -> (params, state, loss)`` with ``params`` a
      ``Layered`` and ``state`` what ``step.init(params)`` returns, the state of each part. Both
      are donated. ``memory_plan(step, params, state, *args)`` is its plan.

    TypeError for an ``optimizer`` that is none. ValueError, at ``step.init``, for an optimizer
    whose updates need all gradients, such as clipping by the global norm.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import Layered, adamw, step_by_layer
    >>> step = step_by_layer(
    ...     first=lambda p, x, y: x @ p,
    ...     layer=lambda p, h: h + jnp.tanh(h @ p),
    ...     last=lambda p, h, x, y: jnp.mean((h @ p - y) ** 2),
    ...     optimizer=adamw(1e-2),
    ... )
    >>> params = Layered(jnp.ones((2, 4)), [jnp.eye(4)] * 3, jnp.ones(4))
    >>> params = jax.tree.map(jnp.copy, params)  # they are donated: each its own array
    >>> state = step.init(params)
    >>> for _ in range(3):
    ...     params, state, loss = step(params, state, jnp.ones((8, 2)), jnp.zeros(8))
    >>> int(state.layers[2][0].count)
    3
    """
    check_optimizer("step_by_layer", optimizer)
    check_order(optimizer)
    return StepByLayer(first, layer, last, optax.with_extra_args_support(optimizer))


class StepByLayer:
    """What ``step_by_layer`` makes."""

    def __init__(
        self,
        first: Callable[..., Any],
        layer: Callable[..., Any],
        last: Callable[..., Any],
        optimizer: optax.GradientTransformationExtraArgs,
    ) -> None:
        self._optimizer = optimizer

        def updated(gradients: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
            return update_and_apply(optimizer, downhill(gradients), state, params)

        def end(params: Tree, state: Any, x: Any, args: Any) -> Any:
            differentiated = jax.value_and_grad(last, argnums=(0, 1))
            loss, (gradients, back) = differentiated(params, x, *args)
            return *updated(gradients, state, params), back, loss

        def back_through(params: Tree, state: Any, back: Any, x: Any) -> Any:
            gradients, back = jax.vjp(layer, params, x)[1](back)
            return *updated(gradients, state, params), back

        def begin(params: Tree, state: Any, back: Any, args: Any) -> Any:
            (gradients,) = jax.vjp(lambda p: first(p, *args), params)[1](back)
            return updated(gradients, state, params)

        self._first: Any = jax.jit(lambda params, args: first(params, *args))
        self._layer: Any = jax.jit(lambda params, h: layer(params, h))
        self._end: Any = jax.jit(end, donate_argnums=(0, 1, 2))
        self._back: Any = jax.jit(back_through, donate_argnums=(0, 1, 2))
        self._begin: Any = jax.jit(begin, donate_argnums=(0, 1))

    def init(self, params: Layered) -> Layered:
        """The state of each part; ValueError where the optimizer needs all gradients."""
        few = params._replace(layers=list(params.layers[:2]))
        found = reach(self._optimizer, few, few)
        if found.scope == "tree":
            raise ValueError(
                f"step_by_layer updates each layer before it knows the gradients of those below,"
                f" but this optimizer looks at all of them: {found}. Leave it out, or use"
                " clip_update_rms, which bounds each tensor's update by itself."
            )
        init = self._optimizer.init
        return Layered(init(params.first), [init(p) for p in params.layers], init(params.last))

    def __call__(self, params: Layered, state: Layered, *args: Any) -> tuple[Layered, Layered, Any]:
        """The new parameters and state, and the loss."""
        kept = [self._first(params.first, args)]
        for p in params.layers:
            kept.append(self._layer(p, kept[-1]))
        last, of_last, back, loss = self._end(params.last, state.last, kept.pop(), args)
        layers, of_layers = list(params.layers), list(state.layers)
        for i in reversed(range(len(layers))):
            layers[i], of_layers[i], back = self._back(layers[i], of_layers[i], back, kept.pop())
        first, of_first = self._begin(params.first, state.first, back, args)
        return Layered(first, layers, last), Layered(of_first, of_layers, of_last), loss

    def lowered(self, params: Layered, state: Layered, *args: Any) -> Iterator[Any]:
        """Its programs for arguments like these, as ``jax.jit`` lowers them."""
        x = self.between(params, *args)
        yield self._first.lower(params.first, args)
        yield self._end.lower(params.last, state.last, x, args)
        yield self._begin.lower(params.first, state.first, x, args)
        for p, of_p in zip(params.layers[:1], state.layers[:1], strict=True):
            yield self._layer.lower(p, x)
            yield self._back.lower(p, of_p, x, x)

    def between(self, params: Layered, *args: Any) -> Any:
        """The shape of what goes from layer to layer, on the devices of the parameters."""
        where = {getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)}
        sharding = where.pop() if len(where) == 1 else None
        x = jax.eval_shape(self._first, params.first, args)
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), x)
