"""The networks behind chapter 2's learned rewards, and how their published weights get into them.

Nothing here is a lesson. The published models and their tiny twins are the same classes, and their
files have the same keys. Whatever does not fit becomes one ValueError: the flag, the file, what is
wrong, and where the right file comes from.
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


def read_weights(source, options):
    """State dict of a .pt, .pth or .safetensors file, or of the hub's OWNER/REPO/FILE.

    No pickle is ever run: weights_only=True.
    """
    if not isinstance(source, Path):
        owner, repo, file = source.split("/", 2)
        source = hf_hub_download(f"{owner}/{repo}", file, **options)
    if str(source).endswith(".safetensors"):
        return load_file(source)
    return torch.load(source, "cpu", weights_only=True)


def from_hub(kind, name, flag, wanted, **settings):
    """kind.from_pretrained(folder or hub name); ValueError that names the flag."""
    with models.source_of(name, flag, wanted) as (source, options):
        return models.whole(kind.from_pretrained(source, **settings, **options))


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
                    dtype=torch.float32, use_safetensors=True, output_loading_info=True).eval()


def load_laion_mlp(file, width):
    wanted = ("sac+logos+ava1-l14-linearMSE.pth from github.com/christophschuhmann/"
              "improved-aesthetic-predictor, made for --clip openai/clip-vit-large-patch14")
    mlp = LaionMLP(width).eval()
    with models.source_of(file, "--aesthetic-weights", wanted) as (source, options):
        mlp.load_state_dict(read_weights(source, options))
    return mlp


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


PUBLISHED = transformers.BlipConfig(  # ImageReward-v1.0's; its file holds the weights alone
    vision_config=dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                       intermediate_size=4096, image_size=224, layer_norm_eps=1e-6),
    text_config=dict(num_attention_heads=12))


class ImageRewardModel(nn.Module):
    """MLP(h_[CLS]): ImageReward before its score is normalized (Xu et al., arXiv 2304.05977)."""

    def __init__(self, config=PUBLISHED):
        super().__init__()
        self.config = config
        self.vision = transformers.BlipVisionModel(config.vision_config)
        self.text = transformers.BlipTextModel(config.text_config, add_pooling_layer=False)
        self.mlp = LaionMLP(config.text_config.hidden_size)

    def forward(self, pixels, ids, mask):
        image_tokens = self.vision(pixels).last_hidden_state
        # BLIP's matching head starts with [ENC]; ImageReward keeps BERT's [CLS], and reads it out.
        h = self.text(ids, attention_mask=mask, encoder_hidden_states=image_tokens)
        return self.mlp(h.last_hidden_state[:, 0])


def load_image_reward(file):
    """ImageReward and its tokenizer: what is beside the file, or else the published sizes, BERT."""
    flag, wanted = "--image-reward-weights", "THUDM/ImageReward/ImageReward.pt"
    folder, config = Path(file).parent, PUBLISHED
    sizes = models.find(folder / "blip_config.json")
    if sizes:
        config = transformers.BlipConfig.from_json_file(sizes)
    model = ImageRewardModel(config).eval()
    with models.source_of(file, flag, wanted) as (source, options):
        model.load_state_dict(rename_blip(read_weights(source, options)))
    # BLIP's tokenizer adds [DEC] and [ENC]; ImageReward never reads them, they only fill two rows.
    tokenizer = models.find(folder, "tokenizer_config.json") or "bert-base-uncased"
    wanted = "beside its tokenizer, or find bert-base-uncased's on the hub"
    return model, from_hub(transformers.BertTokenizer, tokenizer, flag, wanted)


# ---- token embeddings, and a model that answers questions --------------------------------------

BERT_LAYERS = {  # bert-score's choice
    "bert-base-uncased": 9, "bert-large-uncased": 18, "roberta-large": 17,
    "distilbert-base-uncased": 5, "microsoft/deberta-xlarge-mnli": 40}


class TokenEncoder:
    """Sentences -> contextual token embeddings of a layer (T,D), and which are not special (T,)."""
    reference = "The image contains {}"  # DDPO's

    def __init__(self, name, layer, device):
        text_encoder, tokenizer = {}, {}
        if models.find(name, "text_encoder"):  # a pipeline, as tiny_sd is
            text_encoder, tokenizer = {"subfolder": "text_encoder"}, {"subfolder": "tokenizer"}
            self.reference = "{}"  # its text encoder may know no other words than a prompt's
        wanted = "a BERT-family encoder such as microsoft/deberta-xlarge-mnli"
        with models.source_of(name, "--bert", wanted) as (source, options):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                source, **tokenizer, **options)
            model = models.whole(transformers.AutoModel.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, **text_encoder, **options))
            self.model = model.to(device).eval()
            last = self.model.config.num_hidden_layers
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

    def __init__(self, name, device, flag="--vlm"):
        wanted = "a LLaVA such as llava-hf/llava-1.5-7b-hf"
        half = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        self.model = from_hub(transformers.LlavaForConditionalGeneration, name, flag, wanted,
                              dtype=half, output_loading_info=True).to(device).eval()
        self.processor = from_hub(transformers.AutoProcessor, name, flag, wanted)
        self.processor.tokenizer.padding_side = "left"  # answers must start where questions end
        # How many tokens a picture has, the model knows; processors of 2023 and 2024 do not.
        config = self.model.config
        self.processor.patch_size = config.vision_config.patch_size
        self.processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        has_cls = config.vision_config.model_type == "clip_vision_model"
        self.processor.num_additional_image_tokens = int(has_cls)

    def __call__(self, images, questions):
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


def load_vlm(name, device):
    return ask_judge if name == "judge" else Llava(name, device)


def load_questions(file):
    """prompt -> [[question, right answer], ...], from a JSON file, else the shape world's."""
    if file is None:
        return judge.questions
    flag, known = f"--vlm-questions {file}", {}
    try:
        text = Path(models.find(file) or file).read_text(encoding="utf-8")
        for prompt, pairs in json.loads(text).items():
            known[prompt] = [[str(question), str(answer)] for question, answer in pairs]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{flag}: it must read {{prompt: [[question, answer], ...]}}, but {error}"
                         ) from error

    def questions(prompt):
        if not known.get(prompt):
            raise ValueError(f"{flag}: nothing for the prompt {prompt!r}")
        return known[prompt]

    return questions
