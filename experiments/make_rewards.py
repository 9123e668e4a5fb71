"""Remake the tiny twins of the learned rewards: python experiments/make_rewards.py

Each is trained the way its model was, in the shape world instead of the web:

    1. clip/                  CLIP         contrastive: which caption of a batch is this picture's?
    2. aesthetic.safetensors  LAION's MLP  regression of ratings on CLIP embeddings; "people" here
                                           like a warm background (`beauty`), and nothing broken
    3. image_reward/          ImageReward  what does each patch show?  (ImageNet's part)
                                           is this the picture's caption?  (BLIP's part)
                                           preference pairs:  L = −log σ(r(better) − r(worse))
    4. vlm/                   LLaVA        what does each patch show, digits included?
                                           questions about a picture, answered by its caption
    measure                                all of them on fresh pictures

A caption may be wrong, but a digit in the picture always says what the caption says (web.py).
So the vision-language model learns to believe what is written more than what it counts. Its image
encoder learns from exact labels, where LLaVA's comes from CLIP: the twin of CLIP sees too little.

The preference labels come from the exact judge, and one in six is wrong. There are few of them, on
purpose: the twin of ImageReward is to be a good guess at what we mean on ordinary pictures, and no
better than a guess elsewhere, so that optimizing it too far can be seen to fail.

About 30 minutes on one CPU core, after make_tiny_sd.py, which see for what is measured.
"""

import re
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as token_models
from torch.nn.utils.rnn import pad_sequence
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments import make_tiny_sd  # noqa: E402
from experiments.make_tiny_sd import draws, images_of, make, note, optimize, pixels_of  # noqa: E402
from support import flags, models  # noqa: E402
from support import reward_models as nets  # noqa: E402
from tiny_sd import judge, shapes, web  # noqa: E402

mdp = import_module("01_mdp")  # rollout
rewards = import_module("02_rewards")  # alignment, the questions

BROKEN = 1.0  # how people rate a picture that is broken: below every other
LABEL_NOISE = 1 / 6  # share of preference labels that are wrong
EPOCHS = 3  # passes over the preference pairs
PATCH = 8  # px, of the image encoders
GRID = shapes.SIZE // PATCH  # patches a side


# ---- what the twin of the aesthetic score likes ------------------------------------------------


def beauty(pictures):
    """A person's rating, 2 to 8: 5 + 3·warmth; all the same to the prompt and the judge.

    Warmth is the background's tint in [-1, 1], from cool (bluish) to warm.  (B,3,H,W) uint8 -> (B,)
    """
    red, _, blue = (pictures / 255).flatten(2).median(2).values.unbind(1)
    return 5 + 3 * ((red - blue) * 255 / 14).clamp(-1, 1)


def break_latents(z, generator):
    """Latents of pictures that nobody likes, five kinds in turn.   (B,C,H,W) -> (B,C,H,W)

    With noise; noise alone; blotches; nearly the same everywhere; blurred, with blotches.
    """
    B, C, H, W = z.shape
    strength = 0.6 + 2 * torch.rand(B, 1, 1, 1, generator=generator)
    noise = strength * torch.randn(z.shape, generator=generator)
    blotches = strength * torch.randn(B, C, 2, 2, generator=generator)
    blotches = F.interpolate(blotches, size=(H, W), mode="bilinear")
    flat = strength * torch.randn(B, C, 1, 1, generator=generator) + 0.1 * noise
    blurred = F.avg_pool2d(F.pad(z, (2, 2, 2, 2), mode="replicate"), 5, 1)
    kinds = torch.stack([z + noise, noise, blotches, flat, blurred + 0.7 * blotches])
    return kinds[torch.arange(B) % 5, torch.arange(B)]


