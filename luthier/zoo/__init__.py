"""Pretrained models by short name, local folder, hub id or `timm:NAME`; two bridged ones as `VISION+LANGUAGE[:limber(...)]`.

`load(ref)` gives a plain `nn.Module` in eval mode with `module.luthier_origin` (an `Origin`: name, licence, what its input looks
like). Nothing here runs code that came with a model: packages are located, never imported; hub code is refused; pickled weights
are read with `weights_only=True`. A weight that is missing from the file is an error, never a silent random tensor."""

import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .._compat import torchvision
from ..errors import BadState, DoesNotFit, LuthierError, UnknownName, named, nearest
from . import cache
from .table import HALF, IMAGENET, TABLE

__all__ = ["Origin", "about", "entries", "installed", "lasting", "load", "names", "paired", "processor", "train"]


BRIDGE = "bridge.json"          # what a folder with a bridged model holds
SAMPLES = 160_000               # of a sound, for models that hear samples (wav2vec 2.0, HuBERT): ten seconds


@dataclass(frozen=True)
class Origin:
    ref: str                   # what load() was given: load(ref) gives the same model again
    kind: str                  # "text-encoder" | "text-decoder" | "text-pair" (encoder-decoder) | "vision" | "vision-language" |
                               # "image-text" (reads images and text, writes text) | "audio-text" | "audio" | "other"
    licence: str = "unknown"
    folder: str = ""           # where the tokenizer lies, if there is one
    image: dict = field(default_factory=dict)        # mean, std, sizes; of spectra bins and frames; samples
    pool: str = ""
    longest: int = 10**9       # positions that the model has
    unused: tuple = ()         # keys of the file that the model has no place for
    parts: tuple = ()          # of what is bridged: the Origins of the two

    def tokenizer(self):
        if not self.folder:
            raise LuthierError(f"{self.ref} has no tokenizer: it reads {'images' if self.kind == 'vision' else self.kind}.")
        return _tokenizer(self.folder)


def names():
    return list(TABLE)


def entries():
    """One dict a row, for `luthier zoo --json`."""
    keep = ("name", "kind", "what", "licence", "parameters", "megabytes")
    return [{k: getattr(row, k) for k in keep} | {"installed": installed(row.name), "install": row.remedy}
            for row in TABLE.values()]


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
        raise LuthierError(f"Reading {row.name} for the first time needs the package {error.name}. "
                           f"pip install {error.name}") from error


def about(ref):
    """The Origin of what `ref` names, from its configuration alone: no weights are read."""
    if isinstance(ref, nn.Module):
        return getattr(ref, "luthier_origin", None) or _describe(getattr(ref, "config", None), type(ref).__name__, "")
    ref = named(ref, "a model", UnknownName)
    if (pair := _pair(ref)) is not None:
        from ..bridges import parse
        return paired(about(pair[0]), about(pair[1]), parse(pair[2]))
    if ref in TABLE:
        row = TABLE[ref]
        if row.kind == "vision":
            return Origin(ref, row.kind, row.licence, "", dict(row.image), row.pool)
        folder = _folder(row)
        if (folder / BRIDGE).is_file():
            return _bridged(folder, ref, row.licence)
        facts = json.loads((folder / "config.json").read_text("utf-8"))
        longest = min(_longest(facts), _longest(facts.get("text_config") or {}))
        return Origin(ref, row.kind, row.licence, str(folder), dict(row.image), row.pool, longest)
    if ref.startswith("timm:"):
        return _timm_origin(ref)
    if Path(ref).is_dir():
        if (Path(ref) / BRIDGE).is_file():
            return _bridged(Path(ref), ref)
        if _is_timm(ref):
            return _timm_origin(ref)
    elif ref.count("/") != 1 or ref.startswith((".", "/", "~")) or Path(ref).exists():
        raise UnknownName(f"No model is called {ref!r}. {nearest(ref, TABLE)} A model is a zoo name (`luthier zoo`), a folder "
                          "with config.json, a hub id OWNER/NAME, or timm:NAME.")
    return _describe(_config(ref), ref, ref)


