"""Is this machine ready for a run, and if not, what has to be put right?

    python scripts/doctor.py                                              for train.py without arguments
    python scripts/doctor.py optimizer=alice model=llama_1b data=prepared data.path=DIR    for that run
    srun --ntasks-per-node=1 python scripts/doctor.py ...                 on every node of a job
    python scripts/doctor.py --json ...                                   for programs

Each line begins with ok, note (works, but worth knowing) or FIX (will fail, and what to do). Exit code 1 if there is a
FIX, 2 if the settings are wrong. It takes some 10 seconds, writes 64 MiB beside the run folder and removes them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.errors import UserError  # noqa: E402
from pretraining.config import compose, quoted, validate  # noqa: E402

PYTHONS, TORCHES = ((3, 11), (3, 13)), ((2, 11), (2, 13))  # tested: from, to
OPTIONAL = {  # package: what needs it
    "tensorboard": ("tracker.name=tensorboard",),
    "wandb": ("tracker.name=wandb",),
    "pytorch-optimizer": ("optimizer=lion", "optimizer=signum"),
    "adam-mini": ("optimizer=adam_mini",),
    "bitsandbytes": ("optimizer=adam_8bit",),
    "liger-kernel": ("trainer.loss=liger",),
}
SHARED = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse.ceph",
    "wekafs",
    "smb3",
    "cifs",
    "glusterfs",
    "panfs",
)
PROBE = 64 * 2**20  # bytes written to measure
SLOW = 50.0  # MiB/s
MIB, GIB = 2**20, 2**30
PATIENCE = 60  # seconds for processes that try to reach each other
# Two processes add up their ranks.
PAIR = f"""
import datetime, os, sys, torch, torch.distributed as dist
backend, rank, world = sys.argv[1], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
dist.init_process_group(backend, timeout=datetime.timedelta(seconds={PATIENCE}))
x = torch.full((1000,), float(rank + 1), device=device)
dist.all_reduce(x)
assert x.tolist() == [world * (world + 1) / 2] * 1000
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Finding:
    """One line: ``level`` is ok, note or FIX; ``text`` of a FIX says what to do."""

    level: str
    what: str
    text: str


def ok(what: str, text: str) -> Finding:
    return Finding("ok", what, text)


def note(what: str, text: str) -> Finding:
    return Finding("note", what, text)


def fix(what: str, text: str) -> Finding:
    return Finding("FIX", what, text)


# Software -------------------------------------------------------------------------------------------------------------


def within(version: str, tested: tuple[tuple[int, int], tuple[int, int]]) -> int:
    """-1: older than what is tested; 0: tested; 1: newer."""
    numbers = re.findall(r"\d+", version)
    ours = (int(numbers[0]), int(numbers[1]))
    return -1 if ours < tested[0] else int(ours > tested[1])


def _range(tested: tuple[tuple[int, int], tuple[int, int]]) -> str:
    return " to ".join(f"{major}.{minor}" for major, minor in tested)


def versions() -> Iterator[Finding]:
    import torch

    for what, version, tested in (
        ("python", platform.python_version(), PYTHONS),
        ("torch", torch.__version__, TORCHES),
    ):
        place = within(version, tested)
        if place < 0:
            yield fix(what, f"{version} is too old: install {what} {_range(tested)}")
        elif place > 0:
            yield note(what, f"{version} is newer than what is tested, {_range(tested)}")
        else:
            yield ok(what, version)
    pinned = dict(
        line.strip().split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line
    )
    found = {name: _version(name) for name in pinned if name != "torch"}
    missing = [name for name, version in found.items() if version is None and name not in OPTIONAL]
    if missing:
        yield fix("packages", f"{', '.join(missing)} not installed: make setup, or pip install -r requirements.txt")
    others = [f"{name} {version}" for name, version in found.items() if version not in (None, pinned[name])]
    if others:
        yield note("packages", f"other versions than in requirements.txt: {', '.join(others)}")
    if not missing and not others:
        yield ok("packages", "as in requirements.txt")


