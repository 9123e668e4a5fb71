"""Over 300 command lines that nobody should type: they end well, or in one message and code 2.

Most are written by hand, with what the message must name. The rest is drawn from a fixed seed: two
flags of a script's Config, with a value that is wrong in type, range, kind of file, or letters.
"""
import copy
import json
import random

import shlex
import shutil
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import matplotlib.figure
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from support import commands, flags, models
from tests import nasty_rewards

NAMES = {"01": "01_mdp", "02": "02_rewards", "03": "03_ddpo", "04": "04_dpok", "05": "05_eval"}
SCRIPTS = {number: import_module(name) for number, name in NAMES.items()}
TRAIN = ("--rounds 1 --num-steps 2 --prompts-per-round 1 --samples-per-prompt 2 --eval-samples 2 "
         "--film-pictures 1 --reward compressibility ")
BASE = {  # script -> flags with which it takes a moment; those of a case follow, and overrule them
    "01": "--num-steps 2 --prompts 'a red circle' ",
    "02": "--num-steps 2 --prompts 'a red circle' --samples 2 --show 2 --rewards compressibility ",
    "03": TRAIN,
    "04": TRAIN + "--gold incompressibility --lora-rank 1 --lora-targets to_q ",
    "05": "--num-steps 2 --samples 2 --runs good_run --others incompressibility --vlm judge "
          "--reward compressibility --gold incompressibility "}
WELL, ANY = None, "any"  # instead of what a message must name: it ends well; one of its words

