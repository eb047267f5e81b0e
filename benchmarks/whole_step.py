"""How fast is a whole training step, with loss and optimizer? Compares this library, PyTorch, JAX and scikit-learn.

    python benchmarks/whole_step.py --json whole_step.json --markdown whole_step.md
    python benchmarks/whole_step.py --quick --workloads toy rl64 --tables steps

Three tables, all in float32 unless they say otherwise:

- steps: zero_grad, forward, mean squared error, backward and Adam's update. Each step takes the next batch of a data
  set of up to 200 batches, which are cut beforehand. `fit` and JAX's scan gather the rows of each batch themselves, and
  run whole epochs per call; JAX's scan gathers in one fixed random order, while `fit` draws an order per epoch. The
  scan may gather the rows of an epoch at once, which suits small networks, or batch by batch, which suits large ones.
- optimizer: Adam's update alone, with gradients that are there.
- sklearn: scikit-learn's MLPClassifier beside ours on its digits, with the same initial weights and batches.

Rounds, ratios and the process of JAX are those of training_step.py. Before a peer is timed, it takes three steps of
Adam's default learning rate; parameters and both moments must then be eager's in float64. While it is timed, the
learning rate is a thousand times smaller. Otherwise a fast peer, which takes more steps, would train its network to a
different state, in which units die and their moments become denormal numbers, which take more time.

training_step.py compares steps without an optimizer, with the limit of the machine.
"""

import copy
import importlib.util
import itertools
import os
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_manualbp as mbp
from training_step import (
    REFERENCE,
    JaxProcess,
    Step,
    Timing,
    Workload,
    about_jax,
    aligned,
    arguments,
    as_mlp,
    environment,
    geometric_mean,
    load_workloads,
    measure_steps,
    parse,
    prepared,
    report_failures,
    write,
)

CHECKED_STEPS = 3
CHECKED_RATE, TIMED_RATE = 1e-3, 1e-6  # learning rates
BATCHES, DATA_BYTES = 200, 2**27  # of the data set, at most

# ------------------------------------------------------------------------------------------------ the network and data


@dataclass(frozen=True)
class Task:
    """A network and its training data."""

    model: nn.Sequential
    x: Tensor  # (N, D_in)
    target: Tensor  # (N, D_out)
    batch: int

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The data in batches."""
        return [*zip(torch.split(self.x, self.batch), torch.split(self.target, self.batch), strict=True)]

    @property
    def in_order(self) -> Tensor:
        """The rows of the batches (N,)."""
        return torch.arange(len(self.x))

    def with_own_model(self) -> "Task":
        """The same with a copy of the model."""
        return Task(copy.deepcopy(self.model), self.x, self.target, self.batch)

    def in_double(self, order: Tensor) -> "Task":
        """The first steps in float64, with the rows in this order."""
        rows = order[: CHECKED_STEPS * self.batch]
        model = copy.deepcopy(self.model).double()
        return Task(model, self.x[rows].double(), self.target[rows].double(), self.batch)


def build(workload: Workload) -> Task:
    """A workload with a data set."""
    model, x, target = workload.build()
    batches = max(CHECKED_STEPS, min(BATCHES, DATA_BYTES // (x.nbytes + target.nbytes)))
    more = (batches - 1) * workload.batch
    x = torch.cat([x, torch.randn(more, workload.sizes[0])])
    target = torch.cat([target, torch.randn(more, workload.sizes[-1])])
    return Task(model, x, target, workload.batch)


def choose_workloads(names: Sequence[str] | None) -> list[Workload]:
    """All networks, or the named ones."""
    table = [
        *load_workloads(["toy", "rl64", "rl256"]),
        Workload("td3", [23, 400, 300, 1], 100),  # the critic of TD3 and DDPG
        *load_workloads(["mnist", "tcnn64", "dlrm_bot"]),
    ]
    if unknown := set(names or ()) - {workload.name for workload in table}:
        raise SystemExit(f"no workload is called {min(unknown)!r}; there are: {', '.join(w.name for w in table)}")
    return [workload for workload in table if not names or workload.name in names]


# ---------------------------------------------------------------------------------------------------------- the peers


@dataclass(frozen=True)
class Trainer(Step):
    """Training steps that follow one another; `gradients` are values, first and second moments of the parameters."""

    train: Callable[[int], float] = lambda steps: 0.0  # the seconds of this many steps
    set_rate: Callable[[float], object] = lambda rate: None  # the learning rate
    order: Tensor | None = None  # the rows of the first steps, if they do not take the batches in order


def make_trainer(
    train: Callable[[int], float], state: Callable[[], list[Tensor]], *, unit: int = 1, **rest: Any
) -> Trainer:
    """A trainer that is timed in calls of `unit` steps."""

    def whole_calls(steps: int) -> float:
        calls = max(1, round(steps / unit))
        return train(calls * unit) * steps / (calls * unit)

    return Trainer(lambda: train(1), state, whole_calls, train=train, **rest)


def by_torch(model: nn.Module, optimizer: torch.optim.Optimizer, train: Callable[[int], float], **rest: Any) -> Trainer:
    """A trainer whose model and optimizer are torch's."""

    def state() -> list[Tensor]:
        parameters = list(model.parameters())
        moments = [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq") for parameter in parameters]
        return [tensor.detach() for tensor in (*parameters, *moments)]

    def set_rate(rate: float) -> None:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    return make_trainer(train, state, set_rate=set_rate, **rest)


def step_by_step(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[Tensor, Tensor], object]
) -> Trainer:
    """A loop over the batches."""
    batches = itertools.cycle(task.batches())

    def train(steps: int) -> float:
        start = time.perf_counter()
        for x, target in itertools.islice(batches, steps):
            step(x, target)
        return time.perf_counter() - start

    return by_torch(model, optimizer, train)


