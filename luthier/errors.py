"""Every refusal Luthier makes, as a tree. Each message says what, where, the nearest thing that works, and the remedy.

LuthierError                 exit code 2 on the command line, one paragraph, no traceback
├─ BadChain                  a chain that does not parse, or a hyperparameter that does not exist or fit
│  └─ UnknownName            a method, model, data set or system nobody registered
├─ NoSuchSite                a selector that matches nothing
├─ BadOrder                  an order that would silently lose an earlier method's work
├─ DoesNotFit                a verb, stack or model that cannot host the method (the reason is in the message)
├─ NotMergeable              merge() of something that is not a weight transform
├─ ScheduleNotStepped        a budget or pruning schedule that nobody advanced
├─ BadState                  a saved state that is corrupt, unsafe, or incomplete
│  └─ WrongBase              a saved state made for another base model
├─ RowsFailed                a rack ran a batch in which some rows could not be served; the others are in it
├─ BadData                   a data file, column or label that cannot be used
└─ RunStopped                training stopped early (NaN loss, full disk, Ctrl-C); the last good state is kept
"""

import difflib


class LuthierError(Exception):
    """Base of every error that is the user's to mend; anything else that escapes is a defect of ours."""


class BadChain(LuthierError): ...


class UnknownName(BadChain): ...


class NoSuchSite(LuthierError): ...


class BadOrder(LuthierError): ...


class DoesNotFit(LuthierError): ...


class NotMergeable(LuthierError): ...


class ScheduleNotStepped(LuthierError): ...


class BadState(LuthierError): ...


class WrongBase(BadState): ...


class RowsFailed(LuthierError):
    """outputs: of all rows, those that failed blanked; errors: row -> the LuthierError that says why."""

    def __init__(self, outputs, errors):
        first, why = next(iter(errors.items()))
        more = f" {len(errors) - 1} further rows failed." if len(errors) > 1 else ""
        super().__init__(f"Row {first}: {why}{more}")
        self.outputs, self.errors = outputs, errors


class BadData(LuthierError): ...


class RunStopped(LuthierError): ...


def nearest(word, known, n=3):
    """`Nearest: a, b.`, or `` when nothing is known: for the middle of an error message."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n, 0.0)
    return f"Nearest: {', '.join(near)}." if near else ""


def named(text, what, kind=LuthierError):
    """`text` as a str, refused where no file system could hold a thing of that name: it is empty, too long, or has a NUL."""
    text = str(text)
    if not text.strip() or "\0" in text or any(len(p.encode("utf-8", "surrogatepass")) > 255 for p in text.split("/")):
        raise kind(f"{text[:60]!r}{'...' if len(text) > 60 else ''} cannot be the name of {what}: it is "
                   f"{'empty' if not text.strip() else 'too long, or holds a NUL character'}. Give a name or a path.")
    return text
