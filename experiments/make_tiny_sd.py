"""Remake the tiny Stable Diffusion from nothing: python experiments/make_tiny_sd.py

Four steps, as Stable Diffusion was made:

    vae      pictures (3,64,64) -> latents (4,8,8) and back: mean squared error + a little KL
    unet     UNet and text encoder on noisily captioned latents: DDPM's loss (Ho et al., 2020)
             L = E[ w_t ||eps - eps_theta(x_t, t, c)||^2 ] with w_t = 1/alpha_bar_t up to a limit.
             Plain DDPM (w = 1) hardly looks at the noisiest steps, and there it is decided how
             many objects there are, and where
    refine   the same on fresh pictures with half as many wrong captions, as web-scale models are
             finished on cleaner data
    measure  VAE PSNR, denoising loss, and how often the exact judge finds a family's prompts right:
             printed, and added to measured.csv in the folder

The result is a diffusers folder: StableDiffusionPipeline.from_pretrained("tiny_sd") loads it.
About 75 minutes on one CPU core (vae 22, unet 37, refine 12).  `--only` does a single step.
"""

import csv
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tqdm import tqdm, trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support import flags, models, training  # noqa: E402
from tiny_sd import judge, shapes  # noqa: E402

mdp = import_module("01_mdp")  # forward_process, denoising_loss

MAX_LENGTH = 16  # tokens; the longest caption has 9
WIDTH = 64  # of the text encoder
STAGES = ("vae", "unet", "unet batches", "refine", "refine batches", "measure")


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
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    broken = [word for word in shapes.WORDS if len(tokenizer(word).input_ids) != 3]
    assert not broken, f"not one token each: {broken}"
    return tokenizer


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
        assert int(known.sum()) == len(shapes.WORDS) + 2
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


# ---- data -----------------------------------------------------------------------------------


def draws(seed, stage, step=0):
    """Random numbers of one optimizer step of a stage, at an address of their own."""
    return training.random_stream(seed, "make", STAGES.index(stage), step)


def draw_pairs(n, seed, noise=1.0):
    """n pictures (n,3,H,W) uint8 and their captions."""
    rng = np.random.default_rng(seed)
    pictures, captions = torch.empty(n, 3, shapes.SIZE, shapes.SIZE, dtype=torch.uint8), []
    for i in trange(n, desc="drawing"):
        picture, caption = shapes.sample_pair(rng, noise)
        pictures[i] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        captions.append(caption)
    return pictures, captions


def to_unit(pictures):
    """uint8 0..255 -> float -1..1, the VAE's range."""
    return pictures.float() / 127.5 - 1


def cosine(optimizer, steps, warmup=200):
    """Learning rate: linear warm-up, then half a cosine down to zero."""
    def scale(i):
        return min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * i / steps)))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


# ---- step 1: the VAE ------------------------------------------------------------------------


