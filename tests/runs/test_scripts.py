"""The scripts as users start them, what they leave behind, and what bad input gets."""
import filecmp
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (AutoencoderKL, PNDMScheduler, StableDiffusionPipeline,
                       UNet2DConditionModel)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from support import flags, models, runs

ROOT = models.HERE
mdp, rewards = import_module("01_mdp"), import_module("02_rewards")
ddpo, dpok = import_module("03_ddpo"), import_module("04_dpok")
TINY = ["--rounds", "2", "--prompts-per-round", "2", "--samples-per-prompt", "3", "--num-steps",
        "3", "--eval-samples", "4", "--device", "cpu"]
FILES = {"config.json", "metrics.csv", "film.png", "before_after.png", "reward.png",
         "evaluation.json"}


def names_in(folder):
    return {file.name for file in Path(folder).iterdir()}


def difference(images, others):
    """Mean difference of a pixel, of 255, between two lists of pictures."""
    pairs = zip(images, others, strict=True)
    return np.mean([np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs])


# ---- each script, from another directory ----------------------------------------------------


@pytest.mark.parametrize("script, words, said, files", [
    ("01_mdp", ["--num-steps", "3"], "Scored in a batch of its own", {"01_mdp/beliefs.png"}),
    ("02_rewards", ["--samples", "2", "--num-steps", "3", "--show", "3"], "rank correlation",
     {"02_rewards/best_worst.png"}),
    ("03_ddpo", [*TINY, "--name", "a"], "gain", {f"a/{name}" for name in FILES}),
    ("04_dpok", [*TINY, "--name", "a", "--prompts", "tasks"], "path KL",
     {f"a/{name}" for name in FILES})])
def test_scripts_run_from_anywhere_into_a_log_without_greek(script, words, said, files, tmp_path):
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", *words], cwd=tmp_path, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"},
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    for file in files:
        assert (tmp_path / "runs" / file).stat().st_size > 100, file
    assert names_in(tmp_path) == {"runs"}


# ---- what a run is --------------------------------------------------------------------------


