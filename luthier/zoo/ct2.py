"""Reader of CTranslate2's model.bin (version 6; little endian): a header, then for each variable its name, shape, type and bytes,
then names that are aliases of others."""

import struct

import numpy as np
import torch

from ..errors import BadState

TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read(path):
    """{name: tensor}, halves widened to float32; aliases are left out."""
    raw, at, found = path.read_bytes(), 0, {}

    def number(form):
        nonlocal at
        value, = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return value

    def word():
        nonlocal at
        n = number("H")
        at += n
        return raw[at - n:at].rstrip(b"\0").decode()

    try:
        number("I"), word(), number("I")             # format version, kind of model, revision
        for _ in range(number("I")):
            name = word()
            shape = [number("I") for _ in range(number("B"))]
            kind, size = np.dtype(TYPES[number("B")]), number("I")
            array = np.frombuffer(raw, kind, size // kind.itemsize, at).reshape(shape)
            found[name] = torch.tensor(array.astype(np.float32) if kind == np.float16 else array)
            at += size
        for _ in range(number("I")):
            word(), word()
        if at != len(raw):
            raise ValueError(f"{len(raw) - at} bytes are left over")
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise BadState(f"{path} is not a sound CTranslate2 model ({error}). Install its package again.") from error
    return found
