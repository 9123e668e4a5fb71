"""Addresses of random numbers, prompts and minibatches of a round, one optimizer step."""
import math
from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import flags, training


def settings(**values):
    usual = {"seed": 0, "prompts_per_round": 2, "samples_per_prompt": 3, "timestep_fraction": 1.0}
    return SimpleNamespace(**usual | values)


def test_no_two_addresses_share_a_stream():
    """So evaluation noise is never training noise, whatever the seeds, rounds and pictures."""
    seeds = (0, 1, 2, 7, 10, flags.LIMITS["seed"][1])
    first = []
    for seed, purpose in product(seeds, training.PURPOSES):
        for n, i in product((0, 1, 2, 1999), (0, 1, 2, 255)):
            first.append(training.random_stream(seed, purpose, n, i).integers(2**63))
        first.append(training.torch_seed(seed, purpose))
    assert len(set(first)) == len(first) == 6 * 17 * len(training.PURPOSES)


def test_a_stream_is_the_same_one_again_and_numpys_at_four_words():
    z = training.gaussian((2, 3), 5, "film", 7, 9)
    assert z.dtype == torch.float32 and torch.equal(z, training.gaussian((2, 3), 5, "film", 7, 9))
    expected = np.random.default_rng([5, 2, 7, 9]).standard_normal((2, 3), dtype=np.float32)
    assert np.array_equal(z.numpy(), expected)


def test_places_in_the_list_of_purposes_are_kept():
    """A new purpose goes to the end: in the middle it would change the noise of every old run."""
    assert training.PURPOSES[:11] == (
        "train", "evaluate", "film", "compare", "examples", "prompts", "minibatches",
        "timesteps", "adapters", "value", "value batches")
    assert len(set(training.PURPOSES)) == len(training.PURPOSES)


@pytest.mark.parametrize("address", [
    (2**32, "train"), (-1, "train"), (0, "train", 2**32), (0, "train", 0, -1), (0, "nonsense")])
def test_there_are_no_other_addresses(address):
    with pytest.raises(ValueError):
        training.random_stream(*address)


def test_why_an_address_has_four_words_of_32_bits():
    def first(*words):
        return np.random.default_rng(words).integers(2**63)

    assert first(1) == first(1, 0) == first(1, 0, 0, 0)
    assert first(2**32 + 5, 0, 0) == first(5, 1, 0, 0)


@pytest.mark.parametrize("per_round, count", [(1, 4), (2, 5), (3, 7), (7, 3), (8, 45)])
def test_every_prompt_comes_before_any_comes_again(per_round, count):
    prompts = [f"prompt {j}" for j in range(count)]
    config = settings(prompts_per_round=per_round)
    rounds = {n: training.prompts_of_round(prompts, config, n)  # in any order: a function of n
              for n in reversed(range(4 * count))}
    line = []
    for n in range(4 * count):
        chosen = rounds[n]
        assert len(chosen) == 3 * per_round
        assert all(chosen[3 * j] == chosen[3 * j + 1] == chosen[3 * j + 2]
                   for j in range(per_round))
        line += chosen[::3]
    passes = [tuple(line[first:first + count]) for first in range(0, len(line), count)]
    assert all(sorted(one) == sorted(prompts) for one in passes)
    assert len(set(passes)) > 1, "all passes in the same order"
    other = settings(prompts_per_round=per_round, seed=1)
    assert any(training.prompts_of_round(prompts, other, n) != rounds[n] for n in rounds)


def test_spread_evenly():
    assert training.spread_evenly(["a", "b", "c"], 7) == list("abcabca")
    assert training.spread_evenly(list("abcdefgh"), 4) == list("aceg")
    assert training.spread_evenly(list("abcde"), 3) == list("abd")
    assert len(set(training.spread_evenly(list(range(135)), 128))) == 128


@pytest.mark.parametrize("samples, updates", [(6, 1), (6, 2), (128, 2), (10, 3), (5, 5)])
def test_minibatches_split_the_pictures(samples, updates):
    rounds = [training.minibatches(samples, updates, 0, n) for n in range(20)]
    for parts in rounds:
        assert len(parts) == updates and sorted(torch.cat(parts).tolist()) == list(range(samples))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    orders = [torch.cat(parts).tolist() for parts in rounds]
    assert orders.count(orders[0]) < 5 and orders.count(sorted(orders[0])) < 5
    other = [torch.cat(training.minibatches(samples, updates, 1, n)).tolist() for n in range(20)]
    assert other != orders


def test_step_pairs_cover_every_step_of_every_picture_once():
    i, k = training.step_pairs(torch.tensor([4, 0, 9]), 5, settings(), 3)
    assert sorted(zip(i.tolist(), k.tolist())) == [(a, b) for a in (0, 4, 9) for b in range(5)]


@pytest.mark.parametrize("fraction, kept", [(0.5, 5), (0.25, 2), (0.01, 1), (0.99, 10)])
def test_a_fraction_keeps_other_steps_of_each_picture(fraction, kept):
    config = settings(timestep_fraction=fraction)
    i, k = training.step_pairs(torch.arange(200), 10, config, 0)
    steps = {}
    for picture, step in zip(i.tolist(), k.tolist()):
        steps.setdefault(picture, []).append(step)
    assert all(len(s) == len(set(s)) == kept for s in steps.values()) and len(steps) == 200
    counts = Counter(k.tolist())
    share = kept / 10  # each step alike: within 4 standard errors
    error = math.sqrt(200 * share * (1 - share)) * 4
    assert all(abs(counts[step] - 200 * share) <= error for step in range(10))
    again = training.step_pairs(torch.tensor([7]), 10, config, 0)[1].tolist()
    assert again == steps[7]  # of a picture, whoever stands beside it in the minibatch
    other = settings(timestep_fraction=fraction, seed=1)
    for elsewhere in ((config, 1), (other, 0)):  # another round, another seed
        assert k.tolist() != training.step_pairs(torch.arange(200), 10, *elsewhere)[1].tolist()


@pytest.mark.parametrize("bound, scale", [(6.5, 0.5), (13.1, 1), (math.inf, 1)])
def test_a_step_by_hand(bound, scale):
    """Parameters of two shapes have one norm, √(3² + 4² + 12²) = 13."""
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(1, 1, 1, requires_grad=True)
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([[[12.0]]])
    optimizer = torch.optim.SGD([a, b], lr=1)
    seen = training.optimizer_step(optimizer, [a, b], SimpleNamespace(max_grad_norm=bound))
    assert seen == {"grad_norm": pytest.approx(13), "grad_clipped": float(scale < 1)}
    assert a.tolist() == pytest.approx([-3 * scale, -4 * scale], rel=1e-5)
    assert b.item() == pytest.approx(-12 * scale, rel=1e-5)
    assert all(p.grad is None or not p.grad.any() for p in (a, b))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_changes_nothing(bad):
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.tensor([1.0, bad])
    with pytest.raises(ValueError, match="--learning-rate"):
        training.optimizer_step(torch.optim.SGD([p], lr=1), [p], SimpleNamespace(max_grad_norm=1))
    assert p.tolist() == [1, 1]


def test_mean_se():
    mean, error = training.mean_se([1, 2, 6])
    assert (mean, error) == pytest.approx((3, math.sqrt(7 / 3)))
    mean, error = training.mean_se(torch.tensor([4]))
    assert mean == 4 and math.isnan(error)
