"""02 · Rewards: what a picture is worth.

WHAT YOU LEARN. To the algorithms of chapters 3 and 4 a reward is a black box: any function from
pictures and their prompts to numbers. It need not be differentiable (a file size is not), nor
fair, nor sensible; the policy gradient will find out what it *really* pays for.

    reward(images: list[PIL.Image], prompts: list[str]) -> B numbers, higher is better

    compressibility     −(JPEG kilobytes at quality 95)                        DDPO
    incompressibility   +(JPEG kilobytes at quality 95)                        DDPO
    aesthetic           MLP(f / ‖f‖), f = CLIP's image embedding               LAION; DDPO
    image_reward        (MLP(h_[CLS]) − m) / s, h = BERT, looking at BLIP's image tokens     DPOK
    vlm_alignment       BERTScore recall of the prompt in what a vision-language model answers
                        to "what is going on in this image?"                   DDPO
    vlm_strict          share of questions ("how many?", "what?") that it answers correctly
    alignment           share of the objects asked for that are there, exact, in tiny_sd's world

The last is our *gold* reward, what we mean. image_reward and the vlm ones stand in for it: proxies.

RUN `python 02_rewards.py` (30 s on a CPU): the mean of each prompt, rank correlations within
prompts, how well the judge reads, and runs/02_rewards/best_worst.png. EXPECT image_reward and the
vlm ones to agree with alignment in part, and compressibility not at all. TRY --vlm judge (then the
judge itself answers), and --sd --samples 4 (25 GB of weights).
DEPARTURES. DDPO sends LLaVA a JPEG of quality 80, we the picture. The defaults are small *twins* of
the published models, with the same classes and file formats (experiments/make_rewards.py).
EXERCISES. (1) Write a reward that pays for blue, --rewards my.py:blue: which prompt's mean is the
highest? (2) What do compressibility and alignment pay for a white picture, whatever the prompt? (3)
Does --guidance-scale 3 bring image_reward nearer to alignment, or farther from it?
"""
import io
import re
from dataclasses import dataclass
from importlib import import_module

import torch

from support import figures, flags, scoring
from support import reward_models as nets  # networks, and how published weights get into them
from support.models import load_pipeline
from support.scoring import RewardFlags, score  # flags of the learned rewards; numbers, checked
from tiny_sd import judge, shapes

mdp = import_module("01_mdp")  # rollout


@dataclass(frozen=True)
class Config(RewardFlags):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, or a name on the Hugging Face hub
    sd: bool = False  # the published settings for the full model become the defaults
    rewards: tuple[str, ...] = ("all",)  # names, sums (alignment=1,aesthetic=0.2), file.py:function
    prompts: tuple[str, ...] = (  # what to draw
        "three red circles", "a green star and a blue square", "a blue star on the left",
        "a yellow triangle")
    samples: int = 16  # pictures of each prompt
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step: 1 is DDPM's, a smaller number means less
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none
    seed: int = 0  # seed of all noise
    show: int = 12  # how many pictures of a reward's ranking to show, from best to worst
    out: str = "runs/02_rewards/best_worst.png"  # where the sheet goes


SD = dict(
    dtype="bfloat16", batch_size=8, reward_batch_size=8,
    model="stable-diffusion-v1-5/stable-diffusion-v1-5", num_steps=50, guidance_scale=5.0,
    prompts=("a dog riding a bike", "a cat playing chess", "a bear washing the dishes"),
    rewards=("compressibility", "aesthetic", "image_reward", "vlm_alignment"),
    clip="openai/clip-vit-large-patch14",
    aesthetic_weights="trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
    image_reward_weights="THUDM/ImageReward/ImageReward.pt",
    vlm="llava-hf/llava-1.5-7b-hf", bert="microsoft/deberta-xlarge-mnli")


# ---- rewards that need no model -------------------------------------------------------------


def jpeg_kilobytes(image, quality=95):
    """Size in kB (1000 bytes) of one PIL picture after JPEG compression."""
    file = io.BytesIO()
    image.convert("RGB").save(file, format="JPEG", quality=quality)
    return file.tell() / 1000


def compressibility(images, prompts):
    """r = −kB: smooth, plain pictures pay."""
    return [-jpeg_kilobytes(image) for image in images]


