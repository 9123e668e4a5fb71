"""Random command lines: each must end well, or in one line (or tyro's box) and exit code 2.

`python tests/fuzz.py 1000` runs so many, of seed 0 (`1000 7` draws others), a second or two each,
and prints those that end otherwise. tests/runs/test_fuzz.py runs a few.
"""
import contextlib
import io
import os
import random
import sys
import tempfile
import traceback
from dataclasses import fields
from importlib import import_module
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import flags  # noqa: E402

TRAIN = ("--rounds 1 --num-steps 2 --prompts-per-round 1 --samples-per-prompt 2 --eval-samples 2 "
         "--film-pictures 1 --reward compressibility")
BASE = {  # script -> flags with which it takes a moment; those of a case follow, and overrule them
    "01_mdp": "--num-steps 2",
    "02_rewards": "--num-steps 2 --samples 2 --show 2 --rewards compressibility",
    "03_ddpo": TRAIN,
    "04_dpok": TRAIN + " --gold incompressibility --lora-rank 1",
    "experiments.sft": TRAIN + " --gold incompressibility --lora-rank 1"}
NUMBERS = ["0", "-1", "3", "0.5", "nan", "inf", "1e300", "1e-300", "٣", "9" * 20, "", "x", "None"]
NASTY = {  # what a field's type says -> words behind its flag
    "int": NUMBERS, "float": NUMBERS, "bool": ["yes", "0", ""],
    "Literal": ["", "x", "None", "EXACT", "float16", "bfloat16", "running", "sparse", "per_dim"],
    "str": ["", " ", "=", "-", "..", "/", "*", "None", "folder", "empty", "bytes", "missing.py:f",
            "bytes:f", "nobody/nothing", "a red circle", "日本 🙂", "%s{0}$HOME", "\udcff",
            "x" * 5000, "compressibility=1,alignment=-1e3", "cuda:99", "meta", "judge", "count"]}


def write_files():
    Path("folder").mkdir()
    Path("folder.png").mkdir()
    Path("empty").touch()
    Path("bytes").write_bytes(bytes(range(256)) * 4)
    Path("my.py").write_text("def few(images, prompts):\n    return [1]\n")
    Path("runs/taken").mkdir(parents=True)
    Path("runs/taken/config.json").write_text("precious")


def random_case(rng):
    """A script and two of its flags, with a value of their type or, at times, of another."""
    script = rng.choice(list(BASE))
    Config = import_module(script).Config
    words = []
    allowed = [field for field in fields(Config) if field.name not in ("sd", "out")]
    for field in rng.sample(allowed, 2):
        kinds = [kind for kind in NASTY if kind in str(field.type) or rng.random() < 0.1]
        words.append(flags.flag(field.name))
        words += rng.sample(NASTY[rng.choice(kinds)], rng.choice([0, 1, 1, 1, 1, 2]))
    return script, words


def end_of(script, words):
    """The exit code of a command line, and all that it said on stderr."""
    sys.argv = [script.replace(".", "/") + ".py", *BASE.get(script, "").split(), *words]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            flags.run(import_module(script).main)
        except SystemExit as exit:
            code = exit.code or 0
        except BaseException:
            code = traceback.print_exc() or 1
    return code, said.getvalue()


def ends_as_it_should(script, code, message):
    """Well, or with code 2 and a last line that begins with the script's name, or tyro's box."""
    last_line = message.strip().splitlines()[-1] if code else ""
    in_words = "full helptext" in message or f"{script.split('.')[-1]}.py: " in last_line
    return code == 0 or code == 2 and in_words


def main(count, seed=0):
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_files()
        for n in range(count):
            script, words = random_case(rng)
            code, message = end_of(script, words)
            if not ends_as_it_should(script, code, message):
                print(f"{n}: {script} {words!r:.200}\n{code}: {message[-3000:]}\n", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or [100]))
