"""04 · DPOK: policy gradients with a KL term (Fan et al., NeurIPS 2023, arXiv 2305.16381).

WHAT CHANGES FROM 03. The reward is now *learned*, a proxy that a policy can please without doing
what we mean. So the objective also says: stay near the pretrained model. (DPOK's z is our c.)

    J(θ) = E_{p_θ(x_{0:T}|z)}[ α·r(x_0, z) − β·Σ_t KL_t ]                         (DPOK's objective)
    KL_t = KL(p_θ(x_{t−1}|x_t,z) ‖ p_pre(x_{t−1}|x_t,z)) = ‖μ_θ − μ_pre‖² / (2σ_t²), in nats
    KL(p_θ(x_0|z) ‖ p_pre(x_0|z)) ≤ Σ_t E_{p_θ(x_t|z)}[ KL_t ],  both from x_T ~ N(0, I) (Lemma 4.2)

If steps could have any distribution, the best paths from one x_T would be p_pre·exp(α·r/β)/Z(x_T):
pretrained pictures, weighted by their reward. Training cannot choose x_T, so over all x_T the
pictures carry the factor 1/Z(x_T) too. (Best of n, in chapter 5, does choose.) New in the code:

  dpok_objective   03's clipped surrogate times α, minus β times the exact KL at the states visited
  reference        p_pre is the same UNet with its LoRA adapters off: no second network in memory
  Value            the baseline is V(x_t, z, t) ≈ E[r | x_t], with its own value at each step

RUN `python 04_dpok.py`: it cures "four stars", which the pretrained model takes for a brand's
yellow circle. EXPECT alignment, never trained on, to reach 0.84 in one minute on two CPU cores.
TRY `--beta 0` (what does the same cost in nats?), `--prompts tasks --prompts-per-round 5`.
DEPARTURES. Like the paper, the KL's gradient drops how θ changes which states are visited. The
published code's "KL" is an unweighted mean square, it clips without min, and draws its updates from
a buffer. V lags, so the others' mean of r − V is taken off too. Step weights are on the reward's
term only. Adapters and learning rate are other than 03's and than published.
EXERCISES. (1) At which step are most nats paid, and why there? (2) Write + β·kl in dpok_objective:
which tests fail? (3) Run experiments/variance.py on one prompt and on five: where does V help?
"""
import math
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch

from support import flags, models, parallel, plan, runs, training
from support.prompts import get_prompts

mdp = import_module("01_mdp")  # rollout, policy_at, log_prob, kl_divergence, noise_weight
rewards = import_module("02_rewards")  # RewardFlags, get_reward, score
ddpo = import_module("03_ddpo")  # print_clip, step_weights, mean_of_others


@dataclass(frozen=True)
class Config(rewards.RewardFlags, flags.TrainFlags):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, a finished run, or a hub name
    reward: str = "image_reward"  # one of chapter 2's, a sum as in chapter 3, or file.py:name
    gold: str = "alignment"  # what is really meant: measured, never optimized
    prompts: str = "bias"  # a shape family, animals, activities, tasks, a file, or one prompt
    rounds: int = 20  # rounds of sample, score, update
    prompts_per_round: int = 1  # prompts per round, drawn in turn from shuffled passes
    samples_per_prompt: int = 64  # pictures of each of them; the others' mean is the baseline
    updates_per_round: int = 2  # optimizer steps per round (K), each on its share of the pictures
    num_steps: int = 10  # denoising steps T
    timestep_fraction: float = 1.0  # share of each picture's steps to train on, drawn at random
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none, at half the cost
    learning_rate: float = 1e-3  # of AdamW
    weight_decay: float = 1e-4  # of AdamW
    max_grad_norm: float = 100.0  # a longer gradient is scaled down to this norm
    clip_range: float = 0.2  # ε of PPO's clip
    ratio: Literal["exact", "per_dim"] = "exact"  # per_dim divides log-probs and KL by D
    step_weight: Literal["none", "sigma"] = "sigma"  # none: the paper; sigma: steps of equal size
    alpha: float = 1.0  # α, the reward's weight
    beta: float = 0.01  # β, the KL's weight
    value: bool = True  # subtract V(x_t, z, t) from r, and then in any case the others' mean
    value_rounds: int = 4  # V is fitted on this many latest rounds
    lora_rank: int = 16  # rank of LoRA; 0 trains all weights, beside a frozen copy of the UNet
    lora_targets: tuple[str, ...] = (*models.ATTENTION, "conv1", "conv2")  # layers with adapters
    seed: int = 0  # seed of everything
    sd: bool = False  # the published settings for the full model become the defaults


