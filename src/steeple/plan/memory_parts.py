"""Bytes by owner: weights as they lie, keys, the forward's room, laws, block tables, requests.

Every formula here has a class that allocates by it: ``ops/linear.py`` (panels), ``cache/paged.py`` (keys),
``forward.h`` (room), ``ops/law.py`` and ``verify`` (laws), ``cache/batch.py`` (tables), ``request.py`` (host).
R rows of a forward, V vocabulary, D hidden, B requests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from steeple.config import ModelConfig
from steeple.errors import UnsupportedModel
from steeple.plan.shapes import ModelShape

FLOAT = 4  # bytes of float32: logits, laws, rotary tables, scales
LINE = 64  # bytes that the native forward's buffers are rounded to
GRAPH_ROWS = 512  # most rows of a recorded forward
PARTIALS = 64 << 20  # bytes that a GPU's attention keeps for partial sums, for each shape of heads
PLAN_HEADER, PLAN_ITEM, PLAN_BLOCK = 9, 8, 16  # int32 of a plan and of each of its items; positions of a table's entry

# Of the native attention, per thread and split: see attention_call.h and attention.h.
SPLIT, TILE, PIECES, CHUNK, STATES = 512, 64, 4, 64, 128
LANES = 16
REFERENCE_TILE = 256  # rows of a tile of the slow twin: see attention.py

# Bytes of what Python and numpy keep, measured on CPython 3.11 to 3.13.
BLOCK_STATE = 216  # of a block: three list entries, its number, its name, the entry that finds it by its name
REQUEST_STATE = 4096  # of a request: objects, counters, statistics, parameters
TOKEN_STATE = 16  # of a token: int64, in a buffer that grows to twice the text
ROW_STATE = 96  # of a row of a batch: tokens, positions, slots, prefix, ancestors, owner
KEPT_SHAPES = 16  # batches that a batch maker remembers
TABLE_ENTRY = 12  # of a block table in use: block, and what turns a position into a slot


@dataclass(frozen=True, kw_only=True, slots=True)
class Lay:
    """How numbers lie on a device.

    Args:
        element: bytes of a number of the model's dtype: weights, activations, keys.
        panel: outputs of a packed panel of weights; 0 = weights are not packed.
        int8: the target's linear layers are quantised.
        fused: a forward is one native call over buffers of its own.
        threads: that share a native forward.
        gpu: keys have a spare block.
        recorded: forwards are recorded, which takes buffers that stay, and a place for partial sums.
    """

    element: int = 4
    panel: int = 0
    int8: bool = False
    fused: bool = False
    threads: int = 1
    gpu: bool = False
    recorded: bool = False

    @property
    def plain(self) -> Lay:
        """The same without quantisation: drafters are not quantised."""
        return replace(self, int8=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftMemory:
    """What a drafter takes, known before it is built.

    Args:
        held: bytes of its weights, tables included.
        keys: bytes of keys and values of its own that it keeps of every position of the target's cache.
        runs: the model whose forward it makes; None: it makes none.
        reads_text: its forward reads prompts, so it has as many rows as a chunk; otherwise one row per request.
        draws: it keeps the law of every drawn node until that is judged.
        position_state: bytes on the host for every position of the text.
        layers: target layers whose outputs it is shown.
        scores: it is shown the scores of the pages.
    """

    held: int = 0
    keys: int = 0
    runs: ModelConfig | None = None
    reads_text: bool = False
    draws: bool = False
    position_state: int = 0
    layers: int = 0
    scores: bool = False


def config_of(shape: ModelShape, max_context: int = 0) -> ModelConfig:
    """The engine's configuration of a shape from the planner's tables.

    Raises ``UnsupportedModel`` for a feed-forward network without a gate, which the engine does not have.
    """
    if not shape.gated:
        raise UnsupportedModel(f"{shape.name}: the engine has gated feed-forward networks only.")
    return ModelConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_context=max_context or shape.max_context,
        rope_inv_freq=(1.0,) * (shape.head_dim // 2),
        tie_embeddings=shape.tied,
        qkv_bias=shape.qkv_bias,
        o_bias=shape.o_bias,
        qk_norm=shape.qk_norm,
        post_norms=shape.norms > 2,
    )


def linear_bytes(outputs: int, inputs: int, lay: Lay, *, sections: int = 1, bias: bool = False) -> int:
    """Bytes of a weight ``[outputs, inputs]`` as it lies, with its bias.

    Packed: each of ``sections`` parts of the outputs is filled up to whole panels. int8: one byte a weight and a
    float32 scale an output; packed, the panels lie beside the tensor that they came from, which can be had back.
    """
    quantised = lay.int8
    size = 1 if quantised else lay.element
    packed = lay.panel > 0 and inputs % max(1, FLOAT // lay.element) == 0
    total = outputs * lay.element if bias else 0
    if packed:
        total += sections * -(-(outputs // sections) // lay.panel) * lay.panel * inputs * size
    if quantised or not packed:
        total += outputs * inputs * size
    return total + (outputs * FLOAT if quantised else 0)


def _layer_bytes(config: ModelConfig, lay: Lay) -> int:
    D, H = config.hidden_size, config.head_dim
    width = (config.num_heads + 2 * config.num_kv_heads) * H
    matrices = (
        linear_bytes(width, D, lay, bias=config.qkv_bias)
        + linear_bytes(D, config.num_heads * H, lay, bias=config.o_bias)
        + linear_bytes(2 * config.intermediate_size, D, lay, sections=2, bias=config.mlp_bias)
        + linear_bytes(D, config.intermediate_size, lay, bias=config.mlp_bias)
    )
    norms = (4 if config.post_norms else 2) * D + (2 * H if config.qk_norm else 0)
    return matrices + norms * lay.element


def weight_bytes(config: ModelConfig, lay: Lay) -> int:
    """A model in memory: matrices as they lie, norms, embedding, head, rotary tables.

    A tied head is the embedding itself, but where weights are packed it lies a second time as panels.
    """
    D, V = config.hidden_size, config.vocab_size
    head = linear_bytes(V, D, lay.plain if config.tie_embeddings else lay)
    if config.tie_embeddings and not lay.panel:
        head = 0
    tables = 2 * config.max_context * len(config.rope_inv_freq) * FLOAT
    return config.num_layers * _layer_bytes(config, lay) + (V + 1) * D * lay.element + head + tables


def loading_bytes(config: ModelConfig, lay: Lay) -> int:
    """The most that loading takes: all weights as they are stored, and the largest of them once more."""
    D, V = config.hidden_size, config.vocab_size
    largest = max(V, 2 * config.intermediate_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    return weight_bytes(config, replace(lay.plain, panel=0)) + largest * D * lay.element


def key_bytes(per_token: int, blocks: int, block_size: int, lay: Lay) -> int:
    """Keys and values of ``blocks`` blocks; a GPU has one more, for rows that fill a recorded forward."""
    return (blocks + lay.gpu) * block_size * per_token


def room_bytes(config: ModelConfig, rows: int, lay: Lay) -> int:
    """What a forward of ``rows`` rows keeps from step to step for what lies between its operations."""
    if lay.recorded:
        return _recorded_bytes(config) + _partial_bytes(config)
    if not lay.fused:
        return 0
    D, wide = config.hidden_size, config.num_heads * config.head_dim
    qkv = wide + 2 * config.num_kv_heads * config.head_dim
    widths = (D, D, D, qkv, wide, config.intermediate_size)
    return sum((rows * width * lay.element + 2 * LINE - 1) // LINE * LINE for width in widths)


def draft_room_bytes(config: ModelConfig, target: ModelConfig, lay: Lay) -> int:
    """What a drafter's recorded forwards keep from the start; partial sums of equal heads are shared."""
    if not lay.recorded:
        return 0
    alike = (config.num_heads, config.head_dim) == (target.num_heads, target.head_dim)
    return _recorded_bytes(config) + (0 if alike else _partial_bytes(config))


