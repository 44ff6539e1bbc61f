"""Sums of squares as a fixed tree, which depends on an array's length alone: the bits of a norm are anyone's."""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK = 1024  # elements
LANES = 16  # lane j of a block adds its elements j, j + 16, j + 32, ...
GROUP = 256  # blocks: added in order, and then the groups


def sum_of_squares(x: Any) -> float:
    """The sum over all elements in C order, in float64."""
    wide = x.astype(np.float64).ravel()
    blocks = -(-wide.size // BLOCK)
    squares = np.zeros(blocks * BLOCK)  # what is missing in the last block adds nothing
    squares[: wide.size] = wide * wide
    rows = squares.reshape(blocks, BLOCK // LANES, LANES)

    lanes = np.zeros((blocks, LANES))
    for k in range(BLOCK // LANES):
        lanes = lanes + rows[:, k]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]

    sums = lanes.ravel().tolist()
    total = 0.0
    for start in range(0, blocks, GROUP):
        group = 0.0
        for block in sums[start : start + GROUP]:
            group += block
        total += group
    return total