def optional(cfg: Any) -> Iterator[Finding]:
    """A package that is not there matters only if the run asks for it."""
    asked = {f"tracker.name={cfg.tracker.name}", f"trainer.loss={cfg.trainer.loss}", f"optimizer={cfg.optimizer.name}"}
    missing = {name: uses for name, uses in OPTIONAL.items() if _version(name) is None}
    needed = [name for name, uses in missing.items() if asked.intersection(uses)]
    if needed:
        yield fix("packages", f"this run needs {', '.join(needed)}: pip install {' '.join(needed)}")
    others = [f"{name} ({', '.join(uses)})" for name, uses in missing.items() if name not in needed]
    if others:
        yield ok("packages", f"optional, not installed, not needed here: {', '.join(others)}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# Devices and processes ------------------------------------------------------------------------------------------------


def devices(cfg: Any) -> Iterator[Finding]:
    import torch

    wants_bf16 = cfg.trainer.precision in ("bf16", "bf16_mixed")
    if torch.cuda.is_available() and cfg.trainer.device != "cpu":
        every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        kinds = dict.fromkeys((p.name, round(p.total_memory / GIB)) for p in every)
        text = ", ".join(f"{name} ({memory} GiB)" for name, memory in kinds)
        yield ok("devices", f"{len(every)} GPU{'s' * (len(every) != 1)}: {text}")
        if len(kinds) > 1:
            yield note(
                "devices", "the GPUs differ, and all wait for the slowest: choose equal ones by CUDA_VISIBLE_DEVICES"
            )
        if wants_bf16 and any(p.major < 8 for p in every):
            yield fix("bf16", "not all GPUs compute in bfloat16: set trainer.precision=fp32, or take newer ones")
        return
    if cfg.trainer.device == "cuda":
        yield fix("devices", f"trainer.device=cuda, but torch sees no GPU: {_why_no_gpu(torch)}")
    elif cfg.trainer.device == "auto" and shutil.which("nvidia-smi"):
        yield fix(
            "devices", f"there is nvidia-smi, but torch sees no GPU: {_why_no_gpu(torch)}, or set trainer.device=cpu"
        )
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        yield ok("devices", f"no GPU; CPU with {os.cpu_count()} cores, {memory:.0f} GiB")
        from pretraining.plan import choose_precision

        if wants_bf16 and cfg.trainer.device == "auto" and choose_precision("auto", torch.device("cpu")) == "fp32":
            yield note("bf16", "a CPU computes bfloat16 slowly: trainer.precision=fp32 for trying things out")


def _why_no_gpu(torch: Any) -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for CPUs, install one that is built for CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty, unset it"
    return (
        f"update the driver to one for CUDA {torch.version.cuda}, for which this torch is built, or take another torch"
    )


class Pair:
    """Processes that try to reach each other, started now and asked about later."""

    def __init__(self, backend: str, count: int) -> None:
        self.backend, self.count = backend, count
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        # Not what a launcher has left here for others
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "MASTER_", "SLURM_", "PMI"))}
        ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        self.began = time.monotonic()
        self.jobs = [
            subprocess.Popen(
                [sys.executable, "-c", PAIR, backend],
                env=ours | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]

    def findings(self) -> Iterator[Finding]:
        what = {"gloo": "gloo", "nccl": "NCCL"}[self.backend]
        said, codes = [], []
        try:
            for job in self.jobs:
                said.append(job.communicate(timeout=max(1.0, self.began + PATIENCE + 3 - time.monotonic()))[1])
                codes.append(job.returncode)
        except subprocess.TimeoutExpired:
            codes.append(None)
        finally:
            for job in self.jobs:
                job.kill()
                job.wait()
        if codes == [0] * self.count:
            yield ok(what, f"{self.count} process{'es' * (self.count != 1)} of this machine added up numbers")
            return
        lines = [line for text in said for line in text.splitlines() if re.match(r"(\[rank\d\]: )?[\w.]*Error", line)]
        why = f" ({lines[-1][:200]})" if lines else f" (nothing within {PATIENCE} s)"
        advice = {
            "gloo": "set GLOO_SOCKET_IFNAME to the network interface of this machine, and let its host name resolve",
            "nccl": "run again with NCCL_DEBUG=INFO, which names the reason; often NCCL_SOCKET_IFNAME or the driver",
        }[self.backend]
        yield fix(what, f"processes of this machine do not reach each other{why}: {advice}")


def pairs(cfg: Any) -> list[Pair]:
    import torch

    if not torch.distributed.is_available():
        return []
    started = [Pair("gloo", 2)]
    if cfg.trainer.device != "cpu" and torch.cuda.is_available() and torch.distributed.is_nccl_available():
        started.append(Pair("nccl", min(2, torch.cuda.device_count())))
    return started


def launcher(cfg: Any, environ: Mapping[str, str]) -> Iterator[Finding]:
    """What is in the environment, and Accelerate's settings of this machine."""
    import torch

    from pretraining.launch import TASKS, check_launch

    own = {name: value for name, value in environ.items() if name not in TASKS}  # they started the doctor
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.device != "cpu" else "cpu")
    try:
        check_launch(own, device)
    except UserError as error:
        yield fix("launcher", str(error))
    names = (
        r"RANK|WORLD_SIZE|LOCAL_RANK|MASTER_(ADDR|PORT)|(NCCL|GLOO|ACCELERATE|TORCH_NCCL|FSDP)_\w+|CUDA_VISIBLE_DEVICES"
    )
    there = sorted(name for name in environ if re.fullmatch(names, name))
    if there:
        yield note("launcher", "set in this shell, for every run: " + ", ".join(f"{n}={environ[n]}" for n in there))
    else:
        yield ok("launcher", "no variables of a launcher in this shell")


