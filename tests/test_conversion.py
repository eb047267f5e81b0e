"""fuse and unfuse: any model computes the same as before, with fewer calls per Sequential, and can be restored."""

import copy
import io
import pickle
import types
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import torch_manualbp as mbp
from helpers import DTYPES, assert_close, assert_equal, calls_of, integers, training_step


class Residual(nn.Module):
    """A model with Sequentials inside: nested ones, with Dropout, LayerNorm, two runs, in a list and in a dict."""

    def __init__(self, dtype=None):
        super().__init__()
        kind = {"dtype": dtype}
        self.stem = nn.Sequential(
            nn.Linear(6, 8, **kind), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8, **kind), nn.ReLU()
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(8, **kind),
                nn.Sequential(nn.Linear(8, 9, **kind), nn.ReLU(inplace=True), nn.Linear(9, 8, bias=False, **kind)),
            )
            for _ in range(2)
        )
        self.heads = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 7, **kind), nn.ReLU(), nn.Linear(7, 2, **kind))})

    def forward(self, input):
        h = self.stem(input)
        for block in self.blocks:
            h = h + block(h)
        return self.heads["a"](h)


class Scaled(nn.Sequential):
    """A Sequential with its own forward."""

    def forward(self, input):
        return 2 * super().forward(input)


class Named(nn.Sequential):
    """A Sequential with its own attributes and methods, but not its own forward."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.note = "kept"

    def depth(self):
        return len(self)


def small(kind=nn.Sequential):
    return kind(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize("training", [True, False])
def test_a_fused_model_steps_as_before(training):
    model, input = Residual(torch.float64).train(training), torch.randn(5, 3, 6).double()
    before = training_step(model, input)
    assert mbp.fuse(model) is model
    calls = calls_of(model, input)
    stem = "mlp_dropout" if training else "mlp"
    assert calls == [stem, "mlp", "mlp", "mlp"]  # stem, two blocks, head
    assert_close(training_step(model, input), before)
    assert mbp.unfuse(model) is model
    assert calls_of(model, input) == []
    for one, other in zip(training_step(model, input), before, strict=True):
        assert_equal(one, other)


def test_a_model_fused_to_recompute_steps_as_before():
    model, input = Residual(torch.float64), torch.randn(5, 3, 6).double()
    before = training_step(model, input)
    kept = {}
    for mode in ("store", "recompute", "store"):
        mbp.fuse(model, activations=mode)
        sizes = kept[mode] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()), lambda _: None):
            model(input)
        assert_close(training_step(model, input), before)
    assert sum(kept["recompute"]) < sum(kept["store"])


def test_parameters_keys_and_buffers_stay_the_same_objects():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Sequential(nn.Linear(5, 2), nn.ReLU()))
    keys = list(model.state_dict())
    parameters, buffers = list(model.parameters()), list(model.buffers())
    children = list(model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for change in (mbp.fuse, mbp.unfuse):
        change(model)
        assert list(model.state_dict()) == keys
        assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
        assert all(one is other for one, other in zip(model.buffers(), buffers, strict=True))
        assert all(one is other for one, other in zip(model.modules(), children, strict=True))
        model(torch.randn(9, 4)).pow(2).sum().backward()
        before = model[0].weight.clone()
        optimizer.step()  # created before fuse, and still holds the parameters
        assert not torch.equal(model[0].weight, before)


def test_unfuse_is_the_exact_inverse():
    model = Residual()
    types = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    text = repr(model)
    for _ in range(2):
        mbp.unfuse(mbp.fuse(mbp.fuse(model)))
        assert [type(module) for module in model.modules()] == types
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert repr(model) == text
    mbp.unfuse(model)  # nothing to undo
    assert [type(module) for module in model.modules()] == types


def test_a_fused_sequential_is_still_one_of_its_kind():
    model = mbp.fuse(small(Named))
    assert isinstance(model, Named)
    assert (model.note, model.depth()) == ("kept", 3)
    assert calls_of(model, torch.randn(2, 4)) == ["mlp"]
    assert type(mbp.unfuse(model)) is Named


class Reversed(nn.Sequential):
    def __iter__(self):
        return reversed(self._modules.values())


class Truncated(nn.Sequential):
    def __iter__(self):
        return iter(list(super().__iter__())[:2])


class Again(Truncated):
    """Inherits an override from its parent."""


class Called(nn.Sequential):
    def __call__(self, input):
        return 2 * super().__call__(input)


class CalledInside(nn.Sequential):
    def _call_impl(self, *args, **kwargs):
        return 2 * super()._call_impl(*args, **kwargs)


class Without(nn.Sequential):
    """Has an attribute that differs from the registered module."""

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        return {key: value[key] for key in list(value)[:2]} if name == "_modules" else value


@pytest.mark.parametrize("kind", [Scaled, Reversed, Truncated, Again, Called, CalledInside, Without])
def test_a_sequential_that_does_not_run_its_children_in_turn_keeps_its_forward(kind):
    model, input = kind(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(3, 4)
    want = model(input)
    mbp.fuse(model)
    for _ in range(3):
        torch.testing.assert_close(model(input), want)
    assert type(mbp.unfuse(model)) is kind
    assert_equal(model(input), want)


class Looking(nn.Sequential):
    """Looks up missing attributes in its first child; nn.Sequential's forward needs none of them."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(next(self.children(), None), name)


