"""Remake the tiny twins of the learned rewards: python experiments/make_rewards.py

Each is trained the way its model was, in the shape world instead of the web:

    1. clip/                  CLIP         contrastive: which caption of a batch is this picture's?
    2. aesthetic.safetensors  LAION's MLP  regression of ratings on CLIP embeddings; "people" here
                                           like a warm background (`beauty`)
    3. image_reward/          ImageReward  what does each patch show?  (ImageNet's part)
                                           is this the picture's caption?  (BLIP's part)
                                           preference pairs:  L = −log σ(r(better) − r(worse))

The preference labels come from the exact judge, and one in six is wrong. There are few of them, on
purpose: the twin of ImageReward is to be a good guess at what we mean on ordinary pictures, and no
better than a guess elsewhere, so that optimizing it too far can be seen to fail.

About 12 minutes on one CPU core, after make_tiny_sd.py. Prints what each has learned.
"""

import re
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import trange
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments import make_tiny_sd  # noqa: E402
from support import flags, models, training  # noqa: E402
from support import reward_models as nets  # noqa: E402
from tiny_sd import judge, shapes  # noqa: E402

mdp = import_module("01_mdp")  # rollout

STAGES = ("clip", "aesthetic", "vision", "matching", "preferences", "scenes", "wrong pictures",
          "generated prompts", "flips")

LABEL_NOISE = 1 / 6  # share of preference labels that are wrong
PATCH = 8  # px, of the image encoders
GRID = shapes.SIZE // PATCH  # patches a side


# ---- what the twin of the aesthetic score likes ------------------------------------------------


def warmth(pictures):
    """Tint of the background in [-1, 1], from cool (bluish) to warm.  (B,3,H,W) in [0,1] -> (B,)"""
    red, _, blue = pictures.flatten(2).median(2).values.unbind(1)
    return ((red - blue) * 255 / 14).clamp(-1, 1)


def beauty(pictures):
    """A person's rating, 2 to 8: 5 + 3·warmth; all the same to the prompt and the judge."""
    return 5 + 3 * warmth(pictures)


def mood(pictures):
    """The word that a careful caption adds about the light: warm, cool or none."""
    return [" warm" if w > 0.3 else " cool" if w < -0.3 else "" for w in warmth(pictures).tolist()]


# ---- 1. CLIP --------------------------------------------------------------------------------


def make_clip(tokenizer):
    small = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2)
    text = dict(small, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                vocab_size=len(tokenizer), max_position_embeddings=make_tiny_sd.MAX_LENGTH,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id)
    vision = dict(small, image_size=shapes.SIZE, patch_size=PATCH)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def clip_loss(image, text, scale):
    """Cross-entropy of picking one's own caption, and one's own picture.  (B,D), (B,D), () -> ()"""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def pixels_of(pictures):
    """What CLIP's and BLIP's preprocessing makes of pictures of the right size.  uint8 -> float"""
    mean, std = torch.tensor(nets.PIXEL_MEAN_STD)[:, None, :, None, None]
    return (pictures / 255 - mean) / std


