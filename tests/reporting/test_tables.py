"""A record dropped into its place fills its cell; anything else is shown with its label, and never as the cell's number."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretraining.config import compose
from reporting.paper import cost, speed, tables
from reporting.paper.cells import CELLS, EXPERIMENTS
from reporting.paper.numbers import RESULTS, load_paper
from reporting.paper.page import differences, generate
from reporting.paper.records import RUNS, basis_similarities, misfits
from reporting.records import Run, load_run
from tests.reporting.paper_records import add_basis, write_cell

PAPER = load_paper()
ALICE = "table2/alice_60m"


def cells_of(table: tables.Table, *start: str) -> list[str]:
    """The columns of the one row that begins with `start`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.body.splitlines()]
    found = [row for row in rows if tuple(row[: len(start)]) == start]
    assert len(found) == 1, found
    return found[0]


# ---------------------------------------------------------------------------------------------- filling cells


def test_nothing_has_been_run_where_there_are_no_records(tmp_path: Path) -> None:
    for make in (tables.table2, tables.table4, tables.table5, tables.figure5, tables.figure6):
        table = make(PAPER, tmp_path)
        own = [line for line in table.body.splitlines()[2:] if "cited" not in line or "experiment=" in line]
        assert own and all("| not run |" in line for line in own)
    assert "not run" not in tables.table2_overview(PAPER, tmp_path)


def test_a_record_fills_its_cell(tmp_path: Path) -> None:
    write_cell(tmp_path, ALICE, perplexity=30.0)
    assert cells_of(tables.table2(PAPER, tmp_path), "Alice", "60M*") == [
        "Alice",
        "60M*",
        "29.33",
        "[30.00](runs/paper/table2/alice_60m)",
        "+0.67 (+2.3%)",  # to 29.3336, which Figure 2a prints
        "29.10",
        "1 (42)",
        "`train.py experiment=table2/alice_60m`",
    ]
    assert "29.33 / 30.00" in tables.table2_overview(PAPER, tmp_path)
    assert cells_of(tables.table2(PAPER, tmp_path), "Alice", "60M")[3] == "not run"


def test_the_difference_is_to_the_digits_that_the_paper_cut_off(tmp_path: Path) -> None:
    write_cell(tmp_path, f"{ALICE}_candidate", perplexity=30.0)
    row = cells_of(tables.table2(PAPER, tmp_path), "Alice", "60M")
    assert row[2] == "28.69" and row[4] == "+1.30 (+4.5%)"  # to 28.6970


def test_several_seeds_give_mean_and_standard_deviation(tmp_path: Path) -> None:
    for seed, perplexity in ((42, 29.0), (43, 30.0), (44, 31.0)):
        write_cell(tmp_path, ALICE, perplexity=perplexity, seed=seed)
    row = cells_of(tables.table2(PAPER, tmp_path), "Alice", "60M*")
    assert row[3] == "[30.00 ± 1](runs/paper/table2/alice_60m)" and row[6] == "3 (42, 43, 44)"


def test_one_record_fills_every_place_where_the_paper_shows_the_run(tmp_path: Path) -> None:
    write_cell(tmp_path, "table2/alice_130m_candidate", perplexity=22.0)
    assert "22.00" in cells_of(tables.table2(PAPER, tmp_path), "Alice", "130M")[3]
    row = cells_of(tables.table5(PAPER, tmp_path), "Tracking+Switch+Compen.")
    assert "22.00" in row[2] and row[3] == "+0.04 (+0.2%)"
    assert "22.00" in cells_of(tables.figure5(PAPER, tmp_path), "5c", "ours")[3]
    assert "22.00" in cells_of(tables.figure5(PAPER, tmp_path), "5d", "alice")[3]