def adam(model: nn.Module, **options: Any) -> torch.optim.Adam:
    """Adam on all parameters."""
    return torch.optim.Adam(model.parameters(), **{"lr": CHECKED_RATE, **options})


def with_autograd(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> Trainer:
    """The usual loop."""

    def step(x: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step_by_step(task, model, optimizer, step)


def eager(task: Task) -> Trainer:
    """PyTorch as it is."""
    return with_autograd(task, task.model, adam(task.model))


def fused_adam(task: Task) -> Trainer:
    """The same with torch's fused Adam."""
    return with_autograd(task, task.model, adam(task.model, fused=True))


def compiled(task: Task) -> Trainer:
    """torch.compile of the network with its loss, and of the optimizer's step."""
    torch._dynamo.reset()
    optimizer = adam(task.model, lr=torch.tensor(CHECKED_RATE))  # a number would be compiled in
    update = torch.compile(optimizer.step)

    @torch.compile(dynamic=False, fullgraph=True)
    def loss(x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(task.model(x), target)

    def step(x: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        loss(x, target).backward()  # type: ignore[no-untyped-call]
        update()

    return step_by_step(task, task.model, optimizer, step)


def jax_peer(kind: str, task: Task, order: Tensor, unit: int = 1) -> Trainer:
    """Adam in JAX, in another process."""
    process = JaxProcess(kind, task.model, x=task.x, target=task.target, rows=order.view(-1, task.batch))

    def set_rate(rate: float) -> None:
        process.ask(f"rate {rate}")

    set_rate(CHECKED_RATE)
    return make_trainer(process.run, process.results, unit=unit, set_rate=set_rate, order=order, close=process.close)


def jax_jit(task: Task) -> Trainer:
    """`jax.jit` of a whole step."""
    return jax_peer("adam", task, task.in_order)


def jax_scan(kind: str, task: Task) -> Trainer:
    """`jax.lax.scan` over the batches of an epoch."""
    return jax_peer(kind, task, torch.randperm(len(task.x)), len(task.x) // task.batch)


def fused_model(task: Task) -> Trainer:
    """The usual loop after `fuse(model)`."""
    model = mbp.fuse(task.model)
    return with_autograd(task, model, adam(model))


def fused_both(task: Task) -> Trainer:
    """The usual loop after `fuse(model)` and `fuse(optimizer)`."""
    model = mbp.fuse(task.model)
    return with_autograd(task, model, mbp.fuse(adam(model)))


def by_hand(task: Task, fuse: Callable[[torch.optim.Adam], torch.optim.Adam] = lambda optimizer: optimizer) -> Trainer:
    """`loss_backward`, and the optimizer's step."""
    model = as_mlp(task.model)
    optimizer = fuse(adam(model))

    def step(x: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        model.loss_backward(x, target)
        optimizer.step()

    return step_by_step(task, model, optimizer, step)


def train_step(task: Task) -> Trainer:
    """`MLP.train_step`."""
    model = as_mlp(task.model)
    optimizer = mbp.fuse(adam(model))
    return step_by_step(task, model, optimizer, lambda x, target: model.train_step(x, target, optimizer))


def fit(task: Task) -> Trainer:
    """`fit`: all steps in one call, or in two if the last epoch is not a whole one."""
    model = as_mlp(task.model)
    optimizer = mbp.fuse(adam(model))
    generator = torch.Generator().manual_seed(0)
    unit = len(task.x) // task.batch
    order = torch.randperm(CHECKED_STEPS * task.batch, generator=torch.Generator().manual_seed(0))

    def train(steps: int) -> float:
        epochs, rest = divmod(steps, unit)
        start = time.perf_counter()
        for count, rows in ((epochs, len(task.x)), (int(rest > 0), rest * task.batch)):
            if count:
                data = task.x[:rows], task.target[:rows]
                mbp.fit(model, *data, optimizer, epochs=count, batch_size=task.batch, generator=generator)
        return time.perf_counter() - start

    return by_torch(model, optimizer, train, unit=unit, order=order)


Builder = Callable[[Task], Trainer]

STEPS: dict[str, Builder] = {
    REFERENCE: eager,
    "fused=True": fused_adam,
    "torch.compile": compiled,
    "JAX jit": jax_jit,
    "JAX scan": partial(jax_scan, "scan"),
    "JAX scan, gathered first": partial(jax_scan, "gather_scan"),
    "fuse(model)": fused_model,
    "fuse both": fused_both,
    "loss_backward": by_hand,
    "loss_backward, fuse(Adam)": partial(by_hand, fuse=mbp.fuse),
    "train_step": train_step,
    "fit": fit,
}
COMPILERS = ("torch.compile", "JAX jit", "JAX scan", "JAX scan, gathered first")


def update(make: Callable[[nn.Module], torch.optim.Optimizer], task: Task) -> Trainer:
    """The optimizer's step alone; the gradients are always the same."""
    optimizer = make(task.model)
    generator = torch.Generator().manual_seed(0)
    for parameter in task.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    def train(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.step()
        return time.perf_counter() - start

    return by_torch(task.model, optimizer, train)


UPDATES: dict[str, Builder] = {
    "Adam": partial(update, adam),
    "fused=True": partial(update, partial(adam, fused=True)),
    "fuse(Adam)": partial(update, lambda model: mbp.fuse(adam(model))),
}

# The second peer's time over the first one's.
STEP_RATIOS = [
    ("fuse both", REFERENCE),
    ("train_step", REFERENCE),
    ("train_step", "JAX jit"),
    ("fit", REFERENCE),
    ("fit", "train_step"),
    ("fit", "JAX scan"),
    ("fit", "JAX scan, gathered first"),
]
UPDATE_RATIOS = [("fuse(Adam)", "Adam"), ("fuse(Adam)", "fused=True")]


def available(table: dict[str, Builder], compilers: bool) -> dict[str, Builder]:
    """The peers to measure: all, or all that compile nothing, and JAX only if it is installed."""
    has_jax = importlib.util.find_spec("jax") is not None
    left_out = {name for name in COMPILERS if not compilers or (name.startswith("JAX") and not has_jax)}
    return {name: peer for name, peer in table.items() if name not in left_out}


# --------------------------------------------------------------------------------------------------------- correctness


class StateCheck:
    """Compares the state after three steps with that of a reference in float64."""

    # Relative to the norm of each tensor. torch's sums over 131,072 rows in float32 change a moment by 2e-3. The first
    # updates have the size of the learning rate even where a gradient is so small that rounding may change its sign.
    tolerance = 1e-2
    quantities = ("update", "first moment", "second moment")

    def __init__(self, task: Task, reference: Builder) -> None:
        self.task, self.reference = task, reference

    def __call__(self, peer: str, trainer: Trainer) -> None:
        """Ends the program if the state is wrong, because timing a wrong result is pointless."""
        trainer.train(CHECKED_STEPS)
        expected = self.reference(self.task.in_double(self.task.in_order if trainer.order is None else trainer.order))
        expected.train(CHECKED_STEPS)
        names = [name for name, _ in self.task.model.named_parameters()]
        before = [parameter.detach().double() for parameter in self.task.model.parameters()]
        states = [[tensor.double() for tensor in of.gradients()] for of in (trainer, expected)]
        for state in states:
            state[: len(before)] = [after - parameter for after, parameter in zip(state, before, strict=False)]
        labels = itertools.product(self.quantities, names)
        for (quantity, name), actual, correct in zip(labels, *states, strict=True):
            error, norm = float((actual - correct).norm()), float(correct.norm())
            if not error <= self.tolerance * norm:  # NaN is wrong too
                raise SystemExit(
                    f"{peer}: after {CHECKED_STEPS} steps the {quantity} of {name} is off by {error:.1e}, "
                    f"its norm is {norm:.1e} (allowed: {self.tolerance:.0e} of it)"
                )
        trainer.set_rate(TIMED_RATE)


def measure(task: Task, peers: Mapping[str, Builder], reference: Builder, rounds: int) -> dict[str, Timing]:
    """Checks the peers, then times them in rounds."""

    def build(peer: Builder) -> Trainer:
        return peer(task.with_own_model())

    builders = {name: partial(build, peer) for name, peer in peers.items()}
    return measure_steps(builders, StateCheck(task, reference), rounds)


# -------------------------------------------------------------------------------------------------------- scikit-learn


@dataclass(frozen=True)
class Classifier:
    """A network for scikit-learn's digits, and how it is trained."""

    hidden: tuple[int, ...]
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"64–{'–'.join(map(str, self.hidden))}–10, batch {self.batch}, {self.dtype}"


CLASSIFIERS = [
    Classifier(hidden, batch, dtype)
    for hidden, batch in (((100,), 200), ((256, 128), 32))  # scikit-learn's defaults; those of train_digits.py
    for dtype in ("float64", "float32")
]


@dataclass
class Fits:
    """The fits of both implementations, one per seed."""

    seconds: dict[str, list[float]]
    accuracies: dict[str, list[float]]  # on the test data

    @property
    def speedups(self) -> list[float]:
        """scikit-learn's time over ours."""
        return [a / b for a, b in zip(self.seconds["scikit-learn"], self.seconds["ours"], strict=True)]


def measure_fits(case: Classifier, epochs: int, seeds: int) -> Fits:
    """Times both implementations with each seed, in turns; both use all threads that torch has."""
    from sklearn.datasets import load_digits
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    from torch_manualbp.sklearn import MLPClassifier as OurMLPClassifier

    pixels, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        (pixels / 16).astype(case.dtype), labels, test_size=0.25, stratify=labels, random_state=0
    )
    implementations = {"scikit-learn": MLPClassifier, "ours": OurMLPClassifier}
    fits = Fits({name: [] for name in implementations}, {name: [] for name in implementations})

    def fitted(name: str, epochs: int, seed: int) -> Any:
        options = {"hidden_layer_sizes": case.hidden, "batch_size": case.batch, "random_state": seed}
        classifier = implementations[name](**options, max_iter=epochs, tol=0, n_iter_no_change=epochs + 1)
        return classifier.fit(x, y)

    with warnings.catch_warnings(), threadpool_limits(limits=torch.get_num_threads(), user_api="blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of epochs is given
        for seed in range(seeds):
            theirs, ours = (fitted(name, 1, seed).loss_ for name in implementations)
            if not abs(ours - theirs) <= 1e-3 * theirs:
                raise SystemExit(f"{case}: the loss of the first epoch is {ours:.6g}, scikit-learn's {theirs:.6g}")
            for name in sorted(implementations, reverse=bool(seed % 2)):
                fitted(name, 1, seed)  # wakes the threads and refills the caches
                start = time.perf_counter()
                classifier = fitted(name, epochs, seed)
                fits.seconds[name].append(time.perf_counter() - start)
                fits.accuracies[name].append(classifier.score(x_test, y_test))
    return fits


# --------------------------------------------------------------------------------------------------------- the report


def spread(ratios: Sequence[float]) -> str:
    """The median, the minimum and the maximum."""
    return f"{statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})"


def table(results: Mapping[str, Mapping[str, Timing]]) -> str:
    """Speeds relative to the first peer, with one row per network."""
    peers = list(next(iter(results.values())))
    rows = [["network", *peers]]
    for name, timings in results.items():
        cells = [
            "failed" if timing.error else f"{timing.speedup:6.2f}× {timing.median_seconds * 1e3:9.4f} ms"
            for timing in timings.values()
        ]
        rows.append([name, *cells])
    means = [geometric_mean([timings[peer] for timings in results.values()]) for peer in peers]
    rows.append(["geometric mean", *("–" if mean is None else f"{mean:6.2f}×" for mean in means)])
    return aligned(rows)


def ratio_table(results: Mapping[str, Mapping[str, Timing]], pairs: Sequence[tuple[str, str]]) -> str:
    """The ratios of these pairs: median, minimum and maximum of the rounds."""
    pairs = [pair for pair in pairs if set(pair) <= set(next(iter(results.values())))]
    rows = [["network", *(f"{peer} : {other}" for peer, other in pairs)]]
    for name, timings in results.items():
        seconds = [(timings[other].seconds, timings[peer].seconds) for peer, other in pairs]
        ratios = [[a / b for a, b in zip(*both, strict=True)] for both in seconds]
        rows.append([name, *(spread(values) if values else "–" for values in ratios)])
    return aligned(rows)


def fits_table(results: Mapping[Classifier, Fits]) -> str:
    """Seconds of scikit-learn and of ours, their ratio, and both accuracies: medians and means over the seeds."""
    rows = [["network", "scikit-learn", "ours", "ratio", "accuracy of scikit-learn", "accuracy of ours"]]
    for case, fits in results.items():
        seconds = [f"{statistics.median(values):.3f} s" for values in fits.seconds.values()]
        accuracies = [
            f"{statistics.fmean(values):.2%} ({min(values):.1%}–{max(values):.1%})"
            for values in fits.accuracies.values()
        ]
        rows.append([str(case), *seconds, spread(fits.speedups), *accuracies])
    return aligned(rows)


def timings_as_json(results: Mapping[str, Mapping[str, Timing]]) -> dict[str, Any]:
    """All samples of a table."""
    return {
        name: {
            peer: {"error": timing.error}
            if timing.error
            else {"speedup": timing.speedup, "median_seconds": timing.median_seconds, "seconds": timing.seconds}
            for peer, timing in timings.items()
        }
        for name, timings in results.items()
    }


def parse_arguments() -> Any:
    """Parses the command line."""
    tables = ("steps", "optimizer", "sklearn")
    parser = arguments("Times whole training steps of ReLU networks and compares peers.")
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables, help="default: all")
    parser.add_argument("--epochs", type=int, help="of the classifiers (default: 50, or 5 with --quick)")
    parser.add_argument("--seeds", type=int, help="of the classifiers (default: 9, or 2 with --quick)")
    args = parse(parser)
    args.epochs = args.epochs if args.epochs is not None else 5 if args.quick else 50
    args.seeds = args.seeds if args.seeds is not None else 2 if args.quick else 9
    if min(args.epochs, args.seeds) < 1:
        parser.error("--epochs and --seeds must be at least 1")
    if "sklearn" in args.tables and importlib.util.find_spec("sklearn") is None:
        parser.error("the table sklearn needs scikit-learn: pip install scikit-learn, or choose other --tables")
    return args


def main() -> None:
    """Measures, prints the tables and writes the files."""
    args = parse_arguments()
    load = os.getloadavg()[0]  # the mean number of running processes over the last minute
    compilers = not (args.quick or args.no_compile)
    steps, updates = available(STEPS, compilers), available(UPDATES, compilers)
    if compilers and "JAX jit" not in steps:
        sys.stderr.write("JAX is not installed (pip install jax): its columns are left out\n")
    results: dict[str, dict[str, dict[str, Timing]]] = {"steps": {}, "optimizer": {}}
    fits: dict[Classifier, Fits] = {}
    with prepared(args) as peak:
        for workload in choose_workloads(args.workloads):
            peak.update()
            task = build(workload)
            for name, peers, reference in (("steps", steps, eager), ("optimizer", updates, UPDATES["Adam"])):
                if name in args.tables:
                    sys.stderr.write(f"{workload.name}: {args.rounds} rounds of {', '.join(peers)}\n")
                    results[name][workload.name] = measure(task, peers, reference, args.rounds)
                    report_failures(workload.name, results[name][workload.name])
        peak.update()
        for case in CLASSIFIERS if "sklearn" in args.tables else ():
            sys.stderr.write(f"{case}: {args.seeds} seeds\n")
            fits[case] = measure_fits(case, args.epochs, args.seeds)
    header = {
        **environment(load),
        "FMA peak": str(peak),
        **about_jax(list(steps)),
        "command": shlex.join(["python", *sys.argv]),
        "rounds": str(args.rounds),
    }
    body = []
    for name, what, pairs in (("steps", "a step", STEP_RATIOS), ("optimizer", "an update with Adam", UPDATE_RATIOS)):
        if results[name]:
            first = next(iter(next(iter(results[name].values()))))
            body += [f"Speed relative to {first} (median of the rounds), median time of {what}:", ""]
            body += [table(results[name]), ""]
            body += ["How much faster the first is: median of the rounds (minimum–maximum):", ""]
            body += [ratio_table(results[name], pairs), ""]
    if fits:
        body += [f"MLPClassifier, {args.epochs} epochs of digits, {args.seeds} seeds: median time of `fit`, "]
        body[-1] += "median ratio (minimum–maximum), mean test accuracy (minimum–maximum):"
        body += ["", fits_table(fits), ""]
    samples = {
        "header": header,
        "fma_peak_gflops": peak.gflops or None,
        **{name: timings_as_json(timings) for name, timings in results.items()},
        "sklearn": {str(case): {"seconds": f.seconds, "accuracies": f.accuracies} for case, f in fits.items()},
    }
    write(header, body[:-1], samples, args)


if __name__ == "__main__":
    main()
