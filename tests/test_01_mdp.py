"""Tests of 01_mdp.py: exact ones (float64, an independent oracle) and a smoke test."""
import copy
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Independent, Normal
from torch.distributions import kl_divergence as torch_kl
from transformers import CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = os.environ.get("TEST_MODEL", str(ROOT / "tiny_sd"))
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


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def pipe():
    return mdp.load_pipeline(MODEL, device="cpu")


def in_float64(scheduler):
    """A copy with the same table in float64, to run diffusers' own step() without its rounding."""
    exact = copy.deepcopy(scheduler)
    exact.alphas_cumprod = exact.alphas_cumprod.double()
    exact.final_alpha_cumprod = exact.final_alpha_cumprod.double()
    return exact


def diffusers_step(scheduler, pred, t, x, eta, noise):
    return scheduler.step(pred, t, x, eta=eta, variance_noise=noise).prev_sample


# --- step_mean_std -----------------------------------------------------------------------------


@pytest.mark.parametrize("clip_sample", (False, True))
@pytest.mark.parametrize("set_alpha_to_one", (False, True))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_step_is_diffusers_step(prediction, spacing, set_alpha_to_one, clip_sample):
    scheduler = make_scheduler(prediction_type=prediction, timestep_spacing=spacing,
                               set_alpha_to_one=set_alpha_to_one, clip_sample=clip_sample)
    exact = in_float64(scheduler)
    # diffusers loses two digits at t = 1 where it divides by the small √(1−ᾱ_1).
    tolerance = 3e-5 if prediction == "sample" else 3e-6
    pred, x, noise = (randn(2, 4, 3, 5, seed=s) for s in range(3))
    for t in scheduler.timesteps.tolist():  # both end steps are among them
        for eta in (1.0, 0.4, 0.0):
            mean, std = mdp.step_mean_std(scheduler, pred, t, x, eta)
            assert mean.dtype == std.dtype == torch.float64 and std.shape == (2, 1, 1, 1)
            expected = diffusers_step(exact, pred, t, x, eta, noise)
            torch.testing.assert_close(mean + std * noise, expected, rtol=0, atol=1e-12)

            low = [v.float() for v in (pred, x, noise)]
            mean, std = mdp.step_mean_std(scheduler, low[0], t, low[1], eta)
            assert mean.dtype == std.dtype == torch.float32
            expected = diffusers_step(scheduler, low[0], t, low[1], eta, low[2])
            torch.testing.assert_close(mean + std * low[2], expected, rtol=0, atol=tolerance)
            # As good as float32 can be: the float64 answer, rounded once.
            best, best_std = mdp.step_mean_std(scheduler, low[0].double(), t, low[1].double(), eta)
            assert torch.equal(mean, best.float()) and torch.equal(std, best_std.float())


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps, steps_offset", ((6, 1), (15, 0), (10, 0), (1, 1)))
def test_previous_timestep_is_diffusers(num_steps, steps_offset, spacing):
    """Steps that do not divide 1000, and an offset of 0, where t − 1000/T is exactly 0 once."""
    scheduler = make_scheduler(num_steps, timestep_spacing=spacing, steps_offset=steps_offset,
                               set_alpha_to_one=True)
    pred, x, noise = (randn(1, 4, 3, 3, seed=s) for s in range(3))
    for t in scheduler.timesteps.tolist():
        mean, std = mdp.step_mean_std(scheduler, pred, t, x)
        expected = diffusers_step(in_float64(scheduler), pred, t, x, 1.0, noise)
        torch.testing.assert_close(mean + std * noise, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_steps", (3, 10, 50))
@pytest.mark.parametrize("set_alpha_to_one", (False, True))
def test_step_at_eta_1_is_the_posterior_of_ddpm(num_steps, set_alpha_to_one):
    """q(x_{t-1} | x_t, x_0) of DDPM, in DDPM's own parameters: other algebra, same Gaussian."""
    scheduler = make_scheduler(num_steps, prediction_type="sample",
                               set_alpha_to_one=set_alpha_to_one)
    x_0, x_t = randn(1, 4, 2, 2, seed=1), randn(1, 4, 2, 2, seed=2)
    for t in scheduler.timesteps.tolist():
        bar = scheduler.alphas_cumprod[t].item()
        previous = t - 1000 // num_steps
        last = 1.0 if set_alpha_to_one else scheduler.alphas_cumprod[0].item()
        bar_prev = scheduler.alphas_cumprod[previous].item() if previous >= 0 else last
        alpha = bar / bar_prev
        beta = 1 - alpha
        expected = math.sqrt(bar_prev) * beta * x_0 + math.sqrt(alpha) * (1 - bar_prev) * x_t
        expected = expected / (1 - bar)
        mean, std = mdp.step_mean_std(scheduler, x_0, t, x_t)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)
        assert std.item() == pytest.approx(math.sqrt(beta * (1 - bar_prev) / (1 - bar)), abs=1e-13)


