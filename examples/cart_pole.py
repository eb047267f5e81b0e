"""Learns to balance a pole by deep Q-learning, with `MLP.train_step`, and on request also in plain PyTorch.

    python examples/cart_pole.py                                       # torch_manualbp
    python examples/cart_pole.py --plain --output cart_pole.png        # and plain PyTorch beside it

The network estimates Q(s, a), the sum of discounted rewards after action a in state s. The reward is -1 when the pole
falls, and each step costs 0.01 for each metre to the middle. A training step moves the network towards the target of
double Q-learning (van Hasselt et al., 2016) on 64 remembered transitions (s, a, r, s'):

    y = r + γ Q'(s', argmax_a Q(s', a)), or r if the pole fell

where Q' is an older copy of the network. The target of the action that was not taken is its present estimate, so that
the loss is the mean squared error of the whole output.

Both loops start from the same weights and draw the same random numbers, and they alternate, so that other work on the
machine slows both alike. Rounding makes them choose different actions sooner or later; from then on they see different
states.
"""

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import torch_manualbp as mbp

try:
    from matplotlib import style
    from matplotlib.figure import Figure
except ImportError as error:
    sys.exit(f"{error}: this example needs the extra `demo`: pip install '.[demo]'")

SIZES = (4, 64, 64, 2)
CARTS = 8  # that move at the same time
CAPACITY = 20_000  # remembered transitions
WARM_UP = 1000  # transitions before the first training step
BATCH, UPDATES = 64, 2  # transitions of a training step; training steps per move of the carts
LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 10.0
DISCOUNT = 0.99  # γ
SYNC = 20  # training steps after which Q' becomes Q
LONGEST = 500  # moves of an episode
SLICE = 50  # moves of one loop before the other continues
REQUIRED_LENGTH = 400


class CartPoles:
    """Carts that each balance a pole (Barto, Sutton and Anderson, 1983).

    A state is position, velocity, angle and angular velocity. In observations, all four are about 1.
    """

    scale = np.array([1, 1, 10, 2], np.float32)

    def __init__(self, count: int, random: np.random.Generator) -> None:
        self.random = random
        self.states = random.uniform(-0.05, 0.05, (count, 4))
        self.age = np.zeros(count, int)

    @property
    def observations(self) -> NDArray[np.float32]:
        """What the network sees (carts, 4)."""
        return self.states.astype(np.float32) * self.scale

    def move(self, right: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]:
        """Pushes each cart for 0.02 s; returns the next observations, the rewards and which poles fell.

        Where a pole fell, or after 500 moves, another episode begins.
        """
        _, velocity, angle, rate = self.states.T
        sine, cosine = np.sin(angle), np.cos(angle)
        push = (np.where(right, 10.0, -10.0) + 0.05 * rate**2 * sine) / 1.1
        turn = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        self.states = self.states + 0.02 * np.stack([velocity, push - 0.05 * turn * cosine / 1.1, rate, turn], axis=1)
        self.age += 1
        observations = self.observations
        distance = abs(self.states[:, 0])
        fell = (distance > 2.4) | (abs(self.states[:, 2]) > 0.2095)
        over = fell | (self.age == LONGEST)
        self.states[over] = self.random.uniform(-0.05, 0.05, (over.sum(), 4))
        self.age[over] = 0
        return observations, -0.01 * distance - fell, fell


class Memory:
    """The latest transitions."""

    def __init__(self) -> None:
        self.columns = (
            torch.empty(CAPACITY, 4),  # observation
            torch.empty(CAPACITY, 1, dtype=torch.int64),  # action
            torch.empty(CAPACITY, 1),  # reward
            torch.empty(CAPACITY, 4),  # next observation
            torch.empty(CAPACITY, 1),  # whether the pole fell
        )
        self.seen = 0

    def add(self, *transitions: NDArray[Any]) -> None:
        """Replaces the oldest by those of all carts."""
        first = self.seen % CAPACITY
        for column, values in zip(self.columns, transitions, strict=True):
            column[first : first + CARTS] = torch.from_numpy(values).view(CARTS, -1)
        self.seen += CARTS

    def sample(self, generator: torch.Generator) -> list[Tensor]:
        """A random batch."""
        rows = torch.randint(min(self.seen, CAPACITY), (BATCH,), generator=generator)
        return [column[rows] for column in self.columns]


