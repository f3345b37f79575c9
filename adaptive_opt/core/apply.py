"""From gradients to new parameters: update and apply, or both at once where an optimizer can."""

from __future__ import annotations

from typing import Any

import optax

from adaptive_opt.core.trees import Tree


class AppliesItself(optax.GradientTransformationExtraArgs):
    """A transformation that can update and apply at once, besides what every transformation can."""

    def update_and_apply(
        self, gradients: Tree, state: Any, params: Tree, **extra: Any
    ) -> tuple[Tree, Any]:
        """New parameters and state: those of ``update`` and ``optax.apply_updates``."""
        updates, state = self.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state


def update_and_apply(
    optimizer: optax.GradientTransformation,
    gradients: Tree,
    state: Any,
    params: Tree,
    **extra: Any,
) -> tuple[Tree, Any]:
    """New parameters and state, by any optimizer."""
    if not isinstance(optimizer, AppliesItself):
        optimizer = AppliesItself(*optax.with_extra_args_support(optimizer))
    return optimizer.update_and_apply(gradients, state, params, **extra)
