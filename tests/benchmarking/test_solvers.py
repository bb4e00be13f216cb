"""The benchmark of solvers, on matrices of a few rows. Nothing here depends on how fast anything is."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarking import solvers
from benchmarking.solvers import PARTS, Shape
from optimizers import linalg
from reporting import benchmarks
from scripts import benchmark

SHAPE = Shape(24, 40, 6)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    monkeypatch.setattr(solvers, "MOST", 3)
    monkeypatch.setattr(solvers, "LEAST", 2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """File and record of two shapes, measured in two runs."""
    out = tmp_path_factory.mktemp("solvers") / "solvers_cpu.json"
    for shape in (str(SHAPE), "12x12r5"):
        assert benchmark.main(["solvers", "--shapes", shape, "--out", str(out)]) == 0
    return out, json.loads(out.read_text())


def test_a_second_run_adds_its_shape(measured):
    _, record = measured
    assert set(record["runs"]) == {line["shape"] for line in record["lines"]} == {"12x12r5", str(SHAPE)}
    assert record["runs"]["12x12r5"]["command"].startswith("python scripts/benchmark.py solvers --shapes 12x12r5")
    assert [line["shape"] for line in record["lines"]] == sorted(
        (line["shape"] for line in record["lines"]), key=solvers.size
    )


def test_a_shape_measured_again_is_replaced(tmp_path):
    out = tmp_path / "solvers_cpu.json"
    for _ in range(2):
        assert benchmark.main(["solvers", "--shapes", "12x12r5", "--out", str(out)]) == 0
    names = [(x["task"], x["batch"], x.get("solver"), x.get("way")) for x in json.loads(out.read_text())["lines"]]
    assert len(names) == len(set(names))


def test_one_solver_of_each_task_shape_and_batch_is_in_use(measured):
    _, record = measured
    used = [(x["shape"], x["task"], x["batch"]) for x in record["lines"] if x.get("used")]
    assert len(used) == len(set(used))
    assert set(used) == {(x["shape"], x["task"], x["batch"]) for x in record["lines"] if x["task"] != "refresh"}


def test_solvers_agree(measured):
    for line in measured[1]["lines"]:
        if line["task"] != "refresh":
            assert line["orthogonality"] < 1e-5 and line["residual"] < 1e-5, line


def test_ill_conditioned_columns_are_for_qr_alone(measured):
    lines = {
        x["solver"]: x
        for x in measured[1]["lines"]
        if x["task"] == "qr" and x["batch"] == 1 and x["shape"] == str(SHAPE)
    }
    assert lines["qr"]["hard_orthogonality"] < 1e-5 and lines["cholesky_twice_fp64"]["hard_orthogonality"] < 1e-5
    error = lines["cholesky"]["hard_orthogonality"]
    assert error is None or error > 1e-3
    assert not any("hard_residual" in x for x in measured[1]["lines"] if x["task"] != "qr")


def test_the_ill_conditioned_matrix_has_its_condition():
    H = solvers.ill_conditioned(SHAPE, CPU)[0]
    assert torch.linalg.cond(H.double()).item() == pytest.approx(solvers.CONDITION, rel=0.2)
    assert H.norm(dim=0).min() > 1e-2 * H.norm(dim=0).max()


def test_a_gradient_of_zeros_is_what_cholesky_cannot_do():
    H = torch.zeros(1, 24, 6)
    with pytest.raises(torch.linalg.LinAlgError):
        solvers.cholesky_qr(H.double())
    assert solvers.orthogonality(linalg.thin_qr(H)[0]) == 0


def test_complement_columns_are_those_of_the_complete_qr():
    _, U = solvers.draw(SHAPE, 2, CPU)
    index = torch.tensor([[0, 7, 3], [17, 1, 2]])
    U = U.double()
    torch.testing.assert_close(solvers.complete_qr(U, index), linalg.complement_columns(U, index))


def test_errors_are_seen():
    X = torch.eye(6, 3, dtype=torch.float64)
    A = torch.diag(torch.arange(6.0, 0, -1, dtype=torch.float64))
    assert solvers.eigen_errors(X, A) == (0, 0)
    assert solvers.eigen_errors(2 * X, A)[0] == 3
    turned = torch.linalg.qr(torch.ones(6, 3, dtype=torch.float64) + X).Q
    assert solvers.eigen_errors(turned, A)[1] > 0.1 and solvers.qr_errors(turned, X)[1] > 0.1
    assert solvers.complement_errors(X, X, torch.zeros(0))[1] == 1


def test_a_solver_that_fails_is_a_line_without_figures():
    def no(H):
        raise torch.linalg.LinAlgError("no")

    H = torch.ones(1, 4, 2)
    task = solvers.Task("qr", (H,), {"qr": linalg.thin_qr, "cholesky": no}, solvers.qr_errors)
    good, bad = solvers.measure_task(task, Shape(4, 4, 2), CPU)
    assert good["ms"] > 0 and bad["ms"] is None and bad["residual"] is None
    assert benchmarks._task_table([good, bad]).count("fails") == 3


def test_nan_is_a_failure():
    task = solvers.Task("qr", (torch.ones(1, 4, 2),), {}, solvers.qr_errors)
    assert solvers.errors(task, lambda H: H * float("nan"), task.inputs) is None


def test_ways_on_a_gpu_give_the_same_result():
    """The device decides only what is called; the functions themselves run here."""
    found = solvers.ways("qr", linalg.thin_qr, 3, torch.device("cuda"))
    assert [way for _, way in found] == ["batched", "looped", "on the CPU"]
    H = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    for solve in found.values():
        torch.testing.assert_close(solve(H), linalg.thin_qr(H))
    assert [way for _, way in solvers.ways("svd", linalg.thin_qr, 3, torch.device("cuda"))] == ["looped", "on the CPU"]
    assert [way for _, way in solvers.ways("qr", linalg.thin_qr, 1, CPU)] == ["single"]


def test_batches_are_those_of_a_step():
    assert solvers.batch_size(Shape(512, 1376, 128), CPU) == 8
    large = Shape(2048, 5461, 512)
    assert (solvers.batch_size(large, CPU), solvers.batch_size(large, torch.device("cuda"))) == (2, 6)


def test_parts_of_a_refresh_are_called(monkeypatch):
    """Every part of Alice's own refresh takes some time, so none of them has gone elsewhere, and nothing stays patched."""
    before = linalg.thin_qr, linalg.top_eigenvectors, solvers.alice.switch, solvers.alice.subspace_iteration
    line = solvers.refresh_parts(SHAPE, *solvers.draw(SHAPE, 1, CPU))
    assert list(line["parts_ms"]) == [*PARTS, "rest"] and all(line["parts_ms"][name] > 0 for name in PARTS)
    assert before == (linalg.thin_qr, linalg.top_eigenvectors, solvers.alice.switch, solvers.alice.subspace_iteration)