@pytest.mark.parametrize("eta", (0.0, 0.3, 1.0))
def test_step_keeps_the_marginals(eta):
    """With the true noise, x_t ~ N(√ᾱ_t x_0, 1 − ᾱ_t) becomes the same law at t−1, for every η."""
    scheduler = make_scheduler(20)
    x_0, eps = randn(1, 4, 2, 2, seed=1), torch.ones(1, 4, 2, 2, dtype=torch.float64)
    for t in scheduler.timesteps.tolist():
        bar, bar_prev, _ = mdp.ddim_coefficients(scheduler, t, eta)
        x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * eps
        mean, std = mdp.step_mean_std(scheduler, eps, t, x_t, eta)
        spread = (mean - bar_prev.sqrt() * x_0).square() + std.square()
        torch.testing.assert_close(spread, (1 - bar_prev).expand_as(spread), rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_batched_t_equals_one_at_a_time(prediction, dtype):
    scheduler = make_scheduler(10, prediction_type=prediction)
    t = scheduler.timesteps[torch.randperm(10, generator=torch.Generator().manual_seed(0))]
    pred, x = randn(10, 4, 3, 3, seed=1, dtype=dtype), randn(10, 4, 3, 3, seed=2, dtype=dtype)
    mean, std = mdp.step_mean_std(scheduler, pred, t, x, 0.7)
    for i in range(10):
        row = slice(i, i + 1)
        one_mean, one_std = mdp.step_mean_std(scheduler, pred[row], t[i].item(), x[row], 0.7)
        assert torch.equal(mean[row], one_mean) and torch.equal(std[row], one_std)


def test_step_mean_passes_the_gradient():
    scheduler, x = make_scheduler(), randn(2, 1, 2, 2, seed=1)
    pred = randn(2, 1, 2, 2).requires_grad_()
    t = torch.tensor([901, 1])
    assert torch.autograd.gradcheck(lambda p: mdp.step_mean_std(scheduler, p, t, x)[0], pred)


def test_zero_terminal_snr_works_for_v_and_is_refused_for_epsilon():
    settings = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pred, x, noise = (randn(1, 4, 3, 3, seed=s) for s in range(3))
    scheduler = make_scheduler(10, prediction_type="v_prediction", **settings)
    assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[999] == 0
    for t in scheduler.timesteps.tolist():
        mean, std = mdp.step_mean_std(scheduler, pred, t, x)
        expected = diffusers_step(in_float64(scheduler), pred, t, x, 1.0, noise)
        # 1−ᾱ_{t−1}−σ² is 0 at the first step: under the root its rounding error grows to 1e-8.
        torch.testing.assert_close(mean + std * noise, expected, rtol=0, atol=1e-7)
    for num_steps in range(2, 100):  # rounding makes 1−ᾱ_{t−1}−σ² negative for some of them
        scheduler.set_timesteps(num_steps)
        assert torch.isfinite(mdp.step_mean_std(scheduler, pred, 999, x)[0]).all()
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        mdp.step_mean_std(make_scheduler(10, **settings), pred, 999, x)


@pytest.mark.parametrize("settings, t, eta, message", (
    (dict(thresholding=True), 901, 1.0, "thresholding"),
    (dict(prediction_type="flow"), 901, 1.0, "prediction_type"),
    (dict(), 901, 1.1, "--eta"), (dict(), 901, -0.1, "--eta"), (dict(), 901, math.nan, "--eta"),
    (dict(num_steps=1000), 1000, 1.0, "--num-steps 1000"), (dict(), -1, 1.0, "--num-steps 10")))
def test_refused_steps(settings, t, eta, message):
    x = randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match=message):
        mdp.step_mean_std(make_scheduler(**settings), x, t, x, eta)


