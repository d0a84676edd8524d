"""`peft.utils.other`, as far as scripts import from it."""

from ..distributed import fsdp_auto_wrap_policy

__all__ = ["fsdp_auto_wrap_policy"]
