"""Tests that need a GPU: streams, graphs, synchronisation, several devices, memory. Skipped without one.

`make test-cuda` runs these tests and the numerical suite, with tensors on the GPU. None of them has run on a GPU yet:
the kernels were compiled, and run by emulation (test_cuda_kernels.py, test_cuda_ops.py).
"""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import torch_manualbp as mbp
from helpers import (
    DTYPES,
    Net,
    assert_equal,
    integer_net,
    integers,
    normal_net,
    oracle,
    recomputing_mlp,
    results,
    units,
)
from torch_manualbp._route import KERNELS, route

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
pytestmark = pytest.mark.cuda
LOSSES = ("mse", "cross_entropy", "bce_with_logits")


@pytest.fixture(params=["library", "narrow"], autouse=True)
def narrow(request, monkeypatch):
    """Runs every test with and without the narrow kernels."""
    monkeypatch.setenv("MANUALBP_CUDA_NARROW", "1" if request.param == "narrow" else "0")


def model_and_batch(loss, rows=64, device="cuda"):
    model = mbp.MLP([8, 32, 16, 4], device=device)
    target = torch.randint(4, (rows,), device=device) if loss == "cross_entropy" else torch.rand(rows, 4, device=device)
    return model, torch.randn(rows, 8, device=device), target


def gradients(model):
    return [parameter.grad for parameter in model.parameters()]


def test_our_kernels_compute_what_is_on_the_gpu():
    assert route(torch.ones(2, device="cuda")) is KERNELS
    output = mbp.mlp(torch.ones(2, 3, device="cuda"), [torch.ones(4, 3, device="cuda", requires_grad=True)])
    assert "MLPFunction" in output.grad_fn.name()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[5, 7], [9, 33, 16, 4], [64] * 6, [3, 300, 2], [128, 128, 128]], ids=str)
@pytest.mark.parametrize("batch", [1, 37, 5000])
@pytest.mark.parametrize("function", [mbp.mlp, recomputing_mlp])
def test_integers_are_exact(function, batch, sizes, dtype):
    net, grad = integer_net(batch, sizes, dtype), integers(batch, sizes[-1], dtype=dtype)
    truth = oracle(net, grad)  # on the CPU
    got = results(function, net.map(lambda t: t.cuda()), grad.cuda())
    exact = [i for i, total in enumerate(truth.sums) if total.max() < (256 if dtype is torch.bfloat16 else 2048)]
    assert len(exact) >= 2
    assert_equal([got[i].cpu() for i in exact], [truth.values[i] for i in exact])


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_numbers_are_near_those_of_the_cpu(dtype):
    net, grad = normal_net(700, [16, 100, 64, 5], dtype), torch.randn(700, 5).to(dtype)
    device = net.map(lambda t: t.cuda())
    truth = oracle(net, grad, on=[on.cpu() for on in units(device)])
    for one, want, total in zip(results(mbp.mlp, device, grad.cuda()), truth.values, truth.sums, strict=True):
        error = (one.cpu().double() - want.double()).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * total.max()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_call_waits_for_the_device(loss):
    model, input, target = model_and_batch(loss)
    model.loss_backward(input, target, loss)  # does the one-time work
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.loss_backward(input, target, loss)
        model.loss(input, target, loss).backward()
        model(input).backward(torch.ones(64, 4, device="cuda"))
        recomputing_mlp(input, [model[0].weight]).backward(torch.ones(64, 32, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_training_step_is_captured_in_a_graph(loss):
    model, input, target = model_and_batch(loss)
    twin = copy.deepcopy(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model.loss_backward(input, target, loss)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        value = model.loss_backward(input, target, loss)
    input.copy_(torch.randn_like(input))
    graph.replay()
    assert_equal(value, twin.loss_backward(input, target, loss))
    assert_equal(gradients(model), gradients(twin))


def test_work_goes_to_the_current_stream():
    model, input, _ = model_and_batch("mse", rows=4096)
    want = model(input)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # later work on the stream waits for this
        late = torch.empty_like(input).copy_(input)
        got = model(late)
    assert not stream.query()
    stream.synchronize()
    assert_equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_tensors_on_a_device_that_is_not_the_current_one():
    model, input, target = model_and_batch("mse", device="cuda:1")
    value = model.loss_backward(input, target)
    assert torch.cuda.current_device() == 0
    assert value.device == input.device
    torch.testing.assert_close(value, F.mse_loss(torch.nn.Sequential(*model)(input), target))


@pytest.mark.parametrize("elsewhere", ["input", "weight"])
def test_tensors_on_two_devices_are_an_error(elsewhere):
    input, weight = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="device"):
        mbp.linear_relu(*((input.cuda(), weight) if elsewhere == "weight" else (input, weight.cuda())))


def test_autocast_chooses_the_dtype():
    model, input, _ = model_and_batch("mse")
    with torch.autocast("cuda", torch.bfloat16):
        assert model(input).dtype is torch.bfloat16


def test_gradients_of_gradients():
    net = normal_net(5, [4, 6, 3]).map(lambda t: t.cuda()).recorded()
    torch.autograd.gradgradcheck(lambda *leaves: mbp.mlp(leaves[0], leaves[1:3], leaves[3:]), net.leaves())


@pytest.mark.parametrize("loss", LOSSES)
def test_activation_memory_does_not_grow_with_the_batch(loss):
    def peak(rows):
        model, input, target = model_and_batch(loss, rows)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.loss_backward(input, target, loss)
        return torch.cuda.max_memory_allocated() - before

    assert peak(1 << 23) < 1.1 * peak(1 << 22) + (1 << 20)


def test_more_elements_than_fit_into_31_bits():
    rows, width = (1 << 31) // 64 + 100, 64
    if torch.cuda.mem_get_info()[0] < 5 * rows * width * 2:
        pytest.skip("too little memory")
    input = torch.ones(rows, 1, device="cuda", dtype=torch.float16)
    input[-1] = 2
    weight = torch.full((width, 1), 3.0, device="cuda", dtype=torch.float16).requires_grad_()
    output = mbp.linear_relu(input, weight)
    assert output[-1].eq(6).all()
    assert output[-2].eq(3).all()
    gradient = torch.zeros_like(output)
    gradient[-1] = 5
    output.backward(gradient)
    assert_equal(weight.grad, torch.full_like(weight, 10.0))


def test_results_are_the_same_in_every_run():
    net, grad = normal_net(5000, [16, 64, 4], torch.float32), torch.randn(5000, 4).cuda()
    net = Net(*net).map(lambda t: t.cuda())
    first = results(mbp.mlp, net, grad)
    assert all(map(torch.equal, first, results(mbp.mlp, net, grad)))


def test_a_class_out_of_bounds_is_a_device_assertion():
    code = """
import torch, torch_manualbp as mbp
x, w = torch.ones(3, 2, device="cuda"), torch.ones(4, 2, device="cuda")
mbp.mlp_loss(x, torch.tensor([0, 4, 1], device="cuda"), [w], loss="cross_entropy")
torch.cuda.synchronize()
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode != 0
    assert "device-side assert" in process.stderr
    assert "out of bounds" in process.stderr
