"""docs/index.html: up to date, self-contained, valid; its JavaScript equals golden/ and losses.py.

Needs latex2mathml, html5lib and selenium (requirements-dev.txt), node, Chromium and its driver; a test skips
where what it needs is absent.
"""

import ast
import inspect
import json
import math
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import losses
from golden import check, pipeline

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "index.html"
NAMES = [name for name in losses.LOSSES if name != "sft"]
TEMPLATE = (DOCS / "template.html").read_text(encoding="utf-8")
PRESETS = re.findall(r'data-preset="([\w-]+)"', TEMPLATE)
CONTEXTS = [[0], [1], [2, 5], [3], [4], [6], [7]]                # tokens of one context share its logits
SEGMENTS = {"chosen": [[0, 1], [2], [3, 4]], "rejected": [[0, 1], [5, 6, 7]]}


# ---------------------------------------------------------------------------------------------------------
# The file


@pytest.fixture
def make():
    pytest.importorskip("latex2mathml", reason="latex2mathml is not installed")
    from docs import make
    return make


def test_the_page_is_what_make_py_writes(make):
    """docs/index.html is up to date with losses.py, README.md, golden/ and docs/, its figures aside."""
    assert make.without_figures(PAGE.read_text(encoding="utf-8")) == make.without_figures(make.page())


def test_check_sees_a_stale_page_and_overlooks_a_figure(make, tmp_path, monkeypatch):
    """--check fails after a change of the text, not after a change of an embedded figure's bytes."""
    shutil.copytree(DOCS, tmp_path / "docs")
    monkeypatch.setattr(make, "HERE", tmp_path / "docs")
    monkeypatch.setattr("sys.argv", ["make.py", "--check"])
    page, text = tmp_path / "docs/index.html", PAGE.read_text(encoding="utf-8")
    page.write_text(text.replace("base64,iVBOR", "base64,AAAAA"), encoding="utf-8")
    make.main()
    page.write_text(text.replace("logsigmoid", "sigmoid", 1), encoding="utf-8")
    with pytest.raises(SystemExit, match="stale"):
        make.main()


def test_an_equation_without_its_code_is_refused(make):
    """A statement whose part is not in README's equation stops the generator, and says which one."""
    with pytest.raises(SystemExit, match="PARTS\\['u'\\] names no part of the equation of dpo"):
        make.equation(r"-\log\sigma(\rho_w)", "dpo", [("u", "u = 1", "")])


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


# ---------------------------------------------------------------------------------------------------------
# The port: golden's inputs through port.js


def port_results(source):
    """All results of the JavaScript port for the regimes whose logits are given: golden name -> tensor."""
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    given = [name.split("/")[1] for name in check.golden() if re.fullmatch("input/[^/]+/chosen_logits", name)]
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


def test_a_mistake_in_the_port_is_named(tmp_path, capsys):
    """With the hinge outside beta's bracket golden/check.py says so: the comparison can fail."""
    right, wrong = "beta * (chosen - rejected - lam * penalty)", "beta * (chosen - rejected) - lam * penalty"
    assert right in port_source()
    found = {name: tensor for name, tensor in port_results(port_source().replace(right, wrong)).items()
             if name.endswith("/loss")}
    save_file(found, tmp_path / "javascript.safetensors")
    assert check.main([str(tmp_path / "javascript.safetensors")]) == 1
    assert "hinge outside beta's bracket" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------
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


