"""Networks as functions of named weights: exact covariances, batching, images one by one, accelerators."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from ppl_models.functional_prior_bnn import FunctionalPriorBNN
from ppl_models.functional_prior_bnn.networks import ACTIVATIONS, MLP, VGG16, LeNet5, Network, PreResNet20, evaluate
from tests.accelerator import fake_accelerator

NETWORKS: dict[str, tuple[Network, int]] = {
    "mlp": (MLP(5, 3, (7, 4)), 6),
    "linear": (MLP(5, 2, ()), 2),
    "lenet5": (LeNet5((1, 28, 28), 3), 10),
    "lenet5-colour": (LeNet5((3, 32, 32), 3), 10),
    "vgg16": (VGG16((1, 32, 32), 3), 28),
    "preresnet20": (PreResNet20((3, 16, 16), 3), 23),
}


def draw(network: Network, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, *shape, generator=g, dtype=dtype) for name, shape in network.shapes.items()}


def test_covariance_of_one_hidden_layer_is_the_closed_form_at_any_width() -> None:
    """Sheet E5.  The covariance does not depend on the width only with the NTK factors; width 7 and D = 2 tell them
    apart.

    Tolerance: 4 standard errors of 400,000 draws, about 0.7% here; leaving out a factor 1/sqrt(7) or 1/sqrt(2) moves
    the values by over 30%.
    """
    network = MLP(2, 1, (7,))
    x = torch.tensor([[1.0, -0.5], [0.3, 2.0]])
    scales = {"W1": 1.2, "b1": 0.7, "W2": 1.5, "b2": 0.4}
    weights = {name: scales[name] * value for name, value in draw(network, 400_000, seed=3).items()}
    f = evaluate(network, weights, x, chunk_size=100_000)[..., 0].double()
    products = torch.stack([f[:, 0] * f[:, 1], f[:, 0] ** 2, f[:, 1] ** 2], 1)
    truth = torch.tensor([0.153322, 1.182440, 1.535741], dtype=torch.float64)
    error = products.std(0) / math.sqrt(len(f))
    assert ((products.mean(0) - truth).abs() < 4 * error).all()


def test_convolutions_are_divided_by_the_root_of_their_fan_in() -> None:
    """With white weights and constant images of 1, an inner value of the first convolution has variance 1 (and 1 more
    from its bias).
    """
    network = LeNet5((3, 12, 12), 2)
    weights = {name: value for name, value in draw(network, 4000).items() if name in ("W1", "b1")}
    image = torch.ones(1, 3 * 12 * 12)
    values = torch.func.vmap(lambda w: network._conv(w, 1, network._images(image))[0, :, 4, 4])(weights)
    # 24,000 values, relative standard error of the variance 0.9%; without the factor it would be 76.
    assert abs(values.var().item() - 2.0) < 0.08


@pytest.mark.parametrize("name", NETWORKS)
def test_a_bag_of_draws_equals_a_loop(name: str) -> None:
    network, num_tensors = NETWORKS[name]
    assert len(network.shapes) == num_tensors
    weights = draw(network, 2)
    x = torch.randn(2, network.in_features, generator=torch.Generator().manual_seed(1))
    bag = evaluate(network, weights, x)
    loop = torch.stack([network({n: w[i] for n, w in weights.items()}, x) for i in range(2)])
    assert bag.shape == (2, 2, network.out_features) and torch.isfinite(bag).all()
    assert torch.allclose(bag, loop, rtol=1e-4, atol=1e-5)
    assert torch.allclose(
        evaluate(network, {n: w[None] for n, w in weights.items()}, x, chunk_size=1)[0], bag, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["lenet5", "preresnet20"])
def test_an_image_is_predicted_alike_whatever_stands_beside_it(name: str) -> None:
    """Batch statistics would fail this, and with it the likelihood's product over data points."""
    network, _ = NETWORKS[name]
    weights = {n: w[0] for n, w in draw(network, 1).items()}
    x = torch.randn(3, network.in_features, generator=torch.Generator().manual_seed(1))
    together = network(weights, x)
    alone = torch.cat([network(weights, row[None]) for row in x])
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-4)


def test_every_activation_is_what_its_name_says() -> None:
    h = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    expected = {
        "tanh": lambda t: math.tanh(t),
        "relu": lambda t: max(t, 0.0),
        "leaky_relu": lambda t: t if t > 0 else 0.01 * t,
        "softplus": lambda t: math.log1p(math.exp(t)),
        "swish": lambda t: t / (1 + math.exp(-t)),
        "sin": math.sin,
        "cos": math.cos,
        "rbf": lambda t: math.exp(-t * t),
        "linear": lambda t: t,
    }
    assert set(expected) == set(ACTIVATIONS)
    for name, function in expected.items():
        assert torch.allclose(
            ACTIVATIONS[name](h), torch.tensor([function(t) for t in h.tolist()], dtype=torch.float64)
        )


