"""Calls the ops of torch.ops.manualbp directly with invalid arguments, which must raise and never crash.

A case starts from a valid call and changes some of its arguments. A single invalid change must be rejected. Several
changes may result in a valid call, whose results must then not depend on arguments sharing memory. (An optimizer's
update may depend on it, and rejects what torch's own step must do by returning False.)
"""

import re
import resource
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from fuzz.differential import UndecidableError
from helpers import Net, integer_net, integers
from torch_manualbp import _ops

__all__ = ["Case", "UndecidableError", "check", "draw", "simpler"]

OPS = (
    "linear_relu", "linear_relu_backward", "mlp", "mlp_backward", "mlp_dropout", "mlp_dropout_backward",
    "mlp_autocast", "mlp_autocast_backward", "mlp_autocast_loss", "mlp_stacked", "mlp_stacked_backward",
    "mlp_backward_store", "mlp_backward_further", "mlp_double_backward", "mlp_loss",
    "flow_forward", "flow_backward", "flow_update", "update", "train",
)  # fmt: skip
HUGE = (2**31, 2**40, 2**60, 2**61, 2**62, 2**63 - 1)


@dataclass(frozen=True)
class Case:
    """A valid call of `op` and the changes to it: (argument, kind of change)."""

    op: str
    changes: tuple[tuple[str, str], ...]
    sizes: tuple[int, ...] = (5, 7, 3)
    rows: int = 4  # above 2^30, all rows are the same one in memory
    loss: str = "mse"
    final_relu: bool = False
    stored: bool = True


# --- changes ----------------------------------------------------------------------------------------------------------


def _freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


