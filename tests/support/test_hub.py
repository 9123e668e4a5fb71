"""The hub: a name that only it could have fails at once where it does not answer."""
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from support import hub, models
from support import reward_models as nets


class Refuses(BaseHTTPRequestHandler):
    """A hub with nothing in it."""

    def do_HEAD(self):
        self.send_error(404)

    def log_message(self, *words):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    """The address of a hub that answers; after server_close, of none."""
    server = HTTPServer(("127.0.0.1", 0), Refuses)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    hub.answers.cache_clear()
    yield server
    server.shutdown()
    server.server_close()
    hub.answers.cache_clear()


def test_a_hub_that_answers_is_asked_for_more(endpoint, monkeypatch):
    assert hub.answers() and hub.only_here() == {}
    assert hub.why(OSError("no such model\nmore")) == "no such model"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.answers.cache_clear()
    assert not hub.answers()


@pytest.mark.parametrize("load", [
    lambda: models.load_pipeline("nobody/nothing", "cpu"), lambda: nets.load_clip("nobody/nothing"),
    lambda: nets.read_weights("nobody/nothing/file.pt", "--flag", "a file"),
    lambda: nets.load_vlm("nobody/nothing", "cpu"),
    lambda: nets.TokenEncoder("nobody/nothing", None, "cpu")])
def test_without_a_hub_an_unknown_name_fails_at_once_and_says_why(load, endpoint):
    endpoint.shutdown()
    endpoint.server_close()
    started = time.perf_counter()
    with pytest.raises(ValueError, match="^--.* nobody/nothing.* does not answer") as error:
        load()
    assert time.perf_counter() - started < 5 and "\n" not in str(error.value)
