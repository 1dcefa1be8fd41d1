"""Load the processor that ships with a checkpoint, with or without torchvision.

transformers builds VLM processors with a video processor, which needs torchvision. Images and text do not: without
torchvision the same processor class is built with its image processor and tokenizer only. Both give the same pixel
values and token ids.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from tlq.models.checkpoint import load_config, processor_files
from tlq.models.stored import read_json

#: Families whose processors handle images with torchvision or with their video processor -> the packages they need.
NEEDS_VIDEO = {
    "smolvlm": "torchvision and num2words",
    "minicpmv4_6": "torchvision",
    "minicpmv4_7": "torchvision",
    "gemma4_unified": "torchvision",
    "muse_glimmer": "torchvision",
}


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
    """A subclass of the checkpoint's processor class that has no video processor."""
    model_type = load_config(checkpoint).model_type
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise ValueError(
            f"{checkpoint}: transformers has no processor for model type {model_type!r}; "
            "give a vision-language checkpoint, `tlq families` lists the supported ones"
        )
    if model_type in NEEDS_VIDEO:
        raise ImportError(
            f"{checkpoint}: the processor of {model_type} needs {NEEDS_VIDEO[model_type]} even for images; install them"
        )
    base = getattr(transformers, name)
    parts = base.get_attributes()
    video = inspect.signature(base.__init__).parameters.get("video_processor")
    required = video is not None and video.default is inspect.Parameter.empty

    class ImageOnly(base):  # type: ignore[misc, valid-type]
        _loaded_parts = [part for part in parts if part != "video_processor"]

        @classmethod
        def get_attributes(cls) -> list[str]:
            return cls._loaded_parts

        @classmethod
        def from_args_and_dict(cls, args: list[Any], *more: Any, **named: Any) -> Any:
            """Give a constructor that requires a video processor (Gemma 4) None in its place."""
            if required:
                args, cls._loaded_parts = list(args), parts
                args.insert(parts.index("video_processor"), None)
            return super().from_args_and_dict(args, *more, **named)

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    ImageOnly.__name__ = ImageOnly.__qualname__ = name
    return ImageOnly
