"""The digits and the batches."""

import itertools

import numpy as np
import pytest

from funcbp import data
from funcbp.core import InputError


def test_digits_are_the_uci_digits():
    digits = data.digits()
    assert digits.train_images.shape == (1437, 8, 8)
    assert digits.test_images.shape == (360, 8, 8)
    assert digits.train_images.dtype == np.float32
    assert digits.train_labels.dtype == np.int32
    images = np.concatenate([digits.train_images, digits.test_images])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    assert images.min() == 0 and images.max() == 1
    # The counts of the classes in the repository's description of the set.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len(np.unique(images.reshape(1797, -1), axis=0)) == 1797  # none is in both parts


def numbers(n=10):
    return {"x": np.arange(n), "y": 2 * np.arange(n)}


def test_each_example_once_an_epoch_and_pairs_stay_together():
    epoch = list(data.batches(numbers(), 3, epochs=1, drop_remainder=False))
    assert [len(b["x"]) for b in epoch] == [3, 3, 3, 1]
    x = np.concatenate([b["x"] for b in epoch])
    assert sorted(x) == list(range(10)) and list(x) != list(range(10))
    assert all((b["y"] == 2 * b["x"]).all() for b in epoch)
    assert len(list(data.batches(numbers(), 3, epochs=2))) == 6


def take(n, **options):
    return [b["x"].tolist() for b in itertools.islice(data.batches(numbers(), 3, **options), n)]


def test_deterministic_by_seed_and_shuffled_anew():
    assert take(8, seed=1) == take(8, seed=1)
    assert take(8, seed=1) != take(8, seed=2)
    assert take(6, seed=1)[:3] != take(6, seed=1)[3:]


@pytest.mark.parametrize("step", [1, 3, 5])
def test_resumes_from_a_step(step):
    """Inside an epoch, at its end, and in the next."""
    assert take(8 - step, seed=4, step=step) == take(8, seed=4)[step:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((numbers(), 0), "size must be from 1 to the number of examples 10, got 0"),
        ((numbers(), 11), "got 11"),
        (((np.zeros(3), np.zeros(4)), 2), r"one common length on their first axis, got \[3, 4\]"),
        (((), 2), "one common length"),
    ],
)
def test_bad_arguments_raise_at_the_call(arguments, message):
    with pytest.raises(InputError, match=message):
        data.batches(*arguments)


def test_negative_step():
    with pytest.raises(InputError, match="must not be negative, got -1"):
        data.batches(numbers(), 2, step=-1)
