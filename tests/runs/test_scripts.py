"""The scripts as users start them, what they leave behind, and what bad input gets."""
import filecmp
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from support import flags, models, runs, training
from support.prompts import get_prompts
from tests.oracles import difference

ROOT = models.HERE
mdp, rewards = import_module("01_mdp"), import_module("02_rewards")
ddpo, dpok = import_module("03_ddpo"), import_module("04_dpok")
TINY = ["--rounds", "2", "--prompts-per-round", "2", "--samples-per-prompt", "3", "--num-steps",
        "3", "--eval-samples", "4", "--device", "cpu"]
FILES = {"config.json", "metrics.csv", "pictures.csv", "film", "film.png", "before_after.png",
         "reward.png", "evaluation.json"}


def names_in(folder):
    return {file.name for file in Path(folder).iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("script, words, said, files", [
    ("01_mdp", ["--num-steps", "3"], "Scored in a batch of its own", {"01_mdp/beliefs.png"}),
    ("02_rewards", ["--samples", "2", "--num-steps", "3", "--show", "3", "--rewards",
                    "compressibility", "aesthetic"], "rank correlation",
     {"02_rewards/best_worst.png"}),
    ("03_ddpo", [*TINY, "--name", "a"], "gain", {f"a/{name}" for name in FILES}),
    ("04_dpok", [*TINY, "--name", "a", "--prompts", "tasks"], "path KL",
     {f"a/{name}" for name in FILES})])
def test_scripts_run_from_anywhere_into_a_log_without_greek(script, words, said, files, tmp_path):
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", *words], cwd=tmp_path, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"},
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and names_in(tmp_path) == {"runs"}
    for file in files:
        path = tmp_path / "runs" / file
        assert path.is_dir() or path.stat().st_size > 100, file


@pytest.mark.parametrize("script, words, weights", [
    (ddpo, ["--learning-rate", "1e-3"], "model/unet/diffusion_pytorch_model.safetensors"),
    pytest.param(dpok, ["--learning-rate", "1e-2"], models.ADAPTER, marks=pytest.mark.slow)])
def test_a_run_is_the_same_again_bit_for_bit_and_another_goes_on_from_it(script, words, weights,
                                                                         tmp_path, capsys):
    def start(*more):
        return script.main([*TINY, "--reward", "compressibility", "--out", str(tmp_path), *words,
                            "--prompts", "location", "--eta", "0.5", *more])

    torch.manual_seed(1)
    first = start()
    said = capsys.readouterr().out
    assert "clip ±0.2 on the exact ratio: 0.999129 to 1.00071 on the per_dim one" in said  # D = 256
    assert first.film_prompts == training.spread_evenly(get_prompts("location"), 8)
    torch.manual_seed(2)  # nothing hangs on torch's own generator
    again, other = start(), start("--seed", "1")
    for run in (first, again, other):
        assert names_in(run.folder) == FILES | {weights.partition("/")[0]}
        for row in run.rows:
            del row["seconds"]
    assert first.rows == again.rows != other.rows
    for side in ("before", "after"):
        mine, its, others = [getattr(run, side) for run in (first, again, other)]
        assert torch.equal(mine["reward"], its["reward"])
        assert difference(mine["images"], its["images"]) == 0
        assert difference(mine["images"], others["images"]) > 1
    assert filecmp.cmp(first.folder / weights, again.folder / weights, shallow=False)
    assert not filecmp.cmp(first.folder / weights, other.folder / weights, shallow=False)

    further = start("--model", str(first.folder))
    assert difference(further.before["images"], first.after["images"]) < 0.1
    assert difference(further.before["images"], first.before["images"]) > 1
    if script is dpok:  # its reference is where it started
        assert further.before["kl"].max() < 1e-6 < further.after["kl"].min()
        scheduler = models.load_pipeline("tiny_sd", "cpu").scheduler
        scheduler.set_timesteps(3)
        t, weight, kl = zip(*first.after["steps"])
        wanted = mdp.noise_weight(scheduler, scheduler.timesteps, 0.5) ** 2 / 2
        assert list(t) == scheduler.timesteps.tolist()
        assert weight == pytest.approx(wanted.tolist(), rel=1e-3)
        assert sum(kl) == pytest.approx(first.after["kl"].mean().item(), rel=1e-3)
        assert f"{kl[-1]:10.2f}" in said.splitlines()[-1]


@pytest.mark.parametrize("script, flag", [(ddpo, "--reward"), (dpok, "--reward"), (dpok, "--gold")])
def test_flags_of_weights_reach_what_is_measured(script, flag, tmp_path):
    empty = str(tmp_path)  # a folder without a CLIP in it
    with pytest.raises(ValueError, match=f"--clip {empty}"):
        script.main([*TINY, flag, "aesthetic", "--clip", empty, "--out", empty])


def test_every_flag_of_chapter_1_changes_what_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    outputs = set()
    for flag in ("", "--batch-size 64", "--seed 1", "--eta 0.5", "--guidance-scale 2",
                 "--num-steps 3", "--prompts circles"):
        mdp.main(["--num-steps", "2", *flag.split()])
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 6  # a batch size changes nothing
    # Another batch is another rounding, at least somewhere.
    assert any("moves by 0.0e+00" not in output for output in outputs)


