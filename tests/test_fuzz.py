"""Readers under arbitrary input: convert.py, the reader of the one format, those of run.json and of
checkpoints raise nothing but their own errors, and what convert.py writes is read. A few seconds;
TERMWISE_FUZZ_SECONDS=60 makes it a minute.
"""

import gzip
import itertools
import json
import os
import time

import pytest
import torch

import data
from model import GPT, GPTConfig
from plumbing import checkpoints, files, report
from plumbing.errors import ConfigError
from plumbing.folder import read_run
from tools import convert

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.slow  # as long as it is told to take

SECONDS = float(os.environ.get("TERMWISE_FUZZ_SECONDS", 4))
BYTES = data.Tokenizer("bytes")

@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")

def fuzz(test, *strategies, share):
    """Call test with drawn arguments, 50 at a time, for a share of the seconds; each round draws others."""
    end = time.monotonic() + share * SECONDS
    for seed in itertools.count():
        @hypothesis.seed(seed)
        @settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.tuples(*strategies))
        def one_round(drawn):
            test(*drawn)
        one_round()
        if time.monotonic() > end:
            break

TEXT = st.text(st.characters(), max_size=12)
LONE = st.sampled_from(["\ud800", "a\udfff", "\udc00\ud800"])
SCORE = st.one_of(st.integers(-2, 5), st.floats(), st.none(), st.booleans(), st.integers(), TEXT)
JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, LONE),
                    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(TEXT, x, max_size=3)),
                    max_leaves=8)
SEGMENT = st.fixed_dictionaries({}, optional={"text": st.one_of(TEXT, JSON), "scores": st.one_of(
    st.lists(SCORE, max_size=3), st.just([1, 2]), JSON)})
ROLE = st.one_of(st.sampled_from([*sorted(convert.ROLES), "tool"]), JSON)
MESSAGE = st.fixed_dictionaries({}, optional={key: ROLE if key in ("role", "from") else st.one_of(TEXT, JSON)
                                              for key in ("role", "from", "content", "value", "weight", "x")})
ROLES = st.sampled_from(["user", "assistant"])
CHAT = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXT}), max_size=4)
HH = st.builds("\n\nHuman: {}\n\nAssistant: {}".format, TEXT, TEXT)
VALUE = st.one_of(TEXT, HH, CHAT, LONE, st.lists(SEGMENT, max_size=4), st.lists(MESSAGE, max_size=4), JSON)
KEYS = {key for kind in convert.KINDS for key in kind.keys.split()} | {*convert.PROMPTS, "system"}
RECORD = st.fixed_dictionaries({}, optional={key: VALUE for key in (
    *sorted(KEYS), "score_chosen", "score_rejected", "weight", "id", "other")})
TWO = st.fixed_dictionaries({"chosen": VALUE, "rejected": VALUE}, optional={"prompt": VALUE, "input": CHAT})
WELL_FORMED = st.fixed_dictionaries({"prompt": TEXT, "chosen": st.builds("a{}".format, TEXT),
                                     "rejected": st.builds("b{}".format, TEXT)})
CUTS = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4)), max_size=3)  # see damage
KINDS = st.sampled_from([".jsonl", ".jsonl.gz", ".json"])

def damage(content, cuts):
    """Bytes replaced at some places; b"" cuts there."""
    for at, put in cuts:
        at = at % (len(content) + 1)
        content = content[:at] + put + content[at + len(put):] if put else content[:at]
    return content

def read(path, block_size=64, alone=False):
    """The pairs of a data file, or None where a DataError names it. alone: for SFT."""
    try:
        return data.load([path], BYTES, block_size, alone)[0]
    except data.DataError as e:
        assert str(path) in str(e)

def converted(path):
    """Convert a file, alone or without what is unclear; None where that is refused with a DataError."""
    out = path.parent / "out.jsonl"
    try:
        lines = convert.convert_files([path], out, convert.Converter(drop=["other"]), drop_unclear=True)
        return out, " sft " in lines[-1]
    except data.DataError as e:
        assert str(path) in str(e) or "--drop" in str(e)

