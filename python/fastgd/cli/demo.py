"""Train a small network on handwritten digits, with NumPy for the network and fastgd for the steps."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

import fastgd
from fastgd import StepStats
from fastgd.cli.stop import Stop
from fastgd.dynamics import verdict

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Network = list[Array]  # weights and biases of the hidden layer, then of the output

EPOCHS = 30
BATCH = 32
HIDDEN = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options."""
    parser.add_argument(
        "--plot",
        metavar="PATH",
        default="fastgd-demo.png",
        help="where to save the loss curve; the norms go beside it, as fastgd-demo-norms.png",
    )
    parser.add_argument("--no-plot", action="store_const", const=None, dest="plot", help="save no plots")


def run(args: argparse.Namespace) -> int:
    """Show the smallest example, train on the digits, and train again on the twin: the same bits."""
    missing = [name for name in ("matplotlib", "sklearn", "tqdm") if find_spec(name) is None]
    if missing:
        raise Stop(f'the demo needs {" and ".join(missing)}: pip install "fastgd[demo]"')
    smallest_example()
    print()
    return 0 if digits(args.plot) else 1


def smallest_example() -> None:
    """One parameter, one step: the loss (w - 2)**2 pulls w from 5 towards 2."""
    w = np.array([5.0])
    gradient = 2 * (w - 2)
    fastgd.sgd_step(w, gradient, lr=0.1)

    print("The smallest example: w = 5, loss (w - 2)**2, learning rate 0.1, one step.")
    print(f"  gradient {gradient[0]}")
    print(f"  w        {w[0]}")


def digits(plot: str | None) -> bool:
    """Train on the digits with fastgd, then with its NumPy twin; True if both end with the same loss."""
    train, test = load_data()
    print(f"Handwritten digits: {len(train[1])} to learn from, {len(test[1])} held out; {EPOCHS} epochs of AdamW.")

    network, losses, stats, seconds = fit(*train, step=fastgd.adamw_step, title="training")
    print(f"accuracy: {accuracy(network, *test):.3f}")
    print(verdict(losses, stats))
    print()
    _, twin_losses, twin_stats, _ = fit(*train, step=fastgd.reference.adamw_step, title="the twin")
    same = losses == twin_losses and norms(stats) == norms(twin_stats)
    print(f"loss, fastgd:               {losses[-1]!r}")
    print(f"loss, the twin (NumPy):     {twin_losses[-1]!r}")
    print(
        "Equal to the last bit at every step, and so are all norms."
        if same
        else "NOT EQUAL: this is a bug, please report it."
    )
    print()

    print("Where the time went")
    total = sum(seconds.values())
    for part, spent in seconds.items():
        print(f"  {part:<9}{spent:7.3f} s {100 * spent / total:5.1f} %")

    if plot is not None:
        beside = Path(plot)
        beside = beside.with_name(f"{beside.stem}-norms{beside.suffix}")
        save_plot({"loss": losses}, "cross-entropy", plot)
        save_plot(norms(stats), "L2 norm", beside)
        print()
        print(f"The loss curve was saved to {plot}")
        print(f"The norms of gradient, update and parameters were saved to {beside}")
    return same


def load_data() -> tuple[tuple[Array, Labels], tuple[Array, Labels]]:
    """1797 images of 8 x 8 pixels, standardised, in two parts: to learn from and held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    images, labels = load_digits(return_X_y=True)
    images, held_out, labels, held_out_labels = train_test_split(
        images.astype(np.float32), labels, test_size=0.25, stratify=labels, random_state=0
    )
    scaler = StandardScaler().fit(images)
    return (scaler.transform(images), labels), (scaler.transform(held_out), held_out_labels)


def new_network(rng: np.random.Generator) -> Network:
    """64 pixels, one hidden layer of ReLUs, 10 classes (He initialisation)."""
    w1 = rng.standard_normal((64, HIDDEN), np.float32) * np.float32(np.sqrt(2 / 64))
    w2 = rng.standard_normal((HIDDEN, 10), np.float32) * np.float32(np.sqrt(2 / HIDDEN))
    return [w1, np.zeros(HIDDEN, np.float32), w2, np.zeros(10, np.float32)]


def forward(network: Network, images: Array) -> tuple[Array, Array]:
    """Return the hidden layer and the probability of each class."""
    w1, b1, w2, b2 = network
    hidden = np.maximum(images @ w1 + b1, 0)
    scores = hidden @ w2 + b2
    exps = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, exps / exps.sum(axis=1, keepdims=True)


def backward(network: Network, images: Array, labels: Labels, hidden: Array, probabilities: Array) -> Network:
    """Return the gradient of the mean cross-entropy, one array for each of the network's."""
    _, _, w2, _ = network
    d_scores = probabilities.copy()
    d_scores[np.arange(len(labels)), labels] -= 1
    d_scores /= len(labels)
    d_hidden = (d_scores @ w2.T) * (hidden > 0)
    return [images.T @ d_hidden, d_hidden.sum(axis=0), hidden.T @ d_scores, d_scores.sum(axis=0)]


