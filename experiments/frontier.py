"""How much reward can a nat of KL buy at most? The frontier, and who is how near to it.

Of all distributions of pictures that are equally far from the pretrained one, the tilted one has
the highest mean reward: pretrained pictures, weighted by their reward. So one large set of
pretrained pictures, weighted with one β after the other, draws a curve that no method can beat.

    p_β(x_0) = p_pre(x_0)·exp(r/β)/Z,  Z = E_pre[exp(r/β)],  w = p_β/p_pre = exp(r/β)/Z
    reward = E_pre[w·r],  KL(p_β ‖ p_pre) = E_pre[w·log w] = reward/β − log Z

On the same axes stand best of n, at KL ≤ log n − (n−1)/n, and finished runs at their path KL, an
upper bound of the KL of their pictures (Lemma 4.2): their true place lies further left, but not
left of the curve. Best of n may choose x_T; training cannot, so even the best training stays under
the curve. But best of n pays n reward queries for every picture that it delivers. The second panel
has gold of the same pictures: what the proxy's optimum gives, and *no* bound.

RUN `python experiments/frontier.py --runs runs/sweep_beta_*`: some minutes on two CPU cores. What
is drawn is kept block by block, so it can be stopped anywhere and goes on from there.
EXPECT best of n nearer to the curve the larger n is, and runs that learned far to its right.
WRITES frontier.csv, best_of_n.csv, table.csv (all that is printed) and frontier.png in --out,
beside the cache pictures.csv. Errors are standard errors by a bootstrap over pictures, the curve's
at equal KL. A small β rests on few pictures: where fewer than 50 effective ones are left, ESS =
(Σ w)²/Σ w², the curve ends. It is concave and its slope is β, so its last tangent (dotted) is still
a bound.
"""
import math
import sys
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import commands, flags, models, runs, training  # noqa: E402
from support.figures import Figure  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

mdp = import_module("01_mdp")  # rollout
rewards = import_module("02_rewards")  # RewardFlags, get_reward, score
dpok = import_module("04_dpok")  # evaluate
ev = import_module("05_eval")  # best_of_n_kl

BLOCK = 256  # pictures drawn at once; their noise's address is (block, place in it)
MIN_ESS = 50  # effective pictures, without which a point of the curve is not drawn
NS = (1, 2, 4, 8, 16, 32, 64)
BETAS = np.array([math.inf, *np.logspace(1.5, -1, 101)])  # in standard deviations of the reward


@dataclass(frozen=True)
class Config(rewards.RewardFlags):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, or a name on the hub
    reward: str = "image_reward"  # the proxy, by which pictures are weighted
    gold: str = "alignment"  # what is really meant
    prompts: str = "bias"  # what to draw: one prompt, or a set with only one in it
    pictures: int = 20000  # pretrained pictures that the curve is made from
    runs: tuple[str, ...] = ()  # finished runs of the same prompt and reward, to stand beside it
    eval_samples: int = 128  # pictures of a run whose evaluation.json has not this gold
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none, at half the cost
    seed: int = 0  # seed of all noise
    out: str = "runs/frontier"  # folder of all that is written


SAME = ["model", "reward", "prompts", "num_steps", "eta", "guidance_scale"]
SAME += [field.name for field in fields(rewards.RewardFlags)  # of pictures and of all runs
         if field.name not in runs.NO_MATTER]
MEANS = ("reward", "reward_se", "gold", "gold_se")
POINT = ("kl", "reward", "gold", "ess", "reward_se", "gold_se")

# ---- the mathematics ------------------------------------------------------------------------


def tilted_weights(r, beta):
    """w_i = exp(r_i/β) / mean_j exp(r_j/β) = p_β(x_i)/p_pre(x_i).   (N,), β -> (N,), mean 1"""
    return len(r) * torch.softmax(r / beta, 0)


def best_of_n_weights(r, n):
    """w_i = N·(F(r_i)^n − F(r_i⁻)^n) / m_i: how much more often best of n shows picture i.

    n draws with replacement from the N pictures. F(r_i), F(r_i⁻): share of pictures with a reward
    up to r_i, and below it; the m_i pictures with that very reward share evenly. (N,), n -> (N,)
    """
    _, place, m = r.unique(return_inverse=True, return_counts=True)
    last = m.cumsum(0).double()
    return (len(r) * ((last / len(r))**n - ((last - m) / len(r))**n) / m)[place]


def weights_kl(w):
    """KL(w·p_pre ‖ p_pre) = E_pre[w·log w], in nats; 0·log 0 is 0.   (N,), mean 1 -> ()"""
    return torch.special.xlogy(w, w).mean()


def effective_pictures(w):
    """ESS = (Σ w)² / Σ w²: of how many equally weighted pictures a mean is as noisy.  (N,) -> ()"""
    return w.sum()**2 / w.square().sum()


