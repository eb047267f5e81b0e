"""A case holds all drawn options of one call; this module makes its tensors and calls. Its repr is Python code."""

import itertools
import math
import random
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import torch_manualbp as mbp
from helpers import DTYPES, Net, closed_mlp, integer_net, integers, lay_out, normal_net, one_layer, recomputing_mlp
from torch_manualbp._compute import run_layers
from torch_manualbp._losses import LossSpec

NAN, INF = float("nan"), float("inf")

# The functions to call, and whether a ReLU ends the network. loss, loss_backward and fused call modules.
FUNCTIONS = {
    "linear_relu": one_layer,
    "store": mbp.mlp,
    "recompute": recomputing_mlp,
    "closed": closed_mlp,
    "closed_recompute": lambda input, weights, biases: run_layers(input, weights, biases, True, "recompute"),
}
ENTRIES = (*FUNCTIONS, "fused", "loss", "loss_backward")
CLOSED = ("linear_relu", "closed", "closed_recompute", "fused")
LOSSES = ("loss", "loss_backward")
SUM = LossSpec(reduction="sum")

# Sizes around the edges of the register tiles of all levels.
EDGES = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97)
# Powers of two that move sums of a few thousand to the ends of the range, where they are still exact.
EXPONENTS = {
    torch.float64: (-1074, 1000),
    torch.float32: (-149, 100),
    torch.bfloat16: (-133, 100),
    torch.float16: (-24,),
}


