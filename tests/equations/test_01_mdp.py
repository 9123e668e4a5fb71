"""Chapter 1 against diffusers' own step, DDPM's posterior, torch.distributions, and slow loops."""
import copy
import math
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Independent, Normal
from torch.distributions import kl_divergence as torch_kl

from support import models, training

mdp = import_module("01_mdp")

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
PROMPTS = ["a red circle", "two blue squares", "a blue star on the left"]


def make_scheduler(num_steps=10, **settings):
    """Stable Diffusion v1's scheduler, with some settings changed."""
    stable = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                  steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    scheduler = DDIMScheduler(**stable | settings)
    scheduler.set_timesteps(num_steps)
    return scheduler


def ends_and_middle(scheduler):
    t = scheduler.timesteps.tolist()
    return [t[0], t[len(t) // 2], t[-2], t[-1]] if len(t) > 3 else t


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def in_float64(scheduler):
    """A copy with the same table in float64, to run diffusers' own step() without its rounding."""
    exact = copy.deepcopy(scheduler)
    exact.alphas_cumprod = exact.alphas_cumprod.double()
    exact.final_alpha_cumprod = exact.final_alpha_cumprod.double()
    return exact


def diffusers_step(scheduler, pred, t, x, eta, noise):
    return scheduler.step(pred, t, x, eta=eta, variance_noise=noise).prev_sample


def gaussian_by_hand(scheduler, pred, t, x, eta):
    """μ and σ from DDIM's equations 12 and 16, with the textbook's x̂_0 and ε; plain floats."""
    table = [float(a) for a in scheduler.alphas_cumprod.double()]
    a, previous = table[t], t - 1000 // scheduler.num_inference_steps
    b = table[previous] if previous >= 0 else float(scheduler.final_alpha_cumprod)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        x_0, eps = (x - math.sqrt(1 - a) * pred) / math.sqrt(a), pred
    elif kind == "v_prediction":
        x_0 = math.sqrt(a) * x - math.sqrt(1 - a) * pred
        eps = math.sqrt(a) * pred + math.sqrt(1 - a) * x
    else:
        x_0, eps = pred, (x - math.sqrt(a) * pred) / math.sqrt(1 - a)
    sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    toward_x_t = math.sqrt(max(1 - b - sigma**2, 0))
    return math.sqrt(b) * x_0 + toward_x_t * eps, sigma


# ---- how the model was pretrained -----------------------------------------------------------


@pytest.mark.equation("x_t", "01_mdp.forward_process")
def test_forward_process_is_what_diffusers_add_noise_does():
    scheduler = make_scheduler()
    x_0, eps = randn(4, 2, 3, 5, seed=1), randn(4, 2, 3, 5, seed=2)
    t = torch.tensor([0, 1, 500, 999])
    x_t = mdp.forward_process(scheduler, x_0, t, eps)
    torch.testing.assert_close(x_t, in_float64(scheduler).add_noise(x_0, eps, t))
    for i in range(4):
        share = float(scheduler.alphas_cumprod[t[i]])
        by_hand = math.sqrt(share) * x_0[i] + math.sqrt(1 - share) * eps[i]
        torch.testing.assert_close(x_t[i], by_hand, rtol=0, atol=1e-12)
    low = mdp.forward_process(scheduler, x_0.float(), t, eps.float())
    torch.testing.assert_close(low, scheduler.add_noise(x_0.float(), eps.float(), t))
    with pytest.raises(AssertionError):
        mdp.forward_process(scheduler, x_0, t[:1], eps)


@pytest.mark.equation("L_DDPM", "01_mdp.denoising_loss")
def test_denoising_loss_averages_over_pictures_and_numbers_and_weighs_pictures():
    pred, eps, weight = randn(3, 2, 3, 5, seed=1), randn(3, 2, 3, 5, seed=2), [2.0, 0.0, 0.5]
    plain, weighed = 0.0, 0.0
    for i in range(3):
        for left, right in zip(pred[i].flatten().tolist(), eps[i].flatten().tolist()):
            plain += (left - right) ** 2 / 30 / 3
            weighed += weight[i] * (left - right) ** 2 / 30 / 3
    assert mdp.denoising_loss(pred, eps).item() == pytest.approx(plain, rel=1e-12)
    loss = mdp.denoising_loss(pred, eps, torch.tensor(weight).double())
    assert loss.item() == pytest.approx(weighed, rel=1e-12)
    with pytest.raises(AssertionError):
        mdp.denoising_loss(pred, eps, torch.ones(3, 1))


# ---- one step: step_mean_std and what it is made of -----------------------------------------


@pytest.mark.equation("DDIM eq. 12", "01_mdp.step_mean_std")
@pytest.mark.parametrize("settings", (
    dict(), dict(set_alpha_to_one=True), dict(clip_sample=True),
    # Steps that do not divide 1000, and an offset of 0, where t − 1000/T is exactly 0 once.
    dict(num_steps=6, set_alpha_to_one=True), dict(num_steps=1, set_alpha_to_one=True),
    dict(num_steps=15, steps_offset=0, set_alpha_to_one=True)))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_step_is_the_step_of_diffusers(prediction, spacing, settings):
    scheduler = make_scheduler(prediction_type=prediction, timestep_spacing=spacing, **settings)
    exact = in_float64(scheduler)
    # diffusers loses two digits at t = 1 where it divides by the small √(1−ᾱ_1).
    tolerance = 3e-5 if prediction == "sample" else 3e-6
    pred, x, noise = (randn(2, 4, 3, 5, seed=s) for s in range(3))
    for t in ends_and_middle(scheduler):
        for eta in (1.0, 0.4):
            mean, std = mdp.step_mean_std(scheduler, pred, t, x, eta)
            assert mean.dtype == std.dtype == torch.float64 and std.shape == (2, 1, 1, 1)
            expected = diffusers_step(exact, pred, t, x, eta, noise)
            torch.testing.assert_close(mean + std * noise, expected, rtol=0, atol=1e-12)

            low = [v.float() for v in (pred, x, noise)]
            mean, std = mdp.step_mean_std(scheduler, low[0], t, low[1], eta)
            assert mean.dtype == std.dtype == torch.float32
            expected = diffusers_step(scheduler, low[0], t, low[1], eta, low[2])
            torch.testing.assert_close(mean + std * low[2], expected, rtol=3e-7, atol=tolerance)
            # As good as float32 can be: the float64 answer, rounded once.
            best, best_std = mdp.step_mean_std(scheduler, low[0].double(), t, low[1].double(), eta)
            assert torch.equal(mean, best.float()) and torch.equal(std, best_std.float())


@pytest.mark.equation("log p", "01_mdp.log_prob")
@pytest.mark.equation("policy", "01_mdp.policy")
@pytest.mark.equation("DDIM eq. 16", "01_mdp.ddim_coefficients")
@pytest.mark.equation("x̂_0", "01_mdp.x0_and_noise")
@pytest.mark.parametrize("eta", (0.3, 0.7, 1.0))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_steps_density_is_that_of_ddims_gaussian_written_out(prediction, eta):
    scheduler, unet = make_scheduler(prediction_type=prediction), FakeUNet(torch.float64)
    pipe, config = SimpleNamespace(scheduler=scheduler, unet=unet), mdp.Config(eta=eta)
    x_t, z, prompt = randn(2, 3, 2, 2, seed=1), randn(2, 3, 2, 2, seed=2), randn(2, 5, 6)
    for t in ends_and_middle(scheduler):
        pred = unet.answer(x_t, torch.tensor([t, t]), prompt)
        mu, sigma = gaussian_by_hand(scheduler, pred, t, x_t, eta)
        x_prev = mu + sigma * z
        expected = Normal(mu, sigma).log_prob(x_prev).sum((1, 2, 3))
        mean, std = mdp.policy(pipe, x_t, t, prompt, None, config)
        log_prob = mdp.log_prob(x_prev, mean, std)
        torch.testing.assert_close(log_prob, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(mean, mu, rtol=0, atol=1e-11)
        assert std.flatten().tolist() == pytest.approx([sigma] * 2, rel=1e-12)
        bar, bar_prev, sigma_t = mdp.ddim_coefficients(scheduler, t, eta)
        assert bar.item() == float(scheduler.alphas_cumprod[t]) and bar_prev > bar
        assert sigma_t.dtype == torch.float64 and sigma_t.item() == pytest.approx(sigma, rel=1e-12)
        x_0, eps = mdp.x0_and_noise(scheduler, pred, bar.view(1, 1, 1, 1), x_t)
        torch.testing.assert_close(bar.sqrt() * x_0 + (1 - bar).sqrt() * eps, x_t)


@pytest.mark.equation("DDPM's posterior", "01_mdp.step_mean_std")
@pytest.mark.parametrize("num_steps", (3, 10, 50))
@pytest.mark.parametrize("final_alpha", ("first of the table", "one"))
def test_step_at_eta_1_is_the_posterior_of_ddpm(num_steps, final_alpha):
    """q(x_{t-1} | x_t, x_0) of DDPM, in DDPM's own parameters: other algebra, same Gaussian."""
    scheduler = make_scheduler(num_steps, prediction_type="sample",
                               set_alpha_to_one=final_alpha == "one")
    x_0, x_t = randn(1, 4, 2, 2, seed=1), randn(1, 4, 2, 2, seed=2)
    for t in ends_and_middle(scheduler):
        bar = scheduler.alphas_cumprod[t].item()
        previous = t - 1000 // num_steps
        last = 1.0 if final_alpha == "one" else scheduler.alphas_cumprod[0].item()
        bar_prev = scheduler.alphas_cumprod[previous].item() if previous >= 0 else last
        alpha = bar / bar_prev
        beta = 1 - alpha
        expected = math.sqrt(bar_prev) * beta * x_0 + math.sqrt(alpha) * (1 - bar_prev) * x_t
        expected = expected / (1 - bar)
        mean, std = mdp.step_mean_std(scheduler, x_0, t, x_t)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)
        assert std.item() == pytest.approx(math.sqrt(beta * (1 - bar_prev) / (1 - bar)), abs=1e-13)


def test_zero_terminal_snr_works_for_v_and_is_refused_for_epsilon():
    settings = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pred, x, noise = (randn(1, 4, 3, 3, seed=s) for s in range(3))
    scheduler = make_scheduler(10, prediction_type="v_prediction", **settings)
    assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[999] == 0
    for t in ends_and_middle(scheduler):
        mean, std = mdp.step_mean_std(scheduler, pred, t, x)
        expected = diffusers_step(in_float64(scheduler), pred, t, x, 1.0, noise)
        # 1−ᾱ_{t−1}−σ² is 0 at the first step: under the root its rounding error grows to 1e-8.
        torch.testing.assert_close(mean + std * noise, expected, rtol=0, atol=1e-7)
    for num_steps in range(2, 100):  # rounding makes 1−ᾱ_{t−1}−σ² negative for some of them
        scheduler.set_timesteps(num_steps)
        assert torch.isfinite(mdp.step_mean_std(scheduler, pred, 999, x)[0]).all()
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        models.check_scheduler(make_scheduler(10, **settings))


@pytest.mark.parametrize("settings, message", (
    (dict(thresholding=True), "thresholding"), (dict(prediction_type="flow"), "prediction_type")))
def test_schedulers_that_the_equations_do_not_hold_for_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        models.check_scheduler(make_scheduler(**settings))


@pytest.mark.parametrize("settings, t, message", (
    (dict(), -1, "--num-steps 10"), (dict(num_steps=1000), 1000, "--num-steps 1000")))
def test_steps_that_cannot_be_taken_are_refused(settings, t, message):
    x = randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match=message):
        mdp.step_mean_std(make_scheduler(**settings), x, t, x)
    with pytest.raises(ValueError, match="set_timesteps"):
        mdp.step_mean_std(DDIMScheduler(), x, 1, x)


# ---- log_prob, kl_divergence, noise_weight --------------------------------------------------


def normal(mean, std):
    return Independent(Normal(mean, std.expand_as(mean)), 3)


@pytest.mark.equation("log p", "01_mdp.log_prob")
def test_log_prob_and_its_gradient_are_torch_distributions():
    x, mean = randn(5, 4, 3, 2, seed=1), randn(5, 4, 3, 2, seed=2).requires_grad_()
    std = torch.tensor([0.01, 0.5, 1.0, 2.0, 30.0], dtype=torch.float64).view(5, 1, 1, 1)
    ours, theirs = mdp.log_prob(x, mean, std), normal(mean, std).log_prob(x)
    assert ours.shape == (5,) and ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-11)
    gradients = [torch.autograd.grad(v.sum(), mean)[0] for v in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-11)


