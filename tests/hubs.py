"""Tiny models of the hub that read images and write text: random weights, real processors, each saved as a folder."""

import folders
import torch

from luthier._compat import torchvision

torchvision()

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
EYES = SMALL | dict(image_size=16, patch_size=8)             # four places and a class token
WORDS = len(folders.WORDS)
START, END, PAD = 2, 3, 0                                    # [CLS] [SEP] [PAD]
TEXT = SMALL | dict(bos_token_id=START, eos_token_id=END, pad_token_id=PAD, max_position_embeddings=64)
MEAN = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def words(folder, decoder=True):
    import transformers as t

    folder.mkdir(parents=True, exist_ok=True)
    folders.tokenizer(folder, decoder=decoder)
    made = t.AutoTokenizer.from_pretrained(folder)
    made.add_tokens([t.AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    return made


def save(folder, model, processor=None):
    if processor is not None:
        processor.save_pretrained(folder)
    for p in model.parameters():                             # larger than a usual start, so that it learns at once
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    model.eval().save_pretrained(folder)
    return str(folder)


def blip(folder, name="BlipForConditionalGeneration"):
    import transformers as t

    torch.manual_seed(0)
    text = TEXT | dict(vocab_size=WORDS, encoder_hidden_size=16, sep_token_id=END)
    config = t.BlipConfig(text_config=text, vision_config=EYES, projection_dim=16)
    folder.mkdir(parents=True, exist_ok=True)
    folders.tokenizer(folder)                                # as BERT's: [CLS] ... [SEP], and no token called its end
    processor = t.BlipProcessor(t.BlipImageProcessor(size=dict(height=16, width=16)), t.AutoTokenizer.from_pretrained(folder))
    return save(folder, getattr(t, name)(config), processor)


def blip_vqa(folder):
    return blip(folder, "BlipForQuestionAnswering")


def blip2(folder, kind="opt"):
    import transformers as t

    torch.manual_seed(0)
    tokenizer = words(folder)
    text = dict(model_type="opt", vocab_size=WORDS + 1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
                word_embed_proj_dim=16, max_position_embeddings=64, bos_token_id=START, eos_token_id=END, pad_token_id=PAD,
                dropout=0.0)
    if kind == "t5":
        text = dict(model_type="t5", vocab_size=WORDS + 1, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                    dropout_rate=0.0, pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD, is_encoder_decoder=True)
    config = t.Blip2Config(vision_config=EYES, qformer_config=SMALL | dict(encoder_hidden_size=16, vocab_size=WORDS),
                           num_query_tokens=3, text_config=text, image_token_index=WORDS)
    processor = t.Blip2Processor(t.BlipImageProcessor(size=dict(height=16, width=16)), tokenizer, num_query_tokens=3)
    return save(folder, t.Blip2ForConditionalGeneration(config), processor)


def blip2_t5(folder):
    return blip2(folder, "t5")


def llava(folder, processor=True, template=None):
    import transformers as t

    torch.manual_seed(0)
    tokenizer = words(folder)
    config = t.LlavaConfig(vision_config=EYES | dict(model_type="clip_vision_model"), image_token_index=WORDS,
                           text_config=TEXT | dict(model_type="llama", vocab_size=WORDS + 1), image_seq_length=4)
    made = t.LlavaProcessor(t.CLIPImageProcessor(size=dict(shortest_edge=16), crop_size=dict(height=16, width=16)), tokenizer,
                            patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
                            chat_template=template) if processor else None
    tokenizer.save_pretrained(folder)
    return save(folder, t.LlavaForConditionalGeneration(config), made)


def llava_bare(folder):
    return llava(folder, processor=False)


def git(folder):
    import transformers as t

    torch.manual_seed(0)
    config = t.GitConfig(**TEXT, vocab_size=WORDS, vision_config=EYES)
    folder.mkdir(parents=True, exist_ok=True)
    folders.tokenizer(folder)
    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    return save(folder, t.GitForCausalLM(config), t.GitProcessor(
        t.CLIPImageProcessor(size=dict(shortest_edge=16), crop_size=dict(height=16, width=16)), tokenizer))


def paligemma(folder):
    import transformers as t

    torch.manual_seed(0)
    tokenizer = words(folder)
    tokenizer.bos_token = "[CLS]"
    image = t.SiglipImageProcessor(size=dict(height=16, width=16))
    image.image_seq_length = 4
    text = TEXT | dict(model_type="gemma", vocab_size=WORDS + 1200, num_key_value_heads=1, head_dim=8)
    made = t.PaliGemmaProcessor(image, tokenizer)
    config = t.PaliGemmaConfig(vision_config=EYES | dict(model_type="siglip_vision_model", projection_dim=16), text_config=text,
                               image_token_index=made.image_token_id, projection_dim=16)
    return save(folder, t.PaliGemmaForConditionalGeneration(config), made)


def idefics3(folder):
    import transformers as t

    torch.manual_seed(0)
    tokenizer = words(folder)
    image = t.Idefics3ImageProcessor(size=dict(longest_edge=16), max_image_size=dict(longest_edge=16), do_image_splitting=False)
    made = t.Idefics3Processor(image, tokenizer, image_seq_len=1)
    config = t.Idefics3Config(vision_config=EYES, text_config=TEXT | dict(model_type="llama", vocab_size=WORDS + 200),
                              scale_factor=2, image_token_id=made.image_token_id)
    return save(folder, t.Idefics3ForConditionalGeneration(config), made)


MODELS = dict(blip=blip, blip_vqa=blip_vqa, blip2=blip2, blip2_t5=blip2_t5, llava=llava, llava_bare=llava_bare, git=git,
              paligemma=paligemma, idefics3=idefics3)
