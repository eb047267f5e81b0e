"""Fused SGD, Adam and AdamW do what torch's do; and every optimizer of torch trains a fused network like the plain one.

Parity is checked step by step from equal states, so that a difference is not the sum of earlier ones.
"""

import base64
import copy
import io
import itertools
import pickle
import platform
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.testing._internal.common_optimizers import optim_db
from torch.utils._python_dispatch import TorchDispatchMode

import torch_manualbp as mbp
from helpers import DTYPES, LEVELS, assert_equal, run_python, twins
from torch_manualbp import _ops, optimizers
from torch_manualbp.optimizers import FusedAdam, FusedAdamW, FusedSGD

FUSED = {SGD: FusedSGD, Adam: FusedAdam, AdamW: FusedAdamW}
STEPS = 5

# One number, whole vectors and a rest, more than a block of the half types, nothing, a scalar.
SHAPES = ((1,), (3, 5), (37, 29), (0, 4), ())

SGD_OPTIONS = (
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    {"lr": 0.1, "momentum": 0.9, "foreach": True},
    {"lr": 0.1, "momentum": 0.9, "fused": True},
    {"lr": 1, "momentum": 1, "dampening": 1},
    {"lr": 0.0},
)
ADAM_OPTIONS = (
    {"lr": 0.01},
    {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
    {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    {"lr": 0.01, "betas": (0.3, 0.5), "eps": 0.1, "amsgrad": True, "maximize": True},
    {"lr": 0.01, "betas": (0.0, 0.0), "weight_decay": 0.0},
    {"lr": 0.01, "foreach": True},
    {"lr": 0.01, "fused": True},
    {"lr": 0},
)
CASES = [
    *((SGD, options) for options in SGD_OPTIONS),
    *((kind, options) for kind in (Adam, AdamW) for options in ADAM_OPTIONS),
    (Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
]


def described(case):
    return f"{case[0].__name__}-{'-'.join(f'{name}={value}' for name, value in case[1].items())}"


@pytest.fixture
def updates(monkeypatch):
    """A list to which each call of our op appends what it returns."""
    returned, op = [], _ops.update

    def update(*args):
        returned.append(op(*args))
        return returned[-1]

    monkeypatch.setattr(_ops, "update", update)
    return returned


def parameters_of(shapes=SHAPES, dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def pair(kind, options, parameters):
    """A fused optimizer of these parameters, and a plain one of equal parameters."""
    twin = [nn.Parameter(each.detach().clone()) if each.requires_grad else each.clone() for each in parameters]
    return mbp.fuse(kind(parameters, **options)), kind(twin, **options)


def all_parameters(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def draw_gradients(*optimizers):
    """Equal random gradients for the parameters of both."""
    for both in zip(*map(all_parameters, optimizers), strict=True):
        gradient = torch.randn(both[0].shape).to(both[0].dtype)
        for parameter in both:
            parameter.grad = gradient.clone()


def state_of(optimizer):
    """The parameters and all state, one after another: [(name, tensor)]."""
    found = [("parameter", parameter.detach()) for parameter in all_parameters(optimizer)]
    for parameter in all_parameters(optimizer):
        found += optimizer.state[parameter].items() if parameter in optimizer.state else ()
    return found


def tensors_of(optimizer):
    return [tensor for _, tensor in state_of(optimizer)]


def assert_same_state(ours, theirs):
    """Equal bits, and the same layout of the state."""
    one, other = ours.state_dict(), theirs.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert [(k, list(state)) for k, state in one["state"].items()] == [
        (k, list(state)) for k, state in other["state"].items()
    ]
    for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert_equal(a, b)


# torch fuses multiply and add where its kernels have the instruction, and so do we.
SAME_ROUNDING = platform.machine() != "x86_64" or (
    (torch.backends.cpu.get_cpu_capability() == "DEFAULT") == (_ops.isa() == "default")
)


def assert_steps_agree(ours, theirs):
    """Performs a step of both, from equal states, and compares all that it changes.

    Moments and the parameters of SGD are equal, bit for bit, unless torch computes them in another order (``fused``).
    Adam divides by a square root that torch leaves to MKL, which may return a neighbour of the nearest number: of five
    million parameters, the largest difference was 2.3 eps of the numbers that are added, with lr=1 in float32.
    """
    draw_gradients(ours, theirs)
    before = [parameter.detach().double().clone() for parameter in all_parameters(theirs)]
    is_exact = SAME_ROUNDING and not any(group["fused"] for group in theirs.param_groups)
    ours.step()
    theirs.step()
    for one, other, old in zip(all_parameters(ours), all_parameters(theirs), before, strict=True):
        gradient, change = other.grad.double().abs() + old.abs(), (other.detach().double() - old).abs()
        sizes = {"parameter": old.abs() + change, "exp_avg": gradient + 1, "momentum_buffer": gradient + 1}
        if not SAME_ROUNDING:  # then gradient and weight decay may cancel to other small numbers
            sizes["parameter"] += gradient + 1
        sizes["exp_avg_sq"] = sizes["max_exp_avg_sq"] = gradient**2 + 1
        mine, wanted = (
            {"parameter": one.detach(), **ours.state[one]},
            {"parameter": other.detach(), **theirs.state[other]},
        )
        assert list(mine) == list(wanted)
        for name, got in mine.items():
            want = wanted[name]
            assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
            if name == "step" or (is_exact and (name != "parameter" or isinstance(ours, SGD))):
                assert_equal(got, want)
            else:
                assert ((got.double() - want.double()).abs() <= 3 * torch.finfo(got.dtype).eps * sizes[name]).all(), (
                    name
                )
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    with torch.no_grad():
        for one, other in zip(all_parameters(ours), all_parameters(theirs), strict=True):
            one.copy_(other)


# --- the update -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=described)
def test_steps_are_those_of_torch(case, dtype, updates):
    ours, theirs = pair(*case, parameters_of(dtype=dtype))
    for _ in range(STEPS):
        assert_steps_agree(ours, theirs)
    assert updates == [True] * STEPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=described)
def test_half_types_are_float32_rounded_once(case, dtype, updates):
    halves = parameters_of(dtype=dtype)
    wide = [nn.Parameter(parameter.detach().float()) for parameter in halves]
    ours, theirs = (mbp.fuse(case[0](parameters, **case[1])) for parameters in (halves, wide))
    for _ in range(STEPS):
        for one, other in zip(halves, wide, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.float()
        ours.step()
        theirs.step()
        for got, want in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            assert_equal(got, want.to(got.dtype))
            want.copy_(got)
    assert updates == [True] * 2 * STEPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FUSED)
def test_half_types_are_near_torch(kind, dtype):
    """Near its kernels in float32 (``fused=True``), where these are right; SGD's are not, in torch 2.13."""
    options = {"lr": 0.1, "momentum": 0.9} if kind is SGD else {"lr": 0.01, "fused": True}
    ours, theirs = pair(kind, options, parameters_of(dtype=dtype))
    for _ in range(STEPS):
        draw_gradients(ours, theirs)
        ours.step()
        theirs.step()
    torch.testing.assert_close(tensors_of(ours), tensors_of(theirs), rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("info", [each for each in optim_db if each.optim_cls in FUSED], ids=lambda info: info.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_samples_of_torch(info, dtype):
    for sample in info.optim_inputs_func(device="cpu", dtype=dtype):
        ours, theirs = pair(info.optim_cls, sample.kwargs, parameters_of(dtype=dtype))
        for _ in range(3):
            assert_steps_agree(ours, theirs)


@pytest.mark.parametrize("kind", FUSED)
def test_options_of_groups_and_changes_of_them(kind, updates):
    parameters = parameters_of([(5, 3), (7,), (4, 4), (2,)])
    other = "nesterov" if kind is SGD else "amsgrad"
    groups = [
        {"params": parameters[:2], "lr": 0.1},
        {"params": parameters[2:], "weight_decay": 0.1, other: True, **({"momentum": 0.8} if kind is SGD else {})},
    ]
    ours, theirs = (mbp.fuse(kind(groups, lr=0.01)), kind(copy.deepcopy(groups), lr=0.01))
    for k in range(STEPS):
        assert_steps_agree(ours, theirs)
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] *= 0.7
            optimizer.param_groups[k % 2]["maximize"] = k % 2 == 0
    late = nn.Parameter(torch.randn(6))
    for optimizer in (ours, theirs):  # its state begins later
        optimizer.add_param_group({"params": [copy.deepcopy(late)], "lr": 0.5})
    for _ in range(STEPS):
        assert_steps_agree(ours, theirs)
    assert updates == [True] * 2 * STEPS


@pytest.mark.parametrize("kind", FUSED)
def test_parameters_without_a_gradient_are_left_alone(kind, updates):
    ours, theirs = pair(kind, {"lr": 0.1}, parameters_of([(3,), (4,), (5,)]))
    for missing in (1, 0, None):
        draw_gradients(ours, theirs)
        for optimizer in (ours, theirs):
            if missing is not None:
                all_parameters(optimizer)[missing].grad = None
            optimizer.step()
    for one, other in zip(all_parameters(ours), all_parameters(theirs), strict=True):
        torch.testing.assert_close(one, other)
        assert (one in ours.state) == (other in theirs.state)
    for optimizer in (ours, theirs):
        optimizer.zero_grad()
        optimizer.step()
    assert updates == [True] * 3


@pytest.mark.parametrize("kind", FUSED)
def test_dtypes_may_be_mixed(kind, updates):
    parameters = [nn.Parameter(torch.randn(5, 3).to(dtype)) for dtype in DTYPES]
    ours, theirs = pair(kind, {"lr": 0.1, "fused": True}, parameters)
    draw_gradients(ours, theirs)
    ours.step()
    theirs.step()
    for one, other in zip(parameters, all_parameters(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=4 * torch.finfo(one.dtype).eps)
    assert updates == [True]


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "channels last": lambda t: t.view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "a part": lambda t: torch.cat([t, t])[:6],
}
OTHER_LAYOUTS = {
    "every second column": lambda t: torch.cat([t, t], 1)[:, ::2],
    "every second row": lambda t: torch.cat([t, t])[::2],
}


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("layout", [*LAYOUTS, *OTHER_LAYOUTS])
def test_strides(kind, layout, updates):
    """Dense layouts of any order are ours; memory with gaps is torch's."""
    start, steps = {**LAYOUTS, **OTHER_LAYOUTS}[layout](torch.randn(6, 20)), 3
    parameters = [nn.Parameter(start), nn.Parameter(start.clone())]
    made = [mbp.fuse(kind(parameters[:1], lr=0.1)), kind(parameters[1:], lr=0.1)]
    for _ in range(steps):
        gradient = torch.randn_like(start)
        for parameter, optimizer in zip(parameters, made, strict=True):
            parameter.grad = gradient.clone() if layout in LAYOUTS else gradient
            optimizer.step()
    torch.testing.assert_close(*parameters)
    assert updates == [layout in LAYOUTS] * steps


@pytest.mark.parametrize("kind", FUSED)
def test_a_gradient_with_other_strides_is_left_to_torch(kind, updates):
    ours, theirs = pair(kind, {"lr": 0.1, **({"momentum": 0.9} if kind is SGD else {})}, parameters_of([(4, 6), (5,)]))
    for transposed in (True, False, True):
        draw_gradients(ours, theirs)
        for optimizer in (ours, theirs):
            parameter = all_parameters(optimizer)[0]
            if transposed:
                parameter.grad = parameter.grad.t().contiguous().t()
            optimizer.step()
    torch.testing.assert_close(tensors_of(ours), tensors_of(theirs))
    assert updates[0] is False


@pytest.mark.parametrize("kind", FUSED)
def test_special_values_are_those_of_torch(kind):
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, nan, 1e-38, 3e38])
    start = values.repeat_interleave(9)
    gradient = values.repeat(9)
    for options in SGD_OPTIONS if kind is SGD else ADAM_OPTIONS:
        ours, theirs = pair(kind, options, [nn.Parameter(start.clone())])
        for _ in range(3):
            for optimizer in (ours, theirs):
                all_parameters(optimizer)[0].grad = gradient.clone()
                optimizer.step()
            torch.testing.assert_close(tensors_of(ours), tensors_of(theirs), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FUSED)
def test_the_number_of_threads_changes_no_bit(kind, dtype):
    """The parameters are large enough for several threads, and short ones lie between them."""
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        parameters = parameters_of([(300, 400), (7,), (90_001,), (), (3, 5)], dtype)
        optimizer = mbp.fuse(kind(parameters, lr=0.1))
        for _ in range(3):
            draw_gradients(optimizer)
            optimizer.step()
        found.append(tensors_of(optimizer))
    for others in found[1:]:
        assert_equal(others, found[0])


def test_parameters_that_share_memory_are_updated_in_turn(updates):
    """Torch lets a group contain a parameter twice, and warns."""
    torch.set_num_threads(4)
    parameter = nn.Parameter(torch.randn(200_000))
    twin = copy.deepcopy(parameter)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        ours, theirs = mbp.fuse(Adam([parameter] * 2)), Adam([twin] * 2)
    for _ in range(3):
        parameter.grad = torch.randn_like(parameter)
        twin.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(parameter, twin, rtol=1e-6, atol=1e-6)
    assert_equal(ours.state[parameter]["exp_avg"], theirs.state[twin]["exp_avg"])
    assert ours.state[parameter]["step"] == 6
    assert updates == [True] * 3


def check_level():
    """In a process that is forced to a level: every option agrees with torch."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for case, dtype in itertools.product(CASES, (torch.float64, torch.float32)):
        ours, theirs = pair(*case, parameters_of(dtype=dtype))
        for _ in range(2):
            assert_steps_agree(ours, theirs)
    print(_ops.isa())


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_each_instruction_set_agrees_with_torch(level):
    done = run_python("import test_optimizers; test_optimizers.check_level()", MANUALBP_ISA=level)
    if "this machine does not have these instructions" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.stdout.strip() == level, done.stderr


# --- what surrounds the update --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FUSED)
def test_fuse_and_unfuse_change_the_class_only(kind):
    optimizer = kind(parameters_of(), lr=0.1)
    groups, state, names = optimizer.param_groups, optimizer.state, set(vars(optimizer))
    assert mbp.fuse(optimizer) is optimizer
    assert mbp.fuse(optimizer) is optimizer
    assert type(optimizer) is FUSED[kind]
    assert isinstance(optimizer, kind)
    draw_gradients(optimizer)
    optimizer.step()
    assert mbp.unfuse(optimizer) is optimizer
    assert mbp.unfuse(optimizer) is optimizer
    assert type(optimizer) is kind
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert set(vars(optimizer)) == names
    optimizer.step()


def test_other_optimizers_do_not_change():
    class Mine(Adam):
        pass

    for kind in (Mine, torch.optim.Adagrad, torch.optim.NAdam):
        optimizer = kind(parameters_of())
        assert type(mbp.fuse(optimizer)) is kind
        assert type(mbp.unfuse(optimizer)) is kind


def test_a_step_that_somebody_replaced_stays():
    called = []
    optimizer = Adam(parameters_of())
    optimizer.step = lambda closure=None: called.append("mine")
    assert type(mbp.fuse(optimizer)) is Adam
    optimizer.step()
    del optimizer.step
    lr_scheduler.ConstantLR(optimizer)
    scheduled = optimizer.step
    optimizer.step = lambda closure=None: called.append("mine")
    optimizer.step._wrapped_by_lr_sched = True
    assert type(mbp.fuse(optimizer)) is Adam
    optimizer.step()
    assert called == ["mine"] * 2
    optimizer.step = scheduled
    assert type(mbp.fuse(optimizer)) is FusedAdam
    optimizer.step = lambda closure=None: called.append("mine")
    assert type(mbp.unfuse(optimizer)) is FusedAdam


def test_a_replaced_step_of_torchs_class_runs(monkeypatch, updates):
    called, torchs = [], Adam.step

    def step(self, closure=None):
        called.append(self)
        return torchs(self, closure)

    optimizer = mbp.fuse(Adam(parameters_of()))
    draw_gradients(optimizer)
    monkeypatch.setattr(Adam, "step", step)
    optimizer.step()
    assert called == [optimizer]
    assert optimizers.arguments_of(optimizer, all_parameters(optimizer)) is None
    assert not updates


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_checkpoints_move_both_ways(kind, first):
    options = {"lr": 0.1, **({"momentum": 0.9} if kind is SGD else {"amsgrad": True})}
    ours, theirs = pair(kind, options, parameters_of())
    one, other = (ours, theirs) if first == "ours" else (theirs, ours)
    draw_gradients(one)
    one.step()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    with torch.no_grad():
        for a, b in zip(all_parameters(one), all_parameters(other), strict=True):
            b.copy_(a)
    assert_same_state(ours, theirs)
    for _ in range(STEPS):
        assert_steps_agree(ours, theirs)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
def test_new_state_is_that_of_torch(default, fused):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        ours, theirs = pair(Adam, {"lr": 0.0, "amsgrad": True, "fused": fused}, parameters_of([(3, 4)], torch.float32))
        draw_gradients(ours, theirs)
        ours.step()
        theirs.step()
    finally:
        torch.set_default_dtype(before)
    assert ours.state_dict()["state"][0]["step"].dtype is (torch.float32 if fused else default)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), "torch.save"])
@pytest.mark.parametrize("kind", FUSED)
def test_copies_are_fused_too(kind, duplicate, updates):
    def saved(optimizer):
        torch.save(optimizer, file := io.BytesIO())
        return torch.load(io.BytesIO(file.getvalue()), weights_only=False)

    optimizer = mbp.fuse(kind(parameters_of([(3, 4), (5,)]), lr=0.1))
    draw_gradients(optimizer)
    optimizer.step()
    other = (saved if duplicate == "torch.save" else duplicate)(optimizer)
    assert type(other) is FUSED[kind]
    draw_gradients(optimizer, other)
    optimizer.step()
    other.step()
    assert updates == [True] * 3
    assert_same_state(optimizer, other)


@pytest.mark.parametrize("when", ["before", "after", "both"])
@pytest.mark.parametrize("kind", FUSED)
def test_schedulers(kind, when, updates):
    """Schedulers made before and after `fuse` work, and watch the order of the calls, until and after `unfuse`."""
    ours, theirs = kind(parameters_of(), lr=0.1), kind(parameters_of(), lr=0.1)
    schedules = [[], []]

    def schedule():
        for made, optimizer in zip(schedules, (ours, theirs), strict=True):
            made.append(lr_scheduler.ExponentialLR(optimizer, 0.5))

    if when != "after":
        schedule()
    mbp.fuse(ours)
    if when != "before":
        schedule()
    for k in range(4):
        if k == 2:
            mbp.unfuse(ours)
        draw_gradients(ours, theirs)
        for optimizer, made in zip((ours, theirs), schedules, strict=True):
            optimizer._opt_called = False
            optimizer.step()
            assert optimizer._opt_called
            for each in made:
                each.step()
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    assert type(ours) is kind
    assert type(mbp.fuse(ours)) is FUSED[kind]
    assert updates == [True] * 2


def test_a_schedule_that_starts_before_the_optimizer_is_noticed():
    for fuse_first in (True, False):
        optimizer = Adam(parameters_of())
        if fuse_first:
            mbp.fuse(optimizer)
        schedule = lr_scheduler.ConstantLR(optimizer)
        mbp.fuse(optimizer)
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            schedule.step()


def test_an_optimizer_with_a_scheduler_is_freed():
    optimizer = Adam(parameters_of())
    lr_scheduler.ConstantLR(optimizer)
    reference = weakref.ref(mbp.fuse(optimizer))
    del optimizer
    assert reference() is None


@pytest.mark.parametrize("kind", FUSED)
def test_hooks_run_once(kind, updates):
    seen = []
    optimizer = mbp.fuse(kind(parameters_of(), lr=0.1))
    draw_gradients(optimizer)
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("all, before")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("all, after")),
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("own, before")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("own, after")),
    ]
    try:
        optimizer.step()
        assert seen == ["all, before", "own, before", "own, after", "all, after"]
        all_parameters(optimizer)[0].grad = torch.ones(1).to_sparse() if kind is SGD else None
        optimizer.step()  # by torch, for SGD
        assert seen == ["all, before", "own, before", "own, after", "all, after"] * 2
        assert optimizers.arguments_of(optimizer, all_parameters(optimizer)) is None
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert len(seen) == 8
    assert updates == ([True, False, False] if kind is SGD else [True] * 3)


def test_hooks_of_a_loaded_optimizer_run_where_torch_never_made_one():
    optimizer = mbp.fuse(SGD(parameters_of([(3,)]), lr=0.1))
    code = """
import base64, pickle, sys, torch, torch_manualbp
optimizer = pickle.loads(base64.b64decode(sys.argv[1]))
optimizer.register_step_pre_hook(lambda *_: print("before"))
for gradient in (torch.ones(3), torch.ones(3).to_sparse()):
    optimizer.param_groups[0]["params"][0].grad = gradient
    optimizer.step()
with torch.overrides.BaseTorchFunctionMode():
    optimizer.step()
"""
    done = run_python(code, base64.b64encode(pickle.dumps(optimizer)).decode())
    assert done.stdout.split() == ["before"] * 3, done.stderr


def test_a_hook_may_change_the_arguments():
    optimizer = mbp.fuse(SGD(parameters_of(), lr=0.1))
    handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 5.0), {}))
    assert optimizer.step() == 5.0
    handle.remove()
    assert optimizer.step() is None


@pytest.mark.parametrize("kind", FUSED)
def test_closures(kind, updates):
    ours, theirs = pair(kind, {"lr": 0.1}, parameters_of([(3, 4)]))

    def closure_of(optimizer):
        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = all_parameters(optimizer)[0].pow(2).sum()
            loss.backward()
            return loss

        return closure

    for grad_mode in (torch.no_grad(), torch.enable_grad()):
        with grad_mode:
            before = torch.is_grad_enabled()
            assert_equal(ours.step(closure_of(ours)), theirs.step(closure=closure_of(theirs)))
            assert torch.is_grad_enabled() == before
    torch.testing.assert_close(all_parameters(ours), all_parameters(theirs))
    assert updates == [True] * 2


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("kind", FUSED)
def test_grad_scaler(kind, fused, updates):
    """An overflow skips a step; with ``fused=True`` torch's kernels unscale the gradients."""
    ours, theirs = pair(kind, {"lr": 0.1, "fused": fused}, parameters_of([(3, 4), (5,)]))
    for optimizer in (ours, theirs):
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for k in range(4):
            optimizer.zero_grad()
            loss = sum((parameter * torch.randn(parameter.shape)).sum() for parameter in all_parameters(optimizer))
            scaler.scale(loss * float("inf") if k == 1 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(all_parameters(ours), all_parameters(theirs))
    assert updates == ([] if fused else [True] * 3)


def test_the_profiler_sees_the_step_and_nothing_else_pays_for_it(monkeypatch, updates):
    optimizer = mbp.fuse(Adam(parameters_of()))
    draw_gradients(optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = [event.key for event in profile.key_averages()]
    assert names.count("Optimizer.step#FusedAdam.step") == 1
    assert "manualbp::update" in names

    def record_function(name, *args):
        raise AssertionError(f"record_function({name})")

    monkeypatch.setattr(torch.autograd.profiler, "record_function", record_function)
    optimizer.step()
    assert updates == [True] * 2


@pytest.mark.parametrize("kind", FUSED)
def test_a_graph_that_needs_the_old_parameters_is_stale_after_a_step(kind):
    parameter = nn.Parameter(torch.randn(3))
    optimizer = mbp.fuse(kind([parameter], lr=0.1))
    loss = parameter.pow(2).sum()
    parameter.grad = torch.ones(3)
    optimizer.step()
    versions = [tensor._version for tensor in tensors_of(optimizer)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.step()
    assert all(tensor._version > version for tensor, version in zip(tensors_of(optimizer), versions, strict=True))


@pytest.mark.parametrize("kind", FUSED)
def test_gradients_with_a_graph(kind, updates):
    ours, theirs = pair(kind, {"lr": 0.1}, parameters_of([(3,)]))
    for optimizer in (ours, theirs):
        (parameter,) = all_parameters(optimizer)
        (gradient,) = torch.autograd.grad(parameter.pow(3).sum(), parameter, create_graph=True)
        parameter.grad = gradient
        optimizer.step()
    torch.testing.assert_close(all_parameters(ours), all_parameters(theirs))
    assert not any(tensor.requires_grad for tensor in tensors_of(ours))
    assert updates == [True]


# --- what torch's own step does -------------------------------------------------------------------------------------


class Plain(torch.Tensor):
    """A subclass without a meaning of its own."""


def sparse(parameter):
    parameter.grad = torch.randn(parameter.shape).to_sparse()


def negated(parameter):
    parameter.grad = torch._neg_view(torch.randn(parameter.shape))


def without_memory(parameter):
    parameter.grad = torch._efficientzerotensor(parameter.shape)


def of_a_subclass(parameter):
    parameter.grad = torch.randn(parameter.shape).as_subclass(Plain)


def itself(parameter):
    parameter.grad = parameter.detach()


@pytest.mark.parametrize("change", [negated, without_memory, of_a_subclass, itself, sparse])
@pytest.mark.parametrize("kind", FUSED)
def test_unusual_gradients(kind, change, updates):
    ours, theirs = pair(kind, {"lr": 0.1, "weight_decay": 0.0}, parameters_of([(3, 4), (5,)]))
    for _ in range(2):
        draw_gradients(ours, theirs)
        for optimizer in (ours, theirs):
            torch.manual_seed(1)
            change(all_parameters(optimizer)[0])
            if change is sparse and kind is not SGD:
                with pytest.raises(RuntimeError, match="does not support sparse gradients"):
                    optimizer.step()
            else:
                optimizer.step()
    torch.testing.assert_close(tensors_of(ours), tensors_of(theirs))
    assert True not in updates


UNUSUAL_PARAMETERS = {
    "complex": lambda: nn.Parameter(torch.randn(3, dtype=torch.complex64)),
    "subclass": lambda: nn.Parameter(torch.randn(3).as_subclass(Plain)),
    "meta": lambda: nn.Parameter(torch.randn(3, device="meta")),
}


@pytest.mark.parametrize("which", UNUSUAL_PARAMETERS)
@pytest.mark.parametrize("kind", FUSED)
def test_unusual_parameters(kind, which, updates):
    parameters = [UNUSUAL_PARAMETERS[which](), nn.Parameter(torch.randn(4))]
    if which == "meta":
        parameters.pop()
    ours, theirs = pair(kind, {"lr": 0.1}, parameters)
    for one, other in zip(parameters, all_parameters(theirs), strict=True):
        one.grad = torch.ones_like(one)
        other.grad = torch.ones_like(other)
    ours.step()
    theirs.step()
    if which != "meta":
        torch.testing.assert_close(tensors_of(ours), tensors_of(theirs))
    assert True not in updates


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {"lr": torch.tensor(0.1)}),
        (Adam, {"lr": torch.tensor(0.1), "foreach": False}),
        (AdamW, {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": False}),
        (Adam, {"differentiable": True}),
        (SGD, {"differentiable": True}),
    ],
)
def test_options_that_torch_handles(kind, options, updates):
    parameters = [torch.randn(3, 4), torch.randn(5)]
    if not options.get("differentiable"):
        parameters = [nn.Parameter(parameter) for parameter in parameters]
    ours, theirs = pair(kind, options, parameters)
    for _ in range(3):
        draw_gradients(ours, theirs)
        ours.step()
        theirs.step()
        assert optimizers.arguments_of(ours, all_parameters(ours)) is None
    assert_same_state(ours, theirs)
    assert not updates


def test_options_out_of_range_are_errors_of_torch(updates):
    optimizer = mbp.fuse(Adam(parameters_of()))
    draw_gradients(optimizer)
    optimizer.step()
    for parameter in all_parameters(optimizer):
        optimizer.state[parameter]["step"].fill_(-1)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    optimizer.param_groups[0]["betas"] = (1.0, 0.999)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert updates == [True, False, False]


def test_modes_see_all_operations(updates):
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op)
            return op(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    optimizer = mbp.fuse(Adam(parameters_of(), foreach=False))
    draw_gradients(optimizer)
    with Dispatch():
        optimizer.step()
    assert torch.ops.aten.addcdiv_.default in seen
    with Function():
        optimizer.step()
    assert torch.Tensor.addcdiv_ in seen
    assert not updates
    with torch.device("cpu"):  # a mode, too, but one of factories only
        optimizer.step()
    assert updates == [True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", FUSED)
def test_torch_compile_captures_torchs_step(kind, updates):
    ours, theirs = pair(kind, {"lr": 0.1}, parameters_of([(3, 4), (5,)]))
    compiled = torch.compile(ours.step, backend="aot_eager")
    for _ in range(2):
        draw_gradients(ours, theirs)
        compiled()
        theirs.step()
    torch.testing.assert_close(tensors_of(ours), tensors_of(theirs))
    assert not updates
    ours.step()
    assert updates == [True]


def test_inference_tensors_are_written_in_inference_mode_only(updates):
    optimizer = mbp.fuse(Adam(parameters_of([(3,)])))
    draw_gradients(optimizer)
    with torch.inference_mode():
        optimizer.step()
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        optimizer.step()
    assert True not in updates


# --- for ops that train ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FUSED)
def test_arguments_of_any_parameters_in_any_order(kind):
    parameters = parameters_of([(2,), (3,), (4,)])
    groups = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.2}]
    other = kind(copy.deepcopy(groups), **({"momentum": 0.9} if kind is SGD else {}))
    optimizer = mbp.fuse(kind(groups, **({"momentum": 0.9} if kind is SGD else {})))
    some, twins_of_some = parameters[::-1][:2], all_parameters(other)[::-1][:2]
    lr_scheduler.ConstantLR(optimizer, factor=1.0)
    optimizer._opt_called = False
    for k in range(3):
        gradients = [torch.randn_like(parameter) for parameter in some]
        arguments = optimizers.arguments_of(optimizer, some)
        assert arguments.groups == [1, 0]
        assert arguments.fresh == ([k == 0] * 2 if kind is SGD else [])
        assert not optimizer._opt_called or k > 0
        assert _ops.update(some, gradients, *arguments)
        optimizers.finish(optimizer, some, arguments)
        assert optimizer._opt_called
        for parameter, gradient in zip(twins_of_some, gradients, strict=True):
            parameter.grad = gradient
        other.step()
    torch.testing.assert_close(tensors_of(optimizer), tensors_of(other))
    assert parameters[0] not in optimizer.state or not optimizer.state[parameters[0]]


def test_arguments_are_refused_where_step_must_run():
    parameters = parameters_of()
    optimizer = Adam(parameters)
    assert optimizers.arguments_of(optimizer, parameters) is None
    mbp.fuse(optimizer)
    assert optimizers.arguments_of(optimizer, parameters) is not None
    assert optimizers.arguments_of(optimizer, [*parameters, nn.Parameter(torch.ones(2))]) is None
    optimizer.step = lambda: None
    assert optimizers.arguments_of(optimizer, parameters) is None
    del optimizer.step
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert optimizers.arguments_of(optimizer, parameters) is None


# --- every optimizer of torch, with a fused network ------------------------------------------------------------------

# All of torch.optim but SparseAdam, which needs sparse gradients.
OPTIMISERS = {
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 1e-2},
    "Adagrad": {"lr": 1e-2},
    "Adam": {"lr": 1e-2, "amsgrad": True},
    "AdamW": {"lr": 1e-2},
    "Adamax": {"lr": 1e-2},
    "ASGD": {"lr": 1e-2},
    "LBFGS": {"lr": 0.1, "max_iter": 3, "line_search_fn": "strong_wolfe"},  # 100 iterations make rounding visible
    "Muon": {"lr": 1e-2},
    "NAdam": {"lr": 1e-2},
    "RAdam": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-3, "momentum": 0.9},
    "Rprop": {"lr": 1e-3},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
}
FORMS = {"default": {}, "for loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def accepts(name, option):
    return option in getattr(torch.optim, name).__init__.__code__.co_varnames


OF_TORCH = [
    (name, form)
    for name, form in itertools.product(OPTIMISERS, FORMS)
    if all(accepts(name, option) for option in FORMS[form])
]


def test_no_optimiser_of_torch_is_left_out():
    known = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    assert set(OPTIMISERS) >= known - {"SparseAdam"}


def autograd(model, input, target):
    loss = F.mse_loss(model(input), target)
    loss.backward()
    return loss


def fused_loss(model, input, target):
    loss = model.loss(input, target)
    loss.backward()
    return loss


def by_hand(model, input, target):
    return model.loss_backward(input, target)


def networks_and_data(bias=True):
    """Our network, the plain one with equal parameters, an input and a target."""
    data = torch.randn(20, 5).double(), torch.randn(20, 3).double()
    return *twins([5, 9, 8, 3], bias, torch.float64), *data


def train(model, gradients, optimiser, input, target, set_to_none=True):
    def closure():
        optimiser.zero_grad(set_to_none=set_to_none)
        return gradients(model, input, target)

    for _ in range(STEPS):
        optimiser.step(closure)


def assert_same_parameters(ours, theirs, start):
    for one, other, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        assert not torch.equal(one, before)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [autograd, fused_loss, by_hand])
@pytest.mark.parametrize(("name", "form"), OF_TORCH)
def test_training_gives_the_parameters_of_the_plain_network(name, form, gradients):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    ours, theirs, input, target = networks_and_data(bias=name != "Muon")  # which accepts only matrices
    start = copy.deepcopy(list(ours.parameters()))
    for model, way in ((ours, gradients), (theirs, autograd)):
        optimiser = getattr(torch.optim, name)(model.parameters(), **OPTIMISERS[name], **FORMS[form])
        train(model, way, optimiser, input, target)
    assert_same_parameters(ours, theirs, start)


@pytest.mark.parametrize("gradients", [autograd, fused_loss, by_hand])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_that_are_zeroed_in_place(form, gradients):
    ours, theirs, input, target = networks_and_data()
    start = copy.deepcopy(list(ours.parameters()))
    for model, way in ((ours, gradients), (theirs, autograd)):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, **FORMS[form])
        train(model, way, optimiser, input, target, set_to_none=False)
    assert_same_parameters(ours, theirs, start)


@pytest.mark.parametrize("gradients", [autograd, fused_loss, by_hand])
def test_options_per_layer_a_schedule_and_clipped_gradients(gradients):
    ours, theirs, input, target = networks_and_data()
    start = copy.deepcopy(list(ours.parameters()))
    for model, way in ((ours, gradients), (theirs, autograd)):
        groups = [
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": [*model[2].parameters(), *model[4].parameters()]},
        ]
        optimiser = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
        for _ in range(STEPS):
            optimiser.zero_grad()
            way(model, input, target)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            nn.utils.clip_grad_value_(model.parameters(), 0.2)
            optimiser.step()
            schedule.step()
    assert_same_parameters(ours, theirs, start)


def test_an_optimiser_that_steps_during_backward():
    ours, theirs, input, target = networks_and_data()
    start = copy.deepcopy(list(ours.parameters()))
    for model, way in ((ours, by_hand), (theirs, autograd)):
        for parameter in model.parameters():
            optimiser = torch.optim.SGD([parameter], lr=0.1)

            def step(_, optimiser=optimiser):
                optimiser.step()
                optimiser.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
        for _ in range(STEPS):
            way(model, input, target)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert_same_parameters(ours, theirs, start)


def test_a_saved_optimiser_goes_on_with_the_plain_network():
    ours, theirs, input, target = networks_and_data()
    start = copy.deepcopy(list(ours.parameters()))
    first, second = (torch.optim.Adam(model.parameters(), lr=1e-2) for model in (ours, theirs))
    train(ours, by_hand, first, input, target)
    theirs.load_state_dict(ours.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(ours, by_hand, first, input, target)
    train(theirs, autograd, second, input, target)
    assert_same_parameters(ours, theirs, start)


def test_averaged_weights():
    ours, theirs, input, target = networks_and_data()
    averages = []
    for model, way in ((ours, by_hand), (theirs, autograd)):
        optimiser, average = torch.optim.SGD(model.parameters(), lr=0.1), AveragedModel(model)
        for _ in range(STEPS):
            train(model, way, optimiser, input, target)
            average.update_parameters(model)
        averages.append(average(input))
    torch.testing.assert_close(*averages, rtol=1e-9, atol=1e-11)
