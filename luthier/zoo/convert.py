"""From the formats in which packages carry weights to a folder that `transformers` reads (config, safetensors, tokenizer).
Each function takes (source, folder) and writes folder; every stored tensor must find its place, and every place its tensor."""

import torch

from ..errors import BadState

FORMAT = "2"                   # of the converted folders; raise it when a converter changes


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
    names = ["input_ids", "attention_mask"]
    if cls:
        names.insert(1, "token_type_ids")
        core.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1", special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])])
    for key, value in options.items():
        setattr(core, key, value)
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unk, cls_token=cls, sep_token=sep, model_input_names=names,
                            **special).save_pretrained(folder)


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


def rwkv_bytes(source, folder):
    """A byte-level model: token i is byte i. The tokenizer maps bytes through the usual 256 printable stand-ins."""
    from safetensors.torch import load_file
    from tokenizers import Regex, decoders, pre_tokenizers
    from transformers import RwkvConfig, RwkvForCausalLM
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    model = RwkvForCausalLM(RwkvConfig.from_pretrained(source))
    fill(model, load_file(source / "model.safetensors"), source.name).save_pretrained(folder)
    cut = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                                   pre_tokenizers.Split(Regex("."), "isolated")])
    stand_in = {char: byte for byte, char in bytes_to_unicode().items()}
    end = next(c for c, byte in stand_in.items() if byte == 0)
    vocabulary_tokenizer(stand_in, cut, end, dict(eos_token=end, pad_token=end), folder, decoder=decoders.ByteLevel())


ANTIBERTY_EXTRA = ("bert.embeddings.position_ids", "bert.pooler.", "cls.species.", "cls.chain.", "cls.graft.")


def antiberty(source, folder):
    """A masked-language BERT over amino acids with extra heads that only its own class has (species, chain, graft); those go."""
    from tokenizers import Regex, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM
    checkpoint = source / "AntiBERTy_md_smooth"
    state = torch.load(checkpoint / "pytorch_model.bin", map_location="cpu", weights_only=True)
    config = BertConfig.from_pretrained(checkpoint)
    config.architectures = None
    fill(BertForMaskedLM(config), state, source.name, ANTIBERTY_EXTRA).save_pretrained(folder)
    special = dict(pad_token="[PAD]", mask_token="[MASK]")
    cut = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\[[A-Z]+\]|."), "isolated")])
    vocabulary_tokenizer(lines(source / "vocab.txt"), cut, "[UNK]", special, folder, "[CLS]", "[SEP]")


SMILES = r"\[[^\]]+]|Br|Cl|>>|%[0-9]{2}|[A-Za-z0-9().=#+\\/:~@?>*$-]"


def rxnmapper(source, folder):
    """A masked-language ALBERT over reaction SMILES; tokens are atoms, bonds, ring numbers and brackets."""
    from transformers import AlbertConfig, AlbertForMaskedLM
    state = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    fill(AlbertForMaskedLM(AlbertConfig.from_pretrained(source)), state, source.name,
         ("albert.pooler.",)).save_pretrained(folder)
    smiles_tokenizer(source, folder)


def rxnfp(source, folder):
    """A BERT over reaction SMILES and two fine-tuned siblings; the keys say which head was stored."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
    state = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    config, drop = BertConfig.from_pretrained(source), ()
    if "cls.predictions.bias" in state:
        make, drop = BertForMaskedLM, ("bert.pooler.", "cls.seq_relationship.")
        state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]        # one tensor, later named twice
    elif "classifier.weight" in state:
        make, config.num_labels = BertForSequenceClassification, len(state["classifier.bias"])
    else:
        make = BertModel
    fill(make(config), state, source.name, drop).save_pretrained(folder)
    smiles_tokenizer(source, folder)


def smiles_tokenizer(source, folder):
    from tokenizers import Regex, pre_tokenizers
    special = dict(pad_token="[PAD]", mask_token="[MASK]")
    vocabulary_tokenizer(lines(source / "vocab.txt"), pre_tokenizers.Split(Regex(SMILES), "isolated"), "[UNK]", special, folder,
                         "[CLS]", "[SEP]")


def whisper_ct2(source, folder):
    """Whisper in CTranslate2's layout -> transformers: q, k, v come fused (k v in cross-attention), norms as gamma and beta."""
    from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    from .ct2 import read
    stored = read(source / "model.bin")
    vocab, width = stored["decoder/embeddings/weight"].shape
    layers = sum(k.startswith("encoder/") and k.endswith("self_attention/linear_1/weight") for k in stored)
    end = 50256 if vocab == 51864 else 50257         # the English model's vocabulary has one word less
    hidden = stored["encoder/layer_0/ffn/linear_0/bias"].shape[0]
    config = WhisperConfig(
        vocab_size=vocab, d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64, encoder_ffn_dim=hidden, decoder_ffn_dim=hidden, num_mel_bins=80, bos_token_id=end,
        eos_token_id=end, pad_token_id=end, decoder_start_token_id=end + 1, suppress_tokens=None, begin_suppress_tokens=None)
    state = {}

    def place(theirs, ours, names=("",)):
        """One stored layer onto `names`, its rows in equal parts; keys have no bias here."""
        for kind in ("weight", "bias"):
            for name, part in zip(names, stored.pop(f"{theirs}/{kind}").chunk(len(names)), strict=True):
                if (kind, name) != ("bias", ".k_proj"):
                    state[f"{ours}{name}.{kind}"] = part.clone()
                elif part.any():
                    raise BadState(f"{source}: {theirs} has a bias on its keys, which Whisper has not.")

    def norm(theirs, ours):
        state[f"{ours}.weight"], state[f"{ours}.bias"] = stored.pop(f"{theirs}/gamma"), stored.pop(f"{theirs}/beta")

    for conv in ("conv1", "conv2"):
        place(f"encoder/{conv}", f"model.encoder.{conv}")
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = stored.pop(f"{side}/position_encodings/encodings")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(layers):
            theirs, ours = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            place(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", (".q_proj", ".k_proj", ".v_proj"))
            place(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if side == "decoder":
                place(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                place(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", (".k_proj", ".v_proj"))
                place(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            place(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            place(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = stored.pop("decoder/embeddings/weight")
    left = [k for k, v in stored.items() if v.numel() > 1]           # what is left are settings of one number each
    if left:
        raise BadState(f"{source}: {left[:3]} have no place in Whisper. Use the version that `luthier zoo` names.")
    fill(WhisperForConditionalGeneration(config), state, source.name).save_pretrained(folder)
    text = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), eos_token=text, bos_token=text,
                            pad_token=text).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
