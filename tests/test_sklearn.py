"""The estimators of `torch_manualbp.sklearn` give what scikit-learn's give, and pass scikit-learn's own tests."""

import copy
import doctest
import functools
import importlib.util
import pickle
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", minversion="1.4")

from scipy.sparse import csc_matrix, csr_matrix, issparse
from sklearn import neural_network
from sklearn.base import clone
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_iris,
    make_multilabel_classification,
    make_regression,
)
from sklearn.ensemble import BaggingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from torch_manualbp import sklearn as ours
from torch_manualbp.sklearn import MLPClassifier, MLPRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

ESTIMATORS = [MLPClassifier, MLPRegressor]


def scaled(X, y):
    return StandardScaler().fit_transform(X), y


DIGITS = scaled(*load_digits(return_X_y=True))
DATA = {  # rows, kind of outputs; the sizes leave a smaller last batch
    "classes": (MLPClassifier, *(part[:301] for part in DIGITS)),
    "two classes": (MLPClassifier, *(part[:150] for part in scaled(*load_breast_cancer(return_X_y=True)))),
    "labels": (MLPClassifier, *make_multilabel_classification(130, random_state=0)),
    "number": (MLPRegressor, *make_regression(90, 7, random_state=0)),
    "numbers": (MLPRegressor, *make_regression(90, 7, n_targets=3, random_state=0)),
}
SMALL = {"hidden_layer_sizes": (20, 10), "batch_size": 32, "max_iter": 4, "random_state": 3}


def both(data, **parameters):
    """scikit-learn's estimator and ours, fitted."""
    kind, X, y = DATA[data]
    parameters = SMALL | parameters
    return getattr(neural_network, kind.__name__)(**parameters).fit(X, y), kind(**parameters).fit(X, y)


def weights(estimator):
    return [*estimator.coefs_, *estimator.intercepts_]


def assert_close(want, got, tolerance):
    assert len(want) == len(got)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * np.abs(a).max())


def assert_same_weights(first, second):
    assert all(np.array_equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


# --- equal to scikit-learn --------------------------------------------------------------------------------------------

SGD = {
    "nesterov": {},
    "momentum": {"nesterovs_momentum": False},
    "no momentum": {"momentum": 0.0},
    "in order": {"shuffle": False},
    "one batch": {"batch_size": 1000},
    "strong decay": {"alpha": 3.0},
    "invscaling": {"learning_rate": "invscaling"},
    "adaptive": {"learning_rate": "adaptive", "tol": 1e9, "n_iter_no_change": 1, "max_iter": 8},
    "one layer": {"hidden_layer_sizes": ()},
}


@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.filterwarnings("ignore:Got `batch_size`:UserWarning")
def test_sgd_takes_the_steps_of_scikit_learn(data, options):
    rate = 1e-4 if data.startswith("number") else 0.02
    theirs, mine = both(data, solver="sgd", learning_rate_init=rate, **options)
    assert_close(weights(theirs), weights(mine), 1e-12)
    assert_close([theirs.loss_curve_], [mine.loss_curve_], 3e-2 if "alpha" in options else 1e-6)
    assert theirs._optimizer.learning_rate == mine._optimizer.learning_rate
    for name in ("n_iter_", "t_", "n_layers_", "n_outputs_", "out_activation_", "n_features_in_", "validation_scores_"):
        assert getattr(theirs, name) == getattr(mine, name)


@pytest.mark.parametrize("data", DATA)
def test_adam_takes_the_steps_of_scikit_learn_if_epsilon_is_small(data):
    theirs, mine = both(data, epsilon=1e-20, beta_1=0.8, beta_2=0.99)
    assert_close(weights(theirs), weights(mine), 1e-9)  # where α Ω is the whole gradient, its rounding is magnified
    assert_close([theirs.loss_curve_], [mine.loss_curve_], 1e-6)


@pytest.mark.parametrize("data", DATA)
def test_adam_with_the_default_epsilon_is_close(data):
    theirs, mine = both(data, max_iter=8)
    assert_close(weights(theirs), weights(mine), 5e-2)  # dead units differ, whose gradients are as small as epsilon
    assert_close([theirs.loss_curve_], [mine.loss_curve_], 1e-5)
    assert_close([theirs.predict(DATA[data][1])], [mine.predict(DATA[data][1])], 1e-3)


@pytest.mark.parametrize("data", DATA)
def test_adam_is_equal_in_batches_of_everything(data):
    # eps is that of the step in the middle of an epoch: here, of its only step.
    theirs, mine = both(data, batch_size=len(DATA[data][1]), epsilon=1e-3, max_iter=10)
    assert_close(weights(theirs), weights(mine), 1e-11)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("alpha", "batch_size"), [(0.0, 32), (10.0, 1000)])
