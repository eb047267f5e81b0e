"""Python threads, forks, interrupts, exhausted memory, many steps, and read-only file systems."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import torch_manualbp as mbp
from helpers import assert_equal, run_python

SIZES, BATCH = [7, 19, 33, 5], 40


def autograd_step(model, input, target):
    """Computes the loss outside the network, then runs backward."""
    value = F.mse_loss(model(input), target)
    return [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]


def loss_step(model, input, target):
    """Computes the loss inside the network, times 3, so that backward scales the finished gradients."""
    value = model.loss(input, target)
    return [value.detach(), *torch.autograd.grad(3 * value, list(model.parameters()))]


def loss_backward_step(model, input, target):
    """Runs loss_backward on a copy, because it would add to the gradients of a shared module."""
    own = mbp.MLP(SIZES)
    own.load_state_dict(model.state_dict())
    return [own.loss_backward(input, target), *(parameter.grad for parameter in own.parameters())]


STEPS = (autograd_step, loss_step, loss_backward_step)
MODELS = {
    "store": lambda: mbp.MLP(SIZES),
    "recompute": lambda: mbp.MLP(SIZES, activations="recompute"),
    "fused": lambda: mbp.fuse(nn.Sequential(*mbp.MLP(SIZES))),
}


def batches(count, rows=BATCH):
    """A list of different (input, target) pairs, of equal or different sizes."""
    return [(torch.randn(rows + k, SIZES[0]), torch.randn(rows + k, SIZES[-1])) for k in range(count)]


# --- Python threads ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("threads", [1, 2])
def test_eight_threads_train_one_module_at_once(step, threads):
    torch.set_num_threads(threads)
    model, data = mbp.MLP(SIZES), batches(8)
    want = [step(model, *batch) for batch in data]

    def train(k):
        for _ in range(20):
            assert_equal(step(model, *data[k]), want[k])
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(train, range(8)))


@pytest.fixture
def hasty_threads():
    """Makes Python switch threads so often that it happens between any two lines."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("model", MODELS)
def test_eight_threads_add_to_the_gradients_of_one_module(model):
    # With integers, the order of the threads changes no bit.
    model, data = MODELS[model](), batches(8)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(tensor for batch in data for tensor in batch)]:
            tensor.copy_(torch.randint(-1, 2, tensor.shape))
    want = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for input, target in data:
        grads = torch.autograd.grad(F.mse_loss(model(input), target, reduction="sum"), list(model.parameters()))
        want = [total + 5 * grad for total, grad in zip(want, grads, strict=True)]

    def train(batch):
        for _ in range(5):
            F.mse_loss(model(batch[0]), batch[1], reduction="sum").backward()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(train, data))
    assert_equal([parameter.grad for parameter in model.parameters()], want)


def test_threads_add_by_hand_to_the_same_gradients(hasty_threads):
    torch.set_num_threads(1)
    model, calls = mbp.MLP([8, 1024, 1024, 4]), 200  # so large that additions of several threads overlap
    input, target = torch.randn(1, 8), torch.randn(1, 4)
    model.loss_backward(input, target)
    want = [3 * calls * parameter.grad for parameter in model.parameters()]
    model.zero_grad()

    def train(_):
        for _ in range(calls):
            model.loss_backward(input, target)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(train, range(3)))
    for parameter, total in zip(model.parameters(), want, strict=True):
        assert (parameter.grad - total).abs().max() < 2e-4 * total.abs().max()  # a lost gradient gives 1.7e-3


@pytest.mark.parametrize("of", ["output", "loss"])
def test_one_graph_walked_by_several_threads_at_once(of):
    model, (input, target) = mbp.MLP(SIZES), batches(1)[0]
    start = threading.Barrier(4)

    def walk(value):
        start.wait()
        return torch.autograd.grad(value, list(model.parameters()), retain_graph=True)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(30):
            value = 3 * (model.loss(input, target) if of == "loss" else F.mse_loss(model(input), target))
            found = list(pool.map(walk, [value] * 4))
            want = torch.autograd.grad(value, list(model.parameters()))
            for grads in found:
                assert_equal(grads, want)


