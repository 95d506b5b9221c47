"""Which column plays which role, and which task that makes. Guesses go by name first, then by content; they are reported by
`Task.describe()` and overruled by `columns=` and `task=`."""

import math
import re
from collections.abc import Sequence

from ..errors import BadData, nearest

KINDS = {            # task kind -> (roles it needs, roles it may have)
    "text-segmentation": (("mask", "image", "phrase"), ()),
    "image-classification": (("image", "label"), ()),
    "image-to-text": (("image", "response"), ("prompt", "task")),
    "audio-to-text": (("audio", "response"), ("prompt",)),
    "class-names": (("image",), ("label", "attribute", "object", "domain")),
    "image-text-retrieval": (("image", "caption"), ("extra",)),
    "token-classification": (("tokens", "tags"), ()),
    "text-classification": (("text", "label"), ("text_pair",)),
    "regression": (("text", "target"), ("text_pair",)),
    "instruction": (("prompt", "response"), ()),
    "causal-lm": (("text",), ()),
}
NAMES = {            # role -> column names that mean it, likeliest first
    "image": "image images img image_path image_paths frames file_name filename file path",
    "mask": "mask masks mask_path mask_name segmentation",
    "phrase": "phrase prompt expression text sentence caption label class query question",
    "audio": "audio sound clip clips wav audio_path file_name file path",
    "task": "task kind",
    "tokens": "tokens words",
    "tags": "tags ner_tags pos_tags upos labels label",
    "label": "label labels class category intent sentiment topic label_text coarse_label gold y target",
    "target": "target score rating value similarity label labels y",
    "text": "text sentence sentence1 premise question1 review content utterance tweet comment message document body context "
            "query question title description",
    "caption": "caption captions text sentence description",
    "extra": "extra extra_caption second_caption long_caption",
    "attribute": "attribute attr state",
    "object": "object obj noun",
    "domain": "domain style environment",
    "text_pair": "text_pair sentence2 hypothesis question2 text2 text_b passage",
    "prompt": "prompt instruction question problem input source src dialogue document article mr java",
    "response": "response output answer answers caption captions completion solution canonical_solution target tgt summary "
                "highlights ref note section_text cs",
}
NAMES = {role: words.split() for role, words in NAMES.items()}
_ID = re.compile(r"(^|_)(id|idx|index)$", re.I)       # numbers a row, says nothing of it
PLAIN = ("response", "output", "completion", "summary")
SAID = ("response", "output", "completion", "answer", "answers", "caption", "captions")        # of an image


def numbers(values):
    """The values as floats, or None where one is not a number."""
    try:
        return [float(v) for v in values if not isinstance(v, bool) or 1 / 0]
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def mostly_numbers(values):
    """Nine in ten are numbers; the others are refused later, by their row."""
    return sum(numbers([v]) is not None for v in values) >= 0.9 * len(values)


def is_text(values):
    return any(isinstance(v, str) for v in values) and all(isinstance(v, str) or v is None for v in values)


def mostly_text(values):
    """Nine in ten are texts; the others are counted later, as rows that cannot be used."""
    there = [isinstance(v, str) for v in values if v is not None]
    return any(there) and sum(there) >= 0.9 * len(there)


def is_list(values):
    return any(isinstance(v, Sequence) and not isinstance(v, (str, bytes)) for v in values)


def is_image(values):
    values = [x for v in values for x in (v if isinstance(v, list | tuple) else [v])
              if not (x is None or isinstance(x, str) and not x.strip())]        # a row may lack its image
    ends = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
    return sum(isinstance(v, bytes | dict) or hasattr(v, "shape") or hasattr(v, "convert") or isinstance(v, str) and
               v.lower().endswith(ends) for v in values) >= max(1, 0.9 * len(values))


def is_audio(values):
    values = [x for v in values for x in (v if isinstance(v, list | tuple) else [v]) if x is not None]
    return bool(values) and all(callable(v) or isinstance(v, bytes) or getattr(v, "ndim", 0) == 1 or
                                isinstance(v, str) and v.lower().endswith(".wav") for v in values)


