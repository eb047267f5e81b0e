"""LinearReLU and MLP behave like nn.Linear and nn.Sequential in everything except speed."""

import copy
import io
import itertools
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

import torch_manualbp as mbp
from helpers import DTYPES, assert_equal, calls_of, integers, plain_network, recorded_calls, twins
from torch_manualbp import _compute, _route, modules

SIZES = ([3, 2], [4, 8, 1], [5, 7, 6, 2])


def integer_twins(sizes, dtype=torch.float64):
    """Twins whose parameters are small integers, so that both compute the same bits."""
    ours, theirs = twins(sizes, dtype=dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(integers(*parameter.shape, high=1))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_same_step(ours, theirs, input):
    """Outputs and all gradients are equal; clears the gradients."""
    outputs = [model(input) for model in (ours, theirs)]
    assert_equal(*outputs)
    for output in outputs:
        output.sum().backward()
    assert_same_grads(ours, theirs)
    for parameter in (*ours.parameters(), *theirs.parameters()):
        parameter.grad = None


def assert_same_grads(ours, theirs):
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert_equal(one.grad, other.grad)


# --- LinearReLU -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_relu_is_a_linear_with_the_same_start(bias, dtype):
    torch.manual_seed(1)
    ours = mbp.LinearReLU(5, 3, bias=bias, dtype=dtype)
    torch.manual_seed(1)
    theirs = nn.Linear(5, 3, bias=bias, dtype=dtype)
    assert isinstance(ours, nn.Linear)
    assert_equal(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert (ours.bias is None) == (not bias)


def test_linear_relu_module_exchanges_state_with_linear():
    ours, theirs = mbp.LinearReLU(5, 3), nn.Linear(5, 3)
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(4, 5)
    torch.testing.assert_close(ours(input), torch.relu(theirs(input)))
    theirs.load_state_dict(mbp.LinearReLU(5, 3).state_dict())


def test_linear_relu_module_computes_in_one_call_and_names_itself():
    layer = mbp.LinearReLU(5, 3)
    assert calls_of(layer, torch.randn(2, 5)) == ["linear_relu"]
    assert repr(layer) == "LinearReLU(in_features=5, out_features=3, bias=True)"


def test_linear_relu_module_steps_like_its_parts():
    ours = mbp.LinearReLU(5, 3, dtype=torch.float64)
    theirs = nn.Sequential(nn.Linear(5, 3, dtype=torch.float64), nn.ReLU())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(integers(*parameter.shape, high=1))
    theirs[0].load_state_dict(ours.state_dict())
    assert_same_step(ours, theirs, integers(2, 4, 5))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parametrized_weight_is_computed_once_in_a_call(dtype, autocast):
    class Counting(nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return weight

    layer, counting = mbp.LinearReLU(4, 3, dtype=dtype), Counting()
    nn.utils.parametrize.register_parametrization(layer, "weight", counting)
    counting.calls = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(torch.randn(2, 4, dtype=dtype))
    assert counting.calls == 1


# --- MLP: an nn.Sequential ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mlp_has_the_start_keys_and_children_of_its_plain_twin(sizes, bias):
    ours, theirs = twins(sizes, bias)
    assert isinstance(ours, nn.Sequential)
    assert_equal(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [type(child) for child in ours] == [type(child) for child in theirs]
    assert [repr(child) for child in ours] == [repr(child) for child in theirs]


def test_repr_says_what_it_is_and_what_one_call_computes():
    assert repr(mbp.MLP([4, 8, 3])).splitlines()[:2] == ["MLP(", "  in one call: (0) to (2)"]
    model = nn.Sequential(
        OrderedDict(a=nn.Linear(4, 8), b=nn.ReLU(), c=nn.Tanh(), d=nn.Linear(8, 8), e=nn.ReLU(), f=nn.Linear(8, 2))
    )
    children = repr(model).splitlines()[1:]
    first, runs, *rest = repr(mbp.fuse(model)).splitlines()
    assert (first, runs, rest) == ("FusedSequential(", "  in one call each: (a) to (b), (d) to (f)", children)
    model.d.register_forward_hook(lambda *_: None)
    assert repr(model).splitlines()[1] == "  in one call: (a) to (b)"
    model.a.register_forward_hook(lambda *_: None)
    assert repr(model).splitlines()[1:] == children


def test_repr_keeps_what_a_subclass_says_of_itself():
    class Described(nn.Sequential):
        def extra_repr(self):
            return "width 8"

    lines = repr(mbp.fuse(Described(nn.Linear(4, 8), nn.ReLU()))).splitlines()
    assert lines[1:3] == ["  width 8", "  in one call: (0) to (1)"]


def test_state_dict_is_exchanged_both_ways():
    ours, theirs = twins([4, 8, 3])[0], plain_network([4, 8, 3])
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(5, 4)
    torch.testing.assert_close(ours(input), theirs(input))
    other = plain_network([4, 8, 3])
    ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours(input), other(input))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(6,), (), (2, 3), (0,)], ids=str)
def test_mlp_steps_like_its_plain_twin(dtype, leading):
    ours, theirs = integer_twins([4, 9, 7, 3], dtype)
    assert_same_step(ours, theirs, integers(*leading, 4, dtype=dtype))


def test_mlp_computes_each_pass_in_one_call():
    model, input = mbp.MLP([4, 8, 8, 2]), torch.randn(3, 4)
    assert calls_of(lambda: model(input).sum().backward()) == ["mlp", "mlp_backward"]


def test_mlp_of_one_layer_is_that_linear():
    model = mbp.MLP([4, 2])
    input = torch.randn(3, 4)
    assert_equal(model(input), model[0](input))


def test_training_follows_the_trajectory_of_the_plain_twin():
    ours, theirs = twins([6, 16, 16, 1], dtype=torch.float64)
    input, target = torch.randn(32, 6).double(), torch.randn(32, 1).double()
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(input), target)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_mlp_that_recomputes_steps_like_one_that_stores():
    input = integers(7, 4)
    ours, theirs = integer_twins([4, 9, 7, 3])
    again = mbp.MLP([4, 9, 7, 3], activations="recompute", dtype=torch.float64)
    again.load_state_dict(ours.state_dict())
    assert repr(again) == repr(ours)
    assert_same_step(again, theirs, input)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        again(input)
    assert sum(kept) == input.numel() + sum(parameter.numel() for parameter in again.parameters())


