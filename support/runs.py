"""A run is a folder: config.json, metrics.csv (a line for each round), pictures.csv (a line for
each picture that was drawn for training), film/, figures, evaluation.json, and the tuned weights;
rounds/NNN/ has those after NNN rounds where --keep-every asks for them. Until it is finished it has
checkpoints/ too, from which --resume goes on as if nothing had happened.
"""
import csv
import json
import math
import os
import re
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from support import checkpoints, figures, flags, models, parallel, prices, training

FRAMES = 4  # of the film, before its last: at none, a quarter, a half, ... of the rounds
COLUMNS = 8  # of film.png, evenly spaced where a frame has more pictures
LOGS = ("metrics.csv", "pictures.csv")


class Run:
    """A folder runs/<name>/, the rounds of its training, and what each round has logged.

    The folder is a new one, or --resume's.
    """

    def __init__(self, config, method):
        self.config = config
        self.folder = Path(config.resume) if config.resume else new_folder(config, method)
        self.rows = []  # one dict a round, as in metrics.csv
        self.film = []  # (reward queries so far, pictures of the same noise), as training goes on
        self.film_prompts = []
        self.started = self.round_started = time.perf_counter()
        self.settings = asdict(config) | {"resume": None, "method": method}
        if not config.resume:
            write_json(self.folder / "config.json", self.settings)
        self.lock = checkpoints.lock(self.folder)

    def rounds(self, pipe, *others):
        """0, 1, ..., with a progress bar; keeps pipe's weights after every --keep-every of them.

        pipe, others: all that changes from round to round. It is in a checkpoint after each, and
        --resume restores it in place and goes on with the round after it.
        """
        owned = [pipe, *others]
        first = self.go_on(owned) if self.config.resume else 0
        flags.unfinished = self.folder
        self.bar = tqdm(range(first, self.config.rounds), "training", unit="round", initial=first,
                        total=self.config.rounds)
        for n in self.bar:
            self.round_started = time.perf_counter()
            yield n
            if self.config.keep_every and (n + 1) % self.config.keep_every == 0:
                folder = Path(self.folder, "rounds", f"{n + 1:03d}")
                save_trained(pipe, folder)
                write_json(folder / "config.json", self.settings)
            self.write_checkpoint(n + 1, owned)

    @parallel.only_first
    def write_checkpoint(self, n, owned):
        """All that --resume needs to go on after n rounds."""
        sizes = {}
        for name in LOGS:
            if Path(self.folder, name).is_file():
                checkpoints.sync(self.folder / name)
                sizes[name] = Path(self.folder, name).stat().st_size
        notes = {"round": n, "settings": self.settings, "sizes": sizes,
                 "seconds": time.perf_counter() - self.started}
        checkpoints.write(self.folder, owned, notes)

    def go_on(self, owned):
        """All as it was at the newest checkpoint, in the folder too.  -> the rounds done by then

        Without a checkpoint, which a run has after its first round, it begins again.
        """
        found = checkpoints.read_newest(self.folder)
        notes = {"round": 0, "sizes": {}, "seconds": 0.0}
        if found is None and count_lines(self.folder / "metrics.csv") > 2:
            raise ValueError(f"--resume {self.folder}: it has more than a round, but no checkpoint")
        if found:
            state, notes = found
            where = f"--resume {self.folder}: its checkpoint"
            flags.check_settings(where, notes["settings"], self.settings, "it is another run's")
            try:
                for thing, its in zip(owned, state, strict=True):
                    checkpoints.restore(thing, its)
            except (ValueError, KeyError, RuntimeError) as error:
                raise ValueError(f"{where} does not fit this script: {error}") from error
        for name in LOGS:
            cut(self.folder / name, notes["sizes"].get(name, 0))
        parallel.wait()  # for the first process, which alone cuts and deletes
        for row in read_rows(self.folder / "metrics.csv"):
            counts = {name: int(row[name]) for name in ("round", "queries")}
            self.rows.append(row | counts)
        if self.rows:
            # A frame before the round that comes now is drawn again: it may be cut short.
            self.film_prompts, frames = read_film(self.folder, self.rows[-1]["queries"])
            self.film = list(frames.items())
        self.started = time.perf_counter() - notes["seconds"]
        return notes["round"]

    @contextmanager
    def looking(self):
        """What is done inside is only looked at: its time is not in the round's seconds."""
        started = time.perf_counter()
        yield
        self.round_started += time.perf_counter() - started

    def log(self, n, **columns):
        """One line on the screen and one in metrics.csv; a tensor (B,) becomes mean and error.

        What tensors say of each picture goes to pictures.csv, in the order of the round's prompts.
        """
        queries = (n + 1) * self.config.prompts_per_round * self.config.samples_per_prompt
        row = {"round": n + 1, "queries": queries}
        words = [f"round {n + 1:3}"]
        for name, value in columns.items():
            if isinstance(value, torch.Tensor):
                row[name], row[name + "_se"] = training.mean_se(value.detach().cpu())
                words.append(f"{name} {row[name]:.3f} ± {row[name + '_se']:.3f}")
            else:
                row[name] = value
                words.append(f"{name} {value:.3g}")
        of_pictures = {name: values.tolist() for name, values in columns.items()
                       if isinstance(values, torch.Tensor)}
        for i, values in enumerate(zip(*of_pictures.values())):
            picture = {"round": n + 1, "queries": queries, "picture": i}
            append_row(Path(self.folder, "pictures.csv"), picture | dict(zip(of_pictures, values)))
        row["seconds"] = time.perf_counter() - self.round_started
        words.append(f"{row['seconds']:.1f} s")
        self.rows.append(row)
        append_row(Path(self.folder, "metrics.csv"), row)
        self.bar.write("  ".join(words))

    def is_film_due(self, n):
        """Whether the film gets a frame before round n; one more comes after the last round."""
        return n in [k * self.config.rounds // FRAMES for k in range(FRAMES)]

    def add_to_film(self, trajectory):
        """One frame more: to be drawn in the end, and without loss in the folder film/."""
        queries = self.rows[-1]["queries"] if self.rows else 0
        self.film.append((queries, trajectory.images))
        self.film_prompts = trajectory.prompts
        keep_frame(Path(self.folder, "film"), queries, trajectory)
        self.round_started = time.perf_counter()  # the film comes first, and is only looked at

    def finish(self, pipe, before, after, names):
        """Saves pictures, curves, summary and weights.  names: column -> what it is called.

        before, after: {"prompts", "images", and for each of names (B,) values on fresh noise}.
        """
        self.before, self.after = before, after
        self.draw(before, after, names)
        save_trained(pipe, self.folder)
        summary = {"queries": self.rows[-1]["queries"],
                   "seconds": time.perf_counter() - self.started}
        for name, title in names.items():
            summary[name] = summarize(before[name], after[name]) | {"title": title}
        # Last of all: a folder with this file is a finished run.
        write_json(self.folder / "evaluation.json", summary)
        flags.unfinished = None
        checkpoints.remove(self.folder)
        return summary

    @parallel.only_first
    def draw(self, before, after, names):
        """The run's figures: pictures before and after, curves, and the film."""
        folder, prompts = self.folder, before["prompts"]
        first = list(names)[0]
        figures.before_after(folder / "before_after.png", prompts,
                             (before[first], after[first]), (before["images"], after["images"]))
        ends = {name: (before[name], after[name]) for name in names}
        figures.curves(folder / "reward.png", self.rows, ends, names)
        if self.film:
            times = [f"{queries} queries" for queries, _ in self.film]
            columns = training.spread_evenly(range(len(self.film_prompts)), COLUMNS)
            columns = list(dict.fromkeys(columns))
            strips = [[images[i] for i in columns] for _, images in self.film]
            figures.sheet(folder / "film.png", strips, times,
                          [self.film_prompts[i] for i in columns])


def summarize(before, after):
    """Means and errors on the same fresh noise before and after, and of the paired difference."""
    summary = {}
    for name, values in (("before", before), ("after", after), ("gain", after - before)):
        summary[name], summary[name + "_se"] = training.mean_se(values)
    return summary


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


def clean(name):
    """A name as a folder can have it: a file's path has slashes, and a prompt is long."""
    name = re.sub(r"[^\w=.,-]+", "_", name)
    return name.encode()[:100].decode(errors="ignore")  # what is limited is a name's bytes


def check_folder(config):
    """ValueError unless --out can hold a new folder of the run's --name, or --resume can go on."""
    if config.resume:
        if Path(config.resume, "evaluation.json").is_file():
            checkpoints.remove(config.resume)  # it may have been killed before it did so itself
            raise ValueError(f"--resume {config.resume}: this run is finished; "
                             f"--model {config.resume} trains its model further")
        return
    if Path(config.out).exists() and not Path(config.out).is_dir():
        raise ValueError(f"--out {config.out}: this is a file, not a folder")
    if config.name and not clean(config.name).strip("."):
        raise ValueError(f"--name {config.name}: no folder can be called so")
    if config.name and Path(config.out, clean(config.name)).exists():
        raise ValueError(f"--name {config.name}: there is such a run in {config.out}")


@parallel.only_first
def save_trained(pipe, folder):
    folder.mkdir(parents=True, exist_ok=True)
    models.save_trained(pipe, folder)


@parallel.only_first
def keep_frame(folder, queries, trajectory):
    folder.mkdir(exist_ok=True)
    write_json(folder / "prompts.json", trajectory.prompts)
    figures.strip(trajectory.images).save(folder / f"{queries:06d}.png")


def new_folder(config, method):
    """A new folder runs/<name>/, for all processes; never one that is there already."""
    return Path(parallel.same_text(str(make_folder(config, method))))


@parallel.only_first
def make_folder(config, method):
    base = config.name or f"{method}_{config.reward}_{Path(config.prompts).stem}"
    base = clean(base)
    folder, i = Path(config.out, base), 1
    while folder.exists():
        i += 1
        folder = Path(config.out, f"{base}-{i}")
    folder.mkdir(parents=True)
    return folder


@parallel.only_first
def write_json(path, content):
    """A JSON file that is whole or not there."""
    checkpoints.write_whole(Path(path), json.dumps(content, indent=2).encode())


def count_lines(path):
    """Lines of a text file, 0 where there is none; the last may be cut short."""
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


@parallel.only_first
def cut(path, size):
    """A file's first `size` bytes: what was written later is gone. With none of them, no file."""
    length = path.stat().st_size if path.is_file() else 0
    if length < size:
        raise ValueError(f"{path} has lost lines: {length} bytes of {size}")
    if size == 0:
        path.unlink(missing_ok=True)
    elif length > size:
        os.truncate(path, size)


@parallel.only_first
def append_row(path, row):
    """One line more in a CSV file, whose first line names the columns."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path):
    """A CSV file of numbers as a list of dicts; [] where there is no file."""
    if not Path(path).is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def read_film(folder, end=math.inf):
    """A run's film: prompts, and queries -> pictures of the same noise, one for each prompt.

    end: only frames of fewer queries.
    """
    folder = Path(folder, "film")
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    if not prompts:
        raise ValueError(f"{folder / 'prompts.json'} has no prompts")
    frames = {}
    for path in sorted(folder.glob("[0-9]*.png"), key=lambda path: int(path.stem)):
        if int(path.stem) >= end:
            break
        picture = Image.open(path).convert("RGB")
        width = picture.width // len(prompts)
        frames[int(path.stem)] = [picture.crop((i * width, 0, (i + 1) * width, picture.height))
                                  for i in range(len(prompts))]
    return prompts, frames


def labels(folders):
    """Label -> folder of finished runs; ValueError for one that is none, or is given twice."""
    found = {}
    for folder in folders:
        if not Path(folder, "evaluation.json").is_file():
            raise ValueError(f"--runs {folder}: no finished run; its evaluation.json is missing")
        label = Path(folder).resolve().name.replace("|", "_")
        if label in found or label == "pretrained":
            label = str(Path(folder).resolve())  # no bare name can be equal to it
        if Path(folder).resolve() in [Path(other).resolve() for other in found.values()]:
            raise ValueError(f"--runs {folder}: this folder is given twice")
        found[label] = folder
    return found


def curves(runs, reward):
    """Label -> metrics of its runs (a list for each seed), of those trained on that reward.

    Each line has its "queries" and its "evaluations". runs: (label, seed, folder).
    """
    found = {}
    for label, _, folder in runs:
        config = models.read_config(folder)
        try:
            if config["reward"] == reward:  # only equal rewards share an axis
                rows = read_rows(Path(folder, "metrics.csv"))
                found.setdefault(label, []).append(prices.add_evaluations(rows, config))
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"{folder}: its config.json and metrics.csv are not those of a run "
                             f"({type(error).__name__}: {error})") from error
    return found
