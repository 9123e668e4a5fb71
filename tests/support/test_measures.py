"""Chapter 5's measures: each number beside the picture and the prompt that it belongs to."""
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from support import measures, scoring
from support.measures import Measures

CONFIG = SimpleNamespace(reward="first", gold="second", others=("third", "fourth"), vlm="judge",
                         clip="tiny_sd/clip", device="cpu", out="folder")


def value(spec, image, prompt):
    """A number that no other reward gives, nor any other picture or prompt."""
    place = ("first", "second", "third", "fourth").index(spec)
    return 1000.0 * place + 10 * image.getpixel((0, 0))[0] + len(prompt)


def make_chapter(loaded):
    """What is used of chapter 2, with rewards that are easy to foretell."""
    def get_reward(spec, models, device, flag="--reward"):
        loaded.append((spec, device, flag))

        def reward(images, prompts):
            return [value(spec, *pair) for pair in zip(images, prompts, strict=True)]
        return reward

    return SimpleNamespace(get_reward=get_reward, score=scoring.score, QUESTION="What is it?")


@pytest.fixture
def measured(monkeypatch):
    """Measures of six gray pictures, whose embedding is (gray, 1), and all that was loaded."""
    loaded = []
    found = Measures(CONFIG, make_chapter(loaded), lambda f: f[:, 0] + 100 * f[:, 0].sum())
    found.ask = lambda images, questions: [
        f"{question} {image.getpixel((0, 0))[0]}" for image, question in zip(images, questions)]
    found.embed = lambda images: torch.tensor(
        [[image.getpixel((0, 0))[0], 1.0] for image in images])
    return found, loaded


def test_each_reward_is_loaded_once_under_its_flag(measured):
    assert measured[1] == [("first", "cpu", "--reward"), ("second", "cpu", "--gold"),
                           ("third", "cpu", "--others"), ("fourth", "cpu", "--others")]


def test_columns_are_those_of_the_right_picture_and_prompt(measured):
    grays = [5, 6, 7, 8, 9, 10]
    images = [Image.new("RGB", (2, 2), (v, v, v)) for v in grays]
    prompts = ["p", "qq", "p", "qq", "rrr", "p"]
    asked = [{"prompt": prompt, "split": f"split {i}"} for i, prompt in enumerate(prompts)]
    kl = [0.5 * i for i in range(6)]
    rows = measured[0].rows(asked, images, kl)
    sums = {"p": 5 + 7 + 10, "qq": 6 + 8, "rrr": 9}  # diversity: among one prompt's pictures only
    for i, row in enumerate(rows):
        expected = {"prompt": prompts[i], "split": f"split {i}", "picture": i, "path_kl": kl[i],
                    "reward": value("first", images[i], prompts[i]),
                    "gold": value("second", images[i], prompts[i]),
                    "third": value("third", images[i], prompts[i]),
                    "fourth": value("fourth", images[i], prompts[i]),
                    "description": f"What is it? {grays[i]}",
                    "diversity": grays[i] + 100 * sums[prompts[i]]}
        assert row == expected
    assert asked[0] == {"prompt": "p", "split": "split 0"}  # stays as it was


def test_embeddings_are_clips_of_each_picture_in_batches_or_not():
    found = Measures(CONFIG, make_chapter([]), None)
    images = [Image.new("RGB", (64, 64), (40 * i, 200 - 30 * i, 90)) for i in range(5)]
    with torch.no_grad():
        whole, parts = found.embed(images), found.embed(images, batch_size=2)
        size = found.clip.config.vision_config.image_size
        pixels = measures.nets.clip_pixels(images[3:4], size, "cpu")
        alone = found.clip.visual_projection(found.clip.vision_model(pixels).pooler_output)
    assert whole.shape == (5, found.clip.config.projection_dim)
    assert torch.allclose(whole, parts, atol=1e-5) and torch.allclose(whole[3:4], alone, atol=1e-5)
    assert not torch.allclose(whole[0], whole[1], atol=1e-2)


def test_the_describer_is_the_vlm_and_gets_few_pictures_at_a_time(monkeypatch):
    calls = []

    def load_vlm(name, device):
        calls.append((name, device))
        return describe

    def describe(images, questions):
        assert questions == ["What is it?"] * len(images)
        calls.append(len(images))
        return images

    monkeypatch.setattr(measures.nets, "load_vlm", load_vlm)
    found = Measures(CONFIG, make_chapter([]), None)
    assert found.describe(list(range(70))) == list(range(70))
    assert calls == [("judge", "cpu"), 32, 32, 6]