def points(r, g, weights):
    """(E_pre[w·log w], E_pre[w·r], E_pre[w·g], ESS) of each w.   (N,), (N,), (N,)s -> (len, 4)"""
    return torch.stack([torch.stack([weights_kl(w), (w * r).mean(), (w * g).mean(),
                                     effective_pictures(w)]) for w in weights])


def frontier(r, g, betas):
    """The points of p_β for each β.  -> (betas, 4)"""
    return points(r, g, [tilted_weights(r, beta) for beta in betas])


def best_of_n(r, g):
    """The points of the best of n by reward, for each n of NS.  -> (NS, 4)"""
    return points(r, g, [best_of_n_weights(r, n) for n in NS])


def bootstrap_errors(r, g, betas, seed, draws=200):
    """s.e. of reward and gold: the curve's *at equal KL* (betas, 2), and best of n's (NS, 2).

    At equal β a new set of pictures has another KL too, and slides mostly along the curve.
    """
    kl = frontier(r, g, betas)[:, 0]
    stream, curves, best = training.random_stream(seed, "bootstrap"), [], []
    for _ in tqdm(range(draws), "bootstrap", leave=False, delay=2):
        chosen = torch.from_numpy(stream.integers(len(r), size=len(r)))
        new_kl, new_r, new_g, _ = frontier(r[chosen], g[chosen], betas).T
        curves.append(np.stack([np.interp(kl, new_kl, new_r), np.interp(kl, new_kl, new_g)], 1))
        best.append(best_of_n(r[chosen], g[chosen])[:, 1:3].numpy())
    return np.std(curves, 0, ddof=1), np.std(best, 0, ddof=1)


def least_kl(curve, reward):
    """min{KL : frontier(KL) = r}; above the curve's end that end's KL: a bound all the same."""
    return np.interp(reward, [row["reward"] for row in curve], [row["kl"] for row in curve]).item()


# ---- pictures and runs ----------------------------------------------------------------------


def check(config):
    """ValueError for what would fail only after the pictures are drawn.  -> label: run's folder"""
    if len(get_prompts(config.prompts)) != 1:
        raise ValueError(f"--prompts {config.prompts}: the frontier is that of one prompt")
    folders = runs.labels(config.runs)
    wanted = {name: getattr(config, name) for name in SAME}
    for folder in folders.values():
        runs.check_settings(folder, wanted, "its place is under another curve")
    if Path(config.out, "pictures.csv").is_file():
        wanted |= {"gold": config.gold, "seed": config.seed}
        runs.check_settings(config.out, wanted, "move it away, or choose another --out")
    return folders


def draw_pictures(config, reward, gold):
    """Reward and gold of pretrained pictures; draws the blocks that are missing.  -> (N,), (N,)"""
    folder = Path(config.out)
    path = folder / "pictures.csv"
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / "config.json", asdict(config))
    rows = runs.read_rows(path)
    prompts = get_prompts(config.prompts) * BLOCK
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    first, end = len(rows) // BLOCK, math.ceil(config.pictures / BLOCK)
    for k in tqdm(range(first, end), "pretrained pictures", end, initial=first, unit="block"):
        images = mdp.rollout(pipe, prompts, config, "frontier", k).images
        r = rewards.score(reward, images, prompts, folder)
        g = rewards.score(gold, images, prompts, folder)
        rows += [{"reward": round(a, 4), "gold": round(b, 4)}
                 for a, b in zip(r.tolist(), g.tolist())]
        runs.write_rows(path, rows)  # a stop leaves the old file or the new one
    numbers = [[row["reward"], row["gold"]] for row in rows[:config.pictures]]
    r, g = torch.tensor(numbers, dtype=torch.float64).T
    if r.std() == 0:
        raise ValueError(f"{path}: no curve from rewards that are all alike")
    return r, g


def ends_of(folder, config, reward, gold):
    """(mean, s.e.) of reward, of gold and of path KL of a finished run, on fresh noise."""
    summary = tables.summary_of(folder)
    names = ("reward", "gold", "kl")
    if summary.get("gold", {}).get("title") == f"gold: {config.gold}":
        return [(summary[name]["after"], summary[name]["after_se"]) for name in names]
    # A run of chapter 3 has neither gold nor KL.
    pipe, reference = models.load_run(folder, config.device, config.dtype)
    prompts = get_prompts(config.prompts)
    found = dpok.evaluate(pipe, prompts, reward, gold, reference, config)
    return [training.mean_se(found[name]) for name in names]


def rows_of(names, *columns):
    """Lines of a CSV file.  columns: (N,) or (N,K) each, that stand side by side."""
    return [dict(zip(names, line, strict=True)) for line in np.column_stack(columns).tolist()]


