"""The lecture's examples, at its scale, in its notation and with its names.

Training needs none of this: `torch_manualbp.MLP` is the network, and `torch_manualbp.trace` shows its two passes. This
module contains the steps that lead there: least squares and gradient descent, the toy network with four weights,
derivatives in the lecture's layout, the network equation written out, and the outlook on initialisation.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torch_manualbp.inspection.trace import trace
from torch_manualbp.modules import MLP

# --- least squares and gradient descent -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeastSquares:
    """The line φ_0 + φ_1 x through points (x_i, y_i): L[φ] = Σ_i ℓ_i, ℓ_i = (φ_0 + φ_1 x_i − y_i)².

    Args:
        x: x_i, shape (I,).
        y: y_i, shape (I,).

    Raises:
        ValueError: `x` and `y` are not vectors of one length.

    Example:
        >>> line = LeastSquares(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]))
        >>> line.partials(torch.tensor([0.0, 1.0]))
        tensor([[-2., -0.],
                [-4., -4.]])
        >>> line.minimum()
        tensor([1.0000, 2.0000])
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if self.x.dim() != 1 or self.x.shape != self.y.shape:
            raise ValueError(
                f"LeastSquares: `x` and `y` must be vectors of one length, got {tuple(self.x.shape)} and "
                f"{tuple(self.y.shape)}"
            )

    def losses(self, phi: Tensor) -> Tensor:
        """ℓ_i, shape (I,), for the parameters φ = (φ_0, φ_1)."""
        return (phi[0] + phi[1] * self.x - self.y) ** 2

    def loss(self, phi: Tensor) -> Tensor:
        """L[φ] = Σ_i ℓ_i."""
        return self.losses(phi).sum()

    def partials(self, phi: Tensor) -> Tensor:
        """∂ℓ_i/∂φ = [2 (φ_0 + φ_1 x_i − y_i), 2 x_i (φ_0 + φ_1 x_i − y_i)], shape (I, 2)."""
        twice = 2 * (phi[0] + phi[1] * self.x - self.y)
        return torch.stack([twice, self.x * twice], dim=1)

    def gradient(self, phi: Tensor) -> Tensor:
        """∂L/∂φ = Σ_i ∂ℓ_i/∂φ, shape (2,)."""
        return self.partials(phi).sum(0)

    def minimum(self) -> Tensor:
        """The φ where ∂L/∂φ = 0, shape (2,); it exists in closed form for a linear model only."""
        columns = torch.stack([torch.ones_like(self.x), self.x], dim=1)
        phi: Tensor = torch.linalg.lstsq(columns, self.y[:, None]).solution[:, 0]
        return phi


def gradient_descent(phi: Tensor, gradient: Callable[[Tensor], Tensor], alpha: float, steps: int = 1) -> list[Tensor]:
    """Gradient descent: each step computes ∂L/∂φ, then updates φ ← φ − α ∂L/∂φ.

    Args:
        phi: the initial φ, any shape.
        gradient: a function of φ that returns ∂L/∂φ, of the same shape.
        alpha: α > 0, the learning rate.
        steps: the number of steps.

    Returns:
        φ before the first step and after each step, `steps` + 1 tensors.

    Raises:
        ValueError: `alpha` is not positive.

    Example:
        >>> partial = lambda phi: 2 * phi  # of L = φ²
        >>> gradient_descent(torch.tensor(4.0), partial, alpha=0.25, steps=2)
        [tensor(4.), tensor(2.), tensor(1.)]
    """
    _check_alpha("gradient_descent", alpha)
    path = [phi]
    for _ in range(steps):
        path.append(path[-1] - alpha * gradient(path[-1]))
    return path


