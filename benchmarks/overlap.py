"""What happens to the gradients of a large network while its backward pass goes on: are they sent, or used and freed?

    python benchmarks/overlap.py                                       (2 minutes; Linux)
    python benchmarks/overlap.py --sizes 256 512 512 10 --rounds 5 --json build/overlap.json

Two processes of one thread each train the network with DistributedDataParallel over gloo: as plain torch, fused as a
single node of autograd, and fused in segments (`fuse(model, segment_bytes=…)`). For each are measured

- when DDP starts to send a bucket of gradients, as a share of the time of `backward()` (nothing is sent then),
- a training step, where the buckets go one after another over a slow link: the all-reduce, and then a wait for as long
  as the link takes for their bytes,
- by how much a backward pass raises the peak resident size, if each parameter is updated as soon as its gradient is
  known, and the gradient is freed (one process, no DDP).

Rounds of all three are interleaved; the tables show medians. A second table is a model of more processes, each with its
own part of the batch: the backward pass as measured here, and each bucket sent, when it is ready and the link is free,
by a ring all-reduce: 2 (N-1) messages of its bytes / N between N processes (`modelled_ms`).
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import torch_manualbp as mbp
from peak_memory import highest_resident_bytes
from results import add_options, header, save
from torch_manualbp._compute import SEGMENT_BYTES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORLD = 2
NAMES = ["plain", "one node", "segments"]
WORKERS = [8, 64, 256, 1024]
WHOLE = 1 << 40  # bytes: a network is never cut
Hook = Callable[[object, Any], torch.futures.Future[Tensor]]  # (state, GradBucket)


def network(name: str, sizes: list[int], segment_bytes: int) -> nn.Module:
    """A network that always has the same parameters: "plain", fused as "one node", or in "segments"."""
    torch.manual_seed(0)
    model = nn.Sequential(*mbp.MLP(sizes))
    return model if name == "plain" else mbp.fuse(model, segment_bytes=WHOLE if name == "one node" else segment_bytes)


class Link:
    """A connection of this many bytes a second, which transfers one bucket after another."""

    def __init__(self, rate: float) -> None:
        self.rate, self.is_free_at = rate, 0.0
        self.buckets: queue.SimpleQueue[tuple[Any, Tensor, torch.futures.Future[Tensor]]] = queue.SimpleQueue()
        threading.Thread(target=self._transfer, daemon=True).start()

    def hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Starts the all-reduce; the future is complete when the link has transferred the bucket."""
        buffer, future = bucket.buffer(), torch.futures.Future[Tensor]()
        self.buckets.put((dist.all_reduce(buffer, async_op=True), buffer, future))
        return future

    def _transfer(self) -> None:
        while True:
            work, buffer, future = self.buckets.get()
            begin = max(time.perf_counter(), self.is_free_at)
            work.wait()
            self.is_free_at = begin + buffer.nbytes / self.rate
            time.sleep(max(0.0, self.is_free_at - time.perf_counter()))
            future.set_result(buffer.div_(WORLD))


class Starts:
    """Notes when DDP hands over each bucket, and sends nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.bytes: list[int] = []

    def hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """The bucket as it is."""
        self.times.append(time.perf_counter())
        self.bytes.append(bucket.buffer().nbytes)
        future = torch.futures.Future[Tensor]()
        future.set_result(bucket.buffer())
        return future


def data_parallel(model: nn.Module, hook: Hook, bucket_mib: float) -> DistributedDataParallel:
    """DDP whose buckets go to `hook`."""
    wrapper = DistributedDataParallel(model, bucket_cap_mb=bucket_mib)
    wrapper.register_comm_hook(None, hook)
    return wrapper


def train(rank: int, folder: str, options: argparse.Namespace) -> None:
    """One of the processes. The first one writes the starts of buckets and the times of steps to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    x, y = torch.randn(options.rows, options.sizes[0]), torch.randn(options.rows, options.sizes[-1])
    starts: dict[str, list[list[float]]] = {}
    backward: dict[str, list[float]] = {}
    sent: dict[str, list[int]] = {}
    steps: dict[str, list[float]] = {}
    quiet, slow = {}, {}
    link = Link(options.mbit * 1e6 / 8)
    for name in NAMES:
        note, arguments = Starts(), (name, options.sizes, options.segment_bytes)
        quiet[name] = note, data_parallel(network(*arguments), note.hook, options.bucket_mib)
        slow[name] = data_parallel(network(*arguments), link.hook, options.bucket_mib)
    for number in range(-2, options.rounds):  # DDP forms its buckets anew after its first step
        for name, (note, model) in quiet.items():
            loss = nn.functional.mse_loss(model(x), y)
            note.times.clear()
            note.bytes.clear()
            dist.barrier()
            begin = time.perf_counter()
            loss.backward()  # type: ignore[no-untyped-call]
            took = time.perf_counter() - begin
            if number >= 0:
                starts.setdefault(name, []).append([(start - begin) / took for start in note.times])
                backward.setdefault(name, []).append(took)
                sent[name] = list(note.bytes)
        for name, model in slow.items():
            dist.barrier()
            begin = time.perf_counter()
            nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
            if number >= 0:
                steps.setdefault(name, []).append(time.perf_counter() - begin)
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps([starts, steps, backward, sent]))
    dist.barrier()
    dist.destroy_process_group()


