"""AdapterHub's bottleneck adapters, in: adapter_config.json with adapter.safetensors (adapter-hub/adapters, methods/modeling.py).

A method says what it is there by a class attribute `adapterhub`, a dict of:

    places           {module of the block that holds the adapter: the site where the method acts}
    tensors          {name of the tensor in the file: state tensor}
    fields           {hyperparameter: setting}, equal in both
    when             settings that must have these values
    given            hyperparameters of what was read
"""

import json
import re
from pathlib import Path

from ..attach import base_of
from ..errors import BadState, DoesNotFit, NoSuchSite, WrongBase
from ..method import discover
from ..site import find
from . import files
from .reader import Reader

WEIGHTS, HEAD = "adapter.safetensors", "model_head.safetensors"
PICKLED, PICKLED_HEAD = "pytorch_adapter.bin", "pytorch_model_head.bin"
KEY = re.compile(r"(?P<host>.+?)\.(\w*adapters)\.(?P<name>[^.]+(\.[^.]+)*?)\.(?P<tensor>(adapter|gate|invertible)\w*(\.\w+)*)")
WHEN = dict(original_ln_after=(True, None), residual_before_ln=(True, None),
            adapter_residual_before_ln=(False, None), ln_before=(False, None),
            ln_after=(False, None), is_parallel=(False, None), scaling=(1.0, None), use_gating=(False, None),
            phm_layer=(False, None), cross_adapter=(False, None), inv_adapter=(None, ""), factorized_phm_W=(True, False, None))
INERT = {"reduction_factor", "leave_out", "dropout", "init_weights", "invertible_adapter", "inv_adapter_reduction_factor",
         "stochastic_depth", "architecture"}


def declared():
    return [(m, m.adapterhub) for m in discover().values() if isinstance(getattr(m, "adapterhub", None), dict)]


def describe(d):
    """(what it is called there, what maps to what, how equal): a row of the table in docs/interop.md."""
    when = ", ".join(f"{k}={v}" for k, v in d["when"].items())
    return f"AdapterHub bottleneck, {when}", "; ".join(f"{k} = {t}" for k, t in d["tensors"].items()), "to rounding"


def read(folder, config, model, name=None):
    """Attach a bottleneck adapter of AdapterHub; see luthier.interop.read."""
    said, where = config["config"], Path(folder) / files.CONFIG
    if not isinstance(said, dict):
        raise DoesNotFit(f"{where}: config={said!r:.40} is only a name. Save the adapter again: newer AdapterHub writes all of "
                         "it.")
    base, fits = base_of(model), [(m, d) for m, d in declared() if all(said.get(k) == v for k, v in d["when"].items())]
    if not fits:
        known = " or ".join("(" + ", ".join(f"{k}={v}" for k, v in d["when"].items()) + ")" for _, d in declared())
        raise DoesNotFit(f"{where}: no method here is a bottleneck of this form; read are {known}.")
    m, d = fits[0]
    known = INERT | WHEN.keys() | d["when"].keys() | set(d["fields"].values())
    for key, value in said.items():
        if key in WHEN and value not in WHEN[key]:
            raise DoesNotFit(f"{where}: {key}={json.dumps(value)[:60]} cannot be represented by {m.__name__}.")
        if key not in known and value not in (None, False, [], {}, ""):
            raise DoesNotFit(f"{where}: the setting {key}={json.dumps(value)[:60]} is not known here, and nothing is left out "
                             "unread.")
    width, size = getattr(getattr(base, "config", None), "hidden_size", None), config.get("hidden_size")
    if size is not None and width != size:
        raise WrongBase(f"{folder} was made for a {config.get('model_type')} of width {size}; this {type(base).__name__} has "
                        f"{width}. Load the base it was made for.")
    tensors = files.tensors(folder, WEIGHTS, (PICKLED,))
    reader = Hub(folder, config, base)
    step = reader.bottlenecks(m, d, said, tensors)
    return reader.attach(model, [step, *reader.head()], name)


