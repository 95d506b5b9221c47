"""Tiny randomly initialised models of many architectures, and the roles a reader of each paper expects to find in it.

`TABLE[name] = (build, roles)`: roles are those of weight sites inside blocks (written from knowledge of the architecture, never
from the finder's own output), plus what is before and after. A model's roles may be more (norms, raw parameters), never fewer."""

import inspect
import pathlib
import re
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F

from luthier._compat import torchvision

torchvision()                        # before anything that imports it

D = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
IDS = dict(vocab_size=60, bos_token_id=1, eos_token_id=2, pad_token_id=0)
IMG = dict(image_size=32, patch_size=16)
TABLE = {}


def hf(model, config=None, **fields):
    """A transformers model from its class's own configuration."""
    import transformers
    cls = getattr(transformers, model)
    return cls((getattr(transformers, config) if config else cls.config_class)(**fields)).eval()


def add(name, roles, model, config=None, **fields):
    TABLE[name] = (lambda: hf(model, config, **fields), frozenset(roles.split()))


ATTN = "attn.q attn.k attn.v attn.o"
BERT = f"embed.token embed.position embed.type embed.norm {ATTN} attn.norm mlp.up mlp.down mlp.norm head"
LLAMA = f"embed.token {ATTN} attn.norm mlp.gate mlp.up mlp.down mlp.norm final.norm head"
MOE = f"embed.token {ATTN} attn.norm mlp.norm mlp.router mlp.expert.gate mlp.expert.up mlp.expert.down final.norm head"
GPT = f"embed.token embed.position {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm head"
VIT = f"embed.patch embed.cls embed.position {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm head"
CROSS = "cross.q cross.k cross.v cross.o cross.norm"
SEQ2SEQ = f"embed.token {ATTN} attn.norm {CROSS} mlp.up mlp.down mlp.norm head"
DUAL = f"embed.token embed.position embed.patch {ATTN} attn.norm mlp.up mlp.down mlp.norm"

# ---- text encoders
add("bert", BERT + " pool", "BertForSequenceClassification", **D, **IDS)
add("bert-model", BERT.replace("head", "pool"), "BertModel", **D, **IDS)
add("roberta", BERT, "RobertaForSequenceClassification", **D, **IDS)
add("xlm-roberta", BERT, "XLMRobertaForTokenClassification", **D, **IDS)
add("camembert", BERT, "CamembertForMaskedLM", **D, **IDS)
add("distilbert", BERT.replace("embed.type ", ""), "DistilBertForSequenceClassification", vocab_size=60, dim=32, n_layers=2,
    n_heads=4,
    hidden_dim=64)
