"""This machine's accelerator gives the same results as its CPU."""

from copy import deepcopy

import pytest
import torch
from test_train import batch, small_model, small_vit, train_small
from torch.testing import assert_close

from nala_min import nala_attention, softmax_attention
from nala_min.train import load_checkpoint

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
MAPS = ("cosine", "split", "elu", "relu")


accelerator = torch.accelerator.current_accelerator(check_available=True)
DEVICES = [torch.device("cpu"), *([accelerator] if accelerator else [])]


@pytest.fixture(params=DEVICES, ids=str)
def device(request):
    return request.param


@pytest.fixture(params=TOLERANCES, ids=str)
def dtype(request, device):
    if device.type == "mps" and request.param == torch.float64:
        pytest.skip("mps has no float64")
    return request.param


def assert_near(actual, expected, dtype, device):
    """actual is on device, and close to expected, which was computed in float64 on the CPU."""
    assert actual.device.type == device.type and actual.dtype == dtype
    size = expected.abs().max().item()
    assert_close(actual.cpu().double(), expected, rtol=0, atol=TOLERANCES[dtype] * size)


# --- Every device ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "chunked", "quadratic", "recurrent", "parallel"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_attention_and_its_gradients(feature_map, mode, device, dtype):
    """Each form, in each dtype, with padding, a zero query and a zero key."""
    q, k, v, cotangent = torch.randn(4, 2, 3, 70, 8).to(dtype)
    q[0, 0, 3] = k[0, 1, 5] = 0.0
    mask = torch.rand(2, 70) < 0.9
    causal = mode != "parallel"

    def outputs_and_grads(device, dtype, mode):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        options = {"feature_map": feature_map, "causal": causal, "mode": mode}
        out = nala_attention(*inputs, key_mask=mask.to(device), **options)
        return [out, *torch.autograd.grad(out, inputs, cotangent.to(device, dtype))]

    expected = outputs_and_grads("cpu", torch.float64, "parallel")
    for x, y in zip(outputs_and_grads(device, dtype, mode), expected, strict=True):
        assert_near(x, y.detach(), dtype, device)


@pytest.mark.parametrize("attention", [nala_attention, softmax_attention])
def test_a_sequence_may_be_cut(attention, device, dtype):
    q, k, v = torch.randn(3, 2, 3, 90, 8).to(dtype)
    expected = attention(*(x.double() for x in (q, k, v)), causal=True)
    state, outs = None, []
    for part in (slice(0, 64), slice(64, 89), slice(89, 90)):
        piece = (x[:, :, part].to(device) for x in (q, k, v))
        out, state = attention(*piece, causal=True, state=state, return_state=True)
        outs.append(out)
    assert_near(torch.cat(outs, dim=2), expected, dtype, device)


@pytest.mark.parametrize("make", [small_model, small_vit])
def test_a_model_and_its_gradients(make, device):
    model = make()
    inputs = batch(0)[0] if make is small_model else torch.randn(3, 3, 32, 32)
    reference, tested = deepcopy(model).double(), deepcopy(model).to(device)
    expected = reference(inputs if make is small_model else inputs.double())
    actual = tested(inputs.to(device))
    if make is small_model:
        expected, actual = expected[0], actual[0]
    assert_near(actual, expected.detach(), torch.float32, device)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for x, y in zip(tested.parameters(), reference.parameters(), strict=True):
        assert_near(x.grad, y.grad, torch.float32, device)


def test_generation(device):
    """Greedy text equals the CPU's, and a seed reproduces its text."""
    model, start = small_model(), torch.randint(11, (2, 5))
    expected = model.generate(start, 20, temperature=0)
    model.to(device)
    assert torch.equal(model.generate(start.to(device), 20, temperature=0).cpu(), expected)
    first, second = (model.generate(start.to(device), 20, top_k=4, seed=7) for _ in range(2))
    assert torch.equal(first, second) and first.device.type == device.type


def test_a_resumed_run_is_the_same_run_and_its_checkpoint_loads_anywhere(device, tmp_path):
    def stopping(step):
        if step == 4:
            raise KeyboardInterrupt
        return batch(step)

    whole, parts = small_model(dropout=0.2).to(device), small_model(dropout=0.2).to(device)
    history, _ = train_small(whole, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train_small(parts, tmp_path / "parts.pt", batch=stopping)
    parts = small_model(seed=2, dropout=0.2).to(device)
    resumed, _ = train_small(parts, tmp_path / "parts.pt", resume=True)
    expected, weights = whole.state_dict(), load_checkpoint(tmp_path / "parts.pt")["model"]
    exact = {} if device.type == "mps" else {"rtol": 0, "atol": 0}
    for name, tensor in expected.items():
        assert_close(tensor.cpu(), weights[name].cpu(), **exact)
    assert [point["step"] for point in resumed] == [point["step"] for point in history]
    small_model().load_state_dict(weights)  # on the CPU
