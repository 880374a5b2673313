"""What the documentation site generates: pages made from the code, and the check that no public name is undocumented.

MkDocs calls the functions `on_…` (`hooks` in mkdocs.yml).
"""

import contextlib
import importlib
import io
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from shvit.cli import COMMANDS, run
from shvit.export.backends.registry import BACKENDS
from shvit.export.bench.runtimes import RUNTIMES
from shvit.train.recipes import DESCRIPTIONS, RECIPES

ROOT = Path(__file__).parent.parent
ROOT_PAGES = ("CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md")


SOURCES = ROOT / "build" / "docs"
"""Where mkdocstrings looks for the packages (`paths` in mkdocs.yml)."""


def on_startup(**_: Any) -> None:
    """Lay the packages out as they are installed, before mkdocstrings is set up: it drops `paths` that do not exist."""
    lay_out_packages(SOURCES)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Check the docstrings of what the pages name."""
    pages = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    if missing := undocumented(SOURCES, re.findall(r"^::: (\S+)", pages, re.MULTILINE)):
        raise PluginError(f"public names without a docstring: {', '.join(missing)}")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the repository's own pages, whose links start at its root."""
    pages = {name: (ROOT / name).read_text() for name in ROOT_PAGES}
    pages["index.md"] = (ROOT / "README.md").read_text().partition("\n## Files")[0]
    pages = {name: text.replace("](docs/", "](") for name, text in pages.items()}
    pages["reference/commands.md"] = command_page()
    pages["reference/runtimes.md"] = runtime_page()
    pages["reference/recipes.md"] = recipe_page()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Fail if a page or a stylesheet of the site loads anything from the network."""
    for path in Path(config.site_dir).rglob("*.[hc][ts]*"):
        if found := external(path.read_text()):
            raise PluginError(f"{path.name} loads {', '.join(found)}; the site must work without a network")


LOADED = r"""(?:<(?!a\b)\w+\b[^>]*?\b(?:src|href)=|\burl\(|@import )["']?((?:https?:)?//[^"'\s>)]+)"""


def external(text: str) -> list[str]:
    """Return what a page or a stylesheet loads from the network; links that a reader may follow do not count."""
    diagrams = re.findall(r'class="(mermaid)"', text)  # which the theme draws with a script from a CDN
    return sorted({*re.findall(LOADED, text), *diagrams})


# --- packages ---------------------------------------------------------------------------------------------------------


def lay_out_packages(folder: Path) -> None:
    """Copy the packages below `folder` as they are installed: `train/` becomes `shvit/train`."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in sorted({path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}):
        target = folder / "shvit" / ("" if name == "shvit" else name)
        shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def undocumented(sources: Path, names: list[str]) -> list[str]:
    """Return the objects among `names`, and their public members, that have no docstring."""
    loader = griffe.GriffeLoader(search_paths=[sources])
    loader.load("shvit", submodules=True, try_relative_path=False)
    loader.resolve_aliases(external=False)
    objects = (loader.modules_collection[name] for name in names)
    return sorted({each.path for top in objects for each in _public(top) if not each.has_docstring})


def _public(top: griffe.Object | griffe.Alias) -> Iterator[griffe.Object | griffe.Alias]:
    yield top
    for name, member in top.members.items():
        if member.is_public and not name.startswith("_") and (member.is_class or member.is_function):
            yield from _public(member)


# --- commands ---------------------------------------------------------------------------------------------------------

INTRODUCTION = """# Commands and options

Every command prints one JSON object as its last line on stdout. Exit status: 0 done; 1 a check failed; 2 unusable
input, reported in one line on stderr (`--debug`, anywhere, shows the traceback); 70 an internal
error, in one line too."""
VARIETIES = {"train": [("s1",)]}
"""Commands whose options depend on the words that follow."""


def command_page() -> str:
    """Return every command with its options, from what `--help` prints."""
    parts = [INTRODUCTION]
    for name, entry in COMMANDS.items():
        parts += [f"## shvit {name}", f"{entry.help[0].upper()}{entry.help[1:].rstrip('.')}."]
        for words in _varieties(name):
            heading = [f"### shvit {' '.join((name, *words))}"] if words else []
            parts += [*heading, options(help_of(*name.split(), *words))]
    return "\n\n".join(parts) + "\n"


def _varieties(name: str) -> list[tuple[str, ...]]:
    module, _, attribute = COMMANDS[name].target.partition(":")
    target: Any = getattr(importlib.import_module(module), attribute)
    return [(word,) for word in target] if isinstance(target, dict) else VARIETIES.get(name, [()])


def help_of(*words: str) -> str:
    """Return what `shvit WORDS --help` prints, with its frames one below the other."""
    os.environ["COLUMNS"] = "100"
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        run([*words, "--help"])
    printed.seek(0)
    return printed.read()


def options(text: str) -> str:
    """Return a help text as Markdown, with a table for each of its frames."""
    about, *frames = re.split(r"╭─ (.*?) ─*╮", text)
    usage, _, about = about.partition("\n")
    parts = [f"```text\n{usage}\n```", about.strip()]
    for title, frame in zip(frames[::2], frames[1::2], strict=True):
        lines = [line.removeprefix("│ ").rstrip("│ ") for line in frame.splitlines() if line.startswith("│")]
        if any(line.startswith("──") for line in lines):
            about = lines[: (rule := next(i for i, line in enumerate(lines) if line.startswith("──")))]
            lines = lines[rule + 1 :]
            parts.append(" ".join(about))
        rows = "".join(map(_row, _entries(lines)))
        parts.append(f"| {title} | | default |\n| --- | --- | --- |\n{rows}" if rows else "")
    return "\n\n".join(part for part in parts if part)


def _entries(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (option, its help): an option begins at the margin, and its help may begin on the same line."""
    for entry in re.findall(r"^\S.*(?:\n .*)*", "\n".join(lines), re.MULTILINE):
        option, _, about = entry.replace("\n", "  ").partition("  ")
        if not option.startswith("-h"):
            yield option, " ".join(about.split())


def _row(entry: tuple[str, str]) -> str:
    option, about = (text.replace("{None}|", "").replace("|", "\\|") for text in entry)
    about, _, default = about.removesuffix(")").rpartition(" (")
    default = default.removeprefix("default: ").strip("'")
    return f"| `{option}` | {about} | {default if default in ('required', '', 'None') else f'`{default}`'} |\n"


# --- formats and runtimes ---------------------------------------------------------------------------------------------

RUNTIME_PAGE = """# Formats and runtimes

## Formats

| `shvit export` | files | precisions | extra |
| --- | --- | --- | --- |
{formats}

## Runtimes

| `shvit bench --runtimes` | what runs | precision |
| --- | --- | --- |
{runtimes}
"""


def runtime_page() -> str:
    """Return the tables of what can be exported and what can be timed, from the registries."""
    formats = [
        f"| `{name}` | {', '.join((each.suffix, *each.companions))} | {', '.join(each.precisions)} | `{each.extra}` |"
        for name, each in BACKENDS.items()
    ]
    runtimes = [
        f"| `{name}` | {each.help[0].upper()}{each.help[1:]} | {each.precision} |" for name, each in RUNTIMES.items()
    ]
    return RUNTIME_PAGE.format(formats="\n".join(formats), runtimes="\n".join(runtimes))


# --- recipes ----------------------------------------------------------------------------------------------------------


RECIPE_INTRODUCTION = """# Recipes

`shvit train RECIPE` runs one of these. A recipe is a frozen dataclass, and every field is an option.
[Commands and options](commands.md#shvit-train) lists all fields, with the values of `s1`."""


def recipe_page() -> str:
    """Return every recipe with the fields in which it differs from `s1`."""
    parts = [RECIPE_INTRODUCTION]
    base = _flat(asdict(RECIPES["s1"]))
    for name, recipe in RECIPES.items():
        changes = {key: value for key, value in _flat(asdict(recipe)).items() if value != base[key]}
        rows = "".join(f"| `{key}` | `{value}` | `{base[key]}` |\n" for key, value in changes.items())
        parts += [f"## {name}", f"{DESCRIPTIONS[name][0].upper()}{DESCRIPTIONS[name][1:]}."]
        parts += [f"| field | {name} | s1 |\n| --- | --- | --- |\n{rows}"] if rows else []
    return "\n\n".join(parts) + "\n"


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
