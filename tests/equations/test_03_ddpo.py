"""DDPO's estimators on chains of Gaussians, where each density, J and ∇J can be written out."""
import math
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from tests.equations import closed_forms as chain
from tests.equations.closed_forms import CASES, LOOP, T, double, randn, stable_scheduler

ddpo = import_module("03_ddpo")

# ---- the estimators -------------------------------------------------------------------------


@pytest.mark.equation("DDPO_SF", "03_ddpo.ddpo_sf_objective")
@pytest.mark.equation("DDPO_IS", "03_ddpo.ddpo_is_objective")
def test_the_estimators_average_to_the_true_gradient():
    """A constant is taken off the reward, its known mean: ∇J is the same, with less noise."""
    pipe, generator, found = chain.make_pipe(1.1, 0.1), torch.Generator().manual_seed(0), []
    params = [pipe.unet.kappa, pipe.unet.theta]
    J = chain.closed_form(pipe.unet)
    truth = torch.cat([slope.flatten() for slope in torch.autograd.grad(J, params)])
    for _ in range(40):
        trajectory = chain.draw(pipe, 1000, generator, prompts=False)
        _, log_prob = chain.means_and_log_probs(pipe, trajectory)
        A = (chain.reward_of(trajectory) - J.item())[:, None].expand(-1, T)
        terms = ddpo.ddpo_sf_objective(log_prob, A)
        slopes = torch.autograd.grad(terms.sum(1).mean(), params, retain_graph=True)
        found.append(torch.cat([slope.flatten() for slope in slopes]))
        terms = ddpo.ddpo_is_objective(log_prob, trajectory.log_probs, A, 0.2)
        for sf, importance in zip(slopes, torch.autograd.grad(terms.sum(1).mean(), params)):
            torch.testing.assert_close(importance, sf)
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert error.norm() < 0.15 * truth.norm(), "too noisy to tell"
    assert ((found.mean(0) - truth).abs() < 4 * error).all()


@pytest.mark.equation("DDPO_SF", "03_ddpo.ddpo_sf_objective")
def test_is_has_the_gradient_of_sf_at_the_old_policy_and_shapes_must_agree():
    """log p / log p_old is 1 there too, with another gradient: both values and slopes count."""
    log_prob, A = double([-3.0, 2.0, -0.5]).requires_grad_(), double([1.0, -2.0, 0.5])
    sf = ddpo.ddpo_sf_objective(log_prob, A)
    ratio = ddpo.ddpo_is_objective(log_prob, log_prob.detach(), A, 0.2)
    assert sf.tolist() == [-3.0, -4.0, -0.25] and ratio.tolist() == A.tolist()
    for terms in (sf, ratio):
        assert torch.autograd.grad(terms.sum(), log_prob)[0].tolist() == A.tolist()
    with pytest.raises(AssertionError):
        ddpo.ddpo_sf_objective(torch.zeros(4, 4), torch.zeros(4, 1))
    for shapes in ((4, (4, 1), 4), (4, 4, (4, 1))):
        with pytest.raises(AssertionError):
            ddpo.ddpo_is_objective(*map(torch.zeros, shapes), 0.1)


@pytest.mark.equation("DDPO_IS", "03_ddpo.ddpo_is_objective")
@pytest.mark.parametrize("A", (1.0, -1.0, 2.0))
@pytest.mark.parametrize("ratio", (0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.5))
def test_the_clip_ends_the_pay_of_a_ratio_that_went_far_enough_and_of_no_other(ratio, A):
    old, advantage = double([-7.0]), double([A])
    log_prob = (old + math.log(ratio)).requires_grad_()
    J = ddpo.ddpo_is_objective(log_prob, old, advantage, 0.2)
    slope = torch.autograd.grad(J.sum(), log_prob)[0].item()
    far_enough = ratio > 1.2 if A > 0 else ratio < 0.8
    assert slope == pytest.approx(0.0 if far_enough else ratio * A, abs=1e-12)
    assert J.item() == pytest.approx(min(ratio * A, min(max(ratio, 0.8), 1.2) * A), rel=1e-12)


