"""Chapter 3 in flow-matching time: Flow-GRPO's, DanceGRPO's and CPS's steps in the same loop.

WHAT YOU LEARN. Stable Diffusion 3 and FLUX are flow-matching models: on x̃ = (1−s)·x_0 + s·ε, with
time s from 1 (noise) to 0 (picture), they predict the velocity v = ε − x_0. To train one by policy
gradient its sampler needs noise, and so a density. Nothing new has to be trained to see how: in
other coordinates tiny_sd *is* a flow-matching model, and chapter 3's loop trains it.

    s  = √(1−ᾱ)/c,  x̃ = x/c,  c = √ᾱ + √(1−ᾱ)                              change of variables
    v  = ε̂ − x̂_0,  x̂_0 = x̃ − s·v,  ε̂ = x̃ + (1−s)·v                         velocity
    x̃' = x̃ + dt·v,  dt = s' − s < 0                        the ODE, DDIM with η = 0: no density
    μ  = x̃ + dt·(v + g²/(2s)·ε̂),  σ = g·√(−dt)                              the SDE's step
         g = a·√(s/(1−s)) in Flow-GRPO, g = a in DanceGRPO
    μ  = (1−s')·x̂_0 + √(s'²−τ²)·ε̂,  σ = τ = s'·sin(a·π/2)       coefficients-preserving, CPS
    KL of two models' SDE steps = ‖μ_p−μ_q‖²/(2g²(−dt)) = (−dt)/2·(1/g + g(1−s)/(2s))²·‖v_p−v_q‖²

A prime is the next step (`_prev`). In flow_grpo's code s is sigma, g std_dev_t, a noise_level.
Chapter 1's step (DDIM, η) is CPS's with τ = σ_t/c', exactly; Flow-GRPO's mean agrees with that of
CPS at the same σ to first order in dt. So "what is the ratio of a flow model?" has chapter 1's
answer: the same Gaussian log-probability, with another mean and another σ.

WHERE CODE DIFFERS: advantages are divided by the deviation of the group (GRPO), of the round
(global_std in flow_grpo/stat_tracking.py) or not at all (Dr. GRPO): --normalize. Noise in a window
of steps and the ODE elsewhere (MixGRPO; its window moves, here it stays): --noise-steps. Log-ratios
as means over dimensions: --ratio per_dim. The last step is left out: --no-train-last.
TRAPS. (1) g is infinite at s = 1: sd3_sde_with_logprob.py of flow_grpo puts the next s into 1 − s
there, we refuse (tiny_sd begins at 0.89). (2) The SDE's last step leaves noise, σ = 0.07 with ten
equal steps and a = 0.7. Flow-GRPO trains with the SDE and judges by the ODE; we print both. (3) The
SDE's KL in flow_grpo's train_sd3.py lacks −dt, CPS's log-probability 1/(2σ²), and both are means
over dimensions. (4) Latents rounded to bfloat16 after they were scored: the ratio is not 1.
(5) CPS's τ does not shrink with dt: of Gaussian data with variance 0.25 and the exact v it leaves
0.14 in 10 equal steps and 0.18 in 400, the ODE 0.19 and 0.25, Flow-GRPO 0.23 and 0.25.
RUN `python experiments/flow.py`: chapter 3's task with Flow-GRPO's step, 4 minutes on two cores.
EXPECT alignment to rise from 0.67 to 0.97 in 3,840 queries (03 with --rounds 60: 0.73 to 0.99), by
the ODE from 0.63 to 0.97. TRY `--sampler cps`, with `--noise-steps 3` and without.
WRITES a run folder like chapter 3's, and by_ode.json (means, errors). Its config.json says which
sampler drew; chapter 5 draws from it with chapter 1's step. `kl_old` is T times the mean over the
steps that are trained.
DEPARTURES. SD3 and FLUX are not loaded. No KL term is trained on: `flow_kl` is what it would be.
Steps are equal in t, not in s.
"""
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from math import pi, sin
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import flags, models, runs, training  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

mdp = import_module("01_mdp")  # predict_noise, ddim_coefficients, x0_and_noise, column
rewards = import_module("02_rewards")  # get_reward
ddpo = import_module("03_ddpo")  # Config, train, evaluate, check, spread


