"""The monitor measures what training computes, for every way to train, and does not change what it computes."""

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune, vector_to_parameters
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils.flop_counter import FlopCounterMode

import torch_manualbp as mbp
from helpers import plain_network

SIZES = [6, 16, 16, 3]


MODELS = {
    "plain": lambda: plain_network(SIZES),
    "fused": lambda: mbp.fuse(plain_network(SIZES)),
    "MLP": lambda: mbp.MLP(SIZES),
    "recompute": lambda: mbp.MLP(SIZES, activations="recompute"),
}


def autograd(model, x, y):
    F.mse_loss(model(x), y).backward()


STEPS = {
    "autograd": autograd,
    "loss": lambda model, x, y: model.loss(x, y).backward(),
    "loss_backward": lambda model, x, y: model.loss_backward(x, y),
}
WAYS = [(name, "autograd") for name in MODELS] + [("MLP", "loss"), ("MLP", "loss_backward")]


def train(model, step, steps=7, lr=0.1, seed=1, rows=40):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        x, y = torch.randn(rows, 6, generator=generator), torch.randn(rows, 3, generator=generator)
        optimizer.zero_grad()
        step(model, x, y)
        optimizer.step()
    return x, y


def assert_describes(flow, model, x, y):
    """Asserts that `flow` was measured on this network, trained on the mean square error."""
    expected = mbp.gradient_flow(copy.deepcopy(model).double(), x.double(), y.double())
    for got, want in zip(flow.layers, expected.layers, strict=True):
        assert (got.name, got.d_in, got.d_out) == (want.name, want.d_in, want.d_out)
        assert got.dl_df == pytest.approx(want.dl_df / len(x), rel=1e-4)  # the loss is the mean over the examples
        for quantity in ("f", "h", "dead", "always_on", "growth", "growth_theory", "forward_growth", "forward_theory"):
            value = getattr(want, quantity)
            assert getattr(got, quantity) == (value and pytest.approx(value, rel=1e-4)), quantity


def data(rows=40):
    return torch.randn(rows, SIZES[0]), torch.randn(rows, SIZES[-1])


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_training_is_the_same_bit_for_bit(name, how):
    alone = MODELS[name]()
    watched = copy.deepcopy(alone)
    state = torch.get_rng_state()
    train(alone, STEPS[how])
    with mbp.GradientFlowMonitor(watched, every=2) as monitor:
        train(watched, STEPS[how])
    assert torch.equal(state, torch.get_rng_state())
    assert len(monitor.history) == 4
    for p, q in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_it_sees_the_gradient_of_the_loss_and_the_step_that_follows(name, how):
    model = MODELS[name]()
    reference = copy.deepcopy(model).double()
    with mbp.GradientFlowMonitor(model) as monitor:
        x, y = train(model, STEPS[how], steps=1)
    (flow,) = monitor.history
    assert flow.step == 1
    assert_describes(flow, reference, x, y)
    for k, got in enumerate(flow.layers):
        before = reference[2 * k].weight
        change = (model[2 * k].weight.double() - before).norm() / before.norm()
        assert got.update_ratio == pytest.approx(change.item(), rel=1e-4)


def replace_layer(model):
    model[2] = nn.Linear(16, 16)
    nn.init.normal_(model[2].weight, std=3.0)


def append_layers(model):
    model.append(nn.ReLU())
    model.append(nn.Linear(3, 3))


def exchange_data(model):
    for parameter in model.parameters():
        parameter.data = 3 * parameter.data


def write_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(3)


def assign_state(model):
    model.load_state_dict({name: 3 * value for name, value in model.state_dict().items()}, assign=True)


def remove_bias(model):
    model[2].bias = None


def narrow(model):
    model.zero_grad()
    model[0].weight.data, model[0].bias.data = model[0].weight.data[:9], model[0].bias.data[:9]
    model[2].weight.data = model[2].weight.data[:, :9]


def prune_for_good(model):
    prune.l1_unstructured(model[2], "weight", 0.5)
    prune.remove(model[2], "weight")


