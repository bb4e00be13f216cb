"""The doctor: what it says of machines that are made up, and of this one."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from pretraining.config import compose
from scripts import doctor as script

ROOT = Path(__file__).parents[2]


def levels(findings):
    return [(finding.level, finding.what) for finding in findings]


def of(findings, what):
    """The one line about it."""
    (found,) = [finding for finding in findings if finding.what == what]
    return found


@pytest.mark.parametrize(
    ("version", "place"),
    [("3.11.7", 0), ("3.13.0rc1", 0), ("3.10.12", -1), ("3.14.0", 1), ("2.13.0+cpu", -1), ("4.0", 1)],
)
def test_versions(version, place):
    assert script.within(version, script.PYTHONS) == place


def test_a_package_that_is_not_there_matters_only_if_the_run_asks_for_it(monkeypatch):
    monkeypatch.setattr(script, "_version", lambda name: None if name in ("wandb", "bitsandbytes") else "1")
    assert levels(script.optional(compose(["experiment=quickstart"]))) == [("ok", "packages")]
    needed, rest = script.optional(compose(["experiment=quickstart", "tracker.name=wandb"]))
    assert needed.level == "FIX" and "pip install wandb" in needed.text
    assert "bitsandbytes" in rest.text and "wandb" not in rest.text


def test_packages_of_another_version_are_named(monkeypatch):
    versions = {"transformers": "1.0", "accelerate": None, "tensorboard": None}
    monkeypatch.setattr(script, "_version", lambda name: versions.get(name, "0"))
    missing, others = [f for f in script.versions() if f.what == "packages"]
    assert missing.level == "FIX" and "accelerate not installed" in missing.text and "tensorboard" not in missing.text
    assert others.level == "note" and "transformers 1.0" in others.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there():
    found = of(script.devices(compose(["trainer.device=cuda"])), "devices")
    assert found.level == "FIX" and "torch sees no GPU" in found.text
    assert of(script.devices(compose(["trainer.device=cpu"])), "devices").level == "ok"


def test_gpus_that_differ_or_cannot_compute_in_bfloat16(monkeypatch):
    GPU = namedtuple("GPU", "name total_memory major")
    machine = [GPU("new", 80 * 2**30, 9), GPU("old", 16 * 2**30, 7)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(machine))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: machine[i])
    found = list(script.devices(compose(["trainer.precision=bf16"])))
    assert levels(found) == [("ok", "devices"), ("note", "devices"), ("FIX", "bf16")]
    assert found[0].text == "2 GPUs: new (80 GiB), old (16 GiB)"
    machine.pop()
    assert levels(script.devices(compose(["trainer.precision=bf16"]))) == [("ok", "devices")]


def test_what_is_in_the_shell():
    cfg = compose(["trainer.device=cpu"])
    assert levels(script.launcher(cfg, {"PATH": "/bin"})) == [("ok", "launcher")]
    found = list(script.launcher(cfg, {"WORLD_SIZE": "2", "NCCL_DEBUG": "INFO"}))
    assert levels(found) == [("FIX", "launcher"), ("note", "launcher")]
    assert "RANK is not" in found[0].text and "NCCL_DEBUG=INFO, WORLD_SIZE=2" in found[1].text
    # The doctor itself may be started by srun, once on each node.
    assert levels(script.launcher(cfg, {"SLURM_STEP_NUM_TASKS": "2"})) == [("ok", "launcher")]


@pytest.mark.parametrize(
    ("text", "level", "said"),
    [
        (None, "ok", "no default settings"),
        ("distributed_type: MULTI_GPU\nnum_processes: 8\nmixed_precision: bf16\n", "note", "MULTI_GPU, 8 processes"),
        ("distributed_type: 'NO'\nnum_processes: 1\n", "note", "NO, 1 process;"),
        ("distributed_type: NO\n", "note", "NO, 1 process;"),
        ("distributed_type: FSDP\nnum_processes: 8\n", "FIX", "asks for FSDP, which train.py refuses"),
        ("distributed_type: MULTI_CPU\nnum_processes: 2\n", "FIX", "asks for 2 processes and starts one"),
        ("num_processes: 2\n", "FIX", "cannot be read"),
        ("[", "FIX", "cannot be read"),
    ],
)
def test_what_accelerate_config_has_left(tmp_path, text, level, said):
    if text is not None:
        (tmp_path / "accelerate").mkdir()
        (tmp_path / "accelerate/default_config.yaml").write_text(text)
    found = of(script.accelerate_settings({"HF_HOME": str(tmp_path)}), "accelerate")
    assert found.level == level and said in found.text
    assert level == "ok" or "--config_file configs/launcher/" in found.text


def test_files_that_a_run_needs(tmp_path):
    cfg = compose(["experiment=quickstart"])
    assert levels(script.offline_files(cfg, True)) == [("ok", "tokenizer"), ("ok", "data")]
    cfg = compose(["experiment=quickstart", "tokenizer=sample_4k", "data=c4_local", f"data.path={tmp_path}"])
    tokenizer, data = script.offline_files(cfg, False)
    assert (tokenizer.level, data.level) == ("FIX", "FIX")
    assert "sample_4k has" in tokenizer.text and str(tmp_path) in data.text
    cfg = compose(["data=c4", f"tokenizer={tmp_path}/none.model"])
    assert levels(script.offline_files(cfg, True)) == [("FIX", "tokenizer"), ("FIX", "data")]
    assert levels(script.offline_files(cfg, False)) == [("FIX", "tokenizer"), ("note", "data")]


MOUNTS = """\
overlay / overlay rw 0 0
server:/export /home nfs4 rw 0 0
/dev/sdb1 /home/me/scratch\\040disk xfs rw 0 0
tmpfs /run tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/runs", "nfs4"),
        ("/home", "nfs4"),
        ("/homes/me", "overlay"),
        ("/home/me/scratch disk/runs", "xfs"),
        ("/run/user", "tmpfs"),
        ("/", "overlay"),
    ],
)
def test_the_filesystem_of_a_folder(path, kind):
    assert script.filesystem(Path(path), MOUNTS) == kind
    assert script.filesystem(Path(path), "") == ""


