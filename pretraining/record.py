"""The run record: the only thing that leaves the trainer."""

import errno
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import UserError
from data.lines import misfit

from .files import replace_text

C4 = "allenai/c4"  # on the Hub; configs/data/c4.yaml

# Settings that change no number beyond rounding: a run may go on under other values of these.
INDIFFERENT = (
    "run_dir",
    "tokenizer",  # its file may move; the loader compares what it is
    "paths",
    "experiment_name",
    "tracker",
    "data.on_error",  # a run that damage has stopped may go on by leaving it out; the loader refuses the other way
    "data.path",  # a mirror may move; the loader compares what it holds
    "data.retries",
    "data.timeout",
    "data.workers",
    "eval.batch_size",
    "model.attn_implementation",
    "optimizer.log_basis",
    "trainer.compile",
    "trainer.compile_optimizer",
    "trainer.device",
    "trainer.dry_run",
    "trainer.keep_every",
    "trainer.keep_last",
    "trainer.layerwise",
    "trainer.log_every",
    "trainer.loss",
    "trainer.max_skipped",
    "trainer.micro_batch_size",
    "trainer.parallel",
    "trainer.on_nonfinite",  # a run that it has stopped may go on with the other choice
    "trainer.resume",
    "trainer.sample_prompt",
    "trainer.sample_tokens",
    "trainer.save_every",
    "trainer.save_model",
    "trainer.shard_group",
    "trainer.shard_optimizer",
)


class RunRecord:
    """Writes a run folder. Only rank 0 writes; the other ranks call the same methods to no effect.

    Args:
        run_dir: the folder, made if need be.
        cfg: resolved configuration.
        write: False on all ranks but the first.

    Raises:
        UserError: the folder belongs to another configuration.
    """

    def __init__(self, run_dir: str | Path, cfg: DictConfig, write: bool = True) -> None:
        self.path = Path(run_dir)
        self.write = write
        self.config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
        self._refuse_another_configuration()

    def _refuse_another_configuration(self) -> None:
        file = self.path / "config.yaml"
        if not file.exists():
            return
        there = _comparable(read_config(file))
        here = _comparable(self.config)
        differences = _differences(there, without_younger(here, there, self.config))
        if differences:
            raise UserError(
                f"{self.path} holds a run of another configuration ({'; '.join(differences[:4])}): choose another "
                "run_dir, or train anew with trainer.resume=never, which keeps the old folder under another name"
            )

    def refuse_another_tokenizer(self, name: str, fingerprint: str) -> None:
        """Its file may have moved; what it is may not have changed. Raises UserError."""
        file = self.path / "environment.json"
        there = read_json(file) if file.exists() else {}
        known = misfit(there, {"tokenizer": {"fingerprint": str}}) is None
        if known and there["tokenizer"]["fingerprint"] != fingerprint:
            raise UserError(
                f"{self.path} holds a run with another tokenizer than {name}: choose another run_dir, or train anew with "
                "trainer.resume=never, which keeps the old folder under another name"
            )

    def start(self, environment: Mapping[str, Any], step: int, evaluated: bool = True) -> None:
        """Begin to write, after ``step`` finished steps: what tells of later ones is dropped.

        Those steps are about to be done again, and so is the evaluation after ``step`` unless ``evaluated``.
        Environments of resumed parts are kept beside the first one.
        """
        if not self.write:
            return
        with self._writing():
            self._start(environment, step, evaluated)

    def _start(self, environment: Mapping[str, Any], step: int, evaluated: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.config)))
        file = self.path / "environment.json"
        if step and file.exists():
            first = read_json(file)
            try:
                resumed = [part for part in first.get("resumed", []) if part["step"] < step]
            except (KeyError, TypeError) as error:
                raise UserError(f"{file} cannot be read ({error!r} in resumed): restore or remove it") from error
            environment = {**first, "resumed": [*resumed, {"step": step, **environment}]}
        write_json(file, environment)
        for name in ("summary.json", "diverged.json"):
            (self.path / name).unlink(missing_ok=True)
        last_eval = step if evaluated else step - 1
        lines = [
            line
            for line in read_lines(self.metrics_file)
            if line["step"] <= (last_eval if line["kind"] == "eval" else step)
        ]
        replace_text(self.metrics_file, "".join(json.dumps(line) + "\n" for line in lines))
        if self.samples_file.exists():
            written = read_bytes(self.samples_file)
            whole = written[: written.rfind(b"\n") + 1].decode(errors="replace")  # a full disk cuts a line short
            parts = re.findall(r"^--- step (\d{1,18})$(.*?)(?=^--- step \d|\Z)", whole, flags=re.MULTILINE | re.DOTALL)
            kept = (f"--- step {number}{text}" for number, text in parts if int(number) <= last_eval)
            replace_text(self.samples_file, "".join(kept))

    def diverge(self, step: int, message: str) -> None:
        """Write down that training has diverged, until the run goes on."""
        if self.write:
            with self._writing():
                write_json(self.path / "diverged.json", {"step": step, "message": message})

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.txt"

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl; ``step`` counts finished optimizer steps."""
        if self.write:
            with self._writing(), self.metrics_file.open("a") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

    def sample(self, step: int, text: str) -> None:
        if self.write:
            with self._writing(), self.samples_file.open("a", encoding="utf-8") as file:
                file.write(f"--- step {step}\n{text}\n")

    def summary(self, values: Mapping[str, Any]) -> None:
        if self.write:
            with self._writing():
                write_json(self.path / "summary.json", values)

    def flush(self) -> None:
        """Put what was logged on the disk: before a checkpoint says that those steps are done."""
        if not self.write:
            return
        for file in (self.metrics_file, self.samples_file):
            if file.exists():
                with self._writing(), file.open("rb") as opened:
                    os.fsync(opened.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the record in {self.path} cannot be written ({error.strerror or error}): free some space or repair the "
                "filesystem, then run the same command again"
            ) from error


def read_regular(file: Path) -> bytes:
    """The content of a regular file. Opening a pipe that nobody writes to would never return: OSError."""
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    return file.read_bytes()


def read_bytes(file: Path) -> bytes:
    """The same, with UserError."""
    try:
        return read_regular(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}): restore or remove it") from error


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a last one cut short by a crash is dropped.

    Raises:
        UserError: another line is damaged.
    """
    if not file.exists():
        return []
    lines = read_bytes(file).splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    found = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            if not isinstance(line["step"], int) or not isinstance(line["kind"], str):
                raise ValueError("step or kind has another type")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{file}, line {number}: not a line of a run record ({type(error).__name__}); restore the file, or "
                "remove it and the checkpoints beside it to start anew"
            ) from error
        found.append(line)
    return found


