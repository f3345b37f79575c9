"""A state of PyTorch that does not go on here alike is refused, and the message says why."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from torch_states import (
    ADAMW_GROUPS,
    ALONE,
    BEFORE,
    LR,
    PATHS,
    adam_with_l2,
    five_groups,
    grouped,
    imported,
    parameters_of,
    recorded,
    state_dict_of,
)

from adaptive_opt import (
    Group,
    adabound,
    adadelta,
    adagrad,
    adam,
    adamod,
    adamw,
    amsgrad,
    diffgrad,
    import_torch_state,
    nadam,
    radam,
    rmsprop,
    sgd,
)


def said_by(*args, **kwargs):
    """The message of the refusal."""
    with pytest.raises(ValueError, match=r".") as refusal:
        imported(*args, **kwargs)
    return str(refusal.value)


def test_settings_that_differ_are_named_once_and_can_be_let_through():
    wrong = adamw(LR, b1=0.8, b2=0.99, eps=1e-7, weight_decay=0.2)
    assert said_by("adamw", wrong) == (
        "the target computes something else than PyTorch did: betas[0] of PyTorch is 0.9, b1 here"
        " 0.8; betas[1] of PyTorch is 0.999, b2 here 0.99; eps of PyTorch is 1e-08, here 1e-07;"
        " weight_decay of PyTorch is 0.1 (decoupled), here 0.2 (decoupled). Correct it, or let it"
        " be with allow={...}."
    )
    assert "betas[0]" in said_by("adamw", wrong, allow={"b2", "eps", "weight_decay"})
    for allow in ({"b1", "b2", "eps", "weight_decay"}, {"betas", "eps", "weight_decay"}):
        assert int(imported("adamw", wrong, allow=allow)[0].count) == BEFORE


@pytest.mark.parametrize(
    ("row", "target", "said"),
    [
        ("adam", adamw(LR, b1=0.8, b2=0.99, weight_decay=0.1), "0.1 (l2), here 0.1 (decoupled)"),
        ("adam", adam(LR, b1=0.8, b2=0.99), "weight_decay of PyTorch is 0.1 (l2), here 0"),
        ("amsgrad", adam(LR), "second_moment → amsgrad_max → debias → per_weight_rate, the target"),
        ("adamw", amsgrad(LR), "the target is first_moment → second_moment → amsgrad_max"),
        ("adamw", adamw(LR, weight_decay=0.1, convention="keras"), "per_weight_rate → debias_rate"),
        ("adam maximize", adam(LR), "maximize=True of PyTorch is optax.scale(-1.0) in front"),
        ("amsgrad", optax.chain(optax.scale(-1.0), amsgrad(LR)), "the target negates gradients"),
        ("sgd nesterov", sgd(LR, 0.9), "nesterov of PyTorch is True, here False"),
        ("sgd dampening", sgd(LR, 0.8), "dampening of PyTorch is 0.5, here 0.0; momentum of PyTor"),
        ("sgd momentum", sgd(LR, 0.9, convention="keras"), "the target is learning rate → apply_r"),
        ("nadam", nadam(LR), "momentum_decay of PyTorch is 0.01, here 0.004"),
        ("radam", radam(LR, weight_decay=0.1, decay="decoupled"), "is 0.1 (l2), here 0.1 (decou"),
        ("adagrad decay", adagrad(LR), "lr_decay=0.05 of PyTorch is a schedule here"),
        ("rmsprop", rmsprop(LR), "alpha of PyTorch is 0.99, b2 here 0.9"),
        (
            "rmsprop",
            rmsprop(LR, 0.99, convention="optax"),
            "eps_root of PyTorch is 0.0, here 1e-08",
        ),
        ("adadelta", adadelta(0.5, rho=0.8), "rho of PyTorch is 0.9, b2 here 0.8"),
        ("adamod.AdaMod", adamod(LR, weight_decay=0.1), "beta3 of PyTorch is 0.99, b3 here 0.999"),
        (
            "torch_optimizer.AdaBound",
            adabound(LR, gamma=0.01, final_learning_rate=0.2, weight_decay=0.1),
            "final_lr of PyTorch is 0.1, final_learning_rate here 0.2; gamma of PyTorch is 0.001,",
        ),
        (
            "torch_optimizer.DiffGrad",
            diffgrad(LR, friction="signed"),
            "kind of PyTorch is 'absolute', here 'signed'",
        ),
        (
            "pytorch_optimizer.AdaMod",
            adamod(LR, b2=0.99, b3=0.9, weight_decay=0.1),
            "betas[2] of PyTorch is 0.95, b3 here 0.9",
        ),
    ],
)
def test_a_target_that_computes_something_else_is_refused(row, target, said):
    count = {"count": BEFORE} if row.startswith("sgd") else {}
    assert said in said_by(row, target, **count)


def test_settings_are_compared_for_each_parameter():
    row, head = "adamw two groups", ("head/kernel", "head/bias")

    def masked(*paths):
        decays = jax.tree_util.tree_map_with_path(
            lambda p, _: jax.tree_util.keystr(p, simple=True, separator="/") not in paths,
            parameters_of(row),
        )
        return adamw(LR, weight_decay=0.1, mask=decays)

    said = said_by(row, masked(*head))
    assert "lr of PyTorch is 0.1, here 0.01 (of head/bias)" in said
    assert "lr of PyTorch is 0.01, here 0.01 (of body/bias)" in said
    assert int(imported(row, masked(*head), allow={"lr"})[0].count) == BEFORE
    said = said_by(row, masked("head/kernel", "scale"))
    assert "weight_decay of PyTorch is 0, here 0.1 (decoupled) (of head/bias);" in said
    assert "weight_decay of PyTorch is 0.1 (decoupled), here 0 (of scale)" in said
    swapped = grouped(adamw, Group("^body|scale", weight_decay=0.0), weight_decay=0.1)
    assert "is 0, here 0.1 (decoupled) (of head/bias, head/kernel)" in said_by(row, swapped)


def test_names_win_over_positions_and_a_contradiction_is_an_error():
    row, target = "adam five groups named", five_groups(adam_with_l2)
    named = imported(row, target, order=None)
    right = imported(row, target)  # by names and by the optimizer's groups
    jax.tree.map(np.testing.assert_array_equal, named, right)
    of_the_model = [str(name) for name in recorded()[f"{row}|order"]][::-1]
    said = said_by(row, target, order=of_the_model)
    assert "order= contradicts the names in the state dict: 0 is 'head.bias', not 'scale'" in said
    said = said_by(row, target, order=of_the_model[1:])
    assert "order= has 4 names, the optimizer 5 parameters. It is [names[p] for g in opt" in said


def test_positions_are_those_of_the_groups_of_the_optimizer():
    row = "adamw two groups"  # whose two kernels have one shape, the head's first
    by_name = imported(row, ADAMW_GROUPS)
    position = {str(name): i for i, name in enumerate(recorded()[f"{row}|order"])}
    assert position["head.weight"] == 0
    positions = {path: position[name] for path, name in PATHS.items()}
    by_position = import_torch_state(
        state_dict_of(row), ADAMW_GROUPS, parameters_of(row), positions
    )
    jax.tree.map(np.testing.assert_array_equal, by_name, by_position)


def test_what_one_state_cannot_hold_is_refused():
    said = said_by("adamw late", adamw(LR, weight_decay=0.1))
    assert "have not seen one number of gradients (18: body/kernel; 30: body/bias, head/" in said
    assert "a group of their own (ParameterGroups)" in said
    said = said_by("adamw frozen", adamw(LR, weight_decay=0.1))
    assert "(0: body/kernel; 30: " in said
    said = said_by("sgd momentum", sgd(LR, 0.9, weight_decay=0.1))
    assert "does not say how many gradients it has seen" in said
    assert "give count=" in said
    said = said_by("adamw", adamw(LR, weight_decay=0.1), count=7)
    assert said == "count=7, but the state dict has seen 30 gradients."
    beta = grouped(adamw, ALONE, weight_decay=0.1, b1=lambda t: 0.9)
    assert "body/kernel saw 18 gradients, the run 30: a schedule" in said_by("adamw late", beta)


def test_tied_weights_are_one_parameter():
    names = PATHS | {"head/kernel": "body.weight"}
    with pytest.raises(ValueError, match=r"'body/kernel' and 'head/kernel' are both .*body.weight"):
        import_torch_state(
            state_dict_of("adamw named"),
            adamw(LR, weight_decay=0.01),
            parameters_of("adamw named"),
            names,
        )


def test_a_complex_parameter_goes_on_with_sgd_and_is_refused_elsewhere():
    x, params = np.array([1 + 2j, 3 - 1j]), {"w": jnp.array([0j, 1j])}
    saved = {"state": {0: {"momentum_buffer": x}}, "param_groups": [{"params": [0]}]}
    state = import_torch_state(saved, sgd(LR, 0.9), params, {"w": 0}, count=3)
    np.testing.assert_array_equal(optax.tree.get(state, "velocity")["w"], x)
    saved["state"][0] = {"step": 3, "exp_avg": x, "exp_avg_sq": x}
    with pytest.raises(ValueError, match=r"'w' is complex. PyTorch treats its real and imaginary"):
        import_torch_state(saved, adam(LR), params, {"w": 0})
    with pytest.raises(ValueError, match="exp_avg of 'w' is complex, the parameter is not"):
        import_torch_state(saved, adam(LR), {"w": jnp.zeros(2)}, {"w": 0})


class Tensor:
    """What a tensor on a device and in bfloat16 is to us."""

    def __init__(self, array, dtype="torch.bfloat16", on="cuda"):
        self.array, self.dtype, self.on = array, dtype, on

    def detach(self):
        return Tensor(self.array, self.dtype, self.on)

    def cpu(self):
        return Tensor(self.array, self.dtype, "cpu")

    def float(self):
        return Tensor(self.array, "torch.float32", self.on)

    def numpy(self):
        if self.on != "cpu" or self.dtype == "torch.bfloat16":
            raise TypeError("can't convert it to numpy")
        return self.array


def test_tensors_are_taken_as_they_are():
    x = np.array([1.0, 2.0], np.float32)
    moments = {"step": Tensor(np.float32(3), "torch.float32"), "exp_avg": Tensor(x)}
    saved = {"state": {0: moments | {"exp_avg_sq": Tensor(x, "torch.float32")}}}
    state = import_torch_state(saved, adam(LR), {"w": jnp.zeros(2)}, {"w": 0})
    np.testing.assert_array_equal(state[0].mu["w"], x)
    saved["state"][0]["exp_avg"] = [object()]
    with pytest.raises(ValueError, match=r"exp_avg of 0 is no array .*detach\(\).float\(\).cpu"):
        import_torch_state(saved, adam(LR), {"w": jnp.zeros(2)}, {"w": 0})


def test_what_is_no_state_dict_or_contradicts_itself_is_refused():
    x = np.ones(2)
    moments = {"step": 3, "exp_avg": x, "exp_avg_sq": x}
    groups = [{"params": [0]}]

    def with_settings(**settings):
        return {"state": {0: moments}, "param_groups": [{**groups[0], **settings}]}

    for message, saved in [
        ("it is a dict of model. Give what optimizer.state_dict", {"model": {}}),
        ("it is a list", [1]),
        ("states 7 are in no group", {"state": {7: moments}, "param_groups": groups}),
        ("twice in the group", {"state": {0: moments}, "param_groups": groups * 2}),
        (
            "seen .3, 4. gradients",
            {"state": {0: moments}, "param_groups": [{"step": 4, **groups[0]}]},
        ),
        ("step of 0 should be a number of gradients, got 3.5", {"state": {0: {"step": 3.5}}}),
        ("step of 0 should be a number of gradients, got nan", {"state": {0: {"step": np.nan}}}),
        (
            "step of 0 should be a number of grad.*, got .1. 2.",
            {"state": {0: {"step": 1 + x * [0, 1]}}},
        ),
        ("step of 0 should .* from 0 to 2147483647; got 1099", {"state": {0: {"step": 2**40}}}),
        ("step of 0 should .* from 0 to 2147483647; got -1", {"state": {0: {"step": -1}}}),
        ("the state of 0 in the state dict should be a dict of tens", {"state": {0: 3}}),
        ("its 'state' in the state dict should be a dict", {"state": [1], "param_groups": groups}),
        ("group 0 in the state dict should be a dict", {"state": {}, "param_groups": [{}]}),
        ("group 0 in the state dict should be a dict", {"state": {}, "param_groups": [3]}),
        ("betas in group 0 of .* two or three numbers, got None", with_settings(betas=None)),
        ("betas in group 0 of .* two or three numbers, got .0.9,", with_settings(betas=(0.9,))),
        ("betas in group 0 of .* two or three numbers, got 0.9", with_settings(betas=0.9)),
        ("eps in group 0 of the state dict should be a number, got None", with_settings(eps=None)),
        ("1 params and 2 param_names", with_settings(param_names=["a", "b"])),
        (
            "trust=1 of PyTorch is not known here",
            {"state": {0: moments}, "param_groups": [{"trust": 1, "params": [0]}]},
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            import_torch_state(saved, adam(LR), {"w": jnp.zeros(2)}, {"w": 0})


X = np.ones(2)
SGD_GROUP = {"lr": LR, "momentum": 0.9, "dampening": 0, "weight_decay": 0.1, "nesterov": False}
VELOCITY = {"momentum_buffer": X}
MOMENTS = {"step": 20, "exp_avg": X, "exp_avg_sq": X}
ADAM_GROUP = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}


def of_one(target, state, group, **how):
    """What comes of the state dict of one parameter."""
    saved = {
        "state": {} if state is None else {0: state},
        "param_groups": [{"params": [0], **group}],
    }
    return import_torch_state(saved, target, {"w": jnp.zeros(2)}, {"w": 0}, **how)


@pytest.mark.parametrize("count", [5.7, "5", -1, True, [5], 2**40, {"w": 5}])
def test_a_count_is_a_whole_number(count):
    target = sgd(LR, 0.9, weight_decay=0.1)
    with pytest.raises(ValueError, match="count= should be a number of gradients, a whole number"):
        of_one(target, VELOCITY, SGD_GROUP | {"maximize": False}, count=count)


def test_an_optimizer_that_has_not_begun_is_a_fresh_state_here():
    for target, group in (
        (adam(LR), ADAM_GROUP),
        (sgd(LR, 0.9, weight_decay=0.1), SGD_GROUP | {"maximize": False}),
    ):
        made = of_one(target, None, group, count=0)
        jax.tree.map(np.testing.assert_array_equal, made, target.init({"w": jnp.zeros(2)}))
        with pytest.raises(ValueError, match=r"give count=.*; 0 if there was none"):
            of_one(target, None, group)
    with pytest.raises(ValueError, match=r"b2 here 0\.99"):
        of_one(adam(LR, b2=0.99), None, ADAM_GROUP, count=0)
    with pytest.raises(ValueError, match="count=0, but there is a state of w"):
        of_one(target, VELOCITY, SGD_GROUP | {"maximize": False}, count=0)


def test_the_decay_of_an_sgd_that_may_be_another_is_refused():
    """SGDW of torch_optimizer has the settings of SGD before PyTorch 1.11."""
    target = sgd(LR, 0.9, weight_decay=0.1)
    with pytest.raises(
        ValueError, match="weight_decay of PyTorch may be that of torch_optimizer's"
    ):
        of_one(target, VELOCITY, SGD_GROUP, count=3)
    of_one(target, VELOCITY, SGD_GROUP, count=3, allow={"weight_decay"})
    of_one(sgd(LR, 0.9), VELOCITY, SGD_GROUP | {"weight_decay": 0}, count=3)


SPARSE_ADAM = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "maximize": False}
FIRA = {"lr": LR, "betas": (0.9, 0.999), "weight_decay": 0.0, "weight_decouple": True, "eps": 1e-6}


@pytest.mark.parametrize(
    ("target", "state", "group"),
    [
        (adam(LR), MOMENTS, SPARSE_ADAM),
        (adam(LR, eps=1e-6), MOMENTS, FIRA),
        (sgd(LR), None, {"lr": LR}),
    ],
    ids=["SparseAdam", "Fira", "Fromage"],
)
def test_an_optimizer_that_is_not_known_is_refused(target, state, group):
    count = {"count": 20} if state is None else {}
    with pytest.raises(ValueError, match=r"the optimizer is none of those .* its groups say .*lr"):
        of_one(target, state, group, **count)
    of_one(target, state, group, allow={"optimizer", "weight_decouple"}, **count)


def test_the_final_rate_of_adabound_goes_with_the_rate():
    """It is 0.05 after a scheduler has halved the rate: 0.1 lr / initial_lr."""
    group = {
        **{"lr": LR / 2, "initial_lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0},
        **{"final_lr": 0.1, "gamma": 1e-3, "amsbound": False},
    }
    for target in (
        adabound(LR / 2, base_learning_rate=LR),
        adabound(LR),  # at the rate of the start again
        adabound(lambda t: LR, base_learning_rate=LR),
    ):
        state = of_one(target, MOMENTS, group)
        assert (
            int(optax.tree.get(state, "count", filtering=lambda p, _: "count" in str(p[-1]))) == 20
        )
    with pytest.raises(
        ValueError, match=r"final_lr \* lr / initial_lr of PyTorch is 0.05, final_le"
    ):
        of_one(adabound(LR / 2), MOMENTS, group)


def test_lr_decay_goes_by_the_steps_of_a_parameter():
    groups = grouped(
        lambda learning_rate: adagrad(lambda t: learning_rate / (1 + 0.05 * t)), Group("b")
    )
    params, x = {"a": jnp.zeros(2), "b": jnp.zeros(2)}, {"sum": X}
    group = {"params": [0, 1], "lr": LR, "lr_decay": 0.05, "eps": 1e-10, "weight_decay": 0}
    saved = {"state": {0: {"step": 20, **x}, 1: {"step": 12, **x}}, "param_groups": [group]}
    with pytest.raises(
        ValueError, match=r"b saw 12 gradients, the run 20: .* later by 8, and allow"
    ):
        import_torch_state(saved, groups, params, {"a": 0, "b": 1})
    import_torch_state(saved, groups, params, {"a": 0, "b": 1}, allow={"lr_decay"})


def test_names_that_are_misspelt_are_told():
    for how, message in (
        (
            {"allow": {"weight_decoy"}},
            r"allow= names 'weight_decoy', .*Did you mean 'weight_decay'",
        ),
        ({"layout": {"v": (0,)}}, "layout= names 'v', which is not there.* There are w"),
    ):
        with pytest.raises(ValueError, match=message):
            of_one(adam(LR), MOMENTS, ADAM_GROUP, **how)
    with pytest.raises(TypeError, match=r"allow takes a set of names: \{'eps'\}"):
        of_one(adam(LR), MOMENTS, ADAM_GROUP, allow="eps")
    saved = {"state": {0: MOMENTS}, "param_groups": [{"params": [0], **ADAM_GROUP}]}
    with pytest.raises(ValueError, match=r"names= names 'weigt', .*Did you mean 'weight'"):
        import_torch_state(saved, adam(LR), {"weight": jnp.zeros(2)}, {"weight": 0, "weigt": 0})
