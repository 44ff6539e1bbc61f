"""Ultralytics without a network: what its import wants, generated images, a training of some seconds."""

import contextlib
import importlib
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch

QUICK = {"imgsz": 64, "batch": 4, "nbs": 4, "epochs": 2, "warmup_epochs": 1.0, "lr0": 1e-4, "warmup_bias_lr": 0.01}
# nms=False: validation by the head that needs no operator of torchvision's. amp=False: its check downloads a model.
QUIET = {"device": "cpu", "workers": 0, "amp": False, "nms": False, "plots": False, "verbose": False}


def load(folder, monkeypatch):
    """Import Ultralytics, with its settings and its font in `folder`."""
    for name, value in {"CONFIG_DIR": str(folder), "OFFLINE": "1", "AUTOINSTALL": "0", "VERBOSE": "0"}.items():
        monkeypatch.setenv(f"YOLO_{name}", value)
    printing = np.get_printoptions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it draws on
        _load_torchvision()
        ultralytics = importlib.import_module("ultralytics")
        utils = importlib.import_module("ultralytics.utils")
        fonts = Path(importlib.import_module("matplotlib").get_data_path()) / "fonts" / "ttf"
    np.set_printoptions(**printing)  # which it changes for the process, and other tests print
    torch.set_printoptions(profile="default")
    assert folder in utils.USER_CONFIG_DIR.parents, "Ultralytics was imported before, with settings elsewhere"
    shutil.copy(fonts / "DejaVuSans.ttf", utils.USER_CONFIG_DIR / "Arial.ttf")  # else it would download one
    return ultralytics


def _load_torchvision():
    """Import torchvision; where its wheel has no operators for this torch, declare those that its import asks for."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision").operators = operators  # which last as long as this is referred to


def make_images(folder, count=8, size=64):
    """Rectangles of two colours on noise, and the YAML of the data set."""
    cv2 = importlib.import_module("cv2")
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        image = rng.integers(0, 80, (size, size, 3), np.uint8)
        lines = []
        for label, colour in enumerate([(60, 200, 250), (250, 120, 60)]):
            w, h = rng.integers(size // 5, size // 2, 2)
            x, y = rng.integers(0, size - w), rng.integers(0, size - h)
            image[y : y + h, x : x + w] = colour
            lines.append(f"{label} {(x + w / 2) / size} {(y + h / 2) / size} {w / size} {h / size}\n")
        cv2.imwrite(str(folder / "images" / f"{i}.png"), image)
        (folder / "labels" / f"{i}.txt").write_text("".join(lines), "utf-8")
    data = folder / "data.yaml"
    data.write_text(f"path: {folder.as_posix()}\ntrain: images\nval: images\nnames: [yellow, blue]\n", "utf-8")
    return data


class Stopped(Exception):
    """A run cut off, as by the loss of its machine."""


def train(model, callbacks=(), **settings):
    """Train until the end, or until a callback raises `Stopped`; returns the trainer and the losses of all batches.

    `callbacks` are pairs of an event and a function.
    """
    yolo = importlib.import_module("ultralytics").YOLO(model)
    losses = []
    yolo.add_callback("on_train_batch_end", lambda trainer: losses.append(trainer.loss.item()))
    for event, function in callbacks:
        yolo.add_callback(event, function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ultralytics' own
        warnings.filterwarnings("error", module="fastgd")
        with contextlib.suppress(Stopped):
            yolo.train(**{**QUIET, **settings})
    return yolo.trainer, losses
