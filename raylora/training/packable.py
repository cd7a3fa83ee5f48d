"""Says which settings the packed engine can follow, without loading it."""

from raylora.config.schema import SearchConfig
from raylora.errors import PackingError

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit")
"""Names in transformers of AdamW with 32-bit states, the optimizer of the packed engine."""

ATTENTION = (None, "sdpa")
"""Settings of `attn_implementation` that the packed engine follows: it calls `sdpa` row by row."""


def check_settings(config: SearchConfig) -> None:
    """Check that the packed engine has what the settings ask for.

    Raises:
        PackingError: it lacks the optimizer or the attention.
    """
    if config.training.optim not in OPTIMIZERS:
        raise PackingError(f"training.optim is {config.training.optim}, which only TRL's trainer has")
    attention = config.base_model.attn_implementation
    if attention not in ATTENTION:
        raise PackingError(
            f"base_model.attn_implementation is {attention}, which only TRL's trainer uses; leave it out to train "
            "trials together"
        )
