"""transformers: ``from_pretrained(folder, quantization_config=NF4Config())``, bitsandbytes' folders, and Trainer.

Importing this package registers the quantiser, so that ``from_pretrained`` also reads what such a model's ``save_pretrained``
wrote. transformers finds quantisers by no other way: a program that only reads such a folder imports this package, too.
"""

from peftk.integrations.transformers.adalora_callback import AdaLoraCallback
from peftk.integrations.transformers.adapters_only import save_adapters_only
from peftk.integrations.transformers.bitsandbytes_folder import from_bitsandbytes, save_as_bitsandbytes
from peftk.integrations.transformers.config import NF4Config
from peftk.integrations.transformers.quantizer import NF4Quantizer

__all__ = ["AdaLoraCallback", "NF4Config", "NF4Quantizer", "from_bitsandbytes", "save_adapters_only", "save_as_bitsandbytes"]
