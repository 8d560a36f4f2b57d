"""Very small networks of many families: how each is built, and the pixels of its images, by the family's name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision import models as tv

from salve.timm_alone import timm

# Modules of this package hold functions and classes that it does not export.
tm: Any = timm.models

#: Of a vision transformer, of a network with two stages, and of one with four.
_TOKENS = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
_TWO = {"depths": (1, 1), "dims": (8, 16)}
_FOUR = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 16)}


def _regnet(**settings: Any) -> nn.Module:
    stages = tv.regnet.BlockParams.from_init_params(4, 8, 8.0, 2.0, 4, se_ratio=0.25)
    return tv.RegNet(stages, stem_width=8, **settings)


def _mobilenet_v3(**settings: Any) -> nn.Module:
    block = tv.mobilenetv3.InvertedResidualConfig(8, 3, 16, 8, True, "HS", 2, 1, 1.0)
    return tv.MobileNetV3([block], 16, **settings)


def _group_norm(*args: Any, **settings: Any) -> nn.Module:
    norm: nn.Module = timm.layers.GroupNormAct(*args, num_groups=4, **settings)
    return norm


#: Each takes the number of classes as ``num_classes``.
NETWORKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "beit": (partial(tm.beit.Beit, **_TOKENS, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1), 32),
    "byobnet": (partial(timm.create_model, "test_byobnet"), 32),
    "cait": (partial(tm.cait.Cait, **_TOKENS, depth_token_only=1), 32),
    "convmixer": (partial(tm.convmixer.ConvMixer, dim=16, depth=1), 32),
    "convnext": (partial(tm.convnext.ConvNeXt, depths=(1, 1, 1, 1), dims=(8, 8, 8, 16)), 32),
    "densenet": (partial(tv.DenseNet, growth_rate=4, block_config=(2, 2), num_init_features=8), 32),
    "edgenext": (
        partial(
            tm.edgenext.EdgeNeXt,
            dims=(8, 8, 16, 16),
            depths=(1, 1, 1, 1),
            global_block_counts=(0, 0, 0, 1),
            heads=(2, 2, 2, 2),
        ),
        32,
    ),
    "efficientnet": (partial(timm.create_model, "test_efficientnet"), 32),
    "efficientvit": (
        partial(
            tm.efficientvit_msra.EfficientVitMsra,
            img_size=32,
            embed_dim=(16,),
            key_dim=(4,),
            depth=(1,),
            num_heads=(2,),
            window_size=(2,),
            down_ops=(("", 1),),
        ),
        32,
    ),
    "eva": (partial(tm.eva.Eva, **_TOKENS, swiglu_mlp=True, use_rot_pos_emb=True), 32),
    "fasternet": (partial(tm.fasternet.FasterNet, embed_dim=8, depths=(1, 1), feature_dim=16), 32),
    "fastvit": (
        partial(
            tm.fastvit.FastVit,
            layers=(1, 1),
            embed_dims=(8, 16),
            token_mixers=("repmixer", "repmixer"),
            mlp_ratios=(2, 2),
            pos_embs=(None, None),
            downsamples=(False, True),
            se_downsamples=(False, False),
        ),
        32,
    ),
    "focalnet": (partial(tm.focalnet.FocalNet, embed_dim=8, depths=(1, 1)), 32),
    "gmlp": (
        partial(
            tm.mlp_mixer.MlpMixer,
            img_size=32,
            num_blocks=1,
            embed_dim=16,
            mlp_ratio=2,
            block_layer=tm.mlp_mixer.SpatialGatingBlock,
            mlp_layer=timm.layers.GatedMlp,
        ),
        32,
    ),
    "inception_next": (partial(tm.inception_next.MetaNeXt, **_TWO), 32),
    "mambaout": (partial(tm.mambaout.MambaOut, **_TWO), 32),
    "metaformer": (partial(tm.metaformer.MetaFormer, **_TWO), 32),
    "mixer": (partial(tm.mlp_mixer.MlpMixer, img_size=32, num_blocks=1, embed_dim=16), 32),
    "mobilenet_v2": (
        partial(tv.MobileNetV2, width_mult=0.25, inverted_residual_setting=[[1, 8, 1, 1], [2, 16, 2, 2]]),
        32,
    ),
    "mobilenet_v3": (_mobilenet_v3, 32),
    "nfnet": (
        partial(
            tm.nfnet.NormFreeNet,
            tm.nfnet.NfCfg(depths=(1, 1), channels=(16, 32), stem_chs=8, attn_layer="se", attn_kwargs={}),
        ),
        32,
    ),
    "pit": (
        partial(tm.pit.PoolingVisionTransformer, img_size=32, base_dims=(8, 8), depth=(1, 1), heads=(1, 2)),
        32,
    ),
    "pvt_v2": (
        partial(
            tm.pvt_v2.PyramidVisionTransformerV2,
            depths=(1, 1),
            embed_dims=(8, 16),
            num_heads=(1, 2),
            sr_ratios=(2, 1),
            mlp_ratios=(2, 2),
        ),
        32,
    ),
    "rdnet": (
        partial(
            tm.rdnet.RDNet,
            growth_rates=(8, 8),
            num_blocks_list=(1, 1),
            block_type=("Block", "BlockESE"),
            is_downsample_block=(None, True),
            num_init_features=8,
        ),
        32,
    ),
    "regnet": (_regnet, 32),
    "repvit": (partial(tm.repvit.RepVit, embed_dim=(8, 16), depth=(1, 1)), 32),
    "resmlp": (
        partial(
            tm.mlp_mixer.MlpMixer,
            img_size=32,
            num_blocks=1,
            embed_dim=16,
            mlp_ratio=4,
            block_layer=tm.mlp_mixer.ResBlock,
            norm_layer=tm.mlp_mixer.Affine,
        ),
        32,
    ),
    "resnet": (partial(tv.ResNet, tv.resnet.BasicBlock, [1, 1, 1, 1]), 32),
    "resnetv2": (
        partial(tm.resnetv2.ResNetV2, layers=(1, 1), channels=(16, 32), stem_chs=8, norm_layer=_group_norm),
        32,
    ),
    "resnext": (partial(tv.ResNet, tv.resnet.Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=4), 32),
    "senet": (partial(tm.senet.SENet, tm.senet.SEResNetBlock, (1, 1, 1, 1), groups=1, reduction=4), 32),
    "shufflenet_v2": (partial(tv.ShuffleNetV2, [1, 1, 1], [8, 16, 16, 16, 16]), 32),
    "shvit": (
        partial(
            tm.shvit.SHViT,
            embed_dim=(16, 16, 16),
            partial_dim=(8, 8, 8),
            qk_dim=(4, 4, 4),
            depth=(1, 1, 1),
        ),
        64,
    ),
    "sknet": (
        partial(tm.resnet.ResNet, tm.sknet.SelectiveKernelBasic, **_FOUR),
        32,
    ),
    "squeezenet": (partial(tv.SqueezeNet, "1_1"), 32),
    "starnet": (partial(tm.starnet.StarNet, base_dim=8, depths=[1, 1]), 32),
    "swiftformer": (
        partial(tm.swiftformer.SwiftFormer, layers=[1, 1], embed_dims=[8, 16], downsamples=[False, True]),
        32,
    ),
    "swin": (partial(tv.SwinTransformer, [4, 4], 8, [1, 1], [2, 2], [4, 4]), 32),
    "swin_v2": (
        partial(
            tm.swin_transformer_v2.SwinTransformerV2,
            img_size=32,
            embed_dim=8,
            depths=(2,),
            num_heads=(2,),
            window_size=4,
        ),
        32,
    ),
    "tiny_vit": (
        partial(
            tm.tiny_vit.TinyVit,
            embed_dims=(8, 16),
            depths=(1, 1),
            num_heads=(1, 2),
            window_sizes=(4, 4),
        ),
        32,
    ),
    "tresnet": (partial(tm.tresnet.TResNet, layers=(1, 1, 1, 1), width_factor=0.25), 64),
    "vit": (partial(tv.VisionTransformer, 32, 8, 1, 2, 16, 32), 32),
    "vit_relpos": (partial(tm.vision_transformer_relpos.VisionTransformerRelPos, **_TOKENS), 32),
    "xception": (
        partial(
            tm.xception_aligned.XceptionAligned,
            [
                {"in_chs": 64, "out_chs": 32, "stride": 2},
                {"in_chs": 32, "out_chs": (32, 16, 16), "stride": 1, "no_skip": True, "start_with_relu": False},
            ],
        ),
        32,
    ),
}