def test_the_run_folder_is_tried_and_nothing_left_there(tmp_path, monkeypatch):
    cfg = compose([f"run_dir={tmp_path}/a/b"])
    monkeypatch.setattr(script, "PROBE", 2**20)
    found = list(script.run_folder(cfg, 2**30, 2**20))
    assert not any(finding.level == "FIX" for finding in found)
    assert {"run_dir", "speed", "clock"} <= {finding.what for finding in found}
    assert list(tmp_path.iterdir()) == []
    found = list(script.run_folder(cfg, 2**60, 2**20))
    assert found[0].level == "FIX" and "lower trainer.keep_last" in found[0].text
    (tmp_path / "a").write_text("")
    assert levels(script.run_folder(cfg, 0, 1)) == [("FIX", "run_dir")]


@pytest.mark.parametrize(
    ("measured", "kind", "expected"),
    [
        ((500.0, 0.001, 0.0, True), "nfs4", [("ok", "run_dir"), ("ok", "speed"), ("ok", "run_dir"), ("ok", "clock")]),
        ((500.0, 0.001, 0.0, True), "ext4", [("ok", "run_dir"), ("ok", "speed"), ("note", "run_dir"), ("ok", "clock")]),
        ((5.0, 0.1, 90.0, False), "lustre",
         [("ok", "run_dir"), ("note", "speed"), ("note", "run_dir"), ("ok", "run_dir"), ("note", "clock")]),
    ],
)  # fmt: skip
def test_places_of_a_run(tmp_path, monkeypatch, measured, kind, expected):
    monkeypatch.setattr(script, "_measure", lambda place: measured)
    monkeypatch.setattr(script, "filesystem", lambda path, mounts: kind)
    found = list(script.run_folder(compose([f"run_dir={tmp_path}/run"]), 2**20, 2**30))
    assert levels(found) == expected


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def full(place):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "_measure", full)
    found = of(script.run_folder(compose([f"run_dir={tmp_path}/run"]), 0, 1), "run_dir")
    assert found.level == "FIX" and "No space left on device" in found.text and "choose another run_dir" in found.text


