"""tiny-vlt5: tiny-clip's eyes, a T5 of 3 + 3 layers and a linear connector, pretrained on procedural scenes.

Cho et al., Unifying Vision-and-Language Tasks via Text Generation (VL-T5), 2021. arXiv:2102.02779: images as tokens before the
prompt in the encoder, every task as text. How and on what it is trained: see _writers.py.
"""

from . import _writers


def language():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(
        vocab_size=_writers.WORDS, d_model=128, d_kv=32, d_ff=384, num_layers=3, num_heads=4, dropout_rate=0.0, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"]))


def train(out, say=print, **changed):
    return _writers.train("tiny-vlt5", language, True, out, say, **changed)
