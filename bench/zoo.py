"""Architectures by name, with random weights, as small as their options allow; and inputs for them.

``torchvision/resnet18``, ``timm/resnet18`` or ``transformers/llama``: the last names a type of
configuration, of which a small one is made. Nothing is downloaded.
"""

import warnings
from collections.abc import Iterator

import torch
import torchvision
from torch import Tensor, nn

CLASSES, SAMPLES, TOKENS = 10, 4, 12
SIZES = (64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 384)  # pixels, least first
_TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3
    maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large regnet_x_400mf
    regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0
    squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_16 wide_resnet50_2"""
_TIMM = """beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_lite_tiny coat_tiny
    coatnet_pico_rw_224 convformer_s18 convit_tiny convmixer_768_32 convnext_atto
    convnext_zepto_rms convnextv2_atto crossvit_9_240 cs3darknet_s darknet17 davit_tiny
    deit3_small_patch16_224 deit_tiny_patch16_224 densenetblur121d dla46_c dla60_res2net
    dpn48b eca_halonext26ts eca_resnet33ts edgenext_xx_small efficientformer_l1
    efficientformerv2_s0 efficientnet_es efficientnet_lite0 efficientvim_m1 efficientvit_b0
    efficientvit_m0 ese_vovnet19b_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100
    focalnet_tiny_srf gcvit_xxtiny gernet_s ghostnet_050 ghostnetv2_100 gmixer_12_224
    gmlp_ti16_224 halonet_h1 hardcorenas_a hgnetv2_b0 hiera_tiny_224 hrnet_w18_small
    inception_next_atto inception_v4 lambda_resnet26t lcnet_050 legacy_seresnet18 levit_128s
    levit_conv_128s mambaout_femto maxvit_pico_rw_256 mixer_s32_224 mobilenetv1_100
    mobilenetv3_small_050 mobilenetv4_conv_small_035 mobileone_s0 mobilevit_xxs
    mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small nf_regnet_b0 nf_resnet26 pit_ti_224
    poolformer_s12 poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetv_040 regnetx_002 regnety_002
    repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_48w_2s resmlp_12_224 resnest14d resnet10t
    resnet18 resnet26d resnet50_gn resnetaa34d resnetblur50 resnetrs50 resnetv2_18
    resnetv2_50d_gn resnetv2_50x1_bit resnext26ts rexnet_100 selecsls42 semnasnet_050
    sequencer2d_s seresnext26t_32x4d shvit_s1 skresnet18 spnasnet_100 starnet_s050
    swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
    test_nfnet tf_efficientnet_b0 tf_mixnet_s tiny_vit_5m_224 tinynet_e
    tnt_s_legacy_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small visformer_tiny
    vit_base_patch16_siglip_gap_224 vit_base_patch32_clip_224 vit_betwixt_patch16_reg1_gap_256
    vit_relpos_small_patch16_224 vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2
    vit_srelpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224
    volo_d1_224 wide_resnet50_2 xception41 xcit_nano_12_p16_224"""
# Options of configurations that have one, and the value they get.
_SMALL = {
    "hidden_size d_model n_embd embedding_size emb_dim word_embed_proj_dim": 32,
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers": 2,
    "num_decoder_layers num_key_value_heads num_kv_heads eos_token_id": 2,
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads": 4,
    "decoder_attention_heads num_experts num_local_experts n_routed_experts": 4,
    "intermediate_size encoder_ffn_dim decoder_ffn_dim d_ff ffn_dim n_inner": 64,
    "ffn_hidden_size moe_intermediate_size max_position_embeddings n_positions": 64,
    "shared_expert_intermediate_size max_source_positions": 64,
    "d_kv head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim": 8,
    "q_lora_rank kv_lora_rank": 16,
    "num_experts_per_tok": 2,
    "vocab_size": 100,
    "pad_token_id": 0,
}
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}  # of several kinds in turn
SMALL = {option: value for options, value in _SMALL.items() for option in options.split()}


def names() -> list[str]:
    """All that is tried; of transformers whatever the installed version classifies with."""
    import timm  # noqa: F401  once here, rather than in each process made from this one

    found = [f"torchvision/{name}" for name in _TORCHVISION.split()] + [
        f"timm/{name}" for name in _TIMM.split()
    ]
    return found + [f"transformers/{kind}" for kind in _transformers()]


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode that returns logits, and inputs [samples, ...] for it.

    Raises
    ------
    ValueError
        It cannot be made with random weights, or runs on none of the inputs tried.
    """
    library, _, kind = name.partition("/")
    made = {"torchvision": _vision, "timm": _timm, "transformers": _transformer}[library](kind)
    failures: list[str] = []
    torch.manual_seed(1)  # of the inputs
    try:
        for make, inputs in made:
            torch.manual_seed(0)
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    network = make().eval()
                    _randomise(network)
                    logits = network(inputs)
                    logits = logits if isinstance(logits, Tensor) else logits.logits
                if logits.dim() == 2 and logits.isfinite().all():
                    return network, inputs
                failures.append(f"logits {tuple(logits.shape)}")
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")
    except Exception as error:
        failures.append(f"{type(error).__name__}: {error}")
    raise ValueError(failures[0].splitlines()[0] if failures else "no inputs to try")