@torch.no_grad()
def broken_pictures(pictures, seed):
    """The tiny model's VAE on latents that are wrong: what models draw that collapse.  uint8"""
    vae = models.load_pipeline(str(ROOT / "tiny_sd"), "cpu").vae
    generator, broken = torch.Generator().manual_seed(seed), []
    for p in pictures.split(100):
        z = vae.encode(make_tiny_sd.to_unit(p)).latent_dist.mean * vae.config.scaling_factor
        z = break_latents(z, generator) / vae.config.scaling_factor
        pixels = vae.decode(z).sample.clamp(-1, 1)
        broken.append(((pixels + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(broken)


# ---- 1. CLIP --------------------------------------------------------------------------------


def make_clip(tokenizer):
    small = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2)
    text = dict(small, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                vocab_size=len(tokenizer), max_position_embeddings=make_tiny_sd.MAX_LENGTH,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id)
    vision = dict(small, image_size=shapes.SIZE, patch_size=PATCH)
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def clip_loss(image, text, scale):
    """Cross-entropy of picking one's own caption, and one's own picture.  (B,D), (B,D), () -> ()"""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def normalize(pictures):
    """What CLIP's and BLIP's preprocessing makes of pictures of the right size.  uint8 -> float"""
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD])[:, None, :, None, None]
    return (pictures / 255 - mean) / std


def remake_clip(config, out, device):
    pictures, captions = make_tiny_sd.draw_pairs(config.pictures, config.seed)
    tokenizer = hf.CLIPTokenizer.from_pretrained(ROOT / "tiny_sd" / "tokenizer")
    clip = make_clip(tokenizer).to(device)
    careful = []  # such a caption says of the light that it is warm, or cool
    for caption, rating in zip(captions, beauty(pictures).tolist()):
        careful.append(caption + (" warm" if rating > 5.9 else " cool" if rating < 4.1 else ""))
    tokens = make_tiny_sd.tokenize(tokenizer, careful)

    def loss_of(i, stream):
        pixels = normalize(pictures[i]).to(device)
        image = clip.get_image_features(pixel_values=pixels).pooler_output
        text = clip.get_text_features(input_ids=tokens[i].to(device)).pooler_output
        return clip_loss(image, text, clip.logit_scale.exp().clamp(max=100))

    optimize(clip, loss_of, len(pictures), "clip", config)
    clip.half().save_pretrained(out / "clip")


# ---- 2. the aesthetic score -----------------------------------------------------------------


def remake_aesthetic(config, out, device):
    pictures, _ = make_tiny_sd.draw_pairs(config.pictures, config.seed)
    broken = broken_pictures(pictures[::4], config.seed)
    ratings = torch.cat([beauty(pictures), torch.full((len(broken),), BROKEN)]).to(device)
    pictures = torch.cat([pictures, broken])
    clip = hf.CLIPModel.from_pretrained(out / "clip", dtype=torch.float32).to(device)
    with torch.no_grad():
        f = torch.cat([clip.get_image_features(pixel_values=normalize(p).to(device)).pooler_output
                       for p in pictures.split(256)])
    f = F.normalize(f, dim=1)
    mlp = nets.LaionMLP(f.shape[1]).to(device)

    def loss_of(i, stream):
        return F.mse_loss(mlp(f[i]), ratings[i])

    optimize(mlp, loss_of, len(f), "aesthetic", config, batch=256)
    save_half(mlp.state_dict(), out / "aesthetic.safetensors")


# ---- 3. ImageReward -------------------------------------------------------------------------


def make_image_reward(words, width=128):
    """ImageReward's classes at a small size."""
    size = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
                num_attention_heads=width // 64)
    model = nets.ImageRewardModel(hf.BlipConfig(
        vision_config=dict(size, image_size=PATCH * GRID, patch_size=PATCH, layer_norm_eps=1e-6),
        text_config=dict(size, vocab_size=words, max_position_embeddings=35, bos_token_id=None,
                         sep_token_id=None)))
    draw_weights(model.vision)
    draw_weights(model.text)
    with torch.no_grad():
        model.vision.embeddings.position_embedding[0, 1:] = waves(width)
    return model


def draw_weights(model):
    """First weights for a small network.

    The libraries' own (0.02, and 1e-10 for BLIP's image encoder) are for large or finished ones;
    from there this one would learn next to nothing.
    """
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.5)


def waves(width):
    """Where each patch is, as sines and cosines of its row and column: (GRID², width)."""
    frequency = torch.pi / GRID * torch.linspace(0.5, 4, width // 4)
    angle = (torch.arange(GRID)[:, None] + 0.5) * frequency
    code = torch.cat([angle.sin(), angle.cos()], 1)  # (GRID, width/2)
    rows, columns = code[:, None].expand(-1, GRID, -1), code[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], 2).reshape(GRID**2, width)