@pytest.mark.filterwarnings("ignore:Got `batch_size`:UserWarning")
def test_the_loss_is_exact_without_decay_and_with_one_batch(data, alpha, batch_size):
    theirs, mine = both(data, solver="sgd", learning_rate_init=1e-4, alpha=alpha, batch_size=batch_size)
    assert_close([theirs.loss_curve_], [mine.loss_curve_], 1e-13)
    assert theirs.best_loss_ == pytest.approx(mine.best_loss_)


@pytest.mark.parametrize("data", DATA)
def test_early_stopping_holds_out_the_same_rows(data):
    options = {"early_stopping": True, "max_iter": 40, "solver": "sgd", "learning_rate_init": 1e-3}
    theirs, mine = both(data, n_iter_no_change=3, tol=1e-2, **options)
    assert theirs.n_iter_ == mine.n_iter_
    assert_close([theirs.validation_scores_], [mine.validation_scores_], 1e-10)
    assert_close([theirs.best_validation_score_], [mine.best_validation_score_], 1e-10)
    assert_close(weights(theirs), weights(mine), 1e-10)
    assert mine.best_loss_ is None


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("solver", ["sgd", "adam"])
def test_training_goes_on(data, solver):
    kind, X, y = DATA[data]
    parameters = SMALL | {"solver": solver, "learning_rate_init": 1e-3, "epsilon": 1e-20, "learning_rate": "invscaling"}
    theirs, mine = (each(**parameters) for each in (getattr(neural_network, kind.__name__), kind))
    classes = {} if kind is MLPRegressor else {"classes": range(y.shape[1]) if y.ndim == 2 else np.unique(y)}
    for estimator in (theirs, mine):
        for _ in range(3):
            estimator.partial_fit(X, y, **classes)
        estimator.set_params(warm_start=True)
        for _ in range(2):
            estimator.fit(X, y)
        estimator.partial_fit(X[::2], y[::2])
    assert_close(weights(theirs), weights(mine), 1e-9)
    assert (theirs.t_, len(theirs.loss_curve_)) == (mine.t_, len(mine.loss_curve_))


@pytest.mark.parametrize("data", DATA)
def test_single_precision_stays_single(data):
    kind, X, y = DATA[data]
    X = X.astype(np.float32)
    theirs, mine = (each(**SMALL).fit(X, y) for each in (getattr(neural_network, kind.__name__), kind))
    assert {array.dtype for array in weights(mine)} == {np.dtype(np.float32)}
    assert mine.predict(X).dtype == theirs.predict(X).dtype
    assert_close(weights(theirs), weights(mine), 5e-2)
    assert_close([theirs.loss_curve_], [mine.loss_curve_], 1e-4)


SCORED = {
    "iris": (MLPClassifier, *scaled(*load_iris(return_X_y=True))),
    "breast_cancer": (MLPClassifier, *scaled(*load_breast_cancer(return_X_y=True))),
    "digits": (MLPClassifier, *DIGITS),
    "diabetes": (MLPRegressor, *scaled(*load_diabetes(return_X_y=True))),
}


@pytest.mark.parametrize("data", SCORED)
def test_scores_are_those_of_scikit_learn(data):
    kind, X, y = SCORED[data]
    scores = [
        cross_val_score(each(hidden_layer_sizes=30, max_iter=25, learning_rate_init=0.01, random_state=0), X, y, cv=3)
        for each in (getattr(neural_network, kind.__name__), kind)
    ]
    np.testing.assert_allclose(*scores, atol=0.01)


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    return {data: both(data, solver="sgd", learning_rate_init=1e-3)[1] for data in DATA}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("weights_in", [np.float64, np.float32])
@pytest.mark.parametrize("input_in", [np.float64, np.float32, np.float16, np.int64])
def test_predictions_are_those_of_scikit_learn(data, weights_in, input_in, fitted):
    mine = copy.copy(fitted[data])
    mine.coefs_ = [coef.astype(weights_in) for coef in mine.coefs_]
    mine.intercepts_ = [intercept.astype(weights_in) for intercept in mine.intercepts_]
    theirs = getattr(neural_network, type(mine).__name__)()
    theirs.__dict__.update(mine.__dict__)
    X = (DATA[data][1] * 2).astype(input_in)
    for method in ("predict", "predict_proba", "predict_log_proba") if hasattr(mine, "predict_proba") else ("predict",):
        want, got = getattr(theirs, method)(X), getattr(mine, method)(X)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-10 if got.dtype == np.float64 else 2e-4, atol=1e-6)


