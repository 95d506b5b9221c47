"""What peft's settings say (checked against peft 0.21.2), and how a method's file says what it is there.

A method is read and written by a class attribute `peft`, a dict of:

    type, also       peft_type; further types of the same content
    when             settings that tell two methods of one type apart
    layers           site layouts that peft's layer can wrap
    tensors, of      {name of the tensor in the file: layout.py's line}; {site layout: the same, where it is another}
    fields           {setting: hyperparameter}, equal in both
    factor, scale    (alpha, rank): the method multiplies by alpha / rank, peft by its first setting over its second plus a third
    patterns         "number" (rank_pattern and alpha_pattern) or the tensor whose lost ranks rank_pattern masks
    rest             {state tensor: its value at rows of a fused weight that the method leaves alone, or a function of W}
    sums             whether several of it on one weight are one of the summed rank
    listed           {setting: state tensor}: a list of the modules whose state has that tensor
    given            hyperparameters of what was read
    makes            {state tensor: the hyperparameters, of a site, with which init makes it there, where the defaults do not}
    settings         further settings to write
    names, shared    in place of `tensors`: the tensors' names, at each module and once for all,
    prepare, write, read, common      and the functions that make them
    reads            settings of peft that mean nothing more than the tensors say
    prompt           the same for the one tensor of a prompt: write, read, why
    copies           {parameter: state tensor}: the method keeps a module's parameters whole; modules_to_save, or alone LN_TUNING
    rounds           where logits agree to rounding only, and why; absent: equal to the bit
"""

import json
import re
import re._parser as sre
from pathlib import Path

from ..errors import BadState, DoesNotFit, nearest
from ..method import discover
from . import files

ROOT, WRAP = "base_model.model.", "base_model."
COPIES = "LN_TUNING"                                       # peft's type for modules that are kept whole and nothing else
LONGEST = 2000                                             # characters of a pattern

# settings that change nothing of what a loaded adapter computes: bookkeeping, starts, and the schedule of a training that is over
INERT = set("""auto_mapping base_model_name_or_path peft_type peft_version revision task_type inference_mode init_weights
    init_ia3_weights fan_in_fan_out loftq_config eva_config corda_config lora_ga_config qalora_group_size megatron_core
    runtime_config encoder_hidden_size encoder_num_layers encoder_dropout encoder_reparameterization_type prefix_projection
    prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs num_layers num_attention_heads token_dim
    target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step projection_prng_key sparse very_sparse mask_type
    random_seed randlora_dropout""".split())
READ = set("""target_modules exclude_modules layers_to_transform layers_pattern modules_to_save rank_pattern alpha_pattern
    use_rslora num_virtual_tokens num_transformer_submodules save_projection""".split())
STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "loraga_stable")     # leave the base as it is
NEUTRAL = {                                                # setting -> (values that mean nothing, why others are refused)
    "bias": (("none", None), "it trains the base's own biases in place, and a file of them cannot be added to a base exactly. "
                             "Merge in peft, or train biases with a method of their own"),
    "lora_bias": ((False, None), "its bias rides on lora_B and is scaled with it. Fold it into the layer's bias first"),
    "use_qalora": ((False, None), "it pools the layer's input before lora_A. Merge in peft first"),
    "init_lora_weights": (STARTS, "this start also changes the base's weights. Convert it: save_pretrained("
                                  "path_initial_model_for_weight_conversion=...) in peft"),
    "layer_replication": ((None, []), "it makes a deeper model by repeating layers. Build that model first"),
    "trainable_token_indices": ((None, [], {}), "it retrains single rows of an embedding. Save the embedding whole "
                                                "(modules_to_save)"),
    "target_parameters": ((None, []), "it reaches parameters without a layer of their own. Target the layers themselves"),
    "alora_invocation_tokens": ((None, []), "an activated LoRA switches on at a token of the text. There is no such switch here"),
    "megatron_config": ((None, {}), "Megatron's parallel layers are no plain linears. Export the adapter from Megatron first"),
    "ensure_weight_tying": ((False, None), "it ties what is saved to other modules. Save without it"),
    "use_dora": ((False, None), "no method here has this form for the modules it is set for"),
    **{k: ((None, False, {}), f"{what}. Merge in peft first") for k, what in dict(
        use_bdlora="block-diagonal factors are no plain low-rank update", arrow_config="it routes between adapters by the input",
        kasa_config="it cuts the base's own weight by its singular values", velora_config="it changes what is computed beside "
                                                                                          "lora_A",
        monteclora_config="it draws its factors at random").items()},
}
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


def declared():
    """name -> (class, declaration) of every method that peft has too."""
    return {n: (m, m.peft) for n, m in discover().items() if isinstance(getattr(m, "peft", None), dict)}


def describe(d):
    """(what it is called there, what maps to what, how equal): a row of the table in docs/interop.md."""
    equal = d.get("rounds", "to the bit")
    if "copies" in d:
        return f"modules_to_save, or {COPIES}", "; ".join(f"{p} = {t}" for p, t in d["copies"].items()), equal
    said = [f"{k} = {v.replace('|', 'or')}" for k, v in d.get("tensors", {}).items()]
    said += [f"{' and '.join(d['names'])}, rearranged"] if "names" in d else []
    said += ["prompt_embeddings, of all layers at once"] if "prompt" in d else []
    said += [f"{k} = {v}" for k, v in d.get("fields", {}).items()]
    if "factor" in d:
        top, below, eps = d["scale"]
        said.append(f"{top} / {f'({below} + {eps})' if eps else below} = {' / '.join(d['factor'])}")
    when = "".join(f", {k}={v}" for k, v in d.get("when", {}).items())
    return " or ".join((d["type"], *d.get("also", ()))) + when, "; ".join(said), equal