add("albert", BERT + " pool embed.proj", "AlbertForSequenceClassification", **D, **IDS, embedding_size=16)
add("deberta-v2", f"embed.token embed.norm {ATTN} attn.norm mlp.up mlp.down mlp.norm pool head",
    "DebertaV2ForSequenceClassification",
    **D, **IDS, relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"], type_vocab_size=0)
add("deberta", f"embed.token embed.norm {ATTN} attn.norm mlp.up mlp.down mlp.norm pool head", "DebertaForSequenceClassification",
    **D, **IDS, relative_attention=True, pos_att_type=["p2c", "c2p"])
add("electra", BERT + " embed.proj", "ElectraForSequenceClassification", **D, **IDS, embedding_size=16)
add("modernbert", f"embed.token embed.norm {ATTN} attn.norm mlp.gate mlp.up mlp.down mlp.norm final.norm head",
    "ModernBertForSequenceClassification", **D, **IDS, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2)
add("esm", f"embed.token embed.position {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm head", "EsmForMaskedLM", **D,
    vocab_size=60,
    pad_token_id=0, mask_token_id=3)
add("mpnet", BERT.replace("embed.type ", ""), "MPNetForSequenceClassification", **D, **IDS)
add("megatron-bert", f"embed.token embed.position embed.type {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm pool head",
    "MegatronBertForSequenceClassification", **D, **IDS)
add("rembert", BERT + " pool", "RemBertForSequenceClassification", **D, **IDS, input_embedding_size=16, output_embedding_size=16)
add("fnet", "embed.token embed.position embed.type embed.norm mlp.up mlp.down mlp.norm head", "FNetForSequenceClassification",
    **D,
    vocab_size=60, use_tpu_fourier_optimizations=False)
add("layoutlm", BERT + " pool", "LayoutLMForSequenceClassification", **D, **IDS)

# ---- decoders
add("gpt2", GPT, "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, **IDS)
add("gpt-neox", f"embed.token {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm head", "GPTNeoXForCausalLM", **D, **IDS)
add("gpt-j", f"embed.token {ATTN} attn.norm mlp.up mlp.down final.norm head", "GPTJForCausalLM", n_embd=32, n_layer=2, n_head=4,
    rotary_dim=4, **IDS)
add("gpt-neo", GPT, "GPTNeoForCausalLM", hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
    **IDS)
add("gpt-bigcode", GPT, "GPTBigCodeForCausalLM", n_embd=32, n_layer=2, n_head=4, multi_query=True, **IDS)
add("gpt-bigcode-mha", GPT, "GPTBigCodeForCausalLM", n_embd=32, n_layer=2, n_head=4, multi_query=False, **IDS)
add("codegen", f"embed.token {ATTN} attn.norm mlp.up mlp.down final.norm head", "CodeGenForCausalLM", n_embd=32, n_layer=2,
    n_head=4,
    rotary_dim=4, **IDS)
add("opt", GPT, "OPTForCausalLM", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32,
    **IDS)
add("bloom", f"embed.token embed.norm {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm head", "BloomForCausalLM",
    hidden_size=32,
    n_layer=2, n_head=4, **IDS)
add("llama", LLAMA, "LlamaForCausalLM", **D, **IDS, num_key_value_heads=2)
add("mistral", LLAMA, "MistralForCausalLM", **D, **IDS, num_key_value_heads=2)
add("qwen2", LLAMA, "Qwen2ForCausalLM", **D, **IDS, num_key_value_heads=2)
add("qwen3", LLAMA + " attn.q_norm attn.k_norm", "Qwen3ForCausalLM", **D, **IDS, num_key_value_heads=2, head_dim=8)
add("gemma", LLAMA, "GemmaForCausalLM", **D, **IDS, num_key_value_heads=1, head_dim=8)
add("gemma2", LLAMA + " attn.post_norm mlp.post_norm", "Gemma2ForCausalLM", **D, **IDS, num_key_value_heads=2, head_dim=8)
add("gemma3", LLAMA + " attn.post_norm mlp.post_norm attn.q_norm attn.k_norm", "Gemma3ForCausalLM", "Gemma3TextConfig", **D,
    **IDS,
    num_key_value_heads=2, head_dim=8)
add("phi", f"embed.token {ATTN} attn.norm mlp.up mlp.down final.norm head", "PhiForCausalLM", **D, **IDS)
add("phi3", LLAMA, "Phi3ForCausalLM", **D, **IDS, num_key_value_heads=2)
add("falcon", f"embed.token {ATTN} attn.norm mlp.up mlp.down final.norm head", "FalconForCausalLM", hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4, multi_query=True, **IDS)
add("falcon-40b", f"embed.token {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm head", "FalconForCausalLM", hidden_size=32,
    num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True, **IDS)
add("falcon-rw", f"embed.token {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm head", "FalconForCausalLM", hidden_size=32,
    num_hidden_layers=2, num_attention_heads=4, multi_query=False, parallel_attn=False, alibi=True, **IDS)
add("mpt", f"embed.token {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm head", "MptForCausalLM", d_model=32, n_heads=4,
    n_layers=2,
    expansion_ratio=2, **IDS)
add("stablelm", LLAMA, "StableLmForCausalLM", **D, **IDS, num_key_value_heads=4)
add("starcoder2", f"embed.token {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm head", "Starcoder2ForCausalLM", **D, **IDS,
    num_key_value_heads=2)
add("olmo2", LLAMA + " attn.q_norm attn.k_norm", "Olmo2ForCausalLM", **D, **IDS)
add("cohere", LLAMA.replace("mlp.norm ", ""), "CohereForCausalLM", **D, **IDS)
add("persimmon", f"embed.token {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm head", "PersimmonForCausalLM", **D, **IDS)
add("granite", LLAMA, "GraniteForCausalLM", **D, **IDS)
add("glm4", LLAMA + " attn.post_norm mlp.post_norm", "Glm4ForCausalLM", **D, **IDS, num_key_value_heads=2, head_dim=8)
add("openai-gpt", GPT.replace("final.norm ", ""), "OpenAIGPTLMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=60)
add("xglm", GPT.replace("embed.position ", ""), "XGLMForCausalLM", d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, **IDS)
add("biogpt", GPT, "BioGptForCausalLM", **D, **IDS)
add("imagegpt", GPT.replace(" head", ""), "ImageGPTModel", n_embd=32, n_layer=2, n_head=4, vocab_size=60)

# ---- mixtures of experts
add("mixtral", MOE, "MixtralForCausalLM", **D, **IDS, num_key_value_heads=2, num_local_experts=4)
add("qwen2-moe", MOE + " mlp.shared.gate mlp.shared.up mlp.shared.down", "Qwen2MoeForCausalLM", **D, **IDS, num_key_value_heads=2,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40, decoder_sparse_step=1)
add("qwen3-moe", MOE + " attn.q_norm attn.k_norm", "Qwen3MoeForCausalLM", **D, **IDS, num_key_value_heads=2, head_dim=8,
    num_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=24)
add("gpt-oss", MOE, "GptOssForCausalLM", **D, **IDS, num_key_value_heads=2, head_dim=8, num_local_experts=4,
    num_experts_per_tok=2)
add("olmoe", MOE, "OlmoeForCausalLM", **D, **IDS, num_experts=4, num_experts_per_tok=2)
add("deepseek-v3",
    "embed.token attn.q_a attn.q_b attn.kv_a attn.kv_b attn.o attn.norm mlp.norm mlp.gate mlp.up mlp.down mlp.router "
    "mlp.expert.gate mlp.expert.up mlp.expert.down mlp.shared.gate mlp.shared.up mlp.shared.down final.norm head",
    "DeepseekV3ForCausalLM",
    **D, **IDS, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=24, n_shared_experts=1,
    first_k_dense_replace=1)
add("switch", SEQ2SEQ + " mlp.router mlp.expert.up mlp.expert.down final.norm", "SwitchTransformersForConditionalGeneration",
    d_model=32, d_kv=8,
    d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4, num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1, **IDS)

# ---- state space and recurrent
SSM = "embed.token ssm.in ssm.conv ssm.A ssm.D ssm.out ssm.norm final.norm head"
add("mamba", SSM + " ssm.x ssm.dt", "MambaForCausalLM", hidden_size=32, num_hidden_layers=2, state_size=4, **IDS)
add("mamba2", SSM, "Mamba2ForCausalLM", hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8, n_groups=1,
    chunk_size=8, **IDS)
add("falcon-mamba", SSM + " ssm.x ssm.dt", "FalconMambaForCausalLM", hidden_size=32, num_hidden_layers=2, state_size=4, **IDS)
add("rwkv", "embed.token attn.r attn.k attn.v attn.o attn.norm mlp.up mlp.gate mlp.down mlp.norm final.norm head",
    "RwkvForCausalLM",
    hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=64, context_length=16, **IDS)
add("jamba",
    f"embed.token {ATTN} attn.norm ssm.in ssm.conv ssm.x ssm.dt ssm.out ssm.norm mlp.gate mlp.up mlp.down mlp.norm mlp.router "
    "mlp.expert.gate mlp.expert.up mlp.expert.down final.norm head", "JambaForCausalLM", **D | dict(num_hidden_layers=4), **IDS,
    num_key_value_heads=2, num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
    use_mamba_kernels=False, mamba_d_state=4)
add("recurrent-gemma", f"embed.token {ATTN} attn.norm ssm.out mlp.gate mlp.up mlp.down mlp.norm final.norm head",
    "RecurrentGemmaForCausalLM", **D | dict(num_hidden_layers=3), **IDS, lru_width=32, attention_window_size=8,
    num_key_value_heads=1,
    head_dim=8)

# ---- encoder-decoders
BART = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64)
T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
add("t5", SEQ2SEQ + " final.norm", "T5ForConditionalGeneration", **T5, **IDS)
add("mt5", SEQ2SEQ + " mlp.gate final.norm", "MT5ForConditionalGeneration", **T5, **IDS)
add("bart", SEQ2SEQ + " embed.position embed.norm", "BartForConditionalGeneration", **BART, **IDS)
add("mbart", SEQ2SEQ + " embed.position embed.norm final.norm", "MBartForConditionalGeneration", **BART, **IDS)
add("pegasus", SEQ2SEQ + " embed.position final.norm", "PegasusForConditionalGeneration", **BART, **IDS)
add("marian", SEQ2SEQ + " embed.position", "MarianMTModel", **BART, **IDS, decoder_start_token_id=0)
add("m2m100", SEQ2SEQ + " final.norm", "M2M100ForConditionalGeneration", **BART, **IDS)
add("whisper", SEQ2SEQ + " embed.position embed.conv final.norm", "WhisperForConditionalGeneration", **BART, **IDS,
    num_mel_bins=8,
    max_source_positions=32, max_target_positions=32, decoder_start_token_id=1)
add("blenderbot", SEQ2SEQ + " embed.position final.norm", "BlenderbotForConditionalGeneration", **BART, **IDS)
add("led", f"embed.token embed.position {ATTN} cross.q cross.o mlp.up mlp.down head", "LEDForConditionalGeneration", **BART,
    **IDS,
    attention_window=4, max_encoder_position_embeddings=32, max_decoder_position_embeddings=32)

# ---- vision
add("vit", VIT, "ViTForImageClassification", **D, **IMG)
add("deit", VIT + " embed.dist", "DeiTForImageClassificationWithTeacher", **D, **IMG)
add("beit", VIT.replace("embed.position ", "").replace("final.norm ", ""), "BeitForImageClassification", **D, **IMG,
    use_mean_pooling=False, use_relative_position_bias=True)
add("dinov2", VIT, "Dinov2ForImageClassification", **D, image_size=28, patch_size=14, mlp_ratio=2)
add("dinov2-giant", VIT.replace(" head", "") + " mlp.gate", "Dinov2Model", **D, image_size=28, patch_size=14, use_swiglu_ffn=True)
add("dinov2-reg", VIT + " embed.register", "Dinov2WithRegistersForImageClassification", **D, image_size=28, patch_size=14)
add("dinov3", f"embed.patch embed.cls embed.register {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm", "DINOv3ViTModel",
    **D, **IMG)
add("swin", f"embed.patch embed.norm {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm head", "SwinForImageClassification",
    image_size=32,
    patch_size=4, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4)
add("swinv2", f"embed.patch embed.norm {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm head", "Swinv2ForImageClassification",
    image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
add("convnext", "embed.patch conv.0 mlp.up mlp.down final.norm head", "ConvNextForImageClassification",
    hidden_sizes=[8, 16, 24, 32],
    depths=[1, 1, 2, 1], image_size=64)
add("resnet", "embed.conv conv.0 conv.1 conv.2 conv.short conv.norm head", "ResNetForImageClassification", embedding_size=8,
    hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck")
add("regnet", "embed.conv conv.0 conv.1 conv.2 conv.short head", "RegNetForImageClassification", embedding_size=8,
    hidden_sizes=[16, 32],
    depths=[1, 2], groups_width=8)
add("segformer", f"embed.patch {ATTN} attn.norm mlp.up mlp.down mlp.norm head", "SegformerForSemanticSegmentation",
    depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=16)
add("sam", f"embed.patch embed.position {ATTN} attn.norm {CROSS} mlp.up mlp.down mlp.norm", "SamModel",
    vision_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, output_channels=16, image_size=32,
                       patch_size=8,
                       window_size=2, global_attn_indexes=[1], mlp_dim=64, num_pos_feats=8),
    prompt_encoder_config=dict(hidden_size=16, image_size=32, patch_size=8, mask_input_channels=4),
    mask_decoder_config=dict(hidden_size=16, mlp_dim=32, num_hidden_layers=2, num_attention_heads=2, iou_head_hidden_dim=16))
add("mobilevit", f"embed.conv conv.0 conv.1 conv.2 {ATTN} attn.norm mlp.up mlp.down mlp.norm head",
    "MobileViTForImageClassification",
    hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 32], num_attention_heads=2, image_size=64, mlp_ratio=2.0)
add("vit-mae", VIT.replace(" head", ""), "ViTMAEForPreTraining", **D, **IMG, decoder_hidden_size=16,
    decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32)
add("yolos", VIT.replace(" head", ""), "YolosForObjectDetection", **D | IMG | dict(image_size=[32, 32]), num_detection_tokens=3)
add("dpt", VIT.replace(" head", ""), "DPTForDepthEstimation", **D | dict(num_hidden_layers=4), **IMG,
    backbone_out_indices=[0, 1, 2, 3],
    neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, is_hybrid=False)
add("poolformer", "embed.patch mlp.up mlp.down mlp.norm head", "PoolFormerForImageClassification", depths=[1, 1, 1, 1],
    hidden_sizes=[8, 8, 16, 16])
add("videomae", VIT.replace("embed.cls embed.position ", "").replace("final.norm ", ""), "VideoMAEForVideoClassification", **D,
    image_size=16,
    patch_size=8, num_frames=4)

# ---- vision and language
TEXT = D | dict(vocab_size=60, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0)
VISION = D | IMG
add("clip", DUAL + " embed.cls final.norm", "CLIPModel", text_config=TEXT, vision_config=VISION, projection_dim=16)
add("siglip", DUAL + " final.norm", "SiglipModel", text_config=TEXT, vision_config=VISION)
add("clipseg", DUAL + " embed.cls final.norm", "CLIPSegForImageSegmentation", text_config=TEXT, vision_config=VISION,
    projection_dim=16,
    extract_layers=[0, 1], reduce_dim=16, decoder_num_attention_heads=2, decoder_intermediate_size=32, conditional_layer=0)
add("blip", DUAL + f" {CROSS} embed.cls final.norm head", "BlipForConditionalGeneration",
    text_config=TEXT | dict(encoder_hidden_size=32),
    vision_config=VISION, projection_dim=16)
add("blip-vqa", DUAL + f" {CROSS} embed.cls final.norm head", "BlipForQuestionAnswering",
    text_config=TEXT | dict(encoder_hidden_size=32),
    vision_config=VISION, projection_dim=16)
add("blip2", DUAL + f" {CROSS} final.norm head", "Blip2ForConditionalGeneration", vision_config=VISION,
    qformer_config=D | dict(encoder_hidden_size=32, vocab_size=60), num_query_tokens=4, image_token_index=5,
    text_config=dict(model_type="opt", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
                     word_embed_proj_dim=32,
                     vocab_size=60))
add("llava", DUAL + " mlp.gate final.norm head", "LlavaForConditionalGeneration",
    vision_config=VISION | dict(model_type="clip_vision_model"),
    text_config=D | IDS | dict(model_type="llama"), image_token_index=5)
add("idefics", f"embed.token embed.patch {ATTN} {CROSS} mlp.gate mlp.up mlp.down final.norm head", "IdeficsForVisionText2Text",
    **D, **IDS, vision_config=dict(embed_dim=32, image_size=32, patch_size=16, num_hidden_layers=2, num_attention_heads=4,
                                   intermediate_size=64),
    cross_layer_interval=1, use_resampler=False)
add("idefics3", DUAL + " mlp.gate final.norm head", "Idefics3ForConditionalGeneration", vision_config=VISION,
    text_config=D | IDS | dict(model_type="llama"), image_token_id=5)
add("paligemma", DUAL + " mlp.gate final.norm head", "PaliGemmaForConditionalGeneration",
    vision_config=VISION | dict(model_type="siglip_vision_model", projection_dim=32),
    text_config=D | IDS | dict(model_type="gemma", num_key_value_heads=1, head_dim=8), image_token_index=5,
    projection_dim=32)
add("qwen2-vl", f"embed.token embed.patch {ATTN} attn.norm mlp.gate mlp.up mlp.down mlp.norm final.norm head",
    "Qwen2VLForConditionalGeneration", text_config=D | IDS | dict(num_key_value_heads=2, rope_parameters=dict(
        rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])),
    vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4), image_token_id=5,
    vision_start_token_id=3)
