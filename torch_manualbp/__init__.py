"""Hand-derived backpropagation for PyTorch: fused linear+ReLU with a backward pass written out, not recorded."""

__version__ = "0.1.0"

from torch_manualbp import _ops as _ops  # first, because it loads the compiled part, which may be missing
from torch_manualbp import autograd as autograd
from torch_manualbp import lecture as lecture
from torch_manualbp._flops import register_when_needed
from torch_manualbp.conversion import fuse, safe_globals, unfuse
from torch_manualbp.functional import linear_relu, mlp, mlp_loss
from torch_manualbp.inspection.fusion import fusion_report
from torch_manualbp.inspection.gradient_flow import gradient_flow
from torch_manualbp.inspection.memory import empty_cache, memory
from torch_manualbp.inspection.monitor import GradientFlowMonitor
from torch_manualbp.inspection.trace import trace
from torch_manualbp.modules import MLP, LinearReLU
from torch_manualbp.per_sample import clipped_gradients, per_sample_gradient_norms, per_sample_gradients
from torch_manualbp.training import History, fit, train_step

__all__ = [
    "MLP",
    "GradientFlowMonitor",
    "History",
    "LinearReLU",
    "__version__",
    "clipped_gradients",
    "empty_cache",
    "fit",
    "fuse",
    "fusion_report",
    "gradient_flow",
    "linear_relu",
    "memory",
    "mlp",
    "mlp_loss",
    "per_sample_gradient_norms",
    "per_sample_gradients",
    "safe_globals",
    "trace",
    "train_step",
    "unfuse",
]

register_when_needed()
del register_when_needed
