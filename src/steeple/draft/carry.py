"""What a draft carries from step to step: the state that its newest token was predicted from, projected into its input.

For the root of a draft that is the target's last hidden state, which knows more of the text than any window of keys; in
flight it is the draft's own. Sources: EAGLE (Li et al. 2024, arXiv 2401.15077), whose draft reads the target's states,
and the regressive connection of Clover (Xiao et al. 2024, arXiv 2405.00263).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steeple.errors import InternalError, WeightError
from steeple.model.layers import Linear

CARRY_FILE = "carry.safetensors"


class Carry(nn.Module):
    """A projection of states after the last norm, added to the embeddings. Zero to begin with: a draft starts as
    one without it.

    Args: hidden: width D of the states.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.projection = Linear(hidden, hidden, bias=False)
        nn.init.zeros_(self.projection.weight)

    def forward(self, state_TD: Tensor) -> Tensor:
        """``[T, D]``, states of the positions before -> what is added to the embeddings."""
        added_TD: Tensor = self.projection(state_TD)
        return added_TD

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write ``carry.safetensors``; before its weight is packed."""
        weight = self.projection.weight.detach().to(dtype).cpu().contiguous()
        save_file({"projection": weight}, folder / CARRY_FILE)

    @staticmethod
    def load(folder: Path, hidden: int, dtype: torch.dtype, device: torch.device) -> Carry:
        """Read ``carry.safetensors``, for inference; ``WeightError`` if it is absent or holds something else."""
        try:
            weight = load_file(folder / CARRY_FILE)["projection"]
        except (OSError, KeyError, SafetensorError) as error:
            raise WeightError(f"{folder / CARRY_FILE} cannot be read ({error}); train the draft again.") from error
        if weight.shape != (hidden, hidden):
            raise WeightError(f"{folder / CARRY_FILE}: projection has shape {list(weight.shape)}, not [{hidden}] * 2.")
        carry = Carry(hidden)
        carry.projection.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
        return carry


class CarriedStates:
    """For each running request the state that its newest token was predicted from."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[Tensor, int]] = {}

    def note(self, ids: Sequence[str], rows: Sequence[int], states_TD: Tensor) -> None:
        """``rows[i]`` of the states of a step, ``[T, D]``, is that of request ``ids[i]``."""
        if not ids:
            return
        # A copy of few rows, so that a step's states need not stay in memory.
        own_BD = states_TD[torch.tensor(rows, device=states_TD.device)]
        for place, id in enumerate(ids):
            self._rows[id] = (own_BD, place)

    def of(self, ids: Sequence[str]) -> Tensor:
        """``[B, D]``. Raises ``InternalError`` for a request whose state was never noted."""
        try:
            found = [self._rows[id] for id in ids]
        except KeyError as error:
            raise InternalError(f"no state to carry for request {error.args[0]!r}") from error
        whole = found[0][0]
        if whole.shape[0] == len(found) and all([t is whole and row == b for b, (t, row) in enumerate(found)]):  # noqa: C419
            return whole
        return torch.stack([states_BD[row] for states_BD, row in found])

    def forget(self, id: str) -> None:
        """The request left, or starts again from its text."""
        self._rows.pop(id, None)

    @property
    def remembered(self) -> frozenset[str]:
        """Requests with a state."""
        return frozenset(self._rows)
