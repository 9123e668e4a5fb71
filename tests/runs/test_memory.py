"""experiments/memory.py: what it counts on shapes alone is what a training then takes."""
import functools
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from support import flags, models
from tests import make_random_sd

mdp, ddpo = import_module("01_mdp"), import_module("03_ddpo")
memory = import_module("experiments.memory")
SMALL = ("--device cpu --batch-size 2 --train-batch-size 2 --prompts-per-round 1 "
         "--samples-per-prompt 3 --eval-samples 4 ")


def count(words, script="03_ddpo"):
    """Three dicts of parts: what stays, drawing, learning."""
    config = flags.parse(memory.SCRIPTS[script].Config, "", (SMALL + words).split())
    return memory.count(script, config).values()


@pytest.mark.parametrize("rank, dtype", [(0, "float32"), (0, "bfloat16"), (3, "bfloat16")])
def test_what_stays_is_the_size_of_all_weights_and_of_what_adamw_keeps(rank, dtype):
    pipe = models.load_pipeline("tiny_sd", "cpu", dtype)
    unet = pipe.unet.num_parameters() * (pipe.unet.dtype.itemsize if rank else 4)  # trained
    layers = [layer for name, layer in pipe.unet.named_modules() if name.endswith("to_q")]
    adapters = 4 * rank * sum(layer.in_features + layer.out_features for layer in layers)
    stays, *_ = count(f"--lora-rank {rank} --dtype {dtype} --lora-targets to_q", "sft")
    assert (stays["UNet"], stays["adapters"]) == (unet, adapters)
    assert stays["frozen copy of the UNet"] == (0 if rank else unet)
    assert stays["AdamW's two moments"] == 2 * (adapters or unet)


def test_a_batch_counts_its_rows_guidance_doubles_them_and_checkpointing_saves():
    first = {}
    for words in ("", "--train-batch-size 4 --batch-size 4", "--guidance-scale 3",
                  "--checkpointing"):
        _, drawing, learning = count("--lora-rank 2 " + words)
        first[words] = [max(learning.values()), *drawing.values()]
    one, two, guided, saving = first.values()
    assert 1.9 * one[0] < two[0] <= 2 * one[0] and 1.8 * one[1] < two[1] <= 2 * one[1]
    assert guided == two and saving[0] < one[0] / 2 and saving[1:] == one[1:]


@pytest.mark.equation("bytes of a round", "experiments.memory.trajectory_bytes")
def test_trajectories_take_what_a_rollouts_tensors_take(pipe):
    config = ddpo.Config(device="cpu", num_steps=3)
    trajectory = mdp.rollout(pipe, ["four stars"] * 3, config, "train")
    means, prompts = trajectory.means.nbytes, trajectory.prompt_embeds.nbytes
    whole = trajectory.latents.nbytes + means
    assert memory.trajectory_bytes(3, 3, (4, 8, 8)) == whole
    stays, *_ = count("--num-steps 3 --data fixed", "sft")  # two of them, and a reference's means
    assert stays["a round's trajectories"] == 2 * (whole + prompts) + means


def test_weights_of_learned_rewards_are_as_large_as_their_files_or_named_if_not_here(pipe):
    stays, *_ = count("--reward alignment=1,aesthetic=2 --gold vlm_alignment --vlm judge "
                      "--clip nobody/clip", "04_dpok")
    for name, file in (("aesthetic: tiny_sd/aesthetic.safetensors", "aesthetic.safetensors"),
                       ("vlm_alignment: tiny_sd", "text_encoder/model.safetensors")):
        assert stays[name] == (models.HERE / "tiny_sd" / file).stat().st_size
    assert stays["aesthetic: nobody/clip"] is None and "vlm_alignment: judge" not in stays
    stays, *_ = count("--value-rounds 1", "04_dpok")
    V = memory.dpok.Value(pipe, memory.dpok.Config()).parameters()
    assert stays["value function, moments, latest rounds"] == 3 * memory.bytes_of(V)


def write_shapes(folder):
    """A model's folder with the configs of Stable Diffusion v1.5, and no weights."""
    with torch.device("meta"):
        unet = make_random_sd.make_unet()
        make_random_sd.make_vae().save_config(folder / "vae")
    unet.save_config(folder / "unet")
    make_random_sd.make_text_encoder().config.save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text("{}")
    return str(folder)


def test_the_full_models_shapes_are_counted_as_they_were_measured(tmp_path, capsys):
    words = "03_ddpo.py --sd --dtype float32 --no-checkpointing --device cpu --model".split()
    _, drawing, learning = memory.main([*words, write_shapes(tmp_path)]).values()
    assert max(learning.values()) == pytest.approx(12.8e9, rel=0.05)  # 4 pictures, with guidance
    report = capsys.readouterr().out
    assert "3.438  UNet" in report and "not here: aesthetic: openai/clip-vit-large" in report


TRAINING = ("03_ddpo.py --device cpu --rounds 1 --updates-per-round 1 --prompts-per-round 1 "
            "--samples-per-prompt 64 --film-pictures 1 --reward compressibility --num-steps ")
LEARN = "8 --eval-samples 2 --batch-size 8 --train-batch-size "
RUN = """import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(open("/proc/self/status").read())"""
# Freed memory goes back at once, so that what is used is what is alive.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@functools.cache
def counted_and_measured(words, folder):
    """Bytes that are counted, and the most that a process of 03 had, its libraries included."""
    words = [*TRAINING.split(), *words.split(), "--out", str(folder)]
    done = subprocess.run([sys.executable, "-c", RUN, *words], env=os.environ | MALLOC, check=True,
                          cwd=models.HERE, stdout=subprocess.PIPE, text=True)
    peak = re.search(r"VmHWM:\s+(\d+)", done.stdout)
    return memory.total(memory.main(words)), 1024 * int(peak[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's account of memory")
@pytest.mark.parametrize("words", [
    LEARN + "256", LEARN + "512 --checkpointing --lora-rank 4",
    "2 --train-batch-size 8 --batch-size 512 --eval-samples 512"])
def test_a_process_takes_as_much_more_memory_as_was_counted(words, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    least, least_measured = counted_and_measured(LEARN + "8", folder)
    counted, measured = counted_and_measured(words, folder)
    assert measured - least_measured == pytest.approx(counted - least, rel=0.2)
