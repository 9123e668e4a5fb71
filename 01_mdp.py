"""01 · Denoising is a Markov decision process.

WHAT YOU LEARN. A diffusion model turns noise x_T into a picture x_0 in T small random steps. Each
step draws from a Gaussian whose density we can write down, so the sampler is a stochastic policy,
and whatever improves policies by reward can improve pictures. The MDP of DDPO:

    state   s_t = (c, t, x_t)        c is the prompt, x_t the noisy latent
    action  a_t = x_{t−1}            the next, slightly cleaner latent
    policy  π(a_t | s_t) = p_θ(x_{t−1} | x_t, c) = N(μ_θ(x_t, c, t), σ_t² I)
    start   p(c) × N(0, I);  reward r(x_0, c) at the last step, 0 at every other

THE EQUATIONS. ᾱ_t is the share of signal variance left at time t (the DDIM paper writes α_t), t−1
stands for the next entry of a shortened schedule, ε for the predicted noise, D for C·H·W.

    x̂_0   = (x_t − √(1−ᾱ_t)·ε) / √ᾱ_t                        what the model believes x_0 to be
    μ_θ   = √ᾱ_{t−1}·x̂_0 + √(1−ᾱ_{t−1}−σ_t²)·ε                                   (DDIM eq. 12)
    σ_t   = η·√((1−ᾱ_{t−1})/(1−ᾱ_t))·√(1−ᾱ_t/ᾱ_{t−1})                            (DDIM eq. 16)
    log p = −½‖(x_{t−1}−μ_θ)/σ_t‖² − D·log σ_t − (D/2)·log 2π

HOW TO RUN. `python 01_mdp.py` prints one trajectory as a table and saves runs/01_mdp/beliefs.png,
x̂_0 as t falls, in about ten seconds on a CPU. Expect a ratio of 1.0 on replay, and a weight c/σ of
about 1 at every step but the second-to-last, where it is 8.3 (chapter 3 will stumble over it).

DEPARTURES. Where σ_t = 0 there is no density. η = 0 makes every step so and is refused. A last step
that lands exactly on x_0 (set_alpha_to_one=True, or a schedule that ends at t = 0) counts as part
of the decoder, not as an action: log-prob 0, KL 0, no gradient. Latents and Gaussians stay float32
whatever the UNet's precision, so that the action that is stored is the action that was scored.

EXERCISES. (1) Run with --eta 0.3: what happens to c/σ, and why? (2) Print ‖μ_θ − x_t‖/(σ_t·√D):
how much of a step is the model's doing? (3) Find from ᾱ alone why c/σ peaks where it does.
"""
import argparse
import inspect
import math
import re
import sys
import typing
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import diffusers
import torch
import transformers
from tqdm import tqdm

from tiny_sd import figures

HERE = Path(__file__).resolve().parent
FRESH = 2**31  # + seed: an evaluation's noise. torch reads 32 bits of a seed: 2**40 would add 0


@dataclass(frozen=True)
class Config:
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, or a name on the Hugging Face hub
    prompts: tuple[str, ...] = ("a red circle", "two blue squares", "a blue star on the left",
                                "a green star and a yellow circle")  # one trajectory for each
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step: 1 is DDPM's, 0 (no randomness, so no policy) is refused
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none, at half the cost
    seed: int = 0  # seed of all noise
    out: str = "runs/01_mdp/beliefs.png"  # where the picture goes


