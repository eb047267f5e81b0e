"""Memory that stays (csrc/cpu/pool.h): what is kept after a step, what frees it, and that no user can tell.

tests/csrc/pool.cpp tests the pool by itself, with a clock of its own.
"""

import copy
import io
import multiprocessing
import resource
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import torch_manualbp as mbp
from helpers import assert_equal, run_python
from torch_manualbp import _ops, info

MIB = 2**20
SIZES, BATCH = [8, 64, 64, 3], 16_384
HIDDEN = BATCH * (64 + 64) * 4  # bytes of h_1 and h_2: 8 MiB

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="torch 2.10 does not tell when a tensor is freed, so nothing is kept"
)


@pytest.fixture(autouse=True)
def nothing_is_kept():
    mbp.empty_cache()
    yield
    mbp.empty_cache()


def data(batch=BATCH, sizes=SIZES):
    return torch.randn(batch, sizes[0]), torch.randn(batch, sizes[-1])


def step(model, x, y):
    """The loss and the gradients of a training step."""
    loss = F.mse_loss(model(x), y)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def hidden(batch=BATCH, dtype=torch.float32):
    """The output and the stored activations, as the op returns them."""
    model, (x, _) = mbp.MLP(SIZES, dtype=dtype), data(batch)
    return _ops.mlp(x.to(dtype), list(model.parameters())[::2], list(model.parameters())[1::2], False, True)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_activations_stay_for_the_next_step():
    model, (x, y) = mbp.MLP(SIZES), data()
    first = step(model, x, y)
    assert _ops.cache_size() == HIDDEN
    assert_equal(step(model, x, y), first)
    assert _ops.cache_size() == HIDDEN
    output, kept = hidden()
    address = kept.data_ptr()
    del output, kept
    assert hidden()[1].data_ptr() == address


def test_nothing_is_kept_of_small_batches_nor_where_nothing_is_stored():
    model, recompute = mbp.MLP(SIZES), mbp.MLP(SIZES, activations="recompute")
    step(model, *data(8000))
    step(recompute, *data())
    model.loss_backward(*data())
    with torch.no_grad():
        model(data()[0])
    assert _ops.cache_size() == 0


def test_changing_sizes_do_not_add_up():
    model, most = mbp.MLP(SIZES), 0
    for batch in torch.randint(7_000, 30_000, (200,)).tolist():
        most = max(most, batch * (64 + 64) * 4)
        _, kept = hidden(batch)
        del kept
        assert 0 < _ops.cache_size() <= 1.25 * most
    step(model, *data(8_192))
    assert _ops.cache_size() <= 1.25 * most


def test_what_is_kept_is_shown_and_freed():
    model = mbp.MLP(SIZES)
    plan = mbp.memory(model, BATCH)
    assert plan.cached == 0
    assert "kept from earlier steps" not in str(plan)
    step(model, *data())
    assert info.info()["memory kept"] == "8.0 MiB"
    later = mbp.memory(model, BATCH)
    assert later.cached == HIDDEN
    assert str(later).splitlines()[-1] == "kept from earlier steps: 8.0 MiB (empty_cache)"
    assert later == plan
    assert mbp.empty_cache() is None
    assert mbp.memory(model, BATCH).cached == 0
    assert info.info()["memory kept"] == "0 bytes"


