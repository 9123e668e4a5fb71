"""A whole training once more, as slow and as plain as can be: what golden runs are compared with.

One picture and one step at a time, with nothing of the chapters and nothing of support/training.py,
but the pipeline and its VAE. It holds a solution, so no homework has this file.
"""
import numpy as np
import torch
from peft import LoraConfig
from torch import nn
from torch.distributions import Normal, kl_divergence

from support import models
from tests.equations.closed_forms import gaussian, linear_steps

# Where a purpose stands in the address of a random number.
TRAIN, EVALUATE, PROMPTS, MINIBATCHES, TIMESTEPS, ADAPTERS, VALUE, VALUE_BATCHES = (
    0, 1, 5, 6, 7, 8, 9, 10)


def train(config, method, prompts, reward, gold=None):
    """-> {"start": weights, "rounds": [a line of metrics.csv and "weights"], "looks": ...}

    method: sf, is or dpok. looks: queries -> pictures of fresh noise, and what they score.
    """
    pipe = models.load_pipeline(config.model, "cpu")
    names = set_up_weights(pipe, config)
    params = [p for name, p in pipe.unet.named_parameters() if name in names]
    start = weights_of(pipe, names)
    frozen = models.load_pipeline(config.model, "cpu").unet  # the pretrained model, loaded anew
    scheduler = pipe.scheduler
    scheduler.set_timesteps(config.num_steps)
    optimizer = torch.optim.AdamW(params, lr=config.learning_rate,
                                  weight_decay=config.weight_decay)
    value = make_value(pipe, config) if method == "dpok" else None
    history, rounds, looks, N = {}, [], {}, config.rounds
    B, T = config.prompts_per_round * config.samples_per_prompt, config.num_steps

    for n in range(N):
        if n in (0, N // 4, 2 * N // 4, 3 * N // 4):
            looks[n * B] = look(pipe, frozen, scheduler, config, method, prompts, reward, gold)
        chosen = choose_prompts(config, prompts, n)
        chains, images = draw_all(pipe, scheduler, config, chosen, TRAIN, n)
        r = [float(v) for v in reward(images, chosen)]
        row = {"reward": np.mean(r)}
        if method == "dpok":
            A = value_advantages(value, chains, r, chosen, scheduler)
            row["gold"] = np.mean([float(v) for v in gold(images, chosen)])
            row["kl"] = np.mean([path_kl(frozen, scheduler, config, chain) for chain in chains])
        else:
            A = ddpo_advantages(r, chosen, history, config)
        left = 1 - n / N if config.anneal else 1
        optimizer.param_groups[0]["lr"] = left * config.learning_rate
        order, updates = range(B), 1
        if method != "sf":
            order = random(config.seed, MINIBATCHES, n).permutation(B)
            updates = config.updates_per_round
        kl_old, outside = [], []
        for part in np.array_split(order, updates):
            for i in part.tolist():
                kept = max(1, round(config.timestep_fraction * T))
                steps = random(config.seed, TIMESTEPS, n, i).permutation(T)[:kept].tolist()
                for k in steps:
                    advantage = A[i][k] if method == "dpok" else A[i]
                    J, ratio, kl = term(pipe, frozen, scheduler, config, method, chains[i], k,
                                        advantage * step_weight(scheduler, config, k))
                    (-J * T / kept / len(part)).backward()
                    kl_old.append(T * kl)
                    outside.append(abs(ratio - 1) > config.clip_range)
            length = sum(float((p.grad.double() ** 2).sum()) for p in params) ** 0.5
            clipped = length > config.max_grad_norm
            for p in params:
                p.grad *= config.max_grad_norm / length if clipped else 1
            optimizer.step()
            optimizer.zero_grad()
        if method != "sf":
            row |= {"kl_old": np.mean(kl_old), "clip_fraction": np.mean(outside)}
        row |= {"grad_norm": length, "grad_clipped": float(clipped)}
        rounds.append(row | {"weights": weights_of(pipe, names)})
        if method == "dpok" and config.value:
            fit_value(value, chains, r, scheduler, config, n)

    looks[N * B] = look(pipe, frozen, scheduler, config, method, prompts, reward, gold)
    return {"start": start, "rounds": rounds, "looks": looks}


def weights_of(pipe, names):
    return {name: p.detach().clone() for name, p in pipe.unet.named_parameters() if name in names}


def random(seed, purpose, n=0, i=0):
    return np.random.default_rng([seed, purpose, n, i])


def in_turn(prompts, samples):
    return [prompts[i % len(prompts)] for i in range(samples)]  # there are fewer prompts


def choose_prompts(config, prompts, n):
    """Shuffled passes one after the other, of which each round takes the next few."""
    line, number = [], 0
    while len(line) < (n + 1) * config.prompts_per_round:
        line += random(config.seed, PROMPTS, number).permutation(len(prompts)).tolist()
        number += 1
    chosen = []
    for j in line[n * config.prompts_per_round:(n + 1) * config.prompts_per_round]:
        chosen += [prompts[j]] * config.samples_per_prompt
    return chosen


def set_up_weights(pipe, config):
    """Names of the UNet's weights that are trained."""
    if config.lora_rank == 0:
        return {name for name, _ in pipe.unet.named_parameters()}
    torch.manual_seed(int(random(config.seed, ADAPTERS).integers(2**31)))
    pipe.unet.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank,
                                     target_modules=list(config.lora_targets)))
    return {name for name, _ in pipe.unet.named_parameters() if "lora_" in name}