def load_pipeline(model="tiny_sd", device=None, dtype=torch.float32):
    """Any Stable Diffusion 1.x/2.x, with a DDIM scheduler; VAE and text encoder frozen.

    A relative folder is looked for here, then beside this script; any other name on the hub.
    """
    places = Path(model), HERE / model
    folder = next((p for p in places if (p / "model_index.json").is_file()), None)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        if folder:  # but a download of gigabytes should show that it moves
            library.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # use_safetensors: a pickled checkpoint could run any code, so none is ever opened.
            pipe = diffusers.StableDiffusionPipeline.from_pretrained(
                folder or model, use_safetensors=True, safety_checker=None,
                requires_safety_checker=False)
            # DDIMScheduler's own defaults (clip to ±1, end on ᾱ = 1, no offset) are for pixels: a
            # key that the model's file leaves out must not turn into them.
            old = pipe.scheduler.config
            latent = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
            latent = {key: old.get(key, value) for key, value in latent.items()}
            pipe.scheduler = diffusers.DDIMScheduler.from_config(old, **latent)
    except Exception as error:  # the loaders raise nearly every type there is
        reason = str(error).strip().split("\n")[0][:200]
        raise FileNotFoundError(f"--model {model}: no Stable Diffusion folder here or in {HERE}, "
                                f"and the hub does not help: {reason}") from error
    pipe.unet.eval()
    for frozen in (pipe.vae, pipe.text_encoder):
        frozen.requires_grad_(False).eval()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return pipe.to(device, dtype)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0][:200]}") from error


@torch.no_grad()
def encode_prompts(pipe, prompts):
    """c = text_encoder(prompt).  B strings -> (B, L, D).  Unknown words and long prompts raise."""
    tokenizer, limit = pipe.tokenizer, pipe.tokenizer.model_max_length
    # A token whose embedding is exactly zero was in no caption that the model learned from.
    known = (pipe.text_encoder.get_input_embeddings().weight != 0).any(1)
    for prompt in prompts:
        for word in prompt.split():
            # Without special tokens, because CLIP's own unknown token *is* its end token.
            ids = tokenizer(word, add_special_tokens=False).input_ids
            if not ids or tokenizer.unk_token_id in ids or not known[ids].all():
                raise ValueError(f"--prompts: this model does not know {word!r} in {prompt!r}")
        length = len(tokenizer(prompt).input_ids)
        if length > limit:
            raise ValueError(f"--prompts: {length} tokens, {limit} are allowed: {prompt!r}")
    return pipe.encode_prompt(list(prompts), pipe.device, 1, False)[0]


@torch.no_grad()
def decode(pipe, latents, batch_size=16):
    """picture = VAE(x_0 / scale).  (B,C,H,W) -> list of B PIL pictures"""
    latents = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
    pixels = [pipe.vae.decode(rows).sample.float() for rows in latents.split(batch_size)]
    return pipe.image_processor.postprocess(torch.cat(pixels), output_type="pil")


def predict_noise(unet, x_t, t, prompt_embeds, negative_embeds=None, guidance_scale=1.0):
    """ε = ε_θ(x_t, t, ∅) + s·(ε_θ(x_t, t, c) − ε_θ(x_t, t, ∅)): classifier-free guidance.

    (B,C,H,W), int or (B,), (B,L,D), (B or 1,L,D) -> (B,C,H,W) in float32 or better; it is v or x_0
    where the model predicts those. Both halves share one call; s = 1 needs only one half.
    """
    B = len(x_t)
    t = torch.as_tensor(t, device=x_t.device).expand(B)
    if guidance_scale != 1:
        x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
        prompt_embeds = torch.cat([negative_embeds.expand_as(prompt_embeds), prompt_embeds])
    eps = unet(x_t.to(unet.dtype), t, encoder_hidden_states=prompt_embeds.to(unet.dtype)).sample
    eps = eps.to(torch.promote_types(eps.dtype, torch.float32))
    if guidance_scale != 1:
        eps_empty, eps_prompt = eps.chunk(2)
        eps = eps_empty + guidance_scale * (eps_prompt - eps_empty)
    return eps