@pytest.mark.equation("step weight", "03_ddpo.step_weights")
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_step_weights_are_sigma_over_the_means_derivative(eta):
    config = ddpo.Config(eta=eta, num_steps=T, step_weight="sigma")
    pipe = SimpleNamespace(scheduler=stable_scheduler(4), device="cpu")
    weight = ddpo.step_weights(pipe, config)  # it sets the number of steps
    expected = chain.step_weights_by_hand(config).float()
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=0)
    plain = ddpo.step_weights(pipe, replace(config, step_weight="none"))
    assert plain.tolist() == [1.0] * T


# ---- advantages -----------------------------------------------------------------------------


@pytest.mark.equation("mean of others", "03_ddpo.mean_of_others")
@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_mean_of_others_leaves_the_picture_itself_and_other_prompts_out(shape):
    values, prompts = randn(*shape), ["a", "b", "a", "a", "b"]
    means = ddpo.mean_of_others(values, prompts)
    for i in range(5):
        others = [values[j] for j in range(5) if j != i and prompts[j] == prompts[i]]
        torch.testing.assert_close(means[i], sum(others) / len(others), rtol=1e-12, atol=1e-15)


@pytest.mark.equation("spread", "03_ddpo.spread")
@pytest.mark.equation("leave-one-out advantage", "03_ddpo.leave_one_out_advantage")
def test_leave_one_out_advantage_against_a_loop_over_whole_numbers():
    r, prompts = torch.tensor([1, 2, 4, 8, 16]), ["a", "b", "a", "a", "b"]
    A = ddpo.leave_one_out_advantage(r, prompts)
    baselines, scale = [6, 16, 4.5, 2.5, 2], math.sqrt(sum((v - 6.2) ** 2 for v in r.tolist()) / 5)
    assert A.dtype == torch.float64
    assert ddpo.spread(r.double()).item() == pytest.approx(scale, rel=1e-12)
    for i in range(5):
        assert A[i].item() == pytest.approx((r[i].item() - baselines[i]) / scale, rel=1e-12)
    equal = ddpo.leave_one_out_advantage(torch.full((5,), 0.1), prompts)
    assert equal.abs().max() < 1e-12  # and not 0/0


@pytest.mark.equation("running advantage", "03_ddpo.running_advantage")
def test_a_prompt_is_trusted_from_16_rewards_on_and_only_its_latest_32_count():
    history = {"a": [0.0] * 14, "b": [0.0] * 15, "c": [9.0, *[0.0] * 31]}
    A = ddpo.running_advantage(torch.tensor([1, 1, 4, 4]), ["a", "b", "c", "c"], history)
    of_round, of_b = (1 - 2.5) / 1.5, (1 - 1 / 16) / math.sqrt(15 / 256)
    of_c = (4 - 8 / 32) / math.sqrt(32 / 32 - 1 / 16)  # of 30 times 0, and both of this round
    assert A.dtype == torch.float64 and A.tolist() == pytest.approx([of_round, of_b, of_c, of_c])
    assert history == {"a": [0] * 14 + [1], "b": [0] * 15 + [1], "c": [0] * 30 + [4, 4]}
    equal = ddpo.running_advantage(torch.full((5,), 0.1), ["a"] * 5, {})
    assert equal.abs().max() < 1e-12  # and not 0/0


def test_advantages_are_the_chosen_kind_cut_to_the_clip():
    r, prompts, history = double([0.0, 0.0, 0.0, 0.0, 9.0, 1.0]), ["a"] * 6, {}
    A = ddpo.advantages(r, prompts, history, ddpo.Config(advantage_clip=0.5))
    expected = ddpo.leave_one_out_advantage(r, prompts).clamp(-0.5, 0.5)
    assert A.shape == (6, 1) and torch.equal(A[:, 0], expected) and history == {}
    assert A.max() == 0.5 and A.min() == -0.5
    config = ddpo.Config(baseline="running", advantage_clip=math.inf)
    A = ddpo.advantages(r, prompts, history, config)
    assert torch.equal(A[:, 0], ddpo.running_advantage(r, prompts, {}))
    assert history == {"a": r.tolist()}


