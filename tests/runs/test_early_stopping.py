"""Early stopping from the weights that runs keep on the way, against a plain second drawing."""
import csv
import shutil
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import early_stopping as es
from experiments import sft
from support import figures, flags, models
from tests import oracles
from tests.oracles import lightness, warmth

ddpo, dpok = map(import_module, ("03_ddpo", "04_dpok"))

LABELS, TRUTH = 18, 19  # where their noise stands in the address of a random number
REWARD, GOLD = (f"{oracles.__file__}:{name}" for name in ("warmth", "lightness"))
PROMPTS = ["a red circle", "four stars"]
DRAW = SimpleNamespace(num_steps=2, eta=0.8, guidance_scale=1.5, seed=9)  # the script's own seed
SCRIPTS = {"ddpo": ddpo, "dpok": dpok, "sft": sft}
OF_METHOD = {"ddpo": "--lora-rank 2 --learning-rate 2e-2",
             "dpok": "--lora-rank 0 --learning-rate 5e-4 --updates-per-round 1",
             "sft": "--lora-rank 2 --learning-rate 2e-2 --temperature 9"}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    (out / "prompts.txt").write_text("\n".join(PROMPTS))
    usual = ("--num-steps 2 --eta 0.8 --guidance-scale 1.5 --seed 5 --device cpu --eval-samples 2 "
             f"--prompts-per-round 1 --samples-per-prompt 4 --reward {REWARD}").split()

    def start(method, name, *words):
        SCRIPTS[method].main([*usual, "--prompts", str(out / "prompts.txt"), "--out", str(out),
                              "--name", name, *OF_METHOD[method].split(), *words])
        return out / name

    with pytest.MonkeyPatch.context() as patch:
        for name in ("before_after", "curves", "sheet"):  # which take longer than the training
            patch.setattr(figures, name, lambda *_: None)
        yield start


@pytest.fixture(scope="module")
def folders(train):
    """Three rounds with every second one kept; and two of all weights, each of them kept."""
    return {"adapters": train("ddpo", "adapters", "--rounds", "3", "--keep-every", "2"),
            "all": train("dpok", "all", "--rounds", "2", "--keep-every", "1", "--gold", GOLD)}


@pytest.fixture(scope="module")
def judged(folders, tmp_path_factory):
    """What the script returns and hands to its figure, and where it writes."""
    out, calls, draw = tmp_path_factory.mktemp("judged"), [], figures.early_stopping
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "early_stopping", lambda *a: calls.append(a) or draw(*a))
        found = es.main(["--runs", *map(str, folders.values()), "--gold", GOLD, "--labels", "3",
                         "--samples", "5", "--kl-bound", "1e-9", "--seed", "9", "--device", "cpu",
                         "--batch-size", "2", "--out", str(out)])
    assert calls == [(out / "early_stopping.png", found, GOLD, 1e-9)]
    return SimpleNamespace(found=found, out=out)


def weights(folder):
    unet = models.load_run(folder, "cpu")[0].unet
    return {name: value.clone() for name, value in unet.state_dict().items()}


