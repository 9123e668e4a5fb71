"""02 · Rewards: what a picture is worth.

WHAT YOU LEARN. To the algorithms of chapters 3 and 4 a reward is a black box: any function from
pictures and their prompts to numbers. It need not be differentiable (a file size is not), nor
fair, nor sensible; the policy gradient will find out what it *really* pays for.

    reward(images: list[PIL.Image], prompts: list[str]) -> B numbers, higher is better

    compressibility     −(JPEG kilobytes at quality 95)                        DDPO, section 5.1
    incompressibility   +(JPEG kilobytes at quality 95)                        DDPO, section 5.1
    aesthetic           MLP(f / ‖f‖), f = CLIP's image embedding: LAION's guess at a person's 1..10
    image_reward        (MLP(h_[CLS]) − m) / s, h = BERT reading the prompt while looking at BLIP's
                        image tokens: trained on which of two pictures people prefer
    vlm_alignment       BERTScore recall of "The image contains {prompt}" in what a vision-language
                        model answers to "what is going on in this image?"     DDPO, section 5.2
    vlm_strict          share of questions ("how many?", "what?") that it answers rightly
    alignment           share of the objects asked for that are in the picture, with the right
                        color, shape, number and place: exact, for the shape world of tiny_sd/

The last is the *gold* reward, what we mean. All others are proxies: the table of rank correlations
shows how far they agree with it on ordinary pictures, before anything is optimized against them.

HOW TO RUN. `python 02_rewards.py` draws pictures with the tiny model, prints means, correlations
and how well the judge reads, and saves runs/02_rewards/best_worst.png; 15 s on a CPU.
At full size (these names are downloaded; folders and files on disk work too):

    python 02_rewards.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --num-steps 50 \\
        --guidance-scale 5 --prompts "a dog riding a bike" \\
        --rewards aesthetic,image_reward,vlm_alignment \\
        --clip openai/clip-vit-large-patch14 \\
        --aesthetic-weights trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth \\
        --image-reward-weights THUDM/ImageReward/ImageReward.pt \\
        --vlm llava-hf/llava-1.5-7b-hf --bert microsoft/deberta-xlarge-mnli

The defaults are tiny *twins*: the same classes and file formats with small weights, made by
tiny_sd/pretrain_rewards.py. Sizes are read off the weights; no line here asks which it is.

DEPARTURES. DDPO's client sends LLaVA its pictures as JPEG of quality 80 and talks to a server; here
the picture itself goes to a model in this process. The twin's vision-language model is the exact
judge, which *says* what it sees, and tiny_sd's own text encoder stands in for BERT; that knows no
"The image contains", so the twin's reference is the bare prompt.

EXERCISES. (1) Write a reward that pays for blue, in a file of your own: --rewards my.py:blue. (2)
Which pictures does compressibility like best, and what would a model do that is paid for nothing
else? (3) Find a picture that the judge calls right and image_reward dislikes.
"""
import importlib.util
import io
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from tiny_sd import figures, judge
from tiny_sd import reward_models as nets  # networks, and how published weights get into them

mdp = import_module("01_mdp")  # load_pipeline, rollout, decode, parse_config, run_main, HERE


@dataclass(frozen=True)
class Models:
    """Weights of the learned rewards; chapters 3 and 4 have the same flags."""
    clip: str = "tiny_sd/clip"  # CLIPModel of aesthetic: a folder or hub name
    aesthetic_weights: str = "tiny_sd/aesthetic.safetensors"  # LAION's: file, or OWNER/REPO/FILE
    image_reward_weights: str = "tiny_sd/image_reward/model.safetensors"  # file, or OWNER/REPO/FILE
    vlm: str = "judge"  # who looks: judge (shape world), or a LLaVA folder or hub name
    vlm_questions: str | None = None  # JSON file {prompt: [[question, answer], ...]} of vlm_strict
    bert: str = "tiny_sd"  # BERTScore's encoder: folder or hub name of a BERT, RoBERTa, DeBERTa
    bert_layer: int | None = None  # its layer; default: bert-score's choice, else the last


@dataclass(frozen=True)
class Config(Models):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, or a name on the Hugging Face hub
    rewards: tuple[str, ...] = ("all",)  # names, sums (alignment=1,aesthetic=0.2), file.py:function
    prompts: tuple[str, ...] = ("three red circles", "a green star and a blue square",
                                "a blue star on the left", "a yellow triangle")  # what to draw
    samples: int = 16  # pictures of each prompt
    num_steps: int = 10  # denoising steps T
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none
    seed: int = 0  # seed of all noise
    show: int = 12  # how many pictures of a reward's ranking to show, from best to worst
    device: str | None = None  # cpu, cuda, ...; default: a GPU if there is one
    out: str = "runs/02_rewards/best_worst.png"  # where the sheet goes


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
    requests = [judge.shapes.parse(prompt) for prompt in prompts]
    return [judge.score(seen, request) for seen, request in zip(judge.see(images), requests)]