def tensors_of(d, layout):
    """{tensor: its line} at a site of this layout."""
    return d.get("of", {}).get(layout, d["tensors"])


def understood(folder, config):
    """Every setting is understood, means nothing, or is refused by name."""
    kind, where = config["peft_type"], Path(folder) / files.CONFIG
    known = {}
    for _, d in declared().values():
        for t in (d.get("type", COPIES), *d.get("also", ())):
            known.setdefault(t, []).append(d)
    if not isinstance(kind, str) or kind not in known:
        raise DoesNotFit(f"{where}: no method here computes what peft's {str(kind)[:40]} does. {nearest(kind, known)} "
                         f"Read are: {', '.join(sorted(known))}. In peft, merge_and_unload() gives a plain model.")
    own = {k for d in known[kind] for k in (*d.get("scale", ())[:2], *(
        k for part in ("fields", "when", "listed", "settings", "reads") for k in d.get(part, ())))}
    for key, value in config.items():
        if key in NEUTRAL and key not in {k for d in known[kind] for k in d.get("when", ())}:
            neutral, why = NEUTRAL[key]
            if value not in neutral:
                raise DoesNotFit(f"{where}: {key}={json.dumps(value)[:60]} cannot be represented: {why}.")
        elif key not in INERT | READ | own | NEUTRAL.keys() and value not in (None, False, [], {}, ""):
            raise DoesNotFit(f"{where}: the setting {key}={json.dumps(value)[:60]} is not known here, and nothing is left out "
                             f"unread. {nearest(key, INERT | READ | own | NEUTRAL.keys())}")
    values = {k: [False, None, *(v for d in known[kind] if (v := d.get("when", {}).get(k)) is not None)]
              for d in known[kind] for k in d.get("when", ())}
    for key, fit in (values | dict(use_rslora=[False, None, True], num_transformer_submodules=[None, 1, 2])).items():
        if config.get(key) not in fit:
            raise BadState(f"{where}: {key}={json.dumps(config[key])[:60]} is no value of this setting.")
    for key in {k for d in known[kind] for k in d.get("fields", ())} & config.keys():
        if isinstance(config[key], list | dict | str):
            raise BadState(f"{where}: {key}={json.dumps(config[key])[:60]} is no value of this setting.")
    forms = {d.get("patterns") for d in known[kind]} - {None}
    for key, used in dict(rank_pattern=bool(forms), alpha_pattern="number" in forms).items():
        if config.get(key) and not used:
            raise DoesNotFit(f"{where}: {key} says nothing for {kind}, and nothing is left out unread. Is it a slip?")
    for key, kinds in dict(target_modules=(list, str), exclude_modules=(list, str), modules_to_save=(list,), rank_pattern=(dict,),
                           alpha_pattern=(dict,), layers_to_transform=(list, int), layers_pattern=(list, str),
                           feedforward_modules=(list, str)).items():
        value = config.get(key)
        words = value if isinstance(value, list) else list(value) if isinstance(value, dict) else []
        whole = key == "layers_to_transform"
        if value is not None and (type(value) not in kinds or any(type(w) is not (int if whole else str) for w in words)):
            raise BadState(f"{where}: {key} must be a {' or a '.join(k.__name__ for k in kinds)} of "
                           f"{'numbers' if whole else 'names'}, not {json.dumps(value)[:60]}.")
    layers = config.get("layers_to_transform")
    if config.get("layers_pattern") and layers is None or isinstance(config.get("target_modules"), str) and layers is not None:
        raise BadState(f"{where}: layers_to_transform goes with a list of target_modules, and layers_pattern with "
                       "layers_to_transform; peft refuses other combinations too.")
    for text in _patterns(config):
        _pattern(where, text)


def _patterns(config):
    found = [v for k in ("target_modules", "exclude_modules", "feedforward_modules") if isinstance(v := config.get(k), str)]
    found += [config["layers_pattern"]] if isinstance(config.get("layers_pattern"), str) else config.get("layers_pattern") or []
    return found + [k for key in ("rank_pattern", "alpha_pattern") for k in config.get(key) or ()]


def _pattern(where, text):
    """A regular expression of somebody else's: refused where it does not parse, or could take for ever."""
    def loops(tree, inside=False):
        for op, arg in tree:
            again = op in (sre.MAX_REPEAT, sre.MIN_REPEAT, getattr(sre, "POSSESSIVE_REPEAT", None)) and arg[1] > 64
            if again and inside:
                return True
            for sub in arg if isinstance(arg, tuple | list) else ():
                for t in sub if isinstance(sub, list) else [sub]:
                    if isinstance(t, sre.SubPattern) and loops(t, inside or again):
                        return True
        return False

    try:
        if len(text) > LONGEST or loops(sre.parse(text)) or text.count("*") + text.count("+") > 12:
            raise BadState(f"{where}: the pattern {text[:60]!r} could take for ever to match. List the modules' names instead.")
    except (re.error, RecursionError, OverflowError) as e:
        raise BadState(f"{where}: {text[:60]!r} is no regular expression ({e}). List the modules' names instead.") from None


def whole(config, key, where, least=1):
    value = config.get(key)
    if type(value) is not int or value < least:
        raise BadState(f"{where}: {key} must be a whole number of at least {least}, not {json.dumps(value)[:40]}.")
    return value


def selected(words, name):
    return name in words or name.endswith(tuple(f".{w}" for w in words))


def task_of(body, config, copies):
    name = type(body).__name__
    if name.endswith("ForSequenceClassification") and {"classifier", "score"} & copies.keys() and config["peft_type"] != COPIES:
        return "SEQ_CLS"                                   # with this type peft insists on the head's weights
    return next((t for ending, t in TASKS.items() if name.endswith(ending)), None)
