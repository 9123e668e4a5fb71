"""The networks behind chapter 2's learned rewards, and how their published weights get into them.

Nothing here is a lesson. Each class takes the sizes of its layers from the weights, so that the
published model and its tiny twin are the same code. Whatever is missing, left over or misshapen in
a file becomes one ValueError: the flag, the file, the key, and where the right file comes from.
"""
import json
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn

from support import models
from tiny_sd import judge


# ---- from a name to weights -----------------------------------------------------------------


def find(name):
    """The file or folder of that name here or beside the scripts, else None (it is the hub's)."""
    for path in (Path(name), models.HERE / name):
        if path.exists():
            return path
    return None


def read_weights(name, flag, wanted):
    """State dict of a .pt, .pth or .safetensors file.  No pickle is ever run: weights_only=True."""
    path = find(name)
    try:
        if path is None:
            owner, repo, *file = str(name).split("/")
            file = "/".join(file)
            path = hf_hub_download(f"{owner}/{repo}", file, **models.hub_options())
        safe = Path(path).suffix == ".safetensors"
        weights = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
        return {str(key): v.float() if v.is_floating_point() else v for key, v in weights.items()}
    except Exception as error:  # a bad name, no network, no such format: one to the reader
        raise models.load_error(flag, name, path, wanted, error) from error


def load_exactly(model, weights, where):
    """model.load_state_dict, but one line names the first key missing, left over or misshapen."""
    have, want = shapes_of(weights), shapes_of(model.state_dict())
    wrong = sorted(key for key in have | want if have.get(key) != want.get(key))
    if wrong:
        key = wrong[0]
        raise ValueError(f"{where}: {key} is {have.get(key, 'missing')} and should be "
                         f"{want.get(key, 'missing')} ({len(wrong) - 1} more such)")
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def shapes_of(weights):
    return {key: tuple(value.shape) for key, value in weights.items()}


def from_hub(kind, name, flag, wanted, **options):
    """kind.from_pretrained(folder or hub name); ValueError that names the flag."""
    folder, logging = find(name), transformers.utils.logging
    logging.set_verbosity_error()  # but a download of gigabytes should show that it moves
    show_progress = logging.disable_progress_bar if folder else logging.enable_progress_bar
    show_progress()
    try:
        if folder is None:
            options |= models.hub_options()
        return kind.from_pretrained(folder or name, **options)
    except Exception as error:  # the loaders raise nearly every type there is
        raise models.load_error(flag, name, folder, wanted, error) from error


# ---- pictures in, one number out -------------------------------------------------------------


def clip_pixels(images, size, device):
    """(picture/255 − mean) / std, bicubic, center crop.  B PIL -> (B,3,size,size)

    On some odd sizes ImageReward's own code cuts one pixel elsewhere.
    """
    process = transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
    return process(images, return_tensors="pt").pixel_values.to(device)


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
    wanted = ("sac+logos+ava1-l14-linearMSE.pth from github.com/christophschuhmann/"
              "improved-aesthetic-predictor, made for --clip openai/clip-vit-large-patch14")
    weights = read_weights(file, "--aesthetic-weights", wanted)
    return load_exactly(LaionMLP(width), weights,
                        f"--aesthetic-weights {file}: it should be {wanted}")


# ---- ImageReward's BLIP ----------------------------------------------------------------------

BLIP_NAMES = (  # published, and in transformers' BLIP; one after the other
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("blip.visual_encoder.norm.", "vision.post_layernorm."),
    ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
    (".norm", ".layer_norm"), (".attn.proj.", ".self_attn.projection."),
    (".attn.qkv.", ".self_attn.qkv."), ("blip.text_encoder.", "text."))
UNUSED = ("blip.vision_proj.", "blip.text_proj.",  # of a loss that ImageReward never uses
          "text.embeddings.position_ids")  # 0, 1, 2, ...: not a weight


def rename_blip(weights, back=False):
    """State dict with ImageReward's published names -> with this file's, and back."""
    renamed = {}
    for key, value in weights.items():
        for published, ours in BLIP_NAMES:
            key = key.replace(ours, published) if back else key.replace(published, ours)
        if not key.startswith(UNUSED):
            renamed[key] = value
    return renamed