@pytest.fixture(scope="module")
def full_model(tmp_path_factory):
    """A folder laid out as Stable Diffusion v1.5's is, whose text encoder knows every word."""
    folder = tmp_path_factory.mktemp("full") / "model"
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "tiny_sd", safety_checker=None)
    pipe.tokenizer = CLIPTokenizer.from_pretrained(ROOT / "tiny_sd/tokenizer", model_max_length=77)
    words = pipe.text_encoder.config.to_dict() | {"max_position_embeddings": 77}
    pipe.text_encoder = CLIPTextModel(CLIPTextConfig(**words))  # with new, random weights
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("script, words, folder, batch", [
    (mdp, "", "01_mdp", 1), (rewards, "--samples 2 --rewards compressibility", "02_rewards", 6),
    (ddpo, "--reward compressibility --rounds 1 --eval-samples 2 --prompts-per-round 4 "
     "--updates-per-round 1",
     "ddpo_is_compressibility_animals", 8),
    (dpok, "--reward compressibility --rounds 1 --eval-samples 2 --gold incompressibility",
     "dpok_compressibility_A_green_colored_rabbit", 8)])
def test_sd_runs_end_to_end_on_a_stand_in(script, words, folder, batch, full_model, tmp_path,
                                          monkeypatch):
    forward, sizes = UNet2DConditionModel.forward, {False: [], True: []}

    def measured(self, x, *more, **named):
        assert x.dtype == torch.bfloat16
        sizes[torch.is_grad_enabled()].append(len(x))
        return forward(self, x, *more, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", measured)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = script.main(["--sd", "--model", str(full_model), "--num-steps", "2", "--device", "cpu",
                       *words.split()])
    assert names_in("runs") == {folder}
    assert max(sizes[False]) == 2 * batch  # guidance looks at each picture twice
    if script in (ddpo, dpok):
        assert max(sizes[True]) == 2 * 4  # --train-batch-size
        unet = models.load_run(run.folder, "cpu", "bfloat16")[0].unet
        adapters = [p.dtype for name, p in unet.named_parameters() if "lora_" in name]
        assert set(adapters) == {torch.float32}
        assert (run.config.ratio, run.config.lora_rank) == ("per_dim", 4)
        assert names_in(run.folder) == FILES | {models.ADAPTER}
        assert runs.read_rows(run.folder / "metrics.csv")[0]["grad_norm"] > 0


@pytest.mark.parametrize("script, words, named", [
    (mdp, "--num-stps 3", "--num-stps"), (mdp, "--num-steps 2000", "--num-steps"),
    (mdp, "--out x.txt", "--out x.txt"), (mdp, "--model nowhere", "--model nowhere"),
    (rewards, "--rewards beauty", "--rewards beauty"), (ddpo, "--reward beauty", "--reward beauty"),
    (ddpo, "--reward my.py:few", "1 numbers for 4"), (ddpo, "--reward my.py:breaks", "my.py:4"),
    (ddpo, "--prompts my.py", "'def'"), (ddpo, "--eta 0", "--eta"),
    (ddpo, "--film-pictures 0", "--film-pictures"),
    (ddpo, "--samples-per-prompt 1", "--samples-per-prompt"),
    (ddpo, "--updates-per-round 7", "--updates-per-round"),
    (ddpo, "--estimator sf --updates-per-round 2", "--estimator sf"),
    (ddpo, "--learning-rate 1e30", "--learning-rate"), (ddpo, "--name taken", "--name taken"),
    (ddpo, "--out my.py", "--out my.py"), (ddpo, "--device abacus", "--device abacus"),
    (dpok, "--gold beauty", "--gold beauty"), (dpok, "--name taken", "--name taken"),
    (dpok, "--samples-per-prompt 1", "--samples-per-prompt"),
    (dpok, "--updates-per-round 7", "--updates-per-round"),
    (dpok, "--lora-targets nonsense", "--lora-targets"),
    (ddpo, "--reward aesthetic --clip nowhere", "--clip nowhere"),
    (dpok, "--reward aesthetic --clip nowhere", "--clip nowhere"),
    (dpok, "--gold aesthetic --clip nowhere", "--clip nowhere")])
def test_bad_input_gets_one_message_and_does_no_harm(script, words, named, tmp_path, monkeypatch,
                                                     capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("my.py").write_text("def few(images, prompts):\n    return [1]\n"
                             "def breaks(images, prompts):\n    return 1 // 0\n")
    Path("runs/taken").mkdir(parents=True)
    Path("runs/taken/config.json").write_text("precious")
    tiny = TINY if script in (ddpo, dpok) else []
    with pytest.raises(SystemExit) as exit:
        flags.run(lambda: script.main([*tiny, *words.split()]))
    message = capsys.readouterr().err
    assert exit.value.code == 2 and named in message and "Traceback" not in message
    if "1e30" not in words:  # that one is found out in its second round
        assert names_in(".") <= {"my.py", "__pycache__", "runs"}
        files = [file for file in Path("runs").rglob("*") if file.is_file()]
        assert [file.read_text() for file in files] == ["precious"]


@pytest.mark.slow
def test_reward_rises_by_more_than_its_spread(tmp_path):
    run = ddpo.main([
        "--reward", "compressibility", "--prompts", "color", "--rounds", "8", "--num-steps", "5",
        "--prompts-per-round", "4", "--samples-per-prompt", "8", "--eval-samples", "32",
        "--device", "cpu", "--out", str(tmp_path), "--learning-rate", "3e-4"])
    before, after = run.before["reward"], run.after["reward"]
    assert after.mean() - before.mean() > before.std()