def test_quotas():
    text = (
        "Disk quotas for user me (uid 1000): \n"
        "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"
        "server:/home 9961472* 9437184 10485760 6days 200 0 0 \n"
        "server:/data 9800000 0 10485760 - 200 0 0 -\n"
        "server:/free 1000 0 10485760 - 200 0 0 -\n"
        "server:/none 99999999 0 0 - 200 0 0 -\n"
    )
    home, data = script.quotas(text)
    assert home.level == "FIX" and "server:/home: 9.5 of 9.0 GiB" in home.text
    assert data.level == "note" and "server:/data: 9.3 of 10.0 GiB" in data.text


def test_caches_that_are_not_below_the_root(tmp_path):
    root = str(tmp_path / "cache")
    inside = {name: f"{root}/{name}" for name in script.cache_variables()}
    assert levels(script.caches({"RACS_ALICE_CACHE": root, **inside})) == [("ok", "caches")]
    found = list(script.caches({"RACS_ALICE_CACHE": root, **inside, "TRITON_CACHE_DIR": "/home/me/.triton"}))
    assert found[0].level == "FIX" and "not TRITON_CACHE_DIR: . scripts/slurm/caches.sh" in found[0].text
    assert levels(script.caches({})) == [("note", "caches")]


@pytest.mark.parametrize(
    ("files", "shared", "gpus", "expected"),
    [
        (65536, 2**34, 8, ["ok", "ok"]),
        (256, 2**34, 0, ["FIX", "ok"]),
        (1024, 2**26, 8, ["note", "FIX"]),
        (1024, 2**26, 1, ["ok", "ok"]),
        (resource.RLIM_INFINITY, 2**34, 8, ["ok", "ok"]),
    ],
)
def test_limits(tmp_path, monkeypatch, files, shared, gpus, expected):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (files, resource.RLIM_INFINITY))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(total=shared))
    found = list(script.limits(gpus, tmp_path))
    assert [finding.level for finding in found] == expected
    assert all("/" in f.text or "ulimit -n" in f.text for f in found if f.level == "FIX")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('Unable to find address for: eth7')", "(RuntimeError: Unable to find address for: eth7)"),
        ("import time; time.sleep(60)", "(nothing within"),
    ],
)
def test_processes_that_do_not_reach_each_other(monkeypatch, code, said):
    monkeypatch.setattr(script, "PAIR", code)
    monkeypatch.setattr(script, "PATIENCE", -3)
    pair = script.Pair("gloo", 2)
    found = of(pair.findings(), "gloo")
    assert found.level == "FIX" and said in found.text and "set GLOO_SOCKET_IFNAME" in found.text
    assert all(job.poll() is not None for job in pair.jobs)


def test_one_check_that_breaks_does_not_hide_the_others(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(script, "pairs", lambda cfg: [])
    monkeypatch.setattr(script, "caches", broken)
    found = script.examine(compose(["experiment=quickstart"]))
    assert of(found, "caches").text.startswith("could not be checked (ZeroDivisionError: oh)")
    assert of(found, "gloo").level == "FIX" and ("ok", "data") in levels(found)


def test_this_machine_can_run_the_quickstart(tmp_path):
    """The whole, with two real processes."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "RACS_", "MASTER_", "ACCELERATE_"))}
    words = ["--json", "experiment=quickstart", "trainer.device=cpu", f"run_dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "scripts/doctor.py", *words], cwd=ROOT, env=ours, capture_output=True, text=True, timeout=120
    )
    found = json.loads(done.stdout)["findings"]
    levels = {finding["what"]: finding["level"] for finding in found}
    assert levels["gloo"] == levels["data"] == levels["tokenizer"] == "ok", found
    assert done.returncode == any(finding["level"] == "FIX" for finding in found)


def test_settings_that_are_wrong_are_said_before_anything_is_checked(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    assert script.main(["trainer.step=3"]) == 2
    assert capsys.readouterr().err.startswith("error: There is no setting 'trainer.step'. Did you mean 'trainer.steps'")
