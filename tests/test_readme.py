"""What the README says is so: names, figures, commands."""

import json
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_named_function_exists():
    named = re.findall(r"`(\w+)\.py::(\w+)`", README)
    assert len(named) > 15
    for file, function in named:
        source = (ROOT / f"{file}.py").read_text(encoding="utf-8")
        assert f"def {function}(" in source, f"{file}.py::{function}"


def test_the_table_is_the_measured_one():
    for name, value in json.loads((ROOT / "assets" / "tiny.json").read_text()).items():
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        assert re.search(rf"^  {name} +{re.escape(shown)}$", README, re.MULTILINE), name


def test_leak_table_is_the_measured_one():
    found = json.loads((ROOT / "assets" / "leaks.json").read_text())
    for name, half in (("built on", found), ("held out", found["held_out"])):
        row = "| {0} | {caught} of {leaks} | {refused} of {clean} | {implied_caught} of {implied} |"
        assert row.format(name, **half) in README
    probe = found["blind_probe"]
    for share in ("question_alone", "patch", "leaking_teacher", "leaking_teacher_gated", "chance"):
        assert f"{probe[share]:.3f}" in README


def test_memory_table_is_the_computed_one():
    found = json.loads((ROOT / "assets" / "memory.json").read_text())
    columns = [found["GB"][k] for k in (
        "plain, beta 0.04, 8 at once", "checkpointed, beta 0.04, 8 at once",
        "checkpointed, beta 0.04, 1 at once", "checkpointed, beta 0.0, 8 at once")]
    for name in set(columns[0]) - {"generation"}:
        assert f"| {name} | " + " | ".join(f"{c[name]:.1f}" for c in columns) + " |" in README
    assert all(fit[1] < 0.11 for fits in found["fits"].values() for fit in fits.values())
    assert columns[1]["8 GPUs, FSDP2"] < 70 and f"takes {columns[0]['generation']:.1f} GB" in README
    assert columns[1]["reference"] > columns[1]["8 GPUs, FSDP2"] / 2


def test_measured_run_shows_what_is_claimed():
    run = json.loads((ROOT / "assets" / "tiny.json").read_text())
    assert run["unaided_after"] - run["unaided_before"] >= 0.30
    assert run["intervention_last"] <= 0.52 * run["intervention_first"]
    assert run["seconds"] < 360


@pytest.mark.parametrize("name", ["assets/repair.png", "assets/leaks.json", "LICENSE", "requirements-dev.txt"])
def test_named_files_are_there(name):
    assert name.split("/")[-1] in README or name == "LICENSE"
    assert (ROOT / name).is_file()


def test_ci_runs_the_readme_s_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python3 -m venv .*&& (pip install .*) && (pytest)$", README, re.MULTILINE)
    assert command[0] in script.replace(" -q", "") and re.search(r"^pytest$", script, re.MULTILINE)
