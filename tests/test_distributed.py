"""Torch's data, tensor and pipeline parallelism around our modules, between two real processes.

Starting processes takes seconds, so one pair runs all checks, and each test looks up the result of one.
"""

import contextlib
import copy
import gc
import json
import traceback
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import torch_manualbp as mbp
from helpers import recorded_calls

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"),
]

WORLD = 2
SIZES = [6, 8, 10, 8, 4]
CHECKS = {}


def check(function):
    """Registers a function of (rank) that both processes run."""
    CHECKS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For each process, the error of each check ("" if it passed)."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(run_checks, (folder,), nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def run_checks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    outcome = {}
    for name, function in CHECKS.items():
        outcome[name] = "not reached"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", module="torch")  # torch's own warnings
                warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
                function(rank)
            gc.collect()  # a reducer's hooks remain until it is collected
            dist.barrier()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
            break  # the processes are no longer in step
        finally:
            (folder / f"{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


# --- used by every check --------------------------------------------------------------------------------------------


def network(**options):
    torch.manual_seed(0)
    return mbp.MLP(SIZES, dtype=torch.float64, **options)


def batch():
    torch.manual_seed(1)
    return torch.randn(8, SIZES[0]).double(), torch.randn(8, SIZES[-1]).double()


def share(rank):
    """This process's half of the batch; the mean of the two losses is the loss of the batch."""
    input, target = batch()
    return input[rank::WORLD], target[rank::WORLD]


def expected(scale=1.0):
    """The gradients that a single process computes without this library."""
    model, (input, target) = nn.Sequential(*network()), batch()
    (scale * F.mse_loss(model(input), target)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients(model, scale=1.0, names=None):
    want, seen = expected(scale), set()
    for name, parameter in model.named_parameters():
        name = ".".join(name.split(".")[-2:])  # "0.weight", without the prefixes of wrappers
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(
            grad, want[name], rtol=1e-12, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}"
        )
        seen.add(name)
    assert seen == set(names or want)


def assert_same_steps(model, step, calls=None):
    """Checks two steps, since wrappers set up during the first, and optionally the ops that compute them."""
    for _ in range(2):
        model.zero_grad()
        with recorded_calls() as seen:
            step()
        assert_gradients(model)
        if calls is not None:
            assert [name for name, _ in seen] == calls


class LossInside(nn.Module):
    """A module whose forward returns the fused loss, so that it can be wrapped."""

    def __init__(self, mlp, by_hand=False):
        super().__init__()
        self.mlp, self.by_hand = mlp, by_hand

    def forward(self, input, target):
        return self.mlp.loss_backward(input, target) if self.by_hand else self.mlp.loss(input, target)


@contextlib.contextmanager
def refused(wrapper, *models, op="MLP.loss_backward"):
    """Asserts that `op` raises and sets no gradient."""
    with pytest.raises(RuntimeError, match=f"^{op}: {wrapper} combines the gradients of this network"):
        yield
    assert all(parameter.grad is None for model in models for parameter in model.parameters())


FUSED = ["mlp", "mlp_backward"]


def assert_trains_like_one_process(rank, model):
    """Checks train_step of a wrapped network with each process's share of the batch, and fit, against a plain loop."""
    plain, (input, target), (mine, wanted) = nn.Sequential(*network()), batch(), share(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        mbp.train_step(model, mine, wanted, optimizer, max_grad_norm=0.1)
    mbp.fit(model, mine, wanted, optimizer, epochs=2, shuffle=False, max_grad_norm=0.1)
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        F.mse_loss(plain(input), target).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        one = one.full_tensor() if hasattr(one, "full_tensor") else one
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# --- DistributedDataParallel ----------------------------------------------------------------------------------------

DDP = nn.parallel.DistributedDataParallel


def ddp_check(make=network, calls=FUSED, **options):
    def run(rank):
        model = DDP(make(), **options)
        input, target = share(rank)
        assert_same_steps(model, lambda: F.mse_loss(model(input), target).backward(), calls)

    return run


@check
def ddp(rank):
    ddp_check()(rank)


@check
def ddp_in_many_buckets(rank):
    ddp_check(bucket_cap_mb=1e-4)(rank)


@check
def ddp_with_gradients_in_buckets(rank):
    ddp_check(gradient_as_bucket_view=True)(rank)


@check
def ddp_static_graph(rank):
    ddp_check(static_graph=True)(rank)


@check
def ddp_that_looks_for_unused_parameters(rank):
    ddp_check(find_unused_parameters=True)(rank)


@check
def ddp_recompute(rank):
    ddp_check(lambda: network(activations="recompute"))(rank)


@check
def ddp_of_a_fused_sequential(rank):
    ddp_check(lambda: mbp.fuse(nn.Sequential(*network())))(rank)


@check
def ddp_of_linear_relu_layers(rank):
    def make():
        layers = list(network())
        for k in range(0, len(layers) - 1, 2):
            layer = mbp.LinearReLU(SIZES[k // 2], SIZES[k // 2 + 1], dtype=torch.float64)
            layer.load_state_dict(layers[k].state_dict())
            layers[k], layers[k + 1] = layer, nn.Identity()
        return nn.Sequential(*layers)

    ddp_check(make, ["linear_relu"] * 3 + ["linear_relu_backward"] * 3)(rank)


@check
def ddp_unused_branch(rank):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = network(), mbp.MLP(SIZES, dtype=torch.float64)

        def forward(self, input):
            return self.used(input)

    model, (input, target) = DDP(TwoHeads(), find_unused_parameters=True), share(rank)
    for _ in range(2):
        model.zero_grad()
        F.mse_loss(model(input), target).backward()
        assert_gradients(model.module.used)
        assert all(parameter.grad is None for parameter in model.module.unused.parameters())


@check
def ddp_no_sync(rank):
    model, (input, target) = DDP(network()), share(rank)
    with model.no_sync():
        F.mse_loss(model(input), target).backward()
    local = [parameter.grad.clone() for parameter in model.parameters()]
    gathered = [torch.empty_like(local[0]) for _ in range(WORLD)]
    dist.all_gather(gathered, local[0])
    assert not torch.allclose(*gathered)
    F.mse_loss(model(input), target).backward()  # averages the gradients of both passes
    assert_gradients(model, scale=2)


@check
def ddp_of_the_fused_loss(rank):
    model, (input, target) = DDP(LossInside(network())), share(rank)
    assert_same_steps(model, lambda: model(input, target).backward(), ["mlp_loss"])


@check
def ddp_refuses_loss_backward(rank):
    model, (input, target) = DDP(network()), share(rank)
    with refused("DistributedDataParallel", model):
        model.module.loss_backward(input, target)
    handle = model.module[1].register_forward_hook(lambda *_: None)  # uses the graph, and also bypasses the wrapper
    with refused("DistributedDataParallel", model):
        model.module.loss_backward(input, target)
    handle.remove()
    for context in (model.no_sync, torch.no_grad, torch.inference_mode):
        with context(), refused("DistributedDataParallel", model):
            model.module.loss_backward(input, target)
    gc.freeze()
    with refused("DistributedDataParallel", model):
        model.module.loss_backward(input, target)
    gc.unfreeze()
    assert_same_steps(model, lambda: F.mse_loss(model(input), target).backward(), FUSED)


@check
def ddp_refuses_loss_backward_in_its_forward(rank):
    model, (input, target) = DDP(LossInside(network(), by_hand=True)), share(rank)
    with refused("DistributedDataParallel", model):
        model(input, target)


@check
def ddp_train_step(rank):
    for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        assert_trains_like_one_process(rank, DDP(network(), **options))
    assert_trains_like_one_process(rank, DDP(mbp.fuse(nn.Sequential(*network()))))


@check
def ddp_refuses_train_step(rank):
    model, fused = DDP(network()), DDP(mbp.fuse(nn.Sequential(*network())))
    optimizer = torch.optim.SGD([*model.parameters(), *fused.parameters()], lr=0.1)
    with refused("DistributedDataParallel", model, op="MLP.train_step"):
        model.module.train_step(*share(rank), optimizer)
    for inner in (model.module, fused.module):
        with refused("DistributedDataParallel", model, fused, op="train_step"):
            mbp.train_step(inner, *share(rank), optimizer)
        with refused("DistributedDataParallel", model, fused, op="fit"):
            mbp.fit(inner, *share(rank), optimizer)


@check
def loss_backward_without_a_wrapper(rank):
    other = DDP(nn.Linear(2, 2))  # of an unrelated model
    model, (input, target) = network(), batch()
    assert_same_steps(model, lambda: model.loss_backward(input, target), ["mlp_loss"])
    model.zero_grad()
    with torch.inference_mode():
        model.loss_backward(input, target)
    assert_gradients(model)
    model.zero_grad()
    output = model(input)  # its graph holds the same nodes as a reducer would
    assert_same_steps(model, lambda: model.loss_backward(input, target), ["mlp_loss"])
    assert output.requires_grad
    assert other.module.weight.grad is None


@check
def loss_backward_after_the_wrapper_is_gone(rank):
    model, (input, target) = network(), batch()
    wrapper = DDP(model)
    F.mse_loss(wrapper(input), target).backward()
    del wrapper
    gc.collect()
    assert_same_steps(model, lambda: model.loss_backward(input, target), ["mlp_loss"])


# --- fully_shard ----------------------------------------------------------------------------------------------------


def sharded(model, **options):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh(), **options)


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (WORLD,))


@check
def fsdp(rank):
    input, target = share(rank)
    for reshard in (True, False):
        model = sharded(network(), reshard_after_forward=reshard)
        assert_same_steps(model, lambda model=model: F.mse_loss(model(input), target).backward(), FUSED)
        assert isinstance(model, mbp.MLP)


@check
def fsdp_of_each_layer(rank):
    model, (input, target) = network(), share(rank)
    for child in model:
        if isinstance(child, nn.Linear):
            sharded(child)
    sharded(model)
    assert_same_steps(model, lambda: F.mse_loss(model(input), target).backward(), [])  # hooks on every layer


@check
def fsdp_of_a_model_with_fused_blocks(rank):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), nn.LayerNorm(6), nn.Linear(6, 4))
    plain, ours = plain.double(), mbp.fuse(copy.deepcopy(plain).double())
    sharded(ours[0])
    sharded(ours)
    (input, target), (mine, wanted) = batch(), share(rank)
    F.mse_loss(plain(input), target).backward()
    F.mse_loss(ours(mine), wanted).backward()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-12, atol=1e-14)


