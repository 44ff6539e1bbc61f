"""A training loop in torch, before and after: unscale, clip, step, zero and average as separate sweeps, then as one.

    python examples/torch_loop.py --epochs 10

The function `before` is what is replaced, `after` what replaces it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastgd.torch


def floats(model: nn.Module) -> list[torch.Tensor]:
    """What is averaged: parameters and buffers, but for BatchNorm's count of batches."""
    return [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]


def before(model: nn.Module, average: nn.Module, scaler: torch.amp.GradScaler) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)

    def update() -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(floats(average), floats(model), 0.01)

    return update


def after(model: nn.Module, average: nn.Module, scaler: torch.amp.GradScaler) -> Callable[[], None]:
    optimizer = fastgd.torch.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, max_norm=1.0, zero_grads=True)
    optimizer.track_ema(zip(floats(model), floats(average), strict=True), decay=0.99)

    def update() -> None:
        optimizer.step(scaler=scaler)
        scaler.update()

    return update


def train(how: Callable[..., Callable[[], None]], epochs: int) -> None:
    torch.manual_seed(0)
    images, digits = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float().reshape(-1, 1, 8, 8) / 16
    layers = [nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10))
    average = deepcopy(model)
    scaler = torch.amp.GradScaler("cpu")
    update, seconds, steps = how(model, average, scaler), 0.0, 0
    for _ in range(epochs):
        for batch in torch.randperm(1500).split(50):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images[batch]), digits[batch])
            scaler.scale(loss).backward()
            start = time.perf_counter()
            update()
            seconds, steps = seconds + time.perf_counter() - start, steps + 1
    right = (average.eval()(images[1500:]).argmax(1) == digits[1500:]).float().mean()
    print(f"{how.__name__}: {right:.1%} of the test digits right, {1e6 * seconds / steps:.0f} microseconds an update")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    train(before, epochs)
    train(after, epochs)
