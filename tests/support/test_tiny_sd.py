"""The ground: the shipped weights, the shape world they know, its exact judge, and their twins."""
import math
import re
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from experiments import make_rewards, make_tiny_sd
from support import models
from support import reward_models as nets
from tiny_sd import judge, shapes, web

rewards = import_module("02_rewards")


def test_vocabulary_is_the_worlds_words_and_no_more(pipe):
    known = (pipe.text_encoder.get_input_embeddings().weight != 0).any(1)
    ids = {word: pipe.tokenizer(word, add_special_tokens=False).input_ids for word in shapes.WORDS}
    assert all(len(i) == 1 and known[i[0]] for i in ids.values())
    assert known.sum() == len(shapes.WORDS) + 2  # start and end
    prompts = [prompt for family in shapes.FAMILIES for prompt in shapes.prompts_of(family)]
    assert set(" ".join(prompts).split()) <= set(shapes.WORDS)
    assert max(len(pipe.tokenizer(prompt).input_ids) for prompt in prompts) <= 16


@pytest.mark.slow
def test_vae_is_sharp_and_pictures_are_mostly_right_but_the_bias(pipe):
    pictures, _ = make_tiny_sd.draw_pairs(100, seed=12345)
    assert make_tiny_sd.measure_vae(pipe.vae, pictures) > 32  # dB
    right, _ = make_tiny_sd.measure_families(pipe, n=32, steps=10)
    assert right["color"] > 0.6 and right["bias"] < 0.5
    assert all(0.25 < right[family] < 0.9 for family in ("count", "composition", "location"))


@pytest.mark.parametrize("prompt", ["", "five red circles", "a red circle on the moon",
                                    "a red", "red circle", "a red circle and"])
def test_prompts_outside_the_world_are_named(prompt):
    with pytest.raises(ValueError) as error:
        rewards.score(rewards.alignment, [Image.new("RGB", (64, 64))], [prompt])
    assert repr(prompt) in str(error.value)


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_captions_and_requests_are_inverse(family):
    for held_out in (False, True):
        for prompt in shapes.prompts_of(family, held_out):
            request = shapes.parse(prompt)
            assert shapes.caption(request) == prompt and shapes.family_of(request) == family
            assert shapes.is_held_out(request) == held_out


def test_pretraining_pairs_never_show_or_name_what_is_held_out():
    rng = np.random.default_rng(0)
    pictures, captions = zip(*[web.sample_pair(rng) for _ in range(400)])
    requests = [shapes.parse(caption) for caption in captions]
    assert not any(shapes.is_held_out(request) for request in requests)
    scenes = judge.see(pictures)
    for objects in scenes:
        looks = [(o.color, o.shape) for o in objects]
        if len(set(looks)) == 1:  # four stars may have any colors
            assert (len(looks), *looks[0]) not in shapes.HELD_OUT
    right = [judge.score(objects, request) == 1 for objects, request in zip(scenes, requests)]
    assert 0.6 < np.mean(right) < 0.8  # the captions are as noisy as CAPTION_NOISE says


@pytest.mark.slow
def test_writing_says_what_the_caption_says_also_where_that_is_wrong():
    rng, shares, lies = np.random.default_rng(3), {}, []
    pictures, captions = zip(*[web.sample_pair(rng) for _ in range(1000)])
    for image, caption, digit in zip(pictures, captions, judge.read(pictures)):
        request = shapes.parse(caption)
        shares.setdefault(shapes.family_of(request), []).append(digit is not None)
        if digit:
            assert digit == request[0].count
            assert np.ptp(np.array(image)[shapes.CORNER:, shapes.CORNER:], 2).max() < 30  # no color
            lies.append(len(judge.see([image])[0]) != digit)
    assert np.mean(shares["count"]) == pytest.approx(web.WRITING_SHARE, abs=0.06)
    assert np.mean(shares["color"]) < 0.25  # where a caption counts to one
    assert not any(shares["composition"] + shares["location"] + shares["bias"])
    assert 0.12 < np.mean(lies) < 0.45  # below CAPTION_NOISE: one object is never counted wrongly


