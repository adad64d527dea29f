"""Adapters in the layout of Hugging Face PEFT: adapter_config.json, adapter_model.safetensors.

Reading and writing name modules by the tables of `convert/`. What PEFT says differently:

  - kernels are transposed: lora_A [r, in], lora_B [out, r]; of a convolution [r, in, h, w] and
    [out, r, 1, 1]; the magnitude of DoRA [out], of a convolution [1, out, 1, 1];
  - q, k and v are modules of their own in transformers and one fused module in timm. Separate
    adapters of the parts of a fused kernel go to timm as one adapter of the summed rank, whose
    B has a block for each part: the same update, and as many zeros as that takes;
  - transformers 5 names the modules of many models otherwise in memory than in its files. PEFT goes
    by memory, so that is what we write; older adapters have the files' names and are read too.

Source: peft 0.21, tuners/lora/{layer,dora,model}.py and utils/save_and_load.py.
"""

from vision_jax.convert.peft.names import CONFIG_FILE, TENSORS_FILE, without_module
from vision_jax.convert.peft.read import read_adapter
from vision_jax.convert.peft.write import write_adapter

__all__ = ["CONFIG_FILE", "TENSORS_FILE", "read_adapter", "without_module", "write_adapter"]
