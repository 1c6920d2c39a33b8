"""What `slothcore doctor` looks at: packages, host, disk and Hub; the GPU is in `gpu_checkup.py`."""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from slothcore.commands.findings import GIB, Finding
from slothcore.version import __version__

OLDEST_PYTHON = (3, 10)
# Less than this does not take a 7B model in 16 bits and what a run saves.
LITTLE_DISK = 20 * GIB
# Packages that nothing needs, and what each is for.
OPTIONAL = {
    "matplotlib": "loss.png",
    "pyarrow": "Parquet files",
    "gguf": "GGUF files",
    "starlette": "slothcore serve",
    "uvicorn": "slothcore serve",
}
REQUIREMENT = re.compile(r"([\w-]+)(?:>=([\d.]+))?")


def examine() -> Iterator[Finding]:
    """Every finding, in the order in which one thing needs the other."""
    yield check_python()
    packages = list(check_packages())
    yield from packages
    yield from check_optional()
    if all(finding.status != "problem" for finding in packages if finding.name == "torch"):
        yield from check_gpu()
    yield check_memory()
    yield check_disk("disk here", Path.cwd())
    yield from check_hub()


def check_python() -> Finding:
    text = f"{platform.python_version()} ({sys.executable}), slothcore {__version__}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("Python", "problem", text, "install Python 3.10 or newer")
    return Finding("Python", "ok", text)


def check_packages() -> Iterator[Finding]:
    """Each package that slothcore requires, at the oldest version that it takes."""
    try:
        wanted = requires("slothcore") or []
    except PackageNotFoundError:
        yield Finding("slothcore", "warning", "is not installed, so its requirements are unknown", "pip install -e .")
        return
    for requirement in wanted:
        name_and_version, _, marker = requirement.partition(";")
        match = REQUIREMENT.match(name_and_version.replace(" ", ""))
        if "extra" in marker or match is None or ("Linux" in marker and platform.system() != "Linux"):
            continue
        yield check_package(match[1], match[2] or "0")


def check_package(name: str, oldest: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "problem", "is not installed", f'pip install "{name}>={oldest}"')
    if release(found) < release(oldest):
        remedy = f'pip install --upgrade "{name}>={oldest}"'
        return Finding(name, "problem", f"{found} is older than {oldest}", remedy)
    return Finding(name, "ok", found)


def check_optional() -> Iterator[Finding]:
    for name, purpose in OPTIONAL.items():
        try:
            yield Finding(name, "ok", f"{version(name)} (optional, for {purpose})")
        except PackageNotFoundError:
            yield Finding(name, "ok", f"not installed; {purpose} would need it: pip install {name}")


def check_gpu() -> Iterator[Finding]:
    """The findings of `gpu_checkup.py`, which has to import torch first."""
    try:
        from slothcore.commands.gpu_checkup import examine_gpu
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        yield Finding(
            "torch build", "problem", f"torch cannot be imported: {reason}", "pip install --force-reinstall torch"
        )
        return
    yield from examine_gpu()


def check_memory() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{cores} CPU cores"
    if "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        text += f", {total / GIB:.1f} GiB of memory"
    return Finding("host", "ok", f"{text}, {platform.system()} {platform.machine()}")


def check_disk(name: str, folder: Path) -> Finding:
    """The space that is free where `folder` is, or will be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / GIB:.1f} GiB free in {folder}"
    if not os.access(existing, os.W_OK):
        return Finding(name, "problem", f"{folder} may not be written into", f"choose another folder than {folder}")
    if free < LITTLE_DISK:
        return Finding(name, "warning", text, "free some space: a 7B model takes 15 GiB to download or to merge")
    return Finding(name, "ok", text)


def check_hub() -> Iterator[Finding]:
    """The download cache, and whether there is a token, which is not shown."""
    from huggingface_hub import constants, get_token

    cache = check_disk("Hub cache", Path(constants.HF_HUB_CACHE))
    if cache.status == "problem":
        cache = Finding(cache.name, "problem", cache.text, "set HF_HUB_CACHE to a folder that may be written into")
    yield cache
    offline = ", offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    if get_token():
        yield Finding("Hub token", "ok", f"present{offline}")
    else:
        text = "none; models that ask for consent, such as Llama, need one: hf auth login"
        yield Finding("Hub token", "ok", f"{text}{offline}")


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version, 2.11.0+cu128 as (2, 11, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
