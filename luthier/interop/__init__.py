"""Tuned states in the formats of other tools: peft's folders both ways, AdapterHub's bottleneck adapters in.

    export(tuned, folder)        adapter_config.json + adapter_model.safetensors, as PeftModel.from_pretrained reads them
    read(folder, model)          -> Tuned: what such a folder holds, on the base it was made for

What a method is called elsewhere stands in its own file (its class attribute `peft` or `adapterhub`); no method is known here.
A setting that Luthier cannot represent is refused by name, never left out; pickles are never read; nothing moves onto the model
before every name and shape has been checked. docs/interop.md says what is equal to the bit and what only to rounding, and why.
"""

import os
from pathlib import Path

from ..errors import BadState, UnknownName, nearest
from . import adapterhub, files, reader, settings, writer

__all__ = ["export", "export_folder", "import_folder", "read", "table"]

FORMATS = {"peft": writer.export}
SPEC = ("kind", "roles", "metric", "options", "labels", "shown", "mean", "scale")       # all that is taken of a recorded task


def export(tuned, folder, to="peft"):
    """Write what `tuned` adds to its base in the format `to`; returns the notes the user should see. `folder` must be new."""
    if to not in FORMATS:
        raise UnknownName(f"There is no format {to!r} to export to. {nearest(to, FORMATS)}")
    return FORMATS[to](tuned, folder)


def read(folder, model, name=None):
    """Attach what another tool's `folder` holds to `model`. If anything is wrong the model stays as it was."""
    config = files.config(folder)
    if "peft_type" in config:
        return reader.read(folder, config, model, name)
    if isinstance(config.get("config"), dict | str) and "model_type" in config:
        return adapterhub.read(folder, config, model, name)
    raise BadState(f"{Path(folder) / files.CONFIG} names neither a peft_type (peft) nor an adapter's config (AdapterHub). "
                   "Give the folder that save_pretrained or save_adapter wrote.")


def export_folder(folder, out, to="peft", model=None):
    """`luthier export`: a folder that `luthier tune` or Tuned.save wrote, in another format; returns (files, notes)."""
    from .. import save, zoo
    from ..tune import reopen

    if model is None and "task" not in save.read(folder)["extra"]:
        raise BadState(f"{folder} was saved from Python and does not say how to load its base. Name it with --model.")
    tuned = reopen(folder)[1] if model is None else save.load(zoo.load(model), folder)
    notes = export(tuned, out, to)
    return sorted(p.name for p in Path(out).iterdir()), notes


def import_folder(folder, model, out):
    """`luthier import`: save what another tool's folder holds as Luthier's own; returns (chain, notes)."""
    from .. import save, zoo

    if (Path(out) / save.RECIPE).exists():
        raise BadState(f"{out} holds a tuned model already. Choose another folder, or move it away.")
    files.config(folder)
    model = os.path.abspath(model) if os.path.isdir(model) else model
    extra, notes = files.recorded(folder).get("extra"), []
    if isinstance(extra, dict) and "task" in extra:
        from .. import tasks

        with save._sense(Path(folder) / files.OURS):
            spec = {k: v for k, v in extra["task"].items() if k in SPEC} | {"model": model}
            extra = {"task": spec, "seed": int(extra.get("seed", 0))}
            base = tasks.restore(spec).build(seed=extra["seed"])
    else:
        base = zoo.load(model)
        task = _task(base, model)
        extra = {"task": task} if task else {}
        if not task:
            notes.append(f"A {type(base).__name__} has no head that a task of Luthier predicts with: use luthier.load(model, "
                         f"{str(out)!r}) in Python.")
    tuned = read(folder, base)
    labels = tuned.extra.pop("labels", None)
    if labels and len(labels) == len(extra.get("task", {}).get("labels", ())):
        extra["task"] |= dict(labels=labels, shown=labels)
    tuned.save(out, extra=extra)
    return repr(tuned.chain), [*tuned.told, *notes]


def _task(model, ref):
    """The task that a model's own head answers, as `tasks.restore` reads it; None where there is none."""
    name, labels = type(model).__name__, getattr(getattr(model, "config", None), "id2label", None) or {}
    origin = getattr(model, "luthier_origin", None)
    if origin is not None and origin.kind == "text-decoder" and hasattr(model, "lm_head") and hasattr(model, "generate"):
        return dict(kind="causal-lm", model=ref, roles={"text": "text"}, metric="perplexity", options={})
    kinds = {"ForSequenceClassification": ("text-classification", "text"),
             "ForImageClassification": ("image-classification", "image")}
    for ending, (kind, role) in kinds.items():
        if name.endswith(ending) and len(labels) > 1:
            shown = [str(labels[k]) for k in sorted(labels, key=int)]
            return dict(kind=kind, model=ref, roles={role: role, "label": "label"}, metric="accuracy", options={"own": True},
                        labels=shown, shown=shown)
    return None


def table():
    """(Luthier's method, the other tool's name, what maps to what, equal to the bit or why not), from the declarations."""
    from ..method import discover

    rows = []
    for name, m in sorted(discover().items()):
        for tool in ("peft", "adapterhub"):
            d = getattr(m, tool, None)
            if d:
                rows.append((name, *(settings if tool == "peft" else adapterhub).describe(d)))
    return rows


