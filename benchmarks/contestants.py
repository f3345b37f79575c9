"""Who takes part: for each algorithm the same step by different libraries.

A contestant lives in a worker: ``jax``, ``jax-option`` (a process with XLA's option for the single
pass) or ``torch``. ``prepare(name, shapes)`` returns it ready to run, with what it has cost so far.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import cases
from benchmarks.cases import Shapes

ALGORITHMS = ("adam", "adamw", "amsgrad", "adamod", "diffgrad", "diffmod")
PEERS = {
    "adam": ("torch foreach", "torch fused", "torch AdamW fused"),
    "adamw": ("torch foreach", "torch fused"),
    "amsgrad": ("torch foreach", "torch fused"),
    "adamod": ("pytorch_optimizer", "torch_optimizer"),
    "diffgrad": ("pytorch_optimizer", "torch_optimizer"),
    "diffmod": (),
}
IN_OPTAX = ("adam", "adamw", "amsgrad")


class Ready(NamedTuple):
    """A step to be timed, and what is known before it has run."""

    run: Callable[[int], None]
    facts: dict[str, Any]


def workers(algorithm: str, *, option: bool) -> dict[str, str]:
    """The contestants of an algorithm, each with the worker it lives in."""
    found = {"ours": "jax", "hand-fused": "jax", "ours in bfloat16": "jax", "ours in 8-bit": "jax"}
    if algorithm in IN_OPTAX:
        found["optax"] = "jax"
    if option:
        found |= {"single_pass(ours)": "jax-option", "floor": "jax-option"}
        if algorithm in IN_OPTAX:
            found["single_pass(optax)"] = "jax-option"
    else:
        found |= {"floor": "jax", "ours in 8-bit, one kernel": "jax"}
    for peer in PEERS[algorithm]:
        module = peer.split()[0]
        if importlib.util.find_spec("torch") and importlib.util.find_spec(module):
            found[peer] = "torch"
    return found


def prepare(name: str, algorithm: str, shapes: Shapes) -> Ready:
    shapes = {key: tuple(shape) for key, shape in shapes.items()}
    if name.startswith(("torch", "pytorch")):
        return _torch(name, algorithm, shapes)
    return _jax(name, algorithm, shapes)


# --- JAX ------------------------------------------------------------------------------------------


@functools.lru_cache(1)
def _jax_gradients(items: tuple[tuple[str, tuple[int, ...]], ...]) -> Any:
    import jax

    return jax.device_put(cases.arrays(dict(items), 1, 1e-3))


def _jax(name: str, algorithm: str, shapes: Shapes) -> Ready:
    import jax
    import jax.numpy as jnp
    import optax

    import adaptive_opt
    from benchmarks import hand_fused
    from benchmarks.stepping import Run, in_one_kernel, update_and_apply

    def of_optimizer(optimizer: Any) -> Any:
        return optimizer.init, update_and_apply(optimizer)

    def jitted(step: Any) -> Any:
        return jax.jit(step, donate_argnums=(0, 1))

    def floor() -> Any:
        buffers = len(hand_fused.RULES[algorithm][1])

        def init(params: Any) -> Any:
            return jax.tree.map(lambda x: [jnp.zeros_like(x) for _ in range(buffers)], params)

        def step(params: Any, state: Any, gradients: Any) -> Any:
            added = jax.tree.map(lambda g, kept: [b + g for b in kept], gradients, state)
            return jax.tree.map(jnp.add, params, gradients), added

        return init, jitted(step)

    def by_hand() -> Any:
        init = functools.partial(hand_fused.init, algorithm)
        return init, jitted(functools.partial(hand_fused.step, algorithm))

    def in_kernel() -> Any:
        return in_8_bits.init, in_one_kernel(in_8_bits)

    ours, of_optax = (getattr(m, algorithm, None) for m in (adaptive_opt, optax))
    in_8_bits = adaptive_opt.low_memory(ours(1e-3), "8-bit")
    init, step = {
        "ours": lambda: of_optimizer(ours(1e-3)),
        "optax": lambda: of_optimizer(of_optax(1e-3)),
        "single_pass(ours)": lambda: of_optimizer(adaptive_opt.single_pass(ours(1e-3))),
        "single_pass(optax)": lambda: of_optimizer(adaptive_opt.single_pass(of_optax(1e-3))),
        "ours in bfloat16": lambda: of_optimizer(adaptive_opt.low_memory(ours(1e-3))),
        "ours in 8-bit": lambda: of_optimizer(in_8_bits),
        "ours in 8-bit, one kernel": in_kernel,
        "hand-fused": by_hand,
        "floor": floor,
    }[name]()

    params = jax.device_put(cases.arrays(shapes, 0, 1.0))
    run = Run(step, params, init(params), _jax_gradients(tuple(shapes.items())))
    elements = cases.elements(shapes)
    cost, memory = run.compiled.cost_analysis() or {}, run.compiled.memory_analysis()
    facts = run.seconds | {
        "state bytes": sum(x.nbytes for x in jax.tree.leaves(run.state)),
        "bytes accessed per parameter": cost.get("bytes accessed", float("nan")) / elements,
        "temporary bytes per parameter": memory.temp_size_in_bytes / elements,
    }
    return Ready(run, facts)


# --- PyTorch --------------------------------------------------------------------------------------


def _torch(name: str, algorithm: str, shapes: Shapes) -> Ready:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    params = []
    gradients = cases.arrays(shapes, 1, 1e-3)
    for key, value in cases.arrays(shapes, 0, 1.0).items():
        params.append(torch.nn.Parameter(torch.from_numpy(value).to(device)))
        params[-1].grad = torch.from_numpy(gradients[key]).to(device)
    module, _, variant = name.partition(" ")
    if module == "torch":
        amsgrad = algorithm == "amsgrad"
        decays = algorithm == "adamw" or "AdamW" in variant
        cls = torch.optim.AdamW if decays else torch.optim.Adam
        implementation = {variant.split()[-1]: True}
        optimizer = cls(params, lr=1e-3, amsgrad=amsgrad, **implementation)
    else:
        name_of_class = {"adamod": "AdaMod", "diffgrad": "DiffGrad"}[algorithm]
        optimizer = getattr(importlib.import_module(module), name_of_class)(params, lr=1e-3)

    def run(times: int) -> None:
        for _ in range(times):
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    run(1)
    tensors = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    return Ready(run, {"state bytes": sum(t.numel() * t.element_size() for t in tensors)})
