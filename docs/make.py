"""Write docs/index.html: each equation beside its code, gradient and tests, and a pair that can be moved.

    python docs/make.py             after a change of losses.py, README's table, golden/ or anything in docs/
    python docs/make.py --check     exit status 1 if index.html is not what this would write (figures aside)

The page needs no network and no other file. latex2mathml (requirements-dev.txt) turns LaTeX into MathML.
"""

import argparse
import ast
import base64
import html
import inspect
import re
import sys
import textwrap
from pathlib import Path

from latex2mathml.converter import convert
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import losses  # noqa: E402

# The part of an equation that a statement of losses.py computes, by the name it assigns
PARTS = {
    "chosen_logratio": [r"\rho_{w,k}", r"\rho_w"], "rejected_logratio": [r"\rho_{l,k}", r"\rho_l"],
    "penalty": [r"\max(0,-\rho_w)", r"\lambda\max(0,-\rho_w)"], "u": [r"\beta\rho_w-\beta\rho_l"],
    "delta": [r"\beta[K_l-K_w]"], "delta_2": [r"[\beta K_l-\mathrm{sg}(\beta K_w)]"],
    "i_w": ["k<N"], "r_w": ["r_{w,k}"], "r_l": ["r_{l,k}"], "loss": [r"\log\sigma"],
    "return": [r"-\log\sigma", r"-\sum_{k<N}"],
}
TESTS = {  # which tests of tests/test_losses.py are about a loss, by their names
    "dpo": "_dpo_by_hand|_is_dpo", "dpop": "dpop", "tdpo1": "tdpo1", "tdpo2": "tdpo2",
    "2d-dpo-vanilla": "2d_vanilla|masked_segments",
    "2d-dpo": "2d_group|2d_with_one|kth_best|equal_rewards|small_gaps|masked_segment",
}
GRADIENTS = {  # dL/d log pi of the chosen and the rejected response, then dL/dz of the logits of their tokens
    "dpo": ("-g", "+g", "-g(e-s)", "+g(e-s)"),
    "dpop": (r"-g\,(1+\lambda\,[\rho_w<0])", "+g", r"-g\,(1+\lambda\,[\rho_w<0])(e-s)", "+g(e-s)"),
    "tdpo1": ("-g", "+g", "-g(e-q)", "+g(e-q)"),
    "tdpo2": ("-g", "+g", "-g(e-s)", r"+g(e-(1-\alpha)s-\alpha q)"),
    "2d-dpo-vanilla": (r"-g\,r_{w,k}", r"+g\,r_{l,k}", r"-g\,r_{w,k}(e-s)", r"+g\,r_{l,k}(e-s)"),
    "2d-dpo": (r"-g_k\,r_{w,k}", r"+g_k\,r_{l,k}", r"-g_k\,r_{w,k}(e-s)", r"+g_k\,r_{l,k}(e-s)"),
}
REMARKS = {
    "dpo": """It sees only the difference of the log-ratios, so both may fall if the rejected one falls
faster. A prefix that both responses share gets exactly no gradient; shared tokens after the first
difference do.""",
    "dpop": """Below the reference the chosen response weighs 1 + λ, and a shared prefix rises with it.
Elsewhere it is DPO.""",
    "tdpo1": """The KL cancels the policy’s softmax: the gradient of the logits holds q instead of s. Trained
to the end it is not DPO’s Eq. 4 (below).""",
    "tdpo2": """The stop-gradient removes the push on the chosen KL. The rejected KL’s pull remains and draws
a shared prefix back to the reference.""",
    "2d-dpo-vanilla": """A segment has its reward’s share of the push. With all rewards 1 it is DPO.""",
    "2d-dpo": """Each pair of segments has its own h and g. A segment not selected gets no gradient.""",
}
TITLES = {"dpo": "DPO", "dpop": "DPOP", "tdpo1": "TDPO1", "tdpo2": "TDPO2", "2d-dpo": "2D-DPO",
          "2d-dpo-vanilla": "2D-DPO vanilla"}
NEEDS = {"ref_rejected_logps": "nothing", "rejected_mask": r"a reward $r_k=W\tilde r_k$ for each segment",
         "chosen_seq_kl": r"$K=\sum_t\mathrm{KL}(\pi_{\rm ref}\Vert\pi_\theta)$ over the whole vocabulary"}
FIGURES = {
    "frontier": """True reward against KL from the reference, on toy reviews whose reward is known: what every
loss reaches, and dotted Eq. 4 of the DPO paper on samples of each reference.""",
    "optima": """What DPO and TDPO1 converge to, exact, on a world that can be enumerated: TDPO1’s optimum is
another policy than Eq. 4 and lies below it at every KL.""",
    "edit_distance": """Chosen log-probability when the rejected answer differs in few digits: in each of five
seeds DPO lowers even chosen tokens that nobody edited, DPOP in none.""",
}

