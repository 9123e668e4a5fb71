"""Loading, prompts, adapters, the reference model, saving."""
import copy
import json
import shutil
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from support import models, training
from support import reward_models as nets


def settings(**values):
    usual = {"lora_rank": 0, "seed": 0, "lora_targets": models.ATTENTION, "checkpointing": False}
    return SimpleNamespace(**usual | values)


@pytest.fixture
def own(pipe):
    """A model of one's own, which may be changed."""
    return copy.deepcopy(pipe)


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny model's folder, which may be changed."""
    skip = shutil.ignore_patterns("clip", "vlm", "image_reward", "*.py", "aesthetic*")
    return shutil.copytree(models.HERE / "tiny_sd", tmp_path / "model", ignore=skip)


def edit(file, **new):
    """Changes a JSON file; None takes a key out."""
    content = json.loads(file.read_text()) | new
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def run_unet(pipe):
    x = training.gaussian((2, *models.latent_shape(pipe)), 1, "train")
    c = models.encode_prompts(pipe, ["a red circle", "four stars"])
    return pipe.unet(x, torch.tensor([501, 1]), encoder_hidden_states=c).sample


predict = torch.no_grad()(run_unet)


def train_a_little(pipe, params):
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    for _ in range(3):
        run_unet(pipe).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- loading --------------------------------------------------------------------------------


def test_only_the_unet_can_learn(own):
    for frozen in (own.vae, own.text_encoder):
        assert not any(p.requires_grad for p in frozen.parameters())
    assert not (own.unet.training or own.vae.training or own.text_encoder.training)
    params = models.trainable(own, settings())  # rank 0: all of it
    assert {id(p) for p in params} == {id(p) for p in own.unet.parameters()}


def test_what_is_trained_is_float32_and_the_rest_as_asked(own):
    own.to(torch.bfloat16)
    params = models.trainable(own, settings(lora_rank=2))
    assert {p.dtype for p in params} == {torch.float32}
    assert own.unet.conv_in.weight.dtype == own.vae.dtype == torch.bfloat16
    assert {p.dtype for p in models.trainable(own, settings())} == {torch.float32}


def test_settings_left_out_of_the_schedulers_file_stay_those_of_latent_diffusion(folder):
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(
        {"_class_name": "PNDMScheduler", "beta_start": 0.001, "prediction_type": "v_prediction"}))
    edit(folder / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    config = models.load_pipeline(folder, "cpu").scheduler.config
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)
    assert (config.beta_start, config.prediction_type) == (0.001, "v_prediction")
    edit(folder / "scheduler/scheduler_config.json", set_alpha_to_one=True)  # which is refused
    assert models.load_pipeline(folder, "cpu").scheduler.config.set_alpha_to_one


def half_precision_alone(folder):
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))


def no_maximal_length(folder):
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=None)


def no_feature_extractor(folder):
    edit(folder / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])


@pytest.mark.parametrize("change", (half_precision_alone, no_maximal_length, no_feature_extractor))
def test_folders_as_they_are_found_load_as_the_same_model(change, folder, pipe, monkeypatch):
    monkeypatch.setattr(models, "hub_answers", None)  # what is here asks nobody
    change(folder)
    assert torch.equal(predict(models.load_pipeline(folder, "cpu")), predict(pipe))


def flow_matching(folder):
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])


