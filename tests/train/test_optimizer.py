"""AdamW against a reference in plain tensor arithmetic; who decays; the moving average."""

from __future__ import annotations

import pytest
import torch

from trilemma.config import ModelConfig, TrainingConfig
from trilemma.models import SequenceModel, build_model
from trilemma.runs.tensors import model_tensors
from trilemma.train.optimizer import Optimizer


def model_of(**changes: object) -> SequenceModel:
    config = {"layout": "decoder-only", "d_model": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 11, "d_ff": 16}
    return build_model(ModelConfig.model_validate(config | changes)).double()


def give_gradients(model: SequenceModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_adamw_by_its_equations() -> None:
    """Loshchilov and Hutter 2019, algorithm 2: decay is apart from the gradient."""
    model = model_of()
    training = TrainingConfig(weight_decay=0.1, beta1=0.8, beta2=0.95, epsilon=1e-6)
    optimizer = Optimizer(model, training)
    exempt = model.no_weight_decay()
    assert "embedding.tokens.weight" in exempt
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in values.items()}
    second = {name: torch.zeros_like(value) for name, value in values.items()}
    for step in range(1, 4):
        give_gradients(model, step)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            g = parameter.grad
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            update = (first[name] / (1 - 0.8**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-6)
            decay = 0.0 if name in exempt else 0.1
            values[name] = values[name] * (1 - 0.01 * decay) - 0.01 * update
        optimizer.step(step, 0.01)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), values[name], rtol=1e-9, atol=1e-12)


def test_state_survives_a_round_trip() -> None:
    models = [model_of(), model_of()]
    models[1].load_state_dict(models[0].state_dict())
    training = TrainingConfig(weight_decay=0.1, ema=0.9)
    one, two = (Optimizer(model, training) for model in models)
    for step in (1, 2):
        give_gradients(models[0], step)
        one.step(step, 0.01)
    models[1].load_state_dict(models[0].state_dict())
    kept = one.tensors()
    assert kept.keys() == two.tensors().keys()
    with torch.no_grad():
        for name, tensor in two.tensors().items():
            tensor.copy_(kept[name])
    two.set_step(2)
    for model, optimizer in zip(models, (one, two), strict=True):
        give_gradients(model, 3)
        optimizer.step(3, 0.01)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[name]), name
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_moving_average_by_hand() -> None:
    model = model_of()
    optimizer = Optimizer(model, TrainingConfig(ema=0.5))
    name = "embedding.tokens.weight"
    average = model_tensors(model)[name].detach().clone()
    for step in range(1, 6):
        give_gradients(model, step)
        optimizer.step(step, 0.1)
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * model_tensors(model)[name].detach()
    raw = model_tensors(model)[name].detach().clone()
    with optimizer.averaged():
        torch.testing.assert_close(model_tensors(model)[name].detach(), average)
    assert torch.equal(model_tensors(model)[name].detach(), raw)
    with pytest.raises(ZeroDivisionError), optimizer.averaged():
        raise ZeroDivisionError
    assert torch.equal(model_tensors(model)[name].detach(), raw), "an error left the average in the model"


def test_no_average_is_free() -> None:
    model = model_of()
    optimizer = Optimizer(model, TrainingConfig())
    assert not any(name.startswith("ema.") for name in optimizer.tensors())
    with optimizer.averaged():
        pass
