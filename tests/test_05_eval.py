"""The evaluation: statistics against hand-worked numbers, the files against the table."""
import csv
import json
import math
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

mdp, ev = import_module("01_mdp"), import_module("05_eval")

TINY = ["--rounds", "2", "--samples-per-prompt", "2", "--samples", "3", "--long-rounds", "2",
        "--long-samples", "4", "--num-steps", "3", "--device", "cpu"]


def test_mean_se_by_hand():
    mean, se = ev.ddpo.mean_se([1.0, 2.0, 6.0])
    assert mean == 3 and se == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert math.isnan(ev.ddpo.mean_se([1.0])[1])


def test_paired_bootstrap_is_the_normal_interval_where_that_holds():
    d = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() + 0.3
    mean, low, high = ev.paired_bootstrap(d)
    half = 1.96 * (d.std() / 20).item()
    assert mean == pytest.approx(d.mean().item(), rel=1e-12)
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)
    assert ev.paired_bootstrap(d) == ev.paired_bootstrap(d)  # the same table twice
    assert ev.paired_bootstrap(torch.full((5,), 0.2).double()) == pytest.approx((0.2, 0.2, 0.2))


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    generator, held = torch.Generator().manual_seed(1), 0
    for _ in range(300):
        d = torch.rand(60, generator=generator).double() ** 3  # skewed; its mean is 1/4
        _, low, high = ev.paired_bootstrap(d, draws=500)
        held += low <= 0.25 <= high
    assert 0.89 < held / 300 < 0.98


def test_novelty_against_a_loop():
    f = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for i, found in enumerate(ev.novelty(f).tolist()):
        others = [1 - torch.cosine_similarity(f[i], f[j], dim=0).item() for j in range(5) if j != i]
        assert found == pytest.approx(sum(others) / 4, rel=1e-5)
    assert ev.novelty(f[:1].expand(4, 8)).abs().max() < 1e-12
    assert ev.novelty(torch.tensor([[1.0, 0.0], [0.0, 3.0]])).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_best_of_n_kl_is_that_of_the_largest_of_n_uniform_numbers(n):
    """Density of the largest: n·u^(n−1); KL to the uniform, by the midpoint rule."""
    u = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000
    p = n * u ** (n - 1)
    assert ev.best_of_n_kl(n) == pytest.approx((p * p.log()).mean().item(), abs=1e-4)


def test_early_stop_is_the_best_running_mean():
    assert ev.early_stop([0.1, 0.5, 0.6, 0.2, 0.1], window=2) == 2
    assert ev.early_stop([0.1, 0.9, 0.1, 0.6, 0.6, 0.6], window=3) == 5  # one lucky round is not it
    assert ev.early_stop([0.9, 0.8], window=1) == 0


def test_verdicts():
    assert ev.verdict(0.1, 0.2) == "holds" and ev.verdict(-0.2, -0.1) == "FAILS"
    assert ev.verdict(-0.1, 0.1) == "cannot be told from chance"


def rows_of(model, values, seed=0):
    return [dict(model=model, seed=seed, family="f", split="seen", prompt="p", picture=i, r=v, g=v,
                 novelty=v) for i, v in enumerate(values)]


def test_claims_say_holds_and_fails():
    config = ev.Config(reward="r", gold="g")
    models = {name: rows_of(name, [base + 0.01 * i for i in range(20)]) for name, base in dict(
        DDPO_IS=1.0, DPOK=1.0, SFT=2.0, RWR=0.0, DDPO_SF=0.5).items()}
    said = ev.claims(models, {}, config)
    assert any("FAILS (DDPO_IS − SFT, r: -1.000" in line for line in said)
    assert any("per query: holds (DDPO_IS − DDPO_SF, r: +0.500" in line for line in said)
    assert any("per query: holds (DDPO_SF − RWR, r: +0.500" in line for line in said)
    assert any("chance (DPOK − DDPO_IS, g: +0.000" in line for line in said)
    long = {0.0: [dict(reward=float(i), gold=1.0 - i / 10, kl=i) for i in range(10)]}
    (line,) = ev.claims({}, long, config)
    assert "r is 7.000, g 0.300 at 9 nats; g was best, 1.000, at round 1" in line


