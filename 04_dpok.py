"""04 · DPOK: policy gradients with a KL term (Fan et al., NeurIPS 2023, arXiv 2305.16381).

WHAT CHANGES FROM 03. The reward is now *learned*, a proxy that a policy can please without doing
what we mean. So the objective also says: stay near the pretrained model. (DPOK's z is our c.)

    J(θ) = E_{p_θ(x_{0:T}|z)}[ α·r(x_0, z) − β·Σ_t KL_t ]                         (DPOK's objective)
    KL_t = KL(p_θ(x_{t−1}|x_t,z) ‖ p_pre(x_{t−1}|x_t,z)) = ‖μ_θ − μ_pre‖² / (2σ_t²), in nats
    KL(p_θ(x_0|z) ‖ p_pre(x_0|z)) ≤ Σ_t E_{p_θ(x_t|z)}[ KL_t ],  both from x_T ~ N(0, I) (Lemma 4.2)

New in the code:

  dpok_objective   03's clipped surrogate times α, minus β times the exact KL at the states visited
  reference        p_pre is the same UNet with its LoRA adapters off (of rank 0: a copy)
  Value            the baseline is V(x_t, z, t) ≈ E[r | x_t], with its own value at each step

RUN `python 04_dpok.py`: it cures "four stars", which the pretrained model takes for a brand's
yellow circle. EXPECT alignment, never trained on, to reach about 0.8 in 3 minutes on 2 CPU cores.
TRY `--beta 0` (what does the same cure cost in nats?), `--prompts tasks --prompts-per-round 5`.
Like the paper, the KL's gradient leaves out how θ changes which states are visited.
DEPARTURES. The published code's "KL" is an unweighted mean square, it clips without min, and draws
its updates from a buffer. V lags a round behind, so the mean of r − V over the other pictures is
taken off, too; A is neither divided by a spread nor cut, since α sets its scale. Step weights are
on the reward's term only: J's optimum is theirs only with `none`. Adapters and learning rate differ
from 03's and from the published ones.
EXERCISES. (1) At which step are most nats paid, and why there? (2) Write + β·kl in dpok_objective:
which tests fail? (3) Run experiments/variance.py on one prompt and on five: does V help?
"""
import math
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from support import flags, models, runs, training
from support.prompts import get_prompts

mdp = import_module("01_mdp")  # rollout, policy_at, log_prob, kl_divergence, ...
rewards = import_module("02_rewards")  # get_reward, score
ddpo = import_module("03_ddpo")  # PolicyGradient, check, step_weights, step_pairs, ...


@dataclass(frozen=True)
class Config(ddpo.PolicyGradient):
    reward: str = "image_reward"  # a name of chapter 2, a sum such as a=1,b=0.2, or file.py:name
    gold: str = "alignment"  # what is really meant: measured, never optimized
    prompts: str = "bias"  # a shape family, animals, tasks, ..., a file, or one prompt
    rounds: int = 20  # rounds of sample, score, update
    prompts_per_round: int = 1  # prompts per round, in turn from shuffled passes
    samples_per_prompt: int = 64  # pictures of each; the others' mean is the baseline
    updates_per_round: int = 2  # optimizer steps per round (K)
    learning_rate: float = 1e-3  # of AdamW
    max_grad_norm: float = 100.0  # a longer gradient is scaled down to this norm
    lora_rank: int = 16  # rank of LoRA; 0 trains all weights, beside a frozen copy
    lora_targets: tuple[str, ...] = (*models.ATTENTION, "conv1", "conv2")  # adapters' layers
    alpha: float = 1.0  # α, the reward's weight
    beta: float = 0.01  # β, the KL's weight
    value: bool = True  # subtract V(x_t, z, t) from r; no: only the others' mean
    value_rounds: int = 4  # V is fitted on this many latest rounds


SD = flags.published("04_dpok")

# ---- the objective --------------------------------------------------------------------------


def dpok_objective(log_prob, old_log_prob, advantage, kl, clip_range, alpha, beta):
    """J = E[ Σ_t (α·min(w·A, clip(w, 1−ε, 1+ε)·A) − β·KL_t) ],  w = p_θ/p_old  (DPOK): its terms.

    (N,), (N,), (N,), (N,), ε, α, β -> (N,). KL_t with its gradient, at the states that p_old
    visited. Of ∇E[Σ_t KL_t] this has E[Σ_t ∇KL_t]. The paper drops, and so do we, the rest,
    E[Σ_t ∇log p_θ(x_{t−1}|x_t) · Σ_{s<t} KL_s]: how an action changes the KL of later states.
    """
    assert log_prob.shape == old_log_prob.shape
    assert log_prob.shape == advantage.shape
    assert log_prob.shape == kl.shape
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    return alpha * surrogate - beta * kl


