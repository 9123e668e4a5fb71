"""--plan: how much memory a training takes, counted from the shapes of its networks alone.

The networks stand on torch's device "meta", where tensors have shapes but no numbers, so no weight
is loaded. A training batch, a batch of drawing, a decoded picture and a step of AdamW run there as
they run on a GPU. Whenever an operation makes a tensor its bytes are added, until nothing holds the
tensor any more; what is reported is the largest sum.

NOT COUNTED: what CUDA, its libraries and unused gaps between tensors take; encoding prompts, and
the activations of learned rewards, which run while no gradient and no activation of the UNet is
there; the pictures that experiments/sft.py gathers over its rounds, in main memory.
"""
import json
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import hub, models
from support.reward_models import find

GB = 1e9
CARDS = (24, 40, 80)  # a card "of 24 GB" has 24·2³⁰ bytes: CUDA and gaps may take the 7 % more
STATES_AT_ONCE = 256  # in each batch of chapter 4's value function
LEARNED = {  # reward -> the flags that name its weights
    "aesthetic": ("clip", "aesthetic_weights"), "image_reward": ("image_reward_weights",),
    "vlm_alignment": ("vlm", "bert"), "vlm_strict": ("vlm",)}


@dataclass(frozen=True)
class Plan:
    """Bytes by part. Drawing and learning take turns, and in a turn one thing after the other."""
    stays: dict  # part -> bytes that are on the device all the time
    drawing: dict  # what is done without gradients -> bytes that it needs at most
    gradients: int  # bytes that are there while anything of `learning` is
    learning: dict  # what is done with them -> bytes that it needs at most
    trajectories: int  # bytes of a round's trajectories, in main memory
    missing: tuple  # names of reward weights that are not here, and so are not counted

    def total(self):
        """The most bytes that are ever on the device at once."""
        most = max(*self.drawing.values(), self.gradients + max(self.learning.values()))
        return sum(self.stays.values()) + most


# ---- counting -------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Inside `with Peak(module) as peak:` peak.alive counts the bytes of all tensors that are made
    and not yet freed, peak.most the largest such number.  The module's own tensors are not counted.
    """

    def __init__(self, module):
        super().__init__()
        self.alive = self.most = 0
        self.known = weakref.WeakSet()  # storages: views of one tensor share theirs
        for tensor in (*module.parameters(), *module.buffers()):
            self.known.add(tensor.untyped_storage())
            if tensor.grad is not None:
                self.known.add(tensor.grad.untyped_storage())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                self.add(leaf.untyped_storage())
        return result

    def add(self, storage):
        if storage not in self.known:
            self.known.add(storage)
            weakref.finalize(storage, self.free, storage.nbytes())
            self.alive += storage.nbytes()
            self.most = max(self.most, self.alive)

    def free(self, size):
        self.alive -= size


@contextmanager
def fused_attention():
    """Attention that keeps no N×N matrix, as GPUs and CPUs have it; "meta" has only the plain one.

    The CPU's operation also says what is kept for its gradient: q, k, v, the output, a row of sums.
    """
    def attention(q, k, v, **options):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    plain, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- networks without numbers ---------------------------------------------------------------


def find_source(model):
    """Where the configs of --model are: a folder, or a name on the hub."""
    run = models.find_folder(model, "evaluation.json")
    if run is None:
        return models.find_folder(model, "model_index.json") or model
    if (run / models.ADAPTER).is_file():  # to be merged into the model that it was trained on
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
        return find_source(settings["model"])
    return run / "model"


def read_networks(model, dtype):
    """UNet, VAE and text encoder in the place of a pipeline's, from their configs alone."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    source, parts = find_source(model), {}
    options = {} if isinstance(source, Path) else hub.only_here()
    try:
        with torch.device("meta"):
            for part, kind in (("unet", diffusers.UNet2DConditionModel),
                               ("vae", diffusers.AutoencoderKL)):
                parts[part] = kind.from_config(kind.load_config(
                    source, subfolder=part, **options))
            settings = transformers.CLIPTextConfig.from_pretrained(
                source, subfolder="text_encoder", **options)
            parts["text_encoder"] = transformers.CLIPTextModel(settings)
    except Exception as error:  # the loaders raise nearly every type there is
        reason = hub.why(error) if options else str(error).strip().split("\n")[0][:200]
        raise ValueError(f"--model {model}: cannot read its configs: {reason}") from error
    for network in parts.values():
        network.requires_grad_(False).to(getattr(torch, dtype)).eval()
    return SimpleNamespace(**parts)


