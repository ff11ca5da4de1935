"""What the README tells people to type exists: every command, option and script of ours in it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pytest

from controlplane.cli import site as site_command
from meshcompute.cli import mesh

TOP = Path(__file__).parents[1]
README = (TOP / "README.md").read_text()
PROGRAMS = {("meshcompute",): mesh, ("dask", "mesh"): mesh, ("meshcompute-site",): site_command}
# Scripts that pass their arguments to a command of ours; the others read their own.
COMMAND_OF_SCRIPT = {"scripts/demo.sh": "demo", "scripts/dask-boot.sh": "up"}
ALTERNATIVES = re.compile(r"\w+(?: \| \w+)+")  # `meshcompute up | down` stands for two commands


def lines_of(text: str) -> Iterator[str]:
    """Command lines of the text: those of blocks, and those that stand in a sentence and begin like one of ours."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", prose):
        if re.match(r"(meshcompute|meshcompute-site|dask mesh|scripts/\S+)( |$)", span):
            yield span


def ours(line: str) -> list[str]:
    """The part of a command line that calls something of ours; empty if none does."""
    for alternative in re.findall(ALTERNATIVES, line):
        line = line.replace(alternative, alternative.partition(" ")[0])
    words = shlex.split(line, comments=True)
    while words and (words[0] in {"sudo", "env", "time"} or re.match(r"[A-Z_]+=", words[0])):
        del words[0]
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    elif words[:1] == ["python"]:
        words = words[1:]
    is_ours = any(tuple(words[: len(names)]) == names for names in PROGRAMS) or "scripts/" in "".join(words[:1])
    return words if is_ours else []


def check(words: Sequence[str]) -> None:
    """Raise what a person would see who types this."""
    if words[0].startswith(("scripts/", "./scripts/")):
        script = words[0].removeprefix("./")
        assert (TOP / script).is_file(), f"there is no {script}"
        if script in COMMAND_OF_SCRIPT:
            _check_options(mesh, [COMMAND_OF_SCRIPT[script], *words[1:]])
            return
        assert os.access(TOP / script, os.X_OK) or script.endswith(".py")
        text = (TOP / script).read_text()
        for option in (word.partition("=")[0] for word in words[1:] if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{script} knows no {option}"
        return
    names, command = next(
        (names, command) for names, command in PROGRAMS.items() if tuple(words[: len(names)]) == names
    )
    _check_options(command, list(words[len(names) :]))


def _check_options(command: click.Command, words: list[str]) -> None:
    context = click.Context(command, info_name=command.name)
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words[0])
        assert found is not None, f"{context.command_path} has no command {words[0]!r}"
        command, words = found, words[1:]
        context = click.Context(command, info_name=command.name, parent=context)
    if "--" in words:
        behind = words[words.index("--") + 1 :]
        words = words[: words.index("--")]
        if ours(shlex.join(behind)):
            check(ours(shlex.join(behind)))
    command.make_parser(context).parse_args(words)


LINES = sorted({line for line in lines_of(README) if ours(line)})


def test_the_readme_has_commands():
    assert len(LINES) > 10


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_readme_exists(line):
    check(ours(line))


@pytest.mark.parametrize(
    "line",
    [
        "meshcompute upp",
        "meshcompute up --fast mesh@a",
        "scripts/no-such.sh",
        "scripts/dask-boot.sh mesh@a -- meshcompute dmeo",
        "sudo scripts/install-site.sh --no-such-option",
        "meshcompute-site serve --fast",
        "python scripts/benchmarks/memory.py --fast",
    ],
)
def test_one_that_does_not_is_found(line):
    with pytest.raises((AssertionError, click.UsageError)):
        check(ours(line))


def test_its_files_and_folders_exist():
    for path in re.findall(r"`((?:scripts|notebooks|docker|controlplane|tests)/[\w./-]*)`", README):
        assert (TOP / path).exists(), path