def math(latex, display="inline"):
    """MathML of LaTeX; a space after log, which MathML sets without one."""
    mathml = convert(re.sub(r"\\log(?=\\)", r"\\log\\,", latex), display=display)
    return mathml.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")

def items(entries):
    return "".join(f"<li>{entry}</li>" for entry in entries)

def prose(markdown):
    """HTML of a table cell: $LaTeX$, [text](link), `code`; a bare arXiv number becomes a link."""
    pieces = []
    for i, piece in enumerate(markdown.split("$")):
        if i % 2:
            pieces.append(math(piece))
            continue
        piece = html.escape(piece, quote=False)
        piece = re.sub(r"(?<![\[/.\d])(\d{4}\.\d{5})\b(?!\])", r"[\1](https://arxiv.org/abs/\1)", piece)
        piece = re.sub(r"\[([^]]+)\]\((http[^)]+)\)", r'<a href="\2">\1</a>', piece)
        pieces.append(re.sub(r"`([^`]+)`", r"<code>\1</code>", piece))
    return "".join(pieces)

def table():
    """The rows of README's table by the name of the loss: (equation, paper)."""
    rows, link = {}, ""
    functions = {f.__name__: name for name, f in losses.LOSSES.items()}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if len(cells) == 3 and cells[0].strip("`") in functions:
            link = link if cells[2].startswith("the same") else cells[2].partition(",")[0]
            rows[functions[cells[0].strip("`")]] = cells[1], cells[2].replace("the same", link)
    if rows.keys() != losses.LOSSES.keys() - {"sft"}:
        raise SystemExit(f"README.md: its table of losses has {', '.join(rows) or 'no row'}; losses.py has "
                         f"{', '.join(losses.LOSSES)}")
    return rows