def test_step_needs_a_schedule():
    x = randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        mdp.step_mean_std(DDIMScheduler(), x, 1, x)


# --- log_prob, kl_divergence, noise_weight -----------------------------------------------------


def normal(mean, std):
    return Independent(Normal(mean, std.expand_as(mean)), 3)


def test_log_prob_is_torch_distributions():
    x, mean = randn(5, 4, 3, 2, seed=1), randn(5, 4, 3, 2, seed=2).requires_grad_()
    std = torch.tensor([0.01, 0.5, 1.0, 2.0, 30.0], dtype=torch.float64).view(5, 1, 1, 1)
    ours, theirs = mdp.log_prob(x, mean, std), normal(mean, std).log_prob(x)
    assert ours.shape == (5,) and ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-11)
    gradients = [torch.autograd.grad(v.sum(), mean)[0] for v in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-11)


def test_kl_is_torch_distributions():
    p, q = randn(3, 4, 3, 2, seed=1).requires_grad_(), randn(3, 4, 3, 2, seed=2)
    std = torch.tensor([0.01, 0.5, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    ours, theirs = mdp.kl_divergence(p, q, std), torch_kl(normal(p, std), normal(q, std))
    assert ours.shape == (3,)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(v.sum(), p)[0] for v in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert torch.equal(mdp.kl_divergence(p, p, std), torch.zeros(3, dtype=torch.float64))


def test_log_prob_in_float32_at_stable_diffusions_size():
    x, mean = (randn(2, 4, 64, 64, seed=s, dtype=torch.float32) for s in (1, 2))
    std = torch.full((2, 1, 1, 1), 0.3)
    ours, exact = mdp.log_prob(x, mean, std), mdp.log_prob(x.double(), mean.double(), std.double())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=3e-7, atol=0)


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
    t = torch.tensor([901, 1, 501])
    mean, std = mdp.step_mean_std(scheduler, pred, t, x_t)
    assert (std.flatten() > 0).tolist() == [True, False, True]
    for value in (mdp.log_prob(x_prev, mean, std), mdp.kl_divergence(mean, x_prev, std)):
        assert value[1] == 0 and torch.isfinite(value).all() and (value[[0, 2]] != 0).all()
        gradient, = torch.autograd.grad(value.sum(), pred, retain_graph=True)
        assert torch.isfinite(gradient).all() and (gradient[1] == 0).all()
        assert (gradient[[0, 2]] != 0).all()
    rest = [0, 2]
    torch.testing.assert_close(mdp.log_prob(x_prev, mean, std)[rest],
                               normal(mean[rest], std[rest]).log_prob(x_prev[rest]))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_weight_is_the_derivative_over_sigma(prediction):
    scheduler = make_scheduler(10, prediction_type=prediction)
    pred, x = randn(10, 1, 1, 1, seed=1).requires_grad_(), randn(10, 1, 1, 1, seed=2)
    t = scheduler.timesteps
    mean, std = mdp.step_mean_std(scheduler, pred, t, x, 0.8)
    derivative, = torch.autograd.grad(mean.sum(), pred)
    weight = mdp.noise_weight(scheduler, t, 0.8)
    torch.testing.assert_close(weight, (derivative.abs() / std).flatten(), rtol=1e-12, atol=0)
    delta = randn(10, 1, 1, 1, seed=3)
    other, _ = mdp.step_mean_std(scheduler, pred + delta, t, x, 0.8)
    kl = mdp.kl_divergence(mean, other, std)
    torch.testing.assert_close(kl, 0.5 * weight**2 * delta.flatten()**2, rtol=1e-9, atol=0)


def test_noise_weight_figures_quoted_in_the_lesson():
    weight, long = (mdp.noise_weight(s, s.timesteps) for s in map(make_scheduler, (10, 50)))
    assert weight[-2].item() == pytest.approx(8.3, abs=0.05)
    assert all(0.9 < w < 1.4 for i, w in enumerate(weight.tolist()) if i != 8)
    kl_weight = 0.5 * long**2  # KL = kl_weight · ‖Δε‖²
    assert kl_weight.min().item() == pytest.approx(0.07, abs=0.005)
    assert kl_weight.max().item() == pytest.approx(5.36, abs=0.005)


def test_noise_weight_at_the_edges():
    assert mdp.noise_weight(make_scheduler(set_alpha_to_one=True), 1).tolist() == [math.inf]
    with pytest.raises(ValueError, match="clip_sample"):
        mdp.noise_weight(make_scheduler(clip_sample=True), 1)


# --- predict_noise -----------------------------------------------------------------------------


class FakeUNet:
    """ε = x + t/1000 + mean(c), and a record of what it was asked."""
    def __init__(self, dtype=torch.float32):
        self.dtype, self.calls = dtype, []

    def __call__(self, x, t, encoder_hidden_states):
        assert x.dtype == encoder_hidden_states.dtype == self.dtype and t.shape == (len(x),)
        self.calls.append(len(x))
        shift = t.to(x.dtype) / 1000 + encoder_hidden_states.mean((1, 2))
        return SimpleNamespace(sample=x + shift.view(-1, 1, 1, 1))


def test_guidance_is_one_batched_call_and_its_formula():
    unet, x, t = FakeUNet(torch.float64), randn(3, 4, 2, 2), torch.tensor([901, 1, 501])
    prompt, empty = randn(3, 5, 6, seed=1), randn(1, 5, 6, seed=2)
    out = mdp.predict_noise(unet, x, t, prompt, empty, 7.5)
    shift = empty.mean() + 7.5 * (prompt.mean((1, 2)) - empty.mean()) + t.double() / 1000
    torch.testing.assert_close(out, x + shift.view(3, 1, 1, 1), rtol=0, atol=1e-12)
    same = mdp.predict_noise(unet, x, t, prompt, empty.expand(3, -1, -1), 7.5)
    assert torch.equal(out, same) and unet.calls == [6, 6]


def test_guidance_1_costs_one_evaluation():
    unet, x = FakeUNet(), randn(3, 4, 2, 2, dtype=torch.float32)
    prompt = randn(3, 5, 6, dtype=torch.float32)
    out = mdp.predict_noise(unet, x, 501, prompt, None, 1.0)
    assert unet.calls == [3]
    torch.testing.assert_close(out, x + 0.501 + prompt.mean((1, 2)).view(3, 1, 1, 1))
    assert torch.equal(out, mdp.predict_noise(unet, x, torch.tensor([501] * 3), prompt, None, 1.0))


@pytest.mark.parametrize("scale", (1.0, 3.0))
def test_a_half_precision_unet_still_answers_in_float32(scale):
    unet, x = FakeUNet(torch.bfloat16), randn(2, 4, 2, 2, dtype=torch.float32)
    prompt = randn(2, 5, 6, dtype=torch.float32)
    assert mdp.predict_noise(unet, x, 1, prompt, prompt[:1], scale).dtype == torch.float32


# --- load_pipeline, encode_prompts -------------------------------------------------------------


def test_load_pipeline(pipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert isinstance(pipe.scheduler, DDIMScheduler) and pipe.safety_checker is None
    frozen = [p for m in (pipe.vae, pipe.text_encoder) for p in m.parameters()]
    assert not any(p.requires_grad for p in frozen)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in pipe.unet.parameters())
    assert not any(m.training for m in (pipe.vae, pipe.text_encoder, pipe.unet))
    with pytest.raises(FileNotFoundError, match="--model no_such_folder"):
        mdp.load_pipeline("no_such_folder")


def test_relative_folder_is_found_beside_the_script(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mdp, "HERE", Path(MODEL).parent)
    assert mdp.load_pipeline(Path(MODEL).name, device="cpu").unet.config.in_channels == 4


def test_scheduler_settings_left_out_of_the_file_stay_those_of_latent_diffusion(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model/scheduler/scheduler_config.json").write_text(json.dumps(
        {"_class_name": "PNDMScheduler", "beta_start": 0.001, "beta_end": 0.012,
         "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}))
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (tmp_path / "model/model_index.json").write_text(json.dumps(index))
    config = mdp.load_pipeline(str(tmp_path / "model"), device="cpu").scheduler.config
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)
    assert (config.beta_start, config.prediction_type) == (0.001, "v_prediction")


def test_unknown_words_and_long_prompts_are_refused(pipe):
    assert mdp.encode_prompts(pipe, PROMPTS).shape[:2] == (3, pipe.tokenizer.model_max_length)
    assert mdp.encode_prompts(pipe, [""]).shape[0] == 1
    with pytest.raises(ValueError, match="--prompts.*'zebra'.*'a red zebra'"):
        mdp.encode_prompts(pipe, ["a red circle", "a red zebra"])
    with pytest.raises(ValueError, match="--prompts.*tokens"):
        mdp.encode_prompts(pipe, ["a " * pipe.tokenizer.model_max_length])


def test_clips_own_tokenizer_knows_every_word():
    """Byte-level, like the full CLIP: its unknown token and its end token are one and the same."""
    letters = "abcdefghijklmnopqrstuvwxyz,.!"
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    assert tokenizer.unk_token_id == tokenizer.eos_token_id
    encoder = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(len(tokens), 2))
    fake = SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder, device="cpu",
                           encode_prompt=lambda *a: [len(a[0])])
    assert mdp.encode_prompts(fake, ["A zebra, washing the dishes!", ""]) == 2


