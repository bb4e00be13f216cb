"""Every cell of the paper that a training run can fill, and the experiment whose record fills it.

CELLS is the list, EXPERIMENTS says what each of those runs is. The files configs/experiment/<name>.yaml hold the same
(scripts/reproduce.py writes them), and the record of a run lies at results/runs/paper/<experiment>/s<seed>/. Where the
paper shows one run in several places (Alice at 130M in Table 2, Table 5 and Figures 5c and 5d), the cells share the
experiment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import units
from .numbers import CITED, load_paper

RECORDS = Path("results/runs/paper")  # from the root of the repository

SIZES = {"60m": "60M", "130m": "130M", "350m": "350M", "1b": "1.3B"}  # ours -> the paper's
# Of Table 2, config names
OPTIMIZERS = ("adam", "galore", "fira", "apollo_mini", "apollo_svd", "muon", "racs", "alice_0", "alice")


@dataclass(frozen=True)
class Experiment:
    """A run of the paper.

    Attributes:
        name: of its file below configs/experiment, as in experiment=table2/alice_60m.
        optimizer, model: config names.
        last_layer: "adam" | "candidate".
        steps: optimizer steps (Table 10; Table 4's runs are longer).
        settings: what else sets it apart from the recipe of its optimizer and model, by dotted name.
        about: one line.
    """

    name: str
    optimizer: str
    model: str
    last_layer: str
    steps: int
    settings: dict[str, Any] = field(default_factory=dict)
    about: str = ""


@dataclass(frozen=True)
class Cell:
    """One number of the paper.

    Attributes:
        table: table2, table4, table5, figure5a to figure5e, figure6.
        row: as printed; in figures, the curve's name in results/paper/figures.json.
        column: Table 2: the size, with a star where Adam trains the last layer; Table 4: the step.
        experiment: the run that fills it, a key of EXPERIMENTS.
        paper_value: validation perplexity; None: the cell is a curve (Figure 6).
        step: the evaluation that counts; None: the last.
        cited: the paper took the number from somebody else.
    """

    table: str
    row: str
    column: str
    experiment: str
    paper_value: float | None
    step: int | None = None
    cited: bool = False


# ---------------------------------------------------------------------------------------------- the runs

_NO_COMPENSATION = {"optimizer.compensation": "none"}

LONG = 150_000  # steps of Table 4

# At 130M, the last layer by the candidate (F.7). Name: (settings, about)
_ABLATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "table5/none": (
        {
            "optimizer.tracking": False,
            "optimizer.switching": "none",
            **_NO_COMPENSATION,
            "optimizer.log_basis": True,
        },
        "Table 5, row 1; Figures 5a and 6: no tracking, no switching, no compensation",
    ),
    "table5/tracking": (
        {"optimizer.switching": "none", **_NO_COMPENSATION, "optimizer.log_basis": True},
        "Table 5, row 2; Figures 5a and 6: tracking alone",
    ),
    "table5/tracking_switch": (
        dict(_NO_COMPENSATION),
        "Table 5, row 3; Figures 5a to 5c: tracking and switching, no compensation",
    ),
    "figure5/switch_only": (
        {"optimizer.tracking": False, **_NO_COMPENSATION},
        "Figure 5a: switching alone",
    ),
    "figure5/switching_full_basis": (
        {"optimizer.switching": "full_basis", **_NO_COMPENSATION},
        "Figure 5b: drawn from the full basis",
    ),
    "figure5/switching_gaussian_mix": (
        {"optimizer.switching": "gaussian_mix", **_NO_COMPENSATION},
        "Figure 5b: leading vectors and Gaussian ones",
    ),
    "figure5/switching_gaussian": (
        {"optimizer.switching": "gaussian", **_NO_COMPENSATION},
        "Figure 5b: Gaussian vectors alone",
    ),
    "figure5/compensation_fira": ({"optimizer.compensation": "fira"}, "Figure 5c: Fira's compensation"),
    "figure5/compensation_fira_plus": (
        {"optimizer.compensation": "fira_plus"},
        "Figure 5c: Fira's compensation, scaled to the norm of the low-rank update",
    ),
}

# Second names, which set up the same run in the same folder.
ALIASES = {
    "table5/tracking_switch_compensation": "table2/alice_130m_candidate",
    "figure5/compensation_none": "table5/tracking_switch",
    "figure6/no_tracking_no_switch": "table5/none",
    "figure6/tracking_no_switch": "table5/tracking",
}


def _experiments() -> dict[str, Experiment]:
    paper, found = load_paper(), []
    for optimizer in OPTIMIZERS:
        for size, printed in SIZES.items():
            for starred in (True, False):
                if paper.printed(optimizer, printed, starred) is not None:
                    by = "Adam" if starred else "the candidate"
                    found.append(
                        Experiment(
                            table2_name(optimizer, size, starred),
                            optimizer,
                            f"llama_{size}",
                            "adam" if starred else "candidate",
                            paper.steps(printed),
                            about=f"Table 2: {units.optimizer_name(optimizer)} {printed}, last layer by {by}",
                        )
                    )
    for optimizer, settings in (("racs", {}), ("alice", {"optimizer.scale": 0.3})):  # F.3
        about = f"Table 4: {units.optimizer_name(optimizer)} (1B), last layer by Adam"
        settings = {"trainer.steps": LONG, **settings}
        found.append(Experiment(f"table4/{optimizer}_1b", optimizer, "llama_1b", "adam", LONG, settings, about))
    steps = paper.steps("130M")
    for name, (settings, about) in _ABLATIONS.items():
        found.append(Experiment(name, "alice", "llama_130m", "candidate", steps, settings, about))
    about = "Figure 5e: RACS without averages of s and q, last layer by Adam"
    settings = {"optimizer.beta": 0.0}
    found.append(Experiment("figure5/racs_no_ema", "racs", "llama_130m", "adam", steps, settings, about))
    return {experiment.name: experiment for experiment in found}


def table2_name(optimizer: str, size: str, starred: bool) -> str:
    """("alice", "60m", False) -> "table2/alice_60m_candidate"."""
    return f"table2/{optimizer}_{size}{'' if starred else '_candidate'}"


# ---------------------------------------------------------------------------------------------- the cells


def _cells() -> list[Cell]:
    paper, cells = load_paper(), []
    for optimizer in OPTIMIZERS:
        for size, printed in SIZES.items():
            for starred in (True, False):
                value = paper.printed(optimizer, printed, starred)
                if value is not None:
                    row, column = units.optimizer_name(optimizer), printed + ("*" if starred else "")
                    name, cited = table2_name(optimizer, size, starred), (optimizer, starred) in CITED
                    cells.append(Cell("table2", row, column, name, value, cited=cited))
    table4 = paper.tables["table4"]
    for optimizer in ("racs", "alice"):
        row = f"{units.optimizer_name(optimizer)} (1B)"
        for column, value in zip(table4["columns"][1:], table4["rows"][row][1:], strict=True):
            step = 1000 * int(column.removesuffix("K"))
            cells.append(Cell("table4", row, column, f"table4/{optimizer}_1b", value, step))
    for row, name in _TABLE5.items():
        cells.append(Cell("table5", row, "130M", name, paper.tables["table5"]["rows"][row]))
    finals = paper.figures["final_values_printed_in_figures"]
    for figure, curves in _FIGURE5.items():
        for row, name in curves.items():
            cells.append(Cell(figure.split("_")[0].replace("fig", "figure"), row, "130M", name, finals[figure][row]))
    for row, name in _FIGURE6.items():
        cells.append(Cell("figure6", row, "130M", name, None))
    return cells


_TABLE5 = {
    "No tracking, switch, compen.": "table5/none",
    "Tracking": "table5/tracking",
    "Tracking+Switch": "table5/tracking_switch",
    "Tracking+Switch+Compen.": "table2/alice_130m_candidate",
}
_FIGURE5 = {
    "fig5a_tracking": {
        "no switch no tracking": "table5/none",
        "no switch tracking": "table5/tracking",
        "switch no tracking": "figure5/switch_only",
        "switch tracking": "table5/tracking_switch",
    },
    "fig5b_switching": {
        "full basis": "figure5/switching_full_basis",
        "complement basis": "table5/tracking_switch",
        "gaussian mix": "figure5/switching_gaussian_mix",
        "gaussian": "figure5/switching_gaussian",
    },
    "fig5c_compensation": {
        "fira": "figure5/compensation_fira",
        "fira+": "figure5/compensation_fira_plus",
        "no compensation": "table5/tracking_switch",
        "ours": "table2/alice_130m_candidate",
    },
    "fig5d_last_layer": {
        "alice+lm head": "table2/alice_130m",
        "alice": "table2/alice_130m_candidate",
        "GaLore + lm head": "table2/galore_130m",
        "GaLore": "table2/galore_130m_candidate",
    },
    "fig5e_racs_ema": {"RACS": "table2/racs_130m", "RACS w.o. EMA": "figure5/racs_no_ema"},
}
_FIGURE6 = {"no tracking no switch": "table5/none", "tracking no switch": "table5/tracking"}

EXPERIMENTS = _experiments()
CELLS = _cells()
