"""Rewards against numbers worked out by hand, pictures drawn here, and other people's code.

The full-size paths run on small random checkpoints in the published formats: key names and layouts
are written out in this file, not taken from the code under test.
"""
import json
import math
import re
from importlib import import_module
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import save_file

from tiny_sd import judge, pretrain_rewards, shapes
from tiny_sd import reward_models as nets

rewards = import_module("02_rewards")


def picture(*objects):
    """Drawn here, not by shapes.draw: (shape, color, x, y, radius) on light gray, 4× as large."""
    image = Image.new("RGB", (256, 256), (238, 240, 236))
    pen = ImageDraw.Draw(image)
    for shape, color, x, y, r in objects:
        box, fill = [4 * (x - r), 4 * (y - r), 4 * (x + r), 4 * (y + r)], shapes.COLORS[color]
        if shape == "circle":
            pen.ellipse(box, fill=fill)
        elif shape == "square":
            pen.rectangle(box, fill=fill)
        else:
            pen.polygon([4 * x, 4 * (y - r), 4 * (x + r), 4 * (y + r), 4 * (x - r), 4 * (y + r)],
                        fill=fill)
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
    wrong = ["a blue circle", "a red square", "a red circle on the right",
             "a red circle on the top"]
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
        (pytest.approx(x, abs=0.7), pytest.approx(32, abs=0.7),
         pytest.approx(12, abs=0.7)) for x in (26, 38)]


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_judge_reads_clean_pictures_of_every_family(family):
    rng = np.random.default_rng(0)
    prompts = shapes.prompts_of(family) + shapes.prompts_of(family, held_out=True)
    prompts = [prompts[i] for i in rng.integers(len(prompts), size=200)]
    images = [shapes.draw(shapes.layout(shapes.parse(p), rng),
                          shapes.random_background(rng)) for p in prompts]
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
                                          ([float("inf"), 0.0], "inf"),
                                          ([1.0, 2.0, 3.0], "3 numbers")])
def test_broken_rewards_are_named(values, said):
    def broken(images, prompts):
        return values

    with pytest.raises(ValueError, match="^reward broken.*" + said):
        rewards.score(broken, [None] * 2, ["a", "b"])


def test_unknown_reward():
    with pytest.raises(ValueError, match="--reward beauty"):
        rewards.get_reward("beauty")


# ---- the judge on imperfect pictures --------------------------------------------------------


def test_judge_reads_blurred_pictures():
    for family in shapes.FAMILIES:
        images, requests = judge.exam(family, 30, seed=1)
        assert judge.right([image.filter(ImageFilter.GaussianBlur(1.2)) for image in images],
                           requests) > 0.95


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_judge_counts_touching_objects_of_one_color(shape):
    side_by_side = picture((shape, "green", 24, 32, 7), (shape, "green", 37.5, 32, 7))
    assert judge.describe(judge.see([side_by_side])[0]) == f"two green {shape}s"


def test_a_color_that_runs_counts_as_what_most_of_it_is():
    pixels = np.array(picture(("square", "blue", 32, 32, 9)))
    # A corner of it
    ink = (pixels.astype(int).sum(2) < 600) & (np.arange(64)[:, None] + np.arange(64) > 72)
    pixels[ink] = shapes.COLORS["green"]
    objects = judge.see([Image.fromarray(pixels)])[0]
    assert [(o.color, o.shape) for o in objects] == [("blue", "square")]


def test_judge_describes_and_answers():
    objects = judge.see([picture(("circle", "red", 12, 20, 6), ("circle", "red", 32, 20, 6),
                                 ("square", "blue", 50, 45, 6))])[0]
    assert judge.describe(objects) == "two red circles and a blue square"
    asked = {"How many red circles are there in this image?": "two",
             "How many circles are there?": "two",
             "How many green stars are there in this image?": "none",
             "What is in this image?": "two red circles and a blue square"}
    assert {question: judge.answer(objects, question) for question in asked} == asked
    lone = judge.see([picture(("circle", "red", 12, 30, 6))])[0]
    assert judge.describe(lone) == "a red circle on the left"


# ---- pictures in ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (100, 100), (37, 37), (90, 64), (64, 96)])
def test_clip_pixels_is_transformers_preprocessing(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1))
    theirs = transformers.CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48)
    want = torch.as_tensor(np.array(theirs(image).pixel_values))
    assert torch.allclose(nets.clip_pixels([image], 48, "cpu"), want, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_clip_pixels_of_pictures_that_are_not_rgb(mode):
    image = noise_pictures(1, 48)[0].convert(mode)
    got = nets.clip_pixels([image], 48, "cpu")
    assert torch.equal(got, nets.clip_pixels([image.convert("RGB")], 48, "cpu"))


# ---- aesthetic ------------------------------------------------------------------------------


def save_clip(folder):
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(small, vocab_size=50),
        vision_config=dict(small, image_size=32, patch_size=16),
        projection_dim=24)).eval()
    clip.save_pretrained(folder)
    return clip