def wrapped_in_any_order(rank, wrap, kind):
    """fuse and unfuse before and after torch replaces the class; the gradients are right at each step."""
    (input, target), share_of = batch(), share(rank)
    for order in ("wrap fuse unfuse", "fuse wrap unfuse", "fuse wrap fuse unfuse fuse", "wrap fuse unfuse fuse unfuse"):
        model, done = nn.Sequential(*network()), []
        for change in order.split():
            {"wrap": wrap, "fuse": mbp.fuse, "unfuse": mbp.unfuse}[change](model)
            done.append(change)
            x, y = share_of if "wrap" in done else (input, target)
            fused = [word for word in done if word != "wrap"][-1:] == ["fuse"]
            assert_same_steps(model, lambda model=model, x=x, y=y: F.mse_loss(model(x), y).backward(), FUSED * fused)
            assert isinstance(model, kind) == ("wrap" in done)
        assert type(model).__name__.endswith("FusedSequential" if fused else "Sequential")
        assert type(mbp.unfuse(model)).__mro__[-3:-1] == (nn.Sequential, nn.Module)


@check
def fsdp_before_and_after_fuse(rank):
    from torch.distributed.fsdp import FSDPModule

    wrapped_in_any_order(rank, sharded, FSDPModule)
    blocks = mbp.fuse(nn.Sequential(*(sharded(nn.Sequential(nn.Linear(6, 6), nn.ReLU())) for _ in range(2))))
    assert type(blocks[0]) is type(blocks[1])  # so that a compiler treats them alike
    assert type(mbp.unfuse(blocks)[0]) is type(blocks[1])