add("vilt", BERT.replace("head", "embed.patch embed.cls final.norm pool head"), "ViltForQuestionAnswering", **D | IMG, **IDS)
add("git", f"embed.token embed.position embed.patch {ATTN} mlp.up mlp.down head", "GitForCausalLM", **D, **IDS,
    vision_config=VISION)
add("owlvit", DUAL + " embed.cls final.norm", "OwlViTForObjectDetection", text_config=TEXT, vision_config=VISION,
    projection_dim=32)
add("flava", DUAL + " embed.cls final.norm pool", "FlavaModel", text_config=TEXT, image_config=VISION,
    multimodal_config=dict(D), projection_dim=16)

# ---- detection
add("detr", f"{ATTN} attn.norm {CROSS} mlp.up mlp.down mlp.norm", "DetrForObjectDetection", use_timm_backbone=False,
    use_pretrained_backbone=False,
    backbone_config=dict(model_type="resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]),
    **BART, num_queries=5)

# ---- audio
W2V = D | dict(conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
               num_conv_pos_embedding_groups=2,
               classifier_proj_size=16)
AUDIO = f"embed.conv embed.proj {ATTN} attn.norm mlp.up mlp.down mlp.norm"
add("wav2vec2", AUDIO + " embed.norm head", "Wav2Vec2ForSequenceClassification", **W2V)
add("wav2vec2-stable", AUDIO + " final.norm head", "Wav2Vec2ForCTC", **W2V, vocab_size=20, do_stable_layer_norm=True,
    feat_extract_norm="layer")
add("hubert", AUDIO + " head", "HubertForSequenceClassification", **W2V)
add("wavlm", AUDIO + " head", "WavLMForSequenceClassification", **W2V)
add("ast", VIT + " embed.dist", "ASTForAudioClassification", **D, patch_size=4, max_length=16, num_mel_bins=8,
    frequency_stride=4, time_stride=4)
add("clap", f"embed.token embed.position embed.patch {ATTN} attn.norm mlp.up mlp.down mlp.norm", "ClapModel", text_config=TEXT,
    audio_config=dict(patch_embeds_hidden_size=16, hidden_size=32, depths=[1, 1], num_attention_heads=[2, 4], spec_size=64,
                      patch_size=4,
                      patch_stride=[4, 4], window_size=4, num_mel_bins=16, num_hidden_layers=2), projection_dim=16)

# ---- time series
add("patchtst", f"embed.proj {ATTN} attn.norm mlp.up mlp.down mlp.norm head", "PatchTSTForPrediction", num_input_channels=2,
    context_length=16,
    patch_length=4, patch_stride=4, d_model=32, num_attention_heads=4, num_hidden_layers=2, ffn_dim=64, prediction_length=4)
add("time-series-transformer", f"embed.proj {ATTN} attn.norm {CROSS} mlp.up mlp.down mlp.norm",
    "TimeSeriesTransformerForPrediction",
    prediction_length=4, context_length=8, lags_sequence=[1, 2], num_time_features=1, d_model=32, encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64)
add("patchtsmixer", "embed.proj mix.up mix.down mlp.up mlp.down", "PatchTSMixerForPrediction", context_length=16, patch_length=4,
    patch_stride=4,
    num_input_channels=2, d_model=8, num_layers=2, prediction_length=4)


# ---- timm, diffusers, torchvision
def timm(name, roles, model, **fields):
    def build():
        import timm as library
        return library.create_model(model, **fields).eval()
    TABLE[name] = (build, frozenset(roles.split()))


timm("timm-vit", VIT, "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=4, num_classes=5)
timm("timm-vit-reg", VIT + " embed.register", "vit_small_patch14_reg4_dinov2", img_size=28, embed_dim=32, depth=2, num_heads=4,
    num_classes=5)
timm("timm-efficientnet", "embed.conv conv.0 conv.1 conv.2 se.0 se.1 head", "mobilenetv3_small_050", num_classes=5)
timm("timm-mixer", "embed.patch mix.up mix.down mix.norm mlp.up mlp.down mlp.norm final.norm head", "mixer_s32_224", img_size=64,
    num_classes=5)
timm("timm-mobilevit", f"embed.conv conv.0 {ATTN} attn.norm mlp.up mlp.down mlp.norm head", "mobilevit_xxs", num_classes=5)
timm("timm-swin", f"embed.patch {ATTN} attn.norm mlp.up mlp.down mlp.norm final.norm head", "swin_tiny_patch4_window7_224",
    img_size=32, embed_dim=16,
     depths=(1, 1), num_heads=(2, 4), window_size=4, num_classes=5)
timm("timm-convnext", "embed.patch conv.0 mlp.up mlp.down mlp.norm head", "convnext_atto", depths=(1, 1, 1, 1),
    dims=(8, 8, 16, 16), num_classes=5)
timm("timm-resnet", "embed.conv conv.0 conv.1 conv.short head", "resnet10t", num_classes=5)
timm("timm-beit", VIT.replace("embed.position ", "").replace("final.norm ", ""), "beit_base_patch16_224", img_size=32,
    embed_dim=32, depth=2, num_heads=4,
     num_classes=5)
timm("timm-eva02", f"embed.patch embed.cls embed.position {ATTN} attn.norm mlp.gate mlp.up mlp.down mlp.norm head",
    "eva02_tiny_patch14_224", img_size=28,
     embed_dim=32, depth=2, num_heads=4, num_classes=5)


def row(name, roles):
    def put(build):
        TABLE[name] = (build, frozenset(roles.split()))
        return build
    return put


@row("unet2d-condition", f"embed.conv conv.0 conv.1 conv.norm {ATTN} attn.norm {CROSS} mlp.gate mlp.up mlp.down mlp.norm")
def unet():
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16,
                                attention_head_dim=4,
                                norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()


@row("dit", f"embed.patch {ATTN} mlp.up mlp.down")
def dit():
    from diffusers import DiTTransformer2DModel
    return DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8,
                                 patch_size=2,
                                 num_embeds_ada_norm=10, norm_num_groups=4).eval()


@row("torchvision-resnet18", "embed.conv conv.0 conv.1 conv.norm conv.short head")
def resnet18():
    from torchvision.models import resnet18
    return resnet18(num_classes=5, width_per_group=64).eval()


@row("nn.TransformerEncoder", f"{ATTN} attn.norm mlp.up mlp.down mlp.norm")
def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True), 2,
                                 enable_nested_tensor=False).eval()


