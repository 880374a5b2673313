"""JSON and YAML of third parties: bounded, strict, and refused in one line."""

import json
from dataclasses import dataclass

import pytest
import yaml

from shvit.documents import compose_yaml, load_json, load_yaml, parse_json, parse_model, to_json
from shvit.errors import InputError

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 40_000, "too deeply"),
        ("[" * 200 + "]" * 200, "more than 60 levels"),
        ('{"a":' * 100 + "1" + "}" * 100, "more than 60 levels"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("NaN", "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("1e999", "too large"),
        ("9" * 5000, "5000 digits"),
        ("9" * 41, "41 digits"),
        ("{", "line 1 column 2"),
        (b"\xff\xfe\xff", "decode"),
        ("", "line 1 column 1"),
    ],
)
def test_json_that_asks_for_too_much_is_one_line(text, reason):
    with pytest.raises(InputError, match=r"^mine: not readable as JSON \(") as caught:
        parse_json(text, "mine")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_is_read_as_the_standard_library_reads_it():
    content = {"a": [1, -2.5, 1e-300, None, True, "é\n"], "b": {"c": [[]]}, "n": 10**38}
    assert parse_json(json.dumps(content), "x") == content
    assert parse_json(json.dumps(content).encode("utf-16"), "x") == content
    assert parse_json("[" * 60 + "]" * 60, "x")


def test_json_is_written_without_what_is_no_json():
    content = {"nan": float("nan"), "inf": [float("-inf"), (1.5, float("inf"))], "letter": "ü"}
    assert json.loads(to_json(content)) == {"nan": None, "inf": [None, [1.5, None]], "letter": "ü"}
    assert to_json(content).isascii()


def test_larger_file_than_allowed_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" + "1," * 1000 + "1]")
    assert len(load_json(path)) == 1001
    with pytest.raises(InputError, match=r"a\.json: is larger than"):
        load_json(path, limit=1000)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "expand without bound"),
        ("data: &a {root: *a}", "leads back"),
        ("&a [*a]", "leads back"),
        ("x: " + "[" * 2000 + "]" * 2000, "nest"),
        ("[" * 100_000, "nest"),
        ("a: 1\na: 2", "'a' stands twice"),
        ("? [a]\n: 1", "not a word"),
        ("x: &a [1]\n" + "".join(f"y{i}: &{chr(98 + i)} [*{chr(97 + i)}]\n" for i in range(20)) * 1, None),
        ("a: [", "expected"),
        ("a: \x00", "character"),
    ],
)
def test_yaml_that_asks_for_too_much_is_one_line(text, reason):
    if reason is None:
        assert compose_yaml(text, "mine") is not None
        return
    with pytest.raises(InputError, match=r"^mine: not readable as YAML \(") as caught:
        compose_yaml(text, "mine")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["epochs: " + "9" * 5000, "x: .inf", "x: [.nan]", "x: " + "9" * 50, "x: !!int zz"])
def test_yaml_values_without_bound_are_one_line(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"a\.yaml: "):
        load_yaml(path)


def test_yaml_runs_nothing(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"x: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(InputError, match="not readable as YAML"):
        load_yaml(path)
    assert not (tmp_path / "made").exists()


def test_yaml_is_read_as_pyyaml_reads_it(tmp_path):
    path = tmp_path / "a.yaml"
    content = {"a": [1, 2.5, None, True, "é"], "b": {"c": []}, "d": "2020-01-01"}
    text = yaml.safe_dump(content, allow_unicode=True) + "e: &e {f: 1}\ng: {<<: *e, h: 2}\n"
    path.write_text(text, encoding="utf-8")
    assert load_yaml(path) == yaml.safe_load(text)
    path.write_text("")
    assert load_yaml(path) is None


@dataclass
class Thing:
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    size: int
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"size": "64"}, "x: size is '64'; input should be a valid integer; export again"),
        ({"names": []}, "x: size is missing; export again"),
        ({"size": 1, "names": [2]}, "x: names.0 is 2; input should be a valid string; export again"),
        ({"size": 1, "other": 2}, "x: unknown field 'other'; export again"),
        ([1], "x: it is [1]; input should be"),
    ],
)
def test_values_of_the_wrong_type_are_named(content, message):
    with pytest.raises(InputError) as caught:
        parse_model(Thing, content, "x", "export again")
    assert str(caught.value).startswith(message)


def test_model_takes_what_json_has():
    assert parse_model(Thing, {"size": 1, "names": ["a"]}, "x") == Thing(1, ("a",))
