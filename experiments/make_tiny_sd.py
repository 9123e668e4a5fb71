"""Remake the tiny Stable Diffusion from nothing: python experiments/make_tiny_sd.py

Four steps, as Stable Diffusion was made:

    vae      pictures (3,64,64) -> latents (4,8,8) and back: mean squared error + a little KL
    unet     UNet and text encoder on noisily captioned latents: DDPM's loss (Ho et al., 2020)
             L = E[ w_t ||eps - eps_theta(x_t, t, c)||^2 ] with w_t = 1/alpha_bar_t up to a limit.
             Plain DDPM (w = 1) hardly looks at the noisiest steps, and there it is decided how
             many objects there are, and where
    refine   the same on fresh pictures with half as many wrong captions, as web-scale models are
             finished on cleaner data
    measure  VAE PSNR, denoising loss, and how often the exact judge finds a family's prompts right

What is measured, and how long each step takes, is printed, and added to measured.csv in the folder.
The result is a diffusers folder: StableDiffusionPipeline.from_pretrained("tiny_sd") loads it.
About 75 minutes on one CPU core (vae 22, unet 37, refine 12).  `--only` does a single step.
"""

import csv
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm, trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support import flags, models, training  # noqa: E402
from tiny_sd import judge, shapes, web  # noqa: E402

mdp = import_module("01_mdp")  # forward_process, denoising_loss

MAX_LENGTH = 16  # tokens; the longest caption has 9
WIDTH = 64  # of the text encoder
STAGES = ("vae", "unet", "refine", "measure", "clip", "aesthetic", "vision", "matching",
          "preferences", "scenes", "wrong pictures", "generated prompts", "flips",
          "vlm")  # also make_rewards.py's: a place in this list is part of an address
STEPS = {"vae": 6000, "unet": 9000, "refine": 3000, "clip": 1000, "aesthetic": 1500, "vision": 700,
         "matching": 400, "vlm": 2500}  # of the optimizer


# ---- the parts ------------------------------------------------------------------------------


def make_tokenizer():
    """A CLIPTokenizer (byte-pair encoding) whose merges make each word of the world one token."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = []
    for word in sorted(shapes.WORDS, key=len, reverse=True):  # long first: "an" is inside "orange"
        *start, last = word
        pieces = [*start, last + "</w>"]
        for i in range(1, len(pieces)):
            pair = ("".join(pieces[:i]), pieces[i])
            merges += [pair] if pair not in merges else []
    vocab = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges)]
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
        files[1].write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        CLIPTokenizer(*map(str, files), model_max_length=MAX_LENGTH).save_pretrained(folder)
        return CLIPTokenizer.from_pretrained(folder)


def make_text_encoder(tokenizer):
    """A CLIPTextModel; tokens that are no word of the world keep an embedding of exactly zero."""
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))
    known = torch.zeros(len(tokenizer), 1)
    for word in shapes.WORDS:
        known[tokenizer(word).input_ids] = 1
    with torch.no_grad():
        embedding = text_encoder.get_input_embeddings().weight
        embedding.normal_(std=0.5).mul_(known)  # CLIP's 0.02 is slow to learn from at this size
    return text_encoder


def make_vae():
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=shapes.SIZE,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 64), layers_per_block=1, norm_num_groups=8,
    )


def make_unet():
    return UNet2DConditionModel(
        sample_size=shapes.SIZE // 8, in_channels=4, out_channels=4, block_out_channels=(48, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=16,
    )


def make_scheduler():
    """Stable Diffusion v1's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )


# ---- data, and the loop of all stages -------------------------------------------------------


def draws(seed, stage, step=0):
    """Random numbers of one optimizer step of a stage, at an address of their own."""
    return training.random_stream(seed, "make", STAGES.index(stage), step)


def draw_pairs(n, seed, noise=1.0):
    """n pictures (n,3,H,W) uint8 and their captions."""
    rng = np.random.default_rng(seed)
    pairs = [web.sample_pair(rng, noise) for _ in trange(n, desc="drawing")]
    return pixels_of([picture for picture, _ in pairs]), [caption for _, caption in pairs]


def pixels_of(images):
    """PIL pictures -> (n,3,H,W) uint8."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def images_of(pixels):
    """(n,3,H,W) uint8 -> PIL pictures."""
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]


def optimize(model, loss_of, n, stage, config, batch=64, lr=1e-3, weight_decay=0.01, warmup=100,
             steps=None):
    """AdamW; the learning rate rises for some steps, and falls along half a cosine down to zero.

    loss_of(i, stream) -> (): of the examples i (batch,) of n, with this step's random numbers.
    """
    steps = 1 if config.quick else steps or STEPS[stage]
    warmup = min(warmup, steps // 5 + 1)

    def scale(step):
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    for step in (bar := trange(steps, desc=stage, mininterval=5)):
        stream = draws(config.seed, stage, step)
        i = torch.from_numpy(stream.integers(n, size=batch))
        loss = loss_of(i, stream)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    model.eval()


# ---- step 1: the VAE ------------------------------------------------------------------------


def to_unit(pictures):
    """uint8 0..255 -> float -1..1, the VAE's range."""
    return pictures.float() / 127.5 - 1