def size(name: str) -> float:
    """Number of weights, told without making them; infinite where that fails."""
    library, _, kind = name.partition("/")
    made = {"torchvision": _vision, "timm": _timm, "transformers": _transformer}[library](kind)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make, _ = next(made)
            return sum(p.numel() for p in make().parameters())
    except Exception:  # as in build
        return float("inf")


def _randomise(network: nn.Module) -> None:
    """Statistics, gains and shifts as training would leave them: neither zero nor one."""
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    for p in network.parameters():
        if p.dim() < 2:
            p.add_(0.05 * torch.randn_like(p))
        elif p.abs().max() < 1e-3:
            p.normal_(0, 0.02)


def _images(size: int, channels: int = 3) -> Tensor:
    return torch.randn(SAMPLES, channels, size, size)


def _vision(kind: str) -> Iterator:
    options = {"init_weights": True} if kind in ("googlenet", "inception_v3") else {}
    make = getattr(torchvision.models, kind)
    for size in SIZES:
        fixed = {"image_size": size} if kind.startswith("vit") else {}
        fixed = {"input_size": (size, size)} if kind.startswith("maxvit") else fixed
        yield lambda o=options | fixed: make(num_classes=CLASSES, **o), _images(size)


def _timm(kind: str) -> Iterator:
    import timm

    config = timm.get_pretrained_cfg(kind)
    channels = config.input_size[0]
    for size in (*SIZES, config.input_size[-1]):
        if config.fixed_input_size and size != config.input_size[-1]:
            yield (
                lambda s=size: timm.create_model(kind, num_classes=CLASSES, img_size=s),
                _images(size, channels),
            )
        else:
            yield lambda: timm.create_model(kind, num_classes=CLASSES), _images(size, channels)


def _transformers() -> dict[str, str]:
    """Type of configuration -> class, text first."""
    from transformers.models.auto import modeling_auto as auto

    kinds: dict[str, str] = {}
    for task in ("SEQUENCE", "IMAGE", "AUDIO"):
        known = getattr(auto, f"MODEL_FOR_{task}_CLASSIFICATION_MAPPING_NAMES")
        for kind, cls in known.items():
            kinds.setdefault(kind, cls if isinstance(cls, str) else cls[0])
    kinds.pop("timm_wrapper", None)
    return kinds


def _transformer(kind: str) -> Iterator:
    import transformers

    known = transformers.CONFIG_MAPPING[kind]().to_dict()
    options = {option: value for option, value in SMALL.items() if option in known}
    options["num_labels"] = CLASSES
    if known.get("is_encoder_decoder"):
        options["decoder_start_token_id"] = 0
    if isinstance(known.get("depths"), (list, tuple)):
        options["depths"] = [1] * len(known["depths"])
    for nested in ("text_config", "vision_config"):
        if isinstance(known.get(nested), dict):
            options[nested] = {k: v for k, v in SMALL.items() if k in known[nested]}
    cls = getattr(transformers, _transformers()[kind])
    ids = torch.randint(3, 100, (SAMPLES, TOKENS))
    ids[:, -1] = 2  # the end of a sentence
    plain = {} if cls.main_input_name == "input_ids" else {"num_labels": CLASSES}
    more = options | {option: 4 for option in options if option in _LAYERS}
    for made in filter(None, (options, more, plain)):  # small text models: others have billions

        def make(made: dict = made) -> nn.Module:
            config = transformers.CONFIG_MAPPING[kind](**made)
            config._experts_implementation = "eager"  # the others have no float64
            return cls(config)

        if cls.main_input_name == "pixel_values":
            for size in SIZES:
                fixed = {"image_size": size} if "image_size" in known else {}
                yield (
                    lambda m=make, o=made | fixed: m(o),
                    _images(size, known.get("num_channels", 3)),
                )
        elif cls.main_input_name == "input_ids":
            yield make, ids
        else:
            bins, length = known.get("num_mel_bins", 80), known.get("max_length", 64)
            for shape in ((4000,), (64, 160), (length, bins), (bins, 128)):
                yield make, torch.randn(SAMPLES, *shape)
