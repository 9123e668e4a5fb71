"""01 · Denoising is a Markov decision process.

WHAT YOU LEARN. A diffusion model turns noise x_T into a picture x_0 in T small random steps. Each
step draws from a Gaussian whose density we can write down. So the sampler is a stochastic policy,
and whatever improves policies by reward can improve pictures. DDPO's MDP:

    state   s_t = (c, t, x_t)        c is the prompt, x_t the noisy latent
    action  a_t = x_{t−1}            the next, slightly cleaner latent
    policy  π(a_t | s_t) = p_θ(x_{t−1} | x_t, c) = N(μ_θ(x_t, c, t), σ_t² I)
    start   p(c) × N(0, I);  reward r(x_0, c) at the last step, 0 at every other

THE EQUATIONS. ᾱ_t is the share of signal left at time t, t−1 stands for the next entry of a
shortened schedule, ε for the predicted noise, D for the number of entries of a latent, C·H·W.

    x_t   = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε,   L_DDPM = E[‖ε − ε_θ(x_t, t, c)‖²/D]     how it was pretrained
    x̂_0   = (x_t − √(1−ᾱ_t)·ε) / √ᾱ_t                        what the model believes x_0 to be
    μ_θ   = √ᾱ_{t−1}·x̂_0 + √(1−ᾱ_{t−1}−σ_t²)·ε                                   (DDIM eq. 12)
    σ_t   = η·√((1−ᾱ_{t−1})/(1−ᾱ_t))·√(1−ᾱ_t/ᾱ_{t−1})                            (DDIM eq. 16)
    log p = −½‖(x_{t−1}−μ_θ)/σ_t‖² − D·log σ_t − (D/2)·log 2π
    κ_t   = |∂μ_θ/∂ε|:  predictions δ apart are KL = ½(κ_t/σ_t)²·‖δ‖² apart

RUN `python 01_mdp.py`: one trajectory as a table, and a picture of x̂_0 as t falls. EXPECT a ratio
of 1 on replay, and κ/σ near 1 at every step but the second-to-last. DEPARTURES. Where σ_t = 0 there
is no density: η = 0 is refused, and a last step that lands exactly on x_0 counts as part of the
decoder, with log-prob 0, KL 0, no gradient. Gaussians stay float32 whatever the UNet's precision:
the action that is stored is the action that was scored.
EXERCISES. (1) What does --eta 0.3 do to κ/σ, and why? (2) Print ‖μ_θ − x_t‖/(σ_t·√D): how does a
step's drift compare with its noise? (3) Find from ᾱ alone why κ/σ peaks where it does.
"""
import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from support import figures, flags, models, parallel, training


@dataclass(frozen=True)
class Config(flags.MachineFlags):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, a finished run, or a hub name
    prompts: tuple[str, ...] = (  # one trajectory for each
        "a red circle", "two blue squares", "a blue star on the left",
        "a green star and a yellow circle")
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step: 1 is DDPM's, 0 (no randomness, so no policy) is refused
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none, at half the cost
    seed: int = 0  # seed of all noise
    out: str = "runs/01_mdp/beliefs.png"  # where the picture goes
    sd: bool = False  # the full model's settings become the defaults


SD = dict(model="stable-diffusion-v1-5/stable-diffusion-v1-5", prompts=("a dog riding a bike",),
          num_steps=50, guidance_scale=5.0, dtype="bfloat16", batch_size=8)


def forward_process(scheduler, x_0, t, eps):
    """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε.   (B,C,H,W), (B,), (B,C,H,W) -> (B,C,H,W)"""
    assert x_0.shape == eps.shape and t.shape == x_0.shape[:1], (x_0.shape, t.shape, eps.shape)
    alpha_t = scheduler.alphas_cumprod.to(x_0)[t.to(x_0.device)].view(-1, 1, 1, 1)
    return alpha_t.sqrt() * x_0 + (1 - alpha_t).sqrt() * eps


def denoising_loss(eps_pred, eps, weight=None):
    """L_DDPM = E[ w·‖ε − ε_θ(x_t, t, c)‖²/D ].   (B,C,H,W), (B,C,H,W), (B,) or None -> ()"""
    assert eps_pred.shape == eps.shape, (eps_pred.shape, eps.shape)
    error = (eps - eps_pred).square().mean((1, 2, 3))
    if weight is not None:
        assert weight.shape == error.shape, (weight.shape, error.shape)
        error = weight * error
    return error.mean()


# ---- one step back: a Gaussian with a density -----------------------------------------------