def test_a_sequential_with_other_methods_of_its_own_is_fused():
    model, input = small(Looking), torch.randn(2, 4)
    want = model(input)
    mbp.fuse(model)
    assert model.in_features == 4
    assert calls_of(model, input) == ["mlp"]
    torch.testing.assert_close(model(input), want)


def test_a_class_that_torch_knows_by_its_type_is_left_alone():
    nni = pytest.importorskip("torch.ao.nn.intrinsic")

    class Own(nni.LinearReLU):
        pass

    for kind in (nni.LinearReLU, Own):
        model = nn.Sequential(kind(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4), nn.ReLU())
        assert [type(module) for module in mbp.fuse(model).modules()][1] is kind
        assert calls_of(model, torch.randn(2, 4)) == ["mlp"]  # the other two


def test_fused_classes_are_not_added_to_a_register_of_subclasses():
    register = []

    class Registered(nn.Sequential):
        def __init_subclass__(cls, *, name, **kwargs):
            super().__init_subclass__(**kwargs)
            register.append(name)

    class Entry(Registered, name="entry"):
        pass

    model = mbp.fuse(small(Entry))
    assert calls_of(model, torch.randn(2, 4)) == ["mlp"]
    assert type(mbp.unfuse(model)) is Entry
    assert register == ["entry"]


def test_a_sequential_with_its_own_forward_keeps_it():
    model = small(Scaled)
    patched = small()
    patched.forward = lambda input: input
    whole = mbp.fuse(nn.ModuleList([model, patched]))
    assert type(whole[1]) is nn.Sequential
    input = torch.randn(2, 4)
    assert_equal(whole[1](input), input)
    for _ in range(3):
        torch.testing.assert_close(whole[0](input), 2 * whole[0][2](torch.relu(whole[0][0](input))))


def test_mlp_stays_an_mlp():
    model = mbp.MLP([4, 5, 3])
    assert type(mbp.fuse(model)) is mbp.MLP
    assert type(mbp.unfuse(model)) is mbp.MLP
    assert calls_of(model, torch.randn(2, 4)) == ["mlp"]


def test_a_model_without_sequentials_is_left_alone():
    model = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match="found no linear layer with a ReLU"):
        assert type(mbp.unfuse(mbp.fuse(model))) is nn.Linear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mbp.fuse(model)  # it is said once


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_give_the_same_bits_fused(dtype):
    model = nn.Sequential(nn.Linear(6, 9, dtype=dtype), nn.ReLU(), nn.Linear(9, 5, dtype=dtype), nn.ReLU())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(integers(*parameter.shape, high=1))
    input = integers(7, 6, dtype=dtype)
    before = training_step(model, input)
    assert_equal(training_step(mbp.fuse(model), input), before)


# --- which children form a run --------------------------------------------------------------------------------------