class ImageRewardModel(nn.Module):
    """MLP(h_[CLS]): ImageReward before its score is normalized (Xu et al., arXiv 2304.05977).

    `shape` says how large everything is: the name and shape of each weight. Only attention
    heads leave no trace there; they are 64 wide in the published model and so in the twin.
    """

    def __init__(self, shape):
        super().__init__()
        vision = {key.split(".")[3] for key in shape if key.startswith("vision.encoder.layers.")}
        text = {key.split(".")[3] for key in shape if key.startswith("text.encoder.layer.")}
        width, _, patch, _ = shape["vision.embeddings.patch_embedding.weight"]
        places = shape["vision.embeddings.position_embedding"][1]
        grid = round((places - 1) ** 0.5)  # patches a side; one place is no patch's
        self.vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(
            patch_size=patch, image_size=patch * grid,
            hidden_size=width, num_attention_heads=width // 64, num_hidden_layers=len(vision),
            intermediate_size=shape["vision.encoder.layers.0.mlp.fc1.weight"][0],
            layer_norm_eps=1e-6))  # timm's, where transformers has 1e-5
        words, text_width = shape["text.embeddings.word_embeddings.weight"]
        self.text = transformers.BlipTextModel(transformers.BlipTextConfig(
            vocab_size=words, bos_token_id=None, sep_token_id=None,
            max_position_embeddings=shape["text.embeddings.position_embeddings.weight"][0],
            hidden_size=text_width, encoder_hidden_size=width,
            num_attention_heads=text_width // 64, num_hidden_layers=len(text),
            intermediate_size=shape["text.encoder.layer.0.intermediate.dense.weight"][0],
            layer_norm_eps=1e-12), add_pooling_layer=False)
        self.mlp = LaionMLP(text_width)

    def forward(self, pixels, ids, mask):
        image_tokens = self.vision(pixels).last_hidden_state
        # BLIP's matching head starts with [ENC]; ImageReward keeps BERT's [CLS], and reads it out.
        h = self.text(ids, attention_mask=mask, encoder_hidden_states=image_tokens)
        return self.mlp(h.last_hidden_state[:, 0])


def load_image_reward(file):
    """ImageReward and its tokenizer: from the file's folder if it is there, else BERT's."""
    flag, wanted = "--image-reward-weights", "THUDM/ImageReward/ImageReward.pt"
    weights = rename_blip(read_weights(file, flag, wanted))
    where = f"{flag} {file}: it should be {wanted}; under transformers' names"
    try:
        model = ImageRewardModel(shapes_of(weights))
    except (KeyError, ValueError, IndexError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{where}: missing or misshapen is {error}") from error
    model = load_exactly(model, weights, where)
    # BLIP's tokenizer adds [DEC] and [ENC]; ImageReward never reads them, they only fill two rows.
    folder = "bert-base-uncased"
    if find(file) and (find(file).parent / "tokenizer_config.json").is_file():
        folder = find(file).parent
    tokenizer = from_hub(transformers.BertTokenizer, folder, flag,
                         "beside its tokenizer, or find bert-base-uncased's on the hub")
    return model, tokenizer


# ---- token embeddings, and a model that answers questions --------------------------------------

BERT_LAYERS = {  # bert-score's choice
    "bert-base-uncased": 9, "bert-large-uncased": 18, "roberta-large": 17,
    "distilbert-base-uncased": 5, "microsoft/deberta-xlarge-mnli": 40}


class TokenEncoder:
    """Sentences -> contextual token embeddings of a layer (T,D), and which are not special (T,)."""
    reference = "The image contains {}"  # DDPO's

    def __init__(self, name, layer, device):
        text_encoder, tokenizer = {}, {}
        if find(name) and (find(name) / "text_encoder").is_dir():  # a pipeline, as tiny_sd is
            text_encoder, tokenizer = {"subfolder": "text_encoder"}, {"subfolder": "tokenizer"}
            self.reference = "{}"  # its text encoder may know no other words than a prompt's
        wanted = "a BERT-family encoder such as microsoft/deberta-xlarge-mnli"
        self.tokenizer = from_hub(transformers.AutoTokenizer, name, "--bert", wanted, **tokenizer)
        self.model = from_hub(transformers.AutoModel, name, "--bert", wanted,
                              dtype=torch.float32, **text_encoder).to(device).eval()
        last = getattr(self.model.config, "num_hidden_layers", None)
        if last is None:
            raise ValueError(f"--bert {name}: it has no layers; it should be {wanted}")
        self.layer = BERT_LAYERS.get(str(name), last) if layer is None else layer
        if not 0 <= self.layer <= last:
            raise ValueError(f"--bert-layer {self.layer}: {name} has layers 0 to {last}")

    def __call__(self, sentences):
        # As the bert-score package does. That puts a blank before a sentence for RoBERTa's slow
        # tokenizer and none for its fast one; here it is always the fast one, and no blank.
        sentences = [sentence.strip() for sentence in sentences]
        text = self.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt",
                              return_special_tokens_mask=True).to(self.model.device)
        special = text.pop("special_tokens_mask")
        layer = self.model(**text, output_hidden_states=True).hidden_states[self.layer]
        tokens = []
        for h, mask, is_special in zip(layer, text.attention_mask == 1, special == 1):
            tokens.append((h[mask], ~is_special[mask]))
        return tokens