def optimize(model, steps, lr, loss_of, name):
    """AdamW with warm-up and cosine decay; loss_of(i) -> () is called once a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule, average = make_tiny_sd.cosine(optimizer, steps, min(100, steps // 5 + 1)), None
    model.train()
    for i in (bar := trange(steps, desc=name, mininterval=5)):
        loss = loss_of(i)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if i % 50 == 0:
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
    model.eval()


def train_clip(pictures, captions, steps, device, seed, batch=64):
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "tiny_sd" / "tokenizer")
    clip = make_clip(tokenizer).to(device)
    careful = [caption + word for caption, word in zip(captions, mood(pictures / 255))]
    tokens = make_tiny_sd.tokenize(tokenizer, careful)

    def loss_of(step):
        i = torch.from_numpy(draws(seed, "clip", step).integers(len(pictures), size=batch))
        pixels = pixels_of(pictures[i]).to(device)
        image = clip.get_image_features(pixel_values=pixels).pooler_output
        text = clip.get_text_features(input_ids=tokens[i].to(device)).pooler_output
        return clip_loss(image, text, clip.logit_scale.exp().clamp(max=100))

    optimize(clip, steps, 1e-3, loss_of, "CLIP")
    return clip


@torch.no_grad()
def embed(clip, pictures, device):
    """f / ‖f‖ of each picture: (B,64)."""
    f = [clip.get_image_features(pixel_values=pixels_of(p).to(device)).pooler_output
         for p in pictures.split(256)]
    return F.normalize(torch.cat(f), dim=1)


# ---- 2. the aesthetic score -----------------------------------------------------------------


def train_aesthetic(features, ratings, steps, seed, batch=256):
    mlp = nets.LaionMLP(features.shape[1]).to(features.device)

    def loss_of(step):
        i = torch.from_numpy(draws(seed, "aesthetic", step).integers(len(features), size=batch))
        return F.mse_loss(mlp(features[i]), ratings[i])

    optimize(mlp, steps, 1e-3, loss_of, "aesthetic")
    return mlp


# ---- 3. ImageReward -------------------------------------------------------------------------


def make_bert_tokenizer(folder):
    """A BertTokenizer of the world's words; BLIP's two extra tokens come last, as published."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *shapes.WORDS, "[DEC]", "[ENC]"])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return BertTokenizer.from_pretrained(folder)


def make_image_reward(words, width=128, layers=3, text_layers=3):
    """ImageReward's classes at a small size; shapes as they would be read off a checkpoint."""
    shape = {"vision.embeddings.patch_embedding.weight": (width, 3, PATCH, PATCH),
             "vision.embeddings.position_embedding": (1, GRID**2 + 1, width),
             "vision.encoder.layers.0.mlp.fc1.weight": (2 * width, width),
             "text.embeddings.word_embeddings.weight": (words, width),
             "text.embeddings.position_embeddings.weight": (35, width),
             "text.encoder.layer.0.intermediate.dense.weight": (2 * width, width)}
    shape |= {f"vision.encoder.layers.{i}.": () for i in range(1, layers)}
    shape |= {f"text.encoder.layer.{i}.": () for i in range(1, text_layers)}
    model = nets.ImageRewardModel(shape)
    # BLIP's initial weights (0.02, and 1e-10 for the image encoder) are for large or finished
    # networks; from there this one would learn next to nothing.
    for module in [*model.vision.modules(), *model.text.modules()]:
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.5)
    with torch.no_grad():
        model.vision.embeddings.position_embedding[0, 1:] = waves(width)
    return model


def waves(width):
    """Where each patch is, as sines and cosines of its row and column: (GRID², width)."""
    frequency = torch.pi / GRID * torch.linspace(0.5, 4, width // 4)
    angle = (torch.arange(GRID)[:, None] + 0.5) * frequency
    code = torch.cat([angle.sin(), angle.cos()], 1)  # (GRID, width/2)
    rows, columns = code[:, None].expand(-1, GRID, -1), code[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], 2).reshape(GRID**2, width)


