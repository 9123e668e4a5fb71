"""Chapter 5's measures: each number beside the picture and the prompt that it belongs to."""
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from support import measures, scoring
from support.measures import Measures

SPECS = ("first", "second", "third", "fourth")
CONFIG = SimpleNamespace(reward="first", gold="second", others=SPECS[2:], vlm="judge",
                         clip="tiny_sd/clip", device="cpu", out="folder")


def value(spec, image, prompt):
    """A number that no other reward gives, nor any other picture or prompt."""
    return 1000.0 * SPECS.index(spec) + 10 * gray(image) + len(prompt)


def gray(image):
    return image.getpixel((0, 0))[0]


def make_chapter():
    """What is used of chapter 2, with rewards that are easy to foretell."""
    loaded = []

    def get_reward(spec, models, device, flag="--reward"):
        loaded.append((spec, flag))
        return lambda images, prompts: [
            value(spec, *pair) for pair in zip(images, prompts, strict=True)]

    return SimpleNamespace(get_reward=get_reward, score=scoring.score, QUESTION="What is it?",
                           loaded=loaded)


def test_columns_are_those_of_the_right_picture_and_prompt():
    chapter, sizes = make_chapter(), []
    found = Measures(CONFIG, chapter, lambda f: f[:, 0] + 100 * f[:, 0].sum())

    def ask(images, questions):
        sizes.append(len(images))
        pairs = zip(images, questions, strict=True)
        return [f"{question} {gray(image)}" for image, question in pairs]

    found.ask = ask
    found.embed = lambda images: torch.tensor([[gray(image), 1.0] for image in images])
    grays = list(range(70))
    images = [Image.new("RGB", (2, 2), (v, v, v)) for v in grays]
    prompts = ["p", "qq", "p", "qq", "rrr"] * 14
    asked = [{"prompt": prompt, "split": f"split {i}"} for i, prompt in enumerate(prompts)]
    rows = found.rows(asked, images, [0.5 * v for v in grays])
    for i, row in enumerate(rows):
        same = sum(v for v in grays if prompts[v] == prompts[i])  # of one prompt's pictures only
        reward, gold, third, fourth = [value(spec, images[i], prompts[i]) for spec in SPECS]
        assert row == {
            "prompt": prompts[i], "split": f"split {i}", "picture": i, "path_kl": 0.5 * i,
            "reward": reward, "gold": gold, "third": third, "fourth": fourth,
            "description": f"What is it? {i}", "diversity": i + 100 * same}
    assert asked[0] == {"prompt": "p", "split": "split 0"} and sizes == [32, 32, 6]
    assert chapter.loaded == [*zip(SPECS, ("--reward", "--gold", "--others", "--others"))]


def test_embeddings_are_the_flags_clips_of_each_picture_in_batches_or_not(monkeypatch):
    found = Measures(CONFIG, make_chapter(), None)
    images = [Image.new("RGB", (64, 64), (40 * i, 200 - 30 * i, 90)) for i in range(5)]
    with torch.no_grad():
        whole, parts = found.embed(images), found.embed(images, batch_size=2)
        size = found.clip.config.vision_config.image_size
        pixels = measures.nets.clip_pixels(images[3:4], size, "cpu")
        alone = found.clip.visual_projection(found.clip.vision_model(pixels).pooler_output)
    assert torch.allclose(whole, parts, atol=1e-5) and torch.allclose(whole[3:4], alone, atol=1e-5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="--clip nowhere"):
        Measures(SimpleNamespace(**vars(CONFIG) | {"clip": "nowhere"}), make_chapter(), None)