class Loop:
    """Q-learning in plain PyTorch."""

    name = "plain PyTorch"

    def __init__(self, model: nn.Sequential, moves: int, seed: int) -> None:
        self.model, self.all_moves = model, moves
        self.older = copy.deepcopy(model)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        self.random, self.generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        self.carts, self.memory = CartPoles(CARTS, self.random), Memory()
        self.moves = self.updates = 0
        self.seconds = self.update_seconds = 0.0
        self.lengths: list[tuple[int, int]] = []  # of each episode: moves before its end, and its own

    def update(self, before: Tensor, target: Tensor) -> None:
        """A training step."""
        self.optimizer.zero_grad()
        F.mse_loss(self.model(before), target).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()

    def run(self, moves: int) -> None:
        """Moves the carts and learns."""
        start = time.perf_counter()
        for _ in range(moves):
            self.move()
            for _ in range(UPDATES if self.memory.seen >= WARM_UP else 0):
                self.learn()
        self.seconds += time.perf_counter() - start

    def move(self) -> None:
        """A move of the carts, random with a probability that falls to 5 % in the first third, otherwise the best."""
        random = self.random.random((2, CARTS))
        explore = random[0] < max(0.05, 1 - 3 * self.moves / self.all_moves)
        before, lengths = self.carts.observations, self.carts.age + 1
        right = np.where(explore, random[1] < 0.5, choose(self.model, before))
        after, rewards, fell = self.carts.move(right)
        self.memory.add(before, right, rewards, after, fell)
        self.moves += 1
        self.lengths += [(self.moves, int(length)) for length in lengths[self.carts.age == 0]]

    def learn(self) -> None:
        """A training step on a random batch."""
        before, actions, rewards, after, fell = self.memory.sample(self.generator)
        with torch.no_grad():
            best = self.model(after).argmax(1, keepdim=True)
            values = rewards + DISCOUNT * (1 - fell) * self.older(after).gather(1, best)
            target = self.model(before).scatter(1, actions, values)
        start = time.perf_counter()
        self.update(before, target)
        self.update_seconds += time.perf_counter() - start
        self.updates += 1
        if self.updates % SYNC == 0:
            self.older.load_state_dict(self.model.state_dict())


class FusedLoop(Loop):
    """The same with torch_manualbp: another class of network, a fused optimizer, and one call per training step."""

    name = "torch_manualbp"

    def __init__(self, model: mbp.MLP, moves: int, seed: int) -> None:
        super().__init__(model, moves, seed)
        self.mlp = model
        mbp.fuse(self.optimizer)

    def update(self, before: Tensor, target: Tensor) -> None:
        """A training step."""
        self.mlp.train_step(before, target, self.optimizer, max_grad_norm=MAX_GRAD_NORM)


