"""From data to a tuned folder, and what such a folder is good for.

    tune(data, model, chain, out)     train, evaluate, save: OUT/recipe.json, OUT/state.safetensors, OUT/checkpoints/
    reopen(folder)                    -> (task, tuned): ready to predict, without the data
    export(folder, out)               the merged, plain model that any other tool loads
    blend(base, chain, out)           the same of a chain that needs no training (experts to combine, say)
"""

import json
import os
from pathlib import Path

from . import save, zoo
from .errors import BadData, BadState, DoesNotFit, LuthierError, RunStopped, nearest
from .method import parse


def tune(data, model, chain, out, *, epochs=3, batch_size=32, lr=1e-3, seed=0, resume=False, every=None, precision="no",
         schedule="linear", parallel=None, progress=None, log=None,
         say=lambda text: None, **task_options):
    """Fit `chain` to the data, in all the processes that torchrun started; returns {"metric": ..., ...} on the test split. On a
    stop (Ctrl-C, NaN, full disk) the last good state is what lies in `out`, and `resume` goes on from it."""
    from . import ranks, tasks
    from .compare.fit import ready
    from .train import train

    out, model, chain = Path(out), zoo.lasting(model), parse(chain)
    save.writable(out)
    ranks.join()
    ranks.fit(parallel, precision)
    if ranks.told(lambda: (out / save.RECIPE).exists() and not resume and not (out / "checkpoints").exists()):
        raise BadState(f"{out} holds a tuned model already. Choose another folder, or move it away.")
    task = tasks.open(data, model=model, **task_options)
    facts = task.describe()
    say = say if ranks.rank() == 0 else lambda text: None
    say(f"{facts['source']}: {facts['kind']}, " + ", ".join(f"{n:,} {s}" for s, n in facts["sizes"].items())
        + f"; columns {', '.join(f'{k}={v}' for k, v in facts['columns'].items())}; scored by {task.metric}"
        + "".join(f"\n  {note}" for note in facts["notes"]))
    tuned, said = ready(task, chain, seed, batch_size), len(facts["notes"])
    if tuned.chain:
        task.examples("train")                             # whose texts are cut is known now
        said = _tell(task, said, say)
    extra = {"task": task.spec(), "seed": seed}
    try:
        history = dict(steps=0)
        if tuned.chain:                                    # `none`: what the model can do as it came
            history = train(tuned, task, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, out=out, resume=resume,
                            every=every, precision=precision, schedule=schedule, parallel=parallel, progress=progress, log=log)
    except RunStopped as stop:
        if tuned.k and ranks.rank() == 0:                  # tuned holds the last good state; keep it usable, if the disk lets us
            try:
                tuned.save(out, extra=extra | {"steps": tuned.k})
            except BadState:
                pass
        raise stop
    with ranks.together(f"Training is over, and its last state is in {out / 'checkpoints'}: --resume evaluates and saves it."):
        scores = task.evaluate(tuned)
        _tell(task, said, say)
        ranks.gather(tuned)
        ranks.told(lambda: tuned.save(out, extra=extra | {"steps": history["steps"], "scores": scores}))
        ranks.leave()
    return scores


def _tell(task, said, say):
    """Say what was noted after the first `said` notes; returns how many there are."""
    for note in dict.fromkeys(task.notes[said:]):
        say(f"  {note}")
    return len(task.notes)


def reopen(folder, names=None):
    """The task of a folder that `tune` wrote, and its model with the tuned state attached; names: of classes, in place of
    those that it was tuned with."""
    task, model = _base(folder, names)
    return task, save.load(model, folder).eval()


def _base(folder, names=None):
    """The task of a folder that `tune` wrote, and its model as it was before."""
    from . import tasks

    recipe = save.read(folder)
    if "task" not in recipe["extra"]:
        raise BadState(f"{folder} was saved from Python without its task, so nobody knows how to read an input. In Python, use "
                       "luthier.load(model, folder); or tune with `luthier tune`.")
    task = tasks.restore(recipe["extra"]["task"])
    if names:
        if not hasattr(task, "named"):
            raise DoesNotFit(f"{folder} was tuned for {task.kind}, which knows no names of classes. Leave --names out.")
        task.named(names)
    return task, task.build(seed=recipe["extra"].get("seed", 0))