# Published keys
LAION = {"0": (1024, 24), "2": (128, 1024), "4": (64, 128), "6": (16, 64), "7": (1, 16)}


def laion_weights():
    g = torch.Generator().manual_seed(1)
    weights = {}
    for layer, (rows, columns) in LAION.items():
        weights[f"layers.{layer}.weight"] = torch.randn(rows, columns, generator=g) / columns**0.5
        weights[f"layers.{layer}.bias"] = torch.randn(rows, generator=g)
    return weights


def noise_pictures(n, size=64):
    rng = np.random.default_rng(2)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3),
                                         dtype=np.uint8)) for _ in range(n)]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_aesthetic_from_published_files(suffix, tmp_path):
    clip, weights, images = save_clip(tmp_path / "clip"), laion_weights(), noise_pictures(3)
    file = tmp_path / f"sac+logos+ava1-l14-linearMSE.{suffix}"
    torch.save(weights, file) if suffix == "pth" else save_file(weights, file)
    models = rewards.Models(clip=str(tmp_path / "clip"), aesthetic_weights=str(file))
    got = rewards.score(rewards.get_reward("aesthetic", models, "cpu"), images, ["x"] * 3)
    pixels = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32},
                                                crop_size=32)(images).pixel_values
    with torch.no_grad():
        seen = clip.vision_model(torch.as_tensor(np.array(pixels))).pooler_output
        x = clip.visual_projection(seen)
    x = x / x.square().sum(1, keepdim=True).sqrt()
    for layer in LAION:
        x = x @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
    assert got.tolist() == pytest.approx(x[:, 0].tolist(), abs=1e-4) and got.std() > 1e-3


# ---- image_reward ---------------------------------------------------------------------------

VISION, TEXT, IMAGE, PATCH, WORDS = 128, 64, 32, 8, 40  # two vision heads, one text head


