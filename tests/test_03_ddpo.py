"""DDPO's estimators against a diffusion whose reward and gradient are known in closed form.

The oracle: data N(m, s²). The best denoiser is linear in x_t, so x_0 is Gaussian, and with the
reward −‖x_0 − goal‖² both J and ∇J are known. The only parameter, θ, shifts the model's idea of m.
"""
import math
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

mdp = import_module("01_mdp")
ddpo = import_module("03_ddpo")

M, S, GOAL, SHAPE, T = 0.3, 0.5, 1.5, (1, 2, 2), 6
D = math.prod(SHAPE)


class LinearUNet(torch.nn.Module):
    """ε_θ(x_t) = E[ε | x_t] for data N(m + θ, s²)."""

    def __init__(self, scheduler, theta=0.0):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.table = scheduler.alphas_cumprod.double()
        self.dtype = torch.float64

    def forward(self, x, t, encoder_hidden_states):
        a = self.table[t].view(-1, 1, 1, 1)
        eps = (1 - a).sqrt() * (x - a.sqrt() * (M + self.theta)) / (a * S**2 + 1 - a)
        return SimpleNamespace(sample=eps)


def linear_pipe(theta=0.0):
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(T)
    return SimpleNamespace(scheduler=scheduler, unet=LinearUNet(scheduler, theta), device="cpu")


