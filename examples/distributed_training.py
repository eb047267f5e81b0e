"""Trains one network on several processes, in each of PyTorch's four ways, and shows that the gradients stay the same.

    torchrun --nproc-per-node 2 examples/distributed_training.py            # all four, one after another
    torchrun --nproc-per-node 2 examples/distributed_training.py fsdp

    ddp   DistributedDataParallel: every process has the whole network and a part of each batch
    fsdp  fully_shard: the same, but every process keeps only a part of the parameters between steps
    tp    tensor parallelism: every process computes some of the hidden units, for the whole batch
    pp    pipeline: every process has some of the layers, and passes parts of the batch on to the next

All four are torch's own: an `MLP` is an `nn.Sequential` and needs nothing special. Under ddp, fsdp and pp, its layers
are still computed in one call. Under tp, torch adds hooks to every layer, so they run one by one. Each process also
trains the same network alone, as a plain nn.Sequential, and compares its gradients at every step. It does so in
float64, because several processes sum in another order: in float32, a unit within rounding of zero could be on in one
run and off in the other. Everything runs on the CPU, with gloo.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import torch_manualbp as mbp

SIZES = (16, 64, 64, 64, 4)  # four linear layers: tensor parallelism takes them in pairs
BATCH, MICROBATCHES = 240, 4
STEPS, LEARNING_RATE = 50, 0.2
LARGEST_DIFFERENCE = 1e-6

Step = Callable[[Tensor, Tensor], Tensor | None]  # forward and backward; the loss, where this process knows it
Record = list[tuple[float | None, dict[str, Tensor]]]  # for each step, the loss, and the gradient of each parameter


def network() -> mbp.MLP:
    """The same start in every process."""
    torch.manual_seed(0)
    return mbp.MLP(SIZES, dtype=torch.float64)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """The same data in every process: what another network, drawn at random, makes of random inputs."""
    torch.manual_seed(1)
    teacher = mbp.MLP([SIZES[0], 32, SIZES[-1]], dtype=torch.float64)
    for _ in range(STEPS):
        input = torch.randn(BATCH, SIZES[0], dtype=torch.float64)
        yield input, 4 * teacher(input).detach()


def data_parallel(mesh: DeviceMesh) -> tuple[nn.Module, Step]:
    """Each process takes its part of the batch; DDP averages the gradients during backward."""
    model = DistributedDataParallel(network())
    return model, step_on_a_share_of_the_batch(model, mesh)


def sharded(mesh: DeviceMesh) -> tuple[nn.Module, Step]:
    """The same step; the parameters are gathered for it and scattered again.

    The whole network is one unit here. In a larger model, `fully_shard` of each block keeps one block at a time.
    """
    model = network()
    fully_shard(model, mesh=mesh)
    return model, step_on_a_share_of_the_batch(model, mesh)


def step_on_a_share_of_the_batch(model: nn.Module, mesh: DeviceMesh) -> Step:
    """A step whose loss is that of the whole batch: the mean over equal parts."""

    def step(input: Tensor, target: Tensor) -> Tensor:
        mine = slice(mesh.get_rank(), None, mesh.size())
        loss = F.mse_loss(model(input[mine]), target[mine])
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total / mesh.size()

    return step


def tensor_parallel(mesh: DeviceMesh) -> tuple[nn.Module, Step]:
    """Ω_k by rows, then Ω_{k+1} by columns: what one layer leaves scattered is what the next one needs."""
    model = network()
    linear = [name for name, child in model.named_children() if isinstance(child, nn.Linear)]
    plan = dict(zip(linear, itertools.cycle((ColwiseParallel(), RowwiseParallel())), strict=False))
    parallelize_module(model, mesh, plan)

    def step(input: Tensor, target: Tensor) -> Tensor:
        loss = F.mse_loss(model(input), target)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return model, step


def pipelined(mesh: DeviceMesh) -> tuple[nn.Module, Step]:
    """A process takes some of the layers: a slice of an MLP is an nn.Sequential, which `fuse` computes in one call."""
    model, rank, stages = network(), mesh.get_rank(), mesh.size()
    cuts = [2 * (k * (len(SIZES) - 1) // stages) for k in range(stages)]  # before a linear layer
    first, last = [*cuts, len(model)][rank : rank + 2]
    layers: nn.Sequential = mbp.fuse(model[first:last])
    stage = PipelineStage(layers, rank, stages, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=F.mse_loss)

    def step(input: Tensor, target: Tensor) -> Tensor | None:
        losses: list[Tensor] = []
        feed = (input,) if rank == 0 else ()
        at_the_end = rank == stages - 1
        schedule.step(*feed, target=target if at_the_end else None, losses=losses if at_the_end else None)
        return torch.stack(losses).mean() if losses else None

    return layers, step


WAYS = {"ddp": data_parallel, "fsdp": sharded, "tp": tensor_parallel, "pp": pipelined}


def alone() -> tuple[nn.Module, Step]:
    """The plain network in one process, which the others are compared with."""
    model = nn.Sequential(*network())

    def step(input: Tensor, target: Tensor) -> Tensor:
        loss = F.mse_loss(model(input), target)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return model, step


def train(model: nn.Module, step: Step) -> Record:
    """Plain SGD; what every step's loss and gradients were."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    record: Record = []
    for input, target in batches():
        optimizer.zero_grad()
        loss = step(input, target)
        grads = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        record.append((None if loss is None else loss.item(), grads))
        optimizer.step()
    return record


