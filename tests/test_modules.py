"""LinearReLU and MLP: drop-ins for nn.Linear and nn.Sequential in everything but speed."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import torch_manualbp as mbp
from helpers import DTYPES, assert_equal, calls_of, integers, recorded_calls

SIZES = ([3, 2], [4, 8, 1], [5, 7, 6, 2])


def plain(sizes, bias=True, dtype=None):
    """The nn.Sequential that MLP(sizes) stands for."""
    layers = []
    for d_in, d_out in itertools.pairwise(sizes):
        layers += [nn.Linear(d_in, d_out, bias=bias, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def twins(sizes, bias=True, dtype=None, seed=0):
    """An MLP and its plain twin, from the same seed."""
    torch.manual_seed(seed)
    ours = mbp.MLP(sizes, bias=bias, dtype=dtype)
    torch.manual_seed(seed)
    return ours, plain(sizes, bias, dtype)


def integer_twins(sizes, dtype=torch.float64):
    """The same, with small integers for parameters, so that both compute the same bits."""
    ours, theirs = twins(sizes, dtype=dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(integers(*parameter.shape, high=1))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_same_step(ours, theirs, input):
    """Outputs and all gradients are equal; leaves no gradients behind."""
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


# --- MLP: an nn.Sequential ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mlp_has_the_start_keys_children_and_repr_of_its_plain_twin(sizes, bias):
    ours, theirs = twins(sizes, bias)
    assert isinstance(ours, nn.Sequential)
    assert_equal(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [type(child) for child in ours] == [type(child) for child in theirs]
    assert repr(ours) == repr(theirs)


def test_state_dict_is_exchanged_both_ways():
    ours, theirs = twins([4, 8, 3])[0], plain([4, 8, 3])
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(5, 4)
    torch.testing.assert_close(ours(input), theirs(input))
    other = plain([4, 8, 3])
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
    twin = plain([4, 8, 3])
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
    """A subclass of Tensor, which sees each function that it takes part in."""


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
    assert_equal(ours(input), theirs(input))
    assert calls_of(ours, input) == []


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


@pytest.mark.usefixtures("lone_layers_are_fused")
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
    learns = learns[learns.index(True) :] if any(learns) else []  # nothing is kept of frozen layers below
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


def test_functional_call_replaces_parameters():
    model, input = mbp.MLP([4, 5, 3]), torch.randn(2, 4)
    other = mbp.MLP([4, 5, 3])
    got = torch.func.functional_call(model, dict(other.named_parameters()), (input,))
    assert_equal(got, other(input))


def test_moves_between_dtypes():
    model = mbp.MLP([4, 5, 3])
    assert model.to(torch.bfloat16)(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model.double()(torch.randn(2, 4).double()).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"`weights\[0\]` must have the dtype of `input` \(float32\), got float64"):
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
    """A forward of its own."""

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