def load(ref, dtype=None, weights=True):
    """The model `ref` names, in eval mode, float32 unless `dtype` says otherwise; a module is given back as a deep copy.
    `weights=False`: its shapes with random weights, nothing read but the configuration."""
    if isinstance(ref, nn.Module):
        module = copy.deepcopy(ref)
        module.luthier_origin = about(ref)
        return module.eval()
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    origin, unused, ref = about(ref), (), str(ref)
    if (pair := _pair(ref)) is not None:
        from ..bridges import bridge
        return bridge(*(load(one, dtype, weights) for one in pair[:2]), pair[2])
    if ref in TABLE and TABLE[ref].convert == "effnet_lite0":
        from . import convert
        module = convert.effnet_lite0(_folder(TABLE[ref]), weights).to(dtype)
    elif (folder := _folder(TABLE[ref]) if ref in TABLE else Path(ref)).is_dir() and (folder / BRIDGE).is_file():
        from ..bridges import folder as bridges
        module = bridges.read(folder, dtype, weights)
    elif ref in TABLE:
        module, unused = _transformers(_folder(TABLE[ref]), ref, dtype, weights)
    elif ref.startswith("timm:") or Path(ref).is_dir() and _is_timm(ref):
        module = _timm(ref, weights).to(dtype)
    else:
        module, unused = _transformers(ref, ref, dtype, weights)
    module.luthier_origin = dataclasses.replace(origin, unused=unused)
    return module.eval()


def _pair(ref):
    """(vision, language, way) of VISION+LANGUAGE[:WAY], else None."""
    found = re.fullmatch(r"(.+?)\+(.+?)(?::(\w+(?:\(.*\))?))?", ref)
    if found is None or Path(ref).exists():
        return None
    from ..bridges import DEFAULT
    return found[1], found[2], found[3] or DEFAULT


def paired(vision, language, way):
    """The Origin of two bridged models."""
    reads, hears = way.makes == "vision-language", "audio" in way.sees
    for part, kinds, cannot in ((vision, way.sees, "hears no sounds" if hears else "sees no images"),
                                (language, way.language, "reads no text" if reads else "writes no text")):
        if part.kind not in kinds:
            raise DoesNotFit(f"{part.ref} is a model of kind {part.kind}: with {way!r} it {cannot}. Bridge from "
                             f"{'an audio encoder like whisper-tiny' if hears else 'a vision model like dinov2-s'} to a language "
                             f"model like {'minilm' if reads else 'smollm2-135m'}.")
    if hears and vision.kind == "audio" and not vision.image:
        raise DoesNotFit(f"{vision.ref} hears neither log-mel spectra as Whisper does nor samples as wav2vec 2.0 does: how "
                         "to feed it is not known here. Bridge from an audio encoder like whisper-tiny.")
    licence = " + ".join(dict.fromkeys((vision.licence, language.licence)))
    return Origin(f"{vision.ref}+{language.ref}:{way!r}", way.makes, licence, language.folder, vision.image,
                  longest=language.longest, parts=(vision, language))


def _bridged(folder, ref, licence=None):
    """The Origin of a bridged model in a folder."""
    from ..bridges import folder as bridges
    from ..bridges import parse

    facts = bridges.facts(folder)
    parts = tuple(about(bridges.part(folder, facts, p)) for p in bridges.PARTS)
    image = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["image"].items()}
    return Origin(str(ref), parse(facts["way"]).makes, licence or facts["licence"], parts[1].folder, image,
                  longest=parts[1].longest, parts=parts)


def lasting(ref):
    """The same reference, good from any working directory."""
    if not isinstance(ref, nn.Module) and (pair := _pair(str(ref))) is not None:
        return f"{lasting(pair[0])}+{lasting(pair[1])}:{pair[2]}"
    return os.path.abspath(ref) if not isinstance(ref, nn.Module) and os.path.isdir(ref) else ref