@torch.no_grad()
def step_means(pipe, trajectory, config):
    """μ(x_t, z, t) of pipe's present weights at all states of a trajectory.  -> (B,T,C,H,W)"""
    means = torch.zeros_like(trajectory.means)
    B, T = trajectory.log_probs.shape
    mine = training.mine(B)
    for rows in mine.split(config.batch_size):
        for k in range(T):
            mean, _ = mdp.policy_at(pipe, trajectory, rows, k, config)
            means[rows, k] = mean
    return means


def path_kl(pipe, trajectory, reference_means, config):
    """KL_t = ‖μ_θ − μ_pre‖² / (2σ_t²) at each step of the policy that drew the chains.  -> (B,T)"""
    t = trajectory.timesteps
    scheduler = pipe.scheduler
    _, _, sigma_t = mdp.ddim_coefficients(scheduler, t, config.eta)
    kl = torch.zeros_like(trajectory.log_probs)
    for k in range(len(t)):
        mean = trajectory.means[:, k]
        pre_mean = reference_means[:, k]
        std = mdp.column(sigma_t[k], mean)
        kl[:, k] = mdp.kl_divergence(mean, pre_mean, std)
    training.total(kl)  # of pictures that are not mine it is 0
    return kl


# ---- the value function ---------------------------------------------------------------------


class Value(nn.Module):
    """V_φ(x_t, z, t) ≈ E[r(x_0, z) | x_t]: least squares on the rewards of the latest rounds.

    Subtracting what is known before the action x_{t−1} is drawn leaves E[Σ_t ∇log p·(r − V)] = ∇J,
    and can lower its variance. V is 0 until it is fitted, and is fitted after a round's updates: it
    has never seen the rewards that it is subtracted from.
    """

    def __init__(self, pipe, config, hidden=256):
        super().__init__()
        D = math.prod(models.latent_shape(pipe))
        prompt_width = pipe.unet.config.cross_attention_dim
        with torch.random.fork_rng():  # torch draws first weights from the global generator
            seed = training.torch_seed(config.seed, "value")
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(D + prompt_width + 1, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, 1),
            )
        self.to(pipe.device)
        self.optimizer = torch.optim.AdamW(self.parameters())
        self.config = config
        self.rounds = []  # the latest (x_t, c, r)
        self.mean = 0.0  # of their rewards
        self.std = 0.0

    def forward(self, x_t, c, t):
        """(N,C,H,W), (N,L,D), (N,) -> (N,)"""
        state = x_t.flatten(1)
        prompt = c.float().mean(1)
        time = t[:, None] / 1000
        features = torch.cat([state, prompt, time], 1)
        V = self.net(features).squeeze(1)
        return self.mean + self.std * V

    @torch.no_grad()
    def predict(self, trajectory):
        """V at every step of every picture.  -> (B,T)"""
        V = torch.zeros_like(trajectory.log_probs)
        B, T = V.shape
        for i in training.mine(B):
            x_t = trajectory.latents[i, :-1]
            c = trajectory.prompt_embeds[i]
            c = c.expand(T, -1, -1)
            V[i] = self(x_t, c, trajectory.timesteps)
        training.total(V)
        return V

    def fit(self, trajectory, r, n, batch_size=256):
        """One pass over the latest rounds, this one included, toward the final rewards r (B,)."""
        if not self.config.value:
            return
        B, T = trajectory.log_probs.shape
        x_t = trajectory.latents[:, :-1]
        x_t = x_t.clone()
        training.total(x_t)  # each process fits the same V, on all pictures
        c = trajectory.prompt_embeds
        r = r.to(x_t)
        self.rounds.append((x_t, c, r))
        self.rounds = self.rounds[-self.config.value_rounds:]
        columns = zip(*self.rounds)
        x_t, c, r = map(torch.cat, columns)
        self.mean = r.mean().item()
        self.std = r.std().item() + 1e-6

        seed = self.config.seed
        pairs = len(r) * T
        order = training.permutation(pairs, seed, "value batches", n)
        for rows in order.split(batch_size):
            i = rows // T
            k = rows % T
            state = x_t[i, k]
            t = trajectory.timesteps[k]
            V = self(state, c[i], t)
            error = (V - r[i]) / self.std
            loss = error.square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def get_extra_state(self):
        """What a checkpoint keeps of it besides the weights."""
        optimizer = self.optimizer.state_dict()
        return optimizer, self.rounds, self.mean, self.std

    def set_extra_state(self, state):
        optimizer, self.rounds, self.mean, self.std = state
        self.optimizer.load_state_dict(optimizer)