SD = dict(  # DPOK's for one prompt, with aesthetic in the place of gold
    model="stable-diffusion-v1-5/stable-diffusion-v1-5", prompts="A green colored rabbit",
    image_reward_weights="THUDM/ImageReward/ImageReward.pt", gold="aesthetic",
    clip="openai/clip-vit-large-patch14",
    aesthetic_weights="trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
    rounds=2000, samples_per_prompt=10, updates_per_round=5, batch_size=8, train_batch_size=4,
    dtype="bfloat16", checkpointing=True, num_steps=50, guidance_scale=7.5, learning_rate=1e-5,
    lora_rank=4, lora_targets=models.ATTENTION,
    max_grad_norm=5.0,  # the published 0.1 is of a mean over T = 50 steps; here they are summed
    clip_range=1e-4, ratio="per_dim", step_weight="none", alpha=10.0, beta=0.01)

# ---- the objective --------------------------------------------------------------------------


def dpok_objective(log_prob, old_log_prob, advantage, kl, clip_range, alpha, beta):
    """J = E[ Σ_t (α·min(w·A, clip(w, 1−ε, 1+ε)·A) − β·KL_t) ],  w = p_θ/p_old  (DPOK): its terms.

    (N,), (N,), (N,), (N,), ε, α, β -> (N,). KL_t with its gradient, at the states that p_old
    visited. Of ∇E[Σ_t KL_t] this has E[Σ_t ∇KL_t]. The paper drops, and so do we, the rest,
    E[Σ_t ∇log p_θ(x_{t−1}|x_t) · Σ_{s<t} KL_s]: how an action changes the KL of later states.
    """
    assert log_prob.shape == old_log_prob.shape == advantage.shape == kl.shape, log_prob.shape
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    return alpha * surrogate - beta * kl


@torch.no_grad()
def step_means(pipe, trajectory, config):
    """μ(x_t, z, t) of pipe's present weights at all states of a trajectory.  -> (B,T,C,H,W)"""
    means = torch.zeros_like(trajectory.means)
    B, T = trajectory.log_probs.shape
    i, k = torch.arange(B).repeat_interleave(T), torch.arange(T).repeat(B)
    for i, k in training.batches(i, k, config.batch_size):
        means[i, k] = mdp.policy_at(pipe, trajectory, i, k, config)[0].cpu()
    parallel.total(means)
    return means


def path_kl(pipe, trajectory, reference_means, config):
    """KL_t = ‖μ_θ − μ_pre‖² / (2σ_t²) at each step of the policy that drew the chains.  -> (B,T)"""
    std = mdp.ddim_coefficients(pipe.scheduler, trajectory.timesteps, config.eta)[2]
    kl = torch.empty_like(trajectory.log_probs)
    for k in range(kl.shape[1]):
        kl[:, k] = mdp.kl_divergence(trajectory.means[:, k], reference_means[:, k],
                                     std[k].to(kl).view(1, 1, 1, 1))
    return kl


# ---- the value function ---------------------------------------------------------------------


