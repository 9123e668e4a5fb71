"""Chapter 2: rewards by hand, and forward passes of random checkpoints in published formats."""
import math
import re
import shutil
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from scipy import stats

from experiments import make_rewards
from support import models
from support import reward_models as nets
from tiny_sd import shapes

rewards = import_module("02_rewards")


def picture(*objects):
    """Drawn here, not by shapes.draw: (shape, color, x, y, radius) on light gray, 4× as large."""
    image = Image.new("RGB", (256, 256), (238, 240, 236))
    pen = ImageDraw.Draw(image)
    for shape, color, x, y, r in objects:
        draw = {"circle": pen.ellipse, "square": pen.rectangle}[shape]
        draw([4 * (x - r), 4 * (y - r), 4 * (x + r), 4 * (y + r)], fill=shapes.COLORS[color])
    return image.resize((64, 64), Image.Resampling.LANCZOS)


def noise_pictures(n, size):
    pixels = np.random.default_rng(2).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(rows) for rows in pixels]


def clip_input(images):
    """Pixels that CLIP and BLIP were trained on, of square pictures that have the right size."""
    pixels = torch.tensor(np.stack([np.array(image) for image in images])) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((pixels - mean) / std).permute(0, 3, 1, 2)


# ---- rewards that need no model -------------------------------------------------------------


@pytest.mark.equation("kilobytes", "02_rewards.jpeg_kilobytes")
@pytest.mark.equation("compressibility", "02_rewards.compressibility")
@pytest.mark.equation("incompressibility", "02_rewards.incompressibility")
def test_jpeg_rewards_are_the_file_size_in_kilobytes(tmp_path):
    images = [noise_pictures(1, 64)[0], Image.new("RGB", (64, 64), "white")]
    kilobytes = []
    for image in images:
        image.save(tmp_path / "a.jpg", quality=95)
        kilobytes.append((tmp_path / "a.jpg").stat().st_size / 1000)
    assert rewards.incompressibility(images, ["x", "y"]) == kilobytes
    assert rewards.compressibility(images, ["x", "y"]) == [-size for size in kilobytes]
    see_through = images[0].convert("RGBA")  # JPEG has no transparency
    assert rewards.jpeg_kilobytes(see_through) == kilobytes[0]
    images[0].save(tmp_path / "b.jpg", quality=30)
    assert rewards.jpeg_kilobytes(images[0], 30) == (tmp_path / "b.jpg").stat().st_size / 1000


ONE = picture(("circle", "red", 20, 30, 8))
THREE = picture(*[("square", "green", x, 40, 5) for x in (12, 32, 52)])
TWO_KINDS = picture(("square", "blue", 18, 20, 8), ("circle", "yellow", 44, 44, 8))

ALIGNMENT = [
    (ONE, "a red circle", 1), (ONE, "a blue circle", 0), (ONE, "a red square", 0),
    (ONE, "a red circle on the left", 1), (ONE, "a red circle on the right", 0),
    (ONE, "a red circle and a red circle", 1 / 2),  # one object is not counted twice
    (THREE, "three green squares", 1), (THREE, "two green squares", 2 / 3),
    (THREE, "four green squares", 3 / 4), (TWO_KINDS, "a yellow circle and a blue square", 1),
    (TWO_KINDS, "a yellow square and a blue circle", 0),
    (TWO_KINDS, "a blue square and a red circle", 1 / 2), (picture(), "a red circle", 0)]


@pytest.mark.equation("alignment", "02_rewards.alignment")
def test_alignment_is_matches_over_the_larger_count():
    images, prompts, shares = map(list, zip(*ALIGNMENT))
    assert rewards.alignment(images, prompts) == pytest.approx(shares)


# ---- aesthetic and image_reward -------------------------------------------------------------

LAION = {"0": (1024, 24), "2": (128, 1024), "4": (64, 128), "6": (16, 64), "7": (1, 16)}


