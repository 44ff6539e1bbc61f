"""Ultralytics' ``optimizer_step`` in a real training of YOLO26n, its own and fastgd's by turns."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastgd.cli.bench.measure import OURS

THEIRS = "Ultralytics"
_BATCHES = 8  # an epoch


def optimizer_steps(optimizer: str, steps: int = 64, imgsz: int = 320, batch: int = 4) -> dict[str, list[float]]:
    """Train YOLO26n from its YAML on generated images and time every ``optimizer_step``.

    Every other step is Ultralytics' own with torch's optimizer, the others are fastgd's, each with an optimizer of its
    own on the same parameters, averages and gradients of the same run: so whatever disturbs one disturbs the other.

    Parameters
    ----------
    optimizer : str
        As Ultralytics has it: SGD, Adam, AdamW, RMSprop.
    steps : int
        How many of each, after two epochs that are not counted.
    imgsz, batch : int
        Of the images, and how many in a batch.

    Returns
    -------
    dict
        The seconds of each step, of "Ultralytics" and of "fastgd".
    """
    times: dict[str, list[float]] = {THEIRS: [], OURS: []}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yolo = _offline(Path(folder))("yolo26n.yaml")
        yolo.add_callback("on_train_start", lambda trainer: _by_turns(trainer, times))
        yolo.train(
            data=str(_images(Path(folder) / "data", _BATCHES * batch, imgsz)),
            project=folder,
            imgsz=imgsz,
            batch=batch,
            nbs=batch,
            epochs=2 + -(-2 * steps // _BATCHES),
            optimizer=optimizer,
            lr0=1e-4,
            device="cpu",
            workers=0,
            **dict.fromkeys(("amp", "nms", "plots", "save", "val", "verbose"), False),
        )
    return {name: seconds[_BATCHES:] for name, seconds in times.items()}


def _by_turns(trainer: Any, times: dict[str, list[float]]) -> None:
    """Have the trainer step by its own means and by ours, by turns, and note what each takes."""
    from fastgd.ultralytics import accelerate

    fast = copy.copy(trainer)  # of which ``accelerate`` replaces the optimizer and the step; all else is shared
    fast.scheduler = copy.copy(trainer.scheduler)
    accelerate(fast)
    own: Callable[[], None] = trainer.optimizer_step
    turns = {THEIRS: own, OURS: fast.optimizer_step}

    def optimizer_step() -> None:
        name = min(turns, key=lambda name: len(times[name]))
        # The warmup and the scheduler write into the groups of the trainer's.
        for group, written in zip(fast.optimizer.param_groups, trainer.optimizer.param_groups, strict=True):
            group.update({key: written[key] for key in ("lr", "momentum") if key in written})
        start = time.perf_counter()
        turns[name]()
        times[name].append(time.perf_counter() - start)

    trainer.optimizer_step = optimizer_step


def _offline(folder: Path) -> Any:
    """Ultralytics' class YOLO, imported so that it asks nothing of a network and writes into the folder only."""
    os.environ |= {"YOLO_CONFIG_DIR": str(folder), "YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0", "YOLO_VERBOSE": "0"}
    import torch

    try:
        import torchvision
    except RuntimeError:  # its wheel has no operators for this torch, and its import wants two of them
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.operators = operators  # which last as long as this is referred to
    import matplotlib
    from ultralytics import YOLO
    from ultralytics.utils import USER_CONFIG_DIR

    font = Path(USER_CONFIG_DIR) / "Arial.ttf"  # else it would download one
    if not font.exists():
        font.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", font)
    return YOLO


def _images(folder: Path, count: int, size: int) -> Path:
    """Bright rectangles on noise, and the YAML of the data set."""
    import cv2

    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        image = rng.integers(0, 80, (size, size, 3), np.uint8)
        w, h = rng.integers(size // 5, size // 2, 2)
        x, y = rng.integers(0, size - w), rng.integers(0, size - h)
        image[y : y + h, x : x + w] = (60, 200, 250)
        cv2.imwrite(str(folder / "images" / f"{i}.png"), image)
        label = f"0 {(x + w / 2) / size} {(y + h / 2) / size} {w / size} {h / size}\n"
        (folder / "labels" / f"{i}.txt").write_text(label, "utf-8")
    data = folder / "data.yaml"
    data.write_text(f"path: {folder.as_posix()}\ntrain: images\nval: images\nnames: [rectangle]\n", "utf-8")
    return data
