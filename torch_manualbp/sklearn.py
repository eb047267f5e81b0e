"""scikit-learn's `MLPClassifier` and `MLPRegressor`, trained and evaluated by the kernels.

They derive from scikit-learn's classes, which check parameters and data, encode labels, draw the initial weights and
make predictions from outputs. What computes is replaced: `_fit_stochastic`, which trains, and `_forward_pass_fast`.
Everything else is scikit-learn's. Its `coefs_[k]` is Ω_kᵀ (D_k, D_{k+1}), while training a view of the network's Ω_k.
"""

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_manualbp._losses import loss_spec
from torch_manualbp._steps import Steps
from torch_manualbp.conversion import fuse
from torch_manualbp.functional import mlp
from torch_manualbp.modules import MLP
from torch_manualbp.training import uninterrupted

try:
    import sklearn
    from scipy.sparse import issparse
    from scipy.special import expit, softmax
    from sklearn import neural_network
    from sklearn.base import BaseEstimator, is_classifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split
except ImportError as error:
    raise ImportError("torch_manualbp.sklearn needs scikit-learn: pip install 'torch_manualbp[sklearn]'") from error
try:
    from sklearn.utils.validation import validate_data
except ImportError:  # scikit-learn before 1.6 has it as a method

    def validate_data(estimator: Any, X: Any, **options: Any) -> Any:
        """X, checked."""
        return estimator._validate_data(X, **options)


__all__ = ["MLPClassifier", "MLPRegressor"]

_NEEDED = ("_fit", "_fit_stochastic", "_forward_pass_fast", "_update_no_improvement_count")
if not all(hasattr(neural_network.MLPClassifier, name) for name in _NEEDED):  # it would train by itself, unnoticed
    raise ImportError(f"torch_manualbp.sklearn does not know scikit-learn {sklearn.__version__}: use 1.4 to 1.9")

_SPARSE_BYTES = 2**26  # a sparse input is made dense in pieces of at most about this size


class _Loss(NamedTuple):
    """How scikit-learn's loss of D outputs relates to torch's mean of the same terms."""

    name: str
    value: float
    """scikit-learn's loss as a multiple of torch's."""
    gradient: float
    """c, in the same way, of the gradient by which scikit-learn steps."""


def _loss(out_activation: str, D: int) -> _Loss:
    if out_activation == "identity":  # scikit-learn's ½(f − y)² is a mean over the outputs; its gradient is f − y
        return _Loss("mse", 0.5, D / 2)
    if out_activation == "logistic":  # a sum over the outputs
        return _Loss("bce_with_logits", D, D)
    return _Loss("cross_entropy", 1, 1)


