"""The block, the text model and the image model: what they are assembled from, how they start, what
their states hold, and what generate draws."""

import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from nala_min import model

SMALL = {"num_layers": 2, "num_heads": 2, "dim": 16, "conv_size": 3}


def small(kind="LM", **options):
    """A language model of 11 characters, or an image model of 7 classes."""
    sizes = {"LM": {"vocab_size": 11}, "ViT": {"num_classes": 7, "patch_size": 2}}
    config = model.Config(**SMALL | sizes[kind] | options)
    return model.NaLaLM(config) if kind == "LM" else model.NaLaViT(config)


VARIANTS = [{"attention": name} for name in ("nala", "softmax", "polar", "delta")]
VARIANTS += [{"attention": ["softmax", "split"], "conv_size": 1}]
every_kind = pytest.mark.parametrize("kind", ["LM", "ViT"])
every_variant = pytest.mark.parametrize("options", VARIANTS, ids=str)


def small_inputs(kind):
    return torch.randint(11, (2, 9)) if kind == "LM" else torch.randn(2, 3, 9, 6)


def run(net, inputs):
    """The logits, without the state of a language model."""
    out = net(inputs)
    return out[0] if isinstance(out, tuple) else out


def test_a_block_adds_both_branches():
    """Pre-norm and residual: x + attention(norm(x)), then x + mlp(norm(x))."""
    block = small().blocks[0].double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y = x + block.attention(F.layer_norm(x, (16,)), (None, None))[0]
    widen, gelu, narrow = block.mlp
    assert widen.out_features == 64 and isinstance(gelu, torch.nn.GELU)
    want = y + narrow(F.gelu(widen(F.layer_norm(y, (16,)))))
    assert_close(block(x, (None, None))[0], want)


@every_variant
@every_kind
def test_every_parameter_gets_a_gradient(kind, options):
    net = small(kind, **options)
    logits = run(net, small_inputs(kind)).flatten(0, -2)
    F.cross_entropy(logits, torch.randint(7, (len(logits),))).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    net = pickle.loads(pickle.dumps(net)).to("meta")  # without values
    on_meta = run(net, small_inputs(kind).to("meta"))
    assert on_meta.shape == ((2, 9, 11) if kind == "LM" else (2, 7))


@pytest.mark.slow
@every_kind
def test_a_saved_export_gives_the_same_output(kind, tmp_path):
    net, inputs = small(kind).eval(), small_inputs(kind)
    torch.export.save(torch.export.export(net, (inputs,)), tmp_path / "model.pt2")
    assert_close(torch.export.load(tmp_path / "model.pt2").module()(inputs), net(inputs))


@every_kind
def test_dropout_acts_in_training_only(kind):
    """After the embedding or the stem, and after both branches of each block."""
    net, inputs, calls = small(kind, dropout=0.5), small_inputs(kind), []
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, *_: calls.append(module.p))
    assert not torch.equal(run(net, inputs), run(net, inputs))
    assert calls == 2 * [0.5] * (1 + 2 * len(net.blocks))
    net.eval()
    assert torch.equal(run(net, inputs), run(net, inputs))


@every_kind
def test_initial_weights(kind):
    """Their standard deviation is 0.02, or 0.02 / 4 at the end of one of the 16 branches."""
    net = small(kind, num_layers=8, dim=128)
    ends = [end for block in net.blocks for end in (block.attention.out, block.mlp[-1])]
    for module in net.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            want = 0.005 if module in ends else 0.02
            assert module.weight.std().item() == pytest.approx(want, rel=0.1)
    assert (net.head.bias is None) == (kind == "LM")  # as in GPT-2


