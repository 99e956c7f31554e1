from collections import Counter

import numpy as np
import pytest

from llmeff.data.permute import permuted


def whole(size, seed=0, epoch=0):
    return permuted(np.arange(size), size, seed, epoch)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 10, 12, 100, 1000, 65537])
def test_is_a_bijection(size):
    assert sorted(whole(size, seed=3)) == list(range(size))


def test_any_part_is_computed_alone():
    order = whole(1000, seed=1, epoch=2)
    indices = np.array([999, 0, 17, 17])
    assert permuted(indices, 1000, 1, 2).tolist() == order[indices].tolist()


def test_large_sizes_stay_inside():
    size = 10**12 + 39
    result = permuted(np.arange(0, size, size // 1000), size, 0, 0)
    assert result.min() >= 0
    assert result.max() < size
    assert len(set(result.tolist())) == len(result)


def test_seeds_and_epochs_give_other_orders():
    orders = [whole(50, seed, epoch).tolist() for seed in range(2) for epoch in range(2)]
    assert all(first != second for place, first in enumerate(orders) for second in orders[:place])


# Every value is expected equally often: chi2 has mean df and standard deviation sqrt(2 df); 5 of these are allowed.
def test_each_element_goes_everywhere_equally_often():
    size, epochs = 10, 2000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), whole(size, 0, epoch)] += 1
    expected = epochs / size
    df = (size - 1) ** 2
    assert ((counts - expected) ** 2 / expected).sum() < df + 5 * (2 * df) ** 0.5


def test_all_permutations_of_four_come_equally_often():
    counts = Counter(tuple(whole(4, 0, epoch)) for epoch in range(2400))
    assert len(counts) == 24
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 23 + 5 * 46**0.5


def test_neighbours_are_not_kept_together():
    order = whole(100_000, seed=5).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / 100_000**0.5


def test_the_order_never_changes():
    # A change here changes what every recorded run was trained on.
    assert whole(10, seed=0, epoch=0).tolist() == [1, 6, 5, 9, 7, 4, 2, 8, 3, 0]
    assert permuted(np.array([0, 1, 123_456_789]), 10**9, 7, 3).tolist() == [905526790, 913072943, 233460370]