def fit(
    images: Array, labels: Labels, step: Callable[..., Any], title: str
) -> tuple[Network, list[float], list[StepStats], dict[str, float]]:
    """Train a new network; return it, loss and stats of every step, and the seconds that each part of a step took."""
    from tqdm import tqdm

    gc.collect()  # or what the imports left behind is collected in the middle of a step, and counted with it
    rng = np.random.default_rng(0)
    network = new_network(rng)
    exp_avgs = [np.zeros_like(w) for w in network]
    exp_avg_sqs = [np.zeros_like(w) for w in network]
    losses = []
    stats = []
    clock = []

    for t, batch in enumerate(tqdm(batches(rng, len(labels)), title, unit="step", ncols=80), start=1):
        x, y = images[batch], labels[batch]
        begin = perf_counter()

        hidden, probabilities = forward(network, x)
        losses.append(-float(np.log(probabilities[np.arange(len(y)), y]).mean()))
        forward_done = perf_counter()

        grads = backward(network, x, y, hidden, probabilities)
        backward_done = perf_counter()

        told = step(network, grads, exp_avgs, exp_avg_sqs, step=t, lr=1e-3, stats=True, skip_nonfinite=True)
        stats.append(told)
        clock.append([begin, forward_done, backward_done, perf_counter()])

    seconds = np.diff(clock, axis=1).sum(axis=0)
    return network, losses, stats, dict(zip(("forward", "backward", "step"), seconds.tolist(), strict=True))


def batches(rng: np.random.Generator, count: int) -> list[npt.NDArray[np.intp]]:
    """Return the indices of every mini-batch of the run: each epoch is all examples, shuffled."""
    epochs = [rng.permutation(count) for _ in range(EPOCHS)]
    return [order[i : i + BATCH] for order in epochs for i in range(0, count, BATCH)]


def accuracy(network: Network, images: Array, labels: Labels) -> float:
    """Return the share of images whose most probable class is the right one."""
    _, probabilities = forward(network, images)
    return float((probabilities.argmax(axis=1) == labels).mean())


def norms(stats: Sequence[StepStats]) -> dict[str, list[float | None]]:
    """Return the three norms over the run."""
    return {
        "parameters": [s.param_norm for s in stats],
        "gradient": [s.grad_norm for s in stats],
        "update": [s.update_norm for s in stats],
    }


def save_plot(curves: Mapping[str, Sequence[float | None]], label: str, path: str | Path) -> None:
    """Save curves over the steps, each with its mean over an epoch, as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, values in curves.items():
        per_epoch = len(values) // EPOCHS
        means = np.reshape(np.array(values, float), (EPOCHS, per_epoch)).mean(axis=1)
        middles = (np.arange(EPOCHS) + 0.5) * per_epoch
        (line,) = axes.semilogy(values, linewidth=0.5, alpha=0.4)
        axes.semilogy(middles, means, color=line.get_color())
        axes.annotate(f" {name}", (len(values), means[-1]), color=line.get_color(), va="center", annotation_clip=False)
    axes.set_xlim(0, len(values))
    axes.set(xlabel="step; thick: mean over an epoch", ylabel=label, title="fastgd demo: handwritten digits, AdamW")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: an extension that matplotlib does not know
        raise Stop(f"cannot save the plot: {error}") from None