# Replacements of a tensor that are invalid if nothing else is changed …
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "text": lambda t: "text",
    "wider": lambda t: t.new_zeros((*t.shape[:-1], t.shape[-1] + 1)),
    "narrower": lambda t: t[..., :-1],
    "scalar": lambda t: t.new_zeros(()),
    "five dimensions": lambda t: t.new_zeros((2, 3, 2, 3, t.shape[-1] + 2)),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "complex64": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: torch.nested.as_nested_tensor([t.float(), t.float()]),
    "freed": _freed,
    "huge last": lambda t: t.new_zeros((1,) * t.dim()).expand(*t.shape[:-1], 2**61),
    "huge first": lambda t: t.new_zeros((1,) * t.dim()).expand(2**58, *t.shape[1:]),
    "huge both": lambda t: t.new_zeros((1,) * t.dim()).expand((2 ** (62 // t.dim()),) * t.dim()),
}
# … and replacements that may be valid.
ODD: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda t: None,
    "number": lambda t: 1.5,
    "list": lambda t: [t],
    "one more dimension": lambda t: t[None],
    "one dimension less": lambda t: t[0],
    "flat": lambda t: t.flatten(),
    "no columns": lambda t: t[..., :0],
    "no rows": lambda t: t[:0],
    "transposed": lambda t: t.t() if t.dim() == 2 else t,
    "strided": lambda t: torch.cat([t, t], -1)[..., ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (1,) * t.dim()),
    "negated": lambda t: torch._neg_view(t) if t.is_floating_point() else t,
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "requires grad": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
}
LISTS: dict[str, Callable[[Any], Any]] = {
    "fewer": lambda v: v[:-1],
    "more": lambda v: [*v, v[-1]],
    "a hole": lambda v: [None, *v[1:]],
    "missing": lambda v: None,
}
OTHERS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "needs": {
        "shorter": lambda v: v[:-1],
        "longer": lambda v: [*v, True],
        "none of them": lambda v: [],
        "not bools": lambda v: ["yes"] * len(v),
        "missing": lambda v: None,
    },
    "biases": {"shorter": lambda v: v[:-1], "longer": lambda v: [*v, True], "missing": lambda v: None},
    "weights": {
        "no layers": lambda v: [],
        "fewer": lambda v: v[:-1],
        "more": lambda v: [*v, v[-1]],
        "a tensor": lambda v: v[0],
        "a hole": lambda v: [None, *v[1:]],
        "missing": lambda v: None,
    },
    **dict.fromkeys(("parameters", "gradients", "states"), LISTS),
    "loss": {"unknown": lambda v: "huber", "empty": lambda v: "", "missing": lambda v: None, "number": lambda v: 3},
    "label_smoothing": {
        "nan": lambda v: float("nan"),
        "infinite": lambda v: float("inf"),
        "negative": lambda v: -1e-9,
        "above one": lambda v: 1.0000001,
        "text": lambda v: "0.1",
    },
    "ignore_index": {"too large": lambda v: 2**63, "text": lambda v: "0", "missing": lambda v: None},
    "store": {"text": lambda v: "yes"},
    "rule": {"unknown": lambda v: "lion", "missing": lambda v: None, "number": lambda v: 3},
    "options": {
        "shorter": lambda v: v[:-1],
        "longer": lambda v: [*v, 0.0],
        "none of them": lambda v: [],
        "text": lambda v: "0.1",
        "missing": lambda v: None,
    },
    "groups": {
        "shorter": lambda v: v[:-1],
        "longer": lambda v: [*v, 0],
        "too large": lambda v: [1, *v[1:]],
        "negative": lambda v: [-1, *v[1:]],
        "huge": lambda v: [2**62, *v[1:]],
        "missing": lambda v: None,
    },
    "fresh": {"longer": lambda v: [*v, True], "not bools": lambda v: ["yes"], "missing": lambda v: None},
    "order": {
        "too large": lambda v: v + len(v),  # in the first batch: `train` reports the steps before one that fails
        "negative": lambda v: v - 1,
        "float32": lambda v: v.float(),
        "two dimensions": lambda v: v[None],
        "strided": lambda v: torch.stack([v, v], 1)[:, 0],
        "freed": _freed,
    },
    "steps": {"too many": lambda v: v + 1, "zero": lambda v: 0, "text": lambda v: "1", "missing": lambda v: None},
    "batch_size": {"zero": lambda v: 0, "negative": lambda v: -1, "text": lambda v: "1"},
    "scales": {
        "shorter": lambda v: v[:-1] or [1.0, 1.0],  # none at all is no dropout
        "longer": lambda v: [*v, 0.0],
        "negative": lambda v: [-1e-9, *v[1:]],
        "nan": lambda v: [float("nan"), *v[1:]],
        "text": lambda v: "0.1",
        "missing": lambda v: None,
    },
    "dtype": {"float32": lambda v: torch.float32, "text": lambda v: "bfloat16", "missing": lambda v: None},
    "relus": {"shorter": lambda v: v[:-1], "longer": lambda v: [*v, True], "missing": lambda v: None},
}
CLASSES: dict[str, Callable[[Tensor], Any]] = {
    "class too large": lambda t: t + 3,
    "class negative": lambda t: t - 4,
    "class huge": lambda t: t + (2**63 - 4),
    "class least": lambda t: torch.full_like(t, -(2**63)),
}


def draw(seed: int) -> Case:
    """The case of this seed."""
    rng = Random(seed)
    op = rng.choice(OPS)
    layers = 1 if op.startswith("linear") else rng.choice((1, 2, 3))
    huge = rng.random() < 0.2
    sizes = tuple(rng.choice((0, 1, 2, 8, 2**20) if huge else (3, 5, 7, 8, 17)) for _ in range(layers + 1))
    case = Case(
        op,
        (),
        sizes,
        rows=rng.choice(HUGE) if huge else rng.choice((1, 4, 40)),
        loss=rng.choice(("mse", "cross_entropy", "bce_with_logits")),
        final_relu=rng.random() < 0.5,
        stored=rng.random() < 0.7,
    )
    if huge:
        return case
    places = _places(case)
    changes = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.choice(places)
        changes.append((place, rng.choice(list(_changes(case, place)))))
    # Everything that torch does with a freed tensor crashes, even printing it in a message.
    changes = next(([change] for change in changes if change[1] == "freed"), changes)
    return replace(case, changes=tuple(changes))


