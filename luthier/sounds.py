"""Procedural sounds, and what can be asked of one or of two of them. Sound i of a seed is the same on every machine: its choices
come from `random.Random(text).random()`, and its samples are arithmetic.

    s = sound(7, seed=0)     s.wave()  float32, 16,000 a second;  s.caption()  "a high rising tone"
    s.questions()            [("kind", "What is the sound <clip>?", "rising tone"), ...]
    compare(s, t, key)       a question of two clips, such as "Is <clip> higher than <clip>?", and its answer
"""

from dataclasses import dataclass
from random import Random

import numpy as np

from .scenes import Draw

RATE = 16_000
KINDS = ("tone", "rising tone", "falling tone", "beeps", "hiss")
PITCHES = {"low": (220, 400), "high": (1200, 2400)}      # Hz
LENGTHS = {"short": 0.5, "long": 1.5}                    # seconds


@dataclass(frozen=True)
class Sound:
    kind: str
    pitch: str
    length: str
    hertz: float
    key: str

    def wave(self):
        n = int(LENGTHS[self.length] * RATE)
        t, bend = np.arange(n) / RATE, {"rising tone": 1.5, "falling tone": 1 / 1.5}.get(self.kind, 1.0)
        path = self.hertz * (t + (bend - 1) * t * t / (2 * t[-1]))                  # cycles: the pitch moves to bend times itself
        x = np.sin(2 * np.pi * path)
        if self.kind == "hiss":                          # noise around the pitch: it turns the tone's amplitude at random
            draw = Random(self.key).random
            x = x * np.interp(t, np.arange(0, 2, 1 / 400), [2 * draw() - 1 for _ in range(800)])
        if self.kind == "beeps":
            x = x * (np.floor(t * 10) % 2 == 0)
        edge = np.minimum(1, np.minimum(np.arange(n), np.arange(n)[::-1]) / (0.01 * RATE))
        return (0.5 * x * edge).astype(np.float32)

    def caption(self):
        return f"a {self.length} {self.pitch} {self.kind}"

    def questions(self):
        return [("kind", "What is the sound <clip>?", self.kind), ("pitch", "Is the sound <clip> low or high?", self.pitch),
                ("length", "Is the sound <clip> short or long?", self.length)]


def sound(i, seed=0):
    key = f"sound:{seed}:{i}"
    draw = Draw(key)
    kind, pitch, length = draw.one(KINDS), draw.one(list(PITCHES)), draw.one(list(LENGTHS))
    low, high = PITCHES[pitch]
    return Sound(kind, pitch, length, low + (high - low) * draw.random(), key)


def compare(a, b, key):
    """(question, answer) of two clips in this order; yes and no are equally likely where the pair leaves it open."""
    draw, asked = Draw(key, "compare"), []
    if a.pitch != b.pitch:
        asked += [("Is <clip> higher than <clip>?", a.pitch == "high"), ("Is <clip> lower than <clip>?", a.pitch == "low")]
    if a.length != b.length:
        asked += [("Is <clip> longer than <clip>?", a.length == "long")]
    question, true = draw.one(asked or [("Is <clip> the same kind of sound as <clip>?", a.kind == b.kind)])
    return question, "yes" if true else "no"