def modelled_ms(
    starts: list[float], sizes: list[int], backward: float, workers: int, rate: float, latency: float
) -> float:
    """A model: milliseconds from the beginning of the backward pass until all processes have all gradients.

    Args:
        starts: of the buckets, as shares of the backward pass.
        sizes: their bytes.
        backward: seconds of the backward pass.
        workers: the number of processes.
        rate: of each link, bytes a second.
        latency: of a message, seconds.
    """
    free = 0.0
    for start, size in zip(starts, sizes, strict=True):
        messages = 2 * (workers - 1)
        free = max(free, start * backward) + messages * (size / workers / rate + latency)
    return 1000 * max(free, backward)


def released(name: str, sizes: list[int], segment_bytes: int) -> int:
    """Bytes by which a backward pass that updates and frees on the way raises the peak resident size."""
    torch.set_num_threads(1)
    model = network(name, sizes, segment_bytes)

    def update(parameter: Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.add_(parameter.grad, alpha=-1e-3)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)  # type: ignore[no-untyped-call]
    model(torch.randn(8, sizes[0])).sum().backward()  # starts the autograd engine
    output = model(torch.randn(8, sizes[0]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of from now on
    before = highest_resident_bytes()
    output.sum().backward()
    return highest_resident_bytes() - before


def draw(result: dict[str, Any]) -> "Figure":
    """Draws when each bucket starts."""
    from torch_manualbp.inspection._figure import slide_figure

    with slide_figure(11, 4) as figure:
        axes = figure.add_subplot()
        for y, rounds in enumerate(result["starts"].values()):
            shares = [100 * median(share) for share in zip(*rounds, strict=True)]
            axes.plot([0, 100], [y, y], color="0.85", zorder=0)
            axes.plot(shares, [y] * len(shares), "o", markersize=12)
        axes.set_yticks(range(len(result["starts"])), list(result["starts"]))
        axes.set_ylim(len(result["starts"]) - 0.5, -0.5)
        axes.set_xlabel("% of the backward pass")
        axes.set_title("When DistributedDataParallel starts to send each bucket of gradients")
    return figure


def main() -> None:
    """Prints a table, and saves the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, *[1024] * 9, 10])
    parser.add_argument("--rows", type=int, default=128, help="of each process (default: %(default)s)")
    parser.add_argument("--segment-bytes", type=int, default=SEGMENT_BYTES, help="default: that of fuse")
    parser.add_argument("--bucket-mib", type=float, default=8, help="of DDP (default: %(default)s)")
    parser.add_argument("--mbit", type=float, default=2000, help="a second, of the link (default: %(default)s)")
    parser.add_argument(
        "--model-gbit", type=float, default=10, help="a second, of the model's links (default: %(default)s)"
    )
    parser.add_argument("--latency-us", type=float, default=20, help="of the model's messages (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args()
    if options.one:
        print(released(options.one, options.sizes, options.segment_bytes))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        spawn(train, (folder, options), nprocs=WORLD)  # type: ignore[no-untyped-call]
        starts, steps, backward, sent = json.loads(Path(folder, "results.json").read_text())
    peaks = {}
    for name in starts:
        command = [sys.executable, __file__, "--one", name, "--segment-bytes", str(options.segment_bytes), "--sizes"]
        done = subprocess.run([*command, *map(str, options.sizes)], check=True, capture_output=True, text=True)
        peaks[name] = int(done.stdout)
    print("| network | buckets start at, % of backward | step over the link | memory of gradients that are freed |")
    print("|---|---|--:|--:|")
    for name, rounds in starts.items():
        shares = ", ".join(f"{100 * median(share):.0f}" for share in zip(*rounds, strict=True))
        milliseconds = 1000 * median(steps[name])
        print(f"| {name} | {shares} | {milliseconds:.0f} ms | {peaks[name] / 2**20:.0f} MiB |")
    shares_of = {name: [median(share) for share in zip(*rounds, strict=True)] for name, rounds in starts.items()}
    models = {
        name: [
            modelled_ms(
                shares_of[name],
                sent[name],
                median(backward[name]),
                n,
                options.model_gbit * 125e6,
                1e-6 * options.latency_us,
            )
            for n in WORKERS
        ]
        for name in starts
    }
    print(f"\nA model: links of {options.model_gbit:g} Gbit/s, {options.latency_us:g} µs a message.\n")
    print("| network |", *(f"{n} processes |" for n in WORKERS))
    print("|---|" + "--:|" * len(WORKERS))
    for name, milliseconds in models.items():
        print(f"| {name} |", *(f"{each:.0f} ms |" for each in milliseconds))
    settings = {
        key: getattr(options, key)
        for key in ("sizes", "rows", "segment_bytes", "bucket_mib", "mbit", "model_gbit", "latency_us")
    }
    result = {
        "starts": starts,
        "steps": steps,
        "released": peaks,
        "backward": backward,
        "bytes": sent,
        "modelled_ms": models,
    }
    save({"header": header(load), **settings, **result}, options, draw)


if __name__ == "__main__":
    main()