def embed(pipe, prompt):
    tokens = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt",
                            max_length=pipe.tokenizer.model_max_length).input_ids
    with torch.no_grad():
        return pipe.text_encoder(tokens)[0]


def noise(unet, x, t, c):
    return unet(x.float(), torch.tensor([t]), encoder_hidden_states=c).sample.double()


def step(unet, scheduler, config, chain, k):
    """μ and σ of x_{t−1} given x_t, of one picture, in float64."""
    t, x = int(scheduler.timesteps[k]), chain["x"][k]
    eps = noise(unet, x, t, chain["c"])
    if config.guidance_scale != 1:
        empty = noise(unet, x, t, chain["empty"])
        eps = empty + config.guidance_scale * (eps - empty)
    return gaussian(scheduler, eps, t, x, config.eta)


def draw_all(pipe, scheduler, config, prompts, purpose, n):
    """Chains {"c", "empty", "t", "x": T+1 latents, "mean", "log_prob": T each}, and pictures."""
    chains, images = [], []
    for i, prompt in enumerate(prompts):
        z = random(config.seed, purpose, n, i).standard_normal(
            (config.num_steps + 1, 4, 8, 8), dtype=np.float32)
        z = torch.from_numpy(z).double()
        chain = {"c": embed(pipe, prompt), "empty": embed(pipe, ""), "x": [z[:1]], "mean": [],
                 "log_prob": []}
        for k in range(config.num_steps):
            with torch.no_grad():
                mean, sigma = step(pipe.unet, scheduler, config, chain, k)
            x = (mean + sigma * z[k + 1]).float().double()  # kept in float32, scored as it is kept
            chain["x"].append(x)
            chain["mean"].append(mean)
            chain["log_prob"].append(Normal(mean, sigma).log_prob(x).sum())
        chains.append(chain)
        images += models.decode(pipe, chain["x"][-1].float())
    return chains, images


def path_kl(frozen, scheduler, config, chain):
    total = 0
    for k, mean in enumerate(chain["mean"]):
        with torch.no_grad():
            reference, sigma = step(frozen, scheduler, config, chain, k)
        total += float(kl_divergence(Normal(mean, sigma), Normal(reference, sigma)).sum())
    return total


def look(pipe, frozen, scheduler, config, method, prompts, reward, gold):
    prompts = in_turn(prompts, config.eval_samples)
    chains, images = draw_all(pipe, scheduler, config, prompts, EVALUATE, 0)
    found = {"images": images, "reward": [float(v) for v in reward(images, prompts)]}
    if method == "dpok":
        found["gold"] = [float(v) for v in gold(images, prompts)]
        found["kl"] = [path_kl(frozen, scheduler, config, chain) for chain in chains]
    return found


