"""Prompt sets of both papers and of the shape world, and prompts from a file."""
import pytest

from support import prompts
from tiny_sd import shapes


def test_ddpos_animals_and_activities():
    animals = prompts.get_prompts("animals")
    assert len(animals) == len(set(animals)) == 45
    assert animals[:3] == ["a cat", "a dog", "a horse"] and "an ant" in animals
    activities = prompts.get_prompts("activities")
    assert len(activities) == 45 * 3 and "a dog riding a bike" in activities
    assert {"a cat washing the dishes", "an ant playing chess"} <= set(activities)


def test_dpoks_tasks():
    assert prompts.get_prompts("tasks_sd") == [
        "A green colored rabbit", "Four wolves in the park", "A cat and a dog",
        "A dog on the moon", "Four roses"]
    unseen = [unseen for _, unseen in prompts.families("tasks_sd").values()]
    assert unseen == [["A green colored cat"], ["Four birds in the park"], ["A cat and a cup"],
                      ["A lion on the moon"], []]


def test_the_tasks_of_the_tiny_world_are_one_of_each_family():
    tasks = prompts.families("tasks")
    assert [trained for trained, _ in tasks.values()] == [[p] for p in prompts.get_prompts("tasks")]
    for family, (trained, unseen) in tasks.items():
        assert all(shapes.family_of(shapes.parse(p)) == family for p in trained + unseen)
        assert not set(trained) & set(unseen) and set(trained) <= set(prompts.get_prompts(family))


def test_one_prompt_as_it_is_written(tmp_path):
    assert prompts.get_prompts("four stars") == ["four stars"]
    assert prompts.get_prompts("cat ") == ["cat"]
    assert prompts.get_prompts("a " * 5000) == [("a " * 5000).strip()]  # longer than any path
    assert prompts.families("four stars") == {"four stars": (["four stars"], [])}


def test_the_lines_of_a_file(tmp_path):
    file = tmp_path / "my prompts.txt"
    file.write_bytes("\ufeffa red circle\r\n\r\n  a bluë star \n".encode())
    assert prompts.get_prompts(str(file)) == ["a red circle", "a bluë star"]


@pytest.mark.parametrize("content, message", [
    (None, "no such file, and no prompt set; those are color, count"), (b" \n\n", "has no prompt"),
    (bytes(range(128, 256)), "UTF-8")])
def test_files_that_are_refused(content, message, tmp_path):
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        prompts.get_prompts(str(file))
    assert f"--prompts {file}" in str(error.value)
