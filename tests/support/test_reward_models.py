"""How published weights get into the networks of the rewards, and what a wrong file is told."""
import json
import shutil
from importlib import import_module

import huggingface_hub
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from support import models
from support import reward_models as nets
from tiny_sd import judge, shapes

rewards = import_module("02_rewards")
SHIPPED = {"aesthetic": "tiny_sd/aesthetic.safetensors",
           "image_reward": "tiny_sd/image_reward/model.safetensors"}
SIZES = "tiny_sd/image_reward/blip_config.json"


def refusal_of(name, **weights):
    """What a reward's loading says, in one line."""
    with pytest.raises(ValueError) as error:
        rewards.get_reward(name, rewards.RewardFlags(**{"vlm": "judge"} | weights), "cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name, source", [("aesthetic", "sac+logos+ava1-l14-linearMSE.pth"),
                                          ("image_reward", "THUDM/ImageReward/ImageReward.pt")])
@pytest.mark.parametrize("wrong", ["lacks", "has more", "has another shape"])
def test_a_checkpoint_that_does_not_fit_is_one_clear_line(name, source, wrong, tmp_path):
    weights, file = load_file(models.find(SHIPPED[name])), tmp_path / "weights.pt"
    shutil.copy(models.find(SIZES), tmp_path)
    key = "momentum_encoder.weight" if wrong == "has more" else max(weights)
    weights[key] = torch.zeros(3, 5)
    if wrong == "lacks":
        del weights[key]
    torch.save(weights, file)
    message = refusal_of(name, **{f"{name}_weights": str(file)})
    assert message.startswith(f"--{name.replace('_', '-')}-weights {file}: ") and source in message
    told = {"lacks": "Missing key", "has more": "Unexpected key", "has another shape": "[3, 5]"}
    assert key in message and told[wrong] in message


def test_names_go_to_publisheds_and_back():
    weights = load_file(models.find(SHIPPED["image_reward"]))
    ours = nets.rename_blip(weights)
    assert all(key.startswith(("vision.", "text.", "mlp.")) for key in ours)
    assert nets.rename_blip(ours, back=True).keys() == weights.keys()


def test_without_sizes_beside_its_weights_it_is_the_published_model():
    with torch.device("meta"):
        model = nets.ImageRewardModel()
    weights = nets.rename_blip(model.state_dict(), back=True)
    assert sum(value.numel() for value in weights.values()) == 446_206_689
    for key, shape in {
            "visual_encoder.pos_embed": (1, 197, 1024),
            "visual_encoder.blocks.23.attn.qkv.weight": (3072, 1024),
            "text_encoder.embeddings.word_embeddings.weight": (30524, 768),
            "text_encoder.encoder.layer.11.crossattention.self.key.weight": (768, 1024)}.items():
        assert weights[f"blip.{key}"].shape == shape
    for part in (model.vision.config, model.text.config):
        assert part.hidden_size == 64 * part.num_attention_heads
    assert model.vision.config.layer_norm_eps == 1e-6  # timm's, where transformers has 1e-5


def test_a_name_on_the_hub_is_owner_repo_and_file(tmp_path, monkeypatch):
    torch.save({"w": torch.tensor([1.5]).half()}, tmp_path / "half.pth")
    hub = {("owner/repo", "folder/file.pth"): str(tmp_path / "half.pth")}
    monkeypatch.setattr(nets, "hf_hub_download", lambda *names, **_: hub[names])
    assert nets.read_weights("owner/repo/folder/file.pth", {})["w"].item() == 1.5


@pytest.mark.parametrize("field, name, file", [
    ("aesthetic_weights", "aesthetic", "evil.pth"), ("aesthetic_weights", "aesthetic", "none.pth"),
    ("image_reward_weights", "image_reward", SHIPPED["aesthetic"]),
    ("clip", "aesthetic", "no/such-clip"), ("vlm", "vlm_strict", "no/such-llava"),
    ("clip", "aesthetic", "tiny_sd/vlm"),  # which lacks CLIP's weights: none may be drawn for them
    ("bert", "vlm_alignment", "no/such-bert"), ("vlm_questions", "vlm_strict", "no_such.json")])
def test_what_is_not_there_is_named_with_its_flag(field, name, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    evil = type("Evil", (), {"__reduce__": lambda self: (exit, ())})
    torch.save(evil(), "evil.pth")  # a pickle, which must not be run
    assert refusal_of(name, **{field: file}).startswith(f"--{field.replace('_', '-')} {file}: ")


def save_bert(folder, layers=3):
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *shapes.WORDS]
    vocabulary = {word: i for i, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    bert = transformers.BertModel(transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=48))
    bert.half().save_pretrained(folder)
    ids = torch.tensor([[2, words.index("a"), words.index("red"), words.index("circle"), 3]])
    return bert.float().eval(), ids


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_token_embeddings_are_those_of_the_layer_and_know_special_tokens(layer, tmp_path):
    bert, ids = save_bert(tmp_path)
    encode = nets.TokenEncoder(tmp_path, layer, "cpu")
    bert.encoder.layer = bert.encoder.layer[:layer]  # bert-score cuts the layers above off
    with torch.no_grad():
        (short, counts), (long, _) = encode(["a red circle\n", "two blue squares and a red star"])
        want = bert(ids).last_hidden_state[0] if layer else bert.embeddings(ids)[0]
    assert counts.tolist() == [False, True, True, True, False] and len(long) == 9
    assert torch.allclose(short, want, atol=1e-5)