@pytest.mark.parametrize("step", [autograd_step, loss_step])
@pytest.mark.parametrize("model", ["store", "recompute"])
def test_the_number_of_threads_changes_between_forward_and_backward(model, step, monkeypatch):
    model = MODELS[model]()
    input, target = batches(1, rows=3000)[0]
    want = step(model, input, target)
    real = torch.autograd.grad
    for before, after in ((4, 1), (1, 4), (2, 3)):
        torch.set_num_threads(before)

        def grad(*args, after=after):
            torch.set_num_threads(after)
            return real(*args)

        monkeypatch.setattr(torch.autograd, "grad", grad)
        assert_equal(step(model, input, target), want)


# --- other processes --------------------------------------------------------------------------------------------------


class Gradients(Dataset):
    """A dataset whose worker runs a training step per item: the loss and all gradients, as one row."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 6

    def __getitem__(self, k):
        torch.manual_seed(k)
        row = []
        for step in STEPS:
            row += step(self.model, torch.randn(BATCH, SIZES[0]), torch.randn(BATCH, SIZES[-1]))
        return torch.cat([tensor.flatten() for tensor in row])


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_of_a_data_loader_train_after_this_process_did(start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    torch.set_num_threads(2)
    dataset = Gradients(mbp.MLP(SIZES))
    autograd_step(dataset.model, torch.randn(3000, SIZES[0]), torch.randn(3000, SIZES[-1]))  # starts both threads
    want = torch.stack([dataset[k] for k in range(6)])
    loader = DataLoader(dataset, batch_size=3, num_workers=2 if start == "fork" else 1, multiprocessing_context=start)
    assert_equal(torch.cat(list(loader)), want)
    assert_equal(dataset[0], want[0])  # this process still works


@pytest.mark.slow
def test_an_interrupt_in_a_long_step_is_raised_after_the_pass_and_all_goes_on():
    # An op itself is never interrupted. After an interrupted autograd step, each gradient is complete or absent.
    code = """
import os, signal, threading, torch, torch.nn.functional as F, torch_manualbp as mbp
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
torch.set_num_threads(1)
torch.manual_seed(0)
model = mbp.MLP([64, 256, 256, 64])
before = [p.detach().clone() for p in model.parameters()]
small, long = torch.randn(8, 64), torch.randn(1, 64).expand(40_000, 64)
ways = {
    "autograd": lambda x: F.mse_loss(model(x), x).backward(),
    "loss": lambda x: model.loss(x, x).backward(),
    "loss_backward": lambda x: model.loss_backward(x, x),
}
def grads(way, input):
    model.zero_grad()
    ways[way](input)
    return [p.grad.clone() for p in model.parameters()]
for way in ways:
    want, whole = grads(way, small), grads(way, long)
    interrupted = False
    for _ in range(5):  # an interrupt is lost if Python cannot raise, as in a finaliser, so repeat it
        try:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()  # a step takes 0.3 s
            for _ in range(4):
                model.zero_grad()
                ways[way](long)
        except KeyboardInterrupt:
            interrupted = True
            break
    assert interrupted, way
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert all(p.grad is None or torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), whole))
    assert all(torch.equal(grad, again) for grad, again in zip(want, grads(way, small)))
print("fine")
"""
    done = run_python(code)
    assert (done.stdout, done.stderr, done.returncode) == ("fine\n", "", 0)


@pytest.mark.slow
def test_a_process_may_end_with_graphs_and_threads_alive():
    code = """
import threading, torch, torch_manualbp as mbp
torch.set_num_threads(2)
model = mbp.MLP([8, 64, 64, 4])
x = torch.randn(5000, 8)
graph = model(x).sum()
value = model.loss(x, torch.randn(5000, 4))
value.backward()
def work():  # continues after the main thread has ended; a daemon thread would abort eager programs too
    for _ in range(100):
        model.loss_backward(x[:100], torch.zeros(100, 4))