BY_HAND = [  # script, words, what the message must name
    # No such flag, no such value, nothing where something must be.
    ("01", "--nonsense 3", "--nonsense"), ("02", "stray", "stray"), ("03", "--rounds", "--rounds"),
    ("04", "--beta", "--beta"), ("05", "--votes", WELL), ("01", "--prompts", "--prompts"),
    ("02", "--rewards", "--rewards"), ("03", "--eta ''", "--eta"),
    ("03", "--estimator reinforce", "--estimator"), ("04", "--ratio ''", "--ratio"),
    ("03", "--no-sd", WELL), ("02", "--sd yes", "yes"), ("01", "--=", "--="), ("01", "''", WELL),
    ("04", "--value 3", "3"), ("03", "--dtype float8", "--dtype"), ("02", "--help", WELL),
    # Numbers that are none, or too small, or too large for a machine.
    ("01", "--num-steps 0", "--num-steps"), ("01", "--num-steps 1000000", "--num-steps"),
    ("01", "--num-steps 2.5", "--num-steps"), ("01", "--eta nan", "--eta"),
    ("01", "--eta 0", "--eta"), ("01", "--eta 1e-320", WELL), ("01", "--seed -1", "--seed"),
    ("01", "--seed 99999999999", "--seed"), ("01", "--guidance-scale inf", "--guidance-scale"),
    ("01", "--guidance-scale 1e300", "--guidance-scale"), ("01", "--batch-size 0", "--batch-size"),
    ("01", "--batch-size 99999999999999999999", "--batch-size"),
    ("01", "--num-steps 0x2", "--num-steps"), ("01", "--num-steps ٢", WELL),
    ("02", "--samples 99999999999999999999", "--samples"), ("02", "--show 0", "--show"),
    ("02", "--show 99999999999999999999", "--show"), ("02", "--bert-layer 99", WELL),
    ("02", "--rewards vlm_alignment --vlm judge --bert-layer 99", "--bert-layer"),
    ("03", "--rounds 1e3", "--rounds"), ("03", "--eval-samples 1", "--eval-samples"),
    ("03", "--eval-samples 99999999999999999999", "--eval-samples"),
    ("03", "--samples-per-prompt 99999999999999999999", "--samples-per-prompt"),
    ("03", "--prompts-per-round 9999999999999", "--prompts-per-round"),
    ("03", "--film-pictures 99999999999999999999", "--film-pictures"),
    ("03", "--updates-per-round 3", "--updates-per-round"),
    ("03", "--clip-range 1", "--clip-range"),
    ("03", "--learning-rate inf", "--learning-rate"),
    ("03", "--weight-decay nan", "--weight-decay"),
    ("03", "--learning-rate 1e300", "--learning-rate"), ("03", "--max-grad-norm inf", WELL),
    ("03", "--max-grad-norm 1e-300", "--max-grad-norm"),
    ("03", "--advantage-clip inf --keep-every 9", WELL),
    ("03", "--timestep-fraction 0", "--timestep-fraction"),
    ("03", "--timestep-fraction 1e-9", WELL), ("03", "--lora-rank 9999999999", "--lora-rank"),
    ("03", "--lora-rank 2.0", "--lora-rank"), ("03", "--train-batch-size 999999999999999999999",
                                                "--train-batch-size"),
    ("04", "--alpha 1e300", "--alpha"), ("04", "--beta 1e300", "--beta"),
    ("04", "--alpha -inf", "--alpha"), ("04", "--value-rounds 0", "--value-rounds"),
    ("04", "--value-rounds 999999999999999999999", "--value-rounds"),
    ("05", "--samples 0", "--samples"), ("05", "--seeds 0", "--seeds"),
    ("05", "--jobs -1", "--jobs"),
    ("05", "--best-of 0", "--best-of"), ("05", "--rounds nan", "--rounds"),
    # Devices.
    ("01", "--device =", "--device ="), ("02", "--device ''", "--device"),
    ("03", "--device cuda:99", "--device cuda:99"), ("04", "--device meta", "--device meta"),
    ("04", "--device =", "--device ="), ("01", "--device meta", "--device meta"),
    ("03", "--device meta", "--device meta"), ("05", "--device meta", "--device meta"),
    ("05", "--device =", "--device ="), ("02", "--device mps:7", "--device mps:7"),
    ("04", "--reward aesthetic --device meta", "--device meta"), ("01", "--device 0", "--device 0"),
    ("01", "--device privateuseone", "--device privateuseone"), ("01", "--device cpu:1", WELL),
    ("02", "--rewards aesthetic --device =", "--device ="), ("03", "--device ü", "--device ü"),
    ("01", "--dtype float16", WELL), ("03", "--dtype bfloat16 --checkpointing", WELL),
    # Prompts.
    ("03", "--prompts files/empty.txt", "files/empty.txt"),
    ("03", "--prompts files/blank.txt", "files/blank.txt"), ("03", "--prompts files", "files"),
    ("03", "--prompts files/bytes", "files/bytes"), ("03", "--prompts ''", "--prompts"),
    ("03", "--prompts files/utf16.txt", "files/utf16.txt"),
    ("03", "--prompts files/huge.txt", WELL),
    ("03", "--prompts files/line.txt", "--prompts"), ("03", "--prompts files/nul.txt", "--prompts"),
    ("03", "--prompts files/cats.txt", "'cat'"), ("04", "--prompts '   '", WELL),
    ("01", "--prompts ''", WELL), ("01", "--prompts \udcff", "udcff"),
    ("01", "--prompts 'a 🙂' 日本", "'🙂'"), ("02", "--prompts '\n'", WELL),
    ("03", f"--prompts {'red' * 2000}", "--prompts"), ("05", "--prompts files", "files"),
    ("05", "--prompts files/cats.txt --samples 8", "'cat'"),
    ("05", "--prompts 'a red circle'", WELL),
    ("02", "--rewards alignment --prompts 'the the the'", "'the the the'"),
    ("03", "--reward alignment --prompts 'red on left'", "red on left"),
    # Rewards: no such name, no such file, a file that does not run.
    ("02", "--rewards ''", "--rewards"), ("02", "--rewards all,all", "--rewards all"),
    ("02", "--rewards compressibility compressibility", WELL),
    ("03", "--reward =", "--reward ="),
    ("03", "--reward compressibility=nan", "compressibility=nan"),
    ("03", "--reward compressibility=1e308,incompressibility=1e308", WELL),
    ("03", "--reward =1", "--reward =1"), ("03", "--reward compressibility=1,", "--reward"),
    ("03", "--reward .py:f", "--reward .py:f"), ("03", "--reward none.py:f", "none.py"),
    ("03", "--reward files:f", "--reward files:f"),
    ("03", "--reward syntax.py:f", "line 2"),
    ("03", "--reward raises.py:f", "line 2"), ("03", "--reward exits.py:f", "line 2"),
    ("03", "--reward bytes.py:f", "bytes.py"), ("03", "--reward folder.py:f", "folder.py"),
    ("03", "--reward r.py:", "--reward r.py:"), ("03", "--reward r.py:nothing", "r.py:nothing"),
    ("03", "--reward r.py:not_a_function", "no function"),
    ("04", "--gold r.py:boom:boom", "--gold"), ("05", "--others r.py:nothing", "--others"),
    # Rewards: a file's function that raises, or gives what is no number for each picture.
    ("03", "--reward r.py:stops", "stopped"), ("04", "--gold r.py:leaves", "r.py:"),
    ("02", "--rewards r.py:quits", "r.py:"), ("02", "--rewards r.py:boom=1", "r.py:"),
    ("05", "--gold r.py:boom", "r.py:"), ("03", "--reward r.py:large", WELL),
    *[("03", f"--reward r.py:{name}", "r.py:") for name in (
        "boom", "lines", "key", "leaves", "quits", "deep", "memory", "broken_generator",
        "one_argument", "no_argument", "NeedsMore", "clears")],
    *[("02", f"--rewards r.py:{name}", f"r.py:{name}") for name in (
        "nan", "none", "nones", "few", "many", "empty", "words", "one_number", "scalar", "nested",
        "meta", "matrix", "complex_list", "complex_tensor", "huge_whole", "infinite", "pictures",
        "hostile", "endless")],
    *[("02", f"--rewards r.py:{name}", WELL) for name in (
        "digits", "generator", "column", "truths", "needs_grad", "closes", "spoils",
        "other_modes")],
    # Models.
    ("01", "--model files", "--model files"), ("01", "--model files/bytes", "--model files/bytes"),
    ("01", "--model ''", "--model"), ("01", "--model ../..", "--model ../.."),
    ("01", "--model nobody/nothing", "--model nobody/nothing"), ("03", "--model .", "--model ."),
    ("01", "--model 'models/of mine'", WELL), ("01", "--model models/broken", "models/broken"),
    ("01", "--model models/list", "models/list"),
    ("01", "--model models/no_unet", "models/no_unet"),
    ("01", "--model models/bytes", "models/bytes"), ("01", "--model models/evil", "models/evil"),
    ("01", "--model models/zero", "models/zero"), ("01", "--model a/b/c/d", "--model a/b/c/d"),
    ("01", f"--model {'m' * 5000}", "mmm"), ("03", "--model models/unet", "models/unet"),
    ("01", "--model runs_of/no_config", "runs_of/no_config"), ("01", "--model good_run", WELL),
    ("01", "--model runs_of/itself", "runs_of/itself"), ("01", "--model \udcff", "udcff"),
    ("01", "--model runs_of/bytes", "runs_of/bytes"),
    ("01", "--model runs_of/list", "runs_of/list"),
    # Folders and files of results.
    ("01", "--out files/empty.txt/x.png", "files/empty.txt"), ("01", "--out x.gif", "--out x.gif"),
    ("01", "--out ''", "--out"), ("02", "--out folder.png", "folder.png"),
    ("01", "--out .png", "--out"),
    ("03", "--out files/empty.txt", "files/empty.txt"),
    ("03", "--out files/empty.txt/runs", "files/empty.txt"), ("03", "--name ../../x", WELL),
    ("03", "--name ..", "--name .."), ("03", "--name .", "--name ."),
    ("03", "--name ''", "--name is"),
    ("03", "--resume ''", "--resume is"), ("03", "--plan --device nonsense", "--device nonsense"),
    ("03", f"--name {'n' * 5000}", WELL), ("03", f"--name {'🙂日' * 500}", WELL),
    ("04", "--name \udcff", "udcff"), ("03", f"--out {'o' * 5000}", "ooo"),
    ("05", "--out files/empty.txt", "files/empty.txt"),
    # Adapters.
    ("04", "--lora-targets nonsense", "--lora-targets"), ("04", "--lora-targets", "--lora-targets"),
    ("04", "--lora-targets ''", "--lora-targets"), ("04", "--lora-targets norm1", "--lora-targets"),
    ("04", "--lora-targets '*'", "--lora-targets"), ("04", "--lora-targets to_q to_q", WELL),
    ("04", "--lora-targets mid_block", "--lora-targets"),
    # Weights of rewards.
    *[("02", f"--rewards {reward} {flag} {file}", f"{flag} {file}") for reward, flag in (
        ("aesthetic", "--aesthetic-weights"), ("image_reward", "--image-reward-weights"))
      for file in ("files/bytes", "weights/text.safetensors", "weights/text.pt", "weights/list.pt",
                   "weights/numbers.pt", "weights/empty.safetensors", "weights/words.pt", "files",
                   "nothing", "no/bo/dy.pt")],
    ("02", "--rewards aesthetic --aesthetic-weights weights/nan.safetensors", "aesthetic"),
    ("02", "--rewards aesthetic --clip models/unet", "--clip models/unet"),
    ("02", "--rewards aesthetic --clip files/bytes", "--clip files/bytes"),
    ("02", "--rewards aesthetic --clip tiny_sd/vlm", "--clip"),
    ("02", "--rewards vlm_alignment --vlm files", "--vlm files"),
    ("02", "--rewards vlm_alignment --vlm tiny_sd/clip", "--vlm tiny_sd/clip"),
    ("02", "--rewards vlm_alignment --vlm ''", "--vlm"),
    ("02", "--rewards vlm_alignment --vlm judge --bert tiny_sd/vae", "--bert tiny_sd/vae"),
    ("02", "--rewards vlm_alignment --vlm judge --bert tiny_sd/clip", "--bert tiny_sd/clip"),
    ("02", "--rewards vlm_alignment --vlm judge --bert files/bytes", "--bert files/bytes"),
    *[("02", f"--rewards vlm_strict --vlm judge --vlm-questions {file}", f"--vlm-questions {file}")
      for file in ("files", "files/bytes", "json/broken.json", "json/list.json", "json/deep.json",
                   "json/pairs.json", "json/other.json", "json/nothing.json")],
    ("02", "--rewards vlm_strict --vlm judge --vlm-questions ''", "--vlm-questions"),
    # Chapter 5's run folders and votes.
    *[("05", f"--runs runs_of/{name}", f"runs_of/{name}") for name in (
        "no_config", "bytes", "list", "other", "itself", "no_weights", "bad_weights", "words",
        "no_evaluation", "half")],
    ("05", "--runs files/bytes", "files/bytes"), ("05", "--runs good_run good_run", "twice"),
    ("05", "--runs ''", "--runs"), ("05", "--runs good_run --ballot", "--ballot"),
    *[("05", f"--votes json/{name}.json --out ballots/good", f"json/{name}.json") for name in (
        "broken", "list", "deep", "nothing", "pairs", "form", "null")],
    ("05", "--votes files/bytes --out ballots/good", "files/bytes"),
    ("05", "--votes files --out ballots/good", "files"),
    ("05", "--votes x --out nowhere", "nowhere"),
    ("05", "--votes json/good.json --out ballots/good", WELL),
    *[("05", f"--votes json/good.json --out ballots/{name}", f"ballots/{name}") for name in (
        "broken", "list", "empty", "half")],
]

