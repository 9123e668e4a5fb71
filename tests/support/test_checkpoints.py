"""Checkpoints: what is kept of a thing, files that are whole or not there, and a kill anywhere."""
import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from support import checkpoints, figures, flags, models, runs, training


class Killed(BaseException):
    """Nothing in the code catches this: as little is done after it as after a SIGKILL."""


@dataclass(frozen=True)
class Config:
    out: str
    name: str | None = "toy"
    reward: str = "compressibility"
    prompts: str = "color"
    rounds: int = 4
    prompts_per_round: int = 1
    samples_per_prompt: int = 2
    keep_every: int = 2
    learning_rate: float = 0.1
    device: str | None = None
    resume: str | None = None


@dataclass
class Pictures:
    x: list = field(default_factory=list)
    total: torch.Tensor = torch.zeros(())


class Owner:
    """Like chapter 4's Value: a network, its optimizer, tuples of tensors, and what is given."""

    def __init__(self, config, seed):
        torch.manual_seed(seed)
        self.net = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.1 * seed)
        self.config, self.device = config, torch.device("cpu")
        self.rounds = []
        self.mean, self.std = torch.zeros(2)
        self.count, self.note = seed, None
        self.pictures = Pictures()

    def step(self, seed):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        self.net(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rounds = [*self.rounds, (x[:, ::2], x.double())][-2:]
        self.mean = x.mean()
        self.count += 1
        self.pictures.x += x.bfloat16()  # rows that share their memory
        self.pictures.total = self.pictures.total + 1


def bits(thing):
    """A thing with each tensor as its bytes, so that == compares all of it."""
    if isinstance(thing, torch.Tensor):
        values = thing.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        return str(thing.dtype), tuple(thing.shape), values
    if isinstance(thing, dict):
        return {key: bits(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(bits(part) for part in thing)
    return thing


def contents(owner):
    return bits([checkpoints.state_of(owner), owner.rounds, owner.pictures.x])


def test_what_is_restored_is_the_same_and_in_the_same_places(tmp_path):
    owner = Owner(Config("x"), 1)
    history = {"a prompt": [0.1, float("nan"), float("-inf")], "é": [], 3: (True, None, "1")}
    for seed in range(3):
        owner.step(seed)
    checkpoints.write(tmp_path, [owner, history, "pipe"], {"round": 3})
    state, notes = checkpoints.read_newest(tmp_path)
    other, table = Owner(Config("y"), 2), {"gone": 1}
    net, weight, optimizer = other.net, other.net.weight, other.optimizer
    for thing, its in zip((other, table, "pipe"), state, strict=True):
        checkpoints.restore(thing, its)
    assert notes == {"round": 3} and repr(table) == repr(history)
    assert contents(other) == contents(owner) and other.config.out == "y"
    assert other.net is net and net.weight is weight and other.optimizer is optimizer
    assert optimizer.param_groups[0]["params"][0] is weight
    for both in (owner, other):
        both.step(4)
    assert contents(other) == contents(owner)


def test_of_a_pipeline_only_what_is_trained_is_kept(tmp_path):
    pipe = models.load_pipeline("tiny_sd", "cpu")
    config = SimpleNamespace(lora_rank=2, lora_targets=("to_q",), seed=0, checkpointing=False)
    params = models.trainable(pipe, config)
    for parameter in params:
        parameter.data += 1
    state = checkpoints.state_of(pipe)
    assert [p is q for p, q in zip(state.values(), params, strict=True)] == [True] * len(params)
    assert all("lora_" in name for name in state)
    kept = {name: p.detach().clone() for name, p in state.items()}
    for parameter in params:
        parameter.data -= 1
    checkpoints.restore(pipe, kept)
    assert bits(checkpoints.state_of(pipe)) == bits(kept)
    del kept[next(iter(kept))]
    with pytest.raises(ValueError, match="another network"):
        checkpoints.restore(pipe, kept)


def test_no_changed_byte_is_taken_for_whole(tmp_path):
    """Either it is noticed, or it changes nothing: some bytes of the header are only spaces."""
    wanted = [{"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.ones(2, 1)}]
    checkpoints.write(tmp_path, wanted, {"round": 1, "seconds": 0.5})
    path, = checkpoints.files(tmp_path)
    whole, noticed = path.read_bytes(), 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            state, notes = checkpoints.read(path)
        except ValueError as error:
            assert f"{path} was cut short or changed" in str(error)
            noticed += 1
        else:
            assert (bits(state), notes) == (bits(wanted), {"round": 1, "seconds": 0.5})
    assert noticed > 0.8 * len(whole)
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut short"):
            checkpoints.read(path)


def test_two_are_kept_and_a_broken_one_falls_back(tmp_path, capsys):
    assert checkpoints.read_newest(tmp_path) is None
    for n in (8, 9, 10, 10000):
        checkpoints.write(tmp_path, [n], {"round": n})
    older, newer = checkpoints.files(tmp_path)
    assert (older.name, newer.name) == ("round-0010.safetensors", "round-10000.safetensors")
    (older.parent / "round-10001.safetensors.part").write_bytes(b"half")
    assert checkpoints.read_newest(tmp_path) == ([10000], {"round": 10000})
    assert capsys.readouterr().out == ""
    newer.write_bytes(newer.read_bytes()[:-1] + b"x")
    assert checkpoints.read_newest(tmp_path) == ([10], {"round": 10})
    said = capsys.readouterr().out
    assert f"{newer} was cut short or changed" in said and "from round-0010.safetensors" in said
    os.truncate(older, 100)
    with pytest.raises(ValueError, match=f"--resume {tmp_path}: none of its checkpoints is whole"):
        checkpoints.read_newest(tmp_path)
    checkpoints.remove(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folder")
def test_bytes_reach_the_disk_before_their_name_and_the_name_before_we_go_on(tmp_path, monkeypatch):
    events, replace = [], os.replace
    path = tmp_path / "a"

    def fsync(number):
        info = os.fstat(number)
        for name in tmp_path, tmp_path / "a.part", path:
            if name.exists() and os.path.samestat(info, name.stat()):
                events.append(("sync", name.name, info.st_size if name != tmp_path else None))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *names: events.append("name") or replace(*names))
    checkpoints.write_whole(path, b"12345")
    assert events == [("sync", "a.part", 5), "name", ("sync", tmp_path.name, None)]


@pytest.fixture
def ctrl_c():
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def full_disk(monkeypatch, at):
    """Of the file of that name, half fits onto the disk."""
    def open_file(path, mode):
        file = open(path, mode)
        if path.name != at + ".part":
            return file

        def write(data):
            file.__class__.write(file, data[:len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return Proxy(file, write)

    monkeypatch.setattr(checkpoints, "open", open_file, raising=False)


class Proxy:
    """A file with another write."""

    def __init__(self, file, write):
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_ctrl_c_waits_until_a_checkpoint_is_written(tmp_path, monkeypatch, ctrl_c):
    replace = os.replace

    def interrupt(*names):
        signal.raise_signal(signal.SIGINT)
        replace(*names)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupt)
        checkpoints.write(tmp_path, [1], {"round": 1})
    assert checkpoints.read_newest(tmp_path) == ([1], {"round": 1})
    assert signal.getsignal(signal.SIGINT) is ctrl_c


# ---- a training with all of a run's files, small enough to be killed everywhere -------------


def gray(v):
    return Image.new("RGB", (8, 8), (v, v, v))


def train(config):
    net = nn.Linear(2, 1)
    nn.init.constant_(net.weight, 0.5)
    nn.init.constant_(net.bias, 0.25)
    optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate)
    history = {}
    run = runs.Run(config, "toy")

    def film(n):
        shade = int(net.weight.abs().sum() * 100) % 256
        run.add_to_film(SimpleNamespace(images=[gray(shade), gray(n)], prompts=["p", "q"]))

    for n in run.rounds(net, optimizer, history):
        if run.is_film_due(n):
            film(n)
        x = training.gaussian((config.samples_per_prompt, 2), 0, "train", n)
        r = -net(x).square().squeeze(1)
        loss = (sum(history.get("p", [1.0])) - r).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history["p"] = [*history.get("p", []), loss.item()][-3:]
        run.log(n, reward=r, loss=loss.item())
    film(config.rounds)
    side = {"prompts": ["p"], "images": [gray(1)], "reward": torch.tensor([1.0, 2.0])}
    run.finish(net, side, side, {"reward": "r"})
    return run


def left_behind(folder):
    """Path -> what is there; without times and names, and without what was not finished."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.suffix == ".part" or path.name == "lock":
            continue
        found[name] = path.read_bytes()
        if path.name == "metrics.csv":
            rows = list(csv.DictReader(path.read_text().splitlines()))
            found[name] = [{key: row[key] for key in row if key != "seconds"} for row in rows]
        if path.suffix == ".json" and path.name != "prompts.json":
            kept = json.loads(path.read_text())
            found[name] = {key: kept[key] for key in kept if key not in ("seconds", "out")}
    return found


@pytest.fixture
def quiet(monkeypatch):
    """Pictures of a run's end are not drawn, and weights are a file that takes two writes."""
    def save_trained(net, folder):
        with open(folder / "weights", "wb") as file:
            for parameter in net.parameters():
                file.write(bytes(bits(parameter)[2]))
                file.flush()
                os.fsync(file.fileno())
    monkeypatch.setattr(models, "save_trained", save_trained)
    for name in ("before_after", "curves", "sheet"):
        monkeypatch.setattr(figures, name, lambda *a: None)
    monkeypatch.setattr(runs, "tqdm", lambda rounds, *a, **named: Bar(rounds))


class Bar(list):
    def write(self, text):
        pass


class Death:
    """Counts what is done to the disk, and kills at the k-th; a dead process does nothing more."""

    def __init__(self, monkeypatch, k):
        self.left = k
        for module, name in ((os, "fsync"), (os, "replace"), (os, "truncate"), (shutil, "rmtree"),
                             (runs, "append_row"), (runs.Path, "unlink"), (runs.Path, "mkdir"),
                             (runs.Path, "write_text")):
            monkeypatch.setattr(module, name, self.around(getattr(module, name), name))
        monkeypatch.setattr(checkpoints, "open", self.open, raising=False)

    def point(self):
        self.left -= 1
        if self.left < 0:
            raise Killed

    def around(self, function, name):
        def with_points(*a, **named):
            self.point()
            if name == "append_row" and self.left == 0:  # half a line
                with open(a[0], "ab") as file:
                    file.write(b"1,2,0")
            if name == "write_text" and self.left == 0:
                a[0].write_bytes(a[1].encode()[:len(a[1]) // 2])
            self.point()
            if name != "fsync":  # which takes long, and is tested above
                return function(*a, **named)
        return with_points

    def open(self, path, mode):
        self.point()
        file = open(path, mode)

        def write(data):
            file.__class__.write(file, data[:len(data) // 2])
            self.point()
            return file.__class__.write(file, data[len(data) // 2:])
        return Proxy(file, write)


def test_killed_at_any_point_a_run_ends_as_if_nothing_had_happened(tmp_path, quiet, monkeypatch,
                                                                   capsys):
    wanted = left_behind(train(Config(str(tmp_path / "whole"))).folder)
    assert {"rounds/002/weights", "rounds/004/weights", "evaluation.json", "metrics.csv", "weights",
            "pictures.csv", "film/000008.png"} < set(wanted)
    assert not any("checkpoint" in name for name in wanted)
    k, begun_again, went_on = 0, 0, 0
    while True:
        out = str(tmp_path / str(k))
        folder = tmp_path / str(k) / "toy"
        try:
            with monkeypatch.context() as patch:
                Death(patch, k)
                train(Config(out))
            break
        except Killed:
            pass
        k += 1
        if (folder / "evaluation.json").is_file():
            with pytest.raises(ValueError, match="finished"):
                runs.check_folder(Config(out, resume=str(folder)))
        elif (folder / "config.json").is_file():
            rounds_done = len(checkpoints.files(folder))
            again = train(Config(out, resume=str(folder)))
            begun_again += rounds_done == 0
            went_on += rounds_done > 0
            assert [row["round"] for row in again.rows] == [1, 2, 3, 4]
            assert all(isinstance(row[name], int) for row in again.rows for name in
                       ("round", "queries"))
            assert [queries for queries, _ in again.film] == [0, 2, 4, 6, 8]
        else:
            assert left_behind(folder) == {}  # killed before its settings were written
            continue
        assert left_behind(folder) == wanted, k
    assert begun_again > 10 and went_on > 100
    assert "cut short" not in capsys.readouterr().out


def test_a_broken_newest_checkpoint_costs_a_round_and_no_bit(tmp_path, quiet, monkeypatch, capsys):
    wanted = left_behind(train(Config(str(tmp_path / "whole"))).folder)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints, "remove", None)
        patch.setattr(runs.Run, "finish", lambda *a: Death(patch, 0).point())
        train(Config(str(tmp_path)))
    folder = tmp_path / "toy"
    os.truncate(checkpoints.files(folder)[-1], 999)
    assert left_behind(train(Config(str(tmp_path), resume=str(folder))).folder) == wanted
    assert "going on from round-0003.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("change, named", [
    (lambda folder: shutil.rmtree(folder / "checkpoints"), "more than a round, but no checkpoint"),
    (lambda folder: os.truncate(folder / "metrics.csv", 50), "metrics.csv has lost lines"),
    (lambda folder: [os.truncate(file, 50) for file in checkpoints.files(folder)], "is whole")])
def test_what_is_lost_is_one_clear_line_and_nothing_is_touched(change, named, tmp_path, quiet,
                                                              monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runs.Run, "finish", lambda *a: Death(patch, 0).point())
        train(Config(str(tmp_path)))
    folder = tmp_path / "toy"
    change(folder)
    before = left_behind(folder)
    with pytest.raises(ValueError, match=named):
        train(Config(str(tmp_path), resume=str(folder)))
    assert left_behind(folder) == before


def test_where_a_file_system_has_no_locks_there_is_none(tmp_path, monkeypatch):
    def lockf(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoints.fcntl, "lockf", lockf)
    checkpoints.lock(tmp_path).close()


def test_a_run_that_another_process_trains_is_refused(tmp_path):
    code = "import sys; from support import checkpoints; checkpoints.lock(sys.argv[1])"
    mine = checkpoints.lock(tmp_path)
    for refused in (True, False):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=runs.models.HERE,
                              capture_output=True, text=True)
        said = f"ValueError: {tmp_path}: another process trains this run" in done.stderr
        assert (done.returncode != 0) == said == refused
        mine.close()


def test_a_checkpoint_of_another_run_is_refused(tmp_path, quiet, monkeypatch):
    for name, rate in (("a", 0.1), ("b", 0.2)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(runs.Run, "finish", lambda *a: Death(patch, 0).point())
            train(Config(str(tmp_path), name, learning_rate=rate))
    shutil.rmtree(tmp_path / "b/checkpoints")
    shutil.copytree(tmp_path / "a/checkpoints", tmp_path / "b/checkpoints")
    config = Config(str(tmp_path), "b", learning_rate=0.2, resume=str(tmp_path / "b"))
    with pytest.raises(ValueError, match="made with --learning-rate 0.1, not 0.2"):
        train(config)


def test_ctrl_c_is_one_line_with_the_command_that_goes_on(tmp_path, quiet, monkeypatch, capsys,
                                                         ctrl_c):
    monkeypatch.setattr("sys.argv", ["03_ddpo.py"])
    wanted = left_behind(train(Config(str(tmp_path / "whole"))).folder)
    folder, write_whole = tmp_path / "toy", checkpoints.write_whole

    def interrupt(path, data):
        if path.name == "round-0003.safetensors":
            signal.raise_signal(signal.SIGINT)
        write_whole(path, data)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(checkpoints, "write_whole", interrupt)
        flags.run(lambda: train(Config(str(tmp_path))))
    assert exit.value.code == 130 and capsys.readouterr().err == (
        "03_ddpo.py: stopped; what it has finished is kept, go on with: python 03_ddpo.py "
        f"--resume {folder}\n")
    assert checkpoints.read_newest(folder)[1]["round"] == 3
    assert left_behind(train(Config(str(tmp_path), resume=str(folder))).folder) == wanted


def test_a_full_disk_keeps_the_last_checkpoint_and_says_how_to_go_on(tmp_path, quiet, monkeypatch,
                                                                     capsys):
    monkeypatch.setattr("sys.argv", ["03_ddpo.py"])
    wanted = left_behind(train(Config(str(tmp_path / "whole"))).folder)
    folder = tmp_path / "toy"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        full_disk(patch, "round-0003.safetensors")
        flags.run(lambda: train(Config(str(tmp_path))))
    said = capsys.readouterr().err
    path = folder / "checkpoints" / "round-0003.safetensors"
    assert exit.value.code == 2 and said == (
        f"03_ddpo.py: [Errno 28] No space left on device: '{path}'; what it has finished is kept, "
        f"go on with: python 03_ddpo.py --resume {folder}\n")
    # No half-written file takes up room.
    assert sorted(path.parent.iterdir()) == [path.with_name("lock"), *checkpoints.files(folder)]
    assert checkpoints.read_newest(folder)[1]["round"] == 2
    assert left_behind(train(Config(str(tmp_path), resume=str(folder))).folder) == wanted