def train_vae(pictures, steps, device, seed, batch=16, lr=2e-3, kl_weight=3e-5):
    vae = make_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4)
    schedule = cosine(optimizer, steps)
    bar = trange(steps, desc="VAE", mininterval=5)
    for i in bar:
        stream = draws(seed, "vae", i)
        index = torch.from_numpy(stream.integers(len(pictures), size=batch))
        x = to_unit(pictures[index]).to(device, memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = stream.standard_normal(posterior.mean.shape, dtype=np.float32)
        noise = torch.from_numpy(noise).to(device)
        mse = F.mse_loss(vae.decode(posterior.mean + posterior.std * noise).sample, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (mse + kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if i % 100 == 0:
            bar.set_postfix(psnr=f"{psnr(mse.item()):.1f} dB", kl=f"{kl.item():.2f}")
    vae.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    latents = encode(vae, pictures[:4000], device)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))  # as Rombach et al.
    return vae


def psnr(mse):
    """Peak signal-to-noise ratio in dB of an error between pictures in [-1, 1]."""
    return 10 * math.log10(4 / mse)


@torch.no_grad()
def encode(vae, pictures, device):
    """Mean of the posterior, not yet scaled: (n,4,8,8)."""
    batches = tqdm(pictures.split(100), desc="encoding", leave=False)
    return torch.cat([vae.encode(to_unit(p).to(device)).latent_dist.mean.cpu() for p in batches])


@torch.no_grad()
def measure_vae(vae, pictures, device):
    """PSNR in dB of pictures after encoding and decoding, rounded to 8 bits as users see them."""
    error = []
    for p in pictures.split(100):
        x = to_unit(p).to(device)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        y = ((y + 1) * 127.5).round() / 127.5 - 1
        error.append(((x - y) ** 2).mean((1, 2, 3)))
    return psnr(torch.cat(error).mean().item())


# ---- step 2: UNet and text encoder ----------------------------------------------------------


def noise_latents(scheduler, x_0, seed, stage, step=0):
    """x_0 (B,C,H,W) after the forward process, to a random t each: x_t, t (B,), eps, a_t (B,)."""
    stream = draws(seed, stage, step)
    t = torch.from_numpy(stream.integers(scheduler.config.num_train_timesteps, size=len(x_0)))
    eps = torch.from_numpy(stream.standard_normal(x_0.shape, dtype=np.float32))
    return mdp.forward_process(scheduler, x_0, t, eps), t, eps, scheduler.alphas_cumprod[t]


def train_unet(unet, text_encoder, latents, tokens, empty, steps, device, seed, stage, lr=1e-3,
               batch=64, max_weight=30):
    """Yields UNet and text encoder on the way: exponential moving averages of their training."""
    unet.to(device, memory_format=torch.channels_last).requires_grad_(True)
    text_encoder.to(device).requires_grad_(True)
    scheduler = make_scheduler()
    both = torch.nn.ModuleList([unet, text_encoder])
    average = torch.optim.swa_utils.AveragedModel(
        both, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(both.parameters(), lr=lr, weight_decay=1e-3)
    schedule = cosine(optimizer, steps)
    bar, running = trange(steps, desc="UNet", mininterval=5), None
    for i in bar:
        stream = draws(seed, f"{stage} batches", i)
        index = torch.from_numpy(stream.integers(len(latents), size=batch))
        x_t, t, eps, a_t = noise_latents(scheduler, latents[index], seed, stage, i)
        dropped = torch.from_numpy(stream.random((batch, 1))) < 0.1  # for classifier-free guidance
        ids = torch.where(dropped, empty, tokens[index]).to(device)
        eps_theta = unet(x_t.to(device), t.to(device), text_encoder(ids)[0]).sample
        weight = (1 / a_t).clamp(max=max_weight).to(device)
        loss = mdp.denoising_loss(eps_theta, eps.to(device), weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(both)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if i % 100 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
        if i % 2000 == 1999:
            yield average.module[0], average.module[1]
    yield average.module[0], average.module[1]


@torch.no_grad()
def measure_unet(pipe, pictures, captions, device, seed):
    """E||eps - eps_theta||^2 on held-out pictures, all timesteps alike, unweighted."""
    ids = tokenize(pipe.tokenizer, captions).to(device)
    x_0 = encode(pipe.vae, pictures, device) * pipe.vae.config.scaling_factor
    x_t, t, eps, _ = noise_latents(make_scheduler(), x_0, seed, "measure")
    error = []
    for x, s, e, i in zip(x_t.split(100), t.split(100), eps.split(100), ids.split(100)):
        prediction = pipe.unet(x.to(device), s.to(device), pipe.text_encoder(i)[0]).sample
        error.append(((prediction.cpu() - e) ** 2).mean((1, 2, 3)))
    return torch.cat(error).mean().item()


def tokenize(tokenizer, captions):
    return tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True,
                     return_tensors="pt").input_ids


# ---- step 3: the pipeline, and how good it is -----------------------------------------------


def save_pipeline(folder, vae, unet, text_encoder):
    """Write the diffusers folder; UNet and VAE in half precision to stay small."""
    unet.to(memory_format=torch.contiguous_format)  # as files have it
    pipe = StableDiffusionPipeline(
        vae=vae.half(), unet=unet.half(), text_encoder=text_encoder, tokenizer=make_tokenizer(),
        scheduler=make_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipe.save_pretrained(folder)
    vae.float(), unet.float()
    # Stable Diffusion's files have this prefix. Newer transformers write none but read both; older
    # ones would not find the weights, and go on with random ones.
    file = Path(folder, "text_encoder", "model.safetensors")
    weights = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    forget_places(folder)


def forget_places(folder):
    """Take out of the JSON files where on this machine their models were loaded from."""
    for file in Path(folder).rglob("*.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if "_name_or_path" in settings:
            del settings["_name_or_path"]
            file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def load_pipeline(folder, device):
    pipe = StableDiffusionPipeline.from_pretrained(folder).to(device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure_families(pipe, n=128, steps=20, guidance_scale=1.0, held_out=False, seed=0):
    """Share of pictures the judge finds fully right, per family: a dict, and the pictures."""
    right, pictures = {}, {}
    for family in tqdm(shapes.FAMILIES, desc="sampling"):
        prompts = shapes.prompts_of(family, held_out)
        if not prompts:
            continue
        prompts = [prompts[i * len(prompts) // n % len(prompts)] for i in range(n)]
        generator = torch.Generator().manual_seed(seed)
        pictures[family] = pipe(prompts, num_inference_steps=steps, eta=1.0, generator=generator,
                                guidance_scale=guidance_scale).images
        seen = judge.see(pictures[family])
        scores = [judge.score(o, shapes.parse(p)) for o, p in zip(seen, prompts)]
        right[family] = np.mean([score == 1 for score in scores])
    return right, pictures


@dataclass(frozen=True)
class Config:
    out: str = str(ROOT / "tiny_sd")  # folder that the model is written into
    only: Literal["vae", "unet", "refine", "measure"] | None = None  # do one stage
    vae_steps: int = 6000  # optimizer steps of the VAE
    unet_steps: int = 9000  # optimizer steps of UNet and text encoder
    refine_steps: int = 3000  # optimizer steps on cleaner captions
    pictures: int = 40000  # pictures to train on
    seed: int = 0  # seed of everything
    device: str | None = None  # cpu, cuda, ...; default: a GPU if there is one


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    tokenizer, device = make_tokenizer(), models.pick_device(config.device)
    for stage in [config.only] if config.only else ["vae", "unet", "refine", "measure"]:
        torch.manual_seed(config.seed)  # diffusers and transformers draw initial weights from it
        refine = stage == "refine"
        if stage == "measure":
            measure(config, device)
            continue
        n, seed = config.pictures, config.seed
        if refine:
            n, seed = n // 2, seed + 2
        pictures, captions = draw_pairs(n, seed, noise=0.5 if refine else 1.0)
        if stage == "vae":
            vae = train_vae(pictures, config.vae_steps, device, config.seed)
            vae.half().save_pretrained(Path(config.out, "vae"))
            forget_places(Path(config.out, "vae"))
            continue
        vae = AutoencoderKL.from_pretrained(Path(config.out, "vae")).float()
        vae.to(device).requires_grad_(False)
        latents = encode(vae, pictures, device) * vae.config.scaling_factor
        old = load_pipeline(config.out, device) if refine else None
        unet = old.unet if refine else make_unet()
        text_encoder = old.text_encoder if refine else make_text_encoder(tokenizer)
        steps, lr = (config.refine_steps, 5e-4) if refine else (config.unet_steps, 1e-3)
        tokens, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
        for unet, text_encoder in train_unet(unet, text_encoder, latents, tokens, empty, steps,
                                             device, config.seed, stage, lr):
            save_pipeline(config.out, vae, unet, text_encoder)


def measure(config, device):
    """How good the model in the folder is, and the judge on its pictures."""
    pipe = load_pipeline(config.out, device)
    fresh, captions = draw_pairs(1000, config.seed + 1)
    loss = measure_unet(pipe, fresh, captions, device, config.seed + 1)
    note(config.out, "VAE: PSNR on 1000 fresh pictures, dB", measure_vae(pipe.vae, fresh, device))
    note(config.out, "denoising loss, mean squared error of ε, all timesteps alike", loss)
    for held_out in (False, True):
        right, pictures = measure_families(pipe, n=512, held_out=held_out)
        for family, share in right.items():
            which = "combinations never seen" if held_out else "512 each, guidance 1, 20 steps"
            note(config.out, f"pictures fully right, {family}, {which}, %", 100 * share)
        if not held_out:
            digits = judge.read(pictures["count"])
            written = np.mean([digit is not None for digit in digits])
            note(config.out, "family count: pictures with a digit, of these 512, %", 100 * written)
    results = judge.exam_results(pipe.vae).values()
    for name, shares in zip(judge.EXAMS, zip(*results)):
        note(config.out, f"judge right on 500 drawn pictures, {name}, %", 100 * np.mean(shares))


def note(folder, measured, value):
    """Prints something measured, and adds it to measured.csv in the folder."""
    value = float(f"{value:.3g}")
    print(f"{measured:80} {value:g}")
    with open(Path(folder, "measured.csv"), "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(["measured", "value"])
        writer.writerow([measured, value])


if __name__ == "__main__":
    flags.run(main)