def statements(function):
    """The statements of a loss after its docstring: [(name it assigns or "return", code, comments), ...]."""
    source = textwrap.dedent(inspect.getsource(function))
    definition = ast.parse(source).body[0]
    found = []
    for node in definition.body[1:]:
        if isinstance(node, ast.Expr):  # alike(...): no term of the equation
            continue
        lines = [line[4:].partition("  # ") for line in source.splitlines()[node.lineno - 1:node.end_lineno]]
        names = [x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
        statement = "\n".join(written.rstrip() for written, _, _ in lines)
        comments = "; ".join(comment.strip() for _, _, comment in lines if comment)
        found.append((names[0] if names else "return", statement, comments))
    return found

def equation(latex, name, lines):
    """The display equation, in which the part of every statement carries the statement's number."""
    parts = []
    for i, (assigned, _, _) in enumerate(lines):
        here = [part for part in PARTS[assigned] if part in latex]
        if not here:
            raise SystemExit(f"docs/make.py: PARTS[{assigned!r}] names no part of the equation of {name}")
        if assigned == "penalty":                                   # max(0, .), then lam times it
            here = here[sum(before == assigned for before, _, _ in lines[:i]):][:1]
        parts += [(part, i) for part in here]
    for part, i in sorted(parts, key=lambda pair: -len(pair[0])):   # the longest first: others stand inside
        latex = latex.replace(part, rf"\text{{⟦{i}}}{part}\text{{⟧}}")
    mathml = math(latex, "block").replace("<mtext>⟧</mtext>", "</mrow>")
    return re.sub(r"<mtext>⟦(\d+)</mtext>", rf'<mrow class="term" data-t="{name}-\1">', mathml)

def code(name, function, lines):
    """The function as a list of buttons: statement, comment, and the place of its value for the pair."""
    knobs = ", ".join(f"{knob}={value:g}" for knob, value in losses.knobs_of(function).items())
    terms = ", ".join(losses.terms_of(function))
    rows = [f'<p class="def"><b>{function.__name__}</b>({terms}, *, {knobs})</p>']
    for i, (_, statement, comment) in enumerate(lines):
        shown = re.sub(r"^([\w, ]+)(?= = )", r"<b>\1</b>", html.escape(statement, quote=False))
        rows.append(f'<button type="button" class="line" data-t="{name}-{i}"><code>{shown}</code>'
                    f'<span class="value"></span><small>{html.escape(comment, quote=False)}</small></button>')
    return "\n".join(rows)

def departures(name):
    """The numbered departures of losses.py that are about this loss."""
    family = {"tdpo1": "TDPO", "tdpo2": "TDPO", "2d-dpo-vanilla": "2D-DPO"}.get(name, name.upper())
    found = re.split(r"^ \d\. ", losses.__doc__.partition("had to be chosen:")[2], flags=re.M)[1:]
    about = rf"({family}|{name.upper()}|All losses)\b"
    found = [" ".join(item.split()) for item in found if re.match(about, item)]
    if name == "2d-dpo-vanilla":
        found = [item for item in found if "selection" not in item]
    return [html.escape(item, quote=False) for item in found] or ["None."]

def section(name, row, golden):
    """The part of the page about one loss."""
    function, lines = losses.LOSSES[name], statements(losses.LOSSES[name])
    (formula, paper), terms = row, losses.terms_of(function)
    _, latex, rest = formula.split("$", 2)
    needs = NEEDS["chosen_seq_kl" if "chosen_seq_kl" in terms else terms[-1]]
    tests = re.findall(r"^def (test_\w+)", (ROOT / "tests/test_losses.py").read_text(encoding="utf-8"), re.M)
    tests = [test for test in tests if re.search(TESTS[name], test)]
    title, _, source = function.__doc__.split("\n\n")[0].partition(",")
    values = ", ".join(f"{value:.9g}" for value in golden[f"float64/unhealthy/{name}/loss"])
    part, fixed = ",k" if name.startswith("2d") else "", ", K held fixed" if name.startswith("tdpo") else ""
    at = (rf"\log\pi(y_{{w{part}}})", rf"\log\pi(y_{{l{part}}})", "z_w", "z_l")
    gradients = [math(rf"\frac{{\partial L}}{{\partial {x}}}={{{gradient}}}", "block")
                 for x, gradient in zip(at, GRADIENTS[name], strict=True)]
    return f"""<section class="loss loss-{name}" id="{name}" aria-labelledby="{name}-title">
<header><h3 id="{name}-title">{TITLES[name]}</h3>
<p>{html.escape(title)}<br><span>{prose(paper)}</span></p></header>
<div class="beside"><div>
<div class="equation">{equation(latex, name, lines)}<p>{prose(rest.lstrip(', '))}</p></div>
<p>{REMARKS[name]}</p>
<dl><dt>Needs beyond log-probabilities</dt><dd>{prose(needs)}</dd>
<dt>Gradient (in log π{fixed}; in the logits)</dt><dd><ul class="gradients">{items(gradients)}</ul></dd>
<dt>Departures from the paper</dt><dd><ul>{items(departures(name))}</ul></dd></dl></div>
<div class="code" role="group" aria-label="{function.__name__} in losses.py">
{code(name, function, lines)}
<p class="hint">Right: the values for the pair above. <a href="../losses.py">losses.py</a></p></div></div>
<details><summary>Tests and golden numbers</summary><dl>
<dt>Checked in <a href="../tests/test_losses.py">tests/test_losses.py</a></dt>
<dd><ul>{items(f"<code>{test}</code>" for test in tests)}</ul></dd>
<dt>Golden</dt><dd><code>float64/unhealthy/{name}/loss</code> = {values}</dd></dl></details>
</section>"""

def page():
    """The whole of index.html."""
    rows, golden = table(), load_file(ROOT / "golden/vectors.safetensors")
    bars = "".join(f'<td class="push {x}"><i></i><span></span></td>' * 5 for x in ("chosen", "rejected"))
    results = "\n".join(
        f'<tr id="row-{name}" class="loss-{name}"><th scope="row"><a href="#{name}">{TITLES[name]}</a></th>'
        f'<td class="h"></td><td class="l"></td>{bars}</tr>' for name in rows)
    links = "".join(f'<a href="#{name}" class="loss-{name}">{TITLES[name]}</a>' for name in rows)
    figures = "".join(
        f'<figure><img alt="" src="data:image/png;base64,'
        f'{base64.b64encode((ROOT / f"experiments/figures/{name}.png").read_bytes()).decode()}">'
        f"<figcaption>{sentence}</figcaption></figure>" for name, sentence in FIGURES.items())
    tokens = "".join(f'<th scope="col" data-token="{i}"></th>' for i in (0, 1, 2, 3, 4, 0, 1, 5, 6, 7))
    parts = {"tokens": tokens, "results": results, "figures": figures,
             "nav": links,
             "losses": "\n".join(section(name, row, golden) for name, row in rows.items()),
             "port": (HERE / "port.js").read_text(encoding="utf-8"),
             "page": (HERE / "page.js").read_text(encoding="utf-8")}
    text = (HERE / "template.html").read_text(encoding="utf-8")
    text = re.sub(r"\$([^$\n]+)\$", lambda found: math(found[1]), text)
    return re.sub(r"<!--(\w+)-->", lambda found: parts[found[1]], text)

def without_figures(text):
    return re.sub(r"base64,[\w+/=]*", "", text)

def main():
    parser = argparse.ArgumentParser(description="Write docs/index.html.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    target, text = HERE / "index.html", page()
    if not parser.parse_args().check:
        target.write_text(text, encoding="utf-8")
        print(f"{target}: {len(text.encode()) / 1e3:.0f} KB")
    elif not target.exists() or without_figures(target.read_text(encoding="utf-8")) != without_figures(text):
        raise SystemExit("docs/index.html is stale; python docs/make.py writes it")

if __name__ == "__main__":
    main()
