"""A Stable Diffusion pipeline from a name: loaded, frozen, adapted, kept as a reference, saved.

Nothing here asks whether the model is the tiny one or the full one.
"""
import copy
import json
import math
import warnings
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from support import hub, parallel, training

HERE = Path(__file__).resolve().parents[1]  # the folder of the scripts
ADAPTER = "pytorch_lora_weights.safetensors"  # diffusers' own name for it
LATENT_PIXELS = 1024  # H·W of all latents that the VAE decodes at once
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # where both papers' adapters are


# ---- loading --------------------------------------------------------------------------------


def pick_device(name=None, flag="--device"):
    """That device, or a GPU if there is one, else the CPU; ValueError if it cannot compute."""
    parallel.connect()
    for part in (torch.backends.cuda.matmul, torch.backends.cudnn):  # NVIDIA's fast float32
        part.fp32_precision = "tf32"
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).sum().item()
    except Exception as error:  # torch raises a type of its own for nearly each kind of device
        raise ValueError(f"{flag} {name}: {str(error).splitlines()[0][:200]}") from error
    return name


def pick_dtype(name, device):
    """torch's dtype of that name; float16 where a GPU is too old for bfloat16."""
    if name == "bfloat16" and torch.device(device).type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return getattr(torch, name)


def find_folder(name, file):
    """The folder of that name which holds the file: here, or else beside the scripts, or None."""
    for place in (Path(name), HERE / name):
        if (place / file).is_file():
            return place
    return None


def load_pipeline(model="tiny_sd", device=None, dtype="float32"):
    """Any Stable Diffusion 1.x/2.x, with a DDIM scheduler; VAE and text encoder frozen.

    model: a folder in diffusers format, the folder of a finished run, or a name on the hub.
    dtype: of all weights; those that are trained become float32 in `trainable`.
    """
    device = pick_device(device)
    run = find_folder(model, "evaluation.json")
    if run:
        try:
            pipe, _ = load_run(run, device, dtype)
        except RecursionError as error:
            raise ValueError(f"--model {model}: by its config.json, it goes on from itself"
                             ) from error
        if (run / ADAPTER).is_file():  # merged, so that further training starts from here
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        return pipe
    folder = find_folder(model, "model_index.json")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        if folder:  # but a download of gigabytes should show that it moves
            library.utils.logging.disable_progress_bar()
    try:
        pipe = read_pipeline(folder or model)
        check_scheduler(pipe.scheduler)
    except Exception as error:  # the loaders raise nearly every type there is
        where, reason = "cannot be used", str(error).strip().split("\n")[0][:200]
        if not folder:
            where = f"no Stable Diffusion folder here or in {HERE}, and the hub does not help"
            reason = hub.why(error)
        raise ValueError(f"--model {model}: {where}: {reason}") from error
    pipe.unet.eval()
    for frozen in (pipe.vae, pipe.text_encoder):
        frozen.requires_grad_(False).eval()
    return pipe.to(device, pick_dtype(dtype, device))


def read_pipeline(source):
    """StableDiffusionPipeline.from_pretrained, with the DDIM scheduler of latent diffusion.

    source: the Path of a folder, or else a name on the hub.
    """
    options = {} if isinstance(source, Path) else hub.only_here()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # use_safetensors: a pickled checkpoint could run any code, so none is ever opened.
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            source, use_safetensors=True, safety_checker=None, requires_safety_checker=False,
            **options)
        # DDIMScheduler's own defaults (clip to ±1, end on ᾱ = 1, no offset) are for pixels: a key
        # that the file of another scheduler (v1.5 has PNDM's) leaves out must not turn into them.
        latent = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
        for key in latent:
            latent[key] = pipe.scheduler.config.get(key, latent[key])
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **latent)
    return pipe


def check_scheduler(scheduler):
    """ValueError for settings with which chapter 1's equations would not hold."""
    config = scheduler.config
    if config.thresholding:
        raise ValueError("its scheduler has thresholding=True, which is not supported")
    if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"prediction_type={config.prediction_type!r} is not supported")
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise ValueError("after rescale_betas_zero_snr=True no signal is left at the first step, "
                         "and a model that predicts epsilon cannot start there")


def alphas_cumprod(scheduler, t):
    """ᾱ of all training timesteps in float64 on the CPU; ValueError unless t can be looked up."""
    if scheduler.num_inference_steps is None:
        raise ValueError("call scheduler.set_timesteps(num_steps) before taking a step")
    table = scheduler.alphas_cumprod.to("cpu", torch.float64)
    if t.min() < 0 or t.max() >= len(table):
        raise ValueError(f"--num-steps {scheduler.num_inference_steps} does not suit this model's "
                         f"scheduler: timesteps {t.min()}..{t.max()} leave the table "
                         f"0..{len(table) - 1}")
    return table