def test_a_diverged_run_is_the_cells_outcome(tmp_path: Path) -> None:
    write_cell(tmp_path, ALICE, diverged=400)
    row = cells_of(tables.table2(PAPER, tmp_path), "Alice", "60M*")
    assert "diverged" in row[3] and row[4] == "–"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"steps": 300}, "steps 300 instead of 10,000"),
        ({"data": "sample"}, "data sample instead of C4"),
        ({"settings": {"model.name": "llama_tiny"}}, "model.name llama_tiny instead of llama_60m"),
        ({"settings": {"optimizer.name": "racs"}}, "name racs instead of alice"),
        ({"settings": {"optimizer.last_layer": "candidate"}}, "last_layer candidate instead of adam"),
        ({"settings": {"trainer.batch_size": 64}}, "batch_size 64 instead of 512"),
        ({"settings": {"optimizer.lr": 0.01}}, "lr 0.01 instead of 0.02"),
        ({"settings": {"optimizer.rank": 64}}, "rank 64 instead of 128"),
        ({"settings": {"optimizer.betas": [0.9, 0.99, 0.999]}}, "betas [0.9, 0.99, 0.999] instead of [0.9, 0.9]"),
        ({"settings": {"optimizer.tracking": False}}, "tracking False instead of True"),
        ({"summary": {"validation_tokens": 80_743}}, "evaluated on 80.7k tokens instead of 10M"),
        ({"summary": {"steps": 9_000}}, "ended at step 9,000"),
        ({"finished": False}, "not finished"),
    ],
)
def test_a_run_of_something_else_is_not_the_cells_number(tmp_path: Path, how: dict[str, Any], reason: str) -> None:
    write_cell(tmp_path, ALICE, perplexity=30.0, **how)
    table = tables.table2(PAPER, tmp_path)
    assert cells_of(table, "Alice", "60M*")[3] == "not run"
    (label,) = [line for line in table.body.splitlines() if line.startswith("- ")]
    assert label.startswith("- [table2/alice_60m/s42](runs/paper/table2/alice_60m/s42): ")
    assert "Not the cell's number: " in label and reason in label and "tokens of" in label


def test_of_two_records_of_one_seed_one_counts(tmp_path: Path) -> None:
    write_cell(tmp_path, ALICE, perplexity=25.0).rename(tmp_path / ALICE / "s42-again")
    write_cell(tmp_path, ALICE, perplexity=30.0)
    table = tables.table2(PAPER, tmp_path)
    row = cells_of(table, "Alice", "60M*")
    assert row[3].startswith("[30.00](") and row[6] == "1 (42)"
    assert "alice_60m/s42-again): perplexity 25.00" in table.body and "seed 42 is counted already" in table.body


def test_prepared_c4_is_c4(tmp_path: Path) -> None:
    folder = write_cell(tmp_path, ALICE, settings={"data.name": "prepared", "data.kind": "prepared"})
    assert misfits(load_run(folder), EXPERIMENTS[ALICE]) == []  # environment.json names the source: allenai/c4
    environment = (folder / "environment.json").read_text().replace("allenai/c4", "wikipedia")
    (folder / "environment.json").write_text(environment)
    reasons = [f"{split} data wikipedia instead of C4" for split in ("train", "validation")]
    assert misfits(load_run(folder), EXPERIMENTS[ALICE]) == reasons


def test_a_local_copy_counts_where_its_record_tells_that_it_is_c4(tmp_path: Path) -> None:
    """data=c4_local names a layout of files, which any text can have."""
    folder = write_cell(tmp_path, ALICE, settings={"data.name": "c4_local", "data.kind": "c4_local"})
    environment = json.loads((folder / "environment.json").read_text())

    def reasons(**train: str) -> list[str]:
        sources = {"train": {"name": "c4_local", **train}, "validation": {"repository": "allenai/c4"}}
        (folder / "environment.json").write_text(json.dumps({**environment, "data": sources}))
        return misfits(load_run(folder), EXPERIMENTS[ALICE])

    assert reasons(repository="allenai/c4") == reasons(first_file="c4-train.00000-of-01024.json.gz") == []
    [reason] = reasons(first_file="wiki-train.00000-of-00008.json.gz")
    assert reason.startswith("train data c4_local (a layout, not a text") and "fetch_c4.py" in reason


