"""Models as functions of their weights and inputs: the transforms of `torch.func` and forward-mode differentiation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import Case, all_variants, main_output, parametrize
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.both_branches

Weights = dict[str, torch.Tensor]
CLOSE = {"rtol": 1e-8, "atol": 1e-10}

# Forward and reverse mode agree: not so in the published SPADE, whose state space passes no gradient back, but has tangents.
SYMMETRIC = [case for case in all_variants() if (case.model_type, case.variant) != ("spade", "official")]


class Function:
    """Loss of a model as a function of its weights, with a direction for these and the plain gradients."""

    def __init__(self, case: Case, *, training: bool = False) -> None:
        self.model = case.model().double().train(training)
        self.inputs = case.inputs(length=9)
        self.inputs |= case.labels(self.inputs)
        self.weights = {name: weight.detach() for name, weight in self.model.named_parameters()}
        self.direction = {name: torch.randn_like(weight) for name, weight in self.weights.items()}

    def __call__(self, weights: Weights, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        return functional_call(self.model, weights, (), self.inputs if inputs is None else inputs).loss

    def gradients(self, inputs: dict[str, torch.Tensor] | None = None) -> Weights:
        loss = self.model(**(self.inputs if inputs is None else inputs)).loss
        found = torch.autograd.grad(loss, list(self.model.parameters()), allow_unused=True, materialize_grads=True)
        return dict(zip(self.weights, found))

    def single(self, inputs: dict[str, torch.Tensor], function: Callable[..., Any]) -> Any:
        """A function of a batch, called with one row without its batch dimension."""
        return function({name: row.unsqueeze(0) for name, row in inputs.items()})


@parametrize(all_variants())
def test_gradients(case: Case) -> None:
    function = Function(case, training=True)
    expected = function.gradients()
    found = grad(function)(function.weights)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(function.gradients(), expected, rtol=0, atol=0)  # nothing of the transform stays behind


@parametrize(SYMMETRIC)
@sdpa_kernel(SDPBackend.MATH)  # torch has no tangents of the others
def test_tangents(case: Case) -> None:
    """One weight at a time: a tangent that an operation drops would hide among others."""
    function = Function(case)
    gradients, weights = function.gradients(), function.weights
    for name in list(weights)[::2]:
        tangent = function.direction[name]
        expected = (gradients[name] * tangent).sum()
        _, found = jvp(lambda weight, name=name: function({**weights, name: weight}), (weights[name],), (tangent,))
        torch.testing.assert_close(found, expected, **CLOSE)
    with forward_ad.dual_level(), torch.no_grad():
        duals = {name: forward_ad.make_dual(weight, function.direction[name]) for name, weight in weights.items()}
        found = forward_ad.unpack_dual(function(duals)).tangent
    expected = sum((gradients[name] * function.direction[name]).sum() for name in weights)
    torch.testing.assert_close(found, expected, **CLOSE)


@parametrize(all_variants())
def test_rows_of_a_batch(case: Case) -> None:
    """Outputs and gradients of single rows."""
    function = Function(case)
    model, inputs = function.model, function.inputs
    with torch.no_grad():
        expected = main_output(model(**inputs))
        found = vmap(lambda row: function.single(row, lambda one: main_output(model(**one))[0]))(inputs)
    torch.testing.assert_close(found, expected, **CLOSE)

    def gradients(weights: Weights, row: dict[str, torch.Tensor]) -> Weights:
        return function.single(row, lambda one: grad(function)(weights, one))

    found = vmap(gradients, in_dims=(None, 0))(function.weights, inputs)
    for index in range(2):
        expected = function.gradients({name: value[index : index + 1] for name, value in inputs.items()})
        torch.testing.assert_close({name: value[index] for name, value in found.items()}, expected, **CLOSE)


def test_codebooks_learn_from_gradients_of_functions() -> None:
    case = next(case for case in all_variants() if case.model_type == "longvq")
    inputs = case.inputs(length=9)
    inputs |= case.labels(inputs)
    plain, transformed = (case.model(freeze_codebook=False).double().train() for _ in range(2))
    weights = {name: weight.detach() for name, weight in transformed.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        plain(**inputs).loss.backward()
    grad(lambda weights: functional_call(transformed, weights, (), inputs).loss)(weights)
    for model in (plain, transformed):
        torch.manual_seed(2)
        model(**inputs)  # applies what the step before found
    torch.testing.assert_close(dict(transformed.named_buffers()), dict(plain.named_buffers()), **CLOSE)
    with pytest.raises(RuntimeError, match=r"freeze_codebook=True.*model.eval\(\)"):
        vmap(lambda ids: plain(input_ids=ids[None]).logits)(inputs["input_ids"])


@parametrize(SYMMETRIC)
@sdpa_kernel(SDPBackend.MATH)
def test_frozen_models_have_no_tangents_of_constants(case: Case) -> None:
    """What a frozen model computed of its weights before has none: refused, where there is something of the kind."""
    function = Function(case)
    weights, direction = (function.weights,), (function.direction,)
    expected = jvp(function, weights, direction)
    with function.model.frozen():
        with torch.no_grad():
            function.model(**function.inputs)
        try:
            found = jvp(function, weights, direction)
        except RuntimeError as error:
            assert "The model is frozen" in str(error)
            return
    torch.testing.assert_close(found, expected, **CLOSE)


@parametrize(all_variants())
@sdpa_kernel(SDPBackend.MATH)  # others have no rule for a mask that differs
def test_several_models_at_once(case: Case) -> None:
    first = case.model().double()
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    inputs = case.inputs(length=9)
    states = stack_module_state([first, second])
    found = vmap(lambda *state: main_output(functional_call(first, state, (), inputs)))(*states)
    expected = torch.stack([main_output(model(**inputs)) for model in (first, second)])
    torch.testing.assert_close(found, expected, **CLOSE)


@parametrize(SYMMETRIC)
@sdpa_kernel(SDPBackend.MATH)
def test_second_derivatives(case: Case) -> None:
    """The product of the Hessian and a vector, forward over reverse, is that of two reverse passes."""
    function = Function(case)
    weights, direction = function.weights, function.direction
    _, found = jvp(grad(function), (weights,), (direction,))

    def slope(weights: Weights) -> torch.Tensor:
        gradients = grad(function)(weights)
        return sum((gradients[name] * direction[name]).sum() for name in gradients)

    torch.testing.assert_close(found, grad(slope)(weights), rtol=1e-6, atol=1e-8)
    assert any(value.abs().max() > 1e-6 for value in found.values())


@parametrize(all_variants())
def test_jacobians(case: Case) -> None:
    function = Function(case)
    embeddings = function.model.get_input_embeddings()(function.inputs["input_ids"]).detach()
    rest = {name: value for name, value in case.inputs(length=9).items() if name != "input_ids"}

    def output(embeddings: torch.Tensor) -> torch.Tensor:
        return main_output(function.model(inputs_embeds=embeddings, **rest))[:, -1, :3].sum(0)

    expected = torch.autograd.functional.jacobian(output, embeddings)
    torch.testing.assert_close(jacrev(output)(embeddings), expected, **CLOSE)
    if case.model_type != "spade":  # torch's older `vmap`, which this takes, has no rule for a slice of everything
        found = torch.autograd.functional.jacobian(output, embeddings, vectorize=True)
        torch.testing.assert_close(found, expected, **CLOSE)
