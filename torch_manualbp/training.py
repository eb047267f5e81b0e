"""`train_step` trains any model by one step, `fit` for epochs of mini-batches; `History` is what `fit` returns.

Not here: the step itself (_steps.py), and the figure (inspection/training_plot.py).
"""

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from torch_manualbp._arithmetic import widest_dtype
from torch_manualbp._checks import LossName, Reduction, check_choice, check_module, check_tensor, name_call
from torch_manualbp._losses import IGNORE_INDEX, LOSSES, LossSpec, loss_spec
from torch_manualbp._steps import LossFunction, Steps, batch_of
from torch_manualbp.inspection._table import Table
from torch_manualbp.modules import FusedForward, loss_of, whole_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def train_step(
    model: nn.Module,
    input: Tensor,
    target: Tensor,
    optimizer: torch.optim.Optimizer,
    loss: LossName | LossFunction = "mse",
    reduction: Reduction = "mean",
    *,
    max_grad_norm: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """One step of training: forward, loss, backward and update. `MLP.train_step` is the same as a method.

    The parameters become what they are after

        optimizer.zero_grad()
        loss_function(model(input), target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()

    with the gradients of `MLP.loss_backward` if the model is an `MLP` or a fused Sequential and the loss has a name.
    The ``.grad`` of the parameters are neither read nor written, so that nothing has to be zeroed. Hooks, the hooks of
    the optimizer, frozen parameters and wrappers such as DistributedDataParallel have their usual effect. An optimizer
    that needs a closure, such as ``LBFGS``, gets one that computes the same loss and gradients each time.

    Args:
        model: any module. In what mode it is (``train()`` or ``eval()``) is left to you.
        input: of the model.
        target: of the loss.
        optimizer: a ``torch.optim.Optimizer``, or an object around one with ``step`` and ``param_groups``.
        loss: "mse", "cross_entropy" or "bce_with_logits", or a function of the output and the target that returns a
            scalar, such as ``nn.HuberLoss()``.
        reduction: of a named loss, "mean" or "sum".
        max_grad_norm: all gradients of the model are scaled so that their total norm is at most this.
        ignore_index: the class that "cross_entropy" leaves out.
        label_smoothing: of "cross_entropy", in [0, 1].
        dtype: ``torch.bfloat16`` computes the loss and its gradients as under ``torch.autocast``, in half of the memory
            (mixed precision). The parameters, their gradients and the state of the optimizer keep their dtype.

    Returns:
        The loss before the update, a detached scalar.

    Raises:
        TypeError: an argument is of another type.
        ValueError: unknown `loss` or `reduction`, `max_grad_norm` is not positive, `label_smoothing` is not in [0, 1],
            an option of the named losses is given for a function, or `dtype` is neither bfloat16 nor None.
        RuntimeError: as the model raises it if `input` does not fit; or `model` is a fused network inside
            DistributedDataParallel or the like, which combines the gradients of all processes: pass the wrapper.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> x = torch.randn(50, 4)
        >>> y = x.sum(1, keepdim=True)
        >>> losses = [train_step(model, x, y, optimizer).item() for _ in range(200)]
        >>> losses[0] > 2, losses[-1] < 0.1
        (True, True)
    """
    check_module("train_step", model)
    spec = _checked_loss("train_step", loss, reduction, ignore_index, label_smoothing)
    return Steps(model, optimizer, spec, max_grad_norm, "train_step", dtype).one(input, target)


class History:
    """What `fit` measured: losses, learning rates, and why training ended. Epochs and steps are counted from 0.

    Args:
        steps_per_epoch: the number of steps of an epoch.

    Raises:
        ValueError: from `plot`, if there has been no step.

    Example:
        >>> from torch_manualbp import MLP
        >>> _ = torch.manual_seed(0)
        >>> x, model = torch.rand(100, 2), MLP([2, 16, 1])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> history = fit(model, x, x.prod(1, keepdim=True), optimizer, epochs=3)
        >>> history
        History(epochs=3, loss=0.04589, best_epoch=2, stopped='epochs')
        >>> print(history)
        epoch     loss  learning rate
            0  0.06252            0.1
            1  0.05084            0.1
            2  0.04589            0.1
        3 epochs of 4 steps; the best was epoch 2
    """

    steps_per_epoch: int
    """Steps of an epoch."""
    loss: list[float]
    """The training loss of each finished epoch: the mean over its rows, of losses before the updates."""
    validation_loss: list[float]
    """The loss of the validation data after each epoch; empty without such data."""
    learning_rate: list[float | None]
    """The learning rate of each epoch, that of the optimizer's first group; None if it has none."""
    stopped: str | None
    """Why training ended: "epochs", all are done; "patience"; "callback"; "interrupt". None: it goes on."""
    restored: bool
    """Whether the model has the weights of `best_epoch` now, rather than those of the last step."""

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.loss, self.validation_loss, self.learning_rate = [], [], []
        self.stopped, self.restored = None, False
        self._step_losses = [torch.empty(0, dtype=torch.float64)]

    @property
    def step_losses(self) -> Tensor:
        """The loss of each step before its update (steps,), float64, also of an epoch that was not finished."""
        if len(self._step_losses) > 1:
            self._step_losses = [torch.cat(self._step_losses)]
        return self._step_losses[0]

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the smallest validation loss, or, without validation data, training loss; None if none has."""
        losses = self.validation_loss or self.loss
        return min((k for k, loss in enumerate(losses) if not math.isnan(loss)), key=losses.__getitem__, default=None)

    def _add(self, loss: float, validation_loss: float | None, learning_rate: float | None) -> None:
        """Appends an epoch."""
        self.loss.append(loss)
        self.learning_rate.append(learning_rate)
        if validation_loss is not None:
            self.validation_loss.append(validation_loss)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, strings and lists, for JSON or a table."""
        return {
            "steps_per_epoch": self.steps_per_epoch,
            "loss": list(self.loss),
            "validation_loss": list(self.validation_loss),
            "learning_rate": list(self.learning_rate),
            "step_losses": self.step_losses.tolist(),
            "best_epoch": self.best_epoch,
            "stopped": self.stopped,
            "restored": self.restored,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "History":
        """The history of which these are the values of `to_dict`."""
        history = cls(values["steps_per_epoch"])
        for name in ("loss", "validation_loss", "learning_rate"):
            getattr(history, name).extend(values[name])
        history._step_losses = [torch.tensor(values["step_losses"], dtype=torch.float64)]
        history.stopped, history.restored = values["stopped"], values["restored"]
        return history

    def plot(self) -> "Figure":
        """The losses over the epochs, those of the steps behind them, and the learning rate if it changes.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no step has been made.
        """
        from torch_manualbp.inspection.training_plot import plot_training

        if not len(self.step_losses):
            raise ValueError("History: no step has been made, so there is nothing to plot")
        return plot_training(self)

    def __repr__(self) -> str:
        losses = {"loss": self.loss, "validation_loss": self.validation_loss}
        last = [f", {name}={values[-1]:.4g}" for name, values in losses.items() if values]
        end = f"best_epoch={self.best_epoch}, stopped={self.stopped!r}"
        return f"History(epochs={len(self.loss)}{''.join(last)}, {end})"

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        epochs = range(len(self.loss))
        columns = {
            "epoch": list(map(str, epochs)),
            "loss": [f"{loss:.4g}" for loss in self.loss],
            "validation loss": [f"{loss:.4g}" for loss in self.validation_loss],
            "learning rate": ["" if rate is None else f"{rate:.4g}" for rate in self.learning_rate],
        }
        columns = {title: values for title, values in columns.items() if values}
        rows = list(zip(*columns.values(), strict=True))
        if len(rows) > _ROWS:
            rows[_ROWS // 2 : -_ROWS // 2] = [("…",) * len(columns)]
        return Table("", tuple(columns), rows, ">" * len(columns), [self._summary()])

    def _summary(self) -> str:
        epochs, steps = len(self.loss), len(self.step_losses)
        text = f"{_count(epochs, 'epoch')} of {_count(self.steps_per_epoch, 'step')}"
        if rest := steps - epochs * self.steps_per_epoch:
            text += f", and {_count(rest, 'step')} of the next"
        if self.stopped is not None:
            text += _REASONS[self.stopped]
        if self.restored:
            text += f"; the weights are those of epoch {self.best_epoch}, the best"
        elif self.best_epoch is not None:
            text += f"; the best was epoch {self.best_epoch}"
        return text


_ROWS = 10  # of a table; more epochs are shown in part
_REASONS = {
    "epochs": "",
    "patience": "; stopped as the loss no longer improved",
    "callback": "; stopped by the callback",
    "interrupt": "; interrupted",
}


def fit(
    model: nn.Module,
    input: Tensor,
    target: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    loss: LossName | LossFunction = "mse",
    epochs: int = 1,
    batch_size: int = 32,
    shuffle: bool = True,
    drop_last: bool = False,
    generator: torch.Generator | None = None,
    max_grad_norm: float | None = None,
    scheduler: Any = None,
    validation: Sequence[Tensor] | None = None,
    patience: int | None = None,
    progress: bool = False,
    callback: Callable[[History], Any] | None = None,
    dtype: torch.dtype | None = None,
) -> History:
    """Trains a model for epochs of mini-batches of rows.

    The parameters become those of this loop, bit for bit:

        for epoch in range(epochs):
            for rows in torch.randperm(len(input), generator=generator).split(batch_size):
                x, y = input[rows], target[rows]
                train_step(model, x, y, optimizer, loss, max_grad_norm=max_grad_norm)
            scheduler.step()

    The model is in train mode in the steps and in eval mode for the validation; afterwards each of its modules has the
    mode that it had before. ``.grad`` is not touched.

    Ctrl-C ends the training between two steps, at most 20 ms or one step later. The ``KeyboardInterrupt`` has the
    `History` so far as its attribute ``history``. A second Ctrl-C interrupts a step that takes too long.

    Args:
        model: any module.
        input: the training data, an example in each row (n, …), of any shape and dtype that the model takes.
        target: a row for each row of `input` (n, …), on the same device.
        optimizer: as in `train_step`.
        loss: as in `train_step`; the mean over a batch.
        epochs: how many times each row is used.
        batch_size: rows of a step.
        shuffle: whether each epoch takes the rows in a new random order.
        drop_last: leaves out the last rows of an epoch if they are fewer than `batch_size`.
        generator: of the random order; None is torch's default one.
        max_grad_norm: as in `train_step`.
        scheduler: its ``step()`` is called after each epoch. ``ReduceLROnPlateau`` gets the validation loss or, without
            validation data, the training loss.
        validation: (input, target) of which the loss is measured after each epoch, without gradients.
        patience: stops after this many epochs in a row in which the validation loss (without validation data, the
            training loss) was no smaller than the smallest so far. At the end of training, then or after the last
            epoch, the parameters and buffers of the best epoch are copied back into the model; the optimizer's state is
            not.
        progress: shows a tqdm bar.
        callback: is called with the `History` after each epoch; training ends if it returns True.
        dtype: of the steps, as in `train_step`; the validation is computed in the dtype of the parameters.

    Returns:
        A `History`, to be printed; ``.loss``, ``.step_losses``, ``.validation_loss``, ``.plot()``, ``.to_dict()``.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument has an impossible value, or `input` and `target` do not have the same number of rows.
        ImportError: `progress` without tqdm.
        RuntimeError: as in `train_step`.

    Example:
        >>> from torch_manualbp import MLP
        >>> _ = torch.manual_seed(0)
        >>> x = torch.rand(500, 2)
        >>> y = (x[:, 0] > x[:, 1]).long()
        >>> model = MLP([2, 16, 2])
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> history = fit(model, x, y, optimizer, loss="cross_entropy", epochs=20)
        >>> len(history.loss), len(history.step_losses), history.loss[-1] < 0.2
        (20, 320, True)
    """
    check_module("fit", model)
    spec = _checked_loss("fit", loss, "mean", IGNORE_INDEX, 0.0)
    steps = Steps(model, optimizer, spec, max_grad_norm, "fit", dtype)
    _check_rows("input", input, "target", target)
    _check_int("epochs", epochs, 0)
    _check_int("batch_size", batch_size, 1)
    _check_generator(generator)
    _check_options(scheduler, validation, patience, callback)
    count = len(input) // batch_size if drop_last else -(-len(input) // batch_size)
    if count == 0:
        raise ValueError(f"fit: `drop_last` leaves no step: {len(input)} rows are fewer than `batch_size`={batch_size}")

    input, target = input.detach(), target.detach()
    history = History(count)
    best = _Best(model)
    modes = [(module, module.training) for module in model.modules()]
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # nothing that outlives this call may become an inference tensor
            stack.enter_context(torch.inference_mode(False))
        bar = stack.enter_context(_progress_bar(epochs * count)) if progress else None
        try:
            for epoch in range(epochs):
                model.train()
                order = torch.randperm(len(input), generator=generator).to(input.device) if shuffle else None
                losses = _run_epoch(steps, (input, target, order, batch_size), history, bar)
                training_loss = _mean(losses, min(count * batch_size, len(input)), batch_size)
                validation_loss = None
                if validation is not None:
                    model.eval()
                    try:
                        validation_loss = _mean_loss(model, validation[0], validation[1], spec, batch_size)
                    except Exception as error:
                        name_call(error, "fit")
                        raise
                monitored = training_loss if validation_loss is None else validation_loss
                with uninterrupted():
                    history._add(training_loss, validation_loss, _learning_rate(optimizer))
                    if patience is not None:
                        best.see(epoch, monitored)
                if bar is not None:
                    shown = {"loss": training_loss, "validation": validation_loss}
                    bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items() if value is not None})
                if scheduler is not None:
                    scheduler.step(*[monitored] if isinstance(scheduler, ReduceLROnPlateau) else [])
                if callback is not None and callback(history) is True:
                    history.stopped = "callback"
                elif patience is not None and epoch - best.epoch >= patience:
                    history.stopped = "patience"
                if history.stopped is not None:
                    break
            else:
                history.stopped = "epochs"
            with uninterrupted():
                history.restored = best.restore()
        except KeyboardInterrupt as error:
            history.stopped = "interrupt"
            error.history = history  # type: ignore[attr-defined]
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(f"fit: {history._summary()}. The `history` of this exception has the losses so far.")
            raise
        finally:
            for module, training in modes:
                module.training = training
    return history


def _run_epoch(steps: Steps, data: tuple[Tensor, Tensor, Tensor | None, int], history: History, bar: Any) -> Tensor:
    """The steps of one epoch. Returns their losses, and appends them to the history even if they are interrupted."""
    device = data[0].device
    losses = torch.empty(history.steps_per_epoch, dtype=widest_dtype(device), device=device)
    done = 0
    try:
        while done < len(losses):
            before = done
            with uninterrupted():
                done = steps.run(*data, losses, before)
            if bar is not None:
                bar.update(done - before)
    finally:
        with uninterrupted():
            losses = losses[:done].to("cpu", torch.float64)
            history._step_losses.append(losses)
    return losses


def _mean_loss(
    model: nn.Module, input: Tensor, target: Tensor, loss: LossSpec | LossFunction, batch_size: int
) -> float:
    """The mean loss over all rows, without gradients, batch by batch."""
    fused = model if isinstance(model, FusedForward) and isinstance(loss, LossSpec) else None
    with torch.no_grad():
        if fused is not None and whole_network(fused, input) is not None:
            batch_size = max(batch_size, _ROWS_AT_ONCE)
        losses = torch.empty(-(-len(input) // batch_size), dtype=widest_dtype(input.device), device=input.device)
        for k in range(len(losses)):
            x, y = batch_of(input, None, batch_size, k), batch_of(target, None, batch_size, k)
            if isinstance(loss, LossSpec):
                losses[k] = loss.of(model(x), y) if fused is None else loss_of(fused, x, y, loss)
            else:
                losses[k] = loss(model(x), y)
    return _mean(losses, len(input), batch_size)


# Rows that our op for network and loss gets in one call. Its memory does not grow with them, only the time until it can
# be interrupted. Other models get as many as in training, when they need more memory for each.
_ROWS_AT_ONCE = 4096


def _mean(losses: Tensor, rows: int, batch_size: int) -> float:
    """The mean over rows of the mean losses of batches, of which the last may have fewer rows.

    Python adds in order. (The order in which torch adds depends on the number of threads.)
    """
    *full, last = losses.tolist()
    return float((batch_size * sum(full) + (rows - batch_size * len(full)) * last) / rows)


class _Best:
    """The parameters and buffers of the best epoch so far."""

    def __init__(self, model: nn.Module) -> None:
        self.epoch = -1  # before the first: the patience of NaN ends too
        self._model = model
        self._loss = math.inf
        self._copies: list[tuple[Tensor, Tensor]] = []

    def see(self, epoch: int, loss: float) -> None:
        """Copies the tensors of the model if this epoch is better than all before."""
        if loss < self._loss:
            self.epoch, self._loss = epoch, loss
            tensors = (*self._model.parameters(), *self._model.buffers())
            self._copies = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore(self) -> bool:
        """Copies them back. Returns whether there are any."""
        with torch.no_grad():
            for tensor, copy in self._copies:
                tensor.copy_(copy)
        return bool(self._copies)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays the first Ctrl-C to the end of the block; its handler would run, and raise, between any two instructions.

    Python runs it in the main thread only, and a program may have replaced it by none.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[Any] = []

    def delay(number: int, frame: Any) -> None:
        received.append(frame)
        if len(received) > 1:
            handler(number, frame)

    signal.signal(signal.SIGINT, delay)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        handler(signal.SIGINT, received[0])


def _progress_bar(steps: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("fit: `progress=True` needs tqdm: `pip install tqdm`") from error
    return tqdm(total=steps, unit="step", desc="fit")


def _learning_rate(optimizer: Any) -> float | None:
    rate = optimizer.param_groups[0].get("lr") if optimizer.param_groups else None
    return None if rate is None else float(rate)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# --- checks of arguments ----------------------------------------------------------------------------------------------


def _checked_loss(
    op: str, loss: Any, reduction: str, ignore_index: int, label_smoothing: float
) -> LossSpec | LossFunction:
    """The loss with its options; a function has none."""
    if isinstance(loss, str):
        check_choice(op, "loss", loss, LOSSES)
        return loss_spec(loss, reduction, ignore_index, label_smoothing)
    if not callable(loss):
        expected = f"one of {', '.join(map(repr, LOSSES))} or a function (output, target)"
        raise TypeError(f"{op}: `loss` must be {expected}, got {type(loss).__name__}")
    if (reduction, ignore_index, label_smoothing) != ("mean", IGNORE_INDEX, 0.0):
        raise ValueError(
            f"{op}: `reduction`, `ignore_index` and `label_smoothing` are options of the losses that have a name; "
            "give them to the function that is your `loss`"
        )
    function: LossFunction = loss
    return function


def _check_rows(name: str, input: Any, other: str, target: Any) -> None:
    """Raises unless both are tensors with equally many rows, and some."""
    for argument, value in ((name, input), (other, target)):
        check_tensor("fit", argument, value)
        if value.dim() == 0:
            raise ValueError(f"fit: `{argument}` must have rows, got a tensor of shape ()")
    if len(input) != len(target):
        raise ValueError(
            f"fit: `{name}` and `{other}` must have the same number of rows, "
            f"got shapes {tuple(input.shape)} and {tuple(target.shape)}"
        )
    if len(input) == 0:
        raise ValueError(f"fit: `{name}` must have at least one row, got shape {tuple(input.shape)}")
    if input.device != target.device:
        raise ValueError(
            f"fit: `{name}` and `{other}` must be on the same device, got {input.device} and {target.device}"
        )


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"fit: `{name}` must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"fit: `{name}` must be at least {least}, got {value}")


def _check_options(scheduler: Any, validation: Any, patience: Any, callback: Any) -> None:
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"fit: `scheduler` must have a method `step`, got {type(scheduler).__name__}")
    if validation is not None:
        if not isinstance(validation, (tuple, list)) or len(validation) != 2:
            raise TypeError(f"fit: `validation` must be a pair (input, target), got {type(validation).__name__}")
        _check_rows("validation[0]", validation[0], "validation[1]", validation[1])
    if patience is not None:
        _check_int("patience", patience, 1)
    if callback is not None and not callable(callback):
        raise TypeError(f"fit: `callback` must be a function of a History, got {type(callback).__name__}")


def _check_generator(generator: Any) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"fit: `generator` must be a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != (expected := torch.get_default_device().type):
        raise ValueError(
            f"fit: `generator` must be on {expected}, where torch.randperm makes the order of the rows, "
            f"got {generator.device.type}"
        )