def closed_form(theta=0.0):
    """J and dJ/dθ, from the textbook formulas: nothing of 01_mdp.py is used."""
    pipe = linear_pipe()
    table = [float(a) for a in pipe.scheduler.alphas_cumprod.double()]
    mean, slope, var = 0.0, 0.0, 1.0  # of x_t; slope = dmean/dθ
    for t in pipe.scheduler.timesteps.tolist():
        a, b = table[t], table[max(t - 1000 // T, 0)]  # set_alpha_to_one=False: ends on table[0]
        sigma2 = (1 - b) / (1 - a) * (1 - a / b)
        gain = math.sqrt(1 - a) / (a * S**2 + 1 - a)  # ε = gain·(x − √a·(m+θ))
        to_eps = math.sqrt(1 - b - sigma2) - math.sqrt(b * (1 - a) / a)
        keep = math.sqrt(b / a) + to_eps * gain
        push = -to_eps * gain * math.sqrt(a)
        mean, slope = keep * mean + push * (M + theta), keep * slope + push
        var = keep**2 * var + sigma2
    return -D * (var + (mean - GOAL) ** 2), -2 * D * (mean - GOAL) * slope


@torch.no_grad()
def sample(pipe, B, generator):
    """Roll out the linear-Gaussian chain: what mdp.rollout does, without text and pictures."""
    x = torch.randn(B, *SHAPE, generator=generator, dtype=torch.float64)
    latents, log_probs = [x], []
    for t in pipe.scheduler.timesteps:
        mean, std = mdp.policy(pipe, x, t, torch.zeros(B, 1, 1), None, 1.0, 1.0)
        x = mean + std * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        latents.append(x)
        log_probs.append(mdp.log_prob(x, mean, std))
    reward = -((x - GOAL) ** 2).sum((1, 2, 3))
    return SimpleNamespace(
        latents=torch.stack(latents, 1), log_probs=torch.stack(log_probs, 1), reward=reward,
        timesteps=pipe.scheduler.timesteps, prompt_embeds=torch.zeros(B, 1, 1),
        negative_embeds=None)


def all_log_probs(pipe, run):
    """(B,T) log-probs of a run under the pipe's present weights, with gradient."""
    B = len(run.latents)
    return torch.stack([
        mdp.step_log_prob(pipe, run.latents[:, k], run.latents[:, k + 1], t, torch.zeros(B, 1, 1),
                          None, 1.0, 1.0)
        for k, t in enumerate(run.timesteps)], 1)


def gradient(J, theta):
    return torch.autograd.grad(J, theta, retain_graph=True)[0].item()


def test_sample_mean_of_reward_is_the_closed_form():
    run = sample(linear_pipe(0.2), 20000, torch.Generator().manual_seed(0))
    error = run.reward.std().item() / 20000**0.5
    assert run.reward.mean().item() == pytest.approx(closed_form(0.2)[0], abs=4 * error)
    h = 1e-5
    slope = (closed_form(0.2 + h)[0] - closed_form(0.2 - h)[0]) / (2 * h)
    assert slope == pytest.approx(closed_form(0.2)[1], rel=1e-6)


@pytest.mark.parametrize("estimator", ["sf", "is", "sf leave-one-out"])
def test_estimators_average_to_the_true_gradient(estimator):
    pipe, generator, found = linear_pipe(), torch.Generator().manual_seed(0), []
    for _ in range(60):
        run = sample(pipe, 2000, generator)
        log_prob, A = all_log_probs(pipe, run), run.reward
        if estimator == "sf leave-one-out":  # times the scale that it divides by
            advantage = ddpo.leave_one_out_advantage(A, ["p"] * len(A))
            J = ddpo.ddpo_sf_objective(log_prob, advantage * A.std())
        elif estimator == "sf":
            J = ddpo.ddpo_sf_objective(log_prob, A)
        else:
            J = ddpo.ddpo_is_objective(log_prob, run.log_probs, A, 0.2)
        found.append(gradient(J, pipe.unet.theta))
    found, truth = torch.tensor(found), closed_form()[1]
    error = found.std().item() / len(found) ** 0.5
    assert error < 0.1 * abs(truth), "too noisy to tell"
    assert found.mean().item() == pytest.approx(truth, abs=3.5 * error)


def test_importance_sampling_corrects_several_steps_of_an_old_policy():
    """The whole path's ratio Π_t w_t makes E_old[w·r] = J(θ), also away from θ_old."""
    run = sample(linear_pipe(0.0), 4000, torch.Generator().manual_seed(1))
    new = linear_pipe(0.05)
    log_ratio = (all_log_probs(new, run) - run.log_probs).sum(1)
    J = (log_ratio.exp() * run.reward).mean().item()
    error = (log_ratio.exp() * run.reward).std().item() / 4000**0.5
    assert J == pytest.approx(closed_form(0.05)[0], abs=4 * error)


def test_is_is_sf_at_the_old_policy_in_slope_and_in_gradient():
    pipe = linear_pipe()
    run = sample(pipe, 64, torch.Generator().manual_seed(0))
    log_prob, A = all_log_probs(pipe, run), torch.randn(64, dtype=torch.float64)
    sf = ddpo.ddpo_sf_objective(log_prob, A)
    ratio = ddpo.ddpo_is_objective(log_prob, log_prob.detach(), A, 0.2)
    assert ratio.item() == pytest.approx(T * A.mean().item(), rel=1e-12)  # every ratio is 1
    assert gradient(ratio, pipe.unet.theta) == pytest.approx(gradient(sf, pipe.unet.theta),
                                                             rel=1e-10)
    moved = all_log_probs(linear_pipe(1e-6), run)
    rise = [J(moved) - J(log_prob.detach()) for J in (
        lambda lp: ddpo.ddpo_sf_objective(lp, A).item(),
        lambda lp: ddpo.ddpo_is_objective(lp, log_prob.detach(), A, 0.2).item())]
    assert rise[1] == pytest.approx(rise[0], rel=1e-3) and rise[0] != 0


def test_objectives_sum_over_steps_and_average_over_samples():
    log_prob = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]])
    A = torch.tensor([1.0, -2.0])
    assert ddpo.ddpo_sf_objective(log_prob, A).item() == (-7.0 + 2 * 56.0) / 2
    weight = torch.tensor([[1.0, 0.0, 0.0]] * 2)
    assert ddpo.ddpo_sf_objective(log_prob, A, weight).item() == (-1.0 + 2 * 8.0) / 2
    assert ddpo.ddpo_is_objective(log_prob, log_prob, A, 0.1, weight).item() == (1 - 2) / 2


@pytest.mark.parametrize("A, ratio, kept", [
    (1.0, 1.5, False), (1.0, 0.5, True), (-1.0, 1.5, True), (-1.0, 0.5, False),  # the four corners
    (1.0, 1.1, True), (-1.0, 0.9, True), (1.0, 1.0, True)])
def test_clipping_keeps_the_two_corrective_sides(A, ratio, kept):
    log_prob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    J = ddpo.ddpo_is_objective(log_prob, torch.zeros(1, 1), torch.tensor([A]), 0.2)
    slope = torch.autograd.grad(J, log_prob)[0].item()
    assert slope == pytest.approx(ratio * A if kept else 0.0, abs=1e-12)
    value = min(ratio * A, min(max(ratio, 0.8), 1.2) * A)
    assert J.item() == pytest.approx(value, abs=1e-12)