class Value:
    """V_φ(x_t, z, t) ≈ E[r(x_0, z) | x_t]: least squares on the rewards of the latest rounds.

    Subtracting what is known before the action x_{t−1} is drawn leaves E[∇log p · (r − V)] = ∇J,
    and can lower its variance. V is 0 until it is fitted, and is fitted after a round's updates: it
    has never seen the rewards that it is subtracted from.
    """

    def __init__(self, pipe, config):
        channels, width = models.latent_shape(pipe)[0], pipe.unet.config.cross_attention_dim
        with torch.random.fork_rng():  # torch draws first weights from the global generator
            torch.manual_seed(training.torch_seed(config.seed, "value"))
            self.net = models.ValueNet(channels, width).to(pipe.device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3, weight_decay=1e-2)
        self.config = config
        self.rounds = []  # the latest (x_t, c, t, r), each (B·T, ...)
        self.mean, self.std = torch.zeros(2)

    def states(self, trajectory):
        """x_t, the prompt's mean token, t of all (picture, step) pairs, pictures first."""
        B, T = trajectory.log_probs.shape
        c = trajectory.prompt_embeds.float().mean(1).cpu()
        return (trajectory.latents[:, :-1].flatten(0, 1), c.repeat_interleave(T, 0),
                trajectory.timesteps.cpu().repeat(B))

    @torch.no_grad()
    def predict(self, trajectory):
        """V at every step of every picture.  -> (B,T)"""
        batches = zip(*(column.split(256) for column in self.states(trajectory)))
        V = self.mean + self.std * torch.cat([self.net(*states) for states in batches])
        return V.view(trajectory.log_probs.shape).to(trajectory.log_probs.device)

    def fit(self, trajectory, r, n, batch_size=256):
        """One pass over the latest rounds, this one included, towards the final rewards r (B,)."""
        T = trajectory.log_probs.shape[1]
        newest = (*self.states(trajectory), r.to(trajectory.latents).repeat_interleave(T))
        self.rounds = [*self.rounds, newest][-self.config.value_rounds:]
        x_t, c, t, target = (torch.cat(columns) for columns in zip(*self.rounds))
        self.mean, self.std = target.mean(), target.std().clamp(min=1e-6)
        target = (target - self.mean) / self.std
        order = training.random_stream(self.config.seed, "value batches", n).permutation(len(t))
        for rows in torch.from_numpy(order).split(batch_size):
            error = self.net(x_t[rows], c[rows], t[rows]) - target[rows]
            error.square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def value_advantage(reward, V, prompts):
    """A_i = (r_i − V_i) − mean_{j≠i, same prompt} (r_j − V_j).   (B,), (B,T), B strings -> (B,T)

    V lags a round behind the policy: what it is wrong by on average goes out with the mean.
    """
    difference = reward[:, None] - V
    return difference - ddpo.mean_of_others(difference, prompts)


# ---- the loop -------------------------------------------------------------------------------


def check(config):
    """ValueError for flags that contradict each other, before any work is done."""
    runs.check_folder(config)
    if config.samples_per_prompt < 2:
        raise ValueError("--samples-per-prompt must be at least 2: the others are the baseline")
    samples = config.prompts_per_round * config.samples_per_prompt
    if config.updates_per_round > samples:
        raise ValueError(f"--updates-per-round: at most {samples}, the pictures of a round")


def accumulate(pipe, trajectory, reference_means, advantage, pictures, config, n):
    """Adds −∇J of some pictures of round n to the gradients, and nothing else.  -> statistics

    advantage: (B,T). clip_fraction and kl_old compare the policy before this step with the one
    that drew the pictures; the log has those of a round's last update.
    """
    B, T = advantage.shape
    D = trajectory.latents[0, 0].numel()
    all_i, all_k = training.step_pairs(pictures, T, config, n)
    share = 1 / len(all_i)
    stats = {"clip_fraction": 0.0, "kl_old": 0.0}
    for i, k in training.batches(all_i, all_k, config.train_batch_size):
        mean, std = mdp.policy_at(pipe, trajectory, i, k, config)
        log_prob = mdp.log_prob(trajectory.latents[i, k + 1], mean, std)
        old_log_prob = trajectory.log_probs[i, k]
        kl_old = mdp.kl_divergence(trajectory.means[i, k], mean, std)
        kl = mdp.kl_divergence(mean, reference_means[i, k], std)
        if config.ratio == "per_dim":
            log_prob, old_log_prob, kl = log_prob / D, old_log_prob / D, kl / D
        J = dpok_objective(log_prob, old_log_prob, advantage[i, k], kl, config.clip_range,
                           config.alpha, config.beta)
        # E[Σ_t …], a mean over pictures and a sum over steps, is T times the mean over all pairs.
        loss = -J.sum() * T * share
        loss.backward()
        outside = ((log_prob - old_log_prob).exp() - 1).abs() > config.clip_range
        stats["clip_fraction"] += outside.sum().item() * share
        stats["kl_old"] += kl_old.sum().item() * T * share
    return parallel.total_of(stats)