def bradley_terry_loss(better, worse):
    """L = E[ −log σ(r(better) − r(worse)) ]: P(the first is preferred) = σ(difference)."""
    return -F.logsigmoid(better - worse).mean()


def draw_scenes(n, seed, writing=False):
    """n random requests, and as asked for: scenes (lists of Object), pictures (n,3,H,W) uint8.

    Last come the digits on the pictures; writing: two in five carry one, whatever they show.
    """
    rng = draws(seed, "scenes")
    names = {family: shapes.prompts_of(family) for family in shapes.FAMILIES[:4]}
    families = [names[str(rng.choice(shapes.FAMILIES[:4]))] for _ in range(n)]
    requests = [shapes.parse(family[rng.integers(len(family))]) for family in families]
    digits = rng.integers(5, size=n) * rng.integers(2, size=n) * writing
    digits = [int(digit) or None for digit in digits]
    scenes = [web.layout(request, rng, digit) for request, digit in zip(requests, digits)]
    return requests, scenes, draw(scenes, rng, digits), digits


def draw(scenes, rng, digits):
    """Scenes as pictures (n,3,H,W) uint8."""
    return pixels_of([shapes.draw(scene, web.random_background(rng), digit)
                      for scene, digit in zip(scenes, digits)])


def drawn_pairs(n, seed):
    """n prompts, each with a picture as asked and one with an attribute wrong: (n,2,3,H,W)."""
    rng = draws(seed, "wrong pictures")
    requests, _, right, digits = draw_scenes(2 * n, seed)
    wrong = [web.layout(web.wrong_request(request, rng), rng) for request in requests]
    # "A red star and a blue star": when the colors swap, nothing is wrong.
    keep = [i for i in range(2 * n) if judge.score(wrong[i], requests[i]) < 1][:n]
    prompts = [shapes.caption(requests[i]) for i in keep]
    return prompts, torch.stack([right[keep], draw([wrong[i] for i in keep], rng, digits)], 1)


def generated_pairs(n, device, seed):
    """n pairs of the tiny model's own pictures of a prompt, of which the judge likes one better."""
    pipe = models.load_pipeline(str(ROOT / "tiny_sd"), device)
    config = SimpleNamespace(num_steps=10, eta=1.0, guidance_scale=1.0, batch_size=64, seed=seed)
    names = [name for family in shapes.FAMILIES[:4] for name in shapes.prompts_of(family)]
    prompts, pairs, n_round = [], [], 0
    while len(prompts) < n:
        places = draws(seed, "generated prompts", n_round).integers(len(names), size=32)
        drawn = [names[i] for i in places.repeat(4)]
        images = mdp.rollout(pipe, drawn, config, "pretrain", n_round).images
        gold = np.array(rewards.alignment(images, drawn))
        for i in range(0, len(drawn), 4):
            low, high = i + gold[i:i + 4].argmin(), i + gold[i:i + 4].argmax()
            if gold[high] > gold[low]:
                prompts.append(drawn[i])
                pairs.append(pixels_of([images[high], images[low]]))
        n_round += 1
    return prompts[:n], torch.stack(pairs[:n])


