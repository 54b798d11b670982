"""Measures what frozen statistics of batch norm cost on images unlike those that a network was trained on.

    .venv/bin/python scripts/frozen_statistics.py [--digits 1000] [--train 200] [--epochs 16] [--runs 5]

The network is the quickstart's, with ImageNet's weights, and the images are scikit-learn's digits. A head is trained on
the frozen network as it is, on the network with statistics of the training images (`training.reestimate_batch_norm`),
and with the stages behind stage3, which then take statistics of each batch.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from augmentation_pays import BACKBONE, BATCH_SIZE, DIGIT_SIDE, LEARNING_RATE, digits, interval

from featstore import FeatureStore, ImageSet, StagedModel, backbone
from training import Learner, reestimate_batch_norm

THAWED = "stage3"


def main() -> None:
    """Prints a table: accuracy of each way, and how much more that is than of the network as it is, run by run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--digits", type=int, default=1000)
    parser.add_argument("--train", type=int, default=200, help="of them; the others validate")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, images = backbone(BACKBONE), digits(options.digits)
    model = model.with_(view=model.view.resized(size=DIGIT_SIDE, resize=DIGIT_SIDE))
    found: dict[str, list[float]] = {"as it is": [], "statistics taken anew": [], f"trained behind {THAWED}": []}
    for run in range(options.runs):
        dealt = images.split(valid=1 - options.train / len(images), seed=run)
        renewed = reestimate_batch_norm(model, dealt.train, batch_size=BATCH_SIZE, device="cpu", seed=run)
        for name, network, freeze_to in (
            ("as it is", model, None),
            ("statistics taken anew", renewed, None),
            (f"trained behind {THAWED}", model, THAWED),
        ):
            found[name].append(accuracy(network, dealt, freeze_to, epochs=options.epochs, seed=run))
    print("| network | accuracy, % | more than as it is |")
    print("| --- | ---: | ---: |")
    for name, values in found.items():
        gaps = [100 * (own - plain) for own, plain in zip(values, found["as it is"], strict=True)]
        (mean, half), (gap, around) = interval([100 * each for each in values]), interval(gaps)
        more = "" if name == "as it is" else f"{gap:+.1f} ± {around:.1f}"
        print(f"| {name} | {mean:.1f} ± {half:.1f} | {more} |")


def accuracy(model: StagedModel, images: ImageSet, freeze_to: str | None, *, epochs: int, seed: int) -> float:
    """Of the images held out, after the last epoch."""
    with tempfile.TemporaryDirectory() as folder:
        learn = Learner(
            model,
            images,
            FeatureStore(folder),
            on_missing="extract",
            batch_size=BATCH_SIZE,
            seed=seed,
            device="cpu",
            workers=0,
            quiet=True,
        )
        if freeze_to is not None:
            learn.freeze_to(freeze_to)
        learn.fit(epochs, LEARNING_RATE)
        return learn.evaluate("valid")["accuracy"]


if __name__ == "__main__":
    main()