def test_children_may_be_indexed_sliced_and_replaced():
    ours, theirs = integer_twins([4, 5, 6, 3])
    input = integers(7, 4)
    assert type(ours[:2]) is nn.Sequential
    assert ours[:2][0] is ours[0]
    assert_equal(ours[1:][1].weight, theirs[2].weight)
    assert ours[-1] is ours[4]
    assert len(ours) == 5
    for model in (ours, theirs):
        model.append(nn.ReLU())
    assert_same_step(ours, theirs, input)
    for model in (ours, theirs):
        model[1] = nn.Tanh()
    torch.testing.assert_close(ours(input), theirs(input))
    for model in (ours, theirs):
        del model[1:4]
        model.insert(1, nn.Linear(5, 6, dtype=torch.float64))
    theirs[1].load_state_dict(ours[1].state_dict())
    torch.testing.assert_close(ours(input), theirs(input))


def test_linear_layers_without_relu_between_them_stay_separate():
    ours, theirs = integer_twins([4, 5, 3])
    for model in (ours, theirs):
        model.append(nn.Linear(3, 3, bias=False, dtype=torch.float64))
        with torch.no_grad():
            model[-1].weight.copy_(torch.eye(3) * 2)
    assert_same_step(ours, theirs, integers(7, 4))


# --- MLP: copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: _through_a_file(model)],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("make", [lambda: mbp.MLP([4, 8, 3]), lambda: mbp.LinearReLU(4, 3)], ids=["MLP", "LinearReLU"])
def test_copies_compute_the_same_in_the_same_way(make, copied):
    model, input = make(), torch.randn(5, 4)
    twin = copied(model)
    assert type(twin) is type(model)
    assert_equal(twin(input), model(input))
    assert calls_of(twin, input) == calls_of(model, input)


def _through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_deep_copy_is_independent():
    model, input = mbp.MLP([4, 8, 3]), torch.randn(5, 4)
    twin, before = copy.deepcopy(model), model(input)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_equal(model(input), before)
    assert not twin(input).any()


def test_state_survives_torch_save_with_weights_only():
    model, file = mbp.MLP([4, 8, 3]), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = plain_network([4, 8, 3])
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(dict(twin.state_dict()), dict(model.state_dict()))


# --- MLP: hooks, frozen and shared parameters -----------------------------------------------------------------------


@pytest.mark.parametrize("where", range(5))
def test_a_forward_hook_on_any_child_sees_and_changes_its_output(where):
    ours, theirs = integer_twins([4, 5, 6, 3])
    input, seen = integers(7, 4), ([], [])
    handles = []
    for model, log in zip((ours, theirs), seen, strict=True):
        handles.append(
            model[where].register_forward_hook(lambda _, args, out, log=log: log.append((args[0], out)) or 2 * out)
        )
    assert_same_step(ours, theirs, input)
    assert_equal(*seen)
    for handle in handles:
        handle.remove()
    assert_same_step(ours, theirs, input)
    assert calls_of(ours, input) == ["mlp"]  # fused again
    assert len(seen[0]) == 1


@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_each_kind_of_hook_on_any_child_runs(kind, where):
    ours, theirs = integer_twins([4, 5, 3])
    seen = ([], [])
    for model, log in zip((ours, theirs), seen, strict=True):
        getattr(model[where], f"register_{kind}_hook")(lambda _, *values, log=log: log.append(values))
    assert_same_step(ours, theirs, integers(7, 4).requires_grad_())
    assert len(seen[0]) == 1
    assert_equal(*seen)


def test_hooks_on_the_whole_network_run():
    ours, theirs = integer_twins([4, 5, 3])
    seen = ([], [])
    for model, log in zip((ours, theirs), seen, strict=True):
        model.register_forward_hook(lambda _, args, out, log=log: log.append(out))
        model.register_full_backward_hook(lambda _, grads, outs, log=log: log.append(outs))
    assert_same_step(ours, theirs, integers(7, 4).requires_grad_())
    assert len(seen[0]) == 2
    assert_equal(*seen)
    assert calls_of(ours, integers(7, 4)) == ["mlp"]