def strided(X):
    return np.repeat(X, 2, axis=1)[:, ::2]


def read_only(X):
    X = X.copy()
    X.flags.writeable = False
    return X


def unaligned(X):
    records = np.zeros(X.shape, [("byte", "b"), ("number", X.dtype)])
    records["number"] = X
    return records["number"]


LAYOUTS = (np.asfortranarray, strided, read_only, unaligned, lambda X: X[::-1].copy()[::-1], csr_matrix, csc_matrix)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("data", ["classes", "number"])
def test_layouts_make_no_difference(data, layout, fitted):
    _, X, y = DATA[data]
    changed = layout(X)
    mine = clone(fitted[data]).fit(changed, y)
    assert_same_weights(mine, fitted[data])
    assert np.array_equal(mine.predict(changed), mine.predict(X))
    assert issparse(changed) or np.array_equal(changed, X)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("bytes_", [1, 3 * 32 * 64 * 8])  # a batch, three batches
def test_large_sparse_data_is_dense_only_in_pieces(shuffle, bytes_, monkeypatch):
    kind, X, y = DATA["classes"]
    want = kind(**SMALL, shuffle=shuffle).fit(X, y)
    monkeypatch.setattr(ours, "_SPARSE_BYTES", bytes_)
    sizes, toarray = [], csr_matrix.toarray

    def record(self):
        if self.shape[1] == X.shape[1]:  # not the encoded labels of scikit-learn
            sizes.append(self.shape[0])
        return toarray(self)

    monkeypatch.setattr(csr_matrix, "toarray", record)
    got = kind(**SMALL, shuffle=shuffle).fit(csr_matrix(X), y)
    assert_same_weights(want, got)
    assert max(sizes) == (32 if bytes_ == 1 else 96)
    sizes.clear()
    assert np.array_equal(want.predict_proba(X), got.predict_proba(csr_matrix(X)))
    assert max(sizes) == (1 if bytes_ == 1 else 96)


@pytest.mark.parametrize("data", DATA)
def test_a_prediction_does_not_depend_on_the_other_rows(data, fitted):
    X = DATA[data][1]
    method = getattr(fitted[data], "predict_proba", fitted[data].predict)
    assert np.array_equal(np.concatenate([method(X[row : row + 1]) for row in range(20)]), method(X)[:20])


@pytest.mark.parametrize("data", DATA)
def test_the_number_of_threads_changes_no_bit(data):
    kind, X, y = DATA[data]
    one = kind(**SMALL).fit(X, y)
    torch.set_num_threads(3)
    three = kind(**SMALL).fit(X, y)
    assert_same_weights(one, three)
    assert one.loss_curve_ == three.loss_curve_
    assert np.array_equal(one.predict(X), three.predict(X))


# --- a good citizen of scikit-learn -----------------------------------------------------------------------------------

CHECKED = {"hidden_layer_sizes": 16, "max_iter": 30, "learning_rate_init": 0.02}  # takes less time than the defaults


@parametrize_with_checks([kind(**CHECKED) for kind in ESTIMATORS])
def test_the_checks_of_scikit_learn_pass(estimator, check):
    check(estimator)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("solver", ["sgd", "adam"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda estimator: pickle.loads(pickle.dumps(estimator))])
def test_a_copy_goes_on_as_the_original(data, solver, copied):
    kind, X, y = DATA[data]
    original = kind(**SMALL, solver=solver, learning_rate_init=1e-3).fit(X, y)
    other = copied(original)
    assert np.array_equal(original.predict(X), other.predict(X))
    for _ in range(2):
        assert_same_weights(original.partial_fit(X, y), other.partial_fit(X, y))
    before = [array.copy() for array in weights(original)]
    other.partial_fit(X, y)
    assert all(map(np.array_equal, before, weights(original)))


