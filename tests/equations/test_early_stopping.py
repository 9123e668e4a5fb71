"""The rule that stops training, its price, and what hindsight would choose, worked by hand."""
import pytest

from experiments import early_stopping as es

equation = pytest.mark.equation


def rounds(kl, labels=None, gold=None):
    """Kept rounds with 100 reward queries between two of them."""
    return [{"kl": kl[n], "queries": 100 * n, "labels": (labels or kl)[n],
             "gold": (gold or kl)[n]} for n in range(len(kl))]


@equation("early stopping", "experiments.early_stopping.stop_by_rule")
@pytest.mark.parametrize("kl, labels, k, m", [
    ([0, 5, 9, 12, 30], [0.1, 0.7, 0.4, 0.9, 1.0], 1, 3),  # 0.9 and 1.0 are beyond the bound
    ([0, 5, 9, 12, 3], [0.1, 0.2, 0.4, 0.3, 1.0], 2, 3),  # what follows m does not come back
    ([0, 5, 9, 9, 10], [0.1, 0.2, 0.3, 0.2, 0.8], 4, 5),  # exactly at the bound is within it
    ([0, 5, 9, 11], [0.1, 0.6, 0.6, 0.9], 1, 3),  # the earliest of equals
    ([0, 5, 9], [0.5, 0.5, 0.2], 0, 3),  # the pretrained model may be best
    ([0, 11, 5], [0.1, 0.9, 0.9], 0, 1),  # and is what is left if the first round goes too far
    ([10.5, 5], [0.1, 0.2], 1, 2)])  # rounding of its own KL stops nothing
def test_the_rule_keeps_the_best_labels_before_the_bound(kl, labels, k, m):
    gold = [9 - n for n in range(len(kl))]  # which the rule must not look at
    assert es.stop_by_rule(rounds(kl, labels, gold), 10) == (k, m)


@equation("price of early stopping", "experiments.early_stopping.price")
@pytest.mark.parametrize("m, want", [(1, 100 + 7), (3, 300 + 3 * 7), (4, 300 + 4 * 7)])
def test_price_is_all_training_until_the_stop_and_all_labels(m, want):
    """Of rounds 0 to 3. The stop itself is trained, not labeled; without one, all are labeled."""
    assert es.price(rounds([0, 1, 2, 3]), m, 7) == want


@equation("hindsight's best", "experiments.early_stopping.hindsights_best")
def test_hindsight_looks_at_the_truth_of_all_rounds_whatever_their_kl():
    labels = [9, 1, 1, 1, 1]
    assert es.hindsights_best(rounds([0, 5, 99, 5, 5], labels, [0.1, 0.2, 0.8, 0.8, 0.3])) == 2
    assert es.hindsights_best(rounds([0, 5, 9, 5, 99], labels, [0.1, 0.2, 0.3, 0.2, 0.4])) == 4
