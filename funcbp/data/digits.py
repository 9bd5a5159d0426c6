"""The UCI handwritten digits; source and licence (CC BY 4.0) stand in `DIGITS.md` beside this."""

import importlib.resources
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

# The held-out share; the split is one fixed permutation, the same for everybody.
HELD_OUT, SPLIT_SEED = 360, 1998


class Digits(NamedTuple):
    """Images with values in [0, 1] and labels from 0 to 9, in a fixed split of 1,437 and 360."""

    train_images: Float[np.ndarray, "1437 8 8"]
    train_labels: Int[np.ndarray, " 1437"]
    test_images: Float[np.ndarray, "360 8 8"]
    test_labels: Int[np.ndarray, " 360"]


def digits() -> Digits:
    """Loads the digits: float32 images [n, 8, 8] in [0, 1] and int32 labels [n]."""
    with (importlib.resources.files("funcbp.data") / "digits.npz").open("rb") as file:
        stored = np.load(file)
        images = stored["images"].astype(np.float32) / 16
        labels = stored["labels"].astype(np.int32)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    train, test = order[HELD_OUT:], order[:HELD_OUT]
    return Digits(images[train], labels[train], images[test], labels[test])