def test_pipelines_searches_and_ensembles():
    X, y = load_iris(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), MLPClassifier(20, max_iter=30, learning_rate_init=0.03, random_state=0))
    search = GridSearchCV(pipeline, {"mlpclassifier__solver": ["sgd", "adam"]}, cv=3).fit(X, y)
    assert search.best_score_ > 0.9
    bagging = BaggingClassifier(search.best_estimator_, n_estimators=3, random_state=0).fit(X, y)
    assert bagging.score(X, y) > 0.9


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_signatures_are_those_of_scikit_learn(kind):
    theirs = getattr(neural_network, kind.__name__)
    assert isinstance(kind(), theirs)
    assert kind().get_params() == theirs().get_params()
    assert repr(kind(alpha=0.1)) == repr(theirs(alpha=0.1))


def test_verbose_prints_the_lines_of_scikit_learn(capsys):
    printed = []
    for options in ({"learning_rate": "adaptive"}, {}, {"early_stopping": True}):
        for kind in (neural_network.MLPClassifier, MLPClassifier):
            parameters = SMALL | {"max_iter": 60, "n_iter_no_change": 2, "tol": 10.0, "solver": "sgd", "alpha": 0.0}
            kind(**parameters, **options, verbose=True).fit(*DATA["classes"][1:])
            printed.append(capsys.readouterr().out)
        assert printed[-1] == printed[-2]
    assert "Setting learning rate to 0.000200" in printed[0]
    assert "Stopping." in printed[-1]


def test_warnings_are_those_of_scikit_learn():
    kind, X, y = DATA["number"]
    for each in (getattr(neural_network, kind.__name__), kind):
        with pytest.warns(
            ConvergenceWarning, match=r"Maximum iterations \(2\) reached and the optimization hasn't con"
        ):
            each(max_iter=2).fit(X, y)
        with pytest.warns(UserWarning, match=r"Got `batch_size` .* larger than sample size. It is going to be clipped"):
            each(max_iter=2, batch_size=1000).fit(X, y)


def test_an_interrupt_ends_training_between_two_steps(monkeypatch):
    kind, X, y = DATA["classes"]
    run, epochs = ours.Steps.run, []

    def interrupted(steps, X, y, order, batch_size, losses, first):
        epochs.extend([1] * (len(losses) == 1))  # the last batch of an epoch is smaller, a call of its own
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return run(steps, X, y, order, batch_size, losses, first)

    monkeypatch.setattr(ours.Steps, "run", interrupted)
    with pytest.warns(UserWarning, match="Training interrupted by user"):
        mine = kind(**SMALL).fit(X, y)
    assert mine.n_iter_ == 2
    assert len(mine.loss_curve_) == 2
    assert mine.predict(X).shape == y.shape


def test_the_random_numbers_of_torch_are_left_alone():
    before = torch.get_rng_state()
    MLPClassifier(**SMALL).fit(*DATA["classes"][1:])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_of_torch_make_no_difference(mode, fitted):
    _, X, y = DATA["classes"]
    with mode():
        mine = clone(fitted["classes"]).fit(X, y)
        assert np.array_equal(mine.predict_proba(X), fitted["classes"].predict_proba(X))
    assert_same_weights(mine.partial_fit(X, y), clone(fitted["classes"]).fit(X, y).partial_fit(X, y))


def test_weights_can_be_set():
    _, X, y = DATA["numbers"]
    theirs, mine = both("numbers", solver="sgd", learning_rate_init=1e-4)
    for estimator in (theirs, mine):
        estimator.coefs_[0] = np.full_like(estimator.coefs_[0], 0.1)  # another array
        estimator.intercepts_[1][:] = 0.3  # the same one
        estimator.partial_fit(X, y)
    assert_close(weights(theirs), weights(mine), 1e-12)


def test_the_docstrings_are_complete_and_right():
    done = doctest.testmod(ours)
    assert done.attempted > 0
    assert done.failed == 0
    for kind in ESTIMATORS:
        assert all(f"{section}:" in kind.__doc__ for section in ("Args", "Raises", "Example"))


# --- what is left out -------------------------------------------------------------------------------------------------