def predict_noise(unet, x_t, t, prompt_embeds, negative_embeds=None, guidance_scale=1.0):
    """ε = ε_θ(x_t, t, ∅) + s·(ε_θ(x_t, t, c) − ε_θ(x_t, t, ∅)): classifier-free guidance.

    (B,C,H,W), int or (B,), (B,L,D), (B or 1,L,D) -> (B,C,H,W) in float32 or better; it is v or x_0
    where the model predicts those. Both halves share one call; s = 1 needs only one half.
    """
    t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
    if guidance_scale != 1:
        x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
        prompt_embeds = torch.cat([negative_embeds.expand_as(prompt_embeds), prompt_embeds])
    eps = unet(x_t.to(unet.dtype), t, encoder_hidden_states=prompt_embeds.to(unet.dtype)).sample
    eps = eps.to(torch.promote_types(eps.dtype, torch.float32))
    if guidance_scale != 1:
        eps_empty, eps_prompt = eps.chunk(2)
        eps = eps_empty + guidance_scale * (eps_prompt - eps_empty)
    return eps


def ddim_coefficients(scheduler, t, eta=1.0):
    """σ_t = η·√((1−ᾱ_{t−1})/(1−ᾱ_t))·√(1−ᾱ_t/ᾱ_{t−1})  (DDIM eq. 16).  t: int or (N,)

    -> ᾱ_t, ᾱ_{t−1}, σ_t, each (N,) in float64 on the CPU: float32 would cost σ_t two digits.
    """
    t = torch.as_tensor(t).cpu().reshape(-1)
    table = models.alphas_cumprod(scheduler, t)
    previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    # Ask "past the end?" before clamping the index: afterwards the answer is always no.
    past_the_end = previous < 0
    alpha_t = table[t]
    alpha_prev = table[previous.clamp(min=0)]
    alpha_prev[past_the_end] = scheduler.final_alpha_cumprod.to(table)
    sigma_t = ((1 - alpha_prev) / (1 - alpha_t)).sqrt() * (1 - alpha_t / alpha_prev).sqrt()
    return alpha_t, alpha_prev, eta * sigma_t


def x0_and_noise(scheduler, noise_pred, alpha_t, x_t):
    """x_t = √ᾱ_t·x̂_0 + √(1−ᾱ_t)·ε, solved for what the model does not predict.  -> x̂_0, ε

    noise_pred, x_t (B,C,H,W), alpha_t (B,1,1,1); prediction types epsilon, v_prediction and sample.
    """
    signal = alpha_t.sqrt()
    noise = (1 - alpha_t).sqrt()
    if scheduler.config.prediction_type == "epsilon":
        eps = noise_pred
        x_0 = (x_t - noise * eps) / signal
    elif scheduler.config.prediction_type == "v_prediction":
        eps = signal * noise_pred + noise * x_t
        x_0 = signal * x_t - noise * noise_pred
    else:
        x_0 = noise_pred
        eps = (x_t - signal * x_0) / noise
    if scheduler.config.clip_sample:  # as in diffusers, eps is not worked out anew from this x_0
        limit = scheduler.config.clip_sample_range
        x_0 = x_0.clamp(-limit, limit)
    return x_0, eps


def step_mean_std(scheduler, noise_pred, t, x_t, eta=1.0):
    """μ_θ = √ᾱ_{t−1}·x̂_0 + √(1−ᾱ_{t−1}−σ_t²)·ε  (DDIM eq. 12).  -> mean (B,C,H,W), std (B,1,1,1)

    t: int or (B,), all different if you like. Worked in float64 and rounded once, to x_t's dtype.
    """
    work = torch.float32 if x_t.device.type == "mps" else torch.float64  # Apple GPUs lack float64
    coefficients = torch.stack(ddim_coefficients(scheduler, t, eta)).to(x_t.device, work)
    coefficients = coefficients.view(3, -1, 1, 1, 1).expand(3, len(x_t), 1, 1, 1)
    alpha_t, alpha_prev, sigma_t = coefficients
    x_0, eps = x0_and_noise(scheduler, noise_pred.to(work), alpha_t, x_t.to(work))
    # The root's argument is 0 where ᾱ_{t−1} = 1, and rounding can push it below.
    direction = (1 - alpha_prev - sigma_t**2).clamp(min=0).sqrt()
    mean = alpha_prev.sqrt() * x_0 + direction * eps
    return mean.to(x_t.dtype), sigma_t.to(x_t.dtype)


