"""--plan: what is counted on shapes alone is what is then used."""
import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support import models, plan, training
from tests import make_random_sd

mdp, rewards = import_module("01_mdp"), import_module("02_rewards")
ddpo, dpok = import_module("03_ddpo"), import_module("04_dpok")
sft, penalties = import_module("experiments.sft"), import_module("experiments.penalties")
SMALL = dict(device="cpu", batch_size=2, train_batch_size=2, prompts_per_round=1,
             samples_per_prompt=3, eval_samples=4)


def size_of(*modules):
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


# ---- counted, in closed form ----------------------------------------------------------------


@pytest.mark.parametrize("rank, dtype", [(0, "float32"), (0, "bfloat16"), (3, "bfloat16")])
def test_what_stays_is_the_size_of_all_weights_and_of_what_adamw_keeps(rank, dtype):
    config = ddpo.Config(**SMALL, lora_rank=rank, dtype=dtype)
    pipe = models.load_pipeline("tiny_sd", "cpu", dtype)
    unet = size_of(pipe.unet) if rank else 4 * pipe.unet.num_parameters()  # trained in float32
    adapters = 0
    for name, layer in pipe.unet.named_modules():
        if rank and name.endswith(models.ATTENTION):
            adapters += 4 * rank * (layer.in_features + layer.out_features)
    trained = adapters or unet
    found = plan.count(config, reference=True)
    prompts = (3 + 4) * 16 * 64 * pipe.text_encoder.dtype.itemsize
    assert found.stays == {
        "UNet": unet, "VAE": size_of(pipe.vae), "text encoder": size_of(pipe.text_encoder),
        "adapters": adapters, "frozen copy of the UNet": 0 if rank else unet,
        "AdamW's two moments": 2 * trained, "encoded prompts": prompts}
    assert found.gradients == found.learning["a step of AdamW"] == trained


def counted(guided=True, **changes):
    """Bytes of a training batch, a step, a drawing batch, a decoder's batch."""
    found = plan.count(ddpo.Config(**SMALL | {"lora_rank": 2} | changes), guided=guided)
    return [*found.learning.values(), *found.drawing.values()]


def test_each_batch_counts_its_rows_guidance_doubles_them_and_checkpointing_saves():
    learn, step, draw, decode = counted()
    learn_4, _, draw_4, _ = counted(train_batch_size=4, batch_size=4)
    assert 1.9 * learn < learn_4 <= 2 * learn and 1.9 * draw < draw_4 <= 2 * draw
    assert counted(guidance_scale=3.0) == [learn_4, step, draw_4, decode]
    assert counted(guided=False, guidance_scale=3.0) == [learn, step, draw_4, decode]
    saving = counted(checkpointing=True)
    assert saving[0] < learn / 2 and saving[1:] == [step, draw, decode]
    half = counted(dtype="bfloat16")  # but adapters are trained in float32, on inputs in float32
    assert learn / 2 < half[0] < learn and half[1] == step
    assert half[2:] == pytest.approx([draw / 2, decode / 2], rel=1e-3)


@pytest.mark.equation("bytes of a round", "support.plan.trajectory_bytes")
def test_trajectories_take_what_a_rollouts_tensors_take(pipe):
    config = ddpo.Config(device="cpu", num_steps=3)
    chain = mdp.rollout(pipe, ["four stars"] * 5, config, (0, "train", 0))
    one, means = chain.latents.nbytes + chain.means.nbytes, chain.means.nbytes
    for chains in (1, 2):
        assert plan.trajectory_bytes(5, 3, (4, 8, 8), chains) == chains * one
        assert plan.trajectory_bytes(5, 3, (4, 8, 8), chains, True) == chains * one + means
    config = replace(config, prompts_per_round=5, samples_per_prompt=1)
    assert plan.count(config, reference=True, chains=2).trajectories == 2 * one + means


