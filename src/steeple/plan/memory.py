"""How many bytes a configuration takes, and the inverse. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from steeple.errors import CapacityError

# Room left to activations and to everybody else on the machine.
CACHE_SHARE = 0.5
# Without a wish of the user: this many requests of full length, or what memory allows.
FULL_REQUESTS = 64


@dataclass(frozen=True, slots=True)
class CachePlan:
    """``blocks`` of ``block_size`` positions; ``bytes`` of all caches together."""

    blocks: int
    block_size: int
    bytes: int

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_size


def plan_cache(
    *, available: int, bytes_per_token: int, block_size: int, max_context: int, wanted_tokens: int = 0
) -> CachePlan:
    """Blocks for ``wanted_tokens`` positions, or as many as pay within ``CACHE_SHARE`` of the ``available`` bytes.

    ``CapacityError`` if the wish does not fit into what is available, or if not one block does.
    """
    per_block = bytes_per_token * block_size
    if wanted_tokens:
        blocks = -(-wanted_tokens // block_size)
        if blocks * per_block > available:
            missing = blocks * per_block - available
            raise CapacityError(
                f"kv_tokens = {wanted_tokens} takes {blocks * per_block / 2**20:.0f} MiB, {missing / 2**20:.0f} MiB "
                f"more than there is; lower it to {available // bytes_per_token} or less."
            )
    else:
        most = -(-FULL_REQUESTS * max_context // block_size)
        blocks = min(most, int(available * CACHE_SHARE) // per_block)
    if blocks == 0:
        raise CapacityError(
            f"a cache block takes {per_block / 2**20:.1f} MiB and {available / 2**20:.1f} MiB are free; "
            "lower block_size, or free memory."
        )
    return CachePlan(blocks, block_size, blocks * per_block)