@pytest.mark.parametrize(
    ("name", "fingerprint", "fits"),
    [
        ("t5-base", "f1f2f3", True),
        ("google-t5/t5-small", "f1f2f3", True),
        ("spiece.model", "9e925505c08efc3173ed8aa1d7e7e396fa47f6e4aa7aee5a5f56093ca6722a93", True),
        ("spiece.model", "f1f2f3", False),
        ("meta-llama/Llama-2-7b-hf", "f1f2f3", False),
    ],
)
def test_perplexities_of_other_tokenizers_do_not_count(tmp_path: Path, name: str, fingerprint: str, fits: bool) -> None:
    folder = write_cell(tmp_path, ALICE)
    environment = json.loads((folder / "environment.json").read_text())
    environment["tokenizer"] = {"name": name, "fingerprint": fingerprint}
    (folder / "environment.json").write_text(json.dumps(environment))
    assert misfits(load_run(folder), EXPERIMENTS[ALICE]) == ([] if fits else [f"tokenizer {name} instead of T5's"])


def test_a_run_with_skipped_steps_or_the_published_loader_does_not_count(tmp_path: Path) -> None:
    run = load_run(write_cell(tmp_path / "a", ALICE, summary={"skipped_steps": 2}))
    assert misfits(run, EXPERIMENTS[ALICE]) == ["2 steps without an update"]
    run = load_run(write_cell(tmp_path / "b", ALICE, settings={"data.protocol": "published"}))
    assert misfits(run, EXPERIMENTS[ALICE]) == ["data.protocol published instead of exact"]


def test_table_4_takes_the_evaluations_of_a_run_that_is_going_on(tmp_path: Path) -> None:
    folder = write_cell(tmp_path, "table4/racs_1b", perplexity=13.0, finished=False)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    upto = next(i for i, line in enumerate(lines) if '"kind": "eval", "step": 80000,' in line)
    (folder / "metrics.jsonl").write_text("".join(lines[: upto + 1]))
    values = dict(zip(*(load_run(folder).evals[key] for key in ("step", "perplexity")), strict=True))
    table = tables.table4(PAPER, tmp_path)
    for column, step in (("40K", 40_000), ("80K", 80_000)):
        assert f"{values[step]:.2f}" in cells_of(table, "RACS (1B)", column)[3]
    assert cells_of(table, "RACS (1B)", "150K")[3] == "not run"
    assert "no evaluation at step 120,000" in table.body
    without = [line for line in lines[: upto + 1] if '"kind": "eval", "step": 40000,' not in line]
    (folder / "metrics.jsonl").write_text("".join(without))
    assert cells_of(tables.table4(PAPER, tmp_path), "RACS (1B)", "40K")[3] == "not run"


def test_a_run_of_table_4_that_diverged_late_keeps_its_earlier_cells(tmp_path: Path) -> None:
    folder = write_cell(tmp_path, "table4/racs_1b", perplexity=13.0, diverged=140_000)
    values = dict(zip(*(load_run(folder).evals[key] for key in ("step", "perplexity")), strict=True))
    table = tables.table4(PAPER, tmp_path)
    for column, step in (("40K", 40_000), ("120K", 120_000)):
        assert f"{values[step]:.2f}" in cells_of(table, "RACS (1B)", column)[3]
    assert "diverged" in cells_of(table, "RACS (1B)", "150K")[3]


@pytest.mark.parametrize("name", [*sorted({name.split("_")[0]: name for name in EXPERIMENTS}.values()), ALICE])
def test_what_an_experiment_composes_counts_for_its_cell(name: str, tmp_path: Path) -> None:
    """The files of configs/experiment/ and the recipes, as train.py would record them."""
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(compose([f"experiment={name}"]), resolve=True)
    assert isinstance(config, dict)
    run = Run(tmp_path, {str(key): value for key, value in config.items()}, {}, None, {}, {})
    assert misfits(run, EXPERIMENTS[name]) == []