def incompressibility(images, prompts):
    """r = +kB: detail pays, and nothing is as detailed as noise."""
    return [jpeg_kilobytes(image) for image in images]


def alignment(images, prompts):
    """r = matches / max(asked, seen) in [0, 1], read off the pixels by the exact judge.

    An object matches if color, shape and place are what the prompt asks for; one object too many
    costs as much as one too few. ValueError for a prompt that is not about shapes.
    """
    requests = [shapes.parse(prompt) for prompt in prompts]
    scenes = judge.see(images)
    return [judge.score(objects, request) for objects, request in zip(scenes, requests)]


# ---- aesthetic ------------------------------------------------------------------------------


class Aesthetic:
    """r = MLP(f / ‖f‖), f = CLIP's image embedding: LAION's guess at people's rating, 1 to 10."""

    def __init__(self, models, device):
        self.clip = nets.load_clip(models.clip).to(device)
        width = self.clip.config.projection_dim
        self.mlp = nets.load_laion_mlp(models.aesthetic_weights, width).to(device)

    def __call__(self, images, prompts):
        size = self.clip.config.vision_config.image_size
        pixels = nets.clip_pixels(images, size, self.clip.device)
        f = self.clip.get_image_features(pixel_values=pixels).pooler_output  # already projected
        return self.mlp(f / f.norm(dim=-1, keepdim=True))


# ---- image_reward ---------------------------------------------------------------------------


class ImageReward:
    """r = (MLP(h_[CLS]) − m) / s, h = BERT on the prompt, attending to BLIP's picture.

    ImageReward-v1.0 (Xu et al., NeurIPS 2023), DPOK's reward, trained on which of two pictures
    people prefer. Text is cut or padded to 35 tokens.
    """
    mean, std = 0.16717362830052426, 1.0333394966054072  # m and s, which make scores comparable

    def __init__(self, models, device):
        self.model, self.tokenizer = nets.load_image_reward(models.image_reward_weights)
        self.model.to(device)

    def __call__(self, images, prompts):
        vision = self.model.vision
        pixels = nets.clip_pixels(images, vision.config.image_size, vision.device)
        text = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=35,
                              return_tensors="pt").to(vision.device)
        r = self.model(pixels, text.input_ids, text.attention_mask)
        return (r - self.mean) / self.std


# ---- vlm_alignment and vlm_strict -----------------------------------------------------------

QUESTION = "Answer concisely: what is going on in this image?"  # word for word DDPO's


def bertscore_recall(reference, candidate, counts=None):
    """R = Σ_i w_i · max_j cos(r_i, c_j) / Σ_i w_i  (Zhang et al., 2020).  (R,D), (C,D), (R,) -> ()

    How much of the reference is said somewhere in the candidate; saying more costs nothing. w_i is
    0 at special tokens: they count for nothing but, as in the bert-score package, may be matched.
    """
    r = reference / reference.norm(dim=-1, keepdim=True)
    c = candidate / candidate.norm(dim=-1, keepdim=True)
    best = (r @ c.T).max(1).values
    w = torch.ones_like(best) if counts is None else counts.to(best)
    return (w * best).sum() / w.sum()


class VlmAlignment:
    """r = bertscore_recall(reference "The image contains {prompt}", candidate: the answer).

    tiny_sd's text encoder, which stands in for BERT, knows only a prompt's words: so its reference
    is the prompt. LLaVA's twin learned what captions say, be it drawn or written (shapes.py).
    """

    def __init__(self, models, device):
        self.ask = nets.load_vlm(models.vlm, device, models.reward_batch_size)
        self.encode = nets.TokenEncoder(models.bert, models.bert_layer, device)

    def __call__(self, images, prompts):
        answers = self.encode(self.ask(images, [QUESTION] * len(images)))
        references = self.encode([self.encode.reference.format(prompt) for prompt in prompts])
        # An answer without words says nothing of the reference, as in the bert-score package.
        return [bertscore_recall(r, c, counts) if spoken.any() else 0.0
                for (r, counts), (c, spoken) in zip(references, answers)]


