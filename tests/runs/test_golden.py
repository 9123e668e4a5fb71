"""Golden runs: whole trainings through main(), against the plain second implementation."""
import json
from importlib import import_module

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from support import runs
from tests import oracles
from tests.equations import closed_forms

COMMON = [*("--device cpu --rounds 2 --samples-per-prompt 3 --num-steps 4 --eval-samples 5 "
            "--seed 3 --weight-decay 1 --keep-every 1").split(),
          "--reward", f"{closed_forms.__file__}:warmth"]
SLOW = ("is_running", "is_lora", "dpok_all")
RUNS = {  # name: (script, its flags)
    "sf": ("03_ddpo", "--estimator sf --prompts-per-round 2 --max-grad-norm 1000 --batch-size 5"),
    "is": ("03_ddpo", "--prompts-per-round 2 --learning-rate 5e-5 --max-grad-norm 420 "
           "--advantage-clip 1.2"),
    "is_running": ("03_ddpo", "--baseline running --ratio per_dim --clip-range 0.03 --eta 0.7 "
                   "--timestep-fraction 0.5 --guidance-scale 2 --step-weight none "
                   "--prompts-per-round 1 --samples-per-prompt 8 --max-grad-norm 18 "
                   "--learning-rate 3e-5"),
    "is_lora": ("03_ddpo", "--lora-rank 2 --prompts-per-round 2 --updates-per-round 3 "
                "--learning-rate 1e-2 --rounds 3 --max-grad-norm 9 --film-pictures 2"),
    "dpok_value": ("04_dpok", "--lora-rank 2 --prompts-per-round 2 --rounds 4 --value-rounds 2 "
                   "--alpha 2 --beta 0.05 --eta 0.8 --num-steps 3 --max-grad-norm 590 "
                   "--film-pictures 1"),
    "dpok_all": ("04_dpok", "--lora-rank 0 --no-value --ratio per_dim --clip-range 0.004 "
                 "--timestep-fraction 0.5 --prompts-per-round 1 --samples-per-prompt 5 "
                 "--guidance-scale 1.5 --learning-rate 3e-5 --beta 0.5 --max-grad-norm 6.9"),
}
PROMPTS = ["a red circle", "two blue squares", "a green star on the left"]


@pytest.fixture(scope="module", params=[
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in RUNS])
def pair(request, tmp_path_factory):
    script, words = RUNS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    prompts = PROMPTS[2:] if request.param == "is_running" else PROMPTS
    (folder / "prompts.txt").write_text("\n".join(prompts))
    words = [*words.split(), "--prompts", f"{folder}/prompts.txt", "--out", str(folder)]
    if script == "04_dpok":
        words += ["--gold", f"{closed_forms.__file__}:lightness"]
    run = import_module(script).main([*COMMON, *words])
    method = getattr(run.config, "estimator", "dpok")
    return run, oracles.train(run.config, method, prompts, closed_forms.warmth,
                              closed_forms.lightness)


def saved_weights(run, n):
    """The trained weights after n rounds, as diffusers reads them."""
    folder = run.folder / "rounds" / f"{n:03d}"
    source = run.config.model if run.config.lora_rank else folder / "model"
    pipe = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    if run.config.lora_rank:
        pipe.load_lora_weights(folder)
    return {name.replace(".default_0.", ".default."): weight for name, weight in
            pipe.unet.state_dict().items() if "lora_" in name or not run.config.lora_rank}


def test_each_round_is_that_of_a_plain_slow_training(pair):
    """In the order in which a round makes them, so that the first message is the first mistake."""
    run, expected = pair
    rows = runs.read_rows(run.folder / "metrics.csv")
    samples = run.config.prompts_per_round * run.config.samples_per_prompt
    for n, (row, wanted) in enumerate(zip(rows, expected["rounds"], strict=True)):
        assert (row["round"], row["queries"]) == (n + 1, (n + 1) * samples)
        for name in [name for name in wanted if name != "weights"]:
            assert row[name] == pytest.approx(wanted[name], rel=2e-3, abs=1e-6), (
                f"round {n + 1}: {name} is {row[name]}, and {wanted[name]} in the plain training")
        check_weights(n + 1, saved_weights(run, n + 1), wanted["weights"], expected["start"],
                      run.config.learning_rate)
    assert {row["grad_clipped"] for row in rows} == {0, 1}  # the bound acts in some rounds only


def check_weights(n, weights, wanted, start, learning_rate):
    """Where a gradient is nearly 0, AdamW turns its rounding error into a step: most must agree."""
    assert weights.keys() == wanted.keys()
    changes = {name: (wanted[name] - start[name]).abs().flatten() for name in wanted}
    errors = {name: (wanted[name] - weights[name]).abs().flatten() for name in wanted}
    change = torch.cat(list(changes.values())).mean().item()
    assert change > 0.2 * learning_rate, f"round {n}: hardly any weight has moved"
    middle, high = np.quantile(torch.cat(list(errors.values())), (0.5, 0.99)) / change
    worst = max(errors, key=lambda name: (errors[name].median() / changes[name].mean()).item())
    assert middle < 3e-4 and high < 2e-2, f"round {n}: weights differ, {worst} most"


def test_looks_at_fresh_noise_are_those_of_a_plain_slow_training(pair):
    run, expected = pair
    verdict = json.loads((run.folder / "evaluation.json").read_text())
    rows = {row["queries"]: row for row in runs.read_rows(run.folder / "fresh.csv")}
    looks = expected["looks"]
    assert list(rows) == list(looks)
    before, after = looks[0], list(looks.values())[-1]
    for name in before.keys() - {"images"}:
        gain = np.subtract(after[name], before[name])
        lines = [(f"after {queries} queries", rows[queries], name, look[name])
                 for queries, look in looks.items()]
        lines += [("evaluation.json", verdict[name], side, values) for side, values in
                  (("before", before[name]), ("after", after[name]), ("gain", gain))]
        for where, row, column, values in lines:
            error = np.std(values, ddof=1) / len(values) ** 0.5
            found = row[column], row[column + "_se"]
            wanted = pytest.approx((np.mean(values), error), rel=2e-3, abs=2e-3)
            assert found == wanted, f"{where}: {name}, {column}"
    if "kl" in after:
        assert sum(run.after["kl_of_steps"]) == pytest.approx(np.mean(after["kl"]), rel=2e-3)
    _, frames = runs.read_film(run.folder)
    for queries, look in looks.items():
        twins = look["images"][:run.config.film_pictures]
        assert closed_forms.difference(frames[queries], twins) < 0.1, f"film, {queries} queries"
    for side, look in ((run.before, before), (run.after, after)):
        assert closed_forms.difference(side["images"], look["images"]) < 0.1