def value_advantage(r, V, prompts):
    """A_i = (r_i − V_i) − mean_{j≠i, same prompt} (r_j − V_j).   (B,), (B,T), B strings -> (B,T)

    V lags a round behind the policy: what it is wrong by on average goes out with the mean.
    """
    r = r.to(V)
    difference = r[:, None] - V
    return difference - ddpo.mean_of_others(difference, prompts)


# ---- the loop -------------------------------------------------------------------------------


def evaluate(pipe, prompts, reward, gold, reference, config):
    """Proxy, gold and path KL on noise that training never draws: the same at each call."""
    prompts = training.spread_evenly(prompts, config.eval_samples)
    trajectory = mdp.rollout(pipe, prompts, config, "evaluate")
    with reference():
        reference_means = step_means(pipe, trajectory, config)
    kl = path_kl(pipe, trajectory, reference_means, config)
    return {
        "prompts": prompts,
        "images": trajectory.images,
        "reward": rewards.score(reward, trajectory.images, prompts),
        "gold": rewards.score(gold, trajectory.images, prompts),
        "kl": kl.sum(1),
        "kl_of_steps": kl.mean(0).tolist(),
        "timesteps": trajectory.timesteps.tolist(),
    }


def train(config, Baseline=Value):
    """draw → score → advantage → K × (log-probs → objective → step).  -> the run, its summary"""
    ddpo.check(config, needs_others=True)
    T = config.num_steps
    clip_range = config.clip_range
    alpha, beta = config.alpha, config.beta
    all_prompts = get_prompts(config.prompts)
    reward = rewards.get_reward(config.reward, config)
    gold = rewards.get_reward(config.gold, config, flag="--gold")
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    params = models.trainable(pipe, config)
    optimizer = models.adamw(params, config)
    reference = models.make_reference(pipe)
    step_weight = ddpo.step_weights(pipe, config)
    root = ddpo.ratio_root(pipe, config)
    baseline = Baseline(pipe, config)
    look = partial(evaluate, pipe, all_prompts, reward, gold, reference, config)
    run = runs.Run(config, "dpok", look)

    for n in run.rounds(pipe, optimizer, baseline):  # --resume restores these three
        training.set_rate(optimizer, config, n)
        prompts = training.prompts_of_round(all_prompts, config, n)
        trajectory = mdp.rollout(pipe, prompts, config, "train", n)
        with reference():
            reference_means = step_means(pipe, trajectory, config)
        r = rewards.score(reward, trajectory.images, prompts)
        g = rewards.score(gold, trajectory.images, prompts)
        A = value_advantage(r, baseline.predict(trajectory), prompts)
        A = A.to(step_weight) * step_weight  # (B,T)·(T,) -> (B,T)

        B = len(prompts)
        order = training.permutation(B, config.seed, "minibatches", n)
        for pictures in order.tensor_split(config.updates_per_round):
            all_i, all_k = ddpo.step_pairs(pictures, config, n)
            scale = T / len(all_i)  # a mean over pictures, and a sum over steps
            for i, k in training.batches(all_i, all_k, config.train_batch_size):
                mean, std = mdp.policy_at(pipe, trajectory, i, k, config)
                action = trajectory.latents[i, k + 1]
                log_prob = mdp.log_prob(action, mean, std) / root
                old_log_prob = trajectory.log_probs[i, k] / root
                pre_mean = reference_means[i, k]
                kl = mdp.kl_divergence(mean, pre_mean, std) / root
                J = dpok_objective(log_prob, old_log_prob, A[i, k], kl, clip_range, alpha, beta)
                loss = -J.sum() * scale
                loss.backward()
                old_mean = trajectory.means[i, k]
                kl_old = T * mdp.kl_divergence(old_mean, mean, std)
                ratio = (log_prob - old_log_prob).exp()
                outside = (ratio - 1).abs() > clip_range
                run.note(kl_old=kl_old, clip_fraction=outside)
            training.total_gradients(params)
            grad_norm = clip_grad_norm_(params, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        baseline.fit(trajectory, r, n)
        path = path_kl(pipe, trajectory, reference_means, config).sum(1)
        run.log(n, reward=r, grad_norm=grad_norm, gold=g, kl=path)

    return run, run.finish(pipe)


def main(argv=None):
    config = runs.parse(Config, __doc__, argv, SD)
    run, summary = train(config)
    runs.report(run, summary)
    print("\nKL_t in nats, at each step t:")
    steps = zip(run.after["timesteps"], run.after["kl_of_steps"])
    for t, kl in steps:
        print(f"{t:4} {kl:10.2f}")
    return run


if __name__ == "__main__":
    flags.run(main)