def start(script, out, *words):
    return script.main([*TINY, "--reward", "compressibility", "--out", str(out), *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run that trained all weights, and one that trained adapters."""
    out = tmp_path_factory.mktemp("runs")
    return {"all": start(ddpo, out, "--name", "all", "--learning-rate", "1e-3"),
            "lora": start(dpok, out, "--name", "lora", "--learning-rate", "1e-2")}


@pytest.mark.parametrize("name", ["all", "lora"])
def test_a_finished_run_has_its_files(name, finished):
    run = finished[name]
    weights = {"all": "model", "lora": models.ADAPTER}[name]
    assert names_in(run.folder) == FILES | {weights}
    for picture in ("film.png", "before_after.png", "reward.png"):
        assert (run.folder / picture).stat().st_size > 5000
    rows = runs.read_rows(run.folder / "metrics.csv")
    assert [(row["round"], row["queries"]) for row in rows] == [(1, 6), (2, 12)]


@pytest.mark.parametrize("script, words", [(ddpo, []), (dpok, ["--lora-rank", "2"])])
def test_the_same_seed_is_the_same_run_bit_for_bit(script, words, tmp_path):
    torch.manual_seed(1)
    first = start(script, tmp_path, *words)
    torch.manual_seed(2)  # nothing hangs on torch's own generator, nor on the UNet's batches
    again, other = start(script, tmp_path, *words), start(script, tmp_path, *words, "--seed", "1")

    for row in first.rows + again.rows + other.rows:
        del row["seconds"]
    assert first.rows == again.rows != other.rows
    for side in ("before", "after"):
        mine, its, others = [getattr(run, side) for run in (first, again, other)]
        assert torch.equal(mine["reward"], its["reward"])
        assert difference(mine["images"], its["images"]) == 0
        assert difference(mine["images"], others["images"]) > 1
    weights = "model/unet/diffusion_pytorch_model.safetensors" if script is ddpo else models.ADAPTER
    assert filecmp.cmp(first.folder / weights, again.folder / weights, shallow=False)
    assert not filecmp.cmp(first.folder / weights, other.folder / weights, shallow=False)


@pytest.mark.parametrize("name", ["all", "lora"])
def test_what_is_saved_draws_the_runs_own_pictures(name, finished):
    """Loaded by diffusers alone, as somebody would who has never seen this project."""
    run = finished[name]
    source = run.folder / "model" if name == "all" else ROOT / "tiny_sd"
    pipe = StableDiffusionPipeline.from_pretrained(source, safety_checker=None).to(torch.float32)
    if name == "lora":
        pipe.load_lora_weights(run.folder)
    noise = (run.config.seed, "evaluate", 0)
    images = mdp.rollout(pipe, run.after["prompts"], run.config, noise).images
    assert difference(images, run.after["images"]) < 0.1
    assert difference(images, run.before["images"]) > 1


@pytest.mark.parametrize("name", ["all", "lora"])
def test_another_training_goes_on_from_a_finished_run(name, finished, tmp_path):
    run, script = finished[name], {"all": ddpo, "lora": dpok}[name]
    after = start(script, tmp_path, "--model", str(run.folder))
    assert difference(after.before["images"], run.after["images"]) < 0.1
    if name == "lora":  # which is its reference, too
        assert after.before["kl"].max() < 1e-6 < after.after["kl"].min()


FLAGS = ["--seed 1", "--eta 0.5", "--guidance-scale 2", "--num-steps 3", "--prompts circles"]


@pytest.mark.parametrize("script, words", [
    (mdp, []), (rewards, ["--rewards", "compressibility", "--samples", "2"])])
def test_every_flag_of_chapters_1_and_2_changes_what_is_drawn(script, words, tmp_path, monkeypatch,
                                                              capsys):
    monkeypatch.chdir(tmp_path)
    outputs = set()
    for flag in ["", "--batch-size 64", *FLAGS]:
        changed = [word.replace("circles", "two red circles") for word in flag.split()]
        script.main(["--num-steps", "2", *words, *changed])
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 1 + len(FLAGS)  # a batch size changes nothing


@pytest.mark.parametrize("script", [ddpo, dpok])
def test_no_call_of_the_unet_is_larger_than_the_batch_size(script, tmp_path, monkeypatch):
    forward, sizes = UNet2DConditionModel.forward, []

    def watched(self, sample, *arguments, **named):
        sizes.append(len(sample))
        return forward(self, sample, *arguments, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    start(script, tmp_path, "--batch-size", "4", "--rounds", "1")
    assert max(sizes) == 4


# ---- the full model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_model(tmp_path_factory):
    """A folder laid out as Stable Diffusion v1.5's is, with few and random weights."""
    folder = tmp_path_factory.mktemp("full") / "model"
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "tiny_sd/tokenizer", model_max_length=77)
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, sample_size=16)
    unet = UNet2DConditionModel(
        sample_size=8, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], block_out_channels=[8, 16],
        layers_per_block=1, cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        skip_prk_steps=True, set_alpha_to_one=False)
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("script, words", [
    (mdp, []), (rewards, ["--samples", "2", "--rewards", "compressibility"]),
    (ddpo, ["--reward", "compressibility", "--prompts-per-round", "4"]),
    (dpok, ["--reward", "compressibility", "--gold", "incompressibility"])])
