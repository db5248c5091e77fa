"""Planted defects: each is written into the product's own source, and a law must turn red.

Not every law sees every defect: that is why there are several. A defect whose place in the source is gone fails here,
too: then find where it would be made today.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from checks import check_cache_of, check_commits, check_greedy, check_law
from forests import check_draft
from lab import CACHES

import steeple.engine.judge
import steeple.types
import steeple.verify
import steeple.verify.chains
import steeple.verify.rejection
from steeple.cache.paged import PagedCache
from steeple.engine.engine import Engine
from steeple.errors import InternalError
from steeple.types import Draft
from steeple.verify.rejection import Rejection

TIGHT = CACHES["odd_blocks_tight"]


@dataclass(frozen=True)
class Defect:
    """``old`` becomes ``new`` in the function ``name`` of ``owner`` (a class or a module)."""

    owner: object
    name: str
    old: str
    new: str

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Compile the function with the defect and put it in place until the test ends."""
        function = inspect.unwrap(getattr(self.owner, self.name))
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, f"{self.old!r} is not, or not once, in {self.name}"
        place: dict[str, object] = {}
        flags = "from __future__ import annotations\n"
        exec(compile(flags + source.replace(self.old, self.new), f"<{self.name}>", "exec"), function.__globals__, place)
        monkeypatch.setattr(self.owner, self.name, place[self.name])


SWAP = Defect(Rejection, "accept", "kept = u * q_token < p_token", "kept = u * p_token < q_token")
SWAP_OF_CHAINS = Defect(
    steeple.verify, "reject_chains", "u * _drawn_with(draft) < p_token", "u * p_token < _drawn_with(draft)"
)
RESIDUAL = "(p_MV - draft.probs[row.clamp(min=0)])", "(draft.probs[row.clamp(min=0)] - p_MV)"
SWAP_RESIDUAL = Defect(steeple.verify.rejection, "residual", *RESIDUAL)
SWAP_RESIDUAL_OF_CHAINS = Defect(steeple.verify.chains, "residual", *RESIDUAL)
DROP_FIRST = Defect(
    Engine, "_commit", "written = self._write(request, tokens)", "written = self._write(request, tokens[1:] or tokens)"
)
SAME_NODE = Defect(Rejection, "accept", "node - self._first[request]", "0")
SAME_NODE_OF_CHAINS = Defect(steeple.verify, "reject_chains", "np.arange(N) - cu[owner]", "np.arange(N) * 0")
SAME_ROUND = Defect(steeple.engine.judge, "verify", "from_numpy(counter)", "from_numpy(counter * 0)")
SAME_ROUND_OF_CHAINS = Defect(
    steeple.engine.judge, "verify", "probs_RV, generators, counter)", "probs_RV, generators, counter * 0)"
)
TRIM = Defect(PagedCache, "commit", "if node != depth:", "if False:")
CU_OF_JUDGE = Defect(steeple.engine.judge, "_as_lists", "node - base", "node - base - 1")
DEAF = Defect(steeple.verify.chains, "leading", "np.flatnonzero(~kept_N)", "np.flatnonzero(~kept_N)[1:]")
UNMOVED = Defect(Engine, "_keep_keys", "if not draft.chain:", "if False:")
CU_OF_CONCAT = Defect(steeple.types, "concat_drafts", "cu[places] - own_cu[:-1]", "cu[places] - own_cu[:-1] - 1")


def law_of_trees() -> None:
    check_law("drawn_tree", ("temperature",))


def law_of_chains() -> None:
    check_law("small_lm", ("temperature",))


def greedy_trees() -> None:
    check_greedy("chosen_tree", TIGHT)


def greedy_chains() -> None:
    check_greedy("small_lm_self", TIGHT)


def greedy_lookups() -> None:
    check_greedy("ngram", TIGHT)


def commits_of_trees() -> None:
    check_commits(CACHES["paged"], decoys=True)


def cache_of_trees() -> None:
    check_cache_of("motley_tree")


def forests_of_two() -> None:
    """The forest that ``concat_drafts`` makes of two is a valid one."""

    def chain(length: int) -> Draft:
        nodes = torch.arange(length)
        return Draft(nodes, nodes - 1, torch.tensor([0, length]), torch.full_like(nodes, -1))

    check_draft(steeple.types.concat_drafts([((1,), chain(3)), ((0,), chain(2))], 2), (2, 3), 5)


CASES: list[tuple[str, Defect, tuple[Callable[[], None], ...]]] = [
    ("swap p and q", SWAP, (law_of_trees,)),
    ("swap p and q", SWAP_OF_CHAINS, (law_of_chains,)),
    ("swap p and q in the residual", SWAP_RESIDUAL, (law_of_trees,)),
    ("swap p and q in the residual", SWAP_RESIDUAL_OF_CHAINS, (law_of_chains,)),
    ("drop the first token", DROP_FIRST, (greedy_trees, greedy_chains, law_of_chains)),
    ("reseed in the loop: one number for all nodes", SAME_NODE, (law_of_trees,)),
    ("reseed in the loop: one number for all nodes", SAME_NODE_OF_CHAINS, (law_of_chains,)),
    ("reseed in the loop: one number for all rounds", SAME_ROUND, (law_of_trees,)),
    ("reseed in the loop: one number for all rounds", SAME_ROUND_OF_CHAINS, (law_of_chains,)),
    ("trim instead of commit", TRIM, (greedy_trees, commits_of_trees, cache_of_trees)),
    ("trim instead of commit, in the engine", UNMOVED, (greedy_trees, commits_of_trees, cache_of_trees)),
    ("off by one in the judge's cu", CU_OF_JUDGE, (greedy_trees, commits_of_trees)),
    ("a refusal in a chain is not heard", DEAF, (greedy_lookups,)),
    ("off by one in the forest's cu", CU_OF_CONCAT, (forests_of_two,)),
]


@pytest.mark.parametrize(
    ("defect", "law"),
    [pytest.param(d, law, id=f"{name}, seen by {law.__name__}") for name, d, laws in CASES for law in laws],
)
def test_a_planted_defect_turns_the_laws_red(
    defect: Defect, law: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    defect.plant(monkeypatch)
    with pytest.raises((AssertionError, InternalError)):
        law()


def test_without_a_defect_the_forest_check_is_green() -> None:
    # The other checks are green in ``test_matrix``.
    forests_of_two()
