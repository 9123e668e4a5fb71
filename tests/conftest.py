"""`pytest --equations` prints which function holds which equation, and which tests check it."""
import os
import pydoc
import re
import shutil
from importlib import import_module

import pytest

# Before torch is imported: on tensors this small, two threads mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    from selenium import webdriver
except ImportError:
    webdriver = None


def pytest_addoption(parser):
    parser.addoption("--equations", action="store_true",
                     help="print a table of equations, functions and tests, and run nothing")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    if not session.config.getoption("equations") or session.testsfailed:
        return None  # so that the tests run, or a file that cannot be read is reported
    tests = {}
    for item in session.items:
        for mark in item.iter_markers("equation"):
            tests.setdefault(mark.args, set()).add(item.originalname)
    writer = session.config.get_terminal_writer()
    writer.line("\n\n| equation | function | formula | tests |\n| --- | --- | --- | --- |")
    for (label, dotted), names in sorted(tests.items()):
        cells = [label, f"`{dotted}`", formula_of(dotted), ", ".join(sorted(names))]
        writer.line("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return True


def pytest_collection_modifyitems(items):
    """The longest files first: of two processes, none is left alone with one in the end."""
    items.sort(key=lambda item: item.path.parent.name != "runs")


def formula_of(dotted):
    """The first line of a function's docstring.  dotted: "04_dpok.Value.fit", "support.a.b"."""
    doc = pydoc.locate(dotted).__doc__ or ""
    return doc.partition("\n")[0].strip()


@pytest.fixture(scope="session")
def pipe():
    """The tiny model, loaded once: for tests that change nothing of it."""
    return import_module("support.models").load_pipeline("tiny_sd", "cpu")


@pytest.fixture
def chromium(tmp_path):
    """A headless browser; whatever a test does, its page must be quiet: no error, no request."""
    program, driver_program = shutil.which("chromium"), shutil.which("chromedriver")
    if None in (webdriver, program, driver_program):
        pytest.skip("needs Chromium, chromedriver and Selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver_program)) as driver:
        yield driver
        assert driver.get_log("browser") == []
        requests = [entry["message"] for entry in driver.get_log("performance")
                    if "Network.requestWillBeSent" in entry["message"]]
        assert requests and not re.search(r'"url":"(http|ws)', "".join(requests))
