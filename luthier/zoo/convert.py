"""From the formats in which packages carry weights to a folder that `transformers` reads (config.json, model.safetensors, tokenizer).
Each function takes (source, folder) and writes folder; every stored tensor must find its place, and every place its tensor."""

import torch

from ..errors import BadState

FORMAT = "1"                   # of the converted folders; raise it when a converter changes


def fill(model, state, origin, drop=()):
    """Load `state` into `model`, strictly; `drop` are prefixes of known extras (heads that the model here does not have)."""
    state = {k: v for k, v in state.items() if not k.startswith(tuple(drop))}
    missing, extra = model.load_state_dict(state, strict=False, assign=False)
    tied = {k for k, v in model.state_dict(keep_vars=True).items() if any(v is p for n, p in model.named_parameters() if n != k)}
    missing = [k for k in missing if k not in tied]
    if missing or extra:
        raise BadState(f"{origin}: its tensors do not fit {type(model).__name__}: missing {missing[:3]}, left over {extra[:3]}. "
                       "Reinstall the version named by `luthier zoo`.")
    return model.eval()


def vocabulary_tokenizer(vocab, split, unk, special, folder, cls=None, sep=None, **options):
    """A fast tokenizer over a fixed vocabulary: `split` (a tokenizers pre-tokenizer) cuts, a word-level table numbers."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel(vocab, unk_token=unk))
    core.pre_tokenizer = split
    if cls:
        core.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1", special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])])
    for key, value in options.items():
        setattr(core, key, value)
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unk, cls_token=cls, sep_token=sep, **special).save_pretrained(folder)


def lines(path):
    return {word: i for i, word in enumerate(path.read_text("utf-8").split("\n")) if word or i == 0}


def gguf(source, folder):
    """A quantised GGUF file -> float32 weights (about 17 s for 135M parameters)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    where = dict(pretrained_model_name_or_path=source.parent, gguf_file=source.name)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = type(read.config).from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    fill(type(read)(config), read.state_dict(), source.name).save_pretrained(folder)     # plain: no longer marked as quantised
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def dinov2_onnx(source, folder):
    """A ViT-S/14 backbone inside an ONNX graph -> Dinov2Model. Biases and norms kept their names; a linear layer's matrix is
    anonymous and found as the constant operand of the MatMul whose result meets a named bias."""
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model
    graph = onnx.load(str(source)).graph
    constant = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    state = {k: v for k, v in constant.items() if k.startswith("backbone.")}
    matrix = {node.output[0]: constant[node.input[1]] for node in graph.node
              if node.op_type == "MatMul" and node.input[1] in constant}
    for node in graph.node:
        if node.op_type == "Add":
            bias = [i for i in node.input if i.startswith("backbone.") and i.endswith(".bias")]
            product = [i for i in node.input if i in matrix]
            if bias and product:
                state[bias[0][:-4] + "weight"] = matrix[product[0]].T.contiguous()
    grid = [v for v in constant.values() if v.shape == (1, 37 * 37, 384)]               # positions of the patches at 518 px
    first = [v for k, v in constant.items() if v.shape == (1, 1, 384) and "Concat" in k]      # position of the CLS token
    state["backbone.embeddings.position_embeddings"] = torch.cat([first[0], grid[0]], 1)
    state["backbone.embeddings.mask_token"] = torch.zeros(1, 384)                  # unused outside masked pretraining
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("backbone.")
        for old, new in (("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
                         ("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj")):
            key = key.replace(old, new)
        renamed[key] = value
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4,
                                     image_size=518, patch_size=14))
    fill(model, renamed, source.name).save_pretrained(folder)


def effnet_lite0(source, weights=True):
    """The PyTorch original's state dict -> timm's tf_efficientnet_lite0: same order of tensors, other names. -> module"""
    from .._compat import torchvision
    torchvision()
    import timm
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if not weights:
        return model
    state = torch.load(source, map_location="cpu", weights_only=True)
    own = model.state_dict()
    if [v.shape for v in own.values()] != [v.shape for v in state.values()]:
        raise BadState(f"{source.name}: its tensors are not those of tf_efficientnet_lite0 in order. Use the version that "
                       "`luthier zoo` names.")
    return fill(model, dict(zip(own, state.values(), strict=True)), source.name)
