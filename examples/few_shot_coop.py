"""Few-shot classification with CoOp: a CLIP stays as it is, and eight words in front of the class names are learned.

    python examples/few_shot_coop.py                  # coloured shapes in outline, a style that the model never saw
    python examples/few_shot_coop.py my-pictures      # a folder with one folder of images for each class, named like the class
    python examples/few_shot_coop.py my-pictures openai/clip-vit-base-patch32      # with a CLIP from the hub
"""

import sys

from luthier import attach, tasks
from luthier.train import train


def main(data="scenes:classify-outline", model="tiny-clip", shots=16, steps=150):
    # 1. Pictures and the names of their classes; at most 16 of each class are trained on
    task = tasks.open(data, model=model, task="class-names", shots=int(shots))
    print(f"{task.size()} pictures of {len(task.labels)} classes, such as {task.shown[0]!r}")

    # 2. What the model can do by itself: a picture belongs to the text it fits best, "a photo of a NAME."
    clip = task.build()
    before = task.evaluate(clip)["accuracy"]
    print(f"zero-shot: {before:.1%}")

    # 3. CoOp: in place of "a photo of a", eight vectors that train; nothing of the model is written
    tuned = attach(clip, "coop(n=8)")
    train(tuned, task, steps=int(steps), lr=2e-2, batch_size=16)
    after = task.evaluate(tuned)["accuracy"]
    count = sum(p.numel() for _, p in tuned.trainable())
    print(f"CoOp: {after:.1%}, with {count:,} trained numbers beside {sum(p.numel() for p in clip.parameters()):,}")

    # 4. Answers for single pictures, and the state on disk
    picture = task.tables["test"].columns[task.roles["image"]][0]
    print(f"the first test picture: {task.predict(tuned, [picture])[0]['label']}")
    tuned.save("coop-state")
    tuned.detach()                                   # the model is what it was, to the bit
    return before, after


if __name__ == "__main__":
    main(*sys.argv[1:])