def sgd(
    phi: Tensor, partials: Callable[[Tensor, Tensor], Tensor], batches: Iterable[Tensor], alpha: float
) -> list[Tensor]:
    """Stochastic gradient descent: φ_{t+1} ← φ_t − α Σ_{i ∈ B_t} ∂ℓ_i[φ_t]/∂φ.

    Args:
        phi: φ_0.
        partials: a function of φ and the indices i of a batch that returns ∂ℓ_i/∂φ, shape (batch, *phi.shape).
        batches: B_0, B_1, …: the indices of the examples, one integer tensor per step.
        alpha: α > 0, the learning rate.

    Returns:
        φ_0, φ_1, …, one tensor more than there are batches.

    Raises:
        ValueError: `alpha` is not positive.

    Example:
        >>> line = LeastSquares(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]))
        >>> batches = [torch.tensor([0]), torch.tensor([1])]
        >>> sgd(torch.zeros(2), lambda phi, i: line.partials(phi)[i], batches, alpha=0.25)[-1]
        tensor([1.7500, 1.2500])
    """
    _check_alpha("sgd", alpha)
    path = [phi]
    for batch in batches:
        path.append(path[-1] - alpha * partials(path[-1], batch).sum(0))
    return path


def _check_alpha(op: str, alpha: float) -> None:
    if not alpha > 0:
        raise ValueError(f"{op}: `alpha` must be positive, got {alpha}")


# --- the toy network --------------------------------------------------------------------------------------------------


class ToyForward(NamedTuple):
    """The forward pass of a `ToyNetwork`, in the order in which it is computed."""

    x: float
    y: float
    f0: float
    h1: float
    f1: float
    h2: float
    f2: float
    h3: float
    f3: float
    loss: float


class ToyBackward(NamedTuple):
    """The backward pass of a `ToyNetwork`, in the order in which it is computed; then the parameters' gradients."""

    dl_df3: float
    dl_dh3: float
    dl_df2: float
    dl_dh2: float
    dl_df1: float
    dl_dh1: float
    dl_df0: float
    dl_domega: tuple[float, float, float, float]
    dl_dbeta: tuple[float, float, float, float]


@dataclass(frozen=True)
class ToyNetwork:
    """f[x, φ] = β_3 + ω_3 a[β_2 + ω_2 a[β_1 + ω_1 a[β_0 + ω_0 x]]], ℓ = (f[x, φ] − y)², in plain numbers.

    Args:
        beta: β_0, β_1, β_2, β_3.
        omega: ω_0, ω_1, ω_2, ω_3.

    Raises:
        ValueError: there are not four of each.

    Example:
        >>> toy = ToyNetwork(beta=(1.0, -1.0, 4.0, 2.0), omega=(2.0, 3.0, -0.5, 4.0))
        >>> forward = toy.forward(x=0.5, y=3.0)
        >>> forward.h1, forward.h2, forward.h3, forward.f3, forward.loss
        (2.0, 5.0, 1.5, 8.0, 25.0)
        >>> toy.backward(forward).dl_domega
        (-30.0, -40.0, 200.0, 15.0)
    """

    beta: Sequence[float]
    omega: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("beta", "omega"):
            if len(getattr(self, name)) != 4:
                raise ValueError(f"ToyNetwork: `{name}` must hold 4 numbers, got {len(getattr(self, name))}")

    def __call__(self, x: float) -> float:
        """The output in one expression, which the forward pass splits into steps."""
        (b0, b1, b2, b3), (w0, w1, w2, w3) = self.beta, self.omega
        return b3 + w3 * _a(b2 + w2 * _a(b1 + w1 * _a(b0 + w0 * x)))

    def forward(self, x: float, y: float) -> ToyForward:
        """The intermediate quantities, each from the one before it."""
        (b0, b1, b2, b3), (w0, w1, w2, w3) = self.beta, self.omega
        f0 = b0 + w0 * x
        h1 = _a(f0)
        f1 = b1 + w1 * h1
        h2 = _a(f1)
        f2 = b2 + w2 * h2
        h3 = _a(f2)
        f3 = b3 + w3 * h3
        return ToyForward(x, y, f0, h1, f1, h2, f2, h3, f3, loss=(f3 - y) ** 2)

    def backward(self, forward: ToyForward) -> ToyBackward:
        """The derivatives of the loss by the chain rule, each from the one before it; then those of β_k and ω_k."""
        x, y, f0, h1, f1, h2, f2, h3, f3, _ = forward
        _, w1, w2, w3 = self.omega
        dl_df3 = 2 * (f3 - y)
        dl_dh3 = w3 * dl_df3  # ∂f_3/∂h_3 = ω_3
        dl_df2 = _step(f2) * dl_dh3  # ∂h_3/∂f_2 = I[f_2 > 0]
        dl_dh2 = w2 * dl_df2
        dl_df1 = _step(f1) * dl_dh2
        dl_dh1 = w1 * dl_df1
        dl_df0 = _step(f0) * dl_dh1
        dl_domega = (x * dl_df0, h1 * dl_df1, h2 * dl_df2, h3 * dl_df3)  # ∂f_k/∂ω_k = h_k
        dl_dbeta = (dl_df0, dl_df1, dl_df2, dl_df3)  # ∂f_k/∂β_k = 1
        return ToyBackward(dl_df3, dl_dh3, dl_df2, dl_dh2, dl_df1, dl_dh1, dl_df0, dl_domega, dl_dbeta)

    def local_partials(self, forward: ToyForward) -> dict[str, float]:
        """The factors of ∂ℓ/∂f_0 = ∂h_1/∂f_0 ∂f_1/∂h_1 ∂h_2/∂f_1 … ∂f_3/∂h_3 ∂ℓ/∂f_3, by name and in this order."""
        factors: dict[str, float] = {}
        for k, f in enumerate((forward.f0, forward.f1, forward.f2)):
            factors[f"∂h_{k + 1}/∂f_{k}"] = _step(f)
            factors[f"∂f_{k + 1}/∂h_{k + 1}"] = self.omega[k + 1]
        return {**factors, "∂ℓ/∂f_3": 2 * (forward.f3 - forward.y)}

    def mlp(self) -> MLP:
        """The same network as an `MLP` in float64, computed by the kernels."""
        model = MLP([1, 1, 1, 1, 1], dtype=torch.float64)
        for k in range(4):
            torch.nn.init.constant_(model[2 * k].weight, self.omega[k])
            torch.nn.init.constant_(model[2 * k].bias, self.beta[k])
        return model


