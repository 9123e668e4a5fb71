"""When should training stop? A rule that one could use, beside what hindsight would choose.

The path KL says how far a model has gone, and costs no label; gold says whether it still does what
is meant, and costs one for each picture. Rounds n = 0, 1, ..., N are the pretrained model and each
round whose weights were kept, the last one of training too. KL_n and g_n, gold's mean, are of a few
pictures, from the same noise in all rounds of a run, so that no round is ahead by its noise alone;
gold_n, the truth, is of many others, and no rule knows it.

    m = min{n ≥ 1 : KL_n > bound}, or N + 1 where there is none
    the rule:  training stops at round min(m, N), and k = argmax_{n < m} g_n is kept
    price = queries_{min(m, N)} + labels·m      (beyond the bound nothing is labeled)
    hindsight's best = argmax_{n ≤ N} gold_n

Hindsight is no rule: it has seen all of training, and the truth. Its figure is chosen on the very
pictures that it is measured on, so it is too high; those of the rule and of the end are not.

RUN `python experiments/early_stopping.py --runs runs/eval/train/*_seed0_*`: runs of 03, 04 or
sft.py, trained with `--keep-every`; about ten seconds for each kept round on one CPU core.
EXPECT the labels to undo a training that collapses, and elsewhere to end about where training ends,
at a higher price; and a bound of 100 nats to stop most RL far too early, for its path KL, which is
only an upper bound, often grows without harm. TRY `--labels 512`, `--kl-bound 100 1000 inf`.
WRITES early_stopping.csv (a line for each run and round) and table.csv (what is printed) in --out.
The price counts a label as one more reward query.
"""
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import flags, models, runs, training  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

mdp = import_module("01_mdp")  # rollout
rewards = import_module("02_rewards")  # RewardFlags, get_reward, score
dpok = import_module("04_dpok")  # step_means, path_kl


@dataclass(frozen=True)
class Config(rewards.RewardFlags):
    runs: tuple[str, ...] = ()  # finished runs that were trained with --keep-every
    gold: str = "alignment"  # what is really meant
    labels: int = 64  # pictures of each kept round that are judged by gold for the rule
    kl_bound: tuple[float, ...] = (1000.0,)  # path KL, in nats, beyond which training stops
    samples: int = 256  # other pictures of each kept round, on which its true gold is measured
    seed: int = 0  # seed of the noise; that of the labels depends on the run's own seed, too
    out: str = "runs/early_stopping"  # folder of all that is written


# ---- the mathematics ------------------------------------------------------------------------


def stop_by_rule(rounds, bound):
    """k = argmax_{n < m} g_n,  m = min{n ≥ 1 : KL_n > bound} or N + 1.  -> k, m; rounds: dicts

    k is the earliest of equals. What follows m counts for nothing, even if its KL is lower again.
    """
    m = 1
    while m < len(rounds) and rounds[m]["path_kl"] <= bound:
        m += 1
    g = [row["labels_mean"] for row in rounds[:m]]
    return g.index(max(g)), m


def price(rounds, m, labels):
    """price = queries_{min(m, N)} + labels·m: what was paid when training stopped."""
    N = len(rounds) - 1
    return rounds[min(m, N)]["queries"] + labels * m


def hindsights_best(rounds):
    """argmax_{n ≤ N} gold_n, the earliest of equals; gold_n itself is too high, being chosen."""
    gold = [row["gold"] for row in rounds]
    return gold.index(max(gold))


# ---- runs and pictures ----------------------------------------------------------------------


def kept_rounds(folder, saved):
    """Round -> the folder of its weights, in order; None: the pretrained model."""
    paths = Path(folder, "rounds").glob("[0-9]*")
    kept = dict(sorted((int(path.name), path) for path in paths))
    if not kept:
        raise ValueError(f"--runs {folder}: none of its rounds was kept; train with --keep-every")
    return {0: None} | kept | {saved["rounds"]: Path(folder)}


