"""PyTorch features that wrap a model: autocast, deferred init, reparametrised weights, checkpoints, processes, files.

Each is used as documented, on our modules and on the plain ones.
"""

import copy
import functools
import io
import multiprocessing

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from torch.utils.data import DataLoader, Dataset

import torch_manualbp as mbp
from helpers import assert_close, assert_equal, calls_of, plain_twin, training_step

SIZES = [5, 9, 8, 3]


def ours_mlp():
    return mbp.MLP(SIZES)


def ours_fused():
    return mbp.fuse(nn.Sequential(*mbp.MLP(SIZES)))


def ours_layers():
    return nn.Sequential(mbp.LinearReLU(5, 9), mbp.LinearReLU(9, 8), nn.Linear(8, 3))


MODELS = {"MLP": ours_mlp, "fuse": ours_fused, "LinearReLU": ours_layers}


@pytest.fixture(params=MODELS)
def twins(request):
    """Our network in float64, and its plain twin."""
    model = MODELS[request.param]()
    return model.double(), plain_twin(model).double()


def data(dtype=torch.float64, batch=7):
    return torch.randn(batch, SIZES[0]).to(dtype), torch.randn(batch, SIZES[-1]).to(dtype)


# --- mixed precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_autocast_steps_like_the_plain_network(make, dtype):
    model = make()
    steps = []
    for net in (model, plain_twin(model)):
        torch.manual_seed(1)
        input, target = data(torch.float32)
        with torch.autocast("cpu", dtype):
            output = net(input)
            loss = F.mse_loss(output, target)
        assert (output.dtype, loss.dtype) == (dtype, torch.float32)
        loss.backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in net.parameters())
        steps.append([output.detach(), loss.detach(), *(parameter.grad for parameter in net.parameters())])
    unit = torch.finfo(dtype).eps  # plain rounds the gradients, too
    torch.testing.assert_close(*steps, rtol=4 * unit, atol=unit / 4)


def test_kernels_where_autocast_is_switched_off_inside(twins):
    model, twin = twins
    input, target = data()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert calls_of(model, input)
        got = training_step(model, input, target)
    assert_close(got, training_step(twin, input, target))


def test_backward_inside_autocast_of_a_graph_made_outside(twins):
    model, twin = twins
    input, _ = data()
    steps = []
    for net in (model, twin):
        output = net(input)
        with torch.autocast("cpu", torch.bfloat16):
            output.sum().backward()
        steps.append([parameter.grad for parameter in net.parameters()])
    assert_close(*steps)


@pytest.mark.parametrize("loss", ["of the output", "fused"])
def test_grad_scaler_scales_unscales_and_skips_steps_that_overflow(loss):
    model = ours_mlp()
    twin = plain_twin(model)
    before = copy.deepcopy(list(model.parameters()))
    input, target = data(torch.float32)
    for net in (model, twin):
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for overflow in (False, True, False, False, False):
            optimiser.zero_grad()
            value = net.loss(input, target) if net is model and loss == "fused" else F.mse_loss(net(input), target)
            scaler.scale(value * float("inf") if overflow else value).backward()
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimiser)
            scaler.update()
        assert scaler.get_scale() == 2.0**10  # halved once and doubled once
    for one, other, start in zip(model.parameters(), twin.parameters(), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert not torch.equal(one, start)


@pytest.fixture
def _double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double_by_default")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_default_dtype(make):
    model = make()
    input = torch.randn(7, SIZES[0])
    assert model(input).dtype == torch.float64
    assert calls_of(model, input)
    assert_close(training_step(model, input), training_step(plain_twin(model), input))


# --- where and when parameters are made -----------------------------------------------------------------------------


def test_deferred_initialisation():
    want = ours_mlp()
    with torch.device("meta"):
        model = mbp.MLP(SIZES)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(want.state_dict())
    input, target = data(torch.float32)
    assert_equal(training_step(model, input, target), training_step(want, input, target))
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    for child in model:
        if isinstance(child, nn.Linear):
            child.reset_parameters()
    torch.manual_seed(3)
    assert_equal(dict(model.state_dict()), dict(ours_mlp().state_dict()))


def test_parameters_that_are_assigned_when_a_state_is_loaded():
    want = ours_mlp()
    model = mbp.MLP(SIZES, device="meta")
    model.load_state_dict(want.state_dict(), assign=True)
    input = data(torch.float32)[0]
    assert calls_of(model, input) == ["mlp"]
    assert_equal(model(input), want(input))


def test_skip_init():
    model = nn.utils.skip_init(mbp.MLP, SIZES)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    nn.utils.skip_init(mbp.LinearReLU, 3, 2).load_state_dict(nn.Linear(3, 2).state_dict())


def test_lazy_layers_join_a_run_once_they_have_their_shape():
    model = mbp.fuse(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3)))
    input = data(torch.float32)[0]
    model(input)
    assert calls_of(model, input) == ["mlp"]
    assert model[0].weight.shape == (8, SIZES[0])


