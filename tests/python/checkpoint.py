"""SmolLM2-135M-Instruct as a Hugging Face checkpoint, from the GGUF that
tools/setup-llama fetched: `python checkpoint.py GGUF FOLDER`. Needs torch,
transformers, accelerate and gguf."""

import pathlib
import sys


def convert(gguf: pathlib.Path, folder: pathlib.Path) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    where, name = str(gguf.parent), gguf.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, dtype=torch.bfloat16
    )
    # What was read was dequantized; only the label is left.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ensure(deps: pathlib.Path) -> pathlib.Path:
    """The checkpoint's folder, made on first use."""
    folder = deps / "model" / "SmolLM2-135M-Instruct-hf"
    if not folder.exists():
        scratch = folder.with_suffix(".part")
        convert(deps / "model" / "SmolLM2-135M-Instruct.Q4_1.gguf", scratch)
        scratch.rename(folder)
    return folder


if __name__ == "__main__":
    convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
