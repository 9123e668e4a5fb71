"""Chapter 1 against diffusers' own step, torch.distributions, and slow loops."""
import copy
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from support import models, training
from tests.equations.closed_forms import (
    difference, double, gaussian, randn, stable_scheduler)

mdp = import_module("01_mdp")

PREDICTIONS = ("epsilon", "v_prediction", "sample")
PROMPTS = ["a red circle", "two blue squares", "a blue star on the left"]


def ends_and_middle(scheduler):
    t = scheduler.timesteps.tolist()
    return {t[0], t[len(t) // 2], *t[-2:]}


def in_float64(scheduler):
    """A copy with the same table in float64, to run diffusers' own step() without its rounding."""
    exact = copy.deepcopy(scheduler)
    exact.alphas_cumprod = exact.alphas_cumprod.double()
    exact.final_alpha_cumprod = exact.final_alpha_cumprod.double()
    return exact


# ---- how the model was pretrained -----------------------------------------------------------


@pytest.mark.equation("x_t", "01_mdp.forward_process")
def test_forward_process_is_what_diffusers_add_noise_does():
    scheduler, t = stable_scheduler(), torch.tensor([0, 1, 500, 999])
    x_0, eps = randn(4, 2, 3, 5, seed=1), randn(4, 2, 3, 5, seed=2)
    x_t = mdp.forward_process(scheduler, x_0, t, eps)
    torch.testing.assert_close(x_t, in_float64(scheduler).add_noise(x_0, eps, t))


@pytest.mark.equation("L_DDPM", "01_mdp.denoising_loss")
def test_denoising_loss_averages_over_pictures_and_numbers_and_weighs_pictures():
    pred, eps, weight = randn(3, 2, 3, 5, seed=1), randn(3, 2, 3, 5, seed=2), [2.0, 0.0, 0.5]
    errors = [((a - b).numpy() ** 2).mean() for a, b in zip(pred, eps)]
    pred.requires_grad_()
    assert mdp.denoising_loss(pred, eps).item() == pytest.approx(sum(errors) / 3)
    loss = mdp.denoising_loss(pred, eps, torch.tensor(weight).double())
    assert loss.item() == pytest.approx((2 * errors[0] + 0.5 * errors[2]) / 3)
    slope, = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(slope[0], 2 * 2 * (pred - eps)[0] / 30 / 3)
    with pytest.raises(AssertionError):  # a shape that would broadcast in silence
        mdp.denoising_loss(pred, eps, torch.ones(3, 1))


# ---- one step back --------------------------------------------------------------------------


class FakeUNet:
    """ε = x + t/1000 + mean(c), and a record of how many pictures each call had."""
    def __init__(self, dtype=torch.float64):
        self.dtype, self.calls = dtype, []

    def __call__(self, x, t, encoder_hidden_states):
        assert x.dtype == encoder_hidden_states.dtype == self.dtype and t.shape == (len(x),)
        self.calls.append(len(x))
        shift = t.to(x.dtype) / 1000 + encoder_hidden_states.mean((1, 2))
        return SimpleNamespace(sample=x + shift.view(-1, 1, 1, 1))


@pytest.mark.equation("guidance", "01_mdp.predict_noise")
@pytest.mark.parametrize("t", (torch.tensor([901, 1, 501]), torch.tensor(501)))
@pytest.mark.parametrize("scale, calls", ((7.5, [6]), (1.0, [3])))  # none is half the cost
def test_guidance_goes_from_the_empty_prompt_past_the_prompt_in_one_call(scale, calls, t):
    unet, x = FakeUNet(), randn(3, 4, 2, 2)
    prompt, empty = randn(3, 5, 6, seed=1), randn(1, 5, 6, seed=2)
    eps = mdp.predict_noise(unet, x, t, prompt, empty, scale)
    shift = empty.mean() + scale * (prompt.mean((1, 2)) - empty.mean()) + t.double() / 1000
    torch.testing.assert_close(eps, x + shift.view(3, 1, 1, 1), rtol=0, atol=1e-12)
    assert unet.calls == calls
    half = FakeUNet(torch.bfloat16)  # answers in bfloat16, and is raised before it is combined
    assert mdp.predict_noise(half, x.float(), t, prompt, empty, scale).dtype == torch.float32


SCHEDULES = [(prediction, dict(timestep_spacing=spacing))
             for prediction in PREDICTIONS for spacing in ("leading", "trailing")]
SCHEDULES += [("v_prediction", dict(timestep_spacing="trailing", rescale_betas_zero_snr=True))]


@pytest.mark.equation("DDIM eq. 12", "01_mdp.step_mean_std")
@pytest.mark.equation("DDIM eq. 16", "01_mdp.ddim_coefficients")
@pytest.mark.parametrize("num_steps", (1, 6, 11, 34))  # of which none but 1 divides 1000
@pytest.mark.parametrize("prediction, settings", SCHEDULES)
def test_step_is_the_step_of_diffusers(prediction, settings, num_steps):
    scheduler = stable_scheduler(num_steps, prediction_type=prediction, **settings)
    exact = in_float64(scheduler)
    pred, x, noise = (randn(2, 4, 3, 5, seed=s) for s in range(3))
    for t in ends_and_middle(scheduler):
        for eta in (1.0, 0.4):
            mean, std = mdp.step_mean_std(scheduler, pred, t, x, eta)
            assert std.dtype == torch.float64 and std.shape == (1, 1, 1, 1) and std > 0
            expected = exact.step(pred, t, x, eta=eta, variance_noise=noise).prev_sample
            # Where ᾱ_T is 0, so is 1−ᾱ_{t−1}−σ². The root of its rounding error is 1e-8, or, in
            # diffusers, NaN.
            atol = 1e-7 if "rescale_betas_zero_snr" in settings else 1e-12
            x_prev, same = mean + std * noise, expected.isfinite()
            torch.testing.assert_close(x_prev[same], expected[same], rtol=0, atol=atol)
            low, low_std = mdp.step_mean_std(scheduler, pred.float(), t, x.float(), eta)
            assert low.dtype == torch.float32 and torch.equal(low_std, std.float())
            torch.testing.assert_close(low, mean.float(), rtol=1e-5, atol=2e-3)
            assert mean.isfinite().all() and mdp.noise_weight(scheduler, t, eta).isfinite().all()


@pytest.mark.equation("σ_t > 0", "support.models.set_timesteps")
@pytest.mark.parametrize("num_steps, settings", (
    (10, dict(steps_offset=0)), (10, dict(set_alpha_to_one=True)), (1000, dict()),
    (10, dict(timestep_spacing="linspace")), (1000, dict(timestep_spacing="trailing")),
    (10, dict(timestep_spacing="trailing", set_alpha_to_one=True))))
def test_a_schedule_with_a_step_without_noise_is_refused(num_steps, settings):
    with pytest.raises(ValueError, match=f"--num-steps {num_steps} .*scheduler"):
        models.set_timesteps(stable_scheduler(**settings), num_steps)
    models.set_timesteps(stable_scheduler(), 10)
    models.set_timesteps(stable_scheduler(timestep_spacing="trailing"), 10)


@pytest.mark.equation("log p", "01_mdp.log_prob")
@pytest.mark.equation("KL_t", "01_mdp.kl_divergence")
def test_log_prob_and_kl_and_their_gradients_are_torch_distributions():
    x, mean = (randn(5, 4, 3, 2, seed=seed).requires_grad_() for seed in (1, 2))
    std = double([0.01, 0.5, 1.0, 2.0, 30.0]).view(5, 1, 1, 1)
    p, q = (Independent(Normal(m, std.expand_as(m)), 3) for m in (mean, x))
    for ours, theirs in ((mdp.log_prob(x, mean, std), p.log_prob(x)),
                         (mdp.kl_divergence(mean, x, std), kl_divergence(p, q))):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)
        gradients = [torch.autograd.grad(v.sum(), (mean, x)) for v in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-11)
    for function in (mdp.log_prob, mdp.kl_divergence):
        with pytest.raises(AssertionError):
            function(x, mean[:1], std)


@pytest.mark.equation("κ_t/σ_t", "01_mdp.noise_weight")
@pytest.mark.parametrize("eta", (1.0, 0.8))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_weight_is_the_derivative_of_the_textbooks_mean_over_sigma(prediction, eta):
    scheduler = stable_scheduler(prediction_type=prediction)
    weights = mdp.noise_weight(scheduler, scheduler.timesteps, eta)
    assert weights.shape == (10,)
    for weight, t in zip(weights, scheduler.timesteps.tolist()):
        pred = double(0.3).requires_grad_()
        mean, sigma = gaussian(scheduler, pred, t, 0.7, eta)
        slope, = torch.autograd.grad(mean, pred)
        assert weight.item() == pytest.approx(slope.abs().item() / sigma, rel=1e-9)
        assert mdp.noise_weight(scheduler, t, eta).item() == weight.item()


# ---- the policy, and a trajectory -----------------------------------------------------------


@pytest.mark.equation("policy", "01_mdp.policy")
@pytest.mark.equation("x̂_0", "01_mdp.x0_and_noise")
@pytest.mark.parametrize("eta, scale", ((0.3, 1.0), (1.0, 3.0)))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_policy_at_a_state_is_ddims_gaussian_of_its_own_step_and_prompt(prediction, eta, scale):
    scheduler = stable_scheduler(4, prediction_type=prediction)
    pipe = SimpleNamespace(scheduler=scheduler, unet=FakeUNet())
    trajectory = SimpleNamespace(
        policy=mdp.policy, latents=randn(3, 5, 2, 2, 2), timesteps=scheduler.timesteps,
        prompt_embeds=randn(3, 5, 6, seed=1), negative_embeds=randn(1, 5, 6, seed=2))
    config = mdp.Config(eta=eta, guidance_scale=scale)
    i, k = torch.tensor([2, 0, 2, 1]), torch.tensor([3, 0, 1, 2])
    mean, std = mdp.policy_at(pipe, trajectory, i, k, config)
    for n in range(4):
        x_t, t = trajectory.latents[i[n], k[n]], scheduler.timesteps[k[n]].item()
        c, empty = trajectory.prompt_embeds[i[n]].mean(), trajectory.negative_embeds.mean()
        pred = x_t + t / 1000 + empty + scale * (c - empty)
        mu, sigma = gaussian(scheduler, pred, t, x_t, eta)
        torch.testing.assert_close(mean[n], mu, rtol=0, atol=1e-11)
        assert std[n].item() == pytest.approx(sigma, rel=1e-12)
        bar, _, _ = mdp.ddim_coefficients(scheduler, t, eta)
        x_0, eps = mdp.x0_and_noise(scheduler, pred, bar, x_t)
        torch.testing.assert_close(bar.sqrt() * x_0 + (1 - bar).sqrt() * eps, x_t)


@pytest.mark.equation("rollout", "01_mdp.rollout")
@pytest.mark.parametrize("eta, scale, steps", ((1.0, 1.0, 4), (0.6, 3.0, 3)))
@torch.no_grad()
def test_rollout_is_a_slow_loop_over_the_textbooks_step(pipe, eta, scale, steps):
    config = mdp.Config(eta=eta, guidance_scale=scale, num_steps=steps, batch_size=2, seed=3)
    before = torch.get_rng_state()
    sizes = []

    def policy(pipe, x_t, *rest):
        sizes.append(len(x_t))
        return mdp.policy(pipe, x_t, *rest)

    trajectory = mdp.rollout(pipe, PROMPTS, config, "train", 7, policy)
    assert sizes == [2] * steps + [1] * steps  # as --batch-size has it, by the policy passed on
    assert torch.equal(before, torch.get_rng_state()), "global random numbers were drawn"
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    empty = models.encode_prompts(pipe, [""])
    assert trajectory.prompts == PROMPTS and torch.equal(trajectory.timesteps, scheduler.timesteps)
    for i, prompt in enumerate(PROMPTS):
        stream = np.random.default_rng([3, training.PURPOSES.index("train"), 7, i])
        z = torch.from_numpy(stream.standard_normal((steps + 1, 4, 8, 8), dtype=np.float32))
        x, c = z[:1], models.encode_prompts(pipe, [prompt])
        for k, t in enumerate(scheduler.timesteps):
            torch.testing.assert_close(trajectory.latents[i, k], x[0], rtol=0, atol=3e-4)
            eps = pipe.unet(x, t, c).sample
            if scale != 1:
                eps_empty = pipe.unet(x, t, empty).sample
                eps = eps_empty + scale * (eps - eps_empty)
            mu, sigma = gaussian(scheduler, eps, t.item(), x, eta)
            torch.testing.assert_close(trajectory.means[i, k], mu[0], rtol=0, atol=3e-4)
            drawn = Normal(0, sigma).log_prob(sigma * z[k + 1].double()).sum()
            assert trajectory.log_probs[i, k].item() == pytest.approx(drawn.item(), abs=0.01)
            x = (mu + sigma * z[k + 1]).float()
        torch.testing.assert_close(trajectory.latents[i, -1], x[0], rtol=0, atol=3e-4)
        assert difference([trajectory.images[i]], models.decode(pipe, x)) < 0.1


@pytest.mark.parametrize("dtype, scale, bound", (
    (torch.float32, 3.0, 1e-3), (torch.bfloat16, 1.0, 0.05)))
def test_the_ratio_on_replay_is_exactly_one(dtype, scale, bound, pipe):
    """In the same batch; in another one log p moves by rounding, far less than a clip of 0.2.

    Were the latents rounded to bfloat16 after they are scored, the ratio would be far from 1.
    """
    pipe = copy.deepcopy(pipe)
    pipe.unet.to(dtype)
    config = mdp.Config(num_steps=2, guidance_scale=scale, eta=0.8)
    trajectory = mdp.rollout(pipe, PROMPTS, config, "train")
    for stored in (trajectory.latents, trajectory.means, trajectory.log_probs):
        assert stored.dtype == torch.float32 and not stored.requires_grad
    for k in range(2):
        mean, std = mdp.policy_at(pipe, trajectory, torch.arange(3), k, config)
        log_prob = mdp.log_prob(trajectory.latents[:, k + 1], mean, std)
        assert log_prob.requires_grad and torch.equal(log_prob, trajectory.log_probs[:, k])
        assert torch.equal(mean, trajectory.means[:, k])
    i, k = torch.tensor([2, 0, 1, 0]), torch.tensor([1, 0, 0, 1])
    mean, std = mdp.policy_at(pipe, trajectory, i, k, config)
    log_prob = mdp.log_prob(trajectory.latents[i, k + 1], mean, std)
    assert (log_prob - trajectory.log_probs[i, k]).abs().max() < bound


def test_of_two_processes_each_draws_its_own_pictures(pipe, monkeypatch):
    config = mdp.Config(num_steps=2)
    monkeypatch.setenv("RANK", "1")  # as a cluster leaves it: alone it means nothing
    monkeypatch.setenv("WORLD_SIZE", "")
    whole = mdp.rollout(pipe, PROMPTS, config, "train")
    assert None not in whole.images
    monkeypatch.setenv("WORLD_SIZE", "2")
    mine = mdp.rollout(pipe, PROMPTS, config, "train")
    torch.testing.assert_close(mine.latents[1], whole.latents[1], rtol=0, atol=1e-4)
    assert not mine.latents[[0, 2]].any() and not mine.log_probs[[0, 2]].any()
    assert [image is None for image in mine.images] == [True, False, True]


def test_mains_table_and_beliefs_are_of_its_flags(pipe, monkeypatch, tmp_path, capsys):
    drawn = []
    monkeypatch.setattr(mdp.figures, "beliefs", lambda *arguments: drawn.extend(arguments))
    mdp.main(["--eta", "0.5", "--guidance-scale", "2", "--num-steps", "3", "--prompts", *PROMPTS,
              "--seed", "4", "--out", str(tmp_path / "b.png"), "--device", "cpu"])
    out, trajectory, beliefs = drawn
    config = mdp.Config(eta=0.5, guidance_scale=2.0, num_steps=3, seed=4)
    again = mdp.rollout(pipe, PROMPTS, config, "examples")
    assert torch.equal(trajectory.latents, again.latents) and out == tmp_path / "b.png"
    _, _, *lines, _ = [line.split() for line in capsys.readouterr().out.splitlines()]
    for k, line in enumerate(lines):
        t = again.timesteps[k]
        weight = mdp.noise_weight(pipe.scheduler, t, 0.5).item()
        _, _, sigma = mdp.ddim_coefficients(pipe.scheduler, t, 0.5)
        wanted = [t, sigma, weight, again.log_probs[0, k], 1]
        assert [float(word) for word in line] == pytest.approx(list(map(float, wanted)), abs=1e-3)
        a = pipe.scheduler.alphas_cumprod[t]
        with torch.no_grad():
            eps = mdp.predict_noise(pipe.unet, again.latents[:, k], t, again.prompt_embeds,
                                    again.negative_embeds, 2.0)
        x_0 = (again.latents[:, k] - (1 - a).sqrt() * eps) / a.sqrt()
        assert difference(beliefs[k], models.decode(pipe, x_0)) < 0.5