def image_reward_weights():
    """Random weights under every key of ImageReward.pt, as the original code names them."""
    g, weights = torch.Generator().manual_seed(3), {}

    def put(name, *shape):
        weights[name] = torch.randn(shape,
                                    generator=g) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)

    def linear(name, rows, columns):
        put(name + ".weight", rows, columns), put(name + ".bias", rows)

    def norm(name, width):
        put(name + ".weight", width), put(name + ".bias", width)
        weights[name + ".weight"] += 1

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    put(v + "cls_token", 1, 1, VISION), put(v + "pos_embed", 1, (IMAGE // PATCH) ** 2 + 1, VISION)
    put(v + "patch_embed.proj.weight", VISION, 3, PATCH, PATCH)
    put(v + "patch_embed.proj.bias", VISION)
    for i in range(2):
        norm(f"{v}blocks.{i}.norm1", VISION), norm(f"{v}blocks.{i}.norm2", VISION)
        linear(f"{v}blocks.{i}.attn.qkv", 3 * VISION, VISION)
        linear(f"{v}blocks.{i}.attn.proj", VISION, VISION)
        linear(f"{v}blocks.{i}.mlp.fc1", 96, VISION), linear(f"{v}blocks.{i}.mlp.fc2", VISION, 96)
    norm(v + "norm", VISION)
    weights[t + "embeddings.position_ids"] = torch.arange(50)[None]
    put(t + "embeddings.word_embeddings.weight", WORDS, TEXT)
    put(t + "embeddings.position_embeddings.weight", 50, TEXT)
    norm(t + "embeddings.LayerNorm", TEXT)
    for i in range(3):
        for kind, width in (("attention", TEXT), ("crossattention", VISION)):
            name = f"{t}encoder.layer.{i}.{kind}."
            linear(name + "self.query", TEXT, TEXT), linear(name + "output.dense", TEXT, TEXT)
            linear(name + "self.key", TEXT, width), linear(name + "self.value", TEXT, width)
            norm(name + "output.LayerNorm", TEXT)
        linear(f"{t}encoder.layer.{i}.intermediate.dense", 80, TEXT)
        linear(f"{t}encoder.layer.{i}.output.dense", TEXT, 80)
        norm(f"{t}encoder.layer.{i}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", 256, VISION), linear("blip.text_proj", 256, TEXT)
    for layer, (rows, columns) in LAION.items():
        linear(f"mlp.layers.{layer}", rows, TEXT if layer == "0" else columns)
    return weights


def image_reward_by_hand(weights, pixels, ids, mask):
    """ImageReward's forward pass written out, in float64."""
    w = {key: value.double() for key, value in weights.items()}
    linear = lambda name, x: x @ w[name + ".weight"].T + w[name + ".bias"]  # noqa: E731

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    def attend(q, k, v, mask=None):
        heads = lambda x: x.view(*x.shape[:2], -1, 64).transpose(1, 2)  # noqa: E731
        scores = heads(q) @ heads(k).transpose(2, 3) / 8
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -math.inf)
        return (scores.softmax(-1) @ heads(v)).transpose(1, 2).flatten(2)

    v = "blip.visual_encoder."
    x = F.conv2d(pixels.double(), w[v + "patch_embed.proj.weight"], w[v + "patch_embed.proj.bias"],
                 PATCH)
    x = torch.cat([w[v + "cls_token"].expand(len(x), 1, -1), x.flatten(2).mT],
                  1) + w[v + "pos_embed"]
    for i in range(2):
        b = f"{v}blocks.{i}."
        x = x + linear(b + "attn.proj",
                       attend(*linear(b + "attn.qkv", norm(b + "norm1", x, 1e-6)).chunk(3, -1)))
        x = x + linear(b + "mlp.fc2", F.gelu(linear(b + "mlp.fc1", norm(b + "norm2", x, 1e-6))))
    seen = norm(v + "norm", x, 1e-6)
    t = "blip.text_encoder."
    places = w[t + "embeddings.position_embeddings.weight"][:ids.shape[1]]
    h = w[t + "embeddings.word_embeddings.weight"][ids] + places
    h = norm(t + "embeddings.LayerNorm", h, 1e-12)
    for i in range(3):
        for kind, other, see in (("attention", None, mask), ("crossattention", seen, None)):
            b = f"{t}encoder.layer.{i}.{kind}."
            other = h if other is None else other
            a = attend(linear(b + "self.query", h), linear(b + "self.key", other),
                       linear(b + "self.value", other), see)
            h = norm(b + "output.LayerNorm", linear(b + "output.dense", a) + h, 1e-12)
        b = f"{t}encoder.layer.{i}."
        a = linear(b + "output.dense", F.gelu(linear(b + "intermediate.dense", h)))
        h = norm(b + "output.LayerNorm", a + h, 1e-12)
    r = h[:, 0]
    for layer in LAION:
        r = linear(f"mlp.layers.{layer}", r)
    return (r[:, 0] - 0.16717362830052426) / 1.0333394966054072


def save_image_reward(folder, weights, suffix="pt"):
    tokenizer = pretrain_rewards.make_bert_tokenizer(folder)
    file = folder / f"ImageReward.{suffix}"
    torch.save(weights, file) if suffix == "pt" else save_file(weights, file)
    return rewards.Models(image_reward_weights=str(file)), tokenizer


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_image_reward_from_published_files_is_the_original_model(suffix, tmp_path):
    weights, images = image_reward_weights(), noise_pictures(3, IMAGE)
    for key, value in weights.items():  # embeddings so small that the ε of layer norms matters
        if re.search(r"cls_token|pos_embed|patch_embed|embeddings\.(word|position)_emb", key):
            value.mul_(0.01)
    models, tokenizer = save_image_reward(tmp_path, weights, suffix)
    prompts = ["a red circle", "two blue squares and a green star", " ".join(["red"] * 60)]
    got = rewards.score(rewards.get_reward("image_reward", models, "cpu"), images, prompts)
    ids = [[2] + [tokenizer.convert_tokens_to_ids(word) for word in p.split()][:33] + [3]
           for p in prompts]
    mask = torch.tensor([[1] * len(i) + [0] * (35 - len(i)) for i in ids])
    ids = torch.tensor([i + [0] * (35 - len(i)) for i in ids])
    pixels = torch.stack([torch.tensor(np.array(image)).permute(2, 0, 1) / 255 for image in images])
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073],
                              [0.26862954, 0.26130258, 0.27577711]]).view(2, 3, 1, 1)
    want = image_reward_by_hand(weights, (pixels - mean) / std, ids, mask)
    assert got.tolist() == pytest.approx(want.tolist(), abs=1e-4) and got.std() > 1e-2


def break_file(weights, how):
    key = "mlp.layers.4.weight" if "mlp.layers.4.weight" in weights else "layers.4.weight"
    if how == "lacks":
        del weights[key]
    elif how == "does not belong":
        weights["momentum_encoder.weight"] = torch.zeros(1)
    elif how == "wrong shape":
        weights[key] = torch.zeros(3, 5)
    return {"lacks": key, "does not belong": "momentum_encoder.weight", "wrong shape": key}[how]


@pytest.mark.parametrize("how", ["lacks", "does not belong", "wrong shape"])
@pytest.mark.parametrize("name, flag, source", [
    ("aesthetic", "--aesthetic-weights", "sac+logos+ava1-l14-linearMSE.pth"),
    ("image_reward", "--image-reward-weights", "THUDM/ImageReward/ImageReward.pt")])
def test_a_checkpoint_that_does_not_fit_is_one_clear_line(how, name, flag, source, tmp_path):
    weights = laion_weights() if name == "aesthetic" else image_reward_weights()
    key, file = break_file(weights, how), tmp_path / "weights.pt"
    save_clip(tmp_path / "clip")
    torch.save(weights, file)
    models = rewards.Models(clip=str(tmp_path / "clip"), aesthetic_weights=str(file),
                            image_reward_weights=str(file))
    with pytest.raises(ValueError) as error:
        rewards.get_reward(name, models, "cpu")
    assert all(part in str(error.value) for part in (flag, str(file), key, how,
                                                     source)), error.value
    assert "\n" not in str(error.value)


