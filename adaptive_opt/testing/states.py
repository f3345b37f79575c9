"""Contracts about the state: it is found, split, saved and read, and is all that is remembered."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adaptive_opt.core.trees import Tree, is_of_keys, path_of
from adaptive_opt.testing.contract import Broken, DoesNotApply, case, contract
from adaptive_opt.testing.subject import STEPS, Subject
from adaptive_opt.testing.trees import copies, expect_bits, normal, raw

UNUSUAL = {"b": (24,), "w": (16, 8)}
"""Shapes that nothing but a copy of the parameters has."""


@contract
def tree_map_params(subject: Subject) -> None:
    """optax.tree_map_params finds what in a state is like the parameters: shardings, masks and
    casts go through it."""
    state = subject.optimizer.init(normal(0, shapes=UNUSUAL))
    seen: list[Any] = []

    def mark(x: Any) -> Any:
        seen.append(x)
        return x

    with case("optax.tree_map_params(optimizer, f, state)"):
        mapped = optax.tree_map_params(subject.optimizer, mark, state)
        if jax.tree.structure(mapped) != jax.tree.structure(state):
            raise Broken("the state comes back with another structure")
        found = {id(x) for x in seen}
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
            if np.shape(leaf) in UNUSUAL.values() and id(leaf) not in found:
                raise Broken(f"the state at {path_of(path)} is like a parameter and not found")


@contract
def shardings(subject: Subject) -> None:
    """What is kept for a parameter lives where the parameter lives, or every device keeps all of
    it."""
    if jax.device_count() < 2:
        raise DoesNotApply("there is one device; ask jax for more with jax_num_cpu_devices=8")
    n = 8 if jax.device_count() >= 8 else 2
    specs = {"b": PartitionSpec("d"), "w": PartitionSpec("d", None)}
    values = normal(0, shapes=UNUSUAL)
    mesh = jax.make_mesh((n,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    params = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in values.items()}
    with case(f"parameters split over {n} devices, optimizer.init"):
        _expect_split(subject.optimizer.init(params), specs)
    mesh = jax.make_mesh((n,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:n])
    with case(f"parameters split over {n} devices along an explicit axis, a step"):
        with jax.set_mesh(mesh):
            shapes = {
                k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[k]))
                for k, x in values.items()
            }
            state = jax.eval_shape(subject.optimizer.init, shapes)
            _expect_split(state, specs)
            updates, after = jax.eval_shape(subject.update, shapes, state, shapes)
        _expect_split(after, specs)
        _expect_split(updates, specs)


def _expect_split(tree: Tree, specs: dict[str, PartitionSpec]) -> None:
    wanted = {UNUSUAL[name]: tuple(spec) for name, spec in specs.items()}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if (expected := wanted.get(np.shape(leaf))) is None:
            continue
        found = getattr(leaf.sharding, "spec", ())
        if (*found, *[None] * (leaf.ndim - len(found))) != expected:
            where = found if leaf.sharding is None or found else leaf.sharding
            raise Broken(f"{path_of(path)} is split as {where} and not as {expected}")


@contract
def resume_from_bytes(subject: Subject) -> None:
    """A run that goes on from the bytes of its state's leaves, put into a new state, goes on bit
    for bit; so every checkpoint works, whatever writes it."""
    for saved in range(STEPS):
        with case(f"saved after {saved} steps"):
            params, state = _restored(subject.compiled[saved], subject.start())
            for gradient in subject.gradients[saved:]:
                params, state = subject.step(copies(params), copies(state), gradient)
            last = subject.compiled[-1]
            expect_bits("after the last step (parameters, state)", (params, state), last)


def _restored(tree: Tree, fresh: Tree) -> Any:
    """The bytes of a tree in the structure, shapes and dtypes of another."""
    if jax.tree.structure(tree) != jax.tree.structure(fresh):
        raise Broken("a new state has another structure")
    saved = [raw(x).tobytes() for x in jax.tree.leaves(tree)]
    into, structure = jax.tree.flatten(fresh)
    return structure.unflatten(_filled(x, data) for x, data in zip(into, saved, strict=True))


def _filled(x: Any, data: bytes) -> Any:
    like = raw(x)
    if len(data) != like.nbytes:
        raise Broken(f"a new state has {like.dtype}{list(like.shape)} for {len(data)} bytes")
    values = jnp.asarray(np.frombuffer(data, like.dtype).reshape(like.shape))
    if is_of_keys(getattr(x, "dtype", None)):
        return jax.random.wrap_key_data(values, impl=jax.random.key_impl(x))
    return values


@contract
def pickled(subject: Subject) -> None:
    """States go to other processes, and into checkpoints, by pickle; deepcopy keeps a
    copy."""
    state = subject.usual[-1].state
    for what, again in (
        ("pickle", lambda x: pickle.loads(pickle.dumps(x))),
        ("deepcopy", copy.deepcopy),
    ):
        with case(what):
            expect_bits("the state", again(state), state)


@contract
def deterministic(subject: Subject) -> None:
    """The same gradients make the same run: what an optimizer remembers is in its state."""
    again = subject.run(subject.params, subject.gradients)
    for t, (one, other) in enumerate(zip(again, subject.usual, strict=True)):
        with case(f"step {t + 1} of a second run"):
            expect_bits("the update", one.updates, other.updates)
            expect_bits("the state", one.state, other.state)


@contract
def inputs_unchanged(subject: Subject) -> None:
    """A step leaves the state and the trees that it is given as they are: one may go back."""
    state = subject.usual[0].state
    given = (subject.gradients[1], state, subject.params)
    leaves, structure = jax.tree.flatten(given)
    before = [raw(x).tobytes() for x in leaves]
    subject.update(*given)
    if jax.tree.structure(given) != structure:
        raise Broken("(gradients, state, parameters) have another structure after the step")
    for (path, leaf), old in zip(
        jax.tree_util.tree_flatten_with_path(given)[0], before, strict=True
    ):
        if raw(leaf).tobytes() != old:
            raise Broken(f"{path_of(path)} of (gradients, state, parameters) has changed")


@contract
def counts_saturate(subject: Subject) -> None:
    """A count that wraps to a negative number after 2^31 steps starts a warm-up, or makes a NaN."""
    last = np.iinfo(np.int32).max
    start = subject.usual[-1]
    state = jax.tree.map(lambda x: jnp.full_like(x, last) if _is_count(x) else x, start.state)
    with case(f"a count of {last}"):
        updates, after = subject.update(subject.gradients[0], state, start.params)
        for path, leaf in jax.tree_util.tree_flatten_with_path(after)[0]:
            if _is_count(leaf) and leaf < 0:
                raise Broken(f"the state at {path_of(path)} is {leaf} after one more step")
        for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0]:
            if not np.isfinite(leaf).all():
                raise Broken(f"the update at {path_of(path)} is not finite")


def _is_count(x: Any) -> bool:
    return getattr(x, "dtype", None) == jnp.int32 and x.shape == ()
