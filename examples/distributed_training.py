"""Trains one network on several processes, in each of PyTorch's four ways, and shows that the gradients stay the same.

    torchrun --nproc-per-node 2 examples/distributed_training.py            # all four, one after another
    torchrun --nproc-per-node 2 examples/distributed_training.py fsdp
    torchrun --nproc-per-node 2 examples/distributed_training.py --output distributed_training.png

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
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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


def differences(got: Record, want: Record) -> Tensor:
    """The largest at each step (STEPS,) of the gradients of the parameters that this process has; NaN is infinite."""
    apart = [
        torch.stack([(grad - wanted[name.removeprefix("module.")]).abs().max() for name, grad in grads.items()]).max()
        for (_, grads), (_, wanted) in zip(got, want, strict=True)  # DDP calls its network `module`
    ]
    return torch.stack(apart).nan_to_num(float("inf"))


def draw(runs: Sequence[dict[str, Any]]) -> Any:
    """The losses of all runs, the first in one process; its gradients, and how far those of the others are from them.

    runs: what `compare` returns, after ``losses`` and ``gradients`` of one process.
    """
    from torch_manualbp.inspection import _figure

    alone, *ways = runs
    colors = (_figure.BLUE, _figure.ORANGE, _figure.GREEN, _figure.PINK)
    with _figure.slide_figure(12, 5) as figure:
        left, right = figure.subplots(1, 2)
        gray = {"color": "#BBBBBB", "linewidth": 7, "label": alone["name"]}
        left.plot(alone["losses"], **gray)
        right.plot(alone["gradients"], **gray)
        for k, way in enumerate(ways):
            look = {"color": colors[k], "marker": "osD^"[k], "markersize": 7}
            places = range(2 * k, len(way["losses"]), 8)  # not where those of another way are
            left.plot(places, [way["losses"][place] for place in places], linestyle="", label=way["name"], **look)
            right.plot(way["differences"], linewidth=1.6, color=colors[k], label=way["name"])
        left.set(title="The loss is that of one process", xlabel="step", ylabel="loss")
        left.set_ylim(bottom=0)
        right.set(title="Gradients differ by rounding", xlabel="step", ylabel="largest of all parameters")
        right.set_yscale("log", nonpositive="clip")
        right.set_ylim(1e-18, 10)
        for y, text in ((0.7, "gradient in one process"), (0.22, "difference to it")):
            right.text(0.5, y, text, transform=right.transAxes, ha="center", bbox={"color": "white"})
        left.legend()
    return figure


def main() -> int:
    """Trains in each way that is asked for; 1 if a gradient differs."""
    parser = argparse.ArgumentParser(description="Trains a network on several processes; start it with torchrun.")
    parser.add_argument("way", nargs="?", choices=(*WAYS, "all"), default="all", help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="draw this figure, which needs matplotlib")
    parser.add_argument("--json", type=Path, help="write the numbers of the figure to this file")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error(f"start it with: torchrun --nproc-per-node 2 {sys.argv[0]}")
    processes = int(os.environ["WORLD_SIZE"])
    if processes not in (1, 2, 4):
        parser.error(f"1, 2 or 4 processes share 4 layers of width {SIZES[1]}, got {processes}")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (processes,))  # starts gloo
    want = train(*alone())
    ways = [compare(way, mesh, want) for way in (WAYS if args.way == "all" else (args.way,))]
    if mesh.get_rank() == mesh.size() - 1:
        largest = [max(grad.abs().max().item() for grad in grads.values()) for _, grads in want]
        one = {"name": "one process", "losses": [loss for loss, _ in want], "gradients": largest}
        report([one, *ways], args.output, args.json)
    dist.barrier()  # no process exits while others still communicate
    dist.destroy_process_group()
    return 0 if all(difference <= LARGEST_DIFFERENCE for way in ways for difference in way["differences"]) else 1


def compare(way: str, mesh: DeviceMesh, want: Record) -> dict[str, Any]:
    """Trains in this way, and prints the loss and the largest gradient difference of any process.

    Returns what the figure shows; where this process does not know a loss, it is None.
    """
    got = train(*WAYS[way](mesh))
    apart = differences(got, want)
    dist.all_reduce(apart, dist.ReduceOp.MAX)
    if mesh.get_rank() == mesh.size() - 1:  # the last stage of the pipeline has the loss
        print(
            f"{way:5}{mesh.size()} processes, {STEPS} steps: loss {got[0][0]:.4f} -> {got[-1][0]:.4f}, "
            f"largest gradient difference to one process {apart.max().item():.1e}",
            flush=True,
        )
    return {"name": way, "losses": [loss for loss, _ in got], "differences": apart.tolist()}


def report(runs: Sequence[dict[str, Any]], output: Path | None, numbers: Path | None) -> None:
    """Writes the figure and its numbers, where they are asked for."""
    if numbers:
        numbers.write_text(json.dumps(runs) + "\n")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        draw(runs).savefig(output)
        print(f"figure: {output}", flush=True)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # torch's cache of sharded operations keeps the mesh alive, and with it gloo's threads, after the group is
    # destroyed. They would run into the interpreter's teardown and sometimes abort the process: exit without teardown.
    os._exit(code)