def ddim_coefficients(scheduler, t, eta=1.0):
    """σ_t = η·√((1−ᾱ_{t−1})/(1−ᾱ_t))·√(1−ᾱ_t/ᾱ_{t−1})  (DDIM eq. 16).  t: int or (N,)

    -> ᾱ_t, ᾱ_{t−1}, σ_t, each (N,) in float64 on the CPU: float32 would cost σ_t two digits.
    """
    train_steps, num_steps = scheduler.config.num_train_timesteps, scheduler.num_inference_steps
    if num_steps is None:
        raise ValueError("call scheduler.set_timesteps(num_steps) before taking a step")
    if not 0 <= eta <= 1:
        raise ValueError(f"--eta must lie between 0 and 1, not {eta}")
    t = torch.as_tensor(t).cpu().reshape(-1)
    if t.min() < 0 or t.max() >= train_steps:
        raise ValueError(f"--num-steps {num_steps} does not suit this model's scheduler: timesteps "
                         f"{t.min()}..{t.max()} leave the table 0..{train_steps - 1}")
    prev = t - train_steps // num_steps  # diffusers' rule, whatever the timestep spacing
    table = scheduler.alphas_cumprod.to("cpu", torch.float64)
    final = scheduler.final_alpha_cumprod.to("cpu", torch.float64)
    alpha_t = table[t]
    # Ask "past the end?" before clamping the index: afterwards the answer is always no.
    alpha_prev = torch.where(prev >= 0, table[prev.clamp(min=0)], final)
    sigma_t = eta * ((1 - alpha_prev) / (1 - alpha_t)).sqrt() * (1 - alpha_t / alpha_prev).sqrt()
    return alpha_t, alpha_prev, sigma_t


def x0_and_noise(scheduler, noise_pred, alpha_t, x_t):
    """x_t = √ᾱ_t·x̂_0 + √(1−ᾱ_t)·ε, solved for what the model does not predict.  -> x̂_0, ε

    noise_pred, x_t (B,C,H,W), alpha_t (B,1,1,1); prediction types epsilon, v_prediction and sample.
    """
    config, signal, noise = scheduler.config, alpha_t.sqrt(), (1 - alpha_t).sqrt()
    if config.thresholding:
        raise ValueError("--model: a scheduler with thresholding=True is not supported")
    if config.prediction_type == "epsilon":
        if (alpha_t == 0).any():
            raise ValueError("--model: after rescale_betas_zero_snr=True no signal is left at the "
                             "first step, and a model that predicts epsilon cannot start there")
        x_0, eps = (x_t - noise * noise_pred) / signal, noise_pred
    elif config.prediction_type == "v_prediction":
        x_0, eps = signal * x_t - noise * noise_pred, signal * noise_pred + noise * x_t
    elif config.prediction_type == "sample":
        x_0, eps = noise_pred, (x_t - signal * noise_pred) / noise
    else:
        raise ValueError(f"--model: prediction_type={config.prediction_type!r} is not supported")
    if config.clip_sample:  # as in diffusers, eps is not worked out anew from the clipped x_0
        x_0 = x_0.clamp(-config.clip_sample_range, config.clip_sample_range)
    return x_0, eps


def step_mean_std(scheduler, noise_pred, t, x_t, eta=1.0):
    """μ_θ = √ᾱ_{t−1}·x̂_0 + √(1−ᾱ_{t−1}−σ_t²)·ε  (DDIM eq. 12).  -> mean (B,C,H,W), std (B,1,1,1)

    t: int or (B,), all different if you like. Worked in float64 and rounded once, to x_t's dtype.
    """
    B, C, H, W = x_t.shape
    work = torch.float32 if x_t.device.type == "mps" else torch.float64  # Apple GPUs lack float64
    alpha_t, alpha_prev, sigma_t = (value.to(x_t.device, work).view(-1, 1, 1, 1).expand(B, 1, 1, 1)
                                    for value in ddim_coefficients(scheduler, t, eta))
    x_0, eps = x0_and_noise(scheduler, noise_pred.to(work), alpha_t, x_t.to(work))
    # The root's argument can be exactly 0 at eta = 1, and rounding can push it below.
    mean = alpha_prev.sqrt() * x_0 + (1 - alpha_prev - sigma_t**2).clamp(min=0).sqrt() * eps
    return mean.to(x_t.dtype), sigma_t.to(x_t.dtype)