def evaluate(pipe, prompts, reward, gold, reference, config):
    """Proxy, gold and path KL on noise that training never draws: the same before and after."""
    prompts = training.spread_evenly(prompts, config.eval_samples)
    trajectory = mdp.rollout(pipe, prompts, config, noise=(config.seed, "evaluate", 0))
    with reference():
        reference_means = step_means(pipe, trajectory, config)
    kl = path_kl(pipe, trajectory, reference_means, config).cpu().double()
    weight = mdp.noise_weight(pipe.scheduler, trajectory.timesteps, config.eta) ** 2 / 2
    steps = torch.stack([trajectory.timesteps.cpu(), weight, kl.mean(0)], 1)
    r = rewards.score(reward, trajectory.images, prompts, config.out)
    g = rewards.score(gold, trajectory.images, prompts, config.out)
    return {"prompts": prompts, "images": trajectory.images, "reward": r, "gold": g,
            "kl": kl.sum(1), "steps": steps.tolist()}


def train(config):
    """sample → score → advantage → K × (accumulate, step) → log.  Returns the run, its summary."""
    check(config)
    all_prompts = get_prompts(config.prompts)
    film_prompts = training.spread_evenly(all_prompts, config.film_pictures)
    reward = rewards.get_reward(config.reward, config, config.device)
    gold = rewards.get_reward(config.gold, config, config.device, "--gold")
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    scale = ddpo.step_weights(pipe.scheduler, config).to(pipe.device)
    params = models.trainable(pipe, config)
    reference = models.make_reference(pipe)
    optimizer = torch.optim.AdamW(params, config.learning_rate, weight_decay=config.weight_decay)
    K = config.updates_per_round
    ddpo.print_clip(config, math.prod(models.latent_shape(pipe)))
    baseline = Value(pipe, config)
    before = evaluate(pipe, all_prompts, reward, gold, reference, config)
    run = runs.Run(config, "dpok")

    for n in run.rounds(pipe, optimizer, baseline):
        if run.is_film_due(n):
            run.add_to_film(mdp.rollout(pipe, film_prompts, config, (config.seed, "film", 0)))
        prompts = training.prompts_of_round(all_prompts, config, n)
        trajectory = mdp.rollout(pipe, prompts, config, noise=(config.seed, "train", n))
        with reference():
            reference_means = step_means(pipe, trajectory, config)
        r = rewards.score(reward, trajectory.images, prompts, run.folder)
        g = rewards.score(gold, trajectory.images, prompts, run.folder)
        A = value_advantage(r.float().to(pipe.device), baseline.predict(trajectory), prompts)
        A = A * scale  # (B,T); no step weight is negative, so min keeps its sides

        for pictures in training.minibatches(len(prompts), K, config.seed, n):
            stats = accumulate(pipe, trajectory, reference_means, A, pictures, config, n)
            stats |= training.optimizer_step(optimizer, params, config)
        if config.value:
            baseline.fit(trajectory, r, n)
        stats |= {"gold": g, "kl": path_kl(pipe, trajectory, reference_means, config).sum(1)}
        run.log(n, reward=r, **stats)

    run.add_to_film(mdp.rollout(pipe, film_prompts, config, (config.seed, "film", 0)))
    after = evaluate(pipe, all_prompts, reward, gold, reference, config)
    names = {"reward": config.reward, "gold": f"gold: {config.gold}", "kl": "path KL, nats"}
    return run, run.finish(pipe, before, after, names)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv, SD)
    if config.plan:
        return plan.report(config, reference=True, value=True)
    run, summary = train(config)
    runs.report(run, summary)
    print("\nAt each step t: ½(κ_t/σ_t)² (nats per unit of ‖ε_θ − ε_pre‖²), and KL_t in nats")
    for t, weight, kl in run.after["steps"]:
        print(f"{t:6.0f} {weight:10.2f} {kl:10.2f}")
    return run


if __name__ == "__main__":
    flags.run(main)