class Tagged(torch.Tensor):
    """A subclass of Tensor, whose __torch_function__ sees each call that involves it."""


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_of_a_subclass_go_through_torch(name):
    ours = mbp.MLP([4, 5, 3])
    theirs = nn.Sequential(*copy.deepcopy(ours))
    for model in (ours, theirs):
        setattr(model[0], name, nn.Parameter(getattr(model[0], name).detach().as_subclass(Tagged)))
    input = torch.randn(7, 4)
    assert_equal(ours(input), theirs(input))
    assert type(ours(input)) is Tagged
    assert calls_of(ours, input) == []


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_weights_go_through_torch():
    ours, theirs = mbp.MLP([4, 5, 3]), nn.Sequential(*mbp.MLP([4, 5, 3]))
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        model[2].weight = nn.Parameter(model[2].weight.detach().to_sparse_csr())
    input = torch.randn(7, 4)
    torch.testing.assert_close(ours(input), theirs(input))
    assert calls_of(ours, input) == ["mlp"]  # the layer before it


def test_global_hooks_see_every_child():
    model, seen = mbp.MLP([4, 5, 3]), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        model(torch.randn(2, 4))
    finally:
        handle.remove()
    assert seen == [nn.Linear, nn.ReLU, nn.Linear, mbp.MLP]
    assert calls_of(model, torch.randn(2, 4)) == ["mlp"]


def test_a_forward_that_someone_replaced_is_called():
    model = mbp.MLP([4, 5, 3])
    model[1].forward = torch.sigmoid
    input = torch.randn(2, 4)
    assert_equal(model(input), model[2](torch.sigmoid(model[0](input))))


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_subclass_of_linear_keeps_its_forward():
    ours, theirs = integer_twins([4, 5, 3])
    for model in (ours, theirs):
        doubled = Doubled(5, 3, dtype=torch.float64)
        doubled.load_state_dict(theirs[2].state_dict())
        model[2] = doubled
    assert_same_step(ours, theirs, integers(7, 4))
    assert calls_of(ours, integers(7, 4)) == ["mlp"]  # Linear and ReLU before it


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_a_parametrized_layer_computes_its_weight(wrap):
    ours, theirs = twins([4, 4, 3], dtype=torch.float64)
    for model in (ours, theirs):
        wrap(model[0])
    with torch.no_grad():
        ours[0].bias.add_(1)
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(5, 4).double()
    torch.testing.assert_close(ours(input), theirs(input), rtol=1e-12, atol=1e-12)
    for model in (ours, theirs):
        model(input).sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_a_pruned_layer_uses_its_mask():
    model = mbp.MLP([4, 5, 3])
    prune.random_unstructured(model[0], "weight", amount=0.5)
    input = torch.randn(2, 4)
    want = model[2](torch.relu(nn.functional.linear(input, model[0].weight_orig * model[0].weight_mask, model[0].bias)))
    torch.testing.assert_close(model(input), want)


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)), ids=str)
def test_frozen_layers_get_no_gradient_and_ask_for_none(frozen):
    ours, theirs = integer_twins([4, 5, 6, 3])
    for model in (ours, theirs):
        for layer, freeze in zip(model[::2], frozen, strict=True):
            layer.requires_grad_(not freeze)
    input = integers(7, 4)
    with recorded_calls() as calls:
        output = ours(input)
        assert output.requires_grad == (not all(frozen))
        if output.requires_grad:
            output.sum().backward()
            theirs(input).sum().backward()
    assert_same_grads(ours, theirs)
    learns = [not freeze for freeze in frozen]
    asked = [list(args[-1]) for name, args in calls if name == "mlp_backward"]
    learns = learns[learns.index(True) :] if any(learns) else []  # frozen layers below store nothing
    assert asked == ([[False, *learns, *learns]] if any(learns) else [])


def test_a_layer_that_appears_twice_gets_the_sum_of_its_gradients():
    ours, theirs = integer_twins([4, 4, 4, 3])
    for model in (ours, theirs):
        model[2] = model[0]
    assert_same_step(ours, theirs, integers(7, 4))


def test_parameters_that_share_a_tensor_get_the_sum_of_their_gradients():
    ours, theirs = integer_twins([4, 4, 4, 3])
    for model in (ours, theirs):
        model[2].weight = model[0].weight
    assert_same_step(ours, theirs, integers(7, 4))


def test_sizes_given_one_by_one_are_named():
    with pytest.raises(TypeError, match=r"as in MLP\(\[4, 8, 3\]\), got MLP\(4, 8, 3\)"):
        mbp.MLP(4, 8, 3)


def test_sizes_may_be_integers_of_numpy():
    model = mbp.MLP(np.array([4, 8, 3]))
    assert model(torch.ones(2, 4)).shape == (2, 3)
    assert repr(model) == repr(mbp.MLP([4, 8, 3]))


X, Y = torch.ones(2, 4), torch.ones(2, 3)
CALLS = {
    "MLP": lambda model, x, y: model(x),
    "MLP.loss": lambda model, x, y: model.loss(x, y),
    "MLP.loss_backward": lambda model, x, y: model.loss_backward(x, y),
    "MLP.train_step": lambda model, x, y: model.train_step(x, y, torch.optim.SGD(model.parameters(), 0.1)),
}


@pytest.mark.parametrize("call", CALLS)
def test_messages_begin_with_what_was_called(call):
    model, run = mbp.MLP([4, 8, 3]), CALLS[call]
    with pytest.raises(RuntimeError, match=rf"^{call}: `weights\[0\]` has 4 columns but `input` has 3 features"):
        run(model, X[:, :3], Y)
    if call == "MLP":
        with pytest.raises(RuntimeError, match=r"^FusedSequential: `weights\[0\]` has 4 columns"):
            mbp.fuse(plain_network([4, 8, 3]))(X[:, :3])
        return
    with pytest.raises(RuntimeError, match=rf"^{call}: `target` must have shape"):
        run(model, X, Y[:, :2])


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


