"""Ten tiny, randomly initialised models, each of another kind, on which every method is held to its contract."""

import copy
import functools

import torch
from torch import nn

from ._compat import torchvision

TEXT = dict(vocab_size=64, pad_token_id=1, bos_token_id=2, eos_token_id=3)
WIDTH = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
PIXELS = dict(image_size=16, patch_size=4)
DRY = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def _bert(t):                            # encoder
    return t.BertForSequenceClassification(t.BertConfig(**TEXT, **WIDTH, **DRY, max_position_embeddings=64, num_labels=5))


def _gpt2(t):                            # decoder: Conv1D layout, fused QKV, learned positions, tied head
    return t.GPT2LMHeadModel(t.GPT2Config(**TEXT, n_layer=2, n_embd=32, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
                                          attn_pdrop=0.0))


def _llama(t):                           # decoder: rotary positions, grouped queries
    return t.LlamaForCausalLM(t.LlamaConfig(**TEXT, **WIDTH, num_key_value_heads=2))


def _t5(t):                              # encoder-decoder
    return t.T5ForConditionalGeneration(t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                                   dropout_rate=0.0, pad_token_id=1, decoder_start_token_id=1))


def _vit(t):                             # vision: CLS
    return t.ViTForImageClassification(t.ViTConfig(**WIDTH, **PIXELS, **DRY, num_labels=5))


def _dinov2(t):                          # vision: layer scale
    return t.Dinov2ForImageClassification(t.Dinov2Config(**{**WIDTH, "intermediate_size": None}, **PIXELS, **DRY, mlp_ratio=2,
                                                         num_labels=5))


def _clip(t):                            # two towers
    both = dict(**WIDTH, projection_dim=16)
    return t.CLIPModel(t.CLIPConfig(text_config=dict(**both, **TEXT, max_position_embeddings=64), projection_dim=16,
                                    vision_config=dict(**both, **PIXELS)))


def _named(t):                           # two towers as a classifier by names; every word of them is one token
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from .tasks.dual import Named
    words = ("<unk> <pad> <s> </s> a photo of . red blue round flat slow quick green yellow purple orange cyan white "
             "circle square triangle diamond cross small large").split()
    made = Tokenizer(models.WordLevel(dict(zip(words, range(64), strict=False)), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    tokens = t.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
                                       eos_token="</s>", model_input_names=["input_ids", "attention_mask"])
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1)]
    parts = dict(attributes=["red", "blue"], objects=["round", "flat"], pairs=pairs)
    return Named(_clip(t), tokens, [f"{parts['attributes'][a]} {parts['objects'][o]}" for a, o in pairs], parts=parts)


def _resnet(t):                          # convolutions
    return t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1],
                                                         layer_type="basic", hidden_act="gelu",
                                                         num_labels=5))


def _bridged(t):                         # a vision model, a connector and a decoder
    from .bridges import bridge

    return bridge(_vit(t).vit, _llama(t), "limber(dropout=0.0)")


def _clipseg(t):                         # two towers, run without gradients, and a decoder of masks on their states
    both = dict(**WIDTH | dict(num_hidden_layers=3), projection_dim=32)
    model = t.CLIPSegForImageSegmentation(t.CLIPSegConfig(
        text_config=dict(**both, **TEXT, max_position_embeddings=64), vision_config=dict(**both, **PIXELS), projection_dim=32,
        reduce_dim=16, extract_layers=[0, 1, 2], decoder_num_attention_heads=4, decoder_intermediate_size=24))
    del model.clip.logit_scale             # no mask depends on it
    return model


def _clips(t):                           # a model of images that takes clips
    from .clips import framed

    return framed(_vit(t))


MODELS = dict(bert=_bert, gpt2=_gpt2, llama=_llama, t5=_t5, vit=_vit, dinov2=_dinov2, clip=_clip, named=_named, resnet=_resnet,
              bridged=_bridged, clips=_clips)
MORE = dict(clipseg=_clipseg)              # for methods that none of these have a place for


@functools.cache
def _made(name, dtype):
    torchvision()
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (MODELS | MORE)[name](transformers).eval()
        for p in model.parameters():       # larger than a usual start, so that every change of a weight shows in the output
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.15 if p.dim() == 2 else 0.3)
            else:
                p.data.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def build(name, dtype=torch.float32):
    """A fresh copy of one of the tiny models, in eval mode."""
    return copy.deepcopy(_made(name, dtype))


def batch(name, dtype=torch.float32, seed=1):
    """Input for it: 3 rows, one of the text rows padded."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randn(3, 3, 16, 16, generator=g).to(dtype)
    ids = torch.randint(4, 64, (3, 12), generator=g)
    ids[:, -1] = 3                         # CLIP reads its text at the end token
    mask = torch.ones_like(ids)
    mask[0, :4] = 0                        # left padding, as decoders generate with
    if name in ("vit", "dinov2", "named", "resnet"):
        return dict(pixel_values=pixels)
    if name == "clips":                    # of two frames
        return dict(pixel_values=torch.stack([pixels, pixels.flip(0) + 0.5], 1))
    if name in ("clip", "clipseg"):
        return dict(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))
    more = dict(decoder_input_ids=torch.randint(4, 64, (3, 6), generator=g)) if name == "t5" else \
        dict(pixel_values=pixels) if name == "bridged" else {}
    return dict(input_ids=ids, attention_mask=mask.flip(1) if name == "bert" else mask, **more)


def output(model, batch):
    """What two runs are compared by: (3, n), padding left out."""
    out = model(**batch)
    if "text_embeds" in out:
        return torch.cat([out.text_embeds, out.image_embeds, out.logits_per_text], 1)
    h = out.logits
    if "pooled_output" in out:             # masks; and what else the model gives of the image
        return torch.cat([h.flatten(1), out.pooled_output], 1)
    if h.dim() == 3 and "decoder_input_ids" not in batch:
        h = h * batch["attention_mask"][..., None].to(h.dtype)
    return h.flatten(1)