def test_other_experiments_do_not_count_for_a_cell(tmp_path: Path) -> None:
    """No two runs of the paper fit each other's settings, so a record in the wrong folder is found out."""
    fits = []
    for name in (
        "table2/alice_60m",
        "table2/alice_60m_candidate",
        "table2/alice_0_60m",
        "table2/racs_60m",
        "table5/none",
    ):
        run = load_run(write_cell(tmp_path, name, diverged=2))
        fits += [(name, other) for other in EXPERIMENTS if not misfits(run, EXPERIMENTS[other])]
    assert [name == other for name, other in fits] == [True] * 5


# ---------------------------------------------------------------------------------------------- speed, basis


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.adam_lr", 0.001),
        ("optimizer.initial_basis", "gaussian"),
        ("optimizer.bias_correction", True),
        ("optimizer.update_times", "zero_based"),
        ("optimizer.limiter", 2),
        ("optimizer.weight_decay", 0.1),
        ("trainer.precision", "fp32"),
        ("trainer.grad_clip", 1.0),
        ("model.num_hidden_layers", 2),
    ],
)
def test_a_run_that_changes_what_the_paper_leaves_open_is_not_the_cells_number(
    tmp_path: Path, key: str, value: Any
) -> None:
    folder = write_cell(tmp_path, "table2/alice_60m", settings={key: value})
    [reason] = misfits(load_run(folder), EXPERIMENTS["table2/alice_60m"])
    assert key.rpartition(".")[2] in reason and f"{value}" in reason


def test_speedups_of_records(tmp_path: Path) -> None:
    candidate = load_run(write_cell(tmp_path, "table2/alice_60m_candidate", perplexity=28.0))
    assert speed.our_speedup(PAPER, "alice", "60M", tmp_path) is None  # no Adam yet
    write_cell(tmp_path, "table2/adam_60m", perplexity=34.0)
    first = next(s for s, p in zip(candidate.evals["step"], candidate.evals["perplexity"], strict=True) if p <= 34.0)
    assert speed.our_speedup(PAPER, "alice", "60M", tmp_path) == pytest.approx(10_000 / first)
    row = cells_of(speed.speedups(PAPER, tmp_path), "60M", "Adam")
    assert row[5] == f"{10_000 / first:.2f}" and "runs/paper/table2/adam_60m" in row[6]
    row = cells_of(speed.throughput(PAPER, tmp_path), "Alice", "60M")
    # write_cell: 0.01 s a step; Adam's tokens over the seconds to `first`
    assert row[5] == f"{131072 * 10_000 / (0.01 * first):,.0f}" and row[6] == "1 × An Example CPU / 2 GHz"
    assert cells_of(speed.throughput(PAPER, tmp_path), "Adam", "60M")[5] == f"{131072 / 0.01:,.0f}"


def test_a_perplexity_that_is_never_reached(tmp_path: Path) -> None:
    write_cell(tmp_path, "table2/alice_60m_candidate", perplexity=36.0)
    write_cell(tmp_path, "table2/adam_60m", perplexity=34.0)
    assert cells_of(speed.speedups(PAPER, tmp_path), "60M", "Adam")[5] == "never reached"
    assert cells_of(speed.throughput(PAPER, tmp_path), "Alice", "60M")[5] == "0"


def test_throughputs_of_different_hardware_are_not_divided(tmp_path: Path) -> None:
    write_cell(tmp_path, "table2/alice_60m_candidate", perplexity=28.0)
    adam = write_cell(tmp_path, "table2/adam_60m", perplexity=34.0) / "environment.json"
    adam.write_text(adam.read_text().replace("An Example CPU", "Another CPU"))
    assert cells_of(speed.throughput(PAPER, tmp_path), "Alice", "60M")[5] == "not run"