def test_pairs_average_the_seeds_and_keep_the_pictures_order():
    rows = rows_of("A", [1.0, 2.0, 3.0]) + rows_of("A", [3.0, 4.0, 8.0], seed=1)
    assert ev.per_picture(rows, "r").tolist() == [2.0, 3.0, 5.5]
    found = ev.differences({"B": rows_of("B", [0.0, 0.0, 0.0]), "A": rows},
                           ev.Config(reward="r", gold="g"))
    assert [(d["a"], d["b"], d["mean"]) for d in found] == [("A", "B", 3.5)] * 3
    assert all(d["beyond_chance"] for d in found)


def test_error_of_diversity_is_how_much_it_varies_from_sample_to_sample():
    """500 samples of 40 pictures: their diversities spread as much as one sample's error says."""
    generator, means, errors = torch.Generator().manual_seed(0), [], []
    for _ in range(500):
        f = torch.randn(40, 4, generator=generator) + torch.tensor([2.0, 0, 0, 0])
        rows = rows_of("A", ev.novelty(f).tolist())
        mean, error = ev.ddpo.mean_se(ev.per_picture(rows, "novelty"))
        means.append(mean)
        errors.append(error)
    assert sum(errors) / 500 == pytest.approx(torch.tensor(means).std().item(), rel=0.1)


def test_several_seeds_of_a_picture_are_one_picture():
    rows = [row | dict(path_kl=2.0, a=1.0, description=f"{row['picture']} {seed}" * seed)
            for seed in (0, 1) for row in rows_of("A", [1.0 + seed, 2.0 + seed, 6.0 + seed], seed)]
    found = ev.summarize(rows, ev.Config(reward="r", gold="g", others=("a",)))
    assert found["reward"] == (3.5, pytest.approx(math.sqrt(14 / 2 / 3)), 3)  # 1.5, 2.5, 6.5
    assert found["distinct"][0] == 2 and found["distinct"][2] == 1  # 1 and 3 descriptions
    assert found["path KL"] == (2.0, 0.0, 3) and found["gold f"] == found["gold"]


def test_plan_puts_seen_prompts_first_and_unseen_ones_are_unseen():
    asked = ev.plan(ev.Config(samples=50))
    splits = [split for _, split, _ in asked]
    assert splits == ["seen"] * 250 + ["unseen"] * 200
    seen = {prompt for _, split, prompt in asked if split == "seen"}
    unseen = {prompt for _, split, prompt in asked if split == "unseen"}
    assert seen == {pair[0] for pair in ev.dpok.TASKS.values()}
    assert all(ev.shapes.is_held_out(ev.shapes.parse(prompt)) for prompt in unseen)
    assert not any(ev.shapes.is_held_out(ev.shapes.parse(prompt)) for prompt in seen)
    sd = ev.plan(ev.Config(prompts="tasks_sd", samples=2))
    assert ("location", "unseen", "A lion on the moon") in sd and len(sd) == 18
    one = ev.plan(ev.Config(prompts="a red circle", samples=3))
    assert one == [("a red circle", "seen", "a red circle")] * 3


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "eval"
    ev.main([*TINY, "--out", str(out)])
    return out