def test_the_value_function_counts_its_weights_its_moments_and_a_fit():
    found = plan.count(dpok.Config(**SMALL), value=True)
    assert found.stays["value function, with moments"] == 3 * size_of(models.ValueNet(4, 64))
    assert found.stays["frozen copy of the UNet"] == 0
    fit = found.drawing["fitting the value function"]
    # Kept of the first two layers and of their nonlinearities, for 256 states of 64 channels.
    assert 2 * 256 * 64 * 4 * (64 + 16) < fit < 4 * 256 * 64 * 4 * (64 + 16)


def test_the_total_is_the_worst_moment_and_a_card_fits_it_or_not():
    found = plan.Plan(stays={"a": 10, "b": 5}, drawing={"c": 7, "d": 2}, gradients=3,
                      learning={"e": 1, "f": 2}, trajectories=1000, missing=())
    assert found.total() == 10 + 5 + 7
    assert replace(found, gradients=6).total() == 10 + 5 + 6 + 2
    wanted = {24e9: (24, 40, 80), 24e9 + 1: (40, 80), 40e9 + 1: (80,), 80e9 + 1: ()}
    for total, cards in wanted.items():
        assert plan.fits(total) == {card: card in cards for card in (24, 40, 80)}


# ---- how it is counted ----------------------------------------------------------------------


def test_the_peak_counts_tensors_once_while_they_live_and_no_weights():
    layer = nn.Linear(10, 10, bias=False, device="meta")
    layer.weight.grad = torch.zeros_like(layer.weight)
    with plan.Peak(layer) as peak:
        x = torch.empty(100, device="meta")
        assert (peak.alive, peak.most) == (400, 400)
        views = x.view(10, 10)[2:], layer.weight.t(), layer.weight.grad.view(-1)
        x.add_(1)
        layer.weight.grad.add_(layer.weight)
        assert peak.alive == 400
        y = x * x
        assert (peak.alive, peak.most) == (800, 800)
        del x
        assert peak.alive == 800  # a view still holds it
        del views
        assert (peak.alive, peak.most) == (400, 800)
        del y
    assert (peak.alive, peak.most) == (0, 800)


def test_attention_is_counted_as_the_fused_one_which_keeps_no_matrix_of_all_pairs():
    plain, N = F.scaled_dot_product_attention, 512
    q, k, v = (torch.empty(2, 4, N, 8, device="meta", requires_grad=True) for _ in range(3))
    most = {}
    for name in ("plain", "fused"):
        with plan.Peak(nn.Identity()) as peak:
            if name == "plain":
                out = F.scaled_dot_product_attention(q, k, v)
            else:
                with plan.fused_attention():
                    out = F.scaled_dot_product_attention(q, k, v)
            assert out.shape == v.shape
            most[name] = peak.most
    pairs = 4 * 2 * 4 * N * N
    assert most["fused"] == v.nbytes + 4 * 2 * 4 * N < pairs <= most["plain"]
    assert F.scaled_dot_product_attention is plain


# ---- learned rewards, and where configs are --------------------------------------------------


def test_weights_of_learned_rewards_are_counted_if_they_are_here_and_named_if_not():
    flags = rewards.RewardFlags()
    networks = {
        "aesthetic": (rewards.Aesthetic, "clip mlp"),
        "image_reward": (rewards.ImageReward, "model"),
        "vlm_strict": (rewards.VlmStrict, "ask.model"),
        "vlm_alignment": (rewards.VlmAlignment, "ask.model encode.model")}
    sizes = {}
    for name, (kind, parts) in networks.items():
        scorer = kind(flags, "cpu")
        sizes[name] = 0
        for part in parts.split():
            module = scorer
            for attribute in part.split("."):
                module = getattr(module, attribute)
            sizes[name] += size_of(module)
        found, missing = plan.reward_bytes(ddpo.Config(device="cpu", reward=name))
        assert (sum(found.values()), missing) == (pytest.approx(sizes[name], rel=1e-2), ())
    (on_cpu, _), (on_gpu, _) = [plan.reward_bytes(ddpo.Config(device=device, reward="vlm_strict"))
                                for device in ("cpu", "cuda")]
    assert sum(on_cpu.values()) == 2 * sum(on_gpu.values())  # LLaVA in half precision there
    config = dpok.Config(device="cpu", reward="alignment=1,aesthetic=0.2", gold="vlm_alignment",
                         clip="nobody/clip", vlm="judge")
    found, missing = plan.reward_bytes(config)
    assert list(found) == ["reward aesthetic: tiny_sd/aesthetic.safetensors",
                           "reward vlm_alignment: tiny_sd"]
    assert missing == ("nobody/clip",)