FUNCTIONS = {
    "LinearReLU": lambda model, x, y: mbp.LinearReLU(4, 3)(x),
    "trace": mbp.trace,
    "per_sample_gradients": mbp.per_sample_gradients,
    "per_sample_gradient_norms": mbp.per_sample_gradient_norms,
    "clipped_gradients": lambda model, x, y: mbp.clipped_gradients(model, x, y, 1.0),
    "train_step": lambda model, x, y: mbp.train_step(model, x, y, sgd(model)),
    "fit": lambda model, x, y: mbp.fit(model, x, y, sgd(model)),
    "fit ": lambda model, x, y: mbp.fit(model, X, Y, sgd(model), validation=(x, y)),
}


@pytest.mark.parametrize("call", FUNCTIONS)
def test_messages_of_functions_begin_with_what_was_called(call):
    message = rf"^{call.strip()}: `(weight|weights\[0\])` has 4 columns but `input` has 3 features"
    with pytest.raises(RuntimeError, match=message):
        FUNCTIONS[call](mbp.MLP([4, 8, 3]), X[:, :3], Y)


def test_gradient_flow_names_itself_where_layers_do_not_fit():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(7, 3))
    with pytest.raises(RuntimeError, match=r"^gradient_flow: `weights\[1\]` has 7 columns"):
        mbp.gradient_flow(model, X, Y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_messages_of_a_layer_begin_with_its_class(dtype, grad):
    class Named(mbp.LinearReLU):
        pass

    for kind in (mbp.LinearReLU, Named):
        layer = kind(4, 3, dtype=dtype)
        with torch.set_grad_enabled(grad):
            with pytest.raises(TypeError, match=rf"^{kind.__name__}: `input` must be a Tensor, got list"):
                layer([1.0])
            with pytest.raises(RuntimeError, match=rf"^{kind.__name__}: `weight` has 4 columns"):
                layer(X[:, :3].to(dtype))
            with pytest.raises(RuntimeError, match=rf"^{kind.__name__}: `input` must have the dtype of `weight`"):
                layer(X.long())
    with pytest.raises(RuntimeError, match=r"^linear_relu: `weight` has 4 columns"):
        mbp.linear_relu(X[:, :3], mbp.LinearReLU(4, 3).weight)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16])
def test_an_input_of_another_dtype_is_told_with_the_cure(call, dtype):
    with pytest.raises(RuntimeError, match=r"`input` .* \(float32\), got \w+: pass input.to\(torch.float32\)") as told:
        CALLS[call](mbp.MLP([4, 8, 3]), X.to(dtype), Y)
    assert str(told.value).startswith("MLP")


def test_functional_call_replaces_parameters():
    model, input = mbp.MLP([4, 5, 3]), torch.randn(2, 4)
    other = mbp.MLP([4, 5, 3])
    got = torch.func.functional_call(model, dict(other.named_parameters()), (input,))
    assert_equal(got, other(input))


def test_moves_between_dtypes():
    model = mbp.MLP([4, 5, 3])
    assert model.to(torch.bfloat16)(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model.double()(torch.randn(2, 4).double()).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"^MLP: `input` must have .* `weights\[0\]` \(float64\), got float32"):
        model(torch.randn(2, 4))


def test_meta_device_gives_shapes_only():
    model = mbp.MLP([4, 5, 3], device="meta")
    output = model(torch.empty(2, 4, device="meta"))
    assert (output.device.type, output.shape) == ("meta", (2, 3))
    assert mbp.LinearReLU(4, 3, device="meta")(torch.empty(2, 4, device="meta")).shape == (2, 3)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ([4], ValueError, r"`sizes` must hold at least an input and an output width, got \[4\]"),
        ([], ValueError, r"`sizes` must hold at least"),
        ([4, -1], ValueError, r"`sizes` must not be negative, got -1"),
        ([4, 2.0], TypeError, r"`sizes` must hold ints, got 2.0"),
        ([4, True], TypeError, r"`sizes` must hold ints, got True"),
        (["4", 2], TypeError, r"`sizes` must hold ints, got '4'"),
        (4, TypeError, r"`sizes` must be one list of all widths.*, got MLP\(4\)"),
    ],
    ids=str,
)
def test_wrong_sizes_are_named(sizes, error, message):
    with pytest.raises(error, match=f"MLP: {message}"):
        mbp.MLP(sizes)


def test_unknown_activations_mode_of_mlp_is_a_value_error():
    with pytest.raises(ValueError, match=r"MLP: `activations` must be one of .*, got 'all'"):
        mbp.MLP([4, 2], activations="all")
    model = mbp.MLP([4, 2])
    with pytest.raises(ValueError, match=r"MLP: `activations` must be one of .*, got 'all'"):
        model.activations = "all"
    assert model.activations == "store"


def test_an_input_that_does_not_fit_is_an_error_that_names_the_argument():
    with pytest.raises(RuntimeError, match=r"`weights\[0\]` has 4 columns but `input` has 3 features"):
        mbp.MLP([4, 5, 2])(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="`weight` has 4 columns but `input` has 3 features"):
        mbp.LinearReLU(4, 2)(torch.randn(2, 3))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_widths_of_zero_work():
    model = mbp.MLP([4, 0, 2])
    assert_equal(model(torch.randn(3, 4)), model[2].bias.expand(3, 2))


class TenTimes(mbp.MLP):
    """A subclass with its own forward."""

    def forward(self, input):
        return 10 * super().forward(input)


