"""A Stable Diffusion pipeline from a name: loaded, frozen, adapted, kept as a reference, saved.

Nothing here asks whether the model is the tiny one or the full one.
"""
import copy
import functools
import json
import textwrap
import warnings
from contextlib import contextmanager
from pathlib import Path

import diffusers
import huggingface_hub
import torch
import transformers
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

from support import training

HERE = Path(__file__).resolve().parents[1]  # the folder of the scripts
ADAPTER = "pytorch_lora_weights.safetensors"  # diffusers' own name for it
LATENT_PIXELS = 1024  # H·W of all latents that the VAE decodes at once
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # where both papers' adapters are
EQUATIONS = {  # setting -> the values with which chapter 1's equations hold; the first if it lacks
    "addition_embed_type": (None,), "class_embed_type": (None,), "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,), "time_cond_proj_dim": (None,),  # conditions beside the prompt
    "in_channels": (4,), "out_channels": (4,),  # those of a latent
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing"),
    "thresholding": (False,), "clip_sample": (False,)}


# ---- loading --------------------------------------------------------------------------------


def pick_device(name=None, flag="--device"):
    """That device, or a GPU if there is one, else the CPU; ValueError if it cannot compute."""
    training.connect()
    for part in (torch.backends.cuda.matmul, torch.backends.cudnn):  # NVIDIA's fast float32
        part.fp32_precision = "tf32"
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).sum().item()
    except Exception as error:  # torch raises a type of its own for nearly each kind of device
        raise ValueError(f"{flag} {name}: {str(error).splitlines()[0]}") from error
    return name


def pick_dtype(name, device):
    """torch's dtype of that name; float16 where a GPU is too old for bfloat16."""
    if name == "bfloat16" and torch.device(device).type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return getattr(torch, name)


def find(name, file=""):
    """The file or folder of that name: here, or else beside the scripts; None: on the hub, perhaps.

    file: what a folder must have in it to be meant.
    """
    for place in (Path(name), HERE / name):
        if (place / file).exists():
            return place
    return None


@functools.cache
def hub_answers():
    """Whether the hub answers: asked once, before its own loaders try for a minute."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=3)
    except Exception:  # no network, no such host, a proxy that refuses: each library has its own
        return False
    return True


@contextmanager
def source_of(name, flag, wanted, file=""):
    """What a library's loader takes for a name, and options for it.  file: see `find`.

    Whatever fails inside becomes one line.  wanted: what the name should be.
    """
    path = find(name, file)
    offline = path is None and not hub_answers()  # then earlier downloads count alone
    for library in (diffusers, transformers):
        logging = library.utils.logging
        logging.set_verbosity_error()
        show_progress = logging.disable_progress_bar if path else logging.enable_progress_bar
        show_progress()  # a download of gigabytes should show that it moves
    try:
        yield path or name, {"local_files_only": True} if offline else {}
    except Exception as error:  # the loaders raise nearly every type there is
        reason = textwrap.shorten(str(error), 400)
        if offline:
            reason = f"it is not here, and the hub does not answer: {reason}"
        raise ValueError(f"{flag} {name}: cannot be loaded; it should be {wanted} ({reason})"
                         ) from error


def whole(loaded):
    """What a library loaded; ValueError where files lack what it then makes up or leaves out."""
    missing = []
    if isinstance(loaded, tuple):  # transformers draws weights that are missing, and tells of it
        loaded, info = loaded
        missing = [key for key in info["missing_keys"] if "pooler" not in key]  # which none reads
    elif isinstance(loaded, torch.nn.Module):  # diffusers leaves them on no device
        missing = [key for key, p in loaded.named_parameters() if p.is_meta]
    elif isinstance(loaded, transformers.PreTrainedTokenizerBase):
        words = set(loaded.get_vocab()) - set(loaded.all_special_tokens)
        missing = [] if words else ["its tokenizer's words"]
    if missing:
        raise ValueError(f"its files lack {min(missing)}")
    return loaded


def load_pipeline(model="tiny_sd", device=None, dtype="float32"):
    """Any Stable Diffusion 1.x/2.x, with a DDIM scheduler; VAE and text encoder frozen.

    model: a folder in diffusers format, the folder of a finished run, or a name on the hub.
    dtype: of all weights; those that are trained become float32 in `trainable`.
    """
    device = pick_device(device)
    run = find(model, "evaluation.json")
    if run:
        pipe, _ = load_run(run, device, dtype)
        if (run / ADAPTER).is_file():  # merged, so that further training starts from here
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        return pipe
    wanted = ("a folder of Stable Diffusion 1.x/2.x in diffusers' format, weights in safetensors; "
              "a single file: StableDiffusionPipeline.from_single_file(FILE)"
              ".save_pretrained(FOLDER)")
    with source_of(model, "--model", wanted, "model_index.json") as (source, options):
        pipe = read_pipeline(source, options)
        check_pipeline(pipe)
    pipe.unet.eval()
    for frozen in (pipe.vae, pipe.text_encoder):
        frozen.requires_grad_(False).eval()
    return pipe.to(device, pick_dtype(dtype, device))


def read_pipeline(source, options):
    """StableDiffusionPipeline.from_pretrained, with the DDIM scheduler of latent diffusion."""
    if isinstance(source, Path):
        weights = [path.name for path in source.glob("unet/*.safetensors")]
        if weights and all(".fp16." in name for name in weights):
            options["variant"] = "fp16"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A pickled checkpoint could run any code, so none is ever opened.
        options["use_safetensors"] = True
        text_encoder = whole(transformers.CLIPTextModel.from_pretrained(
            source, subfolder="text_encoder", output_loading_info=True, **options))
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            source, text_encoder=text_encoder, safety_checker=None, requires_safety_checker=False,
            feature_extractor=None, image_encoder=None, **options)
        for part in (pipe.unet, pipe.vae, pipe.tokenizer):
            whole(part)
        config = pipe.scheduler.config
        if "beta_start" not in config:
            raise ValueError(f"its scheduler {type(pipe.scheduler).__name__} is none of a DDPM: "
                             "flow matching and its kin are not supported")
        # DDIMScheduler's own defaults (clip to ±1, end on ᾱ = 1, no offset) are for pixels: a key
        # that the file of another scheduler (v1.5 has PNDM's) leaves out must not turn into them.
        latent = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
        for key in latent:
            latent[key] = config.get(key, latent[key])
        pipe.scheduler = diffusers.DDIMScheduler.from_config(config, **latent)
    limit = pipe.text_encoder.config.max_position_embeddings
    pipe.tokenizer.model_max_length = min(pipe.tokenizer.model_max_length, limit)
    return pipe


def check_pipeline(pipe):
    """ValueError for a model with which chapter 1's equations would not hold."""
    settings = dict(pipe.unet.config) | dict(pipe.scheduler.config)
    for name, allowed in EQUATIONS.items():
        value = settings.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"its {name} is {value}, with which a step would not be chapter 1's")
    if settings.get("rescale_betas_zero_snr") and settings["prediction_type"] == "epsilon":
        raise ValueError("its rescale_betas_zero_snr leaves no signal at the first step, where ε "
                         "says nothing of x_0")
    if not pipe.unet.config.sample_size:
        raise ValueError("its UNet's config has no sample_size, the size of a latent")