@torch.no_grad()
def choose(model: nn.Module, observations: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether the best action is a push to the right, for each cart."""
    values = model(torch.from_numpy(observations)).numpy()
    right: NDArray[np.bool_] = values[:, 1] > values[:, 0]
    return right


def evaluate(model: nn.Module) -> float:
    """The mean length of 100 episodes without random actions."""
    carts = CartPoles(100, np.random.default_rng(0))
    up, lengths = np.ones(100, bool), np.zeros(100)
    for _ in range(LONGEST):
        lengths += up
        up &= ~carts.move(choose(model, carts.observations))[2]
    return float(lengths.mean())


def report(loops: Sequence[Loop]) -> str:
    """What each loop learned, and how fast; and how the loops compare."""
    lines = [f"{'':16}{'pole is up':>14}{'training step':>18}{'training steps':>18}{'seconds':>10}"]
    for loop in loops:
        lines.append(
            f"{loop.name:16}{evaluate(loop.model):>8.1f} moves{loop.update_seconds / loop.updates * 1e6:>15.1f} µs"
            f"{loop.updates / loop.seconds:>16,.0f}/s{loop.seconds:>10.2f}"
        )
    if len(loops) == 2:
        ours, plain = loops
        equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours.lengths, plain.lengths, strict=False))
        lines += [
            f"time of {plain.name} / {ours.name}: training step {plain.update_seconds / ours.update_seconds:.2f}, "
            f"all {plain.seconds / ours.seconds:.2f}",
            f"the first {len(list(equal))} of {len(ours.lengths)} episodes are the same",
        ]
    return "\n".join(lines)


def recorded(loops: Sequence[Loop]) -> list[dict[str, Any]]:
    """What each loop has learned, for JSON: of each episode the moves before its end, and its own."""
    return [{"name": loop.name, "moves": loop.moves, "episodes": loop.lengths} for loop in loops]


@style.context("torch_manualbp.inspection.slides")
def draw(loops: Sequence[dict[str, Any]], seconds: Sequence[float] = ()) -> Figure:
    """The lengths of the episodes in training, against the moves and, if it is known, against the time of each loop.

    loops: what `recorded` returns.
    """
    figure = Figure(figsize=(13.33, 6) if seconds else (9, 5))
    left, *right = figure.subplots(1, 2 if seconds else 1, sharey=True, squeeze=False)[0]
    lines: list[dict[str, Any]] = [
        {"color": "#0072B2", "linewidth": 5, "alpha": 0.6},
        {"color": "black", "linewidth": 1.6, "linestyle": (0, (4, 2))},
    ]
    for k, (loop, line) in enumerate(zip(loops, lines, strict=False)):
        ends, lengths = np.array(loop["episodes"]).T
        means = [lengths[max(0, i - 19) : i + 1].mean() for i in range(len(lengths))]
        for axes in (left, *right):
            at = ends if axes is left else ends * seconds[k] / loop["moves"]
            axes.plot(at, lengths, ".", color=line["color"], alpha=0.3, markersize=5)
            axes.plot(at, means, label=loop["name"], **line)
    left.set_title("What is learned (line: mean of 20 episodes)")
    left.set_xlabel(f"moves of the {CARTS} carts")
    left.set_ylabel("moves until the pole falls")
    for axes in right:
        axes.set_title("How fast")
        axes.set_xlabel("time (s)")
    for axes in (left, *right):
        axes.set_xlim(left=0)
        axes.set_ylim(0, LONGEST * 1.05)
        axes.axhline(LONGEST, color="gray", linewidth=1, linestyle=":")
    left.legend(loc="lower right")
    return figure


def main() -> int:
    """Trains, prints the comparison, saves the figure; 1 if our network does not balance the pole."""
    parser = argparse.ArgumentParser(description="Learns to balance a pole by deep Q-learning.")
    parser.add_argument("--plain", action="store_true", help="also train in plain PyTorch, and compare")
    parser.add_argument("--moves", type=int, default=3000, help="of the carts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, enough for layers this small)")
    parser.add_argument("--output", type=Path, default=Path("cart_pole.png"), help="the figure (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the lengths of all episodes to this file")
    args = parser.parse_args()
    if args.moves * CARTS <= WARM_UP:
        parser.error(f"--moves must be more than {WARM_UP // CARTS}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    initial = mbp.MLP(SIZES)
    loops: list[Loop] = [FusedLoop(copy.deepcopy(initial), args.moves, args.seed)]
    if args.plain:
        loops.append(Loop(nn.Sequential(*copy.deepcopy(initial)), args.moves, args.seed))
    for start in range(0, args.moves, SLICE):
        for loop in loops:
            loop.run(min(SLICE, args.moves - start))

    sys.stdout.write(report(loops) + "\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(recorded(loops), [loop.seconds for loop in loops]).savefig(args.output)
    if args.json:
        args.json.write_text(json.dumps(recorded(loops)) + "\n")
    sys.stdout.write(f"figure: {args.output}\n")
    learned = evaluate(loops[0].model)
    if learned < REQUIRED_LENGTH:
        sys.stderr.write(f"the pole is up for {learned:.1f} moves, fewer than the required {REQUIRED_LENGTH}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
