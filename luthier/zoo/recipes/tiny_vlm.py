"""tiny-vlm: tiny-clip's eyes, a Llama of 4 layers and a linear connector, pretrained on procedural scenes.

Liu et al., Visual Instruction Tuning (LLaVA), 2023. arXiv:2304.08485 §4.1: images as tokens before the text of a decoder. How and
on what it is trained: see _writers.py.
"""

from . import _writers


def language():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=_writers.WORDS, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=_writers.LONGEST, tie_word_embeddings=True, pad_token_id=0, bos_token_id=3,
        eos_token_id=1, architectures=["LlamaForCausalLM"]))


def train(out, say=print, **changed):
    return _writers.train("tiny-vlm", language, False, out, say, **dict(steps=2000) | changed)
