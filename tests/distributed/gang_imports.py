"""What the server of `gang` imports once for all ranks."""

import logging
import os
import warnings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.simplefilter("ignore")

import accelerate  # noqa: E402, F401
import bitsandbytes  # noqa: E402, F401
import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed.checkpoint  # noqa: E402
import torch.distributed.fsdp  # noqa: E402
import torch.distributed.tensor  # noqa: E402
import transformers  # noqa: E402
import transformers.trainer  # noqa: E402
from models import FAMILIES, build  # noqa: E402

import pyadapt  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
deepspeed.utils.logger.setLevel(logging.ERROR)

# What these load when they are first used: the modules of each family's model, and what an adapter asks for.
for name in ("llama", "gpt2", "t5", "bert"):
    pyadapt.wrap(build(name), {"peft_type": "LORA", "task_type": FAMILIES[name].task})