class VlmStrict:
    """r = share of the prompt's questions whose answer holds the right word (DDPO's counting)."""

    def __init__(self, models, device):
        self.ask = nets.load_vlm(models.vlm, device, models.reward_batch_size)
        self.questions = scoring.read_questions(models.vlm_questions)

    def __call__(self, images, prompts):
        pictures, questions = [], []
        pairs = [self.questions(prompt) for prompt in prompts]  # [question, right word], ...
        for image, own in zip(images, pairs):
            pictures += [image] * len(own)
            questions += [question for question, _ in own]
        answers, values = self.ask(pictures, questions), []
        for own in pairs:
            right = [holds(answer, word) for answer, (_, word) in zip(answers, own)]
            values.append(sum(right) / len(right))
            answers = answers[len(own):]
        return values


def holds(answer, word):
    """Whether the word is in the answer: as a whole, for "none" is not "one"; also its plural."""
    pattern = rf"(?<!\w){re.escape(word)}s?(?!\w)"
    return re.search(pattern, answer, re.IGNORECASE) is not None


# ---- by name --------------------------------------------------------------------------------

REWARDS = {
    "compressibility": compressibility,
    "incompressibility": incompressibility,
    "aesthetic": Aesthetic,
    "image_reward": ImageReward,
    "vlm_alignment": VlmAlignment,
    "vlm_strict": VlmStrict,
    "alignment": alignment,
}


def get_reward(spec, models=RewardFlags(), device=None, flag="--reward"):
    """A reward by name, from path/to/file.py:function, or a sum from name=weight,name=weight.

    Networks are loaded once, onto the device; ValueError, naming the flag, for what is not there.
    """
    return scoring.get_reward(spec, REWARDS, models, device, flag)


# ---- what the rewards think of the same pictures --------------------------------------------


def spearman(a, b):
    """ρ = Pearson correlation of ranks, equal values sharing their mean rank.  (B,), (B,) -> ()"""
    if len(a) < 2:  # of one pair there is none
        return torch.tensor(torch.nan)
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1]


def ranks(x):
    """1 for the smallest of B values, B for the largest; equal ones share.  (B,) -> (B,)"""
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)  # rank of the last of equal values; the mean lies (count − 1)/2 before
    return (last - (count - 1) / 2)[place].double()


def reward_names(words):
    """The words behind --rewards, where "a,b" means two rewards, but "a=1,b=2" one sum."""
    names = []
    for word in words:
        names += [word] if scoring.is_sum(word) else word.split(",")
    return list(REWARDS) if names == ["all"] else names


def print_table(title, columns, rows, digits):
    """rows: pairs of a name and its numbers, one a column.  Of a file's path the end is shown."""
    head = [name[-13:] if ":" in name else name[:13] for name in columns]
    print(f"{title:32}" + "".join(f"{name:>14}" for name in head))
    for name, numbers in rows:
        print(f"{name[:31]:32}" + "".join(f"{number:14.{digits}f}" for number in numbers))


@torch.no_grad()
def main(argv=None):
    config = flags.parse(Config, __doc__, argv, SD)
    out = flags.picture_path(config.out)
    names = reward_names(config.rewards)
    rewards = [get_reward(name, config, config.device, "--rewards") for name in names]
    pipe = load_pipeline(config.model, config.device, config.dtype)
    prompts = []
    for prompt in config.prompts:
        prompts += [prompt] * config.samples
    images = mdp.rollout(pipe, prompts, config, noise=(config.seed, "examples", 0)).images

    scores = {name: score(reward, images, prompts, out.parent)
              for name, reward in zip(names, rewards)}

    shape = len(config.prompts), config.samples
    means, correlations, within = [], [], {}
    for i, prompt in enumerate(config.prompts):
        means.append((prompt, [r.view(shape)[i].mean() for r in scores.values()]))
    for name, r in scores.items():  # training compares pictures of one prompt, so this does too
        within[name] = (r.view(shape) - r.view(shape).mean(1, keepdim=True)).flatten()
    for name, r in within.items():
        correlations.append((name, [spearman(r, other) for other in within.values()]))
    print_table(f"mean of {config.samples}", scores, means, digits=3)
    print()
    print_table("rank correlation within prompts", scores, correlations, digits=2)
    figures.ranking(out, images, prompts, scores, config.show)
    if "alignment" in scores:
        print(judge.report(pipe.vae))
    print(f"\nPictures sorted by each reward, best to worst: {out}")


if __name__ == "__main__":
    flags.run(main)