def whole(grad: Tensor | None) -> Tensor:
    """A gradient as one process would have it: gathered, if it is spread over the processes."""
    assert grad is not None
    return grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()


def largest_difference(got: Record, want: Record) -> float:
    """Between the gradients of the parameters that this process has, over all steps; NaN counts as infinite."""
    apart = [
        (grad - wanted[name.removeprefix("module.")]).abs().max()  # DDP calls its network `module`
        for (_, grads), (_, wanted) in zip(got, want, strict=True)
        for name, grad in grads.items()
    ]
    return float(torch.stack(apart).max().nan_to_num(float("inf")))


def main() -> int:
    """Trains in each way that is asked for; 1 if a gradient differs."""
    parser = argparse.ArgumentParser(description="Trains a network on several processes; start it with torchrun.")
    parser.add_argument("way", nargs="?", choices=(*WAYS, "all"), default="all", help="default: %(default)s")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error(f"start it with: torchrun --nproc-per-node 2 {sys.argv[0]}")
    processes = int(os.environ["WORLD_SIZE"])
    if processes not in (1, 2, 4):
        parser.error(f"1, 2 or 4 processes share 4 layers of width {SIZES[1]}, got {processes}")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (processes,))  # starts gloo
    want = train(*alone())
    results = torch.tensor([compare(way, mesh, want) for way in (WAYS if args.way == "all" else (args.way,))])
    dist.barrier()  # no process exits while others still communicate
    dist.destroy_process_group()
    return 0 if bool((results <= LARGEST_DIFFERENCE).all()) else 1


def compare(way: str, mesh: DeviceMesh, want: Record) -> float:
    """Trains in this way, and prints the loss and the largest gradient difference of any process."""
    got = train(*WAYS[way](mesh))
    difference = torch.tensor(largest_difference(got, want))
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    if mesh.get_rank() == mesh.size() - 1:  # the last stage of the pipeline has the loss
        print(
            f"{way:5}{mesh.size()} processes, {STEPS} steps: loss {got[0][0]:.4f} -> {got[-1][0]:.4f}, "
            f"largest gradient difference to one process {difference.item():.1e}",
            flush=True,
        )
    return difference.item()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # torch's cache of sharded operations keeps the mesh alive, and with it gloo's threads, after the group is
    # destroyed. They would run into the interpreter's teardown and sometimes abort the process: exit without teardown.
    os._exit(code)
