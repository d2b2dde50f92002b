"""From a command line to settings: each flag's value, preset and limits, and one line and an exit
code for each mistake."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import training

import train_cifar
import train_shakespeare
from nala_min import Config, distributed, train
from nala_min.flags import UsageError, flag, parse_flags, run_script
from nala_min.lab import bench, compare

signals_stay_inside = training.signals_stay_inside


NAMES = "steps batch lr muon weight_decay dropout layers heads dim shift".split()


@dataclass
class Toy(train.Settings):
    """A run of something small."""

    NAME = "toy"
    PRESETS = {  # noqa: RUF012
        "cpu": dict(zip(NAMES, (50, 2, 0.5, 0.125, 0.0, 0.0, 2, 2, 8, 1), strict=True)),
        "gpu": dict(zip(NAMES, (70, 4, 0.25, 0.0, 0.1, 0.2, 4, 3, 12, 2), strict=True)),
    }

    shift: int | None = flag(None, "how far it moves", least=0)
    data: Path | None = flag(None, "what it reads", affects_result=False)
    go_on: bool = flag(False, "whether it goes on", affects_result=False)


CPU = {"preset": "cpu", "attention": "nala", "seed": 1, "schedule": "linear"} | Toy.PRESETS["cpu"]


def fail(error):
    raise error


def toy(argv):
    return parse_flags(Toy, ["--preset", "cpu", *argv.split()])


def test_flags_set_fields_and_a_preset_sets_the_others(monkeypatch):
    argv = "--preset gpu --steps 3 --lr 1 --dropout=0 --data a/b --go-on --schedule cosine"
    monkeypatch.setattr("sys.argv", ["toy.py", *argv.split()])
    run = parse_flags(Toy)
    assert (run.steps, run.lr, run.dropout, run.data, run.go_on) == (3, 1.0, 0.0, Path("a/b"), True)
    assert (type(run.steps), type(run.lr), run.schedule) == (int, float, "cosine")
    assert (run.batch, run.muon, run.weight_decay, run.shift) == (4, 0.0, 0.1, 2)
    assert (run.layers, run.heads, run.dim, run.attention, run.seed) == (4, 3, 12, "nala", 1)
    assert (run.resume, run.compile, run.device, toy("").go_on) == (False, False, "auto", False)


@pytest.mark.parametrize(
    ("argv", "folder"),
    [
        ("", "runs/toy_cpu_nala_seed1"),
        ("--seed 2 --schedule cosine --compile", "runs/toy_cpu_nala_seed2_cosine_compiled"),
        ("--preset gpu --dropout 0 --lr 1e-4", "runs/toy_gpu_nala_seed1_lr0.0001_dropout0"),
        ("--attention nala,softmax --data a/b.txt", "runs/toy_cpu_nala-softmax_b_seed1"),
        ("--out=~/x", "/home/somebody/x"),
    ],
)
def test_a_run_s_folder_is_named_after_its_flags(argv, folder, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):  # the second is Windows'
        monkeypatch.setenv(variable, "/home/somebody")
    assert toy(argv).out == Path(folder)


def test_the_preset_is_chosen_by_whether_a_cuda_card_trains(monkeypatch):
    for cuda, device, preset in ((1, "auto", "gpu"), (1, "cuda", "gpu"), (1, "cpu", "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: bool(cuda))
        assert parse_flags(Toy, ["--device", device]).preset == preset
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_flags(Toy, []).steps == 50


def test_the_config_is_what_affects_the_result():
    """Not where or how a run happens, except for compilation, which rounds differently."""
    assert toy("--data hi --out o --device cpu --resume --go-on").config() == CPU
    assert toy("--compile").config() == CPU | {"compile": True}


def test_settings_make_a_model_s_config_and_a_recipe(monkeypatch):
    run = toy("--attention nala,softmax --dropout 0.25 --steps 59 --schedule cosine")
    config = Config(**train.block_options(run.config()))
    sizes = (config.num_layers, config.num_heads, config.dim, config.dropout, config.attentions)
    assert sizes == (2, 2, 8, 0.25, ("nala", "softmax"))
    assert Config(**train.block_options(CPU)).attentions == ("nala", "nala")
    options = {"muon": 0.125, "weight_decay": 0.0, "schedule": "cosine", "seed": 1}
    expected = train.Recipe(59, 0.5, eval_every=5, bfloat16=False, **options)
    assert run.recipe(torch.device("cpu")) == expected
    for native in (False, True):  # the first only emulates bfloat16
        supported = lambda including_emulation=True, x=native: including_emulation or x  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        recipe = toy("--steps 9").recipe(torch.device("cuda"))
        assert (recipe.eval_every, recipe.bfloat16) == (1, native)


WRONG = {
    Toy: """--bogus positional --steps --steps=1.5 --steps=0 --steps=2147483648 --lr=x --lr=9e-10
        --lr=nan --lr=inf --muon=-1e-9 --muon=nan --weight-decay=-1e-9 --dropout=-0.1 --dropout=1
        --seed=-1 --seed=9223372036854775808 --shift=-1 --layers=0 --heads=0 --heads=3 --dim=9
        --go-on=yes --schedule=step --preset=tpu --attention=fast --attention=nala,
        --attention=softmax,nala,elu --attention=missing.py""",
    train_shakespeare.Settings: "--block=0 --sample=-1",
    train_cifar.Settings: "--patch=3 --shift=-1 --data=mnist",
    bench.Settings: "--dtype=float64 --device=tpu",
    compare.Settings: "--study=nope --seeds=0 --seeds=21 --workers=0 --attention=elu",
}


@pytest.mark.parametrize("settings", WRONG)
def test_a_wrong_flag_is_one_line_that_names_it(settings, monkeypatch, capsys):
    for wrong in WRONG[settings].split():
        monkeypatch.setattr("sys.argv", ["/somewhere/script.py", wrong])
        with pytest.raises(SystemExit, match="2"):
            run_script(lambda: parse_flags(settings))
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("script.py: error: ")
        assert wrong.partition("=")[0] in err
        assert err.count("\n") == 1 and err.endswith("\n")


def test_numbers_at_their_limits_are_accepted():
    run = toy("--steps=1 --lr=1e-9 --muon=0 --weight-decay=0 --dropout=0 --seed=0 --shift=0")
    assert (run.steps, run.lr, run.seed, run.shift) == (1, 1e-9, 0, 0)


def test_a_batch_is_divisible_by_the_processes(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert toy("--batch 4").batch == 4
    with pytest.raises(UsageError, match="--batch must be divisible by 2 processes"):
        toy("--batch 3")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("one\ntwo\r\nthree"), 2, "error: one two three\n"),
        (KeyboardInterrupt(), 130, "interrupted: --resume continues from the last checkpoint\n"),
        (KeyboardInterrupt("interrupted, saved"), 130, "interrupted, saved\n"),
        (OSError(28, "No space left", "x"), 1, "error: [Errno 28] No space left: 'x'\n"),
        (MemoryError(), 1, "error: out of memory\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), 1, "error: CUDA out of memory. "),
        (RuntimeError("No working C++ compiler found\nin"), 1, "error: No working C++ compiler"),
        (RuntimeError("a bug"), None, None),
        (ValueError("a bug"), None, None),
    ],
)
def test_an_error_is_one_line_and_an_exit_code_but_a_bug_is_a_traceback(
    error, code, line, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["/somewhere/script.py"])
    with pytest.raises(SystemExit if code else type(error)) as raised:
        run_script(lambda: fail(error))
    assert getattr(raised.value, "code", None) == code
    err = capsys.readouterr().err
    assert err.startswith(f"script.py: {line}") and err.count("\n") == 1 if code else err == ""


def test_any_console_shows_each_line_at_once(monkeypatch):
    """One that lacks a character shows a question mark. A notebook's cannot be reconfigured."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    monkeypatch.setattr("sys.stdout", console)
    run_script(lambda: print("5 € an hour \udc80"))
    assert console.buffer.getvalue() == b"5 ? an hour ?\n"
    monkeypatch.setattr("sys.stdout", notebook := io.StringIO())
    for rank in (0, 1):  # only the first process prints
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        run_script(lambda: print(f"{distributed.rank()} €"))
    assert notebook.getvalue() == "0 €\n"


def test_a_reader_that_went_away_ends_a_script_quietly(monkeypatch, capsys):
    """As with `| head -1`. What is still to be printed goes to os.devnull."""
    moved, null = [], os.stat(os.devnull)
    note = lambda new, old: moved.append((os.path.samestat(os.fstat(new), null), old))  # noqa: E731
    monkeypatch.setattr(os, "dup2", note)
    with pytest.raises(SystemExit, match="1"):
        run_script(lambda: fail(BrokenPipeError()))
    assert moved == [(True, 1), (True, 2)] and capsys.readouterr() == ("", "")
