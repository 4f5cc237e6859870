"""Tiny random models of the true classes that describe images, written to folders as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

SIDE, PATCH = 16, 8
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "a", "cat", "dog", "on", "red", "house", "USER", "ASSISTANT", ":")
SPECIAL = [0, 1, 2, 3, 4]  # the numbers of those in <>
VISION: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SQUARE = {"height": SIDE, "width": SIDE}


IMAGE = {"image_token": "<image>"}


def tokenizer(**special: str) -> Any:
    words = [*WORDS, *special.values()]
    words += [f"word{number}" for number in range(24 - len(words))]
    held = Tokenizer(models.WordLevel({word: number for number, word in enumerate(dict.fromkeys(words))}, "<unk>"))
    held.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=held, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=special,
    )  # fmt: skip


def write_blip2(folder: Path) -> Path:
    torch.manual_seed(1)
    qformer = {key: TEXT[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=qformer | {"intermediate_size": 16, "encoder_hidden_size": 16},
        text_config={
            "model_type": "opt", "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        num_query_tokens=3, image_token_index=4,
    )  # fmt: skip
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(folder)
    images = transformers.BlipImageProcessor(size=SQUARE)
    transformers.Blip2Processor(images, tokenizer(), num_query_tokens=3).save_pretrained(folder)
    return folder


def write_llava(folder: Path, template: str | None = None) -> Path:
    torch.manual_seed(2)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=4, image_token_id=4, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config.suppress_tokens = SPECIAL
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size=SQUARE, crop_size=SQUARE)
    transformers.LlavaProcessor(
        images, tokenizer(**IMAGE), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_joycaption(folder: Path) -> Path:
    """JoyCaption is a Llava with a chat template."""
    return write_llava(folder, "{% for m in messages %}<image> {{ m.content[1].text }} ASSISTANT :{% endfor %}")


def write_florence2(folder: Path) -> Path:
    torch.manual_seed(3)
    config = transformers.Florence2Config(
        text_config={
            "model_type": "bart", "vocab_size": 24, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
            "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 2, "forced_eos_token_id": 2,
        },
        vision_config={
            "depths": [1, 1], "embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2], "patch_size": [7, 3],
            "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 2,
            "projection_dim": 16,
        },
        image_token_id=4,
    )  # fmt: skip
    model = transformers.Florence2ForConditionalGeneration(config)
    model.generation_config.forced_eos_token_id = None
    model.generation_config.suppress_tokens = SPECIAL  # else random weights end at once
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size=SQUARE, crop_size=SQUARE, do_center_crop=False)
    images.image_seq_length = 5
    rules = {"PARSE_TASKS": [{"TASK_NAME": "pure_text"}], "pure_text": {}}
    transformers.Florence2Processor(images, tokenizer(**IMAGE), post_processor_config=rules).save_pretrained(folder)
    return folder


VIDEOS = '{"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 4, "merge_size": 2}'
QWEN_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}"
    "<vision_start> <image> <vision_end>{% else %} {{ c.text }}{% endif %}{% endfor %}{% endfor %} ASSISTANT :"
)


def write_qwen2_vl(folder: Path) -> Path:
    torch.manual_seed(4)
    special = IMAGE | {
        "vision_bos_token": "<vision_start>",
        "vision_eos_token": "<vision_end>",
        "video_token": "<video>",
    }
    words = tokenizer(**special)
    ids = {name: words.convert_tokens_to_ids(text) for name, text in special.items()}
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={
            "depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 4, "mlp_ratio": 1,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=4, video_token_id=ids["video_token"], vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
    )  # fmt: skip
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    images = transformers.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 256}
    )
    images.save_pretrained(folder)
    words.chat_template = QWEN_TEMPLATE
    words.save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"processor_class": "Qwen2VLProcessor"}', encoding="utf-8")
    (folder / "video_preprocessor_config.json").write_text(VIDEOS, encoding="utf-8")
    return folder
