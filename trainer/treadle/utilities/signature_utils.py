"""What reads the signature of a hook, where users of a trainer look for it."""

from treadle.module.steps.arguments import is_param_in_hook_signature

__all__ = ["is_param_in_hook_signature"]