def _a(z: float) -> float:
    """a[z] = ReLU[z] = max(0, z)."""
    return max(0.0, z)


def _step(z: float) -> float:
    """∂ReLU[z]/∂z = I[z > 0]."""
    return float(z > 0)


# --- matrix calculus --------------------------------------------------------------------------------------------------


def jacobian(f: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """∂f/∂a in the lecture's layout: rows are the elements of the variable, columns those of the function.

    The derivative of a scalar function has the shape of its variable, vector or matrix. That of a vector function of a
    vector is the transpose of what torch and most books call the Jacobian: entry (j, i) is ∂f_i/∂a_j. So
    ∂(β + Ω h)/∂h = Ωᵀ, and the chain rule reads from the variable outwards: ∂ℓ/∂h = ∂f/∂h ∂ℓ/∂f.

    Args:
        f: a differentiable function of one tensor.
        a: the point at which to differentiate, any shape.

    Returns:
        Shape (*a.shape, *f(a).shape).

    Raises:
        RuntimeError: `a` has a dtype without derivatives, such as an integer dtype.

    Example:
        >>> omega = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> jacobian(lambda h: omega @ h, torch.zeros(2))
        tensor([[1., 3., 5.],
                [2., 4., 6.]])
        >>> jacobian(lambda A: (A * A).sum(), torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    columns_first: Tensor = torch.autograd.functional.jacobian(f, a)  # type: ignore[no-untyped-call]
    functions = columns_first.dim() - a.dim()
    return columns_first.permute([*range(functions, columns_first.dim()), *range(functions)])


def chain_rule(outer: Callable[[Tensor], Tensor], inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∂g/∂x = ∂f/∂x ∂h/∂f for g(x) = h(f(x)): in this layout the product reads from the variable outwards.

    Args:
        outer: h, a function of the result of `inner`.
        inner: f, a scalar or vector function of x.
        x: a scalar, vector or matrix.

    Returns:
        The product of the two derivatives, summed over the elements of f; shape (*x.shape, *h(f(x)).shape).

    Example:
        >>> by_hand = torch.cos(torch.tensor(9.0)) * 6
        >>> chain_rule(torch.sin, torch.square, torch.tensor(3.0)) == by_hand
        tensor(True)
    """
    f = inner(x).detach()
    product: Tensor = torch.tensordot(jacobian(inner, x), jacobian(outer, f), dims=f.dim())
    return product


def relu_jacobian(b: Tensor) -> Tensor:
    """∂a/∂b for a = ReLU[b]: a diagonal matrix of I[b > 0].

    Its product with a vector is the pointwise product with I[b > 0], which `relu_backward` computes without a matrix.

    Args:
        b: a vector, shape (D,).

    Returns:
        Shape (D, D), dtype of `b`.

    Raises:
        ValueError: `b` is not a vector.

    Example:
        >>> relu_jacobian(torch.tensor([2.0, -1.0, 0.0]))
        tensor([[1., 0., 0.],
                [0., 0., 0.],
                [0., 0., 0.]])
    """
    if b.dim() != 1:
        raise ValueError(f"relu_jacobian: `b` must be a vector, got shape {tuple(b.shape)}")
    return torch.diag((b > 0).to(b.dtype))


def relu_backward(b: Tensor, dl_da: Tensor) -> Tensor:
    """∂ℓ/∂b = I[b > 0] ⊙ ∂ℓ/∂a: equal to ``relu_jacobian(b) @ dl_da``, for any shape.

    Example:
        >>> relu_backward(torch.tensor([2.0, -1.0]), torch.tensor([5.0, 7.0]))
        tensor([5., 0.])
    """
    return (b > 0) * dl_da


def weight_gradient(dl_df: Tensor, h: Tensor) -> Tensor:
    """∂ℓ/∂Ω_k = ∂ℓ/∂f_k h_kᵀ: if the activation h_k doubles, a weight has twice the effect.

    Args:
        dl_df: ∂ℓ/∂f_k, shape (D_{k+1},).
        h: h_k, shape (D_k,).

    Returns:
        Shape (D_{k+1}, D_k), that of Ω_k.

    Example:
        >>> weight_gradient(torch.tensor([1.0, 10.0]), torch.tensor([2.0, 3.0]))
        tensor([[ 2.,  3.],
                [20., 30.]])
    """
    return torch.outer(dl_df, h)


# --- the network equation ---------------------------------------------------------------------------------------------


def written_out(x: Tensor, theta: Tensor, psi: Tensor, phi: Tensor) -> Tensor:
    """A network with two hidden layers of three units each, as one equation, to show how unwieldy that becomes.

    Args:
        x: the inputs, any shape.
        theta: θ, shape (3, 2): unit j of the first layer is a[θ_j0 + θ_j1 x].
        psi: ψ, shape (3, 4): unit j of the second is a[ψ_j0 + ψ_j1 h_1 + ψ_j2 h_2 + ψ_j3 h_3].
        phi: φ', shape (4,).

    Returns:
        y', the shape of x.

    Example:
        >>> theta, psi, phi = torch.randn(3, 2), torch.randn(3, 4), torch.randn(4)
        >>> x, model = torch.randn(5), written_out_mlp(theta, psi, phi)
        >>> torch.allclose(written_out(x, theta, psi, phi), model(x[:, None])[:, 0], atol=1e-5)
        True
    """
    a = torch.relu
    (t10, t11), (t20, t21), (t30, t31) = theta
    (p10, p11, p12, p13), (p20, p21, p22, p23), (p30, p31, p32, p33) = psi
    f0, f1, f2, f3 = phi
    y: Tensor = (
        f0
        + f1 * a(p10 + p11 * a(t10 + t11 * x) + p12 * a(t20 + t21 * x) + p13 * a(t30 + t31 * x))
        + f2 * a(p20 + p21 * a(t10 + t11 * x) + p22 * a(t20 + t21 * x) + p23 * a(t30 + t31 * x))
        + f3 * a(p30 + p31 * a(t10 + t11 * x) + p32 * a(t20 + t21 * x) + p33 * a(t30 + t31 * x))
    )
    return y


def written_out_mlp(theta: Tensor, psi: Tensor, phi: Tensor) -> MLP:
    """The network of `written_out` as an `MLP`: the first column of θ and ψ and the first element of φ' are biases."""
    model = MLP([1, 3, 3, 1], dtype=theta.dtype)
    with torch.no_grad():
        for layer, rows in zip((model[0], model[2], model[4]), (theta, psi, phi[None]), strict=True):
            layer.bias.copy_(rows[:, 0])
            layer.weight.copy_(rows[:, 1:])
    return model


# --- initialisation ---------------------------------------------------------------------------------------------------

INITIALISATIONS: dict[str, Callable[[int], float]] = {
    "Var = 1/2D (factor 1/2)": lambda D: 0.5 / D,
    "PyTorch (Var = 1/3D)": lambda D: 1 / (3 * D),
    "Xavier (Var = 1/D)": lambda D: 1 / D,
    "He (Var = 2/D)": lambda D: 2 / D,
    "Var = 8/D (factor 2)": lambda D: 8 / D,
}
"""Variance of a weight by the width D of its layer. PyTorch draws uniformly from ±1/√D."""


class Growth(NamedTuple):
    """The ratio of the root mean squares at the two ends of a network: measured, and predicted by theory."""

    measured: float
    predicted: float


def he_factor(width: int, variance: float) -> float:
    """√(D Var[Ω] / 2): the factor by which a layer multiplies the size of activations, and of gradients going back.

    Each of the D terms of a sum contributes Var[Ω] times the square of an activation, and ReLU removes half of them.
    The factor is 1 for the variance 2/D (He et al., 2015).

    Args:
        width: D.
        variance: Var[Ω]; the weights have the mean 0.

    Raises:
        ValueError: `width` is not positive or `variance` is negative.

    Example:
        >>> he_factor(100, 8 / 100)
        2.0
    """
    if width < 1 or variance < 0:
        raise ValueError(f"he_factor: `width` must be positive and `variance` not negative, got {width} and {variance}")
    return math.sqrt(width * variance / 2)


def gradient_growth(depth: int, width: int, variance: float, *, batch: int = 16, seed: int = 0) -> Growth:
    """How ∂ℓ/∂f changes from the last layer to the first, in a random network: the chain rule's product of partials.

    The network has `depth` layers of `width` units, weights N(0, variance) and no biases; `trace` computes its backward
    pass in float64. The loss is linear, ℓ_i = y_iᵀ f, because the theory assumes that the gradient of the output is
    independent of the weights. The ratio of the root mean square of ∂ℓ/∂f_0 to that of ∂ℓ/∂f_{K−1} is a product of
    K − 1 factors: it explodes if most of them are above 1, and vanishes if most of them are below 1.

    Args:
        depth: K, the number of layers, at least 1.
        width: D.
        variance: Var[Ω].
        batch: the number of random examples.
        seed: the seed for weights, inputs and targets; torch's global generator is not used.

    Returns:
        The measured ratio, and the predicted one, `he_factor` to the power of K − 1.

    Raises:
        ValueError: `depth`, `width` or `batch` is not positive, or `variance` is negative.

    Example:
        >>> growth = gradient_growth(depth=21, width=64, variance=8 / 64)
        >>> growth.predicted == 2.0**20 and 0.5 < growth.measured / growth.predicted < 2
        True
    """
    if depth < 1 or batch < 1:
        raise ValueError(f"gradient_growth: `depth` and `batch` must be positive, got {depth} and {batch}")
    predicted = he_factor(width, variance) ** (depth - 1)
    generator = torch.Generator().manual_seed(seed)
    # Created on "meta", without initial weights: drawing them would advance torch's global generator.
    model = MLP([width] * (depth + 1), bias=False, device="meta", dtype=torch.float64).to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=math.sqrt(variance), generator=generator)
    x, y = (torch.randn(batch, width, dtype=torch.float64, generator=generator) for _ in range(2))
    dl_df = trace(model, x, y, loss=lambda output, target: (output * target).sum()).dl_df
    first, last = (df.square().mean().sqrt().item() for df in (dl_df[0], dl_df[-1]))
    return Growth(first / last, predicted)