NASTY = {  # kind of field -> words behind its flag
    "int": ["0", "-1", "1", "3", "2.5", "nan", "inf", "1e3", "''", "x", "None", "٣", "0x2", "1_0",
            "99999999999999999999", "-99999999999999999999", "1 2", ""],
    "float": ["0", "-1", "1", "0.5", "nan", "inf", "-inf", "1e-300", "1e300", "-0.0", "1,5", "''",
              "x", "None", "1e999", "1 2", ""],
    "bool": ["", "yes", "0", "''", "None"],
    "Literal": ["", "''", "x", "EXACT", "0", "None", "float16", "sf", "per_dim", "running"],
    "str": ["''", "' '", "=", "-", "--", "..", "/", "~", "*", "None", "files", "files/bytes",
            "r.py:boom", "r.py:nan", "r.py:generator", "files/empty.txt", "models/list",
            "json/list.json",
            "weights/list.pt", "runs_of/list", "'a red circle'", "'日本 🙂'", "'%s{0}$HOME'",
            "nobody/nothing", "x" * 999, "compressibility=1,alignment=-1e3", "a b", ""],
}
# These would start trainings, write elsewhere, or name what is not on the command line.
NEVER = {"quick", "votes", "ballot", "runs", "out", "sd"}


def random_cases(count, seed=0):
    """Two flags each, with a value of their kind or, one time in four, of any other kind."""
    rng, cases = random.Random(seed), []
    for i in range(count):
        script, words = rng.choice([*list(NAMES)[:4] * 2, "05"]), []  # the last takes longest
        allowed = [field for field in fields(SCRIPTS[script].Config) if field.name not in NEVER]
        for field in rng.sample(allowed, 2):
            kinds = [kind for kind in NASTY if kind in str(field.type)] or ["str"]
            kind = rng.choice(list(NASTY)) if rng.random() < 0.25 else kinds[0]
            words += [flags.flag(field.name), rng.choice(NASTY[kind])]
        cases.append((script, " ".join(words), ANY))
    return cases


