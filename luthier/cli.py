"""The command line: one function a command. Whatever it needs is imported inside it, so that `luthier --help` is there at once.

Exit codes: 0 done, 1 a check failed (or a defect of ours), 2 the user's to mend (one paragraph, no traceback), 130 Ctrl-C.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import textwrap

from .errors import LuthierError, nearest

COMMANDS = {}                            # word -> (function, arguments)


def arg(*names, **options):
    return names, options


def command(*arguments):
    """Make a function a command: its name is the word, its docstring the help (the first line in the list of commands)."""
    def add(fn):
        COMMANDS[fn.__name__.removesuffix("_")] = fn, arguments
        return fn
    return add


def whole(least):
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at least {least}")
        return value
    return parse


def positive(text):
    try:
        value = float(text)
    except ValueError:
        value = None
    if value is None or not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number above 0")
    return value


def several(kind):
    def parse(text):
        return [kind(part.strip()) for part in text.split(",")]
    return parse


def seeds(text):
    from .evidence import parse_seeds

    return parse_seeds(text)


def pairs(text):
    """"text=review, label=stars" -> {"text": "review", "label": "stars"}"""
    found = [part.partition("=") for part in text.split(",")]
    if any(not key.strip() or not value.strip() for key, _, value in found):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not of the form role=column, role=column")
    return {key.strip(): value.strip() for key, _, value in found}


JSON = arg("--json", action="store_true", help="print JSON")
MODEL = arg("--model", required=True, metavar="M",
            help="a zoo name (`luthier zoo`), a local folder, a hub id OWNER/NAME, or timm:NAME")
IMPORT = arg("--import", dest="include", action="append", default=[], metavar="FILE.py",
             help="a file with a method of your own; may repeat")
DATA = arg("data", metavar="DATA", help="CSV, TSV, JSONL (also .gz), Parquet, .npz, a folder of images by class, a hub data set "
                                        "id, or a built-in name (digits)")
SEEDS = arg("--seeds", type=seeds, default=3, metavar="N", help="how many, or which: 0,1,2 (default 3)")
JOBS = arg("--jobs", type=whole(1), default=1, metavar="N", help="train in N processes (default 1)")
TASK = (
    arg("--task", metavar="KIND", help="when the guess is wrong: text-classification, token-classification, "
                                       "image-classification, image-to-text, text-segmentation, audio-to-text, causal-lm, "
                                       "instruction, regression"),
    arg("--columns", type=pairs, metavar="ROLE=COLUMN,...", help="when the guess is wrong: roles text, text_pair, label, target, "
                                                                 "tokens, tags, image, audio, prompt, response, task, phrase, "
                                                                 "mask"),
    arg("--metric", metavar="NAME", help="the primary metric, when the task has several"),
    arg("--limit", type=whole(2), metavar="N", help="at most N rows a split"),
    arg("--max-length", type=whole(2), metavar="N", help="tokens a row"),
    arg("--image-size", type=whole(2), metavar="N", help="pixels a side"),
    arg("--pool", metavar="NAME", help="how features become one vector (cls, mean, cls+mean, last)"),
    arg("--template", metavar="TEXT", help="class-names: the text of a class, with {} for its name (\"a photo of a {}.\")"),
    arg("--shots", type=whole(1), metavar="N", help="class-names: training rows of each class; with --concepts, of each concept"),
    arg("--concepts", metavar="DATA", help="pairs of image and text: train on those that give each class of these labelled "
                                           "images --shots rows"),
    arg("--judge", metavar="M", help="with --concepts: the dual encoder that says which text is near which concept"),
)
BUDGET = (
    arg("--epochs", type=whole(1), default=3, metavar="N", help="passes over the training rows (default 3)"),
    arg("--batch-size", type=whole(1), default=32, metavar="N", help="rows a step (default 32)"),
    arg("--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision of the forward pass (default no)"),
)


def _task_options(a):
    found = {k: getattr(a, k) for k in ("task", "columns", "metric", "limit", "max_length", "image_size", "pool",
                                       "template", "shots", "concepts", "judge")}
    return {k: v for k, v in found.items() if v is not None}


def _include(a):
    from .method import include

    for path in a.include:
        try:
            include(path)
        except LuthierError:
            raise
        except Exception as e:                             # the user's own code may raise anything
            where = f", line {e.lineno}" if isinstance(e, SyntaxError) else ""
            raise LuthierError(f"--import {path}{where}: {type(e).__name__}: {e}. Mend the file, then run this again.") from e


def _print(rows, columns, as_json):
    """Rows as JSON, or as an aligned table of `columns`: {title: key or function}."""
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False, default=str))
        return
    def cell(row, column):
        value = column(row) if callable(column) else row[column]
        return "" if value is None else str(value)

    cells = [list(columns)] + [[cell(r, c) for c in columns.values()] for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())


# -- the main job -----------------------------------------------------------------------------------------------------------


def _show(document, a):
    from .compare import report, rows, table

    if a.json:
        print(json.dumps(rows.rows(document), indent=1, ensure_ascii=False))
    else:
        print(table.show(document))
    if a.out:
        page, picture = report.write(document, a.out)
        print(f"\n{page}\n{picture}", file=sys.stderr if a.json else sys.stdout)


def _again(a):
    return "luthier " + shlex.join(a.argv)


@command(arg("--out", default="demo-out", metavar="DIR", help="folder for the report (default demo-out)"), SEEDS,
         arg("--jobs", type=whole(1), default=2, metavar="N", help="train in N processes (default 2)"), JSON)
def demo(a):
    """the main job on real data: a dozen ways of tuning a real ViT on digits, compared

    Compares ways of tuning DINOv2 ViT-S on scikit-learn's digits against a linear probe and full fine-tuning. Takes under ten
    minutes on two cores and needs nothing but what was installed. Stopped, the same command goes on where it was.
    """
    from .demo import demo

    _show(demo(a.out, a.seeds, a.jobs, command=_again(a)), a)


@command(DATA, MODEL, arg("--methods", default="probe, full, lora(rank=8)", metavar="CHAINS",
                          help="chains with commas between (default: \"probe, full, lora(rank=8)\")"),
         SEEDS, arg("--out", required=True, metavar="DIR", help="folder for results.json, report.html, pareto.png"),
         arg("--lr", type=positive, default=1e-3, metavar="X", help="learning rate of every method (default 1e-3)"),
         arg("--tune-lr", action="store_true", help="search it for every method, baselines included, in the same small grid"),
         arg("--lr-grid", type=several(positive), metavar="X,X,...", help="the grid (default 3e-5,1e-4,3e-4,1e-3,3e-3,1e-2)"),
         JOBS, arg("--ray", metavar="ADDRESS", help="train on the Ray cluster there; local starts one"),
         *BUDGET, *TASK, IMPORT, JSON)
def compare(a):
    """which method pays off on your data? Every chain over several seeds, every cost measured

    Trains every chain on DATA at equal budget, evaluates it on held-out rows, measures parameters, bytes, memory, step time and
    latency, and writes a table, report.html and pareto.png. Stopped, the same command goes on where it was.

    luthier compare reviews.csv --model minilm --methods "probe, full, lora(rank=8), lora() >> ssf()" --out runs/reviews
    luthier compare scenes-multitask --model tiny-vlt5 --methods "full, vl_adapter, lora" --out runs/four-tasks
    """
    _include(a)
    from .compare.run import GRID, compare

    document = compare(a.data, a.model, a.methods, a.seeds, a.out, epochs=a.epochs, batch_size=a.batch_size, lr=a.lr,
                       tune_lr=a.tune_lr, grid=a.lr_grid or GRID, jobs=a.jobs, ray=a.ray, precision=a.precision,
                       command=_again(a), **_task_options(a))
    _show(document, a)


TRAINED = (
    arg("--out", required=True, metavar="DIR", help="folder for the tuned state and its checkpoints"),
    arg("--lr", type=positive, default=1e-3, metavar="X", help="learning rate (default 1e-3)"),
    arg("--schedule", default="linear", metavar="TEXT",
        help="of the learning rate: constant, linear, cosine, step, \"uba(phi=5)\" (default linear)"),
    arg("--seed", type=whole(0), default=0, metavar="N", help="of what is new, the state and the order of the data (default 0)"),
    arg("--resume", action="store_true", help="go on from the newest checkpoint in DIR"),
    arg("--every", type=whole(1), metavar="N", help="steps between checkpoints (default: one a minute)"),
    arg("--parallel", choices=("ddp", "fsdp"), help="under torchrun: whole models side by side (ddp, the default), or the base "
                                                    "cut up over the processes (fsdp)"),
    arg("--log", "--logger", choices=("tensorboard", "none"),
        help="default: TensorBoard if it is installed (torchrun takes --log for its own; it lets --logger through)"),
)


@command(DATA, MODEL, arg("--with", dest="chain", required=True, metavar="CHAIN",
                          help="what to tune with, such as \"lora(rank=8) >> ssf()\""),
         *TRAINED, *BUDGET, *TASK, IMPORT, JSON)
def tune(a):
    """tune a model on your data with one chain

    Trains, evaluates and saves. A run that was killed, stopped by Ctrl-C, or ended by a full disk or a NaN goes on with --resume.

    luthier tune reviews.csv --model minilm --with "lora(rank=8)" --out tuned
    torchrun --nproc-per-node 2 -m luthier tune reviews.csv --model minilm --with "lora(rank=8)" --out tuned
    """
    _tune(a, a.model, a.chain)


def _tune(a, model, chain):
    _include(a)
    from .tune import tune

    scores = tune(a.data, model, chain, a.out, epochs=a.epochs, batch_size=a.batch_size, lr=a.lr, seed=a.seed,
                  resume=a.resume, every=a.every, precision=a.precision, schedule=a.schedule, parallel=a.parallel,
                  log=False if a.log == "none" else a.log, say=lambda text: print(text, file=sys.stderr), **_task_options(a))
    if _several() and os.environ["RANK"] != "0":
        return
    if a.json:
        print(json.dumps(scores))
    else:
        print("  ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        folder = shlex.quote(a.out)
        print(f"Saved in {a.out}. Next: luthier predict {folder} INPUT, or luthier merge {folder} --out MODEL_DIR")


@command(arg("vision", metavar="VISION", help="the model that looks or listens: a zoo name, a folder, a hub id, or timm:NAME"),
         arg("language", metavar="LANGUAGE", help="the model that writes; or reads, where the bridge makes a dual encoder"),
         arg("--with", dest="way", metavar="WAY", help="the bridge between them (default: one linear map)"),
         arg("--data", required=True, metavar="PAIRS", help="rows of an image or several, a prompt if any, and a response (of an "
                                                            "image and a caption, for a dual encoder): JSONL, CSV, Parquet, or "
                                                            "built-in: scenes:caption, scenes:vqa, nlvr, scenes:retrieval"),
         arg("--tune", dest="chain", default="full(at='connector')", metavar="CHAIN",
             help="what trains (default \"full(at='connector')\"); \"lora(at='text.attn.q')\" trains that beside the connector"),
         *TRAINED, *BUDGET, *TASK, IMPORT, JSON)
def bridge(a):
    """connect two frozen models, and train what lies between them on your pairs

    luthier bridge dinov2-s smollm2-135m --with "limber()" --data pairs.jsonl --out captioner
    luthier predict captioner image.png "how many red circles?"
    luthier bridge dinov2-s minilm --with "sail()" --data pairs.jsonl --out dual
    luthier bridge whisper-tiny smollm2-135m --with "apt()" --data clips.jsonl --out listener
    """
    from .bridges import DEFAULT, parse

    tasks = {"vision-language": "image-text-retrieval", "audio-text": "audio-to-text"}
    a.task = a.task or tasks.get(parse(a.way or DEFAULT).makes)
    _tune(a, f"{a.vision}+{a.language}" + f":{a.way}" * bool(a.way), a.chain)


@command(arg("vision", metavar="VISION,...", type=several(str), help="models that look"),
         arg("language", metavar="LANGUAGE,...", type=several(str), help="models that read"),
         arg("--data", required=True, metavar="PAIRS", help="rows of an image and a caption"),
         arg("--steps", type=whole(0), default=0, metavar="N", help="of training for the alignment probe (default 0: CKA alone)"),
         arg("--limit", type=whole(2), default=500, metavar="N", help="at most N rows a split (default 500)"),
         arg("--image-size", type=whole(2), metavar="N", help="pixels a side"),
         arg("--seed", type=whole(0), default=0, metavar="N", help="of rows and probe (default 0)"), JSON)
def rank(a):
    """which encoders fit together? CKA and a linear probe of every pair, before a bridge is trained

    Similarity (CKA) of what a vision and a text encoder make of the same pairs, and with --steps what a linear head on each side
    comes to in retrieval; the best pair first.

    luthier rank dinov2-s,effnet-lite0 minilm,smollm2-135m --data pairs.jsonl --steps 200
    """
    from .procedures.matching import rank

    rows = rank(a.data, a.vision, a.language, steps=a.steps, seed=a.seed, limit=a.limit, image_size=a.image_size)
    more = {k: lambda r, k=k: f"{r[k]:.3f}" for k in ("cka", "recall@1", "recall@5", "recall@10") if k in rows[0]}
    _print(rows, {"vision": "vision", "language": "language"} | more, a.json)


@command(arg("folder", metavar="DIR", nargs="?", help="what `luthier tune` wrote; with --rack none"),
         arg("input", metavar="INPUT", nargs="+", help="a text, an image file, a folder of images, a file of rows, or - for "
                                                       "lines of stdin"),
         arg("--rack", metavar="DIR", help="a folder whose sub-folders `luthier tune` wrote: one base, and for each row "
                                           "the tuned state that its column `adapter` names"),
         arg("--adapter", metavar="NAME", help="with --rack: of rows that name none"),
         arg("--memory", default="2GB", metavar="SIZE", help="with --rack: what states in use may take (default 2GB)"),
         arg("--out", default=".", metavar="FOLDER", help="of masks: where they are written as PNG (default: here)"),
         arg("--names", type=several(str), metavar="NAME,NAME,...", help="of classes, for a dual encoder: DIR may then be one "
                                                                         "that nobody tuned, such as tiny-clip"),
         IMPORT, JSON)
def predict(a):
    """predict with a tuned model, or with many over one base

    luthier predict tuned "the film was good"
    luthier predict captioner image.png "how many red circles?"
    luthier predict listener sound.wav "Is the sound <clip> low or high?"
    luthier predict tiny-clip pictures/ "a red circle"         ranks images for a text, and texts for an image
    luthier predict tiny-clip pictures/ --names "red circle, blue square"
    luthier predict --rack customers rows.csv

    An input that cannot be used fails alone; the others are answered, and the exit code is 2.
    """
    _include(a)
    from .tune import answers, inputs, opened

    errors = {}
    if a.rack:
        from .serve.predict import predict as serve

        given, found, errors = serve(a.rack, [*([a.folder] if a.folder else []), *a.input], a.adapter, a.memory)
    elif not a.folder:
        raise LuthierError("Say which tuned model: luthier predict DIR INPUT, or luthier predict --rack DIR INPUT.")
    else:
        task, tuned = opened(a.folder, a.names)
        given = inputs(task, a.input)
        found, errors = answers(task, tuned, given)
        found = task.write(given, found, a.out) if hasattr(task, "write") else found
        for note in dict.fromkeys(task.notes):                 # what was done to inputs that are not plain
            print(f"  {note}", file=sys.stderr)
    _predictions(given, found, a.json)
    if errors:
        from .errors import RowsFailed

        raise RowsFailed(found, errors)


def _predictions(given, found, as_json):
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for x, y in zip(given, found, strict=True):
        name = x if isinstance(x, str) else " | ".join(str(v) for v in x.values() if v is not None)
        name = name if len(name) <= 60 else name[:59] + "…"
        ranked = [z for key in ("images", "texts") for z in y.get(key, ())]
        shown = "".join(f"\n  {z['score']:.3f}  {z.get('image', z.get('text'))}" for z in ranked) if ranked else \
            f"{y['label']}  {y['score']:.3f}" if "score" in y else "  ".join(str(v) for v in y.values())
        print(f"{name}\t{shown}" if len(given) > 1 else shown)


@command(arg("folder", metavar="DIR", help="what `luthier tune` wrote; with --with, a base model"),
         arg("--with", dest="chain", metavar="CHAIN", help="what to merge into the base model DIR as it is, such as "
                                                           "\"ties(experts=('a', 'b', 'c'))\""),
         arg("--out", required=True, metavar="MODEL_DIR", help="a new folder for the plain model"), IMPORT, JSON)
def merge(a):
    """write the tuned model as a plain one that any other tool loads

    luthier merge tuned --out plain
    luthier merge minilm --with "ties(experts=('runs/a', 'runs/b', 'runs/c'))" --out blend
    """
    _include(a)
    from .tune import blend, export

    files = blend(a.folder, a.chain, a.out) if a.chain else export(a.folder, a.out)
    print(json.dumps(files) if a.json else f"{a.out}: {', '.join(files)}")


@command(arg("folder", metavar="DIR", help="what `luthier tune` or Tuned.save wrote"),
         arg("--to", choices=("peft",), default="peft", help="the format (default peft)"),
         arg("--out", required=True, metavar="FOLDER", help="a new folder"),
         arg("--model", metavar="M", help="the base, for a DIR that was saved from Python"), IMPORT, JSON)
def export(a):
    """write a tuned state as other tools read it: peft, and with it vLLM, diffusers and the hub

    luthier export tuned --to peft --out adapter
    """
    _include(a)
    from .interop import export_folder

    files, notes = export_folder(a.folder, a.out, a.to, a.model)
    if a.json:
        print(json.dumps(dict(files=files, notes=notes), indent=1, ensure_ascii=False))
    else:
        print("\n".join([f"{a.out}: {', '.join(files)}", *notes]))


@command(arg("folder", metavar="FOLDER", help="a folder of peft's or AdapterHub's: adapter_config.json and its safetensors"),
         MODEL, arg("--out", required=True, metavar="DIR", help="a new folder that predict, merge and luthier.load take"), JSON)
def import_(a):
    """read an adapter that another tool wrote

    luthier import adapter --model my-model --out tuned
    """
    from .interop import import_folder

    chain, notes = import_folder(a.folder, a.model, a.out)
    if a.json:
        print(json.dumps(dict(chain=chain, notes=notes), indent=1, ensure_ascii=False))
    else:
        print("\n".join([f"{a.out}: {chain}", *notes]))


# -- looking ------------------------------------------------------------------------------------------------------------------


def _model(ref):
    """A model for looking at: with weights, or (shape:NAME, config:FOLDER) without."""
    if ref.startswith(("shape:", "config:")):
        from .cost import shape

        return shape(ref)
    from . import zoo

    return zoo.load(ref)


LOOK = arg("model", metavar="MODEL", help="a zoo name, a local folder, a hub id, timm:NAME; without weights: shape:llama-7b, "
                                          "config:FOLDER")


@command(LOOK, arg("--select", metavar="SELECTOR", help="only what a selector hits, such as \"attn.q mlp.down\""), JSON)
def sites(a):
    """the named places of a model: what methods can act on"""
    from .site import find
    from .site import sites as scan

    every = scan(_model(a.model))
    found = find(every, a.select) if a.select is not None else every
    rows = [dict(name=s.name, kind=s.kind, role=s.role, tower=s.tower, layout=s.layout, d_out=s.d_out, d_in=s.d_in, block=s.block,
                 path=s.path, param=s.param, tied=list(s.tied)) for s in found]
    def where(r):
        return r["path"] + (f".{r['param']}" if r["param"] else "") + (f"  tied: {', '.join(r['tied'])}" if r["tied"] else "")

    _print(rows, {"site": "name", "kind": "kind", "role": "role", "tower": "tower",
                  "shape": lambda r: f"{r['d_out']}×{r['d_in']}" if r["kind"] == "weight" else r["d_out"], "layout": "layout",
                  "path": where}, a.json)


@command(LOOK, arg("chain", metavar="CHAIN", help="such as \"lora(rank=8) >> ssf()\""),
         arg("--rows", type=whole(1), default=1, metavar="N", help="rows of the example batch (default 1)"),
         arg("--tokens", type=whole(2), default=128, metavar="N", help="tokens a row (default 128)"), IMPORT, JSON)
def cost(a):
    """what a chain costs on a model: predicted, and measured where weights are there"""
    _include(a)
    from .cost import cost, example
    from .method import parse

    chain = parse(a.chain)
    model = _model(a.model)
    found = cost(model, chain, example(model, a.rows, a.tokens))
    print(json.dumps(found.json(), indent=1) if a.json else found.table())


@command(arg("name", nargs="?", metavar="NAME", help="one method: its equation, fields and defaults"), IMPORT, JSON)
def methods(a):
    """the ways of tuning there are"""
    _include(a)
    import inspect

    from .method import VERBS, discover, lookup

    def row(name, thing):
        text = (sys.modules[thing.__module__].__doc__ or thing.__doc__ or "").strip()
        fields = {p.name: None if p.default is p.empty else p.default for p in inspect.signature(thing).parameters.values()}
        verbs = [v for v in VERBS if isinstance(thing, type) and thing.has(v)]
        home = thing.__module__.split(".")
        family = home[2] if home[:2] == ["luthier", "methods"] else "own"
        return dict(name=name, family=family, about=text.split("\n")[0], verbs=verbs, fields=fields, doc=text)

    if a.name is None:
        rows = [row(n, t) for n, t in sorted(discover().items())]
        _print(rows, {"method": "name", "family": "family", "verbs": lambda r: " ".join(r["verbs"]) or "recipe",
                      "about": lambda r: r["about"][:90]}, a.json)
        return
    r = row(a.name, lookup(a.name))
    if a.json:
        print(json.dumps(r, indent=1, ensure_ascii=False, default=str))
    else:
        fields = ", ".join(f"{k}={v!r}" for k, v in r["fields"].items())
        print(f"{r['doc']}\n\n{a.name}({fields})\nverbs: {' '.join(r['verbs']) or 'recipe'}")


@command(JSON)
def systems(a):
    """the 245 published systems and what evidence says of each"""
    from .systems import systems

    _print(systems(), {"id": "id", "system": "name", "fit": "fit", "state": "state", "record": "record"}, a.json)


@command(arg("what", nargs="?", choices=("train",), help="train one of the zoo's own models anew"),
         arg("name", nargs="?", metavar="NAME", help="which (tiny-clip)"),
         arg("--out", metavar="DIR", help="with train: the folder for its files"), JSON)
def zoo(a):
    """the pretrained models known by short name, and how those that Luthier trained itself were made

    luthier zoo
    luthier zoo train tiny-clip --out my-clip
    """
    from .zoo import entries, train

    if a.what:
        if not a.name or not a.out:
            raise LuthierError("Say which model and where to: luthier zoo train tiny-clip --out DIR")
        scores = train(a.name, a.out, say=lambda text: print(text, file=sys.stderr))
        _print([{"zero-shot": k, "accuracy": v} for k, v in scores.items()], {k: k for k in ("zero-shot", "accuracy")}, a.json)
        return
    _print(entries(), {"name": "name", "kind": "kind", "what": "what", "licence": "licence",
                       "size": lambda r: f"{r['parameters'] / 1e6:.3g}M",
                       "installed": lambda r: "yes" if r["installed"] else r["install"]}, a.json)


# -- trusting -----------------------------------------------------------------------------------------------------------------


@command(arg("names", nargs="*", metavar="METHOD", help="methods to check (default: all, or the imported ones)"), IMPORT,
         arg("--model", action="append", metavar="TINY", help="only on this tiny model; may repeat"),
         arg("--fast", action="store_true", help="leave out the slow checks"), JSON)
def check(a):
    """hold a method to the contracts, one's own file included

    luthier check lora
    luthier check --import my_method.py
    """
    from . import check as suite
    from . import tiny
    from .method import include, lookup

    own = []
    for path in a.include:
        a.include = [path]
        _include(a)
        own += include(path)
    names = a.names or own
    for name in names:
        lookup(name)
    for m in a.model or ():
        if m not in (known := tiny.MODELS | tiny.MORE):
            raise LuthierError(f"There is no tiny model {m!r}. {nearest(m, known)} There are: {', '.join(known)}.")
    if not names:
        from .method import discover

        names = sorted(discover())
    rows = suite.run_all(names, a.model, slow=not a.fast, progress=_ticker())
    print(json.dumps(suite.as_json(rows), indent=1, ensure_ascii=False) if a.json else suite.table(rows))
    return int(any(r.verdict == "FAIL" for r in rows))


def _ticker():
    if not sys.stderr.isatty():
        return None
    return lambda *what: print("\r\x1b[K" + " ".join(str(w) for w in what), end="", file=sys.stderr, flush=True)


@command(arg("name", nargs="?", metavar="SYSTEM", help="an id (B105) or name of systems.md"),
         arg("--seeds", metavar="N", help="how many, or which: 0,1,2 (default: the runner's own)"),
         arg("--out", metavar="DIR", help="folder for the record (default: evidence/ of a checkout)"),
         arg("--list", action="store_true", help="the systems that have a runner"), JSON)
def evidence(a):
    """measure again what a published system claims, and keep the record"""
    from .evidence import names, run
    from .systems import row

    if a.list or a.name is None:
        _print([{k: row(n)[k] for k in ("id", "name")} for n in names()], {"id": "id", "system": "name"}, a.json)
        return
    found = run(a.name, a.seeds, a.out)
    if a.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print("\n".join([f"{found['system']} {found['name']}: {found['verdict']}", *(f"  {r}" for r in found["reasons"])]))


@command(arg("--check", action="store_true", help="write nothing; fail and name the pages that are stale"),
         arg("--out", metavar="DIR", help="folder to write (default: docs/ of a checkout)"))
def docs(a):
    """write the pages that are generated from code and records"""
    from . import docs as pages

    folder = a.out or pages.home()
    touched = pages.stale(folder) if a.check else pages.write(folder)
    print("\n".join(map(str, touched)) or "up to date")
    return int(a.check and bool(touched))


# -- the frame ----------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are LuthierErrors that say what is nearest."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise LuthierError(f"{message[:1].upper()}{message[1:]}. See `{self.prog} --help`.")

    def refuse(self, extra):
        flags = [f for action in self._actions for f in action.option_strings if f.startswith("--")]
        word = next((w for w in extra if w.startswith("-")), extra[0])
        if word.startswith("-"):
            self.error(f"there is no flag {word.partition('=')[0][:40]!r}. {nearest(word.partition('=')[0], flags)}".rstrip("."))
        self.error(f"{word[:60]!r} is one argument too many; quote a chain or text that holds spaces")


def parser():
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {(fn.__doc__ or '').strip().splitlines()[0]}" for name, (fn, _) in COMMANDS.items())
    top = Parser(prog="luthier", usage="luthier [--version] COMMAND ...", description=textwrap.dedent("""\
        Fits pretrained models to a task at the least cost: tune, measure, compare, trust.

        commands:
        {}

        `luthier COMMAND --help` says more; --debug shows the traceback of an error.""").format(listed))
    top.add_argument("--version", action="version", version=f"luthier {_version()}")
    return top


def _version():
    from . import __version__

    return __version__


def _sub(name):
    fn, arguments = COMMANDS[name]
    head, _, rest = fn.__doc__.strip().partition("\n")
    sub = Parser(prog=f"luthier {name}", description=textwrap.dedent(head + "\n" + textwrap.dedent(rest)).strip())
    for names, options in arguments:
        sub.add_argument(*names, **options)
    sub.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    return sub


def _parse(argv):
    words = [w for w in argv if w != "--debug"]
    if not words or words[0] in ("-h", "--help", "--version"):
        parser().parse_args(words or ["--help"])
    name = words[0]
    if name not in COMMANDS:
        if name.startswith("-"):
            raise LuthierError(f"There is no flag {name[:40]!r} before the command. See `luthier --help`.")
        raise LuthierError(f"There is no command {name[:40]!r}. {nearest(name, COMMANDS)} See `luthier --help`.")
    sub = _sub(name)
    a, extra = sub.parse_known_args(words[1:])
    if extra:
        sub.refuse(extra)
    a.argv = words
    return COMMANDS[name][0], a


def main(argv=None):
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")           # its warnings are for programmers
    debug = "--debug" in argv
    try:
        fn, a = _parse(argv)
        if _several() and fn is not tune:
            raise LuthierError(f"torchrun started several processes, and `{argv[0]}` is the work of one. Only tune "
                               "shares its work between them; compare has --jobs and --ray.")
        code = fn(a) or 0
        sys.stdout.flush()
        return code
    except SystemExit as e:                                # --help and --version
        return e.code or 0
    except KeyboardInterrupt:
        _complain("Stopped by Ctrl-C.", debug)
        return 130
    except BrokenPipeError:                                # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except LuthierError as e:
        _complain(str(e), debug)
        return 130 if getattr(e, "interrupted", False) else 2
    except OSError as e:                                   # a path that cannot be read or written
        _complain(f"{e.filename or 'A file'}: {e.strerror or e}. Check the path, its owner and the space that is left.", debug)
        return 2
    except Exception as e:
        _complain(f"{type(e).__name__}: {' '.join(str(e).split())[:400]} This is a defect of Luthier, not of your input: please "
                  "report it with what `--debug` shows.", debug)
        return 1


def _several():
    """luthier.ranks, where torchrun started this process as one of several; else None."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    from . import ranks

    return ranks if ranks.launched() else None


def _complain(text, debug):
    if (ranks := _several()) and not (debug or ranks.first()):
        return
    if debug:
        import traceback

        traceback.print_exc()
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    text = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    print(textwrap.fill(f"luthier: {text}", width, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
