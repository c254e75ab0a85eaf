"""The pictures of a run."""

import json

import pytest
from PIL import Image


@pytest.mark.slow
def test_curves_and_the_sheet_of_repairs_are_drawn(tmp_path):
    import draw_run  # matplotlib is an extra

    names = " ".join(draw_run.PANELS.values()).split()
    rows = [{"step": k + 1} | dict.fromkeys(names, k / 40) for k in range(40)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert draw_run.draw_sheet(tmp_path) is None
    (tmp_path / "repairs").mkdir()
    for k in range(5):
        Image.new("RGB", (1200, 800 + 100 * k), (50 * k, 0, 0)).save(tmp_path / f"repairs/{k}.png")
    sheet, curves = draw_run.draw_sheet(tmp_path), draw_run.draw_curves(tmp_path)
    assert Image.open(sheet).size == (4 * 496, 2 * (480 + 16))
    assert Image.open(sheet).getpixel((20, 20)) == (0, 0, 0)  # the first card, top left
    assert Image.open(sheet).getpixel((20, 516))[0] == 200  # the fifth, below it
    assert Image.open(curves).size == (1210, 660)
