"""Whether the Hugging Face hub answers: asked once, before its own loaders try for a minute."""
import functools

from huggingface_hub import constants, get_session

PATIENCE = 3  # seconds


@functools.cache
def answers():
    """Whether the hub answers at all; no where HF_HUB_OFFLINE is set."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # no network, no such host, a proxy that refuses: each library has its own
        return False
    return True


def only_here():
    """Options with which a loader uses earlier downloads alone, where the hub does not answer."""
    return {} if answers() else {"local_files_only": True}


def why(error):
    """A loader's error in one line, and whether the hub answers."""
    reason = str(error).strip().split("\n")[0][:160]
    if answers():
        return reason
    return f"{constants.ENDPOINT} does not answer, so only earlier downloads count; {reason}"