def train(name, out, say=print, **settings):
    """Train one of Luthier's own models anew, by its file in luthier/zoo/recipes, into the folder `out`; returns its scores."""
    from . import recipes
    known = [n.replace("_", "-") for n in sorted(m.name for m in pkgutil.iter_modules(recipes.__path__)) if n[0] != "_"]
    if name not in known:
        raise UnknownName(f"{name!r} is none of the models that Luthier trained itself: {', '.join(known)}. "
                          f"{nearest(name, known)}")
    return importlib.import_module(f".recipes.{name.replace('-', '_')}", __name__).train(out, say, **settings)


def architecture(ref):
    """(the class that transformers would make of `ref`, or None where it knows none; the configuration)."""
    import transformers

    if isinstance(ref, nn.Module):
        return type(ref), getattr(ref, "config", None)
    config = _config(_folder(TABLE[ref]) if ref in TABLE else ref, ref)
    return getattr(transformers, next(iter(config.architectures or ()), ""), None), config


def processor(ref):
    """What turns raw input to the model's: a tokenizer, or for images a dict with mean, std and sizes."""
    origin = about(ref)
    return dict(origin.image) if origin.kind == "vision" else origin.tokenizer()


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


def _config(where, ref=None):
    torchvision()
    from transformers import AutoConfig
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=False)
    except Exception as error:                       # missing files, no network, unknown types: all the user's to mend
        raise LuthierError(f"The model {ref or where} could not be loaded: {_first_line(error)} {nearest(ref or where, TABLE)} "
                           "Give a zoo name, a folder with config.json, or a hub id that this machine can reach.") from error


def _transformers(where, ref, dtype, weights):
    """A model by the class its own configuration names. -> (module, unused keys)"""
    config = _config(where, ref)
    import transformers
    name = next(iter(config.architectures or ()), "AutoModel")
    make = getattr(transformers, name, None)
    if make is None:
        raise LuthierError(f"{ref} is of the class {name}, which transformers does not have; code that comes with a model is "
                           "never run. Use a model whose architecture transformers knows.")
    try:
        if not weights:
            return (make.from_config if name == "AutoModel" else make._from_config)(config, dtype=dtype), ()
        with quiet():                                # its report of keys is replaced by ours
            module, info = make.from_pretrained(where, dtype=dtype, trust_remote_code=False, output_loading_info=True)
    except Exception as error:
        raise BadState(f"The weights of {ref} could not be loaded: {_first_line(error)} Save or download the model "
                       "again.") from error
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        raise BadState(f"The weights of {ref} lack {len(missing)} tensors of {type(module).__name__}, first {missing[0]}: they "
                       "would be random. Correct `architectures` in config.json, or get the whole file.")
    unused = tuple(sorted(info["unexpected_keys"]))
    if unused:
        warnings.warn(f"{ref}: {len(unused)} stored tensors have no place in {type(module).__name__} and are left out, "
                      f"first {unused[0]}.", stacklevel=4)
    return module, unused


def _is_timm(folder):
    """Whether a folder's config.json is timm's; a folder that is no model at all is refused here."""
    config = Path(folder) / "config.json"
    try:
        facts = json.loads(config.read_text("utf-8"))
    except FileNotFoundError:
        raise LuthierError(f"The folder {folder} holds no config.json, so it is no model. "
                           f"{nearest('config.json', os.listdir(folder))} "
                           "Save one with `save_pretrained`.") from None
    except (ValueError, OSError) as error:
        raise BadState(f"{config} cannot be read as JSON: {_first_line(error)} Save the model again.") from error
    return isinstance(facts, dict) and "architecture" in facts and "model_type" not in facts


def _timm_name(ref):
    torchvision()
    try:
        import timm
    except ImportError as error:
        raise LuthierError(f"{ref} needs the package timm. pip install timm") from error
    name = ref.removeprefix("timm:") if ref.startswith("timm:") else f"local-dir:{ref}"
    if not name.startswith(("local-dir:", "hf-hub:")) and not timm.is_model(name):
        raise UnknownName(f"timm has no model {name!r}. {nearest(name, timm.list_models())}")
    return timm, name