# ---- aesthetic ------------------------------------------------------------------------------


class Aesthetic:
    """r = MLP(f / ‖f‖), f = CLIP's image embedding: LAION's guess at how people rate it.

    The twin's "person" likes a warm background, which no prompt asks for and no judge sees.
    """

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

    ImageReward-v1.0 (Xu et al., NeurIPS 2023), DPOK's reward. Text is cut or padded to 35 tokens.
    """
    mean, std = 0.16717362830052426, 1.0333394966054072  # m and s, which make scores comparable

    def __init__(self, models, device):
        self.model, self.tokenizer = nets.load_image_reward(models.image_reward_weights)
        self.model.to(device)

    def __call__(self, images, prompts):
        text = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=35,
                              return_tensors="pt").to(self.model.vision.device)
        size = self.model.vision.config.image_size
        pixels = nets.clip_pixels(images, size, self.model.vision.device)
        return (self.model(pixels, text.input_ids, text.attention_mask) - self.mean) / self.std


# ---- vlm_alignment and vlm_strict -----------------------------------------------------------

QUESTION = "Answer concisely: what is going on in this image?"  # word for word DDPO's


def bertscore_recall(reference, candidate, counts=None):
    """R = Σ_i w_i · max_j cos(r_i, c_j) / Σ_i w_i  (Zhang et al., 2020).  (R,D), (C,D), (R,) -> ()

    How much of the reference is said somewhere in the candidate; saying more costs nothing. w_i is
    0 at special tokens: they count for nothing but, as in the bert-score package, may be matched.
    """
    r, c = (v / v.norm(dim=-1, keepdim=True) for v in (reference, candidate))
    best = (r @ c.T).max(1).values
    w = torch.ones_like(best) if counts is None else counts.to(best)
    return (w * best).sum() / w.sum()


class VlmAlignment:
    """r = bertscore_recall(reference "The image contains {prompt}", candidate: the answer)."""

    def __init__(self, models, device):
        self.ask = nets.Judge() if models.vlm == "judge" else nets.Llava(models.vlm, device)
        self.encode = nets.TokenEncoder(models.bert, models.bert_layer, device)

    def __call__(self, images, prompts):
        answers = self.encode(self.ask(images, [QUESTION] * len(images)))
        references = self.encode([self.ask.reference.format(prompt) for prompt in prompts])
        # An answer without words says nothing of the reference, as in the bert-score package.
        return [bertscore_recall(r, c, counts) if said.any() else 0.0
                for (r, counts), (c, said) in zip(references, answers)]


class VlmStrict:
    """r = share of the prompt's questions whose answer holds the right word (DDPO's counting)."""

    def __init__(self, models, device):
        self.ask = nets.Judge() if models.vlm == "judge" else nets.Llava(models.vlm, device)
        self.questions = nets.read_questions(models.vlm_questions)

    def __call__(self, images, prompts):
        known = [self.questions(prompt) for prompt in prompts]
        said = iter(self.ask([image for image, pairs in zip(images, known) for _ in pairs],
                             [question for pairs in known for question, _ in pairs]))
        # Whole words, also in the plural: "none" is not "one".
        holds = lambda answer, right: bool(  # noqa: E731
            re.search(rf"(?<!\w){re.escape(right)}s?(?!\w)", answer, re.IGNORECASE))
        return [sum(holds(next(said), right) for _, right in pairs) / len(pairs) for pairs in known]


# ---- by name --------------------------------------------------------------------------------

REWARDS = dict(compressibility=compressibility, incompressibility=incompressibility,
               aesthetic=Aesthetic, image_reward=ImageReward, vlm_alignment=VlmAlignment,
               vlm_strict=VlmStrict, alignment=alignment)


def get_reward(spec, models=Models(), device=None, flag="--reward"):
    """A reward by name, from path/to/file.py:function, or a sum from name=weight,name=weight.

    Models are loaded once, onto the device; ValueError, naming the flag, for what is not there.
    """
    if "=" in spec.rpartition(":")[2]:  # and not in the path of a file
        return weighted_sum(spec, models, device, flag)
    if ".py:" in spec:
        return reward_from_file(spec, flag)
    if spec not in REWARDS:
        raise ValueError(f"{flag} {spec}: unknown; choose from {', '.join(REWARDS)}, a sum "
                         "such as alignment=1,aesthetic=0.2, or path/to/file.py:function")
    if not isinstance(REWARDS[spec], type):
        return REWARDS[spec]
    scorer = REWARDS[spec](models, device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def reward(images, prompts, batch_size=32):
        starts = range(0, len(images), batch_size)
        batches = (slice(i, i + batch_size) for i in starts)
        return [value for rows in batches for value in scorer(images[rows], prompts[rows])]

    reward.__name__ = spec
    return reward


def weighted_sum(spec, models, device, flag):
    """r = Σ_k weight_k · r_k  from "name=weight,name=weight"."""
    terms = []
    for term in spec.split(","):
        name, _, weight = term.rpartition("=")
        try:
            terms.append((float(weight), get_reward(name, models, device, flag)))
        except ValueError as error:
            raise ValueError(f"{flag} {spec}: {error}") from error

    def reward(images, prompts):  # score() inside, so that a broken term is named
        return sum(weight * score(term, images, prompts) for weight, term in terms)

    reward.__name__ = spec
    return reward


def reward_from_file(spec, flag="--reward"):
    """One's own reward: the function of that name in that file, which may import its neighbors."""
    file, _, name = spec.rpartition(":")
    try:
        module_spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module  # a dataclass in the file looks itself up there
        sys.path.append(str(Path(file).resolve().parent))
        module_spec.loader.exec_module(module)
        if not callable(getattr(module, name)):
            raise TypeError(f"{name} is not a function")
        return getattr(module, name)
    except Exception as error:  # whatever the reader's own file raises
        raise ValueError(f"{flag} {spec}: {type(error).__name__}: {error}") from error