def test_parameters_as_one_vector(twins):
    model, twin = twins
    vector = nn.utils.parameters_to_vector(twin.parameters())
    nn.utils.vector_to_parameters(vector.detach() / 2, model.parameters())
    nn.utils.vector_to_parameters(vector.detach() / 2, twin.parameters())
    input, target = data()
    assert_close(training_step(model, input, target), training_step(twin, input, target))


# --- weights that are computed --------------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT if weight.shape[0] == weight.shape[1] else weight.abs()


@pytest.mark.parametrize("where", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
        lambda layer: parametrize.register_parametrization(
            parametrizations.spectral_norm(layer), "weight", Symmetric()
        ),
        nn.utils.spectral_norm,
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "own", "two", "old spectral_norm"],
)
def test_reparametrised_weights_and_their_removal(twins, wrap, where):
    model, twin = twins
    for net in (model, twin):
        layers = [child for child in net if isinstance(child, nn.Linear)]
        torch.manual_seed(2)
        wrap(layers[where])
    twin.load_state_dict(dict(zip(twin.state_dict(), model.state_dict().values(), strict=True)))
    input, target = data()
    for _ in range(2):  # spectral_norm iterates at each step
        assert_close(training_step(model, input, target), training_step(twin, input, target))
    layer = [child for child in model if isinstance(child, nn.Linear)][where]
    if parametrize.is_parametrized(layer):
        model.eval()
        before = model(input)
        parametrize.remove_parametrizations(layer, "weight")
        assert_close(model(input), before)
        if type(model) is not nn.Sequential:
            assert calls_of(model, input) == ["mlp"]  # fused again


@pytest.mark.parametrize(
    "cut",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.4),
        lambda layer: prune.ln_structured(layer, "weight", amount=2, n=2, dim=0),
        lambda layer: prune.random_unstructured(layer, "bias", amount=2),
        lambda layer: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.5),
    ],
    ids=["l1", "rows", "bias", "global"],
)
def test_pruned_layers_and_permanent_pruning(twins, cut):
    model, twin = twins
    for net in (model, twin):
        torch.manual_seed(2)
        cut(net[0])
    input, target = data()
    assert_close(training_step(model, input, target), training_step(twin, input, target))
    for net in (model, twin):
        name = "bias" if hasattr(net[0], "bias_mask") else "weight"
        prune.remove(net[0], name)
    assert_close(
        sorted_by_shape(training_step(model, input, target)), sorted_by_shape(training_step(twin, input, target))
    )
    if type(model) is not nn.Sequential:
        assert calls_of(model, input) == ["mlp"]


def sorted_by_shape(tensors):  # removal moves the parameter to the end of its layer's list
    return sorted(tensors, key=lambda tensor: tuple(tensor.shape))