def standardize(x, mean, std):
    """z = (x − μ)/σ in float32 or better, and 0 where σ = 0.  (B,C,H,W), same, (B,1,1,1)"""
    assert x.shape == mean.shape and x.ndim == 4, (x.shape, mean.shape)
    dtype = torch.promote_types(x.dtype, torch.float32)
    std = std.to(dtype)
    difference = x.to(std) - mean.to(std)
    # Never divide by 0, not even in a branch thrown away: its gradient would be 0·∞ = NaN.
    return torch.where(std > 0, difference, 0) / torch.where(std > 0, std, 1)


def log_prob(x_prev, mean, std):
    """log N(x_{t−1}; μ, σ²I) = −½‖(x_{t−1}−μ)/σ‖² − D·log σ − (D/2)·log 2π  -> (B,), in nats

    A sum over D = C·H·W and not a mean: only so is exp(log p − log p_old) a ratio of probabilities.
    A row with σ = 0 gives 0 and no gradient.
    """
    z = standardize(x_prev, mean, std)
    B, D = len(z), z[0].numel()
    std = std.to(z.dtype).flatten().expand(B)
    log_sigma = torch.where(std > 0, std, 1).log()
    distance = z.square().sum((1, 2, 3))
    density = -0.5 * distance - D * log_sigma - 0.5 * D * math.log(2 * math.pi)
    return torch.where(std > 0, density, 0)


def kl_divergence(mean_p, mean_q, std):
    """KL(N(μ_p, σ²I) ‖ N(μ_q, σ²I)) = ‖μ_p − μ_q‖²/(2σ²)  -> (B,), in nats; 0 where σ = 0"""
    return 0.5 * standardize(mean_p, mean_q, std).square().sum((1, 2, 3))


def noise_weight(scheduler, t, eta=1.0):
    """κ_t/σ_t = |∂μ_θ/∂ε|/σ_t: predictions δ apart are KL = ½(κ_t/σ_t)²‖δ‖² apart.  t: int or (N,)

    -> (N,) in float64, ∞ where σ_t = 0. For models that predict v or x_0, read ∂v or ∂x_0.
    """
    if scheduler.config.clip_sample:
        raise ValueError("--model: clip_sample=True makes the mean nonlinear, so no weight exists")
    t = torch.as_tensor(t).cpu().reshape(-1)
    one = torch.ones(len(t), 1, 1, 1, dtype=torch.float64)
    mean, sigma = step_mean_std(scheduler, one, t, 0 * one, eta)  # linear: κ is |μ| at ε = 1, x = 0
    return torch.where(sigma > 0, mean.abs() / sigma, torch.inf).flatten()


# ---- the policy, and a trajectory -----------------------------------------------------------


def policy(pipe, x_t, t, prompt_embeds, negative_embeds, config):
    """π_θ(·|s_t) = N(μ_θ(x_t, c, t), σ_t² I)  -> mean (B,C,H,W), std (B,1,1,1).  t: int or (B,)"""
    scale = config.guidance_scale
    noise_pred = predict_noise(pipe.unet, x_t, t, prompt_embeds, negative_embeds, scale)
    return step_mean_std(pipe.scheduler, noise_pred, t, x_t, config.eta)


@dataclass
class Trajectory:
    """B chains: s_k = (c, timesteps[k], latents[:, k]),  a_k = latents[:, k + 1]."""
    latents: torch.Tensor  # (B,T+1,C,H,W) float32; [:, 0] is x_T and [:, -1] is x_0; on the CPU
    means: torch.Tensor  # (B,T,C,H,W), μ_θ at s_k, of the policy that drew the chains; on the CPU
    log_probs: torch.Tensor  # (B,T), of a_k given s_k, under the same policy
    timesteps: torch.Tensor  # (T,), falling
    prompt_embeds: torch.Tensor  # (B,L,D)
    negative_embeds: torch.Tensor | None  # (1,L,D) of the empty prompt; None without guidance
    prompts: list
    images: list  # B PIL pictures of x_0


