"""Chains in hand-written forwards: the numbers, gradients and errors of the plain model, with fewer calls."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import torch_manualbp as mbp
from helpers import DTYPES, recorded_calls
from torch_manualbp import _chains

RELUS = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "Tensor.relu": lambda x: x.relu(),
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "relu_": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(min=0),
    "torch.clamp": lambda x: torch.clamp(x, 0),
    "clamp_min_": lambda x: x.clamp_min_(0),
    "module": nn.ReLU(),
    "module inplace": nn.ReLU(inplace=True),
}


class Written(nn.Module):
    """Layers a to d of width 8, and a forward that the test gives, with the module as its first argument."""

    def __init__(self, forward, dtype=None, **modules):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8, dtype=dtype) for _ in range(4))
        self.act, self.inplace, self.tanh, self.drop = nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.Dropout(0.4)
        self.flag, self.kept = False, None
        self.register_buffer("mask", torch.tril(torch.ones(8, 8, dtype=dtype)))
        for name, module in modules.items():
            setattr(self, name, module)
        self.forward_ = forward

    def forward(self, *args, **kwargs):
        return type(self).relay(self, *args, **kwargs)

    def relay(self, *args, **kwargs):
        return self.forward_(self, *args, **kwargs)


def chain(self, x):
    return self.c(F.relu(self.b(F.relu(self.a(x)))))


def twins(forward, *, seed=0, **arguments):
    """A plain model, and its fused copy."""
    torch.manual_seed(seed)
    plain = Written(forward, **arguments)
    fused = copy.deepcopy(plain)
    return plain, mbp.fuse(fused)


def tensors_of(output):
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors_of(value)]


def batch(rows=1024, dtype=None):
    return torch.randn(rows, 8, dtype=dtype)


def compare(plain, fused, *inputs, calls=5, tolerance=1e-5):
    """Compares outputs and gradients in several calls. Returns how many ops of ours the last forward called."""
    counted = 0
    for _ in range(calls):
        results = []
        for model in (plain, fused):
            args = [each.detach().clone().requires_grad_(each.is_floating_point()) for each in inputs]
            torch.manual_seed(1)
            if model is fused:
                ops: list[str] = []
                output = ops_of(lambda m=model, a=args: m(*a), ops)
                counted = len(ops)
            else:
                output = model(*args)
            outputs = tensors_of(output)
            assert all(type(tensor) in (Tensor, nn.Parameter) for tensor in outputs)
            leaves = [each for each in [*model.parameters(), *args] if each.requires_grad]
            total = sum((tensor.double() * (1 + k)).square().sum() for k, tensor in enumerate(outputs))
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
            results.append([*outputs, *grads])
        for expected, actual in zip(*results, strict=True):
            if expected is None or actual is None:
                assert expected is actual is None
            else:
                assert actual.dtype is expected.dtype
                assert actual.shape == expected.shape
                assert (actual - expected).abs().max().item() <= tolerance * expected.abs().max().item()
    return counted


def ops_of(function, names):
    """What the function returns; `names` gets the forward ops of ours that it called."""
    with recorded_calls() as calls:
        result = function()
    names += [name for name, _ in calls if name in ("mlp", "mlp_dropout", "linear_relu")]
    return result


@pytest.mark.parametrize("name", RELUS)
def test_every_relu_of_torch_joins(name):
    relu = RELUS[name]
    plain, fused = twins(lambda self, x: self.c(relu(self.b(relu(self.a(x))))))
    assert compare(plain, fused, batch()) == 1


@pytest.mark.parametrize("kind", ["act", "inplace"])
def test_relu_modules_join(kind):
    def forward(self, x):
        relu = getattr(self, kind)
        return self.c(relu(self.b(relu(self.a(x)))))

    assert compare(*twins(forward), batch()) == 1
    plain, fused = twins(lambda self, x: getattr(self, kind)(self.b(getattr(self, kind)(self.a(x)))))
    assert compare(plain, fused, batch()) == 1
    for name in ("a", "b"):  # the slot of compiled calls is used for layers of chains only
        assert "_compiled_call_impl" in getattr(fused, name).__dict__
    assert "_compiled_call_impl" not in fused.c.__dict__


def reuse(self, x):
    h = F.relu(self.a(x))
    return self.b(h) + self.c(h) * h


def residual(self, x):
    for layer in (self.a, self.b):
        x = x + self.c(F.relu(layer(x)))
    return x


def pre_activation_is_used(self, x):
    f = self.a(x)
    return F.relu(f) + self.b(F.relu(f)) * f.mean()


def branch_on_values(self, x):
    h = F.relu(self.a(x))
    if h.sum() > 1e9:
        return h
    h = F.relu(self.b(h))
    return self.c(h) if h[0, 0].item() >= 0 else self.d(h)


def leaves_by_an_attribute(self, x):
    self.kept = h = F.relu(self.a(x))
    return self.b(h)


def leaves_by_several(self, x):
    h = F.relu(self.a(x))
    y = self.b(h)
    return {"y": y, "more": [h, (F.relu(y),)]}


def recurrent(self, x):
    h = x
    for _ in range(3):
        h = F.relu(self.a(h))
    return self.b(h)


def two_paths(self, x):
    first, second = F.relu(self.a(x)), F.relu(self.b(x))
    return torch.minimum(self.c(first), self.d(second))


def interleaved(self, x):
    first, second = self.a(x), self.b(x)
    first, second = F.relu(first), F.relu(second)
    return self.c(first), self.d(second)


def shared_by_two_paths(self, x):
    return self.b(F.relu(self.a(x))) + self.c(F.relu(self.a(x * 2)))


def skip(self, x):
    h = x
    for k, layer in enumerate((self.a, self.b, self.c, self.d)):
        h = F.relu(layer(h))
        if k == 1:
            h = torch.cat([x, h], -1)[:, :8]
    return h


def in_place_after(self, x):
    y = self.b(F.relu(self.a(x)))
    y += 1
    y.mul_(2)
    y[:, 0] = 0
    return y


def hidden_in_place(self, x):
    h = F.relu(self.a(x))
    h = h.clone()
    h.add_(1)
    return self.b(h)


def views(self, x):
    return self.b(F.relu(self.a(x)).view(4, -1, 8)).flatten(0, 1)[::2].t()


def functional_linear(self, x):
    return F.linear(F.relu(self.a(x)), self.b.weight * 2, bias=None)


def functional_everywhere(self, x):
    for _ in range(2):
        x = F.relu(F.linear(x, self.a.weight * self.mask, self.a.bias))
    return F.linear(x, self.b.weight, self.b.bias)


def functional_in_two_places(self, x):
    h = F.relu(F.linear(x, self.a.weight * 2))
    y = F.linear(torch.tanh(F.linear(h, self.b.weight)), self.c.weight)
    return y + self.d(F.relu(F.linear(bias=self.c.bias, weight=self.c.weight, input=x)))


def keyword(self, x):
    return self.b(input=F.relu(self.a(input=x))) + torch.relu(input=self.c(x)) + torch.clamp(input=self.d(x), min=0)


def double_backward(self, x):
    y = self.b(F.relu(self.a(x)))
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y, slope


def no_grad_inside(self, x):
    h = F.relu(self.a(x))
    with torch.no_grad():
        target = self.b(h)
    return self.c(h), target


def no_grad_in_the_middle(self, x):
    h = F.relu(self.a(x))
    with torch.no_grad():
        h = F.relu(self.b(h))
    return self.c(h)


def detached(self, x):
    return self.b(F.relu(self.a(x)).detach())


def rebound(self, x):
    a = F.relu(self.a(x))
    a = F.relu(self.b(a))
    return 2.0 * torch.tanh(self.c(a))


def nothing(self, x):
    return self.b(torch.tanh(self.a(x)))


def softplus_of_each(self, x):
    return torch.stack([self.b(F.relu(self.a(row))) for row in x[:3]])


def rows_in_front(self, x):
    return self.c(F.relu(self.b(F.relu(self.a(x.view(2, 2, -1, 8))))))


def lists(self, x):
    return torch.cat([self.b(F.relu(self.a(x))), F.relu(self.c(x)), self.d(x)], dim=1)


def random_numbers(self, x):
    h = F.relu(self.a(x))
    h = F.dropout(h, 0.5, True)
    return self.b(h) + torch.randn(8)


def dropout(self, x):
    h = F.dropout(F.relu(self.a(x)), 0.3, self.training)
    h = self.drop(self.act(self.b(h)))
    return self.c(h) + torch.rand(8)


def dropout_of_two_paths(self, x):
    first = F.dropout(F.relu(self.a(x)), 0.5)
    second = F.dropout(F.relu(self.b(x)), 0.5)
    noise = torch.rand(8)
    return self.c(first), self.d(second) + noise


def dropout_and_its_input(self, x):
    h = F.relu(self.a(x))
    return self.b(F.dropout(h, 0.5)) + h


def dropout_of_everything(self, x):
    return self.b(F.dropout(F.relu(self.a(x)), 1.0)) + self.c(F.dropout(F.relu(self.a(x)), 0))


def checkpointed(self, x):
    h = F.relu(self.a(x))
    return checkpoint(lambda h: self.c(F.relu(self.b(h))), h, use_reentrant=False)


def checkpointed_layer(self, x):
    return self.c(checkpoint(self.b, F.relu(self.a(x)), use_reentrant=False))


def saved_elsewhere(self, x):
    h = F.relu(self.a(x))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        h = F.relu(self.b(h))
    return self.c(h)


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is negative."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        return -grad_output


def custom_function(self, x):
    h = F.relu(Reversed.apply(self.a(x)))
    return self.b(Reversed.apply(h))


def vmapped(self, x):
    return vmap(lambda row: self.b(F.relu(self.a(row))))(x) + self.d(F.relu(self.c(x)))


def gradient_inside(self, x):
    return self.b(F.relu(self.a(x))) + grad(lambda v: self.c(F.relu(self.a(v))).sum())(x)


# The forward, and how many ops of ours it calls at last.
FORWARDS = {
    chain: 1, reuse: 1, residual: 2, pre_activation_is_used: 0, branch_on_values: 2, leaves_by_an_attribute: 1,
    leaves_by_several: None, recurrent: None, two_paths: 2, interleaved: 2, shared_by_two_paths: 2, skip: 2,
    in_place_after: 1, hidden_in_place: 1, views: None, functional_linear: 1, functional_everywhere: None, functional_in_two_places: 2, keyword: None, double_backward: 1,
    no_grad_inside: None, no_grad_in_the_middle: None, detached: None, rebound: 1, nothing: 0, softplus_of_each: None,
    rows_in_front: 1, lists: 2, random_numbers: 1, dropout: 1,
    dropout_of_two_paths: 2, dropout_and_its_input: None, dropout_of_everything: None, checkpointed: None, checkpointed_layer: None, saved_elsewhere: None, custom_function: None, vmapped: None, gradient_inside: None,
}  # fmt: skip


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
@pytest.mark.parametrize("rows", [128, 4096])
def test_numbers_and_gradients_are_those_of_plain(forward, rows):
    counted = compare(*twins(forward), batch(rows))
    if rows == 4096 and FORWARDS[forward] is not None:
        assert counted == FORWARDS[forward]


# --- forwards that change ---------------------------------------------------------------------------------------------


def flagged(*, early=None, late=None):
    """A chain a, b, c; once the flag is set, `early` sees the first pre-activation, `late` the first activation."""

    def forward(self, x):
        f = self.a(x)
        if self.flag and early is not None:
            f = early(self, f, x)
        h = F.relu(f)
        if self.flag and late is not None:
            h = late(self, h, x)
        return self.c(F.relu(self.b(h)))

    return forward


def keeps(self, h, x):
    self.kept = h
    return h


def prints(self, h, x):
    assert len(repr(h)) > 10
    return h


CHANGES = {
    "another function": lambda self, h, x: torch.tanh(h),
    "in place": lambda self, h, x: h.mul_(2),
    "in place, the result dropped": lambda self, h, x: (h.mul_(2), h)[1],
    "item assignment": lambda self, h, x: (h.__setitem__((0, 0), 5.0), h)[1],
    "numpy": lambda self, h, x: h * float(h.detach().numpy().sum()),
    "shape": lambda self, h, x: h.view(h.shape[0], -1),
    "iteration": lambda self, h, x: torch.stack(list(h)),
    "a list of it": lambda self, h, x: torch.cat([h, x], 0)[: len(h)],
    "a keyword argument": lambda self, h, x: torch.add(input=x, other=h),
    "out": lambda self, h, x: h + torch.add(h.detach(), x.detach(), out=torch.empty_like(x.detach())),
    "detach": lambda self, h, x: h.detach(),
    "data": lambda self, h, x: h.data + h,
    "requires_grad": lambda self, h, x: h if h.requires_grad else h * 2,
    "grad_fn": lambda self, h, x: h * (2 if h.grad_fn is None else 3),
    "a value": lambda self, h, x: h if h.sum().item() > 0 else -h,
    "another layer": lambda self, h, x: self.d(h),
    "another layer and the ReLU": lambda self, h, x: h + self.d(h),
    "gradient": lambda self, h, x: h + torch.autograd.grad(h.sum(), x, create_graph=True)[0],
    "a hook on it": lambda self, h, x: (h.register_hook(lambda g: g * 2), h)[1],
    "saved": keeps,
    "print": prints,
    "deepcopy of its value": lambda self, h, x: h + copy.deepcopy(h.detach()),
    "pickle": lambda self, h, x: h + pickle.loads(pickle.dumps(h.detach())),
    "no_grad": lambda self, h, x: h + torch.no_grad()(lambda: self.d(h))(),
    "autocast": lambda self, h, x: h + torch.autocast("cpu", torch.bfloat16)(lambda: self.d(h))().float(),
    "vmap": lambda self, h, x: vmap(lambda row: row * 2)(h),
    "checkpoint": lambda self, h, x: checkpoint(torch.tanh, h, use_reentrant=False),
    "a module": lambda self, h, x: self.tanh(h),
    "deleted": lambda self, h, x: x[:, :8] * 1,
    "parameter": lambda self, h, x: h + nn.Parameter(h.detach()),
    "type": lambda self, h, x: h.double().float(),
}


@pytest.mark.parametrize("position", ["early", "late"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_that_does_something_else(position, change):
    plain, fused = twins(flagged(**{position: CHANGES[change]}))
    assert compare(plain, fused, batch()) == 1
    plain.flag = fused.flag = True
    try:
        compare(plain, plain, batch(), calls=1)
    except RuntimeError:  # for example because autograd has saved what was modified
        with pytest.raises(RuntimeError):
            compare(fused, fused, batch(), calls=1)
    else:
        compare(plain, fused, batch(), calls=3, tolerance=0.3 if change == "autocast" else 1e-5)
    if change == "saved":
        assert type(fused.kept) is Tensor
        torch.testing.assert_close(fused.kept, plain.kept)
    plain.flag = fused.flag = False
    compare(plain, fused, batch(), calls=3)


IN_PLACE = {
    "the input": lambda self, h, x: (x.detach().add_(1), h)[1],
    "the weight": lambda self, h, x: (self.a.weight.data, torch.no_grad()(lambda: self.a.weight.mul_(2))(), h)[2],
    "the bias": lambda self, h, x: (torch.no_grad()(lambda: self.a.bias.zero_())(), h)[1],
}


@pytest.mark.parametrize("change", IN_PLACE)
def test_a_write_between_a_layer_and_its_use(change):
    """If the first call does it, the layer is computed at once. If a later one does, an error says so, once."""
    forward = flagged(late=IN_PLACE[change])
    plain, fused = twins(forward)
    plain.flag = fused.flag = True
    x = batch()
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(fused(x.clone()), plain(x.clone()), rtol=1e-5, atol=1e-5)
    plain, fused = twins(forward)
    fused(x), fused(x)
    plain.flag = fused.flag = True
    with pytest.raises(RuntimeError, match="modified the layer's input or a parameter in place"):
        fused(x.clone())
    fused.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), plain(x.clone()), rtol=1e-5, atol=1e-5)


def test_code_that_torch_cannot_see():
    """An autograd.Function takes its inputs in C++: an error the first time, if earlier calls did something else."""
    plain, fused = twins(flagged(late=lambda self, h, x: Reversed.apply(h)))
    compare(plain, fused, batch())
    plain.flag = fused.flag = True
    with pytest.raises(RuntimeError, match="code that torch cannot see"):
        fused(batch())
    compare(plain, fused, batch())


def test_errors_are_those_of_plain():
    plain, fused = twins(chain)
    for _ in range(3):
        fused(batch())
    for bad in (torch.randn(1024, 7), torch.randn(1024, 8, dtype=torch.float64), torch.zeros(1024, 8, dtype=torch.int64),
                torch.tensor(1.0), [1.0], torch.randn(8, 1024)):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError)) as expected:
            plain(bad)
        with pytest.raises(type(expected.value)) as actual:
            fused(bad)
        assert str(actual.value) == str(expected.value)
    plain.b = nn.Linear(9, 8)
    fused.b.weight = nn.Parameter(torch.randn(8, 9))
    for _ in range(2):
        with pytest.raises(RuntimeError) as expected:
            plain(batch())
        with pytest.raises(RuntimeError) as actual:
            fused(batch())
        assert str(actual.value) == str(expected.value)


def test_an_exception_in_the_forward_leaves_no_trace():
    def forward(self, x):
        h = F.relu(self.a(x))
        if self.flag:
            raise KeyError("test")
        return self.b(h)

    plain, fused = twins(forward)
    compare(plain, fused, batch())
    fused.flag = True
    with pytest.raises(KeyError):
        fused(batch())
    assert _chains.this_thread.plan is None
    assert not _chains.this_thread.chains
    fused.flag = False
    assert compare(plain, fused, batch()) == 1


# --- modes and transforms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    plain, fused = twins(chain, dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert compare(plain, fused, batch(dtype=dtype), tolerance=tolerance) == 1


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("cpu")],
)
def test_modes(mode):
    plain, fused = twins(rebound)
    x = batch(8192)
    for _ in range(4):
        with mode():
            expected, actual = plain(x), fused(x)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert actual.requires_grad == expected.requires_grad
        assert actual.is_inference() == expected.is_inference()
    x = x.clone().requires_grad_()
    assert compare(plain, fused, x) == 1
    with mode():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


def test_inference_tensors():
    plain, fused = twins(chain)
    with torch.inference_mode():
        x = batch(8192)
        for _ in range(3):
            names: list[str] = []
            torch.testing.assert_close(ops_of(lambda: fused(x), names), plain(x), rtol=1e-5, atol=1e-5)
        assert names == ["mlp"]
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms():
    plain, fused = twins(chain)
    x = batch()
    for _ in range(3):
        fused(x)
    parameters = dict(plain.named_parameters())
    torch.testing.assert_close(functional_call(fused, parameters, (x,)), plain(x))
    doubled = {name: 2 * value.detach() for name, value in parameters.items()}
    torch.testing.assert_close(functional_call(fused, doubled, (x,)), functional_call(plain, doubled, (x,)))

    def loss(model):
        return lambda parameters, x: functional_call(model, parameters, (x,)).square().sum()

    for transform in (
        lambda f: grad(f)(parameters, x),
        lambda f: vmap(grad(f), (None, 0))(parameters, x[:4]),
        lambda f: jvp(lambda x: f(parameters, x), (x,), (torch.ones_like(x),)),
    ):
        expected, actual = transform(loss(plain)), transform(loss(fused))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_capture():
    plain, fused = twins(rebound)
    x = batch()
    for _ in range(2):
        for capture in (
            lambda m: torch.jit.trace(m, x),
            lambda m: torch.export.export(m, (x,)).module(),
            lambda m: torch.compile(m, backend="eager", fullgraph=True),
            lambda m: torch.compile(m, backend="manualbp", fullgraph=True),
        ):
            torch.testing.assert_close(capture(fused)(x), plain(x), rtol=1e-5, atol=1e-5)
        fused(x), fused(x)


class Scriptable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        """Scripts compile this source."""
        return self.b(F.relu(self.a(x))) * scale


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_and_signature():
    import inspect

    plain = Scriptable()
    fused = mbp.fuse(copy.deepcopy(plain))
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    x = batch()
    for _ in range(2):
        torch.testing.assert_close(torch.jit.script(fused)(x), plain(x))
        torch.testing.assert_close(torch.fx.symbolic_trace(fused)(x), plain(x))
        fused(x), fused(x)
    assert compare(plain, fused, x) == 1


# --- modules --------------------------------------------------------------------------------------------------------------


class Masked(nn.Linear):
    """A layer of a masked autoregressive network."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", torch.tril(torch.ones(sizes[1], sizes[0])))

    def forward(self, x):
        return F.linear(x, self.mask * self.weight, self.bias)


