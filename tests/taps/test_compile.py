"""Taps in compiled models (aot_eager: what is tested is tracing and autograd, not code generation)."""

from __future__ import annotations

import pytest
import torch

from fastguard import RepNoiseLoss
from tiny_models import assert_same_gradients, gradients, pair, tiny


@pytest.mark.parametrize(
    "form, checkpointing", [("torch.compile", False), ("torch.compile", True), ("compile a layer", True)]
)
def test_compiled(form, checkpointing):
    """Full graphs where the model as a whole is compiled; two calls before one backward."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = tiny("llama", num_hidden_layers=2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped = model
        if compiled and form == "torch.compile":
            wrapped = torch.compile(model, backend="aot_eager", fullgraph=True)
        elif compiled:
            model.model.layers[0].compile(backend="aot_eager")
        loss_fn = RepNoiseLoss(wrapped, beta=0.5, filter_tol=0.0)
        (a, b), (c, d) = pair(seed=1), pair(seed=1, length=11)
        (loss_fn(harmful=a, harmless=b) + 2 * loss_fn(harmful=c, harmless=d)).backward()
        results.append((loss_fn.components["loss"], gradients(model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=0)
    assert_same_gradients(results[1][1], results[0][1], 2e-5)


def test_compiled_before_the_loss_was_constructed():
    torch._dynamo.reset()
    model = tiny("llama", num_hidden_layers=1)
    harmful, harmless = pair()
    wrapped = torch.compile(model, backend="aot_eager")
    both = {k: torch.cat([harmful[k], harmless[k]]) for k in harmful}
    none = torch.empty(0, dtype=torch.int64)  # as a loss calls it: else it would be compiled anew, with taps
    with torch.enable_grad():
        wrapped(**both, logits_to_keep=none, use_cache=False)
    loss_fn = RepNoiseLoss(wrapped)
    with pytest.raises(RuntimeError, match="before the first call of a compiled model"):
        loss_fn(harmful=harmful, harmless=harmless)