SETTINGS = {
    "mlp": {"in_features": 4, "hidden": (6,), "prior": "flow", "noise_variance": "learned"},
    "linear": {"in_features": 4, "hidden": (), "prior": "hierarchical", "likelihood": "laplace"},
    "lenet5": {"network": "lenet5", "image_shape": (1, 28, 28), "out_features": 3, "likelihood": "categorical"},
    "vgg16": {"network": "vgg16", "image_shape": (3, 32, 32), "out_features": 3, "likelihood": "categorical"},
    "preresnet20": {
        "network": "preresnet20",
        "image_shape": (3, 32, 32),
        "prior": "hierarchical",
        "out_features": 3,
        "likelihood": "categorical",
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_is_created_on_another_device(name: str) -> None:
    """Forward and backward on fake tensors of an accelerator, where mixing devices is an error."""
    with fake_accelerator() as device, pyro.validation_enabled(False):
        bnn = FunctionalPriorBNN(**SETTINGS[name])  # type: ignore[arg-type]
        for module in bnn.modules():  # `Module.to` cannot swap fake tensors
            for key, value in module._parameters.items():
                module._parameters[key] = torch.nn.Parameter(
                    torch.empty(value.shape, dtype=value.dtype, device=device), requires_grad=False
                )
            for key, value in module._buffers.items():
                module._buffers[key] = torch.empty(value.shape, dtype=value.dtype, device=device)
        x = torch.empty(6, bnn.network.in_features, device=device)
        y = (
            torch.empty(6, dtype=torch.long, device=device)
            if bnn.likelihood.name == "categorical"
            else torch.empty(6, 1, device=device)
        )
        trace = poutine.trace(poutine.block(bnn, hide=["obs", "data"])).get_trace(x[:1])
        latent = {
            n: s["value"].detach().requires_grad_()
            for n, s in trace.nodes.items()
            if s["type"] == "sample" and not s["is_observed"]
        }
        loss = -poutine.trace(poutine.condition(bnn, data=latent)).get_trace(x, y, batch_size=4).log_prob_sum()
        gradients = torch.autograd.grad(loss, list(latent.values()))
        assert loss.device.type == device.type and all(g.device.type == device.type for g in gradients)
        f = bnn.prior_functions(x[:2], 2)
        assert f.device.type == device.type and f.shape == (2, 2, bnn.network.out_features)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "in_features"),
        ({"in_features": 0}, ValueError, "in_features"),
        ({"in_features": 2.0}, TypeError, "in_features"),
        ({"in_features": 2, "hidden": (5, -1)}, ValueError, r"hidden\[1\]"),
        ({"in_features": 2, "hidden": 5}, TypeError, "hidden must be a sequence of widths"),
        ({"in_features": 2, "activation": "gelu"}, ValueError, "activation"),
        ({"in_features": 2, "network": "resnet"}, ValueError, "network"),
        ({"network": "lenet5"}, ValueError, "image_shape"),
        ({"network": "lenet5", "image_shape": (1, 8, 8)}, ValueError, "12 x 12"),
        ({"network": "vgg16", "image_shape": (3, 28, 28)}, ValueError, "32 x 32"),
        ({"network": "lenet5", "image_shape": (1, 28, 28), "in_features": 10}, ValueError, "784"),
        ({"in_features": 2, "prior": "laplace"}, ValueError, "prior"),
        ({"in_features": 2, "prior": "flow", "prior_scope": "parameter"}, ValueError, "flow"),
        ({"in_features": 2, "prior_scope": "weight"}, ValueError, "prior_scope"),
        ({"in_features": 2, "parametrisation": "white"}, ValueError, "parametrisation"),
        ({"in_features": 2, "likelihood": "poisson"}, ValueError, "likelihood"),
        ({"in_features": 2, "likelihood": "categorical"}, ValueError, "out_features"),
        ({"in_features": 2, "likelihood": "bernoulli", "noise_variance": 0.1}, ValueError, "noise_variance"),
        ({"in_features": 2, "noise_variance": 0.0}, ValueError, "noise_variance"),
        ({"in_features": 2, "noise_variance": "free"}, TypeError, "noise_variance"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FunctionalPriorBNN(**arguments)
