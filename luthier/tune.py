"""From data to a tuned folder, and what such a folder is good for.

    tune(data, model, chain, out)     train, evaluate, save: OUT/recipe.json, OUT/state.safetensors, OUT/checkpoints/
    reopen(folder)                    -> (task, tuned): ready to predict, without the data
    export(folder, out)               the merged, plain model that any other tool loads
    blend(base, chain, out)           the same of a chain that needs no training (experts to combine, say)
"""

import json
from pathlib import Path

from . import save, zoo
from .errors import BadState, DoesNotFit, RunStopped
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
    tuned = ready(task, chain, seed, batch_size)
    extra = {"task": task.spec(), "seed": seed}
    try:
        history = train(tuned, task, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, out=out, resume=resume, every=every,
                        precision=precision, schedule=schedule, parallel=parallel, progress=progress, log=log)
    except RunStopped as stop:
        if tuned.k and ranks.rank() == 0:                  # tuned holds the last good state; keep it usable, if the disk lets us
            try:
                tuned.save(out, extra=extra | {"steps": tuned.k})
            except BadState:
                pass
        raise stop
    with ranks.together(f"Training is over, and its last state is in {out / 'checkpoints'}: --resume evaluates and saves it."):
        scores = task.evaluate(tuned)
        ranks.gather(tuned)
        ranks.told(lambda: tuned.save(out, extra=extra | {"steps": history["steps"], "scores": scores}))
        ranks.leave()
    return scores


def reopen(folder):
    """The task of a folder that `tune` wrote, and its model with the tuned state attached."""
    task, model = _base(folder)
    return task, save.load(model, folder).eval()


def _base(folder):
    """The task of a folder that `tune` wrote, and its model as it was before."""
    from . import tasks

    recipe = save.read(folder)
    if "task" not in recipe["extra"]:
        raise BadState(f"{folder} was saved from Python without its task, so nobody knows how to read an input. In Python, use "
                       "luthier.load(model, folder); or tune with `luthier tune`.")
    task = tasks.restore(recipe["extra"]["task"])
    return task, task.build(seed=recipe["extra"].get("seed", 0))


def inputs(task, sources):
    """What a user gives to predict: texts, image files, folders of images, files of rows (.txt: one a line), - for stdin. Where a
    task takes images and a text, every text is asked of every image."""
    if not (asks := getattr(task, "asks", None)):
        return [x for source in sources for x in _inputs(task, source)]
    from .tasks.read import SUFFIXES, suffix
    from .tasks.source import IMAGES

    shown, asked = [], []
    for source in map(str, sources):
        if Path(source).is_dir() or source.lower().endswith(IMAGES):
            shown += _inputs(task, source)
        elif suffix(source) in SUFFIXES and Path(source).is_file():
            rows, base = _inputs(task, source), Path(source).parent
            key = task.roles["image"]
            for row in rows:                               # paths in a file are relative to it
                paths = row.get(key)
                row[key] = [str(base / p) for p in paths] if isinstance(paths, list) else str(base / str(paths))
            shown += rows
        else:
            asked += _inputs(task, source)
    if not shown:
        raise DoesNotFit(f"No image is among {', '.join(map(repr, sources))}. Name one before the question: luthier predict DIR "
                         "image.png \"how many?\"")
    return [x if isinstance(x, dict) else {"image": x} | ({asks: q} if q else {}) for x in shown for q in asked or [""]]


def _inputs(task, source):
    import sys

    from .tasks.source import IMAGES

    image = task.kind == "image-classification" or hasattr(task, "asks") and str(source).lower().endswith(IMAGES)
    if source == "-":
        return [line for line in sys.stdin.read().splitlines() if line.strip()]
    path = Path(source)
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError:                                        # a text too long to be a name
        folder = file = False
    if folder and (task.kind.startswith("image") or hasattr(task, "asks")):
        found = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in IMAGES)
        if not found:
            raise DoesNotFit(f"The folder {path} holds no image ({' '.join(IMAGES)}).")
        return found
    if image or not file:
        return [str(source)]
    if path.suffix == ".txt":
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    from .tasks.read import table

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
    licence = getattr(getattr(model, "luthier_origin", None), "licence", "unknown")
    head = f"""
The task's head is a linear layer in `head.safetensors`: `logits = head(pool(hidden))`, pool = `{model.pool}`; labels and all else
that is needed to read its output are in `head.json`.
""" if headed else ""
    return f"""# {task.model}, tuned by Luthier

`{chain!r}` for {task.kind}, merged into the weights: a plain model, {"which Luthier loads" if how.startswith("luthier") else "nothing of Luthier is needed to load it"}.

    {how}
{head}
Licence of the base model: {licence}.
"""
