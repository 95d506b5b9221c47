"""CIDEr-D of captions: n-grams that few images share count most.
    g_k(s) = h_k(s) log(|I| / max(1, d_k)),    h_k: how often n-gram k stands in s, d_k: in how many images' references
    CIDEr-D = mean over n = 1 ... 4 and the references r of  10 e^(-(l(c) - l(r))² / 2σ²) min(g(c), g(r)) · g(r) / |g(c)| |g(r)|
Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, 2015. arXiv:1411.5726 §3 eq. 1 to 3 and, for the length's
penalty and the clipping, §8; σ = 6. Counts are not divided by the sentence's length, as in the authors' code, and words are not
stemmed. The weights come from the references scored: one image alone tells nothing and has 0.

Ours, since the kept packages bring Java or datasets' tools. Words are runs of letters and digits, case aside; the COCO server's
figures differ where its tokenizer does.
"""

import math
import re
from collections import Counter

N, SIGMA = 4, 6.0


def cider(said, answers):
    """The mean over the images, between 0 and 10; answers: for each the references."""
    heard, right = [_grams(s) for s in said], [[_grams(r) for r in several] for several in answers]
    images = Counter(k for several in right for k in set().union(*several))
    scale = math.log(len(said))

    def weighed(grams):
        g = {k: h * (scale - math.log(max(1, images[k]))) for k, h in grams.items()}
        norms = [math.sqrt(sum(w * w for k, w in g.items() if len(k) == n)) for n in range(1, N + 1)]
        return g, norms, sum(h for k, h in grams.items() if len(k) == 1)
    total = 0.0
    for c, several in zip(map(weighed, heard), right, strict=True):
        total += sum(_near(c, weighed(r)) for r in several) / len(several)
    return 10 * total / len(said)


def _near(c, r):
    (c, c_norms, c_long), (r, r_norms, r_long) = c, r
    along = [0.0] * N
    for k in c.keys() & r.keys():
        along[len(k) - 1] += min(c[k], r[k]) * r[k]
    return math.exp(-(c_long - r_long) ** 2 / (2 * SIGMA ** 2)) / N * sum(
        x / (a * b) for x, a, b in zip(along, c_norms, r_norms, strict=True) if a and b)


def _grams(text):
    words = re.findall(r"\w+(?:'\w+)?", text.lower())
    return Counter(tuple(words[i:i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))
