"""Chapter 1 against diffusers' own step, DDPM's posterior, torch.distributions, and slow loops."""
import copy
import math
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Independent, Normal, kl_divergence

from support import models, training
from tests.oracles import gaussian, randn, stable_scheduler

mdp = import_module("01_mdp")

PREDICTIONS = ("epsilon", "v_prediction", "sample")
PROMPTS = ["a red circle", "two blue squares", "a blue star on the left"]


def ends_and_middle(scheduler):
    t = scheduler.timesteps.tolist()
    return [t[0], t[len(t) // 2], *t[-2:]]


def in_float64(scheduler):
    """A copy with the same table in float64, to run diffusers' own step() without its rounding."""
    exact = copy.deepcopy(scheduler)
    exact.alphas_cumprod = exact.alphas_cumprod.double()
    exact.final_alpha_cumprod = exact.final_alpha_cumprod.double()
    return exact


def diffusers_step(scheduler, pred, t, x, eta, noise):
    return scheduler.step(pred, t, x, eta=eta, variance_noise=noise).prev_sample


@pytest.mark.equation("x_t", "01_mdp.forward_process")
def test_forward_process_is_what_diffusers_add_noise_does():
    scheduler, t = stable_scheduler(), torch.tensor([0, 1, 500, 999])
    x_0, eps = randn(4, 2, 3, 5, seed=1), randn(4, 2, 3, 5, seed=2)
    x_t = mdp.forward_process(scheduler, x_0, t, eps)
    torch.testing.assert_close(x_t, in_float64(scheduler).add_noise(x_0, eps, t))
    with pytest.raises(AssertionError):
        mdp.forward_process(scheduler, x_0, t[:1], eps)


@pytest.mark.equation("L_DDPM", "01_mdp.denoising_loss")
def test_denoising_loss_averages_over_pictures_and_numbers_and_weighs_pictures():
    pred, eps, weight = randn(3, 2, 3, 5, seed=1), randn(3, 2, 3, 5, seed=2), [2.0, 0.0, 0.5]
    errors = [((a - b).numpy() ** 2).mean() for a, b in zip(pred, eps)]
    assert mdp.denoising_loss(pred, eps).item() == pytest.approx(sum(errors) / 3)
    loss = mdp.denoising_loss(pred, eps, torch.tensor(weight).double())
    assert loss.item() == pytest.approx((2 * errors[0] + 0.5 * errors[2]) / 3)
    with pytest.raises(AssertionError):
        mdp.denoising_loss(pred, eps, torch.ones(3, 1))


@pytest.mark.equation("DDIM eq. 12", "01_mdp.step_mean_std")
@pytest.mark.equation("DDIM eq. 16", "01_mdp.ddim_coefficients")
@pytest.mark.parametrize("settings", (
    dict(), dict(set_alpha_to_one=True), dict(clip_sample=True),
    # Steps that do not divide 1000, and an offset of 0, where t − 1000/T is exactly 0 once.
    dict(num_steps=6, set_alpha_to_one=True), dict(num_steps=1, set_alpha_to_one=True),
    dict(num_steps=15, steps_offset=0, set_alpha_to_one=True)))
@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace"))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_step_is_the_step_of_diffusers(prediction, spacing, settings):
    scheduler = stable_scheduler(prediction_type=prediction, timestep_spacing=spacing, **settings)
    exact = in_float64(scheduler)
    pred, x, noise = (randn(2, 4, 3, 5, seed=s) for s in range(3))
    low_pred, low_x = pred.float(), x.float()
    for t in ends_and_middle(scheduler):
        for eta in (1.0, 0.4):
            mean, std = mdp.step_mean_std(scheduler, pred, t, x, eta)
            assert std.dtype == torch.float64 and std.shape == (2, 1, 1, 1)
            expected = diffusers_step(exact, pred, t, x, eta, noise)
            torch.testing.assert_close(mean + std * noise, expected, rtol=0, atol=1e-12)
            # In float32 as good as can be: the float64 answer, rounded once.
            best, _ = mdp.step_mean_std(scheduler, low_pred.double(), t, low_x.double(), eta)
            low, low_std = mdp.step_mean_std(scheduler, low_pred, t, low_x, eta)
            assert torch.equal(low, best.float()) and torch.equal(low_std, std.float())


@pytest.mark.equation("DDPM's posterior", "01_mdp.step_mean_std")
@pytest.mark.parametrize("num_steps", (3, 10, 50))
@pytest.mark.parametrize("ends_on_1", (False, True))
def test_step_at_eta_1_is_the_posterior_of_ddpm(num_steps, ends_on_1):
    """q(x_{t-1} | x_t, x_0) of DDPM, in DDPM's own parameters: other algebra, same Gaussian."""
    scheduler = stable_scheduler(num_steps, prediction_type="sample", set_alpha_to_one=ends_on_1)
    x_0, x_t = randn(1, 4, 2, 2, seed=1), randn(1, 4, 2, 2, seed=2)
    table = scheduler.alphas_cumprod.tolist()
    for t in ends_and_middle(scheduler):
        previous = t - 1000 // num_steps
        bar_prev = 1.0 if previous < 0 and ends_on_1 else table[max(previous, 0)]
        alpha, beta, left = table[t] / bar_prev, 1 - table[t] / bar_prev, 1 - table[t]
        expected = math.sqrt(bar_prev) * beta * x_0 + math.sqrt(alpha) * (1 - bar_prev) * x_t
        mean, std = mdp.step_mean_std(scheduler, x_0, t, x_t)
        torch.testing.assert_close(mean, expected / left, rtol=0, atol=1e-12)
        assert std.item() == pytest.approx(math.sqrt(beta * (1 - bar_prev) / left), abs=1e-13)


def test_zero_terminal_snr_works_for_v():
    scheduler = stable_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True,
                                 timestep_spacing="trailing")
    pred, x, noise = (randn(1, 4, 3, 3, seed=s) for s in range(3))
    for t in ends_and_middle(scheduler):
        mean, std = mdp.step_mean_std(scheduler, pred, t, x)
        expected = diffusers_step(in_float64(scheduler), pred, t, x, 1.0, noise)
        # 1−ᾱ_{t−1}−σ² is 0 at the first step: under the root its rounding error grows to 1e-8.
        torch.testing.assert_close(mean + std * noise, expected, rtol=0, atol=1e-7)
    for num_steps in range(2, 100):  # rounding makes 1−ᾱ_{t−1}−σ² negative for some of them
        scheduler.set_timesteps(num_steps)
        assert torch.isfinite(mdp.step_mean_std(scheduler, pred, 999, x)[0]).all()


@pytest.mark.parametrize("settings, message", (
    (dict(thresholding=True), "thresholding"), (dict(prediction_type="flow"), "prediction_type"),
    (dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr")))
def test_schedulers_that_the_equations_do_not_hold_for_are_refused(settings, message):
    models.check_scheduler(stable_scheduler())
    with pytest.raises(ValueError, match=message):
        models.check_scheduler(stable_scheduler(**settings))


@pytest.mark.parametrize("scheduler, t, message", (
    (stable_scheduler(), -1, "--num-steps 10"), (stable_scheduler(1000), 1000, "--num-steps 1000"),
    (DDIMScheduler(), 1, "set_timesteps")))
def test_steps_that_cannot_be_taken_are_refused(scheduler, t, message):
    x = randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match=message):
        mdp.step_mean_std(scheduler, x, t, x)


@pytest.mark.equation("log p", "01_mdp.log_prob")
@pytest.mark.equation("z", "01_mdp.standardize")
@pytest.mark.equation("KL_t", "01_mdp.kl_divergence")
def test_log_prob_and_kl_and_their_gradients_are_torch_distributions():
    x, mean = (randn(5, 4, 3, 2, seed=seed).requires_grad_() for seed in (1, 2))
    std = torch.tensor([0.01, 0.5, 1.0, 2.0, 30.0], dtype=torch.float64).view(5, 1, 1, 1)
    p, q = (Independent(Normal(m, std.expand_as(m)), 3) for m in (mean, x))
    for ours, theirs in ((mdp.log_prob(x, mean, std), p.log_prob(x)),
                         (mdp.kl_divergence(mean, x, std), kl_divergence(p, q))):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)
        gradients = [torch.autograd.grad(v.sum(), (mean, x)) for v in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-11)
    low = [numbers.detach().bfloat16() for numbers in (x, mean, std)]  # raised before arithmetic
    for function in (mdp.log_prob, mdp.kl_divergence):
        assert torch.equal(function(*low), function(*(numbers.float() for numbers in low)))


@pytest.mark.equation("log p", "01_mdp.log_prob")
@pytest.mark.equation("KL_t", "01_mdp.kl_divergence")
def test_a_deterministic_row_gives_zero_and_no_gradient():
    """set_alpha_to_one: the last step lands on x_0. The other rows must not notice."""
    scheduler = stable_scheduler(set_alpha_to_one=True)
    pred = randn(3, 4, 2, 2, seed=1).requires_grad_()
    x_t, x_prev = randn(3, 4, 2, 2, seed=2), randn(3, 4, 2, 2, seed=3)
    mean, std = mdp.step_mean_std(scheduler, pred, torch.tensor([901, 1, 501]), x_t)
    for value in (mdp.log_prob(x_prev, mean, std), mdp.kl_divergence(mean, x_prev, std)):
        gradient, = torch.autograd.grad(value.sum(), pred, retain_graph=True)
        for numbers in (value, gradient.abs().sum((1, 2, 3))):
            assert numbers.isfinite().all() and (numbers != 0).tolist() == [True, False, True]


@pytest.mark.equation("c_t/σ_t", "01_mdp.noise_weight")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_weight_is_the_derivative_of_the_mean_over_sigma(prediction):
    scheduler = stable_scheduler(prediction_type=prediction)
    pred, x, delta = (randn(1, seed=s) for s in range(3))
    weights = mdp.noise_weight(scheduler, scheduler.timesteps, 0.8)
    for k, t in enumerate(scheduler.timesteps.tolist()):
        here, sigma = gaussian(scheduler, pred, t, x, 0.8)
        there, _ = gaussian(scheduler, pred + delta, t, x, 0.8)
        assert weights[k].item() == pytest.approx(((there - here) / delta).abs().item() / sigma)
    assert mdp.noise_weight(stable_scheduler(set_alpha_to_one=True), 1).tolist() == [math.inf]
    with pytest.raises(ValueError, match="clip_sample"):
        mdp.noise_weight(stable_scheduler(clip_sample=True), 1)


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
def test_guidance_goes_from_the_empty_prompt_past_the_prompt_in_one_call():
    unet, x, t = FakeUNet(), randn(3, 4, 2, 2), torch.tensor([901, 1, 501])
    prompt, empty = randn(3, 5, 6, seed=1), randn(1, 5, 6, seed=2)
    for scale, calls in ((7.5, [6]), (1.0, [6, 3])):  # no guidance, at half the cost
        eps = mdp.predict_noise(unet, x, t, prompt, empty, scale)
        shift = empty.mean() + scale * (prompt.mean((1, 2)) - empty.mean()) + t.double() / 1000
        torch.testing.assert_close(eps, x + shift.view(3, 1, 1, 1), rtol=0, atol=1e-12)
        assert unet.calls == calls
    half = FakeUNet(torch.bfloat16)  # answers in bfloat16, and is raised before it is combined
    assert mdp.predict_noise(half, x.float(), t, prompt, empty, 7.5).dtype == torch.float32


@pytest.mark.equation("log p", "01_mdp.log_prob")
@pytest.mark.equation("policy", "01_mdp.policy")
@pytest.mark.equation("DDIM eq. 16", "01_mdp.ddim_coefficients")
@pytest.mark.equation("x̂_0", "01_mdp.x0_and_noise")
@pytest.mark.parametrize("eta, scale", ((0.3, 1.0), (0.6, 3.0), (1.0, 3.0)))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_density_at_a_state_is_ddims_gaussian_of_its_own_step_and_prompt(prediction, eta, scale):
    scheduler = stable_scheduler(4, prediction_type=prediction)
    pipe = SimpleNamespace(scheduler=scheduler, unet=FakeUNet())
    trajectory = SimpleNamespace(
        latents=randn(3, 5, 2, 2, 2), timesteps=scheduler.timesteps,
        prompt_embeds=randn(3, 5, 6, seed=1), negative_embeds=randn(1, 5, 6, seed=2))
    i, k = torch.tensor([2, 0, 2, 1]), torch.tensor([3, 0, 1, 2])
    mean, std = mdp.policy_at(pipe, trajectory, i, k, mdp.Config(eta=eta, guidance_scale=scale))
    x_prev = trajectory.latents[i, k + 1]
    log_prob = mdp.log_prob(x_prev, mean, std)
    for n in range(4):
        x_t, t = trajectory.latents[i[n], k[n]], scheduler.timesteps[k[n]].item()
        c, empty = trajectory.prompt_embeds[i[n]].mean(), trajectory.negative_embeds.mean()
        pred = x_t + t / 1000 + empty + scale * (c - empty)
        mu, sigma = gaussian(scheduler, pred, t, x_t, eta)
        torch.testing.assert_close(mean[n], mu, rtol=0, atol=1e-11)
        expected = Normal(mu, sigma).log_prob(x_prev[n]).sum().item()
        assert log_prob[n].item() == pytest.approx(expected, rel=1e-9)
        bar, _, sigma_t = mdp.ddim_coefficients(scheduler, t, eta)
        assert bar.item() == scheduler.alphas_cumprod[t].item()
        assert std[n].item() == sigma_t.item() == pytest.approx(sigma, rel=1e-12)
        x_0, eps = mdp.x0_and_noise(scheduler, pred, bar, x_t)
        torch.testing.assert_close(bar.sqrt() * x_0 + (1 - bar).sqrt() * eps, x_t)


@pytest.mark.equation("rollout", "01_mdp.rollout")
@pytest.mark.parametrize("eta, scale, steps", ((1.0, 1.0, 4), (0.6, 3.0, 5), (1.0, 0.0, 2)))
@torch.no_grad()
def test_rollout_is_a_slow_loop_over_diffusers_own_step(pipe, eta, scale, steps):
    config = mdp.Config(eta=eta, guidance_scale=scale, num_steps=steps, batch_size=2)
    before = torch.get_rng_state()
    trajectory = mdp.rollout(pipe, PROMPTS, config, (3, "train", 7))
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
            eps_empty, eps = pipe.unet(x, t, empty).sample, pipe.unet(x, t, c).sample
            eps = eps_empty + scale * (eps - eps_empty)
            mu, sigma = gaussian(scheduler, eps, t.item(), x, eta)
            torch.testing.assert_close(trajectory.means[i, k], mu[0], rtol=0, atol=3e-4)
            drawn = Normal(0, sigma).log_prob(sigma * z[k + 1].double()).sum()
            assert trajectory.log_probs[i, k].item() == pytest.approx(drawn.item(), abs=0.01)
            x = diffusers_step(scheduler, eps, t, x, eta, z[k + 1:k + 2])
        torch.testing.assert_close(trajectory.latents[i, -1], x[0], rtol=0, atol=3e-4)
        pixels = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample[0] / 2 + 0.5
        picture = torch.from_numpy(np.array(trajectory.images[i])).float() / 255
        expected = pixels.clamp(0, 1).permute(1, 2, 0)
        torch.testing.assert_close(picture, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("dtype, scale", (
    ("float32", 1.0), ("float32", 3.0), ("bfloat16", 1.0)))
def test_the_ratio_on_replay_is_exactly_one(dtype, scale):
    """Trap 1: round the latents to bfloat16 after scoring them, and the ratio is far from 1."""
    pipe = models.load_pipeline("tiny_sd", "cpu", dtype)
    config = mdp.Config(num_steps=4, guidance_scale=scale, eta=0.8)
    trajectory = mdp.rollout(pipe, PROMPTS, config, (0, "train", 0))
    for stored in (trajectory.latents, trajectory.means, trajectory.log_probs):
        assert stored.dtype == torch.float32 and not stored.requires_grad
    for k in range(4):
        mean, std = mdp.policy_at(pipe, trajectory, torch.arange(3), torch.full((3,), k), config)
        log_prob = mdp.log_prob(trajectory.latents[:, k + 1], mean, std)
        assert log_prob.requires_grad and torch.equal(log_prob, trajectory.log_probs[:, k])
        assert torch.equal(mean, trajectory.means[:, k])


@pytest.mark.parametrize("dtype, bound", (("float32", 1e-3), ("bfloat16", 0.05)))
def test_a_log_prob_hardly_depends_on_who_else_is_in_the_batch(dtype, bound):
    """A clip range of 0.2 is on its exponential, so a move of 0.05 would not yet be clipped."""
    pipe = models.load_pipeline("tiny_sd", "cpu", dtype)
    config = mdp.Config(num_steps=4, guidance_scale=3.0)
    trajectory = mdp.rollout(pipe, PROMPTS, config, (0, "train", 0))
    with torch.no_grad():
        for i, k in [([0], 0), ([1, 2], 1), ([2], 3), ([2, 0, 1, 0], 2)]:
            i, k = torch.tensor(i), torch.full((len(i),), k)
            mean, std = mdp.policy_at(pipe, trajectory, i, k, config)
            moved = mdp.log_prob(trajectory.latents[i, k + 1], mean, std)
            assert (moved - trajectory.log_probs[i, k]).abs().max() < bound


@pytest.mark.parametrize("prompts, eta, named", (
    (PROMPTS, 0.0, "--eta 0.*density"), ([], 1.0, "--prompts")))
def test_no_policy_and_no_prompts_are_refused(prompts, eta, named, pipe):
    with pytest.raises(ValueError, match=named):
        mdp.rollout(pipe, prompts, mdp.Config(num_steps=4, eta=eta), (0, "train", 0))


def test_mains_table_and_beliefs_are_of_its_flags(monkeypatch, tmp_path, capsys):
    drawn, original = [], mdp.policy_at
    monkeypatch.setattr(mdp.figures, "beliefs", lambda *arguments: drawn.extend(arguments))

    def shifted(pipe, trajectory, i, k, config):  # a picture alone, at the first step only
        mean, std = original(pipe, trajectory, i, k, config)
        return mean + (len(i) == 1 and k[0].item() == 0) * 0.01, std

    monkeypatch.setattr(mdp, "policy_at", shifted)
    mdp.main(["--eta", "0.5", "--guidance-scale", "2", "--num-steps", "3", "--prompts", *PROMPTS,
              "--device", "cpu", "--out", str(tmp_path / "b.png")])
    _, _, *lines, largest, _ = [line.split() for line in capsys.readouterr().out.splitlines()]
    pipe = models.load_pipeline("tiny_sd", "cpu")
    config = mdp.Config(eta=0.5, guidance_scale=2.0, num_steps=3)
    trajectory = mdp.rollout(pipe, PROMPTS, config, (0, "examples", 0))
    weights = mdp.noise_weight(pipe.scheduler, trajectory.timesteps, 0.5)
    assert [float(line[2]) for line in lines] == pytest.approx(weights.tolist(), abs=1e-3)
    assert largest[-3] == max((line[-1].lstrip("-") for line in lines), key=float)
    for k, t in enumerate(trajectory.timesteps):
        with torch.no_grad():
            eps = mdp.predict_noise(pipe.unet, trajectory.latents[:, k], t,
                                    trajectory.prompt_embeds, trajectory.negative_embeds, 2.0)
        a = pipe.scheduler.alphas_cumprod[t]
        x_0 = (trajectory.latents[:, k] - (1 - a).sqrt() * eps) / a.sqrt()
        for found, wanted in zip(drawn[2][k], models.decode(pipe, x_0), strict=True):
            assert np.abs(np.asarray(found, float) - np.asarray(wanted, float)).mean() < 0.5