@dataclass(frozen=True)
class Config(ddpo.Config):
    sampler: Literal["sde", "constant", "cps", "ddim"] = "sde"  # Flow-GRPO, DanceGRPO, CPS, ch. 1
    noise: float = 0.7  # a: how much noise a step adds; --sampler ddim has --eta instead
    noise_steps: int = 0  # how many first steps have noise; 0: all
    train_last: bool = True  # train on the last step too
    normalize: Literal["group", "round", "none"] = "group"  # whose deviation divides advantages
    baseline: Literal["group"] = "group"  # the mean of the prompt's pictures is subtracted from r
    estimator: Literal["is"] = "is"  # importance sampling, as in GRPO
    step_weight: Literal["none"] = "none"  # chapter 3's weights belong to chapter 1's step
    samples_per_prompt: int = 8  # pictures of each, the group
    rounds: int = 60  # rounds of sample, score, update
    name: str | None = "flow"  # the run's folder in --out


# As many pictures a round as DDPO, in groups of 8.
SD = ddpo.SD | {"baseline": "group", "samples_per_prompt": 8, "prompts_per_round": 32}


# ---- change of variables --------------------------------------------------------------------


def flow_time(alpha):
    """s = √(1−ᾱ)/c,  c = √ᾱ + √(1−ᾱ): then x/c = (1−s)·x_0 + s·ε.   (N,) -> s, c, (N,) each"""
    signal = alpha.sqrt()
    noise = (1 - alpha).sqrt()
    c = signal + noise
    return noise / c, c


def velocity(x_0, eps):
    """v = ε̂ − x̂_0: what a flow-matching model predicts.   (B,C,H,W), (B,C,H,W) -> (B,C,H,W)"""
    return eps - x_0


# ---- one step: a Gaussian; x and v are (B,C,H,W), s, s_prev, g, tau () or (B,1,1,1) ----------


def flow_grpo_noise(s, a):
    """g = a·√(s/(1−s)); ValueError at s = 1, where it is infinite.   (N,) -> (N,)"""
    if (s >= 1).any():
        raise ValueError("--sampler sde: Flow-GRPO's noise is infinite at s = 1, where this model "
                         "begins; try --sampler constant or cps")
    return a * (s / (1 - s)).sqrt()


def sde_step(x, v, s, s_prev, g):
    """μ = x̃ + dt·(v + g²/(2s)·ε̂),  σ = g·√(−dt)   (Flow-GRPO).  -> mean (B,C,H,W), std

    With g = 0 it is the ODE's step.
    """
    dt = s_prev - s
    eps = x + (1 - s) * v
    mean = x + dt * (v + g**2 / (2 * s) * eps)
    std = g * (-dt).sqrt()
    return mean, std


def cps_noise(s_prev, a):
    """τ = s'·sin(a·π/2): a share of the noise that is due at s'.   (N,) -> (N,)"""
    return s_prev * sin(a * pi / 2)


def cps_step(x, v, s, s_prev, tau):
    """μ = (1−s')·x̂_0 + √(s'²−τ²)·ε̂,  σ = τ   (Flow-CPS).  -> mean (B,C,H,W), std

    Old and new noise together are s', as the model expects, whatever τ is.
    """
    x_0 = x - s * v
    eps = x + (1 - s) * v
    stays = (s_prev**2 - tau**2).clamp(min=0).sqrt()
    mean = (1 - s_prev) * x_0 + stays * eps
    return mean, tau


def flow_kl(v_p, v_q, s, s_prev, g):
    """KL = (−dt)/2·(1/g + g(1−s)/(2s))²·‖v_p − v_q‖²  of the SDE's step, in nats.  -> (B,)"""
    dt = s_prev - s
    reach = 1 / g + g * (1 - s) / (2 * s)
    kl = -dt / 2 * (reach * (v_p - v_q)).square()
    return kl.sum((1, 2, 3))


# ---- the policy: what chapter 3's loop is handed --------------------------------------------