def test_is_gradient_is_detached_from_nothing_but_the_old_policy():
    log_prob = torch.zeros(2, 3, requires_grad=True)
    ddpo.ddpo_is_objective(log_prob, log_prob.detach(), torch.ones(2), 0.1).backward()
    assert torch.equal(log_prob.grad, torch.full((2, 3), 0.5))


def test_shapes_that_would_broadcast_in_silence_are_refused():
    with pytest.raises(AssertionError):
        ddpo.ddpo_sf_objective(torch.zeros(4, 4), torch.zeros(4, 1))
    with pytest.raises(AssertionError):
        ddpo.ddpo_is_objective(torch.zeros(4, 2), torch.zeros(4, 1), torch.zeros(4), 0.1)


def test_approx_kl_averages_to_the_exact_kl():
    old, new, exact = linear_pipe(0.0), linear_pipe(0.1), 0.0
    run = sample(old, 4000, torch.Generator().manual_seed(2))
    with torch.no_grad():
        estimate = ddpo.approx_kl(all_log_probs(new, run), run.log_probs)
        for k, t in enumerate(run.timesteps):
            c = torch.zeros(4000, 1, 1)
            p = mdp.policy(old, run.latents[:, k], t, c, None, 1.0, 1.0)
            q = mdp.policy(new, run.latents[:, k], t, c, None, 1.0, 1.0)
            exact += mdp.kl_divergence(p[0], q[0], p[1]).mean()
    assert estimate.item() == pytest.approx(exact.item(), rel=0.15)
    assert ddpo.approx_kl(run.log_probs, run.log_probs).item() == 0


def test_equivalent_clip():
    low, high = ddpo.equivalent_clip(1e-4, 16384)  # Stable Diffusion's latent has 4·64·64 numbers
    assert (low, high) == (pytest.approx(0.194, abs=5e-4), pytest.approx(5.147, abs=5e-4))
    root_low, root_high = ddpo.equivalent_clip(0.2, 1 / 256)
    assert root_low**256 == pytest.approx(0.8) and root_high**256 == pytest.approx(1.2)


def test_step_weights_even_out_the_gradient_of_the_mean():
    scheduler = linear_pipe().scheduler
    weight = ddpo.step_weights(scheduler, scheduler.timesteps, 1.0)
    product = weight * mdp.noise_weight(scheduler, scheduler.timesteps, 1.0).float()
    assert torch.allclose(product, product[0].expand(T), rtol=1e-5)
    assert weight.mean().item() == pytest.approx(1, rel=1e-6)


# ---- advantages -----------------------------------------------------------------------------


def test_leave_one_out_against_a_loop_over_whole_numbers():
    r, prompts = torch.tensor([1, 2, 4, 8, 16]), ["a", "b", "a", "a", "b"]
    A = ddpo.leave_one_out_advantage(r, prompts)
    assert A.dtype == torch.float64
    for i in range(5):
        others = [float(r[j]) for j in range(5) if j != i]
        same = [float(r[j]) for j in range(5) if j != i and prompts[j] == prompts[i]]
        mean = sum(others) / 4
        std = (sum((v - mean) ** 2 for v in others) / 4) ** 0.5
        assert A[i].item() == pytest.approx((float(r[i]) - sum(same) / len(same)) / std, rel=1e-12)


def test_leave_one_out_is_unbiased_by_enumeration():
    """A coin with p = sigmoid(θ), three throws, all eight outcomes: E[Â] = ∇J · E[1/scale]."""
    p, payoff = 0.3, {0: 1.0, 1: 3.0}
    truth = p * (1 - p) * (payoff[1] - payoff[0])
    estimate, inverse_scale = 0.0, 0.0
    for outcome in range(8):
        bits = [(outcome >> i) & 1 for i in range(3)]
        chance = math.prod(p if b else 1 - p for b in bits)
        r = torch.tensor([payoff[b] for b in bits])
        A = ddpo.leave_one_out_advantage(r, ["p"] * 3)
        score = torch.tensor([b - p for b in bits], dtype=torch.float64)  # d log p(bit)/dθ
        estimate += chance * (A * score).mean().item()
        std = r[1:].std(unbiased=False).item()
        inverse_scale += chance / (std if std > 1e-6 else 1)
    assert estimate == pytest.approx(truth * inverse_scale, rel=1e-12)


