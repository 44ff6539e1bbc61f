"""Train an Ultralytics YOLO without fastgd and with it, and compare what an optimizer step takes.

    python examples/ultralytics_yolo.py model=yolo26n.yaml data=coco8.yaml epochs=10 imgsz=320

takes whatever ``yolo train`` takes. All that fastgd needs is the line with ``accelerate``.
"""

import statistics
import sys
import time

from ultralytics import YOLO
from ultralytics.cfg import smart_value

import fastgd.ultralytics

SETTINGS = {"model": "yolo26n.yaml", "data": "coco8.yaml", "epochs": 3, "optimizer": "AdamW", "device": "cpu"}


def train(settings, fast):
    """Train, and return the seconds of each optimizer step."""
    seconds = []

    def measure(trainer):
        step = trainer.optimizer_step

        def optimizer_step():
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)

        trainer.optimizer_step = optimizer_step

    model = YOLO(settings["model"])
    if fast:
        model.add_callback("on_train_start", fastgd.ultralytics.accelerate)
    model.add_callback("on_train_start", measure)
    model.train(**settings)
    return seconds


if __name__ == "__main__":
    given = {name: smart_value(value) for name, value in (word.split("=", 1) for word in sys.argv[1:])}
    medians = {fast: statistics.median(train({**SETTINGS, **given}, fast)) for fast in (False, True)}
    print(
        f"An optimizer step takes {medians[False] * 1e3:.2f} ms without fastgd, {medians[True] * 1e3:.2f} ms with it."
    )
