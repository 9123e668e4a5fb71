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
of 1 on replay, and κ/σ near 1 at every step but the second-to-last. TRY `--num-steps 50`.
DEPARTURES. DDIM ends on ᾱ = 1, without noise and so without a density; Stable Diffusion's settings,
and we, end on ᾱ_0 < 1. Latents stay float32: the action that is stored is the one that was scored.
EXERCISES. (1) What does --eta 0.3 do to κ/σ, and why? (2) Print ‖μ_θ − x_t‖/(σ_t·√D): how does a
step's drift compare with its noise? (3) Where does κ/σ peak with 50 steps, and why there?
"""
import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from support import figures, flags, models, training


@dataclass(frozen=True)
class Config(flags.MachineFlags):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, a finished run, or a hub name
    prompts: tuple[str, ...] = (  # one trajectory for each
        "a red circle", "two blue squares",
        "a blue star on the left", "a green star and a yellow circle")
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none, at half the cost
    seed: int = 0  # seed of all noise
    out: str = "runs/01_mdp/beliefs.png"  # where the picture goes
    sd: bool = False  # the full model's settings become the defaults


SD = flags.published("01_mdp")


# ---- how the model was pretrained (experiments/make_tiny_sd.py, experiments/sft.py) ---------


def column(values, x):
    """One number for each picture of x, in its dtype.   (B,) -> (B,1,1,1)"""
    return values.to(x).view(-1, 1, 1, 1)


def forward_process(scheduler, x_0, t, eps):
    """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε.   (B,C,H,W), (B,), (B,C,H,W) -> (B,C,H,W)"""
    assert x_0.shape == eps.shape
    alphas = scheduler.alphas_cumprod.to(t.device)
    alpha_t = column(alphas[t], x_0)
    return alpha_t.sqrt() * x_0 + (1 - alpha_t).sqrt() * eps


def denoising_loss(eps_pred, eps, weight=None):
    """L_DDPM = E[ w·‖ε − ε_θ(x_t, t, c)‖²/D ].   (B,C,H,W), (B,C,H,W), (B,) or None -> ()"""
    assert eps_pred.shape == eps.shape
    error = (eps - eps_pred).square()
    error = error.mean((1, 2, 3))
    if weight is not None:
        assert weight.shape == error.shape
        error = weight * error
    return error.mean()


# ---- one step back: a Gaussian with a density -----------------------------------------------


def predict_noise(unet, x_t, t, prompt_embeds, negative_embeds=None, guidance_scale=1.0):
    """ε = ε_θ(x_t, t, ∅) + s·(ε_θ(x_t, t, c) − ε_θ(x_t, t, ∅)): classifier-free guidance.

    (B,C,H,W), () or (B,), (B,L,E), (B or 1,L,E) -> (B,C,H,W) in x_t's dtype; it is v or x_0
    where the model predicts those. Both halves share one call; s = 1 needs only one half.
    """
    t = t.expand(len(x_t))
    x = x_t
    c = prompt_embeds
    if guidance_scale != 1:
        x = torch.cat([x_t, x_t])
        t = torch.cat([t, t])
        empty = negative_embeds.expand_as(c)
        c = torch.cat([empty, c])
    x = x.to(unet.dtype)
    c = c.to(unet.dtype)
    eps = unet(x, t, encoder_hidden_states=c).sample
    eps = eps.to(x_t)
    if guidance_scale != 1:
        eps_empty, eps_prompt = eps.chunk(2)
        eps = eps_empty + guidance_scale * (eps_prompt - eps_empty)
    return eps


def ddim_coefficients(scheduler, t, eta=1.0):
    """σ_t = η·√((1−ᾱ_{t−1})/(1−ᾱ_t))·√(1−ᾱ_t/ᾱ_{t−1})  (DDIM eq. 16).  t: int or (N,)

    -> ᾱ_t, ᾱ_{t−1}, σ_t, each (N,) in float64 on the CPU: float32 would cost σ_t two digits.
    """
    t = torch.as_tensor(t).cpu().reshape(-1)
    alphas = scheduler.alphas_cumprod.cpu().double()
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    previous = (t - stride).clamp(min=0)  # the last step lands on ᾱ_0, not on 1
    alpha_t = alphas[t]
    alpha_prev = alphas[previous]
    left = (1 - alpha_prev) / (1 - alpha_t)
    added = 1 - alpha_t / alpha_prev
    sigma_t = eta * left.sqrt() * added.sqrt()
    return alpha_t, alpha_prev, sigma_t


def toward_x_t(alpha_prev, sigma_t):
    """√(1−ᾱ_{t−1}−σ_t²), the share of ε that stays in the mean.  (N,), (N,) -> (N,)"""
    rest = 1 - alpha_prev - sigma_t**2
    return rest.clamp(min=0).sqrt()  # where it is 0, rounding can make it less


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
    return x_0, eps


def step_mean_std(scheduler, noise_pred, t, x_t, eta=1.0):
    """μ_θ = √ᾱ_{t−1}·x̂_0 + √(1−ᾱ_{t−1}−σ_t²)·ε  (DDIM eq. 12).  -> mean (B,C,H,W), std

    t: () or (B,), all different if you like; std is (1,1,1,1) or (B,1,1,1). All in x_t's dtype.
    """
    alpha_t, alpha_prev, sigma_t = ddim_coefficients(scheduler, t, eta)
    alpha_t = column(alpha_t, x_t)
    alpha_prev = column(alpha_prev, x_t)
    sigma_t = column(sigma_t, x_t)
    x_0, eps = x0_and_noise(scheduler, noise_pred, alpha_t, x_t)
    stays = toward_x_t(alpha_prev, sigma_t)
    mean = alpha_prev.sqrt() * x_0 + stays * eps
    return mean, sigma_t


def log_prob(x_prev, mean, std):
    """log N(x_{t−1}; μ, σ²I) = −½‖(x_{t−1}−μ)/σ‖² − D·log σ − (D/2)·log 2π  -> (B,), in nats

    A sum over D = C·H·W and not a mean: only so is exp(log p − log p_old) a ratio of densities.
    """
    assert x_prev.shape == mean.shape
    z = (x_prev - mean) / std
    normalizer = std.log() + 0.5 * math.log(2 * math.pi)
    log_density = -0.5 * z.square() - normalizer
    return log_density.sum((1, 2, 3))


def kl_divergence(mean_p, mean_q, std):
    """KL(N(μ_p, σ²I) ‖ N(μ_q, σ²I)) = ‖μ_p − μ_q‖²/(2σ²)  -> (B,), in nats"""
    assert mean_p.shape == mean_q.shape
    distance = ((mean_p - mean_q) / std).square()
    return 0.5 * distance.sum((1, 2, 3))


def noise_weight(scheduler, t, eta=1.0):
    """κ_t/σ_t = |√(1−ᾱ_{t−1}−σ_t²) − √(ᾱ_{t−1}(1−ᾱ_t)/ᾱ_t)| / σ_t,  κ_t = |∂μ_θ/∂ε|.   -> (N,)

    Predictions δ apart are KL = ½(κ_t/σ_t)²·‖δ‖² apart. ONE STEP DOMINATES: the second-to-last of
    ten goes from t = 101 to t = 1, where hardly any noise is left. What it may add, σ_t, is then an
    eighth of what it takes away, κ_t: a small change of ε moves its mean by many σ. At all others
    the two are about equal. t: int or (N,); of a model that predicts v or x_0, read ∂v or ∂x_0.
    """
    alpha_t, alpha_prev, sigma_t = ddim_coefficients(scheduler, t, eta)
    signal = alpha_t.sqrt()
    noise = (1 - alpha_t).sqrt()
    signal_prev = alpha_prev.sqrt()
    stays = toward_x_t(alpha_prev, sigma_t)
    if scheduler.config.prediction_type == "epsilon":
        kappa = stays - signal_prev * noise / signal
    elif scheduler.config.prediction_type == "v_prediction":
        kappa = stays * signal - signal_prev * noise
    else:
        kappa = signal_prev - stays * signal / noise
    return kappa.abs() / sigma_t


# ---- the policy, and a trajectory -----------------------------------------------------------


def policy(pipe, x_t, t, prompt_embeds, negative_embeds, config):
    """π_θ(·|s_t) = N(μ_θ(x_t, c, t), σ_t² I)  -> mean (B,C,H,W), std (B or 1,1,1,1)"""
    noise_pred = predict_noise(
        pipe.unet, x_t, t, prompt_embeds, negative_embeds, config.guidance_scale)
    return step_mean_std(pipe.scheduler, noise_pred, t, x_t, config.eta)


@dataclass
class Trajectory:
    """B chains; of step k = 0 … T−1: s_k = (c, timesteps[k], latents[:, k]), a_k = latents[:, k+1].

    Where torchrun shares pictures out, rows of other processes' pictures are 0 or None.
    """
    policy: callable  # what drew it: `policy` above, or another
    prompts: list
    prompt_embeds: torch.Tensor  # (B,L,E): L tokens, each of width E
    negative_embeds: torch.Tensor  # (1,L,E), of the empty prompt
    timesteps: torch.Tensor  # (T,), falling
    latents: torch.Tensor  # (B,T+1,C,H,W) float32: [:, 0] is x_T and [:, -1] is x_0
    means: torch.Tensor  # (B,T,C,H,W), μ_θ at s_k of the policy that drew
    log_probs: torch.Tensor  # (B,T), of a_k given s_k under the same policy
    images: list  # B PIL pictures of x_0


@torch.no_grad()
def rollout(pipe, prompts, config, purpose, n=0, policy=policy):
    """x_T ~ N(0, I);  x_{t−1} = μ_θ(x_t, c, t) + σ_t·z,  z ~ N(0, I).  One chain a prompt.

    config: num_steps, eta, guidance_scale, batch_size, seed. Picture i's noise depends on seed,
    purpose, round n and i alone, not on the model or the batch size.
    """
    B, T = len(prompts), config.num_steps
    shape = models.latent_shape(pipe)
    device = pipe.device
    models.set_timesteps(pipe.scheduler, T)
    trajectory = Trajectory(
        policy=policy,
        prompts=prompts,
        prompt_embeds=models.encode_prompts(pipe, prompts),
        negative_embeds=models.encode_prompts(pipe, [""]),
        timesteps=pipe.scheduler.timesteps.to(device),
        latents=torch.zeros(B, T + 1, *shape, device=device),
        means=torch.zeros(B, T, *shape, device=device),
        log_probs=torch.zeros(B, T, device=device),
        images=[None] * B,
    )
    mine = training.mine(B)  # all, unless torchrun shares them out
    batches = mine.split(config.batch_size)
    for rows in tqdm(batches, "rollout", leave=False, delay=2):
        z = training.gaussians(rows, (T + 1, *shape), config.seed, purpose, n)
        z = z.to(device)
        trajectory.latents[rows, 0] = z[:, 0]  # x_T
        for k in range(T):
            mean, std = policy_at(pipe, trajectory, rows, k, config)
            x_prev = mean + std * z[:, k + 1]
            trajectory.log_probs[rows, k] = log_prob(x_prev, mean, std)
            trajectory.latents[rows, k + 1] = x_prev
            trajectory.means[rows, k] = mean
        images = models.decode(pipe, x_prev)
        for i, image in zip(rows, images):
            trajectory.images[i] = image
    return trajectory


def policy_at(pipe, trajectory, i, k, config):
    """Mean and std of pipe's present policy at step k of chain i.  (N,), int or (N,)"""
    x_t = trajectory.latents[i, k]
    t = trajectory.timesteps[k]
    c = trajectory.prompt_embeds[i]
    empty = trajectory.negative_embeds
    return trajectory.policy(pipe, x_t, t, c, empty, config)