def test_similarities_of_the_basis_are_read_and_averaged(tmp_path: Path) -> None:
    folder = write_cell(tmp_path, "table5/tracking")
    add_basis(folder, {"q": {200: [0.9, 0.8, 0.5, 0.1], 400: [0.7, 0.6, 0.5, 0.3]}, "k": {200: [0.5, 0.4, 0.2, 0.2]}})
    add_basis(folder, {"q": {400: [0.1, 0.6, 0.5, 0.3]}})  # a resumed run wrote it again
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "basis", "step": 600, "na')  # the process died here
    assert basis_similarities(load_run(folder))["q"] == {200: [0.9, 0.8, 0.5, 0.1], 400: [0.1, 0.6, 0.5, 0.3]}
    rows = [cells_of(tables.figure6(PAPER, tmp_path), "tracking no switch", column) for column in ("1", "8")]
    assert rows[0][3] == "[0.50](runs/paper/table5/tracking)" and rows[0][5] == "2"
    assert rows[1][3] == "[0.20](runs/paper/table5/tracking)"


# ---------------------------------------------------------------------------------------------- structures, memory


@pytest.mark.parametrize(
    ("formula", "value"),
    [("3mn", 3 * 6 * 10), ("mn+2nr+mr+n+r^2", 60 + 80 + 24 + 10 + 16), ("mn+m+n+1", 77), ("3mn+2m^2+2n^2", 452)],
)
def test_printed_formulas_are_evaluated(formula: str, value: int) -> None:
    assert cost.elements(formula, m=6, n=10, r=4) == value


@pytest.mark.parametrize("formula", ["mn+k", "m*n", "", "mn+", "-mn"])
def test_what_is_no_formula_is_refused(formula: str) -> None:
    with pytest.raises(ValueError, match="not a sum of products"):
        cost.elements(formula, 1, 1)


def test_stored_elements_are_the_papers_formulas_and_one_number_a_matrix() -> None:
    """From the committed records of real optimizers: seven matrices in Table 1, 28 in Table 6."""
    table = cost.table1(PAPER)
    differences = {row: cells_of(table, row)[8] for row in PAPER.tables["table1"]["columns"]}
    assert differences == {name: "+7" if name == "Alice" else "0" for name in differences}
    table = cost.table6(PAPER)
    differences = {row: cells_of(table, row)[9] for row in PAPER.tables["table6"]["columns"]}
    assert differences == {name: "0" if name == "GaLore" else "+28" for name in differences}


def test_tables_of_elements_say_so_where_nobody_measured(tmp_path: Path) -> None:
    assert "not run" in cost.table1(PAPER, tmp_path / "records.json").body
    assert "not run" in cost.table6(PAPER, tmp_path).body


def test_memory_cells_show_what_is_given_to_them() -> None:
    assert len(cost.table3_cells(PAPER)) == 48
    key = ("alice", "llama_1b", "candidate")
    table = cost.table3(PAPER, {key: 4.42}, {key: 4.4371})
    assert cells_of(table, "Alice", "1.3B")[2:7] == ["4.42", "4.42", "0", "4.44", "+0.02"]
    assert cells_of(table, "Alice", "1.3B*")[2:7] == ["4.60", "–", "–", "–", "–"]
    assert "1 of 48 cells equal" in table.about and "allocate, 0 of 48" in table.about


# ---------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("runs")
    write_cell(root, ALICE, perplexity=30.0)
    write_cell(root, "table2/racs_60m", steps=300)
    return generate(root, {}, {})


def test_every_line_of_every_table_has_all_its_columns(page: dict[str, str]) -> None:
    checked = 0
    for text in page.values():
        for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
            lines = block.splitlines()
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, lines[0]
            checked += len(lines)
    assert checked > 300


