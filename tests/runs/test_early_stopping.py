"""Early stopping from chapter 5's files: two trainings of two seeds on two prompts, by hand."""
import pytest

from experiments import early_stopping as es

READ = {  # seed, prompt -> gold after 0, 20 and 40 queries, read on other noise
    (7, "a"): (0.2, 0.9, 0.1), (7, "b"): (0.4, 0.6, 0.8),
    (8, "a"): (0.2, 0.3, 0.74), (8, "b"): (0.4, 0.5, 0.6)}
DRAWN = {  # seed, prompt -> path KL and gold of the pictures of rounds 1 to 4, ten queries each
    (7, "a"): ((0, 0.1), (1, 9.0), (2, 0.8), (60, 0.9)),  # beyond a bound of 50 at the end
    (7, "b"): ((0, 0.5), (1, 9.0), (70, 0.4), (3, 0.7)),  # and already after 20 queries
    (8, "a"): ((0, 0.1), (1, 9.0), (2, 0.2), (3, 0.3)),
    (8, "b"): ((0, 0.3), (1, 9.0), (2, 0.1), (3, 0.2))}


@pytest.fixture
def folder(tmp_path):
    read, drawn = ["seed,prompt,model,gold,kl,queries"], ["seed,prompt,model,queries,kl,gold"]
    for seed, prompt in READ:
        read.append(f"{seed},{prompt},best of 4,1.0,0.6,")
        for n, gold in enumerate(READ[seed, prompt]):
            read.append(f"{seed},{prompt},DPOK,{gold},9999,{20 * n}")  # a KL that no rule looks at
        for n, (kl, gold) in enumerate(DRAWN[seed, prompt]):
            drawn.append(f"{seed},{prompt},DPOK,{10 * n + 10},{kl},{gold}")
    (tmp_path / "readings.csv").write_text("\n".join(read))
    (tmp_path / "rounds.csv").write_text("\n".join(drawn))
    return tmp_path


def test_a_line_for_each_model_with_every_way_to_stop(folder, tmp_path):
    (line,) = es.main(["--comparison", str(folder), "--kl-bound", "50", "inf", "--out",
                       str(tmp_path / "out")])
    assert line == {  # each number the mean over prompts of seed 7, and of seed 8
        "model": "DPOK", "pretrained": "0.3", "pretrained: price": "0",
        "end": "0.6±0.1", "end: price": "40",  # 0.45, 0.67
        "hindsight": "0.76±0.09", "hindsight: price": "40",  # 0.85, 0.67
        "rule, 50 nats": "0.61±0.04",  # (0.9 + 0.4)/2, for b stops at once; (0.74 + 0.4)/2
        "rule, 50 nats: price": "58",  # (40 + 2·10, 20 + 10, twice 40 + 3·10)/4
        "rule, inf nats": "0.51±0.06", "rule, inf nats: price": "70"}  # 0.45, 0.57


@pytest.mark.parametrize("missing", ["readings.csv", "rounds.csv"])
def test_a_folder_without_chapter_5s_files_is_named(missing, folder):
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"--comparison .*no {missing}"):
        es.main(["--comparison", str(folder), "--out", str(folder / "out")])
    assert not (folder / "out").exists()
