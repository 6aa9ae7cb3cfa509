"""Commands on classifiers: train, evaluate, predict."""

from __future__ import annotations

from . import options as given
from .command import RunOptions, echo, on_run


@on_run
def train(options: RunOptions) -> None:
    """Train the classifier of every method.

    Example: `discl train mine.yaml --set train.optimizer.lr=0.003 --amend`
    """
    echo(options.run("train")[1])


@on_run
def evaluate(options: RunOptions) -> None:
    """Measure every method on validation and test and write `results.json`.

    Example: `discl evaluate mine.yaml`
    """
    echo(options.run("evaluate")[1])


def predict(
    run: given.Classifier,
    images: given.Images,
    out: given.Predictions,
    method: given.MethodName = None,
    device: given.Device = "cpu",
    unreadable: given.Unreadable = "skip",
    base: given.Base = None,
    crops: given.Crops = 1,
) -> None:
    """Classify images with a trained classifier.

    Example: `discl predict runs/fashion-lt photos --out predictions.csv`
    """
    from ..stages.predict import predict as predict_images

    echo(
        predict_images(
            run, images, out, method, device, unreadable=unreadable, base=base, crops=crops
        )
    )
