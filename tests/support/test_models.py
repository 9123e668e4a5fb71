"""Loading, prompts, adapters, the reference model, saving."""
import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import models, training

ROOT = models.HERE


def settings(**values):
    usual = {"lora_rank": 0, "seed": 0, "lora_targets": models.ATTENTION}
    return SimpleNamespace(**usual | values)


@pytest.fixture
def pipe():
    return models.load_pipeline("tiny_sd", "cpu")


@torch.no_grad()
def predict(pipe):
    x = training.gaussian((2, *models.latent_shape(pipe)), 1, "train")
    c = models.encode_prompts(pipe, ["a red circle", "four stars"])
    return pipe.unet(x, torch.tensor([501, 1]), encoder_hidden_states=c).sample


def train_a_little(pipe, params, steps=3):
    """Some steps that move all that may move."""
    x = training.gaussian((2, *models.latent_shape(pipe)), 2, "train")
    c = models.encode_prompts(pipe, ["a red circle", "four stars"])
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    for _ in range(steps):
        eps = pipe.unet(x, torch.tensor([501, 1]), encoder_hidden_states=c).sample
        eps.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_only_the_unet_can_learn(pipe):
    assert all(p.requires_grad for p in pipe.unet.parameters())
    for frozen in (pipe.vae, pipe.text_encoder):
        assert not any(p.requires_grad for p in frozen.parameters())
    assert not (pipe.unet.training or pipe.vae.training or pipe.text_encoder.training)
    assert {m.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}


@pytest.mark.parametrize("model, device, named", [
    ("no_such_model", "cpu", "--model no_such_model"),
    ("tiny_sd/vae", "cpu", "--model tiny_sd/vae"), ("tiny_sd", "cuda:99", "--device cuda:99")])
def test_what_is_not_there_is_named_in_one_line(model, device, named, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as error:
        models.load_pipeline(model, device)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_settings_left_out_of_the_schedulers_file_stay_those_of_latent_diffusion(tmp_path):
    shutil.copytree(ROOT / "tiny_sd", tmp_path / "model")
    (tmp_path / "model/scheduler/scheduler_config.json").write_text(json.dumps(
        {"_class_name": "PNDMScheduler", "beta_start": 0.001, "prediction_type": "v_prediction"}))
    file = tmp_path / "model/model_index.json"
    index = json.loads(file.read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]}
    file.write_text(json.dumps(index))
    config = models.load_pipeline(str(tmp_path / "model"), "cpu").scheduler.config
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)
    assert (config.beta_start, config.prediction_type) == (0.001, "v_prediction")


def test_latent_prompt_and_picture_are_as_diffusers_has_them(pipe):
    assert models.latent_shape(pipe) == (4, 8, 8)
    wide = SimpleNamespace(sample_size=(6, 10), in_channels=3)
    assert models.latent_shape(SimpleNamespace(unet=SimpleNamespace(config=wide))) == (3, 6, 10)
    c = models.encode_prompts(pipe, ["two blue squares", ""])
    ids = pipe.tokenizer(["two blue squares", ""], padding="max_length", return_tensors="pt")
    torch.testing.assert_close(c, pipe.text_encoder(ids.input_ids)[0], rtol=0, atol=1e-6)
    x_0 = training.gaussian((3, 4, 8, 8), 0, "train")
    images = models.decode(pipe, x_0, batch_size=2)
    with torch.no_grad():
        pixels = pipe.vae.decode(x_0 / pipe.vae.config.scaling_factor).sample
    for image, wanted in zip(images, pixels, strict=True):
        found = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        assert (found - wanted.clamp(-1, 1)).abs().max() < 0.51 / 127.5


@pytest.mark.parametrize("prompt, named", [
    ("a purple cat", "'cat' in 'a purple cat'"), ("a red circl", "'circl'"), ("a 🙂", "'🙂'"),
    (" and ".join(["a red circle"] * 4), "17 tokens, 16 are allowed")])
