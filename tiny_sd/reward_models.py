"""The networks behind chapter 2's learned rewards, and how their published weights get into them.

Nothing here is about reinforcement learning; skip it on a first reading. Each class takes the
sizes of its layers from the weights, so that published model and tiny twin are the same code.
Whatever is missing, left over or misshapen in a file becomes one ValueError that names the flag,
the file, the key, and where the right file comes from.
"""
import json
import re
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tiny_sd import judge

HERE = Path(__file__).resolve().parents[1]  # the scripts' folder
PIXEL_MEAN_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


# ---- from a name to weights -----------------------------------------------------------------


def find(name):
    """The file or folder of that name here or beside the scripts, else None (it is the hub's)."""
    return next((path for path in (Path(name), HERE / name) if path.exists()), None)


def read_weights(name, flag, source):
    """State dict of a .pt, .pth or .safetensors file.  No pickle is ever run: weights_only=True."""
    path = find(name)
    try:
        if path is None:
            owner, repo, *file = str(name).split("/")
            path = Path(hf_hub_download(f"{owner}/{repo}", "/".join(file)))
        read = load_file if path.suffix == ".safetensors" else torch.load
        weights = read(path) if read is load_file else read(path, "cpu", weights_only=True)
        return {key: v.float() if v.is_floating_point() else v for key, v in weights.items()}
    except Exception as error:  # a bad name, no network, no such format: one to the reader
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:160]
        problem = "cannot read it" if path else "no such file"
        raise ValueError(f"{flag} {name}: {problem}; it should be {source} ({reason})") from error


def load_exactly(model, weights, where):
    """model.load_state_dict, but one line names the first key missing, left over or misshapen."""
    have, want = ({key: tuple(value.shape) for key, value in named.items()}
                  for named in (weights, model.state_dict()))
    for what, keys in (("lacks the key", want.keys() - have.keys()),
                       ("has a key that does not belong:", have.keys() - want.keys()),
                       ("has the wrong shape at", {k for k in want if have.get(k) != want[k]})):
        if keys:
            key = min(keys)
            raise ValueError(f"{where} {what} {key} {have.get(key, '')} (want {want.get(key)}, "
                             f"{len(keys) - 1} more such)")
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def from_hub(kind, name, flag, source, **how):
    """kind.from_pretrained(folder or hub name); ValueError that names flag and source."""
    logging = transformers.utils.logging
    logging.set_verbosity_error()  # but a download of gigabytes should show that it moves
    (logging.disable_progress_bar if find(name) else logging.enable_progress_bar)()
    try:
        return kind.from_pretrained(find(name) or name, **how)
    except Exception as error:  # the loaders raise nearly every type there is
        reason = str(error).strip().split("\n")[0][:160]
        raise ValueError(f"{flag} {name}: no such folder, and the hub does not help; "
                         f"it should be {source} ({reason})") from error


# ---- pictures in, one number out -------------------------------------------------------------