def prompt_shape(pipe):
    """(L, D) of an encoded prompt c."""
    return pipe.text_encoder.config.max_position_embeddings, pipe.unet.config.cross_attention_dim


def predict(pipe, rows):
    """ε_θ of so many latents, in float32, as chapter 1 calls the UNet."""
    unet = pipe.unet
    with torch.device("meta"):
        x_t = torch.empty(rows, *models.latent_shape(pipe), dtype=unet.dtype)
        c = torch.empty(rows, *prompt_shape(pipe), dtype=unet.dtype)
        t = torch.empty(rows, dtype=torch.long)
    return unet(x_t, t, encoder_hidden_states=c).sample.float()


# ---- what each thing needs on top of what stays ---------------------------------------------


def drawing_peak(pipe, rows):
    """Most bytes of one call without gradients."""
    with torch.no_grad(), fused_attention(), Peak(pipe.unet) as peak:
        predict(pipe, rows)
    return peak.most


def training_peak(pipe, rows):
    """Most bytes of one call and its way back, beside the gradients of the parameters."""
    for p in pipe.unet.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with fused_attention(), Peak(pipe.unet) as peak:
        predict(pipe, rows).square().sum().backward()
    return peak.most


def decoding_peak(pipe):
    """Most bytes of the VAE's decoder, for as many pictures as models.decode takes at once."""
    C, H, W = models.latent_shape(pipe)
    at_once = max(1, models.LATENT_PIXELS // (H * W))
    with torch.no_grad(), fused_attention(), Peak(pipe.vae) as peak:
        x_0 = torch.empty(at_once, C, H, W, device="meta", dtype=pipe.vae.dtype)
        pipe.vae.decode(x_0).sample.float()
    return peak.most


def adamw_bytes(network):
    """AdamW's two moments, and the most bytes of a step beside them.  Needs gradients."""
    params = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, foreach=True)  # all at once, as by itself on a GPU
    with Peak(network) as peak:
        optimizer.step()
    return peak.alive, peak.most - peak.alive


def value_bytes(pipe):
    """Chapter 4's value function: its weights and moments, and the most bytes of a fit."""
    (C, H, W), (_, D), N = models.latent_shape(pipe), prompt_shape(pipe), STATES_AT_ONCE
    with torch.device("meta"):
        net = models.ValueNet(C, D)
    with Peak(net) as peak, torch.device("meta"):
        net(torch.empty(N, C, H, W), torch.empty(N, D), torch.empty(N)).sum().backward()
    return bytes_of(net.parameters()) + adamw_bytes(net)[0], peak.most


def trajectory_bytes(pictures, steps, latent_shape, chains=1, reference=False):
    """bytes = 4·B·D·(n·(2T + 1) + T): T + 1 latents and T means of n chains, T reference means.

    The last term only with a reference.  B pictures, T steps, latents of D numbers.
    """
    C, H, W = latent_shape
    latents = chains * (2 * steps + 1) + (steps if reference else 0)
    return 4 * pictures * C * H * W * latents


# ---- learned rewards ------------------------------------------------------------------------


def reward_names(spec):
    """"alignment=1,aesthetic=0.2" -> ["alignment", "aesthetic"]"""
    return [part.partition("=")[0] for part in spec.split(",")]


def weight_files(name):
    """Files with the weights of that name, which may be a folder; none if it is not here."""
    path = find(name)
    if path is None or path.is_file():
        return [path] if path else []
    if (path / "text_encoder").is_dir():  # a pipeline, of which BERTScore takes this part
        path = path / "text_encoder"
    whole = path / "model.safetensors"
    return [whole] if whole.is_file() else sorted(path.glob("model-*.safetensors"))


def count_numbers(file):
    """How many numbers a weight file holds, from its header."""
    if file.suffix != ".safetensors":
        return file.stat().st_size // 4  # the published ones are float32
    with safe_open(file, "pt") as weights:
        return sum(torch.Size(weights.get_slice(key).get_shape()).numel() for key in weights.keys())


