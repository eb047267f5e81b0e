"""The figure of a `History`: losses over the epochs of training. matplotlib is imported when it is drawn."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torch_manualbp.training import History

MOST_POINTS = 2000  # of the curve of the steps; of more, means of neighbours are drawn


def plot_training(history: "History") -> "Figure":
    """One panel with the losses, and a second one with the learning rate if it changes.

    The loss of an epoch is drawn at its end, where the validation loss is measured.
    """
    from torch_manualbp.inspection._figure import BLUE, GRAY, ORANGE, slide_figure

    changes = len(set(history.learning_rate)) > 1 and None not in history.learning_rate
    with slide_figure(13.33 if changes else 10, 5.6) as figure:
        from matplotlib.ticker import MaxNLocator

        losses, *others = figure.subplots(1, 2 if changes else 1, squeeze=False)[0]
        steps, width = history.step_losses, -(-len(history.step_losses) // MOST_POINTS)
        means = [part.mean().item() for part in torch.split(steps, width)]
        middles = [
            (k * width + min((k + 1) * width, len(steps))) / 2 / history.steps_per_epoch for k in range(len(means))
        ]
        losses.plot(middles, means, color=BLUE, alpha=0.35, linewidth=1, label="training, steps")
        ends = range(1, len(history.loss) + 1)
        losses.plot(ends, history.loss, "o-", color=BLUE, label="training")
        if history.validation_loss:
            losses.plot(ends, history.validation_loss, "s-", color=ORANGE, label="validation")
        if (best := history.best_epoch) is not None:
            losses.axvline(best + 1, color=GRAY, linestyle="--", linewidth=1.5, label=f"best: epoch {best}")
        drawn = [value for value in (*means, *history.loss, *history.validation_loss) if abs(value) < float("inf")]
        if drawn and min(drawn) > 0 and max(drawn) > 10 * min(drawn):
            losses.set_yscale("log")
        losses.set_title("Loss")
        losses.legend()
        for axes in others:
            axes.step([0, *ends], [*history.learning_rate[:1], *history.learning_rate], color="black")
            axes.set_title("Learning rate")
        for axes in figure.axes:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("epochs done")
        figure.suptitle(history._summary(), fontsize=15, wrap=True)
    return figure