@torch.no_grad()
def score(reward, images, prompts, folder="runs"):
    """The reward's B numbers as a float64 tensor (B,); ValueError unless there are B finite ones.

    The picture that got no finite number is saved in the folder.
    """
    name = getattr(reward, "__name__", str(reward))
    values = reward(images, prompts)
    try:  # one by one: whole numbers become floats here, and stay so in every later average
        values = torch.tensor([float(value) for value in values], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {name}: not a number for each picture ({error})") from error
    if len(values) != len(images):
        raise ValueError(f"reward {name}: {len(values)} numbers for {len(images)} pictures, "
                         f"the first of {prompts[0]!r}")
    for value, image, prompt in zip(values, images, prompts):
        if not value.isfinite():
            file = Path(folder, "bad_reward.png")
            if image is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
            raise ValueError(f"reward {name}: gave {value.item()} for a picture of {prompt!r}: "
                             f"see {file}")
    return values


# ---- what the rewards think of the same pictures --------------------------------------------


def spearman(a, b):
    """ρ = Pearson correlation of ranks, equal values sharing their mean rank.  (B,), (B,) -> ()"""
    if len(a) < 2:  # of one pair there is none
        return torch.tensor(torch.nan)

    def ranks(x):
        _, place, count = x.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[place].double()
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1]


@torch.no_grad()
def main(argv=None):
    config = mdp.parse_config(Config, __doc__, argv)
    for flag, n in (("--samples", config.samples), ("--show", config.show)):
        if n < 1:
            raise ValueError(f"{flag} must be at least 1, not {n}")
    specs = [spec for word in config.rewards
             for spec in ([word] if "=" in word else word.split(","))]
    specs = list(REWARDS) if specs == ["all"] else specs
    out = mdp.picture_path(config.out)
    rewards = [get_reward(spec, config, config.device, "--rewards") for spec in specs]
    pipe = mdp.load_pipeline(config.model, config.device)
    prompts = [prompt for prompt in config.prompts for _ in range(config.samples)]
    images = mdp.rollout(pipe, prompts, config.num_steps, guidance_scale=config.guidance_scale,
                         seed=config.seed, batch_size=16).images
    scores = {spec: score(reward, images, prompts, out.parent)
              for spec, reward in zip(specs, rewards)}

    head = "".join(f"{name[-12:] if ':' in name else name[:12]:>13}" for name in scores)
    print(f"{'mean of ' + str(config.samples):32}" + head)
    for i, prompt in enumerate(config.prompts):
        rows = slice(i * config.samples, (i + 1) * config.samples)
        print(f"{prompt[:31]:32}" + "".join(f"{v[rows].mean():13.3f}" for v in scores.values()))
    print(f"\n{'rank correlation':32}" + head)
    for name, a in scores.items():
        print(f"{name[:31]:32}" + "".join(f"{spearman(a, b):13.2f}" for b in scores.values()))
    figures.ranking(out, images, prompts, scores, config.show)
    if "alignment" in scores:
        print(judge.report(pipe.vae))
    print(f"\nPictures sorted by each reward, best to worst: {out}")


if __name__ == "__main__":
    mdp.run_main(main)