def test_configs_are_found_in_a_folder_a_run_the_model_of_a_run_or_on_the_hub(tmp_path):
    for name, start in (("lora", "whole"), ("whole", "tiny_sd")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text("{}")
        settings = {"model": str(tmp_path / start)}
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    (tmp_path / "lora" / models.ADAPTER).write_text("")
    assert plan.find_source("tiny_sd").resolve() == models.HERE / "tiny_sd"
    assert plan.find_source(tmp_path / "whole") == tmp_path / "whole" / "model"
    assert plan.find_source(tmp_path / "lora") == tmp_path / "whole" / "model"
    assert plan.find_source("owner/name") == "owner/name"


def test_a_model_that_is_not_there_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="--model no_such_model: ") as error:
        plan.read_networks("no_such_model", "float32")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("script, has", [
    (ddpo, set()), (dpok, {"value function, with moments", "frozen copy of the UNet"}),
    (penalties, {"value function, with moments", "frozen copy of the UNet"}),
    (sft, {"frozen copy of the UNet"})])
def test_scripts_print_their_plan_and_do_nothing_else(script, has, tmp_path, capsys, monkeypatch):
    rows, count_training = [], plan.training_peak
    monkeypatch.setattr(models, "load_pipeline", None)  # no weights
    monkeypatch.setattr(plan, "training_peak",
                        lambda pipe, n: rows.append(n) or count_training(pipe, n))
    found = script.main(["--plan", "--out", str(tmp_path / "runs"), "--lora-rank", "0",
                         "--guidance-scale", "2", "--device", "cpu"])
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    parts = {"value function, with moments", "frozen copy of the UNet"}
    assert {part for part in parts if part in said} == has
    assert f"{found.total() / 1e9:.3f}  on the device" in said
    assert "A card of 24 GB: enough, 40 GB: enough, 80 GB: enough" in said
    # B pictures, T = 10 steps: own latents and means, with a reference its means, sft's pictures.
    B, latents = {ddpo: (128, 21), sft: (64, 10 + 2 * 21)}.get(script, (64, 10 + 21))
    assert found.trajectories == 4 * 256 * B * latents
    assert rows == [64 if script is sft else 128]  # only sft trains without guidance


# ---- the full model's shapes -----------------------------------------------------------------


def test_the_random_model_has_the_shapes_of_v15_whose_activations_were_measured(monkeypatch):
    with torch.device("meta"):
        parts = dict(unet=make_random_sd.make_unet(), vae=make_random_sd.make_vae(),
                     text_encoder=make_random_sd.make_text_encoder())
    sizes = {name: part.num_parameters() for name, part in parts.items()}
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    tokenizer = make_random_sd.make_tokenizer()
    ids = tokenizer("A green colored rabbit").input_ids
    assert len(tokenizer) == 49408 and len(ids) == 21  # a token each letter, and two ends
    assert (ids[0], ids[-1], tokenizer.decode(ids[1:-1])) == (49406, 49407,
                                                              "a green colored rabbit")
    pipe = SimpleNamespace(**parts)
    for part in parts.values():
        part.requires_grad_(False).eval()
    models.trainable(pipe, ddpo.Config(lora_rank=4))
    # 4 pictures with guidance in float32, and one decoded picture: 12.8 and 0.8 GB.
    assert plan.training_peak(pipe, 8) / 1e9 == pytest.approx(12.8, rel=0.05)
    assert plan.decoding_peak(pipe) / 1e9 == pytest.approx(0.8, rel=0.05)


