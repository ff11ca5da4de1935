"""Wheels of what is installed here, for an installer in a host without a package index."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import controlplane
import meshcompute

__all__ = ["pack_wheels", "repack"]

LEFT_OUT = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"})  # what an installation adds to a wheel


def pack_wheels(folder: Path, requirement: str) -> Path:
    """Pack what is installed here into wheels again.

    Parameters
    ----------
    folder
        Where to write them.
    requirement
        What they must satisfy, e.g. ``meshcompute[site]``.

    Returns
    -------
    Path
        The first distribution's wheel; those of all that it needs lie beside it.
    """
    wheels = [_pack(folder, found) for found in _closure(requirement)]
    return wheels[0]


def repack(wheel: Path, version: str) -> Path:
    """Write a wheel again, beside itself, as if it were of another version."""
    name, old, *tags = wheel.stem.split("-")
    with zipfile.ZipFile(wheel) as source:
        files = {file: source.read(file) for file in source.namelist() if not file.endswith("/RECORD")}
    metadata = f"{name}-{old}.dist-info/METADATA"
    files[metadata] = files[metadata].replace(f"Version: {old}".encode(), f"Version: {version}".encode(), 1)
    renamed = {file.replace(f"{name}-{old}.dist-info/", f"{name}-{version}.dist-info/"): files[file] for file in files}
    return _write(wheel.with_name("-".join((name, version, *tags)) + ".whl"), renamed)


def _closure(requirement: str) -> list[Distribution]:
    """List a distribution and all that it needs here, itself first."""
    first = Requirement(requirement)
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    wanted = [(first.name, extra) for extra in ("", *first.extras)]
    while wanted:
        name, extra = wanted.pop(0)
        key = canonicalize_name(name)
        if (key, extra) in seen:
            continue
        seen.add((key, extra))
        found.setdefault(key, distribution(name))
        for line in found[key].requires or ():
            needs = Requirement(line)
            if needs.marker is None or needs.marker.evaluate({"extra": extra}):
                wanted += [(needs.name, each) for each in ("", *needs.extras)]
    return list(found.values())


def _files(found: Distribution) -> Iterator[tuple[str, Path]]:
    """Yield each file with its name in the wheel."""
    for file in found.files or ():
        # Scripts lie elsewhere and are made anew by whoever installs; so is what makes an installation editable.
        is_ours = ".." not in file.parts and "__pycache__" not in file.parts and file.name not in LEFT_OUT
        if is_ours and not (_is_editable(found) and len(file.parts) == 1):
            yield file.as_posix(), Path(str(file.locate()))
    if _is_editable(found):
        for package in (meshcompute, controlplane):
            top = Path(str(package.__file__)).parent
            for path in top.rglob("*"):
                if path.is_file() and "__pycache__" not in path.parts:
                    yield path.relative_to(top.parent).as_posix(), path


def _is_editable(found: Distribution) -> bool:
    return '"editable": true' in (found.read_text("direct_url.json") or "")


def _pack(folder: Path, found: Distribution) -> Path:
    tags = [line.removeprefix("Tag: ") for line in (found.read_text("WHEEL") or "").splitlines() if "Tag: " in line]
    parts = [tag.split("-") for tag in tags]
    tag = "-".join(".".join(sorted({part[i] for part in parts})) for i in range(3))
    name = canonicalize_name(found.metadata["Name"]).replace("-", "_")
    path = folder / f"{name}-{found.version}-{tag}.whl"
    return _write(path, {inside: file.read_bytes() for inside, file in _files(found)})


def _write(path: Path, files: Mapping[str, bytes]) -> Path:
    record = []
    with zipfile.ZipFile(path, "w") as wheel:
        for inside, content in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f'"{inside}",sha256={digest},{len(content)}\n')
            wheel.writestr(inside, content)
        [info] = {inside.partition("/")[0] for inside in files if inside.endswith(".dist-info/METADATA")}
        wheel.writestr(f"{info}/RECORD", "".join([*record, f"{info}/RECORD,,\n"]))
    return path
