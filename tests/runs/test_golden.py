"""Golden runs: whole trainings through main(), against the plain second implementation."""
import json
from importlib import import_module

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from support import runs
from tests import oracles

COMMON = ("--device cpu --rounds 2 --samples-per-prompt 3 --num-steps 4 --eval-samples 5 "
          f"--seed 3 --weight-decay 1 --reward {oracles.__file__}:warmth")
RUNS = {  # name: (script, its flags)
    "sf": ("03_ddpo", "--estimator sf --prompts-per-round 2 --max-grad-norm 1000 --batch-size 5"),
    "is": ("03_ddpo", "--prompts-per-round 2 --learning-rate 5e-5 --max-grad-norm 280 "
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


@pytest.fixture(scope="module", params=RUNS)
def pair(request, tmp_path_factory):
    script, words = RUNS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    prompts = PROMPTS[2:] if request.param == "is_running" else PROMPTS
    (folder / "prompts.txt").write_text("\n".join(prompts))
    words += f" --prompts {folder}/prompts.txt --out {folder}"
    if script == "04_dpok":
        words += f" --gold {oracles.__file__}:lightness"
    run = import_module(script).main([*COMMON.split(), *words.split()])
    return run, oracles.train(run.config, script[3:], prompts, oracles.warmth, oracles.lightness)


def trained_weights(run):
    source = run.config.model if run.config.lora_rank else run.folder / "model"
    pipe = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    if run.config.lora_rank:
        pipe.load_lora_weights(run.folder)
    return {name.replace(".default_0.", ".default."): weight for name, weight in
            pipe.unet.state_dict().items() if "lora_" in name or not run.config.lora_rank}


def test_trained_weights_are_those_of_a_plain_slow_training(pair):
    run, expected = pair
    weights = trained_weights(run)
    assert weights.keys() == expected["weights"].keys()
    changes, errors = [], []
    for name, weight in weights.items():
        errors.append((weight - expected["weights"][name]).abs().flatten())
        changes.append((expected["weights"][name] - expected["start"][name]).abs().flatten())
    changes, errors = torch.cat(changes).numpy(), torch.cat(errors).numpy()
    assert changes.mean() > 0.5 * run.config.learning_rate
    # Where a gradient is nearly 0, AdamW turns its rounding error into a step: so not the largest.
    assert np.median(errors) < 3e-4 * changes.mean()
    assert np.quantile(errors, 0.99) < 2e-2 * changes.mean()


def test_log_evaluation_and_pictures_are_those_of_a_plain_slow_training(pair):
    run, expected = pair
    rows = runs.read_rows(run.folder / "metrics.csv")
    samples = run.config.prompts_per_round * run.config.samples_per_prompt
    for n, (row, wanted) in enumerate(zip(rows, expected["rows"], strict=True)):
        assert (row["round"], row["queries"]) == (n + 1, (n + 1) * samples)
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=2e-3, abs=1e-6)
    assert {row["grad_clipped"] for row in rows} == {0, 1}  # the bound acts in some rounds only

    verdict = json.loads((run.folder / "evaluation.json").read_text())
    before, after = expected["before"], expected["after"]
    for name in before.keys() - {"images"}:
        gain = np.subtract(after[name], before[name])
        for side, values in (("before", before[name]), ("after", after[name]), ("gain", gain)):
            error = np.std(values, ddof=1) / len(values) ** 0.5
            found = verdict[name][side], verdict[name][side + "_se"]
            assert found == pytest.approx((np.mean(values), error), rel=2e-3, abs=2e-3), side
    _, frames = runs.read_film(run.folder)
    strips = [run.before["images"], run.after["images"], *frames.values()]
    wanted = [before["images"], after["images"], *expected["film"]]
    for images, twins in zip(strips, wanted, strict=True):
        assert oracles.difference(images, twins) < 0.1
