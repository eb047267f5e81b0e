"""Which layers of a model run as one call, and why the others do not: `fusion_report`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_manualbp import _compute
from torch_manualbp._chains import Pending, Site, linear_arguments, tensors_in, this_thread
from torch_manualbp._checks import check_module
from torch_manualbp._forwards import WrittenForward, needs_first_call
from torch_manualbp._relus import relu_in_place
from torch_manualbp._route import AUTOCAST, KERNELS, PLAIN, OwnFunctionMode, route, rows_of
from torch_manualbp.inspection._table import Table, printable
from torch_manualbp.modules import FusedForward, has_hooks


@dataclass(frozen=True)
class FusedChain:
    """Layers that one call computes: a ReLU follows each but the last."""

    layers: tuple[str, ...]
    """Their names in ``model.named_modules()``; "?" for a weight that is no module's."""
    widths: tuple[int, ...]
    """D_0, D_1, …, D_K."""
    relu: bool
    """Whether a ReLU follows the last layer too."""
    rows: int
    """Of the input: the number of examples."""
    route: str
    """What computes it: "kernels", or "graph" in a graph that ``torch.compile`` captures."""

    def __str__(self) -> str:
        names = self.layers[0] if len(self.layers) == 1 else f"{self.layers[0]} … {self.layers[-1]}"
        return printable(f"{names}: {'–'.join(map(str, self.widths))}{', ReLU at its end' if self.relu else ''}")


@dataclass(frozen=True)
class PlainLayer:
    """A linear layer that torch computes."""

    name: str
    """Its name in ``model.named_modules()``."""
    reason: str
    """Why our kernels do not."""


