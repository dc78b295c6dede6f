"""docs/index.html: up to date, self-contained, valid; its JavaScript equals golden/ and losses.py.

Needs latex2mathml, html5lib and selenium (requirements-dev.txt), node, Chromium and its driver; a test skips
where what it needs is absent.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import losses
from golden import check, pipeline

pytestmark = pytest.mark.slow

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "index.html"
NAMES = [name for name in losses.LOSSES if name != "sft"]
TEMPLATE = (DOCS / "template.html").read_text(encoding="utf-8")
PRESETS = re.findall(r'data-preset="([\w-]+)"', TEMPLATE)
CONTEXTS = [[0], [1], [2, 5], [3], [4], [6], [7]]                # tokens of one context share its logits
SEGMENTS = {"chosen": [[0, 1], [2], [3, 4]], "rejected": [[0, 1], [5, 6, 7]]}

# The file

@pytest.fixture
def make():
    pytest.importorskip("latex2mathml", reason="latex2mathml is not installed")
    from docs import make
    return make

def test_the_page_is_what_make_py_writes(make):
    """docs/index.html is up to date with losses.py, README.md, golden/ and docs/, its figures aside."""
    assert make.without_figures(PAGE.read_text(encoding="utf-8")) == make.without_figures(make.page())

def test_the_page_is_self_contained():
    """Everything the page loads is in it; it is small; its relative links and its anchors resolve."""
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?!data:)', text)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", text)
    assert len(text.encode()) < 400_000
    for link in re.findall(r'<a [^>]*href="([^"]+)"', text):
        if link.startswith("#"):
            assert text.count(f'id="{link[1:]}"') == 1, link
        else:
            assert link.startswith("https://arxiv.org/abs/") or (DOCS / link).exists(), link

def test_the_html_is_valid():
    """html5lib's strict parser finds no error, and no id stands twice."""
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed")
    text = PAGE.read_text(encoding="utf-8")
    html5lib.HTMLParser(strict=True).parse(text)
    ids = re.findall(r'\bid="([^"$]+)"', text.partition("<script>")[0])
    assert len(ids) == len(set(ids))

# The port: golden's inputs through port.js

def port_results(source):
    """All results of the JavaScript port for the regimes whose logits are given: golden name -> tensor."""
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    given = [name.split("/")[1] for name in check.golden() if name.startswith("float64")
             and name.endswith("/dpo/grad_chosen_logits")]
    inputs = {regime: {name: tensor.tolist() for name, tensor in check.inputs(regime).items()}
              for regime in given}
    main = """const {inputs, hyper} = JSON.parse(require("fs").readFileSync(0));
        const all = Object.entries(inputs).map(([regime, x]) => [regime, goldenResults(x, hyper)]);
        console.log(JSON.stringify(Object.fromEntries(all)));"""
    given = json.dumps({"inputs": inputs, "hyper": pipeline.HYPER})
    run = subprocess.run(["node", "-e", source + main], input=given, capture_output=True, text=True,
                         check=True)
    found = {}
    for regime, results in json.loads(run.stdout).items():
        for name, value in results.items():
            full = f"float64/{regime}/{name}"
            found[full] = torch.tensor(value, dtype=check.golden()[full].dtype)
    return found

def port_source():
    return "".join((DOCS / name).read_text(encoding="utf-8") for name in ("port.js", "port_golden.js"))

def test_the_javascript_port_equals_golden(tmp_path, capsys):
    """Every float64 result of every regime with given logits, gradients included, agrees to 1e-9."""
    found = port_results(port_source())
    regimes = {name.split("/")[1] for name in found}
    expected = {name for name in check.golden()
                if name.startswith("float64/") and name.split("/")[1] in regimes}
    assert found.keys() == expected and len(regimes) >= 9
    save_file(found, tmp_path / "javascript.safetensors")
    assert check.main([str(tmp_path / "javascript.safetensors")]) == 0, capsys.readouterr().out

# The page in a browser

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium with the page, loaded from disk."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "window-size=1280,900", f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()

@pytest.fixture
def page(browser):
    """The page as it is on arrival; no error may have been reported by the end of the test."""
    browser.get("about:blank")
    browser.get(PAGE.as_uri())
    yield browser
    assert browser.get_log("browser") == []

def choose(page, preset):
    page.execute_script(f"document.querySelector('[data-preset={preset}]').click()")

def sliders(page):
    """The value of every slider by its id."""
    return page.execute_script("return Object.fromEntries([...document.querySelectorAll('input[type=range]')]"
                               ".map(x => [x.id, Number(x.value)]))")