def measure(path, saved, gold, config):
    """Labels and path KL on the noise of the run's own seed, and the truth on that of all runs."""
    if path:
        pipe, reference = models.load_run(path, config.device, config.dtype)
    else:
        pipe = models.load_pipeline(saved["model"], config.device, config.dtype)
        reference = models.make_reference(pipe)
    settings = SimpleNamespace(**saved | {"batch_size": config.batch_size, "seed": config.seed})
    all_prompts = get_prompts(settings.prompts)
    prompts = training.spread_evenly(all_prompts, config.labels)
    trajectory = mdp.rollout(pipe, prompts, settings, "labels", saved["seed"])
    g = rewards.score(gold, trajectory.images, prompts)
    with reference():
        reference_means = dpok.step_means(pipe, trajectory, settings)
    kl = dpok.path_kl(pipe, trajectory, reference_means, settings).sum(1)
    prompts = training.spread_evenly(all_prompts, config.samples)
    images = mdp.rollout(pipe, prompts, settings, "truth").images
    truth = rewards.score(gold, images, prompts)
    numbers = (*training.mean_se(g), kl.mean().item(), *training.mean_se(truth))
    names = ("labels_mean", "labels_se", "path_kl", "gold", "gold_se")
    return {name: round(number, 4) for name, number in zip(names, numbers)}


def ways_to_stop(rounds, config):
    """Way to stop -> which place among a run's rounds it keeps, and at which price."""
    N = len(rounds) - 1
    paid = rounds[N]["queries"]
    ways = {"pretrained": (0, 0), "end": (N, paid), "hindsight": (hindsights_best(rounds), paid)}
    for bound in config.kl_bound:
        k, m = stop_by_rule(rounds, bound)
        ways[f"rule, {bound:g} nats"] = k, price(rounds, m, config.labels)
    return ways


def table_of(found, config):
    """Each way's gold, round and price: a line a run; runs called NAME_seedN share one."""
    methods = {}  # name -> way -> of each run
    for label, rounds in found.items():
        of_method = methods.setdefault(label.partition("_seed")[0], {})
        for way, (k, paid) in ways_to_stop(rounds, config).items():
            of_method.setdefault(way, []).append((rounds[k]["gold"], rounds[k]["round"], paid))
    table = []
    for method, of_method in methods.items():
        line = {"runs": method}
        for way, kept in of_method.items():
            golds, places, prices = zip(*kept)
            text = "{:.3f} ± {:.3f}".format(*training.mean_se(golds))
            line[way] = text.removesuffix(" ± nan")  # of one run
            line[f"{way}: round"] = " ".join(map(str, places))
            line[f"{way}: price"] = round(sum(prices) / len(prices))
        table.append(line)
    return table


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    out, wanted = Path(config.out), []
    for label, folder in runs.labels(config.runs).items():
        saved = models.read_config(folder)
        wanted += [(label, saved, n, path) for n, path in kept_rounds(folder, saved).items()]
    if not wanted:
        raise ValueError("--runs: name at least one folder that was trained with --keep-every")
    gold = rewards.get_reward(config.gold, config, flag="--gold")
    out.mkdir(parents=True, exist_ok=True)
    found, lines = {}, []
    for label, saved, n, path in tqdm(wanted, "kept rounds", unit="round"):
        queries = n * saved["prompts_per_round"] * saved["samples_per_prompt"]
        row = {"run": label, "round": n, "queries": queries}
        row |= measure(path, saved, gold, config)
        found.setdefault(label, []).append(row)
        lines.append(row)
    table = table_of(found, config)
    print(tables.as_text(table))
    print("Hindsight's gold is chosen on the pictures that it is measured on, so it is too high.")
    runs.write_rows(out / "early_stopping.csv", lines)
    runs.write_rows(out / "table.csv", table)
    print(f"early_stopping.csv and table.csv are in {out}")
    return found


if __name__ == "__main__":
    flags.run(main)