def build_desk():
    """All the files that the cases name, in the present folder."""
    shutil.copy(nasty_rewards.__file__, "r.py")
    for folder in ("files", "json", "weights", "models", "runs_of", "ballots", "folder.png",
                   "folder.py"):
        Path(folder).mkdir()
    texts = {
        "syntax.py": "x = 1\ndef f(:\n", "raises.py": "\nf = 1 / 0\n",
        "exits.py": "import sys\nsys.exit(3)\n", "files/empty.txt": "",
        "files/blank.txt": "\n \n\t\n",
        "files/huge.txt": "a red circle\n" * 100000, "files/line.txt": "red " * 2000,
        "files/nul.txt": "a red\0circle\n", "files/cats.txt": "a red circle\na purple cat\n",
        "json/broken.json": "{", "json/list.json": "[]", "json/deep.json": "[" * 100000,
        "json/null.json": "null", "json/pairs.json": '{"a red circle": [["only one"]]}',
        "json/other.json": '{"a dog": [["how many?", "one"]]}', "json/nothing.json": "",
        "json/form.json": '{"ballot": 3, "rater": 4, "votes": [{"pair": [], "alignment": {}}]}'}
    for name, text in texts.items():
        Path(name).write_text(text, encoding="utf-8")
    Path("files/utf16.txt").write_text("a red circle\n", encoding="utf-16")
    for name in ("files/bytes", "bytes.py", "weights/text.pt", "weights/text.safetensors"):
        Path(name).write_bytes(bytes(range(256)) * 4)
    build_weights()
    build_models()
    build_runs()
    build_ballots()