@dataclass(frozen=True)
class FusionReport:
    """What `fusion_report` found; to be printed. Its parts are the fields and `to_dict`."""

    chains: tuple[FusedChain, ...]
    """In the order in which they were computed. A layer that was called several times may be in several."""
    plain: tuple[PlainLayer, ...]
    """All other linear layers, in the order of ``model.named_modules()``."""

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers."""
        return {"chains": [asdict(chain) for chain in self.chains], "plain": [asdict(layer) for layer in self.plain]}

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        count = sum(len(chain.layers) for chain in self.chains)
        title = f"{len(self.chains)} call(s) compute {count} linear layer(s); torch computes {len(self.plain)}"
        chains = [("one call", str(chain), f"{chain.route}, {chain.rows:,} rows") for chain in self.chains]
        return Table(title, (), [*chains, *(("torch", layer.name, layer.reason) for layer in self.plain)], "<<<")


def fusion_report(model: nn.Module, *inputs: Any, **kwargs: Any) -> FusionReport:
    """Runs a model, and says which of its linear layers run as one call, and why each other one does not.

    The model is called as the program calls it: in training or evaluation mode, with or without gradients, as it is. A
    model whose forward is written by hand is called twice if this is its first call since `fuse`. Random numbers are
    drawn from a copy of torch's generator.

    Args:
        model: any module, after `fuse`.
        inputs: what to call it with.
        kwargs: likewise.

    Returns:
        A `FusionReport`, to be printed; ``.chains``, ``.plain``, ``.to_dict()``.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> from torch_manualbp import fuse
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 64)
        ...         self.c = nn.Linear(64, 1)
        ...     def forward(self, x):
        ...         return self.c(torch.tanh(self.b(torch.relu(self.a(x)))))
        >>> print(fusion_report(fuse(Net()), torch.randn(256, 8)))
        1 call(s) compute 2 linear layer(s); torch computes 1
        one call  a … b: 8–64–64  kernels, 256 rows
        torch     c               no ReLU follows: the output leaves the model
    """
    check_module("fusion_report", model)
    with torch.random.fork_rng(devices=[]):
        if any(isinstance(module, WrittenForward) and needs_first_call(module) for module in model.modules()):
            model(*inputs, **kwargs)
        with _Recorder(model) as recorder, _recording(recorder):
            output = model(*inputs, **kwargs)
    report: FusionReport = recorder.report(output)
    return report


@contextmanager
def _recording(recorder: "_Recorder") -> Iterator[None]:
    before, _compute.recorder = _compute.recorder, recorder.computed
    try:
        yield
    finally:
        _compute.recorder = before


class _Call:
    """A call of F.linear that torch computed, and what its output was used for."""

    def __init__(self, input: Tensor, output: Tensor) -> None:
        self.for_kernels = type(input) in PLAIN and route(input) in (KERNELS, AUTOCAST)
        self.rows = rows_of(input) if isinstance(input, Tensor) else 0
        self.output = ref(output)
        self.uses: list[str] = []


def _use(func: Any, args: Any, kwargs: Any) -> str:
    """The name of a function that computes something; empty for what only looks at a tensor."""
    if relu_in_place(func, args, kwargs) is not None:
        return "relu"
    if getattr(func, "namespace", "") == "manualbp":
        return "another call"
    name = getattr(func, "__name__", "a function")
    return "" if name in _LOOKS else name


_LOOKS = frozenset({"__get__", "dim", "is_inference", "numel", "size", "stride", "is_contiguous", "__len__"})


class _Recorder(OwnFunctionMode):
    """Sees which functions are given the output of a layer that torch computes, and what our kernels compute."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names: dict[int, str] = {}  # of the layers, by the id of the module
        self.owners: dict[int, nn.Module] = {}  # of the weights, by their ids
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                self.names[id(module)] = name or type(module).__name__
                if (weight := module._parameters.get("weight")) is not None:
                    self.owners[id(weight)] = module
        self.chains: list[FusedChain] = []
        self.fused: set[int] = set()
        self.calls: dict[int, _Call] = {}  # by the id of the module
        self.by_output: dict[int, _Call] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of the function."""
        kwargs = kwargs or {}
        for tensor in tensors_in(args, kwargs):
            call = self.by_output.get(id(tensor))
            if call is not None and call.output() is tensor and (use := _use(func, args, kwargs)):
                call.uses.append(use)
        output = func(*args, **kwargs)
        if func is F.linear and type(output) is not Pending:
            input, weight, _ = linear_arguments(args, kwargs)
            module = self.owners.get(id(weight)) or (this_thread.site.module() if this_thread.site else None)
            if module is not None and type(input) is not Pending and isinstance(output, Tensor):
                self.calls[id(module)] = self.by_output[id(output)] = _Call(input, output)
        return output

    def computed(self, way: str, input: Tensor, weights: Any, relu: bool) -> None:
        """Our ops have computed these layers."""
        modules: list[Any] = [self.owners.get(id(weight)) for weight in weights]
        for chain in this_thread.chains:  # its weights may be computed from those of its modules
            if chain.weights is weights:
                modules = [site.module() if isinstance(site, Site) else None for site in chain.kind.sites]
        self.fused.update(map(id, modules))
        layers = tuple(self.names.get(id(module), "?") for module in modules)
        widths = (weights[0].shape[1], *(weight.shape[0] for weight in weights))
        self.chains.append(FusedChain(layers, widths, relu, rows_of(input), way))

    def report(self, output: Any) -> FusionReport:
        """What has been seen; `output` is the model's."""
        for tensor in tensors_in(output):
            if (call := self.by_output.get(id(tensor))) is not None and call.output() is tensor:
                call.uses.append("")
        plain = [
            PlainLayer(self.names[id(module)], self._reason(module))
            for module in self.model.modules()
            if isinstance(module, nn.Linear) and id(module) not in self.fused
        ]
        return FusionReport(tuple(self.chains), tuple(plain))

    def _reason(self, module: nn.Linear) -> str:
        call = self.calls.get(id(module))
        if not any(isinstance(each, FusedForward | WrittenForward) for each in self.model.modules()):
            return "nothing in the model is fused: call fuse(model)"
        if has_hooks(module):
            return "it has hooks"
        if call is None:
            return (
                "it was not called"
                if type(module) is nn.Linear
                else f"a subclass of nn.Linear ({type(module).__name__})"
            )
        if not call.for_kernels:
            return "its input is not for our kernels: its class, dtype, device or layout, or a transform"
        others = sorted(set(call.uses) - {"relu", ""})
        if others:
            return f"no ReLU follows: the output goes to {', '.join(others)}"
        if "" in call.uses or not call.uses:
            return "no ReLU follows: the output leaves the model"
        if len(call.uses) > 1:
            return "the output is used more than once"
        return f"too small to gain ({call.rows:,} rows)"