# --- rollout and replay ------------------------------------------------------------------------


def replay(pipe, run, k, scale=1.0, rows=slice(None)):
    return mdp.step_log_prob(pipe, run.latents[rows, k], run.latents[rows, k + 1], run.timesteps[k],
                             run.prompt_embeds[rows], run.negative_embeds, scale, 1.0)


@pytest.mark.parametrize("scale", (1.0, 3.0))
def test_ratio_on_replay_is_exactly_one(pipe, scale):
    run = mdp.rollout(pipe, PROMPTS, num_steps=5, guidance_scale=scale, seed=0)
    B, T, size = 3, 5, pipe.unet.config.sample_size
    assert run.latents.shape == (B, T + 1, pipe.unet.config.in_channels, size, size)
    assert run.latents.dtype == run.log_probs.dtype == torch.float32
    assert run.log_probs.shape == (B, T) and run.timesteps.tolist() == [801, 601, 401, 201, 1]
    assert run.prompts == PROMPTS and len(run.images) == B and run.images[0].size == (8 * size,) * 2
    assert not run.latents.requires_grad and torch.isfinite(run.log_probs).all()
    for k in range(T):
        log_p = replay(pipe, run, k, scale)  # with gradients, as in training
        assert log_p.requires_grad
        assert torch.equal(log_p.detach() - run.log_probs[:, k], torch.zeros(B))
        alone = torch.cat([replay(pipe, run, k, scale, slice(b, b + 1)) for b in range(B)])
        torch.testing.assert_close(alone, run.log_probs[:, k], rtol=0, atol=0.01)  # rounding
    # A minibatch of different timesteps, as in training: sample b at its own step k.
    rows, ks = torch.tensor([0, 1, 2]), torch.tensor([4, 0, 2])
    mixed = mdp.step_log_prob(pipe, run.latents[rows, ks], run.latents[rows, ks + 1],
                              run.timesteps[ks], run.prompt_embeds[rows], run.negative_embeds,
                              scale, 1.0)
    torch.testing.assert_close(mixed, run.log_probs[rows, ks], rtol=0, atol=0.01)