def _changes(case: Case, place: str) -> dict[str, Callable[[Any], Any]]:
    """The possible changes of an argument."""
    if place in OTHERS:
        return OTHERS[place]
    alias = {f"alias of {other}": lambda t: t for other in _places(case) if other not in OTHERS and other != place}
    has_classes = case.loss == "cross_entropy" and case.op in ("mlp_loss", "mlp_autocast_loss", "train")
    classes = CLASSES if place == "target" and has_classes else {}
    return {**WRONG, **ODD, **alias, **classes}


def _places(case: Case) -> list[str]:
    layers = range(len(case.sizes) - 1)
    network = [f"{name}[{k}]" for name in ("weights", "biases") for k in layers] + ["weights"]
    backward = ["grad_output", "input", *network, "hidden", "output", "needs"]
    return {
        "linear_relu": ["input", "weight", "bias"],
        "linear_relu_backward": ["grad_output", "input", "weight", "output", "needs"],
        "mlp": ["input", *network, "store"],
        "mlp_backward": backward,
        "mlp_dropout": ["input", *network, "store", "kept", "scales"],
        "mlp_dropout_backward": [*backward, "kept", "scales"],
        "mlp_autocast": ["input", *network, "store", "kept", "scales", "dtype"],
        "mlp_autocast_backward": [*backward, "kept", "scales"],
        "mlp_autocast_loss": [
            *("input", "target", *network, "loss", "ignore_index", "label_smoothing", "needs", "dtype")
        ],
        "mlp_stacked": ["input", *network, "store"],
        "mlp_stacked_backward": [*backward, *(f"hidden[{k}]" for k in layers[1:])],
        "mlp_backward_store": ["grad_output", "input", *network[: len(layers)], "hidden", "output", "needs"],
        "mlp_backward_further": [
            *("grad_output", "grad_hidden", "input", *network[: len(layers)], "hidden", "output", "needs")
        ],
        "mlp_double_backward": [
            *("grad_output", "input", *network[: len(layers)], "hidden", "output", "df", "grad_dinput", "needs"),
            *(f"{name}[{k}]" for name in ("grad_dweights", "grad_dbiases") for k in layers),
        ],
        "mlp_loss": ["input", "target", *network, "loss", "ignore_index", "label_smoothing", "needs"],
        "flow_forward": ["input", *network, "relus", "f", "h"],
        "flow_backward": ["grad_output", "input", *network, "relus", "f", "df", "copies"],
        "flow_update": [*(f"weights[{k}]" for k in layers), "weights", "copies"],
        "update": [
            *(f"{name}[{k}]" for name in ("parameters", "gradients", "states") for k in layers),
            *("parameters", "gradients", "states", "rule", "options", "groups", "fresh"),
            *(f"states[{2 * len(layers) + k}]" for k in layers if case.stored),  # the counts
        ],
        "train": [
            *("input", "target", "loss", "ignore_index", "label_smoothing", "needs", "order", "batch_size"),
            *(f"{name}[{k}]" for name in ("parameters", "states") for k in range(2 * len(layers))),
            *("parameters", "states", "rule", "options", "groups", "fresh", "steps", "biases"),
        ],
    }[case.op]


# --- the call ---------------------------------------------------------------------------------------------------------


