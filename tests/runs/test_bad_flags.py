"""Command lines that nobody should type: each ends in one message, with exit code 2."""
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from support import flags

TRAIN = ("--rounds 1 --num-steps 2 --prompts-per-round 1 --samples-per-prompt 2 --eval-samples 2 "
         "--film-pictures 1 --reward compressibility")
BASE = {  # script -> flags with which it takes a moment; those of a case follow, and overrule them
    "01_mdp": "--num-steps 2",
    "02_rewards": "--num-steps 2 --samples 2 --show 2 --rewards compressibility",
    "03_ddpo": TRAIN,
    "04_dpok": TRAIN + " --gold incompressibility --lora-rank 1",
    "05_eval": ""}
CASES = [  # script, words, what the message must name
    ("01_mdp", "--nonsense 3", "--nonsense"), ("03_ddpo", "--rounds", "--rounds"),
    ("01_mdp", "--eta nan", "--eta"), ("01_mdp", "--num-steps 1000", "--num-steps 1000"),
    ("03_ddpo", "--samples-per-prompt 99999999999999999999", "--samples-per-prompt"),
    ("03_ddpo", "--learning-rate 1e300", "--learning-rate"),
    ("04_dpok", "--beta 1e300", "--beta"), ("03_ddpo", "--updates-per-round 3", "--updates"),
    ("01_mdp", "--device nonsense", "--device nonsense"),
    ("03_ddpo", "--prompts empty", "--prompts empty"), ("01_mdp", "--prompts 'a 🙂'", "'🙂'"),
    ("02_rewards", "--rewards alignment --prompts 'the the'", "'the the'"),
    ("03_ddpo", "--reward nonsense", "--reward nonsense"),
    ("04_dpok", "--gold nonsense", "--gold nonsense"),
    ("03_ddpo", "--reward missing.py:f", "missing.py"),
    ("03_ddpo", "--reward my.py:few", "1 numbers for 2"),
    ("02_rewards", "--rewards aesthetic --clip bytes", "--clip bytes"),
    ("03_ddpo", "--reward aesthetic --clip bytes", "--clip bytes"),
    ("04_dpok", "--reward aesthetic --clip bytes", "--clip bytes"),
    ("04_dpok", "--gold aesthetic --clip bytes", "--clip bytes"),
    ("02_rewards", "--rewards alignment,beauty", "--rewards beauty"),
    ("01_mdp", "--model folder", "--model folder"), ("01_mdp", "--model ''", "--model"),
    ("01_mdp", "--model nobody/nothing", "--model nobody/nothing"),
    ("01_mdp", "--out x.gif", "--out x.gif"), ("01_mdp", "--out empty/x.png", "empty"),
    ("03_ddpo", "--out empty", "empty"), ("03_ddpo", "--name ''", "--name"),
    ("01_mdp", "--out folder.png", "--out folder.png"), ("05_eval", "--out empty", "exists"),
    ("03_ddpo", "--resume folder", "folder/config.json: not the settings of a run"),
    ("04_dpok", "--lora-targets nonsense", "--lora-targets"),
    ("03_ddpo", "--samples-per-prompt 1 --estimator sf", "--samples-per-prompt"),
    ("04_dpok", "--samples-per-prompt 1", "--samples-per-prompt"),
    ("05_eval", "--runs nowhere", "--runs nowhere"), ("05_eval", "--gold nonsense", "--gold"),
    ("05_eval", "--prompts dogs", "05_eval.py: --prompts dogs")]
FOUND_LATE = "--learning-rate 1e300", "--beta 1e300", "--reward my.py:few"  # as it trains


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with the files that the words name; whatever else is written must be in runs/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for folder in ("folder", "folder.png", "runs/taken"):
        Path(folder).mkdir(parents=True)
    Path("empty").touch()
    Path("bytes").write_bytes(bytes(range(256)) * 4)
    Path("my.py").write_text("def few(images, prompts):\n    return [1]\n")
    Path("runs/taken/config.json").write_text("precious")
    files = set(tmp_path.iterdir())
    yield
    assert {path for path in tmp_path.iterdir() if path.name != "__pycache__"} == files
    assert Path("runs/taken/config.json").read_text() == "precious"


@pytest.mark.parametrize("script, words, named", CASES)
def test_a_bad_command_line_names_what_is_wrong_and_leaves_nothing(
        script, words, named, desk, monkeypatch, capsys):
    typed = [f"{script}.py", *BASE[script].split(), *shlex.split(words)]
    monkeypatch.setattr("sys.argv", typed)
    with pytest.raises(SystemExit) as error:
        flags.run(import_module(script).main)
    message = capsys.readouterr().err
    last_line = message.strip().splitlines()[-1]
    assert error.value.code == 2 and named in message
    assert "full helptext" in message or f"{script}.py: " in last_line  # tyro's box, or our line
    files = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert words in FOUND_LATE or files == [Path("runs/taken/config.json")]