@pytest.mark.parametrize("shapes", ["", "12", "12x8r4", "12x12r12", "12x20r0", "12x20r3,x"])
def test_a_shape_that_is_none_is_one_sentence(shapes, tmp_path, capsys):
    assert benchmark.main(["solvers", "--shapes", shapes, "--out", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.startswith("error: --shapes")
    assert not (tmp_path / "x.json").exists()


def test_figures_of_another_machine_are_not_mixed(measured, tmp_path, capsys):
    _, record = measured
    out = tmp_path / "solvers_cpu.json"
    record = json.loads(json.dumps(record))
    record["environment"]["hardware"]["cpu"] = "another"
    out.write_text(json.dumps(record))
    assert benchmark.main(["solvers", "--shapes", "12x12r5", "--out", str(out)]) == 2
    assert "other hardware" in capsys.readouterr().err
    out.write_text("[]")
    assert benchmark.main(["solvers", "--shapes", "12x12r5", "--out", str(out)]) == 2
    assert "not a record" in capsys.readouterr().err


def test_the_page_shows_the_record_and_why_faster_ones_are_not_taken(measured, tmp_path):
    _, record = measured
    assert benchmarks.page(tmp_path).count("solvers --device") == 2  # not run, with the command
    record = json.loads(json.dumps(record))
    for line in record["lines"]:
        if line.get("solver") == "cholesky":
            line["ms"] = 1e-6
    (tmp_path / "solvers_cpu.json").write_text(json.dumps(record))
    text = benchmarks.page(tmp_path)
    section = text[text.index("## Solvers of a refresh") :]
    assert "`cholesky` (0.00 to 0.00 of the time in 6 rows): float32 does not hold" in section
    assert "Not run: `python scripts/benchmark.py solvers --device cuda`" in section
    assert section.count("**eigh**") == 8 and "| Shape | Refresh, ms |" in section


def test_every_solver_and_way_has_a_reason(measured):
    lines = [x for x in measured[1]["lines"] if x["task"] != "refresh"]
    others = {x["solver"] for x in lines} - {x["solver"] for x in lines if x["used"]}
    ways = {way for device in ("cpu", "cuda") for _, way in solvers.ways("qr", linalg.thin_qr, 2, torch.device(device))}
    assert others | ways <= benchmarks._REASONS.keys()