def reward_bytes(config):
    """Reward or gold -> bytes of its networks, and the names of those that are not here."""
    sizes, missing = {}, []
    try:
        on_gpu = torch.device(config.device or models.pick_device()).type == "cuda"
    except RuntimeError as error:  # it need not be here, but it must be a device
        raise ValueError(f"--device {config.device}: {str(error)[:200]}") from error
    for spec in (config.reward, getattr(config, "gold", "")):
        for reward in reward_names(spec):
            for field in LEARNED.get(reward, ()):
                name = getattr(config, field)
                files = weight_files(name)
                if not files and name != "judge":  # the judge has no weights
                    missing.append(name)
                size = 2 if field == "vlm" and on_gpu else 4
                part = f"reward {reward}: {name}"
                sizes[part] = sizes.get(part, 0) + size * sum(map(count_numbers, files))
    return {part: size for part, size in sizes.items() if size}, tuple(dict.fromkeys(missing))


# ---- all of it ------------------------------------------------------------------------------


def count(config, reference=False, value=False, guided=True, chains=1):
    """The Plan of a training with these settings.

    reference: the script keeps the pretrained model and its means beside the tuned ones. value: it
    fits chapter 4's value function. guided: it trains with guidance, if it draws with it. chains:
    trajectories that it keeps of each picture.
    """
    pipe = read_networks(config.model, config.dtype)
    params = models.trainable(pipe, config)
    guidance = 1 if config.guidance_scale == 1 else 2  # it needs a row without the prompt, too
    pictures = config.prompts_per_round * config.samples_per_prompt
    next_pictures = max(pictures, config.eval_samples)  # while they are drawn, the last ones stay
    rows = min(config.train_batch_size, pictures * config.num_steps) * (guidance if guided else 1)
    learning = {"activations of a batch": training_peak(pipe, rows)}
    moments, learning["a step of AdamW"] = adamw_bytes(pipe.unet)
    drawing = {"the UNet on a batch": drawing_peak(
        pipe, guidance * min(config.batch_size, next_pictures)),
               "the VAE's decoder": decoding_peak(pipe)}

    weights = bytes_of(pipe.unet.parameters())
    adapters = bytes_of(params) if config.lora_rank else 0
    copied = reference and not config.lora_rank
    L, D = prompt_shape(pipe)
    of_prompt = L * D * pipe.text_encoder.dtype.itemsize
    stays = {"UNet": weights - adapters, "VAE": bytes_of(pipe.vae.parameters()),
             "text encoder": bytes_of(pipe.text_encoder.parameters()), "adapters": adapters,
             "frozen copy of the UNet": weights if copied else 0, "AdamW's two moments": moments,
             "encoded prompts": (pictures + next_pictures) * of_prompt}
    if value:
        kept, fitting = value_bytes(pipe)
        stays["value function, with moments"] = kept
        drawing["fitting the value function"] = fitting
    sizes, missing = reward_bytes(config)
    trajectories = trajectory_bytes(pictures, config.num_steps, models.latent_shape(pipe), chains,
                                    reference)
    return Plan(stays | sizes, drawing, bytes_of(params), learning, trajectories, missing)


def fits(total):
    """Size of card -> whether so many bytes fit."""
    return {card: total <= card * GB for card in CARDS}


def report(config, **script):
    """Prints the Plan, of a script as `count` has it, and returns it."""
    plan = count(config, **script)
    print(f"{config.model} with --dtype {config.dtype}, --guidance-scale {config.guidance_scale:g}"
          f"{', --checkpointing' if config.checkpointing else ''}, in GB of 10⁹ bytes")
    print_parts("Always on the device", plan.stays)
    for name in plan.missing:
        print(f"{'?':>9}  not counted, because it is not here: {name}")
    print_parts(f"On top while {config.batch_size} pictures at a time are drawn, one of these",
                plan.drawing)
    print_parts(f"On top while the model learns from {config.train_batch_size} at a time",
                {"gradients": plan.gradients})
    print_parts("  and one of these", plan.learning)
    print_parts("At most", {
        "on the device" + (", without what is not counted" if plan.missing else ""): plan.total(),
        "of main memory for a round's trajectories, and again while the next are drawn":
        plan.trajectories})
    cards = [f"{card} GB: {'enough' if enough else 'too small'}"
             for card, enough in fits(plan.total()).items()]
    print("\nA card of " + ", ".join(cards))
    return plan


def print_parts(title, parts):
    print(f"\n{title}")
    for name, size in parts.items():
        if size:
            print(f"{size / GB:9.3f}  {name}")
