"""What a training costs, in reward queries and in UNet evaluations.

A forward pass of one latent counts 1, a backward pass 2, as is usual. Charged is what a training
needs: to draw its pictures, to learn from them, and the reference model's passes where its gradient
has a KL term. What is only looked at (film, fresh noise, KL and gold of a log) is not charged, nor
is an earlier training whose run folder is the --model. Charged in full is a round of chapter 3 that
leaves pictures out, because all of their prompt got the same reward.
"""
from support.training import mean_se

FORWARD, BACKWARD = 1, 2


def of_a_round(config):
    """(reward queries, UNet evaluations) of a round, from a run's config.json as a dict.

    B pictures of T steps, of which RL trains on a share; g = 2 with classifier-free guidance:

        B·T·g + B·T·share·g·3 + [β > 0]·B·T·g          chapters 3 and 4
        B·T·g + B·T·(3 + [β > 0])                      experiments/sft.py: learns without guidance
    """
    B, T = config["prompts_per_round"] * config["samples_per_prompt"], config["num_steps"]
    g = 1 if config["guidance_scale"] == 1 else 2
    has_kl = config.get("beta", 0) > 0
    draw = B * T * g * FORWARD
    if config["method"].startswith("sft"):
        K = config["updates_per_round"]
        noisy_pictures = K * max(1, B * T // K)
        return B, draw + noisy_pictures * (FORWARD + BACKWARD + has_kl * FORWARD)
    steps = max(1, round(config["timestep_fraction"] * T))
    learn = B * steps * g * (FORWARD + BACKWARD)
    return B, draw + learn + has_kl * B * T * g * FORWARD


def add_evaluations(rows, config):
    """Gives each line of a run's metrics.csv its "evaluations", as it has its "queries"."""
    queries, evaluations = of_a_round(config)
    return [row | {"evaluations": row["queries"] // queries * evaluations} for row in rows]


def reward_at(rows, price, budget, window=3):
    """Mean reward of the last `window` rounds that a budget pays for; None where it pays for none.

    rows: of metrics.csv; price: "queries" or "evaluations".
    """
    rewards = [row["reward"] for row in rows if row[price] <= budget][-window:]
    return sum(rewards) / len(rewards) if rewards else None


def budgets(curves):
    """(price, budget) pairs: a quarter, a half and all of what the cheapest training cost.

    curves: label -> metrics of its runs, a list for each seed.
    """
    pairs = []
    for price in ("queries", "evaluations"):
        least = min((rows[-1][price] for seeds in curves.values() for rows in seeds), default=0)
        pairs += [(price, least // 4), (price, least // 2), (price, least)]
    return pairs


def affordable(curves, pictures, config):
    """For each budget the n of best of n that costs at most that much for so many pictures."""
    g = 1 if config.guidance_scale == 1 else 2
    of_one = {"queries": 1, "evaluations": config.num_steps * g * FORWARD}
    return [int(budget // (pictures * of_one[price])) for price, budget in budgets(curves)]


def table(curves, best, pictures, config):
    """A line for each price, budget and model: the reward that it has bought, ± s.e. over seeds.

    best: n -> (mean, s.e.) of the reward of best of n, of so many pictures.
    """
    rows = []
    for (price, budget), n in zip(budgets(curves), affordable(curves, pictures, config)):
        if n in best:
            mean, error = best[n]
            rows.append({"price": price, "budget": int(budget), "model": "best of n", "n": n,
                         "reward": mean, "standard_error": error})
        for model, seeds in curves.items():
            rewards = [reward_at(metrics, price, budget) for metrics in seeds]
            if None not in rewards:
                mean, error = mean_se(rewards)
                rows.append({"price": price, "budget": int(budget), "model": model, "n": "",
                             "reward": mean, "standard_error": error})
    return rows
