"""A run is a folder: config.json, metrics.csv (a line for each round), pictures.csv (a line for
each picture that was drawn for training), fresh.csv (a line for each look at fresh noise), film/,
figures, evaluation.json, and the tuned weights; rounds/NNN/ has those after NNN rounds where
--keep-every asks for them. Until it is finished it has checkpoint.pt too, from which --resume goes
on as if nothing had happened.
"""
import csv
import io
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from support import figures, flags, models, training

FRAMES = 4  # looks before the last one: after none, a quarter, a half, ... of the rounds
NOTED = ("kl_old", "clip_fraction")  # what updates may note of their (picture, step) pairs
CHECKPOINT = "checkpoint.pt"
# Fields that change no trained weight: where a run is, on what, and how it is looked at.
NO_MATTER = ("name", "out", "device", "batch_size", "train_batch_size", "checkpointing",
             "reward_batch_size", "reward_device", "eval_samples", "keep_every", "resume")


@dataclass(frozen=True)
class TrainFlags(flags.MachineFlags):
    """What every training has, whatever it learns by."""
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, a finished run, or a hub name
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none, at half the cost
    weight_decay: float = 1e-4  # of AdamW
    anneal: bool = False  # the learning rate falls to 0 in a straight line
    seed: int = 0  # seed of everything
    train_batch_size: int = 64  # (picture, step) pairs per UNet call in training; memory only
    checkpointing: bool = False  # keep few activations and compute them again: a third slower
    eval_samples: int = 128  # pictures on fresh noise, before and after, that the result rests on
    film_pictures: int = 8  # pictures in each row of the film; each column keeps its noise
    keep_every: int = 0  # also keep the weights after every so many rounds; 0: only the last
    name: str | None = None  # the run's folder in --out; default: made from what is run
    out: str = "runs"  # folder of all runs
    resume: str | None = None  # folder of a run that was cut short: goes on where it stopped
    sd: bool = False  # the published settings for the full model become the defaults


