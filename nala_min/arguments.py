"""Argument checks for everything that the package exports. They live here to keep model.py short.
Each error names the argument, says what it must be and shows what it got.

`checked(q="B H N D", k="B H N D")` declares the shapes of a function's tensors in model.py's
letters. A letter is the same size in all arguments; "..." matches any sizes that broadcast. Other
arguments are checked by name, see RULES: a name means the same everywhere. An argument without a
spec or a rule is an error when the function is defined, so none can be forgotten. Calls from inside
a checked function and calls traced by torch.compile are not checked.
"""

from __future__ import annotations

import functools
import inspect
import math
import reprlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.utils._pytree import _register_namedtuple as register_namedtuple
from torch.utils._pytree import tree_leaves

from nala_min import model

DOUBLE = torch.float64  # not mixed with lower precision
FEATURE_MAPS = ("cosine", "split", "elu", "relu")
MODES = ("auto", "parallel", "quadratic", "chunked", "recurrent")
Rule = Callable[[str, Any], None]  # takes name and value, raises TypeError or ValueError


def checked(
    check_together: Callable[[dict[str, Any]], None] | None = None,
    **specs: str | Sequence[str] | type,
) -> Callable[[Callable], Callable]:
    """Decorator that checks a function's arguments before it runs.

    specs: per argument, its shape, such as "B H N D" or "B N bool" (floating-point if none of KINDS
    is named), its allowed strings, or its type. check_together: checks arguments against each
    other; it gets all of them by name. Raises TypeError for an argument without a spec or rule.
    """

    def decorate(function: Callable) -> Callable:
        parameters = inspect.signature(function).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names = [p.name for p in parameters if p.kind in kinds]
        required = {p.name for p in parameters if p.default is not None}
        if missing := [n for n in names if n != "self" and n not in specs and n not in RULES]:
            raise TypeError(f"{function.__name__}: no spec for {missing}")

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or _call_state.in_checked_call:
                return function(*args, **kwargs)
            given = dict(zip(names, args, strict=False)) | kwargs
            ordered = [n for n in dict.fromkeys((*names, *given)) if n in given]
            check({n: given[n] for n in ordered if given[n] is not None or n in required}, specs)
            if check_together:
                check_together(given)
            _call_state.in_checked_call = True
            try:
                return function(*args, **kwargs)
            finally:
                _call_state.in_checked_call = False

        call.specs = specs
        return call

    return decorate


class _CallState(threading.local):
    in_checked_call = False


_call_state = _CallState()


def check(given: dict[str, Any], specs: dict[str, Any] | None = None) -> None:
    """Check named values against specs, see checked, or else against RULES.

    Raises TypeError or ValueError, which names the first wrong value.
    """
    specs = specs or {}
    sizes: dict[str, tuple[int, str]] = {}  # letter: its size, and the tensor that set it
    first: tuple[str, Tensor] | None = None
    for name, value in given.items():
        spec = specs.get(name)
        if isinstance(spec, str) and (isinstance(value, Tensor) or name not in RULES):
            _check_tensor(name, value, spec, sizes)
            if spec.endswith("token"):
                _check_tokens(name, value, given["self"].config.vocab_size)
            first = first or (name, value)
            if value.device != first[1].device:
                raise ValueError(
                    f"{name} must be on {first[1].device}, like {first[0]}, got {value.device}"
                )
            mixed = (value.dtype == DOUBLE) != (first[1].dtype == DOUBLE)
            if mixed and name in ("k", "v", "state"):
                raise TypeError(f"{name} must be {first[1].dtype}, like {first[0]}, {_got(value)}")
        elif isinstance(spec, tuple | list):
            if not (callable in spec and callable(value)):
                _check_choice(name, value, [x for x in spec if isinstance(x, str)])
        elif spec is callable:
            if not callable(value):
                raise TypeError(f"{name} must be a function, {_got(value)}")
        elif isinstance(spec, type):
            if not isinstance(value, spec):
                raise TypeError(f"{name} must be a {spec.__name__.lower()}, {_got(value)}")
        elif name in RULES:
            RULES[name](name, value)


