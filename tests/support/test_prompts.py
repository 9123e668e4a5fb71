"""Prompt sets of both papers and of the shape world, and prompts from a file."""
import pytest

from support import prompts
from tiny_sd import shapes


def test_ddpos_animals_and_activities():
    animals = prompts.get_prompts("animals")
    assert len(animals) == len(set(animals)) == 45
    assert {"a cat", "an ant"} < set(animals)
    activities = prompts.get_prompts("activities")
    assert len(activities) == 45 * 3
    assert {"a dog riding a bike", "an ant playing chess"} < set(activities)


def test_the_tasks_are_one_of_each_family_and_never_what_is_unseen():
    tasks = prompts.families("tasks")
    assert [trained for trained, _ in tasks.values()] == [[p] for p in prompts.get_prompts("tasks")]
    for family, (trained, unseen) in tasks.items():
        assert all(shapes.family_of(shapes.parse(p)) == family for p in trained + unseen)
        assert not set(trained) & set(unseen) and set(trained) <= set(prompts.get_prompts(family))
    papers = prompts.families("tasks_sd")
    assert papers["composition"] == (["A cat and a dog"], ["A cat and a cup"])
    assert [trained for trained, _ in papers.values()] == [
        [p] for p in prompts.get_prompts("tasks_sd")]


def test_one_prompt_as_it_is_written():
    assert prompts.get_prompts("four stars") == ["four stars"]
    assert prompts.get_prompts("cat ") == ["cat"]
    assert prompts.get_prompts("a" + " a" * 5000) == ["a" + " a" * 5000]  # longer than any path
    assert prompts.families("four stars") == {"four stars": (["four stars"], [])}
    seen, unseen = prompts.families("count")["count"]
    assert seen == prompts.get_prompts("count") and not set(seen) & set(unseen) and unseen


def test_the_lines_of_a_file_and_files_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--prompts none.txt: no such file"):
        prompts.get_prompts("none.txt")
    file = tmp_path / "my prompts.txt"
    file.write_bytes("\ufeffa red circle\r\n\r\n  a bluë star \n".encode())
    assert prompts.get_prompts(str(file)) == ["a red circle", "a bluë star"]
    for content, problem in ((b" \n\n", "has no prompt"), (bytes(range(128, 256)), "UTF-8")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"--prompts {file}: .*{problem}"):
            prompts.get_prompts(str(file))
