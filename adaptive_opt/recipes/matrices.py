"""Optimizers of matrices, with another for the rest: Muon, AdamH."""

from __future__ import annotations

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_opt.core.bracket import adaptive
from adaptive_opt.core.checks import Hyperparameter
from adaptive_opt.core.describe import transformation
from adaptive_opt.core.observe import Observers, told
from adaptive_opt.core.recipe import recipe
from adaptive_opt.core.trees import Tree, path_of
from adaptive_opt.recipes.adam import adamw
from adaptive_opt.stages.matrices import Axes, Layout, ahead_of, orthogonalize, scale_by_shape
from adaptive_opt.stages.modifiers import hyperball
from adaptive_opt.stages.moments import debias, first_moment, second_moment
from adaptive_opt.stages.rates import per_weight_rate
from adaptive_opt.stages.weight_decay import Mask, with_decay

NOT_HIDDEN = re.compile(r"embed|head|output|vocab|wte|wpe|logits", re.IGNORECASE)


def hidden_matrices(params: Tree) -> Tree:
    """Which parameters are hidden matrices: two axes or more, and no embedding or head by name.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import hidden_matrices
    >>> shapes = {"embedding": (9, 2), "dense": {"kernel": (2, 2), "bias": (2,)}, "head": (2, 9)}
    >>> params = {k: jnp.ones(s) for k, s in shapes.items() if k != "dense"}
    >>> hidden_matrices(params | {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}})
    {'dense': {'bias': False, 'kernel': True}, 'embedding': False, 'head': False}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.ndim(x) >= 2 and NOT_HIDDEN.search(path_of(path)) is None, params
    )


@recipe
def muon(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.95,
    *,
    nesterov: bool = True,
    steps: int = 5,
    shape: Literal["spectral", "rms", "none"] = "spectral",
    layout: Layout = "in-out",
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled"] = "decoupled",
    matrices: Mask | None = None,
    rest_learning_rate: Hyperparameter = 3e-4,
    rest_b1: Hyperparameter = 0.9,
    rest_b2: Hyperparameter = 0.95,
    rest_eps: Hyperparameter = 1e-10,
    rest_weight_decay: Hyperparameter | None = None,
    convention: Literal["reference", "torch"] = "reference",
    axis_name: Axes = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Matrices by the orthogonalised momentum, the rest by AdamW: ``x - lr (O_t + wd x)``.

    ``O_t`` is the momentum ``m_t``, or ``b1 m_t + (1 - b1) g_t`` with ``nesterov``, with its
    singular values near 1, see ``orthogonalize``, times a factor for its shape. Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon. Equals the author's ``SingleDeviceMuonWithAuxAdam``
    (KellerJordan/Muon) and ``torch.optim.Muon``, both of which calculate the orthogonalisation in
    bfloat16; this one in float32 at least, and in float64 where the parameters are.

    Use it for the hidden matrices of Transformers: they keep one buffer, and steps and tokens are
    saved at equal loss. Vectors, embeddings and the head stay with AdamW.

    Do without it where batches are small, as its products of matrices cost the same at any batch;
    and on other problems than those above: of HeavyBall's LightBench it passes 51.0 %, AdamW 72.3
    %.

    Args:
      learning_rate: of the matrices; with shape="spectral" about 0.02, with "rms" as AdamW's.
      b1: the decay of the momentum.
      nesterov: see above.
      steps: Newton-Schulz steps.
      shape, layout: see ``scale_by_shape``.
      weight_decay, mask: of the matrices; see ``adamw``.
      decay: "decoupled": times the learning rate and its schedule.
      matrices: which parameters are matrices, as a mask; default: ``hidden_matrices``.
        Arrays of more than two axes are stacks of matrices in their last two: keep kernels of
        convolutions out.
      rest_learning_rate, rest_b1, rest_b2, rest_eps, rest_weight_decay: of ``adamw`` for the rest;
        the decay is by default that of the matrices.
      convention: "reference": the norm plus 1e-7; "torch": the norm, at least 1e-7.
      axis_name: see ``orthogonalize``.
      observers: they look at the matrices.
      state_dtype: see ``adam``.

    State: that of ``optax.partition``, with ``mu`` for matrices, ``mu`` and ``nu`` for the rest.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import muon
    >>> x = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    >>> optimizer = muon(0.1, rest_learning_rate=0.01)
    >>> updates, state = optimizer.update(x | {"bias": jnp.ones(2)}, optimizer.init(x), x)
    >>> print(round(float(updates["kernel"][0, 0]), 3), updates["bias"].round(3))
    -0.111 [-0.01 -0.01]
    """
    eps_is: Any = "added" if convention == "reference" else "floor"
    known = {"learning_rate": learning_rate, "b1": b1, "weight_decay": weight_decay}
    orthogonal = adaptive(
        first_moment(b1),
        *((ahead_of(b1),) if nesterov else ()),
        orthogonalize(steps, eps_is=eps_is, axis_name=axis_name),
        scale_by_shape(shape, layout, axis_name=axis_name),
        *told(observers, known, (learning_rate,)),
        state_dtype=state_dtype,
    )
    of_matrices = optax.chain(*with_decay(decay, weight_decay, mask, orthogonal, learning_rate))
    of_the_rest = adamw(
        rest_learning_rate,
        rest_b1,
        rest_b2,
        rest_eps,
        weight_decay=weight_decay if rest_weight_decay is None else rest_weight_decay,
        mask=mask,
        state_dtype=state_dtype,
    )

    return _each_its_own(
        {"matrices": of_matrices, "rest": of_the_rest}, matrices or hidden_matrices
    )