class Run:
    """A folder runs/<name>/, the rounds of its training, and what each round has logged.

    look: draws and scores pictures, of the same fresh noise whenever it is called: a dict with
    "prompts", "images" and, as tensors (B,), "reward"; where there is a gold, "gold" and "kl" too.
    """

    def __init__(self, config, method, look):
        self.config, self.look = config, look
        self.settings = asdict(config) | {"resume": None, "method": method}
        self.titles = {"reward": config.reward}  # of what look measures of each picture
        if hasattr(config, "gold"):
            self.titles |= {"gold": f"gold: {config.gold}", "kl": "path KL, nats"}
        self.pictures_per_round = config.prompts_per_round * config.samples_per_prompt
        self.rows = []  # one dict a round, as in metrics.csv
        self.pictures = []  # one dict a picture, as in pictures.csv
        self.fresh = []  # one dict a look, as in fresh.csv
        # The sum and the number of a round's values: there even where a process has no pair.
        self.notes = {name: torch.zeros(2, dtype=torch.float64) for name in NOTED}
        self.started = self.round_started = time.perf_counter()
        self.before = self.see()  # what goes wrong at once leaves no folder behind
        if config.resume:
            self.folder = Path(config.resume)
        else:
            self.folder = make_folder(config, method) or Path(config.out)
            write_json(self.folder / "config.json", self.settings)

    def rounds(self, pipe, *others):
        """0, 1, ..., with a progress bar; now and then a look at fresh noise, which counts in none.

        pipe, others: all that changes from round to round: a dict, or what has a state_dict. It is
        in a checkpoint after each, and --resume restores it and goes on with the next round.
        """
        self.add_look(0, self.before)
        done = self.restore(pipe, others) if self.config.resume else 0
        if training.is_first():
            flags.unfinished = self.folder
        N = self.config.rounds
        self.bar = tqdm(range(done, N), "training", unit="round", initial=done, total=N)
        for n in self.bar:
            if n and n in [k * N // FRAMES for k in range(1, FRAMES)]:
                self.add_look(n, self.see())
            self.round_started = time.perf_counter()
            yield n
            if self.config.keep_every and (n + 1) % self.config.keep_every == 0:
                self.save_weights(pipe, self.folder / "rounds" / f"{n + 1:03d}")
            self.write_checkpoint(n + 1, pipe, others)
        self.after = self.see()
        self.add_look(N, self.after)

    def see(self):
        """What look() gives now, with the pictures of all processes."""
        seen = self.look()
        return seen | {"images": training.all_images(seen["images"])}

    def add_look(self, n, seen):
        """What was seen on fresh noise after n rounds: a line in fresh.csv, a frame of the film."""
        row = {"queries": n * self.pictures_per_round}
        for name in self.titles:
            row[name], row[name + "_se"] = training.mean_se(seen[name])
        self.fresh.append(row)
        write_rows(self.folder / "fresh.csv", self.fresh)
        self.add_to_film(seen["prompts"], seen["images"], row["queries"])

    @training.only_first
    def add_to_film(self, prompts, images, queries):
        """A frame without loss in the folder film/: pictures of different prompts, if there are."""
        columns = min(len(prompts), self.config.film_pictures)
        pool = range(max(len(set(prompts)), columns))
        shown = training.spread_evenly(pool, columns)
        frame = self.folder / "film" / str(queries)
        frame.mkdir(parents=True, exist_ok=True)
        write_json(frame.parent / "prompts.json", [prompts[i] for i in shown])
        for k, i in enumerate(shown):
            images[i].save(frame / f"{k}.png")

    def note(self, **columns):
        """Values (N,) of (picture, step) pairs, whose mean over the round goes into its log."""
        for name, values in columns.items():
            self.notes[name] += torch.tensor([values.sum().item(), len(values)])

    def log(self, n, grad_norm, **columns):
        """One line on the screen and one in metrics.csv; a tensor (B,) becomes mean and error.

        What tensors say of each picture goes to pictures.csv, in the order of the round's prompts.
        """
        if not grad_norm.isfinite():
            raise ValueError(f"the gradient is {grad_norm}; try a smaller --learning-rate")
        start = {"round": n + 1, "queries": (n + 1) * self.pictures_per_round}
        row, words = dict(start), [f"round {n + 1:3}"]
        for name, values in columns.items():
            row[name], row[name + "_se"] = training.mean_se(values.cpu())
            words.append(f"{name} {row[name]:.3f} ± {row[name + '_se']:.3f}")
        others = {"grad_norm": grad_norm.item(),
                  "grad_clipped": float(grad_norm > self.config.max_grad_norm)}
        for name, sums in self.notes.items():
            training.total(sums)
            total, number = sums.tolist()
            others[name] = total / max(number, 1)
            sums.zero_()
        others["seconds"] = time.perf_counter() - self.round_started
        words += [f"{name} {value:.3g}" for name, value in others.items()]
        self.rows.append(row | others)
        for i in range(self.pictures_per_round):
            numbers = {name: values[i].item() for name, values in columns.items()}
            self.pictures.append(start | {"picture": i} | numbers)
        write_rows(self.folder / "pictures.csv", self.pictures)
        write_rows(self.folder / "metrics.csv", self.rows)
        self.bar.write("  ".join(words))

    @training.only_first
    def write_checkpoint(self, n, pipe, others):
        """All that --resume needs to go on after n rounds."""
        weights = {name: p.detach() for name, p in pipe.unet.named_parameters() if p.requires_grad}
        states = [thing if isinstance(thing, dict) else thing.state_dict() for thing in others]
        file = io.BytesIO()
        torch.save({"round": n, "weights": weights, "states": states, "rows": self.rows,
                    "pictures": self.pictures, "fresh": self.fresh,
                    "seconds": time.perf_counter() - self.started}, file)
        write_whole(self.folder / CHECKPOINT, file.getbuffer())

    def restore(self, pipe, others):
        """Makes all what it was at the checkpoint.  -> the rounds done by then

        A run has a checkpoint after its first round; without one it begins again.
        """
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return 0
        try:
            saved = torch.load(path, map_location=pipe.device, weights_only=True)
        except Exception as error:  # torch has a type of its own for each kind of damage
            raise ValueError(f"--resume: {path} cannot be read: {error}") from error
        pipe.unet.load_state_dict(saved["weights"], strict=False)  # the others never change
        for thing, state in zip(others, saved["states"], strict=True):
            if isinstance(thing, dict):
                thing.update(state)
            else:
                thing.load_state_dict(state)
        self.rows, self.pictures, self.fresh = saved["rows"], saved["pictures"], saved["fresh"]
        self.started -= saved["seconds"]
        return saved["round"]

    @training.only_first
    def save_weights(self, pipe, folder):
        """The trained weights and, beside them, what they were trained with."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            models.save_trained(pipe, folder)
        except SafetensorError as error:  # as it calls a full disk
            raise OSError(f"{folder}: the weights could not be saved: {error}") from error
        write_json(folder / "config.json", self.settings)

    def finish(self, pipe):
        """Saves weights, figures, summary; keeps pipe.  -> the summary, by what is measured"""
        self.pipe = pipe
        self.save_weights(pipe, self.folder)
        summary = {"queries": self.rows[-1]["queries"],
                   "seconds": time.perf_counter() - self.started}
        for name, title in self.titles.items():
            before, after = self.before[name], self.after[name]
            column = summary[name] = {"title": title}
            for side, values in (("before", before), ("after", after), ("gain", after - before)):
                column[side], column[side + "_se"] = training.mean_se(values)
        try:
            self.draw()
        except Exception as error:  # whatever it is, the weights are worth more
            print(f"warning: not all figures could be drawn: {error}")
        write_json(self.folder / "evaluation.json", summary)  # with it, a run is finished
        if training.is_first():
            Path(self.folder, CHECKPOINT).unlink(missing_ok=True)
        flags.unfinished = None
        return summary

    @training.only_first
    def draw(self):
        """The run's figures: pictures before and after, curves, and the film."""
        figures.before_after(self.folder / "before_after.png", self.before, self.after)
        figures.curves(self.folder / "reward.png", self.rows, self.fresh, self.titles)
        prompts, frames = read_film(self.folder)
        times = [f"{queries} queries" for queries in frames]
        figures.sheet(self.folder / "film.png", list(frames.values()), times, prompts)


def report(run, summary):
    """What was gained on fresh noise, and where it all is."""
    print("\nOn pictures from fresh noise, mean ± standard error; the gain is of the same noise:")
    for column in summary.values():
        if isinstance(column, dict):
            line = ("{title:16} {before:8.3f} ± {before_se:.3f} before  {after:8.3f} ± "
                    "{after_se:.3f} after  gain {gain:+.3f} ± {gain_se:.3f}")
            print(line.format(**column))
    print(f"{summary['queries']} reward queries, {summary['seconds']:.0f} s. "
          f"Pictures, film, curves, metrics.csv and the tuned weights: {run.folder}")


# ---- going on --------------------------------------------------------------------------------


def parse(Config, doc, argv=None, sd=None):
    """flags.parse, where a run's own settings are the defaults behind --resume, and must stay."""
    config = flags.parse(Config, doc, argv, sd)
    if not config.resume:
        flags.make_folder(config.out)
        return config
    folder = config.resume
    if is_finished(folder):
        raise ValueError(f"--resume {folder}: this run is finished; "
                         f"--model {folder} trains its model further")
    saved = models.read_config(folder)
    saved.pop("method", None)
    try:
        begun = Config(**{name: tuple(value) if isinstance(value, list) else value
                          for name, value in saved.items()})
    except TypeError as error:
        raise ValueError(f"--resume {folder}: no run of this script: {error}") from error
    config = flags.parse(Config, doc, argv, default=begun)
    check_settings(folder, asdict(config), "it goes on as it began")
    return config


def check_settings(folder, wanted, advice):
    """ValueError naming the first flag of which a run's config.json holds another value."""
    saved = models.read_config(folder)
    for name, value in json.loads(json.dumps(wanted)).items():  # a tuple becomes a list
        if name not in NO_MATTER and saved.get(name) != value:
            raise ValueError(f"{folder} was made with {flags.flag(name)} {saved.get(name)}, not "
                             f"{value}: {advice}")


# ---- folders and files: the first process alone writes --------------------------------------


def is_finished(folder):
    """Whether a run's folder holds its summary, which is written last of all."""
    return Path(folder, "evaluation.json").is_file()


def clean(name):
    """A name as a folder can have it: a file's path has slashes, and a prompt is long."""
    name = re.sub(r"[^\w=.,-]+", "_", name)
    return name.encode()[:100].decode(errors="ignore")  # what is limited is a name's bytes


@training.only_first
def make_folder(config, method):
    """A folder runs/<name>/ in which no run is yet."""
    base = clean(config.name or f"{method}_{config.reward}_{Path(config.prompts).stem}")
    folder, i = Path(config.out, base), 1
    while (folder / "config.json").exists():
        i += 1
        folder = Path(config.out, f"{base}-{i}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@training.only_first
def write_whole(path, data):
    """A file of these bytes: whatever cuts this short, path is as it was before, or all new."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # before the name: a name must not come before its bytes
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # where the disk is full, it needs the room


def write_json(path, content):
    write_whole(path, json.dumps(content, indent=2).encode())


def write_rows(path, rows):
    """A CSV file with a line for each dict; the first one's keys are the columns."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def read_rows(path):
    """A CSV file of numbers as a list of dicts; [] where there is no file."""
    if not Path(path).is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def read_film(folder):
    """A run's film: prompts, and queries -> pictures of the same noise, one for each prompt."""
    folder, frames = Path(folder, "film"), {}
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    for queries in sorted(int(path.name) for path in folder.glob("[0-9]*")):
        files = [folder / str(queries) / f"{k}.png" for k in range(len(prompts))]
        frames[queries] = [Image.open(file).convert("RGB") for file in files]
    return prompts, frames


def kept_weights(folder):
    """Reward queries -> the weights after 1/8, 1/4, 1/2 of the rounds, where kept, and all."""
    saved = models.read_config(folder)
    pictures = saved["prompts_per_round"] * saved["samples_per_prompt"]
    found = {}
    for k in (1, 2, 4):
        n = saved["rounds"] // 8 * k
        weights = Path(folder, "rounds", f"{n:03d}")
        if weights.is_dir():
            found[n * pictures] = weights
    found[saved["rounds"] * pictures] = Path(folder)
    return found


def labels(folders):
    """Label -> folder of finished runs; a label is the end in which their paths differ."""
    if not folders:
        return {}
    for folder in folders:
        if not is_finished(folder):
            raise ValueError(f"--runs {folder}: no finished run; its evaluation.json is missing")
    paths = [Path(folder).resolve() for folder in folders]
    above = os.path.commonpath([path.parent for path in paths])
    return {os.path.relpath(path, above): path for path in paths}