def clip_pixels(images, size, device):
    """(picture/255 − mean) / std, bicubic, center crop.  B PIL -> (B,3,size,size)"""
    rows = []
    for image in images:
        scaled = [int(size * side / min(image.size)) for side in image.size]
        left, top = [(side - size) // 2 for side in scaled]
        image = image.convert("RGB").resize(scaled, Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        rows.append(pixels.view(size, size, 3))
    mean, std = torch.tensor(PIXEL_MEAN_STD)
    return ((torch.stack(rows) / 255 - mean) / std).permute(0, 3, 1, 2).to(device)


class LaionMLP(nn.Module):
    """width -> 1024 -> 128 -> 64 -> 16 -> 1.  No activations, as published: a linear map."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1))

    def forward(self, x):
        return self.layers(x).squeeze(-1)


def load_clip(name):
    return from_hub(transformers.CLIPModel, name, "--clip", "openai/clip-vit-large-patch14",
                    dtype=torch.float32, use_safetensors=True).eval()


def load_laion_mlp(file, width):
    source = ("sac+logos+ava1-l14-linearMSE.pth from github.com/christophschuhmann/"
              "improved-aesthetic-predictor, made for --clip openai/clip-vit-large-patch14")
    weights = read_weights(file, "--aesthetic-weights", source)
    where = f"--aesthetic-weights {file}: it should be {source}; it"
    return load_exactly(LaionMLP(width), weights, where)


# ---- ImageReward's BLIP ----------------------------------------------------------------------

BLIP_KEYS = [  # published name -> name in transformers' BLIP; the first pattern that fits decides
    (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.",
     r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.",
     r"vision.encoder.layers.\1.self_attn.projection."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"blip\.text_encoder\.embeddings\.position_ids", None),  # 0, 1, 2, ...: not a weight
    (r"blip\.text_encoder\.", "text."),
    (r"blip\.(vision|text)_proj\.", None),  # of a loss that ImageReward never uses
    (r"mlp\.layers\.", "mlp.layers."),
]


def from_blip_keys(weights):
    """State dict with ImageReward's published names -> with this file's; unknown ones stay."""
    renamed = {}
    for key, value in weights.items():
        pattern, new = next((rule for rule in BLIP_KEYS if re.match(rule[0], key)), ("", ""))
        if new is not None:
            renamed[re.sub("^" + pattern, new, key)] = value
    return renamed


class ImageRewardModel(nn.Module):
    """MLP(h_[CLS]): ImageReward before its score is normalized (Xu et al., arXiv 2304.05977).

    `shape` says how large everything is: the name and shape of each weight. Only attention
    heads leave no trace there; they are 64 wide in the published model and so in the twin.
    """

    def __init__(self, shape):
        super().__init__()
        vision_layers, text_layers = (
            len({key.split(".")[3] for key in shape if key.startswith(prefix)})
            for prefix in ("vision.encoder.layers.", "text.encoder.layer."))
        width, _, patch, _ = shape["vision.embeddings.patch_embedding.weight"]
        words, text_width = shape["text.embeddings.word_embeddings.weight"]
        grid = round((shape["vision.embeddings.position_embedding"][1] - 1) ** 0.5)
        self.vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(
            hidden_size=width, num_attention_heads=width // 64, num_hidden_layers=vision_layers,
            intermediate_size=shape["vision.encoder.layers.0.mlp.fc1.weight"][0], patch_size=patch,
            image_size=patch * grid, layer_norm_eps=1e-6))  # timm's, where transformers has 1e-5
        self.text = transformers.BlipTextModel(transformers.BlipTextConfig(
            vocab_size=words, bos_token_id=None, sep_token_id=None, hidden_size=text_width,
            num_attention_heads=text_width // 64, num_hidden_layers=text_layers,
            encoder_hidden_size=width,
            intermediate_size=shape["text.encoder.layer.0.intermediate.dense.weight"][0],
            max_position_embeddings=shape["text.embeddings.position_embeddings.weight"][0],
            layer_norm_eps=1e-12), add_pooling_layer=False)
        self.mlp = LaionMLP(text_width)

    def forward(self, pixels, ids, mask):
        seen = self.vision(pixels).last_hidden_state
        # BLIP's matching head starts with [ENC]; ImageReward keeps BERT's [CLS], and reads it out.
        h = self.text(ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return self.mlp(h[:, 0])


def load_image_reward(file):
    """ImageReward and its tokenizer: from the file's folder if it is there, else BERT's."""
    flag, source = "--image-reward-weights", "THUDM/ImageReward/ImageReward.pt"
    weights = from_blip_keys(read_weights(file, flag, source))
    where = f"{flag} {file}: it should be {source}; under transformers' names it"
    try:
        model = ImageRewardModel({key: tuple(value.shape) for key, value in weights.items()})
    except (KeyError, ValueError, IndexError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{where} lacks the key or has the wrong shape at {error}") from error
    model = load_exactly(model, weights, where)
    beside = find(file) and (find(file).parent / "tokenizer_config.json").is_file()
    # BLIP's tokenizer adds [DEC] and [ENC]; ImageReward never reads them, they only fill two rows.
    folder = find(file).parent if beside else "bert-base-uncased"
    tokenizer = from_hub(transformers.BertTokenizer, folder, flag,
                         "beside its tokenizer, or find bert-base-uncased's on the hub")
    return model, tokenizer


# ---- token embeddings, and a model that answers questions --------------------------------------

BERT_LAYERS = {"bert-base-uncased": 9, "bert-large-uncased": 18, "roberta-large": 17,
               "distilbert-base-uncased": 5,
               "microsoft/deberta-xlarge-mnli": 40}  # bert-score's choice


class TokenEncoder:
    """Sentences -> contextual token embeddings of a layer (T,D), and which are not special (T,)."""

    def __init__(self, name, layer, device):
        # In a pipeline's folder, as tiny_sd is, the text encoder and its tokenizer live apart.
        apart = find(name) and (find(name) / "text_encoder").is_dir()
        where = lambda part: {"subfolder": part} if apart else {}  # noqa: E731
        source = "a BERT-family encoder such as microsoft/deberta-xlarge-mnli"
        self.tokenizer = from_hub(transformers.AutoTokenizer, name, "--bert", source,
                                  **where("tokenizer"))
        self.model = from_hub(transformers.AutoModel, name, "--bert", source, dtype=torch.float32,
                              **where("text_encoder")).to(device).eval()
        last = self.model.config.num_hidden_layers
        self.layer = BERT_LAYERS.get(str(name), last) if layer is None else layer
        if not 0 <= self.layer <= last:
            raise ValueError(f"--bert-layer {self.layer}: {name} has layers 0 to {last}")

    def __call__(self, sentences):
        text = self.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt",
                              return_special_tokens_mask=True).to(self.model.device)
        special = text.pop("special_tokens_mask")
        layer = self.model(**text, output_hidden_states=True).hidden_states[self.layer]
        return [(h[mask == 1], s[mask == 1] == 0)
                for h, mask, s in zip(layer, text.attention_mask, special)]


class Judge:
    """(pictures, questions) -> answers of the rule-based judge, for the shape world."""
    reference = "{}"  # the tiny text encoder knows no other words than a prompt's

    def __call__(self, images, questions):
        return [judge.answer(seen, asked) for seen, asked in zip(judge.see(images), questions)]


class Llava:
    """(pictures, questions) -> answers, greedily, from a LLaVA-1.5 in transformers' format."""
    reference = "The image contains {}"  # DDPO's

    def __init__(self, name, device):
        source = "judge, or a LLaVA such as llava-hf/llava-1.5-7b-hf"
        half = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        kind = transformers.LlavaForConditionalGeneration
        self.model = from_hub(kind, name, "--vlm", source, dtype=half)
        self.model.to(device).eval()
        self.processor = from_hub(transformers.AutoProcessor, name, "--vlm", source)
        self.processor.tokenizer.padding_side = "left"  # answers must start where questions end

    def __call__(self, images, questions):
        chats = [self.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True) for question in questions]
        inputs = self.processor(images=images, text=chats, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=64, do_sample=False)
        answers = tokens[:, inputs.input_ids.shape[1]:]
        return [a.strip() for a in self.processor.batch_decode(answers, skip_special_tokens=True)]


def read_questions(file):
    """prompt -> [[question, right answer], ...], from a JSON file, else the shape world's."""
    if file is None:
        return judge.questions
    try:
        known = json.loads(Path(find(file) or file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--vlm-questions {file}: {error}") from error
    right = isinstance(known, dict) and all(
        isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 and
                                        all(isinstance(word, str) for word in pair)
                                        for pair in pairs) for pairs in known.values())
    if not right:
        raise ValueError(f"--vlm-questions {file}: it must read {{prompt: [[question, answer]]}}")

    def questions(prompt):
        if not known.get(prompt):
            raise ValueError(f"--vlm-questions {file}: nothing for the prompt {prompt!r}")
        return known[prompt]

    return questions