def ask_judge(images, questions):
    """Answers of the rule-based judge, for the shape world."""
    return [judge.answer(scene, question) for scene, question in zip(judge.see(images), questions)]


class Llava:
    """(pictures, questions) -> answers, greedily, from a LLaVA-1.5 in transformers' format."""

    def __init__(self, name, device, at_once):
        self.at_once = at_once  # pictures
        wanted = "a LLaVA such as llava-hf/llava-1.5-7b-hf, or judge"
        half = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        self.model = from_hub(transformers.LlavaForConditionalGeneration, name, "--vlm", wanted,
                              dtype=half).to(device).eval()
        self.processor = from_hub(transformers.AutoProcessor, name, "--vlm", wanted)
        self.processor.tokenizer.padding_side = "left"  # answers must start where questions end
        # How many tokens a picture has, the model knows; processors of 2023 and 2024 do not.
        config = self.model.config
        self.processor.patch_size = config.vision_config.patch_size
        self.processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        has_cls = config.vision_config.model_type == "clip_vision_model"
        self.processor.num_additional_image_tokens = int(has_cls)

    def __call__(self, images, questions):
        answers = []
        for first in range(0, len(images), self.at_once):
            batch = slice(first, first + self.at_once)
            answers += self.answer(images[batch], questions[batch])
        return answers

    def answer(self, images, questions):
        chats = [self.chat(question) for question in questions]
        inputs = self.processor(images=images, text=chats, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=64, do_sample=False)
        new_tokens = tokens[:, inputs.input_ids.shape[1]:]
        answers = self.processor.batch_decode(new_tokens, skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def chat(self, question):
        if not self.processor.chat_template:  # of 2023
            return f"USER: <image>\n{question} ASSISTANT:"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(chat, add_generation_prompt=True)


def load_vlm(name, device, at_once=32):
    return ask_judge if name == "judge" else Llava(name, device, at_once)


def load_questions(file):
    """prompt -> [[question, right answer], ...], from a JSON file, else the shape world's."""
    if file is None:
        return judge.questions
    flag = f"--vlm-questions {file}"
    try:
        known = json.loads((find(file) or Path(file)).read_text(encoding="utf-8"))
        for pairs in known.values():
            for pair in pairs:
                question, answer = map(str.strip, pair)  # TypeError of what is no text
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{flag}: it must read {{prompt: [[question, answer], ...]}}, but {error}"
                         ) from error

    def questions(prompt):
        if not known.get(prompt):
            raise ValueError(f"{flag}: nothing for the prompt {prompt!r}")
        return known[prompt]

    return questions
