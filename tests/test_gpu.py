"""This machine's accelerator gives the same results as its CPU. Skipped without one."""

from copy import deepcopy

import pytest
import torch
import training
from torch.testing import assert_close
from training import small_model, stopping_at, train_small

from nala_min import Config, NaLaLM, NaLaViT, nala_attention, train

signals_stay_inside = training.signals_stay_inside
DEVICE = torch.accelerator.current_accelerator(check_available=True)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
CONFIG = Config(num_layers=2, num_heads=2, dim=16, vocab_size=11, attention=("nala", "softmax"))
TOKENS, IMAGES = torch.arange(24).view(2, 12) % 11, torch.arange(3072).cos().view(1, 3, 32, 32)
pytestmark = pytest.mark.skipif(DEVICE is None, reason="no accelerator")


def assert_near(actual, expected, dtype=torch.float32):
    """actual is on the device, and close to expected, which was computed in float64 on the CPU."""
    assert actual.device.type == DEVICE.type and actual.dtype == dtype
    size = expected.abs().max().item()
    assert_close(actual.cpu().double(), expected, rtol=0, atol=TOLERANCES[dtype] * size)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("mode", ["auto", "chunked", "recurrent", "parallel"])
def test_attention_and_its_gradients(mode, dtype):
    """With padding, a zero query and a zero key."""
    q, k, v, weights = torch.randn(4, 2, 3, 70, 8).to(dtype)
    q[0, 0, 3] = k[0, 1, 5] = 0.0
    mask, causal = torch.rand(2, 70) < 0.9, mode != "parallel"

    def results(device, dtype, mode):
        tensors = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        options = {"causal": causal, "mode": mode, "key_mask": mask.to(device)}
        out = nala_attention(*tensors, **options)
        return [out, *torch.autograd.grad(out, tensors, weights.to(device, dtype))]

    expected = results("cpu", torch.float64, "parallel")
    for x, y in zip(results(DEVICE, dtype, mode), expected, strict=True):
        assert_near(x, y.detach(), dtype)


@pytest.mark.parametrize("make", [NaLaLM, NaLaViT])
def test_a_model_its_gradients_and_its_text(make):
    tested = make(CONFIG)
    reference = deepcopy(tested).double()
    tested.to(DEVICE)
    inputs = (TOKENS, TOKENS) if make is NaLaLM else (IMAGES, IMAGES.double())
    outs = [net(x) for net, x in ((tested, inputs[0].to(DEVICE)), (reference, inputs[1]))]
    actual, expected = [out[0] for out in outs] if make is NaLaLM else outs
    assert_near(actual, expected.detach())
    actual.square().sum().backward()
    expected.square().sum().backward()
    for x, y in zip(tested.parameters(), reference.parameters(), strict=True):
        assert_near(x.grad, y.grad)
    if make is NaLaLM:
        text = tested.generate(TOKENS.to(DEVICE), 20, temperature=0).cpu()
        assert torch.equal(text, reference.generate(TOKENS, 20, temperature=0))


def test_a_resumed_run_is_the_same_run_and_its_checkpoint_loads_anywhere(tmp_path):
    def weights(name, **options):
        train_small(small_model().to(DEVICE), tmp_path / name, evaluate=lambda net: {}, **options)
        return train.load_checkpoint(tmp_path / name)["model"]

    expected = weights("whole.pt")
    with pytest.raises(KeyboardInterrupt):
        weights("parts.pt", batch=stopping_at(4))
    resumed = weights("parts.pt", resume=True)
    for name, tensor in expected.items():
        assert_close(resumed[name], tensor, rtol=0, atol=1e-6 if DEVICE.type == "mps" else 0)
    small_model().load_state_dict(resumed)  # on the CPU