@every_variant
def test_decoding_equals_recomputing_the_whole_prefix(options):
    """Greedy decoding in float64. Large weights make the tokens vary."""
    lm = small(**options).double()
    for parameter in lm.parameters():
        parameter.data.mul_(5.0)
    want = prompt = torch.randint(11, (3, 5))
    for _ in range(20):
        logits, _ = lm(want)
        want = torch.cat([want, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert len(want.unique()) > 3
    assert torch.equal(lm.generate(prompt, 20, temperature=0), want)
    logits, state = lm(prompt)
    before = tuple(state)  # a state is not modified, and may be a tuple
    assert torch.equal(lm(prompt, state)[0], lm(prompt, before)[0])
    assert all(x is y for x, y in zip(state, before, strict=True))


def test_a_state_is_small_and_holds_no_other_memory():
    """NaLa's has a constant size, softmax's grows, the convolution keeps its last W - 1 values. A
    view would keep alive, and save, all that it is a part of."""
    lm = small(attention=("nala", "softmax"))
    with torch.no_grad():
        _, first = lm(torch.zeros(1, 40, dtype=torch.long))
        _, second = lm(torch.zeros(1, 1, dtype=torch.long), first)
    for ((nala, past), (softmax, _)), num_tokens in ((first, 40), (second, 41)):
        shapes = [(1, 2, 16, 9), (1, 2, 16), *[(1, 2, num_tokens, 8)] * 2]
        assert [x.shape for x in (nala, past, *softmax)] == shapes
        for x in (nala, past, *softmax):
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size(), x.shape


def test_generate_is_seeded_and_takes_no_gradient():
    lm, prompt, enabled = small(dropout=0.5), torch.randint(11, (2, 3)), []
    a, b, c = (lm.generate(prompt, 12, seed=seed) for seed in (1, np.int64(1), 2))
    assert a.shape == (2, 15) and torch.equal(a[:, :3], prompt)
    assert torch.equal(a, b) and not torch.equal(a, c)
    greedy = lm.generate(prompt, 12, temperature=0)
    for options in ({"top_k": 1}, {"temperature": 1e-30}, {"temperature": 1e-40}):
        assert torch.equal(lm.generate(prompt, 12, **options), greedy)
    assert torch.equal(lm.generate(prompt, 12, top_k=99, seed=1), a)
    a, b = (lm.generate(prompt, 12) for _ in range(2))  # from the global generator
    assert not torch.equal(a, b)
    lm.head.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    lm.generate(prompt, 1)
    assert enabled == [False]


def test_generate_restores_the_mode_of_every_module():
    """Also after an error, and if modules are in different modes."""
    lm, prompt = small(dropout=0.5).train(), torch.zeros(1, 2, dtype=torch.long)
    lm.blocks[0].eval()  # frozen: it stays so

    def modes():
        return [module.training for module in lm.modules()]

    before = modes()
    lm.generate(prompt, 2)
    with model.in_mode(lm, training=True):
        assert modes() == before
    lm.head.register_forward_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.generate(prompt, 2)
    assert modes() == before
    with model.in_mode(lm.eval(), training=True):
        assert all(modes())
    assert not any(modes())


def test_temperature_and_top_k_shape_the_draw():
    lm, prompt = small(), torch.zeros(4000, 1, dtype=torch.long)
    lm.head.weight.data.mul_(30)
    logits = lm(prompt[:1])[0][0, -1]
    for options in ({}, {"temperature": 0.5}, {"top_k": 3}):
        smallest = logits.topk(options.get("top_k", 11)).values[-1]
        kept = logits.where(logits >= smallest, -math.inf)
        want = torch.softmax(kept / options.get("temperature", 1.0), 0)
        drawn = lm.generate(prompt, 1, seed=0, **options)[:, 1]
        got = torch.bincount(drawn, minlength=11) / 4000
        assert (got - want).abs().max() < 0.04
        assert (got[want == 0] == 0).all()
    lm.head.weight.data.zero_()  # all logits are equal: top_k keeps k of them
    assert len(lm.generate(prompt, 1, top_k=3, seed=0)[:, 1].unique()) == 3


@pytest.mark.parametrize(
    ("patch_size", "strides"), [(1, [1, 1]), (2, [1, 2, 1]), (4, [1, 2, 1, 2, 1])]
)
def test_the_stem_has_two_convolutions_per_halving(patch_size, strides):
    """It goes from 3 channels to half the width, then to the full width, and normalises each whole
    image before every later convolution. Sizes are rounded up to whole patches."""
    stem = small("ViT", patch_size=patch_size, dim=13, num_heads=1).stem.double()
    convolutions = [x for x in stem if isinstance(x, torch.nn.Conv2d)]
    assert [x.stride for x in convolutions] == [(stride, stride) for stride in strides]
    assert [x.in_channels for x in convolutions] == [3, 7, *[13] * (len(strides) - 2)]
    images = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    x = convolutions[0](images)
    for convolution in convolutions[1:]:
        mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), False, keepdim=True)
        x = convolution(F.gelu((x - mean) / (variance + 1e-5).sqrt()))
    assert_close(stem(images), x)
    assert x.shape == (2, 13, -(-5 // patch_size), -(-7 // patch_size))


@pytest.mark.parametrize("names", [("nala", "softmax"), ("softmax", "nala")], ids="-".join)
def test_each_block_has_the_configured_attention(names):
    """The model equals one assembled from blocks of models with a single attention."""
    vit = small("ViT", attention=names).double()
    images = torch.randn(2, 3, 6, 10, dtype=torch.float64)
    x = vit.stem(images).movedim(1, -1)
    for i, name in enumerate(names):
        single = small("ViT", attention=name).double()
        single.load_state_dict(vit.state_dict())
        x, _ = single.blocks[i](x, (None, None))
    x = F.layer_norm(x, (16,), vit.norm.weight, vit.norm.bias)
    mean = sum(x[:, r, s] for r in range(3) for s in range(5)) / 15
    assert_close(vit(images), mean @ vit.head.weight.T + vit.head.bias)
