"""Wrong answers, to prove the tests with, to recognize mistakes by, and to hunt."""
import ast
from dataclasses import dataclass
from pathlib import Path
import cut
from exercises import BY_FUNCTION, split
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutant:
    function: str
    old: str
    new: str
    words: str

    @property
    def graded(self):
        return self.function in BY_FUNCTION

    def text(self):
        module, name = split(self.function)
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        text = cut.function_text(source, name)
        assert text.count(self.old) == 1, (self.function, self.old, text.count(self.old))
        return text.replace(self.old, self.new)


MUTANTS = []