def belief(pipe, trajectory, k, config):
    """What the model believes x_0 to be at step k, as pictures."""
    x_t = trajectory.latents[:, k]
    t = trajectory.timesteps[k]
    c = trajectory.prompt_embeds
    empty = trajectory.negative_embeds
    eps = predict_noise(pipe.unet, x_t, t, c, empty, config.guidance_scale)
    alpha_t, _, _ = ddim_coefficients(pipe.scheduler, t)
    alpha_t = column(alpha_t, x_t)
    x_0, _ = x0_and_noise(pipe.scheduler, eps, alpha_t, x_t)
    return models.decode(pipe, x_0)


@torch.no_grad()
def main(argv=None):
    config = flags.parse(Config, __doc__, argv, SD)
    out = flags.picture_path(config.out)
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    trajectory = rollout(pipe, config.prompts, config, "examples")
    print(f"{config.prompts[0]!r}; D = {trajectory.latents[0, 0].numel()}")
    print("   t   sigma_t       κ/σ    log-prob  ratio on replay")
    beliefs = []
    for k, t in enumerate(trajectory.timesteps.tolist()):
        # In a batch of one the kernels round otherwise: the ratio shows by how much.
        mean, std = policy_at(pipe, trajectory, [0], k, config)
        action = trajectory.latents[[0], k + 1]
        new_log_prob = log_prob(action, mean, std).item()
        old_log_prob = trajectory.log_probs[0, k].item()
        ratio = math.exp(new_log_prob - old_log_prob)
        weight = noise_weight(pipe.scheduler, t, config.eta).item()
        print(f"{t:4}  {std.item():8.5f}  {weight:8.3f}  {old_log_prob:10.3f}  {ratio:15.6f}")
        beliefs.append(belief(pipe, trajectory, k, config))
    figures.beliefs(out, trajectory, beliefs)
    print(f"What the model believes x_0 to be, as t falls: {out}")


if __name__ == "__main__":
    flags.run(main)