def _check_tensor(name: str, value: Any, spec: str, sizes: dict[str, tuple[int, str]]) -> None:
    *letters, last = spec.split()
    kind = last if last in KINDS else "floating"
    letters += [] if last in KINDS else [last]
    shape = f"{KIND_NAMES.get(kind, kind)} ({', '.join(letters)})"
    if isinstance(value, torch.fx.Proxy):
        raise TypeError(f"{name} must be a tensor, got a torch.fx.Proxy: use torch.export instead")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, {shape}, {_got(value)}")
    if not KINDS[kind](value):
        raise TypeError(f"{name} must be {shape}, {_got(value)}")
    dims = list(value.shape)
    if letters[0] == "...":
        letters = letters[1:]
        if set(letters) == {"1"}:  # sizes of 1 may be omitted
            dims = [1] * (len(letters) - len(dims)) + dims
        leading = dims[: len(dims) - len(letters)]
        dims = dims[len(dims) - len(letters) :] if len(dims) >= len(letters) else []
        _check_leading(name, value, leading, sizes)
    if len(dims) != len(letters):
        raise ValueError(f"{name} must be {shape}, {_got(value)}")
    for letter, dim in zip(letters, dims, strict=True):
        size, source = sizes.setdefault(letter, (dim, name))
        if letter.isdigit():
            size, source = int(letter), ""
        if letter.endswith("+1") and letter[:-2] in sizes:
            size, source = sizes[letter[:-2]][0] + 1, sizes[letter[:-2]][1]
        if dim != size:
            where = f" with {letter} = {size}, as in {source}" if source else ""
            raise ValueError(f"{name} must be {shape}{where}, {_got(value)}")
        if dim == 0 and letter not in ("B", "M"):
            raise ValueError(f"{name} must be {shape} with {letter} > 0, {_got(value)}")


def _check_tokens(name: str, tokens: Tensor, size: int) -> None:
    """Check token values on a CPU only: reading them would synchronise another device. A tensor
    subclass may have no values."""
    if type(tokens) is not Tensor or not tokens.is_cpu or not tokens.numel():
        return
    if torch._C._are_functorch_transforms_active():
        return
    extremes = tokens.aminmax()
    if type(extremes.min) is not Tensor:  # for example under FakeTensorMode
        return
    low, high = extremes.min.item(), extremes.max.item()
    if low < 0 or high >= size:
        raise ValueError(f"{name} must be from 0 to {size - 1}, got {low} to {high}")


def _check_leading(name: str, value: Tensor, leading: list[int], sizes: dict) -> None:
    size, source = sizes.get("...", ((), ""))
    try:
        sizes["..."] = tuple(torch.broadcast_shapes(size, leading)), source or name
    except RuntimeError:
        raise ValueError(
            f"{name} must be broadcastable with the leading sizes {tuple(size)} of {source},"
            f" {_got(value)}"
        ) from None