@pytest.mark.parametrize("where", ["class", "instance"])
def test_the_loss_is_that_of_a_forward_which_was_overridden(where):
    model, x, y = (TenTimes if where == "class" else mbp.MLP)([4, 5, 3]), torch.randn(8, 4), torch.randn(8, 3)
    if where == "instance":
        plain = model.forward
        model.forward = lambda input: 10 * plain(input)
    want = F.mse_loss(model(x), y)
    wanted = torch.autograd.grad(want, list(model.parameters()))
    assert_equal(model.loss(x, y), want)
    assert_equal(model.loss_backward(x, y), want.detach())
    assert_equal([parameter.grad for parameter in model.parameters()], list(wanted))


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_loss_backward_needs_no_graph_and_leaves_ordinary_gradients(mode, watched):
    model, x, y = mbp.MLP([4, 5, 3]), torch.randn(8, 4), torch.randn(8, 3)
    if watched:
        model[0].weight.register_hook(lambda grad: grad)
    with mode():
        model.loss_backward(x, y)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    model.loss_backward(x, y)
    assert_equal([parameter.grad for parameter in model.parameters()], [2 * grad for grad in once])


# --- replaced torch functions and layers change the network as they change torch's ----------------------------------


def _fused(model):
    return mbp.fuse(copy.deepcopy(model))


def _as_mlp(model):
    ours = mbp.MLP([4, 6, 5, 3], dtype=torch.float64)
    ours.load_state_dict(model.state_dict())
    return ours


def _doubled_linear(input, weight, bias=None):
    return 2 * torch._C._nn.linear(input, weight, bias)


def _shifted_relu(input, inplace=False):
    return input.clamp(min=0) + 1


REPLACEMENTS = {
    "F.linear": (F, "linear", _doubled_linear),
    "F.relu": (F, "relu", _shifted_relu),
    "torch.relu": (torch, "relu", _shifted_relu),
    "Linear.forward": (nn.Linear, "forward", lambda self, input: _doubled_linear(input, self.weight, self.bias)),
    "ReLU.forward": (nn.ReLU, "forward", lambda self, input: _shifted_relu(input)),
    "Module.__call__": (nn.Module, "__call__", lambda self, *args: self.forward(*args) * 3),
    "Sequential.forward": (nn.Sequential, "forward", lambda self, input: self[0](input)),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
@pytest.mark.parametrize("make", [_fused, _as_mlp])
def test_a_replaced_function_of_torch_is_called(make, name, monkeypatch):
    theirs, input, target = plain_network([4, 6, 5, 3], dtype=torch.float64), integers(7, 4), integers(7, 3)
    ours = make(theirs)
    want = theirs(input)
    torch.testing.assert_close(ours(input), want)
    monkeypatch.setattr(*REPLACEMENTS[name])
    replaced = theirs(input)
    assert replaced.shape != want.shape or not torch.allclose(replaced, want)
    if not (make is _as_mlp and name == "Sequential.forward"):  # an MLP has its own forward
        assert_equal(ours(input), replaced)
        if make is _as_mlp and replaced.shape == target.shape:
            assert_equal(ours.loss(input, target), F.mse_loss(replaced, target))
    monkeypatch.undo()
    torch.testing.assert_close(ours(input), want)
    assert calls_of(ours, input) == ["mlp"]


@pytest.mark.parametrize("name", ["F.linear", "F.relu", "torch.relu", "Linear.forward", "ReLU.forward"])
def test_linear_relu_calls_a_replaced_function_of_torch(name, monkeypatch):
    ours = mbp.LinearReLU(4, 3, dtype=torch.float64)
    theirs = nn.Sequential(nn.Linear(4, 3, dtype=torch.float64), nn.ReLU())
    theirs[0].load_state_dict(ours.state_dict())
    input = integers(7, 4)
    monkeypatch.setattr(*REPLACEMENTS[name])
    assert_equal(ours(input), theirs(input))


class _Watching(TorchFunctionMode):
    """Records each torch function that is called, and doubles the result of linear."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is F.linear else result


@pytest.mark.parametrize("make", [_fused, _as_mlp])
def test_a_function_mode_sees_the_layers_and_may_change_them(make):
    theirs, input = plain_network([4, 6, 5, 3], dtype=torch.float64), integers(7, 4)
    ours = make(theirs)
    ours(input)
    seen = []
    for model in (ours, theirs):
        with _Watching() as mode:
            output = model(input)
        seen.append((mode.seen, output))
    assert seen[0][0] == seen[1][0]
    assert_equal(seen[0][1], seen[1][1])
    torch.set_default_device("cpu")  # this is also a mode, but it changes no layer
    try:
        assert "MLPFunction" in ours(input).grad_fn.name()
    finally:
        torch.set_default_device(None)


class _Truncated(mbp.MLP):
    def __iter__(self):
        return iter(list(self._modules.values())[:2])


def test_a_network_with_an_iteration_of_its_own_is_computed_by_it():
    model, input = _Truncated([4, 5, 3], dtype=torch.float64), integers(7, 4)
    want = torch.relu(model[0](input))
    assert_equal(model(input), want)
    target = integers(7, 5)
    assert_equal(model.loss(input, target), F.mse_loss(want, target))


@pytest.mark.parametrize("shape", [(), (1,), (1, 5)])
def test_a_bias_that_broadcasts_is_left_to_torch(shape):
    theirs = plain_network([4, 5, 3], dtype=torch.float64)
    theirs[0].bias = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    ours, input = _fused(theirs), integers(7, 4)
    for _ in range(2):
        assert_same_step(ours, theirs, input)
    assert calls_of(ours, input) == []  # also once the decision is cached
    ours[0].bias = nn.Parameter(torch.randn(5, dtype=torch.float64))
    assert calls_of(ours, input) == ["mlp"]


@pytest.mark.parametrize("message", ["not enough memory", "unforeseen"])
def test_an_error_of_one_call_decides_nothing_about_the_next(message, monkeypatch):
    ours, input = _fused(plain_network([4, 5, 3])), torch.randn(7, 4)
    want = ours(input)

    def layers(*args):
        raise RuntimeError(message)

    with monkeypatch.context() as patch:
        patch.setattr(_compute, "layers", layers)
        if message == "unforeseen":  # torch computes it
            assert calls_of(ours, input) == []
        else:  # torch might compute other bits whenever memory is short, and fail in the middle of its backward pass
            with pytest.raises(RuntimeError, match=message):
                ours(input)
    assert calls_of(ours, input) == ["mlp"]
    assert torch.equal(ours(input), want)


def test_frozen_layers_below_keep_no_activations():
    theirs = plain_network([64] * 9 + [10])
    theirs.requires_grad_(False)
    theirs[-1].requires_grad_(True)
    kept = []
    for model in (_fused(theirs), theirs):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.randn(100, 64))
        kept.append(sum(sizes))
    assert kept[0] == kept[1] == 100 * 64


class DoublingTensor(torch.Tensor):
    """Gives `linear` another meaning."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        output = super().__torch_function__(function, types, args, kwargs or {})
        return output + output if function is F.linear else output


class ToDoubling(nn.Module):
    def forward(self, input):
        return input.as_subclass(DoublingTensor)


def test_a_module_between_two_runs_may_return_a_subclass_of_tensor():
    theirs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), ToDoubling(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    ours, input = mbp.fuse(copy.deepcopy(theirs)), torch.randn(5, 4)
    assert type(ours(input)) is DoublingTensor
    torch.testing.assert_close(ours(input).as_subclass(torch.Tensor), theirs(input).as_subclass(torch.Tensor))


def _forward_of_its_own(model):
    model[0].forward = lambda input: input @ torch.ones(4, 8)


def _parameter_of_a_subclass(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(DoublingTensor))


@pytest.mark.parametrize("change", [_forward_of_its_own, _parameter_of_a_subclass])
def test_a_child_that_changes_between_two_calls_is_computed_as_it_is(change):
    theirs, input = plain_network([4, 8, 3]), torch.randn(5, 4)
    ours = mbp.fuse(copy.deepcopy(theirs))
    assert calls_of(ours, input) == ["mlp"]
    change(ours)
    change(theirs)
    for _ in range(2):
        assert_equal(*(model(input).as_subclass(torch.Tensor) for model in (ours, theirs)))
    assert calls_of(ours, input) == []


def test_children_that_another_thread_changes_are_called_in_turn(monkeypatch):
    theirs, input = plain_network([4, 8, 3]), torch.randn(5, 4)
    ours = mbp.fuse(copy.deepcopy(theirs))
    with monkeypatch.context() as patch:
        patch.setattr(modules._Plan, "parameters", lambda self, *args: None)  # they are no longer those of the plan
        assert_equal(ours(input), theirs(input))
        assert calls_of(ours, input) == []
    assert calls_of(ours, input) == ["mlp"]


# --- Sequentials in a Sequential ------------------------------------------------------------------------------------


def nested_pair():
    """((Linear, ReLU), (Linear, Identity, ReLU), Linear), fused and plain."""
    theirs = nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 6), nn.Identity(), nn.ReLU()),
        nn.Linear(6, 3),
    ).double()
    return mbp.fuse(copy.deepcopy(theirs)), theirs


