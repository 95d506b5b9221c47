"""Codes of 1 to 8 bits as bytes: eight codes make one integer of 8·bits bits, that is `bits` bytes, lowest code first."""

import torch
from torch.nn.functional import pad


def _word(parts, bits):                    # (…, n, m) small integers -> (…, n): part i shifted by i·bits
    wide = torch.int32 if max(8 * parts.shape[-1], bits * parts.shape[-1]) <= 32 else torch.int64
    word = parts[..., 0].to(wide)
    for i in range(1, parts.shape[-1]):
        word = word | parts[..., i].to(wide) << bits * i
    return word


def _split(word, bits, n):                 # (…, m) -> (…, m·n): the inverse; masking undoes the sign's extension
    return torch.stack([(word >> bits * i & 2**bits - 1).byte() for i in range(n)], -1).flatten(-2)


def pack(codes, bits):
    """(…, d) integers below 2^bits -> (…, ceil(d·bits/8)) bytes; every row starts on a byte."""
    eights = pad(codes.byte(), (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return _split(_word(eights, bits), 8, bits)[..., : -(-codes.shape[-1] * bits // 8)].contiguous()


def unpack(packed, bits, d):
    """(…, ceil(d·bits/8)) bytes -> (…, d) codes; exactly what `pack` was given."""
    words = pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    return _split(_word(words, 8), bits, 8)[..., :d]