L, LR, D = lambda: nn.Linear(4, 4), lambda: mbp.LinearReLU(4, 4), lambda: nn.Dropout(0.5)
R, T = nn.ReLU, nn.Tanh
RUNS = {
    "linear": ([L], []),
    "linear relu": ([L, R], ["mlp"]),
    "relu": ([R], []),
    "linear linear": ([L, L], []),
    "linear relu linear": ([L, R, L], ["mlp"]),
    "linear relu linear linear relu": ([L, R, L, L, R], ["mlp", "mlp"]),
    "relu first": ([R, L, R, L], ["mlp"]),
    "relu twice": ([L, R, R, L], ["mlp"]),
    "dropout between": ([L, R, D, L, R, L], ["mlp_dropout"]),
    "dropout after linear": ([L, D, R, L], []),
    "dropout after linear relu": ([L, R, L, D, L, R], ["mlp", "mlp"]),
    "dropout twice": ([L, R, D, D, L, R], ["mlp_dropout", "mlp"]),
    "dropout and relu": ([L, R, D, R, L], ["mlp_dropout"]),
    "dropout first": ([D, L, R, L], ["mlp"]),
    "dropout last": ([L, R, L, R, D], ["mlp_dropout"]),
    "dropout after our own layer": ([LR, D, L], ["mlp_dropout"]),
    "tanh": ([L, T, L, R], ["mlp"]),
    "our own layers": ([LR, LR, L], ["mlp"]),
    "our own layer alone": ([LR], ["mlp"]),
    "our own layer and a relu": ([LR, R, L], ["mlp"]),
    "in place": ([L, lambda: nn.ReLU(inplace=True), L], ["mlp"]),
    "in place first": ([lambda: nn.ReLU(inplace=True), L, R], ["mlp"]),
    "identity": ([L, nn.Identity, R, nn.Identity, D, nn.Identity, L, nn.Identity], ["mlp_dropout"]),
    "identity between linears": ([L, R, L, nn.Identity, L, R], ["mlp", "mlp"]),
    "identity first": ([nn.Identity, L, R], ["mlp"]),
    "flatten first": ([nn.Flatten, L, R, L], ["mlp"]),
    "empty": ([], []),
    "nested": ([L, R, lambda: nn.Sequential(L(), R(), L()), R], ["mlp"]),
    "nested alone": ([lambda: nn.Sequential(L(), R()), lambda: nn.Sequential(L(), R()), L], ["mlp"]),
    "nested, split": ([lambda: nn.Sequential(L()), R, lambda: nn.Sequential(nn.Sequential(L()), R())], ["mlp"]),
    "nested and empty": ([L, nn.Sequential, R, lambda: nn.Sequential(nn.Sequential()), L], ["mlp"]),
    "nested with tanh": ([L, lambda: nn.Sequential(R(), L(), T()), L, R], ["mlp", "mlp"]),
    "nested mlp": ([L, R, lambda: mbp.MLP([4, 4, 4]), R, L], ["mlp", "mlp"]),
    "nested subclass": ([L, R, lambda: Named(L(), R())], ["mlp", "mlp"]),
}


@pytest.mark.parametrize("case", RUNS)
def test_runs_are_found_and_compute_the_same(case):
    makers, calls = RUNS[case]
    model = nn.Sequential(*(make() for make in makers)).double()
    input = torch.randn(5, 4).double().requires_grad_()

    def run():
        torch.manual_seed(3)
        output = model(input.clone())
        return [output.detach(), *torch.autograd.grad(output.sum(), [input, *model.parameters()])]

    before = run()
    mbp.fuse(model)
    assert_close(run(), before)
    assert calls_of(model, input.detach()) == calls


