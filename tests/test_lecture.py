"""The lecture's statements in `torch_manualbp.lecture` hold; checked against autograd and the library."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import torch_manualbp as mbp
from torch_manualbp import lecture
from torch_manualbp.lecture import (
    INITIALISATIONS,
    LeastSquares,
    ToyNetwork,
    chain_rule,
    gradient_descent,
    gradient_growth,
    he_factor,
    jacobian,
    relu_backward,
    relu_jacobian,
    sgd,
    weight_gradient,
    written_out,
    written_out_mlp,
)

DOUBLE = torch.float64


def normal(*shape):
    return torch.randn(shape, dtype=DOUBLE)


# --- least squares and gradient descent -----------------------------------------------------------------------------


def test_partials_of_least_squares_are_those_of_autograd():
    line, phi = LeastSquares(normal(7), normal(7)), normal(2)
    torch.testing.assert_close(line.partials(phi), torch.autograd.functional.jacobian(line.losses, phi))
    torch.testing.assert_close(line.gradient(phi), torch.autograd.functional.jacobian(line.loss, phi))
    torch.testing.assert_close(line.losses(phi).sum(), line.loss(phi))


def test_the_gradient_is_zero_at_the_minimum_and_nowhere_is_less():
    line = LeastSquares(normal(7), normal(7))
    phi = line.minimum()
    assert line.gradient(phi).abs().max() < 1e-12
    for _ in range(10):
        assert line.loss(phi) < line.loss(phi + 0.1 * normal(2))


def test_gradient_descent_steps_and_converges():
    line = LeastSquares(normal(20), normal(20))
    path = gradient_descent(torch.zeros(2, dtype=DOUBLE), line.gradient, alpha=0.01, steps=500)
    assert len(path) == 501
    torch.testing.assert_close(path[1], path[0] - 0.01 * line.gradient(path[0]))
    torch.testing.assert_close(path[-1], line.minimum())
    losses = [line.loss(phi).item() for phi in path[:30]]
    assert losses == sorted(losses, reverse=True)


def test_sgd_steps_on_the_examples_of_each_batch():
    line = LeastSquares(normal(6), normal(6))
    batches = [torch.tensor([0, 3]), torch.tensor([5]), torch.arange(6)]
    path = sgd(torch.zeros(2, dtype=DOUBLE), lambda phi, i: line.partials(phi)[i], batches, alpha=0.1)
    for before, after, batch in zip(path, path[1:], batches, strict=False):
        part = LeastSquares(line.x[batch], line.y[batch])
        torch.testing.assert_close(after, before - 0.1 * part.gradient(before))
    assert len(path) == 4
    whole = gradient_descent(path[2], line.gradient, alpha=0.1)[-1]  # one batch with all examples
    torch.testing.assert_close(path[3], whole)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_learning_rate_must_be_positive(alpha):
    with pytest.raises(ValueError, match="`alpha` must be positive"):
        gradient_descent(torch.zeros(2), lambda phi: phi, alpha)
    with pytest.raises(ValueError, match="`alpha` must be positive"):
        sgd(torch.zeros(2), lambda phi, i: phi[None], [torch.tensor([0])], alpha)


@pytest.mark.parametrize(("x", "y"), [((3,), (4,)), ((3, 1), (3, 1)), ((), ())])
def test_least_squares_wants_two_vectors(x, y):
    with pytest.raises(ValueError, match="vectors of one length"):
        LeastSquares(torch.zeros(x), torch.zeros(y))


# --- the toy network ------------------------------------------------------------------------------------------------


def random_toy():
    return ToyNetwork(beta=torch.randn(4).tolist(), omega=torch.randn(4).tolist()), *torch.randn(2).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_toy_network_agrees_with_trace_and_autograd(seed):
    torch.manual_seed(seed)
    toy, x, y = random_toy()
    forward = toy.forward(x, y)
    backward = toy.backward(forward)
    t = mbp.trace(toy.mlp(), torch.tensor([[x]], dtype=DOUBLE), torch.tensor([[y]], dtype=DOUBLE))
    t.verify()
    close = {"rel": 1e-12, "abs": 1e-14}
    assert toy(x) == forward.f3
    assert [f.item() for f in t.f] == pytest.approx([forward.f0, forward.f1, forward.f2, forward.f3], **close)
    assert [h.item() for h in t.h] == pytest.approx([x, forward.h1, forward.h2, forward.h3], **close)
    assert t.loss.item() == pytest.approx(forward.loss, **close)
    dl_df = [backward.dl_df0, backward.dl_df1, backward.dl_df2, backward.dl_df3]
    assert [d.item() for d in t.dl_df] == pytest.approx(dl_df, **close)
    assert [d.item() for d in t.dl_dh[1:]] == pytest.approx(
        [backward.dl_dh1, backward.dl_dh2, backward.dl_dh3], **close
    )
    assert [d.item() for d in t.dl_domega] == pytest.approx(backward.dl_domega, **close)
    assert [d.item() for d in t.dl_dbeta] == pytest.approx(backward.dl_dbeta, **close)


def test_the_gradient_is_the_product_of_local_partials():
    toy = ToyNetwork(beta=(0.4, -0.3, 0.2, 1.0), omega=(1.5, 0.8, 1.2, -0.7))
    forward = toy.forward(0.9, 0.5)
    factors = toy.local_partials(forward)
    product = 1.0
    for factor in factors.values():
        product *= factor
    assert product == pytest.approx(toy.backward(forward).dl_df0)
    assert list(factors) == [
        "∂h_1/∂f_0", "∂f_1/∂h_1", "∂h_2/∂f_1", "∂f_2/∂h_2", "∂h_3/∂f_2", "∂f_3/∂h_3", "∂ℓ/∂f_3",
    ]  # fmt: skip


def test_a_unit_that_is_off_stops_the_gradient():
    toy = ToyNetwork(beta=(0.0, -5.0, 1.0, 1.0), omega=(1.0, 1.0, 1.0, 1.0))  # f_1 < 0
    backward = toy.backward(toy.forward(1.0, 0.0))
    assert backward.dl_df2 != 0
    assert (backward.dl_df1, backward.dl_df0, backward.dl_domega[:2]) == (0, 0, (0, 0))


def test_the_order_of_the_fields_is_that_of_the_computation():
    assert lecture.ToyForward._fields == ("x", "y", "f0", "h1", "f1", "h2", "f2", "h3", "f3", "loss")
    order = ("dl_df3", "dl_dh3", "dl_df2", "dl_dh2", "dl_df1", "dl_dh1", "dl_df0", "dl_domega", "dl_dbeta")
    assert lecture.ToyBackward._fields == order


def test_toy_network_has_four_layers():
    with pytest.raises(ValueError, match="`omega` must hold 4 numbers, got 3"):
        ToyNetwork(beta=(1, 1, 1, 1), omega=(1, 1, 1))


# --- matrix calculus ------------------------------------------------------------------------------------------------


def test_a_derivative_of_a_scalar_has_the_shape_of_the_variable():
    for shape in ((), (4,), (4, 3)):
        a = normal(*shape)
        derivative = jacobian(lambda a: (a**3).sum(), a)
        assert derivative.shape == shape
        torch.testing.assert_close(derivative, 3 * a**2)


def test_rows_are_variables_and_columns_are_functions():
    a = normal(4)

    def f(a):
        return torch.stack([a[0] * a[1], a[2] ** 2, a.sum()])

    derivative = jacobian(f, a)
    assert derivative.shape == (4, 3)
    want = [[a[1], 0, 1], [a[0], 0, 1], [0, 2 * a[2], 1], [0, 0, 1]]
    torch.testing.assert_close(derivative, torch.tensor(want, dtype=DOUBLE))
    torch.testing.assert_close(derivative, torch.func.jacrev(f)(a).T)


def test_linear_layer():
    omega, beta, h = normal(3, 4), normal(3), normal(4)
    assert torch.equal(jacobian(lambda h: beta + omega @ h, h), omega.T)
    assert torch.equal(jacobian(lambda beta: beta + omega @ h, beta), torch.eye(3, dtype=DOUBLE))
    by_omega = jacobian(lambda omega: beta + omega @ h, omega)  # ∂f_i/∂Ω_ij = h_j
    assert by_omega.shape == (3, 4, 3)
    torch.testing.assert_close(by_omega, torch.einsum("ik,j->ijk", torch.eye(3, dtype=DOUBLE), h))
    assert jacobian(lambda h3: 2.0 + 5.0 * h3, torch.tensor(1.0)) == 5.0  # ∂f_3/∂h_3 = ω_3


def test_relu_is_a_diagonal_matrix_or_a_pointwise_product():
    b, dl_da = torch.tensor([1.5, -2.0, 0.0, 3.0], dtype=DOUBLE), normal(4)
    assert torch.equal(relu_jacobian(b), torch.diag(torch.tensor([1.0, 0, 0, 1], dtype=DOUBLE)))
    assert torch.equal(relu_jacobian(b), jacobian(torch.relu, b))
    assert torch.equal(relu_jacobian(b) @ dl_da, relu_backward(b, dl_da))
    with pytest.raises(ValueError, match=r"`b` must be a vector, got shape \(2, 2\)"):
        relu_jacobian(torch.zeros(2, 2))


def test_chain_rule_reads_from_the_variable_outwards():
    omega, x = normal(3, 4), normal(4)

    def inner(x):
        return omega @ x

    def outer(f):
        return torch.relu(f) ** 2

    product = chain_rule(outer, inner, x)
    torch.testing.assert_close(product, jacobian(lambda x: outer(inner(x)), x))
    torch.testing.assert_close(product, jacobian(inner, x) @ jacobian(outer, inner(x)))
    matrix = normal(4, 2)
    torch.testing.assert_close(
        chain_rule(lambda f: f.sum(), torch.sin, matrix), jacobian(lambda m: torch.sin(m).sum(), matrix)
    )


def test_the_backward_pass_is_made_of_these_jacobians():
    """∂ℓ/∂f_0 = ∂h_1/∂f_0 ∂f_1/∂h_1 ∂h_2/∂f_1 ∂f_2/∂h_2 ∂ℓ/∂f_2, and ∂ℓ/∂Ω_k = ∂ℓ/∂f_k h_kᵀ, as in `trace`."""
    model = mbp.MLP([4, 5, 3, 2], dtype=DOUBLE)
    t = mbp.trace(model, normal(4), normal(2))
    omega = [layer.weight for layer in t.layers]
    f, h = [f[0] for f in t.f], [h[0] for h in t.h]
    dl_df1 = relu_jacobian(f[1]) @ omega[2].T @ t.dl_df[2][0]
    torch.testing.assert_close(t.dl_df[1][0], dl_df1)
    torch.testing.assert_close(t.dl_df[0][0], relu_jacobian(f[0]) @ omega[1].T @ dl_df1)
    for k in range(3):
        torch.testing.assert_close(t.dl_domega[k], weight_gradient(t.dl_df[k][0], h[k]))
        torch.testing.assert_close(t.dl_dbeta[k], t.dl_df[k][0])


def test_twice_the_activation_gives_a_weight_twice_the_effect():
    dl_df, h, omega = normal(3), normal(4), normal(3, 4)
    assert torch.equal(weight_gradient(dl_df, 2 * h), 2 * weight_gradient(dl_df, h))
    change = torch.zeros(3, 4, dtype=DOUBLE)
    change[1, 2] = 1e-3
    effect, doubled = ((omega + change) @ activation - omega @ activation for activation in (h, 2 * h))
    torch.testing.assert_close(doubled, 2 * effect)


# --- the network equation -------------------------------------------------------------------------------------------


def test_the_equation_written_out_is_the_network():
    theta, psi, phi, x = normal(3, 2), normal(3, 4), normal(4), normal(50)
    model = written_out_mlp(theta, psi, phi)
    torch.testing.assert_close(written_out(x, theta, psi, phi), model(x[:, None])[:, 0].detach())
    assert sum(parameter.numel() for parameter in model.parameters()) == 22
    parameters = [p.clone().requires_grad_() for p in (theta, psi, phi)]
    grads = torch.autograd.grad(written_out(x, *parameters).sum(), parameters)
    model(x[:, None]).sum().backward()
    for layer, grad in zip((model[0], model[2], model[4]), grads, strict=True):
        got = torch.cat([layer.bias.grad[:, None], layer.weight.grad], dim=1)
        torch.testing.assert_close(got, grad.view(got.shape))


# --- initialisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_gradients_grow_by_the_predicted_factor_per_layer(name):
    width = 200
    variance = INITIALISATIONS[name](width)
    for depth in (2, 10, 50):
        growth = gradient_growth(depth, width, variance)
        assert growth.predicted == pytest.approx(he_factor(width, variance) ** (depth - 1))
        assert (growth.measured / growth.predicted) ** (1 / (depth - 1)) == pytest.approx(1, abs=0.05)


def test_partials_above_two_explode_and_below_a_half_vanish():
    assert gradient_growth(50, 64, 8.5 / 64).measured > 1e12
    assert gradient_growth(50, 64, 0.4 / 64).measured < 1e-12
    assert 0.05 < gradient_growth(50, 64, 2 / 64).measured < 20
    assert he_factor(64, 2 / 64) == 1


def test_pytorch_initialises_as_said():
    weight = torch.nn.Linear(300, 300).weight
    assert weight.var().item() == pytest.approx(INITIALISATIONS["PyTorch (Var = 1/3D)"](300), rel=0.05)


def test_growth_is_reproducible_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    assert gradient_growth(5, 8, 0.2, seed=3) == gradient_growth(5, 8, 0.2, seed=3)
    assert gradient_growth(5, 8, 0.2, seed=3) != gradient_growth(5, 8, 0.2, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert gradient_growth(1, 8, 0.2) == (1.0, 1.0)


@pytest.mark.parametrize("bad", [{"depth": 0}, {"width": 0}, {"variance": -1.0}, {"batch": 0}])
def test_bad_networks(bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}`"):
        gradient_growth(**{"depth": 3, "width": 4, "variance": 0.5} | bad)


# --- the figure of three hidden layers --------------------------------------------------------------------------------


def test_the_diagram_of_three_hidden_layers(tmp_path, monkeypatch, capsys):
    script = Path(__file__).parent.parent / "examples" / "lecture_figures.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--output", str(tmp_path / "new" / "figure.png")])
    names = runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"figure: {tmp_path / 'new' / 'figure.png'}\n")
    trace = names["traced"]()
    assert [int((h > 0).sum()) for h in trace.h[1:]] == [2, 2, 2]  # as the comment on its seed says
    assert trace.verify() <= 1e-12