def test_every_file_is_there_and_the_page_needs_no_other(evaluated):
    for name in ev.FIGURES:
        assert (evaluated / f"{name}.png").stat().st_size > 5000
    page = (evaluated / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(ev.FIGURES)
    assert "http://" not in page and "https://" not in page
    models = ["pretrained", *ev.METHODS, "best of 2"]
    table = (evaluated / "table.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == models
    assert all(f"<td>{model}</td>" in page for model in models)
    claims = (evaluated / "claims.md").read_text(encoding="utf-8")
    assert claims.count("Trained too long") == 4 and claims.count("Trained for 2 rounds") == 3
    assert all(line[2:] in page for line in
               (evaluated / "claims.md").read_text(encoding="utf-8").splitlines())


def test_a_row_of_the_table_from_the_files_alone(evaluated):
    rows = [row for row in csv.DictReader(open(evaluated / "samples.csv", encoding="utf-8"))
            if row["model"] == "DPOK"]
    saved = {row["column"]: row for row in csv.DictReader(open(evaluated / "table.csv"))
             if row["model"] == "DPOK"}
    seen = [row for row in rows if row["split"] == "seen"]
    columns = dict(reward="image_reward", gold="alignment", aesthetic="aesthetic",
                   incompressibility="incompressibility", **{"path KL": "path_kl"})
    values = {name: [float(row[key]) for row in seen] for name, key in columns.items()}
    values["gold unseen"] = [float(r["alignment"]) for r in rows if r["split"] == "unseen"]
    for family in ev.dpok.TASKS:
        values[f"gold {family}"] = [float(r["alignment"]) for r in seen if r["family"] == family]
    f = load_file(evaluated / "embeddings.safetensors")["DPOK"].double()
    groups = {p: [i for i, row in enumerate(rows) if row["prompt"] == p and row["split"] == "seen"]
              for p in dict.fromkeys(row["prompt"] for row in seen)}
    values["diversity"] = [
        sum(1 - torch.cosine_similarity(f[i], f[j], dim=0).item() for j in g if i != j)
        / (len(g) - 1) for g in groups.values() for i in g]
    values["distinct"] = [len({rows[i]["description"] for i in g}) for g in groups.values()]
    assert set(values) == set(saved)
    for name, found in values.items():
        mean = sum(found) / len(found)
        spread = found
        if name == "diversity":  # deviations from the prompt's own mean count twice
            of = [row["prompt"] for row in seen]
            own = {p: [v for v, q in zip(found, of) if q == p] for p in groups}
            spread = [2 * v - sum(own[p]) / len(own[p]) for v, p in zip(found, of)]
        se = math.sqrt(sum((v - mean) ** 2 for v in spread) / (len(found) - 1) / len(found))
        assert float(saved[name]["mean"]) == pytest.approx(mean, rel=1e-6, abs=1e-9)
        assert float(saved[name]["standard_error"]) == pytest.approx(se, rel=1e-6, abs=1e-9)
        assert int(saved[name]["N"]) == len(found)
    table = (evaluated / "table.md").read_text(encoding="utf-8")
    line = next(line for line in table.splitlines() if line.startswith("| DPOK"))
    assert "{:.3f} ± {:.3f}".format(float(saved["reward"]["mean"]),
                                    float(saved["reward"]["standard_error"])) in line


def test_the_same_command_twice_gives_the_same_files_and_trains_nothing(evaluated, monkeypatch):
    files = {name: (evaluated / name).read_bytes()
             for name in ("samples.csv", "table.md", "differences.csv", "claims.md")}
    monkeypatch.setattr(ev.dpok, "train", None)
    ev.main([*TINY, "--out", str(evaluated)])
    assert files == {name: (evaluated / name).read_bytes() for name in files}


def test_the_pretrained_model_is_at_0_nats_and_best_of_n_beats_it(evaluated):
    rows = list(csv.DictReader(open(evaluated / "samples.csv", encoding="utf-8")))
    pick = lambda model, key: [float(row[key]) for row in rows  # noqa: E731
                               if row["model"] == model and row["split"] == "seen"]
    assert max(pick("pretrained", "path_kl")) < 1e-4 < min(pick("DPOK", "path_kl"))
    once, best = pick("pretrained", "image_reward"), pick("best of 2", "image_reward")
    # Other batches round a pixel otherwise now and then, which moves a reward by a hair.
    assert all(b >= a - 0.02 for a, b in zip(once, best, strict=True))
    assert sum(best) > sum(once) + 0.1
    assert set(pick("best of 2", "path_kl")) == {ev.best_of_n_kl(2)}


def test_runs_of_other_chapters_are_evaluated(evaluated, tmp_path):
    folder = evaluated / "train" / "SFT_seed0"
    ev.main(["--runs", str(folder), "--samples", "3", "--num-steps", "3", "--device", "cpu",
             "--out", str(tmp_path / "other")])
    ours = [row for row in csv.DictReader(open(tmp_path / "other/samples.csv", encoding="utf-8"))
            if row["model"] == "SFT_seed0"]
    theirs = [row for row in csv.DictReader(open(evaluated / "samples.csv", encoding="utf-8"))
              if row["model"] == "SFT"]
    assert [row["image_reward"] for row in ours] == [row["image_reward"] for row in theirs]
    assert (tmp_path / "other/queries.png").exists()


def test_runs_of_one_name_are_two_models_and_nothing_of_an_earlier_page_stays(
        evaluated, tmp_path):
    twins = [tmp_path / name / "DPOK_seed0" for name in "ab"]
    for twin, method in zip(twins, ("DPOK", "SFT")):
        shutil.copytree(evaluated / f"train/{method}_seed0/model", twin / "model")
    out = tmp_path / "out"
    out.mkdir()
    for stale in ("queries.png", "samples_long.csv"):
        (out / stale).write_bytes((evaluated / stale).read_bytes())
    ev.main(["--runs", *map(str, twins), "--samples", "2", "--num-steps", "3", "--device", "cpu",
             "--out", str(out)])
    lines = (out / "table.md").read_text(encoding="utf-8").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| pretrained", *(f"| {t}" for t in twins)]
    assert lines[1].split(" | ")[1:] != lines[2].split(" | ")[1:]
    assert not (out / "queries.png").exists() and not (out / "samples_long.csv").exists()
    assert "against reward queries" not in (out / "index.html").read_text(encoding="utf-8")


def test_a_ballot_on_two_given_runs(evaluated, tmp_path):
    flags = ["--samples", "2", "--num-steps", "3", "--device", "cpu", "--ballot"]
    runs = [str(evaluated / f"train/{method}_seed0") for method in ("DDPO_IS", "RWR")]
    ev.main(["--runs", *runs, *flags, "--out", str(tmp_path / "b")])
    key = json.loads((tmp_path / "b/ballot_key.json").read_text())
    assert (key["a"], key["b"]) == ("DDPO_IS_seed0", "RWR_seed0") and len(key["pairs"]) == 10
    for bad in (runs[:1], [*runs, str(evaluated / "train/SFT_seed0")], [runs[0]] * 2):
        with pytest.raises(ValueError, match="--ballot compares two|a folder is given twice"):
            ev.main(["--runs", *bad, *flags, "--out", str(tmp_path / "c")])


def test_runs_trained_on_another_reward_share_no_axis_and_seconds_are_theirs(evaluated, tmp_path,
                                                                            monkeypatch):
    run = tmp_path / "three"
    shutil.copytree(evaluated / "train/DPOK_seed0/model", run / "model")
    (run / "config.json").write_text(json.dumps({"reward": "alignment"}))
    (run / "metrics.csv").write_text("round,queries,reward,reward_se,sample_s,reward_s,update_s\n"
                                     "1,6,0.5,0.1,10,20,30\n2,12,0.6,0.1,1,2,3\n")
    runs = ["--runs", str(run), str(evaluated / "train/SFT_seed0"), "--seeds", "3"]
    flags = ["--samples", "2", "--num-steps", "3", "--device", "cpu", "--out", str(tmp_path / "o")]
    drawn = []
    monkeypatch.setattr(ev.figures, "queries", lambda path, lines, *_: drawn.append(lines))
    ev.main([*runs, *flags])
    assert set(drawn[0]) == {"SFT_seed0"}
    table = (tmp_path / "o/table.md").read_text(encoding="utf-8").splitlines()
    assert table[3].endswith("| 12 | 66 |")
    seconds = sum(row["seconds"] for row in ev.read_metrics(evaluated / "train/SFT_seed0"))
    assert table[4].endswith(f"| 20 | {seconds:.0f} |")
    assert "<p>Measured: image_reward" in (tmp_path / "o/index.html").read_text(encoding="utf-8")


def test_best_of_n_has_a_bound_where_others_have_a_measured_kl(evaluated):
    lines = (evaluated / "table.md").read_text(encoding="utf-8").splitlines()
    column = [c.split(" (")[0].strip() for c in lines[0].strip("|").split(" | ")].index("path KL")
    cells = [line.strip("| ").split(" | ")[column] for line in lines[2:]]
    assert cells[-1] == f"≤ {ev.best_of_n_kl(2):.3f}" and all("±" in cell for cell in cells[:-1])


def test_a_prompt_of_one_word_trains_too_long_as_a_prompt(tmp_path):
    (tmp_path / "f.txt").write_text("a red star\nstar\n")
    jobs = ev.jobs(ev.Config(prompts=str(tmp_path / "f.txt"), out=str(tmp_path)))
    assert ev.dpok.get_prompts(jobs["long_beta_0"].prompts) == ["star"]
    assert ev.dpok.get_prompts(jobs["noise"].prompts) == ["star"]


def test_a_quick_tour_keeps_the_flags_that_were_given(monkeypatch):
    seen = []
    monkeypatch.setattr(ev, "write_ballot", seen.append)
    ev.main(["--quick", "--ballot", "--rounds", "20"])
    ev.main(["--ballot"])
    ev.main(["--ballot", "--runs", "x"])
    assert [(c.rounds, c.samples, c.out) for c in seen] == [
        (20, 12, "runs/quick"), (20, 50, "runs/eval"), (20, 50, "runs/eval_runs")]


def test_an_unfinished_run_is_moved_aside_and_another_setting_is_refused(tmp_path, monkeypatch):
    jobs = ev.jobs(ev.Config(out=str(tmp_path), long_rounds=0, rounds=3))
    assert set(jobs) == {f"{name}_seed0" for name in ev.METHODS}
    trained = []
    monkeypatch.setattr(ev.dpok, "train", lambda job: trained.append(job.name))
    half = tmp_path / "train" / "DPOK_seed0"
    half.mkdir(parents=True)
    (half / "metrics.csv").write_text("precious")
    done = tmp_path / "train" / "RWR_seed0"
    (done / "model").mkdir(parents=True)
    (done / "model/model_index.json").write_text("{}")
    settings = ev.asdict(jobs["RWR_seed0"])
    (done / "config.json").write_text(json.dumps(settings | {"eval_samples": 9}))  # not training's
    ev.train_missing(jobs)
    assert set(trained) == set(jobs) - {"RWR_seed0"}
    assert (tmp_path / "train/DPOK_seed0-unfinished-0/metrics.csv").read_text() == "precious"
    (done / "config.json").write_text(json.dumps(settings | {"rounds": 7}))
    with pytest.raises(ValueError, match="RWR_seed0 was trained with rounds = 7, not 3"):
        ev.train_missing(jobs)


@pytest.mark.parametrize("flags, named", [
    (["--runs", "nowhere"], "--runs nowhere"), (["--samples", "1"], "--samples"),
    (["--seeds", "0"], "--seeds"), (["--rounds", "0"], "--rounds"),
    (["--reward", "beauty"], "--reward beauty"), (["--long-rounds", "-1"], "--long-rounds"),
    (["--prompts", "a red dog"], "'dog'"), (["--model", "nothing"], "--model nothing"),
    (["--gold", "beauty"], "--gold beauty"), (["--others", "beauty"], "--others beauty"),
    (["--ballot", "--seeds", "0"], "--seeds"),
])
def test_bad_input_is_one_line_naming_the_flag(flags, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as exit:
        mdp.run_main(lambda: ev.main([*TINY, *flags, "--out", str(tmp_path / "eval")]))
    assert exit.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path(tmp_path).glob("eval/*.csv"))


def test_ballot_from_runs_to_rates(evaluated, tmp_path, capsys):
    """A rater who always prefers DPOK's picture: 100 %, read through the key."""
    flags = [*TINY, "--out", str(evaluated)]
    ev.main([*flags, "--ballot"])
    key = json.loads((evaluated / "ballot_key.json").read_text())
    assert len(key["pairs"]) == 15 and (key["a"], key["b"]) == ("DPOK", "SFT")
    page = (evaluated / "ballot.html").read_text(encoding="utf-8")
    bare = re.sub("base64,[A-Za-z0-9+/=]+", "", page)  # where any three letters may meet
    assert "DPOK" not in bare and "SFT" not in bare and key["ballot"] in bare
    sides = ["left" if pair["left"] == "DPOK" else "right" for pair in key["pairs"]]
    votes = [dict(pair=i, alignment=side, quality="tie") for i, side in enumerate(sides)]
    file = tmp_path / "votes_ann.json"
    file.write_text(json.dumps(dict(ballot=key["ballot"], rater="Ann", votes=votes)))
    capsys.readouterr()
    ev.main([*flags, "--votes", str(file)])
    assert "| 100.0 ± – % | 0.0 ± – % | 0.0 ± – % | 1 | 15 |" in capsys.readouterr().out
    for bad in ([*flags, "--ballot"], [*flags, "--votes", str(file), str(file)],
                ["--out", str(tmp_path), "--votes", str(file)]):
        with pytest.raises(ValueError, match="--ballot|--votes"):
            ev.main(bad)
