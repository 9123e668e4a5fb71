"""A pipeline folder with the exact shapes of Stable Diffusion v1.5 and random weights.

RUN `python tests/make_random_sd.py OUT` (a minute, 4.3 GB; half of it with --dtype bfloat16). What
memory and time the full model needs can then be found out without a download:

    python experiments/memory.py 03_ddpo.py --sd --model OUT

Its pictures are noise. Every prompt can be encoded, though in more tokens than CLIP's own tokenizer
needs: this one knows single letters and no merges.
"""
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import diffusers
import torch
import tyro
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import flags  # noqa: E402


@dataclass(frozen=True)
class Config:
    out: Annotated[str, tyro.conf.Positional]  # the new folder
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights on the disk
    seed: int = 0  # seed of the weights


WORDS, LENGTH, WIDTH = 49408, 77, 768  # CLIP ViT-L/14: tokens, tokens a prompt, numbers a token


def make_unet():
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=WIDTH)  # all else is v1.5's


def make_vae():
    return AutoencoderKL(
        sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)


def make_text_encoder():
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=12,
        max_position_embeddings=LENGTH, bos_token_id=WORDS - 2, eos_token_id=WORDS - 1))


def make_tokenizer():
    """CLIP's, with its 512 letters (inside a word, and at its end) but with no merges of them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [f"<unused {i}>" for i in range(WORDS - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        files[1].write_text("#version: 0.2\n")
        CLIPTokenizer(*map(str, files), model_max_length=LENGTH).save_pretrained(folder)
        return CLIPTokenizer.from_pretrained(folder)


def make_scheduler():
    """Of v1.5's file; support/models.py makes chapter 1's DDIM scheduler of it."""
    return PNDMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
                         beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
                         set_alpha_to_one=False)


def main(argv=None):
    config = tyro.cli(Config, description=__doc__, args=argv)
    if Path(config.out).exists():
        raise ValueError(f"{config.out} is there already")
    diffusers.utils.logging.set_verbosity_error()
    torch.manual_seed(config.seed)
    pipe = StableDiffusionPipeline(
        unet=make_unet(), vae=make_vae(), text_encoder=make_text_encoder(),
        tokenizer=make_tokenizer(), scheduler=make_scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipe.to(getattr(torch, config.dtype)).save_pretrained(config.out, safe_serialization=True)
    numbers = sum(p.numel() for p in pipe.unet.parameters())
    print(f"{config.out}: a UNet of {numbers / 1e6:.1f} million random weights, {config.dtype}")


if __name__ == "__main__":
    flags.run(main)