@check
def replicate_before_and_after_fuse(rank):
    from torch.distributed._composable.replicate import DDP, replicate

    wrapped_in_any_order(rank, replicate, DDP)


@check
def replicate_by_fsdp_before_and_after_fuse(rank):
    try:
        from torch.distributed._composable.replicate_with_fsdp import ReplicateModule, replicate
    except ImportError:
        return  # torch is too old
    wrapped_in_any_order(rank, lambda model: replicate(model, mesh=mesh()), ReplicateModule)


@check
def fsdp_mixed_precision(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    input, target = share(rank)
    grads = []
    for kind in (lambda model: model, lambda model: nn.Sequential(*model)):
        model = sharded(kind(network().float()), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        output = model(input.float())
        assert output.dtype == torch.bfloat16
        F.mse_loss(output.float(), target.float()).backward()
        grads.append([parameter.grad.full_tensor() for parameter in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= 2**-6 * theirs.abs().max()


@check
def fsdp_losses(rank):
    input, target = share(rank)
    model = sharded(network())
    assert_same_steps(model, lambda: model.loss(input, target).backward(), FUSED)
    assert_same_steps(model, lambda: model.loss_backward(input, target), FUSED)  # its hooks require the graph
    whole = sharded(LossInside(network()))
    assert_same_steps(whole, lambda: whole(input, target).backward())


@check
def fsdp_around_refuses_loss_backward(rank):
    input, target = share(rank)
    model = sharded(LossInside(network(), by_hand=True))
    with refused("FSDP", model):
        model.mlp.loss_backward(input, target)
    with refused("FSDP", model):
        model(input, target)


@check
def fsdp_clips_and_steps_like_one_process(rank):
    model, plain = sharded(network()), nn.Sequential(*network())
    (input, target), (mine, wanted) = batch(), share(rank)
    for net, x, y in ((model, mine, wanted), (plain, input, target)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.full_tensor(), other, rtol=1e-9, atol=1e-12)


@check
def fsdp_train_step(rank):
    assert_trains_like_one_process(rank, sharded(network()))


# --- tensor parallelism ---------------------------------------------------------------------------------------------


def tensor_parallel(model):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(), "6": RowwiseParallel()}
    return parallelize_module(model, mesh(), plan)


@check
def tensor_parallel_mlp(rank):
    model, (input, target) = tensor_parallel(network()), batch()
    assert model[0].weight.to_local().shape == (SIZES[1] // WORLD, SIZES[0])
    assert_same_steps(model, lambda: F.mse_loss(model(input), target).backward(), [])


@check
def tensor_parallel_fused_sequential(rank):
    model, (input, target) = mbp.fuse(tensor_parallel(nn.Sequential(*network()))), batch()
    assert_same_steps(model, lambda: F.mse_loss(model(input), target).backward(), [])


@check
def tensor_parallel_losses(rank):
    model, (input, target) = tensor_parallel(network()), batch()
    assert_same_steps(model, lambda: model.loss(input, target).backward(), [])
    assert_same_steps(model, lambda: model.loss_backward(input, target), [])


# --- pipeline -------------------------------------------------------------------------------------------------------


def run_pipeline(rank, stage, schedule):
    from torch.distributed import pipelining

    input, target = batch()
    run = getattr(pipelining, schedule)(stage, 4, loss_fn=F.mse_loss)
    losses = []
    if rank == 0:
        run.step(input)
    else:
        run.step(target=target, losses=losses)
        torch.testing.assert_close(
            torch.stack(losses).mean().detach(), F.mse_loss(network()(input), target).detach(), rtol=1e-12, atol=0
        )


@check
def pipeline_of_slices(rank):
    from torch.distributed.pipelining import PipelineStage

    for schedule in ("ScheduleGPipe", "Schedule1F1B"):
        model = network()
        layers = mbp.fuse(model[:4] if rank == 0 else model[4:])
        with recorded_calls() as calls:
            run_pipeline(rank, PipelineStage(layers, rank, WORLD, torch.device("cpu")), schedule)
        assert {name for name, _ in calls} == {"mlp", "mlp_backward"}
        assert_gradients(layers, names=[name for name, _ in layers.named_parameters()])
        assert len(list(layers.parameters())) == 4


@check
def pipeline_cut_by_torch(rank):
    from torch.distributed.pipelining import SplitPoint, pipeline

    (input, _), model = batch(), network()
    pipe = pipeline(model, mb_args=(input[:2],), split_spec={"4": SplitPoint.BEGINNING})
    stage = pipe.build_stage(rank, torch.device("cpu"))
    run_pipeline(rank, stage, "ScheduleGPipe")
    assert_gradients(stage.submod, names=[f"{k}.{part}" for k in ((0, 2), (4, 6))[rank] for part in ("weight", "bias")])


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKS)
def test_between_two_processes(name, results):
    wrong = {rank: outcome.get(name, "not reached") for rank, outcome in enumerate(results)}
    assert not any(wrong.values()), "\n".join(f"process {rank}: {text}" for rank, text in wrong.items())