def _valid(case: Case) -> dict[str, Any]:
    """The arguments before anything is changed."""
    torch.manual_seed(0)
    net = integer_net(1 if case.rows > 2**30 else case.rows, case.sizes, torch.float32)

    def tall(tensor: Tensor) -> Tensor:
        return tensor.expand(case.rows, *tensor.shape[1:]) if case.rows > 2**30 else tensor

    rows = net.input.shape[0]
    kept = (case.rows * sum(case.sizes[1:-1]) + 2**63) % 2**64 - 2**63  # the count wraps in 64 bits
    input, output = tall(net.input), integers(rows, case.sizes[-1], dtype=torch.float32).abs()
    grad = tall(integers(rows, case.sizes[-1], dtype=torch.float32))
    hidden = torch.ones(kept if 0 <= kept < 2**20 else 0)
    needs = [True] * (1 + 2 * len(net.weights))
    if case.op == "linear_relu":
        return {"input": input, "weight": net.weights[0], "bias": net.biases[0]}
    if case.op == "linear_relu_backward":
        return {"grad_output": grad, "input": input, "weight": net.weights[0], "output": output, "needs": needs}
    if case.op in ("mlp", "mlp_dropout", "mlp_autocast"):
        parameters = {"weights": net.weights, "biases": net.biases}
        options = {"final_relu": case.final_relu, "store": case.stored}
        if case.op == "mlp_autocast":
            options["dtype"] = torch.bfloat16
        return {"input": input, **parameters, **options, **({} if case.op == "mlp" else _dropout(case))}
    if case.op.startswith("mlp_stacked"):
        return _stacked(case, net, input, output, grad, needs)
    if case.op == "mlp_autocast_backward":
        grad, hidden, output = (
            tensor.bfloat16() if tensor.numel() < 2**20 else tensor for tensor in (grad, hidden, output)
        )
    if case.op in ("mlp_backward", "mlp_dropout_backward", "mlp_autocast_backward"):
        parameters = {"grad_output": grad, "input": input, "weights": net.weights, "biases": net.biases}
        kept = {"hidden": hidden if case.stored else None, "output": output if case.final_relu else None}
        dropout = {} if case.op == "mlp_backward" else _dropout(case)
        return {**parameters, **kept, "needs": needs, **dropout}
    if case.op in ("mlp_backward_store", "mlp_backward_further", "mlp_double_backward"):
        stored = {"hidden": hidden, "output": output if case.final_relu else None}
        first = {"grad_output": grad, "input": input, "weights": net.weights, **stored, "needs": needs}
        if case.op == "mlp_backward_store":
            return first
        if case.op == "mlp_backward_further":
            return {**first, "grad_hidden": hidden * 2}
        like = [weight * 2 for weight in net.weights]
        cotangents = {"grad_dinput": tall(net.input * 2), "grad_dweights": like, "grad_dbiases": net.biases}
        return {**first, "df": hidden * 2, **cotangents, "needs": [True] * (3 + len(net.weights))}
    if case.op == "update":
        like = [torch.ones_like(weight) for weight in net.weights]
        rest = {"parameters": net.weights, "gradients": like, "groups": [0] * len(like)}
        moments = [weight.clone() for weight in (*like, *like)]
        if not case.stored:  # SGD with momentum
            fresh = [case.final_relu] * len(like)
            return {
                **rest,
                "rule": "sgd",
                "states": moments[: len(like)],
                "options": [0.1, 0.9, 0, 0, 0, 0],
                "fresh": fresh,
            }
        states = [*moments, *(torch.tensor(0.0) for _ in like)]
        return {**rest, "rule": "adam", "states": states, "options": [0.1, 0.9, 0.9, 1e-8, 0, 0, 0, 0], "fresh": []}
    copies = torch.ones(sum(weight.numel() for weight in net.weights))
    if case.op == "flow_update":
        return {"weights": net.weights, "copies": copies}
    if case.op.startswith("flow"):
        relus = [k % 2 == 0 for k in range(len(net.weights))]
        rest = {"input": input, "weights": net.weights, "biases": net.biases, "relus": relus}
        size = case.rows * sum(case.sizes[1:])
        f, other = torch.ones(2, size if 0 <= size < 2**20 else 0)
        if case.op == "flow_forward":
            return {**rest, "f": f, "h": other}
        return {"grad_output": grad, **rest, "f": f, "has_f": case.stored, "df": other, "copies": copies}
    is_class = case.loss == "cross_entropy"
    target = torch.zeros(rows, dtype=torch.int64) if is_class else torch.rand(rows, case.sizes[-1])
    rest = {"loss": case.loss, "mean": True, "ignore_index": -100, "label_smoothing": 0.1}
    if case.op == "train":
        parameters = [each for layer in zip(net.weights, net.biases, strict=True) for each in layer if each is not None]
        return {
            **{"input": input, "target": tall(target), "order": torch.arange(rows), "batch_size": 3, **rest},
            **{"biases": [each is not None for each in net.biases], "needs": [True] * (2 * len(net.weights))},
            **{"parameters": parameters, "rule": "sgd", "options": [0.1, 0.9, 0, 0, 0, 0]},
            **{"states": [each.clone() for each in parameters]},
            **{"groups": [0] * len(parameters), "fresh": [case.final_relu] * len(parameters)},
            **{"autocast": torch.bfloat16 if case.stored and case.final_relu else None},
            **{"max_grad_norm": 1.0 if case.stored else None, "steps": -(-rows // 3), "seconds": 1.0},
        }
    needs[0] = case.stored
    parameters = {"weights": net.weights, "biases": net.biases}
    if case.op == "mlp_autocast_loss":
        rest["dtype"] = torch.bfloat16
    return {"input": input, "target": tall(target), **parameters, **rest, "needs": needs, "flat": False}


def _stacked(case: Case, net: Net, input: Tensor, output: Tensor, grad: Tensor, needs: list[bool]) -> dict[str, Any]:
    """The arguments of mlp_stacked and of its backward pass for two networks."""

    def twice(tensor: Tensor) -> Tensor:
        return tensor.expand(2, *tensor.shape) if tensor.numel() > 2**24 else torch.stack([tensor, tensor])

    parameters = {"weights": [twice(weight) for weight in net.weights], "biases": [twice(bias) for bias in net.biases]}
    if case.op == "mlp_stacked":
        return {"input": twice(input), **parameters, "final_relu": case.final_relu, "store": case.stored}
    hidden = [twice(torch.ones(1, width).expand(case.rows, width)) for width in case.sizes[1:-1]]
    kept = {"hidden": hidden if case.stored else [], "output": twice(output) if case.final_relu else None}
    return {"grad_output": twice(grad), "input": twice(input), **parameters, **kept, "needs": needs}


KEPT = (
    "biases", "needs", "loss", "mean", "ignore_index", "label_smoothing", "rule", "states", "options", "groups",
    "fresh", "autocast",
)  # fmt: skip


def _call(case: Case, arguments: dict[str, Any]) -> Any:
    """What the op returns; of `train`, which is called for what `keep` is given first, the number of steps."""
    if case.op != "train":
        return getattr(_ops, case.op)(**arguments)
    handle = _ops.keep(**{name: arguments[name] for name in KEPT})
    try:
        rest = {name: value for name, value in arguments.items() if name not in KEPT}
        losses = _ops.train(handle, **rest, options=arguments["options"] if case.final_relu else None)
        return None if losses is None else losses.numel()
    finally:
        _ops.release(handle)


def _dropout(case: Case) -> dict[str, Any]:
    """The dropout after each ReLU, all elements being kept."""
    layers = len(case.sizes) - 1
    scales = [2.0] * (layers - 1 + case.final_relu) + [0.0] * (not case.final_relu)
    size = case.rows * sum(width for width, scale in zip(case.sizes[1:], scales, strict=True) if scale)
    return {"kept": torch.ones(size if size < 2**20 else 0, dtype=torch.bool), "scales": scales}


def check(case: Case) -> None:
    """Raises AssertionError if an invalid call returns, or if a result depends on shared memory."""
    try:
        arguments = _valid(case)
    except RuntimeError:  # torch itself cannot make a tensor of this many elements
        raise UndecidableError from None
    impossible = case.rows > 2**30 and _largest_result(case) >= 2**40
    if case.rows > 2**30 and not impossible and not case.changes:
        raise UndecidableError  # valid, but too much to compute
    certain = False
    for place, kind in case.changes:
        before = _get(arguments, place)
        if place not in OTHERS and not isinstance(before, Tensor):
            continue  # already changed, or absent
        if isinstance(before, Tensor) and before.numel() > 2**30:
            continue  # already huge: to make it sparse, torch would read it for years
        try:
            other = _get(arguments, kind[9:]) if kind.startswith("alias of ") else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nested tensors are prototypes, imaginary parts are dropped
                after = _changes(case, place)[kind](before) if other is None else other
        except (RuntimeError, IndexError, TypeError, ZeroDivisionError):
            continue  # torch itself cannot make such a tensor from this one
        certain = (kind in WRONG and not (isinstance(after, Tensor) and _alike(before, after))) or place in OTHERS
        if isinstance(before, Tensor) and before.dim() == 0 and kind == "float64":
            certain = False  # a valid count of steps
        if case.op == "mlp_autocast_backward" and (place, kind) == ("grad_output", "float16"):
            certain = False  # the dtype of this call, unless the activations or the output have another
        _set(arguments, place, after)
    try:
        result = _call(case, arguments)
    except Exception:  # as required
        return
    if result is False or (result is None and case.op == "train"):  # rejected, too
        return
    assert not impossible or case.changes, "returned more than fits into memory"
    assert not (certain and len(case.changes) == 1), "accepted an invalid argument"
    if any(t.device.type == "meta" for t in _tensors(result)):
        assert all(t.device.type == "meta" for t in _tensors(list(arguments.values()))), "mixed devices were accepted"
        return
    apart = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), arguments)
    for one, other in zip(_tensors(result), _tensors(_call(case, apart)), strict=True):
        torch.testing.assert_close(
            one, other, rtol=0, atol=0, equal_nan=True, msg="memory that arguments share matters"
        )


