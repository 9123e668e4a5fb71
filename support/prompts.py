"""Prompt sets by name: the shape world's, both papers', files, or one prompt as it is written."""
import csv
import io
import json
import os
from pathlib import Path

from tiny_sd import shapes

ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear
raccoon fox wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake
turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog
kangaroo""".split()  # DDPO's 45 common animals
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")  # DDPO, prompt alignment
TASKS = {  # DPOK's tasks, in the tiny world's words
    "color": "an orange star",
    "count": "three red squares",
    "composition": "a red circle and a blue square",
    "location": "a blue star on the left",
    "bias": "four stars"}  # pretrained: mostly the brand's yellow circle
TASKS_SD = {  # the paper's own
    "color": "A green colored rabbit",
    "count": "Four wolves in the park",
    "composition": "A cat and a dog",
    "location": "A dog on the moon",
    "bias": "Four roses"}  # pretrained: mostly the whiskey
SUFFIXES = (".txt", ".json", ".jsonl", ".csv")  # of the files that can be read
OTHERS = (".text", ".md", ".tsv", ".yaml", ".yml", ".toml", ".parquet", ".xlsx", ".gz", ".zip")


def get_prompts(name):
    """A prompt set by name, the prompts in a file, or the very prompt given, as a list.

    A prompt of a single word needs a space after it. ValueError names what is wrong.
    """
    animals = [("an " if animal[0] in "aeiou" else "a ") + animal for animal in ANIMALS]
    activities = [f"{animal} {activity}" for animal in animals for activity in ACTIVITIES]
    sets = {family: shapes.prompts_of(family) for family in shapes.FAMILIES}
    sets |= {"animals": animals, "activities": activities, "tasks": list(TASKS.values()),
             "tasks_sd": list(TASKS_SD.values())}
    if name in sets:
        return sets[name]
    path = os.path.expanduser(name)  # os.path, for Path fails if a name is very long
    if os.path.isfile(path):
        return read_prompts(path)
    is_path = name.startswith(("./", "../", "/", "~")) or os.path.exists(path)
    if is_path or " " not in name or name.strip().lower().endswith(SUFFIXES + OTHERS):
        raise ValueError(f"--prompts {name}: no such file, and no prompt set; those are "
                         f"{', '.join(sets)}")
    return [name.strip()]


def read_prompts(file):
    """The prompts in a file: one a line, or what JSON, JSON lines or CSV have as `prompt`."""
    kind = Path(file).suffix.lower()
    if kind not in ("", *SUFFIXES):
        raise ValueError(f"--prompts {file}: a file of prompts ends in {', '.join(SUFFIXES)}")
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        entries = [line for line in text.split("\n") if line.strip()]
        if kind == ".json":
            entries = json.loads(text)
        elif kind == ".jsonl":
            entries = [json.loads(line) for line in entries]
        elif kind == ".csv":
            entries = list(csv.DictReader(io.StringIO(text), strict=True))
        if not isinstance(entries, list):
            raise ValueError("it holds no list")
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"--prompts {file}: cannot be read as UTF-8 and "
                         f"{kind[1:] or 'text'}: {error}") from error
    prompts = []
    for n, entry in enumerate(entries, 1):
        prompt = entry.get("prompt") if isinstance(entry, dict) else entry
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"--prompts {file}: entry {n} has no text as its 'prompt'")
        prompts.append(prompt.strip())
    if not prompts:
        raise ValueError(f"--prompts {file}: the file has no prompt in it")
    return prompts