@pytest.mark.parametrize("check", ["freed_memory_goes_back", "touching_again_causes_hardly_a_fault"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pages(check):
    """In a process of its own: after large tensors have been freed, malloc keeps memory of this size."""
    done = run_python(f"import test_pool; test_pool.{check}()")
    assert done.returncode == 0, done.stderr


def freed_memory_goes_back():
    """To the system."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    output, kept = hidden(8 * BATCH)
    del output, kept
    before = resident()
    mbp.empty_cache()
    assert before - resident() > 0.9 * 8 * HIDDEN


def touching_again_causes_hardly_a_fault():
    """The pages are still there."""

    def faults(empty):
        if empty:
            mbp.empty_cache()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        output, kept = hidden(4 * BATCH)
        del output, kept
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(empty=True)
    new = statistics.median(faults(empty=True) for _ in range(5))
    again = statistics.median(faults(empty=False) for _ in range(5))
    assert new >= 4 * HIDDEN // (2 * MIB)  # a fault per huge page at least
    assert again < new / 2


# --- the memory is like any other -------------------------------------------------------------------------------------


def test_what_users_see_comes_from_torch():
    # So its storage can be resized, which FSDP and others do to free memory early.
    model, (x, y) = mbp.MLP(SIZES), data(2 * BATCH)
    step(model, x, y)
    x.requires_grad_()
    output = model(x)
    F.mse_loss(output, y).backward()
    for tensor in (output.detach(), x.grad, *(p.grad for p in model.parameters())):
        assert tensor.untyped_storage().resizable()
        tensor.untyped_storage().resize_(0)
        tensor.untyped_storage().resize_(4096)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activations_can_be_used_like_any_tensor(dtype):
    batch = 2 * BATCH
    _, kept = hidden(batch, dtype)
    assert not kept.untyped_storage().resizable()  # it is the pool's
    assert kept.device == torch.device("cpu")
    assert kept.data_ptr() % 64 == 0
    assert kept.untyped_storage().nbytes() == kept.nbytes == batch * (64 + 64) * dtype.itemsize
    want = kept.clone()
    assert torch.equal(copy.deepcopy(kept), want)
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    assert torch.equal(torch.load(file), want)
    kept.resize_(100)
    assert torch.equal(kept, want[:100])
    with pytest.raises(RuntimeError, match="not resizable"):
        kept.resize_(2 * want.numel())
    kept.set_(kept.untyped_storage(), 0, want.shape)
    kept.mul_(2)
    assert torch.equal(kept, 2 * want)
    assert kept.share_memory_().is_shared()
    assert torch.equal(kept, 2 * want)
    assert _ops.cache_size() == kept.nbytes  # share_memory_ has moved the tensor and handed the block back


def test_memory_in_use_is_not_touched():
    _, kept = hidden()
    want, view = kept.clone(), kept[1000:]
    del kept
    mbp.empty_cache()
    others = [hidden() for _ in range(3)]
    assert torch.equal(view, want[1000:])
    del view
    assert len({other[1].data_ptr() for other in others}) == 3


def test_a_graph_keeps_its_activations():
    model, (x, y) = mbp.MLP(SIZES), data()
    want = step(model, x, y)
    loss = F.mse_loss(model(x), y)
    step(model, *data())
    for _ in range(2):
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        step(model, *data())
        assert_equal([loss.detach(), *grads], want)


# --- threads, processes, the end --------------------------------------------------------------------------------------


def test_threads_do_not_share_what_they_store():
    model, batches = mbp.MLP(SIZES), [data(BATCH + 100 * k) for k in range(4)]
    want = [step(model, *batch) for batch in batches]

    def train(k):
        for _ in range(5):
            assert_equal(step(model, *batches[k]), want[k])
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(train, range(4)))
    assert HIDDEN <= _ops.cache_size() <= 1.25 * 5 * HIDDEN


FORK = """
import os, threading, torch, torch_manualbp as mbp
from torch_manualbp import _ops
torch.set_num_threads(1)
model = mbp.MLP([8, 64, 64, 3])
weights, biases = list(model.parameters())[::2], list(model.parameters())[1::2]
x = torch.randn(16_384, 8)
def store():
    return _ops.mlp(x, weights, biases, False, True)[1]
want, in_use = store(), store()
store()
assert _ops.cache_size() == 8 << 20
done = threading.Event()
def work():  # holds the lock of the pool as often as it can
    while not done.is_set():
        store()
threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        wrong = [_ops.cache_size() != 0, not torch.equal(store(), want), not torch.equal(in_use, want)]
        del in_use
        mbp.empty_cache()
        wrong.append(_ops.cache_size() != 0)
        os._exit(sum(2**i for i, each in enumerate(wrong) if each))  # the status tells which
    status = os.waitpid(child, 0)[1]
    assert status == 0, status
done.set()
for thread in threads:
    thread.join()
os.register_at_fork(before=store)
store()
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
assert _ops.cache_size() == 0  # pages of idle blocks would be copied when they are written to
print("fine")
"""


@pytest.mark.slow
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_fork_frees_what_is_kept_and_locks_nothing():
    done = run_python(FORK)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


@pytest.mark.slow
def test_a_process_may_end_with_blocks_in_use_and_idle():
    code = """
import atexit, threading, torch, torch_manualbp as mbp
torch.set_num_threads(2)
model, x = mbp.MLP([8, 64, 64, 3]), torch.randn(16_384, 8)
model(x).sum().backward()
graph = model(x).sum()
atexit.register(lambda: model(x).sum().backward())
def work():  # continues after the main thread has ended
    for _ in range(20):
        model(x)
threading.Thread(target=work).start()
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- little memory ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_what_is_kept_is_given_up_when_memory_runs_out():
    code = """
import resource, torch, torch_manualbp as mbp
from torch_manualbp import _ops
torch.set_num_threads(1)
def output(rows):  # 1 KiB a row, from torch's allocator
    return _ops.linear_relu(x.expand(rows, 1), weight, None)
x, weight = torch.randn(1, 1), torch.randn(256, 1)
model = mbp.MLP([1, 64, 1])
model(torch.randn(600_000, 1)).sum().backward()
kept = _ops.cache_size()
assert kept > 140 << 20
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), resource.RLIM_INFINITY))
output(100 << 10)
assert _ops.cache_size() == 0
try:
    output(1 << 20)
except RuntimeError as error:
    assert "memory" in str(error) or "failed" in str(error), error
    print("fine")
"""
    done = run_python(code)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_system_may_take_idle_blocks_in_huge_pages():
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not modes.exists() or "[never]" in modes.read_text():
        pytest.skip("this system has no huge pages")

    def lazily_freed():
        lines = Path("/proc/self/smaps").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("LazyFree:")) * 1024

    def attempt():  # a system that is short of memory takes it at once
        output, kept = hidden(4 * BATCH)
        in_use = lazily_freed()
        del output, kept
        return lazily_freed() - in_use >= 4 * HIDDEN - 4 * MIB  # the ends of the block are no whole huge pages

    assert any(attempt() for _ in range(5))
