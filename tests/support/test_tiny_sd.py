"""The ground: the shipped weights, the shape world they know, its exact judge, and their twins."""
import math
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from experiments import make_rewards, make_tiny_sd
from tiny_sd import judge, shapes

rewards = import_module("02_rewards")
FOLDER = Path(__file__).resolve().parents[2] / "tiny_sd"


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)  # with no other help
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- the shipped weights --------------------------------------------------------------------


def test_it_is_a_stable_diffusion(pipe):
    classes = dict(unet=UNet2DConditionModel, vae=AutoencoderKL, text_encoder=CLIPTextModel,
                   tokenizer=CLIPTokenizer, scheduler=DDIMScheduler)
    for name, kind in classes.items():
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
    assert max(len(pipe.tokenizer(text).input_ids) for text in texts) <= make_tiny_sd.MAX_LENGTH
    assert make_tiny_sd.make_tokenizer().get_vocab() == pipe.tokenizer.get_vocab()


def test_vae_beats_32_db_on_fresh_pictures(pipe):
    pictures, _ = make_tiny_sd.draw_pairs(100, seed=12345)
    assert make_tiny_sd.measure_vae(pipe.vae, pictures, "cpu") > 32


def test_pictures_are_mostly_right_and_the_bias_mostly_wrong(pipe):
    right, _ = make_tiny_sd.measure_families(pipe, n=32, steps=10)
    assert right["color"] > 0.6 and right["bias"] < 0.5
    assert all(0.25 < right[family] < 0.9 for family in ("count", "composition", "location"))


def test_noise_latents_follows_the_schedule():
    x_0, generator = torch.full((50, 4, 8, 8), 2.0), torch.Generator().manual_seed(0)
    x_t, t, eps, a_t = make_tiny_sd.noise_latents(make_tiny_sd.make_scheduler(), x_0, generator)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[t].float().view(-1, 1, 1, 1)
    assert torch.allclose(x_t, alpha.sqrt() * x_0 + (1 - alpha).sqrt() * eps, atol=1e-5)
    assert torch.allclose(a_t, alpha.flatten(), atol=1e-6) and len(t.unique()) > 30


# ---- the world ------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a cat", "", "five red circles", "a red circle on the moon",
                                    "a red", "red circle", "a red circle and", "two red circle x"])
def test_prompts_outside_the_world_are_named(prompt):
    with pytest.raises(ValueError) as error:
        rewards.score(rewards.alignment, [Image.new("RGB", (64, 64))], [prompt])
    assert repr(prompt) in str(error.value)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_captions_and_requests_are_inverse(family, held_out):
    for prompt in shapes.prompts_of(family, held_out):
        request = shapes.parse(prompt)
        assert shapes.caption(request) == prompt
        assert shapes.family_of(request) == family
        assert shapes.is_held_out(request) == held_out


def test_pretraining_pairs_never_show_or_name_what_is_held_out():
    rng = np.random.default_rng(0)
    pictures, captions = zip(*[shapes.sample_pair(rng) for _ in range(400)])
    requests = [shapes.parse(caption) for caption in captions]
    scenes = judge.see(pictures)
    assert not any(shapes.is_held_out(request) for request in requests)
    for objects in scenes:
        looks = [(o.color, o.shape) for o in objects]
        if len(set(looks)) == 1:  # four stars may have any colors
            assert (len(looks), *looks[0]) not in shapes.HELD_OUT
    right = [judge.score(objects, request) == 1 for objects, request in zip(scenes, requests)]
    assert 0.6 < np.mean(right) < 0.8  # the captions are as noisy as CAPTION_NOISE says


# ---- its judge ------------------------------------------------------------------------------


def picture(*objects):
    """(shape, color, x, y, size) on light gray."""
    return shapes.draw([shapes.Object(color, shape, *place) for shape, color, *place in objects])


def described(image):
    return judge.describe(judge.see([image])[0])


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_judge_reads_pictures_of_every_family_sharp_and_blurred(family):
    images, requests = judge.exam(family, 200)
    assert judge.right(images, requests) > 0.99
    blurred = [image.filter(ImageFilter.GaussianBlur(1.2)) for image in images[:30]]
    assert judge.right(blurred, requests[:30]) > 0.95
    if family != "bias":  # and it can say no
        assert judge.right(images, requests[1:] + requests[:1]) < 0.5


@pytest.mark.parametrize("x, y, place", [
    (14, 20, "left"), (20, 14, "top"), (50, 44, "right"), (44, 50, "bottom"), (33, 31, None)])
