"""How tight is Lemma 4.2? Both of its sides, where both are known in closed form.

    KL(p_θ(x_0|z) ‖ p_pre(x_0|z)) ≤ Σ_t E_{p_θ(x_t|z)}[ KL_t ]                         (Lemma 4.2)

Chapter 4 pays for the right side, because nobody can compute the left one. Of one-dimensional data
N(m, s²) the best denoiser is a line, E[ε|x_t] = √(1−ᾱ_t)·(x_t − √ᾱ_t·m)/(ᾱ_t·s² + 1−ᾱ_t), so every
x_t is Gaussian and both sides have a formula. p_pre knows data with mean 0, p_θ with mean m.

RUN `python experiments/lemma.py`: a table and a plot in ten seconds. EXPECT the left side to be
near the data's own m²/(2·s²) with many steps, and the bound to be looser with few.
WRITES the plot, runs/lemma.png. TRY `--eta 0.5`: less noise a step, so which side grows?
"""
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from diffusers import DDIMScheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import evaluation, flags, models  # noqa: E402
from support.figures import Figure  # noqa: E402

mdp = import_module("01_mdp")  # ddim_coefficients, step_mean_std

MEANS = (0.1, 0.2, 0.4, 0.8, 1.6)  # m, of the data that p_θ knows
STD = 0.5  # s, of both data
CHAINS = (5, 10, 20, 50)  # numbers of denoising steps T


@dataclass(frozen=True)
class Config:
    model: str = "tiny_sd"  # the noise schedule is this model's
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    out: str = "runs/lemma.png"  # where the plot goes


def perfect_step(scheduler, t, mean, std, eta):
    """μ(x_t) = a + b·x_t and σ_t of the best denoiser of data N(mean, std²).  -> a, b, σ_t"""
    x_t = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    alpha_t, _, sigma_t = mdp.ddim_coefficients(scheduler, t, eta)
    eps = (1 - alpha_t).sqrt() * (x_t - alpha_t.sqrt() * mean) / (alpha_t * std**2 + 1 - alpha_t)
    at_0, at_1 = mdp.step_mean_std(scheduler, eps, t, x_t, eta)[0].flatten()
    return at_0, at_1 - at_0, sigma_t.squeeze()


def gaussian_chains(scheduler, num_steps, mean, std, pre_mean, pre_std, eta=1.0):
    """KL(p(x_0) ‖ p_pre(x_0)), Σ_t E_p[KL_t] of two perfect denoisers of Gaussian data, in nats.

    p's data are N(mean, std²), p_pre's N(pre_mean, pre_std²), in one dimension.  -> two floats
    """
    models.set_timesteps(scheduler, num_steps)
    m, v = torch.zeros(()).double(), torch.ones(()).double()  # mean and variance of p(x_t)
    m_pre, v_pre = m, v  # both chains start from N(0, 1)
    bound = 0.0
    for t in scheduler.timesteps:
        a, b, sigma_t = perfect_step(scheduler, t, mean, std, eta)
        a_pre, b_pre, _ = perfect_step(scheduler, t, pre_mean, pre_std, eta)
        gap = (a - a_pre) + (b - b_pre) * m  # of the two steps' means, at the mean of p(x_t)
        bound += (gap**2 + (b - b_pre) ** 2 * v) / (2 * sigma_t**2)
        m, v = a + b * m, b**2 * v + sigma_t**2
        m_pre, v_pre = a_pre + b_pre * m_pre, b_pre**2 * v_pre + sigma_t**2
    kl = 0.5 * (v / v_pre + (m - m_pre) ** 2 / v_pre - 1 - (v / v_pre).log())
    return kl.item(), bound.item()


def draw(path, sides):
    """Lemma 4.2's two sides.  sides: T -> list of (KL of x_0, sum of step KLs), in nats"""
    figure = Figure(figsize=(5, 4), dpi=120, layout="constrained")
    ax = figure.subplots()
    for T, points in sides.items():
        kl, bound = zip(*points)
        ax.loglog(kl, bound, ".-", label=f"T = {T}")
    ax.loglog(kl, kl, "k:", label="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.set(xlabel="KL of x_0, nats", ylabel="Σ of step KLs, nats")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    out = flags.picture_path(config.out)
    scheduler = models.load_pipeline(config.model, "cpu").scheduler
    # Our denoiser predicts ε, whatever the model whose schedule this is predicts.
    scheduler = DDIMScheduler.from_config(scheduler.config, prediction_type="epsilon")
    sides = {T: [gaussian_chains(scheduler, T, m, STD, 0.0, STD, config.eta) for m in MEANS]
             for T in CHAINS}

    print(f"KL(p(x_0) ‖ p_pre(x_0)) ≤ Σ_t E[KL_t] in nats: data N(m, {STD}²), pretrained on m = 0")
    rows = [{"m": m} for m in MEANS]
    for T, points in sides.items():
        for row, (kl, bound) in zip(rows, points):
            row[f"T = {T}"] = f"{kl:.4f} ≤ {bound:8.4f}"
    print(evaluation.as_text(rows))
    draw(out, sides)
    print(f"The bound against the truth: {out}")
    return sides


if __name__ == "__main__":
    flags.run(main)
