"""Several processes: who computes what, and N of them train like one."""
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from support import parallel, runs
from tests.test_house import ROOT


@pytest.fixture
def process(monkeypatch):
    def become(rank, N):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(N))
    return become


@pytest.mark.parametrize("M, batch_size, N", [(10, 3, 1), (10, 3, 2), (128, 64, 2), (7, 64, 2),
                                              (5, 1, 3), (1, 64, 2), (0, 4, 2)])
def test_every_place_has_one_process_and_none_is_idle_without_need(M, batch_size, N, process):
    found, counts = [], []
    for rank in range(N):
        process(rank, N)
        batches = parallel.share(M, batch_size)
        found += [rows.tolist() for rows in batches]
        counts.append(sum(map(len, batches)))
    assert sorted(sum(found, [])) == list(range(M))
    assert max(map(len, found), default=0) <= batch_size
    assert max(counts) - min(counts) <= batch_size and (0 not in counts or M < N)


def test_one_process_sends_nothing_and_changes_nothing():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    parallel.total_gradients([p])
    assert p.grad.tolist() == [1, 1] and parallel.total_of({"a": 0.5}) == {"a": 0.5}
    assert parallel.same_text("β") == "β" and parallel.all_images([1, None], [0]) == [1, None]


def start(script, words, N):
    """A script in N processes with one thread each; the only one is started without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(N)] if N > 1 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *launcher, str(ROOT / script), *words], env=env,
                          capture_output=True, text=True, timeout=120)


TINY = ("--rounds 2 --num-steps 3 --samples-per-prompt 6 --prompts-per-round 2 --eval-samples 5 "
        "--batch-size 4 --train-batch-size 4 --film-pictures 3 --guidance-scale 1.5 --device cpu "
        "--prompts tasks").split()


SCRIPTS = [("04_dpok.py", "--lora-rank 4 --ratio per_dim")]
if "ALL_SCRIPTS" in os.environ:  # these take twenty seconds each
    SCRIPTS += [("03_ddpo.py", "--timestep-fraction 0.7"),
                ("experiments/sft.py", "--data fresh --beta 0.1")]


@pytest.mark.slow
@pytest.mark.parametrize("script, words", SCRIPTS)
def test_two_processes_make_the_updates_of_one(script, words, tmp_path):
    folders = []
    for N in (1, 2):
        ended = start(script, [*TINY, *words.split(), "--name", f"of_{N}", "--out", str(tmp_path)],
                      N)
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert ended.stdout.count("reward queries") == 1  # the first process alone prints
        folders.append(tmp_path / f"of_{N}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["of_1", "of_2"]
    ones, twos = (load_file(next(iter(sorted(folder.glob("**/unet/*.safetensors"))
                                      or sorted(folder.glob("*.safetensors")))))
                  for folder in folders)
    distance = sum((ones[name] - twos[name]).square().sum() for name in ones).sqrt()
    length = sum(value.square().sum() for value in ones.values()).sqrt()
    assert distance / length < 1e-5
    for one, two in zip(*(runs.read_rows(folder / "metrics.csv") for folder in folders)):
        for name in set(one) - {"seconds"}:
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-4), name
    files = [sorted(str(path.relative_to(folder)) for path in folder.glob("**/*.*"))
             for folder in folders]
    assert files[0] == files[1]


def test_a_process_that_fails_ends_all_with_its_error(tmp_path):
    (tmp_path / "my.py").write_text("import os\n\n\ndef bad(images, prompts):\n"
                                    "    if os.environ['RANK'] == '1':\n"
                                    "        raise RuntimeError('no light')\n"
                                    "    return [0.0] * len(images)\n", encoding="utf-8")
    ended = start("03_ddpo.py", [*TINY, "--reward", f"{tmp_path}/my.py:bad", "--out",
                                 str(tmp_path / "runs")], 2)
    assert ended.returncode != 0 and "no light" in ended.stderr and "my.py:6" in ended.stderr