def rounded(row):
    """The same line with numbers of four digits behind the point, or four in all if larger."""
    return {name: value if isinstance(value, str) else f"{value:.4f}" if abs(value) < 10 else
            f"{value:.4g}" for name, value in row.items()}


def table_of(curve, best, ends):
    """A line for each tenth point of the curve, best of n and each run: its KL lies between two.

    No distribution has such a reward at less KL than the curve ("KL at least"), and Lemma 4.2 and
    best of n's formula say what it is at most.
    """
    rows = []
    for row in curve[::-10][::-1]:  # every tenth, the last one too
        rows.append({"what": f"β = {row['beta']:.3g}", "KL at least": row["kl"],
                     "KL at most": row["kl"], **{name: row[name] for name in MEANS}})
    for row in best:
        rows.append({"what": f"best of {row['n']:.0f}",
                     "KL at least": least_kl(curve, row["reward"]),
                     "KL at most": row["kl_bound"], **{name: row[name] for name in MEANS}})
    for label, (reward, gold, (kl, _)) in ends.items():
        rows.append({"what": label, "KL at least": least_kl(curve, reward[0]), "KL at most": kl,
                     **dict(zip(MEANS, (*reward, *gold)))})
    return rows


def draw(path, curve, best, ends, config):
    """Reward and gold against KL: the curve ± s.e., best of n, and runs at their path KL."""
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    titles = (f"proxy: {config.reward} (nothing is above the curve)",
              f"gold: {config.gold} (the curve is no bound)")
    x, beta = [row["kl"] for row in curve], curve[-1]["beta"]
    for i, (ax, name) in enumerate(zip(figure.subplots(1, 2), ("reward", "gold"))):
        y = np.array([row[name] for row in curve])
        error = np.array([row[f"{name}_se"] for row in curve])
        ax.fill_between(x, y - error, y + error, alpha=0.25, color="black", lw=0)
        ax.plot(x, y, "k", lw=1)
        ax.annotate("p_β", (x[-1], y[-1]), (-4, 4), textcoords="offset points", ha="right")
        if name == "reward":  # concave, with the slope β: nothing is above its last tangent either
            highest = [row["reward"] for row in best] + [run[0][0] for run in ends.values()]
            top = max(y[-1], *highest)
            ax.plot([x[-1], x[-1] + (top - y[-1]) / beta], [y[-1], top], "k:", lw=1)
        for row in best:
            ax.errorbar(row["kl_bound"], row[name], row[f"{name}_se"], fmt="ko", ms=4, mfc="white")
            ax.annotate(f"{row['n']:.0f}", (row["kl_bound"], row[name]), (5, -7),
                        textcoords="offset points", size=7)
        ax.annotate("best of n", (row["kl_bound"], row[name]), (9, 1), size=8,
                    textcoords="offset points")
        for label, run in ends.items():
            (value, its_error), (kl, _) = run[i], run[2]
            ax.errorbar(kl, value, its_error, fmt="<", ms=6, label=label)
        ax.set(xlabel="KL to the pretrained model, nats (best of n and runs: at most)")
        ax.set_title(titles[i], size=10)
        ax.set_xscale("asinh", linear_width=0.5)
        ticks = [0, 0.3, 1, 3, 10, 30, 100, 300, 1000, 10000]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    if ends:
        handles = ax.get_legend_handles_labels()
        figure.legend(*handles, fontsize=8, loc="outside right center", title="runs, at path KL")
    figure.savefig(path)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    folders, out = check(config), Path(config.out)
    reward = rewards.get_reward(config.reward, config)
    gold = rewards.get_reward(config.gold, config, flag="--gold")
    r, g = draw_pictures(config, reward, gold)
    ends = {label: ends_of(folder, config, reward, gold) for label, folder in folders.items()}

    betas = BETAS * r.std().item()
    errors, best_errors = bootstrap_errors(r, g, betas, config.seed)
    curve = rows_of(("beta", *POINT), betas, frontier(r, g, betas), errors)
    curve = [row for row in curve if row["ess"] >= MIN_ESS]
    best = rows_of(("n", *POINT, "kl_bound", "queries"), NS, best_of_n(r, g), best_errors,
                   [ev.best_of_n_kl(n) for n in NS], NS)
    rows = table_of(curve, best, ends)
    for name, lines in (("frontier", curve), ("best_of_n", best), ("table", rows)):
        runs.write_rows(out / f"{name}.csv", [rounded(line) for line in lines])
    print(tables.as_text([rounded(row) for row in rows]))
    draw(out / "frontier.png", curve, best, ends, config)
    print(f"frontier.csv, best_of_n.csv, table.csv and frontier.png are in {out}")
    return curve, best, ends


if __name__ == "__main__":
    flags.run(main)