def assert_same_calls(ours, theirs, calls):
    """Equal outputs and gradients, by these calls; twice, since the plan is kept."""
    input = torch.randn(5, 4, dtype=torch.float64)
    for _ in range(2):
        results = []
        for model in (ours, theirs):
            output = model(input)
            results.append(
                [output.detach(), *torch.autograd.grad(output.sum(), list(model.parameters()), allow_unused=True)]
            )
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
        assert calls_of(ours, input) == calls


def test_nested_sequentials_are_one_run_with_the_same_keys():
    ours, theirs = nested_pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert "in one call: (0.0) to (2)" in repr(ours)
    assert_same_calls(ours, theirs, ["mlp"])
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same_calls(copied, theirs, ["mlp"])
    input, target = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    mbp.train_step(ours, input, target, torch.optim.SGD(ours.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    F.mse_loss(theirs(input), target).backward()
    optimizer.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


NESTED = {
    "a child more": (lambda model: model[1].append(nn.Tanh()), ["mlp"]),
    "a child less": (lambda model: model[1].pop(2), ["mlp"]),
    "another child": (lambda model: model[1].__setitem__(1, nn.Tanh()), ["mlp"]),
    "another layer": (lambda model: model[1].__setitem__(0, nn.Linear(8, 6, bias=False).double()), ["mlp"]),
    "an empty one": (lambda model: model.insert(1, nn.Sequential()), ["mlp"]),
    "replaced": (lambda model: model.__setitem__(1, nn.Sequential(nn.Linear(8, 6), nn.Tanh()).double()), ["mlp"]),
    "hook": (lambda model: model[1].register_forward_hook(lambda module, args, output: 2 * output), ["mlp"] * 2),
    "backward hook": (
        lambda model: model[1].register_full_backward_hook(lambda module, grads, _: (2 * grads[0],)),
        ["mlp"] * 2,
    ),
    "hook inside": (
        lambda model: model[1][2].register_forward_hook(lambda module, args, output: 2 * output),
        ["mlp"],
    ),
    "forward": (lambda model: setattr(model[1], "forward", lambda input: 2 * input[:, :6]), ["mlp"]),
    "class": (lambda model: setattr(model[1], "__class__", type("Own", (type(model[1]),), {})), ["mlp"] * 2),
    "deeper": (lambda model: model[1].__setitem__(2, nn.Sequential(nn.Sequential(nn.ReLU()))), ["mlp"]),
}


@pytest.mark.parametrize("case", NESTED)
def test_a_change_inside_a_nested_sequential_is_seen_at_the_next_call(case):
    change, calls = NESTED[case]
    ours, theirs = nested_pair()
    assert_same_calls(ours, theirs, ["mlp"])
    for model in (ours, theirs):
        torch.manual_seed(3)
        change(model)
    for parameters in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_equal(*parameters)
    assert_same_calls(ours, theirs, calls)


def test_a_hook_on_a_nested_sequential_that_is_removed_leaves_one_run():
    ours, theirs = nested_pair()
    handle = ours[0].register_forward_hook(lambda *_: None)
    assert_same_calls(ours, theirs, ["mlp", "mlp"])
    handle.remove()
    assert_same_calls(ours, theirs, ["mlp"])


def test_a_nested_sequential_with_a_memory_mode_of_its_own_is_called():
    ours, theirs = nested_pair()
    mbp.fuse(ours[0], activations="recompute")
    assert_same_calls(ours, theirs, ["mlp", "mlp"])
    mbp.fuse(ours, activations="recompute")
    assert_same_calls(ours, theirs, ["mlp"])


def test_a_nested_sequential_that_is_watched_is_called():
    ours, theirs = nested_pair()
    with mbp.GradientFlowMonitor(ours[0], every=1) as monitor:
        assert calls_of(ours, torch.randn(5, 4).double())[-1] == "mlp"
        ours(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    assert len(monitor.history) > 0
    ours.zero_grad()
    input = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(input), theirs(input))


def test_a_nested_sequential_alone_computes_its_own_run():
    ours, theirs = nested_pair()
    input = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(ours[0](input), theirs[0](input))
    assert calls_of(ours[0], input) == ["mlp"]
    assert_same_calls(ours, theirs, ["mlp"])


def test_one_sequential_nested_twice_gets_the_sum_of_its_gradients():
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    theirs = nn.Sequential(block, block, nn.Linear(4, 2)).double()
    ours = mbp.fuse(copy.deepcopy(theirs))
    assert_same_calls(ours, theirs, ["mlp"])


# --- one small layer on its own -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "rows", "by_torch"), [((4, 64), 64, True), ((4, 64), 4096, False), ((256, 8), 70000, True)], ids=str
)
def test_one_small_layer_is_left_to_torch(sizes, rows, by_torch, monkeypatch):
    monkeypatch.setattr(_route, "_OUTPUTS_LEFT_TO_TORCH", 1 << 17)
    model = mbp.fuse(nn.Sequential(nn.Linear(*sizes), nn.ReLU(), nn.Dropout(0.0)))
    input = torch.randn(rows, sizes[0])
    for _ in range(2):
        assert calls_of(model, input) == ([] if by_torch else ["mlp"])
    assert calls_of(mbp.fuse(plain_network([4, 8, 2])), torch.randn(1, 4)) == ["mlp"]  # two layers are fused
    half = model.to(torch.float16)
    assert calls_of(half, input.to(torch.float16)) == ["mlp"]


def test_small_layers_that_are_left_to_torch_compute_what_the_modules_compute(monkeypatch):
    monkeypatch.setattr(_route, "_OUTPUTS_LEFT_TO_TORCH", 1 << 17)
    theirs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Tanh(), nn.Linear(8, 3), nn.ReLU())
    ours, input = mbp.fuse(copy.deepcopy(theirs)), torch.randn(5, 4)
    ours(input)  # makes the plan

    def autocast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(input)

    def gradients(model):
        model.zero_grad()
        model(input).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    def replaced(model):
        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "forward", lambda self, input: 2 * F.linear(input, self.weight, self.bias))
            return model(input)

    def counted(model):
        class Counting(TorchFunctionMode):
            calls = 0

            def __torch_function__(self, function, types, args=(), kwargs=None):
                self.calls += function in (F.linear, F.relu, torch.relu)
                return function(*args, **(kwargs or {}))

        with Counting() as mode:
            model(input)
        return mode.calls

    assert_equal(gradients(ours), gradients(theirs))
    assert calls_of(ours, input) == []
    for call in (autocast, replaced):
        assert_equal(call(ours), call(theirs))
    assert counted(ours) == counted(theirs)
    for transform in (torch.func.vmap, torch.func.jacrev):
        assert_equal(transform(ours)(input), transform(theirs)(input))


