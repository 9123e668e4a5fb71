"""02 · Rewards: what a picture is worth.

WHAT YOU LEARN. To the algorithms of chapters 3 and 4 a reward is a black box: any function from
pictures and their prompts to numbers. It need not be differentiable (a file size is not), nor
fair, nor sensible; the policy gradient will find out what it *really* pays for.

THE EQUATIONS. reward(images: list[PIL.Image], prompts: list[str]) -> B numbers, higher is better:

    compressibility     −(JPEG kilobytes at quality 95)                        DDPO
    incompressibility   +(JPEG kilobytes at quality 95)                        DDPO
    aesthetic           MLP(f / ‖f‖), f = CLIP's image embedding               LAION; DDPO
    image_reward        (MLP(h_[CLS]) − m) / s, h = BERT, looking at BLIP's image tokens     DPOK
    vlm_alignment       BERTScore recall of the prompt in what a vision-language model answers
                        to "what is going on in this image?"                   DDPO
    vlm_strict          share of questions ("how many?", "what?") that it answers correctly
    quality             how much of it is whole shapes of tiny_sd's world (judge.quality)
    alignment           share of the objects asked for that are there, exact, in that world

The last is our *gold* reward, what we mean. image_reward and the vlm ones stand in for it: proxies.

RUN `python 02_rewards.py` (30 s on a CPU): the mean of each prompt, and of pure noise; rank
correlations within prompts; runs/02_rewards/best_worst.png. EXPECT image_reward and the vlm ones to
agree with alignment in part, compressibility not at all, and noise to please incompressibility
alone. TRY --vlm judge (then the judge of alignment itself answers), and --sd --samples 4 (25 GB of
weights).
DEPARTURES. DDPO sends LLaVA a JPEG of quality 80, we the picture. The defaults are small *twins* of
the published models, with the same classes and file formats (experiments/make_rewards.py).
EXERCISES. (1) Write a reward that pays for blue, --rewards my.py:blue: which prompt's mean is the
highest? (2) What do compressibility and alignment pay for a white picture, whatever the prompt? (3)
Does --guidance-scale 3 bring image_reward nearer to alignment, or farther from it?
"""
import io
import re
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch

from support import figures, flags, models, scoring
from support import reward_models as nets  # networks, and published weights for them
from support.scoring import RewardFlags, score  # flags of learned rewards; numbers, checked
from tiny_sd import judge, shapes

mdp = import_module("01_mdp")  # rollout


@dataclass(frozen=True)
class Config(RewardFlags):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, a finished run, or a hub name
    sd: bool = False  # the published settings for the full model become the defaults
    rewards: tuple[str, ...] = ("all",)  # names, sums (alignment=1,aesthetic=0.2), FILE.py:NAME
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


SD = flags.published("02_rewards")


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

    def __init__(self, config, device):
        self.clip = nets.load_clip(config.clip).to(device)
        width = self.clip.config.projection_dim
        self.mlp = nets.load_laion_mlp(config.aesthetic_weights, width).to(device)

    def __call__(self, images, prompts):
        size = self.clip.config.vision_config.image_size
        pixels = nets.clip_pixels(images, size, self.clip.device)
        features = self.clip.get_image_features(pixel_values=pixels)
        f = features.pooler_output  # already projected
        return self.mlp(f / f.norm(dim=-1, keepdim=True))


# ---- image_reward ---------------------------------------------------------------------------


class ImageReward:
    """r = (MLP(h_[CLS]) − m) / s, h = BERT on the prompt, attending to BLIP's picture.

    ImageReward-v1.0 (Xu et al., NeurIPS 2023), DPOK's reward, trained on which of two pictures
    people prefer. Text is cut or padded to 35 tokens.
    """
    mean = 0.16717362830052426  # m and s make scores comparable
    std = 1.0333394966054072

    def __init__(self, config, device):
        self.model, self.tokenizer = nets.load_image_reward(config.image_reward_weights)
        self.model.to(device)

    def __call__(self, images, prompts):
        vision = self.model.vision
        pixels = nets.clip_pixels(images, vision.config.image_size, vision.device)
        text = self.tokenizer(list(prompts), padding="max_length", truncation=True,
                              max_length=35, return_tensors="pt")
        text = text.to(vision.device)
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
    if counts is None:
        counts = torch.ones_like(best)
    w = counts.to(best)
    return (w * best).sum() / w.sum()