def build_weights():
    save_file({}, "weights/empty.safetensors")
    torch.save([1, 2], "weights/list.pt")
    torch.save({1: torch.zeros(2)}, "weights/numbers.pt")
    torch.save({"layers.0.weight": "word"}, "weights/words.pt")
    good = load_file(models.HERE / "tiny_sd/aesthetic.safetensors")
    save_file({key: value * torch.nan for key, value in good.items()}, "weights/nan.safetensors")


def build_models():
    source = models.HERE / "tiny_sd"
    for name in ("of mine", "broken", "list", "no_unet", "bytes", "evil", "zero"):
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            shutil.copytree(source / part, Path("models", name, part))
        shutil.copy(source / "model_index.json", Path("models", name))
    shutil.copytree(source / "unet", "models/unet")
    weights = "unet/diffusion_pytorch_model.safetensors"
    Path("models/broken/unet/config.json").write_text("{")
    Path("models/list/model_index.json").write_text("[]")
    Path("models/no_unet", weights).unlink()
    Path("models/bytes", weights).write_bytes(bytes(range(256)))
    index = json.loads(Path("models/evil/model_index.json").read_text())
    index["unet"] = ["os", "system"]
    Path("models/evil/model_index.json").write_text(json.dumps(index))
    config = json.loads(Path("models/zero/scheduler/scheduler_config.json").read_text())
    config["num_train_timesteps"] = 0
    Path("models/zero/scheduler/scheduler_config.json").write_text(json.dumps(config))