def mean_of_others(values, prompts, i):
    others = [values[j] for j in range(len(prompts)) if j != i and prompts[j] == prompts[i]]
    return sum(others) / len(others)


def ddpo_advantages(r, prompts, history, config):
    for value, prompt in zip(r, prompts):
        history.setdefault(prompt, []).append(value)
    A = []
    for i, prompt in enumerate(prompts):
        if config.baseline == "running":
            known = history[prompt][-32:] if len(history[prompt]) >= 16 else r
            advantage = (r[i] - np.mean(known)) / np.std(known)
        else:
            advantage = (r[i] - mean_of_others(r, prompts, i)) / np.std(r)
        A.append(min(max(advantage, -config.advantage_clip), config.advantage_clip))
    return A


def step_weight(scheduler, config, k):
    if config.step_weight == "none":
        return 1
    weights = [sigma / abs(feed) for _, _, feed, sigma in linear_steps(scheduler, config.eta)]
    return weights[k] / np.mean(weights)


def term(pipe, frozen, scheduler, config, method, chain, k, advantage):
    """One step's term of J, the ratio, and the KL from the policy that drew."""
    mean, sigma = step(pipe.unet, scheduler, config, chain, k)
    now, x = Normal(mean, sigma), chain["x"][k + 1]
    D = x.numel() if config.ratio == "per_dim" and method != "sf" else 1
    log_prob = now.log_prob(x).sum() / D
    ratio = torch.exp(log_prob - chain["log_prob"][k] / D)
    if method == "sf":
        J = log_prob * advantage
    else:
        low, high = 1 - config.clip_range, 1 + config.clip_range
        J = torch.min(ratio * advantage, torch.clamp(ratio, low, high) * advantage)
    if method == "dpok":
        with torch.no_grad():
            reference, _ = step(frozen, scheduler, config, chain, k)
        kl = kl_divergence(now, Normal(reference, sigma)).sum() / D
        J = config.alpha * J - config.beta * kl
    kl_old = kl_divergence(Normal(chain["mean"][k], sigma), now).sum()
    return J, ratio.item(), kl_old.item()


def make_value(pipe, config, hidden=256):
    torch.manual_seed(int(random(config.seed, VALUE).integers(2**31)))
    width = 4 * 8 * 8 + pipe.unet.config.cross_attention_dim + 1
    net = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                        nn.Linear(hidden, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    return {"net": net, "optimizer": optimizer, "rounds": [], "mean": 0, "std": 0}


def value_of(value, chain, t, k):
    """V of one state, less the mean and over the spread."""
    c = chain["c"][0].mean(0)  # over the tokens
    return value["net"](torch.cat([chain["x"][k].float().flatten(), c, torch.tensor([t / 1000])]))


def value_advantages(value, chains, r, prompts, scheduler):
    """(r − V) less the mean of the others of the same prompt, at each step of each picture."""
    A = np.zeros((len(chains), len(scheduler.timesteps)))
    for k, t in enumerate(scheduler.timesteps.tolist()):
        rest = []
        for i, chain in enumerate(chains):
            V = value["mean"] + value["std"] * value_of(value, chain, t, k).item()
            rest.append(r[i] - V)
        for i in range(len(chains)):
            A[i, k] = rest[i] - mean_of_others(rest, prompts, i)
    return A.tolist()


def fit_value(value, chains, r, scheduler, config, n, batch_size=256):
    value["rounds"].append(list(zip(chains, r)))
    pictures = sum(value["rounds"][-config.value_rounds:], [])
    targets = [target for _, target in pictures]
    value["mean"], value["std"] = np.mean(targets), np.std(targets, ddof=1)
    rows = [(chain, t, k, target) for chain, target in pictures
            for k, t in enumerate(scheduler.timesteps.tolist())]
    order = random(config.seed, VALUE_BATCHES, n).permutation(len(rows)).tolist()
    for first in range(0, len(rows), batch_size):
        batch = order[first:first + batch_size]
        for j in batch:
            chain, t, k, target = rows[j]
            error = value_of(value, chain, t, k) - (target - value["mean"]) / value["std"]
            (error**2 / len(batch)).sum().backward()
        value["optimizer"].step()
        value["optimizer"].zero_grad()