class VlmAlignment:
    """r = bertscore_recall(reference "The image contains {prompt}", candidate: the answer).

    tiny_sd's text encoder, which stands in for BERT, knows only a prompt's words: so its reference
    is the prompt. LLaVA's twin learned what captions say, be it drawn or written (web.py).
    """

    def __init__(self, config, device):
        self.ask = nets.load_vlm(config.vlm, device)
        self.encode = nets.TokenEncoder(config.bert, config.bert_layer, device)

    def __call__(self, images, prompts):
        answers = self.ask(images, [QUESTION] * len(images))
        sentence = self.encode.reference
        references = [sentence.format(prompt) for prompt in prompts]
        values = []
        for answer, meant in zip(self.encode(answers), self.encode(references)):
            candidate, spoken = answer
            reference, counts = meant
            r = bertscore_recall(reference, candidate, counts)
            # An answer without words says nothing of the reference, as in the bert-score package.
            values.append(r if spoken.any() else 0.0)
        return values


class VlmStrict:
    """r = share of the prompt's questions whose answer holds the right word (DDPO's counting)."""

    def __init__(self, config, device):
        self.ask = nets.load_vlm(config.vlm, device)
        self.questions = nets.load_questions(config.vlm_questions)

    def __call__(self, images, prompts):
        pairs = [self.questions(prompt) for prompt in prompts]  # [question, right word], ...
        pictures, questions = [], []
        for image, own in zip(images, pairs):
            for question, _ in own:
                pictures.append(image)
                questions.append(question)
        answers = iter(self.ask(pictures, questions))  # all at once
        values = []
        for own in pairs:
            right = [holds(next(answers), word) for _, word in own]
            values.append(sum(right) / len(right))
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
    "quality": judge.quality,
    "alignment": alignment,
}


# get_reward(spec, config, device, flag): by name, from path/to/file.py:function, or a sum from
# name=weight,name=weight. Networks are loaded once; ValueError names the flag.
get_reward = partial(scoring.get_reward, REWARDS)


# ---- what the rewards think of the same pictures --------------------------------------------


def spearman(a, b):
    """ρ = Pearson correlation of ranks, equal values sharing their mean rank.  (B,), (B,) -> ()"""
    if len(a) < 2:  # of one pair there is none
        return torch.tensor(torch.nan)
    both = torch.stack([ranks(a), ranks(b)])
    return torch.corrcoef(both)[0, 1]


def ranks(x):
    """1 for the smallest of B values, B for the largest; equal ones share.  (B,) -> (B,)"""
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)  # rank of the last of equal values
    mean = last - (count - 1) / 2
    return mean[place].double()


def reward_names(words):
    """The words behind --rewards, where "a,b" means two rewards, but "a=1,b=2" one sum."""
    names = []
    for word in words:
        if scoring.is_sum(word):
            names.append(word)
        else:
            names += word.split(",")
    return list(REWARDS) if names == ["all"] else names


def print_table(title, columns, rows, numbers, digits):
    """numbers: a row of them for each of the rows.  Of a file's path the end is shown."""
    head = [name[-13:] if ":" in name else name[:13] for name in columns]
    print(f"{title:32}" + "".join(f"{name:>14}" for name in head))
    for row, values in zip(rows, numbers):
        print(f"{row[:31]:32}" + "".join(f"{value:14.{digits}f}" for value in values))


@torch.no_grad()
def main(argv=None):
    config = flags.parse(Config, __doc__, argv, SD)
    out = flags.picture_path(config.out)
    names = reward_names(config.rewards)
    rewards = [get_reward(name, config, config.device, "--rewards") for name in names]
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    prompts = []
    for prompt in config.prompts:
        prompts += [prompt] * config.samples
    trajectory = mdp.rollout(pipe, prompts, config, "examples")
    images = trajectory.images

    scores = {}
    for name, reward in zip(names, rewards):
        scores[name] = score(reward, images, prompts)
    shape = len(config.prompts), config.samples
    mean, within = [], []
    for r in scores.values():
        r = r.view(shape)
        mean.append(r.mean(1))
        # Training compares pictures of one prompt, so this does too.
        within.append((r - r.mean(1, keepdim=True)).flatten())

    first = prompts[:config.samples]
    noise = models.decode(pipe, trajectory.latents[:config.samples, 0])  # x_T, as if it were x_0
    of_noise = [score(reward, noise, first).mean() for reward in rewards]
    mean = [*torch.stack(mean, 1), of_noise]  # a row for each prompt, and one for what is none
    labels = [*config.prompts, f"(noise) {first[0]}"]
    print_table(f"mean of {config.samples}", scores, labels, mean, digits=3)
    rho = []
    for r in within:
        rho.append([spearman(r, other) for other in within])
    print()
    print_table("rank correlation within prompts", scores, scores, rho, digits=2)
    figures.ranking(out, images, prompts, scores, config.show)
    print(f"\nPictures sorted by each reward, best to worst: {out}")


if __name__ == "__main__":
    flags.run(main)
