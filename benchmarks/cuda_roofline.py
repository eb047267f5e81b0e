"""How fast could a training step be on an H100? An ESTIMATE from bytes and operations: nothing here was measured.

    python benchmarks/cuda_roofline.py --dtype bfloat16 --batch 65536

Each kernel takes one launch plus the longer of two times: its bytes at memory bandwidth and its operations at the peak
rate. The time of a step is the sum. Caches are ignored: each kernel is charged for everything it reads and writes, and
for the weights once. The numbers thus compare implementations and are lower bounds; a kernel reaches perhaps 80 % of
these rates, a small matrix product much less.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# From NVIDIA's data sheet for the H100 SXM (dense rates).
BYTES_PER_SECOND = 3.35e12
FLOPS = {"float32": 67e12, "bfloat16": 989e12, "float16": 989e12}  # FMA units; tensor cores
LAUNCH_SECONDS = 2e-6
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, its layer, and how much it must move and compute."""

    name: str
    layer: int
    bytes: float
    flops: float = 0.0

    def seconds(self, dtype: str) -> float:
        """A lower bound for any implementation, including the launch."""
        return max(self.bytes / BYTES_PER_SECOND, self.flops / FLOPS[dtype]) + LAUNCH_SECONDS


def product(name: str, layer: int, rows: int, d_in: int, d_out: int, size: int) -> Kernel:
    """The product of two of a layer's three matrices, written to the third."""
    return Kernel(name, layer, size * (rows * (d_in + d_out) + d_in * d_out), 2.0 * rows * d_in * d_out)


def step_by_layers(sizes: list[int], rows: int, size: int, *, ours: bool) -> list[Kernel]:
    """Library products with one or two kernels between them (ours or eager's); MSE, no input gradient."""
    kernels = []
    layers = list(enumerate(pairwise(sizes)))
    for k, (d_in, d_out) in layers:
        kernels.append(product("forward product", k, rows, d_in, d_out, size))
        if k + 1 < len(layers):  # both read and write f once; ours adds the bias, which eager's product includes
            kernels.append(Kernel("bias_relu" if ours else "relu", k, 2 * size * rows * d_out))
    last = rows * sizes[-1]
    if ours:
        kernels += [Kernel("loss", len(layers) - 1, 3 * size * last), Kernel("loss_total", len(layers) - 1, 0)]
    else:  # the value reads f and y; its gradient rereads them and writes df
        kernels += [Kernel("loss", len(layers) - 1, 2 * size * last), Kernel("its gradient", 0, 3 * size * last)]
    for k, (d_in, d_out) in reversed(layers):
        masked = k + 1 < len(layers)
        if ours:
            reads = (2 if masked else 1) * size * rows * d_out
            kernels.append(Kernel("relu_backward", k, reads + (size * rows * d_out if masked else 0)))
            if rows > 256:  # approximately: several slices of rows, whose sums a second kernel adds
                kernels.append(Kernel("reduce", k, 0))
        else:
            if masked:
                kernels.append(Kernel("threshold_backward", k, 3 * size * rows * d_out))
            kernels.append(Kernel("sum of the bias gradient", k, size * rows * d_out))
        kernels.append(product("weight gradient", k, rows, d_in, d_out, size))
        if k > 0:
            kernels.append(product("input gradient", k, rows, d_in, d_out, size))
    return kernels


def step_narrow(sizes: list[int], rows: int, size: int) -> list[Kernel]:
    """The narrow kernels run all layers forward in one launch and backward in another; the library does the rest."""
    layers = list(enumerate(pairwise(sizes)))
    parameters = sum(d_in * d_out for _, (d_in, d_out) in layers)
    flops = 2.0 * rows * parameters
    hidden, last = rows * sum(sizes[1:-1]), rows * sizes[-1]
    first_product = 2.0 * rows * sizes[0] * sizes[1]  # no input gradient
    kernels = [
        Kernel("narrow_forward", 0, size * (rows * sizes[0] + hidden + last + parameters), flops),
        Kernel("loss", len(layers) - 1, 3 * size * last),
        Kernel("loss_total", len(layers) - 1, 0),
        Kernel("narrow_backward", 0, size * (last + 2 * hidden + parameters), flops - first_product),
    ]
    kernels.append(Kernel("narrow_biases", 0, 0))
    return kernels + [product("weight gradient", k, rows, d_in, d_out, size) for k, (d_in, d_out) in layers]


def main() -> None:
    """Prints the estimates as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(FLOPS), default="bfloat16")
    parser.add_argument("--batch", type=int, help="batch size (default: that of each workload)")
    parser.add_argument("--kernels", metavar="NAME", help="list the kernels of this workload")
    options = parser.parse_args()
    size = ITEM_BYTES[options.dtype]
    table = json.loads(Path(__file__).with_name("workloads.json").read_text())
    print(f"ESTIMATES for an H100 SXM, {options.dtype}: bytes at {BYTES_PER_SECOND / 1e12} TB/s, operations at")
    print(f"{FLOPS[options.dtype] / 1e12:.0f} TFLOP/s, {LAUNCH_SECONDS * 1e6:.0f} µs a launch. Not measured.\n")
    if options.kernels:
        sizes = table[options.kernels]["sizes"]
        rows = options.batch or table[options.kernels]["batch"]
        ways = {"library": step_by_layers(sizes, rows, size, ours=True)}
        if max(sizes) <= 128:
            ways["narrow"] = step_narrow(sizes, rows, size)
        print("| way | kernel | layer | MB | MFLOP | µs | bound by |\n|---|---|--:|--:|--:|--:|---|")
        for way, kernels in ways.items():
            for k in kernels:
                by = "memory" if k.bytes / BYTES_PER_SECOND > k.flops / FLOPS[options.dtype] else "operations"
                time = k.seconds(options.dtype) * 1e6
                cells = [way, k.name, k.layer, f"{k.bytes / 1e6:.2f}", f"{k.flops / 1e6:.0f}", f"{time:.1f}", by]
                print(f"| {' | '.join(map(str, cells))} |")
        return
    print("| workload | rows | eager µs | library + our kernels µs | narrow kernels µs |\n|---|--:|--:|--:|--:|")
    for name, workload in table.items():
        sizes, rows = workload["sizes"], options.batch or workload["batch"]
        ways_in_order = [
            step_by_layers(sizes, rows, size, ours=False),
            step_by_layers(sizes, rows, size, ours=True),
            step_narrow(sizes, rows, size) if max(sizes) <= 128 else None,
        ]
        times = [
            "–" if kernels is None else f"{sum(k.seconds(options.dtype) for k in kernels) * 1e6:.0f}"
            for kernels in ways_in_order
        ]
        print(f"| {name} | {rows} | {' | '.join(times)} |")


if __name__ == "__main__":
    main()