def test_prompts_that_the_model_does_not_know_are_refused(prompt, named, pipe):
    with pytest.raises(ValueError, match="--prompts") as error:
        models.encode_prompts(pipe, ["a red circle", prompt])
    assert named in str(error.value)


def test_rank_0_trains_all_of_the_unet_and_nothing_else(pipe):
    params = models.trainable(pipe, settings())
    assert {id(p) for p in params} == {id(p) for p in pipe.unet.parameters()}
    old = copy.deepcopy(pipe.vae.state_dict())
    train_a_little(pipe, params)
    assert all(torch.equal(value, pipe.vae.state_dict()[name]) for name, value in old.items())


@pytest.mark.parametrize("targets", [models.ATTENTION, ("to_q", "conv1")])
def test_lora_trains_adapters_only_and_starts_at_the_pretrained_model(targets, pipe):
    pretrained = predict(pipe)
    layers = {name for name, _ in pipe.unet.named_modules() if name.endswith(targets)}
    params = models.trainable(pipe, settings(lora_rank=3, lora_targets=targets))
    trained = {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}
    assert {id(p) for p in params} == {id(p) for p in trained.values()}
    assert set(trained) == {f"{layer}.lora_{AB}.default.weight" for layer in layers for AB in "AB"}
    for name, p in trained.items():
        assert p.any() == ("lora_A" in name)
    for layer in layers:
        module = pipe.unet.get_submodule(layer)
        assert module.scaling == {"default": 1} and module.r == {"default": 3}
    assert torch.equal(predict(pipe), pretrained)


def test_first_weights_of_adapters_are_a_function_of_the_seed():
    def first_weights(seed):
        pipe = models.load_pipeline("tiny_sd", "cpu")
        params = models.trainable(pipe, settings(lora_rank=2, seed=seed))
        return torch.cat([p.flatten() for p in params])

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = first_weights(5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, first_weights(5)) and not torch.equal(first, first_weights(6))


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_is_the_pretrained_model_bit_for_bit(rank, pipe):
    pretrained = predict(pipe)
    params = models.trainable(pipe, settings(lora_rank=rank))
    reference = models.make_reference(pipe)
    for _ in range(2):  # while it learns, too
        train_a_little(pipe, params)
        tuned, unet = predict(pipe), pipe.unet
        with reference():
            assert torch.equal(predict(pipe), pretrained)
        assert pipe.unet is unet and torch.equal(predict(pipe), tuned)
        assert not torch.equal(tuned, pretrained)
    with pytest.raises(ZeroDivisionError):
        with reference():
            1 // 0
    assert pipe.unet is unet and torch.equal(predict(pipe), tuned)
    train_a_little(pipe, params)  # and it still learns
    assert not torch.equal(predict(pipe), tuned)
    assert sum(p.requires_grad for p in pipe.unet.parameters()) == len(params)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_saved_run_is_loaded_with_its_reference(rank, pipe, tmp_path):
    pretrained = predict(pipe)
    train_a_little(pipe, models.trainable(pipe, settings(lora_rank=rank)))
    tuned = predict(pipe)
    (tmp_path / "config.json").write_text(json.dumps({"model": "tiny_sd"}))
    models.save_trained(pipe, tmp_path)
    weights = {file.name for file in tmp_path.iterdir()} - {"config.json"}
    assert weights == ({models.ADAPTER} if rank else {"model"})

    loaded, reference = models.load_run(tmp_path, "cpu")
    assert torch.equal(predict(loaded), tuned)
    with reference():
        assert torch.equal(predict(loaded), pretrained)
    assert torch.equal(predict(loaded), tuned)

    # As the start of another training it counts once evaluation.json, the last file, is there.
    with pytest.raises(ValueError, match="--model"):
        models.load_pipeline(str(tmp_path), "cpu")
    (tmp_path / "evaluation.json").write_text("{}")
    start = models.load_pipeline(str(tmp_path), "cpu")
    torch.testing.assert_close(predict(start), tuned, rtol=0, atol=1e-4)
    assert not any("lora_" in name for name, _ in start.unet.named_parameters())