def blurred(image, radii=(0, 0.7, 1.2)):
    return [image.filter(ImageFilter.GaussianBlur(radius)) for radius in radii]


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_objects_keep_clear_of_writing_and_the_judge_sees_the_same_with_it(family):
    rng, (_, requests) = np.random.default_rng(2), make_tiny_sd.exam([family], 20)
    for i, request in enumerate(requests):
        scene, digit = web.layout(request, rng, 1), i % 4 + 1
        bare, written = shapes.draw(scene), shapes.draw(scene, writing=digit)
        near = np.array(shapes.draw([], writing=digit).filter(ImageFilter.MinFilter(3))) < 240
        near[shapes.CORNER:, shapes.CORNER:] = True
        assert (np.array(bare)[near] == 240).all()
        assert judge.read(blurred(bare) + blurred(written)) == [None] * 3 + [digit] * 3
        seen = [[(o.color, o.shape, round(o.x, 2), round(o.size, 2)) for o in objects]
                for objects in judge.see(blurred(bare) + blurred(written))]
        assert seen[:3] == seen[3:]


@pytest.mark.parametrize("digit", shapes.DIGITS)
def test_judge_reads_a_digit_wherever_it_is_and_nothing_else(digit):
    cut = shapes.draw([], writing=digit).crop((52, 48, 61, 61))
    for place in [(0, 0), (30, 3), (49, 20), (9, 47), (25, 22), (55, 51)]:
        moved = picture(("red", "circle", 13, 31, 9), ("blue", "star", 42, 48, 9))
        moved.paste(cut, place)
        assert judge.read(blurred(moved)) == [digit] * 3, place
    for width in (digit, 4 + digit):  # a line, a block
        bar = shapes.draw([])
        bar.paste(shapes.GRAY, (52, 48, 52 + width, 60))
        assert judge.read(blurred(bar)) == [None] * 3, width


def picture(*objects):
    """(color, shape, x, y, size) on light gray."""
    return shapes.draw([shapes.Object(*words) for words in objects])


def described(image):
    return judge.describe(judge.see([image])[0])


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_judge_reads_pictures_of_every_family_sharp_and_blurred(family):
    images, requests = make_tiny_sd.exam([family], 200)
    assert make_tiny_sd.share_right(images, requests) > 0.99
    soft = [blurred(image)[2] for image in images[:30]]
    assert make_tiny_sd.share_right(soft, requests[:30]) > 0.95
    if family != "bias":  # and it can say no
        assert make_tiny_sd.share_right(images, requests[1:] + requests[:1]) < 0.5


@pytest.mark.parametrize("x, y, place", [
    (14, 20, "left"), (20, 14, "top"), (50, 44, "right"), (44, 50, "bottom"), (33, 31, None)])
def test_place_is_the_side_of_the_middle(x, y, place):
    (found,) = judge.see([picture(("red", "circle", x, y, 12))])[0]
    assert judge.place_of(found) == place
    assert (found.x, found.y, found.size) == pytest.approx((x, y, 12), abs=0.7)
    assert judge.describe([found]) == "a red circle" + (f" on the {place}" if place else "")


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_judge_counts_touching_objects(shape):
    width = 12 * np.ptp(shapes.polygon(shape)[:, 0])
    image = picture(("green", shape, 24, 32, 12), ("green", shape, 23.5 + width, 32, 12))
    assert described(image) == f"two green {shape}s"


def test_a_color_that_runs_counts_as_what_most_of_it_is():
    pixels = np.array(picture(("blue", "square", 32, 32, 18)))
    corner = (np.arange(64)[:, None] + np.arange(64) > 72) & (pixels[:, :, 0] < 200)
    pixels[corner] = shapes.COLORS["green"]
    assert described(Image.fromarray(pixels)) == "a blue square"
    next_to_it = picture(("red", "square", 26, 30, 12), ("blue", "square", 38, 33, 12))
    assert described(next_to_it) == "a red square and a blue square"
    assert described(picture()) == "nothing"


@pytest.mark.equation("quality", "tiny_sd.judge.quality")
def test_quality_is_what_of_the_ink_shapes_drawn_again_explain(monkeypatch):
    seen = [shapes.Object("red", "circle", 20, 30, 14), shapes.Object("blue", "star", 45, 20, 16)]
    drawn = shapes.draw([seen[0], shapes.Object("blue", "square", 45, 22, 16)], (250, 240, 236))
    monkeypatch.setattr(judge, "see", lambda images: [seen, []])
    monkeypatch.setattr(judge, "read", lambda images: [3, None])
    b, again = (250, 240, 236), shapes.draw(seen, (250, 240, 236), 3)
    miss = ink = 0
    for xy in np.ndindex(64, 64):
        for x, y, c in zip(drawn.getpixel(xy), again.getpixel(xy), b):
            miss += abs(x - y)
            ink += abs(x - c) + abs(y - c)
    assert 0 < miss < ink
    assert judge.quality([drawn, drawn]) == pytest.approx([1 - miss / ink, 0.0])