def differences(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_only_the_rounds_that_were_asked_for_are_kept(folders):
    assert sorted(path.name for path in (folders["adapters"] / "rounds").iterdir()) == ["002"]
    assert sorted(path.name for path in (folders["all"] / "rounds").iterdir()) == ["001", "002"]


@pytest.mark.parametrize("method", SCRIPTS)
def test_a_kept_round_is_what_a_run_of_so_many_rounds_ends_with(method, train, folders):
    """A round's noise has an address of its own, so a short run is a prefix of a longer one."""
    kept = {"ddpo": "adapters", "dpok": "all"}.get(method)
    folder = folders[kept] if kept else train("sft", "sft", "--rounds", "2", "--keep-every", "1")
    k = 2 if method == "ddpo" else 1
    short_run = train(method, f"{method}_{k}", "--rounds", str(k))
    assert not (short_run / "rounds").exists()  # the default is to keep none
    short = weights(short_run)
    assert differences(weights(folder / "rounds" / f"{k:03d}"), short) == 0
    assert differences(weights(folder), short) > 1e-5  # so the next round has changed something


@pytest.mark.parametrize("run, places", [
    ("adapters", [(0, None), (2, "rounds/002"), (3, "")]),  # the run's end is kept, whatever N is
    ("all", [(0, None), (1, "rounds/001"), (2, "rounds/002")])])
def test_labels_truth_and_path_kl_are_what_the_folders_alone_give(run, places, judged, folders,
                                                                  pipe):
    rows, k, m, best = judged.found[run]
    for row, (n, place) in zip(rows, places, strict=True):
        assert (row["run"], row["round"], row["queries"]) == (run, n, 4 * n)
        tuned = pipe if place is None else models.load_run(folders[run] / place, "cpu")[0]
        tuned.scheduler.set_timesteps(DRAW.num_steps)
        for column, error, purpose, address, samples in (
                ("labels_mean", "labels_se", LABELS, 5, 3),  # 5: the runs' seed
                ("gold", "gold_se", TRUTH, 0, 5)):
            prompts = oracles.in_turn(PROMPTS, samples)
            chains, images = oracles.draw_all(tuned, tuned.scheduler, DRAW, prompts, purpose,
                                              address)
            values = lightness(images, prompts)
            assert row[column] == pytest.approx(np.mean(values), abs=0.02), (n, column)
            expected = np.std(values, ddof=1) / samples**0.5
            assert row[error] == pytest.approx(expected, abs=0.02), (n, error)
            if purpose == LABELS:
                kl = [oracles.path_kl(pipe.unet, tuned.scheduler, DRAW, chain) for chain in chains]
                assert row["path_kl"] == pytest.approx(np.mean(kl), rel=5e-3, abs=1e-4)
    assert rows[-1]["path_kl"] > 0.01 and rows[0]["path_kl"] < 1e-6
    assert (k, m) == (0, 1)  # for the bound is next to nothing
    assert best == int(np.argmax([row["gold"] for row in rows]))


def test_the_file_and_the_table_say_which_round_the_rule_and_hindsight_choose(judged, capsys):
    with open(judged.out / "early_stopping.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = sum((found[0] for found in judged.found.values()), [])
    assert [{name: str(value) for name, value in row.items()} for row in rows] == lines
    assert list(lines[0]) == ("run round queries labels_mean labels_se path_kl gold gold_se "
                              "stopped hindsight").split()
    for of_run, k, _, best in judged.found.values():
        for column, place in (("stopped", k), ("hindsight", best)):
            assert [row[column] == "yes" for row in of_run] == [
                n == place for n in range(len(of_run))]
    assert (judged.out / "early_stopping.png").is_file()
    es.print_table(judged.found, 3)
    *_, first, second, note = capsys.readouterr().out.splitlines()
    assert "too high" in note
    for line, (label, (of_run, k, _, best)) in zip((first, second), judged.found.items()):
        kept, end = of_run[k], of_run[-1]
        assert line.split() == (
            f"{label} 0 {kept['path_kl']:.2f} {kept['gold']:.3f} ± {kept['gold_se']:.3f} "
            f"{of_run[1]['queries'] + 3} {end['gold']:.3f} ± {end['gold_se']:.3f} "
            f"{of_run[best]['round']} {of_run[best]['gold']:.3f}").split()


def test_noise_of_labels_is_of_the_runs_seed_and_of_the_truth_the_same_for_all(pipe, monkeypatch):
    noise, rollout = [], es.mdp.rollout
    monkeypatch.setattr(es.mdp, "rollout", lambda *a: noise.append(a[-1]) or rollout(*a))
    saved = {"num_steps": 2, "eta": 1.0, "guidance_scale": 1.0, "prompts": "four stars"}
    config = es.Config(labels=2, samples=2, seed=9)
    for seed in (0, 7):
        es.measure(pipe, models.make_reference(pipe), saved | {"seed": seed}, warmth, config)
    assert noise == [(9, "labels", 0), (9, "truth", 0), (9, "labels", 7), (9, "truth", 0)]


@pytest.mark.parametrize("words, named", [
    ("", "--runs"), ("--runs nowhere", "--runs nowhere"), ("--runs NONE", "--runs NONE"),
    ("--runs RUN RUN", "given twice"), ("--runs RUN NONE", "--runs NONE"),
    ("--runs RUN --gold beauty", "--gold beauty"), ("--runs RUN --labels 1", "--labels"),
    ("--runs RUN --kl-bound 0", "--kl-bound")])
def test_bad_input_is_one_message_naming_the_flag(words, named, folders, tmp_path, capsys,
                                                  monkeypatch):
    none = shutil.copytree(folders["all"], tmp_path / "none",
                           ignore=shutil.ignore_patterns("rounds", "model"))
    monkeypatch.chdir(tmp_path)
    names = {"RUN": str(folders["all"]), "NONE": str(none)}
    for short, name in names.items():
        words, named = words.replace(short, name), named.replace(short, name)
    with pytest.raises(SystemExit) as error:
        flags.run(lambda: es.main(["--device", "cpu", *words.split()]))
    said = capsys.readouterr().err
    assert error.value.code == 2 and named in said and len(said.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["none"]
