"""README.md, --help and the code say the same. Tests about source text live here, not in test_losses.py."""

import dataclasses
import inspect
import re
from pathlib import Path

import losses
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = [row.split(" | ") for row in README.splitlines() if row.startswith("|") and "](losses.py)" in row]
TABLE = [row for row in TABLE if len(row) == 6]
EQUATIONS = {("Eq. 7", "2305.18290"): "dpo_loss", ("Eq. 3", "2402.13228v2"): "dpop_loss",
             ("Theorem 4.5", "2404.11999"): "tdpo1_loss", ("Eq. 6", "2410.19720"): "dpo2d_loss"}


def test_each_equation_stands_in_exactly_one_function():
    """One function claims each numbered equation in its first line, and has the number on a line of code."""
    functions = dict(inspect.getmembers(losses, inspect.isfunction))
    for (number, paper), home in EQUATIONS.items():
        first_lines = {name: f.__doc__.split("\n")[0] for name, f in functions.items()}
        claims = [name for name, line in first_lines.items() if number in line and paper in line]
        assert claims == [home]
        code = inspect.getsource(functions[home]).split('"""')[2]
        assert number.replace("Theorem", "Thm") in code


def test_the_table_links_equation_function_and_test():
    """Each row names a function that train.py trains with, and a test that its file defines once."""
    assert len(TABLE) == 6
    named = {re.search(r"\[`(\w+)`\]\(losses.py\)", row[2])[1] for row in TABLE}
    assert named == {f.__name__ for f in train.LOSSES.values()} - {"sft_loss"}
    for row in TABLE:
        test, file = re.search(r"\[`(\w+)`\]\((tests/\w+\.py)\)", row[-1]).groups()
        assert (ROOT / file).read_text().count(f"def {test}(") == 1


def test_the_links_of_the_readmes_resolve():
    """Every relative link points at a file; every #anchor at a heading."""
    for readme in [ROOT / "README.md", *ROOT.glob("[a-z]*/README.md")]:
        text = readme.read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", text, re.M)
        headings = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("#"):
                assert link[1:] in headings, link
            elif "://" not in link:
                assert (readme.parent / link.partition("#")[0]).exists(), f"{readme}: {link}"


def test_the_flags_in_the_readme_exist():
    """Every --flag the README mentions is a flag of one of the programs."""
    known = {f"--{f.name}" for f in dataclasses.fields(train.Config)}
    for program in [ROOT / "sample.py", *ROOT.glob("tools/*.py"), *ROOT.glob("[eg]*/*.py")]:
        known |= set(re.findall(r'"(--\w+)"', program.read_text(encoding="utf-8")))
    known |= {flag.replace("--", "--no-") for flag in known} | {"--help", "--standalone", "--nproc_per_node"}
    assert set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)?", README)) <= known


def test_the_metrics_in_the_readme_are_those_that_are_logged():
    """The README's table of metrics names what train.py writes, no more and no less."""
    section = README[README.index("## What is logged"):README.index("## Differences")]
    cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    named = set(re.findall(r"`([\w/]+)`", "".join(cells)))
    source = "".join(map(inspect.getsource, (train.metrics_of, train.speed, train.train)))
    written = set(re.findall(r'"((?:rewards|logps|logratio|kl|segments)/\w+|loss)"', source))
    written |= set(re.findall(r'"(\w+)": (?:norm|group|len\(rows\)|float\(|peak_memory)', source))
    assert named == written


def test_every_flag_has_a_comment_and_the_defaults_are_the_papers():
    """Config is the one list of flags: each field's line ends in a comment, which --help shows."""
    lines = [line for line in inspect.getsource(train.Config).splitlines() if re.match(r"    \w+: ", line)]
    assert len(lines) == len(dataclasses.fields(train.Config)) and all("  # " in line for line in lines)
    assert train.fill_defaults(train.Config(loss="dpop")).beta == 0.3 and train.DEFAULTS["beta"] == 0.1
    assert (train.DEFAULTS["lam"], train.DEFAULTS["alpha"]) == (50, 0.5)


def test_no_placeholder_is_left():
    """What the READMEs show was filled in."""
    for readme in [ROOT / "README.md", *ROOT.glob("[a-z]*/README.md")]:
        text = readme.read_text(encoding="utf-8")
        assert "@@" not in text and "PROSE" not in text