def read_config(folder):
    """The settings of a run, from its config.json; ValueError that names the file."""
    file = Path(folder, "config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), str):
        raise ValueError(f"{file}: not the settings of a run")
    return config


def load_run(folder, device=None, dtype="float32"):
    """The tuned model of a run's folder, and its reference (see make_reference)."""
    folder = Path(folder)
    config = read_config(folder)
    if (folder / ADAPTER).is_file():
        pipe = load_pipeline(config["model"], device, dtype)
        pipe.load_lora_weights(folder, weight_name=ADAPTER)
        adapters_in_float32(pipe.unet)
        return pipe, make_reference(pipe)
    pipe = load_pipeline(folder / "model", device, dtype)
    pretrained = load_pipeline(config["model"], device, dtype)
    return pipe, make_reference(pipe, pretrained.unet)


# ---- using ----------------------------------------------------------------------------------


def latent_shape(pipe):
    """(C, H, W) of a latent x_t."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipe.unet.config.in_channels, height, width


@torch.no_grad()
def encode_prompts(pipe, prompts):
    """c = text_encoder(prompt).  B strings -> (B, L, D).  Unknown words and long prompts raise."""
    tokenizer, limit = pipe.tokenizer, pipe.tokenizer.model_max_length
    # A token whose embedding is exactly zero was in no caption that the model learned from.
    known = (pipe.text_encoder.get_input_embeddings().weight != 0).any(1)
    for prompt in dict.fromkeys(prompts):
        for word in prompt.split():
            # Without special tokens, because CLIP's own unknown token *is* its end token.
            ids = tokenizer(word, add_special_tokens=False).input_ids
            if not ids or tokenizer.unk_token_id in ids or not known[ids].all():
                raise ValueError(f"--prompts: this model does not know {word!r:.200} in "
                                 f"{prompt!r:.200}")
        length = len(tokenizer(prompt).input_ids)
        if length > limit:
            raise ValueError(f"--prompts: {length} tokens, {limit} are allowed: "
                             f"{prompt!r:.200}")
    distinct = list(dict.fromkeys(prompts))
    embeds = pipe.encode_prompt(distinct, pipe.device, 1, False)[0]
    return embeds[[distinct.index(prompt) for prompt in prompts]]


@torch.no_grad()
def decode(pipe, latents):
    """picture = VAE(x_0 / scale).  (B,C,H,W) -> list of B PIL pictures

    Few at a time: 16 of the tiny model, one of the full, whose decoder needs 0.8 GB for each.
    """
    at_once = max(1, LATENT_PIXELS // latents[0, 0].numel())
    images, mine = [None] * len(latents), []
    for rows in parallel.share(len(latents), at_once):
        z = (latents[rows] / pipe.vae.config.scaling_factor).to(pipe.device, pipe.vae.dtype)
        pixels = pipe.vae.decode(z).sample.float()
        if not pixels.isfinite().all():
            raise ValueError("a picture is not made of finite numbers; try a smaller "
                             "--learning-rate, or --dtype float32")
        mine += rows.tolist()
        for i, image in zip(rows, pipe.image_processor.postprocess(pixels, output_type="pil")):
            images[i] = image
    return parallel.all_images(images, mine)


# ---- training, and what it is measured from -------------------------------------------------


def trainable(pipe, config):
    """The parameters to train: all of the UNet's, or LoRA's on the layers of --lora-targets."""
    rank = config.lora_rank
    pipe.unet.requires_grad_(rank == 0)
    if rank:
        # alpha = rank: the adapter's product is added as it is, and readers of the file know it.
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(config.lora_targets))
        with torch.random.fork_rng():  # peft draws its first weights from the global generator
            torch.manual_seed(training.torch_seed(config.seed, "adapters"))
            try:
                pipe.unet.add_adapter(lora)
            except ValueError as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(f"--lora-targets: {reason}") from error
        adapters_in_float32(pipe.unet)
    else:
        pipe.unet.float()  # a small step of the optimizer would be lost in fewer digits
    if config.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    return [p for p in pipe.unet.parameters() if p.requires_grad]


def adapters_in_float32(unet):
    """Whatever the UNet's own precision: adapters are trained, and kept, in float32."""
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def make_reference(pipe, frozen=None):
    """p_pre, the model before it was tuned: inside `with reference():` pipe.unet is that one.

    With adapters it is the same network with its adapters off; else a frozen copy beside it.
    """
    if frozen is None and not getattr(pipe.unet, "peft_config", None):
        frozen = copy.deepcopy(pipe.unet).requires_grad_(False)

    @contextmanager
    def reference():
        tuned = pipe.unet
        if frozen is None:
            tuned.disable_adapters()
        else:
            pipe.unet = frozen
        try:
            yield
        finally:
            pipe.unet = tuned
            if frozen is None:
                tuned.enable_adapters()

    return reference


def save_trained(pipe, folder):
    """The adapter alone, as pipe.load_lora_weights reads it, or else the pipeline, in model/."""
    if getattr(pipe.unet, "peft_config", None):
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
        pipe.save_lora_weights(folder, unet_lora_layers=layers, weight_name=ADAPTER)
    else:
        pipe.save_pretrained(Path(folder, "model"))


class ValueNet(nn.Module):
    """The network of chapter 4's V_φ(x_t, z, t): small convolutions, the prompt, the time.

    (N,C,H,W), (N,W), (N,) -> (N,), on the device of these, wherever the network itself is.
    """

    def __init__(self, channels, prompt_width, hidden=64):
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(channels, hidden, 3, 1, 1), nn.SiLU(),
                                  nn.Conv2d(hidden, hidden, 3, 2, 1), nn.SiLU(),
                                  nn.Conv2d(hidden, hidden, 3, 2, 1), nn.SiLU(),
                                  nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.judge = nn.Sequential(nn.Linear(4 * hidden + prompt_width + 8, 2 * hidden), nn.SiLU(),
                                   nn.Linear(2 * hidden, 1))

    def forward(self, x_t, c, t):
        device = x_t.device
        x_t, c, t = (values.to(self.judge[0].weight.device) for values in (x_t, c, t))
        turns = math.pi * (t[:, None] / 1000 - 0.5) * torch.tensor([1, 2, 4, 8]).to(x_t)
        features = torch.cat([self.look(x_t), c, turns.sin(), turns.cos()], 1)
        return self.judge(features).squeeze(-1).to(device)
