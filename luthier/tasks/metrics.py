"""Figures of merit, on tensors of predictions and truths. Each returns a float."""

import math
import re

import torch

from ..errors import BadData


def accuracy(predicted, truth):
    return (predicted == truth).double().mean().item()


def macro_f1(predicted, truth, classes):
    """Mean over the classes that occur (in truth or prediction) of F1 = 2 TP / (2 TP + FP + FN)."""
    scores = []
    for c in range(classes):
        hit, said, is_c = ((predicted == c) & (truth == c)).sum(), (predicted == c).sum(), (truth == c).sum()
        if said + is_c:
            scores.append(2 * hit.item() / (said + is_c).item())
    return sum(scores) / len(scores)


def micro_f1(predicted, truth, outside):
    """F1 over all labels but `outside` (the O of tagging), by token; 0 when neither side has any."""
    hit = ((predicted == truth) & (truth != outside)).sum().item()
    total = (predicted != outside).sum().item() + (truth != outside).sum().item()
    return 2 * hit / total if total else 0.0


def matthews(predicted, truth):
    """Matthews correlation of two classes: (TP TN - FP FN) / sqrt of the four margins' product; 0 when a margin is empty."""
    tp, tn = (((predicted == v) & (truth == v)).sum().item() for v in (1, 0))
    fp, fn = (((predicted == v) & (truth == 1 - v)).sum().item() for v in (1, 0))
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(margins) if margins else 0.0


def r2(predicted, truth):
    """1 - residual / total sum of squares; 0 is what the mean of the truth would get."""
    total = ((truth - truth.mean()) ** 2).sum().item()
    residual = ((truth - predicted) ** 2).sum().item()
    return 1 - residual / total if total else 0.0


def mae(predicted, truth):
    return (predicted - truth).abs().mean().item()


def perplexity(nll, tokens):
    return math.exp(min(nll / tokens, 700.0))        # exp overflows a float beyond 709


def swept(scores, truth, n):
    """{"seen", "unseen", "best_harmonic", "auc"} of scores (N, C) of which the first n classes are old: a bias b on the new ones
    is swept over every value at which a prediction changes. The curve is (right among new, right among old), its area exact."""
    (s, old), (u, new) = scores[:, :n].double().max(1), scores[:, n:].double().max(1)
    gap, is_old = s - u, truth < n                   # new is said where b > gap
    right = torch.where(is_old, old == truth, new + n == truth)
    order = gap.argsort()
    gap, is_old, right = gap[order], is_old[order], right[order].double()
    # after the k smallest gaps have gone over to the new classes
    seen = ((right * is_old).sum() - (right * is_old).cumsum(0)) / is_old.sum()
    unseen = (right * ~is_old).cumsum(0) / (~is_old).sum()
    at = [k for k, ends in enumerate([*gap.diff().ne(0).tolist(), True]) if ends]       # equal gaps go over together
    y = [float((right * is_old).sum() / is_old.sum()), *seen[at].tolist()]
    x = [0.0, *unseen[at].tolist()]
    area = sum((b - a) * (p + q) / 2 for a, b, p, q in zip(x, x[1:], y, y[1:], strict=False))
    best = max(range(len(x)), key=lambda k: x[k] * y[k] / max(x[k] + y[k], 1e-12))
    mean = 2 * x[best] * y[best] / max(x[best] + y[best], 1e-12)
    return {"seen": y[best], "unseen": x[best], "best_harmonic": mean, "auc": area}


def recall(similarity, match, at):
    """Share of rows among whose `at` most similar columns there is one that matches; similarity, match: (N, M)."""
    best = similarity.topk(min(at, similarity.shape[1]), dim=1).indices
    return match.gather(1, best).any(1).double().mean().item()


# -- of generated texts: what was said, and for each the answers that are right


def exact(said, answers):
    """The share of texts that equal an answer, but for case, spaces at the ends and a full stop."""
    def bare(text):
        return text.strip().rstrip(".").strip().lower()
    return sum(bare(s) in map(bare, right) for s, right in zip(said, answers, strict=True)) / len(said)


def bleu(said, answers):
    """Corpus BLEU by sacrebleu, as a share."""
    most = max(map(len, answers))
    references = [[right[min(k, len(right) - 1)] for right in answers] for k in range(most)]
    return sacrebleu().corpus_bleu(said, references).score / 100


def sacrebleu():
    try:
        import sacrebleu
    except ImportError as error:
        raise BadData("Scoring texts by BLEU needs the package sacrebleu. pip install sacrebleu, or choose another "
                      "metric.") from error
    return sacrebleu


def acc_iou(said, answers, least=0.5):
    """The share of boxes that overlap a true one by IoU >= least."""
    return sum(any(iou(box(s), box(r)) >= least for r in right) for s, right in zip(said, answers, strict=True)) / len(said)


def box(text):
    """x0 y0 x1 y1, the first four numbers of a text; None where there are fewer."""
    found = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", text)[:4]]
    return found if len(found) == 4 else None


def iou(a, b):
    """Intersection over union of two boxes; 0 where there is none."""
    if a is None or b is None:
        return 0.0
    both = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    whole = sum(max(0.0, x1 - x0) * max(0.0, y1 - y0) for x0, y0, x1, y1 in (a, b)) - both
    return both / whole if whole > 0 else 0.0