def test_leave_one_out_needs_two():
    with pytest.raises(ValueError, match="--samples-per-prompt"):
        ddpo.leave_one_out_advantage(torch.tensor([1.0, 2.0, 3.0]), ["a", "a", "b"])


def test_equal_rewards_give_no_advantage():
    r = torch.full((6,), 0.1, dtype=torch.float64)
    assert ddpo.leave_one_out_advantage(r, ["a"] * 6).abs().max() < 1e-12
    assert ddpo.running_advantage(r, ["a"] * 6, {}).abs().max() < 1e-12


def test_running_advantage_by_hand():
    history = {}
    first = ddpo.running_advantage(torch.tensor([1, 3]), ["a", "a"], history)
    assert first.tolist() == [-1.0, 1.0]
    second = ddpo.running_advantage(torch.tensor([5.0, 7.0]), ["a", "b"], history)
    std = (((1 - 3) ** 2 + 0 + (5 - 3) ** 2) / 3) ** 0.5
    assert second.tolist() == [pytest.approx((5 - 3) / std), 0.0]
    assert history == {"a": [1.0, 3.0, 5.0], "b": [7.0]}
    ddpo.running_advantage(torch.tensor([9.0]), ["a"], history, keep=2)
    assert history["a"] == [5.0, 9.0]


# ---- the update -----------------------------------------------------------------------------


def test_draw_pairs_covers_every_pair_once():
    parts = ddpo.draw_pairs(5, 7, 1.0, 3, torch.Generator().manual_seed(0))
    assert len(parts) == 3
    assert sorted(map(tuple,
                      torch.cat(parts).tolist())) == [(i, k) for i in range(5) for k in range(7)]
    some = torch.cat(ddpo.draw_pairs(5, 10, 0.3, 1, torch.Generator().manual_seed(0)))
    assert len(set(map(tuple, some.tolist()))) == 15
    assert some[:, 0].bincount().tolist() == [3] * 5


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("estimator", ["sf", "is"])
def test_update_is_one_step_on_the_whole_objective_whatever_the_batch_size(estimator, batch_size):
    pipe, A = linear_pipe(), torch.randn(9, generator=torch.Generator().manual_seed(3)).double()
    run = sample(pipe, 9, torch.Generator().manual_seed(0))
    truth = gradient(ddpo.ddpo_sf_objective(all_log_probs(pipe, run), A), pipe.unet.theta)
    config = ddpo.Config(estimator=estimator, batch_size=batch_size, max_grad_norm=1e9)
    params = [pipe.unet.theta]
    pairs, = ddpo.draw_pairs(9, T, 1.0, 1, torch.Generator().manual_seed(0))
    ddpo.update(pipe, torch.optim.SGD(params, lr=0.5), params, run, A, pairs, torch.ones(T), config)
    assert pipe.unet.theta.item() == pytest.approx(0.5 * truth, rel=1e-9)  # uphill


def test_update_clips_the_gradient_norm():
    pipe, A = linear_pipe(), torch.ones(9).double()
    run = sample(pipe, 9, torch.Generator().manual_seed(0))
    pairs, = ddpo.draw_pairs(9, T, 1.0, 1, torch.Generator().manual_seed(0))
    config, params = ddpo.Config(max_grad_norm=0.01), [pipe.unet.theta]
    said = ddpo.update(pipe, torch.optim.SGD(params, lr=1.0), params, run, A, pairs, torch.ones(T),
                       config)
    assert abs(pipe.unet.theta.item()) == pytest.approx(0.01, rel=1e-3) and said["grad_norm"] > 0.01


