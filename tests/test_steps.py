"""A training step in one op equals its composition bit for bit, and where it would not, the composition computes."""

import copy
import itertools
import os
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrize

import torch_manualbp as mbp
from helpers import DTYPES
from torch_manualbp import _ops, _steps
from torch_manualbp._losses import loss_spec

pytestmark = pytest.mark.cpu_only

RULES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.2, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, maximize=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1, eps=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, eps=1e-4),
}
SIZES = [5, 19, 8, 3]


@pytest.fixture
def made(monkeypatch):
    """The steps that each call of the op has made; -1: it has left them to the composition."""
    counts = []
    train = _ops.train

    def counted(*args):
        losses = train(*args)
        counts.append(-1 if losses is None else losses.numel())
        return losses

    monkeypatch.setattr(_ops, "train", counted)
    return counts


def data(rows=23, loss="mse", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(rows, SIZES[0], generator=generator).to(dtype)
    if loss == "cross_entropy":
        return input, torch.randint(SIZES[-1], (rows,), generator=generator)
    return input, torch.rand(rows, SIZES[-1], generator=generator).to(dtype)


def network(dtype=torch.float32, sizes=SIZES, **options):
    torch.manual_seed(1)
    return mbp.MLP(sizes, **options).to(dtype)


def composed(model, optimizer, input, target, loss="mse", max_grad_norm=None):
    """The step by its parts."""
    model.zero_grad()
    value = model.loss_backward(input, target, loss)
    if max_grad_norm is not None:
        clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    model.zero_grad()
    return value


def numbers(model, optimizer):
    state = optimizer.state_dict()["state"]
    return [
        *model.parameters(),
        *(value for key in sorted(state) for value in state[key].values() if value is not None),
    ]


def assert_same(model, optimizer, other, other_optimizer):
    pairs = zip(numbers(model, optimizer), numbers(other, other_optimizer), strict=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def twins(rule="Adam", dtype=torch.float32, **options):
    model = network(dtype, **options)
    other = copy.deepcopy(model)
    return model, mbp.fuse(RULES[rule](model.parameters())), other, mbp.fuse(RULES[rule](other.parameters()))


def train_twins(change, rule="Adam"):
    """Two steps of each twin, the change of both, and two more."""
    model, optimizer, other, other_optimizer = twins(rule)
    input, target = data()
    for step in range(4):
        if step == 2:
            change(model, optimizer)
            change(other, other_optimizer)
        value = model.train_step(input, target, optimizer)
        assert torch.equal(value, composed(other, other_optimizer, input, target))
    assert_same(model, optimizer, other, other_optimizer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_has_the_bits_of_its_parts(made, rule, dtype):
    model, optimizer, other, other_optimizer = twins(rule, dtype)
    for step in range(4):
        input, target = data(20 + step, dtype=dtype)
        clip = 0.05 if step % 2 else None
        value = model.train_step(input, target, optimizer, max_grad_norm=clip)
        assert torch.equal(value, composed(other, other_optimizer, input, target, max_grad_norm=clip))
    assert made == [1] * 4
    assert_same(model, optimizer, other, other_optimizer)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
@pytest.mark.parametrize("sizes", [[5, 3], [5, 1, 3], [5, 300, 3], [5, 64, 64, 3]])
@pytest.mark.parametrize("rows", [1, 64, 3000])
def test_every_loss_on_every_kind_of_batch(made, loss, sizes, rows):
    model, optimizer, other, other_optimizer = twins(sizes=sizes)
    input, target = data(rows, loss)
    for _ in range(2):
        value = model.train_step(input, target, optimizer, loss, max_grad_norm=0.1)
        assert torch.equal(value, composed(other, other_optimizer, input, target, loss, max_grad_norm=0.1))
    assert made == [1, 1]
    assert_same(model, optimizer, other, other_optimizer)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("seconds", [0.0, 10.0], ids=["one step a call", "one call"])
def test_steps_of_an_epoch_are_single_steps(made, monkeypatch, loss, ordered, seconds):
    monkeypatch.setattr(_steps, "_SECONDS", seconds)
    model, optimizer, other, other_optimizer = twins()
    input, target = data(23, loss)
    order = torch.randperm(23) if ordered else torch.arange(23)
    losses = torch.zeros(5, dtype=torch.float64)
    steps = _steps.Steps(model, optimizer, loss_spec(loss, "mean", -100, 0.0), 0.5, "fit")
    step = 0
    while step < 5:
        step = steps.run(input, target, order if ordered else None, 5, losses, step)
    assert made == ([1] * 5 if seconds == 0 else [5])
    for k in range(5):
        rows = order[5 * k : 5 * k + 5]
        assert losses[k] == composed(other, other_optimizer, input[rows], target[rows], loss, max_grad_norm=0.5)
    assert_same(model, optimizer, other, other_optimizer)


def test_strided_data_need_no_copy(made):
    model, optimizer, other, other_optimizer = twins()
    input, target = data(46)
    mbp.fit(model, input[::2], target.t().contiguous().t()[::2], optimizer, batch_size=7, shuffle=False)
    mbp.fit(other, input[::2].contiguous(), target[::2].contiguous(), other_optimizer, batch_size=7, shuffle=False)
    assert sum(made) == 8
    assert_same(model, optimizer, other, other_optimizer)


def test_frozen_and_missing_parameters(made):
    model, optimizer, other, other_optimizer = twins(bias=False)
    for each in (model, other):
        each[2].weight.requires_grad_(False)
    frozen = model[2].weight.clone()
    input, target = data()
    for _ in range(3):
        model.train_step(input, target, optimizer)
        composed(other, other_optimizer, input, target)
    assert made == [1] * 3
    assert torch.equal(model[2].weight, frozen)
    assert_same(model, optimizer, other, other_optimizer)


def test_groups_have_options_of_their_own(made):
    def grouped(model):
        weights = [p for p in model.parameters() if p.dim() == 2]
        biases = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": weights, "weight_decay": 0.3}, {"params": biases, "lr": 0.5}]
        return mbp.fuse(torch.optim.AdamW(groups, lr=0.01))

    model, other = network(), network()
    optimizer, other_optimizer = grouped(model), grouped(other)
    input, target = data()
    for _ in range(3):
        model.train_step(input, target, optimizer)
        composed(other, other_optimizer, input, target)
    assert made == [1] * 3
    assert_same(model, optimizer, other, other_optimizer)


def change_lr(model, optimizer):
    optimizer.param_groups[0]["lr"] = 0.3


def change_to_amsgrad(model, optimizer):
    optimizer.param_groups[0]["amsgrad"] = True
    for state in optimizer.state.values():
        state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()


def freeze(model, optimizer):
    model[0].weight.requires_grad_(False)


def load_state(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def forget_state(model, optimizer):
    optimizer.state.clear()


def exchange_storage(model, optimizer):
    model[2].weight.data = model[2].weight.data * 2


def exchange_a_state(model, optimizer):
    optimizer.state[model[0].weight]["exp_avg"] = torch.ones_like(model[0].weight)


def exchange_the_storage_of_a_state(model, optimizer):
    state = optimizer.state[model[2].bias]["exp_avg_sq"]
    state.data = state.data + 1


def count_again(model, optimizer):
    for state in optimizer.state.values():
        state["step"].fill_(7)


def swap_tensors(model, optimizer):
    torch.utils.swap_tensors(model[2].weight, nn.Parameter(2 * model[2].weight.detach()))
    state = optimizer.state[model[2].weight]
    torch.utils.swap_tensors(model[0].bias, nn.Parameter(model[0].bias.detach() + 1))
    state["exp_avg"] = state["exp_avg"] + 1


def use_two_threads(model, optimizer):
    torch.set_num_threads(3 - torch.get_num_threads())


def replace_a_layer(model, optimizer):
    torch.manual_seed(5)
    model[2] = nn.Linear(19, 8)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.2})


def write_into_a_weight(model, optimizer):
    with torch.no_grad():
        model[4].weight.mul_(0.5)


@pytest.mark.parametrize(
    "change",
    [
        *(change_lr, change_to_amsgrad, freeze, load_state, forget_state, exchange_storage, exchange_a_state),
        *(
            exchange_the_storage_of_a_state,
            count_again,
            swap_tensors,
            replace_a_layer,
            write_into_a_weight,
        ),
    ],
)
def test_a_change_between_steps_counts(made, change):
    train_twins(change)
    assert made == [1] * 4


def narrow(model, optimizer):
    weight, bias = model[0].weight, model[0].bias
    weight.data, bias.data = weight.data[:7].clone(), bias.data[:7].clone()
    model[2].weight.data = model[2].weight.data[:, :7].clone()


def shift_in_memory(model, optimizer):
    weight = model[2].weight
    weight.data = torch.cat([weight.data.flatten(), torch.ones(1)])[1:].view(weight.shape)


@pytest.mark.parametrize("change", [narrow, shift_in_memory])
def test_parameters_may_get_other_memory_and_shapes(made, change):
    train_twins(change, "SGD")
    assert made == [1] * 4


def test_the_dtype_may_change(made):
    model, optimizer, other, other_optimizer = twins("SGD")
    input, target = data()
    for dtype in (torch.float32, torch.float64, torch.float32):
        for parameter in (*model.parameters(), *other.parameters()):
            parameter.data = parameter.data.to(dtype)
        value = model.train_step(input.to(dtype), target.to(dtype), optimizer)
        assert torch.equal(value, composed(other, other_optimizer, input.to(dtype), target.to(dtype)))
    assert made == [1] * 3
    assert_same(model, optimizer, other, other_optimizer)


def test_a_square_weight_transposed_in_place_takes_the_composition(made):
    model, optimizer, other, other_optimizer = twins("SGD", sizes=[5, 8, 8, 3])
    input, target = data()
    for step in range(4):
        if step == 2:
            for each in (model, other):
                each[2].weight.data = each[2].weight.data.t()  # the same memory and the same shape
        value = model.train_step(input, target, optimizer)
        assert torch.equal(value, composed(other, other_optimizer, input, target))
    assert [count for count in made if count > 0] == [1, 1]
    assert_same(model, optimizer, other, other_optimizer)


def parameter_hook(model, optimizer):
    model[0].weight.register_hook(lambda grad: grad * 2)


def post_accumulate_hook(model, optimizer):
    def hook(parameter):
        parameter.grad.mul_(3)

    model[0].bias.register_post_accumulate_grad_hook(hook)


def module_hook(model, optimizer):
    model[2].register_forward_hook(lambda module, args, output: output * 2)


def step_hook(model, optimizer):
    def hook(optimizer, args, kwargs):
        model[0].bias.grad.zero_()

    optimizer.register_step_pre_hook(hook)


def parametrization(model, optimizer):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    original = model[0].weight
    parametrize.register_parametrization(model[0], "weight", Double())
    assert model[0].parametrizations.weight.original is original


def tensor_lr(model, optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)


def transposed_weight(model, optimizer):
    model[2].weight.data = model[2].weight.data.t().contiguous().t()
    for name in ("exp_avg", "exp_avg_sq"):
        state = optimizer.state[model[2].weight]
        state[name] = torch.empty_like(model[2].weight).copy_(state[name])


def unfused(model, optimizer):
    mbp.unfuse(optimizer)


@pytest.mark.parametrize(
    "disturb",
    [
        *(parameter_hook, post_accumulate_hook, module_hook, step_hook, parametrization, tensor_lr, transposed_weight),
        unfused,
    ],
)
def test_what_the_op_does_not_know_takes_the_composition(made, disturb):
    train_twins(disturb)
    assert [count for count in made if count > 0] == [1, 1]


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="since torch 2.10")
def test_gradients_of_another_dtype_take_the_composition(made):
    def round_gradients(model, optimizer):
        model[0].weight.grad_dtype = torch.bfloat16

    train_twins(round_gradients, "SGD")
    assert [count for count in made if count > 0] == [1, 1]


def test_the_default_device_is_not_that_of_a_step(made):
    model, optimizer, _, _ = twins()
    input, target = data()
    with torch.device("meta"):
        assert model.train_step(input, target, optimizer).device.type == "cpu"
        mbp.fit(model, input, target, optimizer, batch_size=23, shuffle=False)
    assert made == [1, 1]


def test_a_hook_on_the_accumulating_node_takes_the_composition(made):
    model, optimizer, _, _ = twins()
    input, target = data()
    model.train_step(input, target, optimizer)
    node = model[0].weight.expand_as(model[0].weight).grad_fn.next_functions[0][0]
    seen = []
    node.register_hook(lambda *args: seen.append(1))
    model.train_step(input, target, optimizer)
    assert made == [1]
    assert seen == [1]


def test_an_input_that_requires_a_gradient_gets_it(made):
    model, optimizer, _, _ = twins()
    input, target = data()
    input.requires_grad_()
    model.train_step(input, target, optimizer)
    assert made == []
    assert input.grad is not None


def test_parameters_of_no_group_take_the_composition(made):
    model = network()
    optimizer = mbp.fuse(torch.optim.Adam(model[0].parameters()))
    others = [parameter.clone() for parameter in model[2].parameters()]
    model.train_step(*data(), optimizer)
    assert made == []
    assert all(map(torch.equal, model[2].parameters(), others))


def test_two_networks_of_one_optimizer(made):
    one, two = network(), network(sizes=[5, 7, 3])
    optimizer = mbp.fuse(torch.optim.Adam([*one.parameters(), *two.parameters()], lr=0.01))
    alone, copied = copy.deepcopy(one), copy.deepcopy(two)
    optimizers = [mbp.fuse(torch.optim.Adam(each.parameters(), lr=0.01)) for each in (alone, copied)]
    input, target = data()
    for _ in range(2):
        one.train_step(input, target, optimizer)
        two.train_step(input, target, optimizer)
        composed(alone, optimizers[0], input, target)
        composed(copied, optimizers[1], input, target)
    assert made == [1] * 4
    assert all(map(torch.equal, [*one.parameters(), *two.parameters()], [*alone.parameters(), *copied.parameters()]))


def test_an_error_in_a_step_leaves_the_model_at_the_end_of_the_step_before(made):
    model, optimizer, other, other_optimizer = twins()
    input, target = data(20, "cross_entropy")
    target[12] = 77
    with pytest.raises(IndexError, match="77"):
        mbp.fit(model, input, target, optimizer, loss="cross_entropy", batch_size=5, shuffle=False)
    for k in range(2):
        composed(other, other_optimizer, input[5 * k : 5 * k + 5], target[5 * k : 5 * k + 5], "cross_entropy")
    assert_same(model, optimizer, other, other_optimizer)


def test_a_graph_of_before_the_step_is_stale():
    model, optimizer, _, _ = twins()
    input, target = data()
    output = model(input).sum()
    model.train_step(input, target, optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_a_scheduler_knows_that_a_step_was_made(recwarn):
    model, optimizer, _, _ = twins()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model.train_step(*data(), optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.005
    assert not recwarn.list


def test_steps_do_not_depend_on_threads():
    results = []
    for threads, (sizes, rows) in itertools.product((1, 2, 3), (([5, 64, 64, 3], 64), ([5, 300, 300, 3], 500))):
        torch.set_num_threads(threads)
        model = network(sizes=sizes)
        optimizer = mbp.fuse(torch.optim.Adam(model.parameters(), lr=0.01))
        history = mbp.fit(model, *data(1100), optimizer, batch_size=rows, generator=torch.Generator().manual_seed(3))
        results.append([*model.parameters(), history.step_losses])
    torch.set_num_threads(2)
    for k in (0, 1):
        for other in results[k + 2 :: 2]:
            assert all(map(torch.equal, results[k], other))


def test_options_in_place_and_parameters_that_move_between_groups(made):
    def grouped(model):
        first, *rest = model.parameters()
        groups = [{"params": [first], "lr": 0.3}, {"params": rest}]
        return mbp.fuse(torch.optim.Adam(groups, lr=0.01))

    model, other = network(), network()
    optimizer, other_optimizer = grouped(model), grouped(other)
    input, target = data()
    for _ in range(2):
        model.train_step(input, target, optimizer)
        composed(other, other_optimizer, input, target)
        for each in (optimizer, other_optimizer):
            first, second = each.param_groups
            first["params"].append(second["params"].pop(0))
    model.train_step(input, target, optimizer)
    composed(other, other_optimizer, input, target)
    assert_same(model, optimizer, other, other_optimizer)
    for each in (optimizer, other_optimizer):
        each.param_groups[1]["betas"] = [0.8, 0.99]
    model.train_step(input, target, optimizer)
    composed(other, other_optimizer, input, target)
    for each in (optimizer, other_optimizer):
        each.param_groups[1]["betas"][0] = 0.5
    model.train_step(input, target, optimizer)
    composed(other, other_optimizer, input, target)
    assert_same(model, optimizer, other, other_optimizer)
    assert made == [1] * 5


def test_a_scheduler_and_another_limit_keep_what_is_kept(made):
    model, optimizer, other, other_optimizer = twins()
    input, target = data()
    model.train_step(input, target, optimizer)
    composed(other, other_optimizer, input, target)
    kept = optimizer._manualbp_kept
    for step in range(1, 4):
        for each in (optimizer, other_optimizer):
            each.param_groups[0]["lr"] = 0.1 / step
        model.train_step(input, target, optimizer, max_grad_norm=step / 10)
        composed(other, other_optimizer, input, target, max_grad_norm=step / 10)
        assert optimizer._manualbp_kept is kept
    assert made == [1] * 4
    assert_same(model, optimizer, other, other_optimizer)


def test_a_list_of_betas_may_change_in_place(made):
    model, optimizer, other, other_optimizer = twins()
    for each in (optimizer, other_optimizer):
        each.param_groups[0]["betas"] = [0.8, 0.9]
    input, target = data()
    for step in range(1, 4):
        model.train_step(input, target, optimizer)
        composed(other, other_optimizer, input, target)
        for each in (optimizer, other_optimizer):
            each.param_groups[0]["betas"][0] = 0.8 - step / 10
    assert made == [1] * 3
    assert_same(model, optimizer, other, other_optimizer)


def test_losses_may_alternate(made):
    model, optimizer, other, other_optimizer = twins()
    input, target = data()
    for loss in ("mse", "bce_with_logits") * 2:
        value = model.train_step(input, target, optimizer, loss)
        assert torch.equal(value, composed(other, other_optimizer, input, target, loss))
    assert made == [1] * 4


def is_known(handle):
    """Whether the op knows this handle. It rejects the other arguments."""
    with pytest.raises(RuntimeError) as error:
        _ops.train(handle, torch.ones(1, 1), torch.ones(1, 1), None, None, 1, [], None, None, 0.0)
    return "`handle`" not in str(error.value)


def test_what_is_kept_is_released_with_its_owner():
    model, optimizer, _, _ = twins()
    input, target = data()
    model.train_step(input, target, optimizer)
    first = optimizer._manualbp_kept.handle
    assert is_known(first)
    forget_state(model, optimizer)
    model.train_step(input, target, optimizer)
    second = optimizer._manualbp_kept.handle
    assert not is_known(first)
    assert is_known(second)
    memory = weakref.ref(optimizer.state[model[0].weight]["exp_avg"])
    mbp.unfuse(optimizer)
    optimizer.state.clear()
    assert not is_known(second)
    assert memory() is None


def test_parameters_are_not_kept():
    model, optimizer, _, _ = twins()
    model.train_step(*data(), optimizer)
    assert all(parameter._use_count() == 1 for parameter in model.parameters())
    assert model.loss_backward(*data()).grad_fn is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copied_optimizer_keeps_nothing_of_the_original(made, copied):
    model, optimizer, _, _ = twins()
    input, target = data()
    model.train_step(input, target, optimizer)
    handle = optimizer._manualbp_kept.handle
    before = [each.detach().clone() for each in numbers(model, optimizer)]
    other, other_optimizer = copied((model, optimizer))
    other.train_step(input, target, other_optimizer)
    assert other_optimizer._manualbp_kept.handle != handle
    assert all(map(torch.equal, before, numbers(model, optimizer)))
    assert copied(optimizer.__dict__)["_manualbp_kept"] is None
    shallow = copy.copy(optimizer)
    model.train_step(input, target, shallow)
    del shallow, other_optimizer
    assert is_known(handle)
    assert made == [1] * 3


def in_two_threads(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_two_threads_train_two_networks():
    one, optimizer, two, other_optimizer = twins()

    def train(model, optimizer):
        for _ in range(300):
            model.train_step(*data(4), optimizer)

    in_two_threads(lambda: train(one, optimizer), lambda: train(two, other_optimizer))
    assert_same(one, optimizer, two, other_optimizer)


def test_two_threads_may_share_what_is_kept():
    model, optimizer, _, _ = twins()
    input, target = data()
    model.train_step(input, target, optimizer)
    handle, parameters, finite = optimizer._manualbp_kept.handle, list(model.parameters()), []

    def train():
        for rows in range(1, 300):
            losses = _ops.train(handle, input[: rows % 23 + 1], target[: rows % 23 + 1], *rest)
            finite.append(bool(losses.isfinite()))

    rest = None, None, 1, parameters, None, None, 1.0
    in_two_threads(train, train)
    assert finite == [True] * 598


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_makes_the_same_steps(made):
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    model, optimizer, other, other_optimizer = twins()
    input, target = data()
    model.train_step(input, target, optimizer)
    composed(other, other_optimizer, input, target)
    child = os.fork()
    if child == 0:
        value = model.train_step(input, target, optimizer)
        os._exit(0 if made == [1, 1] and torch.equal(value, composed(other, other_optimizer, input, target)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    torch.set_num_threads(2)
    assert torch.equal(model.train_step(input, target, optimizer), composed(other, other_optimizer, input, target))
    assert_same(model, optimizer, other, other_optimizer)


@pytest.mark.parametrize("case", ["order", "steps", "batch_size", "needs", "states", "target", "parameters", "options"])
def test_errors_of_the_op_name_the_argument(case):
    model, _, _, _ = twins("SGD")
    input, target = data()
    kept = {
        "biases": [True] * 3, "needs": [True] * 6, "loss": "mse", "mean": True, "ignore_index": -100,
        "label_smoothing": 0.0, "rule": "sgd", "states": [], "options": [0.1, 0, 0, 0, 0, 0], "groups": [0] * 6,
        "fresh": [],
    }  # fmt: skip
    arguments = {
        "input": input, "target": target, "order": torch.arange(23), "batch_size": 5, "steps": 5,
        "parameters": list(model.parameters()), "max_grad_norm": None, "seconds": 1.0,
    }  # fmt: skip

    def train():
        arguments["handle"] = _ops.keep(**kept)
        return _ops.train(**arguments, options=None)

    assert len(train()) == 5
    wrong = {
        "order": torch.tensor([0, 23, 1]), "steps": 6, "batch_size": 0, "needs": [True] * 5,
        "states": [input], "target": target[:, :2], "parameters": arguments["parameters"][:5], "options": [0.1],
    }  # fmt: skip
    (kept if case in kept else arguments)[case] = wrong[case]
    if case == "order":
        arguments["steps"] = 1
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match=f"(train|keep): `{case}"):
        train()
    assert all(map(torch.equal, before, model.parameters()))