def standardize(x, mean, std):
    """z = (x − μ)/σ in float32 or better, and 0 where σ = 0.  (B,C,H,W), same, (B,1,1,1)"""
    assert x.shape == mean.shape and x.ndim == 4, (x.shape, mean.shape)
    x, mean, std = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (x, mean, std))
    # Never divide by 0, not even in a branch thrown away: its gradient would be 0·∞ = NaN.
    return torch.where(std > 0, x - mean, 0) / torch.where(std > 0, std, 1)


def log_prob(x_prev, mean, std):
    """log N(x_{t−1}; μ, σ²I) = −½‖(x_{t−1}−μ)/σ‖² − D·log σ − (D/2)·log 2π  -> (B,), in nats

    A sum over D = C·H·W and not a mean: only so is exp(log p − log p_old) a ratio of probabilities.
    A row with σ = 0 gives 0 and no gradient.
    """
    z = standardize(x_prev, mean, std)
    B, D = len(z), z[0].numel()
    std = std.to(z.dtype).expand(B, 1, 1, 1).reshape(B)
    log_sigma = torch.where(std > 0, std, 1).log()
    density = -0.5 * z.square().sum((1, 2, 3)) - D * log_sigma - 0.5 * D * math.log(2 * math.pi)
    return torch.where(std > 0, density, 0)


def kl_divergence(mean_p, mean_q, std):
    """KL(N(μ_p, σ²I) ‖ N(μ_q, σ²I)) = ‖μ_p − μ_q‖²/(2σ²)  -> (B,), in nats; 0 where σ = 0"""
    return 0.5 * standardize(mean_p, mean_q, std).square().sum((1, 2, 3))


def noise_weight(scheduler, t, eta=1.0):
    """c_t/σ_t = |∂μ_θ/∂ε|/σ_t: predictions δ apart are KL = ½(c_t/σ_t)²‖δ‖² apart.  t: int or (N,)

    -> (N,) in float64, ∞ where σ_t = 0. For models that predict v or x_0, read ∂v or ∂x_0.
    """
    if scheduler.config.clip_sample:
        raise ValueError("--model: clip_sample=True makes the mean nonlinear, so no weight exists")
    t = torch.as_tensor(t).cpu().reshape(-1)
    one = torch.ones(len(t), 1, 1, 1, dtype=torch.float64)
    c, sigma = step_mean_std(scheduler, one, t, 0 * one, eta)  # linear: the value at ε = 1, x_t = 0
    return torch.where(sigma > 0, c.abs() / sigma, torch.inf).flatten()


def policy(pipe, x_t, t, prompt_embeds, negative_embeds, guidance_scale, eta):
    """π_θ(·|s_t) = N(μ_θ(x_t, c, t), σ_t² I)  -> mean (B,C,H,W), std (B,1,1,1).  t: int or (B,)"""
    if eta == 0:
        raise ValueError("--eta 0 makes every step deterministic: with σ = 0 there is no density, "
                         "so no log-prob and no policy; use 0 < eta ≤ 1")
    noise_pred = predict_noise(pipe.unet, x_t, t, prompt_embeds, negative_embeds, guidance_scale)
    return step_mean_std(pipe.scheduler, noise_pred, t, x_t, eta)


def step_log_prob(pipe, x_t, x_prev, t, prompt_embeds, negative_embeds, guidance_scale, eta):
    """log p_θ(x_{t−1} | x_t, c)  -> (B,).  The schedule is the one last set in pipe.scheduler."""
    mean, std = policy(pipe, x_t, t, prompt_embeds, negative_embeds, guidance_scale, eta)
    return log_prob(x_prev, mean, std)


