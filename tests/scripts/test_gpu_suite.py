"""The suite for GPUs, with stubs for its jobs: what is run, what is kept, how it goes on and how it ends."""

import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile

import pytest

from benchmarking import gpu_suite
from data.errors import UserError
from pretraining.config import compose, validate
from pretraining.record import read_json, write_json
from scripts import benchmark
from scripts import gpu_suite as script

FACTS = '{"hardware": {"device": "stub", "cpu": "stub", "cores": 1}, "versions": {"torch": "2"}, "commit": null, \
"uncommitted_changes": null, "command": "none"}'


@pytest.fixture
def suite(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "MACHINE", f"print('''{FACTS}''')")
    return gpu_suite.Suite(
        out=tmp_path / "out",
        work=tmp_path / "work",
        device="cpu",
        tiny=True,
        stages=gpu_suite.STAGES,
        adam_rates=("0.001",),
        methods=("racs",),
        data=None,
        tokenizer=None,
        deadline=time.monotonic() + 600,
    )


def stub(name, code, minutes=0.1, run=None):
    return gpu_suite.Job(f"tests/{name}", (sys.executable, "-c", code), minutes, run)


def give(monkeypatch, *jobs):
    monkeypatch.setattr(gpu_suite, "jobs", lambda suite: iter(jobs))


def summary(suite):
    return (suite.out / "summary.md").read_text()


def test_a_job_that_fails_stops_no_other_and_its_last_lines_are_kept(suite, monkeypatch):
    talk = "for i in range(50): print('line', i)\nraise SystemExit(4)"
    give(monkeypatch, stub("bad", talk), stub("good", "print('fine')"))
    assert not gpu_suite.work(suite)
    bad, good = (read_json(suite.out / "jobs" / f"tests-{name}.json") for name in ("bad", "good"))
    assert (bad["state"], bad["exit_code"], good["state"]) == ("failed", 4, "done")
    assert bad["end_of_output"] == [f"line {i}" for i in range(20, 50)]
    text = summary(suite)
    assert "tests/bad failed (exit code 4)" in text and "line 49" in text and "line 19" not in text
    assert "| tests/good | done |" in text


