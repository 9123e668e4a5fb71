"""What a training owns, written to disk after every round, so that a run can be cut short anywhere.

A checkpoint is one safetensors file: its tensors, and as text all that is no tensor, with a sha256
over both. Nothing in it can run code, and one that was cut short or changed is never taken for
whole. The two newest are kept: the older one is there if the newer one is broken.
"""
import hashlib
import json
import os
import shutil
import signal
import threading
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path

import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from torch import nn

from support import parallel

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

KEPT = 2  # checkpoints of a run


# ---- what a thing consists of ---------------------------------------------------------------


def trained_weights(pipe):
    """Name -> parameter of those that are trained; the others are read from the model again."""
    return {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}


def is_given(thing):
    """Whether every start of a script makes the same of it again: a frozen Config, a device."""
    frozen = is_dataclass(thing) and type(thing).__dataclass_params__.frozen
    return frozen or isinstance(thing, torch.device)


def is_plain(thing):
    """Whether a thing is only a value: it has no parts that could change in place."""
    return thing is None or isinstance(thing, (bool, int, float, str, tuple, torch.Tensor))


def state_of(thing):
    """All that changes in a thing, as dicts, lists, tuples, tensors, numbers and text."""
    if isinstance(thing, DiffusionPipeline):
        return trained_weights(thing)
    if isinstance(thing, (nn.Module, torch.optim.Optimizer)):
        return thing.state_dict()
    if is_plain(thing) or isinstance(thing, (dict, list)):
        return thing
    return {name: state_of(part) for name, part in vars(thing).items() if not is_given(part)}


def restore(thing, state):
    """Makes a thing what it was when state_of gave this state: in place, whoever holds it."""
    if isinstance(thing, DiffusionPipeline):
        weights = trained_weights(thing)
        if {name: p.shape for name, p in weights.items()} != {
                name: tensor.shape for name, tensor in state.items()}:
            raise ValueError("its weights are those of another network")
        for name, parameter in weights.items():
            parameter.data.copy_(state[name])
    elif isinstance(thing, (nn.Module, torch.optim.Optimizer)):
        thing.load_state_dict(state)
    elif isinstance(thing, dict):
        thing.clear()
        thing.update(state)
    elif isinstance(thing, list):
        thing[:] = state
    elif not is_plain(thing):
        for name, part in vars(thing).items():
            if is_given(part):
                continue
            if not is_plain(part):
                restore(part, state[name])
            elif isinstance(part, torch.Tensor):
                setattr(thing, name, state[name].to(part.device))
            else:
                setattr(thing, name, state[name])


def pack(state, tensors):
    """A state as JSON can have it; each tensor is put into `tensors`, its name in its place."""
    if isinstance(state, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = state.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(state, dict):  # as pairs: keys of JSON are text, an optimizer's are numbers
        return {"dict": [[key, pack(value, tensors)] for key, value in state.items()]}
    parts = [pack(part, tensors) for part in state] if isinstance(state, (list, tuple)) else None
    if isinstance(state, tuple):
        return {"tuple": parts}
    return state if parts is None else parts


def unpack(packed, tensors):
    """The state that pack made this of."""
    if isinstance(packed, list):
        return [unpack(part, tensors) for part in packed]
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    if "tuple" in packed:
        return tuple(unpack(part, tensors) for part in packed["tuple"])
    return {key: unpack(value, tensors) for key, value in packed["dict"]}


# ---- files that are whole or not there ------------------------------------------------------


def sync(path):
    """Waits until a file or a folder's list of names is on the disk, not only in memory."""
    if os.name == "nt" and Path(path).is_dir():
        return  # Windows opens no folder, and needs none of this
    number = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_whole(path, data):
    """A file of these bytes: whatever cuts this short, path is as it was before, or all new."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # before the name: a name must not come before its bytes
        os.replace(part, path)
        sync(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)  # where the disk is full, it needs the room
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def uninterrupted():
    """Ctrl-C waits until what is done inside is done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals come to the main thread only
        return
    waiting = []
    handler = signal.signal(signal.SIGINT, lambda *signals: waiting.append(signals))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting and callable(handler):
            handler(*waiting[0])


# ---- checkpoints ----------------------------------------------------------------------------


@parallel.only_first
def lock(folder):
    """Keeps other processes from training in a run's folder until this one ends.

    -> the file that must stay open; None on Windows. A file system may have no locks: then none.
    """
    if fcntl is None:
        return None
    path = Path(folder, "checkpoints", "lock")
    path.parent.mkdir(exist_ok=True)
    file = path.open("wb")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise ValueError(f"{folder}: another process trains this run now") from error
    except OSError:  # a file system without locks, as some clusters have
        pass
    return file


def fingerprint(tensors, text):
    """sha256 over names, types, shapes and bytes of tensors, and over a text."""
    total = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def files(folder):
    """The checkpoints of a run's folder, the oldest first."""
    found = Path(folder, "checkpoints").glob("round-[0-9]*.safetensors")
    return sorted(found, key=lambda path: int(path.stem.partition("-")[2]))


def write(folder, things, notes):
    """The checkpoint of these things after notes["round"] rounds; then all but the newest go.

    notes: what else is to be known, as JSON can have it.
    """
    with uninterrupted():
        tensors = {}
        packed = pack([state_of(thing) for thing in things], tensors)
        text = json.dumps({"notes": notes, "state": packed})
        data = safetensors.torch.save(tensors, {"text": text, "sha256": fingerprint(tensors, text)})
        path = Path(folder, "checkpoints", f"round-{notes['round']:04d}.safetensors")
        path.parent.mkdir(exist_ok=True)
        write_whole(path, data)
        for old in files(folder)[:-KEPT]:
            old.unlink()


def read(path):
    """State and notes of a checkpoint; ValueError if it is not as it was written."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
            # Copies: else they would be the file itself, which is going to be deleted.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        text = metadata["text"]
        if metadata["sha256"] != fingerprint(tensors, text):
            raise ValueError("its sha256 is another one")
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} was cut short or changed: {error}") from error
    found = json.loads(text)
    return unpack(found["state"], tensors), found["notes"]


def read_newest(folder):
    """State and notes of a run's newest whole checkpoint; None where there is none at all.

    Says so where one is passed over; ValueError if there are some and none is whole.
    """
    broken = []
    for path in reversed(files(folder)):
        try:
            found = read(path)
        except ValueError as error:
            broken.append(str(error))
            continue
        for message in broken:
            print(f"{message}; going on from {path.name}")
        return found
    if broken:
        raise ValueError(f"--resume {folder}: none of its checkpoints is whole: {broken[0]}")
    return None


@parallel.only_first
def remove(folder):
    """Deletes a run's checkpoints, when it has come to its end."""
    shutil.rmtree(Path(folder, "checkpoints"), ignore_errors=True)
