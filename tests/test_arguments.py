"""Invalid arguments for every public function, generated from its signature. Each error names the
argument, what it must be and what it got."""

import dataclasses
import inspect
import math
import re

import pytest
import torch

import nala_min
from nala_min import LMConfig, NaLaLM, NaLaViT, ViTConfig, arguments, distributed
from nala_min.arguments import check, checked

B, H, N, D, M = 2, 3, 6, 4, 5
LM = NaLaLM(LMConfig(vocab_size=7, num_layers=2, num_heads=2, dim=8))
VIT = NaLaViT(ViTConfig(num_layers=1, num_heads=2, dim=8))
FUNCTIONS = {
    name: value
    for name, value in vars(nala_min).items()
    if name in nala_min.__all__ and inspect.isfunction(value)
} | {
    "sequence_parallel_attention": distributed.sequence_parallel_attention,
    "NaLaLM": LM.forward,
    "generate": LM.generate,
    "NaLaViT": VIT.forward,
}
CONFIGS = {"LMConfig": {"vocab_size": 7}, "ViTConfig": {}}

q, k, x = torch.randn(3, B, H, N, D)
VALID = {  # a valid value for each name, unless OTHER_VALID has one
    **{"q": q, "k": k, "x": x, "v": torch.randn(B, H, N, M)},
    **{"norm": q.norm(dim=-1, keepdim=True), "direction": q, "magnitude": q.abs()},
    **{"power": torch.ones(B, H, N, 1), "weights": torch.rand(B, H, N, N), "features": q},
    **{"angles": torch.rand(N, D // 2), "positions": torch.arange(N)[:, None].float()},
    **{"key_mask": torch.ones(B, N, dtype=torch.bool), "rope_positions": torch.rand(N, 2)},
    **{"state": torch.zeros(B, H, 2 * D, M + 1), "norm_scale": torch.ones(H, 1, 1)},
    **{"tokens": torch.zeros(B, N, dtype=torch.long), "images": torch.randn(B, 3, 8, 8)},
    **{"lam": 2.0, "tau": 0.5, "alpha": 3, "num_features": 4, "chunk_size": 4, "seed": 1},
    **{"num_tokens": 2, "temperature": 1.0, "top_k": 3, "causal": True, "return_state": False},
    **{"feature_map": "split", "mode": "auto", "group": None},
    **{"query_features": torch.relu, "key_features": torch.relu},
}
LM_STATE = LM(torch.zeros(B, 1, dtype=torch.long))[1]
OTHER_VALID = {
    ("linear_attention", "state"): torch.zeros(B, H, D, M + 1),
    ("softmax_attention", "state"): (torch.zeros(B, H, 2, D), torch.zeros(B, H, 2, M)),
    ("NaLaLM", "state"): LM_STATE,
}
INVALID_BY_RULE = {
    arguments._POSITIVE: [math.nan, math.inf, -1.0, 0.0, "3", True, 1j, [1.0]],
    arguments._NOT_NEGATIVE: [math.nan, math.inf, -1.0, "3", True, 1j, [1.0]],
    arguments._COUNT: [0, -1, 1.5, math.nan, "3", True, 2**70, [1]],
    arguments._boolean: [0, 1, "yes", torch.tensor(True)],
    arguments._names: [5, ["nala", 5], b"nala"],
    arguments.RULES["temperature"]: [math.nan, math.inf, -1.0, 1e-40, "3", True, 1j, [1.0]],
    arguments.RULES["dropout"]: [math.nan, 1.0, -0.1, "0.1", True],
    arguments.RULES["num_tokens"]: [-1, 1.5, "3", True, 2**70],
    arguments.RULES["seed"]: [-1, 1.5, "3", True, 2**70],
}
OTHER_INVALID = {
    ("softmax_attention", "state"): ["3", torch.zeros(2)],
    ("NaLaLM", "state"): [3, LM_STATE[:1]],
    ("sequence_parallel_attention", "group"): [],
}


def valid_arguments(function):
    """Valid arguments for FUNCTIONS[function]; those that default to None are left out."""
    parameters = inspect.signature(FUNCTIONS[function]).parameters.values()
    return {
        p.name: OTHER_VALID.get((function, p.name), VALID[p.name])
        for p in parameters
        if p.kind is not p.VAR_KEYWORD and p.default is not None
    }


def invalid_tensors(spec, tensor, known):
    """Values that violate spec. known: letters whose sizes earlier arguments fix."""
    *letters, last = spec.split()
    letters += [] if last in arguments.KINDS else [last]
    kinds = [torch.float32, torch.int64, torch.bool, torch.complex64]
    is_valid = arguments.KINDS[last if last in arguments.KINDS else "floating"]
    for dtype in kinds:
        if not is_valid(torch.zeros(1, dtype=dtype)):
            yield torch.zeros(tensor.shape, dtype=dtype)
    yield from ([1.0], "tensor", 3j)
    if set(letters) - {"...", "1"}:  # sizes of 1 may be left out
        yield tensor.flatten()[0] if letters[0] == "..." else tensor[0]
    for i, letter in enumerate(reversed(letters)):
        if letter == "...":
            continue
        shape = list(tensor.shape)
        if letter in known or letter.isdigit() or "+" in letter:
            shape[-1 - i] += 1
            yield torch.zeros(shape, dtype=tensor.dtype)
        if letter in "DNKRSF":
            shape[-1 - i] = 0
            yield torch.zeros(shape, dtype=tensor.dtype)
    if known:
        yield tensor.to("meta")


def invalid_arguments(function):
    """Yield pairs (argument, value) that FUNCTIONS[function] must reject."""
    call = FUNCTIONS[function]
    specs, known = call.specs, set()
    for p in inspect.signature(call).parameters.values():
        name, spec = p.name, specs.get(p.name)
        if p.kind is p.VAR_KEYWORD:
            names = ["lam", "tau", "alpha", "norm_scale"]
            yield from ((n, value) for n in names for value in INVALID_BY_RULE[arguments.RULES[n]])
            continue
        if p.default is not None:
            yield name, None
        if (function, name) in OTHER_INVALID:
            yield from ((name, value) for value in OTHER_INVALID[function, name])
        elif isinstance(spec, str):
            example = VALID[name]
            for value in invalid_tensors(spec, example, known):
                if isinstance(value, torch.Tensor) or name not in arguments.RULES:
                    yield name, value
            known |= set(spec.split())
        elif spec is not None:
            yield from ((name, value) for value in ("nope", 5, b"split"))
        if name in arguments.RULES:
            yield from ((name, value) for value in INVALID_BY_RULE[arguments.RULES[name]])


def assert_named(error, name, value):
    """The message starts with the argument's name and says what it got."""
    message = str(error.value)
    assert "\n" not in message
    assert re.match(rf"{name}\b", message), message
    if isinstance(value, torch.Tensor) and value.device.type != "meta":
        is_range = name == "tokens" and "must be from" in message
        assert is_range or str(value.dtype).removeprefix("torch.") in message, message
        assert is_range or str(tuple(value.shape)) in message, message
    assert " must be " in message, message


@pytest.mark.parametrize("function", FUNCTIONS)
def test_valid_arguments_are_accepted(function):
    if function != "sequence_parallel_attention":  # it needs other processes
        FUNCTIONS[function](**valid_arguments(function))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_invalid_argument_is_named(function):
    cases = list(invalid_arguments(function))
    assert {name for name, _ in cases} >= set(valid_arguments(function)) - {"group"}
    for name, value in cases:
        with pytest.raises((TypeError, ValueError)) as error:
            FUNCTIONS[function](**valid_arguments(function) | {name: value})
            pytest.fail(f"{function} accepted {name}={value}")
        assert_named(error, name, value)


@pytest.mark.parametrize("config", CONFIGS)
def test_an_invalid_config_field_is_named(config):
    kind = getattr(nala_min, config)
    for item in dataclasses.fields(kind):
        values = ["both", 5] if item.name == "rope" else INVALID_BY_RULE[arguments.RULES[item.name]]
        if item.name != "norm_scale":
            values = values + [None] * (item.name != "rope")
        for value in values:
            with pytest.raises((TypeError, ValueError)) as error:
                kind(**CONFIGS[config] | {item.name: value})
                pytest.fail(f"{config} accepted {item.name}={value}")
            assert re.match(rf"{item.name}\b", str(error.value)), error.value


def test_float64_is_not_mixed_with_float32():
    for name in ("k", "v"):
        with pytest.raises(TypeError, match=f"{name} must be torch.float32, like q, got float64"):
            nala_min.nala_attention(
                **valid_arguments("nala_attention") | {name: VALID[name].double()}
            )


def test_q_is_the_reference_in_any_order_of_arguments():
    with pytest.raises(ValueError, match=r"k must be .* with N = 6, as in q"):
        nala_min.nala_attention(v=VALID["v"], k=k[:, :, :5], q=q)


@pytest.mark.parametrize(
    "function", ["nala_attention", "linear_attention", "softmax_attention", "attention_weights"]
)
def test_shared_sizes_of_queries_keys_and_values_are_compared(function):
    """Written out, because the cases above come from the specs under test."""
    shared = {"k": (0, 1, 3), "v": (0, 1, 2), "key_mask": (0, 1)}
    if function in ("nala_attention", "linear_attention"):
        shared |= {"k": (0, 1, 2, 3), "rope_positions": (0,), "state": (0, 1, 2, 3)}
    if function == "linear_attention":
        shared["state"] = (0, 1, 3)  # F is known only after the features are computed
    for name in shared.keys() & inspect.signature(FUNCTIONS[function]).parameters.keys():
        for dim in shared[name]:
            shape = list(VALID[name].shape)
            shape[dim] += 1
            tensor = torch.zeros(shape, dtype=VALID[name].dtype)
            with pytest.raises(ValueError, match=rf"^{name} must "):
                FUNCTIONS[function](**valid_arguments(function) | {name: tensor})


def test_a_missing_tensor_is_named():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'q'"):
        nala_min.nala_attention(k=k, v=VALID["v"])


def test_a_state_has_as_many_features_as_the_feature_map(monkeypatch):
    """Also if the feature map was edited."""
    monkeypatch.setattr(nala_min.model, "cosine_map", lambda magnitude, direction, alpha: magnitude)
    _, state = nala_min.nala_attention(q, k, VALID["v"], causal=True, return_state=True)
    assert state.shape[2] == D
    nala_min.nala_attention(q, k, VALID["v"], causal=True, state=state)
    with pytest.raises(ValueError, match=r"state must be .* with F = 4, got float32"):
        nala_min.nala_attention(q, k, VALID["v"], causal=True, state=VALID["state"])


def test_tokens_outside_the_vocabulary_are_named():
    for invalid in (-1, 7):
        with pytest.raises(ValueError, match=r"tokens must be from 0 to 6, got "):
            LM(torch.tensor([[0, invalid]]))


def test_incompatible_sizes_are_named():
    with pytest.raises(
        ValueError,
        match=r"direction must be broadcastable with the leading sizes \(2, 3, 6\) of magnitude",
    ):
        nala_min.cosine_map(q.abs(), torch.randn(5, D))
    assert nala_min.cosine_map(q.abs(), torch.randn(N, D)).shape == (B, H, N, 2 * D)


def test_a_mask_with_a_softmax_state_is_rejected():
    """It would not cover the keys in the state."""
    state = OTHER_VALID["softmax_attention", "state"]
    with pytest.raises(ValueError, match="key_mask must be None with a state, got bool"):
        nala_min.softmax_attention(q, k, VALID["v"], state=state, key_mask=VALID["key_mask"])


def test_an_argument_without_a_rule_is_rejected_at_once():
    with pytest.raises(TypeError, match=r"forgetful: no spec for \['forgotten'\]"):

        @checked(q="... D")
        def forgetful(q, forgotten, lam=1.0):
            pass


def test_a_call_within_a_checked_function_is_not_checked_again():
    calls = []

    @checked(q="... D")
    def inner(q):
        calls.append(q)

    @checked(q="... D")
    def outer(q):
        inner("anything")
        raise KeyError

    with pytest.raises(KeyError):
        outer(q)
    assert calls == ["anything"]
    with pytest.raises(TypeError, match="q must be a tensor"):  # checks are on again
        inner("anything")


def test_numpy_numbers_are_accepted():
    check({"lam": torch.ones(1).numpy()[0], "chunk_size": torch.ones(1).long().numpy()[0]})


def test_checked_functions_keep_their_names_and_their_source():
    assert nala_min.decompose.__name__ == "decompose"
    assert "vector_norm" in inspect.getsource(nala_min.decompose)