class Hub(Reader):
    def __init__(self, folder, config, base):
        from ..tasks import Headed

        prefix = "backbone." if isinstance(base, Headed) else ""
        super().__init__(folder, config | {"peft_type": "AdapterHub"}, base, base.backbone if prefix else base, prefix)

    def bottlenecks(self, m, d, said, tensors):
        try:
            every = find(self.every, m.at)
        except NoSuchSite as e:
            raise WrongBase(f"{self.folder} needs {m.__name__}'s places: {e}") from None
        found, names = {}, set()
        for key, t in tensors.items():
            hit = KEY.fullmatch(key)
            if hit is None or hit["tensor"] not in d["tensors"]:
                raise DoesNotFit(f"{self.folder}: {key!r:.120} is no tensor of a bottleneck that {m.__name__} has. Save the "
                                 "adapter without it, or use AdapterHub itself.")
            names.add(hit["name"])
            found.setdefault(hit["host"].removesuffix(".output_adapters"), {})[d["tensors"][hit["tensor"]]] = t
        if len(names) > 1:
            raise DoesNotFit(f"{self.folder} holds several adapters ({', '.join(sorted(names))[:100]}). Save them one by one.")
        states, width = {}, None
        for host, state in found.items():
            tail = host.partition(".")[2] if host.partition(".")[0] == getattr(self.body, "base_model_prefix", None) else host
            s = next((s for s in every if s.kind == "stream" and s.path.rpartition(".")[0].endswith("." + tail)
                      and any(host.endswith("." + place) and s.role == role for place, role in d["places"].items())), None)
            if s is None:
                raise WrongBase(f"{self.folder} has an adapter at {host!r:.100}, which a {type(self.body).__name__} has not. "
                                f"Load the base it was made for ({self.config.get('model_type')}).")
            if state.keys() != set(d["tensors"].values()) or state["D"].dim() != 2:
                raise BadState(f"{self.folder}: at {host} there is only {', '.join(state)}. The file is incomplete.")
            if width not in (None, len(state["D"])):
                raise DoesNotFit(f"{self.folder}: bottlenecks of widths {width} and {len(state['D'])}; {m.__name__} has one "
                                 "width.")
            states[s], width = state, len(state["D"])
        blocks = {s.block for s in states}
        lost = sorted({s.block for s in every if s.role in d["places"].values()} - blocks - set(said.get("leave_out") or ()))
        if lost:
            raise BadState(f"{self.folder}: block {lost[0]} has no adapter in the file, and leave_out does not name it. The "
                           "file is incomplete, or this base has more blocks than the one it was made for.")
        for s in every:                                    # places that the method only reads
            if s.block in blocks and s.role not in d["places"].values() and s.kind == "stream":
                states[s] = {}
        hyper = {ours: said.get(theirs) for ours, theirs in d["fields"].items() if said.get(theirs) is not None}
        return self._step(m, dict(width=width, **hyper, **d.get("given", {})), states)

    def head(self):
        """A classification head of AdapterHub's, where the model has one of the same form: dense, tanh, linear."""
        folder = Path(self.folder)
        if not (folder / HEAD).exists():
            if (folder / PICKLED_HEAD).exists():
                self.told.append(f"Its head is a pickle, {PICKLED_HEAD}, and was left aside. To have it too, convert it in "
                                 f"that folder: {files.CONVERT % (PICKLED_HEAD, HEAD)}")
            return []
        said = files.words(folder / "head_config.json") if (folder / "head_config.json").exists() else {}
        kind, tensors = said.get("config") or {}, files.tensors(folder, HEAD, ())
        numbers = sorted({k.split(".")[-2] for k in tensors})
        same = (kind.get("head_type"), kind.get("layers"), kind.get("activation_function")) == ("classification", 2, "tanh")
        if not (same and len(numbers) == 2 and {"classifier.dense", "classifier.out_proj"} <= self.modules.keys()):
            self.told.append(f"Its head ({kind.get('head_type')}, {kind.get('layers')} layers) is none that a "
                             f"{type(self.body).__name__} has: it was left aside.")
            return []
        place = dict(zip(numbers, ("classifier.dense", "classifier.out_proj"), strict=True))
        copied = {f"base_model.model.{place[k.split('.')[-2]]}.{k.split('.')[-1]}": t for k, t in tensors.items()}
        ids = kind.get("label2id")
        if isinstance(ids, dict) and all(type(v) is int for v in ids.values()):
            self.labels = [str(k) for k in sorted(ids, key=ids.get)]
        return self._copies(copied)

    labels = None

    def attach(self, model, steps, name):
        tuned = super().attach(model, steps, name)
        tuned.extra = {"labels": self.labels} if self.labels else {}
        return tuned


