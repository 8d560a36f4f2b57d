# SPDX-License-Identifier: MIT
"""Hugging Face's image classifiers, from a folder or the hub. Code that lies there is never run, and nothing unpickled.

``transformers`` is imported when the first of them is built: it is optional, and takes seconds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import nn

from salve.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from salve.types import UserError
from salve.untrusted import check_safetensors, reason, some

#: Entries of a network's configuration that say what it is, and not how it is built.
FIXED = ("architectures", "auto_map", "id2label", "label2id", "model_type", "num_labels", "quantization_config")
#: How PIL numbers the interpolation that a preprocessor names.
BICUBIC = 3


def build(name: str, classes: int | None, args: Mapping[str, Any]) -> nn.Module:
    """An image classifier with random weights.

    Args:
        name: a folder with a ``config.json``, or a name on the hub. classes: outputs; None for those that it names.
        args: entries of its configuration to change.

    Raises:
        UserError: transformers is missing, or there is no such image classifier.
    """
    transformers, config = _configuration(name, classes, args)
    with _refusing(name):
        model: nn.Module = transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    return model


def pretrained(name: str, args: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
    """An image classifier with the weights that lie beside its configuration, and the names of those that do not.

    Raises:
        UserError: see :func:`build`; or there are no weights as safetensors, or they do not fit.
    """
    transformers, config = _configuration(name, None, args)
    for file in sorted(Path(name).glob("*.safetensors")):
        check_safetensors(file, "")
    with _refusing(name):
        model, found = transformers.AutoModelForImageClassification.from_pretrained(
            name,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    if found["mismatched_keys"]:
        raise UserError(
            f"The weights of {name} have another shape for {some(sorted(key for key, *_ in found['mismatched_keys']))} "
            "than its configuration; check backbone.args."
        )
    return model.float(), sorted(found["missing_keys"])


def configuration(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The network's configuration as plain values, without what does not change what it computes."""
    config: dict[str, Any] = _configuration(name, None, args)[1].to_dict()
    return {key: value for key, value in config.items() if key not in (*FIXED, "_name_or_path", "transformers_version")}


def preprocess_of(name: str) -> tuple[Preprocess | None, str]:
    """The preprocessing in a network's ``preprocessor_config.json``, None if there is none; and a remark."""
    transformers = _library()
    try:
        found, _ = transformers.image_processing_utils.BaseImageProcessor.get_image_processor_dict(name)
    except (OSError, ValueError):
        return None, ""
    return read_preprocess(found)


def read_preprocess(found: Mapping[str, Any]) -> tuple[Preprocess | None, str]:
    """Read a ``preprocessor_config.json``.

    Returns:
        The preprocessing, None if it names no size; and what differs from it, in a part of a sentence, or "".
    """
    side, squashes = _side(found.get("size"))
    if side is None:
        return None, ""
    remark = ""
    crop, _ = _side(found.get("crop_size")) if found.get("do_center_crop") else (None, True)
    if crop is not None:
        size, resize = crop, side
        if squashes and isinstance(found.get("size"), Mapping):
            remark = (
                f", whose processor squashes to {side} × {side} before the crop, where here images keep their shape"
            )
    elif squashes or ("crop_pct" in found and side >= 384):  # as ConvNeXt's processor has it
        size, resize = side, None
    else:
        size, resize = side, int(side / found.get("crop_pct", 1))
    # Pixels are counted from 0 to 1 here, and there from 0 to 255 times a factor.
    scale = 255 * float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 255.0
    shift = 1.0 if found.get("rescale_offset") else 0.0
    mean, std = [0.0] * 3, [1.0] * 3
    if found.get("do_normalize", True):
        mean = list(found.get("image_mean") or IMAGENET_MEAN)
        std = list(found.get("image_std") or IMAGENET_STD)
        if found.get("include_top"):  # EfficientNet's divides twice
            std = [one * one for one in std]
    red, green, blue = ((shift + one) / scale for one in mean)
    spread = [one / scale for one in std]
    interpolation: Literal["bilinear", "bicubic"] = "bicubic" if found.get("resample") == BICUBIC else "bilinear"
    chosen = Preprocess(size, resize, interpolation, (red, green, blue), (spread[0], spread[1], spread[2]))
    return chosen, remark


def _side(size: Any) -> tuple[int | None, bool]:
    """Pixels of a side, None if they are not given; and whether both sides are resized to it."""
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), False
        return (
            (int(size["height"]), True) if size.get("height") and size["height"] == size.get("width") else (None, True)
        )
    return (size, True) if isinstance(size, int) else (None, True)


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"backbone.library=transformers needs the package transformers ({reason(error)}): pip install "
            "'salve[transformers]'."
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _configuration(name: str, classes: int | None, args: Mapping[str, Any]) -> tuple[Any, Any]:
    """The library, and the network's configuration."""
    transformers = _library()
    with _refusing(name):
        known = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    if unknown := [key for key in args if key not in known or key.startswith("_") or key in FIXED]:
        usable = sorted(key for key in known if not key.startswith("_") and key not in FIXED)
        raise UserError(
            f"backbone.args.{unknown[0]} is no entry of the configuration of {name}; its entries are "
            f"{some(usable, 60)}."
        )
    labels = {} if classes is None else {"num_labels": classes}
    with _refusing(name):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **args, **labels)
    config.architectures = config.architectures or []
    return transformers, config


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn what transformers raises, which may be anything, into a sentence."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"backbone.name={name} could not be loaded as an image classifier of transformers ({reason(error)}); it "
            "must be a folder with a config.json, or a name on the hub (USER/MODEL)."
        ) from error