def pickled(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def without_a_weight(folder, part="unet"):
    path, = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    weights.pop(max(weights))
    save_file(weights, path, {"format": "pt"})


def one_file(folder):
    shutil.rmtree(folder)
    folder.write_text("x")


@pytest.mark.parametrize("change, named", (
    (flow_matching, "flow matching"), (pickled, "safetensors"), (one_file, "diffusers' format"),
    (lambda folder: shutil.rmtree(folder / "tokenizer"), "lack its tokenizer's words"),
    (without_a_weight, "lack up_blocks"),
    (partial(without_a_weight, part="text_encoder"), "lack final_layer_norm")))
def test_what_is_no_such_model_is_named_in_one_line(change, named, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    change(folder)
    with pytest.raises(ValueError, match=f"--model .*model: .*{named}") as error:
        models.load_pipeline(str(folder), "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("unet, scheduler, named", (
    (dict(addition_embed_type="text_time"), {}, "addition_embed_type"),
    (dict(class_embed_type="timestep"), {}, "class_embed_type"),
    (dict(in_channels=9), {}, "in_channels is 9"),
    (dict(out_channels=8), {}, "out_channels is 8"), (dict(sample_size=None), {}, "sample_size"),
    ({}, dict(prediction_type="flow"), "prediction_type"),
    ({}, dict(thresholding=True), "thresholding"), ({}, dict(clip_sample=True), "clip_sample"),
    ({}, dict(timestep_spacing="linspace"), "linspace"),
    ({}, dict(rescale_betas_zero_snr=True), "zero_snr")))
def test_a_model_for_which_the_equations_do_not_hold_is_refused(unet, scheduler, named, pipe):
    models.check_pipeline(pipe)
    config = type(pipe.unet.config)(dict(pipe.unet.config) | unet)
    other = SimpleNamespace(unet=SimpleNamespace(config=config),
                            scheduler=DDIMScheduler.from_config(pipe.scheduler.config, **scheduler))
    with pytest.raises(ValueError, match=named):
        models.check_pipeline(other)


@pytest.mark.parametrize("load", [
    lambda: models.load_pipeline("nobody/nothing", "cpu"), lambda: nets.load_clip("nobody/nothing"),
    lambda: nets.load_laion_mlp("nobody/nothing/file.pt", 8),
    lambda: nets.load_vlm("nobody/nothing", "cpu"),
    lambda: nets.TokenEncoder("nobody/nothing", None, "cpu")])
def test_without_a_hub_an_unknown_name_fails_at_once_and_says_why(load, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    models.hub_answers.cache_clear()
    started = time.perf_counter()
    with pytest.raises(ValueError, match="^--.* nobody/nothing.* does not answer") as error:
        load()
    models.hub_answers.cache_clear()
    assert time.perf_counter() - started < 5 and "\n" not in str(error.value)


# ---- prompts and pictures -------------------------------------------------------------------


def test_latent_prompt_and_picture_are_as_diffusers_has_them(pipe):
    wide = SimpleNamespace(sample_size=(6, 10), in_channels=3)
    assert models.latent_shape(SimpleNamespace(unet=SimpleNamespace(config=wide))) == (3, 6, 10)
    c = models.encode_prompts(pipe, ["two blue squares", "two blue squares", ""])
    ids = pipe.tokenizer(["two blue squares", ""], padding="max_length", return_tensors="pt")
    expected = pipe.text_encoder(ids.input_ids)[0][[0, 0, 1]]
    torch.testing.assert_close(c, expected, rtol=0, atol=1e-6)
    x_0 = training.gaussian((19, 4, 8, 8), 0, "train")  # 16 and 3 at a time
    images = models.decode(pipe, x_0)
    with torch.no_grad():
        pixels = pipe.vae.decode(x_0 / pipe.vae.config.scaling_factor).sample
    for image, wanted in zip(images, pixels, strict=True):
        found = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        assert (found - wanted.clamp(-1, 1)).abs().max() < 0.51 / 127.5


@pytest.mark.parametrize("prompt, named", [
    ("a purple cat", "'cat' in 'a purple cat'"), ("a 🙂", "'🙂'"),
    (" and ".join(["a red circle"] * 4), "17 tokens, 16 are allowed")])
def test_prompts_that_the_model_does_not_know_are_refused(prompt, named, pipe):
    with pytest.raises(ValueError, match="--prompts") as error:
        models.encode_prompts(pipe, ["a red circle", prompt])
    assert named in str(error.value)


# ---- adapters and the reference -------------------------------------------------------------


@pytest.mark.equation("p_pre", "support.models.make_reference")
@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_is_the_pretrained_model_bit_for_bit(rank, own):
    pretrained = predict(own)
    params = models.trainable(own, settings(lora_rank=rank))
    reference = models.make_reference(own)
    train_a_little(own, params)
    tuned = predict(own)
    with pytest.raises(ZeroDivisionError), reference():
        assert torch.equal(predict(own), pretrained)
        1 // 0
    assert torch.equal(predict(own), tuned) and not torch.equal(tuned, pretrained)
    assert sum(p.requires_grad for p in own.unet.parameters()) == len(params)


@pytest.mark.equation("p_pre", "support.models.make_reference")
@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_is_frozen_and_a_second_network_only_without_adapters(rank, own):
    models.trainable(own, settings(lora_rank=rank))
    tuned = own.unet
    with models.make_reference(own)():
        assert (own.unet is tuned) == (rank > 0)
        assert rank > 0 or not any(p.requires_grad for p in own.unet.parameters())
    given = models.load_pipeline("tiny_sd", "cpu").unet
    with models.make_reference(own, given)():
        assert own.unet is given
    assert own.unet is tuned


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_of_a_run_that_went_on_from_another_is_what_that_one_ended_with(
        rank, tmp_path):
    folders, ends = [tmp_path / name for name in ("first", "second")], []
    for folder, start in zip(folders, ("tiny_sd", str(folders[0]))):
        folder.mkdir()
        pipe = models.load_pipeline(start, "cpu")
        begun = predict(pipe)
        train_a_little(pipe, models.trainable(pipe, settings(lora_rank=rank)))
        (folder / "config.json").write_text(json.dumps({"model": start, "method": "m"}))
        models.save_trained(pipe, folder)
        (folder / "evaluation.json").write_text("{}")
        ends.append(predict(pipe))
    torch.testing.assert_close(begun, ends[0], rtol=0, atol=1e-4)
    assert (ends[1] - ends[0]).abs().max() > 1e-3
    loaded, reference = models.load_run(folders[1], "cpu")
    torch.testing.assert_close(predict(loaded), predict(pipe), rtol=0, atol=1e-4)
    with reference():
        torch.testing.assert_close(predict(loaded), begun, rtol=0, atol=1e-4)