def test_links_lead_somewhere(page: dict[str, str]) -> None:
    checked = 0
    for name, text in page.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            if "runs/paper/" not in target:  # records of this test
                assert ((RESULTS / name).parent / target).exists(), (name, target)
                checked += 1
    assert checked > 20
    headings = {re.sub(r"[^\w\- ]", "", line[3:].lower()).replace(" ", "-") for line in page["README.md"].splitlines()}
    anchors = re.findall(r"\]\(#([^)]+)\)", page["README.md"])
    assert len(anchors) > 10 and set(anchors) <= headings


def test_what_the_fair_comparison_says_has_a_section_of_its_own(tmp_path: Path) -> None:
    with_it = generate(tmp_path, {}, {}, "- Nobody wins.")["README.md"]
    assert "\n- [The fair comparison](#the-fair-comparison)\n" in with_it
    assert "\n## The fair comparison\n\n- Nobody wins.\n\n## Other reports\n" in with_it
    assert "## The fair comparison" not in generate(tmp_path, {}, {})["README.md"]


def test_the_page_counts_what_has_been_run(page: dict[str, str]) -> None:
    cells = [cell for cell in CELLS if cell.paper_value is not None]
    places = sum(cell.experiment == ALICE for cell in cells)
    assert f"**{places} of {len(cells)} cells" in page["README.md"]
    assert "[30.00](../runs/paper/table2/alice_60m)" in page["tables/table2.md"]


def test_every_cell_of_the_paper_is_on_the_page(page: dict[str, str]) -> None:
    commands = set(re.findall(r"experiment=([\w/]+)`", "".join(page.values())))
    assert commands >= {cell.experiment for cell in CELLS} and commands <= set(EXPERIMENTS)


def test_differences_name_the_file_and_the_table(tmp_path: Path, page: dict[str, str]) -> None:
    for name, text in page.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    pictures = sorted(sentence for sentence in differences(page, tmp_path))
    assert len(pictures) == 14 and all(sentence.startswith("figures/paper/") for sentence in pictures)
    changed = page["README.md"].replace("[30.00](runs/paper/table2/alice_60m)", "[29.00](runs/paper/table2/alice_60m)")
    (tmp_path / "README.md").write_text(changed, encoding="utf-8")
    (tmp_path / "tables/table5.md").unlink()
    (tmp_path / "tables/old.md").write_text("")
    assert sorted(set(differences(page, tmp_path)) - set(pictures)) == [
        "README.md disagrees with the records in: Table 2: final perplexity on C4.",
        "tables/old.md is the table of nothing.",
        "tables/table5.md is missing.",
    ]


def test_the_pages_text_is_the_same_every_time(page: dict[str, str], tmp_path: Path) -> None:
    assert generate(tmp_path, {}, {}) == generate(tmp_path, {}, {}) != page


# ---------------------------------------------------------------------------------------------- figures


def test_a_figure_is_the_same_bytes_every_time_and_shows_records(tmp_path: Path) -> None:
    from reporting.paper.figures import draw

    name, runs = "speedups", tmp_path / "runs"
    twice = [[path.read_bytes() for path in draw(name, tmp_path / folder, runs)] for folder in ("a", "b")]
    assert twice[0] == twice[1]
    assert b"/tmp" not in twice[0][1] and b"<dc:date>" not in twice[0][1]
    write_cell(runs, "table2/alice_60m_candidate", perplexity=23.0)
    write_cell(runs, "table2/adam_60m", perplexity=33.0)
    assert [path.read_bytes() for path in draw(name, tmp_path / "c", runs)] != twice[0]