@recipe
def adamh(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.95,
    eps: Hyperparameter = 1e-8,
    *,
    matrices: Mask | None = None,
    rest_learning_rate: Hyperparameter = 6e-4,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled"] = "decoupled",
    axis_name: Axes = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Matrices by Adam on the sphere where they began, the rest by Adam: ``R unit(x - lr R
    unit(u))``.

    ``u`` is Adam's direction, ``R = |x_0|``, see ``hyperball``. Hyperball optimization (Wen et al.
    2026, arXiv:2606.16899). Equals ``scale_by_adamh`` of Levanter (marin-community/marin,
    ``optim/adamh.py``) for arrays of two and three axes. That takes the norm of today's x for R,
    the same but for rounding, divides by norms of at least 1e-10, and makes a NaN of a matrix of
    zeros, which here stays as it is. Its clipping of gradients is not copied: put
    ``optax.clip_by_global_norm`` in front.

    Use it in place of AdamW for hidden matrices: with one learning rate for all widths, and no
    weight decay to tune.

    Do without it where the length of a matrix matters, as it does without a normalisation behind
    it.

    Args:
      learning_rate: of the matrices, an angle, in units of their norm; about ``sqrt(lr wd)`` of an
        AdamW.
      b1, b2, eps: see ``adam``; of both.
      matrices: which parameters are matrices, as a mask; default: ``hidden_matrices``. Arrays of
        more than two axes are stacks of matrices in their last two.
      rest_learning_rate: of Adam for the rest.
      weight_decay, mask: of the rest, see ``adamw``: on a sphere nothing decays.
      decay: "decoupled": times the learning rate of the rest and its schedule.
      axis_name: see ``orthogonalize``.
      observers: they look at the matrices.
      state_dtype: see ``adam``.

    State: that of ``optax.partition``, with ``mu`` and ``nu`` for all, ``radius`` for matrices.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adamh
    >>> x = {"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.zeros(1)}
    >>> optimizer = adamh(1.0, rest_learning_rate=0.125)
    >>> g = {"kernel": jnp.array([[0.0, 2.0]]), "bias": jnp.ones(1)}
    >>> updates, state = optimizer.update(g, optimizer.init(x), x)
    >>> print((x["kernel"] + updates["kernel"]).round(4), updates["bias"].round(4))
    [[ 0.7071 -0.7071]] [-0.125]
    """
    on_the_sphere = adaptive(
        first_moment(b1),
        second_moment(b2),
        debias(b1, b2),
        per_weight_rate(eps),
        hyperball(learning_rate, scope="matrix", axis_name=axis_name),
        *told(observers, {"learning_rate": learning_rate, "b1": b1}, ()),
        state_dtype=state_dtype,
    )
    of_matrices = optax.chain(on_the_sphere, optax.scale(-1.0))
    of_the_rest = adamw(
        rest_learning_rate,
        b1,
        b2,
        eps,
        weight_decay=weight_decay,
        mask=mask,
        decay=decay,
        state_dtype=state_dtype,
    )
    return _each_its_own(
        {"matrices": of_matrices, "rest": of_the_rest}, matrices or hidden_matrices
    )


def _each_its_own(
    transforms: dict[Any, optax.GradientTransformation], matrices: Mask
) -> optax.GradientTransformationExtraArgs:
    """``optax.partition`` by what the parameters are, even where a gradient is missing."""

    def among(params: Tree) -> optax.GradientTransformationExtraArgs:
        chosen = matrices(params) if callable(matrices) else matrices
        labels = jax.tree.map(lambda is_matrix: "matrices" if is_matrix else "rest", chosen)
        return optax.partition(transforms, labels)

    def init(params: Tree) -> Any:
        return among(params).init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        known = updates if params is None else params
        return among(known).update(updates, state, params, **extra)

    plain = optax.GradientTransformationExtraArgs(init, update)
    return transformation("partition", {}, plain, transforms.values(), keys=transforms)
