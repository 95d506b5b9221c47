"""Pretrained models by short name, local folder, hub id or `timm:NAME`.

`load(ref)` gives a plain `nn.Module` in eval mode with `module.luthier_origin` (an `Origin`: name, licence, what its input looks
like). Nothing here runs code that came with a model: packages are located, never imported; hub code is refused; pickled weights
are read with `weights_only=True`. A weight that is missing from the file is an error, never a silent random tensor."""

import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .._compat import torchvision
from ..errors import BadState, LuthierError, UnknownName, nearest
from . import cache
from .table import HALF, IMAGENET, TABLE

__all__ = ["Origin", "entries", "installed", "load", "names", "origin", "processor"]


@dataclass(frozen=True)
class Origin:
    ref: str                   # what load() was given: load(ref) gives the same model again
    kind: str                  # "text-encoder" | "text-decoder" | "text-pair" (encoder-decoder) | "vision" | "audio" | "other"
    licence: str = "unknown"
    folder: str = ""           # where the tokenizer lies, if there is one
    image: dict = field(default_factory=dict)        # mean, std, sizes
    pool: str = ""
    unused: tuple = ()         # keys of the file that the model has no place for

    def tokenizer(self):
        if not self.folder:
            raise LuthierError(f"{self.ref} has no tokenizer: it reads {'images' if self.kind == 'vision' else self.kind}.")
        return _tokenizer(self.folder)


def names():
    return list(TABLE)


def entries():
    """One dict a row, for `luthier zoo --json`."""
    keep = ("name", "kind", "what", "licence", "parameters", "megabytes")
    return [{k: getattr(row, k) for k in keep} | {"installed": installed(row.name), "install": row.remedy} for row in TABLE.values()]


def installed(name):
    return _located(TABLE[name]) is not None


def _located(row):
    """Path of the row's files, or None. The top-level package is looked up, not imported."""
    if not row.package:
        root = os.environ.get("LUTHIER_DATA")
        path = Path(root) / row.path if root else None
        return path if path and path.exists() else None
    top, _, rest = row.path.partition("/")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / rest).exists():
            return Path(place) / rest
    return None


def _folder(row):
    """A folder that transformers reads (or the one file, for what is built elsewhere)."""
    path = _located(row)
    if path is None:
        raise LuthierError(f"The zoo's model {row.name} is not installed ({row.path} not found). {row.remedy}")
    if not row.convert or row.convert == "effnet_lite0":
        return path
    torchvision()
    from . import convert
    version = row.version
    if row.package:
        version = importlib.metadata.version(row.package)
    key = "-".join(x for x in (row.name, version, convert.FORMAT) if x)
    try:
        with quiet():
            return cache.converted(key, functools.partial(getattr(convert, row.convert), path))
    except ImportError as error:
        raise LuthierError(f"Reading {row.name} for the first time needs the package {error.name}. pip install {error.name}") from error


def load(ref, dtype=None, weights=True):
    """The model `ref` names, in eval mode, float32 unless `dtype` says otherwise. `weights=False`: its shapes with random weights,
    nothing downloaded but the configuration. A module is given back as a deep copy."""
    if isinstance(ref, nn.Module):
        return copy.deepcopy(ref)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    ref = str(ref)
    if ref in TABLE:
        row = TABLE[ref]
        folder = _folder(row)
        facts = dict(kind=row.kind, licence=row.licence, image=row.image, pool=row.pool)
        if row.convert == "effnet_lite0":
            from . import convert
            module = convert.effnet_lite0(folder).to(dtype)
        else:
            module, unused = _transformers(folder, ref, dtype, weights)
            facts |= dict(folder="" if row.kind == "vision" else str(folder), unused=unused)
        origin = Origin(ref, **facts)
    elif ref.startswith("timm:"):
        module, origin = _timm(ref, dtype, weights)
    elif Path(ref).is_dir():
        module, origin = _local(ref, dtype, weights)
    elif ref.count("/") == 1 and not ref.startswith((".", "/", "~")) and not Path(ref).exists():
        module, unused = _transformers(ref, ref, dtype, weights)
        origin = _describe(module, ref, ref, unused)
    else:
        raise UnknownName(f"No model is called {ref!r}. {nearest(ref, TABLE)} A model is a zoo name (`luthier zoo`), a folder with "
                          "config.json, a hub id OWNER/NAME, or timm:NAME.")
    module.luthier_origin = origin
    return module.eval()


def origin(module):
    """The Origin of a module, guessed from its configuration where load() did not make it."""
    return getattr(module, "luthier_origin", None) or _describe(module, type(module).__name__, "", ())


def processor(ref):
    """What turns raw input to the model's: a tokenizer, or for images a dict with mean, std and sizes."""
    if isinstance(ref, str) and ref in TABLE:
        row = TABLE[ref]
        return dict(row.image) if row.kind == "vision" else _tokenizer(str(_folder(row)))
    if isinstance(ref, nn.Module):
        facts = origin(ref)
        return dict(facts.image) if facts.kind == "vision" else facts.tokenizer()
    if str(ref).startswith("timm:"):
        return dict(load(ref, weights=False).luthier_origin.image)
    return _tokenizer(str(ref))


@contextlib.contextmanager
def quiet():
    """transformers without progress bars and warnings: loading here takes a moment."""
    import transformers
    level, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bar:
            transformers.logging.enable_progress_bar()


