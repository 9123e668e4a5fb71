"""02 · Rewards: what a picture is worth.

WHAT YOU LEARN. To the algorithms of chapters 3 and 4 a reward is a black box: any function from
pictures and their prompts to numbers. It need not be differentiable (a file size is not), nor
fair, nor sensible; the policy gradient will find out what it *really* pays for.

    reward(images: list[PIL.Image], prompts: list[str]) -> B numbers, higher is better

    compressibility     −(JPEG kilobytes at quality 95)      DDPO, section 5.1
    incompressibility   +(JPEG kilobytes at quality 95)      DDPO, section 5.1
    alignment           share of the objects asked for that are in the picture, with the right
                        color, shape, number and place: exact, for the shape world of tiny_sd/

HOW TO RUN. `python 02_rewards.py` draws pictures with the tiny model, scores them and saves the
best and the worst under each reward to runs/02_rewards/best_worst.png; about ten seconds on a CPU.

DEPARTURES. DDPO asks a vision-language model whether picture and prompt agree. In a world of
colored shapes that question has an exact answer, and tiny_sd/judge.py reads it off the pixels.

EXERCISES. (1) Write a reward that pays for blue, and add it to REWARDS. (2) Which pictures does
compressibility like best, and what would a model do that is paid for nothing else? (3) Find a
picture that a person calls right and the judge calls wrong.
"""
import io
import textwrap
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from matplotlib.figure import Figure

from tiny_sd import judge

mdp = import_module("01_mdp")  # load_pipeline, rollout, parse_config, run_main


@dataclass(frozen=True)
class Config:
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, or a name on the Hugging Face hub
    rewards: tuple[str, ...] = ("compressibility", "incompressibility", "alignment")  # which ones
    prompts: tuple[str, ...] = ("three red circles", "a green star and a blue square",
                                "a blue star on the left", "a yellow triangle")  # what to draw
    samples: int = 8  # pictures of each prompt
    num_steps: int = 10  # denoising steps T
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none
    seed: int = 0  # seed of all noise
    show: int = 8  # how many of the best and of the worst to show
    out: str = "runs/02_rewards/best_worst.png"  # where the sheet goes


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


REWARDS = {f.__name__: f for f in (compressibility, incompressibility, alignment)}


def get_reward(name):
    """The reward function of that name; ValueError for an unknown one."""
    if name not in REWARDS:
        raise ValueError(f"--reward {name}: unknown; choose from {', '.join(REWARDS)}")
    return REWARDS[name]


@torch.no_grad()
def score(reward, images, prompts):
    """The reward's numbers as a float64 tensor (B,); ValueError unless there are B finite ones."""
    name = getattr(reward, "__name__", str(reward))
    # One by one: whole numbers become floats here, and stay so in every later average.
    values = torch.tensor([float(value) for value in reward(images, prompts)], dtype=torch.float64)
    if len(values) != len(images):
        raise ValueError(f"--reward {name}: {len(values)} numbers for {len(images)} pictures")
    for value, prompt in zip(values, prompts):
        if not value.isfinite():
            raise ValueError(f"--reward {name}: gave {value.item()} for a picture of {prompt!r}")
    return values


def save_best_worst(path, images, prompts, scores, show):
    """A sheet with two rows a reward: its best pictures, best first, and its worst, worst last."""
    show = min(show, len(images))
    figure = Figure(figsize=(1.25 * show + 1, 3.7 * len(scores)), dpi=110, layout="constrained")
    axes = figure.subplots(2 * len(scores), show, squeeze=False)
    for pair, (name, values) in zip(axes.reshape(len(scores), 2, show), scores.items()):
        order = values.argsort(descending=True, stable=True).tolist()
        for row, indices, title in zip(pair, (order[:show], order[-show:]), ("best", "worst")):
            for ax, i in zip(row, indices):
                ax.imshow(images[i])
                ax.set(xticks=[], yticks=[])
                ax.set_title(f"{values[i]:.2f}", size=9)
                ax.set_xlabel(textwrap.fill(prompts[i], 18), size=6)
            row[0].set_ylabel(f"{name}\n{title}", size=8)
    figure.savefig(path)


def main(argv=None):
    config = mdp.parse_config(Config, __doc__, argv)
    for flag, n in (("--samples", config.samples), ("--show", config.show)):
        if n < 1:
            raise ValueError(f"{flag} must be at least 1, not {n}")
    rewards = [get_reward(name) for name in config.rewards]
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    pipe = mdp.load_pipeline(config.model)
    prompts = [prompt for prompt in config.prompts for _ in range(config.samples)]
    images = mdp.rollout(pipe, prompts, config.num_steps, guidance_scale=config.guidance_scale,
                         seed=config.seed).images
    scores = {reward.__name__: score(reward, images, prompts) for reward in rewards}
    print(f"{'mean of ' + str(config.samples):42}" + "".join(f"{name:>20}" for name in scores))
    for i, prompt in enumerate(config.prompts):
        rows = slice(i * config.samples, (i + 1) * config.samples)
        print(f"{prompt:42}" + "".join(f"{v[rows].mean():20.3f}" for v in scores.values()))
    save_best_worst(out, images, prompts, scores, config.show)
    print(f"Best and worst under each reward: {out}")


if __name__ == "__main__":
    mdp.run_main(main)