# ---- pairs, and the loops -------------------------------------------------------------------


@pytest.mark.equation("pairs", "03_ddpo.step_pairs")
@pytest.mark.parametrize("fraction, kept", [(1, T), (0.5, 3), (0.25, 2), (0.01, 1)])
def test_a_fraction_keeps_other_steps_of_each_picture(fraction, kept):
    config = ddpo.Config(timestep_fraction=fraction, num_steps=T)
    i, k = ddpo.step_pairs(torch.arange(200), config, 0)
    steps = {}
    for picture, step in zip(i.tolist(), k.tolist()):
        steps.setdefault(picture, []).append(step)
    assert all(len(s) == len(set(s)) == kept for s in steps.values()) and len(steps) == 200
    assert len({tuple(s) for s in steps.values()}) > 1
    alone, again = ddpo.step_pairs(torch.tensor([7]), config, 0)
    assert alone.tolist() == [7] * kept
    assert again.tolist() == steps[7]  # whoever stands beside it in the minibatch
    for other, n in ((config, 1), (replace(config, seed=1), 0)):
        assert k.tolist() != ddpo.step_pairs(torch.arange(200), other, n)[1].tolist()


def advantages_by_hand(trajectory, prompts, n):
    r = chain.reward_of(trajectory)
    means = [[r[j] for j in range(len(r)) if j != i and prompts[j] == prompts[i]]
             for i in range(len(r))]
    A = (r - double([sum(others) / len(others) for others in means])) / r.std(unbiased=False)
    return A.clamp(-1.5, 1.5)[:, None]


@pytest.mark.equation("DDPO_SF", "03_ddpo.reinforce")
@pytest.mark.parametrize("case", [case for case in CASES if "ratio" not in case])
def test_reinforce_takes_one_step_a_round_along_sf_of_all_its_pictures(case, monkeypatch, tmp_path):
    config = ddpo.Config(**LOOP | CASES[case], advantage_clip=1.5, out=str(tmp_path))
    found = chain.rehearse(ddpo.reinforce, config, monkeypatch)
    chain.check_loop(found, chain.by_hand(config, "sf", advantages_by_hand))
    assert len(found[0]) == 2


@pytest.mark.equation("DDPO_IS", "03_ddpo.train")
@pytest.mark.equation("lr_n", "support.training.set_rate")
@pytest.mark.parametrize("case", CASES)
def test_train_takes_k_steps_a_round_along_is_of_a_share_of_its_pictures(case, monkeypatch,
                                                                         tmp_path):
    config = ddpo.Config(**LOOP | CASES[case], advantage_clip=1.5, out=str(tmp_path))
    found = chain.rehearse(ddpo.train, config, monkeypatch)
    expected = chain.by_hand(config, "is", advantages_by_hand)
    chain.check_loop(found, expected)
    assert case != "plain" or 0.1 < expected[1][0]["clip_fraction"] < 0.9


@pytest.mark.parametrize("solved", (5, 10))  # pictures with the same reward, of 10
def test_pairs_without_an_advantage_are_left_out_and_the_gradient_is_the_same(solved, monkeypatch,
                                                                              tmp_path):
    original, policy_at, asked = chain.reward_of, ddpo.mdp.policy_at, []
    same = torch.arange(10) < solved
    monkeypatch.setattr(chain, "reward_of",
                        lambda trajectory: original(trajectory).where(~same, -9.0))
    monkeypatch.setattr(ddpo.mdp, "policy_at",
                        lambda *words: asked.extend(words[2]) or policy_at(*words))
    config = ddpo.Config(**LOOP, advantage_clip=1.5, out=str(tmp_path))
    steps, rows = chain.rehearse(ddpo.train, config, monkeypatch)
    assert len(asked) == 2 * T * (10 - solved)  # of two rounds
    if solved == 10:
        assert len(steps) == 6 and not any(slope.any() for step in steps for slope in step)
    else:
        chain.check_loop((steps, rows), chain.by_hand(config, "is", advantages_by_hand))
