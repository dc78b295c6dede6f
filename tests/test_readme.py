"""The READMEs, --help and the code say the same; each room keeps to its number of lines."""

import ast
import inspect
import re
import shlex

import pytest
from test_train import COUNTS, KL, REWARDS, ROOT

import losses
import train
from plumbing import flags

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *ROOT.glob("[a-z]*/*.md"))}
EQUATIONS = {("Eq. 7", "2305.18290"): "dpo_loss", ("Eq. 3", "2402.13228v2"): "dpop_loss",
             ("Eq. 15", "2404.11999"): "tdpo1_loss", ("Eq. 17", "2404.11999"): "tdpo2_loss",
             ("Eq. 6", "2410.19720"): "dpo2d_loss"}

@pytest.mark.parametrize("room, limit, over", [
    ("*.py", 1350, 0), ("plumbing/*.py", 1450, 207), ("tools/*.py", 1100, 0), ("ports/*.py", 900, 0),
    ("golden/*.py", 1900, 0), ("docs/*.py", 620, 0), ("toy/*.py", 300, 0), ("experiments/*.py", 2700, 0),
    ("tests/**/*.py", 8000, 0)])
def test_no_room_grows(room, limit, over):
    """The limits of the design, and by how much a room is still over: that may only shrink."""
    assert 0 < sum(p.read_bytes().count(b"\n") for p in ROOT.glob(room)) <= limit + over

def test_each_equation_stands_in_exactly_one_function_and_in_the_readmes_table():
    """One function claims each numbered equation in the first line of its docstring."""
    functions = dict(inspect.getmembers(losses, inspect.isfunction))
    first_lines = {name: f.__doc__.split("\n")[0] for name, f in functions.items() if f.__doc__}
    for (number, paper), home in EQUATIONS.items():
        assert [name for name, line in first_lines.items() if number in line and paper in line] == [home]
        assert re.search(rf"^\|.*{home}.*{number}", README, re.MULTILINE), home
    assert {f.__name__ for f in losses.LOSSES.values()} - {"sft_loss"} <= set(re.findall(r"`(\w+)`", README))

def test_the_links_of_the_pages_resolve():
    """Every relative link points at a file; every #anchor at a heading."""
    for page, text in PAGES.items():
        headings = re.findall(r"^#+ (.*)$", text.lower(), re.M)
        headings = [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings]
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("#"):
                assert link[1:] in headings, link
            elif "://" not in link:
                assert (page.parent / link.partition("#")[0]).exists(), f"{page}: {link}"

def test_the_commands_of_the_pages_are_read_and_their_flags_exist():
    """Those of train.py by its own parser; of every flag on any page that some program has it."""
    commands = [x for text in PAGES.values() for x in re.findall(r"python train\.py([^`\n|#]*)", text)]
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command.partition("&&")[0].replace("…", "").replace("...", ""))
        if "--help" not in words:
            flags.parse(train.Config, words)
    known = set(train.Config.__dataclass_fields__)
    known |= {knob for loss in losses.LOSSES.values() for knob in losses.knobs_of(loss)}
    known = {f"--{name}" for name in known} | {f"--no-{name}" for name in known}
    for program in ROOT.rglob("*.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', program.read_text(encoding="utf-8")))
    known |= {"--help", "--standalone", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr",
              "--master_port", "--index-url", "--extra-index-url"}
    assert set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)?", README)) <= known

def test_numbers_of_lines_that_the_pages_claim_are_true():
    """Of a file that is linked just before, or of a function in it."""
    for page, text in PAGES.items():
        for link, number in re.findall(r"\]\(([\w/.]+\.py)\)[^.|\]]{0,70}?\b(\d+) lines", text):
            source = (page.parent / link).read_text(encoding="utf-8")
            functions = [f for f in ast.walk(ast.parse(source)) if isinstance(f, ast.FunctionDef)]
            true = {len(source.splitlines())} | {f.end_lineno - f.lineno + 1 for f in functions}
            assert int(number) in true, f"{page}: {link}, {number} lines"

def test_the_page_of_metrics_names_those_that_are_logged():
    """No more and no less; test_train.py compares the same names with a run's log."""
    page = PAGES[ROOT / "plumbing/README.md"]
    section = page[page.index("## What is logged"):]
    cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    named = set(re.findall(r"`([\w/]+)`", "".join(cells)))
    assert named == COUNTS | REWARDS | KL | {"loss", "segments/paired"}

def test_the_readme_is_short_and_its_two_commands_stand_alone_on_their_lines():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert "pip install -r requirements.txt && python train.py" in lines and "python -m pytest" in lines