@torch.no_grad()
def rollout(pipe, prompts, config, noise):
    """x_T ~ N(0, I);  x_{t−1} = μ_θ(x_t, c, t) + σ_t·z,  z ~ N(0, I).  One chain a prompt.

    config: num_steps, eta, guidance_scale, batch_size. noise: (seed, purpose, round): picture i's
    noise depends on these and on i alone, not on the model or the batch size.
    """
    prompts, B = list(prompts), len(prompts)
    if B == 0:
        raise ValueError("--prompts: at least one is needed")
    if not 0 < config.eta <= 1:
        raise ValueError(f"--eta {config.eta} is not above 0 and at most 1; --eta 0 makes steps "
                         "deterministic: with σ = 0 there is no density, so no log-prob")
    pipe.scheduler.set_timesteps(config.num_steps)
    timesteps = pipe.scheduler.timesteps.to(pipe.device)
    T, (C, H, W) = len(timesteps), models.latent_shape(pipe)
    prompt_embeds = models.encode_prompts(pipe, prompts)
    negative_embeds = models.encode_prompts(pipe, [""]) if config.guidance_scale != 1 else None
    latents = torch.zeros(B, T + 1, C, H, W)  # on the CPU: a round's are too large for a GPU
    means = torch.zeros(B, T, C, H, W)
    log_probs = torch.zeros(B, T, device=pipe.device)

    bar = tqdm(total=B * T, desc="rollout", leave=False, delay=2)
    for rows in parallel.share(B, config.batch_size):
        z = torch.stack([training.gaussian((T + 1, C, H, W), *noise, i) for i in rows.tolist()])
        x_t, *z = z.to(pipe.device).unbind(1)
        latents[rows, 0] = x_t.cpu()
        for k in range(T):
            mean, std = policy(pipe, x_t, timesteps[k], prompt_embeds[rows], negative_embeds,
                               config)
            x_t = mean + std * z[k]
            log_probs[rows, k] = log_prob(x_t, mean, std)
            latents[rows, k + 1] = x_t.cpu()
            means[rows, k] = mean.cpu()
            bar.update(len(rows))
    bar.close()
    parallel.total(latents, means, log_probs)
    return Trajectory(latents, means, log_probs, timesteps, prompt_embeds, negative_embeds,
                      prompts, models.decode(pipe, latents[:, -1]))


def policy_at(pipe, trajectory, i, k, config):
    """Mean and std of pipe's present policy at step k of chain i.  (N,), (N,) -> as `policy`"""
    x_t = trajectory.latents[i, k].to(trajectory.timesteps.device)
    return policy(pipe, x_t, trajectory.timesteps[k], trajectory.prompt_embeds[i],
                  trajectory.negative_embeds, config)


@torch.no_grad()
def main(argv=None):
    config = flags.parse(Config, __doc__, argv, SD)
    out = flags.picture_path(config.out)
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    trajectory = rollout(pipe, config.prompts, config, noise=(config.seed, "examples", 0))
    pictures = torch.arange(len(trajectory.prompts))
    print(f"{trajectory.prompts[0]!r}, one of a batch of {len(pictures)}; "
          f"D = {trajectory.latents[0, 0].numel()}")
    print("   t   sigma_t       κ/σ    log-prob  KL to itself  ratio on replay  log-ratio, alone")
    worst, beliefs = 0.0, []
    for k, t in enumerate(trajectory.timesteps.tolist()):
        x_t, x_prev = trajectory.latents[:, k:k + 2].to(pipe.device).unbind(1)
        mean, std = policy_at(pipe, trajectory, pictures, torch.full_like(pictures, k), config)
        ratio = (log_prob(x_prev, mean, std) - trajectory.log_probs[:, k]).exp()
        # The same step in a batch of one: other kernels, other rounding, and nothing else.
        mean_1, std_1 = policy_at(pipe, trajectory, pictures[:1], torch.tensor([k]), config)
        log_ratio = log_prob(x_prev[:1], mean_1, std_1)[0] - trajectory.log_probs[0, k]
        worst = max(worst, abs(log_ratio.item()))
        weight = noise_weight(pipe.scheduler, t, config.eta)
        kl = kl_divergence(trajectory.means[:, k], mean, std)
        print(f"{t:4}  {std[0].item():8.5f}  {weight.item():8.3f}  "
              f"{trajectory.log_probs[0, k].item():10.3f}  {kl[0].item():12}  "
              f"{ratio[0].item():15}  {log_ratio.item():15.1e}")
        eps = predict_noise(pipe.unet, x_t, t, trajectory.prompt_embeds,
                            trajectory.negative_embeds, config.guidance_scale)
        alpha_t = ddim_coefficients(pipe.scheduler, t)[0].to(x_t).view(1, 1, 1, 1)
        x_0, _ = x0_and_noise(pipe.scheduler, eps, alpha_t, x_t)
        beliefs.append(models.decode(pipe, x_0))
    print(f"Scored in a batch of its own, a log-prob moves by {worst:.1e} at most.")
    names = [f"t = {t}" for t in trajectory.timesteps.tolist()]
    figures.beliefs(out, trajectory.prompts, beliefs, names, trajectory.images)
    print(f"What the model believes x_0 to be, as t falls: {out}")


if __name__ == "__main__":
    flags.run(main)
