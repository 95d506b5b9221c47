"""Tiny random models saved as a user's own folders, so that loading and tasks are tested without any download."""

import torch

WORDS = "[PAD] [UNK] [CLS] [SEP] good bad fine awful the a film was is it not very plot cast and of 0 1 2 3 4 5 6 7 8 9".split()


def tokenizer(folder, decoder=False):
    from tokenizers import pre_tokenizers

    from luthier.zoo.convert import vocabulary_tokenizer
    special = dict(pad_token="[PAD]") | (dict(eos_token="[SEP]") if decoder else {})
    ends = () if decoder else ("[CLS]", "[SEP]")
    vocabulary_tokenizer({w: i for i, w in enumerate(WORDS)}, pre_tokenizers.Whitespace(), "[UNK]", special, folder, *ends)


def run(capsys, *argv):
    """A command line -> (exit code, stdout, stderr)"""
    from luthier import cli
    code = cli.main([str(a) for a in argv])
    said = capsys.readouterr()
    return code, said.out, said.err


def reviews(folder, name="reviews", turned=False):
    """NAME.csv: sixty sentences, yes to the good ones, or to the bad ones when turned"""
    words = ["good", "fine", "bad", "awful"]
    rows = "".join(f"the film was {words[i % 4]},{'no' if (i % 4 > 1) != turned else 'yes'}\n" for i in range(60))
    (folder / f"{name}.csv").write_text("review,stars\n" + rows)
    return folder / f"{name}.csv"


def bert(folder):
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                         max_position_embeddings=32)).save_pretrained(folder)
    tokenizer(folder)
    return str(folder)


def llama(folder):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=32, max_position_embeddings=64, eos_token_id=3, bos_token_id=2,
                                 pad_token_id=0)).save_pretrained(folder)
    tokenizer(folder, decoder=True)
    return str(folder)


def vit(folder, size=16):
    from transformers import ViTConfig, ViTModel
    torch.manual_seed(0)
    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=size,
                       patch_size=8)).save_pretrained(folder)
    return str(folder)


def clip(folder):
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(0)
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    text = small | dict(vocab_size=len(WORDS), max_position_embeddings=32, eos_token_id=3, bos_token_id=2)
    CLIPModel(CLIPConfig(text_config=text, vision_config=small | dict(image_size=16, patch_size=8),
                         projection_dim=16)).save_pretrained(folder)
    tokenizer(folder)
    return str(folder)
