"""Chapter 5's measures, each beside its picture and prompt, and what trainings cost, counted."""
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from support import measures, models, runs, scoring
from support.measures import Measures
from tests.equations import closed_forms

SPECS = ("first", "second", "third", "fourth")
CONFIG = SimpleNamespace(reward="first", gold="second", others=SPECS[2:], clip="tiny_sd/clip",
                         device="cpu", out="folder")
REWARD = f"{closed_forms.__file__}:lightness"
TINY = [*("--rounds 2 --num-steps 2 --prompts-per-round 1 --samples-per-prompt 4 --eval-samples 2 "
          "--lora-rank 2 --device cpu --prompts bias").split(), "--reward", REWARD]


def gray(image):
    return image.getpixel((0, 0))[0]


def value(spec, image, prompt):
    """A number that no other reward gives, nor any other picture or prompt."""
    return 1000.0 * SPECS.index(spec) + 10 * gray(image) + len(prompt) + 0.00004


def make_chapter():
    """What is used of chapter 2, with rewards that are easy to foretell."""
    loaded = []

    def get_reward(spec, config, device=None, flag="--reward"):
        loaded.append((spec, flag))
        return lambda images, prompts: [
            value(spec, *pair) for pair in zip(images, prompts, strict=True)]

    return SimpleNamespace(get_reward=get_reward, score=scoring.score, loaded=loaded)


def test_columns_are_those_of_the_right_picture_and_prompt(monkeypatch):
    chapter = make_chapter()
    found = Measures(CONFIG, chapter)
    found.embed = lambda images: torch.tensor([[gray(image), 1.0] for image in images])
    monkeypatch.setattr(measures, "diversity", lambda f: f[:, 0] + 100 * f[:, 0].sum())
    grays = list(range(20))
    images = [Image.new("RGB", (2, 2), (v, v, v)) for v in grays]
    prompts = ["p", "qq", "p", "qq", "rrr"] * 4
    columns = found.columns(images, prompts, torch.tensor([0.5 * v for v in grays]))
    assert list(columns) == ["reward", "gold", "third", "fourth", "diversity", "kl"]
    for i in grays:
        same = sum(v for v in grays if prompts[v] == prompts[i])  # of one prompt's pictures only
        wanted = [value(spec, images[i], prompts[i]) for spec in SPECS]
        row = [values[i].item() for values in columns.values()]
        assert row == pytest.approx([*wanted, i + 100 * same, 0.5 * i])
    assert chapter.loaded == [*zip(SPECS, ("--reward", "--gold", "--others", "--others"))]


@pytest.mark.equation("weighted mean", "support.measures.means")
def test_means_of_weighted_pictures_have_the_error_of_what_is_averaged():
    r, w = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 1.5, 1.5])
    assert measures.means({"a": r, "b": 2 * r}) == pytest.approx(
        {"a": 3, "a_se": (7 / 3) ** 0.5, "b": 6, "b_se": (28 / 3) ** 0.5})
    assert measures.means({"a": r + 50}, w) == pytest.approx(
        {"a": 54, "a_se": ((0 + 9 + 9) / 2) ** 0.5 / 3**0.5})  # of 0, -3 and 3


def test_embeddings_are_the_flags_clips_of_each_picture_in_batches_or_not(monkeypatch):
    found = Measures(CONFIG, make_chapter())
    images = [Image.new("RGB", (64, 64), (40 * i, 200 - 30 * i, 90)) for i in range(5)]
    with torch.no_grad():
        whole, parts = found.embed(images), found.embed(images, batch_size=2)
        size = found.clip.config.vision_config.image_size
        pixels = measures.nets.clip_pixels(images[3:4], size, "cpu")
        alone = found.clip.visual_projection(found.clip.vision_model(pixels).pooler_output)
    assert torch.allclose(whole, parts, atol=1e-5) and torch.allclose(whole[3:4], alone, atol=1e-5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="--clip nowhere"):
        Measures(SimpleNamespace(**vars(CONFIG) | {"clip": "nowhere"}), make_chapter())


@pytest.mark.equation("price", "support.measures.price")
@pytest.mark.parametrize("script, words, looked_at", [
    ("03_ddpo", "", 0), ("03_ddpo", "--estimator sf", 0),
    ("03_ddpo", "--guidance-scale 2 --timestep-fraction 0.5", 0),
    ("04_dpok", "--no-value", 0), ("04_dpok", "--beta 0 --no-value", 8),
    ("04_dpok", "--guidance-scale 2 --timestep-fraction 0.5 --no-value", 0),
    ("experiments.sft", "--data fresh --passes 3", 8),
    ("experiments.sft", "--data fixed --beta 1", 16),
    ("experiments.sft", "--data fresh --weights sparse --keep 0.5 --passes 20", 8),
    ("experiments.sft", "--data fresh --guidance-scale 2 --updates-per-round 3", 16)])
def test_price_is_what_the_unet_was_asked_for(script, words, looked_at, tmp_path, monkeypatch):
    """looked_at: latents of a round's forward passes that no update needs, as of a logged KL."""
    counts, training = [0], [False]

    def count(unet, inputs, output):
        if training[0]:
            counts[0] += len(output.sample) * (3 if output.sample.requires_grad else 1)

    def load(*arguments):
        pipe = load_pipeline(*arguments)
        pipe.unet.register_forward_hook(count)
        return pipe

    def rounds(run, *owned):
        for n in all_rounds(run, *owned):  # between two of them it is only looked at
            training[0] = True
            yield n
            training[0] = False
    load_pipeline, all_rounds = models.load_pipeline, runs.Run.rounds
    monkeypatch.setattr(models, "load_pipeline", load)
    monkeypatch.setattr(runs.Run, "rounds", rounds)
    run = import_module(script).main([*TINY, *words.split(), "--out", str(tmp_path)])
    config = models.read_config(run.folder)
    queries, evaluations = measures.price(config)
    by_lot = 0.1 if "sparse" in words else 0  # how many of the drawn have a weight
    assert queries == 2 * 4
    assert evaluations == pytest.approx(counts[0] - 2 * looked_at, rel=by_lot)