NOTHING = {
    "empty": [],
    "linear": [L],
    "relu": [R],
    "linear linear": [L, L],
    "relu linear": [R, L],
    "other activations": [L, T, L, nn.ReLU6],
    "something between": [L, lambda: nn.BatchNorm1d(4), R],
    "a subclass": [lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4), R],
}
SOMETHING = {
    "hook": lambda layer: layer.register_forward_hook(lambda *_: None).remove,
    "parametrization": lambda layer: (
        parametrizations.weight_norm(layer) and (lambda: parametrize.remove_parametrizations(layer, "weight"))
    ),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_sequential_without_anything_to_fuse_is_left_alone(case):
    model = nn.Sequential(*(make() for make in NOTHING[case]))
    assert type(mbp.fuse(model)) is nn.Sequential
    assert not [name for name in vars(model) if "manualbp" in name]
    model.extend(nn.Sequential(L(), R()))  # layers added later need another call
    assert calls_of(mbp.fuse(model), torch.randn(2, 4)) == ["mlp"]


@pytest.mark.parametrize("case", SOMETHING)
def test_a_layer_that_may_join_a_run_later_counts(case):
    model, input = nn.Sequential(L(), R()), torch.randn(2, 4)
    remove = SOMETHING[case](model[0])
    mbp.fuse(model)
    assert calls_of(model, input) == []
    remove()
    assert calls_of(model, input) == ["mlp"]


def test_a_run_across_nested_sequentials_makes_the_outer_one_fused():
    model = nn.Sequential(nn.Sequential(L()), nn.Identity(), R(), nn.Sequential(nn.Sequential(L()), T()))
    kinds = [type(each) for each in model.modules()]
    mbp.fuse(model)
    assert [type(each).__name__ for each in (model, model[0], model[3])] == ["FusedSequential", *["Sequential"] * 2]
    assert calls_of(model, torch.randn(2, 4)) == ["mlp"]
    assert repr(model).splitlines()[1] == "  in one call: (0.0) to (3.0.0)"
    assert [type(each) for each in mbp.fuse(mbp.unfuse(model))] == [type(each) for each in model]
    assert [type(each) for each in mbp.unfuse(model).modules()] == kinds


def test_a_shared_relu_counts_at_each_place():
    relu = nn.ReLU()
    model = mbp.fuse(nn.Sequential(relu, nn.Linear(4, 4), relu))
    assert calls_of(model, torch.randn(2, 4)) == ["mlp"]


def test_children_that_change_later_are_seen():
    model = mbp.fuse(small())
    input = torch.randn(2, 4)
    assert calls_of(model, input) == ["mlp"]
    model[1] = nn.Tanh()
    assert calls_of(model, input) == []
    assert_equal(model(input), model[2](torch.tanh(model[0](input))))
    model[1] = nn.ReLU()
    handle = model[2].register_forward_hook(lambda *_: None)
    assert calls_of(model, input) == ["mlp"]  # Linear and ReLU; the last Linear as a module
    handle.remove()
    model.append(nn.Linear(3, 2))
    assert model(input).shape == (2, 2)


# --- copies ---------------------------------------------------------------------------------------------------------


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _pickled(protocol):
    return lambda model: pickle.loads(pickle.dumps(model, protocol))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, *(_pickled(protocol) for protocol in (0, 2, 5)), _saved],
    ids=["deepcopy", "copy", "pickle 0", "pickle 2", "pickle 5", "torch.save"],
)
@pytest.mark.parametrize("make", [Residual, small, lambda: small(Named)], ids=["Residual", "Sequential", "subclass"])
def test_copies_of_a_fused_model_are_fused_and_can_be_unfused(make, copied):
    model = mbp.fuse(make()).eval()
    twin = copied(model)
    input = torch.randn(3, 6 if isinstance(model, Residual) else 4)
    assert_equal(twin(input), model(input))
    assert calls_of(twin, input) == calls_of(model, input) != []
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    plain = [type(module) for module in make().modules()]
    assert [type(module) for module in mbp.unfuse(twin).modules()] == plain


def _remade(width):
    return mbp.fuse(Remade(width))


class Remade(nn.Sequential):
    """A Sequential that defines how it is copied."""

    def __init__(self, width):
        super().__init__(nn.Linear(4, width), nn.ReLU())

    def __reduce__(self):
        return _remade, (self[0].out_features,)


def test_a_class_that_says_how_it_is_copied_is_copied_so():
    model = mbp.fuse(Remade(5))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert twin[0].weight.shape == (5, 4)
        assert type(mbp.unfuse(twin)) is Remade


class Made(nn.Sequential):
    """A Sequential whose __new__ takes an argument, which copying must pass on."""

    def __new__(cls, *args):
        made = super().__new__(cls)
        made.__dict__["given"] = args[-1]
        return made

    def __init__(self, *args):
        super().__init__(nn.Linear(4, 5), nn.ReLU())

    def __getnewargs__(self):
        return (self.given,)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "given"}