def read_json(file: Path) -> dict[str, Any]:
    """Raises UserError where the file does not hold one JSON object."""
    try:
        values = json.loads(read_bytes(file))
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {error}): restore or remove it") from error
    return values


def read_config(file: Path) -> dict[str, Any]:
    """A run's config.yaml, as plain values.

    Raises:
        UserError: it is not what `RunRecord` writes.
    """
    try:
        text = read_bytes(file).decode()
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has aliases, which could unfold without end")
        values = OmegaConf.to_container(OmegaConf.create(text))
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values) or not values:
            raise ValueError("not a group of settings")
    except UserError:
        raise
    except Exception as error:  # of two parsers, one in the other
        raise UserError(
            f"{file} is not the configuration of a run ({type(error).__name__}): restore it, choose another run_dir, or "
            "train anew with trainer.resume=never, which keeps the folder under another name"
        ) from error
    return values  # type: ignore[return-value]


def at_its_commit(data: DictConfig, run_dir: Path) -> DictConfig:
    """These settings, at the commit that a run of the same branch began with: the branch may have moved since."""
    files = run_dir / "environment.json", run_dir / "config.yaml"
    if data.get("kind") != "hub" or not all(file.exists() for file in files):
        return data
    began, there = read_json(files[0]), read_config(files[1])
    known = misfit(began, {"data": {"train": {"revision": str}}}) is None and misfit(there, {"data": {}}) is None
    if not known or any(there["data"].get(key) != data.get(key) for key in ("name", "revision")):
        return data
    return at_commit(data, began["data"]["train"]["revision"])


def at_commit(data: DictConfig, commit: str) -> DictConfig:
    return OmegaConf.merge(data, {"revision": commit})  # type: ignore[return-value]


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    replace_text(file, json.dumps(values, indent=2) + "\n")


def write_report(file: Path, values: Mapping[str, Any]) -> None:
    """The file that a user has asked for; its folder is made.

    Raises:
        UserError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, values)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror or error}): choose another file") from error


def set_aside(run_dir: Path) -> Path | None:
    """Rename an existing run folder to ``name~1`` (or ~2, ...), so that starting over loses nothing."""
    if not run_dir.exists():
        return None
    number = next(n for n in range(1, 10_000) if not run_dir.with_name(f"{run_dir.name}~{n}").exists())
    return run_dir.rename(run_dir.with_name(f"{run_dir.name}~{number}"))


def environment(device: torch.device, processes: int, **more: Any) -> dict[str, Any]:
    """Commit, versions, hardware and command, for environment.json."""
    hardware: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": processes,
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # a virtual machine may hide some of a processor's
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    changes = _git("status", "--porcelain", "--untracked-files=no")
    packages = ("torch", "transformers", "accelerate", "datasets", "hydra-core", "sentencepiece", "numpy")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        # torch's own word: that of its package does not say which build it is (+cpu, +cu130).
        "versions": {name: _version(name) for name in packages} | {"torch": str(torch.__version__)},
        "hardware": hardware,
        **more,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _comparable(config: Any) -> dict[str, Any]:
    flat = dict(_flatten(config))
    return {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(name + ".") for name in INDIFFERENT)
    }


def without_younger(here: Mapping[str, Any], there: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """``here`` without the settings that ``there``, of an older version, does not know, where they are at their defaults.

    Args:
        config: the whole of it: which model, optimizer, data and seed have those defaults.
    """
    younger = here.keys() - there.keys()
    defaults = _defaults(config) if younger else {}
    return {key: x for key, x in here.items() if not (key in younger and key in defaults and defaults[key] == x)}


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting as it is where only model, optimizer, data and seed are chosen."""
    from .config import compose

    def composed(choice: str) -> dict[str, Any]:
        chosen = [choice, f"optimizer={config['optimizer']['name']}", f"seed={config.get('seed', 42)}"]
        try:
            return dict(_flatten(OmegaConf.to_container(compose(chosen), resolve=True)))
        except (UserError, OmegaConfBaseException):  # a model of one's own, or a setting that must be given
            return {}

    kind, name = (config.get("data", {}).get(key) for key in ("kind", "name"))
    data = composed(f"data={kind if kind != 'hub' else 'c4' if name == C4 else 'hub'}")
    rest = composed(f"model={config.get('model', {}).get('name')}")
    of_data = {key: value for key, value in data.items() if key.startswith("data.")}
    return {key: value for key, value in rest.items() if not key.startswith("data.")} | of_data


def _flatten(node: Any, prefix: str = ""):
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    keys = sorted(old.keys() | new.keys())
    return [f"{k}: {old.get(k)} there, {new.get(k)} here" for k in keys if old.get(k) != new.get(k)]
