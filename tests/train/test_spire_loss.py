"""The mixed loss, its gradient in closed form, and the tau that is made of acceptances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from steeple.model.decoder import Decoder
from steeple.model.families import model_config
from steeple.train.shape import SHAPES, llama_config
from steeple.train.spire_forward import Seen
from steeple.train.spire_loss import Laws, Rounds, joined_rounds, scores_and_gradient

ROWS, VOCAB = 12, 31


def logits(seed: int) -> Tensor:
    return 2 * torch.randn(ROWS, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_the_mixed_one_and_its_gradient_autograds(weight: float) -> None:
    target, draft, text = logits(0), logits(1).requires_grad_(), torch.randint(0, VOCAB, (ROWS,))
    p, q = target.softmax(-1), draft.softmax(-1)
    alpha = torch.minimum(p, q).sum(-1)
    expected = (1 - weight) * -(p * q.log()).sum(-1) - weight * alpha
    (by_autograd,) = torch.autograd.grad(expected.sum(), draft)
    scores, gradient = scores_and_gradient(target, draft, text, weight, False)
    torch.testing.assert_close(scores.loss, expected.detach())
    torch.testing.assert_close(scores.alpha, alpha.detach())
    torch.testing.assert_close(gradient, by_autograd)


def test_hard_targets_are_the_texts_tokens() -> None:
    target, draft, text = logits(0), logits(1).requires_grad_(), torch.randint(0, VOCAB, (ROWS,))
    expected = F.cross_entropy(draft, text, reduction="none")
    (by_autograd,) = torch.autograd.grad(expected.sum(), draft)
    scores, gradient = scores_and_gradient(target, draft, text, 0.5, True)
    torch.testing.assert_close(scores.loss, expected.detach())
    torch.testing.assert_close(gradient, by_autograd)
    torch.testing.assert_close(scores.alpha, torch.minimum(target.softmax(-1), draft.detach().softmax(-1)).sum(-1))


def test_a_match_is_the_same_best_token() -> None:
    target, draft = torch.eye(3)[[0, 1, 2]], torch.eye(3)[[0, 2, 2]]
    scores, _ = scores_and_gradient(target, draft, torch.zeros(3, dtype=torch.int64), 0.5, False)
    assert scores.match.tolist() == [1.0, 0.0, 1.0]


def test_stretches_of_rows_add_up_to_the_gradient_of_the_whole() -> None:
    torch.manual_seed(0)
    target, draft = (Decoder(model_config(llama_config(SHAPES["tiny"], 0))) for _ in range(2))
    hidden, text = torch.randn(ROWS, 32, requires_grad=True), torch.randint(0, 512, (ROWS,))
    seen = Seen(torch.randn(ROWS, 32))
    scores = Laws(target, draft, alpha_weight=0.5, hard=False, chunk=5).backward(seen, hidden, text, 0.25)
    p, q = target.logits(seen.final_TD).softmax(-1).detach(), draft.logits(hidden).softmax(-1)
    loss = (-0.5 * (p * q.log()).sum(-1) - 0.5 * torch.minimum(p, q).sum(-1)).mean()
    grads = torch.autograd.grad(0.25 * loss, (hidden, draft.head.weight))
    torch.testing.assert_close(scores.loss.mean(), loss.detach())
    torch.testing.assert_close(hidden.grad, grads[0])
    torch.testing.assert_close(draft.head.weight.grad, grads[1])


def test_tau_is_one_and_the_products_of_acceptances() -> None:
    alpha = torch.tensor([[0.5, 0.5, 1.0], [1.0, 0.25, 0.0]])
    rounds = Rounds(alpha, torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]), torch.tensor([0, 600]))
    assert rounds.tau(2) == pytest.approx(1 + (0.5 + 0.25 + 1.0 + 0.25) / 2)
    assert rounds.tau(3) == pytest.approx(1 + (0.5 + 0.25 + 0.25 + 1.0 + 0.25 + 0.0) / 2)
    assert rounds.tau(3, greedy=True) == pytest.approx(1 + (1 + 3) / 2)
    assert rounds.tau(1, first=512) == 2.0
    assert math.isnan(rounds.tau(1, first=2000))
    both = joined_rounds([rounds, rounds])
    assert both.tau(3) == pytest.approx(rounds.tau(3))
    report = rounds.report((2, 3))
    assert report["tau_2_from"] == {"0": pytest.approx(1.75), "512": pytest.approx(2.25)}
