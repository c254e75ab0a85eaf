"""The tables and figures of `tests/bench_learning.py`, from its records.

`python tests/report_learning.py` writes assets/chain.md and, with matplotlib,
assets/chain-curves.png and assets/chain-skills.png. `--quick` does it for the rows of
`bench_learning.py --quick`, beside them; `--search` prints the table in assets/learning-search.md.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from bench_learning import CHAIN_ARMS, arms_of

ROOT = Path(__file__).parent.parent
SKILLS = {"find": "the flash", "relate": "the moment asked for", "read": "the four colours"}
LOOKS = {  # colour, line and mark of the arms whose curves are drawn
    "FFR": ("black", "-", "o"),
    "GRPO": ("0.35", "--", "s"),
    "bare prompt": ("0.5", ":", "^"),
    "GRPO, then FFR": ("0.65", "-.", "v"),
}
CHAIN = """# The second look: chain videos, where no guess is right

`python tests/bench_learning.py` ran these arms ([`chain.json`](chain.json) has every run), and `python
tests/report_learning.py` wrote this table. A *chain video* is a needle video that asks for four colours: those at the
flash, and those one moment before or after it. The cold start taught to read colours and, in some of its lessons, to find
the flash and to go on from there. The more seldom it did, the rarer is an unaided success: of 2,048 samples 29 % are right
in *common*, 0.05 % in *rare*, none in *rarer*, where 2 % of the lessons found the flash, and none in *never*, where none
did. A student that does not know cites the first moment or the last. *Rarer* has two arms only.

Every arm trains from the cold start of its cell until the student has sampled 400,000 tokens, first and second answers
together, then answers 512 unseen questions. GRPO, FFR and the bare prompt have the best of five learning rates (4e-5 to
6e-4, by accuracy unaided plus with a patch), tried on two other seeds, which stand in the record as *rates*; the other arms
have FFR's. λ is 0, as the patch shows the flash alone.

| arm | what differs from FFR |
|---|---|
| GRPO | no teacher |
| bare prompt | repaired tokens are scored under the question alone, without the patch |
| where all failed | repairs only in groups without a success |
| GRPO, then FFR; FFR, then GRPO | each for half of the tokens |
| reward only | the released code's: the repaired reward on the failed tokens |
| imitation | supervised on right rationales, which only a toy has |

Figures are means over the seeds, ± half of the 95 % t-interval. *With a patch*: the second answer counts where the first
was wrong. *Find*, *relate* and *read* are the probabilities of each skill without a patch, given that all before it is
right. *Reading kept* is the share that is left of the cold start's unaided answers whose colours are those at the moments
that they cite, right or wrong ones.
*Reliance* is the mean per token of log p(τ* given x) − log p(τ* given x and c). A group has a *signal* if its rewards
differ.

"""
SEARCHED = (
    "where it does not know, it | find | relate | captions, steps | p₀ | fix | arm | rate | seed | "
    "tokens, k | unaided | with a patch | cite both moments | find | relate | read"
)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % t-interval."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), math.nan)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.mean(values), t * spread / len(values) ** 0.5


def by_arm(record: dict, cell: str) -> dict[str, list[dict]]:
    """The rows of a cell, in the order of its arms."""
    found = {arm: [] for arm in CHAIN_ARMS}
    for row in record["rows"].values():
        if row["phase"] == "cells" and row["start"] == record["settings"]["cells"][cell]:
            found[row["arm"]].append(row)
    return {arm: rows for arm, rows in found.items() if rows}


def retention(record: dict, cell: str, rows: list[dict]) -> list[float]:
    """What is left of the cold start's reading, in each run: of the share of unaided answers whose
    colours are those at the moments that they cite."""
    start = record["starts"][cell]["reading"] or math.nan
    return [row["reading"] / start for row in rows]


def told(values: list[float], digits: int = 3) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(record: dict) -> list[str]:
    """An arm a line, of each cell: means over the seeds, ± half of the 95 % t-interval."""
    columns = (
        "cell | arm | seeds | unaided | of those cite both moments | with a patch | "
        "find | relate | read | reading kept | reliance | groups with a signal | "
        "questions without one | steps"
    )
    lines = [f"| {columns} |", "|" + "---|" * (columns.count("|") + 1)]
    for cell, start in record["starts"].items():
        cells = [
            cell,
            "*cold start*",
            "",
            f"{start['unaided']:.3f}",
            "",
            f"{start['assisted']:.3f}",
        ]
        cells += [f"{start[skill]:.3f}" for skill in SKILLS]
        cells += ["1", f"{start['reliance']:.2f}", f"{1 - start['groups_without_success']:.3f}"]
        lines.append(f"| {' | '.join([*cells, '', ''])} |")
        for arm, rows in by_arm(record, cell).items():
            shown = (*SKILLS, "reliance", "signal", "never_a_signal", "steps")
            mean = {key: statistics.mean(row[key] for row in rows) for key in shown}
            cites = statistics.mean(row["faithful"] / max(row["unaided"], 1e-9) for row in rows)
            cells = [cell, arm, f"{len(rows)}", told([row["unaided"] for row in rows])]
            cells += [f"{cites:.3f}", told([row["assisted"] for row in rows])]
            cells += [f"{mean[skill]:.3f}" for skill in SKILLS]
            cells += [told(retention(record, cell, rows)), f"{mean['reliance']:.2f}"]
            cells += [f"{mean['signal']:.3f}", f"{mean['never_a_signal']:.3f}"]
            cells += [f"{mean['steps']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def cells_of_all_arms(record: dict) -> list[str]:
    return [cell for cell in record["starts"] if len(arms_of(cell)) == len(CHAIN_ARMS)]


def short_table(record: dict) -> list[str]:
    """The README's: an arm a line, but for those of two halves, and how it ends in each cell."""
    columns = [f"{cell}: unaided | assisted" for cell in record["starts"]]
    lines = ["| arm | " + " | ".join(columns) + " |", "|---|" + "---|" * 2 * len(columns)]
    for arm in by_arm(record, "common"):
        if "then" in arm:
            continue
        told_of = []
        for cell in record["starts"]:
            rows = by_arm(record, cell).get(arm)
            for key in ("unaided", "assisted"):
                told_of.append(told([row[key] for row in rows], 2) if rows else "")
        lines.append(f"| {arm} | " + " | ".join(told_of) + " |")
    return lines