CHANGES = [
    replace_layer,
    append_layers,
    exchange_data,
    write_data,
    assign_state,
    remove_bias,
    narrow,
    prune_for_good,
    lambda model: model.__delitem__(3),  # removes a ReLU, so that two linear layers are adjacent
    lambda model: model.insert(0, nn.Linear(6, 6)),
    lambda model: vector_to_parameters(torch.randn(sum(p.numel() for p in model.parameters())), model.parameters()),
    mbp.fuse,
]


@pytest.mark.parametrize(("name", "how"), WAYS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_it_measures_the_network_that_the_forward_pass_computed(name, how, change):
    model = MODELS[name]()
    with mbp.GradientFlowMonitor(model, every=1) as monitor:
        STEPS[how](model, *data())
        change(model)
        x, y = data()
        STEPS[how](model, x, y)
    assert len(monitor.history) == 2
    assert_describes(monitor.history[1], model, x, y)
    str(monitor)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", [change for change in CHANGES if change not in (write_data, narrow)])
def test_what_happens_between_forward_and_backward_does_not_matter(name, change):
    """The exceptions change the backward pass itself: values written through ``.data``, other shapes."""
    model = MODELS[name]()
    before, (x, y) = copy.deepcopy(model), data()
    with mbp.GradientFlowMonitor(model) as monitor:
        output = model(x)
        change(model)
        F.mse_loss(output, y).backward()
    assert_describes(monitor.history[0], before, x, y)


def test_the_first_layer_the_biases_and_the_input_may_be_written_before_the_backward_pass():
    """Autograd allows this, because it no longer needs their values."""
    model = plain_network(SIZES)
    model[0].requires_grad_(False)
    (x, y), before = data(), copy.deepcopy(model)
    x_before = x.clone()
    with mbp.GradientFlowMonitor(model) as monitor:
        output = model(x)
        with torch.no_grad():
            model[0].weight.mul_(2)
            for layer in model[::2]:
                layer.bias.add_(1)
            x.zero_()
        F.mse_loss(output, y).backward()
    for got, want in zip(monitor.history[0].layers, mbp.gradient_flow(before, x_before, y).layers, strict=True):
        assert (got.f, got.h) == pytest.approx((want.f, want.h), rel=1e-4)
        assert got.dl_df == pytest.approx(want.dl_df / 40, rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_functional_call_lends_are_measured(name):
    model, other, (x, y) = MODELS[name](), MODELS[name](), data()
    before = copy.deepcopy(model)
    with mbp.GradientFlowMonitor(model, every=1) as monitor:
        F.mse_loss(torch.func.functional_call(model, dict(other.named_parameters()), (x,)), y).backward()
        autograd(model, x, y)
    assert_describes(monitor.history[0], other, x, y)
    assert_describes(monitor.history[1], before, x, y)


def test_other_hooks_do_not_hide_the_output():
    model, (x, y) = plain_network(SIZES), data()
    model.register_forward_hook(lambda module, args, output: 2 * output)
    with mbp.GradientFlowMonitor(model) as monitor:
        (model(x) / 2 - y).square().mean().backward()
    assert_describes(monitor.history[0], nn.Sequential(*model), x, y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: prune.l1_unstructured(m[2], "weight", 0.5), TypeError, "child '2'"),
        (lambda m: parametrize.register_parametrization(m[2], "weight", nn.Identity()), TypeError, "child '2'"),
        (lambda m: parametrizations.spectral_norm(m[0]), TypeError, "child '0'"),
        (lambda m: m.__setitem__(1, nn.Tanh()), TypeError, "child '1' .Tanh. is not supported"),
        (lambda m: m.append(nn.Dropout()), TypeError, "child '5' .Dropout."),
        (lambda m: m[4].register_forward_hook(lambda *_: None), TypeError, "child '4' .* has hooks"),
        (lambda m: setattr(m[2], "forward", F.relu), TypeError, "child '2'"),
        (lambda m: setattr(m[2], "bias", m[0].bias), ValueError, "child '2' .* shares a parameter with child '0'"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_what_it_cannot_describe_any_more_it_refuses_before_the_step_is_taken(name, change, error, message):
    model, (x, y) = MODELS[name](), data()
    with mbp.GradientFlowMonitor(model, every=2) as monitor:
        autograd(model, x, y)
        change(model)
        model.zero_grad()
        model(x)  # must not be measured
        for _ in range(2):
            with pytest.raises(error, match=f"GradientFlowMonitor: {message}"):
                autograd(model, x, y)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert len(monitor.history) == 1


def test_no_gradient_is_added_when_a_loss_is_refused():
    model, (x, y) = mbp.MLP(SIZES), data()
    with mbp.GradientFlowMonitor(model, every=1):
        model[2].bias = model[0].bias
        for how in ("loss", "loss_backward"):
            with pytest.raises(ValueError, match="shares a parameter"):
                STEPS[how](model, x, y)
    assert all(parameter.grad is None for parameter in model.parameters())


def per_sample(model, x, y):
    def loss(parameters, x, y):
        return F.mse_loss(torch.func.functional_call(model, parameters, (x[None],))[0], y)

    torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(dict(model.named_parameters()), x, y)


def of_parameters(transform):
    def run(model, x, y):
        transform(lambda parameters: torch.func.functional_call(model, parameters, (x,)))(
            dict(model.named_parameters())
        )

    return run


def ensemble(model, x, y):
    parameters = {name: torch.stack([p.detach()] * 2).requires_grad_() for name, p in model.named_parameters()}
    outputs = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
    outputs.square().sum().backward()


def batched_backward(model, x, y):
    output = model(x)
    gradients = torch.randn(5, *output.shape)
    torch.autograd.grad(output, list(model.parameters()), gradients, is_grads_batched=True)


def vmapped_backward(model, x, y):
    output, parameters = model(x), list(model.parameters())
    gradients = torch.randn(5, *output.shape)
    torch.func.vmap(lambda g: torch.autograd.grad(output, parameters, g, retain_graph=True))(gradients)


def forward_mode(model, x, y):
    with forward_ad.dual_level():
        parameters = {name: forward_ad.make_dual(p, p.detach()) for name, p in model.named_parameters()}
        torch.func.functional_call(model, parameters, (x,)).square().sum().backward()


def fake_tensors(model, x, y):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x)).sum().backward()


def fake_parameters(model, x, y):
    with torch._subclasses.FakeTensorMode() as mode:
        parameters = {name: mode.from_tensor(p) for name, p in model.named_parameters()}
        torch.func.functional_call(model, parameters, (mode.from_tensor(x),)).sum().backward()


def compiled(model, x, y):
    torch._dynamo.reset()
    F.mse_loss(torch.compile(model, backend="eager")(x), y).backward()


def compiled_backward(model, x, y):
    torch._dynamo.reset()
    loss = F.mse_loss(model(x), y)
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        loss.backward()


def jit_trace(model, x, y):
    torch.jit.trace(model, (x,))


def nested(model, x, y):
    model(torch.nested.nested_tensor([x, x[:5]], layout=torch.jagged)).values().sum().backward()


def on_meta(model, x, y):
    parameters = {name: p.detach().to("meta").requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, parameters, (x.to("meta"),)).sum().backward()


TRANSFORMS = {
    "vmap of grad": per_sample,
    "vmap": lambda model, x, y: torch.func.vmap(model)(x).sum().backward(),
    "vmap over models": ensemble,
    "grad": lambda model, x, y: torch.func.grad(lambda x: model(x).sum())(x),
    "vjp": lambda model, x, y: torch.func.vjp(model, x)[1](y),
    "jvp": lambda model, x, y: torch.func.jvp(model, (x,), (x,)),
    "linearize": lambda model, x, y: torch.func.linearize(model, x)[1](x),
    "jacrev": of_parameters(torch.func.jacrev),
    "jacfwd": of_parameters(torch.func.jacfwd),
    "hessian": lambda model, x, y: torch.func.hessian(lambda x: model(x).square().sum())(x[0]),
    "is_grads_batched": batched_backward,
    "vmap of backward": vmapped_backward,
    "jacobian": lambda model, x, y: torch.autograd.functional.jacobian(model, x),
    "jacobian, vectorized": lambda model, x, y: torch.autograd.functional.jacobian(model, x, vectorize=True),
    "jacobian, vectorized, forward": lambda model, x, y: torch.autograd.functional.jacobian(
        model, x, vectorize=True, strategy="forward-mode"
    ),
    "hessian, vectorized": lambda model, x, y: torch.autograd.functional.hessian(
        lambda x: model(x).square().sum(), x[0], vectorize=True
    ),
    "forward mode": forward_mode,
    "expanded weights": lambda model, x, y: call_for_per_sample_grads(model)(x).sum().backward(),
    "torch.compile": compiled,
    "compiled autograd": compiled_backward,
    "torch.export": lambda model, x, y: torch.export.export(model, (x,)),
    "torch.jit.trace": jit_trace,
    "make_fx": lambda model, x, y: make_fx(lambda x: torch.autograd.grad(model(x).sum(), list(model.parameters())))(x),
    "fake tensors": fake_tensors,
    "fake parameters": fake_parameters,
    "no data": on_meta,
    "nested": nested,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "fused", "MLP"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore")  # some transforms are deprecated or prototypes
def test_transforms_run_while_it_watches(name, transform):
    run = TRANSFORMS[transform]
    alone = MODELS[name]()
    model, (x, y) = copy.deepcopy(alone), data(8)
    run(alone, x, y)
    with mbp.GradientFlowMonitor(model, every=2) as monitor:
        run(model, x, y)
        for p, q in zip(alone.parameters(), model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or type(p.grad) is not nn.Parameter or torch.equal(p.grad, q.grad)
        model.zero_grad()
        for _ in range(2):
            autograd(model, x, y)
    assert monitor.history
    for flow in monitor.history:
        assert all(math.isfinite(layer.f) and math.isfinite(layer.dl_df) for layer in flow.layers)


def test_a_graph_that_is_captured_holds_nothing_of_the_monitor():
    model, (x, _) = plain_network(SIZES), data()

    def step(x):
        return torch.autograd.grad(model(x).sum(), list(model.parameters()))

    alone = make_fx(step)(x).code
    with mbp.GradientFlowMonitor(model):
        assert make_fx(step)(x).code == alone


def test_a_batched_backward_pass_does_not_take_the_place_of_the_step():
    model, (x, y) = mbp.MLP(SIZES), data()
    with mbp.GradientFlowMonitor(model) as monitor:
        output = model(x)
        torch.autograd.grad(
            output, list(model.parameters()), torch.randn(5, *output.shape), is_grads_batched=True, retain_graph=True
        )
        F.mse_loss(output, y).backward()
    assert_describes(monitor.history[0], model, x, y)


@pytest.mark.parametrize("name", MODELS)
def test_modes_and_subclasses_do_not_see_it(name):
    class Image(torch.Tensor):
        pass

    model, (x, y) = MODELS[name](), data()
    flops = []
    for every in (None, 1):
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            if every is None:
                autograd(model, x.as_subclass(Image), y)
            else:
                with mbp.GradientFlowMonitor(model, every) as monitor:
                    autograd(model, x.as_subclass(Image), y)
                assert_finite = monitor.history[0].layers[0].f
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    assert math.isfinite(assert_finite)
    assert_describes(monitor.history[0], model, x, y)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_inside_the_network_are_seen_like_losses_outside(loss, reduction):
    y = torch.randint(3, (40,)) if loss == "cross_entropy" else torch.rand(40, 3)
    if loss == "cross_entropy":
        y[:7] = -100
    function = {
        "mse": F.mse_loss,
        "cross_entropy": F.cross_entropy,
        "bce_with_logits": F.binary_cross_entropy_with_logits,
    }
    model, x = mbp.MLP(SIZES), torch.randn(40, 6)
    flows = []
    for step in (
        lambda: function[loss](model(x), y, reduction=reduction).backward(),
        lambda: model.loss(x, y, loss, reduction).backward(),
        lambda: model.loss_backward(x, y, loss, reduction),
    ):
        with mbp.GradientFlowMonitor(model) as monitor:
            step()
        flows.append(monitor.history[0])
    for flow in flows[1:]:
        for got, want in zip(flow.layers, flows[0].layers, strict=True):
            assert got.dl_df == pytest.approx(want.dl_df, rel=1e-4)


def test_losses_inside_the_network_stay_in_one_pass():
    from helpers import calls_of

    model, x, y = mbp.MLP(SIZES), torch.randn(40, 6), torch.randn(40, 3)
    with mbp.GradientFlowMonitor(model):
        calls = calls_of(lambda: model.loss_backward(x, y))
        assert [call for call in calls if not call.startswith("flow")] == ["mlp_loss"]
        model.register_forward_hook(lambda *_: None)  # a hook that must be called
        assert "mlp" in calls_of(lambda: model.loss_backward(x, y))


def test_every_and_rows():
    model = mbp.MLP(SIZES)
    with mbp.GradientFlowMonitor(model, every=3, rows=7) as monitor:
        train(model, autograd, steps=8)
        with torch.no_grad():
            model(torch.randn(4, 6))  # not training, so not counted
        model(torch.randn(4, 6))  # without a backward pass: counted, not measured
    assert [flow.step for flow in monitor.history] == [1, 4, 7]
    assert str(monitor).startswith("GradientFlowMonitor: 9 steps seen, 3 measured")
    train(model, autograd, steps=1)
    assert len(monitor.history) == 3  # the monitor has been removed
    assert not model._manualbp_watchers


def test_a_model_may_be_fused_and_unfused_meanwhile():
    model = plain_network(SIZES)
    hooks = len(model._forward_hooks)
    with mbp.GradientFlowMonitor(model, every=1) as monitor:
        for change in (mbp.fuse, mbp.unfuse, mbp.fuse, mbp.unfuse):
            change(model)
            train(model, autograd, steps=1)
    with mbp.GradientFlowMonitor(mbp.fuse(model), every=1) as second:
        train(model, autograd, steps=1)
        train(mbp.unfuse(copy.deepcopy(model)), autograd, steps=1)  # the monitor does not see the copy
        train(mbp.unfuse(model), autograd, steps=1)
    train(model, autograd, steps=1)
    assert [flow.step for flow in monitor.history] == [1, 2, 3, 4]
    assert [flow.step for flow in second.history] == [1, 2]
    assert len(model._forward_hooks) == hooks


def test_batches_may_differ_in_size_and_models_in_dtype():
    model = mbp.MLP(SIZES)
    reference = copy.deepcopy(model)
    seen, expected = [], []
    with mbp.GradientFlowMonitor(model, every=1) as monitor:
        for rows, dtype in ((40, torch.float32), (9, torch.float32), (9, torch.float64), (40, torch.float32)):
            x, y = torch.randn(rows, 6, dtype=dtype), torch.randn(rows, 3, dtype=dtype)
            autograd(model.to(dtype), x, y)
            expected.append(mbp.gradient_flow(reference, x.float(), y.float()).layers[0].f)
    seen = [flow.layers[0].f for flow in monitor.history]
    assert seen == pytest.approx(expected, rel=1e-5)


def test_sampled_rows_stand_for_the_batch():
    model = mbp.MLP([6, 64, 64, 3])
    x, y = torch.randn(5000, 6), torch.randn(5000, 3)
    with mbp.GradientFlowMonitor(model, rows=500) as few, mbp.GradientFlowMonitor(model, rows=5000) as all_rows:
        autograd(model, x, y)
    for a, b in zip(few.history[0].layers, all_rows.history[0].layers, strict=True):
        assert a.f == pytest.approx(b.f, rel=0.1)
        assert a.dl_df == pytest.approx(b.dl_df, rel=0.1)


def test_no_graph_is_kept_alive():
    model = mbp.MLP(SIZES)
    with mbp.GradientFlowMonitor(model) as monitor:
        x = torch.randn(40, 6)
        output = model(x)
        node, seen = weakref.ref(output.grad_fn), weakref.ref(x)
        output.sum().backward()
        del output, x
        gc.collect()
        assert len(monitor.history) == 1
        assert node() is None
        assert seen() is None


def test_what_is_no_step_is_not_measured():
    model = mbp.MLP(SIZES)
    with mbp.GradientFlowMonitor(model, every=1) as monitor:
        output = model(torch.randn(4, SIZES[0])).sum()
        output.backward(retain_graph=True)
        output.backward()  # the same step again
        model(torch.randn(0, SIZES[0])).sum().backward()  # nothing to measure
        model.loss_backward(torch.randn(4, SIZES[0]), torch.randn(4, SIZES[-1]))
    assert [flow.step for flow in monitor.history] == [1, 3]


def test_accumulated_gradients_wait_for_the_step():
    model = mbp.MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mbp.GradientFlowMonitor(model, every=100) as monitor:
        for _ in range(3):
            autograd(model, torch.randn(10, 6), torch.randn(10, 3))
        assert monitor.history[0].layers[0].update_ratio is None
        optimizer.step()
        autograd(model, torch.randn(10, 6), torch.randn(10, 3))
        assert monitor.history[0].layers[0].update_ratio > 0


def test_without_a_step_there_is_no_update():
    model = mbp.MLP(SIZES)
    with mbp.GradientFlowMonitor(model) as monitor:
        autograd(model, torch.randn(10, 6), torch.randn(10, 3))
    assert monitor.history[0].layers[0].update_ratio is None


def write_through_data(model, gradients):
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.data.add_(gradient, alpha=-0.1)


def exchange_storage(model, gradients):
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.data = parameter.data - 0.1 * gradient


def new_parameters(model, gradients):
    state = {name: p.detach() - 0.1 * g for (name, p), g in zip(model.named_parameters(), gradients, strict=True)}
    model.load_state_dict(state, assign=True)


def set_vector(model, gradients):
    stepped = [p.detach() - 0.1 * g for p, g in zip(model.parameters(), gradients, strict=True)]
    vector_to_parameters(torch.cat([p.flatten() for p in stepped]), model.parameters())


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("step", [write_through_data, exchange_storage, new_parameters, set_vector])
@pytest.mark.parametrize(("name", "how"), WAYS)
def test_a_step_is_measured_however_it_is_written(name, how, step, every):
    model, (x, y) = MODELS[name](), data()
    with mbp.GradientFlowMonitor(model, every=every) as monitor:
        STEPS[how](model, x, y)
        before = [p.detach().clone() for p in model.parameters()]
        step(model, [p.grad for p in model.parameters()])
        STEPS[how](model, x, y)
    for layer, old, new in zip(monitor.history[0].layers, before[::2], list(model.parameters())[::2], strict=True):
        assert layer.update_ratio == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-4)


def test_steps_of_functional_training_are_measured():
    """Each step creates new weights; the model's own never change, so the last measurement has no update."""
    model, (x, y) = mbp.MLP(SIZES), data()
    parameters, ratios = {name: 2 * p.detach() for name, p in model.named_parameters()}, []
    with mbp.GradientFlowMonitor(model, every=1) as monitor:
        for _ in range(3):
            before = {name: p.requires_grad_() for name, p in parameters.items()}
            F.mse_loss(torch.func.functional_call(model, before, (x,)), y).backward()
            parameters = {name: (p - 0.1 * p.grad).detach() for name, p in before.items()}
            ratios.append((0.1 * before["0.weight"].grad.norm() / before["0.weight"].norm()).item())
    assert [flow.layers[0].update_ratio for flow in monitor.history] == [*map(pytest.approx, ratios[:2]), None]


def test_weights_that_were_computed_do_not_keep_their_graph():
    model, (x, _) = mbp.MLP(SIZES), data()

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return 2 * weight

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    with mbp.GradientFlowMonitor(model) as monitor:
        parameters = {name: Twice.apply(p) for name, p in model.named_parameters()}
        node = weakref.ref(parameters["0.weight"].grad_fn)
        torch.func.functional_call(model, parameters, (x,)).sum().backward()
        del parameters
        gc.collect()
        assert len(monitor.history) == 1
        assert node() is None


def test_a_step_that_is_lost_to_rounding_is_a_step():
    model = mbp.MLP(SIZES, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    with mbp.GradientFlowMonitor(model) as monitor:
        model(torch.randn(10, 6).bfloat16()).sum().backward()
        optimizer.step()
    assert [layer.update_ratio for layer in monitor.history[0].layers] == [0, 0, 0]


@pytest.mark.parametrize("every", [1, 5])
def test_a_layer_of_another_shape_has_no_update(every):
    model, (x, y) = mbp.MLP(SIZES), data()
    with mbp.GradientFlowMonitor(model, every=every) as monitor:
        autograd(model, x, y)
        before = model[2].weight.detach().clone()
        model.zero_grad()
        model[2].weight.data = 1.5 * before
        model[4].weight.data = model[4].weight.data[:2]
        model[4].bias.data = model[4].bias.data[:2]
        autograd(model, x, y[:, :2])
    ratios = [layer.update_ratio for layer in monitor.history[0].layers]
    assert ratios == [0, pytest.approx(0.5), None]


def test_frozen_layers_have_no_update():
    model, (x, y) = mbp.MLP(SIZES), data()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mbp.GradientFlowMonitor(model) as monitor:
        autograd(model, x, y)
        optimizer.step()
    first, *rest = [layer.update_ratio for layer in monitor.history[0].layers]
    assert first == 0
    assert all(ratio > 0 for ratio in rest)


def test_a_part_of_a_larger_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 6)
            self.head = mbp.fuse(plain_network(SIZES))

        def forward(self, tokens):
            return self.head(input=self.embedding(tokens))

    model, tokens = Model(), torch.randint(10, (4, 5))
    with mbp.GradientFlowMonitor(model.head) as monitor:
        model(tokens).square().mean().backward()
    assert len(monitor.history[0].layers) == 3
    assert model.embedding.weight.grad is not None
    with pytest.raises(TypeError, match="Model"):
        mbp.GradientFlowMonitor(model)


@pytest.mark.parametrize(
    ("gain", "bias", "lr", "diagnosis"),
    [(0.3, 0, 1e-3, "vanishing"), (1, 0, 1e-3, None), (2.5, 0, 1e-12, "exploding"), (1, -50, 1e-3, "dead")],
)
def test_diagnosis_in_training(gain, bias, lr, diagnosis):
    model = mbp.MLP([64] * 21)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=gain * math.sqrt(2 / 64))
        nn.init.constant_(layer.bias, 0.0)
    nn.init.constant_(model[8].bias, bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with mbp.GradientFlowMonitor(model, every=5) as monitor:
        for _ in range(10):
            optimizer.zero_grad()
            model.loss_backward(torch.randn(100, 64), torch.randn(100, 64))
            optimizer.step()
    assert diagnosis in monitor.diagnosis if diagnosis else monitor.diagnosis == []
    assert (diagnosis or "nothing found") in str(monitor)


def test_units_that_die_in_training_are_found_when_they_do():
    model = mbp.MLP([8, 64, 64, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    with mbp.GradientFlowMonitor(model, every=1) as monitor:
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(100, 8)), torch.randn(100, 1)).backward()
            optimizer.step()
    assert monitor.history[0].diagnosis == []
    assert monitor.diagnosis != []
    assert "from step 1: nothing found" in str(monitor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    model = mbp.MLP(SIZES, dtype=dtype)
    with mbp.GradientFlowMonitor(model) as monitor:
        F.mse_loss(model(torch.randn(30, 6).to(dtype)), torch.randn(30, 3).to(dtype)).backward()
    assert all(layer.dl_df > 0 for layer in monitor.history[0].layers)


def test_autocast():
    model = mbp.MLP(SIZES)
    with mbp.GradientFlowMonitor(model) as monitor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(30, 6)).float().square().mean()
        loss.backward()
    assert all(layer.dl_df > 0 for layer in monitor.history[0].layers)


def test_copies_of_a_watched_model_are_not_watched():
    model = mbp.MLP(SIZES)
    with mbp.GradientFlowMonitor(model) as monitor:
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        for other in copies:
            autograd(other, torch.randn(10, 6), torch.randn(10, 3))
            other.loss_backward(torch.randn(10, 6), torch.randn(10, 3))
        assert monitor.history == []


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def test_scalars_are_written_once_each():
    model, writer = mbp.MLP(SIZES), Writer()
    with mbp.GradientFlowMonitor(model, every=2).write_to(writer, "net") as monitor:
        train(model, autograd, steps=4)
    tags = [(tag, step) for tag, _, step in writer.scalars]
    assert len(set(tags)) == len(tags)
    assert {step for _, step in tags} == {1, 3}
    values = {(tag, step): value for tag, value, step in writer.scalars}
    for flow in monitor.history:
        assert values["net/gradient_ratio", flow.step] == flow.gradient_ratio
        assert values["net/update_ratio/2", flow.step] == flow.layers[1].update_ratio
        assert values["net/dead/0", flow.step] == flow.layers[0].dead
    assert not any("dead/4" in tag for tag, _ in tags)  # the last layer has no ReLU


@pytest.mark.parametrize("layers", [3, 20])
def test_plot_shows_every_layer_over_the_steps(layers):
    model = mbp.MLP([6] * (layers + 1))
    with mbp.GradientFlowMonitor(model, every=2) as monitor:
        for _ in range(6):
            model(torch.randn(10, 6)).square().mean().backward()
    figure = monitor.plot()
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [3] * layers
    assert list(figure.axes[0].lines[0].get_xdata()) == [1, 3, 5]
    assert len(figure.axes[1].lines) == layers - 1
    figure.canvas.draw()


def test_plot_of_a_network_that_grew_and_shrank():
    model, (x, y) = plain_network(SIZES), data()
    with mbp.GradientFlowMonitor(model, every=1) as monitor:
        autograd(model, x, y)
        append_layers(model)
        autograd(model, x, y)
        del model[6], model[5]
        autograd(model, x, y)
    figure = monitor.plot()
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[1, 2, 3]] * 3 + [[2]]
    assert [list(line.get_xdata()) for line in figure.axes[1].lines] == [[1, 2, 3]] * 2 + [[2]]
    figure.canvas.draw()


def test_misuse():
    model = mbp.MLP(SIZES)
    monitor = mbp.GradientFlowMonitor(model)
    assert monitor.diagnosis == []
    with pytest.raises(ValueError, match="nothing has been measured"):
        monitor.plot()
    with monitor, pytest.raises(RuntimeError, match="active already"):
        monitor.__enter__()
    for name in ("every", "rows"):
        with pytest.raises(ValueError, match=f"`{name}` must be a positive int, got 0"):
            mbp.GradientFlowMonitor(model, **{name: 0})


def test_a_target_that_does_not_fit_is_named_as_without_a_monitor():
    model, x = mbp.MLP(SIZES), torch.randn(5, SIZES[0])
    with mbp.GradientFlowMonitor(model), pytest.raises(RuntimeError, match="`target` must have shape"):
        model.loss_backward(x, torch.randn(5, SIZES[-1] + 1))


def test_an_error_in_training_passes_and_removes_the_hook():
    model = mbp.MLP(SIZES)
    with pytest.raises(ZeroDivisionError), mbp.GradientFlowMonitor(model):
        raise ZeroDivisionError
    assert not model._manualbp_watchers
