"""Loading, prompts, adapters, the reference model, saving."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import models, training


def settings(**values):
    usual = {"lora_rank": 0, "seed": 0, "lora_targets": models.ATTENTION,
             "checkpointing": False}
    return SimpleNamespace(**usual | values)


@pytest.fixture
def pipe():
    """A model of one's own, which may be changed."""
    return models.load_pipeline("tiny_sd", "cpu")


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


def test_only_the_unet_can_learn(pipe):
    for frozen in (pipe.vae, pipe.text_encoder):
        assert not any(p.requires_grad for p in frozen.parameters())
    assert not (pipe.unet.training or pipe.vae.training or pipe.text_encoder.training)
    params = models.trainable(pipe, settings())  # rank 0: all of it
    assert {id(p) for p in params} == {id(p) for p in pipe.unet.parameters()}


def test_a_model_that_is_not_there_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no_such_model", "tiny_sd/vae"):
        with pytest.raises(ValueError, match=f"--model {name}") as error:
            models.load_pipeline(name, "cpu")
        assert "\n" not in str(error.value)


def test_settings_left_out_of_the_schedulers_file_stay_those_of_latent_diffusion(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models.HERE / "tiny_sd", folder)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(
        {"_class_name": "PNDMScheduler", "beta_start": 0.001, "prediction_type": "v_prediction"}))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    config = models.load_pipeline(folder, "cpu").scheduler.config
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)
    assert (config.beta_start, config.prediction_type) == (0.001, "v_prediction")


def test_latent_prompt_and_picture_are_as_diffusers_has_them(pipe):
    wide = SimpleNamespace(sample_size=(6, 10), in_channels=3)
    assert models.latent_shape(SimpleNamespace(unet=SimpleNamespace(config=wide))) == (3, 6, 10)
    c = models.encode_prompts(pipe, ["two blue squares", ""])
    ids = pipe.tokenizer(["two blue squares", ""], padding="max_length", return_tensors="pt")
    torch.testing.assert_close(c, pipe.text_encoder(ids.input_ids)[0], rtol=0, atol=1e-6)
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


@pytest.mark.parametrize("targets", [models.ATTENTION, ("to_q", "conv1")])
def test_lora_trains_adapters_only_and_starts_at_the_pretrained_model(targets, pipe):
    pretrained = predict(pipe)
    layers = {name for name, _ in pipe.unet.named_modules() if name.endswith(targets)}
    params = models.trainable(pipe, settings(lora_rank=3, lora_targets=targets))
    trained = {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}
    assert {id(p) for p in params} == {id(p) for p in trained.values()}
    assert set(trained) == {f"{layer}.lora_{AB}.default.weight" for layer in layers for AB in "AB"}
    for layer in layers:
        module = pipe.unet.get_submodule(layer)
        assert module.scaling == {"default": 1} and module.r == {"default": 3}
    assert torch.equal(predict(pipe), pretrained)


def test_first_weights_of_adapters_are_a_function_of_the_seed():
    weights = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(weights))
        state, pipe = torch.get_rng_state(), models.load_pipeline("tiny_sd", "cpu")
        params = models.trainable(pipe, settings(lora_rank=2, seed=seed))
        assert torch.equal(state, torch.get_rng_state())
        weights.append(torch.cat([p.flatten() for p in params]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.equation("p_pre", "support.models.make_reference")
@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_is_the_pretrained_model_bit_for_bit(rank, pipe):
    pretrained = predict(pipe)
    params = models.trainable(pipe, settings(lora_rank=rank))
    reference = models.make_reference(pipe)
    train_a_little(pipe, params)
    tuned = predict(pipe)
    with reference():
        assert torch.equal(predict(pipe), pretrained)
    assert torch.equal(predict(pipe), tuned) and not torch.equal(tuned, pretrained)
    with pytest.raises(ZeroDivisionError):
        with reference():
            1 // 0
    assert torch.equal(predict(pipe), tuned)
    assert sum(p.requires_grad for p in pipe.unet.parameters()) == len(params)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_of_a_run_that_went_on_from_another_is_what_that_one_ended_with(
        rank, pipe, tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder, start in zip(folders, ("tiny_sd", str(folders[0]))):
        folder.mkdir()
        pipe = models.load_pipeline(start, "cpu")
        begun = predict(pipe)
        train_a_little(pipe, models.trainable(pipe, settings(lora_rank=rank)))
        (folder / "config.json").write_text(json.dumps({"model": start}))
        models.save_trained(pipe, folder)
        (folder / "evaluation.json").write_text("{}")
    loaded, reference = models.load_run(folders[1], "cpu")
    torch.testing.assert_close(predict(loaded), predict(pipe), rtol=0, atol=1e-4)
    with reference():
        torch.testing.assert_close(predict(loaded), begun, rtol=0, atol=1e-4)
    double = models.load_pipeline(str(folders[1]), "cpu", "float64")
    assert double.unet.dtype == torch.float64


def test_a_folder_here_comes_before_one_beside_the_scripts(tmp_path, monkeypatch):
    (tmp_path / "tiny_sd").mkdir()
    (tmp_path / "tiny_sd/model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    found = models.find_folder("tiny_sd", "model_index.json")
    assert found.resolve() == (tmp_path / "tiny_sd").resolve()


def test_the_value_network_tells_times_states_and_prompts_apart():
    torch.manual_seed(0)
    net = models.ValueNet(4, 6)
    x, c, t = torch.randn(2, 4, 8, 8), torch.randn(2, 6), torch.tensor([1, 901])
    values = [net(x[:1], c[:1], t[:1]), net(x[1:], c[:1], t[:1]), net(x[:1], c[1:], t[:1]),
              net(x[:1], c[:1], t[1:])]
    assert len({round(value.item(), 5) for value in values}) == 4