class Layout(NamedTuple):
    """The memory layout of a tensor, as arguments of `helpers.lay_out`."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int
    expanded: tuple[bool, ...]


@dataclass(frozen=True)
class Case:
    """One call. Tensors are named "input", "weights[0]", "grad_output", "target", …"""

    seed: int = 0  # of the numbers
    entry: str = "store"
    dtype: torch.dtype = torch.float64
    leading: tuple[int, ...] = (1,)
    sizes: tuple[int, ...] = (1, 1)
    biases: tuple[int, ...] = ()  # the layers that have a bias
    needs: tuple[str, ...] = ()  # the tensors that require a gradient
    data: str = "integers"  # or "normals"
    exponent: int = 0  # input and biases are multiplied by 2**exponent
    specials: tuple[tuple[str, float, float], ...] = ()  # tensor, relative position (0 to 1), value
    layouts: tuple[tuple[str, Layout], ...] = ()
    threads: int = 1
    spec: LossSpec = SUM
    scale: float = 1.0  # the incoming gradient of the loss
    prior: bool = False  # .grad already holds a gradient

    def __repr__(self) -> str:
        """Runnable code, without default values."""
        changed = [(f.name, getattr(self, f.name)) for f in fields(self)]
        usual = Case()
        return (
            f"Case({', '.join(f'{name}={_code(value)}' for name, value in changed if value != getattr(usual, name))})"
        )

    @property
    def final_relu(self) -> bool:
        """Whether a ReLU ends the network."""
        return self.entry in CLOSED

    @property
    def has_loss(self) -> bool:
        """Whether the call computes the loss."""
        return self.entry in LOSSES

    @property
    def rows(self) -> int:
        """B."""
        return math.prod(self.leading)


def _code(value: Any) -> str:
    """repr that also covers floats without a literal."""
    if isinstance(value, tuple) and type(value) is tuple:
        return f"({', '.join(map(_code, value))}{',' * (len(value) == 1)})"
    return f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw(seed: int) -> Case:
    """The case of this seed: mostly small networks, some large, with all kinds of options."""
    rng = random.Random(seed)
    chance = lambda share: rng.random() < share  # noqa: E731
    entry, dtype = rng.choice(ENTRIES), rng.choice(DTYPES)
    layers = 1 if entry == "linear_relu" else rng.choice((1, 2, 2, 3, 3, 4, 5, 6))
    large = chance(0.03)
    sizes = tuple(_width(rng, large) for _ in range(layers + 1))
    leading = _leading(rng, large) if chance(0.96) else (rng.randint(300, 3000),)
    work = sum(itertools.starmap(int.__mul__, itertools.pairwise(sizes))) * math.prod(leading)
    if work > 3e7:
        leading = (max(int(3e7 * math.prod(leading) / work), 1),)
    biases = {0: (), 1: tuple(range(layers))}.get(rng.randrange(3), tuple(k for k in range(layers) if chance(0.5)))
    spec = SUM
    if entry in LOSSES:
        spec = _loss(rng, sizes[-1], leading)
    # On integers, among losses only the sum of squares is exact; powers of two are exact if nothing is squared.
    exact = entry not in LOSSES or (spec.name == "mse" and spec.reduction == "sum")
    data = "integers" if exact and chance(0.6) else "normals"
    exponent = rng.choice(EXPONENTS[dtype]) if data == "integers" and entry not in LOSSES and chance(0.1) else 0
    case = Case(
        rng.randrange(2**31),
        entry,
        dtype,
        leading,
        sizes,
        biases,
        data=data,
        exponent=exponent,
        threads=rng.choice((2, 3, 4)) if chance(0.2) else 1,
        spec=spec,
        scale=rng.choice((1.0, 1.0, 0.5, -3.0, 0.0)) if entry == "loss" else 1.0,
        prior=entry == "loss_backward" and chance(0.3),
    )
    shapes = shapes_of(case)
    parameters = [name for name in shapes if name not in ("target", "grad_output")]
    needs = tuple(parameters) if chance(0.4) else tuple(name for name in parameters if chance(0.5))
    specials = []
    for _ in range(rng.choice((1, 1, 2)) if chance(0.15) else 0):
        name = rng.choice([name for name in shapes if not (name == "target" and spec.name == "cross_entropy")])
        specials.append((name, rng.random(), rng.choice((NAN, INF, -INF, 0.0, -0.0))))
    layouts = [(name, _layout(rng, len(shape))) for name, shape in shapes.items() if shape and chance(0.25)]
    case = replace(case, needs=needs, specials=tuple(specials), layouts=tuple(layouts))
    return case if case.entry != "loss_backward" or needs else replace(case, needs=tuple(parameters))


def _width(rng: random.Random, large: bool) -> int:
    pick = rng.random()
    if large:
        return rng.randint(1, 560)
    return rng.randint(1, 20) if pick < 0.55 else rng.choice(EDGES) if pick < 0.85 else rng.randint(0, 140)


def _leading(rng: random.Random, large: bool) -> tuple[int, ...]:
    pick = rng.random()
    if large:
        return (rng.choice((rng.randint(1, 40), rng.randint(1, 3000))),)
    if pick < 0.15:
        return tuple(rng.randint(0 if pick < 0.03 else 1, 6) for _ in range(rng.choice((0, 2, 3))))
    return (rng.randint(0, 20) if pick < 0.6 else rng.choice(EDGES) if pick < 0.8 else rng.randint(1, 400),)


def _loss(rng: random.Random, classes: int, leading: tuple[int, ...]) -> LossSpec:
    name, reduction = rng.choice(("mse", "cross_entropy", "bce_with_logits")), rng.choice(("mean", "sum"))
    if name != "cross_entropy" or classes == 0 or len(leading) > 1:
        return LossSpec("mse" if name == "cross_entropy" else name, reduction)
    ignored = rng.choice((-100, -100, rng.randrange(classes)))
    return LossSpec(name, reduction, ignored, rng.choice((0.0, 0.0, 0.1, 1.0)))


def _layout(rng: random.Random, rank: int) -> Layout:
    order = list(range(rank))
    rng.shuffle(order)
    steps = tuple(rng.choice((1, 1, 2, 3)) for _ in order)
    return Layout(tuple(order), steps, rng.randint(0, 3), tuple(rng.random() < 0.1 for _ in order))


# --- tensors ----------------------------------------------------------------------------------------------------------


def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a case."""
    pairs = list(itertools.pairwise(case.sizes))
    shapes = {"input": (*case.leading, case.sizes[0])}
    shapes |= {f"weights[{k}]": (d_out, d_in) for k, (d_in, d_out) in enumerate(pairs)}
    shapes |= {f"biases[{k}]": (d_out,) for k, (_, d_out) in enumerate(pairs) if k in case.biases}
    if not case.has_loss:
        shapes["grad_output"] = (*case.leading, case.sizes[-1])
    else:
        shapes["target"] = case.leading if case.spec.name == "cross_entropy" else (*case.leading, case.sizes[-1])
    return shapes


class Tensors(NamedTuple):
    """The network, and the gradient of its output or the target of its loss."""

    net: Net
    end: Tensor