def test_what_a_class_needs_to_be_made_is_given_to_its_copies():
    model = mbp.fuse(Made("this"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert twin.given == "this"


# --- files that torch.load reads with weights_only=True ------------------------------------------------------------


def _saved_weights_only(model, *classes):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.serialization.safe_globals(mbp.safe_globals(*classes)):
        return torch.load(file, weights_only=True)


FILES = {
    "MLP": (lambda: mbp.MLP([4, 5, 3]), ()),
    "MLP, recompute": (lambda: mbp.MLP([4, 5, 3], activations="recompute"), ()),
    "LinearReLU": (lambda: mbp.LinearReLU(4, 5), ()),
    "fused": (lambda: mbp.fuse(small()), ()),
    "fused, recompute": (lambda: mbp.fuse(small(), activations="recompute"), ()),
    "fused, nested": (lambda: mbp.fuse(nn.Sequential(small(), nn.Sequential(nn.Linear(3, 2), nn.ReLU()))), ()),
    "subclass": (lambda: mbp.fuse(small(Named)), (Named,)),
    "other layers": (lambda: mbp.fuse(nn.Sequential(*small(), nn.ReLU(), nn.Dropout(0.5)).eval()), (nn.Dropout,)),
    "own forward": (lambda: small(Scaled), (Scaled,)),
}


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("case", FILES)
def test_one_list_allows_what_a_file_with_a_model_names(case, used):
    make, classes = FILES[case]
    model, input = make(), torch.randn(3, 4)
    if used:
        model(input).sum().backward()
    loaded = _saved_weights_only(model, *classes)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    assert_equal(loaded(input), model(input))
    assert calls_of(loaded, input) == calls_of(model, input)
    if case.startswith("fused"):
        settings = [[getattr(one, "_manualbp_activations", None) for one in net.modules()] for net in (loaded, model)]
        assert settings[0] == settings[1]
        assert {type(module) for module in mbp.unfuse(loaded).modules()} == {nn.Sequential, nn.Linear, nn.ReLU}


def test_classes_that_were_not_named_are_not_allowed():
    with pytest.raises(pickle.UnpicklingError, match="Named"):
        _saved_weights_only(mbp.fuse(small(Named)))
    with pytest.raises(pickle.UnpicklingError, match="Dropout"):
        _saved_weights_only(mbp.fuse(nn.Sequential(*small(), nn.Dropout())))


@pytest.mark.parametrize("value", ["Named", nn.Dropout(), [Named]], ids=["name", "module", "list"])
def test_what_is_not_a_class_cannot_be_allowed(value):
    with pytest.raises(TypeError, match="safe_globals: `classes` must be classes, got "):
        mbp.safe_globals(value)


def test_a_deep_copy_is_independent():
    model = mbp.fuse(small())
    twin, input = copy.deepcopy(model), torch.randn(2, 4)
    before = model(input)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_equal(model(input), before)


def test_state_dict_is_exchanged_with_plain_and_fused():
    fused, plain, input = mbp.fuse(small()), small(), torch.randn(2, 4)
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(plain(input), fused(input))
    other = small()
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(other(input), fused(input))


# --- hooks, shared and frozen ---------------------------------------------------------------------------------------


def test_hooks_made_before_and_after_keep_running():
    model, seen = small(), []
    model[0].register_forward_hook(lambda *_: seen.append("child"))
    model.register_forward_hook(lambda *_: seen.append("whole"))
    mbp.fuse(model)
    model[1].register_forward_pre_hook(lambda *_: seen.append("after"))
    model(torch.randn(2, 4))
    assert seen == ["child", "after", "whole"]
    mbp.unfuse(model)
    model(torch.randn(2, 4))
    assert seen == ["child", "after", "whole"] * 2


def test_hooks_on_parameters_see_their_gradients():
    model, seen = small().double(), []
    input = integers(3, 4)
    want = training_step(model, input)[1:]
    model[0].weight.register_hook(lambda grad: seen.append(grad))
    model[2].bias.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    training_step(mbp.fuse(model), input)
    assert len(seen) == 2
    assert_close(sorted(seen, key=torch.Tensor.numel), [want[3], want[0]])


def test_a_layer_shared_by_two_sequentials():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(
        OrderedDict(a=nn.Sequential(shared, nn.ReLU(), nn.Linear(4, 4)), b=nn.Sequential(nn.ReLU(), shared, nn.ReLU()))
    ).double()
    input = torch.randn(3, 4).double()
    before = training_step(model, input)
    assert_close(training_step(mbp.fuse(model), input), before)
    assert model.a[0] is model.b[1]
    assert calls_of(model, input) == ["mlp"]


def test_one_sequential_used_twice():
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.Sequential(block, nn.Tanh(), block).double()
    input = torch.randn(3, 4).double()
    before = training_step(model, input)
    assert_close(training_step(mbp.fuse(model), input), before)
    assert model[0] is model[2]


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_a_frozen_parameter_stays_frozen(frozen):
    model = small().double()
    model.get_parameter(frozen).requires_grad_(False)
    input = torch.randn(3, 4).double()
    before = training_step(model, input)
    got = training_step(mbp.fuse(model), input)
    assert_close(got, before)
    assert model.get_parameter(frozen).grad is None


def test_an_eager_input_changed_in_place_by_the_first_relu_is_changed_fused_too():
    model = mbp.fuse(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU()))
    input = torch.tensor([[-1.0, 2.0, -3.0, 4.0]])
    model(input)
    assert_equal(input, torch.tensor([[0.0, 2.0, 0.0, 4.0]]))


def test_inputs_that_are_not_tensors_pass_through_to_the_children():
    class Takes(nn.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    model = mbp.fuse(nn.Sequential(Takes(), nn.Linear(4, 3), nn.ReLU()))
    input = torch.randn(2, 4)
    expected = torch.relu(model[1](2 * input))
    torch.testing.assert_close(model((input, input)), expected)  # the run after it is fused


# --- errors ---------------------------------------------------------------------------------------------------------


def test_unfuse_refuses_a_class_that_was_derived_from_the_fused_one_and_changes_nothing():
    model = mbp.fuse(nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), small()[2]))
    input = torch.randn(2, 4)
    want, fused = model(input), type(model[0])

    class Derived(fused):
        def forward(self, input):
            return super().forward(input)

    model[0].__class__ = Derived
    with pytest.raises(RuntimeError, match=r"unfuse: the class Derived is derived from FusedSequential"):
        mbp.unfuse(model)
    torch.testing.assert_close(model(input), want)  # within rounding: the last layer is no longer part of the run
    assert calls_of(model, input) == ["mlp"]
    model[0].__class__ = fused
    assert type(mbp.unfuse(model)[0]) is nn.Sequential


