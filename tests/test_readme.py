"""What README.md tells readers to run: every script and path exists, and every flag is known."""
import re
import shlex
from dataclasses import fields
from importlib import import_module

import pytest

from support import flags
from tests.test_house import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PARTS = re.findall(r"```(\w*)\n(.*?)```|`([^`]+)`", TEXT, re.DOTALL)  # language, block, inline
BLOCKS = [block for language, block, _ in PARTS if language == "bash"]
INLINE = [" ".join(inline.split()) for _, _, inline in PARTS if inline]
LINES = [line.partition(" #")[0] for block in BLOCKS for line in block.splitlines()]
COMMANDS = [part.strip() for line in [*LINES, *INLINE] for part in line.split("&&")]
SCRIPTS = [command for command in dict.fromkeys(COMMANDS)
           if re.match(r"(python3?|torchrun) .*\.py\b", command)]


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_command_names_a_script_and_flags_that_are_there(command):
    script, words = re.search(r"(\S+\.py)(.*)", command).groups()
    assert (ROOT / script).is_file()
    module = import_module(script.removesuffix(".py").replace("/", "."))
    words = shlex.split(words.partition(" -- ")[0])
    if not hasattr(module, "Config"):  # its flags are another script's
        script = words.pop(0)
        module = import_module(script.removesuffix(".py").replace("/", "."))
    try:
        flags.parse(module.Config, "", words, getattr(module, "SD", None),
                    getattr(module, "QUICK", None))
    except SystemExit as exit:  # which is 0 after --help
        assert exit.code == 0


def test_flags_that_stand_alone_are_some_scripts_flags():
    known = {"--help", "--equations"}
    for script in ROOT.glob("0*.py"):
        known |= {flags.flag(field.name) for field in fields(import_module(script.stem).Config)}
    alone = " ".join(words for words in INLINE if words.startswith("--"))
    assert set(re.findall(r"--[a-z-]+", alone)) <= known


def test_paths_and_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    words = [word for words in INLINE for word in words.split()]
    paths = [word for word in words if re.fullmatch(r"[\w./]+(/|\.py|\.md|\.txt)", word)]
    for path in [*links, *paths]:
        places = (ROOT / path, ROOT / "experiments" / path)
        assert path.startswith("runs/") or any(place.exists() for place in places), path