def remake_vae(config, out, device, kl_weight=3e-5):
    pictures, _ = draw_pairs(config.pictures, config.seed)
    vae = make_vae().to(device, memory_format=torch.channels_last)

    def loss_of(i, stream):
        x = to_unit(pictures[i]).to(device, memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = stream.standard_normal(posterior.mean.shape, dtype=np.float32)
        z = posterior.mean + posterior.std * torch.from_numpy(noise).to(device)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.mse_loss(vae.decode(z).sample, x) + kl_weight * kl

    optimize(vae, loss_of, len(pictures), "vae", config, batch=16, lr=2e-3, weight_decay=1e-4,
             warmup=200)
    vae.to(memory_format=torch.contiguous_format)  # as files have it
    latents = encode(vae, pictures[:4000])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))  # as Rombach et al.
    vae.half().save_pretrained(out / "vae")


@torch.no_grad()
def encode(vae, pictures):
    """Mean of the posterior, not yet scaled: (n,4,8,8)."""
    batches = tqdm(pictures.split(100), desc="encoding", leave=False)
    return torch.cat([vae.encode(to_unit(p).to(vae.device)).latent_dist.mean.cpu()
                      for p in batches])


@torch.no_grad()
def through_vae(vae, images):
    """PIL pictures as a VAE gives them back, rounded to 8 bits."""
    images_back, processor = [], VaeImageProcessor()
    for p in pixels_of(images).split(100):
        x = to_unit(p).to(vae.device, vae.dtype)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
        images_back += processor.postprocess(y.float(), output_type="pil")
    return images_back


def measure_vae(vae, pictures):
    """Peak signal-to-noise ratio in dB of pictures after encoding and decoding."""
    back = pixels_of(through_vae(vae, images_of(pictures)))
    mse = (to_unit(pictures) - to_unit(back)).square().mean().item()
    return 10 * math.log10(4 / mse)


# ---- step 2: UNet and text encoder ----------------------------------------------------------


def noise_latents(scheduler, x_0, stream):
    """x_0 (B,C,H,W) after the forward process, to a random t each: x_t, t (B,), eps, a_t (B,)."""
    t = torch.from_numpy(stream.integers(scheduler.config.num_train_timesteps, size=len(x_0)))
    eps = torch.from_numpy(stream.standard_normal(x_0.shape, dtype=np.float32))
    return mdp.forward_process(scheduler, x_0, t, eps), t, eps, scheduler.alphas_cumprod[t]


