"""Prompt sets by name: the shape world's, both papers', files, or one prompt as it is written."""
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
TUNING = (  # one like each of them: what settings are chosen on, and what no verdict looks at
    "a purple circle", "three green squares", "a green star and a purple circle",
    "a yellow circle on the top", "four red circles")
TASKS_SD = {  # the paper's own
    "color": "A green colored rabbit",
    "count": "Four wolves in the park",
    "composition": "A cat and a dog",
    "location": "A dog on the moon",
    "bias": "Four roses"}  # pretrained: mostly the whiskey
UNSEEN_SD = {  # the same with another noun, never trained on
    "color": ["A green colored cat"],
    "count": ["Four birds in the park"],
    "composition": ["A cat and a cup"],
    "location": ["A lion on the moon"],
    "bias": []}


def get_prompts(name):
    """A prompt set by name, the lines of a text file, or the very prompt given, as a list.

    A prompt of a single word needs a space after it. ValueError names what is wrong.
    """
    if name in shapes.FAMILIES:
        return shapes.prompts_of(name)
    if name == "animals":
        return animals()
    if name == "activities":
        return [f"{animal} {activity}" for animal in animals() for activity in ACTIVITIES]
    if name == "tasks":
        return list(TASKS.values())
    if name == "tasks_sd":
        return list(TASKS_SD.values())
    if name == "tuning":
        return list(TUNING)
    if " " in name and not os.path.exists(name):  # Path(name).exists() fails if it is very long
        return [name.strip()]
    return read_prompts(name)


def animals():
    """DDPO's animals as prompts: "a cat", "an ant"."""
    return [("an " if animal[0] in "aeiou" else "a ") + animal for animal in ANIMALS]


def read_prompts(name):
    """The lines of a text file that are not empty."""
    if not os.path.isfile(name):  # Path(name).is_file() fails if it is very long
        known = ", ".join([*shapes.FAMILIES, "animals", "activities", "tasks", "tasks_sd",
                           "tuning"])
        raise ValueError(f"--prompts {name:.200}: no such file, and no prompt set; those are "
                         f"{known}")
    try:
        lines = Path(name).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {name}: not a text file in UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {name}: the file has no prompt in it")
    return prompts


def families(name):
    """Family -> (prompts that are trained on, prompts that no training saw), for an evaluation."""
    if name == "tasks":
        return {family: ([prompt], shapes.prompts_of(family, held_out=True))
                for family, prompt in TASKS.items()}
    if name == "tasks_sd":
        return {family: ([prompt], UNSEEN_SD[family]) for family, prompt in TASKS_SD.items()}
    if name in shapes.FAMILIES:
        return {name: (shapes.prompts_of(name), shapes.prompts_of(name, held_out=True))}
    return {name: (get_prompts(name), [])}