def test_subclasses_of_linear():
    plain, fused = twins(chain, b=Masked(8, 8))
    assert compare(plain, fused, batch()) == 1
    plain, fused = twins(chain, a=Masked(8, 8), b=Masked(8, 8), c=Masked(8, 8))
    assert compare(plain, fused, batch()) == 1
    plain, fused = twins(chain, a=parametrizations.weight_norm(nn.Linear(8, 8)), c=Masked(8, 8))
    assert compare(plain, fused, batch()) == 1


class Probe(nn.Module):
    """A module that is not torch's: it must be given tensors."""

    def __init__(self):
        super().__init__()
        self.types: list[type] = []

    def forward(self, x):
        self.types.append(type(x))
        return x


@pytest.mark.parametrize("place", ["before the ReLU", "after it"])
def test_other_modules_are_given_tensors(place):
    def forward(self, x):
        h = self.a(x)
        h = F.relu(self.probe(h)) if place == "before the ReLU" else self.probe(F.relu(h))
        return self.c(F.relu(self.b(h)))

    plain, fused = twins(forward, probe=Probe())
    compare(plain, fused, batch())
    assert set(fused.probe.types) == {Tensor}


@pytest.mark.parametrize("name", ["a", "b", "c", "act", "tanh"])
@pytest.mark.parametrize("kind", ["forward", "pre", "full_backward", "kwargs"])
def test_hooks(name, kind):
    def forward(self, x):
        return self.tanh(self.c(self.act(self.b(self.act(self.a(x))))))

    seen: dict[str, list] = {"plain": [], "fused": []}
    plain, fused = twins(forward)
    assert compare(plain, fused, batch()) == 1
    handles = []
    for who, model in (("plain", plain), ("fused", fused)):
        module = getattr(model, name)

        def hook(module, *args, who=who):
            tensors = [tensor for arg in args for tensor in ([arg] if isinstance(arg, Tensor) else arg or ())]
            assert all(type(tensor) is Tensor for tensor in tensors)
            seen[who] += [tensor.detach().clone() for tensor in tensors]

        if kind == "forward":
            handles.append(module.register_forward_hook(hook))
        elif kind == "pre":
            handles.append(module.register_forward_pre_hook(hook))
        elif kind == "kwargs":
            handles.append(module.register_forward_hook(lambda m, a, k, o, hook=hook: hook(m, *a, o), with_kwargs=True))
        else:
            handles.append(module.register_full_backward_hook(hook))
    compare(plain, fused, batch(), calls=3)
    assert len(seen["plain"]) == len(seen["fused"]) > 0
    for expected, actual in zip(seen["plain"], seen["fused"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()
    assert compare(plain, fused, batch()) == 1


def test_a_global_hook():
    plain, fused = twins(chain)
    assert compare(plain, fused, batch()) == 1
    types = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: types.append(type(output)))
    try:
        compare(plain, fused, batch(), calls=2)
    finally:
        handle.remove()
    assert set(types) == {Tensor}
    assert compare(plain, fused, batch()) == 1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return F.relu(self.fc(x))


class Head(nn.Sequential):
    """As torchrl's MLP: a Sequential with work of its own before the children."""

    def forward(self, *inputs):
        return super().forward(torch.cat(inputs, -1))


def test_chains_cross_modules():
    torch.manual_seed(0)
    plain = nn.Sequential(Block(), Block(), nn.Linear(8, 8))
    fused = mbp.fuse(copy.deepcopy(plain))
    compare(plain, fused, batch(4096))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(3)])
            self.head = Head(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
            self.out = nn.Linear(2, 2)

        def forward(self, x):
            h = x
            for block in self.blocks:
                h = block(h)
            return self.out(F.relu(self.head(h, x)))

    plain = Net()
    fused = mbp.fuse(copy.deepcopy(plain))
    assert compare(plain, fused, batch(32768)) == 2
    for part in ("blocks", "head"):  # each part is a model of its own
        parts = [model.blocks[1] if part == "blocks" else model.head for model in (plain, fused)]
        inputs = [batch(32768)] * (1 if part == "blocks" else 2)
        assert compare(*parts, *inputs) == 1


def test_a_copy_makes_its_own_plan():
    plain, fused = twins(chain)
    compare(plain, fused, batch())
    copies = [copy.deepcopy(fused), copy.copy(fused), pickle.loads(pickle.dumps(mbp.fuse(Scriptable())))]
    assert compare(plain, copies[0], batch()) == 1
    assert compare(plain, fused, batch()) == 1
    with torch.no_grad():
        copies[0].a.weight.zero_()
    assert compare(plain, fused, batch()) == 1
    model = mbp.fuse(Scriptable())
    model(batch()), model(batch())
    torch.save(model, file := io.BytesIO())
    with torch.serialization.safe_globals(mbp.safe_globals(Scriptable)):
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert compare(mbp.unfuse(model), loaded, batch()) == 1
    assert type(mbp.unfuse(loaded)) is Scriptable


def test_fuse_and_unfuse():
    plain, fused = twins(chain)
    assert type(fused) is not Written
    assert isinstance(fused, Written)
    assert type(fused).__name__ == "Written"
    assert type(fused.a) is nn.Linear
    assert mbp.fuse(fused) is fused
    compare(plain, fused, batch())
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert repr(fused) == repr(plain)
    mbp.unfuse(fused)
    assert type(fused) is Written
    assert all("_compiled_call_impl" not in module.__dict__ for module in fused.modules())
    assert not any(name.startswith("_manualbp") for name in fused.__dict__)
    assert compare(plain, fused, batch(), calls=2) == 0


def test_a_model_in_which_nothing_fuses_gets_its_class_back():
    _, fused = twins(nothing)
    fused(batch())
    assert type(fused) is Written
    assert all("_compiled_call_impl" not in module.__dict__ for module in fused.modules())


def test_replicas_of_data_parallel():
    """They run on other devices, with parameters of their own: not by the calls of the original's layers."""
    plain, fused = twins(chain)
    compare(plain, fused, batch())
    x = batch()
    for _ in range(2):
        replica = fused._replicate_for_data_parallel()
        for name, child in fused._modules.items():
            replica._modules[name] = copied = child._replicate_for_data_parallel()
            for key, parameter in child._parameters.items():  # as torch.nn.parallel.replicate does
                setattr(copied, key, parameter.detach() * 2)
        parameters = {name: parameter.detach() * 2 for name, parameter in plain.named_parameters()}
        torch.testing.assert_close(replica(x), functional_call(plain, parameters, (x,)))
    assert compare(plain, fused, batch()) == 1


def test_a_compiled_child_stays_compiled():
    plain, fused = twins(chain)
    called = []
    fused.b._compiled_call_impl = lambda x: (called.append(1), fused.b._call_impl(x))[1]
    compare(plain, fused, batch(), calls=3)
    assert len(called) == 3


def test_a_replaced_layer_is_a_plain_one():
    plain, fused = twins(chain)
    compare(plain, fused, batch())
    plain.b = nn.Linear(8, 8)
    fused.b = copy.deepcopy(plain.b)
    compare(plain, fused, batch())
    assert compare(plain, mbp.fuse(fused), batch()) >= 0


def test_frozen_layers_and_inputs_without_gradient():
    plain, fused = twins(chain)
    for model in (plain, fused):
        model.a.requires_grad_(False)
    assert compare(plain, fused, batch()) == 1
    plain, fused = twins(chain)
    for model in (plain, fused):
        model.b.weight.requires_grad_(False)
    assert compare(plain, fused, batch()) == 1


def test_threads():
    plain, fused = twins(rebound)
    x = batch(2000)
    expected = plain(x)
    failures = []

    def work():
        for _ in range(50):
            output = fused(x)
            if not torch.allclose(output, expected, atol=1e-5) or type(output) is not Tensor:
                failures.append(output)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("forward", [chain, rebound, leaves_by_several, residual])
def test_nothing_is_kept(forward):
    _, fused = twins(forward)
    for _ in range(4):
        x = batch()
        output = fused(x)
        seen = weakref.ref(x)
        del x, output
        assert seen() is None
    model = weakref.ref(fused.a)
    del fused
    gc.collect()
    assert model() is None


def test_computed_weights_are_not_kept():
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            weight = self.weight * 2
            seen.append(weakref.ref(weight))
            return F.linear(x, weight, self.bias)

    _, fused = twins(chain, a=Watched(8, 8), b=Watched(8, 8))
    for _ in range(3):
        fused(batch())
    assert len(seen) == 6
    assert all(weight() is None for weight in seen)


def test_a_model_goes_without_the_garbage_collector():
    _, fused = twins(chain)
    for _ in range(3):
        fused(batch())
    weight = weakref.ref(fused.a.weight)
    gc.disable()
    try:
        del fused
        assert weight() is None
    finally:
        gc.enable()


def test_equal_calls_have_equal_bits():
    """The first call included, and for any number of rows."""
    _, fused = twins(chain)
    x = batch(3000)
    first = fused(x)
    assert all(torch.equal(fused(x), first) for _ in range(3))
    assert torch.equal(fused(x[:700]), first[:700])


def test_dropout_trains_as_plain_does():
    """The same losses from the same seed, in training and evaluation in turn, whichever comes first."""
    for first in (True, False):
        plain, fused = twins(dropout)
        x, target = batch(512), batch(512)
        losses = []
        for model in (plain, fused):
            torch.manual_seed(5)
            optimizer = torch.optim.Adam(model.parameters())
            values = []
            for k in range(40):
                model.train((k % 4 != 3) is first)
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), target)
                loss.backward()
                optimizer.step()
                values.append(loss.item())
            losses.append(torch.tensor(values))
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
        assert compare(plain.train(), fused.train(), x) == 1
        assert compare(plain.eval(), fused.eval(), x) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torch_computes_what_our_op_refuses(dtype, monkeypatch):
    """With the masks that have been drawn, in the dtype of the model."""
    plain, fused = twins(dropout, dtype=dtype)
    x = batch(dtype=dtype)
    assert compare(plain, fused, x) == 1

    def refuse(*args):
        raise RuntimeError("test")

    monkeypatch.setattr(_chains._compute, "layers", refuse)
    assert compare(plain, fused, x, tolerance=1e-12 if dtype is torch.float64 else 1e-5) == 0