def opened(folder, names=None):
    """What predict works with: `reopen` of a tuned folder, `bare` of a model that nobody tuned."""
    from .zoo.table import TABLE

    path = Path(folder)
    tuned = (path / save.RECIPE).exists() or (path / save.NEXT).exists()
    whole = folder in TABLE or any((path / n).exists() for n in ("config.json", zoo.BRIDGE)) or bool(names) and not path.exists()
    return reopen(folder, names) if tuned or not whole else bare(folder, names)


def bare(model, names=None):
    """The task and the model of what nobody tuned: by the names of classes a dual encoder classifies, else it ranks images and
    texts; a model that writes about images answers."""
    from . import tasks
    from .tasks.dual import is_dual
    from .tasks.hub import writes
    from .tasks.segment import is_segmenter

    origin = zoo.about(model)
    cls = None if origin.parts else zoo.architecture(model)[0]
    if names:
        task = tasks.KINDS["class-names"](model, roles={"image": "image", "label": "label"}).named(names)
    elif origin.kind == "audio-text":
        task = tasks.KINDS["audio-to-text"](model, roles={"audio": "audio", "prompt": "prompt", "response": "response"})
    elif origin.kind == "image-text" or writes(model, origin):
        task = tasks.KINDS["image-to-text"](model, roles={"image": "image", "prompt": "prompt", "response": "response"})
    elif cls is not None and is_segmenter(cls):
        task = tasks.KINDS["text-segmentation"](model, roles={"mask": "mask", "image": "image", "phrase": "phrase"})
    elif origin.parts or cls is not None and is_dual(cls):
        task = tasks.KINDS["image-text-retrieval"](model, roles={"image": "image", "caption": "caption"})
    else:
        raise BadState(f"{model} is a model as it came, of kind {origin.kind}, and has learned no task. Tune it first: luthier "
                       f"tune DATA --model {model} --with \"lora()\" --out DIR")
    return task, task.build().eval()


def answers(task, model, given):
    """What the model says of each input, and {number: error}: an input that cannot be used fails alone."""
    errors = {}
    if hasattr(task, "rank"):                              # inputs are told of each other
        return task.rank(model, given, errors), errors
    return each(range(len(given)), lambda part: task.predict(model, [given[i] for i in part]))


