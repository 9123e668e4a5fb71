"""The shipped tiny Stable Diffusion: loads on its own, is small, and is good but improvable."""
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from tiny_sd import pretrain, shapes

FOLDER = Path(__file__).resolve().parent.parent / "tiny_sd"


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)  # with no other help
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_a_stable_diffusion(pipe):
    kinds = dict(unet=UNet2DConditionModel, vae=AutoencoderKL, text_encoder=CLIPTextModel,
                 tokenizer=CLIPTokenizer, scheduler=DDIMScheduler)
    for name, kind in kinds.items():
        assert isinstance(getattr(pipe, name), kind)
    assert pipe.vae_scale_factor == 8 and pipe.unet.config.sample_size == 8
    assert pipe.vae.config.latent_channels == pipe.unet.config.in_channels == 4
    want = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                num_train_timesteps=1000, set_alpha_to_one=False, clip_sample=False,
                prediction_type="epsilon")
    assert {key: pipe.scheduler.config[key] for key in want} == want
    assert 1e6 <= sum(p.numel() for p in pipe.unet.parameters()) <= 2.5e6


def test_it_is_small_and_holds_no_pickle():
    files = [f for f in FOLDER.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 12e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".py", ".png"}


def test_text_encoder_has_the_published_key_names():
    """Without the prefix, transformers 5.0 finds no weights and silently makes up random ones."""
    keys = load_file(FOLDER / "text_encoder" / "model.safetensors").keys()
    assert all(key.startswith("text_model.") for key in keys)


def test_vocabulary_is_the_worlds_words_and_no_more(pipe):
    known = (pipe.text_encoder.get_input_embeddings().weight != 0).any(1)
    ids = {word: pipe.tokenizer(word, add_special_tokens=False).input_ids for word in shapes.WORDS}
    assert all(len(i) == 1 and known[i[0]] for i in ids.values())
    assert known.sum() == len(shapes.WORDS) + 2  # start and end
    texts = [shapes.caption(shapes.parse(p)) for f in shapes.FAMILIES for p in shapes.prompts_of(f)]
    assert set(" ".join(texts).split()) <= set(shapes.WORDS)
    assert max(len(pipe.tokenizer(text).input_ids) for text in texts) <= pretrain.MAX_LENGTH


def test_remade_tokenizer_is_the_shipped_one(pipe):
    assert pretrain.make_tokenizer().get_vocab() == pipe.tokenizer.get_vocab()


def test_vae_beats_32_db_on_fresh_pictures(pipe):
    pictures, _ = pretrain.draw_pairs(100, seed=12345)
    assert pretrain.measure_vae(pipe.vae, pictures, "cpu") > 32


def test_pictures_are_mostly_right_and_the_bias_mostly_wrong(pipe):
    right, _ = pretrain.measure_families(pipe, n=32, steps=10)
    assert right["color"] > 0.6 and right["bias"] < 0.5
    assert all(0.25 < right[family] < 0.9 for family in ("count", "composition", "location"))


def test_noise_latents_follows_the_schedule():
    scheduler = pretrain.make_scheduler()
    x_0 = torch.full((50, 4, 8, 8), 2.0)
    x_t, t, eps, a_t = pretrain.noise_latents(scheduler, x_0, torch.Generator().manual_seed(0))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[t].view(-1, 1, 1, 1).float()
    assert torch.allclose(x_t, alpha.sqrt() * x_0 + (1 - alpha).sqrt() * eps, atol=1e-5)
    assert torch.allclose(a_t, alpha, atol=1e-6) and len(t.unique()) > 30