def terms_of_sliders(values):
    """The pair that the sliders describe: the terms of every loss, and what to differentiate in.

    Returns (terms by name of the loss, log-probabilities of the ten tokens, logits of each token's context,
    and its place there). Tokens that the page does not name form one more outcome.
    """
    def logits(kind, context):
        named = torch.tensor([values[f"{kind}{i}"] for i in context], dtype=torch.float64)
        return torch.cat([named, torch.log1p(-named.exp().sum()).view(1)])

    z = [logits("p", context).requires_grad_() for context in CONTEXTS]
    z_ref = [logits("q", context) for context in CONTEXTS]
    terms, tokens, places = {"2d": {}, "": {}}, [], []
    for side, segments in SEGMENTS.items():
        numbers = [i for segment in segments for i in segment]
        at = [(c, context.index(i)) for i in numbers for c, context in enumerate(CONTEXTS) if i in context]
        rewards = [values[f"{side}{k}"] for k in range(len(segments))]
        ids = torch.tensor([k for k, segment in enumerate(segments) for _ in segment])
        logps = torch.stack([losses.token_logps(z[c], torch.tensor(y)) for c, y in at])
        ref = torch.stack([losses.token_logps(z_ref[c], torch.tensor(y)) for c, y in at])
        kl = torch.stack([losses.token_kl(z_ref[c][None], z[c][None])[0] for c, _ in at])
        terms[""] |= {f"{side}_logps": logps.sum()[None], f"ref_{side}_logps": ref.sum()[None],
                      f"{side}_seq_kl": kl.sum()[None]}
        terms["2d"] |= {f"{side}_logps": losses.segment_sum(logps, ids, len(segments))[None],
                        f"ref_{side}_logps": losses.segment_sum(ref, ids, len(segments))[None],
                        f"{side}_rewards": torch.tensor([rewards], dtype=torch.float64),
                        f"{side}_mask": torch.ones(1, len(segments), dtype=torch.bool)}
        tokens.append(logps)
        places += at
    of_loss = {name: {term: terms[name[:2] if name.startswith("2d") else ""][term]
                      for term in losses.terms_of(losses.LOSSES[name])} for name in NAMES}
    return of_loss, tokens, z, places

def compare(page):
    """Whatever the sliders say, the page's numbers are those of losses.py and of autograd through it."""
    values = sliders(page)
    terms, tokens, z, places = terms_of_sliders(values)
    shown = page.execute_script("""const rows = [...document.querySelectorAll("[id^=row-]")];
        return Object.fromEntries(rows.map(row => [row.id.slice(4), {
            loss: row.querySelector(".l").textContent, h: row.querySelector(".h").textContent,
        push: [...row.querySelectorAll(".push")].map(x => Number(x.dataset.value))}]))""")
    together = page.execute_script("return document.getElementById('view-logits').checked")
    assert shown.keys() == set(NAMES)
    for name, function in losses.LOSSES.items():
        if name == "sft":
            continue
        knobs = {knob: values[knob] for knob in losses.knobs_of(function)}
        loss = function(**terms[name], **knobs)
        assert float(shown[name]["loss"]) == pytest.approx(loss.item(), abs=6e-4)
        if name != "2d-dpo" and loss.item() > 1e-2:
            h = -torch.log(torch.expm1(loss)).item()
            assert float(shown[name]["h"].replace("−", "-")) == pytest.approx(h, abs=6e-3)
        grads = torch.autograd.grad(loss.sum(), [*tokens, *z], retain_graph=True, materialize_grads=True,
                                    allow_unused=True)
        alone = (-torch.cat(grads[:2])).tolist()
        pushes = [-grads[2 + c][y].item() for c, y in places] if together else alone
        assert shown[name]["push"] == pytest.approx(pushes, abs=1e-9), name
    return shown

@pytest.mark.parametrize("preset", PRESETS)
def test_the_numbers_of_every_preset_are_those_of_losses_py(page, preset):
    """Losses, h and both kinds of push of all six losses, read from the page; a preset has two sentences."""
    choose(page, preset)
    compare(page)
    for view in ("view-logits", "view-logps"):
        page.execute_script(f"document.getElementById('{view}').click()")
        compare(page)
    lesson = page.execute_script("return [...document.querySelectorAll('.lesson')].filter(x => !x.hidden)"
                                 ".map(x => x.textContent)")
    assert len(lesson) == 1 and len(re.findall(r"[.](?= |$)", lesson[0])) == 2

def test_every_line_lights_a_term_and_every_term_a_line(page):
    """Terms of equations and lines of code correspond one to one, in every loss."""
    for name in NAMES:
        lines, terms = page.execute_script("""return [".line", "mrow.term"].map(kind =>
            [...document.getElementById(arguments[0]).querySelectorAll(kind)].map(x => x.dataset.t))""", name)
        assert lines and set(lines) == set(terms), name