def test_a_small_layer_that_is_left_to_torch_is_watched_all_the_same(monkeypatch):
    monkeypatch.setattr(_route, "_OUTPUTS_LEFT_TO_TORCH", 1 << 17)
    model, input = mbp.fuse(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.0))), torch.randn(3, 4)
    model(input)
    seen = []
    handle = model[0].register_forward_hook(lambda *args: seen.append(args))
    model(input)
    handle.remove()
    assert len(seen) == 1
    model[0].weight = nn.Parameter(torch.zeros(8, 4))
    model[0].bias = nn.Parameter(torch.ones(8))
    assert_equal(model(input), torch.ones(3, 8))
    model[2] = nn.Linear(8, 2)
    assert calls_of(model, input) == ["mlp"]


def test_a_hook_on_a_small_layer_that_is_left_to_torch_sees_a_call_under_autocast(monkeypatch):
    monkeypatch.setattr(_route, "_OUTPUTS_LEFT_TO_TORCH", 1 << 17)
    model, input = mbp.fuse(nn.Sequential(nn.Linear(4, 8), nn.ReLU())), torch.randn(3, 4)
    model(input)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(input)
    assert seen == [torch.bfloat16]


# --- loss_backward leaves the gradients that torch's engine leaves --------------------------------------------------


def _loss_steps(change):
    """An MLP after loss_backward and its plain twin after backward, both modified by `change` first."""
    ours, theirs = integer_twins([4, 5, 3])
    input, target = integers(7, 4), integers(7, 3)
    for model in (ours, theirs):
        change(model)
    ours.loss_backward(input, target, reduction="sum")
    F.mse_loss(theirs(input), target, reduction="sum").backward()
    return ours, theirs