def each(numbers, predict, alone=True):
    """What predict(numbers) says of the inputs of these numbers, and {number: error}: where it refuses several, they are tried by
    halves. alone: one input that has no others beside it is refused outright."""
    errors = {}

    def run(part):
        try:
            return predict(part)
        except LuthierError as error:
            if len(numbers) == 1 and alone:
                raise
            if len(part) > 1:
                return run(part[:len(part) // 2]) + run(part[len(part) // 2:])
            errors[part[0]] = type(error)(str(error).replace("Input 0 ", f"Input {part[0]} ", 1))
            return [{"error": str(errors[part[0]])}]
    return run(list(numbers)), errors


def inputs(task, sources):
    """What a user gives to predict: texts, image (or sound) files, folders of them, files of rows (.txt: one a line), - for
    stdin. Where a task takes images and a text, every text is asked of every image."""
    from .tasks.read import SUFFIXES, suffix
    from .tasks.source import IMAGES

    if "image" not in task.roles:
        return [x for source in sources for x in _inputs(source)]
    shown, asked, asks, endings = [], [], getattr(task, "asks", None), getattr(task, "endings", IMAGES)
    lines = [line for s in map(str, sources) for line in (_inputs(s) if s == "-" else [s])]
    for source in lines:
        if os.path.isdir(source):
            found = sorted(str(p) for p in Path(source).iterdir() if p.suffix.lower() in endings)
            if not found:
                raise DoesNotFit(f"The folder {source} holds no {'sound' if endings != IMAGES else 'image'} "
                                 f"({' '.join(endings)}).")
            shown += found
        elif source.lower().endswith(endings):
            shown.append(source)
        elif suffix(source) in SUFFIXES and suffix(source) != ".txt" and os.path.isfile(source):
            shown += _rows(task, source)
        elif source.startswith("{") and "-" in sources and (row := _object(source)) is not None:
            shown.append(row)
        else:
            (asked if asks else shown).extend(_inputs(source))
    if not shown:
        what = "sound" if endings != IMAGES else "image"
        raise DoesNotFit(f"No {what} is among {', '.join(map(repr, sources))}. Name one before the text: luthier predict DIR "
                         f"{what}{endings[0]} \"how many?\"")
    if hasattr(task, "among"):
        return task.among(shown, asked)
    if not asks:
        return shown
    key, rows = task.roles.get(asks), []
    for x in shown:                                        # a row that asks something itself is asked that alone
        row = x if isinstance(x, dict) else {"image": x}
        own = row.get(key) or row.get(asks)
        rows += [row] if own or not asked else [row | {asks: q} for q in asked if q] or [row]
    return rows


def _object(line):
    """The row that a line of JSON holds, else None."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _rows(task, source):
    """The rows of a file that names images: paths in it are relative to it."""
    rows, base, key = _inputs(source), Path(source).parent, task.roles["image"]
    if any(key not in row and "image" not in row for row in rows):
        raise BadData(f"{source} has no column {key!r} (the image). {nearest(key, rows[0])} It has: "
                      f"{', '.join(map(str, rows[0]))}.")
    for row in rows:
        k = key if key in row else "image"
        row[k] = [str(base / p) if isinstance(p, str) else p for p in row[k]] if isinstance(row[k], list) else (
            str(base / row[k]) if isinstance(row[k], str) and row[k].strip() else row[k])
    return rows


def _inputs(source):
    import sys

    from .tasks.read import whole

    if source == "-":
        try:
            return [whole(line) for line in sys.stdin.read().splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise BadData("What came through stdin is not UTF-8 text. Save or convert it as UTF-8.") from error
    path = Path(source)
    try:
        file = path.is_file()
    except OSError:                                        # a text too long to be a name
        file = False
    if not file:
        return [whole(str(source))]
    if path.suffix == ".txt":
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    from .tasks.read import SUFFIXES, suffix, table

    if suffix(path) not in SUFFIXES:
        return [str(source)]
    rows = table(path, 0, [])
    return [dict(zip(rows.columns, row, strict=True)) for row in zip(*rows.columns.values(), strict=True)]


def export(folder, out):
    """Write the merged model into `out` as its own library saves it; returns the names of the files."""
    from .merging import plain, written
    from .tasks import Headed

    task, model = _base(folder)
    recipe, chain, state = save.contents(model, folder, lazy=True)
    headed = isinstance(model, Headed)

    def put(place, save_file):
        with zoo.quiet():
            how = plain(model.backbone if headed else model, place, save_file).format(Path(out).name)
        if task.options.get("tokenizer") or task.kind != "image-classification":
            task.tokenizer.save_pretrained(place)
        if headed:
            save_file(model.head.state_dict(), place / "head.safetensors")
            (place / "head.json").write_text(json.dumps({"pool": model.pool, **task.spec()}, indent=1, ensure_ascii=False) + "\n",
                                             "utf-8")
        (place / "README.md").write_text(_card(task, chain, model, how, headed), "utf-8")
    return written(model.eval(), chain, out, put, seed=recipe["seed"], state=state)


def blend(base, chain, out):
    """Write the model `base` names into `out` with a chain that needs no data (experts to combine, say) merged into it."""
    from .merging import plain, written

    model, chain = zoo.load(base), parse(chain)

    def put(place, save_file):
        with zoo.quiet():
            plain(model, place, save_file)
        origin = model.luthier_origin
        if origin.folder and (Path(origin.folder) / "tokenizer_config.json").exists():
            origin.tokenizer().save_pretrained(place)
    return written(model, chain, out, put)


def _card(task, chain, model, how, headed):
    needs = "which Luthier loads" if how.startswith("luthier") else "nothing of Luthier is needed to load it"
    licence = getattr(getattr(model, "luthier_origin", None), "licence", "unknown")
    head = f"""
The task's head is a linear layer in `head.safetensors`: `logits = head(pool(hidden))`, pool = `{model.pool}`; labels and all else
that is needed to read its output are in `head.json`.
""" if headed else ""
    return f"""# {task.model}, tuned by Luthier

`{chain!r}` for {task.kind}, merged into the weights: a plain model, {needs}.

    {how}
{head}
Licence of the base model: {licence}.
"""