@pytest.mark.equation("aesthetic", "02_rewards.Aesthetic")
def test_aesthetic_is_a_linear_map_of_the_unit_embedding(tmp_path):
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=dict(small, vocab_size=50), projection_dim=24,
        vision_config=dict(small, image_size=32, patch_size=16))
    clip, images, weights = transformers.CLIPModel(config).eval(), noise_pictures(3, 32), {}
    clip.save_pretrained(tmp_path)
    for layer, (rows, columns) in LAION.items():
        weights[f"layers.{layer}.weight"] = torch.randn(rows, columns) / columns**0.5
        weights[f"layers.{layer}.bias"] = torch.randn(rows)
    torch.save(weights, tmp_path / "linearMSE.pth")
    config = rewards.RewardFlags(clip=str(tmp_path),
                                 aesthetic_weights=str(tmp_path / "linearMSE.pth"))
    got = rewards.score(rewards.get_reward("aesthetic", config, "cpu"), images, ["x"] * 3)
    with torch.no_grad():
        f = clip.visual_projection(clip.vision_model(clip_input(images)).pooler_output)
    x = f / f.square().sum(1, keepdim=True).sqrt()
    for layer in LAION:
        x = x @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
    assert got.tolist() == pytest.approx(x[:, 0].tolist(), abs=1e-4) and got.std() > 1e-3


def image_reward_weights():
    """Random weights under every key of ImageReward.pt, in the shapes of the twin."""
    g, weights = torch.Generator().manual_seed(3), {}
    for key, value in load_file(models.find("tiny_sd/image_reward/model.safetensors")).items():
        scale = 0.3 if value.ndim == 1 else 2 * value.shape[-1] ** -0.5
        if re.search(r"cls_token|pos_embed|patch_embed|embeddings\.(word|position)_emb", key):
            scale = 0.001 * scale  # so small that the ε of layer norms matters
        weights[key] = scale * torch.randn(value.shape, generator=g)
        if re.search(r"norm\d?\.weight", key, re.IGNORECASE):
            weights[key] += 1
    unused = ["blip.vision_proj.weight", "blip.vision_proj.bias", "blip.text_proj.weight",
              "blip.text_proj.bias", "blip.text_encoder.embeddings.position_ids"]
    return weights | {key: torch.ones(1) for key in unused}, unused


