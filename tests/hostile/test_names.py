"""Names of models and of published weights: what is none is one line, and reaches no file and no network."""

import re
import socket

import pytest
import timm

from shvit.cli import run
from shvit.create import check_model_name
from shvit.errors import InputError
from shvit.weights.connection import TIMEOUT_S, bounded_waits
from shvit.weights.resolve import resolve_weights

NAMES = {
    "shvit_s1.nope": "shvit_s1 has no weights of that tag; choose from shvit_s1.in1k, or shvit_s1 alone",
    "shvit_s1.": "shvit_s1 has no weights of that tag",
    "resnet18.nope": "choose from resnet18.a1_in1k",
    "hf-hub:timm/resnet18.a1_in1k": "names with a source are not taken",
    "local-dir:/etc": "names with a source are not taken",
    "timm/resnet18": "choose from resnet18",
    "shvit_s1.pth": "is a file of weights",
    "../../etc/passwd": "'../../etc/passwd'; choose from",
    "https://example.org/x": "names with a source are not taken",
    "\x1b[2J": "'\\x1b[2J'; choose from",
    "": "''; choose from",
    "a" * 5000: "'aaaa",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("SHVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:30]))
@pytest.mark.parametrize("how", ["info", "export", "pretrained", "teacher"])
def test_a_model_that_is_none_is_one_line(name, how):
    commands = {
        "info": lambda: run(["info", name]),
        "export": lambda: run(["export", "onnx", f"--model={name}", "--output", "x.onnx"]),
        "pretrained": lambda: resolve_weights(name, None, pretrained=True),
        "teacher": lambda: run(["train", "demo", f"--distill.teacher={name}"]),
    }
    with pytest.raises(InputError, match=re.escape(NAMES[name])) as failed:
        commands[how]()
    assert len(str(failed.value)) < 400


def test_names_of_timms_are_taken():
    names = sorted({*timm.list_models(), *timm.list_models(include_tags=True), *timm.list_pretrained()})
    for name in names[::9]:
        check_model_name(name)


@pytest.mark.parametrize("name", ["nope", "../../x", "a" * 5000, "", "\x00", "hf-hub:timm/x", "https://example.org/x"])
@pytest.mark.parametrize("command", ["pull", "check"])
def test_published_weights_that_are_none_are_one_line(name, command):
    with pytest.raises(InputError) as failed:
        run(["weights", command, name])
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("pattern", ["*a*a*a*a*a*a*a*a*a*b" * 5, "[", "\x00", "[!", "a" * 5000])
def test_a_pattern_that_matches_nothing_is_one_line(pattern):
    with pytest.raises(InputError, match="no model matches"):
        run(["list", pattern])


def test_libraries_that_download_by_themselves_do_not_wait_for_ever():
    with bounded_waits():
        assert socket.getdefaulttimeout() == TIMEOUT_S
    assert socket.getdefaulttimeout() is None
