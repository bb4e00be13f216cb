"""The command that judges any optimizer class, with a stand-in for train.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from optimizers import battery
from pretraining.config import compose, validate
from scripts import check_optimizer

ROOT = Path(__file__).resolve().parents[2]

SOUND = """
import torch

class Mine(torch.optim.Optimizer):
    def __init__(self, params, lr=0.01, sign=1.0):
        super().__init__(params, {"lr": lr})
        self.sign = sign

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.sign * group["lr"] * p.grad.sign())
        return loss

class NoRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

def factory(params):
    return Mine(params)
"""

STAND_IN = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.reporting.synthetic import write_run
here = Path(__file__).parent
(here / "calls.txt").write_text("\\n".join([*sys.argv[1:], "PYTHONPATH=" + os.environ["PYTHONPATH"]]))
given = dict(word.split("=", 1) for word in sys.argv[1:])
if (here / "broken").exists():
    sys.exit(3)
write_run(Path(given["run_dir"]), optimizer="any", lr=float(given["optimizer.lr"]),
          adam_lr=float(given["optimizer.adam_lr"]), steps=int(given["trainer.steps"]), perplexity=64.32)
"""


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Run the command in a folder with the file above; exit code, output, error, and the arguments train.py was given."""
    (tmp_path / "my_file.py").write_text(SOUND)
    (tmp_path / "needs.py").write_text("import a_package_that_nobody_has")
    (tmp_path / "crashes.py").write_text("1 / 0")
    (tmp_path / "trainer.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_file", "needs", "crashes"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def run(*words):
        code = check_optimizer.main(words, trainer=(sys.executable, str(tmp_path / "trainer.py")))
        output, error = capsys.readouterr()
        calls = tmp_path / "calls.txt"
        return code, output, error, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_a_class_of_torch(check):
    code, output, _, calls = check("torch.optim.RMSprop", "--lr", "0.003", "alpha=0.95", "--no-train")
    assert code == 0 and not calls
    lines = {line.split()[0]: line for line in output.splitlines() if line.startswith("  ")}
    assert [lines[each.name].split()[1] for each in battery.CHECKS[:-1]] == ["pass"] * (len(battery.CHECKS) - 1)
    assert lines["eigen_solver"].split()[1] == "n/a"
    assert "does not depend on the gradient's scale" in lines["scale"]
    assert "element by element" in lines["structure"] and "depends on the past" in lines["memory"]


def test_a_class_of_a_file_in_this_folder_that_climbs(check):
    code, output, _, _ = check("my_file.Mine", "sign=-1.0", "--no-train")
    assert code == 1
    failed = {line.split()[0] for line in output.splitlines() if line.split()[1:2] == ["FAIL"]}
    assert failed == {"quadratic", "transformer"}
    assert check("my_file.Mine", "--no-train")[0] == 0


def test_training_and_its_place_among_the_others(check, tmp_path):
    code, output, _, calls = check(
        "my_file.Mine",
        "--lr",
        "1e-3",
        "--adam-lr",
        "0.005",
        "sign=2",
        "trainer.steps=7",
        "run_dir=" + str(tmp_path / "r"),
    )
    assert code == 0
    assert {
        "optimizer=any", "optimizer.target=my_file.Mine", "optimizer.lr=0.001", "optimizer.adam_lr=0.005",
        "++optimizer.options.sign=2", "trainer.steps=7", f"run_dir={tmp_path / 'r'}",
    } <= set(calls)  # fmt: skip
    assert sum(word.startswith("trainer.steps=") for word in calls) == 1
    assert calls[-1].split(os.pathsep)[0] == f"PYTHONPATH={tmp_path}"
    table = [line.split() for line in output[output.index("Final perplexity") :].splitlines()[1:-1]]
    perplexities = [float(row[0]) for row in table]
    assert perplexities == sorted(perplexities) and len(table) > 3
    assert ["64.32", "this", "one"] in [row[:3] for row in table]
    assert any(row[1] == "Muon" for row in table)


def test_training_fails(check, tmp_path):
    (tmp_path / "broken").touch()
    code, _, error, _ = check("my_file.Mine", "run_dir=" + str(tmp_path / "r"))
    assert code == 1 and "exit code 3" in error


def test_small_options_are_for_the_battery_alone(check, tmp_path):
    words = ("rank=64", "leading=20", "betas=[0.9, 0.9, 0.99]", "run_dir=" + str(tmp_path / "r"))
    code, _, error, _ = check("optimizers.Alice", *words)
    assert code == 2 and "rank 64 is larger than the smaller side" in error and "--small" in error
    _, _, _, calls = check("optimizers.Alice", *words, "--small", "rank=4", "--small", "leading=2")
    assert "++optimizer.options.rank=64" in calls and "++optimizer.options.betas=[0.9,0.9,0.99]" in calls


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RMSprop"], "write package.Class"),
        (["nowhere_at_all.Mine"], "there is no module nowhere_at_all"),
        (["torch.optum.RMSprop"], "there is no module torch.optum"),
        (["needs.Mine"], "needs a_package_that_nobody_has, which is not installed"),
        (["crashes.Mine"], "importing crashes failed with ZeroDivisionError"),
        (["torch.optim.RMSProp"], "torch.optim has no class RMSProp: do you mean RMSprop"),
        (["my_file.factory"], "my_file.factory is not an optimizer class"),
        (["torch.nn.Linear"], "torch.nn.Linear is not an optimizer class"),
        (["torch.optim.SGD", "--lr", "-1"], "Invalid learning rate"),
        (["torch.optim.SGD", "alpha=1"], "alpha=1) failed with TypeError"),
        (["torch.optim.SGD", "momentum"], "'momentum' is not of the form key=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_sentence(check, words, message):
    code, output, error, calls = check(*words)
    assert code == 2 and not calls and not output
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_an_optimizer_that_breaks_everywhere_is_reported_line_by_line(check):
    code, output, _, _ = check("my_file.NoRate", "--no-train")
    assert code == 1
    assert output.count("FAIL") > 5 and "No property could be measured" in output
    code, _, error, calls = check("my_file.NoRate")
    assert code == 2 and "no learning rate to train with" in error and not calls


@pytest.mark.parametrize("options", [{}, {"betas": [0.9, 0.99], "form": "a b", "nesterov": True, "limit": None}])
def test_the_command_is_one_that_train_py_takes(options):
    command, folder = check_optimizer.training_command(
        "torch.optim.RMSprop", 1e-3, 0.02, options, ["seed=3"], ["train.py"]
    )
    cfg = compose(command[1:])
    validate(cfg)
    assert cfg.optimizer.target == "torch.optim.RMSprop" and cfg.optimizer.options == options
    assert cfg.seed == 3 and str(cfg.run_dir) == str(folder)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("[0.9, 0.99]", [0.9, 0.99]), ("true", True), ("null", None), ("evd", "evd"), ("7", 7)],
)
def test_values(text, value):
    assert check_optimizer.value_of(text) == value


def test_from_the_shell(tmp_path):
    (tmp_path / "my_file.py").write_text(SOUND)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_optimizer.py", "my_file.Mine", "--no-train"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "quadratic       pass" in done.stdout