threading.Thread(target=work).start()
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- exhausted memory -------------------------------------------------------------------------------------------------

TOO_TALL = 2**45


@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_a_batch_that_no_memory_holds_is_the_error_of_torch_and_all_goes_on(activations):
    model = mbp.MLP(SIZES, activations=activations)
    data = batches(1)[0]
    want = autograd_step(model, *data)
    huge = torch.zeros(1, SIZES[0]).expand(TOO_TALL, SIZES[0])
    with pytest.raises(RuntimeError) as eager:
        F.linear(huge, model[0].weight)
    with pytest.raises(RuntimeError) as ours:
        model(huge)
    with pytest.raises(RuntimeError):
        mbp.linear_relu(huge, model[0].weight)
    assert type(ours.value) is type(eager.value)
    assert "memory" in str(ours.value)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_equal(autograd_step(model, *data), want)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
@pytest.mark.parametrize("way", ["store", "recompute", "loss", "loss_backward"])
def test_memory_that_ends_anywhere_in_a_step_leaves_all_usable(way):
    # Each step gets a little more address space, so that each allocation of a step fails once.
    code = """
import resource, sys, torch, torch.nn.functional as F, torch_manualbp as mbp
torch.set_num_threads(1)
torch.manual_seed(0)
way = sys.argv[1]
model = mbp.MLP([64, 256, 256, 64], activations="recompute" if way == "recompute" else "store")
def step(input, target):
    if way == "loss_backward":
        return model.loss_backward(input, target)
    value = model.loss(input, target) if way == "loss" else F.mse_loss(model(input), target)
    value.backward()
    return value.detach()
small, large = torch.randn(20, 64), torch.randn(40_000, 64)
want = step(small, small)
grads = [p.grad.clone() for p in model.parameters()]
before = [p.detach().clone() for p in model.parameters()]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
failures = 0
for extra in range(2 << 20, 1 << 30, 6 << 20):
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))
    model.zero_grad()
    try:
        step(large, large)
        done = True
    except (RuntimeError, MemoryError) as error:
        assert "memory" in str(error) or "bad_alloc" in str(error), error
        done, failures = False, failures + 1
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    if not done:
        assert all(p.grad is None for p in model.parameters())
    model.zero_grad()
    assert torch.equal(step(small, small), want)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads))
    if done:
        break
print(failures, done)
"""
    done = run_python(code, way)
    assert done.returncode == 0, done.stderr
    failures, finished = done.stdout.split()
    assert int(failures) > 0
    assert finished == "True"