class Holder(nn.Sequential):
    """A Sequential that also has a parameter."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.scale = nn.Parameter(torch.ones(2))


class Twice(nn.Module):
    def forward(self, value):
        return 2 * value


CHANGES = {
    "fuse": mbp.fuse,
    "unfuse": mbp.unfuse,
    "register": lambda model: parametrize.register_parametrization(model, "scale", Twice()),
    "more": lambda model: parametrize.register_parametrization(model, "offset", Twice()),
    "remove": lambda model: parametrize.remove_parametrizations(model, "scale"),
    "prune": lambda model: prune.l1_unstructured(model[0], "weight", amount=0.4),
    "normalise": lambda model: parametrizations.weight_norm(model[0]),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize(
    "order",
    [
        "fuse register unfuse remove",
        "fuse register remove unfuse",
        "register fuse remove unfuse",
        "register fuse unfuse remove",
        "register fuse more unfuse remove",
        "fuse register fuse unfuse fuse remove",
        "fuse register copy unfuse copy remove",
        "register fuse copy remove unfuse",
        "prune fuse unfuse",
        "fuse prune unfuse",
        "normalise fuse unfuse",
        "fuse normalise copy unfuse",
    ],
)
@pytest.mark.parametrize("kind", [nn.Sequential, Holder])
def test_what_torch_adds_to_a_class_stays_in_whatever_order(kind, order):
    """A model that is never fused goes through the same changes; its classes, state and outputs must be equal."""

    def described(model):
        kinds = [
            (type(module).__name__, [base.__name__ for base in type(module).__bases__]) for module in model.modules()
        ]
        state = {name: value.detach() for name, value in model.state_dict().items()}
        return kinds, list(state), [*state.values(), model.scale.detach()]

    torch.manual_seed(1)
    model = kind(nn.Linear(5, 4), nn.ReLU())
    model.scale, model.offset = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))
    twin = copy.deepcopy(model)
    for change in order.split():
        model = CHANGES[change](model) if change in ("copy", "fuse", "unfuse") else CHANGES[change](model) and model
        if change not in ("fuse", "unfuse"):
            twin = CHANGES[change](twin) if change == "copy" else CHANGES[change](twin) and twin
        assert isinstance(model, kind)
        assert_equal(model.scale, twin.scale)
    mbp.unfuse(model)
    (kinds, names, values), (want, same, others) = described(model), described(twin)
    assert kinds == want
    assert names == same
    assert_equal(values, others)
    if "register" not in order:  # parametrizations add a child, which a Sequential calls
        assert_equal(model(torch.ones(2, 5)), twin(torch.ones(2, 5)))


@pytest.mark.parametrize("norm", [1.0, 2.0, float("inf")])
def test_clipping_returns_the_same_norm_and_leaves_the_same_gradients(twins, norm):
    norms = []
    input, target = data()
    for net in twins:
        F.mse_loss(net(input), target).backward()
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.1, norm_type=norm))
    assert_close(*norms)
    assert_close(*([parameter.grad for parameter in net.parameters()] for net in twins))
    model = ours_mlp().double()
    model.loss_backward(input, target)  # puts the gradients in one buffer
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    total = nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=norm)
    assert_close(
        [parameter.grad for parameter in model.parameters()], [grad * (0.1 / (total + 1e-6)) for grad in grads]
    )


# --- what is saved for backward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_models(twins, use_reentrant):
    model, twin = twins
    input, target = data()
    input.requires_grad_()
    steps = []
    for net in (functools.partial(checkpoint, model, use_reentrant=use_reentrant), twin):
        input.grad = None
        F.mse_loss(net(input), target).backward()
        steps.append(input.grad)
    assert_close(*steps)
    assert_close(*([parameter.grad for parameter in net.parameters()] for net in twins))


def test_checkpoint_sequential(twins):
    model, twin = twins
    input, target = data()
    F.mse_loss(checkpoint_sequential(model, 2, input, use_reentrant=False), target).backward()
    F.mse_loss(twin(input), target).backward()
    assert_close(*([parameter.grad for parameter in net.parameters()] for net in twins))


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE], ids=str)
def test_selective_checkpoint(twins, policy):
    model, twin = twins
    input, target = data()
    contexts = functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: policy)
    calls = calls_of(
        lambda: F.mse_loss(checkpoint(model, input, use_reentrant=False, context_fn=contexts), target).backward()
    )
    forward = [name for name in calls if not name.endswith("_backward")]
    assert len(forward) == len(calls) - len(forward) if policy == CheckpointPolicy.MUST_SAVE else forward
    F.mse_loss(twin(input), target).backward()
    assert_close(*([parameter.grad for parameter in net.parameters()] for net in twins))


def test_saved_tensors_on_the_cpu_in_a_file_and_changed_in_place(twins, tmp_path):
    model, twin = twins
    input, target = data()
    want = training_step(twin, input, target)

    def pack(tensor):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
        torch.save(tensor, path)
        return path

    with torch.autograd.graph.save_on_cpu():
        assert_close(training_step(model, input, target), want)
    with torch.autograd.graph.saved_tensors_hooks(pack, torch.load):
        assert_close(training_step(model, input, target), want)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        scratch = input.clone()
        output = model(scratch)
        scratch.zero_()
        F.mse_loss(output, target).backward()
    assert_close([parameter.grad for parameter in model.parameters()], want[1:])


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize(("function", "node"), [("mlp", "MLPFunction"), ("linear_relu", "LinearReLUFunction")])
def test_anomaly_mode_finds_where_a_nan_comes_from(function, node, capfd):
    weight = torch.ones(2, 2, requires_grad=True)
    input = torch.ones(1, 2, requires_grad=True)
    with torch.autograd.detect_anomaly():
        output = mbp.mlp(input, [weight]) if function == "mlp" else mbp.linear_relu(input, weight)
        with (
            pytest.warns(UserWarning, match=f"Error detected in {node}Backward. Traceback of forward call"),
            pytest.raises(RuntimeError, match=f"Function '{node}Backward' returned nan values in its 0th output"),
        ):
            (output * torch.tensor([[float("inf"), -float("inf")]])).sum().backward()
        assert_close(torch.autograd.grad(mbp.mlp(input, [weight]).sum(), input)[0], torch.full((1, 2), 2.0))


# --- hooks ----------------------------------------------------------------------------------------------------------


def test_hooks_with_all_their_options(twins):
    logs = []
    input, target = data()
    input.requires_grad_()
    for net in twins:
        log = []
        linear = [child for child in net if isinstance(child, nn.Linear)][-1]
        for module in (net, linear):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, log=log: log.append(("pre", args[0])), with_kwargs=True
            )
            module.register_forward_hook(lambda *_, log=log: log.append(("late", None)))
            module.register_forward_hook(lambda _, args, out, log=log: log.append(("early", out)), prepend=True)
            module.register_forward_hook(lambda *_, log=log: log.append(("always", None)), always_call=True)
            module.register_full_backward_pre_hook(lambda _, grads, log=log: log.append(("backward pre", grads[0])))
            module.register_full_backward_hook(lambda _, grads, outs, log=log: log.append(("backward", outs[0])))
        training_step(net, input, target)
        logs.append(log)
    assert [name for name, _ in logs[0]] == [name for name, _ in logs[1]]
    assert len(logs[0]) == 12
    assert_close(
        [value for _, value in logs[0] if value is not None], [value for _, value in logs[1] if value is not None]
    )


def test_a_backward_hook_that_changes_the_gradient(twins):
    for net in twins:
        net[0].register_full_backward_hook(lambda _, grads, outs: tuple(2 * grad for grad in grads))
        net.register_full_backward_pre_hook(lambda _, grads: tuple(3 * grad for grad in grads))
    input, target = data()
    grads = []
    for net in twins:
        leaf = input.clone().requires_grad_()
        F.mse_loss(net(leaf), target).backward()
        grads.append([leaf.grad, *(parameter.grad for parameter in net.parameters())])
    assert_close(*grads)


def test_hooks_on_several_gradients_at_once(twins):
    model, _ = twins
    seen = []
    with torch.autograd.graph.register_multi_grad_hook(list(model.parameters()), lambda grads: seen.append(len(grads))):
        training_step(model, *data())
        if isinstance(model, mbp.MLP):
            model.loss_backward(*data())
    assert seen == [len(list(model.parameters()))] * (2 if isinstance(model, mbp.MLP) else 1)


# --- quantization ---------------------------------------------------------------------------------------------------


class Quantizable(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.body = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3), nn.ReLU())

    def forward(self, input):
        return self.leave(self.body(self.enter(input)))


def quantized(fuse_before, aware):
    """The outputs during quantization to int8, with fuse before the named step, and the final classes in the model."""
    ao = torch.ao.quantization
    engine = torch.backends.quantized.engine
    config = ao.get_default_qat_qconfig(engine) if aware else ao.get_default_qconfig(engine)
    pairs = [["body.0", "body.1"], ["body.2", "body.3"]]
    steps = {
        "fuse_modules": lambda model: (ao.fuse_modules_qat if aware else ao.fuse_modules)(model, pairs),
        "prepare": ao.prepare_qat if aware else ao.prepare,
        "calibrate": lambda model: outputs.append(model(torch.linspace(-2, 2, 35).view(7, 5)).detach()) or model.eval(),
        "convert": ao.convert,
        "infer": lambda model: outputs.append(model(torch.linspace(-1, 3, 35).view(7, 5))) or model,
    }
    torch.manual_seed(4)
    model, outputs = Quantizable().train(aware), []
    model.qconfig = config
    for name, step in steps.items():
        if name == fuse_before:
            mbp.fuse(model)
        model = step(model)
    kinds = [type(module) for module in mbp.unfuse(model).modules()]
    return outputs, kinds


needs_int8 = pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="no int8 kernels in this torch")
ignore_quantization = pytest.mark.filterwarnings("ignore")  # deprecation warnings of torch.ao.quantization


@pytest.mark.slow
@needs_int8
@ignore_quantization
@pytest.mark.parametrize("aware", [False, True], ids=["after training", "aware"])
@pytest.mark.parametrize("fuse_before", ["fuse_modules", "prepare", "calibrate", "convert", "infer"])
def test_a_model_is_fused_at_any_point_on_its_way_to_int8(fuse_before, aware):
    (got, kinds), (want, same) = quantized(fuse_before, aware), quantized(None, aware)
    assert kinds == same
    assert "LinearReLU" in [kind.__name__ for kind in kinds]
    torch.testing.assert_close(got[0], want[0])  # in float, fused until prepare adds hooks to its layers
    assert_equal(got[1], want[1])


@needs_int8
@ignore_quantization
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_dynamic_quantization(make, when):
    model, input = make(), data(torch.float32)[0]
    twin = plain_twin(model)
    before, ao = calls_of(model, input), torch.ao.quantization
    if when != "after":
        mbp.fuse(model)
    model, twin = ao.quantize_dynamic(model, {nn.Linear}), ao.quantize_dynamic(twin, {nn.Linear})
    if when != "before":
        mbp.fuse(model)
    if "linear_relu" in before:  # torch does not treat a LinearReLU as an nn.Linear, so it stays float
        assert_close(model(input), model[2](model[1](model[0](input))))
    else:
        assert_equal(model(input), twin(input))
        assert calls_of(mbp.unfuse(model), input) == []


@needs_int8
@ignore_quantization
def test_quantization_of_a_traced_graph():
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    input = data(torch.float32)[0]
    torch.manual_seed(4)
    twin = Quantizable().body.eval()
    outputs = []
    for model in (mbp.fuse(copy.deepcopy(twin)), twin):
        mapping = torch.ao.quantization.get_default_qconfig_mapping(torch.backends.quantized.engine)
        prepared = prepare_fx(model, mapping, (input,))
        prepared(input)
        outputs.append(convert_fx(prepared)(input))
    assert_equal(*outputs)


# --- processes ------------------------------------------------------------------------------------------------------


def train_in_another_process(model, input, target):
    torch.set_num_threads(1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        F.mse_loss(model(input), target).backward()
        optimiser.step()


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_shared_parameters_are_trained_by_another_process(start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    model = nn.ModuleList([ours_mlp(), ours_fused()]).double()
    twins = [plain_twin(part) for part in model]
    input, target = data()
    training_step(model[0], input, target)  # trains in this process first
    model.share_memory()
    for part, twin in zip(model, twins, strict=True):
        assert all(parameter.is_shared() for parameter in part.parameters())
        if part is model[0] or start == "fork":  # starting a process takes seconds, so one is enough
            process = torch.multiprocessing.get_context(start).Process(
                target=train_in_another_process, args=(part, input, target)
            )
            process.start()
            process.join(60)
            assert process.exitcode == 0
            train_in_another_process(twin, input, target)
        assert_close(list(part.parameters()), list(twin.parameters()))


class Embedded(Dataset):
    """A dataset whose worker computes the items with a network."""

    def __init__(self):
        self.model, self.input = ours_mlp().double(), data()[0]

    def __len__(self):
        return len(self.input)

    def __getitem__(self, index):
        assert calls_of(self.model, self.input[index]) == ["mlp"]
        leaf = self.input[index].clone().requires_grad_()
        return torch.autograd.grad(self.model(leaf).sum(), leaf)[0]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_data_loader_workers_compute_with_a_model():
    torch.set_num_threads(2)
    dataset = Embedded()
    dataset.model(torch.randn(5000, SIZES[0]).double())  # starts threads, which a forked worker does not inherit
    got = torch.cat(list(DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork")))
    leaf = dataset.input.clone().requires_grad_()
    assert_close(got, torch.autograd.grad(dataset.model(leaf).sum(), leaf)[0])


# --- graphs for other programs --------------------------------------------------------------------------------------


class Model(nn.Module):
    """A user's module that contains each of our kinds of module."""

    def __init__(self):
        super().__init__()
        self.first = mbp.MLP([5, 9, 8])
        self.second = mbp.LinearReLU(8, 6)
        self.third = mbp.fuse(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 3)))

    def forward(self, input):
        return self.third(self.second(self.first(input)))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_scripted_model_is_the_plain_network_and_can_be_saved():
    model, input = Model().double().eval(), data()[0]
    scripted = torch.jit.script(model)
    assert "manualbp::" not in str(scripted.inlined_graph)
    assert type(model.first) is mbp.MLP  # scripting does not change the model itself
    assert list(scripted.state_dict()) == list(model.state_dict())
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    for graph in (scripted, torch.jit.load(file)):
        got = training_step(graph, input)
        assert_close(got, training_step(model, input))


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_model_is_plain_aten_ops_and_can_be_saved(dynamic):
    model, (input, _) = Model().eval(), data(torch.float32)
    shapes = {"input": {0: torch.export.Dim("batch")}} if dynamic else None
    program = torch.export.export(model, (input,), dynamic_shapes=shapes).run_decompositions()
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {target.split(".")[0] for target in targets} == {"aten"}
    assert {target.split(".")[1] for target in targets} <= {"addmm", "permute", "t", "relu", "clone"}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    more = torch.randn(11, SIZES[0]) if dynamic else input
    torch.testing.assert_close(torch.export.load(file).module()(more), model(more))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own warnings
def test_onnx_has_the_plain_graph():
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, (input, _) = Model().eval(), data(torch.float32)
    program = torch.onnx.export(model, (input,), dynamo=True, verbose=False)
    onnx.checker.check_model(program.model_proto)
    nodes = [node.op_type for node in program.model_proto.graph.node]
    assert nodes == ["Gemm", "Relu", "Gemm", "Gemm", "Relu", "Gemm", "Relu", "Gemm"]
    (output,) = onnx.reference.ReferenceEvaluator(program.model_proto).run(
        None, {program.model_proto.graph.input[0].name: input.numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(output), model(input))


def test_safetensors_round_trip(tmp_path):
    files = pytest.importorskip("safetensors.torch")
    model, other = Model(), Model()
    files.save_model(model, str(tmp_path / "a.safetensors"))
    files.load_model(other, str(tmp_path / "a.safetensors"))
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))
    files.save_file(model.state_dict(), tmp_path / "b.safetensors")
    assert_equal(files.load_file(tmp_path / "b.safetensors"), dict(model.state_dict()))
