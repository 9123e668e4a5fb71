"""The rewards ready to use, on small random models of the true classes, saved and loaded again."""
import base64
import io
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
import transformers
from PIL import Image

from support import models, scoring
from support import reward_models as nets
from tests.support.test_reward_models import IMAGES, llava  # noqa: F401

more = scoring.load_module("experiments/more_rewards.py")
PROMPTS = ["a red circle and two blue stars on the left", "one star"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):  # on a GPU a LLaVA has half precision
    monkeypatch.setattr(models, "pick_device", lambda *_: "cpu")


def reward_of(name):
    return scoring.get_reward({}, f"experiments/more_rewards.py:{name}")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP with its tokenizer, as on the hub."""
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("clip"))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(models.find("tiny_sd/tokenizer"))
    tokenizer.save_pretrained(folder)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    words = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                 eos_token_id=tokenizer.eos_token_id, max_position_embeddings=20)
    transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=dict(small, image_size=32, patch_size=16), text_config=dict(small, **words),
        projection_dim=24, logit_scale_init_value=1.5)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ("pickscore", "clip_score"))
@torch.no_grad()
def test_clip_scores_are_scaled_cosines_of_each_picture_and_its_own_prompt(name, clip, monkeypatch):
    monkeypatch.setattr(more, name.upper(), clip)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
    prompts = [PROMPTS[0], "one star " * 20]  # which is cut to 20 tokens
    found = reward_of(name)(IMAGES, prompts)
    for r, image, prompt in zip(found, IMAGES, prompts, strict=True):
        seen = model.vision_model(nets.clip_pixels([image], 32, "cpu")).pooler_output
        text = tokenizer(prompt, truncation=True, max_length=20, return_tensors="pt")
        read = model.text_model(text.input_ids).pooler_output
        f, g = model.visual_projection(seen)[0], model.text_projection(read)[0]
        cosine = (f @ g / f.norm() / g.norm()).item()
        assert r == pytest.approx(torch.tensor(1.5).exp().item() * cosine, abs=1e-4)
    monkeypatch.setattr(more, name.upper(), "no/such-clip")
    with pytest.raises(ValueError, match=f"{name.upper()} no/such-clip: cannot be loaded"):
        reward_of(name)(IMAGES, PROMPTS)


def test_the_shipped_clip_is_found_from_anywhere_and_a_mix_is_a_sum(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = [Image.new("RGB", (64, 64), "white"), *IMAGES[:1]]
    score, mix = (reward_of(name)(images, PROMPTS) for name in ("clip_score", "jpeg_and_clip"))
    sizes = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    assert mix == pytest.approx([r - 0.5 * kB for r, kB in zip(score, sizes)])


@torch.no_grad()
def test_vqa_score_is_the_share_of_yes(llava, monkeypatch):  # noqa: F811
    monkeypatch.setattr(more, "VQA_SCORE", str(llava))
    found = reward_of("vqa_score")(IMAGES, PROMPTS)
    own = nets.Llava(str(llava), "cpu")
    tokenizer = own.processor.tokenizer
    yes, no = ({tokenizer(word, add_special_tokens=False).input_ids[0] for word in words}
               for words in (("yes", "Yes"), ("no", "No")))
    assert not yes & no
    for r, image, prompt in zip(found, IMAGES, PROMPTS, strict=True):
        text = own.chat(f'Does this figure show "{prompt}"? Please answer yes or no.')
        inputs = own.processor(images=[image], text=[text], return_tensors="pt")
        p = own.model(**inputs).logits[0, -1].softmax(-1)
        p_yes, p_no = (sum(p[i].item() for i in tokens) for tokens in (yes, no))
        assert r == pytest.approx(p_yes / (p_yes + p_no), abs=1e-4) and 0 < r < 1
    monkeypatch.setattr(more, "VQA_SCORE", "tiny_sd/vlm")
    with pytest.raises(ValueError, match="does not know 'yes'"):  # it only counts and names
        reward_of("vqa_score")(IMAGES, PROMPTS)


@pytest.fixture
def server(monkeypatch):
    """A server on loopback that answers with the next of `answers`, and keeps what was posted."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, text = answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    answers, posted = [], []
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever).start()
        monkeypatch.setattr(more, "REWARD_URL", f"http://127.0.0.1:{http.server_port}/rate")
        monkeypatch.setattr(more, "PAUSE", 0)
        yield answers, posted
        http.shutdown()


def test_a_server_gets_pictures_and_prompts_and_is_asked_again(server):
    answers, posted = server
    answers += [(500, "busy"), (200, '{"scores": [1, 2.5]}')]
    assert reward_of("rating_from_http")(IMAGES, PROMPTS) == [1.0, 2.5]
    assert posted[0] == posted[1] and posted[0]["prompts"] == PROMPTS
    for image, text in zip(IMAGES, posted[0]["images"], strict=True):
        assert Image.open(io.BytesIO(base64.b64decode(text))).tobytes() == image.tobytes()


@pytest.mark.parametrize("texts, told", (
    (['{"scores": [1]}'], "1 scores, 2 pictures"), (['{"scores": [1, 2, 3]}'], "3 scores"),
    (["no JSON"] * 3, "no scores in 3 tries"), (['{"scores": "12"}'] * 3, "no scores in 3 tries"),
    (['{"marks": [1, 2]}'] * 3, "no scores in 3 tries"), (["[1, 2]"] * 3, "no scores in 3 tries")))
def test_a_server_that_gives_no_scores_is_named(texts, told, server):
    answers, posted = server
    answers += [(200, text) for text in texts]
    with pytest.raises(ValueError, match=f"REWARD_URL {more.REWARD_URL}: {told}"):
        reward_of("rating_from_http")(IMAGES, PROMPTS)
    assert len(posted) == len(texts)


def test_a_server_that_is_silent_or_not_there_is_named(monkeypatch):
    monkeypatch.setattr(more, "TIMEOUT", 0.1)
    monkeypatch.setattr(more, "PAUSE", 0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        for listening in (False, True):
            if listening:
                silent.listen()
            url = "http://127.0.0.1:{}/".format(silent.getsockname()[1])
            monkeypatch.setattr(more, "REWARD_URL", url)
            with pytest.raises(ValueError, match=f"REWARD_URL {url}: no scores in 3 tries"):
                reward_of("rating_from_http")(IMAGES, PROMPTS)