@dataclass
class Trajectory:
    """B chains: s_k = (c, timesteps[k], latents[:, k]),  a_k = latents[:, k + 1]."""
    latents: torch.Tensor  # (B,T+1,C,H,W) float32; [:, 0] is x_T and [:, -1] is x_0
    means: torch.Tensor  # (B,T,C,H,W), μ_θ at s_k; chapter 4 compares them with another model's
    log_probs: torch.Tensor  # (B,T), of a_k given s_k
    timesteps: torch.Tensor  # (T,), falling, on the CPU
    prompt_embeds: torch.Tensor  # (B,L,D)
    negative_embeds: torch.Tensor | None  # (1,L,D) of the empty prompt; None without guidance
    prompts: list
    images: list  # B PIL pictures of x_0


def latent_shape(pipe):
    """(C, H, W) of a latent x_t."""
    size = pipe.unet.config.sample_size
    return pipe.unet.config.in_channels, *((size, size) if isinstance(size, int) else size)


@torch.no_grad()
def rollout(pipe, prompts, num_steps=10, eta=1.0, guidance_scale=1.0, seed=None, generator=None,
            batch_size=None, progress=True):
    """x_T ~ N(0, I);  x_{t−1} = μ_θ(x_t, c, t) + σ_t·z,  z ~ N(0, I).  One chain a prompt.

    Needs a seed or a torch.Generator. The noise of sample i depends on neither weights nor batches.
    """
    prompts, B = list(prompts), len(prompts)
    batch_size = B if batch_size is None else batch_size
    for flag, n in (("--prompts", B), ("--num-steps", num_steps), ("--batch-size", batch_size)):
        if n < 1:
            raise ValueError(f"{flag}: at least one is needed, not {n}")
    train_steps = pipe.scheduler.config.num_train_timesteps
    if num_steps > train_steps:
        raise ValueError(f"--num-steps: at most {train_steps} for this model, not {num_steps}")
    if not 0 <= guidance_scale < math.inf:
        raise ValueError(f"--guidance-scale must be a number ≥ 0, not {guidance_scale}")
    if (seed is None) == (generator is None):  # and not "if seed": 0 is a seed too
        raise ValueError("rollout needs a seed or a generator (and not both)")
    if generator is None:
        if not 0 <= seed < 2**32:
            raise ValueError(f"--seed must lie in [0, 2³²), all that torch reads of it, not {seed}")
        generator = torch.Generator().manual_seed(seed)
    pipe.scheduler.set_timesteps(num_steps)
    timesteps = pipe.scheduler.timesteps
    shape = len(timesteps) + 1, *latent_shape(pipe)
    prompt_embeds = encode_prompts(pipe, prompts)
    negative_embeds = encode_prompts(pipe, [""]) if guidance_scale != 1 else None
    latents = torch.empty(B, *shape, device=pipe.device)
    means = torch.empty_like(latents[:, 1:])
    log_probs = torch.empty(B, len(timesteps), device=pipe.device)
    batches = [slice(i, min(i + batch_size, B)) for i in range(0, B, batch_size)]
    steps = [(rows, k) for rows in batches for k in range(len(timesteps))]
    for rows, k in tqdm(steps, "rollout", leave=False, delay=2, disable=None if progress else True):
        if k == 0:  # all noise of one sample, then of the next: the order no batch size can change
            noise = torch.stack([torch.randn(shape, generator=generator, device=generator.device)
                                 for _ in prompts[rows]]).to(pipe.device)
            latents[rows, 0] = noise[:, 0]
        mean, std = policy(pipe, latents[rows, k], timesteps[k], prompt_embeds[rows],
                           negative_embeds, guidance_scale, eta)
        means[rows, k] = mean
        latents[rows, k + 1] = mean + std * noise[:, k + 1]
        log_probs[rows, k] = log_prob(latents[rows, k + 1], mean, std)
    return Trajectory(latents, means, log_probs, timesteps, prompt_embeds, negative_embeds,
                      prompts, decode(pipe, latents[:, -1]))