def accelerate_settings(environ: Mapping[str, str]) -> Iterator[Finding]:
    """`accelerate config` leaves a file that every later `accelerate launch` reads, unless it is given another."""
    import yaml

    cache = Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    folder = Path(environ.get("HF_HOME") or cache).expanduser() / "accelerate"
    files = [file for file in (folder / "default_config.yaml", folder / "default_config.json") if file.is_file()]
    if not files:
        yield ok("accelerate", "no default settings on this machine")
        return
    own = "take --config_file configs/launcher/NAME.yaml, which wins over it"
    try:
        settings = yaml.safe_load(files[0].read_text())
        kind, count = str(settings["distributed_type"]), int(settings.get("num_processes", 1))
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        yield fix("accelerate", f"{files[0]} cannot be read ({type(error).__name__}): remove it, or {own}")
        return
    kind = "NO" if kind == "False" else kind  # YAML reads an unquoted NO so
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU"):
        yield fix("accelerate", f"{files[0]} asks for {kind}, which train.py refuses: {own}")
    elif kind in ("NO", "MULTI_CPU") and count > 1:
        yield fix("accelerate", f"{files[0]} asks for {count} processes and starts one ({kind}): {own}")
    else:
        text = f"{files[0]}: {kind}, {count} process{'es' * (count != 1)}; its precision and compilation change nothing here"
        yield note("accelerate", f"{text}, its number of processes does: {own}")


# Files ----------------------------------------------------------------------------------------------------------------