def image_reward_by_hand(weights, pixels, ids, mask):
    """ImageReward's forward pass written out, in float64; it takes its weights out of the dict."""
    def take(name):
        return weights.pop(name).double()

    def linear(name, x):
        return x @ take(name + ".weight").T + take(name + ".bias")

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], take(name + ".weight"), take(name + ".bias"), eps)

    def attend(q, k, v, mask=None):
        q, k, v = (x.unflatten(2, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    v = "blip.visual_encoder."
    patches = F.conv2d(pixels.double(), take(v + "patch_embed.proj.weight"),
                       take(v + "patch_embed.proj.bias"), stride=8).flatten(2).mT
    x = torch.cat([take(v + "cls_token").expand(len(patches), 1, -1), patches], 1)
    x = x + take(v + "pos_embed")
    for i in range(3):
        b = f"{v}blocks.{i}."
        query, key, value = linear(b + "attn.qkv", norm(b + "norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(b + "attn.proj", attend(query, key, value))
        x = x + linear(b + "mlp.fc2", F.gelu(linear(b + "mlp.fc1", norm(b + "norm2", x, 1e-6))))
    image_tokens = norm(v + "norm", x, 1e-6)
    t = "blip.text_encoder."
    places = take(t + "embeddings.position_embeddings.weight")[:ids.shape[1]]
    h = take(t + "embeddings.word_embeddings.weight")[ids] + places
    h = norm(t + "embeddings.LayerNorm", h, 1e-12)
    for i in range(3):
        for kind in ("attention", "crossattention"):
            b = f"{t}encoder.layer.{i}.{kind}."
            source, visible = (h, mask) if kind == "attention" else (image_tokens, None)
            a = attend(linear(b + "self.query", h), linear(b + "self.key", source),
                       linear(b + "self.value", source), visible)
            h = norm(b + "output.LayerNorm", linear(b + "output.dense", a) + h, 1e-12)
        b = f"{t}encoder.layer.{i}."
        a = linear(b + "output.dense", F.gelu(linear(b + "intermediate.dense", h)))
        h = norm(b + "output.LayerNorm", a + h, 1e-12)
    r = h[:, 0]
    for layer in (0, 2, 4, 6, 7):
        r = linear(f"mlp.layers.{layer}", r)
    return (r[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.mark.equation("image_reward", "02_rewards.ImageReward")
def test_image_reward_is_the_original_model(tmp_path):
    weights, unused = image_reward_weights()
    images, file = noise_pictures(3, 64), tmp_path / "ImageReward.pt"
    torch.save(weights, file)
    shutil.copy(models.find("tiny_sd/image_reward/blip_config.json"), tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "star"]
    vocabulary = {word: i for i, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path)
    prompts = ["a red circle", "a blue star", " ".join(["red"] * 60)]
    config = rewards.RewardFlags(image_reward_weights=str(file))
    got = rewards.score(rewards.get_reward("image_reward", config, "cpu"), images, prompts)
    ids = torch.tensor([[2, 5, 6, 8, 3] + [0] * 30, [2, 5, 7, 9, 3] + [0] * 30,
                        [2] + [6] * 33 + [3]])
    want = image_reward_by_hand(weights, clip_input(images), ids, (ids != 0)[:, None, None])
    assert got.tolist() == pytest.approx(want.tolist(), rel=1e-4) and got.std() > 1
    assert sorted(weights) == sorted(unused)


# ---- vlm_alignment and vlm_strict -----------------------------------------------------------


@pytest.mark.equation("BERTScore recall", "02_rewards.bertscore_recall")
def test_bertscore_recall_by_hand():
    reference = torch.tensor([[3.0, 0.0], [0.0, 0.5]])  # lengths do not count
    candidate = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    half = 0.5**0.5
    assert rewards.bertscore_recall(reference, candidate).item() == pytest.approx((1 + half) / 2)
    second = rewards.bertscore_recall(reference, candidate, torch.tensor([0, 1]))
    assert second.item() == pytest.approx(half)
    opposite = rewards.bertscore_recall(reference[:1], candidate[2:])
    assert opposite.item() == -1


VECTORS = {"The": [0.0, 1.0], "image": [1.0, 1.0], "contains": [1.0, -1.0], "stars": [1.0, 0.0],
           "[CLS]": [-1.0, 0.0]}


def embed(sentences):
    """A BERT of four words: (token embeddings, which of them are not special) a sentence."""
    rows = []
    for sentence in sentences:
        words = ["[CLS]", *sentence.split()]
        rows.append((torch.tensor([VECTORS[word] for word in words]), torch.arange(len(words)) > 0))
    return rows


@pytest.mark.equation("vlm_alignment", "02_rewards.VlmAlignment")
def test_vlm_alignment_is_recall_of_the_prompt_in_the_answer():
    def ask(images, questions):
        assert questions == ["Answer concisely: what is going on in this image?"] * len(images)
        return images

    scorer = rewards.VlmAlignment(rewards.RewardFlags(vlm="judge"), "cpu")
    assert scorer.encode.reference == "{}"  # of tiny_sd's text encoder
    scorer.ask, scorer.encode = ask, embed
    embed.reference = "The image contains {}"
    got = rewards.score(scorer, ["stars", "", "The image"], ["stars", "stars", "contains"])
    half = 0.5**0.5
    # "[CLS] stars" matches The, image, contains, stars by 0, √½, √½, 1; nothing, by 0.
    want = [(0 + half + half + 1) / 4, 0, (1 + 1 + 0 + 0) / 4]
    assert got.tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.equation("vlm_strict", "02_rewards.VlmStrict")
def test_vlm_strict_is_the_share_of_right_answers():
    def ask(images, questions):
        calls.append((images, questions))
        return [f"{image} {question}" for image, question in zip(images, questions, strict=True)]

    table, calls = {"x": [["A?", "1"], ["B?", "B"], ["C?", "2"]], "y": [["D?", "2"]]}, []
    scorer = rewards.VlmStrict(rewards.RewardFlags(vlm="judge"), "cpu")
    scorer.questions, scorer.ask = table.get, ask
    assert scorer([*"2113"], [*"yxyx"]) == pytest.approx([1, 2 / 3, 0, 1 / 3])
    questions = ["D?", "A?", "B?", "C?", "D?", "A?", "B?", "C?"]
    assert calls == [([*"21111333"], questions)]  # all at once


def test_the_judge_answers_where_it_is_the_vlm():
    config = rewards.RewardFlags(vlm="judge")
    prompts = ["a blue square and a yellow circle", "two red circles", "two blue squares"]
    images = [TWO_KINDS, ONE, THREE]
    strict = rewards.score(rewards.get_reward("vlm_strict", config, "cpu"), images, prompts)
    assert strict.tolist() == [1, 1 / 2, 0]
    said = rewards.score(rewards.get_reward("vlm_alignment", config, "cpu"), images, prompts)
    assert said[0].item() == pytest.approx(1, abs=1e-5) and said[2] < 0.9


def test_an_answer_is_right_word_for_word():
    right = {"one": "one red circle", "red circle": "One RED circles", "1.5 m": "it is 1.5 m."}
    wrong = {"one": "none", "red circle": "a red circlet", "1.5 m": "it is 165 m tall"}
    assert all(rewards.holds(answer, word) for word, answer in right.items())
    assert not any(rewards.holds(answer, word) for word, answer in wrong.items())


# ---- rank correlation, and what main prints and draws ---------------------------------------


@pytest.mark.equation("ranks", "02_rewards.ranks")
@pytest.mark.equation("Spearman's ρ", "02_rewards.spearman")
@pytest.mark.parametrize("values", ([5, 5, 7, 6, 5], [0.5, -1, 0.5, 9, 9], [4, 3, 2, 1, 0]))
def test_ranks_and_their_correlation_are_scipys(values):
    x, other = torch.tensor(values), torch.tensor([1.0, 8.0, 27.0, 3.0, 2.0])
    assert rewards.ranks(x).tolist() == stats.rankdata(values).tolist()
    rho = stats.spearmanr(values, other).statistic
    assert rewards.spearman(x, other).item() == pytest.approx(rho)
    assert rewards.spearman(x[:1], x[:1]).isnan()


@pytest.mark.equation("Bradley–Terry", "experiments.make_rewards.bradley_terry_loss")
def test_bradley_terry_loss_is_minus_the_log_of_the_chance_that_the_better_wins():
    better = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    worse = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    loss = make_rewards.bradley_terry_loss(better, worse)
    wins = [math.exp(b) / (math.exp(b) + math.exp(w)) for b, w in zip(better.tolist(), worse)]
    assert loss.item() == pytest.approx(-sum(map(math.log, wins)) / 3, rel=1e-9)
    loss.backward()
    assert better.grad.tolist() == pytest.approx([-(1 - win) / 3 for win in wins])
    far = make_rewards.bradley_terry_loss(torch.tensor([-1000.0]), torch.tensor([1000.0]))
    assert far.item() == pytest.approx(2000)  # where exp overflows or log(0) is infinite


MINE = """
def first(images, prompts):
    return [1, 2, 6, 20, 30, 10][:len(images)]
def second(images, prompts):
    return [2, 1, 3, 6, 5, 4][:len(images)]
def light(images, prompts):
    return [sum(image.convert("L").tobytes()) / 4096 for image in images]
"""
PROMPTS = ["a red circle", "two blue stars"]


def test_main_draws_with_its_flags_and_prints_means_and_rank_correlations(
        pipe, tmp_path, monkeypatch, capsys):
    file, shown = tmp_path / f"{tmp_path.name}.py", []
    file.write_text(MINE)
    monkeypatch.setattr(rewards.figures, "ranking", lambda *arguments: shown.extend(arguments))
    words = [*"--samples 3 --num-steps 3 --eta 0.5 --seed 4 --guidance-scale 2 --show 2".split(),
             "--device", "cpu", "--out", str(tmp_path / "a.png"), "--prompts", *PROMPTS]
    names = "mine:first,mine:second mine:second=2,mine:light=0 mine:light"
    rewards.main([*words, "--rewards", *names.replace("mine", str(file)).split()])
    _, images, prompts, scores, show = shown
    config = SimpleNamespace(num_steps=3, eta=0.5, guidance_scale=2.0, batch_size=100, seed=4)
    assert prompts == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3 and show == 2 and len(scores) == 4
    drawn = rewards.mdp.rollout(pipe, prompts, config, "examples")
    assert np.abs(np.stack(images).astype(int) - np.stack(drawn.images)).max() <= 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    light = np.stack([image.convert("L") for image in images]).reshape(2, -1).mean(1)
    for row, prompt, mean, others in zip(rows[1:3], PROMPTS, light, ([3, 2, 4], [20, 5, 10])):
        assert " ".join(row[:-4]) == prompt
        assert [float(word) for word in row[-4:]] == pytest.approx([*others, mean], abs=1e-3)
    noise = rewards.models.decode(pipe, drawn.latents[:3, 0])
    assert rows[3][0] == "(noise)" and float(rows[3][-1]) == pytest.approx(
        np.mean([image.convert("L") for image in noise]), abs=0.1)
    # Less each prompt's mean: −2 −1 3 0 10 −10 and 0 −1 1 1 0 −1, of ranks 2 3 5 4 6 1 and
    # 3½ 1½ 5½ 5½ 3½ 1½: ρ = 10 / √(17.5 · 16).
    assert [row[-4:-1] for row in rows[6:9]] == [
        ["1.00", "0.60", "0.60"], ["0.60", "1.00", "1.00"], ["0.60", "1.00", "1.00"]]
