from reporting import best_cell, find_runs, findings, grid_table, results_table
from tests.reporting.synthetic import write_run


def write(folder, optimizer, lr, adam_lr, seed=42, perplexity=60.0, **more):
    write_run(folder / f"{optimizer}-{lr}-{adam_lr}-{seed}", optimizer, lr, adam_lr, seed, perplexity, steps=2, **more)


def test_the_best_cell_is_the_lowest_perplexity_of_the_grid(tmp_path):
    write(tmp_path, "racs", 0.01, 0.005, perplexity=61.0)
    write(tmp_path, "racs", 0.02, 0.005, perplexity=58.0)
    write(tmp_path, "racs", 0.05, 0.005, diverged=1)
    write(tmp_path, "racs", 0.02, 0.001, finished=False)
    [best] = best_cell(find_runs(tmp_path))
    assert (best.lr, best.adam_lr) == (0.02, 0.005)


def test_extra_seeds_of_a_cell_do_not_change_which_cell_is_best(tmp_path):
    write(tmp_path, "racs", 0.01, 0.005, perplexity=59.0)
    write(tmp_path, "racs", 0.02, 0.005, perplexity=58.0)
    for seed in (43, 44):
        write(tmp_path, "racs", 0.02, 0.005, seed=seed, perplexity=65.0)
    assert [(run.lr, run.seed) for run in best_cell(find_runs(tmp_path))] == [(0.02, 42), (0.02, 43), (0.02, 44)]


def test_with_several_seeds_everywhere_the_mean_decides(tmp_path):
    for seed, first, second in ((42, 57.0, 58.0), (43, 63.0, 59.0)):
        write(tmp_path, "racs", 0.01, 0.005, seed, first)
        write(tmp_path, "racs", 0.02, 0.005, seed, second)
    assert best_cell(find_runs(tmp_path))[0].lr == 0.02


def test_the_table_has_one_row_for_each_optimizer_best_first_with_its_spread(tmp_path):
    for seed, value in ((42, 58.0), (43, 59.0), (44, 60.0)):
        write(tmp_path, "racs", 0.02, 0.005, seed, value)
    write(tmp_path, "racs", 0.05, 0.005, perplexity=70.0)
    write(tmp_path, "alice", 0.01, 0.02, perplexity=62.5)
    rows = [line.strip("| ").split(" | ") for line in results_table(find_runs(tmp_path)).splitlines()[2:]]
    assert rows == [
        ["RACS", "0.02", "0.005", "59.00", "3", "± 1 (58.00 to 60.00)", "23.0 MiB", "14,876"],
        ["Alice", "0.01", "0.02", "62.50", "1", "one seed", "23.0 MiB", "14,876"],
    ]


def test_an_optimizer_that_only_diverged_is_in_the_tables(tmp_path):
    write(tmp_path, "muon", 0.05, 0.02, diverged=1)
    write(tmp_path, "adam", 0.001, 0.02, perplexity=90.0)
    assert [line.split("|")[1].strip() for line in results_table(find_runs(tmp_path)).splitlines()[2:]] == [
        "Adam",
        "Muon",
    ]
    assert "| Muon | 0.05 | 0.02 | 42 | diverged at step 1 |" in grid_table(find_runs(tmp_path))


def test_findings_name_overlap_missing_seeds_and_the_edge_of_the_grid(tmp_path):
    for seed, alice, muon in ((42, 53.0, 53.5), (43, 54.0, 55.0)):
        write(tmp_path, "alice", 0.02, 0.005, seed, alice)
        write(tmp_path, "muon", 0.02, 0.005, seed, muon)
    write(tmp_path, "alice", 0.01, 0.005, perplexity=70.0)
    write(tmp_path, "racs", 0.02, 0.005, perplexity=60.0)
    notes = findings(find_runs(tmp_path))
    assert notes[0] == "Order, best first: Alice 53.50, Muon 54.25, RACS 60.00."
    assert any(note.startswith("Alice and Muon: the ranges over seeds overlap") for note in notes)
    assert any(note.startswith("Muon and RACS: a single seed") for note in notes)
    assert [note for note in notes if "outside the grid" in note] == [
        "Alice: the best matrix rate (0.02) is the largest that was tried, so a better one may lie outside the grid."
    ]


def test_seeds_that_lie_apart_are_not_called_overlapping(tmp_path):
    for seed in (42, 43):
        write(tmp_path, "alice", 0.02, 0.005, seed, 53.0 + seed / 100)
        write(tmp_path, "adam", 0.02, 0.005, seed, 63.0 + seed / 100)
    assert len(findings(find_runs(tmp_path))) == 1


def test_with_many_optimizers_each_kind_of_remark_is_one_sentence(tmp_path):
    for i, name in enumerate("abcdefghij"):
        write(tmp_path, name, 0.01, 0.02, perplexity=50.0 + i + (20 if name == "j" else 0))
        write(tmp_path, name, 0.03, 0.02, perplexity=60.0 + i)
    write(tmp_path, "a", 0.003, 0.02, perplexity=90.0)
    assert findings(find_runs(tmp_path)) == [
        "A single seed of every optimizer: no difference has an error bar.",
        "The best matrix rate is at an end of its grid (2 values) for 9 of 10 optimizers, so a better one may lie outside: "
        "the smallest (0.01) for b, c, d, e, f, g, h, i; the largest (0.03) for j.",
    ]


def test_with_many_optimizers_those_with_seeds_are_told_apart(tmp_path):
    for i, name in enumerate("abcdefghi"):
        write(tmp_path, name, 0.01, 0.02, perplexity=50.0 + i + (i > 1))
    for name, value in (("a", 52.0), ("b", 50.5), ("c", 53.2)):
        write(tmp_path, name, 0.01, 0.02, seed=43, perplexity=value)
    assert findings(find_runs(tmp_path)) == [
        "A single seed, so no error bar on differences from others: d, e, f, g, h, i.",
        "The ranges over seeds overlap, so this sweep does not tell apart: b and a.",
    ]