def offline_files(cfg: Any, offline: bool) -> Iterator[Finding]:
    """Tokenizer and text, without a network. Where the run may use one (not ``offline``), what is missing is only noted."""
    from data import load_tokenizer, open_source

    need = fix if offline else note
    try:
        tokenizer = load_tokenizer(cfg.tokenizer)
        if tokenizer.vocab_size != cfg.model.vocab_size:
            yield fix(
                "tokenizer",
                f"{cfg.tokenizer} has {tokenizer.vocab_size:,} pieces, {cfg.model.name} has {cfg.model.vocab_size:,}: set "
                f"tokenizer, or model.vocab_size={tokenizer.vocab_size}",
            )
        else:
            yield ok("tokenizer", f"{cfg.tokenizer}, {tokenizer.vocab_size:,} pieces, there without a network")
    except UserError as error:
        on_hub = "/" not in str(cfg.tokenizer) and not Path(cfg.tokenizer).exists()
        if on_hub:
            load = f"python -c \"from data import load_tokenizer; load_tokenizer('{cfg.tokenizer}')\""
            text = f"{cfg.tokenizer} is not on this machine, and nodes without a network cannot fetch it: {load} where there "
            yield need("tokenizer", text + "is one, with the same HF_HOME, or give the path of its file")
        else:
            yield fix("tokenizer", str(error))
    if cfg.data.kind == "hub":
        text = f"data={cfg.data.name} is streamed from the Hub by every node, which needs a network: scripts/fetch_c4.py or "
        yield need("data", text + "scripts/prepare_data.py bring it to a disk (docs/data.md)")
        return
    try:
        for split in ("train", "validation"):
            open_source(cfg.data, split)
        yield ok("data", f"{cfg.data.kind}, both splits open without a network")
    except UserError as error:
        yield fix("data", str(error))


def existing(path: Path) -> Path:
    """The nearest folder that is there."""
    path = path.expanduser().absolute()
    while not path.is_dir():
        path = path.parent
    return path


def filesystem(path: Path, mounts: str) -> str:
    """The type of the filesystem that holds ``path``, from the text of /proc/mounts; "" where unknown."""
    best, kind = "", ""
    for line in mounts.splitlines():
        _, place, this, *_ = [*line.split(), "", "", ""]
        place = place.replace("\\040", " ")
        inside = str(path) == place or str(path).startswith(place.rstrip("/") + "/")
        if place and inside and len(place) >= len(best):
            best, kind = place, this
    return kind


def run_folder(cfg: Any, needed: int, one: int) -> Iterator[Finding]:
    """Place, room, speed and what saving relies on: flushing, renaming, links. Bytes of the run, of one checkpoint."""
    run_dir = Path(cfg.run_dir)
    files = [place for place in (run_dir, *run_dir.parents) if place.exists() and not place.is_dir()]
    if files:
        yield fix("run_dir", f"{files[0]} is a file: choose another run_dir or paths.runs")
        return
    folder = existing(run_dir)
    try:
        kind = filesystem(folder.resolve(), Path("/proc/mounts").read_text())
    except OSError:
        kind = ""
    where = f"{run_dir} ({kind or 'unknown filesystem'})"
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as place:
            speed, flush, skew, links = _measure(Path(place))
    except OSError as error:
        yield fix(
            "run_dir", f"{where} cannot be written ({error.strerror or error}): choose another run_dir or paths.runs"
        )
        return
    free = shutil.disk_usage(folder).free
    room = f"{free / GIB:.1f} GiB free, about {needed / GIB:.1f} GiB needed"
    if needed > free:
        yield fix("run_dir", f"{where}: {room}: free some, lower trainer.keep_last or choose another place")
    else:
        yield ok("run_dir", f"{where}: {room}")
    pace = f"{speed:.0f} MiB/s to the disk, {1000 * flush:.1f} ms to flush a line; a checkpoint takes about "
    pace += f"{one / MIB / speed:.0f} s"
    slow = speed < SLOW and one / MIB / speed > 60
    yield (note if slow else ok)(
        "speed", pace + (": choose a faster place, or a larger trainer.save_every" if slow else "")
    )
    if not links:
        yield note(
            "run_dir", "no hard links here: two jobs that start in the same instant might both get the run's lock"
        )
    if kind in ("tmpfs", "ramfs"):
        yield note("run_dir", "it lies in memory: everything is gone when the machine restarts; set paths.runs")
    elif kind in SHARED:
        yield ok("run_dir", f"{kind}: other nodes can see it, if they have it mounted")
    else:
        yield note(
            "run_dir", "a local disk, as it seems: with several nodes, paths.runs has to be where all of them see it"
        )
    if abs(skew) > 5:
        yield note("clock", f"this machine's clock is {skew:+.0f} s from that of {folder}: have it set (NTP)")
    else:
        yield ok("clock", "agrees with that of the run folder")