class _Solver:
    """A solver's parameters and state: it lives as long as the estimator, for `partial_fit`, and is pickled with it.

    For n rows, scikit-learn's gradient of a weight is G = (Σ_i ∂ℓ_i/∂Ω + α Ω) / n, and torch's gradient of a mean is
    g = Σ_i ∂ℓ_i/∂Ω / (c n), so that G = c (g + weight_decay Ω) with weight_decay = α / (c n). The factor c remains.

    SGD: scikit-learn's velocity v ← μ v − lr G is −lr c times torch's buffer b ← μ b + G / c, Nesterov's step
    included. So torch's learning rate is lr c, and when lr changes, b is divided by the same factor to keep v.

    Adam: scikit-learn steps by −lr √(1 − β₂ᵗ)/(1 − β₁ᵗ) m/(√v + ε), torch by −lr/(1 − β₁ᵗ) m/(√(v/(1 − β₂ᵗ)) + eps).
    With moments of G / c instead of G these are equal for eps = ε / (c √(1 − β₂ᵗ)), which depends on the step t.
    """

    def __init__(self, estimator: Any) -> None:
        self.is_adam = estimator.solver == "adam"
        self.schedule = "constant" if self.is_adam else estimator.learning_rate
        self.learning_rate = self.initial = float(estimator.learning_rate_init)
        self.power_t = estimator.power_t
        self.momentum = estimator.momentum
        self.nesterov = estimator.nesterovs_momentum and self.momentum > 0
        self.betas = (estimator.beta_1, estimator.beta_2)
        self.epsilon = estimator.epsilon
        self.loss = _loss(estimator.out_activation_, estimator.n_outputs_)
        self.done = 0  # steps
        self.state: list[dict[str, Any]] = [{} for _ in (*estimator.coefs_, *estimator.intercepts_)]
        self._network: _Network | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_network": None}  # its weights are in the estimator, its optimizer's state is here

    def network(self, estimator: Any) -> "_Network":
        """The network to train, with the estimator's weights, which become views of the network's."""
        if self._network is None:
            self._network = _Network(self, estimator)
        self._network.take_weights(estimator)
        return self._network

    def optimizer(self, weights: list[Tensor], biases: list[Tensor]) -> torch.optim.Optimizer:
        """This solver by torch, fused, sharing its state; the weights are the first group."""
        groups: Any = [{"params": weights}, {"params": biases}]
        optimizer: torch.optim.Optimizer
        if self.is_adam:
            optimizer = torch.optim.Adam(groups, lr=self.learning_rate, betas=self.betas)
        else:
            optimizer = torch.optim.SGD(groups, momentum=self.momentum, nesterov=self.nesterov)
        for parameter, state in zip((*weights, *biases), self.state, strict=True):
            optimizer.state[parameter] = state
        return fuse(optimizer)

    def start_epoch(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Sets the options that change between epochs, before an epoch of this many steps."""
        for group in optimizer.param_groups:
            if self.is_adam:  # eps is that of the step in the middle; it matters only where √v is as small as ε
                t = self.done + (steps + 1) / 2
                group["eps"] = self.epsilon / (self.loss.gradient * (1 - self.betas[1] ** t) ** 0.5)
            else:
                group["lr"] = self.loss.gradient * self.learning_rate
        self.done += steps

    def end_epoch(self, t: int) -> None:
        """After an epoch, when t rows have been seen in all."""
        if self.schedule == "invscaling":
            self._set_rate(self.initial / (t + 1) ** self.power_t)

    def stops(self, message: str, verbose: bool) -> bool:
        """Whether training ends because it does not improve; otherwise the learning rate is lowered."""
        stops = self.schedule != "adaptive" or self.learning_rate <= 1e-6
        if not stops:
            self._set_rate(self.learning_rate / 5)
            message += f" Setting learning rate to {self.learning_rate:f}"
        else:
            message += " Stopping." if self.schedule != "adaptive" else " Learning rate too small. Stopping."
        if verbose:
            print(message)
        return stops

    def _set_rate(self, rate: float) -> None:
        for state in self.state:
            if (buffer := state.get("momentum_buffer")) is not None:
                buffer.mul_(self.learning_rate / rate)
        self.learning_rate = rate


class _Network:
    """A network of the estimator's sizes, and torch's optimizer for it with the state of the solver."""

    def __init__(self, solver: _Solver, estimator: Any) -> None:
        sizes = [len(estimator.coefs_[0]), *map(len, estimator.intercepts_)]
        dtype = torch.from_numpy(np.empty(0, estimator.coefs_[0].dtype)).dtype
        with torch.random.fork_rng(devices=[]):  # whose initial weights are not used
            model = MLP(sizes, dtype=dtype, device="cpu")
        layers: list[Any] = list(model)[::2]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        self.coefs = [weight.detach().numpy().T for weight in weights]
        self.intercepts = [bias.detach().numpy() for bias in biases]
        self.optimizer = solver.optimizer(weights, biases)
        spec = loss_spec(solver.loss.name, "mean", -100, 0.0)
        self.steps = Steps(model, self.optimizer, spec, None, type(estimator).__name__)

    def take_weights(self, estimator: Any) -> None:
        """Copies the weights of the estimator, unless they are this network's, to which they change."""
        ours, theirs = (*self.coefs, *self.intercepts), (*estimator.coefs_, *estimator.intercepts_)
        for mine, other in zip(ours, theirs, strict=True):
            if mine is not other:
                mine[...] = other
        estimator.coefs_, estimator.intercepts_ = list(self.coefs), list(self.intercepts)


class _Training:
    """Epochs on one set of data.

    Args:
        estimator: with a `_Solver` as its `_optimizer`.
        X: (rows, features), an array or sparse.
        y: (rows, D), encoded by the estimator.
        batch_size: of all batches of an epoch but the last, which has the rows that are left.
    """

    def __init__(self, estimator: Any, X: Any, y: Any, batch_size: int) -> None:
        self.solver: _Solver = estimator._optimizer
        self.network = self.solver.network(estimator)
        dtype, X = self.network.coefs[0].dtype, _dense_if_small(X)
        self.X: Any = X.astype(dtype, copy=False) if issparse(X) else _tensor(np.ascontiguousarray(X, dtype))
        self.y = _tensor(y.argmax(1) if estimator.out_activation_ == "softmax" else np.ascontiguousarray(y, dtype))
        self.rows, self.batch_size, self.alpha = X.shape[0], batch_size, estimator.alpha
        self.squares = self._squares()

    def epoch(self, order: Any) -> float:
        """Trains on the rows in this order (None: as they are), and returns scikit-learn's loss, a mean over them.

        The term of α in the loss of a batch is ½ α ‖Ω‖² / n, with the Ω before the step. ‖Ω‖² is computed between
        epochs only, and taken to change by the same amount at each step.
        """
        steps, total, whole = -(-self.rows // self.batch_size), 0.0, self.rows - self.rows % self.batch_size
        self.solver.start_epoch(self.network.optimizer, steps)
        loss, decayed = self.solver.loss, self.network.optimizer.param_groups[0]
        for first, last, size in ((0, whole, self.batch_size), (whole, self.rows, self.rows - whole)):
            if not size:
                continue
            decayed["weight_decay"] = self.alpha / (loss.gradient * size)
            for piece in _pieces(self.X, first, last, size):
                losses = self._run(piece if order is None else order[piece], size)
                total += loss.value * size * float(losses.sum())
        before, self.squares = self.squares, self._squares()
        squares = steps * before + (steps - 1) / 2 * (self.squares - before)  # summed over the batches
        return float((total + 0.5 * self.alpha * squares) / self.rows)

    def _run(self, rows: Any, size: int) -> Any:
        """Steps on batches of these rows, a slice or indices, all of the same size. Returns torch's loss of each."""
        order = None
        if issparse(self.X):
            X, y = torch.from_numpy(self.X[rows].toarray()), self.y[rows]
        elif isinstance(rows, slice):
            X, y = self.X[rows], self.y[rows]
        else:
            X, y, order = self.X, self.y, torch.from_numpy(rows)
        losses = torch.empty((len(y) if order is None else len(order)) // size, dtype=torch.float64, device="cpu")
        step = 0
        while step < len(losses):  # it returns from time to time, so that Ctrl-C ends training after a whole step
            with uninterrupted():
                step = self.network.steps.run(X, y, order, size, losses, step)
        return losses.numpy()

    def _squares(self) -> float:
        """‖Ω‖² of all weights."""
        return float(sum(np.square(coef).sum(dtype=np.float64) for coef in self.network.coefs)) if self.alpha else 0.0


def _tensor(array: Any) -> Tensor:
    """The array as a tensor, without a copy unless torch needs one: it wants writable memory and positive strides."""
    array = np.require(array, requirements=["ALIGNED", "WRITEABLE"])
    return torch.from_numpy(array.copy() if min(array.strides) < 0 else array)


def _dense_if_small(X: Any) -> Any:
    """X, as an array unless this would take much memory; then as a sparse one whose rows are quickly found."""
    if not issparse(X):
        return X
    return X.toarray() if X.shape[0] * X.shape[1] * X.dtype.itemsize <= _SPARSE_BYTES else X.tocsr()


def _pieces(X: Any, first: int, last: int, batch_size: int = 1) -> Iterator[slice]:
    """The rows [first, last) of X in one piece, or, if X is sparse, whole batches of which a dense copy can be made."""
    length = max(last - first, 1)
    if issparse(X):
        length = max(_SPARSE_BYTES // (batch_size * X.shape[1] * X.dtype.itemsize), 1) * batch_size
    for start in range(first, last, length):
        yield slice(start, min(start + length, last))


class _ByKernels(BaseEstimator):
    """Replaces what computes in scikit-learn's classes."""

    _offered: ClassVar = {"activation": ["relu"], "solver": ["adam", "sgd"]}  # of what scikit-learn knows
    _no_improvement_count: int  # consecutive epochs, counted by `_update_no_improvement_count`

    def fit(self, X: Any, y: Any, **options: Any) -> Any:
        """Trains on X (rows, features) and y (rows,) or (rows, outputs): see scikit-learn's ``fit``.

        Raises:
            ValueError: a parameter or the data is wrong, or this class does not offer what a parameter asks for.
        """
        # `sample_weight` is not in the signature, so that ensembles and searches see that it is not supported.
        return super().fit(X, y, **options)

    def _fit(self, X: Any, y: Any, **options: Any) -> Any:
        name = type(self).__name__
        alternative = f"use sklearn.neural_network.{name}"
        for parameter, offered in self._offered.items():
            if (value := getattr(self, parameter)) not in offered:
                choices = " or ".join(map(repr, offered))
                raise ValueError(f"{name}: `{parameter}` must be {choices}, got {value!r}; {alternative} for others")
        if options.get("sample_weight") is not None:
            raise ValueError(f"{name}: `sample_weight` must be None; {alternative} for weights of samples")
        with torch.inference_mode(False):  # parameters and moments must not be inference tensors
            return super()._fit(X, y, **options)

    def _fit_stochastic(self, X: Any, y: Any, *arguments: Any) -> None:
        # The last six arguments are the same in all versions. Before them is sample_weight, None here, since 1.7.
        sample_weight, incremental = arguments[:-6], arguments[-1]
        if incremental and self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True")
        if not incremental or not hasattr(self, "_optimizer"):
            self._optimizer = _Solver(self)
        held_out: Any = None, None
        if self.early_stopping:
            X, y, *held_out = self._hold_out(X, y)
        rows = X.shape[0]
        batch_size = 200 if self.batch_size == "auto" else int(self.batch_size)
        if batch_size > rows and self.batch_size != "auto":
            warnings.warn(
                "Got `batch_size` less than 1 or larger than sample size. It is going to be clipped", stacklevel=2
            )
        training = _Training(self, X, y, min(batch_size, rows))
        order = np.arange(rows) if self.shuffle else None
        try:
            self.n_iter_ = 0
            for _ in range(self.max_iter):
                if order is not None:
                    order = order[self._random_state.permutation(rows)]  # as sklearn.utils.shuffle does
                self.loss_ = training.epoch(order)
                self.n_iter_ += 1
                self.t_ += rows
                self.loss_curve_.append(self.loss_)
                if self.verbose:
                    print(f"Iteration {self.n_iter_}, loss = {self.loss_:.8f}")
                self._update_no_improvement_count(self.early_stopping, *held_out, *sample_weight)
                self._optimizer.end_epoch(self.t_)
                if self._no_improvement_count > self.n_iter_no_change:
                    if self._optimizer.stops(self._why_to_stop(), self.verbose):
                        break
                    self._no_improvement_count = 0
                if incremental:
                    break
            else:
                warnings.warn(
                    f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and the optimization hasn't "
                    "converged yet.",
                    ConvergenceWarning,
                    stacklevel=2,
                )
        except KeyboardInterrupt:
            warnings.warn("Training interrupted by user.", stacklevel=2)
        if self.early_stopping:
            self.coefs_, self.intercepts_ = self._best_coefs, self._best_intercepts

    def _hold_out(self, X: Any, y: Any) -> tuple[Any, Any, Any, Any]:
        """X and y to train on, then X and y to validate on, as `_score` takes them."""
        stratify = y if is_classifier(self) and self.n_outputs_ == 1 else None
        X, X_val, y, y_val = train_test_split(
            X, y, random_state=self._random_state, test_size=self.validation_fraction, stratify=stratify
        )
        if X_val.shape[0] < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of your dataset."
            )
        return X, y, X_val, self._label_binarizer.inverse_transform(y_val) if is_classifier(self) else y_val

    def _why_to_stop(self) -> str:
        what = "Validation score" if self.early_stopping else "Training loss"
        return f"{what} did not improve more than tol={self.tol:f} for {self.n_iter_no_change} consecutive epochs."

    def _forward_pass_fast(self, X: Any, check_input: bool = True) -> Any:
        """The outputs (rows, D), after the output activation."""
        if check_input:
            X = validate_data(self, X, accept_sparse=["csr", "csc"], reset=False)
        dtype = np.result_type(X.dtype, self.coefs_[0].dtype)  # what a product of numpy has
        X = X.astype(dtype if dtype == np.float32 else np.float64, copy=False)
        weights = [_tensor(coef.astype(X.dtype, copy=False)).T for coef in self.coefs_]
        biases = [_tensor(intercept.astype(X.dtype, copy=False)) for intercept in self.intercepts_]
        X = _dense_if_small(X)
        outputs = []
        for rows in _pieces(X, 0, X.shape[0]):
            piece = X[rows].toarray() if issparse(X) else X
            with torch.no_grad():
                outputs.append(mlp(_tensor(piece), weights, biases))
        output: Any = torch.cat(outputs).numpy()
        if self.out_activation_ == "softmax":
            return softmax(output, axis=1)
        return expit(output) if self.out_activation_ == "logistic" else output


class MLPClassifier(_ByKernels, neural_network.MLPClassifier):
    """``sklearn.neural_network.MLPClassifier`` by the kernels: the same parameters, attributes, methods and results.

    Binary, multi-class and multi-label; float32 and float64, dense or sparse. The same `random_state` gives the same
    initial weights and the same batches as in scikit-learn.

    Args:
        **parameters: those of scikit-learn's class, with its defaults; `activation` must be "relu", and `solver` "adam"
            or "sgd".

    Raises:
        ValueError: in ``fit`` and ``partial_fit``, if a parameter is wrong or asks for what is left out: other
            activations, the solver "lbfgs", `sample_weight`. The message names scikit-learn's class, which has it.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = MLPClassifier(20, learning_rate_init=0.01, random_state=0).fit(X, y)
        >>> model.predict(X[:2]), [coef.shape for coef in model.coefs_]
        (array([0, 0]), [(4, 20), (20, 3)])
    """


class MLPRegressor(_ByKernels, neural_network.MLPRegressor):
    """``sklearn.neural_network.MLPRegressor`` by the kernels: the same parameters, attributes, methods and results.

    One output or several; float32 and float64, dense or sparse. The same `random_state` gives the same initial weights
    and the same batches as in scikit-learn.

    Args:
        **parameters: those of scikit-learn's class, with its defaults; `activation` must be "relu", `solver` "adam" or
            "sgd", and `loss` "squared_error".

    Raises:
        ValueError: in ``fit`` and ``partial_fit``, if a parameter is wrong or asks for what is left out: other
            activations, the solver "lbfgs", the loss "poisson", `sample_weight`. The message names scikit-learn's
            class, which has it.

    Example:
        >>> from sklearn.datasets import make_regression
        >>> X, y = make_regression(100, 5, random_state=0)
        >>> model = MLPRegressor(solver="sgd", max_iter=500, random_state=0).fit(X, y)
        >>> bool(model.score(X, y) > 0.99)
        True
    """

    _offered: ClassVar = {**_ByKernels._offered, "loss": ["squared_error"]}