def test_what_is_done_is_not_done_again_and_what_failed_is(suite, monkeypatch, tmp_path):
    count = (
        "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    )
    files = [tmp_path / name for name in ("done", "failed")]
    jobs = [
        gpu_suite.Job("tests/done", (sys.executable, "-c", count, str(files[0])), 0.1),
        gpu_suite.Job("tests/failed", (sys.executable, "-c", count + "; sys.exit(1)", str(files[1])), 0.1),
    ]
    give(monkeypatch, *jobs)
    gpu_suite.work(suite)
    gpu_suite.work(suite)
    assert [file.read_text() for file in files] == ["x", "xx"]


def test_the_summary_keeps_what_earlier_calls_have_run(suite, monkeypatch):
    give(monkeypatch, gpu_suite.Job("training/first", (sys.executable, "-c", "print()"), 0.1))
    gpu_suite.work(suite)
    give(monkeypatch, stub("second", "print()"))
    gpu_suite.work(suite)
    rows = [line.split(" | ")[:2] for line in summary(suite).splitlines() if line.startswith("| ") and "/" in line]
    assert rows == [["| tests/second", "done"], ["| training/first", "done"]]


def alive(pid):
    """Whether a process runs; one that is dead and not yet collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="asks /proc about processes")
def test_a_job_that_is_too_slow_loses_its_whole_process_group(suite, monkeypatch, tmp_path):
    file = tmp_path / "pid"
    # A child that ignores SIGTERM, and a parent that dies of it
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    parent = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        f"open({str(file)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    give(monkeypatch, stub("slow", parent, minutes=1.5 / 240), stub("next", "print()"))
    assert not gpu_suite.work(suite)
    assert read_json(suite.out / "jobs" / "tests-slow.json")["state"] == "failed"
    assert "tests/slow failed (too slow)" in summary(suite)
    assert read_json(suite.out / "jobs" / "tests-next.json")["state"] == "done"
    assert file.is_file() and not alive(int(file.read_text()))


def test_without_time_nothing_is_begun_and_the_summary_says_so(suite, monkeypatch):
    suite.deadline = time.monotonic() + 1
    give(monkeypatch, stub("late", "print()", minutes=5))
    assert gpu_suite.work(suite)
    assert not (suite.out / "jobs" / "tests-late.json").exists()
    assert "| tests/late | not run |" in summary(suite)


TRAINING = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text(f"optimizer: {{name: adam}}\\nrun_dir: {folder}\\n")
(folder / "checkpoints" / "weights").write_text("many")
again = (folder / "saved").exists()
def save(*_):
    (folder / "saved").write_text("state")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
if not again:
    time.sleep(60)
"""


def test_a_training_may_save_at_the_end_of_the_time_and_goes_on_later(suite, monkeypatch):
    folder = suite.work / "runs" / "adam"
    job = gpu_suite.Job("comparison/adam", (sys.executable, "-c", TRAINING, str(folder)), 0.01, folder)
    give(monkeypatch, job)
    monkeypatch.setattr(gpu_suite, "comparison_table", lambda suite: [])  # a stub leaves no figures
    suite.deadline = time.monotonic() + 8.5  # some seconds, and five in which it may save
    assert gpu_suite.work(suite)
    stopped = suite.state(job)
    assert stopped["state"] == "stopped" and (folder / "saved").exists()
    kept = suite.out / "runs" / "adam"
    assert sorted(path.name for path in kept.iterdir()) == ["config.yaml"]  # and no checkpoint
    assert str(suite.work) not in (kept / "config.yaml").read_text()

    suite.deadline = time.monotonic() + 600
    assert gpu_suite.work(suite)
    done = suite.state(job)
    assert done["state"] == "done" and done["seconds"] >= stopped["seconds"] > 0  # of both parts; the second is short
    assert not (folder / "checkpoints").exists()


def test_a_training_that_diverges_is_over(suite, monkeypatch):
    folder = suite.work / "runs" / "adam"
    code = (
        "import pathlib, sys; f = pathlib.Path(sys.argv[1]); f.mkdir(parents=True); (f / 'config.yaml').write_text('a: 1');"
        "print('error: the loss is not finite at step 7'); sys.exit(3)"
    )
    job = gpu_suite.Job("comparison/adam", (sys.executable, "-c", code, str(folder)), 0.01, folder)
    give(monkeypatch, job)
    monkeypatch.setattr(gpu_suite, "comparison_table", lambda suite: [])
    assert gpu_suite.work(suite) and gpu_suite.work(suite)  # the second finds it done: the folder cannot be made twice
    assert suite.state(job)["state"] == "diverged"
    assert read_json(suite.out / "runs" / "adam" / "diverged.json")["step"] == 7


# The comparison's number of steps -----------------------------------------------------------------------------------


def measured(suite, *speeds):
    lines = [{"loop": "ours", "settings": [], "tokens_per_second": speed} for speed in speeds]
    lines += [{"loop": "ours", "settings": ["trainer.compile=true"], "tokens_per_second": 1.0}]
    lines += [{"loop": "transformers", "settings": [], "tokens_per_second": 1.0}]
    suite.out.mkdir(parents=True, exist_ok=True)
    model = "llama_tiny" if suite.tiny else "llama_60m"
    write_json(gpu_suite.training_record(suite, model), {"contestants": lines})


def test_the_steps_come_from_the_slowest_method_measured_and_stay(suite):
    suite.tiny = False
    suite.deadline = time.monotonic() + 3600
    measured(suite, 2e6, 1e6, None)
    settled = gpu_suite.settle(suite, 4)
    expected = (gpu_suite.SAFETY * 3600 / 4 - gpu_suite.OTHER) * 1e6 / (512 * 256)
    assert settled["steps"] == pytest.approx(expected, rel=1e-3) and settled["measured"]
    assert 4 * settled["seconds_per_run"] == pytest.approx(3600, rel=1e-2), "all runs fit into the time"
    suite.deadline = time.monotonic() + 60
    assert gpu_suite.settle(suite, 4) == settled  # begun, it is what all its runs are trained for
    with pytest.raises(UserError, match="another --out"):
        gpu_suite.work(suite)  # of two runs


def test_a_comparison_too_short_to_mean_anything_is_not_begun(suite):
    suite.tiny = False
    suite.deadline = time.monotonic() + 60
    measured(suite, 1e5)
    assert gpu_suite.settle(suite, 8) is None
    assert list(gpu_suite.comparison(suite)) == [] and not (suite.out / "comparison.json").exists()


def test_the_steps_end_at_the_papers(suite):
    suite.tiny = False
    suite.deadline = time.monotonic() + 10**7
    measured(suite, 1e6)
    assert gpu_suite.settle(suite, 8)["steps"] == 10_000


# The plan -----------------------------------------------------------------------------------------------------------


def test_the_whole_plan_can_be_asked_for(suite, monkeypatch):
    """Every command of the suite is one that the scripts understand."""
    suite.tiny, suite.device, suite.dry = False, "cuda", True
    suite.deadline = time.monotonic() + 10**5
    planned = list(gpu_suite.jobs(suite))
    assert [stage for stage in gpu_suite.STAGES for job in planned if job.stage == stage] == [
        job.stage for job in planned
    ]
    asked = []
    for job in planned:
        assert job.command[0] == sys.executable and (gpu_suite.ROOT / "scripts" / "benchmark.py").is_file()
        if job.stage in ("optimizers", "training"):
            module = benchmark.module(job.command[2])
            monkeypatch.setattr(module, "run", lambda found: asked.append(found) or 0)
            assert benchmark.main(job.command[2:]) == 0
        if job.stage == "comparison":
            validate(compose(job.command[2:]))
    models = [found.model for found in asked if "model" in found]
    assert len(asked) == len(models) + 1 == 9, "the solvers have shapes of their own"
    assert set(models) == set(gpu_suite.MODELS)
    suite.models = ("llama_60m",)
    fewer = [job.name for job in gpu_suite.jobs(suite) if job.stage in ("optimizers", "training")]
    assert fewer == [
        "optimizers/solvers",
        "optimizers/llama_60m_bf16",
        "optimizers/llama_60m_fp32",
        "training/llama_60m",
    ]
    runs = [job for job in planned if job.stage == "comparison"]
    assert len({compose(job.command[2:]).trainer.steps for job in runs}) == 1
    assert len({job.run for job in runs}) == len(runs) == len(suite.adam_rates) + len(suite.methods)


def test_a_short_comparison_refreshes_as_often_as_the_papers_runs():
    assert gpu_suite.refreshes("alice", 1_000) == ["optimizer.update_interval=20"]
    assert gpu_suite.refreshes("galore", 40) == ["optimizer.update_interval=1"]
    assert gpu_suite.refreshes("fira", 20_000) == ["optimizer.update_interval=200"]
    assert gpu_suite.refreshes("soap", 10_000) == ["optimizer.update_interval=10"]
    assert gpu_suite.refreshes("racs", 1_000) == []


def test_packages_from_wheels_are_there_before_anything_is_imported(tmp_path):
    """The machine may lack what the suite itself imports."""
    wheels, work = tmp_path / "wheels", tmp_path / "work"
    wheels.mkdir()
    trace = "import os, pathlib\npathlib.Path(os.environ['TRACE']).open('a').write('x')\n"
    with zipfile.ZipFile(wheels / "probe-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sitecustomize.py", trace)
        wheel.writestr("probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
        wheel.writestr("probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("probe-1.0.dist-info/RECORD", "")
    words = [
        "--minutes",
        "2",
        "--tiny",
        "--device",
        "cpu",
        "--dry-run",
        "--work",
        str(work),
        "--out",
        str(tmp_path / "out"),
    ]
    command = [sys.executable, str(gpu_suite.ROOT / "scripts/gpu_suite.py"), *words, "--wheels", str(wheels)]
    for started in (1, 2):  # the second time there is nothing to install
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "TRACE": str(tmp_path / "trace")}
        )
        assert done.returncode == 0 and "comparison" in done.stdout, done.stderr
        assert (tmp_path / "trace").read_text() == "x" * started
    (wheels / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    shutil.rmtree(work)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "fetch those of this Python" in done.stderr and not (work / "site").exists()


def test_every_switch_is_a_setting_of_the_trainer():
    for setting in gpu_suite.SWITCHES.values():
        compose(["experiment=quickstart", setting])


def test_data_are_prepared_or_a_mirror(suite, tmp_path):
    suite.data, suite.tokenizer = tmp_path, "spiece.model"
    assert gpu_suite.data_settings(suite, "llama_60m")[0] == "data=c4_local"
    (tmp_path / "manifest.json").write_text("{}")
    assert gpu_suite.data_settings(suite, "llama_60m") == [
        "data=prepared",
        f"data.path={tmp_path}",
        "tokenizer=spiece.model",
    ]


def test_a_dry_run_starts_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--minutes", "90", "--dry-run", "--out", str(out), "--work", str(tmp_path / "work")]
    assert script.main(words) == 0
    text = capsys.readouterr().out
    for name in ("tests/devices", "optimizers/llama_1b_bf16", "training/llama_130m", "comparison/alice"):
        assert f"min  {name}" in text
    assert not out.exists() and not (tmp_path / "work").exists() and str(tmp_path) not in text


def test_without_the_device_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "MACHINE", "raise ValueError('no such device')")
    words = ["--minutes", "1", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert script.main(words) == 1
    assert capsys.readouterr().err == (
        "error: the device cuda cannot be used (no such device): see python scripts/doctor.py, or try --device cpu --tiny.\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    ["--minutes 0", "--minutes 5 --device cpu", "--minutes 5 --stages training,magic", "--minutes 5 --data nowhere"],
)
def test_what_cannot_work_is_refused(words, capsys):
    with pytest.raises(SystemExit) as left:
        script.main(shlex.split(words))
    assert left.value.code == 2 and "error:" in capsys.readouterr().err