def test_replay_is_exact_with_a_half_precision_unet():
    """Trap 1: round the latents to bfloat16 after scoring them, and the ratio is far from 1."""
    half = mdp.load_pipeline(MODEL, device="cpu", dtype=torch.bfloat16)
    run = mdp.rollout(half, PROMPTS, num_steps=3, seed=0)
    assert run.latents.dtype == run.log_probs.dtype == torch.float32
    actions = run.latents[:, 1:]
    assert not torch.equal(actions, actions.bfloat16().float())
    for k in range(3):
        assert torch.equal(replay(half, run, k), run.log_probs[:, k])


@pytest.mark.parametrize("scale", (1.0, 4.0))
def test_rollout_is_the_pipelines_own_sampling(pipe, scale):
    """The pipeline of diffusers draws x_T, then each step's noise: for one picture, as we do."""
    run = mdp.rollout(pipe, PROMPTS[:1], num_steps=4, guidance_scale=scale, seed=7)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(PROMPTS[0], num_inference_steps=4, guidance_scale=scale, eta=1.0,
                  generator=torch.Generator().manual_seed(7), output_type="latent").images
    torch.testing.assert_close(run.latents[:, -1], theirs, rtol=0, atol=2e-4)
    picture = torch.from_numpy(pipe.image_processor.pil_to_numpy(run.images[0]))
    expected = pipe.vae.decode(theirs / pipe.vae.config.scaling_factor).sample[0] / 2 + 0.5
    torch.testing.assert_close(picture[0], expected.clamp(0, 1).permute(1, 2, 0), rtol=0, atol=0.01)