def test_the_presets_show_what_their_sentences_say(page):
    """The statements of the presets' sentences, as numbers."""
    shown = {}
    for preset in PRESETS:
        choose(page, preset)
        shown[preset] = compare(page)
    start, fell = shown["at-the-start"], shown["chosen-fell-too"]
    assert {float(start[name]["loss"]) for name in NAMES if name != "2d-dpo"} == {0.693}
    assert start["2d-dpo"]["loss"] == "1.386" and set(map(abs, start["dpop"]["push"])) == {0.25}
    assert float(fell["dpo"]["loss"]) < 0.693
    assert fell["dpop"]["push"][0] == pytest.approx(-6 * fell["dpop"]["push"][5])
    prefix = {name: row["push"][0] for name, row in shown["one-token-differs"].items()}
    assert abs(prefix["dpo"]) < 1e-15 and abs(prefix["tdpo1"]) < 1e-15
    assert prefix["dpop"] > 1 and prefix["tdpo2"] > 0.01
    assert min(prefix["2d-dpo"], prefix["2d-dpo-vanilla"]) > 0.01
    for name in ("2d-dpo", "2d-dpo-vanilla"):
        assert shown["reward-0"][name]["push"][7:] == [0, 0, 0]
    noisy = {name: row["push"][0] for name, row in shown["noisy-label"].items()}
    assert noisy["dpo"] > 0.8 * 0.5 and noisy["dpop"] == max(noisy.values())


def test_which_beta_has_its_largest_push_in_between(page):
    """In this preset DPO's push grows with beta, then falls: both ends are below the middle."""
    choose(page, "which-beta")
    pushes = []
    for beta in (0.05, 0.3, 1.0):
        move(page, "beta", beta)
        pushes.append(compare(page)["dpo"]["push"][0])
    assert pushes[0] < pushes[1] > pushes[2]


def move(page, slider, value):
    page.execute_script("const x = document.getElementById(arguments[0]); x.value = arguments[1];"
                        "x.dispatchEvent(new Event('input', {bubbles: true}))", slider, value)


def test_moved_sliders_give_the_numbers_of_losses_py(page):
    """Sixty random moves over every slider, each compared; two tokens of one context stay below 0.99."""
    random = torch.Generator().manual_seed(0)
    ids = sorted(sliders(page))
    for _ in range(60):
        name = ids[torch.randint(len(ids), (), generator=random)]
        least, most = page.execute_script("const x = document.getElementById(arguments[0]);"
                                          "return [+x.min, +x.max]", name)
        move(page, name, least + (most - least) * torch.rand((), generator=random).item())
        compare(page)
    for first, second in (("p2", "p5"), ("p5", "p2"), ("q2", "q5"), ("q5", "q2")):
        move(page, first, -0.05)
        values = sliders(page)
        assert math.exp(values[first]) + math.exp(values[second]) <= 0.99
        compare(page)


def test_the_values_beside_the_code_are_those_of_its_statements(page):
    """Each statement of losses.py is executed; the page shows the value it gives, to three digits."""
    def numbers(value):
        if isinstance(value, tuple):                             # i_w, i_l, paired: the page shows i_w, i_l
            value = torch.stack(value[:2], dim=-1)
        return torch.as_tensor(value).double().flatten().tolist()

    for preset in PRESETS:
        choose(page, preset)
        values = sliders(page)
        terms, *_ = terms_of_sliders(values)
        for name in NAMES:
            function = losses.LOSSES[name]
            scope = vars(losses) | terms[name] | values
            expected = []
            for node in ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body[1:]:
                source = ast.unparse(node.value)
                value = eval(source, scope)
                if isinstance(node, ast.Assign):
                    exec(ast.unparse(node), scope)
                expected.append(numbers(value))
            shown = page.execute_script("""return [...document.getElementById(arguments[0])
                .querySelectorAll('.value')].map(x => x.textContent)""", name)
            shown = [[float(x) for x in re.findall(r"-?\d+\.?\d*", text.replace("−", "-"))] for text in shown]
            assert len(shown) == len(expected)
            for got, wanted in zip(shown, expected, strict=True):
                assert got == pytest.approx(wanted, abs=6e-4), (preset, name)