def test_unfuse_refuses_a_forward_that_was_replaced_and_changes_nothing():
    model, input = mbp.fuse(nn.ModuleList([small(), small()])), torch.randn(2, 4)
    first = model[1]
    before = first.forward
    first.forward = types.MethodType(lambda self, input: 2 * before(input), first)  # as accelerate does
    want = first(input)
    with pytest.raises(RuntimeError, match="unfuse: the forward of a FusedSequential was replaced after fuse"):
        mbp.unfuse(model)
    assert_equal(first(input), want)
    assert calls_of(model[0], input) == ["mlp"]
    del first.forward
    assert [type(child) for child in mbp.unfuse(model)] == [nn.Sequential] * 2


@pytest.mark.parametrize("function", [mbp.fuse, mbp.unfuse])
@pytest.mark.parametrize("value", [None, nn.Linear, [nn.Linear(2, 2)]], ids=["None", "class", "list"])
def test_what_is_not_a_module_is_a_type_error(function, value):
    message = f"{function.__name__}: `module` must be an nn.Module or an Optimizer, got {type(value).__name__}"
    with pytest.raises(TypeError, match=message):
        function(value)


def test_an_mlp_in_a_model_keeps_its_memory_mode():
    model = nn.Sequential(mbp.MLP([4, 3]), nn.Tanh())
    mbp.fuse(model, activations="recompute")
    assert model[0].activations == "store"


def test_attributes_and_children_called_activations_stay():
    class Block(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 5), nn.ReLU())
            self.activations = ["mine"]

    named = nn.Sequential(OrderedDict(linear=nn.Linear(4, 5), activations=nn.ReLU()))
    relu = named.activations
    block = Block()
    mbp.fuse(nn.ModuleList([block, named]), activations="recompute")
    assert block.activations == ["mine"]
    assert named.activations is relu
    assert named(torch.ones(2, 4)).shape == (2, 5)
    mbp.unfuse(block)
    assert block.activations == ["mine"]


@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_a_slice_of_a_fused_model_computes_what_a_slice_of_the_plain_one_does(mode):
    model, x = small(), torch.randn(3, 4)
    want = model[:2](x)
    part = mbp.fuse(model, activations=mode)[:2]
    torch.testing.assert_close(part(x), want)
    assert part._manualbp_activations == mode
    assert type(mbp.unfuse(part)) is nn.Sequential


def test_unknown_activations_mode_is_a_value_error_and_changes_nothing():
    model = small()
    with pytest.raises(ValueError, match="fuse: `activations` must be one of"):
        mbp.fuse(model, activations="none")
    assert type(model) is nn.Sequential
