"""Load the processor that ships with a checkpoint, with or without torchvision.

transformers builds VLM processors with a video processor, which needs torchvision. Images and text do not: without
torchvision the same processor class is built with its image processor and tokenizer only. Both give the same pixel
values and token ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import cached_file, is_torchvision_available

from tlq.models.checkpoint import load_config, processor_files
from tlq.models.stored import read_json

#: Processors whose constructors read their video processor -> the packages that they need.
NEEDS_VIDEO = {
    "SmolVLMProcessor": "torchvision and num2words",
    "MiniCPMV4_6Processor": "torchvision",
    "MiniCPMV4_7Processor": "torchvision",
}

#: Files in which a checkpoint may name the class of its processor, in transformers' order.
_CLASS_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load_processor(checkpoint: str | Path, **image_kwargs: Any) -> Any:
    """The processor of ``checkpoint`` (a directory or a hub id).

    ``image_kwargs`` go to the image processor (``min_pixels`` and ``max_pixels``, for instance).

    Raises:
        ValueError: the checkpoint's model type has no processor class in transformers, or its files are damaged.
        ImportError: its processor cannot be built without torchvision.
    """
    cls = AutoProcessor if is_torchvision_available() else image_only_class(checkpoint)
    try:
        processor = cls.from_pretrained(checkpoint, trust_remote_code=False, **image_kwargs)
    except Exception as error:  # tokenizers raises Exception itself for a damaged file
        if not Path(checkpoint).is_dir() or isinstance(error, ImportError):
            raise
        for file in processor_files(Path(checkpoint)):
            if file.suffix == ".json":
                read_json(file)  # names the file that is damaged
        raise ValueError(
            f"{checkpoint}: transformers cannot build its processor ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); download its tokenizer and processor files again"
        ) from error
    if getattr(processor, "chat_template", None) is None:  # older checkpoints keep it in tokenizer_config.json
        processor.chat_template = processor.tokenizer.chat_template
    return processor


def image_only_class(checkpoint: str | Path) -> Any:
    """A subclass of the checkpoint's processor class that has no video processor.

    Raises:
        ValueError: transformers has no processor for the checkpoint.
        ImportError: the processor handles images with torchvision.
    """
    model_type = load_config(checkpoint).model_type
    name = _stated_class(checkpoint) or PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise ValueError(
            f"{checkpoint}: transformers has no processor for model type {model_type!r}; "
            "give a vision-language checkpoint, `tlq families` lists the supported ones"
        )
    base = getattr(transformers, name)
    needed = NEEDS_VIDEO.get(name) or ("torchvision" if _needs_torchvision(base, model_type) else None)
    if needed:
        raise ImportError(
            f"{checkpoint}: the processor of {model_type} needs {needed} even for images; install it with "
            f"`pip install {needed.replace(' and', '')}`"
        )
    parts = base.get_attributes()
    place = parts.index("video_processor") if "video_processor" in parts else None

    class ImageOnly(base):  # type: ignore[misc, valid-type]
        _loaded_parts = [part for part in parts if part != "video_processor"]

        @classmethod
        def get_attributes(cls) -> list[str]:
            return cls._loaded_parts

        @classmethod
        def from_args_and_dict(cls, args: list[Any], *more: Any, **named: Any) -> Any:
            """Give the constructor None in the place of its video processor."""
            if place is not None:
                args, cls._loaded_parts = list(args), parts
                args.insert(place, None)
            return super().from_args_and_dict(args, *more, **named)

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    ImageOnly.__name__ = ImageOnly.__qualname__ = name
    return ImageOnly


def _stated_class(checkpoint: str | Path) -> str | None:
    """The processor class that the checkpoint's files name (GLM-OCR has no other), if transformers has it."""
    for name in _CLASS_FILES:
        file = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
        stated = read_json(Path(file)).get("processor_class") if file else None
        if isinstance(stated, str) and stated.endswith("Processor") and hasattr(transformers, stated):
            return stated
    return None


def _needs_torchvision(processor: Any, model_type: str) -> bool:
    """Whether transformers has the processor, or the family's image processor, with torchvision only."""
    backends = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type)
    return "torchvision" in getattr(processor, "_backends", ()) or (backends is not None and "pil" not in backends)
