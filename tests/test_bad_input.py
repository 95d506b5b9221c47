"""Over 200 malformed inputs, by hand and by property: each is refused with a LuthierError of one readable paragraph,
and nothing is
written or lost. On the command line that is exit code 2, one paragraph on stderr and no traceback."""

import gzip
import json
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier import attach, find, load, plan, switch, tasks, tiny, zoo
from luthier.errors import (
    BadChain,
    BadData,
    BadOrder,
    BadState,
    DoesNotFit,
    LuthierError,
    NoSuchSite,
    NotMergeable,
    UnknownName,
    WrongBase,
)
from luthier.method import Chain, include, parse, split

QUICK = settings(max_examples=60, deadline=None, database=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def refused(kind, call, *args, says="", **kwargs):
    """The call raises `kind` with one paragraph of printable text, which holds every word of `says`."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    readable(str(caught.value))
    for word in says.split():
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return str(caught.value)


def readable(text):
    assert 20 < len(text) < 3000 and "\n\n" not in text and "Traceback" not in text, text
    assert not re.search(r"<[\w.]+ object at 0x", text), text


# -- chains -------------------------------------------------------------------------------------------------------------

CHAINS = [  # (text, words that the message must hold)
    ("", ""), ("   ", ""), ("\n", ""), ("lora(", ""), ("lora)", ""), ("lora(rank=)", ""), ("lora(rank=8", ""),
    ("lora() >>", ""), (">> lora()", ""), ("lora() >> >> ssf()", ""), ("lora() > ssf()", ""), ("lora() | ssf()", ""),
    ("lora() + ssf()", ""), ("lora() ssf()", ""), ("lora(); ssf()", ""), ("lora()()", ""), ("lora.rank", ""), ("lora[0]", ""),
    ("(lora", ""), ("5", ""), ("None", ""), ("'lora()'", ""), ("[lora()]", ""), ("{}", ""), ("lora() >> 5", ""),
    ("lora() >> 'ssf'", ""), ("lambda: 0", ""), ("lora() if 1 else ssf()", ""), ("not lora()", ""), ("lora(8)", "at="),
    ("lora(*[8])", ""), ("lora(**{'rank': 8})", ""), ("lora(rank=8, rank=9)", ""), ("lora(rank=-1)", "rank 1"),
    ("lora(rank=0)", "rank 1"), ("lora(rank='8')", "int str"), ("lora(rank=1.5)", "int float"), ("lora(rank=True)", "int bool"),
    ("lora(rank=None)", "int"), ("lora(rank=(8,))", "int tuple"), ("lora(rank=[8])", "int list"), ("lora(rank={})", "int dict"),
    ("lora(rank=2**3)", "rank"), ("lora(rank=10**9)", "rank"), ("lora(rank=1e400)", "rank"), ("lora(alpha=1e400)", "alpha"),
    ("lora(alpha=-1e400)", "alpha"), ("lora(alpha='x')", "alpha"), ("lora(alpha=-1)", "alpha"), ("lora(dropout=2)", "dropout"),
    ("lora(dropout=-0.1)", "dropout"), ("lora(at=5)", "at str"), ("lora(at=None)", "at str"), ("lora(at=b'attn.q')", "at str"),
    ("lora(rank=open('x'))", ""), ("lora(rank=__import__('os'))", ""), ("__import__('os').system('true')", ""),
    ("exec('1')", "exec"), ("lora(rank=lora)", ""), ("lora(rank=f'{1}')", ""), ("lora(rnk=8)", "rnk rank"),
    ("lora(ranks=8)", "ranks rank"), ("lora(Rank=8)", "Rank rank"), ("lora(r=8)", "rank"), ("lor()", "lora"), ("loraa", "lora"),
    ("LoRA()", "lora"), ("houlsbey()", "houlsby"), ("bit_fit()", "bitfit"), ("adalor()", "adalora"), ("fulll", "full"),
    ("prob", "probe"), ("lora() >> sssf()", "ssf"), ("lora-r8", "lora"), ("gptq(bit=4)", "bits"),
    ("spiel(density=2)", "density"), ("spiel(density=-1)", "density"), ("adalora(warmup=-1)", "warmup"),
    ("adalora(beta1=1.5)", "beta1"), ("pitome(keep=0.1)", "keep"), ("pitome(keep=2)", "keep"),
    ("petl(form='nope')", "form 'relu'"), ("petl(insertion=1)", "insertion"), ("prompt(n=0)", "n"), ("prompt(n=-3)", "n"),
    ("mam(width='x')", "width"), ("\x00", ""), ("lora(rank=8)\x00", ""), ("lörä()", "lora"), ("🎻", ""),
    ("lora(rank=8) # >>\nssf()", ""), ("\u202elora()", ""), ("import os", ""), ("rank=8", ""), ("lora(rank==8)", ""),
    ("lora(rank:=8)", ""), ("...", ""), ("lora() >> ...", ""),
]


@pytest.mark.parametrize("text, says", CHAINS, ids=lambda v: ascii(v)[:30])
def test_chain(text, says):
    refused(BadChain, parse, text, says=says)


@pytest.mark.parametrize("text", ["(" * 300 + "lora" + ")" * 300, "lora(" * 300, "lora() >> " * 5000 + "lora()", "-" * 9000,
                                  "a" * 100_000],
                         ids=["parens", "calls", "long", "minus", "word"])
def test_chains_of_absurd_size(text):
    try:
        parse(text)
    except BadChain:
        pass                                                # no crash of the parser, no recursion error


@pytest.mark.parametrize("value", [None, 5, b"lora()", 3.5, {"lora": 1}, {1, 2}], ids=str)
def test_what_is_no_text_is_no_chain(value):
    refused(BadChain, parse, value)


@pytest.mark.parametrize("text", ["", ",", "lora(),", ",lora()", "lora(),,ssf()", "lora() ssf()", "lora(), 5", "lora(), nope()"])
def test_list_of_chains(text):
    try:
        assert all(isinstance(c, Chain) and c for c in split(text)) and text == "lora(),"      # a trailing comma is harmless
    except BadChain as error:
        readable(str(error))


@QUICK
@given(st.text(alphabet="loraspbeitn()=>>, 0123456789.'\"[]{}*-_#\\\n", max_size=40))
def test_any_text_is_a_chain_or_is_refused(text):
    try:
        assert parse(repr(parse(text))) == parse(text)
    except LuthierError as error:
        readable(str(error).replace(text, ""))


@QUICK
@given(st.sampled_from(["rank", "alpha", "dropout", "at"]), st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=3),
    st.binary(max_size=5)))
def test_any_value_fits_or_is_refused(name, value):
    try:
        chain = parse(f"lora({name}={value!r})")
        assert parse(repr(chain)) == chain
    except BadChain as error:
        readable(str(error))


# -- method files of one's own ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, text", [
    ("no_such_file.py", None), ("a_folder.py", ""), ("empty.py", ""), ("notes.txt", "hello"), ("plain.py", "x = 1"),
    ("other.py", "from luthier.method import Method, method\n@method\nclass different(Method):\n    at: str = 'head'\n")])
def test_import_of_a_file(tmp_path, name, text):
    path = tmp_path / name
    if name == "a_folder.py":
        path.mkdir()
    elif text is not None:
        path.write_text(text)
    refused(BadChain, include, path)


# -- selectors and places -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def gpt2():
    return tiny.build("gpt2")


@pytest.fixture(scope="module")
def resnet():
    return tiny.build("resnet")


SELECTORS = [
    "", " ", "attn.z", "attn", "atn.q", "block.99.attn.q", "block.-9.out", "block.x.attn.q", "block.1-0.out", "block..attn.q",
    "vision.attn.q", "encoder.block.0.out", "*", "**", "*.*", ".", "..", "-", "--", "-attn.q", "-linear", "attn.q -attn.q",
    "linear -linear", "[", "[a-", "{q,k}", "attn.q,attn.v", "attn/q", "attn.q\\", "../embed", "/etc/passwd", "block.0.attn.q.",
    "conv", "mlp.gate", "transformer.h.0.attn.nope", "٣", "attn.q\x00", "9" * 400, "block." + "9" * 400 + ".out", "Linear",
]


@pytest.mark.parametrize("text", SELECTORS, ids=lambda v: ascii(v)[:24])
def test_selector(gpt2, text):
    if text in ("attn", "*", "**", "*.*"):                   # these exist, and lora has no verb for some of them
        refused(DoesNotFit, plan, gpt2, f"lora(at={text!r})")
    else:
        refused(NoSuchSite, plan, gpt2, f"lora(at={text!r})")


@QUICK
@given(text=st.text(alphabet="attn.qvkomlpublock0123*-[]?! \t", max_size=16))
def test_any_selector_finds_or_is_refused(gpt2, text):
    try:
        assert find(gpt2, text)
    except NoSuchSite as error:
        readable(str(error))


@pytest.mark.parametrize("chain, kind", [
    ("adaptformer(at='attn.q')", DoesNotFit), ("lora(at='block.*.out')", DoesNotFit), ("prefix(at='mlp.up')", DoesNotFit),
    ("prompt(at='attn.q')", DoesNotFit), ("ia3(at='attn')", DoesNotFit), ("said(dim=3)", DoesNotFit), ("pitome()", DoesNotFit),
    ("gptq(at='embed.token')", DoesNotFit), ("gptq()", DoesNotFit), ("lora() >> gptq()", BadOrder),
    ("lora() >> full()", BadOrder),
    ("ssf() >> gptq(bits=3)", BadOrder), ("compacter(n=5)", DoesNotFit), ("petl(form='softmax', at='attn.q')", DoesNotFit)])
def test_chain_that_does_not_fit(gpt2, chain, kind):
    before = {n: (id(p), p._version, p.requires_grad) for n, p in gpt2.named_parameters()}
    refused(kind, attach, gpt2, chain)
    assert {n: (id(p), p._version, p.requires_grad) for n, p in gpt2.named_parameters()} == before
    assert attach(gpt2, "lora()").detach() is gpt2           # nothing was left behind


@pytest.mark.parametrize("chain", ["prompt()", "prefix()", "houlsby()", "attn.q", "pitome()"])
def test_methods_for_transformers_on_a_cnn(resnet, chain):
    refused(LuthierError, attach, resnet, chain)


def test_misuse_of_an_attachment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny.build("gpt2")
    tuned = attach(model, "houlsby(width=2)", name="a")
    refused(NotMergeable, tuned.merge)
    refused(BadOrder, attach, model, "lora()", name="a", says="'a'")
    refused(UnknownName, switch, model, "b", says="a")
    tuned.detach()
    refused(DoesNotFit, tuned, **tiny.batch("gpt2"))
    refused(BadState, tuned.save, "never-written")
    assert os.listdir(tmp_path) == []
    for data in ([], [{}], [{"input_ids": torch.zeros(0, 0, dtype=torch.long)}]):
        with pytest.raises(Exception):                       # noqa: B017  what the model itself raises may come through
            attach(model, "gptq()", data=data)
        assert attach(model, "lora()").detach() is model


# -- models -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ref, says", [
    ("minilmm", "minilm"), ("smollm", "smollm2-135m"), ("dinov2", "dinov2-s"), ("", ""), (" ", ""), ("timm:", ""),
    ("timm:nope_xyz", ""),
    ("no/such/folder", ""), ("./nowhere", ""), ("~/nowhere", ""), ("/nowhere/at/all", ""), ("a b", ""), ("x" * 300, ""),
    ("\x00", "")], ids=lambda v: ascii(v)[:20])
def test_model_name(ref, says):
    refused(LuthierError, zoo.load, ref, says=says)


@pytest.mark.parametrize("config", [None, "", "{", "[]", "null", "{}", '{"model_type": "nope"}',
                                    '{"architectures": ["NoSuchModel"]}',
                                    '{"model_type": "bert", "architectures": ["BertModel"]}', '{"architecture": 5}'],
                         ids=lambda v: ascii(v)[:24])
def test_model_folder(tmp_path, config):
    (tmp_path / "notes.txt").write_text("x")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    refused(LuthierError, zoo.load, str(tmp_path))


# -- data ---------------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["text", "label", "x"])
GOOD = "text,label\n" + "".join(f"row {i} is fine,{'yes' if i % 2 else 'no'}\n" for i in range(40))
LINES = "".join(json.dumps({"text": f"row {i}", "label": i % 2}) + "\n" for i in range(40))
FILES = {  # name -> content
    "empty.csv": "", "blank.csv": "\n\n\n", "header.csv": "text,label\n", "one_row.csv": "text,label\na,b\n",
    "one_class.csv": "text,label\n" + "some words,yes\n" * 40, "no_label.csv": GOOD + "a row without,\n",
    "wide_row.csv": GOOD + "a,b,c,d,e\n", "binary.csv": bytes(range(256)) * 20, "utf16.csv": GOOD.encode("utf-16"),
    "latin.csv": (GOOD + "caf\xe9,yes\n").encode("latin-1"), "twice.csv": "text,text\n" + "a,b\n" * 20,
    "quote.csv": GOOD + '"never closed,yes\n' + "x,no\n" * 5, "empty.tsv": "", "plain.csv.gz": GOOD.encode(),
    "cut.csv.gz": gzip.compress(GOOD.encode())[:-20], "junk.csv.gz": b"\x1f\x8b" + b"junk" * 20, "empty.jsonl": "",
    "list.jsonl": "[1, 2]\n" * 20, "number.jsonl": "5\n" * 20, "null.jsonl": "null\n" * 20,
    "broken.jsonl": LINES + '{"text": "a", "label"\n', "text.jsonl": "hello\n" * 20, "keys.jsonl": LINES + '{"txt": "a"}\n',
    "nested.jsonl": '{"text": {"a": 1}, "label": 0}\n' * 20, "nan.jsonl": '{"text": "a", "label": NaN}\n' * 20,
    "deep.json": "[" * 5000, "object.json": '{"a": 1}', "empty.json": "", "empty.txt": "", "spaces.txt": "   \n",
    "junk.parquet": b"PAR1" + b"x" * 50 + b"PAR1", "empty.parquet": b"", "junk.npz": b"PK\x03\x04junk", "empty.npz": b"",
    "image.png": b"\x89PNG\r\n", "table.xlsx": b"PK\x03\x04", "data.pkl": b"\x80\x04.", "code.py": "print(1)",
    "no_suffix": GOOD, "missing_values.csv": "text,label\n" + ",\n" * 40,
}


@pytest.mark.parametrize("name", FILES)
def test_data_file(tmp_path, name):
    path = tmp_path / name
    content = FILES[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(LuthierError, tasks.open, str(path), task="text-classification")
    assert name in message or "row" in message, message
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("options, says", [
    (dict(task="classify"), "text-classification"), (dict(task=5), ""), (dict(columns={"txt": "text"}), "text"),
    (dict(columns={"text": "txt"}), "text"), (dict(columns={"label": "labl"}), "label"), (dict(limit=0), "limit"),
    (dict(limit=1), "limit"),
    (dict(limit=-5), "limit"), (dict(limit=True), "limit"), (dict(limit="10"), "limit"), (dict(limit=2.5), "limit"),
    (dict(limit={"train": 0}), "limit"), (dict(max_length=1), "max_length"), (dict(max_length="8"), "max_length"),
    (dict(maxlen=8), "max_length"), (dict(image_size=0), "image_size"), (dict(metric="acuracy"), "accuracy"),
    (dict(task="regression"), ""), (dict(task="image-classification"), "image"), (dict(task="token-classification"), "tokens"),
    (dict(task="instruction", columns={"prompt": "text", "response": "nope"}), "nope"),
    (dict(columns={"text": "text + nope"}), "nope")],
    ids=lambda v: ascii(v)[:40])
def test_data_options(tmp_path, options, says):
    (tmp_path / "a.csv").write_text(GOOD)
    refused(LuthierError, tasks.open, str(tmp_path / "a.csv"), says=says, **options)


@pytest.mark.parametrize("source, says", [
    ("digit", "digits"), ("nowhere.csv", ""), ("./nowhere/", ""), ("", ""), ("/", ""), ("\x00", ""), ("x" * 400, ""),
    ("hub:", "")],
    ids=lambda v: ascii(v)[:20])
def test_data_name(monkeypatch, source, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(LuthierError, tasks.open, source, says=says)


def test_file_names_suggest_the_nearest(tmp_path):
    (tmp_path / "reviews.csv").write_text(GOOD)
    refused(BadData, tasks.open, str(tmp_path / "review.csv"), says="reviews.csv")


@pytest.mark.parametrize("arrays", [
    {}, {"x": np.zeros(3)}, {"images": np.zeros((4, 8, 8, 3), np.uint8)},
    {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.zeros(3)},
    {"images": np.zeros((4, 64), np.uint8), "labels": np.arange(4)},
    {"images": np.zeros((0, 8, 8), np.uint8), "labels": np.zeros(0)},
    {"images": np.full((40, 8, 8), np.nan), "labels": np.arange(40) % 2},
    {"images": np.zeros((40, 8, 8), np.uint8), "labels": np.zeros(40)},
    {"bytes": np.zeros(4, np.uint8), "offsets": np.array([0, 2, 9]), "labels": np.arange(2)},
    {"bytes": np.zeros(4, np.uint8), "offsets": np.array([0, 3, 2, 4]), "labels": np.arange(3)},
    {"images": np.array([{"a": 1}] * 40, dtype=object), "labels": np.arange(40) % 2}], ids=range(11))
def test_npz(tmp_path, arrays):
    np.savez(tmp_path / "data.npz", **arrays, allow_pickle=True)
    refused(LuthierError, tasks.open, str(tmp_path / "data.npz"))


@pytest.mark.parametrize("kind", ["empty", "one class", "no images", "broken images"])
def test_image_folder(tmp_path, kind):
    classes = {"empty": [], "one class": ["a"], "no images": ["a", "b"], "broken images": ["a", "b"]}[kind]
    for c in classes:
        (tmp_path / c).mkdir()
        for i in range(12):
            (tmp_path / c / f"{i}.{'txt' if kind == 'no images' else 'png'}").write_bytes(b"not an image")
    refused(LuthierError, tasks.open, str(tmp_path))


@QUICK
@given(content=st.binary(max_size=200))
def test_any_bytes_are_data_or_are_refused(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    try:
        tasks.open(str(tmp_path / "a.csv"))
    except LuthierError as error:
        readable(str(error))


@QUICK
@given(rows=st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                                  lambda v: st.lists(v, max_size=2) | st.dictionaries(KEYS, v, max_size=3)),
                     min_size=1, max_size=30))
def test_any_json_lines_are_data_or_are_refused(tmp_path, rows):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    try:
        tasks.open(str(tmp_path / "a.jsonl"))
    except LuthierError as error:
        readable(str(error))


# -- saved states -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tuned = attach(tiny.build("gpt2"), "lora(rank=2)")
    for _, p in tuned.trainable():
        torch.nn.init.normal_(p)
    return Path(tuned.save(tmp_path_factory.mktemp("saved") / "a"))


def spoil(folder, what):
    """One fault in a saved folder."""
    state, recipe = folder / "state.safetensors", folder / "recipe.json"
    said = json.loads(recipe.read_text())

    def write(**change):
        recipe.write_text(json.dumps(said | change))

    raw = state.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    faults = {
        "no state": state.unlink, "no recipe": recipe.unlink, "empty state": lambda: state.write_bytes(b""),
        "empty recipe": lambda: recipe.write_text(""), "cut state": lambda: state.write_bytes(raw[:-9]),
        "half state": lambda: state.write_bytes(raw[:len(raw) // 2]), "long state": lambda: state.write_bytes(raw + b"x" * 64),
        "flipped bit": lambda: state.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1])),
        "header beyond the file": lambda: state.write_bytes(struct.pack("<Q", 1 << 40) + raw[8:]),
        "header of nothing": lambda: state.write_bytes(struct.pack("<Q", 0) + raw[8:]),
        "header that is no json": lambda: state.write_bytes(raw[:8] + b"}" * length + raw[8 + length:]),
        "pickle": lambda: state.write_bytes(b"\x80\x04K\x01."), "zip": lambda: state.write_bytes(b"PK\x03\x04" + b"\0" * 40),
        "state is a folder": lambda: (state.unlink(), state.mkdir()), "recipe is a folder": lambda: (recipe.unlink(),
        recipe.mkdir()),
        "state is a link out": lambda: (shutil.move(state, folder.parent / "out"), state.symlink_to(folder.parent / "out")),
        "recipe is a link out": lambda: (shutil.move(recipe, folder.parent / "out"), recipe.symlink_to(folder.parent / "out")),
        "state is a dangling link": lambda: (state.unlink(), state.symlink_to("nowhere")),
        "recipe cut": lambda: recipe.write_text(recipe.read_text()[:-30]), "recipe is a list": lambda: recipe.write_text("[]"),
        "recipe is null": lambda: recipe.write_text("null"), "recipe is binary": lambda: recipe.write_bytes(b"\xff\xfe" * 50),
        "recipe is deep": lambda: recipe.write_text("[" * 100_000), "recipe says nan": lambda: write(seed=float("nan")),
        "other format": lambda: write(format=99), "format is text": lambda: write(format="1"),
        "other seed": lambda: write(seed=5),
        "other chain": lambda: write(chain="lora(rank=4)"), "chain is code": lambda: write(chain="__import__('os')"),
        "unknown method": lambda: write(chain="nope()"), "chain is a number": lambda: write(chain=5),
        "no steps": lambda: write(steps=[]),
        "steps of rubbish": lambda: write(steps=[5]), "unknown key": lambda: write(hello=1),
        "base is gone": lambda: write(base={}),
        "digest is wrong": lambda: write(digest="0" * 64), "sha is wrong": lambda: write(sha256="0" * 64),
        "key is missing": lambda: recipe.write_text(json.dumps({k: v for k, v in said.items() if k != "steps"})),
    }
    if what is None:
        return list(faults)
    faults[what]()


SPOILS = [
    "no state", "no recipe", "empty state", "empty recipe", "cut state", "half state", "long state", "flipped bit",
    "header beyond the file", "header of nothing", "header that is no json", "pickle", "zip", "state is a folder",
    "recipe is a folder", "state is a link out", "recipe is a link out", "state is a dangling link", "recipe cut",
    "recipe is a list", "recipe is null", "recipe is binary", "recipe is deep", "recipe says nan", "other format",
    "format is text", "other seed", "other chain", "chain is code", "unknown method", "chain is a number", "no steps",
    "steps of rubbish", "unknown key", "base is gone", "digest is wrong", "sha is wrong", "key is missing",
]


@pytest.mark.parametrize("what", SPOILS)
def test_saved_state(saved, tmp_path, gpt2, what):
    shutil.copytree(saved, tmp_path / "a")
    spoil(tmp_path / "a", what)
    before = files(tmp_path)
    refused(BadState, load, gpt2, tmp_path / "a")
    assert files(tmp_path) == before                         # nothing written, nothing lost
    assert attach(gpt2, "lora()").detach() is gpt2


def test_every_fault_is_tried(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a")
    assert spoil(tmp_path / "a", None) == SPOILS


def files(folder):
    return {p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))
            if p.is_file() and not p.is_symlink()}


@pytest.mark.parametrize("where", ["nowhere", "file.txt", "", "\x00", "x" * 400], ids=lambda v: ascii(v)[:12])
def test_no_saved_state_there(tmp_path, gpt2, where):
    (tmp_path / "file.txt").write_text("x")
    refused(BadState, load, gpt2, tmp_path / where)


@pytest.mark.parametrize("other", ["bert", "llama", "vit"])
def test_wrong_base(saved, other):
    refused(WrongBase, load, tiny.build(other), saved)


def test_base_with_other_weights(saved):
    model = tiny.build("gpt2")
    next(model.parameters()).data.add_(1)
    refused(WrongBase, load, model, saved)


def copied(saved, folder):
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(saved, folder))


@QUICK
@given(at=st.integers(0, 10**6), byte=st.integers(1, 255))
def test_any_changed_byte_is_noticed(saved, tmp_path, gpt2, at, byte):
    path = copied(saved, tmp_path / "a") / ("state.safetensors" if at % 2 else "recipe.json")
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] ^= byte
    path.write_bytes(bytes(raw))
    try:
        load(gpt2, tmp_path / "a").detach()                  # white space between words may change
        assert json.loads(path.read_text()) == json.loads((saved / "recipe.json").read_text())
    except BadState as error:
        readable(str(error))


@QUICK
@given(path=st.sampled_from(["chain", "seed", "name", "stepped", "on", "base", "steps", "extra", "format", "sha256"]),
       value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                          lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=4), v, max_size=2)))
def test_a_recipe_forged_with_a_right_digest_is_refused_or_harmless(saved, tmp_path, gpt2, path, value):
    from luthier.save import _digest

    said = json.loads((saved / "recipe.json").read_text()) | {path: value}
    said["digest"] = _digest(said)
    (copied(saved, tmp_path / "a") / "recipe.json").write_text(json.dumps(said))
    try:
        load(gpt2, tmp_path / "a").detach()
    except LuthierError as error:
        readable(str(error))


# -- evidence and systems -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, says", [("B999", "B"), ("GPTQQ", "GPTQ"), ("", ""), ("C036", "runner"), ("../B105", ""),
                                        ("b105.py", "B105")])
def test_evidence_name(name, says):
    from luthier import evidence

    refused(UnknownName, evidence.runner, name, says=says)


# -- the command line ---------------------------------------------------------------------------------------------------

COMMANDS = [  # (arguments, words that the message must hold)
    (["sites", "minilmm"], "minilm"), (["sites", "nowhere/at/all"], ""), (["sites", ""], ""), (["zooo"], "zoo"),
    (["compair"], "compare"), (["systems", "--jsn"], ""), (["evidence", "B999"], ""),
    (["evidence", "B092", "--seeds", "a"], "seeds"), (["evidence", "B092", "--seeds", "1,1"], "seeds"),
    (["evidence", "B092", "--seeds", "0"], "seeds"), (["cost", "minilmm", "lora()"], "minilm"),
    (["cost", "shape:llama-7b", "lor()"], "lora"), (["cost", "shape:nope", "lora()"], ""),
    (["cost", "shape:llama-7b", "lora(rank=-1)"], "rank"),
    (["compare", "nowhere.csv", "--model", "minilm", "--out", "OUT"], "nowhere.csv"),
    (["compare", "digit", "--model", "dinov2-s", "--out", "OUT"], "digits"), (["compare", "digits"], "model"),
    (["compare", "digits", "--model", "dinov2-s", "--methods", "lor()", "--out", "OUT"], "lora"),
    (["compare", "digits", "--model", "dinov2-s", "--methods", "lora(", "--out", "OUT"], ""),
    (["compare", "digits", "--model", "dinov2-s", "--seeds", "x", "--out", "OUT"], "seeds"),
    (["compare", "digits", "--model", "dinov2-s", "--seeds", "0", "--out", "OUT"], "seeds"),
    (["compare", "digits", "--model", "minilm", "--out", "OUT"], ""), (["tune", "digits"], ""),
    (["tune", "digits", "--model", "dinov2-s", "--with", "lora(rnk=8)", "--out", "OUT"], "rank"),
    (["tune", "nowhere.csv", "--model", "minilm", "--with", "lora()", "--out", "OUT"], "nowhere.csv"),
    (["tune", "digits", "--model", "dinov2-s", "--with", "lora()", "--out", "OUT", "--lr", "-1"], "lr"),
    (["tune", "digits", "--model", "dinov2-s", "--with", "lora()", "--out", "OUT", "--lr", "x"], "lr"),
    (["tune", "digits", "--model", "dinov2-s", "--with", "lora()", "--out", "OUT", "--epochs", "0"], "epochs"),
    (["tune", "digits", "--model", "dinov2-s", "--with", "lora()", "--out", "OUT", "--batch-size", "0"], "batch"),
    (["predict", "nowhere", "hello"], ""), (["predict"], ""), (["merge", "nowhere", "--out", "OUT"], ""), (["merge"], ""),
    (["check", "lor"], "lora"), (["check", "--import", "nowhere.py"], "nowhere.py"),
    (["methods", "--import", "nowhere.py"], "nowhere.py"), (["docs", "--out", "/dev/null/x"], ""), (["--nope"], ""),
    (["sites", "minilm", "--select", "attn.z"], "attn"),
]


@pytest.mark.parametrize("argv, says", COMMANDS, ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "")
def test_command_line(tmp_path, monkeypatch, capsys, argv, says):
    from luthier.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = str(tmp_path / "made")
    try:
        code = main([out if a == "OUT" else a for a in argv])
    except SystemExit as stop:                               # argparse's own way
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and not said.out.strip(), (code, said.out)
    assert "Traceback" not in said.err and "\n\n" not in said.err.strip() and len(said.err.strip()) > 10, said.err
    for word in says.split():
        assert word in said.err, said.err                    # words are wrapped between, never within
    assert os.listdir(tmp_path) == []                        # nothing written


def test_there_are_over_200():
    assert len(CHAINS) + len(SELECTORS) + len(FILES) + len(SPOILS) + len(COMMANDS) > 250