def is_class(values):
    """Few distinct values, each seen again and again; numbers only if they look like codes (0..K-1, 1..K, or at most 20)."""
    if is_list(values) or any(isinstance(v, (bytes, dict)) or hasattr(v, "shape") for v in values):
        return False
    kinds = {v for v in values if v not in (None, "")}
    if len(kinds) > max(2, len(values) // 2):
        return False
    x = numbers(kinds)
    if x is None or not kinds:
        return max((len(str(k)) for k in kinds), default=0) < 100
    if any(not math.isfinite(v) or v != int(v) for v in x):
        return False
    return len(x) <= 20 or (min(x) in (0, 1) and max(x) - min(x) < 1.2 * len(x))


def is_kind(values):
    """A class in nine of ten; the others are counted later, as rows that cannot be used."""
    plain = [v for v in values if not isinstance(v, list | tuple | dict)]
    return len(plain) >= 0.9 * len(values) and is_class(plain)


def guess(columns, source, task=None, given=None):
    """(kind, {role: column}) for a table's columns {name: values}."""
    given, columns = dict(given or {}), {k: list(v[:2000]) for k, v in columns.items()}
    roles = sorted(NAMES)
    for role, name in given.items():
        if role not in roles:
            raise BadData(f"columns={{{role!r}: ...}}: there is no such role. {nearest(role, roles)} Roles: {', '.join(roles)}.")
        for part in parts(name):
            if part not in columns:
                raise BadData(f"{source} has no column {part!r} (asked for as {role}). {nearest(part, columns)} "
                              f"It has: {', '.join(columns)}.")
    if task == "regression" and "label" in given:    # the number to predict goes by either name
        given.setdefault("target", given.pop("label"))
    if task is not None and task not in KINDS:
        raise BadData(f"There is no task {task!r}. {nearest(task, KINDS)} Tasks: {', '.join(KINDS)}.")
    reasons = {}
    for kind, by_name in [(task, False)] if task else _candidates(given):
        found = _fill(kind, columns, given, task is not None, by_name)
        if isinstance(found, dict):
            spare = given.keys() - found.keys()
            if spare:
                raise BadData(f"columns={{{min(spare)!r}: ...}}: {kind} has no such role. Its roles: "
                              f"{', '.join(sum(KINDS[kind], ()))}.")
            return kind, found
        reasons[kind] = f"{kind} needs a column for {found}"
    raise BadData(f"{source}: the columns {', '.join(columns)} make no task: {'; '.join(reasons.values())}. Say which is which "
                  "with columns={\"text\": ..., \"label\": ...}, and task= if need be.")


def parts(name):
    """A role may join columns: "context + question"."""
    return [p.strip() for p in name.split(" + ")] if isinstance(name, str) else [name]


def _candidates(given):
    """(kind, whether its label or target must be known by name), in the order in which they are tried; roles that were given
    leave only the kinds that use them."""
    order = (("token-classification", False), ("text-segmentation", True), ("image-to-text", True), ("audio-to-text", True),
             ("image-classification", False), ("instruction", False),
             ("text-classification", True), ("regression", True), ("text-classification", False), ("regression", False),
             ("causal-lm", False))
    return [k for k in order if set(given) <= set(sum(KINDS[k[0]], ()))] or order


def _fill(kind, columns, given, forced, by_name):
    """{role: column}, or the role that no column can play. A column plays one role."""
    need, may = KINDS[kind]
    roles = {r: c for r, c in given.items() if r in need + may}
    for role in sorted(need + may, key=lambda r: r in ("text", "text_pair")):        # the pickiest roles choose first
        free = [c for c in columns if c not in {p for n in roles.values() for p in parts(n)}]
        if role not in roles:
            name = _pick(role, {c: columns[c] for c in free}, forced, by_name or role not in need, kind == "image-to-text")
            if name is None and role in need:
                return role
            if name is not None:
                roles[role] = name
    if kind == "causal-lm" and not forced and not given and len(columns) > 1:
        return "(only one column may be there)"
    return {r: roles[r] for r in need + may if r in roles}


def _pick(role, columns, forced, by_name, said=False):
    """The column that plays a role: by its name, or else by its content where that can tell."""
    fits = {
        "image": is_image, "mask": is_image, "phrase": is_text, "audio": is_audio, "tokens": is_list, "tags": is_list,
        "label": lambda v: is_class(v) or (forced and not is_list(v)),
        "target": lambda v: mostly_numbers(v) and (forced or not is_class(v)),
        "text": is_text, "text_pair": is_text, "prompt": mostly_text if said else is_text, "task": is_kind,
        "response": (lambda v: True) if said else is_text, "caption": lambda v: is_text(v) or is_list(v),
        "extra": is_text, "attribute": is_class, "object": is_class, "domain": is_class,
    }[role]
    low = {c.lower().replace("-", "_").replace(" ", "_"): c for c in columns if isinstance(c, str)}
    names = NAMES[role] + (NAMES["caption"] if role == "response" and said and forced else [])
    named = [low[n] for n in names if n in low and fits(columns[low[n]])]
    if role == "response" and said:
        named = [c for c in named if forced or c.lower() in SAID]
    elif role == "response" and not forced:          # a closed set of answers is a label, unless the name is plain
        named = [c for c in named if c.lower() in PLAIN or not is_class(columns[c])]
    if named:
        return named[0]
    if by_name and role in ("label", "target"):
        return None
    if role in ("image", "audio", "tokens", "tags", "label", "target", "text", "caption"):
        able = [c for c, v in columns.items() if fits(v) and not (role == "target" and _ID.search(c))]
        if role == "text":                                           # the longest text, not a code
            return max((c for c in able if forced or not is_class(columns[c]) and not mostly_numbers(columns[c])), default=None,
                       key=lambda c: sum(len(v or "") for v in columns[c]))
        if role == "label":                          # the fewest classes, but two at least
            kinds = {c: len(set(map(str, columns[c]))) for c in able}
            return min(able, default=None, key=lambda c: (kinds[c] < 2, kinds[c]))
        return able[0] if able else None
    return None