def _largest_result(case: Case) -> int:
    """The number of elements of the largest tensor that the unchanged call must make."""
    output, hidden, input = case.sizes[-1], sum(case.sizes[1:-1]), case.sizes[0]
    widths = {
        "linear_relu": [output],
        "linear_relu_backward": [input],
        "mlp": [output, hidden * case.stored],
        "mlp_backward": [input],
        "mlp_dropout": [output, hidden * case.stored],
        "mlp_dropout_backward": [input],
        "mlp_autocast": [output, hidden * case.stored],
        "mlp_autocast_backward": [input],
        "mlp_stacked": [2 * output, 2 * hidden * case.stored],
        "mlp_stacked_backward": [2 * input],
        "mlp_backward_store": [input, hidden],
        "mlp_backward_further": [input],
        "mlp_double_backward": [input, hidden, output],
        # All classes are read before any tensor is made.
        "mlp_loss": [input * (case.stored and case.loss != "cross_entropy")],
        "mlp_autocast_loss": [input * (case.stored and case.loss != "cross_entropy")],
        "flow_forward": [hidden + output],
        "flow_backward": [hidden + output],
        "flow_update": [0],
        "update": [0],
        "train": [0],
    }[case.op]
    return case.rows * max(widths)


def _alike(one: Tensor, other: Tensor) -> bool:
    if other.is_nested:
        return False
    same = (one.shape, one.dtype, one.layout, one.device) == (other.shape, other.dtype, other.layout, other.device)
    is_view = other.layout is torch.strided  # other layouts have no storage
    return same and not (is_view and one.untyped_storage().nbytes() != other.untyped_storage().nbytes())


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _split(place: str) -> tuple[str, int | None]:
    name, index = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", place).groups()  # type: ignore[union-attr]
    return name, None if index is None else int(index)


def _get(arguments: dict[str, Any], place: str) -> Any:
    name, index = _split(place)
    value = arguments[name]
    if index is None:
        return value
    return value[index] if isinstance(value, list) and index < len(value) else None


def _set(arguments: dict[str, Any], place: str, value: Any) -> None:
    name, index = _split(place)
    if index is None:
        arguments[name] = value
    elif isinstance(arguments[name], list) and index < len(arguments[name]):
        arguments[name] = [*arguments[name][:index], value, *arguments[name][index + 1 :]]


def prepare() -> None:
    """Limits the address space of the process that runs the cases, so that huge allocations fail."""
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))


def simpler(case: Case) -> Iterator[Case]:
    """Yields simpler cases."""
    for k in range(len(case.changes) if len(case.changes) > 1 else 0):
        yield replace(case, changes=case.changes[:k] + case.changes[k + 1 :])
    if len(case.sizes) > 2 and not case.changes:
        for k in range(len(case.sizes)):
            yield replace(case, sizes=case.sizes[:k] + case.sizes[k + 1 :])
    for k, width in enumerate(case.sizes):
        if width > 1:
            yield replace(case, sizes=(*case.sizes[:k], 1, *case.sizes[k + 1 :]))
