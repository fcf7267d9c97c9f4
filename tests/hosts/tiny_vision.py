"""Random vision-language models of two layers over the ten digits, with processors that need PIL alone.

Their processors lay images out in different ways: Qwen2-VL puts the patches of all images into one row after another,
Idefics3 gives every prompt as many images as the largest has, LLaVA has one row per image.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

FAMILIES = ("qwen2_vl", "idefics3", "llava")
SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<image>")
SPECIAL += ("<fake_token_around_image>", "<end_of_utterance>")
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *SPECIAL, *"0123456789>"])}
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


class ImageProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor of images and text; the one of videos needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        for kind in ("image", "video"):
            token = f"<|{kind}_pad|>"
            setattr(self, f"{kind}_token", token)
            setattr(self, f"{kind}_token_id", VOCABULARY[token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL),
        padding_side="left",
    )


def processor(family: str) -> Any:
    if family == "qwen2_vl":
        template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        size = {"shortest_edge": 64, "longest_edge": 4096}
        images: Any = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
        return ImageProcessor(images, tokenizer(), chat_template=template)
    template = TEMPLATE.replace("IMAGE", "<image>")
    if family == "idefics3":
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": 16}, max_image_size={"longest_edge": 8}, do_image_splitting=True
        )
        return Idefics3Processor(images, tokenizer(), image_seq_len=1, chat_template=template)
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def model(family: str) -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    text: dict[str, Any] = {
        **size,
        "vocab_size": len(VOCABULARY),
        "intermediate_size": 32,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if family == "qwen2_vl":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        towers: Any = {
            "text_config": text | {"num_key_value_heads": 2, "rope_parameters": rope},
            "vision_config": {
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": 16,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
                "initializer_range": 0.2,
            },
        }
        names = {
            "image_token_id": 0,
            "video_token_id": 1,
            "vision_start_token_id": 2,
            "vision_end_token_id": 3,
        }
        ids = {name: VOCABULARY[SPECIAL[place]] for name, place in names.items()}
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**towers, **ids))
    vision = size | {"intermediate_size": 32, "image_size": 8, "patch_size": 4}
    image = VOCABULARY["<image>"]
    if family == "idefics3":
        return Idefics3ForConditionalGeneration(
            Idefics3Config(text_config=text, vision_config=vision, image_token_id=image, pad_token_id=0)
        )
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=image, image_seq_length=4)
    )
