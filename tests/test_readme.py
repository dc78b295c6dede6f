"""The READMEs, --help and the code say the same."""

import dataclasses
import inspect
import re
from pathlib import Path

from test_train import COUNTS, KL, REWARDS

import losses
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *ROOT.glob("[a-z]*/*.md")]
TABLE = [row.split(" | ") for row in README.splitlines() if row.startswith("|") and "](losses.py)" in row]
TABLE = [row for row in TABLE if len(row) == 6]
EQUATIONS = {("Eq. 7", "2305.18290"): "dpo_loss", ("Eq. 3", "2402.13228v2"): "dpop_loss",
             ("Eq. 15", "2404.11999"): "tdpo1_loss", ("Eq. 17", "2404.11999"): "tdpo2_loss",
             ("Eq. 6", "2410.19720"): "dpo2d_loss"}


def test_each_equation_stands_in_exactly_one_function():
    """One function claims each numbered equation in the first line of its docstring."""
    functions = dict(inspect.getmembers(losses, inspect.isfunction))
    for (number, paper), home in EQUATIONS.items():
        first_lines = {name: f.__doc__.split("\n")[0] for name, f in functions.items() if f.__doc__}
        assert [name for name, line in first_lines.items() if number in line and paper in line] == [home]


def test_the_table_links_equation_function_and_test():
    """Each row names a function that train.py trains with, and a test that its file defines once."""
    assert len(TABLE) == 6
    named = {re.search(r"\[`(\w+)`\]\(losses.py\)", row[2])[1] for row in TABLE}
    assert named == {f.__name__ for f in losses.LOSSES.values()} - {"sft_loss"}
    for row in TABLE:
        test, file = re.search(r"\[`(\w+)`\]\((tests/\w+\.py)\)", row[-1]).groups()
        assert (ROOT / file).read_text().count(f"def {test}(") == 1


def test_the_links_of_the_pages_resolve():
    """Every relative link points at a file; every #anchor at a heading."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", text, re.M)
        headings = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("#"):
                assert link[1:] in headings, link
            elif "://" not in link:
                assert (page.parent / link.partition("#")[0]).exists(), f"{page}: {link}"


def test_the_flags_in_the_readme_exist():
    """Every --flag the README mentions is a flag of one of the programs."""
    known = {f"--{f.name}" for f in dataclasses.fields(train.Config)}
    for program in [ROOT / "sample.py", *ROOT.glob("tools/*.py"), *ROOT.glob("[egp]*/*.py")]:
        known |= set(re.findall(r'"(--\w+)"', program.read_text(encoding="utf-8")))
    known |= {flag.replace("--", "--no-") for flag in known}
    known |= {"--help", "--standalone", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr",
              "--master_port"}
    assert set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)?", README)) <= known


def test_the_page_of_metrics_names_those_that_are_logged():
    """No more and no less; test_train.py compares the same names with a run's log."""
    page = (ROOT / "plumbing/README.md").read_text(encoding="utf-8")
    section = page[page.index("## What is logged"):]
    cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    named = set(re.findall(r"`([\w/]+)`", "".join(cells)))
    assert named == COUNTS | REWARDS | KL | {"loss", "segments/paired"}


def test_the_readme_is_short_and_its_two_commands_stand_alone_on_their_lines():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert "pip install -r requirements.txt && python train.py" in lines and "python -m pytest" in lines