def test_no_larger_batch_is_counted_than_a_round_has():
    steps = ddpo.Config().num_steps
    assert counted(train_batch_size=10**6, batch_size=10**6) == counted(
        train_batch_size=3 * steps, batch_size=4)


# ---- measured -------------------------------------------------------------------------------

ROWS = 256
QUANTITIES = ("drawing", "decoding", "all weights", "all weights, checkpointing", "adapters")


def status(name):
    """Bytes in a line of Linux's /proc/self/status: VmRSS, what is used; VmHWM, the most so far."""
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(name):
            return 1024 * int(row.split()[1])


def peak_of(function):
    """The most memory that the process had during a call, minus what it had before."""
    Path("/proc/self/clear_refs").write_text("5")  # the largest so far becomes the present one
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def measure():
    """Prints name of quantity -> bytes, each after the same at batch size 1."""
    measured = {}
    pipe = models.load_pipeline("tiny_sd", "cpu")
    pipe.scheduler.set_timesteps(2)
    c = models.encode_prompts(pipe, ["four stars"])
    x_t = training.gaussian((ROWS, *models.latent_shape(pipe)), 0, "train")

    @torch.no_grad()
    def draw(rows):
        mdp.policy(pipe, x_t[:rows], torch.tensor(501), c.expand(rows, -1, -1), None, ddpo.Config())

    for name, function, rows in (("drawing", draw, ROWS),
                                 ("decoding", lambda n: models.decode(pipe, x_t[:n]), 16)):
        function(1)
        measured[name] = peak_of(lambda: function(rows))

    def learn(rows, pipe, config):
        n = max(1, rows // 2)  # pictures, of two steps each
        latents, means = x_t.expand(3, *x_t.shape)[:, :n], x_t.expand(2, *x_t.shape)[:, :n]
        chain = mdp.Trajectory(latents.transpose(0, 1), means.transpose(0, 1), torch.zeros(n, 2),
                               pipe.scheduler.timesteps, c.expand(n, -1, -1), None, [], [])
        config = replace(config, train_batch_size=rows)
        ddpo.accumulate(pipe, chain, torch.ones(n, 2), torch.arange(n), config, 0)

    for name in QUANTITIES[2:]:
        pipe = models.load_pipeline("tiny_sd", "cpu")
        pipe.scheduler.set_timesteps(2)
        config = settings_of(name)
        params = models.trainable(pipe, config)
        learn(1, pipe, config)
        measured[name] = peak_of(lambda: learn(ROWS, pipe, config))
        assert all(p.grad is not None for p in params)
    print(json.dumps(measured))


def settings_of(name):
    return ddpo.Config(batch_size=ROWS, train_batch_size=ROWS, device="cpu", num_steps=2,
                       samples_per_prompt=ROWS // 8,  # so that a batch can be so large
                       lora_rank=4 if name == "adapters" else 0,
                       checkpointing="checkpointing" in name)


@pytest.fixture(scope="module")
def measured():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's account of a process's memory")
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(models.HERE),
           # Freed memory goes back at once, so that what is used is what is alive.
           "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    code = "from tests.support.test_plan import measure; measure()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=os.environ | env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


count = functools.cache(plan.count)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTITIES)
def test_a_process_takes_as_much_memory_as_was_counted(name, measured):
    found = count(settings_of(name))
    counted = {"drawing": found.drawing["the UNet on a batch"],
               "decoding": found.drawing["the VAE's decoder"]}
    counted = counted.get(name, found.learning["activations of a batch"])
    print(f"{name}: counted {counted / 1e6:.1f} MB, measured {measured[name] / 1e6:.1f} MB")
    assert measured[name] == pytest.approx(counted, rel=0.2)