def test_the_keyboard_is_enough(page):
    """Tab reaches the presets, Enter chooses one, an arrow moves a slider, focus lights a term."""
    from selenium.webdriver import ActionChains, Keys

    def press(key):
        ActionChains(page).send_keys(key).perform()
        return page.switch_to.active_element

    for _ in range(30):
        if press(Keys.TAB).get_attribute("data-preset") == "chosen-fell-too":
            break
    button = press(Keys.ENTER)
    assert button.get_attribute("aria-pressed") == "true"
    assert page.current_url.endswith("#pair=chosen-fell-too")
    before = sliders(page)
    while press(Keys.TAB).get_attribute("id") != "p0":
        pass
    press(Keys.ARROW_LEFT)
    assert sliders(page)["p0"] == pytest.approx(before["p0"] - 0.01)
    compare(page)
    page.execute_script("document.querySelector('.line[data-t=dpop-2]').focus()")
    lit = page.execute_script("return [...document.querySelectorAll('.on')]"
                              ".map(x => [x.localName, x.textContent])")
    assert sorted(tag for tag, _ in lit) == ["button", "mrow"]
    assert dict(lit)["mrow"] == "max(0,−ρw)"


def test_every_line_lights_a_term_and_every_term_a_line(page):
    """Terms of equations and lines of code correspond one to one, in every loss."""
    for name in NAMES:
        lines, terms = page.execute_script("""return [".line", "mrow.term"].map(kind =>
            [...document.getElementById(arguments[0]).querySelectorAll(kind)].map(x => x.dataset.t))""", name)
        assert lines and set(lines) == set(terms), name


def test_every_control_has_a_name(page):
    """A screen reader can say what each slider, button and table is for."""
    controls = page.find_elements("css selector", "input, button, svg, [role]")
    assert len(controls) > 60
    unnamed = [control for control in controls if control.is_displayed() and not control.accessible_name]
    assert [control.get_attribute("outerHTML") for control in unnamed] == []


def test_a_link_opens_a_preset(page):
    """index.html#pair=NAME shows that preset; an unknown name the first one."""
    for asked, shown in (("noisy-label", "noisy-label"), ("nonsense", "at-the-start")):
        page.get("about:blank")
        page.get(f"{PAGE.as_uri()}#pair={asked}")
        assert page.find_element("css selector", "[aria-pressed=true]").get_attribute("data-preset") == shown


CONTRAST = """
const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number);
                       const scale = text.startsWith("color") ? 1 : 255;
                       return [...n.slice(0, 3).map(x => x / scale), n[3] ?? 1]; };
const over = (top, under) => under.map((x, i) => top[3] * top[i] + (1 - top[3]) * x);
const background = e => { if (!e) return [1, 1, 1];
  const c = rgba(getComputedStyle(e).backgroundColor);
  return c[3] === 1 ? c.slice(0, 3) : over(c, background(e.parentElement)); };
const light = c => c.map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
const found = [];
for (const e of document.querySelectorAll("body *")) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
  if (["script", "style"].includes(e.localName)) continue;
  const style = getComputedStyle(e), under = background(e);
  const [a, b] = [light(over(rgba(e.localName === "text" ? style.fill : style.color), under)), light(under)];
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  found.push([ratio, `${e.localName} ${e.textContent.slice(0, 30)}`]);
}
return found;"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_contrast_of_every_text_is_4_5_or_more(page, scheme):
    """WCAG AA for every text, highlighted terms and lines included, in both colour schemes."""
    page.execute_cdp_cmd("Emulation.setEmulatedMedia",
                         {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    page.execute_script("document.querySelectorAll('details').forEach(x => { x.open = true })")
    dark = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(19, 23, 26)") == (scheme == "dark")
    for _ in range(2):
        found = page.execute_script(CONTRAST)
        assert len(found) > 500
        assert [x for x in found if x[0] < 4.5] == []
        page.execute_script("document.querySelectorAll('[data-t]').forEach(x => x.classList.add('on'))")


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(page, width):
    """No sideways scrolling on phones, tablets and desktops, with every part unfolded."""
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                         {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 700})
    page.execute_script("document.querySelectorAll('details').forEach(x => { x.open = true })")
    wide = page.execute_script("return document.documentElement.scrollWidth")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= width
