"""Other libraries' networks for tools/symmetry_table.py: built without weights, with example inputs."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, Any]

_declared: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Import torchvision, or its Python files alone where tools/install_torchvision.sh found no build for this torch:
    no network here uses its compiled operations, but its import asks for two to be declared.

    Raises:
        ModuleNotFoundError: neither is there.
    """
    try:
        import torchvision
    except (ModuleNotFoundError, RuntimeError):  # not there, or of another build than torch
        if not _declared:
            sys.path.append(str(Path(sys.prefix) / "share" / "torchvision"))
            _declared.append(torch.library.Library("torchvision", "DEF"))  # what it declares goes with it
            for name in ("nms", "qnms"):
                _declared[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision  # noqa: F401


def _torchvision(name: str, size: int, **options: Any) -> Made:
    import_torchvision()
    import torchvision

    return torchvision.models.get_model(name, weights=None, **options), (torch.zeros(2, 3, size, size),)


def _video(name: str, frames: int, size: int) -> Made:
    import_torchvision()
    import torchvision

    return torchvision.models.get_model(name, weights=None), (torch.zeros(2, 3, frames, size, size),)


def _timm(name: str, size: int, **options: Any) -> Made:
    import_torchvision()
    import timm

    return timm.create_model(name, pretrained=False, **options), (torch.zeros(2, 3, size, size),)


def _transformers(kind: str, head: str, inputs: dict[str, Any] | None = None, **config: Any) -> Made:
    """A model of this kind of configuration, on two sentences of 8 tokens or on `inputs`."""
    import_torchvision()
    import transformers

    model = getattr(transformers, head)(getattr(transformers, f"{kind}Config")(**config))
    if kind == "Mixtral":  # its own kernel for experts is no operation of torch
        model.set_experts_implementation("batched_mm")
    # The cache of keys and values would be an output, whose heads may not move.
    return model, inputs or {"input_ids": _TOKENS, "use_cache": False}


_TOKENS = torch.zeros(2, 8, dtype=torch.long)
_TEXT = {"input_ids": _TOKENS}
_PAIR = {"input_ids": _TOKENS, "decoder_input_ids": _TOKENS[:, :5], "use_cache": False}
_PICTURE = {"pixel_values": torch.zeros(2, 3, 32, 32)}
_WORDS = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
_LANGUAGE = {**_WORDS, "pad_token_id": 1}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 16}
_LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
_BERT = {**_LANGUAGE, **_LLAMA, "max_position_embeddings": 16}
_VIT = {**_LLAMA, "image_size": 32, "patch_size": 8}
_BART = {
    **_LANGUAGE,
    **{
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in {"layers": 2, "attention_heads": 4}.items()
    },
    **{"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32},
    "decoder_start_token_id": 0,
}

_64 = (
    "resnet18 resnet50 vgg16_bn densenet121 mobilenet_v3_small convnext_tiny resnext50_32x4d regnet_y_400mf "
    "efficientnet_b0 swin_t squeezenet1_1 shufflenet_v2_x0_5 mnasnet0_5 swin_v2_t efficientnet_v2_s"
)
_SEGMENTATION = "deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large"
_TIMM_64 = (
    "resnet50 convnext_nano convmixer_768_32 skresnet18 ghostnet_050 hrnet_w18_small dla46_c edgenext_xx_small "
    "res2net50_14w_8s resnest14d tresnet_m eca_nfnet_l0 poolformer_s12 mixnet_s rexnet_100 darknet17 cspresnet50 "
    "vovnet39a dpn48b xception41 inception_next_atto starnet_s1 lcnet_035 hgnetv2_b0 efficientvit_b0 repvgg_a0 "
    "fastvit_t8 gcresnet33ts selecsls42 resnetv2_18 legacy_seresnet18 lambda_resnet26t mobilevit_xxs mobilevitv2_050"
)
_TIMM_224 = (
    "vit_tiny_patch16_224 mixer_s16_224 xcit_nano_12_p16_224 beit_base_patch16_224 cait_xxs24_224 coat_lite_tiny "
    "pit_ti_224 levit_128s resmlp_12_224 gmlp_ti16_224 volo_d1_224 efficientformer_l1 pvt_v2_b0 twins_svt_small "
    "tnt_s_patch16_224 visformer_tiny convit_tiny davit_tiny nest_tiny mvitv2_tiny focalnet_tiny_srf "
    "tiny_vit_5m_224 deit3_small_patch16_224 gcvit_xxtiny vit_relpos_small_patch16_224 mambaout_femto"
)
_TIMM: dict[str, int] = {
    **dict.fromkeys(_TIMM_64.split(), 64),
    **dict.fromkeys(_TIMM_224.split(), 224),
    **dict.fromkeys(("botnet26t_256", "halonet26t"), 256),
    "crossvit_9_240": 240,
}
_OF_LLAMA = partial(_transformers, "Llama", "LlamaForCausalLM", **_WORDS, **_LLAMA)
NETWORKS: dict[str, partial[Made]] = {
    **{name: partial(_torchvision, name, 64) for name in _64.split()},
    **{name: partial(_torchvision, name, 224) for name in ("vit_b_16", "maxvit_t")},
    **{name: partial(_torchvision, name, 64, weights_backbone=None) for name in _SEGMENTATION.split()},
    "googlenet": partial(_torchvision, "googlenet", 64, init_weights=False),
    "inception_v3": partial(_torchvision, "inception_v3", 96, init_weights=False),
    "r3d_18": partial(_video, "r3d_18", 8, 32),
    "s3d": partial(_video, "s3d", 16, 224),
    "mvit_v2_s": partial(_video, "mvit_v2_s", 16, 224),
    **{f"timm.{name}": partial(_timm, name, size) for name, size in _TIMM.items()},
    "gpt2": partial(_transformers, "GPT2", "GPT2LMHeadModel", **_WORDS, **_GPT2),
    "llama": partial(_OF_LLAMA, num_key_value_heads=4),
    "llama-grouped": partial(_OF_LLAMA, num_key_value_heads=2),
    "bert": partial(_transformers, "Bert", "BertForMaskedLM", _TEXT, **_BERT),
    "roberta": partial(_transformers, "Roberta", "RobertaForMaskedLM", _TEXT, **_BERT),
    "distilbert": partial(
        _transformers,
        "DistilBert",
        "DistilBertForMaskedLM",
        _TEXT,
        **_LANGUAGE,
        **{"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2, "max_position_embeddings": 16},
    ),
    "albert": partial(_transformers, "Albert", "AlbertForMaskedLM", _TEXT, embedding_size=16, **_BERT),
    "electra": partial(_transformers, "Electra", "ElectraForMaskedLM", _TEXT, embedding_size=16, **_BERT),
    "deberta": partial(
        _transformers,
        "DebertaV2",
        "DebertaV2ForMaskedLM",
        _TEXT,
        **_BERT,
        **{"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    ),
    "t5": partial(
        _transformers,
        "T5",
        "T5ForConditionalGeneration",
        _PAIR,
        **_LANGUAGE,
        **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bart": partial(_transformers, "Bart", "BartForConditionalGeneration", _PAIR, **_BART),
    "clip": partial(
        _transformers,
        "CLIP",
        "CLIPModel",
        {**_TEXT, **_PICTURE},
        text_config=_BERT,
        vision_config=_VIT,
        projection_dim=24,
    ),
    "gpt-neox": partial(_transformers, "GPTNeoX", "GPTNeoXForCausalLM", **_BERT),
    "bloom": partial(_transformers, "Bloom", "BloomForCausalLM", **_WORDS, hidden_size=32, n_layer=2, n_head=4),
    "phi": partial(_transformers, "Phi", "PhiForCausalLM", **_BERT),
    "opt": partial(
        _transformers,
        "OPT",
        "OPTForCausalLM",
        **_LANGUAGE,
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48},
        **{"max_position_embeddings": 16, "word_embed_proj_dim": 32},
    ),
    "gptj": partial(_transformers, "GPTJ", "GPTJForCausalLM", **_WORDS, **_GPT2, rotary_dim=4),
    "gpt-neo": partial(
        _transformers,
        "GPTNeo",
        "GPTNeoForCausalLM",
        **_WORDS,
        **{"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        max_position_embeddings=16,
    ),
    "falcon": partial(
        _transformers,
        "Falcon",
        "FalconForCausalLM",
        **_WORDS,
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    **{
        name: partial(_transformers, kind, f"{kind}ForCausalLM", **_BERT, num_key_value_heads=2, **more)
        for name, kind, more in (
            ("mistral", "Mistral", {}),
            ("qwen2", "Qwen2", {}),
            ("qwen3", "Qwen3", {"head_dim": 8}),
            ("gemma", "Gemma", {"head_dim": 8}),
            ("gemma2", "Gemma2", {"head_dim": 8}),
            ("mixtral", "Mixtral", {"num_local_experts": 3}),
            ("olmo2", "Olmo2", {}),
            ("starcoder2", "Starcoder2", {}),
        )
    },
    "mamba": partial(
        _transformers, "Mamba", "MambaForCausalLM", **_LANGUAGE, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
    "vit": partial(_transformers, "ViT", "ViTForImageClassification", _PICTURE, **_VIT),
    "deit": partial(_transformers, "DeiT", "DeiTForImageClassification", _PICTURE, **_VIT),
    "dinov2": partial(_transformers, "Dinov2", "Dinov2ForImageClassification", _PICTURE, **_VIT),
    "beit": partial(_transformers, "Beit", "BeitForImageClassification", _PICTURE, **_VIT),
    "segformer": partial(
        _transformers,
        "Segformer",
        "SegformerForSemanticSegmentation",
        {"pixel_values": torch.zeros(2, 3, 64, 64)},
        **{"hidden_sizes": [16, 32, 40, 64], "depths": [1] * 4, "num_attention_heads": [1, 2, 5, 8]},
        decoder_hidden_size=24,
    ),
    "swin": partial(
        _transformers,
        "Swin",
        "SwinForImageClassification",
        {"pixel_values": torch.zeros(2, 3, 64, 64)},
        **{"image_size": 64, "patch_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "convnextv2": partial(
        _transformers,
        "ConvNextV2",
        "ConvNextV2ForImageClassification",
        {"pixel_values": torch.zeros(2, 3, 64, 64)},
        **{"hidden_sizes": [12, 24, 32, 40], "depths": [1, 1, 2, 1]},
    ),
    "whisper": partial(
        _transformers,
        "Whisper",
        "WhisperForConditionalGeneration",
        {
            "input_features": torch.zeros(2, 16, 32),
            "decoder_input_ids": _TOKENS[:, :5],
            "use_cache": False,
        },
        **{**_BART, "vocab_size": 60, "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 16},
    ),
    "wav2vec2": partial(
        _transformers,
        "Wav2Vec2",
        "Wav2Vec2ForCTC",
        {"input_values": torch.zeros(2, 800)},
        **{**_LANGUAGE, **_LLAMA, "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 2)},
        **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    ),
}
"""How to make each network, with its example inputs; the function's name says whose it is."""
