"""What a training costs: the formula against the calls of the UNet that real trainings make."""
import math
from importlib import import_module
from types import SimpleNamespace

import pytest

from support import models, prices, runs
from tests import oracles

REWARD = f"{oracles.__file__}:lightness"
TINY = ("--rounds 1 --num-steps 2 --prompts-per-round 1 --samples-per-prompt 4 --eval-samples 2 "
        f"--lora-rank 2 --device cpu --reward {REWARD} --prompts bias").split()


@pytest.mark.equation("price", "support.prices.of_a_round")
@pytest.mark.parametrize("script, words, looked_at", [
    ("03_ddpo", "", 0), ("03_ddpo", "--guidance-scale 2 --timestep-fraction 0.5", 0),
    ("04_dpok", "--no-value", 0), ("04_dpok", "--beta 0 --no-value", 8),
    ("04_dpok", "--guidance-scale 2 --timestep-fraction 0.5 --no-value", 0),
    ("experiments.sft", "--data fresh", 8), ("experiments.sft", "--data fixed --beta 1", 16),
    ("experiments.sft", "--data fresh --guidance-scale 2 --updates-per-round 3", 16)])
def test_price_is_what_the_unet_was_asked_for(script, words, looked_at, tmp_path, monkeypatch):
    """looked_at: latents of forward passes that no update needs, such as a logged KL's."""
    counts, training = [0], [False]

    def count(unet, inputs, output):
        if training[0]:
            counts[0] += len(output.sample) * (3 if output.sample.requires_grad else 1)

    def load(*arguments):
        pipe = load_pipeline(*arguments)
        pipe.unet.register_forward_hook(count)
        return pipe

    def rounds(run, *owned):
        training[0] = True
        yield from all_rounds(run, *owned)
        training[0] = False
    load_pipeline, all_rounds = models.load_pipeline, runs.Run.rounds
    monkeypatch.setattr(models, "load_pipeline", load)
    monkeypatch.setattr(runs.Run, "rounds", rounds)
    monkeypatch.setattr(runs.Run, "is_film_due", lambda run, n: False)
    run = import_module(script).main([*TINY, *words.split(), "--out", str(tmp_path)])
    config = vars(run.config) | {"method": script.rpartition(".")[2].removeprefix("03_")}
    assert prices.of_a_round(config) == (4, counts[0] - looked_at)


def test_each_line_of_metrics_gets_what_was_paid_until_then():
    config = dict(method="ddpo", prompts_per_round=2, samples_per_prompt=3, num_steps=10,
                  guidance_scale=1.0, timestep_fraction=0.5)  # of 6 pictures: 60 + 30·3
    rows = [{"queries": 6.0, "reward": 1.0}, {"queries": 18.0, "reward": 2.0}]
    assert prices.add_evaluations(rows, config) == [
        {"queries": 6, "reward": 1, "evaluations": 150},
        {"queries": 18, "reward": 2, "evaluations": 450}]


def test_what_a_budget_buys_by_hand():
    def metrics(evaluations, *rewards):
        return [{"queries": 10.0 * (k + 1), "evaluations": evaluations * (k + 1), "reward": r}
                for k, r in enumerate(rewards)]
    curves = {"A": [metrics(100, 1, 2, 3, 4), metrics(100, 3, 4, 5, 6)],
              "B": [metrics(200, 1, 2, 3, 9)]}
    assert prices.budgets(curves) == [("queries", 10), ("queries", 20), ("queries", 40),
                                      ("evaluations", 100), ("evaluations", 200),
                                      ("evaluations", 400)]
    config = SimpleNamespace(num_steps=5, guidance_scale=2.0)  # 10 evaluations a picture
    assert prices.affordable(curves, 4, config) == [2, 5, 10, 2, 5, 10]
    assert prices.reward_at(curves["A"][0], "queries", 40) == 3  # the latest three
    assert prices.reward_at(curves["A"][0], "queries", 9) is None
    rows = prices.table(curves, {5: (0.5, 0.1)}, 4, config)
    found = {(row["price"], row["budget"], row["model"]): (row["reward"], row["standard_error"])
             for row in rows}
    assert found["queries", 20, "best of n"] == found["evaluations", 200, "best of n"] == (0.5, 0.1)
    assert found["queries", 40, "A"] == pytest.approx((4, 1))
    assert found["evaluations", 400, "B"][0] == 1.5 and math.isnan(found["queries", 40, "B"][1])
    assert ("evaluations", 100, "B") not in found and ("queries", 40, "best of n") not in found