def parse_config(Config, doc, argv=None):
    """Command line -> Config: its fields give the flags, its comments the help."""
    source = "".join(inspect.getsource(c) for c in Config.__mro__[-2::-1])  # one may extend another
    comments = dict(re.findall(r"^ +(\w+):[^#]*  # (.+)$", source, re.M))
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):  # argparse's own would print the usage first
        raise ValueError(message)

    parser.error = fail
    types = typing.get_type_hints(Config)
    for field in fields(Config):
        kind, inner = types[field.name], typing.get_args(types[field.name])
        how = {"type": inner[0] if inner else kind}  # "int | None" reads an int
        if kind is bool:  # type=bool would read "False" as True
            how = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is typing.Literal:
            how = {"choices": inner}
        elif typing.get_origin(kind) is tuple:
            how["nargs"] = "+"
        how["help"] = f"{comments[field.name]} [{field.default}]".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **how)
    values = vars(parser.parse_args(argv))
    return Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def picture_path(out):
    """--out as a Path whose folder is there: what is wrong with it fails before the work."""
    out = Path(out)
    if out.suffix not in (".png", ".jpg", ".pdf"):
        raise ValueError(f"--out {out}: the name must end in .png, .jpg or .pdf")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def run_main(main):
    """main(), where bad input becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a log file on Windows may have no β
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


@torch.no_grad()
def main(argv=None):
    config = parse_config(Config, __doc__, argv)
    out = picture_path(config.out)
    pipe = load_pipeline(config.model)
    scale, eta = config.guidance_scale, config.eta
    run = rollout(pipe, config.prompts, config.num_steps, eta, scale, config.seed)
    c, empty = run.prompt_embeds, run.negative_embeds
    B, _, *chw = run.latents.shape
    print(f"{run.prompts[0]!r}, one of a batch of {B}; D = {math.prod(chw)}")
    print("   t   sigma_t   c/sigma    log-prob  KL to itself  ratio on replay  log-ratio alone")
    beliefs, alone = [], []
    for k, t in enumerate(run.timesteps):
        x_t, x_prev = run.latents[:, k], run.latents[:, k + 1]
        noise_pred = predict_noise(pipe.unet, x_t, t, c, empty, scale)
        mean, std = step_mean_std(pipe.scheduler, noise_pred, t, x_t, eta)
        again, _ = policy(pipe, x_t, t, c, empty, scale, eta)
        ratio = (log_prob(x_prev, again, std) - run.log_probs[:, k]).exp()
        # The same step in a batch of one: other kernels, other rounding, and nothing else.
        lone = step_log_prob(pipe, x_t[:1], x_prev[:1], t, c[:1], empty, scale, eta)
        alone.append((lone - run.log_probs[:1, k]).item())
        row = (t, std[0], noise_weight(pipe.scheduler, t, eta), run.log_probs[0, k],
               kl_divergence(mean, again, std)[0], ratio[0], alone[-1])
        form = "{:4.0f}  {:8.5f}  {:8.3f}  {:10.3f}  {:12}  {:15}  {:15.1e}"
        print(form.format(*map(float, row)))
        alpha_t = ddim_coefficients(pipe.scheduler, t)[0].to(x_t).view(1, 1, 1, 1)
        beliefs.append(decode(pipe, x0_and_noise(pipe.scheduler, noise_pred, alpha_t, x_t)[0]))
    print(f"Scored in a batch of its own, a log-prob moves by {max(map(abs, alone)):.1e} at most.")
    shown = sorted({round(k) for k in torch.linspace(0, len(beliefs) - 1, 10).tolist()})
    rows = list(zip(*(beliefs[k] for k in shown), run.images))
    figures.sheet(out, rows, run.prompts, [f"t = {run.timesteps[k]}" for k in shown] + ["$x_0$"])
    print(f"What the model believes x_0 to be, as t falls: {out}")


if __name__ == "__main__":
    run_main(main)