REFUSED = {
    "activation": ["identity", "logistic", "tanh"],
    "solver": ["lbfgs"],
    "loss": ["poisson"],
}


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.parametrize(("parameter", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]])
def test_what_is_left_out_names_the_alternative(kind, parameter, value):
    if parameter not in kind().get_params():
        pytest.skip("scikit-learn has no such parameter")
    message = f"{kind.__name__}: `{parameter}` must be .*, got '{value}'; use sklearn.neural_network.{kind.__name__}"
    with pytest.raises(ValueError, match=message):
        kind(**{parameter: value}).fit([[1.0], [2.0]], [0, 1])


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_weights_of_samples_are_left_out(kind):
    _, X, y = DATA["two classes"]
    with pytest.raises((ValueError, TypeError), match="sample_weight"):  # TypeError: scikit-learn before 1.7
        kind().fit(X, y, sample_weight=np.ones(len(y)))


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_errors_of_parameters_are_those_of_scikit_learn(kind):
    with pytest.raises(ValueError, match=f"The 'solver' parameter of {kind.__name__} must be a str among"):
        kind(solver="newton").fit([[1.0], [2.0]], [0, 1])


def load_copy(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_scikit_learn_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'torch_manualbp\[sklearn\]'"):
        load_copy(ours.__file__, "torch_manualbp._copy")


def test_an_unknown_scikit_learn_is_refused(monkeypatch):
    (base,) = (kind for kind in MLPClassifier.__mro__[2:] if "_fit_stochastic" in vars(kind))
    monkeypatch.delattr(base, "_fit_stochastic")
    with pytest.raises(ImportError, match="does not know scikit-learn"):
        load_copy(ours.__file__, "torch_manualbp._copy")


# --- scikit-learn's own tests of its MLP, with our classes in place of theirs -----------------------------------------

OWN_TESTS = Path(neural_network.__file__).parent / "tests" / "test_mlp.py"
# Those that need what is left out: of any parameter, or only if that parameter of the test has this value.
NEED = {
    "test_fit": "activation",
    "test_gradient": "activation",
    "test_lbfgs_classification": "activation",
    "test_lbfgs_classification_maxfun": "activation",
    "test_lbfgs_regression": "activation",
    "test_lbfgs_regression_maxfun": "activation",
    "test_mlp_diverging_loss": "activation",
    "test_mlp_sample_weight_with_early_stopping": "sample_weight",
    "test_mlp_vs_poisson_glm_equivalent": "activation",
    "test_mlp_warm_start_no_convergence[lbfgs]": "solver",
    "test_multilabel_classification": "activation",
    "test_multioutput_regression": "solver",
    "test_predict_proba_binary": "activation",
    "test_predict_proba_multilabel": "solver",
    "test_sparse_matrices": "solver",
    "test_warm_start": "solver",
}


def adapted(test):
    """The test; if it needs what is left out, a test that our error is raised."""

    @functools.wraps(test)
    def run(**arguments):
        variant = f"{test.__name__}[{arguments.get('solver')}]"
        parameter = NEED.get(test.__name__) or NEED.get(variant)
        if parameter is None:
            test(**arguments)
            return
        with pytest.raises((ValueError, pytest.fail.Exception)) as info:
            test(**arguments)
        errors = [info.value]
        while errors[-1].__context__ is not None:  # pytest.warns adds that there was no warning
            errors.append(errors[-1].__context__)
        assert any(re.search(f"`{parameter}` must be .* use sklearn.neural_network", str(error)) for error in errors)

    return run


def own_tests():
    """The tests in a class, so that their names do not get in the way of those above."""
    if not OWN_TESTS.exists():
        return {"test_none": staticmethod(lambda: pytest.skip("this scikit-learn is installed without its tests"))}
    with mock.patch.multiple(neural_network, MLPClassifier=MLPClassifier, MLPRegressor=MLPRegressor):
        module = load_copy(OWN_TESTS, "test_mlp_of_sklearn")
    return {name: staticmethod(adapted(test)) for name, test in vars(module).items() if name.startswith("test_")}


TestOfScikitLearn = type("TestOfScikitLearn", (), own_tests())


@pytest.fixture
def global_random_seed():
    return 42


def test_the_page_lists_the_tests_that_do_not_pass():
    page = (Path(__file__).parents[1] / "docs" / "howto" / "scikit_learn.md").read_text()
    assert set(re.findall(r"`(test_\w+(?:\[\w+\])?)`", page)) == set(NEED)
