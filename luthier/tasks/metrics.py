"""Figures of merit, on tensors of predictions and truths. Each returns a float."""

import math


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