def _measure(place: Path) -> tuple[float, float, float, bool]:
    """MiB/s, seconds to flush a line, seconds that our clock is ahead, whether hard links work."""
    block = os.urandom(MIB)  # a filesystem may compress
    began = time.perf_counter()
    with (place / "a").open("wb") as file:
        for _ in range(PROBE // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    speed = PROBE / MIB / (time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(5):
        with (place / "line").open("ab") as file:
            file.write(b"line\n")
            file.flush()
            os.fsync(file.fileno())
    flush = (time.perf_counter() - began) / 5
    skew = time.time() - (place / "line").stat().st_mtime
    (place / "a").rename(place / "b")
    try:
        os.link(place / "line", place / "link")
        links = True
    except OSError:
        links = False
    return speed, flush, skew, links


def quotas(text: str) -> Iterator[Finding]:
    """From the output of `quota -w`: numbers of KiB or files, each with soft and hard limits."""
    for line in text.splitlines():
        words = line.split()
        if len(words) < 7 or not re.fullmatch(r"\d+\*?", words[1]):
            continue
        used, soft, hard = (int(word.rstrip("*")) for word in words[1:4])
        limit = min((x for x in (soft, hard) if x), default=0)
        if limit and used >= 0.9 * limit:
            say = fix if used >= limit else note
            yield say("quota", f"{words[0]}: {used / 2**20:.1f} of {limit / 2**20:.1f} GiB are used: free some space")


def disk_quotas() -> Iterator[Finding]:
    found = None
    if shutil.which("quota"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run(["quota", "-w"], capture_output=True, text=True, timeout=5).stdout
    if found is None:
        yield ok("quota", "there is no `quota` here; what the filesystems call free is above")
    else:
        yield from list(quotas(found)) or [ok("quota", "none is nearly full")]


def cache_variables() -> list[str]:
    return re.findall(r"^ *export (\w+)=", (ROOT / "scripts/slurm/caches.sh").read_text(), re.MULTILINE)


def caches(environ: Mapping[str, str]) -> Iterator[Finding]:
    root = environ.get("RACS_ALICE_CACHE")
    home = Path("~").expanduser()
    use = "export RACS_ALICE_CACHE=DIR; . scripts/slurm/caches.sh"
    if root:
        outside = [name for name in cache_variables() if not Path(environ.get(name) or "/").is_relative_to(Path(root))]
        if outside:
            yield fix(
                "caches", f"RACS_ALICE_CACHE={root}, but not {', '.join(outside)}: . scripts/slurm/caches.sh sets them"
            )
    places = {
        "HF_HOME": environ.get("HF_HOME") or home / ".cache/huggingface",
        "TORCHINDUCTOR_CACHE_DIR": environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir(),
        "TRITON_CACHE_DIR": environ.get("TRITON_CACHE_DIR") or home / ".triton",
        "temporary files": tempfile.gettempdir(),
    }
    bad = []
    for name, place in places.items():
        folder = existing(Path(place))
        if not os.access(folder, os.W_OK | os.X_OK):
            bad.append(f"{name} ({place})")
    if bad:
        yield fix("caches", f"cannot write {', '.join(bad)}: {use}")
    elif root:
        yield ok("caches", f"below {root}, {shutil.disk_usage(existing(Path(root))).free / GIB:.0f} GiB free")
    else:
        free = shutil.disk_usage(existing(Path(places["HF_HOME"]))).free / GIB
        yield note("caches", f"in {places['HF_HOME']} ({free:.0f} GiB free) and other places; all in one: {use}")


# Limits ---------------------------------------------------------------------------------------------------------------


def limits(gpus: int, shm: Path = Path("/dev/shm")) -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 1024:
        yield fix(
            "limits",
            f"{soft} open files are too few: ulimit -n {min(65536, hard) if hard > 0 else 65536} before the run",
        )
    elif soft != resource.RLIM_INFINITY and soft < 4096 and gpus > 1:
        yield note("limits", f"{soft} open files may be too few for {gpus} GPUs: ulimit -n 65536 before the run")
    else:
        yield ok("limits", f"{'unlimited' if soft == resource.RLIM_INFINITY else soft} open files")
    if not shm.is_dir():
        return
    size = shutil.disk_usage(shm).total
    if gpus > 1 and size < GIB:
        text = f"{shm} has {size / MIB:.0f} MiB, through which the GPUs of a machine talk: in a container, --shm-size=8g or "
        yield fix("limits", text + "--ipc=host")
    else:
        yield ok("limits", f"{shm} has {size / GIB:.1f} GiB")


# The whole ------------------------------------------------------------------------------------------------------------


def sizes(cfg: Any) -> tuple[int, int]:
    """Bytes that the run will write, and those of one checkpoint."""
    from pretraining.plan import make_plan

    plan, t = make_plan(cfg), cfg.trainer
    count = 0 if not t.save_every else t.keep_last + 1 + (t.steps // t.keep_every if t.keep_every else 0)
    return (count + bool(t.save_model)) * plan.checkpoint_bytes, plan.checkpoint_bytes


def examine(cfg: Any, offline: bool = False) -> list[Finding]:
    """All checks; one that breaks is a finding, and the others go on."""
    import torch

    found: list[Finding] = []

    def add(what: str, check: Callable[[], Iterator[Finding]]) -> None:
        try:
            found.extend(check())
        except UserError as error:
            found.append(fix(what, str(error)))
        except Exception as error:  # a machine may be broken in ways that nobody thought of
            found.append(fix(what, f"could not be checked ({type(error).__name__}: {error}): report this"))

    started = pairs(cfg)
    add("packages", versions)
    add("packages", lambda: optional(cfg))
    add("devices", lambda: devices(cfg))
    add("launcher", lambda: launcher(cfg, os.environ))
    add("accelerate", lambda: accelerate_settings(os.environ))
    add("data", lambda: offline_files(cfg, offline))
    add("run_dir", lambda: run_folder(cfg, *sizes(cfg)))
    add("quota", disk_quotas)
    add("caches", lambda: caches(os.environ))
    add("limits", lambda: limits(torch.cuda.device_count()))
    for pair in started:
        add(pair.backend, pair.findings)
    if not started:
        found.append(
            fix("gloo", "this torch is built without torch.distributed: install another for several processes")
        )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog="key=value: the settings of train.py"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--json", action="store_true", help="a list of {level, what, text}")
    asked = parser.parse_intermixed_args(argv)
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the Hub's client: the doctor fetches nothing
    try:
        cfg = compose([quoted(setting) for setting in asked.settings])
        validate(cfg)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    found = examine(cfg, offline)
    if asked.json:
        print(json.dumps({"host": socket.gethostname(), "findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        bad = sum(finding.level == "FIX" for finding in found)
        lines = [f"{finding.level:5} {finding.what:11} {finding.text}" for finding in found]
        end = f"{bad} thing{'s' * (bad != 1)} to fix" if bad else "nothing to fix"
        print("\n".join([f"{socket.gethostname()}, for {cfg.run_dir}", *lines, end]), flush=True)
    return int(any(finding.level == "FIX" for finding in found))


if __name__ == "__main__":
    sys.exit(main())
