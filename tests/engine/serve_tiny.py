"""Runs transformers' own `serve` command on a tiny checkpoint, in a process of its own.

    python tests/engine/serve_tiny.py CHECKPOINT PORT [plain]

The command loads the family's full processor, whose video part wants torchvision. This registers a subclass
that has images and text only; everything else (the application, the routes, the generation) is
transformers' own. With `plain`, replies are texts as they were written. Without it, they are parsed by the
rules for Qwen's models, which lose what stands before `<think>`.
"""

import sys

from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.cli.serve import Serve
from transformers.models.auto import image_processing_auto, processing_auto


def images_only(family: type) -> type:
    """The family's processor without videos, under the name that a checkpoint asks for."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        family.__init__(self, image_processor, tokenizer, None, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        images = image_processing_auto.AutoImageProcessor.from_pretrained(folder)
        return cls(images, tokenizer, chat_template=tokenizer.chat_template)

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    members = {"__init__": __init__, "from_pretrained": from_pretrained, "get_attributes": get_attributes}
    return type(family.__name__, (family,), members)


def register() -> None:
    """Puts the images-only classes where `AutoProcessor` looks a class up by its name."""
    classes = {cls.__name__: images_only(cls) for cls in (Qwen2_5_VLProcessor, Qwen3VLProcessor)}
    found = processing_auto.processor_class_from_name
    processing_auto.processor_class_from_name = lambda name: classes.get(name) or found(name)


def leave_texts_whole() -> None:
    """Makes the server treat the model as one that it has no parser for."""
    from transformers.cli.serving import chat_completion

    def unparsed(processor, model, generated_ids, input_ids, cleaned_content="", tools=None):
        return cleaned_content, None, None

    chat_completion.parse_assistant_message = unparsed


if __name__ == "__main__":
    register()
    if sys.argv[3:] == ["plain"]:
        leave_texts_whole()
    Serve(sys.argv[1], host="127.0.0.1", port=int(sys.argv[2]), device="cpu", dtype="float32")
