"""How much memory does a training take? Counted from the shapes of its networks alone.

RUN `python experiments/memory.py 03_ddpo.py --sd`, or 04_dpok.py or experiments/sft.py, with any
flags of that script. The networks stand on torch's device "meta", where tensors have shapes but no
numbers, so no weight is loaded. Batches of drawing, decoding and training run there as on a GPU.
Whenever an operation makes a tensor its bytes are added, until nothing holds the tensor any more;
what is reported is the largest sum.

Learned rewards count as large as their files. NOT COUNTED: what CUDA, its libraries and gaps
between tensors take; encoding prompts, and learned rewards at work, while no activation of the UNet
is there; the pictures that sft.py gathers.
"""
import math
import sys
import weakref
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import flags, models  # noqa: E402

ddpo = import_module("03_ddpo")  # Config
dpok = import_module("04_dpok")  # Config, Value
sft = import_module("experiments.sft")  # Config

PARTS = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
SCRIPTS = {"03_ddpo": ddpo, "04_dpok": dpok, "sft": sft}
CARDS = (24, 40, 80)  # a card "of 24 GB" has 24·2³⁰ bytes: CUDA and gaps may take the 7 % more
LEARNED = {  # reward -> the flags that name its weights
    "aesthetic": ("clip", "aesthetic_weights"), "image_reward": ("image_reward_weights",),
    "vlm_alignment": ("vlm", "bert"), "vlm_strict": ("vlm",)}


class Peak(TorchDispatchMode):
    """peak.most: the most bytes of tensors that were alive at once, without the network's own."""

    def __init__(self, network):
        super().__init__()
        self.alive = self.most = 0
        self.known = weakref.WeakSet()  # storages: views of one tensor share theirs
        for tensor in (*network.parameters(), *network.buffers()):
            self.known.add(tensor.untyped_storage())
            if tensor.requires_grad:
                tensor.grad = torch.zeros_like(tensor)
                self.known.add(tensor.grad.untyped_storage())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage() not in self.known:
                storage = leaf.untyped_storage()
                self.known.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.most = max(self.most, self.alive)
        return result

    def free(self, size):
        self.alive -= size


def attention(q, k, v, **options):
    """Attention without an N×N matrix, as CPUs and GPUs have it; "meta" has only the plain one."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def most_bytes(network, call, learns=False):
    """The most bytes that a call has at once, beside the network's weights and their gradients."""
    fused = patch.object(F, "scaled_dot_product_attention", attention)
    with torch.device("meta"), torch.set_grad_enabled(learns), fused, Peak(network) as peak:
        result = call()
        if learns:
            result.square().sum().backward()
    return peak.most


def bytes_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def trajectory_bytes(pictures, steps, latent_shape, reference=False):
    """bytes = 4·B·D·(2T + 1): T + 1 latents and T means; a reference adds its T means: 3T + 1."""
    rows = (3 if reference else 2) * steps + 1
    return 4 * pictures * math.prod(latent_shape) * rows


def read_networks(model, dtype):
    """UNet, VAE and text encoder in the place of a pipeline's, from their configs alone."""
    run = models.find(model, "evaluation.json")
    if run:  # a run has the shapes of the model that it was trained from
        return read_networks(models.read_config(run)["model"], dtype)
    wanted = "Stable Diffusion 1.x/2.x in diffusers' format"
    pipe = SimpleNamespace(scheduler=diffusers.DDIMScheduler(clip_sample=False), device="meta")
    with models.source_of(model, "--model", wanted, "model_index.json") as (source, options):
        with torch.device("meta"):
            for part, kind in PARTS.items():
                config = kind.load_config(source, subfolder=part, **options)
                setattr(pipe, part, kind.from_config(config))
            config = transformers.CLIPTextConfig.from_pretrained(
                source, subfolder="text_encoder", **options)
            pipe.text_encoder = transformers.CLIPTextModel(config)
        models.check_pipeline(pipe)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        network.requires_grad_(False).to(getattr(torch, dtype)).eval()
    return pipe


def reward_bytes(config):
    """Part -> bytes of the files of reward's and gold's weights; None for those not here."""
    spec = f"{config.reward},{getattr(config, 'gold', '')}"
    sizes = {}
    for reward in [part.partition("=")[0] for part in spec.split(",")]:
        for field in LEARNED.get(reward, ()):
            name = getattr(config, field)
            path = models.find(name)
            if path and (path / "text_encoder").is_dir():  # a pipeline: BERTScore takes this part
                path = path / "text_encoder"
            if name != "judge":  # who has no weights
                sizes[f"{reward}: {name}"] = path and file_bytes(path)
    return sizes


