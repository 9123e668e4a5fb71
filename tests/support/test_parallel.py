"""Several processes: N of them train like one."""
import os
import socket
import subprocess
import sys
from functools import partial
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from support import models, runs
from tests import processes

TINY = ("--rounds 2 --num-steps 3 --samples-per-prompt 5 --prompts-per-round 1 --eval-samples 5 "
        "--batch-size 4 --train-batch-size 4 --film-pictures 3 --guidance-scale 1.5 --device cpu "
        "--prompts tasks --max-grad-norm 0.5").split()
SCRIPTS = {  # script -> its flags; each process has other pictures in each update
    "03_ddpo": "--timestep-fraction 0.7",
    "04_dpok": "--lora-rank 4 --ratio per_dim",
    "experiments.sft": "--data fresh --beta 0.1"}


def main(script, words, path):
    """A script's main, which keeps the gradient of the first update."""
    def keep(optimizer, arguments, settings):
        if not path.exists():
            groups = optimizer.param_groups
            torch.save([p.grad.flatten() for group in groups for p in group["params"]], path)
    register_optimizer_step_pre_hook(keep)
    import_module(script).main(words)


def distance(ones, twos):
    """‖a − b‖/‖a‖ of all numbers together."""
    one, two = torch.cat(list(ones)).double(), torch.cat(list(twos)).double()
    return ((one - two).norm() / one.norm()).item()


def weights_of(folder):
    path, = (path for path in folder.rglob("*.safetensors")
             if path.parent.name == "unet" or path.parent == folder)
    return [weight.flatten() for _, weight in sorted(load_file(path).items())]


@pytest.mark.parametrize("script", [
    "03_ddpo", pytest.param("04_dpok", marks=pytest.mark.slow),
    pytest.param("experiments.sft", marks=pytest.mark.slow)])
def test_two_processes_make_the_updates_of_one(script, tmp_path):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    found = []
    for N in (1, 2):
        words = [*TINY, *SCRIPTS[script].split(), "--name", f"of_{N}", "--out", str(tmp_path)]
        started = []
        for rank in range(N):
            name = f"{rank}_of_{N}"
            environment = {"WORLD_SIZE": str(N), "RANK": str(rank), "LOCAL_RANK": str(rank),
                           "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            started.append(processes.start(partial(main, script, words, tmp_path / name),
                                           tmp_path / f"{name}.log", environment=environment))
        for rank, process in enumerate(started):
            process.join(timeout=200)
            process.kill()  # where it waits for one that has failed
            printed = (tmp_path / f"{rank}_of_{N}.log").read_text(encoding="utf-8")
            assert process.exitcode == 0, printed
            assert printed.count("reward queries") == (rank == 0)  # the first alone prints
            found.append(torch.load(tmp_path / f"{rank}_of_{N}"))
    one, first, second = found
    assert distance(one, first) < 1e-5 and distance(first, second) == 0
    folders = tmp_path / "of_1", tmp_path / "of_2"
    assert distance(*map(weights_of, folders)) < 1e-3
    for name in ("metrics.csv", "pictures.csv"):
        for a, b in zip(*(runs.read_rows(folder / name) for folder in folders), strict=True):
            a.pop("seconds", None)
            assert {key: b[key] for key in a} == pytest.approx(a, rel=1e-3, abs=1e-4)
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in folders]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_process_that_fails_ends_all_with_its_error(tmp_path):
    (tmp_path / "my.py").write_text("import os\n\n\ndef bad(images, prompts):\n"
                                    "    if os.environ['RANK'] == '1':\n"
                                    "        raise RuntimeError('no light')\n"
                                    "    return [0.0] * len(images)\n", encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         str(models.HERE / "03_ddpo.py"), *TINY, "--reward", f"{tmp_path}/my.py:bad", "--out",
         str(tmp_path / "runs")], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert ended.returncode != 0 and "no light" in ended.stderr and "my.py" in ended.stderr