def test_sd_runs_end_to_end_on_a_stand_in(script, words, full_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if script in (ddpo, dpok):
        words = [*words, "--rounds", "1", "--eval-samples", "2"]
    run = script.main(["--sd", "--model", str(full_model), "--num-steps", "2", "--device", "cpu",
                       *words])
    assert names_in("runs") == {
        mdp: {"01_mdp"}, rewards: {"02_rewards"}, ddpo: {"ddpo_is_compressibility_animals"},
        dpok: {"dpok_compressibility_A_green_colored_rabbit"}}[script]
    if script in (ddpo, dpok):
        assert (run.config.ratio, run.config.lora_rank) == ("per_dim", 4)
        assert names_in(run.folder) == FILES | {models.ADAPTER}
        assert run.rows[0]["grad_norm"] > 0


# ---- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("script, words, named", [
    (mdp, "--num-stps 3", "--num-stps"), (mdp, "--num-steps 2000", "--num-steps"),
    (mdp, "--eta 0", "--eta"), (mdp, "--out x.txt", "--out x.txt"), (mdp, "--prompts", "--prompts"),
    (mdp, "--model nowhere", "--model nowhere"), (rewards, "--rewards beauty", "--rewards beauty"),
    (rewards, "--samples 0", "--samples"), (ddpo, "--rounds", "--rounds"),
    (ddpo, "--reward beauty", "--reward beauty"), (ddpo, "--reward my.py:no", "--reward my.py:no"),
    (ddpo, "--reward my.py:few", "1 numbers for 4"), (ddpo, "--reward my.py:breaks", "my.py:4"),
    (ddpo, "--prompts none.txt", "--prompts none.txt"), (ddpo, "--eta 0", "--eta"),
    (ddpo, "--prompts EMPTY", "--prompts EMPTY"), (ddpo, "--prompts my.py", "'def'"),
    (ddpo, "--samples-per-prompt 1", "--samples-per-prompt"),
    (ddpo, "--updates-per-round 7", "--updates-per-round"),
    (ddpo, "--estimator sf --updates-per-round 2", "--estimator sf"),
    (ddpo, "--estimator both", "--estimator"), (ddpo, "--learning-rate nan", "--learning-rate"),
    (ddpo, "--learning-rate 1e30", "--learning-rate"), (ddpo, "--name taken", "--name taken"),
    (ddpo, "--out EMPTY", "--out EMPTY"), (ddpo, "--device abacus", "--device abacus"),
    (ddpo, f"--seed {2**32}", "--seed"), (dpok, "--gold beauty", "--gold beauty"),
    (dpok, "--beta -1", "--beta"), (dpok, "--samples-per-prompt 1", "--samples-per-prompt"),
    (dpok, "--updates-per-round 7", "--updates-per-round"), (dpok, "--value maybe", "maybe"),
    (dpok, "--lora-targets nonsense", "--lora-targets"), (dpok, "--name taken", "--name taken")])
def test_bad_input_gets_one_message_and_does_no_harm(script, words, named, tmp_path, monkeypatch,
                                                     capsys):
    """The message names the flag or the file; tyro's own, about flags, are longer than a line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("EMPTY").write_text("\n \n")
    Path("my.py").write_text("def few(images, prompts):\n    return [1]\n"
                             "def breaks(images, prompts):\n    return 1 // 0\n")
    Path("runs/taken").mkdir(parents=True)
    Path("runs/taken/config.json").write_text("precious")

    def files():
        return {file: file.read_bytes() for file in Path().rglob("*.*") if file.suffix != ".pyc"}

    before = files()
    tiny = TINY if script in (ddpo, dpok) else []
    with pytest.raises(SystemExit) as exit:
        flags.run(lambda: script.main([*tiny, *words.split()]))
    message = capsys.readouterr().err.replace("training:", "\ntraining:")
    lines = [line for line in message.splitlines() if line and "training:" not in line]
    assert exit.value.code == 2 and named in message and "Traceback" not in message
    assert len(lines) == 1 or "full helptext" in message, message
    if "1e30" not in words:  # that one is found out in its second round
        assert files() == before and names_in("runs") <= {"taken", "01_mdp", "02_rewards"}


# ---- learning -------------------------------------------------------------------------------


@pytest.mark.parametrize("script, words", [
    (ddpo, "--estimator is --learning-rate 3e-4"), (ddpo, "--estimator sf --learning-rate 3e-4"),
    (dpok, "--alpha 20 --learning-rate 5e-3")])
def test_reward_rises_by_more_than_its_spread(script, words, tmp_path):
    run = script.main([
        "--reward", "compressibility", "--prompts", "color", "--rounds", "8", "--num-steps", "5",
        "--prompts-per-round", "4", "--samples-per-prompt", "8", "--eval-samples", "32",
        "--device", "cpu", "--out", str(tmp_path), *words.split()])
    before, after = run.before["reward"], run.after["reward"]
    assert after.mean() - before.mean() > before.std()
    assert run.rows[-1]["reward"] - run.rows[0]["reward"] > 2 * run.rows[0]["reward_se"]