@pytest.mark.parametrize("name, layers, want", [
    ("roberta-large", 24, 17), ("tiny_sd/clip", 3, 3)])  # here, before what is beside the scripts
def test_default_layer_is_the_bert_score_packages_else_the_last(name, layers, want, tmp_path,
                                                                monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_bert(tmp_path / name, layers)
    encode = nets.TokenEncoder(name, None, "cpu")
    assert encode.reference == "The image contains {}"  # DDPO's; a pipeline's knows fewer words
    assert encode.layer == want and encode.model.dtype == torch.float32  # whatever the file has
    with pytest.raises(ValueError, match=f"--bert-layer {layers + 1}: {name} has layers 0 to"):
        nets.TokenEncoder(name, layers + 1, "cpu")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A random LLaVA in the layout of llava-hf/llava-1.5-7b-hf, with the words of the world.

    Narrow, but with CLIP's 24 × 24 patches, of which the last layer but one is read.
    """
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.find("tiny_sd/tokenizer"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="right")
    template = ("{% for m in messages %}{{ 'USER: ' }}{% for c in m['content'] %}"
                "{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}"
                "{% endfor %}{% endfor %}ASSISTANT:")
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336), tokenizer,
        patch_size=14, vision_feature_select_strategy="default", chat_template=template,
        image_token="<image>", num_additional_image_tokens=1).save_pretrained(folder)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=336, patch_size=14),
        text_config=transformers.LlamaConfig(**small, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=576,
        vision_feature_layer=-2, vision_feature_select_strategy="default")
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


IMAGES = [Image.effect_noise((side, side), 90).convert("RGB") for side in (32, 40)]


def test_llava_answers_the_same_alone_and_in_a_batch_with_only_the_new_words(llava):
    def generate(**inputs):
        calls.append(inputs)
        new = words.convert_tokens_to_ids(["two</w>", "stars</w>", "<|endoftext|>"])
        return torch.cat([inputs["input_ids"], torch.tensor([new, new])], 1)

    ask, calls = nets.load_vlm(str(llava), "cpu"), []
    questions = ["a red circle and two blue stars on the left", "one star"]
    together = ask(IMAGES, questions)
    assert together == [ask([image], [question])[0] for image, question in zip(IMAGES, questions)]

    ask.model.generate, words = generate, ask.processor.tokenizer
    assert ask(IMAGES, ["a blue star", "star"]) == ["two</w>stars</w>"] * 2
    (inputs,) = calls
    assert inputs["max_new_tokens"] == 64 and inputs["do_sample"] is False
    long, short = [words.convert_ids_to_tokens(row) for row in inputs["input_ids"]]
    assert long.count("<image>") == short.count("<image>") == 24 * 24
    assert short[:3] == ["<pad>", "<pad>", "<|startoftext|>"] and long[0] == "<|startoftext|>"


@pytest.mark.parametrize("gone", ["num_additional_image_tokens", "patch_size", "chat_template"])
def test_a_llava_of_2023_or_2024_answers_as_todays(llava, gone, tmp_path):
    """Its processor lacks what its own config.json has, or the words around a question."""
    old = tmp_path / "old"
    shutil.copytree(llava, old)
    file = old / "processor_config.json"
    settings = json.loads(file.read_text())
    for key in ("num_additional_image_tokens", "vision_feature_select_strategy", "patch_size"):
        settings.pop(key)
        if key == gone:
            break
    file.write_text(json.dumps(settings))
    if gone == "chat_template":
        (old / "chat_template.jinja").unlink()
    questions = ["a star", "two red circles"]
    today = nets.load_vlm(str(llava), "cpu")(IMAGES, questions)
    assert nets.load_vlm(str(old), "cpu")(IMAGES, questions) == today


@pytest.mark.parametrize("text", ["{", "{}", '{"x": []}', "[]", '{"x": [["How many?"]]}'])
def test_questions_come_from_a_file_and_those_that_cannot_be_asked_are_named(text, tmp_path):
    assert nets.load_questions(None) is judge.questions
    file = tmp_path / "questions.json"
    file.write_text(json.dumps({"x": [["What is it?", "a dog"], ["How many?", "two"]]}))
    questions = nets.load_questions(str(file))
    assert questions("x") == [["What is it?", "a dog"], ["How many?", "two"]]
    file.write_text(text)
    with pytest.raises(ValueError, match="--vlm-questions .*questions.json"):
        nets.load_questions(str(file))("x")