def test_every_blip_key_is_needed_and_known():
    weights = image_reward_weights()
    renamed = nets.from_blip_keys(weights)
    dropped = {key for key in weights
               if "position_ids" in key or "_proj." in key and "blocks" not in key}
    assert len(dropped) == 5 and len(renamed) == len(weights) - 5
    assert not any(key.startswith("blip.") for key in renamed)
    back = pretrain_rewards.to_blip_keys(renamed)
    assert set(back) == set(weights) - dropped and all(back[key] is weights[key] for key in back)


def test_a_file_of_another_model_is_not_image_reward(tmp_path):
    torch.save(laion_weights(), tmp_path / "mlp.pt")
    models = rewards.Models(image_reward_weights=str(tmp_path / "mlp.pt"))
    with pytest.raises(ValueError, match="--image-reward-weights .*mlp.pt.*THUDM.*lacks the key"):
        rewards.get_reward("image_reward", models, "cpu")


def test_load_exactly_names_the_first_key_and_what_it_should_be():
    weights = {"weight": torch.zeros(2, 4), "bias": torch.zeros(3)}
    with pytest.raises(ValueError) as error:
        nets.load_exactly(torch.nn.Linear(3, 2), weights, "it")
    assert str(error.value) == "it has the wrong shape at bias (3,) (want (2,), 1 more such)"


