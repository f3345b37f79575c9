"""Runs the package keras-adamw, whose TensorFlow is too old to install, on NumPy in float64.

What its optimizers call of TensorFlow (assignments, casts, powers) is put in place as NumPy
functions before its files are loaded; its own code runs unchanged. TensorFlow would keep eta_t in
float32.
"""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import sys
import types
from typing import Any

import numpy as np


class Variable(np.ndarray):
    """A float64 array that can be assigned to; its dtype has a base, as TensorFlow's."""

    name: str

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(base_dtype=np.float64)


def variable(value: Any, dtype: Any = None, name: str = "") -> Variable:
    del dtype
    made = np.array(value, np.float64).view(Variable)
    made.name = name
    return made


def assign(target: Variable, value: Any, use_locking: Any = None) -> np.ndarray:
    del use_locking
    target[...] = value
    return np.array(target)


def assign_add(target: Variable, value: Any, use_locking: Any = None) -> np.ndarray:
    return assign(target, np.asarray(target) + value)


class OptimizerV2:
    """The little that the package uses of tf.keras's optimizer."""

    _use_locking = False
    _initial_decay = 0.0

    def __init__(self, name: str, **kwargs: Any) -> None:
        self._name, self._hyper, self._slots, self.iterations = name, {}, {}, 0
        self._initial_decay = kwargs.get("decay", 0.0)

    def _set_hyper(self, name: str, value: Any) -> None:
        self._hyper[name] = value

    def _get_hyper(self, name: str, dtype: Any = None) -> Any:
        return np.float64(self._hyper[name])

    def _decayed_lr(self, dtype: Any) -> Any:
        return np.float64(self._hyper["learning_rate"])

    def add_slot(self, var: Any, name: str) -> None:
        self._slots[name] = variable(np.zeros(var.shape))

    def get_slot(self, var: Any, name: str) -> Variable:
        return self._slots[name]


def load(checkout: pathlib.Path) -> types.ModuleType:
    """The package's ``optimizers_v2`` module."""

    def module(name: str, **contents: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(contents)
        sys.modules[name] = made
        return made

    mathematics = {
        name: getattr(np, name) for name in ("sqrt", "square", "maximum", "sign", "cos", "equal")
    }
    mathematics |= {
        "cast": lambda x, dtype: np.float64(x),
        "pow": np.power,
        "sub": np.subtract,
    }
    math_ops = module("tensorflow.python.ops.math_ops", **mathematics)
    state_ops = module("tensorflow.python.ops.state_ops", assign=assign, assign_add=assign_add)
    control = module(
        "tensorflow.python.ops.control_flow_ops",
        cond=lambda when, yes, no: yes() if when else no(),
        group=lambda *_: None,
    )
    array_ops = module("tensorflow.python.ops.array_ops", identity=lambda x: x)
    backend = module("tensorflow.python.keras.backend", variable=variable, constant=variable)
    module("termcolor", colored=lambda text, colour: text)
    module("tensorflow", control_dependencies=lambda _: contextlib.nullcontext())
    module("tensorflow.python")
    module(
        "tensorflow.python.framework",
        ops=types.SimpleNamespace(
            convert_to_tensor=lambda x, dtype: np.float64(x), Tensor=Variable
        ),
    )
    module("tensorflow.python.keras", backend=backend, backend_config=None)
    schedule = module(
        "tensorflow.python.keras.optimizer_v2.learning_rate_schedule",
        LearningRateSchedule=type("LearningRateSchedule", (), {}),
    )
    module("tensorflow.python.keras.optimizer_v2", learning_rate_schedule=schedule)
    module("tensorflow.python.keras.optimizer_v2.optimizer_v2", OptimizerV2=OptimizerV2)
    module(
        "tensorflow.python.ops",
        array_ops=array_ops,
        control_flow_ops=control,
        math_ops=math_ops,
        state_ops=state_ops,
    )
    module("tensorflow.python.util")
    module("tensorflow.python.util.tf_export", keras_export=lambda *_: lambda x: x)
    package = module("keras_adamw", TF_KERAS=True)
    package.__path__ = [str(checkout / "keras_adamw")]
    spec = importlib.util.spec_from_file_location(
        "keras_adamw.optimizers_v2", checkout / "keras_adamw" / "optimizers_v2.py"
    )
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


def trajectory(optimizer: Any, gradients: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The parameters after every step."""
    var = variable(start, name="w")
    optimizer._create_slots([var])
    path = []
    for gradient in gradients:
        optimizer._resource_apply_dense(gradient, var)
        optimizer.iterations += 1
        path.append(np.array(var))
    return np.stack(path)