def policy(pipe, x_t, t, prompt_embeds, negative_embeds, config):
    """N(c'·μ, (c'·σ)²I): a flow step in chapter 1's coordinates, x = c·x̃.  -> mean, std

    So the start, what is stored and the decoder stay chapter 1's. log p falls by D·log c', the same
    for every model: ratio and KL are those of x̃. Where --noise-steps has none, std is 0.
    """
    scheduler = pipe.scheduler
    noise_pred = mdp.predict_noise(
        pipe.unet, x_t, t, prompt_embeds, negative_embeds, config.guidance_scale)
    alpha_t, alpha_prev, sigma_t = mdp.ddim_coefficients(scheduler, t, config.eta)
    s, c = flow_time(alpha_t)
    s_prev, c_prev = flow_time(alpha_prev)
    if config.sampler == "sde":
        noise = flow_grpo_noise(s, config.noise)
    elif config.sampler == "constant":
        noise = torch.full_like(s, config.noise)
    elif config.sampler == "cps":
        noise = cps_noise(s_prev, config.noise)
    else:
        noise = sigma_t / c_prev
    if config.noise_steps:
        noisy = scheduler.timesteps[:config.noise_steps]
        noise = noise * (t >= noisy.min()).cpu()

    column = partial(mdp.column, x=x_t)
    s, c = column(s), column(c)
    s_prev, c_prev = column(s_prev), column(c_prev)
    x_0, eps = mdp.x0_and_noise(scheduler, noise_pred, column(alpha_t), x_t)
    v = velocity(x_0, eps)
    step = sde_step if config.sampler in ("sde", "constant") else cps_step
    mean, std = step(x_t / c, v, s, s_prev, column(noise))
    return c_prev * mean, c_prev * std


# ---- advantages -----------------------------------------------------------------------------


def group_advantage(r, prompts, normalize):
    """A_i = (r_i − mean of the prompt's r) / scale.   (B,), B strings -> (B,) float64

    scale: deviation of the prompt's r (GRPO), of the round's, or 1 (Dr. GRPO). The mean has r_i in
    it: before dividing that is chapter 3's difference times (n−1)/n.
    """
    r = r.double()
    A = torch.empty_like(r)
    for i, prompt in enumerate(prompts):
        group = r[[other == prompt for other in prompts]]
        scale = 1
        if normalize == "group":
            scale = ddpo.spread(group)
        elif normalize == "round":
            scale = ddpo.spread(r)
        A[i] = (r[i] - group.mean()) / scale
    return A


def trained_steps(config):
    """1 for steps to train on: those with noise, without the last if --no-train-last.  -> (T,)"""
    trained = torch.ones(config.num_steps)
    if config.noise_steps:
        trained[config.noise_steps:] = 0
    if not config.train_last:
        trained[-1] = 0
    return trained


def advantages(r, prompts, history, config):
    """A of each step, cut to ± --advantage-clip, and 0 at steps not to be trained.  -> (B,T)"""
    A = group_advantage(r, prompts, config.normalize)
    A = A.clamp(-config.advantage_clip, config.advantage_clip)
    return A[:, None] * trained_steps(config)


def rewards_by_ode(pipe, config):
    """Rewards of a run's evaluation noise when the ODE draws.  -> (eval_samples,)"""
    reward = rewards.get_reward(config.reward, config)
    config = replace(config, sampler="constant", noise=0.0)  # without noise it is the ODE's step
    seen = ddpo.evaluate(pipe, get_prompts(config.prompts), reward, config, policy)
    return seen["reward"]


def main(argv=None):
    config = runs.parse(Config, __doc__, argv, SD)
    ddpo.check(config, needs_others=True)
    if not trained_steps(config).any():
        raise ValueError("--no-train-last: no step is left to train on")
    if config.sampler == "cps" and config.noise > 1:
        raise ValueError("--noise must be at most 1 with --sampler cps: there it is all noise")
    pretrained = models.load_pipeline(config.model, config.device, config.dtype)
    before = rewards_by_ode(pretrained, config)
    del pretrained  # a large model leaves no room for a second one
    run, summary = ddpo.train(config, policy, advantages)
    runs.report(run, summary)
    by_ode = {}
    for when, r in (("before", before), ("after", rewards_by_ode(run.pipe, config))):
        mean, error = by_ode[when] = training.mean_se(r)
        print(f"By the ODE, from the same noise: {mean:.3f} ± {error:.3f} {when}")
    runs.write_json(run.folder / "by_ode.json", by_ode)
    return run


if __name__ == "__main__":
    flags.run(main)