def test_several_clipped_updates_climb_to_the_optimum():
    """θ* puts x_0's mean on the goal; K = 4 updates a round reach it from θ = 0."""
    pipe, generator = linear_pipe(), torch.Generator().manual_seed(0)
    config = ddpo.Config(estimator="is", clip_range=0.2, batch_size=1000)
    params = [pipe.unet.theta]
    optimizer = torch.optim.Adam(params, lr=0.05)
    for _ in range(40):
        run = sample(pipe, 64, generator)
        A = ddpo.leave_one_out_advantage(run.reward, ["p"] * 64)
        for minibatch in ddpo.draw_pairs(64, T, 1.0, 4, generator):
            ddpo.update(pipe, optimizer, params, run, A, minibatch, torch.ones(T), config)
    best = max(closed_form(theta / 100)[0] for theta in range(0, 300))
    start, end = closed_form(0.0)[0], closed_form(pipe.unet.theta.item())[0]
    assert end > best - 0.05 * (best - start)


def test_per_dim_ratio_is_the_dth_root():
    """Published form: exp(Δ log p / D), whose gradient at θ_old is the exact one's divided by D."""
    pipe, A = linear_pipe(), torch.randn(9, generator=torch.Generator().manual_seed(3)).double()
    run = sample(pipe, 9, torch.Generator().manual_seed(0))
    truth = gradient(ddpo.ddpo_sf_objective(all_log_probs(pipe, run), A), pipe.unet.theta)
    config = ddpo.Config(ratio="per_dim", clip_range=1e-4, max_grad_norm=1e9)
    params = [pipe.unet.theta]
    pairs, = ddpo.draw_pairs(9, T, 1.0, 1, torch.Generator().manual_seed(0))
    ddpo.update(pipe, torch.optim.SGD(params, lr=0.5), params, run, A, pairs, torch.ones(T), config)
    assert pipe.unet.theta.item() == pytest.approx(0.5 * truth / D, rel=1e-9)


def test_a_second_update_weighs_by_the_policy_that_sampled():
    pipe, A = linear_pipe(), torch.randn(9, generator=torch.Generator().manual_seed(3)).double()
    run = sample(pipe, 9, torch.Generator().manual_seed(0))
    config, params = ddpo.Config(max_grad_norm=1e9, clip_range=0.01), [pipe.unet.theta]
    pairs, = ddpo.draw_pairs(9, T, 1.0, 1, torch.Generator().manual_seed(0))
    optimizer, theta = torch.optim.SGD(params, lr=1e-3), 0.0
    for _ in range(3):
        there = linear_pipe(theta)
        J = ddpo.ddpo_is_objective(all_log_probs(there, run), run.log_probs, A, 0.01)
        theta += 1e-3 * gradient(J, there.unet.theta)
        said = ddpo.update(pipe, optimizer, params, run, A, pairs, torch.ones(T), config)
        assert pipe.unet.theta.item() == pytest.approx(theta, rel=1e-6)
    assert said["clip_fraction"] > 0 and said["kl"] > 0


def test_learning_on_the_tiny_model(tmp_path):
    """Six rounds on "four stars", which the pretrained model mostly takes for a yellow circle."""
    config = ddpo.Config(prompts="bias", rounds=6, prompts_per_round=1, samples_per_prompt=48,
                         num_steps=8,
                         eval_samples=48, seed=0, device="cpu", out=str(tmp_path))
    result = ddpo.train(config)
    gain = result["after"] - result["before"]
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5  # 9.6 and 7.4 when it was written
    assert result["rows"][-1]["reward"] > result["rows"][0]["reward"] + 0.2


def test_prompt_sets(tmp_path):
    animals, activities = ddpo.get_prompts("animals"), ddpo.get_prompts("activities")
    assert len(set(animals)) == 45 and "an ant" in animals and "a dog" in animals
    assert len(set(activities)) == 135 and "a raccoon washing the dishes" in activities
    assert "a blue star on the left" in ddpo.get_prompts("location")
    assert "a purple triangle" not in ddpo.get_prompts("color")  # held out of pretraining
    (tmp_path / "mine.txt").write_text("a red circle\n\n  two blue squares \n")
    assert ddpo.get_prompts(str(tmp_path / "mine.txt")) == ["a red circle", "two blue squares"]


def test_prompt_stream_passes_over_all_prompts_before_it_repeats():
    stream = ddpo.prompt_stream(list("abcde"), torch.Generator().manual_seed(0))
    drawn = [next(stream) for _ in range(15)]
    assert [sorted(drawn[i:i + 5]) for i in (0, 5, 10)] == [list("abcde")] * 3
    assert drawn[:5] != drawn[5:10]