def searched(file: Path) -> list[str]:
    """A line for each run of the search, in the order in which they were made."""
    lines = [f"| {SEARCHED} |", "|" + "---|" * (SEARCHED.count("|") + 1)]
    for text in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        start, cold = row["start"], row["cold"]
        habit = row.get("habit", "cites the first moment or the last")
        cells = [habit, f"{start['find']:g}", f"{start['relate']:g}"]
        cells += [f"{start['captions']:g}, {start['steps']}", f"{cold['p0']:.4f}"]
        cells += [f"{cold['fix']:.3f}", row["arm"], f"{row['lr']:g}", f"{row['seed']}"]
        cells += [f"{row['tokens'] / 1000:.0f}"]
        cells += [f"{row[key]:.3f}" for key in ("unaided", "assisted", "faithful")]
        cells += [f"{cold[skill]:.2f} → {row[skill]:.2f}" for skill in SKILLS]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw_curves(record: dict, file: Path) -> None:
    """Right without and with a patch over the budget, in every cell, with 95 % bands."""
    from matplotlib import pyplot

    cells, size = record["starts"], (3.6 * len(record["starts"]), 6)
    shared = {"sharex": True, "sharey": True}
    figure, panels = pyplot.subplots(2, len(cells), figsize=size, squeeze=False, **shared)
    titles = {"unaided": "right unaided", "assisted": "right, with a patch where it fails"}
    for column, cell in enumerate(cells):
        for row, (key, title) in enumerate(titles.items()):
            axis = panels[row][column]
            for arm, rows in by_arm(record, cell).items():
                if arm in LOOKS:
                    draw_arm(axis, arm, rows, key)
            axis.set_ylim(-0.02, 1.02)
            axis.grid(axis="y", color="0.9")
            if row:
                axis.set_xlabel("tokens sampled, thousands")
            else:
                axis.set_title(f"unaided success: {cell}")
            if not column:
                axis.set_ylabel(title)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), handlelength=4)
    figure.savefig(file, dpi=100)


def draw_arm(axis, arm: str, rows: list[dict], key: str) -> None:
    colour, line, mark = LOOKS[arm]
    points = list(zip(*(row["curve"] for row in rows)))  # at the same share of the budget
    tokens = [statistics.mean(point["tokens"] for point in seeds) / 1000 for seeds in points]
    middle, half = zip(*(interval([point[key] for point in seeds]) for seeds in points))
    low = [m - h for m, h in zip(middle, half)]
    high = [m + h for m, h in zip(middle, half)]
    look = {"color": colour, "marker": mark, "markersize": 4}
    axis.plot(tokens, middle, line, label=arm, **look)
    axis.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_skills(record: dict, file: Path) -> None:
    """Each skill by itself, of each arm, after its budget, in the cells that have all arms. The
    dashed line is the cold start."""
    from matplotlib import pyplot

    cells = cells_of_all_arms(record)
    size = (11, 2.6 * len(cells) + 0.6)
    shape = (len(cells), len(SKILLS))
    figure, panels = pyplot.subplots(*shape, figsize=size, sharex=True, sharey="row", squeeze=False)
    for row, cell in enumerate(cells):
        arms = by_arm(record, cell)
        for column, (skill, what) in enumerate(SKILLS.items()):
            axis = panels[row][column]
            for place, rows in enumerate(reversed(arms.values())):
                middle, half = interval([run[skill] for run in rows])
                axis.errorbar(middle, place, xerr=half, fmt="o", color="black", capsize=3)
            axis.axvline(record["starts"][cell][skill], color="0.5", linestyle="--")
            axis.set_xlim(-0.02, 1.02)
            axis.set_yticks(range(len(arms)), list(reversed(arms)))
            axis.grid(axis="y", color="0.9")
            if not row:
                axis.set_title(f"{skill}: {what}")
            if row == len(cells) - 1:
                axis.set_xlabel("probability, all before it right")
        panels[row][0].set_ylabel(f"unaided success: {cell}")
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--search", action="store_true", help="print the table of the search")
    given = parser.parse_args()
    if given.search:
        print("\n".join(searched(ROOT / "assets" / "learning-search.jsonl")))
        return
    folder = ROOT / ("runs/learning/quick" if given.quick else "assets")
    record = json.loads((folder / "chain.json").read_text())
    lines = table(record)
    (folder / "chain.md").write_text("\n".join([CHAIN, *lines, ""]), encoding="utf-8")
    print("\n".join(lines + ["", *short_table(record)]))
    try:
        draw_curves(record, folder / "chain-curves.png")
        draw_skills(record, folder / "chain-skills.png")
    except ImportError:
        print("no matplotlib: no figures")


if __name__ == "__main__":
    main()
