"""Rewards ready to use: each a function for --reward FILE.py:NAME.

    pickscore         exp(logit_scale)·cos(picture, prompt) of PickScore's CLIP-H   (Kirstain, 2023)
    clip_score        the same of any CLIP, here tiny_sd's (not CLIPScore's 2.5·max(cos, 0))
    jpeg_and_clip     a mix of two: clip_score, less something for every kilobyte
    vqa_score         P("yes") / (P("yes") + P("no")) of a LLaVA: is it this? (after Lin, 2024)
    rating_from_http  what a server of your own says

RUN `python 03_ddpo.py --reward experiments/more_rewards.py:clip_score`, or look first: `python
02_rewards.py --rewards experiments/more_rewards.py:clip_score,alignment`. EXPECT the tiny CLIP to
agree with alignment in part only (rank correlation 0.37). TRY a sum of two: `--reward
alignment=1,experiments/more_rewards.py:clip_score=0.1`. Environment variables say which models and
which server, if not those below: `CLIP_SCORE=openai/clip-vit-large-patch14 python ...`. They use a
GPU if there is one.
"""
import base64
import io
import json
import os
import sys
import time
import urllib.request
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import models, scoring  # noqa: E402
from support import reward_models as nets  # noqa: E402

rewards = import_module("02_rewards")  # compressibility

PICKSCORE = os.environ.get("PICKSCORE", "yuvalkirstain/PickScore_v1")
CLIP_SCORE = os.environ.get("CLIP_SCORE", "tiny_sd/clip")
VQA_SCORE = os.environ.get("VQA_SCORE", "llava-hf/llava-1.5-7b-hf")
REWARD_URL = os.environ.get("REWARD_URL", "http://127.0.0.1:8000/")
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
TIMEOUT, TRIES, PAUSE = 60, 3, 1  # seconds for an answer, how many times, seconds between
in_batches = partial(scoring.in_batches, name="batch", batch_size=32)


@cache
def load_clip(name, variable):
    """A CLIPModel and its tokenizer, which for tiny_sd's CLIP is the pipeline's."""
    wanted = "a CLIP such as openai/clip-vit-large-patch14, with its tokenizer"
    clip = nets.from_hub(transformers.CLIPModel, name, variable, wanted, dtype=torch.float32,
                         use_safetensors=True, output_loading_info=True)
    tiny = models.find(name) == models.find("tiny_sd/clip")
    tokenizer = nets.from_hub(transformers.CLIPTokenizer, "tiny_sd/tokenizer" if tiny else name,
                              variable, wanted)
    return clip.to(models.pick_device()).eval(), tokenizer


def clip_logits(images, prompts, name, variable):
    """r = exp(logit_scale)·cos(f(picture), g(prompt)), each picture with its own prompt."""
    clip, tokenizer = load_clip(name, variable)
    pixels = nets.clip_pixels(images, clip.config.vision_config.image_size, clip.device)
    text = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt",
                     max_length=clip.config.text_config.max_position_embeddings).to(clip.device)
    logits = clip(pixel_values=pixels, **text).logits_per_image  # (B,B): each with each
    return logits.diagonal().tolist()


@in_batches
def pickscore(images, prompts):
    return clip_logits(images, prompts, PICKSCORE, "PICKSCORE")


@in_batches
def clip_score(images, prompts):
    return clip_logits(images, prompts, CLIP_SCORE, "CLIP_SCORE")


def jpeg_and_clip(images, prompts, per_kilobyte=0.5):
    """r = clip_score − per_kilobyte·kB: a weight says what a unit of one is worth in the other."""
    both = zip(clip_score(images, prompts), rewards.compressibility(images, prompts))
    return [score + per_kilobyte * minus_kB for score, minus_kB in both]


@cache
def load_llava(name):
    """A LLaVA, and the tokens with which an answer of yes, or of no, begins."""
    llava = nets.Llava(name, models.pick_device(), "VQA_SCORE")
    tokenizer, tokens = llava.processor.tokenizer, []
    for words in (["yes", "Yes"], ["no", "No"]):
        answers = tokenizer(words, add_special_tokens=False).input_ids
        first = {ids[0] for ids in answers} - {tokenizer.unk_token_id}
        if not first:
            raise ValueError(f"VQA_SCORE {name}: its tokenizer does not know {words[0]!r}")
        tokens.append(sorted(first))
    return llava, tokens


@in_batches
def vqa_score(images, prompts):
    """r = P("yes") / (P("yes") + P("no")) of the answer's first token."""
    llava, (yes, no) = load_llava(VQA_SCORE)
    chats = [llava.chat(QUESTION.format(prompt)) for prompt in prompts]
    inputs = llava.processor(images=images, text=chats, padding=True, return_tensors="pt")
    inputs = inputs.to(llava.model.device, llava.model.dtype)
    last = llava.model(**inputs).logits[:, -1].float()  # padding stands on the left
    log_odds = last[:, yes].logsumexp(-1) - last[:, no].logsumexp(-1)
    return log_odds.sigmoid().tolist()


@in_batches
def rating_from_http(images, prompts):
    """POST to REWARD_URL: {"images": [PNG in base64, ...], "prompts": [...]}, at most 32 of each.

    The answer is {"scores": [a number for each picture]}.
    """
    pngs = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        pngs.append(base64.b64encode(file.getvalue()).decode())
    body = json.dumps({"images": pngs, "prompts": list(prompts)}).encode()
    header = {"Content-Type": "application/json"}
    for left in reversed(range(TRIES)):
        try:
            request = urllib.request.Request(REWARD_URL, body, header)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                scores = json.load(answer)["scores"]
            scores = [float(score) for score in list.copy(scores)]  # a text is no list
            break
        except Exception as error:  # each way to fail has a type of its own
            if not left:
                raise ValueError(f"REWARD_URL {REWARD_URL}: no scores in {TRIES} tries "
                                 f"({type(error).__name__}: {error})") from error
            time.sleep(PAUSE)
    if len(scores) != len(images):
        raise ValueError(f"REWARD_URL {REWARD_URL}: {len(scores)} scores, {len(images)} pictures")
    return scores