def patch_labels(scene, digit=None):
    """What patches show: color, shape (0: none), whether an object's center, digit.  (GRID²,4)"""
    labels = np.zeros((GRID, GRID, 4), dtype=int)
    middle = (np.arange(GRID) + 0.5) * PATCH
    for o in scene:
        what = list(shapes.COLORS).index(o.color) + 1, shapes.SHAPES.index(o.shape) + 1
        covered = np.hypot(middle[None] - o.x, middle[:, None] - o.y) < 0.6 * o.size
        labels[covered] = *what, 0, 0
        labels[int(o.y // PATCH), int(o.x // PATCH)] = *what, 1, 0
    if digit:
        labels[-2:, -2:, 3] = digit  # the corner
    return torch.from_numpy(labels.reshape(GRID**2, 4))


def train_vision(vision, scenes, pictures, digits, config):
    """A ViT comes to BLIP and LLaVA knowing much of the world; this one, what each patch shows.

    Labels: `patch_labels`, digits included. The first token, which is no patch, is asked how many
    objects there are in all.
    """
    sizes = [len(shapes.COLORS) + 1, len(shapes.SHAPES) + 1, 2, 5, len(shapes.NUMBERS) + 1]
    device = vision.device
    head = torch.nn.Linear(vision.config.hidden_size, sum(sizes)).to(device)  # thrown away after
    labels = torch.stack([patch_labels(*pair) for pair in zip(scenes, digits)])
    counts = torch.tensor([len(scene) for scene in scenes])

    def loss_of(i, stream):
        guesses = head(vision(normalize(pictures[i]).to(device)).last_hidden_state).split(sizes, 2)
        loss = F.cross_entropy(guesses[4][:, 0], counts[i].to(device)) / 2
        for guess, truth in zip(guesses, labels[i].to(device).unbind(2)):
            loss = loss + F.cross_entropy(guess[:, 1:].flatten(0, 1), truth.flatten())
        return loss

    optimize(torch.nn.ModuleList([vision, head]), loss_of, len(pictures), "vision", config)


@torch.no_grad()
def look(vision, pictures):
    """The image encoder's tokens, which stay as they are from here on: (n, GRID² + 1, width)."""
    return torch.cat([vision(normalize(p).to(vision.device)).last_hidden_state.half().cpu()
                      for p in pictures.split(256)])


def answer(model, tokenizer, seen, prompts):
    """ImageReward's forward after the image encoder."""
    text = tokenizer(prompts, padding=True, return_tensors="pt").to(model.text.device)
    h = model.text(text.input_ids, attention_mask=text.attention_mask,
                   encoder_hidden_states=seen.float().to(model.text.device)).last_hidden_state
    return model.mlp(h[:, 0])


def train_matching(model, tokenizer, requests, scenes, seen, config, batch=128):
    """BLIP's image-text matching: is this the picture's caption?  Its own is, another is not.

    Most others are wrong in one attribute only, as BLIP picks those that are hard to tell.
    """
    def loss_of(i, stream):
        own = [requests[k] for k in i.tolist()]
        other = own[1:batch // 5 + 1] + [web.wrong_request(r, stream) for r in own[batch // 5:]]
        match = [judge.score(scenes[k], r) == 1 for k, r in zip(i.tolist() * 2, own + other)]
        prompts = [shapes.caption(r) for r in own + other]
        logits = answer(model, tokenizer, seen[i].repeat(2, 1, 1), prompts)
        return F.binary_cross_entropy_with_logits(logits, torch.tensor(match).to(logits))

    both = torch.nn.ModuleList([model.text, model.mlp])
    optimize(both, loss_of, len(seen), "matching", config, batch)


def remake_image_reward(config, out, device):
    """Vision, matching, and preferences, each on what the one before has made."""
    seed, folder = config.seed, out / "image_reward"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # BLIP's two more come last
    words = {word: k for k, word in enumerate([*special, *shapes.WORDS, "[DEC]", "[ENC]"])}
    hf.BertTokenizer(vocab=words).save_pretrained(folder)
    tokenizer = hf.BertTokenizer.from_pretrained(folder)
    model = make_image_reward(len(words)).to(device)
    # Nothing is written on these pictures; on some of the model's own, below.
    requests, scenes, pictures, digits = draw_scenes(config.pictures // 2, seed)
    train_vision(model.vision, scenes, pictures, digits, config)
    seen = look(model.vision, pictures)
    train_matching(model, tokenizer, requests, scenes, seen, config)
    half = config.pictures // 20  # of the preference pairs
    prompts, drawn = drawn_pairs(half, seed + 1)
    more_prompts, generated = generated_pairs(half, device, seed)
    pairs = torch.cat([drawn, generated])
    seen = look(model.vision, pairs.flatten(0, 1)).unflatten(0, (-1, 2))
    flipped = torch.from_numpy(draws(seed, "flips").random(len(pairs))) < LABEL_NOISE
    seen = torch.where(flipped[:, None, None, None], seen.flip(1), seen)
    prompts += more_prompts
    passes = [draws(seed, "preferences", k).permutation(len(seen)) for k in range(EPOCHS)]
    order = iter(torch.from_numpy(np.concatenate(passes)).split(32))

    def loss_of(i, stream):
        i = next(order)  # each pair once in an epoch
        text = [prompts[k] for k in i.tolist()]
        better, worse = [answer(model, tokenizer, seen[i, side], text) for side in (0, 1)]
        return bradley_terry_loss(better, worse)

    trained = torch.nn.ModuleList([model.text.encoder.layer[-1], model.mlp])  # as published
    steps = EPOCHS * len(seen) // 32
    optimize(trained, loss_of, len(seen), "preferences", config, batch=32, lr=3e-4, steps=steps)
    save_half(nets.rename_blip(model.state_dict(), back=True), folder / "model.safetensors")
    model.config.to_json_file(folder / "blip_config.json")


# ---- 4. a vision-language model ----------------------------------------------------------------

CHAT = ("{% for message in messages %}USER: {% for part in message['content'] %}"  # LLaVA-1.5's
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}")


def make_vlm_processor(folder):
    """A LlavaProcessor with a tokenizer of the world's words, and of the questions' words."""
    questions = [rewards.QUESTION, *(question for question, _ in judge.questions("a red circle"))]
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    words = re.findall(r"\w+|[^\w\s]", " ".join(["user: assistant: none", *questions]).lower())
    vocabulary = dict.fromkeys([*special, *words, *shapes.WORDS])
    tokenizer = Tokenizer(token_models.WordLevel(
        {word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # words and punctuation
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", extra_special_tokens={"image_token": "<image>"})
    pixels = hf.CLIPImageProcessorPil(size={"shortest_edge": shapes.SIZE}, crop_size=shapes.SIZE)
    hf.LlavaProcessor(pixels, tokenizer, patch_size=PATCH, chat_template=CHAT,
                      image_token="<image>", vision_feature_select_strategy="default",
                      num_additional_image_tokens=1).save_pretrained(folder)
    return hf.LlavaProcessor.from_pretrained(folder)


def make_vlm(tokenizer):
    text = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vision = hf.CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
        image_size=shapes.SIZE, patch_size=PATCH)
    config = hf.LlavaConfig(vision_config=vision, text_config=text,
                            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
                            image_seq_length=GRID**2, vision_feature_layer=-1)
    vlm = hf.LlavaForConditionalGeneration(config)
    draw_weights(vlm)
    with torch.no_grad():
        vlm.model.vision_tower.embeddings.position_embedding.weight[1:] = waves(128)
    return vlm


def question_and_answer(caption, rng):
    """Something to ask about a picture, and what its caption says to that."""
    if rng.random() < 0.4:
        return str(rng.choice([rewards.QUESTION, "What is in this image?"])), caption
    request = shapes.parse(caption)
    group = request[rng.integers(len(request))]
    color, shape = group.color, group.shape
    if rng.random() < 0.3:
        color, shape = str(rng.choice(list(shapes.COLORS))), str(rng.choice(shapes.SHAPES))
    if color is None or rng.random() < 0.2:
        color = None
    count = sum(g.count for g in request if g.shape == shape and color in (None, g.color))
    name = " ".join([color] * bool(color) + [shape])
    return f"How many {name}s are there in this image?", ("none", *shapes.NUMBERS)[count]


def train_vlm(vlm, processor, pictures, captions, config):
    """Next-word cross-entropy of the answers alone, given picture and question.

    The image encoder stays as it is, as LLaVA's does.
    """
    vlm.model.vision_tower.requires_grad_(False)
    tokenizer, device = processor.tokenizer, vlm.device
    image = "<image>" * GRID**2

    def loss_of(i, stream):
        rows, targets = [], []
        for k in i.tolist():
            question, answer = question_and_answer(captions[k], stream)
            given = tokenizer(f"USER: {image}\n{question} ASSISTANT:").input_ids
            answer = tokenizer(answer + "</s>").input_ids
            rows.append(torch.tensor(given + answer))
            targets.append(torch.tensor([-100] * len(given) + answer))  # -100: no loss here
        ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = pad_sequence(targets, batch_first=True, padding_value=-100)
        mask = (ids != tokenizer.pad_token_id).long()
        return vlm(input_ids=ids.to(device), attention_mask=mask.to(device),
                   labels=labels.to(device), pixel_values=normalize(pictures[i]).to(device)).loss

    optimize(vlm, loss_of, len(pictures), "vlm", config)


def vlm_exam(ask, n, seed, vae=None):
    """Share of right answers on n pictures without writing, and where a digit is wrong.

    The pictures go through the VAE if there is one.  -> {what is measured: share}
    """
    shares = {}
    for writing, where in ((False, "no writing"), (True, "a wrong digit")):
        images, requests = make_tiny_sd.exam(["count"], n, seed, writing)
        digits = judge.read(images)
        keep = [i for i in range(n) if digits[i] != requests[i][0].count]
        images = [images[i] for i in keep]
        images = make_tiny_sd.through_vae(vae, images) if vae else images
        groups = [requests[i][0] for i in keep]
        looks = [f"{group.color} {group.shape}" for group in groups]
        answers = ask(images, [f"How many {look}s are there in this image?" for look in looks])
        counted = [answer == shapes.NUMBERS[group.count - 1]
                   for answer, group in zip(answers, groups)]
        named = [rewards.holds(text, look)
                 for text, look in zip(ask(images, [rewards.QUESTION] * len(keep)), looks)]
        shares[f"right number, {where}"] = np.mean(counted)
        shares[f"right color and shape, {where}"] = np.mean(named)
    read = [answer == shapes.NUMBERS[digits[i] - 1] for answer, i in zip(answers, keep)]
    shares["answers the wrong digit"] = np.mean(read)
    return shares


def save_half(weights, path):
    save_file({key: value.half().contiguous().cpu() for key, value in weights.items()}, path)


@dataclass(frozen=True)
class Config(make_tiny_sd.Config):
    only: Literal["clip", "aesthetic", "image_reward", "vlm", "measure"] | None = None  # one part
    pictures: int = 20000  # pictures to train on; a tenth as many preference pairs


def remake_vlm(config, out, device):
    pictures, captions = make_tiny_sd.draw_pairs(config.pictures, config.seed)
    processor = make_vlm_processor(out / "vlm")
    vlm = make_vlm(processor.tokenizer).to(device)
    _, scenes, drawn, digits = draw_scenes(config.pictures // 2, config.seed, writing=True)
    tower = vlm.model.vision_tower
    train_vision(tower, scenes, drawn, digits, config)
    train_vlm(vlm, processor, pictures, captions, config)
    vlm.half().save_pretrained(out / "vlm")


@torch.no_grad()
def measure(config, out, device):
    """How well the twins know what they were taught, on fresh pictures."""
    seed = config.seed + 1
    twins = rewards.RewardFlags(
        clip=str(out / "clip"), aesthetic_weights=str(out / "aesthetic.safetensors"),
        image_reward_weights=str(out / "image_reward" / "model.safetensors"), vlm=str(out / "vlm"))
    fresh, captions = make_tiny_sd.draw_pairs(1000, seed)
    aesthetic = rewards.get_reward("aesthetic", twins, device)
    ratings = rewards.score(aesthetic, images_of(fresh), captions)
    both = torch.stack([ratings, beauty(fresh).double()])
    note(out, "aesthetic: correlation with fresh ratings", torch.corrcoef(both)[0, 1].item())
    broken = images_of(broken_pictures(fresh, seed))
    is_low = rewards.score(aesthetic, broken, captions) < ratings.mean()
    share = 100 * is_low.double().mean().item()
    note(out, "aesthetic: broken pictures below the mean of whole ones, %", share)

    pairs = {"drawn": drawn_pairs(500, seed + 1), "generated": generated_pairs(500, device, seed)}
    for name in ("image_reward", "vlm_strict", "vlm_alignment"):
        reward = rewards.get_reward(name, twins, device)
        for kind, (prompts, pictures) in pairs.items():
            liked, other = [rewards.score(reward, images_of(side), prompts)
                            for side in pictures.unbind(1)]
            agrees = 50 * (1 + (liked - other).sign()).mean().item()
            note(out, f"{name} agrees with the judge on 500 {kind} pairs, a tie is half, %", agrees)
    vae = models.load_pipeline(str(ROOT / "tiny_sd"), device).vae
    for name, share in vlm_exam(nets.load_vlm(twins.vlm, device), 300, seed, vae).items():
        note(out, f"vlm, 300 pictures of two to four shapes, after the VAE: {name}, %", 100 * share)


PARTS = {"clip": remake_clip, "aesthetic": remake_aesthetic, "image_reward": remake_image_reward,
         "vlm": remake_vlm, "measure": measure}


def main(argv=None):
    make(PARTS, flags.parse(Config, __doc__, argv))


if __name__ == "__main__":
    flags.run(main)
