"""Whether the engine computes the laws that were trained; a draft is written only if it does.

For a few texts the target's cache is filled as the engine fills it, the drafter runs over its window step by step, and
each law is compared with that of the training forward at the same position.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from steeple.draft.base import Surroundings
from steeple.draft.spire import SpireDraftConfig, SpireParts, draft_laws, spire_drafter
from steeple.errors import ModelError
from steeple.model.decoder import Decoder
from steeple.ops.kernels import kernels
from steeple.ops.native_attention import attention_backend
from steeple.train.spire_forward import Student, target_forward

TOLERANCE = 1e-4
LENGTHS = (2, 17, 80, 131, 300)
"""Of the texts: within the sink, within the window, beyond both, on and off page boundaries."""

# text [n], forced tokens [k] -> laws [k, V] at temperature 1: after the newest token of the text, and after each
# forced token but the last
EngineLaws = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def training_laws(target: Decoder, student: Student, text_N: Tensor, forced_k: Tensor) -> Tensor:
    """The draft's laws in the block that begins with the newest token of ``text_N``, float32 ``[k, V]``."""
    tokens = torch.cat((text_N, forced_k[:-1]))
    base = len(text_N) - 1
    seen = target_forward(target, tokens.unsqueeze(0), student.shape)
    hidden_TD = student.forward(tokens.unsqueeze(0), seen, -base % student.shape.k)
    return student.draft.logits(hidden_TD[base:]).float().softmax(dim=-1)


def check_parity(
    target: Decoder,
    student: Student,
    stream_T: Tensor,
    engine: Callable[[Decoder, Student], EngineLaws] | None = None,
) -> float:
    """The largest difference between a probability in training and in the engine, over texts cut from ``stream_T``.

    Args:
        target, student: in float32, the student's draft a plain decoder. The target's weights are packed in the end.
        engine: makes what computes laws as the engine does; default: the drafter.

    Raises:
        ModelError: it is above 1e-4, or not a number.
    """
    k, worst = student.shape.k, 0.0
    room = min(len(stream_T), target.config.max_context) - k
    cuts = []
    for number, length in enumerate(n for n in LENGTHS if n <= room):
        start = min(number * 97, room - length)
        cuts.append((stream_T[start : start + length], stream_T[start + length : start + length + k]))
    trained = [training_laws(target, student, text, forced) for text, forced in cuts]
    laws = (engine or drafter_laws)(target, student)
    for (text, forced), expected in zip(cuts, trained, strict=True):
        gap = (laws(text, forced).to(expected.device) - expected).abs().max().item()
        if not gap <= TOLERANCE:
            raise ModelError(
                f"After {len(text)} tokens the engine's draft laws differ from the trained ones by {gap:.2g} (at most "
                f"{TOLERANCE:.0e} is rounding), so drafts would be refused far more often than in training. Nothing "
                "was written; the checkpoint is in the run folder. Report this with the command line."
            )
        worst = max(worst, gap)
    return worst


def drafter_laws(target: Decoder, student: Student) -> EngineLaws:
    """The draft as the engine runs it: its drafter, the engine's kernels, a paged cache of the target."""
    draft, operations = copy.deepcopy(student.draft), kernels(target.device)
    for decoder in (target, draft):
        decoder.use(operations)
    carry = copy.deepcopy(student.carry)
    if carry is not None:
        carry.projection.use(operations.pack)
    around = Surroundings(
        decoder=target,
        tokenizer=None,
        attention=attention_backend(target.device),
        kernels=operations,
        device=target.device,
        dtype=target.dtype,
        block_size=student.shape.page,
        step_tokens=max(LENGTHS),
    )
    drafter = spire_drafter(
        SpireDraftConfig(k=student.shape.k), student.shape, SpireParts(draft, student.memory, carry), around
    )
    return lambda text, forced: draft_laws(drafter, text.tolist(), forced.tolist())
