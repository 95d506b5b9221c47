"""Data, loss and metric for each kind of task.

    task = tasks.open("reviews.csv", model="minilm")        # or a folder, npz, hub id, or a built-in name such as "digits"
    model = task.build(seed=0)                              # the pretrained model with a new head
    for batch in task.batches("train", 32, seed=0, epoch=0):
        task.loss(model, batch).backward()
    task.evaluate(model)                                    # {"accuracy": ..., "macro_f1": ..., ...}
"""

from .. import zoo
from ..errors import BadData
from . import roles as _roles
from .audio import AudioToText
from .base import Task
from .classify import Regression, TextClassification, TokenClassification
from .headed import Headed
from .image import ImageClassification
from .imagetext import ImageToText
from .lm import CausalLM, Instruction
from .names import ClassNames
from .retrieval import Retrieval
from .segment import TextSegmentation
from .source import find, known

__all__ = ["KINDS", "Headed", "Task", "known", "open", "restore"]

KINDS = {c.kind: c for c in (TextClassification, TokenClassification, ImageClassification, ClassNames, Retrieval, CausalLM,
                             Instruction, Regression, ImageToText, AudioToText, TextSegmentation)}


def open(source, model=None, task=None, columns=None, limit=None, seed=0, metric=None, tokenizer=None, **options):
    """A Task over `source`: CSV, TSV, JSONL, JSON, TXT (each also .gz), Parquet, npz, a folder of images by class, a hub data
    set's id, a built-in name, or a dict of arrays.

    model    what it is for: a zoo name, folder, hub id, timm:NAME, or a module (then give `tokenizer` for text)
    task     its kind, when the guess is wrong: text-classification, token-classification, image-classification, causal-lm,
             instruction, regression, image-to-text, audio-to-text, and for dual encoders such as CLIP class-names and
             image-text-retrieval, for CLIPSeg text-segmentation
    columns  {role: column}, roles text, text_pair, label, target, tokens, tags, image, audio, prompt, response, task, caption,
             attribute, object, domain, phrase, mask; "a + b" joins columns
    limit    at most this many rows (blocks for causal-lm) a split, or {split: number}; drawn with `seed`, classes in proportion
    seed     of every split and sample that the data does not fix itself
    options  max_length (tokens), image_size (pixels), pool (how features become one vector, see headed.py), template (of a
             class's text, with {} for its name), shots (training rows a class), concepts (labelled images: of pairs of image and
             text, those are trained on that give each of their classes `shots` rows) and judge (the dual encoder that says so)
    """
    known_options = ("max_length", "image_size", "pool", "template", "shots", "concepts", "judge")
    for key, value in options.items():
        if key not in known_options:
            raise BadData(f"There is no option {key!r}. {_roles.nearest(key, known_options)} Options: "
                          f"{', '.join(known_options)}.")
        least = 1 if key == "shots" else 2
        words = key in ("pool", "template", "concepts", "judge")
        if not words and value is not None and (not isinstance(value, int) or value < least):
            raise BadData(f"{key}={value!r} must be a whole number of at least {least}.")
    for n in limit.values() if isinstance(limit, dict) else [limit]:
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 2):
            raise BadData(f"limit={n!r} must be a whole number of at least 2.")
    for split in limit if isinstance(limit, dict) else ():
        if split not in ("train", "val", "test"):
            raise BadData(f"limit={limit}: there is no split {split!r}. {_roles.nearest(split, ('train', 'val', 'test'))} "
                          "Splits: train, val, test.")
    data = find(source, seed)
    first = data.splits.get("train") or next(iter(data.splits.values()))
    if set(columns or ()) <= set(data.columns) or not columns:       # what the user says wins, role by role or as a whole
        columns = data.columns | dict(columns or {})
    kind, found = _roles.guess(first.columns, data.source, task or data.task or _only(model), columns)
    made = KINDS[kind](model, source=data.source, roles=found, metric=metric or data.metric, tokenizer=tokenizer, **options)
    return made.fill(data, seed, limit)


def _only(model):
    """The kind of task of models that can do no other: those that write about images or sounds."""
    reads = zoo.about(model).kind if model is not None else ""
    return next((k for k, c in KINDS.items() if reads in c.reads), None) if reads in ("image-text", "audio-text") else None


def restore(spec):
    """The Task of `task.spec()`, without data: it builds and predicts."""
    try:
        spec = dict(spec)
        kind = KINDS[spec.pop("kind")]
        task = kind(spec.pop("model"), roles=spec.pop("roles"), metric=spec.pop("metric"), **spec.pop("options"))
    except (KeyError, TypeError, ValueError) as error:
        raise BadData(f"This is not the description of a task ({type(error).__name__}: {error}). It should come from "
                      "task.spec().") from error
    for key, value in spec.items():
        setattr(task, key, value)
    return task
