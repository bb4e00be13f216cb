"""The benchmark of optimizer steps, on matrices of a few hundred weights. Nothing here depends on how fast anything is."""

import gc
import json
import statistics
from collections import Counter

import pytest
import torch

from benchmarking import optimizers, peers, record
from benchmarking.optimizers import Runner, measure_group, peak_bytes
from benchmarking.peers import ADAMW, Clock, Contestant
from scripts import benchmark

SHAPES = {"q": (16, 16), "up": (40, 16), "down": (16, 40), "k": (16, 16)}
RANK = 4
EVERYBODY = {c.name: c for group in peers.all_groups().values() for c in group}


@pytest.fixture
def problem():
    """Weights and gradients in float64."""
    generator = torch.Generator().manual_seed(3)
    weights = {name: 0.02 * torch.randn(s, generator=generator).double() for name, s in SHAPES.items()}
    return weights, [optimizers.make_gradient(s, generator).double() for s in SHAPES.values()]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(optimizers, "matrix_shapes", lambda model: SHAPES)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Methods without and with refreshes, and their rivals: file, record, what was printed."""
    out = tmp_path_factory.mktemp("benchmark") / "steps.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "matrix_shapes", lambda model: SHAPES)
        words = [
            "--only",
            "racs,galore,soap",
            "--rank",
            str(RANK),
            "--repeats",
            "12",
            "--refreshes",
            "2",
            "--threads",
            "1",
        ]
        assert benchmark.main(["optimizers", "--model", "llama_tiny_4k", *words, "--out", str(out)]) == 0
    return out, json.loads(out.read_text())


def runner(name, problem):
    made = Runner(EVERYBODY.get(name) or peers.adamw(), *problem, RANK)
    made.warm_up()
    return made


# The record -------------------------------------------------------------------------------------------------------------


def test_groups_are_led_by_the_fused_adamw_and_hold_the_rivals(measured):
    lines = measured[1]["contestants"]
    groups = {
        title: [line["name"] for line in lines if line["group"] == title] for title in ("racs", "low rank", "soap")
    }
    assert sum(map(len, groups.values())) == len(lines)
    assert all(names[0] == ADAMW for names in groups.values())
    assert groups["low rank"] == [ADAMW, "galore", "galore (bfloat16 products)", "galore-torch"]
    assert groups["soap"][1:] == ["soap", "soap (bfloat16 products)", "pytorch_optimizer SOAP", "heavyball SOAP"]


def test_every_contestant_makes_the_same_number_of_ordinary_steps(measured):
    for line in measured[1]["contestants"]:
        if "error" in line:
            assert line["error"] == "not installed" and not EVERYBODY[line["name"]].installed
            continue
        assert len(line["samples_ms"]) == 12 and min(line["samples_ms"]) > 0
        refreshes = len(line["refresh_samples_ms"])
        assert refreshes >= 2 if line["interval"] else refreshes == 0
        assert line["quartiles_ms"][0] <= line["step_ms"] <= line["quartiles_ms"][1]
        assert line["step_peak_bytes"] is not None and line["bound_ms"] > 0


def test_figures_follow_from_the_samples(measured):
    lines = {(line["group"], line["name"]): line for line in measured[1]["contestants"]}
    ours, theirs, adamw = (lines["low rank", name] for name in ("galore", "galore-torch", ADAMW))
    assert ours["step_ms"] == pytest.approx(statistics.median(ours["samples_ms"]), abs=1e-3)
    assert ours["refresh_ms"] == pytest.approx(statistics.median(ours["refresh_samples_ms"]), abs=1e-3)
    assert ours["to_rivals"] == {"galore-torch": pytest.approx(ours["step_ms"] / theirs["step_ms"], rel=1e-4)}
    assert ours["to_adamw"] == pytest.approx(ours["step_ms"] / adamw["step_ms"], rel=1e-4)
    assert ours["amortised_ms"] == pytest.approx((199 * ours["step_ms"] + ours["refresh_ms"]) / 200, rel=1e-4)
    assert ours["fraction"] == pytest.approx(ours["bound_ms"] / ours["step_ms"], rel=1e-4)
    assert adamw["amortised_ms"] == adamw["step_ms"] and adamw["to_adamw"] == 1


def test_the_record_says_how_it_was_made(measured):
    out, found = measured
    assert found["environment"]["command"].startswith("python scripts/benchmark.py optimizers --model llama_tiny_4k")
    assert found["environment"]["command"].endswith("--out steps.json")  # and not the folder
    assert found["environment"]["versions"]["torch"] == str(torch.__version__)
    assert {"galore-torch", "heavyball", "pytorch-optimizer"} <= found["environment"]["versions"].keys()
    assert found["settings"]["matrices"] == {"16x16": 2, "40x16": 1, "16x40": 1} and found["settings"]["rank"] == RANK
    assert found["settings"]["memory_limit_bytes"] == 64 * 10**6
    assert len(out.read_text().splitlines()) == len(found["contestants"]) + 8  # a line for each


def test_the_limit_of_memory_is_that_of_the_issue():
    assert optimizers.memory_limit([(512, 1376)]) == 64_000_000
    assert optimizers.memory_limit([(512, 512), (5461, 2048)]) == 3 * 4 * 5461 * 2048


# Measuring --------------------------------------------------------------------------------------------------------------


def test_all_get_the_same_gradient_tensors_and_weights_of_their_own(problem):
    weights, gradients = problem
    two = [runner(name, problem) for name in ("galore", ADAMW)]
    for one in two:
        one.step()
        assert all(p.grad is G for (_, p), G in zip(one.named, gradients, strict=True))
        assert not torch.equal(one.named[0][1], weights["q"])
    assert two[0].named[0][1].data_ptr() != two[1].named[0][1].data_ptr() != weights["q"].data_ptr()


def test_gradients_are_the_same_in_every_session_and_have_full_rank():
    drawn = [optimizers.make_gradient((24, 40), torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*drawn)
    values = torch.linalg.svdvals(drawn[0].double())
    assert values[-1] > 1e-2 * values[0] and values.diff().abs().min() > 1e-6 * values[0]


class Careless(torch.optim.SGD):
    """Notes the gradient it is given, then destroys it."""

    def step(self):
        p = self.param_groups[0]["params"][0]
        self.seen = p.grad.clone()
        p.grad.zero_()


def test_who_changes_gradients_gets_fresh_copies(problem):
    weights, gradients = problem
    before = [G.clone() for G in gradients]
    careless = Contestant("careless", "adam", lambda named, rank: Careless([p for _, p in named], lr=1.0))
    found = measure_group([careless, EVERYBODY["racs"]], weights, gradients, RANK, 2, 1)
    assert all(map(torch.equal, gradients, before)) and not any(G._version for G in gradients)
    assert found["careless"].own is not None and found["racs"].own is None
    assert torch.equal(found["careless"].optimizer.seen, before[0])


def test_who_fails_is_left_out_at_the_start_and_in_the_middle(problem):
    weights, gradients = problem

    def fail(named, rank):
        raise RuntimeError("no bfloat16 here\nand more")

    class Tires(torch.optim.SGD):
        def step(self):
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps > optimizers.WARMUP + 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().step()

    broken = Contestant("broken", "adam", fail)
    tired = Contestant("tired", "adam", lambda named, rank: Tires([p for _, p in named], lr=1.0))
    found = measure_group([broken, tired, EVERYBODY["racs"]], weights, gradients, RANK, 3, 1)
    assert found["broken"] == "RuntimeError: no bfloat16 here"
    assert found["tired"] == "OutOfMemoryError: CUDA out of memory"
    assert len(found["racs"].step_ms) == 3
    assert gc.isenabled()
    line = optimizers.describe("some", EVERYBODY["racs"], found, {"bound_ms": 1.0})
    assert line["to_adamw"] is None and line["to_rivals"] == {}


def test_groups_that_are_measured_stay_whatever_happens_to_the_next(tmp_path, monkeypatch, capsys):
    """And the command fails for a mistake of ours, not for a card that is too small."""
    out = tmp_path / "record.json"
    line = {"group": "one", "name": "racs", "config": "racs", "error": "OutOfMemoryError: too large"}

    def stops(*_):
        yield [line], {"bytes_per_second": 1.0}
        raise KeyboardInterrupt

    words = ["optimizers", "--model", "llama_tiny", "--only", "racs", "--out", str(out)]
    monkeypatch.setattr(benchmark.module("optimizers"), "measure", stops)
    assert benchmark.main(words) == 130
    assert json.loads(out.read_text())["contestants"] == [line]
    for error, code in (("OutOfMemoryError: too large", 0), ("RuntimeError: a mistake", 1)):
        found = [[{**line, "error": error}], {}]
        monkeypatch.setattr(benchmark.module("optimizers"), "measure", lambda *_, found=found: iter([found]))
        assert benchmark.main(words) == code
        assert f"error: racs: {error}" in capsys.readouterr().err


def bases(optimizer):
    """What a refresh replaces, of the first matrix."""
    state = next(iter(optimizer.state.values()))
    if "projector" in state:
        found = [state["projector"].ortho_matrix]
    else:
        found = [state[name] for name in ("U", "U_L", "U_R") if name in state] or state["Q"]
    return [x.clone() for x in found]


WITH_BASES = [
    name
    for name, c in EVERYBODY.items()
    if c.clock and c.clock.place != "hidden" and name not in ("apollo", "apollo_mini")
]


@pytest.mark.parametrize("name", WITH_BASES)
def test_refreshes_are_told_from_ordinary_steps(name, problem):
    if not EVERYBODY[name].installed:
        pytest.skip("not installed")
    one = runner(name, problem)
    marks = []
    for skip in (False, True, False, True, False):
        if skip:
            EVERYBODY[name].clock.skip(one.optimizer)
        before = bases(one.optimizer)
        one.gradients = [torch.randn_like(G) for G in one.gradients]  # from the same one comes the same basis
        _, refreshed = one.step()
        marks.append(refreshed)
        assert refreshed != all(map(torch.equal, before, bases(one.optimizer)))
    assert marks == [False, True, False, True, False]


class Hidden(torch.optim.SGD):
    """Counts by itself, as HeavyBall does, and refreshes at every third step."""

    count = 0

    def step(self):
        self.count += 1
        self._is_preconditioning = self.count % 3 == 0


def test_a_refresh_is_waited_for_where_the_counter_cannot_be_moved(problem):
    clock = Clock(3, place="hidden")
    one = Runner(Contestant("hidden", "adam", lambda named, rank: Hidden([p for _, p in named]), clock), *problem, RANK)
    one.refresh()
    assert (len(one.step_ms), len(one.refresh_ms), one.optimizer.count) == (0, 1, 3)
    for _ in range(4):
        one.ordinary()
    assert (len(one.step_ms), len(one.refresh_ms)) == (4, 2)
    one.measure_memory()
    assert one.peaks.keys() == {False, True} and len(one.step_ms) == 4


def test_peak_is_what_is_held_at_a_time():
    kept = []

    def work():
        kept.append(torch.zeros(250_000))  # 1 MB that stays
        for _ in range(3):
            torch.zeros(500_000).sum()  # 2 MB that goes
        return "done"

    peak, result = peak_bytes(work, torch.device("cpu"))
    assert result == "done" and 3_000_000 <= peak < 3_001_000


def test_on_cuda_the_allocators_own_peak_counts_from_what_was_there(monkeypatch):
    """Without a GPU: which functions are asked, and when."""
    calls, peaks = [], iter([100, 175])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    assert peak_bytes(lambda: calls.append("work"), torch.device("cuda", 0)) == (75, None)
    assert calls == ["wait", "reset", "work", "wait"]


# Pairs ------------------------------------------------------------------------------------------------------------------

# ours, theirs, and how far the weights may lie apart: packages use float32 (or bfloat16) inside
AGREE = {
    "galore": ("galore-torch", 1e-4),
    "fira": ("fira package", 1e-4),
    "muon": ("torch Muon", 0.03),
    "soap": ("pytorch_optimizer SOAP", 1e-3),
    "adam": (ADAMW, 1e-12),
}


@pytest.mark.parametrize("name", AGREE)
def test_settings_of_a_pair_agree(name, problem):
    """Six steps from the same weights, no refresh but the first: signs of a basis change nothing then."""
    rival, tolerance = AGREE[name]
    theirs = EVERYBODY.get(rival) or peers.adamw()
    if not theirs.installed:
        pytest.skip("not installed")
    assert rival in EVERYBODY[name].rivals
    two = [Runner(c, *problem, RANK) for c in (EVERYBODY[name], theirs)]
    for one in two:
        for _ in range(6):
            one.step()
    for (key, p), (_, q) in zip(two[0].named, two[1].named, strict=True):
        moved = (q - problem[0][key]).norm()
        assert moved > 0 and (p - q).norm() < tolerance * moved, key


def test_every_rival_is_somebody_in_the_same_group():
    for title, group in peers.all_groups().items():
        names = Counter([ADAMW, *(c.name for c in group)])
        assert max(names.values()) == 1, title
        for c in group:
            assert set(c.rivals) <= names.keys(), c.name
            assert bool(c.rivals) == bool(c.config)


def test_only_takes_the_rivals_along():
    chosen = peers.select(["alice_0"])
    assert {title: [c.name for c in group] for title, group in chosen.items()} == {
        "low rank": [
            ADAMW,
            "alice_0",
            "alice_0 (bfloat16 products)",
            "alice_0 (bfloat16 products, compiled)",
            "galore-torch",
            "pytorch_optimizer Alice-0",
        ]
    }
    assert len(peers.select()) == len(peers.all_groups())


# Mistakes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "alise"], "alise is not in this benchmark: choose from adam, alice"),
        (["--model", "llama_2t"], "There is no model 'llama_2t': choose one of"),
        (["--repeats", "0"], "must be at least 1"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_mistakes_end_in_one_sentence_before_anything_is_measured(
    words, sentence, capsys, monkeypatch, small, tmp_path
):
    monkeypatch.setattr(optimizers, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["optimizers", "--out", str(tmp_path / "x.json"), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1
    assert not (tmp_path / "x.json").exists()


def test_a_shorter_session_does_not_replace_a_longer_one(measured, capsys, monkeypatch, small):
    monkeypatch.setattr(optimizers, "measure", lambda *_: pytest.fail("measured"))
    out, before = measured[0], measured[0].read_bytes()
    assert benchmark.main(["optimizers", "--only", "racs", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "contestants that would not be measured now" in said and "galore" in said and said.count("\n") == 1
    assert out.read_bytes() == before
    record.refuse_to_lose(out, [line["name"] for line in measured[1]["contestants"] if "error" not in line])


def test_another_file_or_folder_is_not_overwritten(tmp_path):
    other = tmp_path / "mine.json"
    other.write_text("[1]")
    for out, sentence in ((other, "not a record of this benchmark"), (tmp_path, "is a folder")):
        with pytest.raises(record.UserError, match=sentence):
            record.refuse_to_lose(out, [])
    record.refuse_to_lose(tmp_path / "new.json", ["racs"])


def test_floats_are_rounded_to_six_digits():
    assert record.rounded({"a": [1.23456789, (2e-9 / 3,)], "b": 10**9 + 1, "c": None}) == {
        "a": [1.23457, [6.66667e-10]],
        "b": 10**9 + 1,
        "c": None,
    }
