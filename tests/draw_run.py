"""`python tests/draw_run.py OUT`: the curves of a run, OUT/curves.png, and its repairs on one sheet,
OUT/repairs.png. matplotlib is an extra."""

import json
import sys
from pathlib import Path

from PIL import Image, ImageOps

try:
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit("draw_run.py: pip install matplotlib") from None

PANELS = {
    "rates": "unaided intervention fix",
    "rewards": "reward format align",
    "tokens per rollout": "length",
    "policy": "entropy kl",
    "teacher": "teacher_failures",
    "seconds a step": "seconds_round seconds_update",
}


def draw_curves(out: Path) -> Path:
    """Every panel's metrics against the step: each value pale, their running mean strong."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    width = max(1, len(rows) // 20)
    figure = Figure(figsize=(11, 6), layout="constrained")
    for panel, (title, names) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        for k, name in enumerate(names.split()):
            steps, values = [row["step"] for row in rows], [row[name] for row in rows]
            means = [
                sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1)
                for i in range(len(values))
            ]
            panel.plot(steps, values, f"C{k}", alpha=0.2)
            panel.plot(steps, means, f"C{k}", label=name)
        panel.set(title=title, xlabel="step")
        panel.legend(frameon=False)
    figure.suptitle(f"{out}: running means over {width} steps")
    figure.savefig(out / "curves.png", dpi=110)
    return out / "curves.png"


def draw_sheet(out: Path) -> Path | None:
    """The run's repair pictures, four in a row, in the order of their steps."""
    cards = [
        ImageOps.contain(Image.open(file), (480, 720))
        for file in sorted((out / "repairs").glob("*.png"))
    ]
    if not cards:
        return None
    height = max(card.height for card in cards) + 16
    sheet = Image.new("RGB", (496 * min(4, len(cards)), height * -(-len(cards) // 4)), "gray")
    for k, card in enumerate(cards):
        sheet.paste(card, (496 * (k % 4) + 8, height * (k // 4) + 8))
    sheet.save(out / "repairs.png")
    return out / "repairs.png"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "metrics.jsonl").is_file():
        raise SystemExit("draw_run.py: give the folder of a run, one with a metrics.jsonl")
    for drawn in (draw_curves(Path(sys.argv[1])), draw_sheet(Path(sys.argv[1]))):
        print(drawn or "no repairs to draw")