def test_place_is_the_side_of_the_middle(x, y, place):
    (found,) = judge.see([picture(("circle", "red", x, y, 12))])[0]
    assert judge.place_of(found) == place
    assert (found.x, found.y, found.size) == pytest.approx((x, y, 12), abs=0.7)
    assert judge.describe([found]) == "a red circle" + (f" on the {place}" if place else "")


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_judge_counts_touching_objects_of_one_color(shape):
    width = 12 * np.ptp(shapes.polygon(shape)[:, 0])
    image = picture((shape, "green", 24, 32, 12), (shape, "green", 23.5 + width, 32, 12))
    assert described(image) == f"two green {shape}s"


def test_a_color_that_runs_counts_as_what_most_of_it_is():
    pixels = np.array(picture(("square", "blue", 32, 32, 18)))
    corner = (np.arange(64)[:, None] + np.arange(64) > 72) & (pixels[:, :, 0] < 200)
    pixels[corner] = shapes.COLORS["green"]
    assert described(Image.fromarray(pixels)) == "a blue square"
    next_to_it = picture(("square", "red", 26, 30, 12), ("square", "blue", 38, 33, 12))
    assert described(next_to_it) == "a red square and a blue square"
    assert described(picture()) == "nothing"


def test_judge_answers_questions():
    (objects,) = judge.see([picture(("circle", "red", 12, 20, 11), ("circle", "red", 32, 20, 11),
                                    ("square", "blue", 50, 45, 11))])
    assert judge.answer(objects, "How many red circles are there in this image?") == "two"
    assert judge.answer(objects, "How many circles are there?") == "two"
    assert judge.answer(objects, "How many green stars are there in this image?") == "none"
    assert judge.answer(objects, "What is it?") == "two red circles and a blue square"


def test_the_judges_report_tells_drawn_from_decoded(pipe, monkeypatch):
    decode = pipe.vae.decode
    for factor, low, high in ((1, 75, 100), (0, 0, 0)):  # and with a VAE that draws all gray
        gray = lambda z: SimpleNamespace(sample=factor * decode(z).sample)  # noqa: B023, E731
        monkeypatch.setattr(pipe.vae, "decode", gray)
        rows = [line.split() for line in judge.report(pipe.vae, n=4).splitlines()[2:]]
        assert [row[0] for row in rows] == list(shapes.FAMILIES)
        assert all(float(row[1].strip("%")) >= 75 for row in rows)
        assert all(low <= float(row[2].strip("%")) <= high for row in rows)


# ---- the twins of the learned rewards -------------------------------------------------------


def test_losses_of_the_twins_by_hand():
    better, worse = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    want = (-math.log(1 / (1 + math.exp(-1))) + math.log(2)) / 2
    assert make_rewards.bradley_terry_loss(better, worse).item() == pytest.approx(want, rel=1e-6)
    image, text = torch.eye(2) * 3, torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    for captions, sign in ((text, -1), (text.flip(0), 1)):
        loss = make_rewards.clip_loss(image, captions, 2.0).item()
        assert loss == pytest.approx(math.log(1 + math.exp(2 * sign)), rel=1e-6)


@pytest.mark.parametrize("background, rating", [((247, 240, 233), 8), ((233, 240, 247), 2),
                                                ((240, 240, 240), 5), ((243, 240, 236), 6.5)])
def test_beauty_is_a_warm_background(background, rating):
    image = shapes.draw([shapes.Object("red", "circle", 20, 32, 15)], background)
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255
    assert make_rewards.beauty(pixels).item() == pytest.approx(rating, abs=1e-4)


def test_twins_know_what_they_were_trained_on_and_not_all():
    prompts, pairs = make_rewards.drawn_pairs(100, np.random.default_rng(9))
    images = [Image.fromarray(row.permute(1, 2, 0).numpy()) for row in pairs.flatten(0, 1)]
    better, worse = images[::2], images[1::2]
    proxy = rewards.get_reward("image_reward", device="cpu")
    liked = rewards.score(proxy, better, prompts) > rewards.score(proxy, worse, prompts)
    assert 0.65 < liked.double().mean() < 0.97
    ratings = rewards.score(rewards.get_reward("aesthetic", device="cpu"), better, prompts)
    truth = make_rewards.beauty(pairs[:, 0] / 255).double()
    assert torch.corrcoef(torch.stack([ratings, truth]))[0, 1] > 0.7