def make(case: Case) -> Tensors:
    """The tensors of a case in their layouts; the same at each call.

    Input and biases are multiplied by 2**exponent, which multiplies exactly all f_k and h_k by it.
    """
    torch.manual_seed(case.seed)
    make_net = integer_net if case.data == "integers" else normal_net
    net = make_net(case.leading, case.sizes, case.dtype)
    net = net._replace(biases=[bias if k in case.biases else None for k, bias in enumerate(net.biases)])
    shape = (*case.leading, case.sizes[-1])
    if not case.has_loss or case.spec.name == "mse":
        end = integers(*shape) if case.data == "integers" else torch.randn(shape)
    else:
        end = torch.randint(case.sizes[-1], case.leading) if case.spec.name == "cross_entropy" else torch.rand(shape)
    end = end if end.dtype == torch.int64 else end.to(case.dtype)

    def finish(name: str, tensor: Tensor) -> Tensor:
        for _, where, value in (special for special in case.specials if special[0] == name and tensor.numel()):
            tensor.view(-1)[int(where * tensor.numel())] = value
        if case.exponent and (name == "input" or name.startswith("biases")):
            tensor = (tensor.double() * 2.0**case.exponent).to(case.dtype)
        layout = dict(case.layouts).get(name)
        fits = layout is not None and len(layout.order) == tensor.dim()
        return lay_out(tensor, *layout) if fits else tensor  # type: ignore[misc]

    net = Net(
        finish("input", net.input),
        [finish(f"weights[{k}]", weight) for k, weight in enumerate(net.weights)],
        [None if bias is None else finish(f"biases[{k}]", bias) for k, bias in enumerate(net.biases)],
    )
    return Tensors(net, finish("target" if case.has_loss else "grad_output", end))


# --- the call ---------------------------------------------------------------------------------------------------------


def call(case: Case, net: Net, end: Tensor) -> list[Tensor | None]:
    """The library's output or loss, then the gradient of each leaf, or None if it is not requested."""
    leaves = net.map(lambda tensor: tensor.detach())
    needs = [name in case.needs for name in net.names()]
    for leaf, need in zip(leaves.leaves(), needs, strict=True):
        leaf.requires_grad_(need)
    if case.entry in ("fused", "loss_backward"):
        return _module_call(case, leaves, needs, end)
    if case.entry == "loss":
        spec = case.spec
        options = {"ignore_index": spec.ignore_index, "label_smoothing": spec.label_smoothing}
        output = mbp.mlp_loss(leaves.input, end, *leaves[1:], loss=spec.name, reduction=spec.reduction, **options)  # type: ignore[arg-type]
        end = torch.tensor(case.scale, dtype=case.dtype)
    else:
        output = FUNCTIONS[case.entry](*leaves)
    assert output.requires_grad == any(needs), (
        "the output requires a gradient, but nothing asks for one, or the reverse"
    )
    asked = [leaf for leaf, need in zip(leaves.leaves(), needs, strict=True) if need]
    grads = torch.autograd.grad(output, asked, end, retain_graph=True) if asked else ()
    if asked:
        for first, second in zip(grads, torch.autograd.grad(output, asked, end), strict=True):
            assert_same(first, second, "a second backward pass through the same graph")
    made = iter(grads)
    return [output.detach(), *(next(made) if need else None for need in needs)]


def _module_call(case: Case, leaves: Net, needs: list[bool], end: Tensor) -> list[Tensor | None]:
    """The same computed by modules, with the tensors of the case as parameters."""
    layers = len(leaves.weights)
    model = mbp.MLP([1] * (layers + 1), dtype=case.dtype)
    for layer, weight, bias in zip(list(model)[::2], leaves.weights, leaves.biases, strict=True):
        layer.weight = nn.Parameter(weight.detach(), weight.requires_grad)
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)
    linears = list(model)[::2]
    parameters = [layer.weight for layer in linears] + [layer.bias for layer in linears if layer.bias is not None]
    tensors = [leaves.input, *parameters]
    if case.prior:
        for parameter in parameters:
            parameter.grad = torch.ones(parameter.shape, dtype=case.dtype) if parameter.requires_grad else None
    if case.entry == "fused":
        output = mbp.fuse(nn.Sequential(*model, nn.ReLU()))(leaves.input)
        if any(needs):
            output.backward(end)
        output = output.detach()
    else:
        spec = case.spec
        options = {"ignore_index": spec.ignore_index, "label_smoothing": spec.label_smoothing}
        compute = model.loss_backward if any(needs) else model.loss  # loss_backward raises if nothing is trainable
        output = compute(leaves.input, end, spec.name, spec.reduction, **options)  # type: ignore[arg-type]
        assert not output.requires_grad
    for tensor, need in zip(tensors, needs, strict=True):
        assert (tensor.grad is not None) == need, "an unrequested gradient, or a missing one"
    return [output, *(tensor.grad for tensor in tensors)]


def assert_same(one: Tensor, other: Tensor, what: str) -> None:
    """Equal bits, except the sign of zero and the payload of NaN."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")