def test_curves_of_ours_are_told_from_the_papers(tmp_path: Path) -> None:
    from reporting.paper.figures import make

    assert "none of them has been run here yet" in make("figure1_2", tmp_path).get_suptitle()
    write_cell(tmp_path, "table2/alice_60m_candidate", perplexity=28.0)
    write_cell(tmp_path, "table2/alice_60m_candidate", perplexity=30.0, seed=43)
    write_cell(tmp_path, "table2/racs_60m", perplexity=60.0, steps=2000, data="wikipedia")
    figure = make("figure1_2", tmp_path)
    labels = [str(line.get_label()) for line in figure.axes[0].lines]
    assert [label for label in labels if label.startswith("ours")] == ["ours: 8.2M tokens of wikipedia", "ours: 29.00"]
    assert "ours (markers)" in figure.get_suptitle()
    assert not any(str(line.get_label()).startswith("ours") for line in figure.axes[1].lines)


def test_bars_and_similarities_say_whose_they_are(tmp_path: Path) -> None:
    from reporting.paper.figures import make

    for name in ("figure3", "speedups", "figure6"):
        title = make(name, tmp_path).get_suptitle()
        assert "the paper's" in title and title.endswith("; none of them has been run here yet")
    write_cell(tmp_path, "table2/alice_60m_candidate", perplexity=23.0, summary={"tokens_per_second": 1000.0})
    write_cell(tmp_path, "table2/adam_60m", perplexity=33.0)
    add_basis(write_cell(tmp_path, "table5/tracking"), {"w": {200: [0.9, 0.8, 0.7, 0.6], 400: [0.5, 0.4, 0.3, 0.2]}})
    for name in ("figure3", "speedups"):
        assert make(name, tmp_path).get_suptitle().endswith("and ours (white)")
    figure = make("figure6", tmp_path)
    assert "ours (markers)" in figure.get_suptitle()
    ours = [line for line in figure.axes[3].lines if str(line.get_label()).startswith("ours")]
    assert [list(line.get_ydata()) for line in ours] == [[0.6, 0.2]]


def test_figure_4_labels_its_units_and_memory_perplexity_shows_every_printed_number(tmp_path: Path) -> None:
    from reporting.paper.figures import make

    words = [text.get_text() for text in make("figure4", tmp_path, memory={}).legends[0].get_texts()]
    assert [text.rpartition(", ")[2].split()[0] for text in words] == ["GB", "GB", "GiB"]
    assert "none for Adam" in words[1]
    axes = make("memory_perplexity", tmp_path).axes[0]
    table = PAPER.tables["table3"]
    columns = [table["columns"].index(column) for column in ("60M", "60M*")]
    printed = sum(row[column] is not None for row in table["rows"].values() for column in columns)
    assert len(axes.lines) == printed > 10


def test_another_papers_numbers_stand_in_their_columns() -> None:
    rows = tables.peers(PAPER).body.splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["Muon", "Adam", "GaLore", "Fira"]
    assert all(row.count(" / ") == 4 for row in rows)
    cited = PAPER.tables["iclr2026"]["muon"]["ppl"]
    without = replace(PAPER, tables={**PAPER.tables, "iclr2026": {"muon": {"ppl": {**cited, "130M": None}}}})
    [muon] = [row for row in tables.peers(without).body.splitlines() if row.startswith("| Muon")]
    assert [cell.strip().startswith("–") for cell in muon.strip("|").split("|")[1:]] == [False, True, False, False]


def test_an_unknown_figure_is_refused(tmp_path: Path) -> None:
    from reporting.paper.figures import make

    with pytest.raises(ValueError, match=r"no figure 'figure7': choose one of figure1_2, figure3"):
        make("figure7", tmp_path)


def test_committed_records_lie_where_a_cell_looks_for_them(tmp_path: Path) -> None:
    """A record below results/runs/paper/ in a folder of no experiment would be shown nowhere."""

    def strays(runs: Path) -> list[str]:
        known = {runs / name for name in EXPERIMENTS}
        return [path.parent.name for path in runs.rglob("config.yaml") if path.parent.parent not in known]

    for folder in ("table2/alice_60m/s42", "table2/alice_61m/s43"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").touch()
    assert strays(tmp_path) == ["s43"]
    assert strays(RUNS) == []
