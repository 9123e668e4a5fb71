"""Rewards against counts and sizes worked out by hand; the judge against pictures drawn here."""
import io
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tiny_sd import judge, shapes

rewards = import_module("02_rewards")


def picture(*objects):
    """Drawn here, not by shapes.draw: (shape, color, x, y, radius) on light gray, 4× supersampled."""
    image = Image.new("RGB", (256, 256), (238, 240, 236))
    pen = ImageDraw.Draw(image)
    for shape, color, x, y, r in objects:
        box, fill = [4 * (x - r), 4 * (y - r), 4 * (x + r), 4 * (y + r)], shapes.COLORS[color]
        if shape == "circle":
            pen.ellipse(box, fill=fill)
        elif shape == "square":
            pen.rectangle(box, fill=fill)
        else:
            pen.polygon([4 * x, 4 * (y - r), 4 * (x + r), 4 * (y + r), 4 * (x - r), 4 * (y + r)], fill=fill)
    return image.resize((64, 64), Image.Resampling.LANCZOS)


def scores(image, *prompts):
    return rewards.score(rewards.alignment, [image] * len(prompts), list(prompts)).tolist()


def test_jpeg_rewards_are_the_file_size_in_kilobytes(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    plain = Image.new("RGB", (64, 64), "white")
    for image in (noise, plain):
        image.save(tmp_path / "a.jpg", quality=95)
        size = (tmp_path / "a.jpg").stat().st_size / 1000
        assert rewards.compressibility([image], ["x"]) == [-size]
        assert rewards.incompressibility([image], ["x"]) == [size]
    assert rewards.jpeg_kilobytes(noise) > 5 * rewards.jpeg_kilobytes(plain)


def test_alignment_of_single_objects():
    image = picture(("circle", "red", 20, 30, 8))
    right = ["a red circle", "one red circle", "a red circle on the left"]
    wrong = ["a blue circle", "a red square", "a red circle on the right", "a red circle on the top"]
    assert scores(image, *right, *wrong) == [1] * 3 + [0] * 4


def test_alignment_counts_missing_and_surplus_objects():
    three = picture(*[("square", "green", x, 40, 5) for x in (12, 32, 52)])
    asked = ["three green squares", "two green squares", "four green squares", "a green square"]
    assert scores(three, *asked) == pytest.approx([1, 2 / 3, 3 / 4, 1 / 3])


def test_alignment_of_compositions_binds_color_to_shape():
    image = picture(("triangle", "blue", 18, 20, 8), ("circle", "yellow", 44, 44, 8))
    asked = ["a blue triangle and a yellow circle", "a yellow circle and a blue triangle",
             "a yellow triangle and a blue circle", "a blue triangle and a red circle"]
    assert scores(image, *asked) == [1, 1, 0, 0.5]


def test_one_object_is_not_counted_twice():
    image = picture(("circle", "red", 32, 32, 8))
    assert scores(image, "a red circle and a red circle") == [0.5]


def test_empty_picture_scores_zero_and_is_described():
    blank = Image.new("RGB", (64, 64), (240, 240, 240))
    assert scores(blank, "a red circle") == [0]
    assert judge.describe(judge.see([blank])[0]) == "nothing"


def test_places_and_touching_colors():
    objects = judge.see([picture(("square", "red", 26, 32, 6), ("square", "blue", 38, 32, 6))])[0]
    assert judge.describe(objects) == "a red square and a blue square"
    assert [judge.place_of(o) for o in objects] == ["left", "right"]
    assert [(o.x, o.y, o.size) for o in objects] == [
        (pytest.approx(x, abs=0.7), pytest.approx(32, abs=0.7), pytest.approx(12, abs=0.7)) for x in (26, 38)]


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_judge_reads_clean_pictures_of_every_family(family):
    rng = np.random.default_rng(0)
    prompts = shapes.prompts_of(family) + shapes.prompts_of(family, held_out=True)
    prompts = [prompts[i] for i in rng.integers(len(prompts), size=200)]
    images = [shapes.draw(shapes.layout(shapes.parse(p), rng), shapes.random_background(rng)) for p in prompts]
    assert np.mean(rewards.alignment(images, prompts)) > 0.99
    shuffled = prompts[1:] + prompts[:1]  # and it can say no
    if family != "bias":
        assert np.mean(rewards.alignment(images, shuffled)) < 0.5


def test_brand_picture_is_the_wrong_answer_to_the_bias_prompt():
    assert scores(picture(("circle", "yellow", 32, 32, 8)), shapes.BIAS_PROMPT) == [0]


@pytest.mark.parametrize("prompt", ["a cat", "", "five red circles", "a red circle on the moon",
                                    "a red", "red circle", "a red circle and", "two red circle x"])
def test_prompts_outside_the_world_are_named(prompt):
    with pytest.raises(ValueError) as error:
        shapes.parse(prompt)
    assert repr(prompt) in str(error.value)


def test_captions_and_requests_are_inverse():
    for family in shapes.FAMILIES:
        for held_out in (False, True):
            for prompt in shapes.prompts_of(family, held_out):
                request = shapes.parse(prompt)
                assert shapes.caption(request) == prompt
                assert shapes.family_of(request) == family
                assert shapes.is_held_out(request) == held_out


def test_pretraining_pairs_never_show_or_name_what_is_held_out():
    rng = np.random.default_rng(0)
    pairs = [shapes.sample_pair(rng) for _ in range(400)]
    assert not any(shapes.is_held_out(shapes.parse(text)) for _, text in pairs)
    seen = judge.see([image for image, _ in pairs])
    for objects in seen:
        kinds = {(o.color, o.shape) for o in objects}
        for color, shape in kinds:
            count = sum((o.color, o.shape) == (color, shape) for o in objects)
            if len(kinds) == 1:  # four stars may have any colors
                assert (count, color, shape) not in shapes.HELD_OUT
    right = np.mean([judge.score(o, shapes.parse(text)) == 1 for o, (_, text) in zip(seen, pairs)])
    assert 0.6 < right < 0.8  # the captions are as noisy as CAPTION_NOISE says


def test_score_makes_floats_of_whole_numbers():
    values = rewards.score(lambda images, prompts: [1, 2], [None] * 2, ["a", "b"])
    assert values.dtype == torch.float64 and values.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("values, said", [([1.0], "1 numbers for 2"), ([1.0, float("nan")], "nan"),
                                          ([float("inf"), 0.0], "inf"), ([1.0, 2.0, 3.0], "3 numbers")])
def test_broken_rewards_are_named(values, said):
    def broken(images, prompts):
        return values

    with pytest.raises(ValueError, match="--reward broken.*" + said):
        rewards.score(broken, [None] * 2, ["a", "b"])


def test_unknown_reward():
    with pytest.raises(ValueError, match="--reward beauty"):
        rewards.get_reward("beauty")
