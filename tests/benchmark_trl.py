"""The same training in TRL 0.23.1, the last version that had a DDPOTrainer: for tests/benchmark.py.

It runs in an environment of its own, with the libraries of that time:

    pip install torch trl==0.23.1 transformers==4.56.2 diffusers==0.35.2 accelerate==1.10.1 \
        peft==0.17.1 ftfy pillow

Prints one JSON line a round: CPU seconds of the rounds so far, and the mean reward; while learning,
after each quarter of the rounds, the mean of 128 pictures on fresh noise, which is not charged.
"""
import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tiny_sd import judge, shapes  # noqa: E402

EPOCH = dict(  # the work of benchmark.py's "epoch"
    sample_num_steps=20, sample_guidance_scale=5.0, train_cfg=True, sample_batch_size=16,
    sample_num_batches_per_epoch=4, train_batch_size=16)
LEARNING = dict(  # 03's defaults: 128 pictures, 10 steps, no guidance, 2 updates, all weights
    sample_num_steps=10, sample_guidance_scale=1.0, train_cfg=False, sample_batch_size=64,
    sample_num_batches_per_epoch=2, train_batch_size=64, per_prompt_stat_tracking=True)


def old_format(folder):
    """A copy of a pipeline's folder whose tokenizer has the two files of older versions, too."""
    copy = Path(tempfile.mkdtemp(), "model")
    shutil.copytree(folder, copy)
    file = copy / "tokenizer/tokenizer.json"
    if file.is_file():
        model = json.loads(file.read_text())["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (copy / "tokenizer/vocab.json").write_text(json.dumps(model["vocab"]))
        (copy / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return str(copy)


def alignment(images, prompts, metadata):
    pixels = (images * 255).round().clamp(0, 255).to(torch.uint8).numpy().transpose(0, 2, 3, 1)
    pictures = [Image.fromarray(picture) for picture in pixels]
    scores = [judge.score(seen, shapes.parse(prompt))
              for seen, prompt in zip(judge.see(pictures), prompts)]
    return np.array(scores, dtype=float), {}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(ROOT / "tiny_sd"))
    parser.add_argument("--part", choices=("epoch", "learning"), default="epoch")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    learns = flags.part == "learning"
    torch.set_num_threads(1)
    PartialState()  # TRL's logger raises unless accelerate has started
    logging.disable(logging.WARNING)
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    pipeline = DefaultDDPOStableDiffusionPipeline(old_format(flags.model), use_lora=False)
    pipeline.set_progress_bar_config(disable=True)
    if learns:
        encode = pipeline.sd_pipeline.encode_prompt

        def encode_without_empty(*arguments, **options):
            """TRL joins the empty prompt's embeddings to the others also where guidance is 1."""
            embeddings = encode(*arguments, **options)[0]
            return embeddings, embeddings[:0]

        pipeline.sd_pipeline.encode_prompt = encode_without_empty
    config = DDPOConfig(  # saving needs a folder, half precision a GPU: off
        num_epochs=flags.rounds, seed=flags.seed, save_freq=10**9, mixed_precision="no",
        sample_eta=1.0, train_learning_rate=flags.learning_rate, **LEARNING if learns else EPOCH)
    prompts, rng = shapes.prompts_of("location"), np.random.default_rng(flags.seed)
    trainer = DDPOTrainer(config, alignment, lambda: (str(rng.choice(prompts)), {}), pipeline)
    means = []
    trainer.accelerator.log = lambda values, step=None, **_: means.append(
        values.get("reward_mean"))
    seconds, step = 0.0, 0
    for n in range(flags.rounds):
        means.clear()
        started = time.process_time()
        step = trainer.step(n, step)
        seconds += time.process_time() - started
        reward = next(mean for mean in means if mean is not None)
        row = {"seconds": seconds, "reward": float(reward)}
        if learns and (n + 1) * 4 % flags.rounds == 0:
            with torch.no_grad():
                _, drawn = trainer._generate_samples(2, 64)
            scores = [alignment(images, texts, None)[0] for images, texts, _ in drawn]
            row["fresh"] = float(np.concatenate(scores).mean())
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
