"""How much reward can a nat of KL buy at most? The frontier, and who is how near to it.

Of all distributions of pictures that are equally far from the pretrained one, the tilted one has
the highest mean reward: pretrained pictures, weighted by their reward. So one large set of
pretrained pictures, weighted with one β after the other, draws a curve that no method can beat.

    p_β(x_0) = p_pre(x_0)·exp(r/β)/Z,  Z = E_pre[exp(r/β)],  w = p_β/p_pre = exp(r/β)/Z
    reward = E_pre[w·r],  KL(p_β ‖ p_pre) = E_pre[w·log w] = reward/β − log Z

On the same axes stand best of n, at KL ≤ log n − (n−1)/n, and finished runs at their path KL, an
upper bound of the KL of their pictures (Lemma 4.2): their true place lies further left, but not
left of the curve. Best of n may choose x_T; training cannot, so at its path KL even the best one
stays under the curve. But best of n pays n reward queries for every picture that it delivers. The
second panel has gold of the same pictures: what the proxy's optimum gives, and *no* bound.

RUN `python experiments/frontier.py --runs runs/sweep_beta_*`: some minutes on two CPU cores. What
is drawn is kept block by block, so it can be stopped anywhere and goes on from there.
EXPECT best of n nearer to the curve the larger n is, and runs that learned far to its right.
WRITES frontier.csv (the curve), table.csv (what is printed) and frontier.png in --out, beside the
cache pictures.csv. Errors are standard errors by a bootstrap over pictures, the curve's at equal
KL. A small β rests on few pictures: where fewer than 50 effective ones are left, ESS = (Σ w)²/Σ w²,
the curve ends. It is concave and its slope is β, so its last tangent (dotted) is still a bound.
"""
import math
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import evaluation, flags, models, runs, training  # noqa: E402
from support.figures import Figure  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

mdp = import_module("01_mdp")  # rollout
rewards = import_module("02_rewards")  # RewardFlags, get_reward, score
dpok = import_module("04_dpok")  # evaluate
ev = import_module("05_eval")  # best_of_n_weights, best_of_n_kl

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
    eval_samples: int = 128  # fresh pictures of each run
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none, at half the cost
    seed: int = 0  # seed of all noise
    out: str = "runs/frontier"  # folder of all that is written


OWN = ("gold", "pictures", "runs", "eval_samples", "seed", "out")  # what a run has otherwise

# ---- the mathematics ------------------------------------------------------------------------


def tilted_weights(r, beta):
    """w_i = exp(r_i/β) / mean_j exp(r_j/β) = p_β(x_i)/p_pre(x_i).   (N,), β -> (N,), mean 1"""
    return len(r) * torch.softmax(r / beta, 0)


def weights_kl(w):
    """KL(w·p_pre ‖ p_pre) = E_pre[w·log w], in nats; 0·log 0 is 0.   (N,), mean 1 -> ()"""
    return torch.special.xlogy(w, w).mean()


def effective_pictures(w):
    """ESS = (Σ w)² / Σ w²: of how many equally weighted pictures a mean is as noisy.  (N,) -> ()"""
    return w.sum()**2 / w.square().sum()


def point(r, g, w):
    """(E_pre[w·log w], E_pre[w·r], E_pre[w·g], ESS).   (N,), (N,), (N,) -> (4,)"""
    return torch.stack([weights_kl(w), (w * r).mean(), (w * g).mean(), effective_pictures(w)])


def points(r, g, betas):
    """The points of p_β for each β, and then of the best of n for each n of NS.  -> (P,4)"""
    weights = [tilted_weights(r, beta) for beta in betas]
    weights += [ev.best_of_n_weights(r, n) for n in NS]
    return torch.stack([point(r, g, w) for w in weights])


def bootstrap_errors(r, g, betas, seed, draws=200):
    """s.e. of reward and gold of all points, the curve's *at equal KL*.  -> (P,2)

    At equal β a new set of pictures has another KL too, and slides mostly along the curve.
    """
    C = len(betas)
    kl = points(r, g, betas)[:C, 0]
    stream, found = training.random_stream(seed, "bootstrap"), []
    for _ in tqdm(range(draws), "bootstrap", leave=False, delay=2):
        chosen = torch.from_numpy(stream.integers(len(r), size=len(r)))
        new = points(r[chosen], g[chosen], betas).numpy()
        for column in (1, 2):
            new[:C, column] = np.interp(kl, new[:C, 0], new[:C, column])
        found.append(new[:, 1:3])
    return np.std(found, 0, ddof=1)


def least_kl(curve, reward):
    """min{KL : frontier(KL) = r}; above the curve's end that end's KL, still a lower bound."""
    return np.interp(reward, [row["reward"] for row in curve], [row["kl"] for row in curve]).item()


# ---- pictures and runs ----------------------------------------------------------------------