def _timm(ref, weights):
    timm, name = _timm_name(ref)
    try:
        return timm.create_model(name, pretrained=weights)
    except Exception as error:
        raise LuthierError(f"{ref} could not be loaded: {_first_line(error)} timm's weights come from the hub: check the "
                           "network, or save the model to a local folder once.") from error


def _timm_origin(ref):
    timm, name = _timm_name(ref)
    if name.startswith("local-dir:"):
        facts = json.loads((Path(ref) / "config.json").read_text("utf-8")).get("pretrained_cfg", {})
    elif name.startswith("hf-hub:"):
        facts = {}
    else:
        found = timm.get_pretrained_cfg(name, allow_unregistered=True)
        facts = found.to_dict() if found else {}
    image = dict(mean=tuple(facts.get("mean") or HALF["mean"]), std=tuple(facts.get("std") or HALF["std"]),
                 sizes=((facts.get("input_size") or (3, 224, 224))[-1],))
    return Origin(ref, "vision", facts.get("license") or "unknown", image=image)


def _describe(config, ref, folder):
    """What a model reads: its class names its main input; two configurations inside one make a vision-language model."""
    if config is None:
        return Origin(ref, "other")
    get = functools.partial(getattr, config)
    name = next(iter(get("architectures", None) or ()), "")
    import transformers
    reads = getattr(getattr(transformers, name, None), "main_input_name", "")
    size = get("image_size", None) or getattr(get("vision_config", None), "image_size", None)
    if get("vision_config", None) is not None or size and get("vocab_size", None) and reads == "input_ids":
        kind = "vision-language"
    elif reads in ("input_values", "input_features") or get("num_mel_bins", None):
        kind = "audio"
    elif reads == "pixel_values" or not reads and size:
        kind = "vision"
    elif get("vocab_size", None) is None:
        kind = "other"
    elif get("is_encoder_decoder", False):
        kind = "text-pair"
    else:
        kind = "text-decoder" if name.endswith(("CausalLM", "LMHeadModel")) or get("is_decoder", False) or _causal(config) \
            else "text-encoder"
    image = {}
    if kind.startswith("vision"):
        size = size[0] if isinstance(size, (tuple, list)) else size or 224
        image = _image(folder) | dict(sizes=(size,))
    elif kind == "audio" and get("num_mel_bins", None) and get("max_source_positions", None):
        image = dict(bins=config.num_mel_bins, frames=2 * config.max_source_positions)
    elif reads == "input_values" and not get("num_mel_bins", None):
        image = dict(samples=SAMPLES)
    facts = config.to_dict()
    longest = min(_longest(facts), _longest(facts.get("text_config") or {}))
    return Origin(ref, kind, _licence(folder), folder, image, longest=longest)


def _longest(facts):
    """The positions a configuration states; RoBERTa's kin count theirs from the padding id on."""
    n = next((facts[k] for k in ("max_position_embeddings", "n_positions", "n_ctx") if isinstance(facts.get(k), int)), 0)
    kind = facts.get("model_type", "")
    return 10**9 if n <= 2 else n - 2 if "roberta" in kind or kind == "camembert" else n


def _causal(config):
    """Whether transformers knows this architecture as a decoder only (no masked-language model of the same type)."""
    from transformers.models.auto import modeling_auto as auto
    kind = getattr(config, "model_type", "")
    return kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _image(folder):
    for name in ("preprocessor_config.json", "processor_config.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            facts = json.loads((Path(folder) / name).read_text("utf-8"))
            facts = facts.get("image_processor", facts)
            return dict(mean=tuple(facts["image_mean"]), std=tuple(facts["image_std"]))
    return dict(IMAGENET)


def _licence(folder):
    """The licence that a model card's front matter states."""
    try:
        head = (Path(folder) / "README.md").read_text("utf-8").split("---")[1]
        return next(line.split(":", 1)[1].strip() for line in head.splitlines() if line.startswith("license:"))
    except (OSError, IndexError, StopIteration, UnicodeDecodeError):
        return "unknown"
