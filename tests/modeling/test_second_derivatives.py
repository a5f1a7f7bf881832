"""Gradients under `create_graph=True`, differentiated again (gradient penalties, products with the Hessian): right or refused."""

from __future__ import annotations

import pytest
import torch
from factories import Case, all_variants, parametrize
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.both_branches

STEP = 1e-6

# Differences of losses show no derivative there: the straight-through codes of LongVQ, and the published SPADE, whose state space
# passes no gradient on.
CASES = [
    case
    for case in all_variants()
    if case.model_type != "longvq" and (case.model_type, case.variant) != ("spade", "official")
]


@parametrize(CASES)
@sdpa_kernel(SDPBackend.MATH)  # torch differentiates the gradients of no other
def test_a_penalty_on_gradients_has_the_right_gradient_or_none(case: Case) -> None:
    """The penalty on the gradient of one parameter at a time, along a random direction of all of them."""
    model = case.model().double().train()
    inputs = case.inputs(length=9)
    inputs |= case.labels(inputs)
    parameters = list(model.parameters())
    direction = [torch.randn_like(parameter) for parameter in parameters]

    def penalties(shift: float) -> list[float]:
        with torch.no_grad():
            for parameter, part in zip(parameters, direction):
                parameter.add_(part, alpha=shift)
        gradients = torch.autograd.grad(model(**inputs).loss, parameters)
        return [float(gradient.square().sum()) for gradient in gradients]

    above, below = penalties(STEP), penalties(-2 * STEP)
    penalties(STEP)  # back again
    seen = 0
    for index in range(0, len(parameters), 3):
        loss = model(**inputs).loss
        (gradient,) = torch.autograd.grad(loss, parameters[index], create_graph=True)
        try:
            second = torch.autograd.grad(gradient.square().sum(), parameters, allow_unused=True)
        except NotImplementedError as error:
            assert "Second derivatives of" in str(error) and "over 2 e" in str(error)
            continue
        found = sum(float((value * part).sum()) for value, part in zip(second, direction) if value is not None)
        assert found == pytest.approx((above[index] - below[index]) / (2 * STEP), rel=1e-4, abs=1e-5)
        seen += 1
    assert seen > 0