def file_bytes(path):
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def count(script, config):
    """Title -> part -> bytes of a training.  None: weights that are not here, and not counted."""
    pipe = read_networks(config.model, config.dtype)
    unet, latent = pipe.unet, models.latent_shape(pipe)
    params = models.trainable(pipe, config)
    L, D = pipe.text_encoder.config.max_position_embeddings, unet.config.cross_attention_dim
    B, T = config.prompts_per_round * config.samples_per_prompt, config.num_steps
    next_B = max(B, config.eval_samples)  # while these are drawn, the last ones are still there
    guidance = 1 if config.guidance_scale == 1 else 2  # it needs a row without the prompt, too

    def predict(rows):
        x_t = torch.empty(rows, *latent, dtype=unet.dtype)
        c = torch.empty(rows, L, D, dtype=unet.dtype)
        t = torch.empty(rows, dtype=torch.long)
        return unet(x_t, t, encoder_hidden_states=c).sample.float()

    def decode():
        rows = max(1, models.LATENT_PIXELS // math.prod(latent[1:]))
        return pipe.vae.decode(torch.empty(rows, *latent, dtype=pipe.vae.dtype)).sample.float()

    trained, weights = bytes_of(params), bytes_of(unet.parameters())
    adapters = trained if config.lora_rank else 0
    prompt = L * D * pipe.text_encoder.dtype.itemsize
    reference = script != "03_ddpo"  # the pretrained model and its means, beside the tuned ones
    trajectories = trajectory_bytes(B, T, latent, reference) + B * prompt
    next_ones = trajectory_bytes(next_B, T, latent, reference) + next_B * prompt
    if getattr(config, "data", "") == "fixed":  # sft's, a second one of each picture
        trajectories += trajectory_bytes(B, T, latent) + B * prompt
    stays = {"UNet": weights - adapters, "VAE": bytes_of(pipe.vae.parameters()),
             "text encoder": bytes_of(pipe.text_encoder.parameters()), "adapters": adapters,
             "frozen copy of the UNet": weights if reference and not adapters else 0,
             "AdamW's two moments": 2 * trained, "a round's trajectories": trajectories}
    rows = guidance * min(config.batch_size, next_B)
    drawn = next_ones + most_bytes(unet, lambda: predict(rows))
    drawing = {"their trajectories, and the UNet on a batch": drawn,
               "their trajectories, and the decoder": next_ones + most_bytes(pipe.vae, decode)}
    learned = min(config.train_batch_size, B * T) * (1 if script == "sft" else guidance)
    activations = most_bytes(unet, lambda: predict(learned), learns=True)
    learning = {"gradients, and activations of a batch": trained + activations,
                "gradients, and a step of AdamW": 2 * trained}
    if getattr(config, "value", False):  # rounds that it keeps, of x_t, prompts; weights; moments
        states = B * (4 * (T + 1) * math.prod(latent) + prompt)
        weights_of_V = bytes_of(dpok.Value(pipe, config).parameters())
        stays["value function, moments, latest rounds"] = (
            3 * weights_of_V + (config.value_rounds - 1) * states)
        learning["a fit of the value function"] = config.value_rounds * states + weights_of_V
    return {"Always on the device": stays | reward_bytes(config),
            "On top while pictures are drawn, one of these": drawing,
            "On top while the model learns, one of these": learning}


def total(counted):
    """The most bytes that are on the device at once: drawing and learning take turns."""
    stays, drawing, learning = (parts.values() for parts in counted.values())
    return sum(size or 0 for size in stays) + max(*drawing, *learning)


def main(argv=None):
    """Prints what `count` gives, and returns it."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words in ([], ["--help"]):
        return print(__doc__)
    script = Path(words[0]).stem
    if script not in SCRIPTS:
        raise ValueError(f"{words[0]} is none of 03_ddpo.py, 04_dpok.py, experiments/sft.py")
    module = SCRIPTS[script]
    config = flags.parse(module.Config, module.__doc__, words[1:], module.SD)
    counted = count(script, config)
    print(f"{config.model} with --dtype {config.dtype}, in GB of 10⁹ bytes")
    for title, parts in counted.items():
        print(f"\n{title}")
        for name, size in parts.items():
            if size is None:
                print(f"{'?':>9}  not counted, because it is not here: {name}")
            elif size:
                print(f"{size / 1e9:9.3f}  {name}")
    print(f"\nAt most\n{total(counted) / 1e9:9.3f}  on the device; a card of")
    for GB in CARDS:
        print(f"{GB:6} GB is {'enough' if total(counted) <= GB * 1e9 else 'too small'}")
    return counted


if __name__ == "__main__":
    flags.run(main)
