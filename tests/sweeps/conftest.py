import sys
from pathlib import Path

import pytest

STAND_IN = Path(__file__).with_name("stand_in.py")


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """The command of the stand-in for train.py; `trainer.calls()` are the runs that it was called for."""
    monkeypatch.setenv("STAND_IN", str(tmp_path))

    class Trainer(list):
        def calls(self):
            file = tmp_path / "calls.txt"
            return [line.split() for line in file.read_text().splitlines()] if file.is_file() else []

        def names(self):
            return [call[0] for call in self.calls()]

    return Trainer([sys.executable, str(STAND_IN)])