def _partial_bytes(config: ModelConfig) -> int:
    """Partial sums of a GPU's attention: as many as fit."""
    sums = FLOAT * config.num_heads * (config.head_dim + 2)
    return PARTIALS // sums * sums


def _recorded_bytes(config: ModelConfig) -> int:
    """Tokens, positions and slots of a recorded forward, int64, and the plan of its attention, int32."""
    longest = -(-config.max_context // PLAN_BLOCK)
    table = GRAPH_ROWS * (longest + longest // 4 + 4)
    slots = PARTIALS // (FLOAT * config.num_heads * (config.head_dim + 2))
    return 4 * (PLAN_HEADER + PLAN_ITEM * (slots + GRAPH_ROWS) + 6 * GRAPH_ROWS + table) + 3 * 8 * GRAPH_ROWS


def activation_bytes(config: ModelConfig, rows: int, lay: Lay) -> int:
    """The most that a forward of ``rows`` rows has beside its output, operation by operation or recorded."""
    D, H = config.hidden_size, config.head_dim
    heads, keys = config.num_heads * H, config.num_kv_heads * H
    tables = 2 * len(config.rope_inv_freq)
    attention = 2 * D + 2 * (heads + 2 * keys) + 3 * (heads + keys) + heads
    feed_forward = 3 * D + 4 * config.intermediate_size
    return rows * lay.element * (tables + max(attention, feed_forward))


def working_bytes(config: ModelConfig, rows: int, context: int, lay: Lay) -> int:
    """What a forward takes for its own time beside ``room_bytes``, and the hidden states that it gives."""
    hidden = rows * config.hidden_size * lay.element
    if lay.fused:
        return hidden + _attention_bytes(config, context, lay)
    recorded = min(rows, GRAPH_ROWS) if lay.recorded else 0
    kept = recorded * config.hidden_size * lay.element + activation_bytes(config, recorded, lay)
    attention = 0 if lay.gpu else _reference_bytes(config, rows, context, lay)
    return hidden + max(activation_bytes(config, rows, lay), kept) + attention


def _reference_bytes(config: ModelConfig, rows: int, context: int, lay: Lay) -> int:
    """The attention of the slow twin, a tile of rows of one request: keys and values of the text, gathered and in
    float32, three tables of scores, and the masks."""
    tile = min(rows, REFERENCE_TILE)
    gathered = 2 * config.num_kv_heads * config.head_dim * context * (lay.element + FLOAT)
    scores = 3 * FLOAT * tile * config.num_heads * context
    return gathered + scores + tile * (context + 4 * 64 * 8)


def _attention_bytes(config: ModelConfig, context: int, lay: Lay) -> int:
    """Sums of the native attention: of each thread's piece, and of splits of one request that threads share."""
    if lay.threads < 1:
        return 0
    H, group = config.head_dim, max(1, config.num_heads // config.num_kv_heads)
    rows = max(1, TILE // group)
    states = max(STATES, rows * group)
    thread = states * (H + LANES + 2 * (H + 2)) + 3 * rows * group * CHUNK + 6 * CHUNK * H
    # A request is split where it is worth more than one of threads * PIECES pieces: half of them at most are.
    shared = (
        0 if lay.threads == 1 else lay.threads * PIECES // 2 * -(-context // SPLIT) * rows * config.num_heads * (H + 2)
    )
    return FLOAT * (lay.threads * thread + shared)


def law_bytes(config: ModelConfig, requests: int, rows: int, portion: int, draft: DraftMemory | None, k: int) -> int:
    """Logits and laws of a step in the costliest case: sampled, cut off, penalised, with log-probabilities.

    Laws of nodes drawn are kept until they are judged, ``[B k, V]``. Beside these either the drafter makes the laws of
    one depth, or the judge those of ``portion`` rows.
    """
    V, drawing = config.vocab_size, draft is not None and draft.draws
    kept = requests * k * V * FLOAT if drawing else 0
    drafted = requests * V * DRAFT_LAW if drawing else 0
    judged = V * (min(portion, rows) * JUDGED_LAW + min(requests, portion) * COUNTED_TEXT)
    return kept + max(drafted, judged)


# Bytes of an entry [row, token] at the costliest moment. Judged: logits, penalised logits, counts of prompt and output,
# sorted and cut logits, the law and masks. Drafted: the same, with the counts of all requests. Text: counts before
# they are spread over the rows of a request.
JUDGED_LAW, COUNTED_TEXT, DRAFT_LAW = 29, 8, 40


def batch_bytes(requests: int, rows: int, blocks: int, block_size: int, context: int) -> int:
    """Block tables and flat arrays of the batches that are remembered, on the host."""
    longest = min(-(-context // block_size), blocks)
    width = longest + longest // 4 + 4
    return 2 * requests * width * TABLE_ENTRY + KEPT_SHAPES * requests * ROW_STATE + 2 * rows * ROW_STATE


def score_bytes(config: ModelConfig, requests: int, blocks: int, block_size: int, context: int) -> int:
    """Scores of pages, ``[layers, kv heads, pages of the batch]``, twice while pages are chosen."""
    longest = min(-(-context // block_size), blocks)
    entries = requests * (longest + longest // 4 + 4)
    return 2 * FLOAT * config.num_layers * config.num_kv_heads * entries


def state_bytes(requests: int, blocks: int, block_size: int, per_position: int = 0) -> int:
    """Objects of requests and blocks on the host, and what a drafter keeps there of every position."""
    positions = blocks * block_size
    return requests * REQUEST_STATE + blocks * BLOCK_STATE + positions * (TOKEN_STATE + per_position)