def train_unet(unet, text_encoder, pairs, stage, lr, config, out, device, max_weight=30):
    """Trains both on pictures and captions, and writes the pipeline with their moving averages."""
    pictures, captions = pairs
    vae = AutoencoderKL.from_pretrained(out / "vae").float().to(device)
    latents = encode(vae, pictures) * vae.config.scaling_factor
    unet.to(memory_format=torch.channels_last)
    tokenizer, scheduler = make_tokenizer(), make_scheduler()
    tokens, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    both = torch.nn.ModuleList([unet, text_encoder]).requires_grad_(True)
    average = torch.optim.swa_utils.AveragedModel(
        both, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))

    def loss_of(i, stream):
        average.update_parameters(both)
        x_t, t, eps, a_t = noise_latents(scheduler, latents[i], stream)
        dropped = torch.from_numpy(stream.random((len(i), 1))) < 0.1  # for guidance
        ids = torch.where(dropped, empty, tokens[i]).to(device)
        eps_theta = unet(x_t.to(device), t.to(device), text_encoder(ids)[0]).sample
        weight = (1 / a_t).clamp(max=max_weight).to(device)
        return mdp.denoising_loss(eps_theta, eps.to(device), weight)

    optimize(both, loss_of, len(latents), stage, config, lr=lr, weight_decay=1e-3, warmup=200)
    average.update_parameters(both)
    unet, text_encoder = average.module.eval()
    unet.to(memory_format=torch.contiguous_format)  # as files have it
    pipe = StableDiffusionPipeline(
        vae=vae.half(), unet=unet.half(), text_encoder=text_encoder, tokenizer=make_tokenizer(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipe.save_pretrained(out)
    # Stable Diffusion's files have this prefix. Newer transformers write none but read both; older
    # ones would not find the weights, and go on with random ones.
    file = Path(out, "text_encoder", "model.safetensors")
    weights = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def remake_unet(config, out, device):
    pairs = draw_pairs(config.pictures, config.seed)
    unet, text_encoder = make_unet().to(device), make_text_encoder(make_tokenizer()).to(device)
    train_unet(unet, text_encoder, pairs, "unet", 1e-3, config, out, device)


def refine(config, out, device):
    pairs = draw_pairs(config.pictures // 2, config.seed + 2, noise=0.5)
    pipe = models.load_pipeline(str(out), device)
    train_unet(pipe.unet, pipe.text_encoder, pairs, "refine", 5e-4, config, out, device)


def tokenize(tokenizer, captions):
    return tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True,
                     return_tensors="pt").input_ids


# ---- step 3: how good it is -----------------------------------------------------------------


@torch.no_grad()
def measure_unet(pipe, pictures, captions, seed):
    """E[‖ε − ε_θ‖²/D] on held-out pictures, all timesteps alike, unweighted."""
    text = pipe.text_encoder(tokenize(pipe.tokenizer, captions).to(pipe.device))[0]
    x_0 = encode(pipe.vae, pictures) * pipe.vae.config.scaling_factor
    x_t, t, eps, _ = noise_latents(make_scheduler(), x_0, draws(seed, "measure"))
    eps_theta = pipe.unet(x_t.to(pipe.device), t.to(pipe.device), text).sample
    return mdp.denoising_loss(eps_theta.cpu(), eps).item()


def measure_families(pipe, n=128, steps=20, held_out=False, seed=0):
    """Share of pictures the judge finds fully right, per family: a dict, and the pictures."""
    right, pictures = {}, {}
    pipe.set_progress_bar_config(disable=True)
    for family in tqdm(shapes.FAMILIES, desc="sampling"):
        prompts = training.spread_evenly(shapes.prompts_of(family, held_out), n)
        if prompts:
            generator = torch.Generator().manual_seed(seed)
            pictures[family] = pipe(prompts, num_inference_steps=steps, eta=1.0,
                                    generator=generator, guidance_scale=1.0).images
            right[family] = share_right(pictures[family], [shapes.parse(p) for p in prompts])
    return right, pictures


def share_right(images, requests):
    """Share of pictures that score 1."""
    return np.mean([judge.score(seen, r) == 1 for seen, r in zip(judge.see(images), requests)])


def exam(families, n, seed=0, writing=False):
    """n drawn pictures of each family, and what they show; writing: any digit on each."""
    images, requests = [], []
    for family in families:
        rng = np.random.default_rng(seed)
        prompts = shapes.prompts_of(family) + shapes.prompts_of(family, held_out=True)
        for i in rng.integers(len(prompts), size=n):
            request = shapes.parse(prompts[i])
            digit = int(rng.choice(list(shapes.DIGITS))) if writing else None
            scene = web.layout(request, rng, digit)
            images.append(shapes.draw(scene, web.random_background(rng), digit))
            requests.append(request)
    return images, requests


def measure(config, out, device):
    """How good the model in the folder is, and the judge on its pictures."""
    pipe = models.load_pipeline(str(out), device)
    fresh, captions = draw_pairs(1000, config.seed + 1)
    note(out, "VAE: PSNR on 1000 fresh pictures, dB", measure_vae(pipe.vae, fresh))
    note(out, "denoising loss, mean squared error of ε, all timesteps alike",
         measure_unet(pipe, fresh, captions, config.seed + 1))
    for held_out, which in ((False, "512 each, guidance 1, 20 steps"),
                            (True, "combinations never seen")):
        right, pictures = measure_families(pipe, n=512, held_out=held_out)
        for family, share in right.items():
            note(out, f"pictures fully right, {family}, {which}, %", 100 * share)
        written = np.mean([digit is not None for digit in judge.read(pictures["count"])])
        note(out, f"family count: pictures with a digit, {which}, %", 100 * written)
    for writing, name in ((False, "as drawn"), (True, "with a digit")):
        images, requests = exam(shapes.FAMILIES, 100, writing=writing)
        for where, seen in (("", images), (", after the VAE", through_vae(pipe.vae, images))):
            note(out, f"judge right on 500 drawn pictures, {name}{where}, %",
                 100 * share_right(seen, requests))


# ---- one after the other --------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    out: str = str(ROOT / "tiny_sd")  # folder that is written into
    only: Literal["vae", "unet", "refine", "measure"] | None = None  # do one stage
    pictures: int = 40000  # pictures to train on
    quick: bool = False  # one step of each training, to see whether all of it works
    seed: int = 0  # seed of everything
    device: str | None = None  # cpu, cuda, ...; default: a GPU if there is one


PARTS = {"vae": remake_vae, "unet": remake_unet, "refine": refine, "measure": measure}


def note(out, measured, value):
    """Prints something measured, and adds it to measured.csv in the folder."""
    print(f"{measured:80} {value:.3g}")
    with open(out / "measured.csv", "a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow([measured, float(f"{value:.3g}")])


def make(parts, config):
    """Does all parts, or --only one."""
    out, device = Path(config.out), models.pick_device(config.device)
    for part in [config.only] if config.only else parts:
        started = time.perf_counter()
        torch.manual_seed(config.seed)  # diffusers and transformers draw initial weights from it
        parts[part](config, out, device)
        forget_places(out)
        note(out, f"minutes of {part}", (time.perf_counter() - started) / 60)


def forget_places(out):
    """Take out of the JSON files where on this machine their models were loaded from."""
    for file in out.rglob("*.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def main(argv=None):
    make(PARTS, flags.parse(Config, __doc__, argv))


if __name__ == "__main__":
    flags.run(main)