def check(config):
    """ValueError for what would fail only after the pictures are drawn.  -> label: run's folder"""
    if len(get_prompts(config.prompts)) != 1:
        raise ValueError(f"--prompts {config.prompts}: the frontier is that of one prompt")
    folders = runs.labels(config.runs)
    if Path(config.out, "metrics.csv").is_file():
        raise ValueError(f"--out {config.out}: this is a training's folder, choose another")
    wanted = {name: value for name, value in asdict(config).items() if name not in OWN}
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
        r = rewards.score(reward, images, prompts)
        g = rewards.score(gold, images, prompts)
        rows += rows_of(("reward", "gold"), r, g)
        runs.write_rows(path, rows)  # a stop leaves the old file or the new one
    numbers = [[row["reward"], row["gold"]] for row in rows[:config.pictures]]
    r, g = torch.tensor(numbers, dtype=torch.float64).T
    if r.std() == 0:
        raise ValueError(f"{path}: no curve from rewards that are all alike")
    return r, g


def point_of(folder, config, reward, gold):
    """A finished run on fresh noise: path KL, and reward and gold with their errors."""
    pipe, reference = models.load_run(folder, config.device, config.dtype)
    prompts = get_prompts(config.prompts)
    found = dpok.evaluate(pipe, prompts, reward, gold, reference, config)
    point = {"kl": found["kl"].mean().item()}
    for name in ("reward", "gold"):
        point[name], point[f"{name}_se"] = training.mean_se(found[name])
    point["least reward"] = point["reward"] - 2 * point["reward_se"]
    return point


def rows_of(names, *columns):
    """Lines of a CSV file.  columns: (N,) or (N,K) each, that stand side by side."""
    return [dict(zip(names, line, strict=True)) for line in np.column_stack(columns).tolist()]


def table_of(curve, others):
    """A line for each tenth point of the curve, best of n and each run, with two bounds of its KL.

    No distribution has such a reward at less KL than the curve ("KL at least"; of a run, whose
    reward is not known exactly, with two standard errors less), and Lemma 4.2 and best of n's
    formula say what it is at most.
    """
    every_tenth = curve[::-10][::-1]  # the last one too
    points = {f"β = {row['beta']:.3g}": row for row in every_tenth} | others
    rows = []
    for what, point in points.items():
        least = least_kl(curve, point.get("least reward", point["reward"]))
        row = {"what": what, "KL at least": f"{least:.3g}",
               "KL at most": evaluation.cell(point["kl"], 0)}
        for name in ("reward", "gold"):
            row[name] = evaluation.cell(point[name], point[f"{name}_se"])
        rows.append(row)
    return rows


def draw(path, curve, others, config):
    """Reward and gold against KL: the curve ± s.e., best of n, and runs at their path KL."""
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    titles = (f"proxy: {config.reward} (nothing is above the curve)",
              f"gold: {config.gold} (the curve is no bound)")
    x, end = [row["kl"] for row in curve], curve[-1]
    for ax, name, title in zip(figure.subplots(1, 2), ("reward", "gold"), titles):
        y = np.array([row[name] for row in curve])
        error = np.array([row[f"{name}_se"] for row in curve])
        ax.fill_between(x, y - error, y + error, alpha=0.25, color="black", lw=0)
        ax.plot(x, y, "k", lw=1, label="p_β")
        if name == "reward":  # concave, with the slope β: nothing is above its last tangent either
            rise = max(0, *(point["reward"] - y[-1] for point in others.values()))
            ax.plot([x[-1], x[-1] + rise / end["beta"]], [y[-1], y[-1] + rise], "k:", lw=1)
        for label, point in others.items():
            place = point["kl"], point[name]
            look = dict(fmt="<", ms=6, label=label)
            if label.startswith("best of"):
                look = dict(fmt="ko", ms=4, mfc="white")
                ax.annotate(label.split()[-1], place, (5, -7), textcoords="offset points", size=7)
            ax.errorbar(*place, point[f"{name}_se"], **look)
        ax.set(xlabel="KL in nats, or what it is at most")
        ax.set_title(title, size=10)
        ax.set_xscale("asinh", linear_width=0.5)
        ticks = [0, 0.3, 1, 3, 10, 30, 100, 300, 1000, 10000]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    handles = ax.get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, loc="outside right center",
                  title="numbers: best of n\nruns: at path KL")
    figure.savefig(path)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    folders, out = check(config), Path(config.out)
    reward = rewards.get_reward(config.reward, config)
    gold = rewards.get_reward(config.gold, config, flag="--gold")
    r, g = draw_pictures(config, reward, gold)
    betas = BETAS * r.std().item()
    errors = bootstrap_errors(r, g, betas, config.seed)
    rows = rows_of(("kl", "reward", "gold", "ess", "reward_se", "gold_se"),
                   points(r, g, betas), errors)
    curve = [{"beta": beta} | row for beta, row in zip(betas, rows) if row["ess"] >= MIN_ESS]
    others = {}  # label -> a point at the most that its KL can be
    for n, row in zip(NS, rows[len(betas):]):
        others[f"best of {n}"] = row | {"kl": ev.best_of_n_kl(n)}
    for label, folder in folders.items():
        others[label] = point_of(folder, config, reward, gold)
    rows = table_of(curve, others)
    runs.write_rows(out / "frontier.csv", curve)
    draw(out / "frontier.png", curve, others, config)
    runs.write_rows(out / "table.csv", rows)
    print(evaluation.as_text(rows))
    print(f"frontier.csv, table.csv and frontier.png are in {out}")
    return curve, others


if __name__ == "__main__":
    flags.run(main)