@functools.lru_cache(maxsize=8)
def _tokenizer(folder):
    torchvision()
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:                       # transformers raises what it likes here
        raise LuthierError(f"No tokenizer could be read from {folder}: {_first_line(error)} "
                           "Put tokenizer.json (and tokenizer_config.json) beside the model.") from error


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:300] + "."


def _transformers(where, ref, dtype, weights):
    """A model by the class its own configuration names. -> (module, unused keys)"""
    torchvision()
    import transformers
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
        name = next(iter(config.architectures or ()), None)
        auto = getattr(transformers, name or "", None) or (transformers.AutoModel if name is None else None)
        if auto is None:
            raise LuthierError(f"{ref} is of the class {name}, which transformers does not have; code that comes with a model is "
                               "never run. Use a model whose architecture transformers knows.")
        if not weights:
            make = auto.from_config if auto is transformers.AutoModel else auto._from_config
            return make(config, dtype=dtype), ()
        with quiet():                                # its report of keys is replaced by ours
            module, info = auto.from_pretrained(where, dtype=dtype, trust_remote_code=False, output_loading_info=True)
    except LuthierError:
        raise
    except Exception as error:                       # missing files, no network, unknown types: all the user's to mend
        raise LuthierError(f"The model {ref} could not be loaded: {_first_line(error)} {nearest(ref, TABLE)} Give a zoo name, a "
                           "folder with config.json and model.safetensors, or a hub id that this machine can reach.") from error
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        raise BadState(f"The weights of {ref} lack {len(missing)} tensors of {type(module).__name__}, first {missing[0]}: they would "
                       "be random. Correct `architectures` in config.json, or get the whole file.")
    unused = tuple(sorted(info["unexpected_keys"]))
    if unused:
        warnings.warn(f"{ref}: {len(unused)} stored tensors have no place in {type(module).__name__} and are left out, "
                      f"first {unused[0]}.", stacklevel=4)
    return module, unused


def _local(ref, dtype, weights):
    config = Path(ref) / "config.json"
    try:
        facts = json.loads(config.read_text("utf-8"))
    except FileNotFoundError:
        raise LuthierError(f"The folder {ref} holds no config.json, so it is no model. {nearest('config.json', os.listdir(ref))} "
                           "Save one with `save_pretrained`.") from None
    except (ValueError, OSError) as error:
        raise BadState(f"{config} cannot be read as JSON: {_first_line(error)} Save the model again.") from error
    if isinstance(facts, dict) and "architecture" in facts and "model_type" not in facts:
        return _timm("timm:local-dir:" + ref, dtype, weights, ref)
    module, unused = _transformers(ref, ref, dtype, weights)
    return module, _describe(module, ref, ref, unused)


def _timm(ref, dtype, weights, shown=None):
    torchvision()
    try:
        import timm
    except ImportError as error:
        raise LuthierError(f"{ref} needs the package timm. pip install timm") from error
    name = ref.removeprefix("timm:")
    if not name.startswith(("local-dir:", "hf-hub:")) and not timm.is_model(name):
        raise UnknownName(f"timm has no model {name!r}. {nearest(name, timm.list_models())}")
    try:
        module = timm.create_model(name, pretrained=weights)
    except Exception as error:
        raise LuthierError(f"{shown or ref} could not be loaded: {_first_line(error)} Its weights come from the hub: check the network, "
                           "or save them once to a local folder.") from error
    facts = module.pretrained_cfg or {}
    size = facts.get("input_size", (3, 224, 224))[-1]
    image = dict(mean=tuple(facts.get("mean") or HALF["mean"]), std=tuple(facts.get("std") or HALF["std"]), sizes=(size,))
    return module.to(dtype), Origin(shown or ref, "vision", facts.get("license") or "unknown", image=image)


def _describe(module, ref, folder, unused):
    """What a model reads, from its configuration: a vision tower has channels and patches, a text model a vocabulary."""
    config = getattr(module, "config", None)
    get = functools.partial(getattr, config)
    if config is None:
        return Origin(ref, "other", unused=unused)
    size = get("image_size", None)
    if size is not None or get("num_channels", None) is not None:
        size = size[0] if isinstance(size, (tuple, list)) else size or 224
        return Origin(ref, "vision", _licence(folder), folder, _image(folder) | dict(sizes=(size,)), unused=unused)
    if get("is_encoder_decoder", False):
        kind = "text-pair" if get("vocab_size", None) and not get("num_mel_bins", None) else "audio"
    elif get("vocab_size", None) is None:
        kind = "other"
    else:
        kind = "text-decoder" if type(module).__name__.endswith(("CausalLM", "LMHeadModel")) or get("is_decoder", False) or \
            _causal(config) else "text-encoder"
    return Origin(ref, kind, _licence(folder), folder, unused=unused)


def _causal(config):
    """Whether transformers knows this architecture as a decoder only (no masked-language model of the same type)."""
    from transformers.models.auto import modeling_auto as auto
    kind = getattr(config, "model_type", "")
    return kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _image(folder):
    try:
        facts = json.loads((Path(folder) / "preprocessor_config.json").read_text("utf-8"))
        return dict(mean=tuple(facts["image_mean"]), std=tuple(facts["image_std"]))
    except (OSError, ValueError, KeyError, TypeError):
        return dict(IMAGENET)


def _licence(folder):
    """The licence that a model card's front matter states."""
    try:
        head = (Path(folder) / "README.md").read_text("utf-8").split("---")[1]
        return next(line.split(":", 1)[1].strip() for line in head.splitlines() if line.startswith("license:"))
    except (OSError, IndexError, StopIteration, UnicodeDecodeError):
        return "unknown"
