"""Prompt sets of both papers and of the shape world, and prompts from a file."""
import pytest

from support.prompts import get_prompts
from tiny_sd import shapes


def test_ddpos_animals_and_activities():
    animals, activities = get_prompts("animals"), get_prompts("activities")
    assert len(set(animals)) == 45 and {"a cat", "an ant"} < set(animals)
    assert len(set(activities)) == 45 * 3
    assert {"a dog riding a bike", "an ant playing chess"} < set(activities)


def test_the_tasks_are_one_prompt_of_each_family():
    families = [shapes.family_of(shapes.parse(prompt)) for prompt in get_prompts("tasks")]
    assert families == list(shapes.FAMILIES)
    assert get_prompts("tasks_sd")[2] == "A cat and a dog" and len(get_prompts("tasks_sd")) == 5


@pytest.mark.parametrize("name", ["four stars", "cat ", "a" + " a" * 5000, "a cat. A dog"])
def test_one_prompt_as_it_is_written(name):
    assert get_prompts(name) == [name.strip()]


BOTH = ["a red, round cat", "a “bluë” star\u2028here"]


@pytest.mark.parametrize("name, text", [
    ("a.txt", "\ufeffa red, round cat\r\n\r\n  a “bluë” star\u2028here \n"),
    ("no suffix", "a red, round cat\na “bluë” star\u2028here"),
    ("a.json", '["a red, round cat", {"id": 3, "prompt": "a “bluë” star\u2028here"}]'),
    ("a.JSONL", '{"prompt": "a red, round cat"}\n\n"a “bluë” star\u2028here"\n'),
    ("a b.csv", '\ufeffid,prompt\r\n1,"a red, round cat"\r\n2,a “bluë” star\u2028here\r\n')])
def test_prompts_are_read_from_text_json_json_lines_and_csv(name, text, tmp_path, monkeypatch):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert get_prompts(str(tmp_path / name)) == BOTH
    monkeypatch.setenv("HOME", str(tmp_path))
    assert get_prompts(f"~/{name}") == BOTH


@pytest.mark.parametrize("name, text, problem", [
    ("a.txt", " \n\n", "no prompt in it"), ("a.txt", b"\x80\xff", "UTF-8"),
    ("a.tsv", "prompt\na cat\n", "ends in .txt, .json"),
    ("a.json", '{"prompt": "a cat"}', "no list"), ("a.json", '"a cat"', "no list"),
    ("a.json", "[" * 100000, "json"), ("a.json", "[1]", "entry 1"),
    ("a.json", '["a cat", {"text": "a dog"}]', "entry 2"), ("a.json", '[" "]', "entry 1"),
    ("a.jsonl", '"a cat"\na dog\n', "jsonl"), ("a.csv", "a cat\na dog\n", "entry 1"),
    ("a.csv", "id,prompt\n1\n", "entry 1"), ("a.csv", 'prompt\n"a cat\n', "csv"),
    ("a.csv", "prompt\n", "no prompt")])
def test_files_without_prompts_are_refused(name, text, problem, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"--prompts {tmp_path / name}: .*{problem}"):
        get_prompts(str(tmp_path / name))


@pytest.mark.parametrize("name", ["none", "none.txt", "my file.JSON", "my file.yaml", "a b.csv ",
                                  "./a b", "../a b", "/data/my prompts", "~/a b", "a folder"])
def test_what_looks_like_a_file_and_is_none_is_no_prompt(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a folder").mkdir()
    with pytest.raises(ValueError, match=f"--prompts {name}: no such file, and no prompt set"):
        get_prompts(name)