KIND_NAMES = {"floating": "floating-point", "token": "int64 or int32", "real": "real-valued"}
KINDS: dict[str, Callable[[Tensor], bool]] = {
    "floating": Tensor.is_floating_point,
    "bool": lambda x: x.dtype == torch.bool,
    "token": lambda x: x.dtype in (torch.int64, torch.int32),
    "real": lambda x: not x.is_complex() and x.dtype != torch.bool,
}


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {tuple(choices)}, {_got(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def _number(description: str, is_valid: Callable[[Any], bool], integer: bool = False) -> Rule:
    def rule(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, Integral if integer else Real):
            raise TypeError(f"{name} must be {description}, {_got(value)}")
        if not is_valid(value):
            raise ValueError(f"{name} must be {description}, {_got(value)}")

    return rule


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, {_got(value)}")


def _names(name: str, value: Any) -> None:
    several = isinstance(value, tuple | list)
    if not isinstance(value, str) and not (several and all(isinstance(x, str) for x in value)):
        raise TypeError(f"{name} must be a name or a list of names, {_got(value)}")


def _got(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"got {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"got {reprlib.repr(value)} ({type(value).__name__})"


_POSITIVE = _number("a positive finite number", lambda x: 0 < x < math.inf)
_NOT_NEGATIVE = _number("a non-negative finite number", lambda x: 0 <= x < math.inf)
_COUNT = _number("a positive integer", lambda x: 0 < x < 2**63, integer=True)

RULES: dict[str, Rule] = {
    **dict.fromkeys(("lam", "alpha", "norm_scale"), _POSITIVE),
    "tau": _NOT_NEGATIVE,
    "temperature": _number(
        "0 or a finite number of at least 1e-30", lambda x: not x or 1e-30 <= x < math.inf
    ),
    **dict.fromkeys(("num_layers", "num_heads", "dim", "conv_size", "patch_size"), _COUNT),
    **dict.fromkeys(("vocab_size", "num_classes"), _COUNT),
    **dict.fromkeys(("chunk_size", "top_k"), _COUNT),
    "dropout": _number("a probability in [0, 1)", lambda x: 0 <= x < 1),
    "num_tokens": _number("a non-negative integer", lambda x: 0 <= x < 2**63, integer=True),
    "seed": _number("a non-negative integer", lambda x: 0 <= x < 2**63, integer=True),
    **dict.fromkeys(("causal", "return_state"), _boolean),
    "attention": _names,
}


# --- What the package exports ---------------------------------------------------------------------


def _check_attention(given: dict[str, Any]) -> None:
    """Check the arguments of linear_attention or nala_attention against each other."""
    if not {"q", "k"} <= given.keys():
        return  # Python names the missing one
    mode, causal, state = (given.get(name) for name in ("mode", "causal", "state"))
    if mode in ("quadratic", "chunked", "recurrent") and not causal:
        raise ValueError(f"causal must be True for mode={mode!r}, got False")
    if state is not None or given.get("return_state"):
        if not causal:
            raise ValueError("causal must be True for a state, got False")
        if mode in ("parallel", "quadratic"):
            raise ValueError(
                f"mode must be 'auto', 'chunked' or 'recurrent' for a state, got {mode!r}"
            )
    dim, positions = given["q"].shape[3], given.get("rope_positions")
    if state is not None and "query_features" not in given:
        feature_map = given.get("feature_map", "cosine")
        num_features = model.key_features(given["k"][:1, :1, :1].detach(), feature_map).shape[3]
        if state.shape[2] != num_features:
            raise ValueError(f"state must be (B, H, F, M+1) with F = {num_features}, {_got(state)}")
    if positions is not None and dim % (2 * positions.shape[1]):
        axes = positions.shape[1]
        raise ValueError(f"rope_positions: D must be divisible by 2 x {axes} axes, got {dim}")


def _check_softmax(given: dict[str, Any]) -> None:
    if {"q", "k"} <= given.keys() and given.get("causal") and given.get("state") is None:
        queries, keys = given["q"].shape[2], given["k"].shape[2]
        if queries > keys:
            raise ValueError(
                f"k must have at least as many tokens as q if causal, got {keys} < {queries}"
            )
    if given.get("state") is not None and given.get("key_mask") is not None:
        raise ValueError(
            f"key_mask must be None with a state, {_got(given['key_mask'])}: it does not cover the"
            " earlier keys"
        )


_QKV = {"q": "B H N D", "k": "B H N D", "v": "B H N M"}
_LINEAR = {"mode": MODES, "key_mask": "B N bool", "state": "B H F M+1"}
_LINEAR |= {"rope_positions": "N A real"}
_NALA = {"feature_map": FEATURE_MAPS, "norm_scale": "... 1 1"}

PUBLIC: dict[str, dict[str, Any]] = {  # functions of model.py, and their specs
    "decompose": {"x": "... D"},
    "query_power": {"norm": "...", "norm_scale": "..."},
    "query_magnitude": {"direction": "... D", "power": "... 1"},
    "key_magnitude": {"k": "... D"},
    "cosine_map": {"magnitude": "... D", "direction": "... D"},
    "sign_split": {"magnitude": "... D", "direction": "... D"},
    "query_features": {"q": "... D", "feature_map": FEATURE_MAPS, "norm_scale": "... 1"},
    "key_features": {"k": "... D", "feature_map": FEATURE_MAPS},
    "nala_attention": {**_QKV, **_LINEAR, **_NALA, "check_together": _check_attention},
    "linear_attention": {
        **_QKV,
        "query_features": callable,
        "key_features": callable,
        **_LINEAR,
        "check_together": _check_attention,
    },
    "softmax_attention": {
        "q": "B H N D",
        "k": "B H K D",
        "v": "B H K M",
        "key_mask": "B K bool",
        "state": tuple,
        "check_together": _check_softmax,
    },
    "attention_weights": {
        "q": "B H N D",
        "k": "B H N D",
        **_NALA,
        "feature_map": (*FEATURE_MAPS, "softmax", callable),
        "key_mask": "B N bool",
        "rope_positions": "N A real",
    },
    "entropy": {"weights": "... N"},
}


def public(name: str) -> Callable:
    """The function of model.py with this name, with its arguments checked. It is looked up at each
    call, so an edit of model.py takes effect at once."""
    function = getattr(model, name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(model, name)(*args, **kwargs)

    if name == "nala_attention":  # show its options, those of linear_attention
        own = list(inspect.signature(function).parameters.values())[:-1]
        options = inspect.signature(model.linear_attention).parameters.values()
        options = [p for p in options if p.kind is p.KEYWORD_ONLY]
        call.__signature__ = inspect.signature(function).replace(parameters=own + options)
    return checked(**PUBLIC[name])(call)


# Lets torch.export save states.
register_namedtuple(model.BlockState, serialized_type_name="nala_min.BlockState")


@dataclass(frozen=True, kw_only=True)
class BlockConfig(model.Config):
    """Options of both models.

    Raises TypeError or ValueError for wrong values, or for values that do not fit together.
    """

    def __post_init__(self) -> None:
        check({n: x for n, x in vars(self).items() if (n, x) != ("norm_scale", None)})
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim must be divisible by num_heads, got {self.dim} and {self.num_heads}"
            )
        if len(self.attentions) != self.num_layers:
            raise ValueError(
                f"attention must be one name, or num_layers={self.num_layers} names,"
                f" got {len(self.attentions)}"
            )
        for name in self.attentions:
            if name not in model.ATTENTIONS:
                raise ValueError(
                    f"attention must be one of {tuple(model.ATTENTIONS)}, got {name!r}"
                )
            parameters = inspect.signature(model.ATTENTIONS[name]).parameters
            if self.rope and not parameters.keys() & {"rope_positions", "options"}:
                raise ValueError(
                    f"rope must be None for {name!r}, got {self.rope!r}: it needs linear attention"
                )
        if self.rope not in (None, "numerator"):
            raise ValueError(f"rope must be None or 'numerator', got {self.rope!r}")

    def check_rope(self, axes: int) -> None:
        dim = self.dim // self.num_heads
        if self.rope and dim % (2 * axes):
            raise ValueError(f"rope: channels per head must be divisible by {2 * axes}, got {dim}")

    @property
    def kind(self) -> str:
        """Kind of model: "linear", "softmax", or "hybrid" if only some blocks are linear."""
        linear = sum(name != "softmax" for name in self.attentions)
        return {0: "softmax", self.num_layers: "linear"}.get(linear, "hybrid")


@dataclass(frozen=True, kw_only=True)
class LMConfig(BlockConfig):
    """Sizes and options of a NaLaLM."""

    vocab_size: int  # V

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rope(axes=1)


@dataclass(frozen=True, kw_only=True)
class ViTConfig(BlockConfig):
    """Sizes and options of a NaLaViT. The released backbone is a hybrid, with linear attention in
    early blocks and softmax in late ones: attention=("split", "split", "softmax", "softmax")."""

    conv_size: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rope(axes=2)
        if self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size must be a power of 2, got {self.patch_size}")
        if self.conv_size % 2 == 0:
            raise ValueError(f"conv_size must be odd, got {self.conv_size}")


class NaLaLM(model.NaLaLM):
    __doc__ = model.NaLaLM.__doc__

    @checked(tokens="B N token", state=Sequence)
    @functools.wraps(model.NaLaLM.forward)
    def forward(self, tokens, state=None):
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(
                f"state must be {len(self.blocks)} items, one per block, got {len(state)}"
            )
        for block_state in state or ():
            if not isinstance(block_state, model.BlockState):
                raise TypeError(
                    f"state must be BlockStates, as forward returns, {_got(block_state)}"
                )
            for x in tree_leaves(block_state):
                if isinstance(x, Tensor) and x.shape[:1] != tokens.shape[:1]:
                    raise ValueError(
                        f"state must be of batch size {len(tokens)}, like tokens, got {len(x)}"
                    )
        return super().forward(tokens, state)

    @checked(tokens="B N token")
    @functools.wraps(model.NaLaLM.generate)
    def generate(self, tokens, num_tokens, **options):
        return super().generate(tokens, num_tokens, **options)

    def _replicate_for_data_parallel(self):
        raise TypeError("DataParallel cannot gather the state of a NaLaLM: use torchrun")


class NaLaViT(model.NaLaViT):
    __doc__ = model.NaLaViT.__doc__

    @checked(images="B 3 R S")
    @functools.wraps(model.NaLaViT.forward)
    def forward(self, images):
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            # range() needs concrete numbers, so each image size is compiled separately. With
            # symbolic sizes, PyTorch fails: https://github.com/pytorch/pytorch/issues/172204.
            [len(range(side)) for side in images.shape[2:]]
        return super().forward(images)
