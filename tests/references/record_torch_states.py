"""Records state dicts of runs of PyTorch, and how those runs went on, for tests of moving in.

    pip install -r tests/references/requirements.txt
    python tests/references/record_torch_states.py

Each row is an optimizer that takes 130 steps, in float64, over the same gradients of a model of two
equal Linear layers and a scale. Written is ``torch_states.npz``: the gradients, the parameters at
the start and, for each row, the state dict (its groups as JSON) and the parameters after step 30,
and the parameters after some of the 100 steps that follow.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import adamod
import numpy as np
import pytorch_optimizer
import torch
import torch_optimizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

BEFORE, AFTER = 30, 100
LATE = 12
SEEN = (1, 2, 5, 10, 30, 100)
"""After which of the steps that follow the parameters are recorded."""

LR = 1e-2
ONE_GROUP: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, weight_decay=0.1),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "sgd dampening": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, dampening=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=LR, betas=(0.8, 0.99), weight_decay=0.1),
    "adam maximize": lambda p: torch.optim.Adam(p, lr=LR, maximize=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=LR, amsgrad=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=LR, amsgrad=True, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=LR, momentum_decay=0.01),
    "nadamw": lambda p: torch.optim.NAdam(p, lr=LR, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=LR, weight_decay=0.1),
    "radam decoupled": lambda p: torch.optim.RAdam(
        p, lr=LR, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "adamax": lambda p: torch.optim.Adamax(p, lr=LR),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=LR, initial_accumulator_value=0.1),
    "adagrad decay": lambda p: torch.optim.Adagrad(p, lr=LR, lr_decay=0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=LR),
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, lr=LR, centered=True),
    "rmsprop momentum": lambda p: torch.optim.RMSprop(p, lr=LR, centered=True, momentum=0.9),
    "adamod.AdaMod": lambda p: adamod.AdaMod(p, lr=LR, beta3=0.99, weight_decay=0.1),
    "torch_optimizer.AdaMod": lambda p: torch_optimizer.AdaMod(p, lr=LR, beta3=0.9),
    "torch_optimizer.DiffGrad": lambda p: torch_optimizer.DiffGrad(p, lr=LR),
    "torch_optimizer.AdaBound": lambda p: torch_optimizer.AdaBound(p, lr=LR, weight_decay=0.1),
    "torch_optimizer.AdaBound amsbound": lambda p: torch_optimizer.AdaBound(
        p, lr=LR, amsbound=True
    ),
    "pytorch_optimizer.AdaMod": lambda p: pytorch_optimizer.AdaMod(
        p, lr=LR, betas=(0.9, 0.99, 0.95), weight_decay=0.1
    ),
    "pytorch_optimizer.DiffGrad": lambda p: pytorch_optimizer.DiffGrad(p, lr=LR, weight_decay=0.1),
    "pytorch_optimizer.AdaBound": lambda p: pytorch_optimizer.AdaBound(
        p, lr=LR, weight_decay=0.01, fixed_decay=True
    ),
}


def two_groups(model: Any, make: Any, **settings: Any) -> Any:
    """The head first, with ten times the rate; then what decays in other ways."""
    named = dict(model.named_parameters())
    head = [named["head.weight"], named["head.bias"]]
    others = [p for n, p in named.items() if not n.startswith("head")]
    return make(
        [{"params": head, "lr": 10 * LR, "weight_decay": 0.0}, {"params": others}],
        lr=LR,
        **settings,
    )


def five_groups(model: Any, make: Any, named: bool, **settings: Any) -> Any:
    """Each parameter by itself, the last first, with decays of its own."""
    groups = [
        {"params": [(n, p)] if named else [p], "weight_decay": 0.02 * i}
        for i, (n, p) in enumerate(reversed(list(model.named_parameters())))
    ]
    return make(groups, lr=LR, **settings)


OF_THE_MODEL: dict[str, Any] = {
    "adamw named": lambda m: torch.optim.AdamW(m.named_parameters(), lr=LR),
    "adamw two groups": lambda m: two_groups(m, torch.optim.AdamW, weight_decay=0.1),
    "adamod two groups": lambda m: two_groups(m, pytorch_optimizer.AdaMod, weight_decay=0.1),
    "nadam two groups": lambda m: two_groups(m, torch.optim.NAdam, momentum_decay=0.01),
    "sgd five groups": lambda m: five_groups(m, torch.optim.SGD, False, momentum=0.9),
    "adam five groups named": lambda m: five_groups(m, torch.optim.Adam, True),
    "adamw sharded": lambda m: two_groups(m, torch.optim.AdamW, weight_decay=0.1),
    "adamw sharded flat": lambda m: two_groups(m, torch.optim.AdamW, weight_decay=0.1),
    "adamw frozen": lambda m: torch.optim.AdamW(m.parameters(), lr=LR, weight_decay=0.1),
    "adamw late": lambda m: torch.optim.AdamW(m.parameters(), lr=LR, weight_decay=0.1),
    "adamw scheduled": lambda m: torch.optim.AdamW(m.parameters(), lr=LR, weight_decay=0.1),
    "adamw scheduled late": lambda m: torch.optim.AdamW(m.parameters(), lr=LR, weight_decay=0.1),
    "nadam late": lambda m: torch.optim.NAdam(m.parameters(), lr=LR),
    "rmsprop late": lambda m: torch.optim.RMSprop(m.parameters(), lr=LR),
}


def state_dict_of(name: str, model: Any, optimizer: Any) -> Any:
    if "sharded" not in name:
        return optimizer.state_dict()
    options = StateDictOptions(flatten_optimizer_state_dict="flat" in name, full_state_dict=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(2, 3)
        self.head = torch.nn.Linear(2, 3)
        self.scale = torch.nn.Parameter(torch.ones(2))


def gets_a_gradient(row: str, parameter: str, step: int) -> bool:
    if "late" in row:
        return parameter != "body.weight" or step >= LATE
    return "frozen" not in row or parameter != "body.weight"


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = Model()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    rng = np.random.default_rng(8)
    size = 10 ** rng.uniform(-3, 1, BEFORE + AFTER)
    gradients = {
        n: rng.standard_normal((BEFORE + AFTER, *p.shape)) * size.reshape(-1, *[1] * p.ndim)
        for n, p in start.items()
    }
    kept = {f"gradients {n}": g for n, g in gradients.items()}
    kept["torch"] = np.array(torch.__version__)
    rows = {n: lambda m, make=make: make(m.parameters()) for n, make in ONE_GROUP.items()}
    for row, make in (rows | OF_THE_MODEL).items():
        model.load_state_dict(start)
        optimizer = make(model)
        names = {p: n for n, p in model.named_parameters()}
        order = [names[p] for g in optimizer.param_groups for p in g["params"]]
        kept[f"{row}|order"] = np.array(order)
        schedule = (lambda t: 1 / (1 + 0.05 * t)) if "scheduled" in row else (lambda t: 1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        for t in range(BEFORE + AFTER):
            if t == BEFORE:
                for name, parameter in model.named_parameters():
                    kept[f"{row}|before|{name}"] = parameter.detach().numpy().copy()
                keep_state_dict(row, state_dict_of(row, model, optimizer), kept)
            for name, parameter in model.named_parameters():
                has = gets_a_gradient(row, name, t)
                parameter.grad = torch.tensor(gradients[name][t]) if has else None
            optimizer.step()
            scheduler.step()
            if t + 1 - BEFORE in SEEN:
                for name, parameter in model.named_parameters():
                    seen = kept.setdefault(f"{row}|after|{name}", [])
                    seen.append(parameter.detach().numpy().copy())
    record_layers(kept)
    np.savez_compressed(pathlib.Path(__file__).parent / "torch_states.npz", **kept)


LAYERS: dict[str, Any] = {
    "linear": (lambda: torch.nn.Linear(3, 3), (2, 3)),
    "conv": (lambda: torch.nn.Conv2d(2, 2, 2), (1, 2, 5, 6)),
    "conv grouped": (lambda: torch.nn.Conv2d(4, 4, (3, 2), groups=2), (1, 4, 5, 6)),
    "transposed": (lambda: torch.nn.ConvTranspose2d(2, 3, (3, 2), stride=2), (1, 2, 4, 5)),
    "transposed square": (lambda: torch.nn.ConvTranspose1d(2, 2, 3), (1, 2, 5)),
    "attention": (lambda: torch.nn.MultiheadAttention(4, 2, batch_first=True), (1, 3, 4)),
}


def record_layers(kept: dict[str, Any]) -> None:
    """What some layers make of an input, with their parameters."""
    for name, (make, shape) in LAYERS.items():
        layer, x = make(), torch.randn(shape)
        for parameter, array in layer.state_dict().items():
            array.copy_(torch.randn(array.shape))
            kept[f"layer {name}|{parameter}"] = array.numpy().copy()
        y = layer(x, x, x)[0] if name == "attention" else layer(x)
        kept |= {f"layer {name}|x": x.numpy(), f"layer {name}|y": y.detach().numpy()}


def keep_state_dict(row: str, saved: Any, kept: dict[str, Any]) -> None:
    """As JSON, with the number of an array that is kept beside it in the place of a tensor."""
    arrays: list[Any] = []

    def plain(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            arrays.append(x.detach().numpy().copy())
            return {"array": len(arrays) - 1}
        if isinstance(x, dict):
            return {"dict": [[key, plain(value)] for key, value in x.items()]}
        return [plain(item) for item in x] if isinstance(x, (list, tuple)) else x

    kept[f"{row}|state_dict"] = np.array(json.dumps(plain(saved)))
    kept |= {f"{row}|array|{i}": array for i, array in enumerate(arrays)}


if __name__ == "__main__":
    main()
