"""Captions for images of your own: two frozen models, one linear map between them, trained on your pairs.

    python examples/caption_your_images.py pairs.jsonl          # rows like {"image": "cat.jpg", "caption": "a cat on a chair"}

Without a file it draws coloured shapes and writes their captions. What trains is 0.1% of the model; the vision model looks once
at each image, whatever the number of epochs.
"""

import argparse
import json
import tempfile
from pathlib import Path

import luthier
from luthier import scenes, tasks
from luthier.train import train


def drawn(folder, n=300):
    """Pictures and a JSONL that names them, as a user would bring."""
    from PIL import Image

    rows = []
    for i in range(n):
        s = scenes.scene(i, seed=1, size=64, most=2)
        Image.fromarray(s.image()).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": s.caption()})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return folder / "pairs.jsonl"


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("pairs", nargs="?", help="JSONL, CSV or Parquet with image paths and captions")
    ask.add_argument("--model", default="dinov2-s+smollm2-135m:limber()")
    ask.add_argument("--steps", type=int, default=300)
    a = ask.parse_args()
    pairs = a.pairs or drawn(Path(tempfile.mkdtemp()))
    task = tasks.open(pairs, model=a.model, image_size=56)
    print("\n".join(task.describe()["notes"]))
    tuned = luthier.attach(task.build(seed=0), 'full(at="connector")')
    show = task.tables["test"].take(range(min(4, task.size("test"))))
    shown = [str(task.base(show) / p) for p in show.columns[task.roles["image"]]]
    before = task.predict(tuned, shown)
    train(tuned, task, steps=a.steps, lr=3e-3, batch_size=16)
    print(task.evaluate(tuned))
    for path, old, new, true in zip(shown, before, task.predict(tuned, shown), task.answers(show), strict=True):
        print(f"{Path(path).name}\n  before: {old['text'][:70]!r}\n  after:  {new['text'][:70]!r}\n  true:   {true[0]!r}")


if __name__ == "__main__":
    main()