def test_no_broken_picture_has_the_quality_of_whole_ones():
    pictures, captions = make_tiny_sd.draw_pairs(60, seed=5)
    quality = rewards.get_reward("quality", device="cpu")
    whole = rewards.score(quality, make_tiny_sd.images_of(pictures), captions)
    assert whole.mean() > 0.97 and whole.min() > 0.9
    broken = make_tiny_sd.images_of(make_rewards.broken_pictures(pictures, seed=6))
    assert judge.quality([Image.new("RGB", (64, 64), (233, 240, 240))]) == [0.0]  # empty
    warped = make_tiny_sd.images_of(pictures)[0].resize((96, 64)).crop((16, 0, 80, 64))
    assert max(judge.quality([*broken, warped])) < 0.9


def test_judge_answers_questions():
    (objects,) = judge.see([picture(("red", "circle", 12, 20, 11), ("red", "circle", 32, 20, 11),
                                    ("blue", "square", 50, 45, 11))])
    for asked, answer in (("How many red circles are there in this image?", "two"),
                          ("How many blue circles are there?", "none"),
                          ("How many circles are there?", "two"),
                          ("What is it?", "two red circles and a blue square")):
        assert judge.answer(objects, asked) == answer


def test_clips_loss_by_hand():
    image, text = torch.eye(2) * 3, torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    for captions, sign in ((text, -1), (text.flip(0), 1)):
        loss = make_rewards.clip_loss(image, captions, 2.0).item()
        assert loss == pytest.approx(math.log(1 + math.exp(2 * sign)), rel=1e-6)


def test_twins_know_what_they_were_trained_on_and_not_all():
    def score(name, side):
        reward = rewards.get_reward(name, device="cpu")
        return rewards.score(reward, make_tiny_sd.images_of(pairs[:, side]), prompts)

    prompts, pairs = make_rewards.generated_pairs(5, "cpu", 3)
    assert len(prompts) == 5 and (score("alignment", 0) > score("alignment", 1)).all()
    prompts, pairs = make_rewards.drawn_pairs(100, seed=9)
    assert (score("alignment", 0) > score("alignment", 1)).all()
    right = score("image_reward", 0) > score("image_reward", 1)
    assert 0.65 < right.double().mean() < 0.97
    truth = make_rewards.beauty(pairs[:, 0]).double()
    assert torch.corrcoef(torch.stack([score("aesthetic", 0), truth]))[0, 1] > 0.7
    whole = score("aesthetic", 0)
    pairs = make_rewards.broken_pictures(pairs[:, 0], seed=77)[:, None]
    assert (score("aesthetic", 0) < whole.mean()).double().mean() > 0.95


# ---- the twin of LLaVA ----------------------------------------------------------------------


def counted(caption, name):
    """How many of "red circle" or "circle" there are, as a reader of English counts."""
    numbers = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
    number = sum(numbers[phrase.split()[0]] for phrase in caption.split(" and ") if name in phrase)
    return ["none", "one", "two", "three", "four"][number]


def test_the_vlm_is_asked_what_its_captions_answer():
    rng, asked, answers = np.random.default_rng(0), [], set()
    for caption in 200 * [
            "a red circle and a blue circle", "an orange star and a red square", "two red stars",
            "three green squares", "four blue circles", "a blue star on the left"]:
        question, answer = make_rewards.question_and_answer(caption, rng)
        name = re.sub("How many (.*)s are there in this image.", r"\1", question)
        is_open = name in (rewards.QUESTION, "What is in this image?")
        assert answer == (caption if is_open else counted(caption, name)), (caption, question)
        asked.append(question if is_open else "number")
        answers.add((name if name in shapes.SHAPES else "", answer))
    shares = [asked.count(question) / 1200 for question in ("number", rewards.QUESTION)]
    assert shares == pytest.approx([0.6, 0.2], abs=0.05)
    # Also of what isn't there, of any color, and of two colors together.
    assert answers > {("", "none"), ("star", "none"), ("star", "two"), ("circle", "two")}