def test_log_probs_are_those_of_the_noise_that_was_drawn(pipe):
    run = mdp.rollout(pipe, PROMPTS[:2], num_steps=3, seed=1)
    noise = torch.randn(2, 4, *run.latents.shape[2:], generator=torch.Generator().manual_seed(1))
    assert torch.equal(run.latents[:, 0], noise[:, 0])
    for k, t in enumerate(run.timesteps):
        sigma = mdp.ddim_coefficients(pipe.scheduler, t)[2]
        expected = normal(torch.zeros_like(noise[:, 0]), torch.ones(1)).log_prob(noise[:, k + 1])
        expected = expected - noise[0, 0].numel() * sigma.log()
        torch.testing.assert_close(run.log_probs[:, k].double(), expected, rtol=0, atol=0.01)


def test_seeds(pipe):
    before = torch.get_rng_state()
    zero = mdp.rollout(pipe, PROMPTS, num_steps=2, seed=0)
    assert torch.equal(before, torch.get_rng_state())  # no global random numbers
    again = mdp.rollout(pipe, PROMPTS, num_steps=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(zero.latents, again.latents)
    one = mdp.rollout(pipe, PROMPTS, num_steps=2, seed=1)
    assert not torch.equal(zero.latents[:, 0], one.latents[:, 0])
    split = mdp.rollout(pipe, PROMPTS, num_steps=2, seed=0, batch_size=2)
    assert torch.equal(zero.latents[:, 0], split.latents[:, 0])
    torch.testing.assert_close(zero.latents, split.latents, rtol=0, atol=1e-3)
    assert split.log_probs.shape == (3, 2) and len(split.images) == 3
    for settings in (dict(), dict(seed=0, generator=torch.Generator())):
        with pytest.raises(ValueError, match="seed or a generator"):
            mdp.rollout(pipe, PROMPTS, num_steps=2, **settings)


def test_a_rollout_that_ends_deterministically(pipe, monkeypatch):
    ends = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    monkeypatch.setattr(pipe, "scheduler", ends)
    run = mdp.rollout(pipe, PROMPTS, num_steps=3, seed=0)
    assert (run.log_probs[:, -1] == 0).all() and (run.log_probs[:, :-1] != 0).all()
    gradient, = torch.autograd.grad(replay(pipe, run, 2).sum(), pipe.unet.conv_out.bias)
    assert (gradient == 0).all()


def test_eta_0_is_refused_where_a_log_prob_is_asked_for(pipe):
    with pytest.raises(ValueError, match="--eta 0.*density"):
        mdp.rollout(pipe, PROMPTS, num_steps=2, eta=0, seed=0)
    x, c = torch.zeros(1, 4, 8, 8), mdp.encode_prompts(pipe, PROMPTS[:1])
    with pytest.raises(ValueError, match="--eta 0.*density"):
        mdp.step_log_prob(pipe, x, x, 1, c, None, 1.0, 0.0)


# --- the command line --------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    name: str = "x"  # 100% text
    flag: bool = True  # a switch
    kind: Literal["sf", "is"] = "is"  # one of two
    words: tuple[str, ...] = ("a", "b")  # several
    limit: int | None = None  # may be missing


def test_parse_config(capsys):
    assert mdp.parse_config(Example, "", []) == Example()
    line = ["--no-flag", "--kind", "sf", "--words", "c", "d e", "--limit", "3"]
    assert mdp.parse_config(Example, "", line) == Example("x", False, "sf", ("c", "d e"), 3)
    for bad in (["--kind", "ppo"], ["--limit", "x"], ["--flag", "False"], ["--lim", "3"]):
        with pytest.raises(ValueError):
            mdp.parse_config(Example, "", bad)
    with pytest.raises(SystemExit):
        mdp.parse_config(Example, "The lesson.", ["--help"])
    text = capsys.readouterr().out
    assert "The lesson." in text and "100% text [x]" in text and "may be missing" in text


@pytest.mark.parametrize("line, name", (
    ("--num-steps -3", "--num-steps"), ("--num-steps 0", "--num-steps"),
    ("--num-steps x", "--num-steps"), ("--num-steps 1000", "--num-steps"),
    ("--num-steps 1001", "--num-steps"), ("--eta 0", "--eta"), ("--eta 2", "--eta"),
    ("--eta nan", "--eta"), ("--guidance-scale -1", "--guidance-scale"),
    ("--guidance-scale inf", "--guidance-scale"), ("--model no_such_folder", "--model"),
    ("--prompts zebra", "--prompts"), ("--prompts", "--prompts"), ("--out x.docx", "--out"),
    ("--out blocked/x.png", "blocked"), ("--sed 1", "--sed")))
def test_bad_input_is_one_line_and_exit_code_2(line, name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("blocked").write_text("a file where a folder should be")
    monkeypatch.setattr(sys, "argv", ["01_mdp.py", "--model", MODEL, *line.split()])
    with pytest.raises(SystemExit) as stop:
        mdp.run_main(mdp.main)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("01_mdp.py: ") and message.count("\n") == 1 and name in message


def test_smoke_from_another_directory(tmp_path):
    command = [sys.executable, ROOT / "01_mdp.py", "--model", MODEL, "--num-steps", "3",
               "--out", "a/b.png", "--prompts", "a red circle", "two blue squares"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:5]]
    assert [row[0] for row in rows] == ["667", "334", "1"]
    assert all(float(row[4]) == 0.0 and float(row[5]) == 1.0 for row in rows)  # KL, ratio
    assert (tmp_path / "a/b.png").stat().st_size > 5000


def test_importing_does_nothing(tmp_path):
    code = "from importlib import import_module; import_module('01_mdp')"
    done = subprocess.run([sys.executable, "-c", code, "--no-such-flag"], cwd=tmp_path, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