def test_a_name_on_the_hub_is_owner_repo_and_file(tmp_path, monkeypatch):
    def download(*names):
        asked.append(names)
        return str(tmp_path / "half.pth")

    asked = []
    torch.save({"w": torch.tensor([1.5]).half()}, tmp_path / "half.pth")
    monkeypatch.setattr(nets, "hf_hub_download", download)
    for name in ("trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth", "a/b/folder/file.pth"):
        (w,) = nets.read_weights(name, "--flag", "a file").values()
        assert w.dtype == torch.float32 and w.item() == 1.5
    assert asked == [("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
                     ("a/b", "folder/file.pth")]


def test_a_broken_file_is_told_from_a_missing_one(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty.pth").write_bytes(b"")
    for file, said in ((tmp_path / "empty.pth", "cannot read it"), ("none.pth", "no such file")):
        with pytest.raises(ValueError, match=f"--flag {file}: {said}; it should be a file"):
            nets.read_weights(file, "--flag", "a file")


class Evil:
    def __reduce__(self):
        return (exit, ())


@pytest.mark.parametrize("field, name, file", [
    ("aesthetic_weights", "aesthetic", "no/such/file.pth"),
    ("aesthetic_weights", "aesthetic", "missing.pth"),
    ("aesthetic_weights", "aesthetic", "PICKLE"),
    ("image_reward_weights", "image_reward", "no/such/ImageReward.pt"),
    ("clip", "aesthetic", "no/such-clip"), ("vlm", "vlm_alignment", "no/such-llava"),
    ("vlm", "vlm_strict", "no/such-llava"),
    ("bert", "vlm_alignment", "no/such-bert"), ("vlm_questions", "vlm_strict", "no_such.json")])
def test_what_is_not_there_is_named_with_its_source(field, name, file, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if file == "PICKLE":
        file = str(tmp_path / "evil.pth")
        torch.save(Evil(), file)
    flag = "--" + field.replace("_", "-")
    with pytest.raises(ValueError) as error:
        rewards.get_reward(name, rewards.Models(**{field: file}), "cpu")
    said = str(error.value)
    assert said.startswith(f"{flag} {file}") and "\n" not in said
    assert field == "vlm_questions" or "it should be" in said


# ---- vlm_alignment and vlm_strict -----------------------------------------------------------


def test_bertscore_recall_by_hand():
    reference = torch.tensor([[3.0, 0.0], [0.0, 0.5]])  # lengths do not count
    candidate = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    half = 0.5**0.5
    assert rewards.bertscore_recall(reference, candidate).item() == pytest.approx((1 + half) / 2)
    precision = rewards.bertscore_recall(candidate, reference)
    assert precision.item() == pytest.approx((1 + half + 0) / 3)
    assert rewards.bertscore_recall(reference, candidate,
                                    torch.tensor([0, 1])).item() == pytest.approx(half)
    opposite = rewards.bertscore_recall(torch.tensor([[1.0, 0.0]]), torch.tensor([[-2.0, 0.0]]))
    assert opposite.item() == -1


def save_bert(folder, layers=3):
    torch.manual_seed(0)
    tokenizer = pretrain_rewards.make_bert_tokenizer(folder)
    bert = transformers.BertModel(transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=48))
    bert.save_pretrained(folder)
    return bert.eval()


def test_token_embeddings_are_those_of_the_layer_and_know_special_tokens(tmp_path):
    bert = save_bert(tmp_path)
    encode = nets.TokenEncoder(tmp_path, 2, "cpu")
    bert.encoder.layer = bert.encoder.layer[:2]  # bert-score cuts the layers above off
    with torch.no_grad():
        (short, counts), (long, _) = encode(["a red circle", "two blue squares and a red star"])
        ids = torch.tensor([encode.tokenizer("a red circle").input_ids])
        want = bert(ids).last_hidden_state[0]
    assert counts.tolist() == [False, True, True, True, False] and len(long) == 9
    assert torch.allclose(short, want, atol=1e-5)
    with pytest.raises(ValueError, match="--bert-layer 4"):
        nets.TokenEncoder(tmp_path, 4, "cpu")


@pytest.mark.parametrize("name, layers, want", [
    ("bert-base-uncased", 12, 9), ("roberta-large", 24, 17),
    ("microsoft/deberta-xlarge-mnli", 48, 40), ("my-bert", 3, 3)])
def test_default_layer_is_the_bert_score_packages_else_the_last(
    name, layers, want, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_bert(tmp_path / name, layers).half().save_pretrained(tmp_path / name)
    encode = nets.TokenEncoder(name, None, "cpu")
    assert encode.layer == want and encode.model.dtype == torch.float32  # whatever the file has


def test_bert_layer_0_is_the_embeddings_and_minus_1_is_no_layer(tmp_path):
    bert = save_bert(tmp_path)
    encode = nets.TokenEncoder(tmp_path, 0, "cpu")
    with torch.no_grad():
        ((got, _),) = encode(["a red circle"])
        want = bert.embeddings(torch.tensor([encode.tokenizer("a red circle").input_ids]))[0]
    assert torch.allclose(got, want, atol=1e-6)
    with pytest.raises(ValueError, match="--bert-layer -1"):
        nets.TokenEncoder(tmp_path, -1, "cpu")


def save_llava(folder):
    """A random LLaVA in the layout of llava-hf/llava-1.5-7b-hf."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    torch.manual_seed(0)
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "USER", ":", "ASSISTANT", "?",
             *shapes.WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)},
                                       unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="right")
    template = ("{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
                "{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}"
                "{% endfor %}{% endfor %}"
                "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    transformers.LlavaProcessor(images, tokenizer, patch_size=16,
                                vision_feature_select_strategy="default",
                                chat_template=template, image_token="<image>",
                                num_additional_image_tokens=1).save_pretrained(folder)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=32, patch_size=16,
                                                    projection_dim=32),
        text_config=transformers.LlamaConfig(**small, vocab_size=len(words), bos_token_id=1,
                                             eos_token_id=2, pad_token_id=3),
        image_token_index=4, vision_feature_select_strategy="default", vision_feature_layer=-2,
        image_seq_length=4)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)


def test_llava_from_disk_answers_the_same_alone_and_in_a_batch(tmp_path):
    save_llava(tmp_path)
    ask = nets.Llava(str(tmp_path), "cpu")
    images = noise_pictures(2, 32)
    questions = ["what is on the left ?", "a red circle and two blue stars on the left ?"]
    together = ask(images, questions)
    assert together == [ask([image], [question])[0] for image, question in zip(images, questions)]
    # Only what is new
    assert not any(question in answer for question, answer in zip(questions, together))


def test_llava_gets_ddpos_chat_and_returns_only_the_new_words(tmp_path):
    def generate(**how):
        calls.append(how)
        new = words.convert_tokens_to_ids(["two", "red", "stars", "</s>"])
        return torch.cat([how["input_ids"], torch.tensor([new] * len(how["input_ids"]))], 1)

    save_llava(tmp_path)
    ask, calls = nets.Llava(str(tmp_path), "cpu"), []
    ask.model.generate, words = generate, ask.processor.tokenizer
    assert ask(noise_pictures(2, 32), ["a blue star ?", "?"]) == ["two red stars"] * 2
    (how,) = calls
    assert how["max_new_tokens"] == 64 and how["do_sample"] is False
    assert [" ".join(words.convert_ids_to_tokens(row)) for row in how["input_ids"]] == [
        "USER : <image> <image> <image> <image> a blue star ? ASSISTANT :",
        "<pad> <pad> <pad> USER : <image> <image> <image> <image> ? ASSISTANT :"]


def test_vlm_rewards_run_on_llava_and_bert_from_disk(tmp_path):
    save_llava(tmp_path / "llava"), save_bert(tmp_path / "bert")
    models = rewards.Models(vlm=str(tmp_path / "llava"), bert=str(tmp_path / "bert"))
    aligned = rewards.score(rewards.get_reward("vlm_alignment", models, "cpu"),
                            noise_pictures(2, 32), ["a red circle"] * 2)
    strict = rewards.score(rewards.get_reward("vlm_strict", models, "cpu"), noise_pictures(2, 32),
                           ["a red circle"] * 2)
    assert ((-1 <= aligned) & (aligned <= 1)).all() and set(strict.tolist()) <= {0.0, 0.5, 1.0}


def test_vlm_alignment_is_recall_of_the_prompt_in_the_answer(tmp_path, monkeypatch):
    save_bert(tmp_path)
    scorer = rewards.VlmAlignment(rewards.Models(bert=str(tmp_path)), "cpu")
    asked, answers = [], ["two red stars and a blue circle", ""]

    class Llava:
        reference = nets.Llava.reference

        def __call__(self, images, questions):
            asked.extend(questions)
            return answers

    scorer.ask = Llava()
    with torch.no_grad():
        got = rewards.score(scorer, [None] * 2, ["two red stars", "two red stars"])
        (r, counts), (c, _) = scorer.encode(["The image contains two red stars", answers[0]])
        cosine = F.cosine_similarity(r[:, None], c[None], dim=-1).max(1).values[1:-1].mean()
    assert asked == ["Answer concisely: what is going on in this image?"] * 2
    assert got.tolist() == [pytest.approx(cosine.item(), abs=1e-6), 0]


def test_vlm_alignment_with_the_judge_prefers_what_was_asked():
    reward = rewards.get_reward("vlm_alignment", device="cpu")
    right = picture(("triangle", "blue", 18, 20, 8), ("circle", "yellow", 44, 44, 8))
    wrong = picture(("square", "red", 32, 32, 8))
    prompt = "a blue triangle and a yellow circle"
    high, low = rewards.score(reward, [right, wrong], [prompt] * 2).tolist()
    assert high == pytest.approx(1, abs=1e-5) and low < 0.9


def test_vlm_strict_is_the_share_of_right_answers(tmp_path):
    image = picture(("circle", "red", 12, 20, 6), ("circle", "red", 32, 20, 6))
    prompts = ["two red circles", "three red circles", "two blue squares"]
    assert rewards.score(rewards.get_reward("vlm_strict"), [image] * 3,
                         prompts).tolist() == [1, 0.5, 0]
    blank = Image.new("RGB", (64, 64), (240, 240, 240))  # the judge says "none", which is not "one"
    assert rewards.score(rewards.get_reward("vlm_strict"), [blank],
                         ["a red circle"]).tolist() == [0]
    file = tmp_path / "questions.json"
    file.write_text(json.dumps({"x": [["What is it?", "RED circle"],
                                      ["How many circles are there?", "two"],
                                      ["How many stars are there?", "two"]]}))
    reward = rewards.get_reward("vlm_strict", rewards.Models(vlm_questions=str(file)))
    assert rewards.score(reward, [image], ["x"]).tolist() == pytest.approx([2 / 3])
    with pytest.raises(ValueError, match="--vlm-questions.*'y'"):
        rewards.score(reward, [image], ["y"])


def test_vlm_strict_asks_every_picture_its_own_questions():
    two = picture(("triangle", "blue", 18, 20, 8), ("circle", "yellow", 44, 44, 8))
    one = picture(("circle", "red", 32, 32, 8))
    prompts = ["a blue triangle and a yellow circle", "a red circle", "a red circle"]  # 4, 2, 2
    reward = rewards.get_reward("vlm_strict", device="cpu")
    assert rewards.score(reward, [two, one, two], prompts).tolist() == [1, 1, 0]


def test_vlm_strict_reads_a_right_answer_word_for_word():
    scorer = rewards.VlmStrict(rewards.Models(), "cpu")
    scorer.questions = lambda prompt: [["How tall?", "1.5 m"], ["Who?", "St. John"]]
    scorer.ask = lambda images, questions: ["it is 165 m tall", "St. John"]
    assert scorer([None], ["x"]) == [0.5]


@pytest.mark.parametrize("text", ["{", "{}", '{"x": []}', "[]", '{"x": [["Who?"]]}',
                                  '{"x": [["How many?", 2]]}'])
def test_questions_that_cannot_be_asked_are_named(text, tmp_path):
    file = tmp_path / "questions.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="--vlm-questions .*questions.json"):
        nets.read_questions(str(file))("x")


# ---- by name, summed, from a file -----------------------------------------------------------


def test_vlm_strict_wants_whole_words(monkeypatch):
    for said, share in (("one red circle", 1), ("none", 0), ("one red circlet", 0.5),
                        ("One RED circles", 1)):
        monkeypatch.setattr(rewards.judge, "answer", lambda objects, question: said)
        blank = Image.new("RGB", (64, 64), (240, 240, 240))
        reward = rewards.get_reward("vlm_strict", device="cpu")
        assert rewards.score(reward, [blank], ["a red circle"]).tolist() == [share]


def test_weighted_sum_by_hand():
    images = [picture(("circle", "red", 20, 30, 8)), picture()]
    prompts = ["a red circle"] * 2
    reward = rewards.get_reward("alignment=2,compressibility=-0.5")
    want = [2 * a + 0.5 * rewards.jpeg_kilobytes(image) for a, image in zip((1, 0), images)]
    assert reward.__name__ == "alignment=2,compressibility=-0.5"
    assert rewards.score(reward, images, prompts).tolist() == pytest.approx(want)


def test_reward_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def longest(images, prompts):\n    return [len(p) for p in prompts]\n")
    for spec, want in ((f"{file}:longest", [3, 1]),
                       (f"{file}:longest=2,compressibility=0", [6, 2])):
        assert rewards.score(rewards.get_reward(spec), [picture()] * 2,
                             ["abc", "x"]).tolist() == want


@pytest.mark.parametrize("text, said", [("def f(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError")])
def test_a_file_that_does_not_run_is_named(text, said, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=f"--reward .*mine.py:f: {said}"):
        rewards.get_reward(f"{tmp_path}/mine.py:f")


@pytest.mark.parametrize("spec, said", [
    ("alignment=1,beauty=2", "beauty"), ("alignment=x", "'x'"), ("alignment=1,,", ""),
    ("no_such.py:f", "no_such.py"),
    ("tiny_sd/judge.py:missing", "missing"), ("alignment=", ""), ("=1", "")])
def test_bad_specs_are_named(spec, said):
    with pytest.raises(ValueError, match="--reward " + re.escape(spec)) as error:
        rewards.get_reward(spec)
    assert said in str(error.value)


def test_a_broken_term_is_named_and_its_picture_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(rewards.REWARDS, "broken", lambda images, prompts: [1.0, math.nan])
    rewards.REWARDS["broken"].__name__ = "broken"
    images = [picture(), picture(("circle", "red", 20, 30, 8))]
    with pytest.raises(ValueError, match="^reward broken.*nan.*'a blue star'") as error:
        rewards.score(rewards.get_reward("compressibility=1,broken=0.5"), images,
                      ["x", "a blue star"])
    file = re.search(r"see (\S+)", str(error.value))[1]
    assert np.array_equal(np.array(Image.open(file)), np.array(images[1]))


def test_models_see_batches_and_no_gradient(monkeypatch):
    sizes = []

    class Counting:
        def __init__(self, models, device):
            self.weight = torch.ones(1, requires_grad=True)

        def __call__(self, images, prompts):
            sizes.append(len(images))
            value = self.weight * len(images)
            assert not value.requires_grad
            return value.expand(len(images))

    monkeypatch.setitem(rewards.REWARDS, "counting", Counting)
    assert len(rewards.score(rewards.get_reward("counting"), [None] * 70, ["x"] * 70)) == 70
    assert sizes == [32, 32, 6]


def test_every_batch_gets_its_own_prompts_also_in_a_sum(monkeypatch):
    class Numbers:
        def __init__(self, models, device):
            seen.append((models, device))

        def __call__(self, images, prompts):
            assert len(images) == len(prompts)
            return [100 * image + int(prompt) for image, prompt in zip(images, prompts)]

    seen, models = [], rewards.Models(clip="mine")
    monkeypatch.setitem(rewards.REWARDS, "numbers", Numbers)
    numbers = list(range(40))
    for spec, times in (("numbers", 1), ("numbers=2,numbers=0.5", 2.5)):
        reward = rewards.get_reward(spec, models, "abacus")
        got = rewards.score(reward, numbers, [str(n) for n in numbers])
        assert got.tolist() == [times * 101 * n for n in numbers] and reward.__name__ == spec
    assert seen == [(models, "abacus")] * 3


def test_a_bad_picture_is_saved_in_the_folder(tmp_path):
    folder, image = tmp_path / "new" / "runs", picture()
    with pytest.raises(ValueError, match=re.escape(str(folder / "bad_reward.png"))):
        rewards.score(lambda images, prompts: [math.nan], [image], ["x"], folder)
    assert np.array_equal(np.array(Image.open(folder / "bad_reward.png")), np.array(image))


@pytest.mark.parametrize("values", [None, [None], 3, [[1.0, 2.0]]])
def test_what_is_no_number_for_each_picture_is_named(values):
    def mine(images, prompts):
        return values

    with pytest.raises(ValueError, match="^reward mine: not a number for each picture"):
        rewards.score(mine, [None], ["x"])


def test_a_file_in_a_folder_with_an_equals_sign(tmp_path):
    (tmp_path / "lr=3").mkdir()
    file = tmp_path / "lr=3" / "mine.py"
    file.write_text("one, three = lambda images, prompts: [1], 3")
    for spec, want in ((f"{file}:one", 1.0), (f"{file}:one=2.5", 2.5)):
        assert rewards.score(rewards.get_reward(spec), [None], ["x"]).tolist() == [want]
    with pytest.raises(ValueError, match="three is not a function"):
        rewards.get_reward(f"{file}:three")


def test_spearman_by_hand():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rewards.spearman(a, a**3).item() == pytest.approx(1)
    assert rewards.spearman(a, -a).item() == pytest.approx(-1)
    tied = torch.tensor([5.0, 5.0, 7.0, 6.0])  # ranks 1.5, 1.5, 4, 3
    want = np.corrcoef([1, 2, 3, 4], [1.5, 1.5, 4, 3])[0, 1]
    assert rewards.spearman(a, tied).item() == pytest.approx(want)
    assert rewards.spearman(a[:1], a[:1]).isnan()


# ---- what main prints and draws ------------------------------------------------------------


def test_own_reward_file_may_hold_a_dataclass_and_import_its_neighbor(tmp_path):
    (tmp_path / "neighbor_of_mine.py").write_text("K = 3\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from neighbor_of_mine import K\n@dataclass\nclass C:\n    k: int = K\n"
        "def f(images, prompts):\n    return [C().k for _ in images]\n")
    assert rewards.get_reward(f"{tmp_path}/mine.py:f")([1, 2], ["a", "b"]) == [3, 3]


@pytest.mark.parametrize("out", ["plain", "x.bmpx"])
def test_a_picture_needs_a_pictures_name(out, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewards.mdp, "load_pipeline", None)
    with pytest.raises(ValueError, match=f"--out {out}: the name must end in"):
        rewards.main(["--out", out])


def test_main_prints_means_of_each_prompt_and_rank_correlations(tmp_path, monkeypatch, capsys):
    class Drawn:
        images = [Image.new("RGB", (4, 4), (i, i, i)) for i in (1, 2, 6, 20, 30, 10)]

    file = tmp_path / "mine.py"
    file.write_text("def bright(images, prompts):\n"
                    "    return [image.getpixel((0, 0))[0] for image in images]\n"
                    "def even(images, prompts):\n    return [2, 1, 3, 6, 5, 4]\n")
    monkeypatch.setattr(rewards.mdp, "load_pipeline", lambda model, device: None)
    monkeypatch.setattr(rewards.mdp, "rollout", lambda pipe, prompts, *_, **how: Drawn)
    rewards.main(["--rewards", f"{file}:bright,{file}:even", f"{file}:even=2,compressibility=0",
                  "--prompts", "p", "q", "--samples", "3", "--out", str(tmp_path / "a.png")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:3] == [["p", "3.000", "2.000", "4.000"], ["q", "20.000", "5.000", "10.000"]]
    # ranks 1 2 3 5 6 4 and 2 1 3 6 5 4: ρ = 1 − 6 Σd² / (n³ − n) = 1 − 6 · 4 / 210
    assert rows[5][-3:] == ["1.00", "0.89", "0.89"] and rows[6][-3:] == ["0.89", "1.00", "1.00"]


def test_the_judge_reads_pictures_also_after_the_vae():
    said = judge.report(rewards.mdp.load_pipeline("tiny_sd", "cpu").vae, n=10)
    rows = [line.split() for line in said.splitlines()[2:]]
    assert [row[0] for row in rows] == list(shapes.FAMILIES)
    assert all(float(share.strip("%")) >= 80 for row in rows for share in row[1:])


def test_the_judges_report_tells_drawn_from_decoded(monkeypatch):
    vae = rewards.mdp.load_pipeline("tiny_sd", "cpu").vae
    asked, exam, decode = [], judge.exam, vae.decode
    monkeypatch.setattr(judge, "exam", lambda *args: asked.append(args) or exam(*args))
    gray = lambda z: SimpleNamespace(sample=0 * decode(z).sample)  # noqa: E731
    monkeypatch.setattr(vae, "decode", gray)
    rows = [line.split() for line in judge.report(vae, n=4).splitlines()[2:]]
    assert asked == [(family, 4) for family in shapes.FAMILIES]
    assert all(float(row[1].strip("%")) >= 75 and row[2] == "0.0%" for row in rows)


# ---- the twins ------------------------------------------------------------------------------


def test_bradley_terry_by_hand():
    better, worse = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    want = (-math.log(1 / (1 + math.exp(-1))) + math.log(2)) / 2
    assert pretrain_rewards.bradley_terry_loss(better, worse).item() == pytest.approx(want,
                                                                                      rel=1e-6)


def test_clip_loss_by_hand():
    image, text = torch.eye(2) * 3, torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    for captions, sign in ((text, -1), (text.flip(0), 1)):
        loss = pretrain_rewards.clip_loss(image, captions, 2.0).item()
        assert loss == pytest.approx(math.log(1 + math.exp(2 * sign)), rel=1e-6)


def test_beauty_is_a_warm_background():
    def of(*background):
        image = shapes.draw([shapes.Object("red", "circle", 20, 32, 15)], background)
        pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255
        return pretrain_rewards.beauty(pixels).item()

    for background, rating in (((247, 240, 233), 8), ((233, 240, 247), 2), ((240, 240, 240), 5),
                               ((243, 240, 236), 6.5)):
        assert of(*background) == pytest.approx(rating, abs=1e-4)


def test_twins_know_what_they_were_trained_on_and_not_all():
    prompts, pairs = pretrain_rewards.drawn_pairs(100, np.random.default_rng(9))
    images = [[Image.fromarray(row[side].permute(1, 2, 0).numpy()) for row in pairs]
              for side in (0, 1)]
    proxy = rewards.get_reward("image_reward", device="cpu")
    liked = [rewards.score(proxy, side, prompts) for side in images]
    assert 0.65 < (liked[0] > liked[1]).double().mean() < 0.97
    said = rewards.score(rewards.get_reward("aesthetic", device="cpu"), images[0], prompts)
    truth = pretrain_rewards.beauty(pairs[:, 0] / 255).double()
    assert torch.corrcoef(torch.stack([said, truth]))[0, 1] > 0.7