@row("nn.Transformer", f"{ATTN} attn.norm {CROSS} mlp.up mlp.down mlp.norm final.norm")
def transformer():
    return nn.Transformer(32, 4, 2, 2, 64, batch_first=True).eval()


class Attend(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.n_heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class HandBlock(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.n1, self.mix, self.n2 = nn.LayerNorm(d), Attend(d, heads), nn.LayerNorm(d)
        self.ff = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return x + self.ff(self.n2(x))


class Hand(nn.Module):
    """A decoder as someone might write it, with names of their own."""

    def __init__(self, d=32, heads=4, vocab=60, length=16):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, d), nn.Parameter(torch.randn(length, d))
        self.trunk = nn.ModuleList(HandBlock(d, heads) for _ in range(2))
        self.last, self.read = nn.LayerNorm(d), nn.Linear(d, vocab)
        self.curious = nn.Parameter(torch.zeros(3))

    def forward(self, ids):
        x = self.tok(ids) + self.pos[:ids.shape[1]]
        for block in self.trunk:
            x = block(x)
        return self.read(self.last(x)) + self.curious.sum()


@row("hand-written", GPT)
def hand():
    return Hand().eval()


@row("hand-blocks", "embed.proj attn.q attn.k attn.v attn.o attn.norm mlp.up mlp.down mlp.norm head")
def numbered():
    """No list at all: block1 and block2."""
    class Numbered(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block1, self.block2, self.head = nn.Linear(8, 32), HandBlock(32, 4), HandBlock(32, 4), nn.Linear(32,
                3)

        def forward(self, x):
            return self.head(self.block2(self.block1(self.embed(x))).mean(1))
    return Numbered().eval()


@lru_cache(None)
def built(name):
    """The model of a row, built once, always the same."""
    torch.manual_seed(0)
    return TABLE[name][0]()


def feed(name):
    """Some input that the model of a row runs on."""
    model, draw = built(name), torch.Generator().manual_seed(0)
    takes, config = inspect.signature(inspect.unwrap(type(model).forward)).parameters, getattr(model, "config", None)
    ids = torch.randint(6, 50, (2, 8), generator=draw)
    ids[:, -1] = 2
    pictures = ids.clone()
    pictures[:, :4] = 5                                             # where four image tokens go

    def noise(*shape):
        return torch.randn(shape, generator=draw)
    special = {
        "vilt": lambda: dict(input_ids=ids, pixel_values=noise(2, 3, 32, 32)),
        "time-series-transformer": lambda: dict(
            past_values=noise(2, 10), past_time_features=noise(2, 10, 1), past_observed_mask=torch.ones(2, 10),
            future_values=noise(2, 4), future_time_features=noise(2, 4, 1)),
        "patchtst": lambda: dict(past_values=noise(2, 16, 2)),
        "patchtsmixer": lambda: dict(past_values=noise(2, 16, 2)),
        "unet2d-condition": lambda: dict(sample=noise(2, 4, 8, 8), timestep=torch.tensor(3),
            encoder_hidden_states=noise(2, 5, 16)),
        "dit": lambda: dict(hidden_states=noise(2, 4, 8, 8), timestep=torch.tensor([3, 3]), class_labels=torch.tensor([1, 2])),
        "hand-written": lambda: dict(ids=ids),
        "hand-blocks": lambda: dict(x=noise(2, 5, 8)),
        "nn.TransformerEncoder": lambda: dict(src=noise(2, 5, 32)),
        "nn.Transformer": lambda: dict(src=noise(2, 5, 32), tgt=noise(2, 4, 32)),
        "qwen2-vl": lambda: dict(input_ids=torch.cat([torch.tensor([[3, 5, 5, 5, 5]]), ids[:1]], 1),
                                 pixel_values=noise(16, 3 * 2 * 4 * 4), image_grid_thw=torch.tensor([[1, 4, 4]]),
                                 mm_token_type_ids=torch.tensor([[0, 1, 1, 1, 1] + [0] * 8])),
        "ast": lambda: dict(input_values=noise(2, 16, 8)),
        "clap": lambda: dict(input_ids=ids, input_features=noise(2, 1, 64, 16), is_longer=torch.zeros(2, 1, dtype=torch.bool)),
        "whisper": lambda: dict(input_features=noise(2, 8, 64), decoder_input_ids=ids),
        "videomae": lambda: dict(pixel_values=noise(2, 4, 3, 16, 16)),
        "llava": lambda: dict(input_ids=pictures, pixel_values=noise(2, 3, 32, 32)),
        "paligemma": lambda: dict(input_ids=pictures, pixel_values=noise(2, 3, 32, 32), token_type_ids=torch.zeros_like(ids)),
        "blip2": lambda: dict(input_ids=pictures, pixel_values=noise(2, 3, 32, 32)),
        "idefics3": lambda: dict(input_ids=pictures[:, 3:], pixel_values=noise(2, 1, 3, 32, 32)),
        "idefics": lambda: dict(input_ids=ids, pixel_values=noise(2, 1, 3, 32, 32),
                                image_attention_mask=torch.ones(2, 8, 1, dtype=torch.long)),
        "blip-vqa": lambda: dict(input_ids=ids, pixel_values=noise(2, 3, 32, 32), decoder_input_ids=ids)}
    if name in special:
        return special[name]()
    if name.startswith(("timm", "torchvision")):
        size = {"timm-vit-reg": 28, "timm-eva02": 28, "timm-vit": 32, "timm-swin": 32, "timm-beit": 32}.get(name, 64)
        return dict(x=noise(2, 3, size, size))
    if "input_values" in takes:
        return dict(input_values=noise(2, 400))
    given = {}
    if "pixel_values" in takes:
        owner = next((c for k in ("vision_config", "image_config") if (c := getattr(config, k, None)) is not None), config)
        size = getattr(owner, "image_size", 64) if name not in ("convnext", "resnet", "regnet", "segformer", "mobilevit") else 64
        size = size if isinstance(size, int) else size[0]
        given["pixel_values"] = noise(2, 3, size, size)
    if "input_ids" in takes:
        given["input_ids"] = ids
    if "decoder_input_ids" in takes:
        given["decoder_input_ids"] = ids
    return given


# ---- the page docs/sites.md
COLUMNS = {
    "embedding": r"^embed\.(token|position|type|patch|cls|register|conv|proj|relative|mask|dist)", "attention": r"^attn\.(\w+)$",
    "cross": r"^cross\.(\w+)$", "MLP": r"^mlp\.(up|gate|down|shared)", "experts": r"^mlp\.(expert|router)",
    "mixer": r"^(?:ssm|mix)\.(\w+)$",
    "convolution": r"^(conv|se)\.", "after": r"^(pool|final\.norm|head)"}


def table():
    """docs/sites.md: architecture x roles found."""
    from luthier.site import sites
    lines = ["# Sites in every architecture", "",
             f"Generated by `python tests/architectures.py` from {len(TABLE)} tiny randomly initialised architectures, each held",
             "by `tests/test_sites.py` to the roles its paper describes, to every parameter being in exactly one site, to exact",
             "reading and writing. A name is `[tower.]block.i.role`; `luthier sites MODEL` lists them for your model.", "",
             "|architecture|towers (blocks)|" + "|".join(COLUMNS) + "|", "|" + "-|" * (len(COLUMNS) + 2)]
    for name in TABLE:
        found = sites(built(name))
        cells = [", ".join(f"{s.name or 'one'} ({s.n_blocks})" for s in found.stacks)]
        for pattern in COLUMNS.values():
            hits = [m[1] for s in found if s.kind == "weight" and (m := re.search(pattern, s.role))]
            cells.append(" ".join(dict.fromkeys(hits)))
        lines.append(f"|{name}|" + "|".join(cells) + "|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    pathlib.Path(__file__).parent.parent.joinpath("docs", "sites.md").write_text(table())