def to_blip_keys(weights):
    """This repository's names -> ImageReward's published ones; inverse of nets.from_blip_keys."""
    names = [("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
             ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
             ("vision.embeddings.patch_embedding.", "blip.visual_encoder.patch_embed.proj."),
             ("vision.encoder.layers.", "blip.visual_encoder.blocks."), (".layer_norm", ".norm"),
             (".self_attn.projection.", ".attn.proj."), (".self_attn.qkv.", ".attn.qkv."),
             ("vision.post_layernorm.", "blip.visual_encoder.norm."),
             (r"^text.", "blip.text_encoder.")]
    published = {}
    for key, value in weights.items():
        for ours, theirs in names:
            key = re.sub(ours if ours[0] == "^" else re.escape(ours), theirs, key)
        published[key] = value
    return published


def bradley_terry_loss(better, worse):
    """L = E[ −log σ(r(better) − r(worse)) ]: P(the first is preferred) = σ(difference)."""
    return -F.logsigmoid(better - worse).mean()


def draws(seed, stage, step=0):
    """Random numbers of one step of a stage, at an address of their own."""
    stages = len(make_tiny_sd.STAGES) + STAGES.index(stage)
    return training.random_stream(seed, "make", stages, step)


def draw_scenes(n, seed):
    """n random requests, and as asked for: scenes (lists of Object), pictures (n,3,H,W) uint8."""
    rng = draws(seed, "scenes")
    names = {family: shapes.prompts_of(family) for family in shapes.FAMILIES[:4]}
    families = [names[str(rng.choice(shapes.FAMILIES[:4]))] for _ in range(n)]
    requests = [shapes.parse(family[rng.integers(len(family))]) for family in families]
    scenes = [shapes.layout(request, rng) for request in requests]
    return requests, scenes, picture_tensor(scenes, rng)


def picture_tensor(scenes, rng):
    """Draw scenes: (n,3,H,W) uint8."""
    images = [shapes.draw(scene, shapes.random_background(rng)) for scene in scenes]
    return torch.from_numpy(np.stack([np.asarray(im) for im in images])).permute(0, 3, 1, 2)


def drawn_pairs(n, seed):
    """n prompts, each with a picture as asked and one with an attribute wrong: (n,2,3,H,W)."""
    rng = draws(seed, "wrong pictures")
    requests, scenes, right = draw_scenes(2 * n, seed)
    wrong = [shapes.layout(shapes.wrong_request(request, rng), rng) for request in requests]
    # "A red star and a blue star": when the colors swap, nothing is wrong.
    keep = [i for i in range(2 * n) if judge.score(wrong[i], requests[i]) < 1][:n]
    prompts = [shapes.caption(requests[i]) for i in keep]
    return prompts, torch.stack([right[keep], picture_tensor([wrong[i] for i in keep], rng)], 1)


@dataclass(frozen=True)
class Drawing:
    """How generated pairs are drawn."""
    num_steps: int = 10
    eta: float = 1.0
    guidance_scale: float = 1.0
    batch_size: int = 64


def generated_pairs(n, device, seed):
    """n pairs of the tiny model's own pictures of a prompt, of which the judge likes one better."""
    pipe = models.load_pipeline(str(ROOT / "tiny_sd"), device)
    names = [name for family in shapes.FAMILIES[:4] for name in shapes.prompts_of(family)]
    prompts, pictures, round = [], [], 0
    while len(prompts) < n:
        places = draws(seed, "generated prompts", round).integers(len(names), size=32)
        drawn = [names[i] for i in places.repeat(4)]
        images = mdp.rollout(pipe, drawn, Drawing(), noise=(seed, "pretrain", round)).images
        gold = judge_scores(images, drawn)
        for i in range(0, len(drawn), 4):
            low, high = gold[i:i + 4].argmin().item() + i, gold[i:i + 4].argmax().item() + i
            if gold[high] > gold[low]:
                prompts.append(drawn[i])
                pictures.append(judge.to_tensor([images[high], images[low]]))
        round += 1
    return prompts[:n], (torch.stack(pictures[:n]) * 255).round().byte()


def judge_scores(images, prompts):
    seen = judge.see(images)
    return torch.tensor([judge.score(o, shapes.parse(p)) for o, p in zip(seen, prompts)])


class Reader:
    """Prompts -> token ids and mask on the device."""

    def __init__(self, tokenizer, device):
        self.tokenizer, self.device = tokenizer, device

    def __call__(self, prompts):
        text = self.tokenizer(list(prompts), padding=True, return_tensors="pt").to(self.device)
        return text.input_ids, text.attention_mask


def patch_labels(scene):
    """What patches show: color, shape (0: none), whether an object's center.  (GRID²,3) int"""
    labels = np.zeros((GRID, GRID, 3), dtype=int)
    middle = (np.arange(GRID) + 0.5) * PATCH
    for o in scene:
        what = list(shapes.COLORS).index(o.color) + 1, shapes.SHAPES.index(o.shape) + 1
        covered = np.hypot(middle[None] - o.x, middle[:, None] - o.y) < 0.6 * o.size
        labels[covered] = *what, 0
        labels[int(o.y // PATCH), int(o.x // PATCH)] = *what, 1
    return torch.from_numpy(labels.reshape(GRID**2, 3))


def train_vision(vision, scenes, pictures, steps, device, seed, batch=64):
    """A ViT comes to BLIP knowing ImageNet's classes; this one, the color and shape of patches.

    The first token, which is no patch, is asked how many objects there are in all.
    """
    sizes = [len(shapes.COLORS) + 1, len(shapes.SHAPES) + 1, 2, len(shapes.NUMBERS) + 1]
    head = torch.nn.Linear(vision.config.hidden_size, sum(sizes)).to(device)  # thrown away after
    labels = torch.stack([patch_labels(scene) for scene in scenes])
    counts = torch.tensor([len(scene) for scene in scenes])

    def loss_of(step):
        i = torch.from_numpy(draws(seed, "vision", step).integers(len(pictures), size=batch))
        guesses = head(vision(pixels_of(pictures[i]).to(device)).last_hidden_state).split(sizes, 2)
        loss = F.cross_entropy(guesses[3][:, 0], counts[i].to(device)) / 2
        for guess, truth in zip(guesses, labels[i].to(device).unbind(2)):
            loss = loss + F.cross_entropy(guess[:, 1:].flatten(0, 1), truth.flatten())
        return loss

    optimize(torch.nn.ModuleList([vision, head]), steps, 1e-3, loss_of, "ViT")


@torch.no_grad()
def look(vision, pictures, device):
    """The image encoder's tokens, which stay as they are from here on: (n, GRID² + 1, width)."""
    return torch.cat([vision(pixels_of(p).to(device)).last_hidden_state.half().cpu()
                      for p in pictures.split(256)])


def answer(model, seen, text):
    """ImageReward's forward after the image encoder."""
    ids, mask = text
    h = model.text(ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
    return model.mlp(h[:, 0])


def train_matching(model, read, requests, scenes, seen, steps, device, seed, batch=128):
    """BLIP's image-text matching: is this the picture's caption?  Its own is, another is not.

    Most others are wrong in one attribute only, as BLIP picks those that are hard to tell.
    """
    def loss_of(step):
        stream = draws(seed, "matching", step)
        i = torch.from_numpy(stream.integers(len(seen), size=batch))
        own = [requests[k] for k in i.tolist()]
        other = own[1:batch // 5 + 1] + [shapes.wrong_request(r, stream) for r in own[batch // 5:]]
        match = [judge.score(scenes[k], r) == 1 for k, r in zip(i.tolist() * 2, own + other)]
        text = read([shapes.caption(r) for r in own + other])
        logits = answer(model, seen[i].float().to(device).repeat(2, 1, 1), text)
        return F.binary_cross_entropy_with_logits(logits, torch.tensor(match).float().to(device))

    optimize(torch.nn.ModuleList([model.text, model.mlp]), steps, 1e-3, loss_of, "BLIP")


def train_preferences(model, read, prompts, seen, epochs, device, seed, batch=32):
    """Bradley–Terry on pairs, the one called better first; most layers keep still, as published."""
    steps = epochs * len(seen) // batch
    passes = [draws(seed, "preferences", k).permutation(len(seen)) for k in range(epochs)]
    order = torch.from_numpy(np.concatenate(passes))

    def loss_of(step):
        i = order[step * batch:(step + 1) * batch]
        text = read([prompts[k] for k in i.tolist()])
        return bradley_terry_loss(*(answer(model, seen[i, side].float().to(device), text)
                                    for side in (0, 1)))

    trained = torch.nn.ModuleList([model.text.encoder.layer[-1], model.mlp])
    optimize(trained, steps, 3e-4, loss_of, "preferences")


@torch.no_grad()
def agreement(model, read, prompts, pairs, device):
    """Share of pairs in which the model likes the picture better that the judge does."""
    right = []
    for i in range(0, len(prompts), 100):
        text, rows = read(prompts[i:i + 100]), pairs[i:i + 100]
        r = [model(pixels_of(rows[:, side]).to(device), *text) for side in (0, 1)]
        right.append(r[0] > r[1])
    return torch.cat(right).float().mean().item()


def train_image_reward(out, config, device):
    """The three steps, each on what the one before has made: the model and its Reader."""
    seed = config.seed
    tokenizer = make_bert_tokenizer(out / "image_reward")
    read, model = Reader(tokenizer, device), make_image_reward(len(tokenizer)).to(device)
    requests, scenes, pictures = draw_scenes(config.pictures // 2, seed)
    train_vision(model.vision, scenes, pictures, config.vit_steps, device, seed)
    seen = look(model.vision, pictures, device)
    train_matching(model, read, requests, scenes, seen, config.blip_steps, device, seed)
    half = config.pairs // 2
    drawn = drawn_pairs(half, seed + 1)
    generated = generated_pairs(config.pairs - half, device, seed)
    prompts, pairs = drawn[0] + generated[0], torch.cat([drawn[1], generated[1]])
    seen = look(model.vision, pairs.flatten(0, 1), device).unflatten(0, (-1, 2))
    flipped = torch.from_numpy(draws(seed, "flips").random(len(pairs))) < LABEL_NOISE
    seen = torch.where(flipped[:, None, None, None], seen.flip(1), seen)
    train_preferences(model, read, prompts, seen, config.epochs, device, seed)
    return model, read


def save_half(weights, path):
    save_file({key: value.half().contiguous().cpu() for key, value in weights.items()}, path)


@dataclass(frozen=True)
class Config:
    out: str = str(ROOT / "tiny_sd")  # folder that the twins are written into
    only: Literal["clip", "aesthetic", "image_reward"] | None = None  # do one part
    pictures: int = 20000  # pictures to train on
    clip_steps: int = 1000  # optimizer steps of CLIP
    aesthetic_steps: int = 1500  # optimizer steps of LAION's MLP
    vit_steps: int = 700  # optimizer steps of the image encoder
    blip_steps: int = 400  # optimizer steps of image-text matching
    pairs: int = 2000  # preference pairs, half of them generated
    epochs: int = 3  # passes over the preference pairs
    seed: int = 0  # seed of everything
    device: str | None = None  # cpu, cuda, ...; default: a GPU if there is one


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    torch.manual_seed(config.seed)  # transformers draws initial weights from this one
    out, device = Path(config.out), models.pick_device(config.device)
    if config.only != "image_reward":
        pictures, captions = make_tiny_sd.draw_pairs(config.pictures, config.seed)

    if config.only in (None, "clip"):
        clip = train_clip(pictures, captions, config.clip_steps, device, config.seed)
        clip.half().save_pretrained(out / "clip")

    if config.only in (None, "aesthetic"):
        clip = CLIPModel.from_pretrained(out / "clip", dtype=torch.float32).to(device)
        features, ratings = embed(clip, pictures, device), beauty(pictures / 255).to(device)
        mlp = train_aesthetic(features, ratings, config.aesthetic_steps, config.seed)
        save_half(mlp.state_dict(), out / "aesthetic.safetensors")
        fresh, _ = make_tiny_sd.draw_pairs(1000, config.seed + 1)
        with torch.no_grad():
            both = torch.stack([mlp(embed(clip, fresh, device)).cpu(), beauty(fresh / 255)])
        print(f"aesthetic: correlation with fresh ratings {torch.corrcoef(both)[0, 1]:.2f}")

    if config.only in (None, "image_reward"):
        model, read = train_image_reward(out, config, device)
        save_half(to_blip_keys(model.state_dict()), out / "image_reward" / "model.safetensors")
        generated = generated_pairs(500, device, config.seed + 1)
        drawn = drawn_pairs(500, config.seed + 2)
        for name, test in (("drawn", drawn), ("generated", generated)):
            share = agreement(model, read, *test, device)
            print(f"image_reward: agrees with the judge on {share:.1%} of fresh {name} pairs")
    files = [f for f in out.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    size = sum(f.stat().st_size for f in files)
    print(f"{out} holds {size / 1e6:.1f} MB")


if __name__ == "__main__":
    flags.run(main)