# --- many steps -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_call_of_an_op_leaves_a_byte_behind():
    # Compares malloc's bytes in use before and after many calls; the smallest leak is 32 bytes a call.
    # (Except `isa`: torch 2.13 leaks the strings that ops return.)
    code = """
import ctypes, torch
from torch_manualbp import _ops
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks used free top".split()]
mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
if mallinfo is None:
    print("no mallinfo2")
    raise SystemExit
mallinfo.restype = Info
torch.set_num_threads(1)
input, weights, biases = torch.randn(9, 5), [torch.randn(7, 5), torch.randn(3, 7)], [None, torch.randn(3)]
output, hidden = _ops.mlp(input, weights, biases, True, True)
needs, classes = [True] * 5, torch.zeros(9, dtype=torch.int64)
loss = ("cross_entropy", True, -100, 0.1, needs)
calls = {
    "linear_relu": lambda: _ops.linear_relu(input, weights[0], None),
    "linear_relu_backward": lambda: _ops.linear_relu_backward(
        output, hidden[:63].view(9, 7), weights[1], output, [True] * 3),
    "mlp": lambda: _ops.mlp(input, weights, biases, False, True),
    "mlp_backward": lambda: _ops.mlp_backward(output, input, weights, biases, hidden, output, needs),
    "mlp_backward, again": lambda: _ops.mlp_backward(output, input, weights, biases, None, None, needs),
    "mlp_backward_store": lambda: _ops.mlp_backward_store(output, input, weights, hidden, output, needs),
    "mlp_backward_further": lambda: _ops.mlp_backward_further(output, hidden, input, weights, hidden, output, needs),
    "mlp_double_backward": lambda: _ops.mlp_double_backward(
        output, input, weights, hidden, output, hidden, input, weights, biases, needs),
    "mlp_loss": lambda: _ops.mlp_loss(input, classes, weights, biases, *loss, False),
    "mlp_loss, flat": lambda: _ops.mlp_loss(input, classes, weights, biases, *loss, True),
}
wrong = {
    "mlp, wrong": lambda: _ops.mlp(input, weights[:1], biases, False, True),
    "mlp_backward, wrong": lambda: _ops.mlp_backward(output, input, weights, biases, hidden[1:], output, needs),
    "mlp_loss, wrong": lambda: _ops.mlp_loss(input, classes + 9, weights, biases, *loss, False),
}
def refused(call):
    try:
        call()
    except RuntimeError:
        return
    raise AssertionError("accepted")
calls |= {name: (lambda call=call: refused(call)) for name, call in wrong.items()}
for name, call in calls.items():
    for _ in range(300):
        call()
    before = mallinfo().used
    for _ in range(2000):
        call()
    print(f"{name}: {(mallinfo().used - before) / 2000:.1f}")
"""
    done = run_python(code, MALLOC_ARENA_MAX="1")
    assert done.returncode == 0, done.stderr
    if done.stdout == "no mallinfo2\n":
        pytest.skip("malloc does not tell what is in use")
    left = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    assert list(left)[-1] == "mlp_loss, wrong"  # every call was made
    assert {name: size for name, size in left.items() if abs(float(size)) > 8} == {}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_steps():
    # This is a short version of benchmarks/memory_growth.py.
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import memory_growth
torch.set_num_threads(1)
for way in memory_growth.WAYS:
    held = memory_growth.held(way, 2000, [8, 16, 4], 32)
    # The first half may load code and fill caches; a quarter may get a huge page. A leak appears in both quarters.
    half, quarters = len(held) // 2, len(held) * 3 // 4
    print(min(held[-1] - held[quarters], held[quarters] - held[half]))
"""
    done = run_python(code, str(Path(__file__).parents[1] / "benchmarks"))
    assert done.returncode == 0, done.stderr
    growth = [int(line) for line in done.stdout.split()]
    assert max(growth) < 1 << 19


# --- read-only file systems -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_imports_and_trains_where_nothing_may_be_written(tmp_path):
    # site-packages is read-only. Permissions do not apply to root, so writes by Python code are also refused.
    site = tmp_path / "site-packages"
    shutil.copytree(Path(mbp.__file__).parent, site / "torch_manualbp", ignore=shutil.ignore_patterns("__pycache__"))
    files = sorted(site.rglob("*"))
    for path in [*files, site]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    code = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
def refuse(event, args):
    writes = event in ("os.mkdir", "os.rename", "os.remove", "os.truncate") or (
        event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if writes:
        raise PermissionError(f"{event} {args}")
sys.dont_write_bytecode = True
sys.addaudithook(refuse)
import torch_manualbp as mbp
assert mbp.__file__.startswith(sys.argv[1]), mbp.__file__
model = mbp.MLP([3, 4, 2])
model(torch.ones(2, 3)).sum().backward()
model.loss_backward(torch.ones(2, 3), torch.ones(2, 2))
import torch_manualbp.info
torch_manualbp.info.info()
"""
    env = {**os.environ, "HOME": str(tmp_path / "no home"), "PYTHONPATH": ""}
    env.pop("COVERAGE_PROCESS_CONFIG", None)  # coverage would write at exit
    command = [sys.executable, "-W", "error", "-c", code, str(site)]
    done = subprocess.run(command, env=env, cwd=site, capture_output=True, text=True, check=False)
    for path in [site, *files]:
        path.chmod(0o755)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(site.rglob("*")) == files