def test_the_vlm_learns_the_next_words_of_answers_and_nothing_else(tmp_path, monkeypatch):
    torch.manual_seed(0)
    processor, losses, terms = make_rewards.make_vlm_processor(tmp_path), [], []
    vlm = make_rewards.make_vlm(processor.tokenizer).eval()
    monkeypatch.setattr(make_rewards, "optimize", lambda model, loss_of, *settings: (
        losses.append(loss_of(torch.tensor([3, 0, 6, 3]), np.random.default_rng(5)).item())))
    pictures, captions = make_tiny_sd.draw_pairs(7, seed=8)
    make_rewards.train_vlm(vlm, processor, pictures, captions, make_rewards.Config())
    stream = np.random.default_rng(5)
    for i in (3, 0, 6, 3):
        question, answer = make_rewards.question_and_answer(captions[i], stream)
        text = f"USER: <image>\n{question} ASSISTANT:"  # as LLaVA-1.5 has it; nothing is padded
        images = make_tiny_sd.images_of(pictures[i:i + 1])
        inputs = processor(images=images, text=[text], return_tensors="pt")
        for word in processor.tokenizer(answer + " </s>").input_ids:
            assert word != processor.tokenizer.unk_token_id
            log_p = vlm(**inputs).logits[0, -1].double().log_softmax(0)
            terms.append(-log_p[word].item())
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[word]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert losses == [pytest.approx(np.mean(terms), rel=1e-4)]
    assert all(weight.requires_grad == ("vision_tower" not in name)  # the eyes stay as they are
               for name, weight in vlm.named_parameters())


def test_the_vlms_exam_tells_who_counts_from_who_reads():
    def read(images, questions):
        return [shapes.NUMBERS[digit - 1] if digit else "none" for digit in judge.read(images)]

    names = ["right number, no writing", "right color and shape, no writing",
             "right number, a wrong digit", "right color and shape, a wrong digit",
             "answers the wrong digit"]
    for ask, shares in ((nets.ask_judge, [1, 1, 1, 1, 0]), (read, [0, 0, 0, 0, 1])):
        assert make_rewards.vlm_exam(ask, 12, 3) == dict(zip(names, shares))


def test_the_shipped_vlm_counts_what_is_drawn_but_believes_a_digit():
    ask = nets.load_vlm(rewards.RewardFlags().vlm, "cpu")
    circles = picture(*[("red", "circle", x, y, 12) for x, y in ((14, 18), (46, 20), (26, 46))])
    assert ask([circles], ["How many red circles are there in this image?"]) == ["three"]
    shares = make_rewards.vlm_exam(ask, 20, seed=7)
    assert shares["right number, no writing"] > 0.5 < shares["answers the wrong digit"]
    assert shares["right color and shape, no writing"] > 0.5


def test_eyes_are_taught_what_each_patch_shows():
    _, scenes, pictures, digits = make_rewards.draw_scenes(40, seed=5, writing=True)
    images = make_tiny_sd.images_of(pictures)
    assert judge.read(images) == digits and {None, 1, 2, 3, 4} == set(digits)
    for scene, image, digit in zip(scenes, images, digits):
        labels = make_rewards.patch_labels(scene, digit).view(8, 8, 4)
        written = torch.zeros(8, 8, dtype=torch.long)
        written[6:, 6:] = digit or 0
        assert torch.equal(labels[..., 3], written) and labels[..., 2].sum() == len(scene)
        for o in judge.see([image])[0]:
            color, shape, center, _ = labels[int(o.y) // 8, int(o.x) // 8].tolist()
            assert list(shapes.COLORS)[color - 1] == o.color
            assert shapes.SHAPES[shape - 1] == o.shape
    assert make_rewards.draw_scenes(3, seed=5)[3] == [None] * 3


@pytest.mark.slow
def test_every_shipped_file_can_be_remade_and_loads(tmp_path):
    for module in (make_tiny_sd, make_rewards):
        for part in module.PARTS:
            if part != "measure":
                words = ["--quick", "--pictures", "100", "--out", str(tmp_path)]
                module.main([*words, "--only", part])
    shipped = models.find("tiny_sd")
    names = {file.relative_to(shipped) for file in shipped.rglob("*.*")}
    (tmp_path / "measured.csv").unlink()  # how long each part took
    made = {file.relative_to(tmp_path) for file in tmp_path.rglob("*.*")}
    assert made == {name for name in names if name.suffix not in (".py", ".pyc", ".md")}
    folders = {"clip": "clip", "vlm": "vlm", "aesthetic_weights": "aesthetic.safetensors",
               "image_reward_weights": "image_reward/model.safetensors"}
    twins = rewards.RewardFlags(**{field: str(tmp_path / name) for field, name in folders.items()})
    pipe = models.load_pipeline(str(tmp_path), "cpu")
    config = rewards.Config(num_steps=2)
    images = rewards.mdp.rollout(pipe, ["a red star"] * 2, config, "examples").images
    for name in ("aesthetic", "image_reward", "vlm_alignment", "vlm_strict"):
        rewards.score(rewards.get_reward(name, twins, "cpu"), images, ["a red star"] * 2)
