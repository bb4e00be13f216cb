"""Packages for a machine without a network (`--wheels` of scripts/gpu_suite.py); needs nothing but Python itself."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def begin_again(argv: Sequence[str], root: Path) -> None:
    """Install what --wheels names below --work, and start the command anew with it, since it imports such packages itself.

    Returns only where nothing is to be installed, or the command has been started anew already.

    Raises:
        SystemExit: they cannot be installed.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--wheels", nargs="+", type=Path, default=[])
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_suite"))
    try:
        asked, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        return  # the command says what is wrong with it
    site = (root / asked.work / "site").resolve()
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if not asked.wheels or str(site) in paths or not all(path.exists() for path in asked.wheels):
        return
    if not site.is_dir():
        install(asked.wheels, site)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *paths])
    os.execv(sys.executable, [sys.executable, *sys.argv])


def install(wheels: Sequence[Path], site: Path) -> None:
    """Files, and all *.whl of folders, into ``site``, whole or not at all."""
    files = [str(file) for wheel in wheels for file in (sorted(wheel.glob("*.whl")) if wheel.is_dir() else [wheel])]
    new = site.with_name(site.name + ".new")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(new)]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:]
        raise SystemExit(f"error: the packages of --wheels cannot be installed ({said}): fetch those of this Python, "
                         f"{sys.version_info.major}.{sys.version_info.minor}, and this platform.")  # fmt: skip
    new.rename(site)