@pytest.mark.equation("z", "01_mdp.standardize")
@pytest.mark.equation("KL_t", "01_mdp.kl_divergence")
def test_kl_and_its_gradient_are_torch_distributions():
    p, q = randn(3, 4, 3, 2, seed=1).requires_grad_(), randn(3, 4, 3, 2, seed=2)
    std = torch.tensor([0.01, 0.5, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    ours, theirs = mdp.kl_divergence(p, q, std), torch_kl(normal(p, std), normal(q, std))
    assert ours.shape == (3,)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(v.sum(), p)[0] for v in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert torch.equal(mdp.kl_divergence(p, p, std), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_is_raised_before_the_arithmetic(dtype):
    x, mean = (randn(2, 4, 8, 8, seed=s, dtype=dtype) for s in (1, 2))
    std = torch.full((2, 1, 1, 1), 0.02, dtype=dtype)
    for function in (mdp.log_prob, mdp.kl_divergence):
        low, high = function(x, mean, std), function(x.float(), mean.float(), std.float())
        assert low.dtype == torch.float32 and torch.equal(low, high)


def test_a_deterministic_row_gives_zero_and_no_gradient():
    """set_alpha_to_one: the last step lands on x_0. The other rows must not notice."""
    scheduler = make_scheduler(set_alpha_to_one=True)
    pred = randn(3, 4, 2, 2, seed=1).requires_grad_()
    x_t, x_prev = randn(3, 4, 2, 2, seed=2), randn(3, 4, 2, 2, seed=3)
    mean, std = mdp.step_mean_std(scheduler, pred, torch.tensor([901, 1, 501]), x_t)
    assert (std.flatten() > 0).tolist() == [True, False, True]
    for value in (mdp.log_prob(x_prev, mean, std), mdp.kl_divergence(mean, x_prev, std)):
        assert value[1] == 0 and torch.isfinite(value).all() and (value[[0, 2]] != 0).all()
        gradient, = torch.autograd.grad(value.sum(), pred, retain_graph=True)
        assert torch.isfinite(gradient).all() and (gradient[1] == 0).all()
        assert (gradient[[0, 2]] != 0).all()
    rest = [0, 2]
    torch.testing.assert_close(mdp.log_prob(x_prev, mean, std)[rest],
                               normal(mean[rest], std[rest]).log_prob(x_prev[rest]))


@pytest.mark.equation("c_t/σ_t", "01_mdp.noise_weight")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_weight_is_the_derivative_of_the_mean_over_sigma(prediction):
    scheduler = make_scheduler(10, prediction_type=prediction)
    pred, x, delta = (randn(1, 1, 1, 1, seed=s) for s in range(3))
    weights = mdp.noise_weight(scheduler, scheduler.timesteps, 0.8)
    for k, t in enumerate(scheduler.timesteps.tolist()):
        here, sigma = gaussian_by_hand(scheduler, pred, t, x, 0.8)
        there, _ = gaussian_by_hand(scheduler, pred + delta, t, x, 0.8)
        by_hand = ((there - here) / delta).abs().item() / sigma
        assert weights[k].item() == pytest.approx(by_hand, rel=1e-9)
        kl = Normal(here, sigma).log_prob(here) - Normal(there, sigma).log_prob(here)
        assert 0.5 * (weights[k] * delta).square().item() == pytest.approx(kl.item(), rel=1e-6)


def test_noise_weight_shouts_where_the_lesson_says():
    weight, long = (mdp.noise_weight(s, s.timesteps) for s in map(make_scheduler, (10, 50)))
    assert weight[-2].item() == pytest.approx(8.3, abs=0.05)
    assert all(0.9 < w < 1.4 for w in weight[[0, 1, 2, 3, 4, 5, 6, 7, 9]].tolist())
    kl_weight = 0.5 * long**2  # KL = kl_weight · ‖Δε‖²
    assert kl_weight.min().item() == pytest.approx(0.07, abs=0.005)
    assert kl_weight.max().item() == pytest.approx(5.36, abs=0.005)
    assert mdp.noise_weight(make_scheduler(set_alpha_to_one=True), 1).tolist() == [math.inf]
    with pytest.raises(ValueError, match="clip_sample"):
        mdp.noise_weight(make_scheduler(clip_sample=True), 1)


# ---- predict_noise, policy_at ---------------------------------------------------------------


class FakeUNet:
    """ε = x + t/1000 + mean(c), and a record of how many pictures each call had."""
    def __init__(self, dtype=torch.float32):
        self.dtype, self.calls = dtype, []

    def answer(self, x, t, c):
        return x + (t.to(x.dtype) / 1000 + c.mean((1, 2))).view(-1, 1, 1, 1)

    def __call__(self, x, t, encoder_hidden_states):
        assert x.dtype == encoder_hidden_states.dtype == self.dtype and t.shape == (len(x),)
        self.calls.append(len(x))
        return SimpleNamespace(sample=self.answer(x, t, encoder_hidden_states))


@pytest.mark.equation("guidance", "01_mdp.predict_noise")
def test_guidance_goes_from_the_empty_prompt_past_the_prompt_in_one_call():
    unet, x, t = FakeUNet(torch.float64), randn(3, 4, 2, 2), torch.tensor([901, 1, 501])
    prompt, empty = randn(3, 5, 6, seed=1), randn(1, 5, 6, seed=2)
    eps = mdp.predict_noise(unet, x, t, prompt, empty, 7.5)
    shift = empty.mean() + 7.5 * (prompt.mean((1, 2)) - empty.mean()) + t.double() / 1000
    torch.testing.assert_close(eps, x + shift.view(3, 1, 1, 1), rtol=0, atol=1e-12)
    same = mdp.predict_noise(unet, x, t, prompt, empty.expand(3, -1, -1), 7.5)
    assert torch.equal(eps, same) and unet.calls == [6, 6]
    eps = mdp.predict_noise(unet, x, 501, prompt, None, 1.0)  # no guidance, at half the cost
    assert unet.calls == [6, 6, 3]
    torch.testing.assert_close(eps, unet.answer(x, torch.tensor([501] * 3), prompt))
    half = FakeUNet(torch.bfloat16)  # answers in bfloat16, and is raised before it is combined
    assert mdp.predict_noise(half, x.float(), t, prompt, empty, 7.5).dtype == torch.float32


@pytest.mark.parametrize("prediction, scale", (
    ("epsilon", 1.0), ("epsilon", 3.0), ("v_prediction", 3.0), ("sample", 3.0)))
def test_policy_at_takes_the_state_the_step_and_the_prompt_of_its_own_chain(prediction, scale):
    scheduler, unet = make_scheduler(4, prediction_type=prediction), FakeUNet(torch.float64)
    pipe = SimpleNamespace(scheduler=scheduler, unet=unet)
    config = mdp.Config(eta=0.6, guidance_scale=scale)
    trajectory = SimpleNamespace(
        latents=randn(3, 5, 2, 2, 2), timesteps=scheduler.timesteps,
        prompt_embeds=randn(3, 5, 6, seed=1), negative_embeds=randn(1, 5, 6, seed=2))
    i, k = torch.tensor([2, 0, 2, 1]), torch.tensor([3, 0, 1, 2])
    mean, std = mdp.policy_at(pipe, trajectory, i, k, config)
    for n in range(4):
        x_t, t = trajectory.latents[i[n], k[n]][None], scheduler.timesteps[k[n]].item()
        c, empty = trajectory.prompt_embeds[i[n]].mean(), trajectory.negative_embeds.mean()
        eps = x_t + t / 1000 + empty + scale * (c - empty)
        mu, sigma = gaussian_by_hand(scheduler, eps, t, x_t, 0.6)
        torch.testing.assert_close(mean[n], mu[0], rtol=0, atol=1e-12)
        assert std[n].item() == pytest.approx(sigma, rel=1e-12)


# ---- rollout --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return models.load_pipeline("tiny_sd", "cpu")


def settings(**changed):
    return mdp.Config(**dict(num_steps=4) | changed)


def noise_by_hand(pipe, seed, purpose, n, i, steps):
    """The noise of one picture, straight from numpy: x_T and then one z a step."""
    stream = np.random.default_rng([seed, training.PURPOSES.index(purpose), n, i])
    shape = (steps + 1, pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    return torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))


@pytest.mark.equation("rollout", "01_mdp.rollout")
@pytest.mark.parametrize("eta, scale, steps", ((1.0, 1.0, 4), (0.6, 3.0, 5)))
@torch.no_grad()
def test_rollout_is_a_slow_loop_over_diffusers_own_step(pipe, eta, scale, steps):
    config = settings(eta=eta, guidance_scale=scale, num_steps=steps, batch_size=2)
    trajectory = mdp.rollout(pipe, PROMPTS, config, (3, "train", 7))
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    empty = models.encode_prompts(pipe, [""])
    assert trajectory.prompts == PROMPTS and torch.equal(trajectory.timesteps, scheduler.timesteps)
    assert trajectory.latents.shape[:2] == (3, steps + 1)
    assert trajectory.log_probs.shape == trajectory.means.shape[:2] == (3, steps)
    for i, prompt in enumerate(PROMPTS):
        z, c = noise_by_hand(pipe, 3, "train", 7, i, steps), models.encode_prompts(pipe, [prompt])
        x = z[:1]
        for k, t in enumerate(scheduler.timesteps):
            torch.testing.assert_close(trajectory.latents[i, k], x[0], rtol=0, atol=3e-4)
            eps_empty, eps = pipe.unet(x, t, empty).sample, pipe.unet(x, t, c).sample
            eps = eps_empty + scale * (eps - eps_empty)
            mu, sigma = gaussian_by_hand(scheduler, eps, t.item(), x, eta)
            torch.testing.assert_close(trajectory.means[i, k], mu[0], rtol=0, atol=3e-4)
            drawn = Normal(0, sigma).log_prob(sigma * z[k + 1].double()).sum()
            assert trajectory.log_probs[i, k].item() == pytest.approx(drawn.item(), abs=0.01)
            x = diffusers_step(scheduler, eps, t, x, eta, z[k + 1:k + 2])
        torch.testing.assert_close(trajectory.latents[i, -1], x[0], rtol=0, atol=3e-4)
        pixels = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample[0] / 2 + 0.5
        picture = torch.from_numpy(np.array(trajectory.images[i])).float() / 255
        expected = pixels.clamp(0, 1).permute(1, 2, 0)
        torch.testing.assert_close(picture, expected, rtol=0, atol=0.01)


def test_noise_has_an_address_that_batches_and_other_pictures_do_not_change(pipe):
    before = torch.get_rng_state()
    whole = mdp.rollout(pipe, PROMPTS, settings(), (0, "train", 0))
    assert torch.equal(before, torch.get_rng_state()), "global random numbers were drawn"
    again = mdp.rollout(pipe, PROMPTS, settings(), (0, "train", 0))
    assert torch.equal(whole.latents, again.latents)
    fewer = mdp.rollout(pipe, PROMPTS[:2], settings(batch_size=1), (0, "train", 0))
    torch.testing.assert_close(fewer.latents, whole.latents[:2], rtol=0, atol=1e-3)
    for address in ((1, "train", 0), (0, "evaluate", 0), (0, "train", 1)):
        other = mdp.rollout(pipe, PROMPTS, settings(num_steps=1), address)
        assert (other.latents[:, 0] - whole.latents[:, 0]).abs().amax((1, 2, 3)).min() > 0.5
    assert len({tuple(x_T.flatten().tolist()) for x_T in whole.latents[:, 0]}) == 3


@pytest.mark.parametrize("scale", (1.0, 3.0))
def test_the_ratio_on_replay_is_exactly_one(pipe, scale):
    config = settings(num_steps=5, guidance_scale=scale, eta=0.8)
    trajectory = mdp.rollout(pipe, PROMPTS, config, (0, "train", 0))
    for stored in (trajectory.latents, trajectory.means, trajectory.log_probs):
        assert stored.dtype == torch.float32 and not stored.requires_grad
    assert torch.isfinite(trajectory.log_probs).all()
    every = torch.arange(3)
    for k in range(5):
        mean, std = mdp.policy_at(pipe, trajectory, every, torch.full((3,), k), config)
        log_prob = mdp.log_prob(trajectory.latents[:, k + 1], mean, std)
        assert log_prob.requires_grad
        assert torch.equal(log_prob, trajectory.log_probs[:, k])
        assert torch.equal(mean, trajectory.means[:, k])
    # A minibatch of different timesteps, as in training; other rounding and nothing else.
    k = torch.tensor([4, 0, 2])
    mean, std = mdp.policy_at(pipe, trajectory, every, k, config)
    mixed = mdp.log_prob(trajectory.latents[every, k + 1], mean, std)
    torch.testing.assert_close(mixed, trajectory.log_probs[every, k], rtol=0, atol=0.01)


def test_the_ratio_on_replay_is_exactly_one_with_a_half_precision_unet():
    """Trap 1: round the latents to bfloat16 after scoring them, and the ratio is far from 1."""
    half, config = models.load_pipeline("tiny_sd", "cpu", torch.bfloat16), settings(num_steps=3)
    trajectory = mdp.rollout(half, PROMPTS, config, (0, "train", 0))
    assert trajectory.latents.dtype == trajectory.log_probs.dtype == torch.float32
    actions = trajectory.latents[:, 1:]
    assert not torch.equal(actions, actions.bfloat16().float())
    for k in range(3):
        mean, std = mdp.policy_at(half, trajectory, torch.arange(3), torch.full((3,), k), config)
        assert torch.equal(mdp.log_prob(actions[:, k], mean, std), trajectory.log_probs[:, k])


def test_a_last_step_without_noise_counts_as_decoding(pipe, monkeypatch):
    lands_on_x_0 = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    monkeypatch.setattr(pipe, "scheduler", lands_on_x_0)
    trajectory = mdp.rollout(pipe, PROMPTS, settings(num_steps=3), (0, "train", 0))
    assert (trajectory.log_probs[:, -1] == 0).all() and (trajectory.log_probs[:, :-1] != 0).all()
    mean, std = mdp.policy_at(pipe, trajectory, torch.arange(3), torch.full((3,), 2), settings())
    log_prob = mdp.log_prob(trajectory.latents[:, -1], mean, std)
    gradient, = torch.autograd.grad(log_prob.sum(), pipe.unet.conv_out.bias)
    assert (gradient == 0).all()


def test_no_policy_and_no_prompts_are_refused(pipe):
    with pytest.raises(ValueError, match="--eta 0.*density"):
        mdp.rollout(pipe, PROMPTS, settings(eta=0.0), (0, "train", 0))
    with pytest.raises(ValueError, match="--prompts"):
        mdp.rollout(pipe, [], settings(), (0, "train", 0))