def build_runs():
    words = shlex.split(BASE["03"]) + ["--lora-rank", "1", "--out", ".", "--name", "good_run"]
    SCRIPTS["03"].main(words)
    config = json.loads(Path("good_run/config.json").read_text())
    changes = {  # run -> file -> its text; None: no such file
        "no_config": {"config.json": None}, "bytes": {"config.json": "\0\1\2"},
        "list": {"config.json": "[]"}, "other": {"config.json": '{"model": "tiny_sd"}'},
        "itself": {"config.json": json.dumps(config | {"model": "runs_of/itself"})},
        "no_weights": {models.ADAPTER: None}, "bad_weights": {models.ADAPTER: "none"},
        "words": {"metrics.csv": "round,queries,reward\n1,two,3\n"},
        "no_evaluation": {"evaluation.json": None},
        "half": {"metrics.csv": "round,queries,reward\n1\n"}}
    for name, files in changes.items():
        shutil.copytree("good_run", Path("runs_of", name))
        for file, text in files.items():
            path = Path("runs_of", name, file)
            path.unlink()
            if text is not None:
                path.write_text(text)


def build_ballots():
    pairs = [{"prompt": "a star", "left": "a"}, {"prompt": "a circle", "left": "b"}]
    key = {"ballot": "id", "pairs": pairs, "a": "a", "b": "b"}
    texts = {"good": json.dumps(key), "broken": "{", "list": "[]", "half": '{"ballot": "id"}',
             "empty": json.dumps(key | {"pairs": []})}
    for name, text in texts.items():
        Path("ballots", name).mkdir()
        Path("ballots", name, "ballot_key.json").write_text(text)
    Path("ballots/good/votes.md").touch()  # which counting overwrites
    votes = [{"pair": i, "alignment": "left", "quality": "tie"} for i in range(2)]
    form = {"ballot": "id", "rater": "Ann", "votes": votes}
    Path("json/good.json").write_text(json.dumps(form))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with all that the cases name: built once, and left as it was by every case."""
    folder = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build_desk()
    return folder


LOADED = []  # the tiny model, once a case has needed it


@pytest.fixture
def quick(desk, monkeypatch):
    """What takes long is done once or not at all: loading the tiny model, drawing figures."""
    def read_pipeline(source):
        if source != models.HERE / "tiny_sd":
            return read(source)
        if not LOADED:
            LOADED.append(read(source))
        return copy.deepcopy(LOADED[0])

    def no_training(*arguments):
        raise AssertionError(f"a training was started: {arguments}")

    read = models.read_pipeline
    monkeypatch.setattr(models, "read_pipeline", read_pipeline)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig",
                        lambda figure, path, **options: Image.new("RGB", (400, 300)).save(path))
    for name in ("start", "start_logged"):
        monkeypatch.setattr(commands, name, no_training)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.path", sys.path[:])
    monkeypatch.chdir(desk)


def names_in(folder):
    names = {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}
    return {name for name in names if "__pycache__" not in name}


def end_of(script, argv, monkeypatch):
    """The exit code of the script, as a shell would see it."""
    monkeypatch.setattr("sys.argv", [f"{NAMES[script]}.py", *argv])
    try:
        flags.run(lambda: SCRIPTS[script].main(argv))
    except SystemExit as exit:
        return exit.code or 0
    except KeyboardInterrupt:  # which would end all tests
        return "a traceback"
    return 0


@pytest.mark.parametrize("script, words, named", [*BY_HAND, *random_cases(20)])
def test_a_command_line_ends_well_or_in_one_message(script, words, named, quick, desk, capsys,
                                                    monkeypatch):
    words = shlex.split(words)
    files = names_in(desk)
    try:
        code = end_of(script, [*shlex.split(BASE[script]), *words], monkeypatch)
        new = names_in(desk) - files
    finally:
        shutil.rmtree("runs", ignore_errors=True)
    message = capsys.readouterr().err
    of_a_reward = " failed:\nTraceback (most recent call last):\n" in message
    assert of_a_reward or "Traceback" not in message
    assert {name for name in new if Path(name).parts[0] != "runs"} == set()
    if code == 0:
        assert named in (WELL, ANY)
        return
    assert code == (130 if named == "stopped" else 2), message
    of_tyro = "For full helptext" in message  # a box, else one line
    last = message.partition(" failed:\nTraceback")[0].splitlines()[-1]
    assert of_tyro or last.startswith(f"{NAMES[script]}.py: ")
    if named == ANY:
        assert of_tyro or any(word in message for word in words if word.strip())
    else:
        assert named is not WELL and named in message