def test_any_records_are_converted_or_refused_and_what_is_written_is_read(folder):
    """Objects that resemble every form; what is read is well-formed."""
    found = []

    def check(records, kind, block_size, alone):
        lines = [json.dumps(x | {"other": 1} if isinstance(x, dict) else x) for x in records]
        text = ("[" + ",".join(lines) + "]" if kind == ".json" else "\n".join(lines)).encode()
        path = folder / f"records{kind}"
        path.write_bytes(gzip.compress(text, 1) if kind.endswith("gz") else text)
        read(path, block_size, alone)
        if not (made := converted(path)):
            return
        try:
            pairs = data.load([made[0]], BYTES, block_size, made[1])[0]
        except data.DataError as e:  # every record is well-formed, but none may be left
            assert "no pair is left" in str(e) or "scores a segment" in str(e)
            return
        found.append(len(pairs))
        for p in pairs:
            assert len(p.prompt) >= 1 and len(p.prompt) + max(len(p.chosen), len(p.rejected)) <= block_size
            sides = [(p.chosen, p.chosen_segment, p.chosen_scores),
                     (p.rejected, p.rejected_segment, p.rejected_scores)]
            for ids, segment, scores in sides[:1] if made[1] else sides:
                assert ids[-1] == BYTES.eot
                assert len(ids) == len(segment) and segment.max() < len(scores) and (scores >= 0).all()
        data.collate([pairs[i] for i in range(len(pairs))])

    fuzz(check, st.lists(st.one_of(RECORD, TWO, WELL_FORMED, JSON), min_size=1, max_size=3), KINDS,
         st.sampled_from([8, 64, 1000]), st.booleans(), share=0.6)
    assert found  # not everything is refused

def test_any_bytes_in_a_data_file_are_read_or_refused_with_data_errors(folder):
    chosen = [{"text": "é.", "scores": [1, 1]}, {"text": " b", "scores": [0, 1]}]
    good = b"".join(json.dumps({"prompt": f"Q{i}", "chosen": chosen, "rejected": "b"}).encode() + b"\n"
                    for i in range(3))

    def check(content, cuts, kind):
        content = content or damage(good if kind != ".jsonl.gz" else gzip.compress(good), cuts)
        (folder / f"bytes{kind}").write_bytes(content)
        read(folder / f"bytes{kind}")
        converted(folder / f"bytes{kind}")

    fuzz(check, st.one_of(st.just(b""), st.binary(max_size=60)), CUTS,
         st.sampled_from([".jsonl", ".jsonl.gz", ".json", ".csv"]), share=0.2)

def test_any_change_of_a_checkpoint_or_of_run_json_is_read_or_refused_with_a_config_error(folder):
    model = GPT(GPTConfig(8, 4, 1, 1, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    checkpoints.save(folder, 3, model, optimizer, {"seed": 0})
    [path] = checkpoints.paths_of(folder)
    files.write_json(folder / "run.json", {"config": {}, "identity": {}, "saved": 3, "finished": None})
    good, run = path.read_bytes(), (folder / "run.json").read_bytes()
    assert read_run(folder)["saved"] == checkpoints.newest(folder)[0] == 3

    def check(cuts, value):
        path.write_bytes(damage(good, cuts))
        (folder / "run.json").write_bytes(json.dumps(value).encode() if value else damage(run, cuts))
        for use, message in ((lambda: checkpoints.load(folder, model, optimizer), "--overwrite starts anew"),
                             (lambda: read_run(folder), "run.json: damaged")):
            try:
                use()
            except ConfigError as e:
                assert message in str(e)

    keys = st.sampled_from(["config", "identity", "saved", "finished"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "say", lambda text: None)
        fuzz(check, CUTS, st.one_of(st.none(), st.dictionaries(keys, JSON), JSON), share=0.2)
