"""scripts/setup.sh, which every target of the Makefile begins with: what it says when it cannot go on."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "scripts" / "setup.sh"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(SETUP, tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("a-package-that-is-nowhere==1.0\n")
    return tmp_path


def setup(root, **environment):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    kept |= {"PYTHON": sys.executable, "SYSTEM": "", "PIP_ARGS": ""} | environment
    command = ["bash", str(root / "scripts/setup.sh"), "requirements.txt"]
    return subprocess.run(command, env=kept, capture_output=True, text=True)


@pytest.mark.skipif(importlib.util.find_spec("ensurepip") is None, reason="this Python cannot make an environment")
def test_an_installation_that_fails_shows_the_end_of_its_log_and_what_to_do(root):
    done = setup(root, PIP_ARGS="--no-index")
    assert done.returncode == 2
    assert "    ERROR: No matching distribution found for a-package-that-is-nowhere==1.0" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the installation stopped (status 1)") and "run the same command again" in last
    assert not list((root / ".venv").glob(".setup-*"))  # the next call tries again


def test_an_environment_that_cannot_be_made_is_an_error_too(root):
    (root / ".venv").write_text("a file")
    done = setup(root)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the installation stopped")
    assert setup(root, TMPDIR="/nowhere").stderr.count("error: ") == 1


def test_system_packages_that_are_missing_are_named(root):
    done = setup(root, SYSTEM="1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: SYSTEM=1 installs nothing") and "a-package-that-is-nowhere" in done.stderr
    assert not (root / ".venv").exists()


@pytest.mark.parametrize(
    ("python", "said"),
    [("no-such-python", "PYTHON=no-such-python is not a command"), ("bash", "PYTHON=bash is another program")],
)
def test_an_interpreter_that_cannot_serve_is_refused(root, python, said):
    done = setup(root, PYTHON=python)
    assert done.returncode == 2 and not (root / ".venv").exists()
    assert done.stderr.startswith("error: ") and said in done.stderr