def set_timesteps(scheduler, num_steps):
    """scheduler.timesteps: T of them, falling.  ValueError where a step would have σ = 0.

    Stable Diffusion's last step goes from t ≥ 1 to ᾱ_0 < 1, so all of its steps have σ > 0.
    """
    scheduler.set_timesteps(num_steps)
    t = scheduler.timesteps
    if t.max() >= len(scheduler.alphas_cumprod):
        raise ValueError(f"--num-steps {num_steps} does not suit this model's scheduler: it would "
                         f"start at t = {t.max()} of {len(scheduler.alphas_cumprod)}")
    if t.min() < 1 or scheduler.config.set_alpha_to_one:
        raise ValueError(f"--num-steps {num_steps} with this model's scheduler ends on a step "
                         "without noise, which has no density: it needs steps_offset=1 or "
                         "timestep_spacing=trailing, and set_alpha_to_one=False")


def read_config(folder):
    """The settings of a run, from its config.json; ValueError that names the file."""
    file = Path(folder, "config.json")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: not the settings of a run: {error}") from error


def load_run(folder, device=None, dtype="float32"):
    """The tuned model of a run's folder, and its reference (see make_reference)."""
    folder = Path(folder)
    model = read_config(folder)["model"]
    if (folder / ADAPTER).is_file():
        pipe = load_pipeline(model, device, dtype)
        pipe.load_lora_weights(folder, weight_name=ADAPTER)
        adapters_in_float32(pipe.unet)
        return pipe, make_reference(pipe)
    pipe = load_pipeline(folder / "model", device, dtype)
    pretrained = load_pipeline(model, device, dtype)
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
    B, _, H, W = latents.shape
    at_once = max(1, LATENT_PIXELS // (H * W))
    images = []
    for first in range(0, B, at_once):
        x_0 = latents[first:first + at_once]
        z = (x_0 / pipe.vae.config.scaling_factor).to(pipe.device, pipe.vae.dtype)
        pixels = pipe.vae.decode(z).sample.float()
        if not pixels.isfinite().all():
            raise ValueError("a picture is not made of finite numbers; try a smaller "
                             "--learning-rate, or --dtype float32")
        images += pipe.image_processor.postprocess(pixels, output_type="pil")
    return images


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
                raise ValueError(f"--lora-targets: {' '.join(str(error).split())}") from error
        adapters_in_float32(pipe.unet)
    else:
        pipe.unet.float()  # a small step of the optimizer would be lost in fewer digits
    if config.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    return [p for p in pipe.unet.parameters() if p.requires_grad]


def adamw(params, config):
    """The optimizer of a training."""
    return torch.optim.AdamW(params, config.learning_rate, weight_decay=config.weight_decay)


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
