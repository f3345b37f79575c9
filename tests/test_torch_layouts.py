"""A parameter of PyTorch is laid out as the layers here want it: they make the same of an input."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_states import recorded

from adaptive_opt import adam, import_torch_params, import_torch_state

LR = 1e-2


def layer_of(name):
    """The parameters of a layer of PyTorch, an input and its output."""
    prefix = f"layer {name}|"
    arrays = {k.removeprefix(prefix): v for k, v in recorded().items() if k.startswith(prefix)}
    return arrays, arrays.pop("x"), arrays.pop("y")


class Layers(nn.Module):
    make: object

    @nn.compact
    def __call__(self, x):
        return self.make()(x)


F64 = {"param_dtype": np.float64}
VALID = {"padding": "VALID", **F64}
LINEN = {
    "linear": [lambda: nn.Dense(3, **F64)],
    "conv": [lambda: nn.Conv(2, (2, 2), **VALID)],
    "conv grouped": [lambda: nn.Conv(4, (3, 2), feature_group_count=2, **VALID)],
    "transposed": [
        lambda: nn.ConvTranspose(3, (3, 2), strides=(2, 2), **VALID),
        lambda: nn.ConvTranspose(3, (3, 2), strides=(2, 2), transpose_kernel=True, **VALID),
    ],
    "transposed square": [lambda: nn.ConvTranspose(2, (3,), **VALID)],
}
NNX = {
    "linear": lambda r: nnx.Linear(3, 3, rngs=r, **F64),
    "conv": lambda r: nnx.Conv(2, 2, (2, 2), rngs=r, **VALID),
    "transposed": lambda r: nnx.ConvTranspose(2, 3, (3, 2), strides=(2, 2), rngs=r, **VALID),
}
EQUINOX = {
    "linear": lambda k: eqx.nn.Linear(3, 3, dtype=float, key=k),
    "conv": lambda k: eqx.nn.Conv2d(2, 2, 2, dtype=float, key=k),
    "conv grouped": lambda k: eqx.nn.Conv2d(4, 4, (3, 2), groups=2, dtype=float, key=k),
    "transposed": lambda k: eqx.nn.ConvTranspose2d(2, 3, (3, 2), stride=2, dtype=float, key=k),
    "transposed square": lambda k: eqx.nn.ConvTranspose1d(2, 2, 3, dtype=float, key=k),
}


def assert_equal_to(y, expected):
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


def last(x):
    """With the channels at the end, as Flax has them."""
    return np.moveaxis(x, 1, -1) if x.ndim > 2 else x


@pytest.mark.parametrize("name", LINEN)
def test_layers_of_linen_make_of_an_input_what_those_of_pytorch_make(name, x64):
    saved, x, y = layer_of(name)
    for make in LINEN[name]:
        model = Layers(make)
        like = jax.eval_shape(model.init, jax.random.key(0), last(x))["params"]
        (layer,) = like
        names = {f"{layer}/kernel": "weight", f"{layer}/bias": "bias"}
        told = {f"{layer}/kernel": "conv_transpose"} if "square" in name else None
        params = import_torch_params(saved, like, names, layout=told)
        assert_equal_to(model.apply({"params": params}, last(x)), last(y))


@pytest.mark.parametrize("name", NNX)
def test_layers_of_nnx_make_of_an_input_what_those_of_pytorch_make(name, x64):
    saved, x, y = layer_of(name)
    model = NNX[name](nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    if name == "transposed":  # its path says nothing, its shape does
        assert saved["weight"].shape[0] != saved["weight"].shape[1]
    told = {"kernel": "conv"} if name == "conv" else None  # as many channels in as out
    names = {"kernel": "weight", "bias": "bias"}
    nnx.update(model, import_torch_params(saved, state, names, layout=told))
    assert_equal_to(model(last(x)), last(y))


@pytest.mark.parametrize(
    "layer", ["up", "layers_0", "ConvTranspose_0", "deconv", "conv_transpose_2"]
)
def test_a_square_kernel_that_may_be_of_two_layers_has_to_be_told(layer, x64):
    """Both layers of Flax are the one of PyTorch, if they are told."""
    saved, x, y = layer_of("transposed square")
    names = {f"{layer}/kernel": "weight", f"{layer}/bias": "bias"}
    for is_as_in_torch, told in ((False, "conv_transpose"), (True, "conv")):
        model = nn.ConvTranspose(2, (3,), transpose_kernel=is_as_in_torch, **VALID)
        like = {layer: jax.eval_shape(model.init, jax.random.key(0), last(x))["params"]}
        with pytest.raises(ValueError, match=rf"channels in as out.*'{layer}/kernel': 'conv_tran"):
            import_torch_params(saved, like, names)
        params = import_torch_params(saved, like, names, layout={f"{layer}/kernel": told})
        assert_equal_to(model.apply({"params": params[layer]}, last(x)), last(y))
    for wrong, message in (
        ({f"{layer}/kernel": "deconv"}, "layout= says 'deconv' for"),
        ({f"{layer}/kernal": "conv"}, f"layout= names .*Did you mean '{layer}/kernel'"),
    ):
        with pytest.raises(ValueError, match=message):
            import_torch_params(saved, like, names, layout=wrong)


def test_a_convolution_that_is_called_so_is_laid_out_by_itself(x64):
    saved, x, y = layer_of("conv")
    model = nn.Conv(2, (2, 2), **VALID)
    like = {"conv1": jax.eval_shape(model.init, jax.random.key(0), last(x))["params"]}
    names = {"conv1/kernel": "weight", "conv1/bias": "bias"}
    params = import_torch_params(saved, like, names)["conv1"]
    assert_equal_to(model.apply({"params": params}, last(x)), last(y))


@pytest.mark.parametrize("name", EQUINOX)
def test_layers_of_equinox_make_of_an_input_what_those_of_pytorch_make(name, x64):
    saved, x, y = layer_of(name)
    arrays, static = eqx.partition(EQUINOX[name](jax.random.key(0)), eqx.is_array)
    params = import_torch_params(saved, arrays, {"weight": "weight", "bias": "bias"})
    assert_equal_to(jax.vmap(eqx.combine(params, static))(x), y)


def test_attention_is_moved_once_its_packed_weights_are_split(x64):
    saved, x, y = layer_of("attention")
    model = nn.MultiHeadDotProductAttention(num_heads=2, **F64)
    like = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    inside = {"query": "q", "key": "k", "value": "v"}
    packed = {
        f"{here}/{leaf}": f"in_proj_{there}"
        for here in inside
        for leaf, there in (("kernel", "weight"), ("bias", "bias"))
    }
    out = {"out/kernel": "out_proj.weight", "out/bias": "out_proj.bias"}
    with pytest.raises(ValueError, match=r"in_proj_bias of 'key/bias' has shape .* split it into"):
        import_torch_params(saved, like, packed | out)
    split = {
        f"{part}.{kind}": x
        for kind in ("weight", "bias")
        for part, x in zip("qkv", np.split(saved[f"in_proj_{kind}"], 3), strict=True)
    }
    names = {
        f"{here}/{leaf}": f"{there}.{kind}"
        for here, there in inside.items()
        for leaf, kind in (("kernel", "weight"), ("bias", "bias"))
    }
    params = import_torch_params(saved | split, like, names | out)
    assert_equal_to(model.apply({"params": params}, x), y)


def one(array, **group):
    """The state dict of an Adam with one parameter."""
    moments = {"step": 3, "exp_avg": array, "exp_avg_sq": np.abs(array)}
    return {"state": {0: moments}, "param_groups": [{"params": [0], **group}]}


def test_an_axis_that_does_not_fit_is_named_and_the_advice_works():
    kernel = np.random.default_rng(0).normal(size=(8, 4, 3, 3))
    like = {"conv": {"w": jnp.zeros((3, 3, 4, 8))}}
    names = {"conv/w": 0}
    with pytest.raises(ValueError, match=r"layout={'conv/w': \(2, 3, 1, 0\)}"):
        import_torch_state(one(kernel), adam(LR), like, names)
    state = import_torch_state(one(kernel), adam(LR), like, names, layout={"conv/w": (2, 3, 1, 0)})
    np.testing.assert_allclose(state[0].mu["conv"]["w"], kernel.transpose(2, 3, 1, 0), rtol=1e-6)
    with pytest.raises(ValueError, match=r"swaps height and width of 'conv/w'.*\(2, 3, 1, 0\)"):
        import_torch_state(one(kernel), adam(LR), like, names, layout=lambda path, x: x.T)
    with pytest.raises(ValueError, match="give every axis once"):
        import_torch_state(one(kernel), adam(LR), like, names, layout={"conv/w": (0, 1)})
    with pytest.raises(ValueError, match="is another parameter"):
        import_torch_state(one(np.zeros((5, 4))), adam(LR), like, names)
    square = {"w": jnp.zeros((2, 2)), "kernel": jnp.zeros((2, 2))}
    x = np.array([[1.0, 2.0], [3.0, 4.0]])
    moved = import_torch_params({"a": x}, square, {"w": "a", "kernel": "a"})
    np.testing.assert_array_equal(moved["w"], x)
    np.testing.assert_array_equal(moved["kernel"], x.T)
    kept = import_torch_params({"a": x}, square, {"w": "a", "kernel": "a"}, layout=lambda p, x: x)
    np.testing.assert_array_equal(kept["kernel"], x)
