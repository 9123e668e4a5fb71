"""The chapters' scripts as users start them, and what they leave behind."""
import filecmp
import os
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from support import models, runs
from tests.equations.closed_forms import difference

ROOT = models.HERE
mdp, rewards = import_module("01_mdp"), import_module("02_rewards")
ddpo, dpok = import_module("03_ddpo"), import_module("04_dpok")
TINY = ["--rounds", "2", "--prompts-per-round", "2", "--samples-per-prompt", "3", "--num-steps",
        "3", "--eval-samples", "4", "--device", "cpu"]
FILES = {"config.json", "metrics.csv", "pictures.csv", "fresh.csv", "film", "film.png",
         "before_after.png", "reward.png", "evaluation.json"}


def names_in(folder):
    return {file.name for file in Path(folder).iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("script, words, said, files", [
    ("01_mdp", ["--num-steps", "3"], "ratio on replay", {"beliefs.png"}),
    ("02_rewards", ["--samples", "2", "--num-steps", "3"], "rank correlation", {"best_worst.png"}),
    ("03_ddpo", TINY, "gain", FILES), ("04_dpok", TINY, "path KL", FILES)])
def test_scripts_run_from_anywhere_into_a_log_without_greek(script, words, said, files, tmp_path):
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", *words], cwd=tmp_path, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"},
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and names_in(tmp_path) == {"runs"}
    (folder,) = (tmp_path / "runs").iterdir()
    assert files <= names_in(folder)


@pytest.mark.parametrize("script, words, weights", [
    (ddpo, ["--learning-rate", "1e-3"], "model/unet/diffusion_pytorch_model.safetensors"),
    pytest.param(dpok, ["--learning-rate", "1e-2"], models.ADAPTER, marks=pytest.mark.slow)])
def test_a_run_is_the_same_again_bit_for_bit_and_another_goes_on_from_it(script, words, weights,
                                                                         tmp_path):
    def start(*more):
        return script.main([*TINY, "--reward", "compressibility", "--out", str(tmp_path), *words,
                            "--prompts", "location", "--eta", "0.5", *more])

    torch.manual_seed(1)
    first = start()
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


# ---- the full model's settings --------------------------------------------------------------


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


ELSEWHERE = {  # flags that no run with a reward by formula reads
    *(field.name for field in fields(rewards.RewardFlags)),  # test_fuzz.py: --clip bytes
    "sd", "quick"}  # they choose the defaults, in flags.py


@pytest.fixture
def unread(monkeypatch):
    """Fields of a script's Config which nothing has read but the command line and config.json."""
    seen = set()

    def read(self, name):
        if Path(sys._getframe(1).f_code.co_filename).name not in ("flags.py", "dataclasses.py"):
            seen.add(name)
        return object.__getattribute__(self, name)

    for module in (mdp, rewards, ddpo, dpok):
        monkeypatch.setattr(module.Config, "__getattribute__", read)
    return lambda module: {field.name for field in fields(module.Config)} - seen


@pytest.mark.parametrize("script, words, folder, batch", [
    (mdp, "", "01_mdp", 1), (rewards, "--samples 2 --rewards compressibility", "02_rewards", 6),
    (ddpo, "--reward compressibility --rounds 1 --eval-samples 2 --prompts-per-round 4 "
     "--updates-per-round 1", "ddpo_is_compressibility_animals", 4),
    (dpok, "--reward compressibility --rounds 1 --eval-samples 2 --gold incompressibility",
     "dpok_compressibility_A_green_colored_rabbit", 8)])
def test_sd_runs_end_to_end_on_a_stand_in_and_every_flag_arrives(
        script, words, folder, batch, full_model, unread, tmp_path, monkeypatch):
    forward, sizes = UNet2DConditionModel.forward, {False: [], True: []}

    def measured(self, x, *more, **named):
        assert x.dtype == torch.bfloat16
        sizes[torch.is_grad_enabled()].append(len(x))
        return forward(self, x, *more, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", measured)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    run = script.main(["--sd", "--model", str(full_model), "--num-steps", "2", "--device", "cpu",
                       *words.split()])
    assert names_in("runs") == {folder}
    assert max(sizes[False]) == 2 * batch  # guidance looks at each picture twice
    assert unread(script) - ELSEWHERE == set()
    if script in (ddpo, dpok):
        assert max(sizes[True]) == 2 * 4  # --train-batch-size
        unet = models.load_run(run.folder, "cpu", "bfloat16")[0].unet
        adapters = [p.dtype for name, p in unet.named_parameters() if "lora_" in name]
        assert set(adapters) == {torch.float32}
        assert (run.config.ratio, run.config.lora_rank) == ("per_dim", 4)
        assert names_in(run.folder) == FILES | {models.ADAPTER}
        assert runs.read_rows(run.folder / "metrics.csv")[0]["grad_norm"] > 0


@pytest.mark.slow
def test_reward_rises_by_more_than_its_spread(tmp_path):
    run = ddpo.main([
        "--reward", "compressibility", "--prompts", "color", "--rounds", "8", "--num-steps", "5",
        "--prompts-per-round", "4", "--samples-per-prompt", "8", "--eval-samples", "32",
        "--device", "cpu", "--out", str(tmp_path), "--learning-rate", "3e-4"])
    before, after = run.before["reward"], run.after["reward"]
    assert after.mean() - before.mean() > before.std()
