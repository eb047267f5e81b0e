"""fusion_report: which layers run as one call, and why the others do not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import torch_manualbp as mbp


class Net(nn.Module):
    """Two layers in a chain, a Tanh, a layer used twice, and one that is not called."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        f = self.c(torch.tanh(self.b(F.relu(self.a(x)))))
        return self.d(F.relu(f) + f)


def reasons(report):
    return {layer.name: layer.reason for layer in report.plain}


def test_chains_and_reasons():
    report = mbp.fusion_report(mbp.fuse(Net()), torch.randn(256, 8))
    (chain,) = report.chains
    assert (chain.layers, chain.widths, chain.relu) == (("a", "b"), (8, 64, 64), False)
    assert (chain.rows, chain.route) == (256, "kernels")
    assert reasons(report) == {
        "c": "no ReLU follows: the output goes to add",
        "d": "no ReLU follows: the output leaves the model",
        "unused": "it was not called",
    }
    assert report.to_dict()["chains"][0]["layers"] == ("a", "b")
    lines = str(report).splitlines()
    assert lines[0] == "1 call(s) compute 2 linear layer(s); torch computes 3"
    assert len(lines) == 5
    assert report._repr_html_().count("<tr>") == 4


def test_it_reports_what_a_call_does_now():
    model = mbp.fuse(Net())
    assert reasons(mbp.fusion_report(model, torch.randn(2, 8)))["a"] == "too small to gain (2 rows)"
    with torch.autocast("cpu", torch.bfloat16):
        assert mbp.fusion_report(model, torch.randn(256, 8)).chains[0].route == "autocast"
    handle = model.b.register_forward_hook(lambda *args: None)
    report = mbp.fusion_report(model, torch.randn(4096, 8))
    assert report.chains[0].relu
    assert reasons(report)["b"] == "it has hooks"
    handle.remove()
    assert len(mbp.fusion_report(model, torch.randn(4096, 8)).chains[0].layers) == 2
    mbp.unfuse(model)
    assert set(reasons(mbp.fusion_report(model, torch.randn(256, 8))).values()) == {
        "nothing in the model is fused: call fuse(model)"
    }


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_sequentials_subclasses_and_computed_weights():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh()),
        nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), Own(8, 8)),
    )
    report = mbp.fusion_report(mbp.fuse(model), torch.randn(4096, 8))
    assert [chain.layers for chain in report.chains] == [("0.0", "0.2")]
    assert set(reasons(report)) == {"1.0", "1.2"}

    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Masked(8, 8), Masked(8, 8)

        def forward(self, x):
            return self.b(F.relu(self.a(x)))

    report = mbp.fusion_report(mbp.fuse(Flow()), torch.randn(4096, 8))
    assert [chain.layers for chain in report.chains] == [("a", "b")]
    assert not report.plain


def test_it_leaves_the_random_numbers_alone():
    model = mbp.fuse(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8)))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    mbp.fusion_report(model, torch.ones(2, 8))
    assert torch.equal(torch.rand(3), expected)


def test_bad_arguments():
    with pytest.raises(TypeError, match="fusion_report: `model`"):
        mbp.fusion_report(torch.relu, torch.randn(2, 8))
    with pytest.raises(RuntimeError):
        mbp.fusion_report(mbp.fuse(Net()), torch.randn(2, 9))
