"""Early stopping from the weights that runs keep on the way, against a plain second drawing."""
import csv
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from experiments import early_stopping as es
from support import models
from tests.equations import closed_forms
from tests.equations.closed_forms import lightness

mdp, ddpo, dpok = map(import_module, ("01_mdp", "03_ddpo", "04_dpok"))

PROMPTS = ["a red circle", "four stars"]
GOLD = f"{closed_forms.__file__}:lightness"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three rounds with every second one kept; and two of all weights, each of them kept."""
    out = tmp_path_factory.mktemp("trained")
    (out / "prompts.txt").write_text("\n".join(PROMPTS))
    usual = ["--num-steps", "2", "--eta", "0.8", "--guidance-scale", "1.5", "--seed", "5",
             "--device", "cpu", "--eval-samples", "2", "--prompts-per-round", "1",
             "--samples-per-prompt", "4", "--reward", f"{closed_forms.__file__}:warmth",
             "--prompts", f"{out}/prompts.txt", "--out", str(out), "--name"]
    ddpo.main([*usual, "adapters", "--rounds", "3", "--keep-every", "2", "--lora-rank", "2",
               "--learning-rate", "2e-2"])
    dpok.main([*usual, "all", "--rounds", "2", "--keep-every", "1", "--gold", GOLD, "--lora-rank",
               "0", "--learning-rate", "5e-4"])
    return {"adapters": out / "adapters", "all": out / "all"}


@pytest.fixture(scope="module")
def judged(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("judged")
    found = es.main(["--runs", *map(str, folders.values()), "--gold", GOLD, "--labels", "3",
                     "--samples", "5", "--kl-bound", "1e-9", "--seed", "9", "--device", "cpu",
                     "--batch-size", "2", "--out", str(out)])
    return found, out


@pytest.mark.slow
@pytest.mark.parametrize("run, places", [
    ("adapters", [(0, None), (2, "rounds/002"), (3, "")]),  # the run's end is kept, whatever N is
    ("all", [(0, None), (1, "rounds/001"), (2, "rounds/002")])])
def test_labels_truth_and_path_kl_are_what_the_folders_alone_give(run, places, judged, folders):
    rows = judged[0][run]
    pre = models.load_pipeline("tiny_sd", "cpu")
    config = SimpleNamespace(num_steps=2, eta=0.8, guidance_scale=1.5, batch_size=64, seed=9)
    for row, (n, place) in zip(rows, places, strict=True):
        assert (row["run"], row["round"], row["queries"]) == (run, n, 4 * n)
        tuned = pre if place is None else models.load_run(folders[run] / place, "cpu")[0]
        for column, error, purpose, address, samples in (
                ("labels_mean", "labels_se", "labels", 5, 3),  # 5: the run's own seed
                ("gold", "gold_se", "truth", 0, 5)):
            prompts = [PROMPTS[i % 2] for i in range(samples)]
            trajectory = mdp.rollout(tuned, prompts, config, purpose, address)
            g = torch.tensor(lightness(trajectory.images, prompts)).double()
            assert row[column] == pytest.approx(g.mean().item(), abs=0.02)
            assert row[error] == pytest.approx(g.std().item() / samples**0.5, abs=0.02)
            if purpose == "labels":
                kl = 0.0
                for j, t in enumerate(trajectory.timesteps):
                    mean, std = mdp.policy_at(pre, trajectory, list(range(3)), j, config)
                    kl += ((trajectory.means[:, j] - mean) / std).square().sum().item() / 2 / 3
                assert row["path_kl"] == pytest.approx(kl, rel=5e-3, abs=2e-4)
    assert rows[-1]["path_kl"] > 0.01 and rows[0]["path_kl"] < 1e-4


def test_the_file_and_the_table_say_which_round_the_rule_and_hindsight_choose(judged):
    found, out = judged
    with open(out / "early_stopping.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = [row for rounds in found.values() for row in rounds]
    assert [{name: str(value) for name, value in row.items()} for row in rows] == lines
    config = es.Config(labels=3, kl_bound=(1e-9,))
    for line, rounds in zip(es.table_of(found, config), found.values(), strict=True):
        best = max(rounds, key=lambda row: row["gold"])
        for way, row in (("rule, 1e-09 nats", rounds[0]), ("pretrained", rounds[0]),
                         ("end", rounds[-1]), ("hindsight", best)):
            assert line[f"{way}: round"] == str(row["round"])
            assert line[way] == f"{row['gold']:.3f}"
        assert line["rule, 1e-09 nats: price"] == rounds[1]["queries"] + 3
        assert (line["pretrained: price"], line["end: price"]) == (0, rounds[-1]["queries"])
    seeds = {f"a_seed{i}": rounds for i, rounds in enumerate(found.values())}
    (line,) = es.table_of(seeds, config)
    mean, error = es.training.mean_se([rounds[-1]["gold"] for rounds in seeds.values()])
    assert line["end"] == f"{mean:.3f} ± {error:.3f}" and line["end: price"] == (12 + 8) / 2


@pytest.mark.parametrize("words, named", [
    ("", "--runs"), ("--runs nowhere", "--runs nowhere"),
    ("--runs RUN --gold beauty", "--gold beauty"), ("--runs RUN --labels 1", "--labels"),
    ("--runs RUN --kl-bound 0", "--kl-bound")])
def test_bad_input_is_one_message_naming_the_flag(words, named, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=named):
        es.main(["--device", "cpu", *words.replace("RUN", str(folders["all"])).split()])
    assert not list(tmp_path.iterdir())