def _transposed(model):
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())


def _gaps(model):
    for layer in (model[0], model[2]):
        wide = torch.zeros(*layer.weight.shape, 2, dtype=torch.float64)
        wide[..., 0] = layer.weight.detach()
        layer.weight = nn.Parameter(wide[..., 0])


def _accumulating(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def _accumulating_across(model):
    _transposed(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones(parameter.shape, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:grad and param do not obey")  # from torch, in the mixed case
@pytest.mark.parametrize("change", [_transposed, _gaps, _accumulating, _accumulating_across])
def test_loss_backward_lays_gradients_out_as_autograd(change):
    ours, theirs = _loss_steps(change)
    assert_same_grads(ours, theirs)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.grad.stride() == other.grad.stride()


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_fused_optimizer_steps_on_weights_that_are_not_row_major(optimizer):
    ours, theirs = twins([3, 4, 2])
    for model in (ours, theirs):
        _transposed(model)
    input, target = torch.randn(5, 3), torch.randn(5, 2)
    steps = [optimizer(model.parameters(), lr=0.1, fused=True) for model in (ours, theirs)]
    for _ in range(3):
        for step in steps:
            step.zero_grad()
        ours.loss_backward(input, target)
        F.mse_loss(theirs(input), target).backward()
        for step in steps:
            step.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def _accumulator(parameter):
    return parameter.expand_as(parameter).grad_fn.next_functions[0][0]


def _hook_after(parameter, seen):
    node = _accumulator(parameter)
    node.register_hook(lambda *args: seen.append(parameter.shape))
    return node


def _hook_before(parameter, seen):
    node = _accumulator(parameter)
    node.register_prehook(lambda *args: seen.append(parameter.shape))
    return node


def _hook_on_several(parameter, seen):
    return torch.autograd.graph.register_multi_grad_hook([parameter], lambda grads: seen.append(parameter.shape))


@pytest.mark.parametrize("listen", [_hook_after, _hook_before, _hook_on_several])
def test_loss_backward_calls_hooks_on_the_node_that_accumulates(listen):
    model, seen = mbp.MLP([4, 5, 3]), []
    input, target = torch.randn(7, 4), torch.randn(7, 3)
    assert calls_of(model.loss_backward, input, target) == ["mlp_loss"]
    held = [listen(parameter, seen) for parameter in model.parameters()]
    model.loss_backward(input, target)
    assert sorted(seen) == sorted(parameter.shape for parameter in model.parameters())
    del held


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.filterwarnings("ignore:Error detected:UserWarning")
def test_loss_backward_looks_for_nan_where_autograd_does():
    model = mbp.MLP([4, 5, 3])
    with torch.no_grad():
        model[2].weight.fill_(float("nan"))
    with torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError, match="nan values"):
        model.loss_backward(torch.randn(7, 4), torch.randn(7, 3))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_backward_gives_gradients_the_dtype_that_was_asked_for():
    model = mbp.MLP([4, 5, 3], dtype=torch.bfloat16)
    if not hasattr(model[0].weight, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype")
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    for _ in range(2):
        model.loss_backward(torch.randn(7, 4).bfloat16(), torch.randn(7, 3).bfloat16())
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def _a_gradient_of_another_shape(model):
    model[2].bias.grad = torch.zeros(3)
    model[2].bias.grad.data = torch.zeros(4)


def _a_hook_that_fails(model):
    def fail(gradient):
        raise ValueError("a hook that fails")

    model[0].weight.register_hook(fail)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("spoil", [_a_gradient_of_another_shape, _a_hook_that_fails])
def test_loss_backward_that_fails_changes_no_gradient(spoil, accumulate):
    model = mbp.MLP([4, 5, 3])
    if accumulate:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    spoil(model)
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    with pytest.raises((RuntimeError, ValueError)):
        model.loss_backward(torch.randn(7, 4), torch.randn(7, 3))
    for parameter, (grad, numbers) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is grad
        if grad is not None:
            assert_equal(grad, numbers)


def test_loss_backward_of_a_frozen_network_raises_as_backward_does():
    model = mbp.MLP([4, 5, 3]).requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model.loss_backward(torch.randn(7, 4), torch.randn(7, 3))
