"""Names to classes: discovery, nearest names, options, plug-in files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trilemma
from trilemma import registry
from trilemma.errors import CapabilityError, ConfigError
from trilemma.mixers.base import Mixer
from trilemma.mixers.build import build_mixer
from trilemma.models import build_model

BUILT_IN = {"attention", "bidirectional", "cross_attention", "gru", "lstm", "retention"}

PLUGIN = '''
"""A mixer in one file: the mean of what was read."""

from dataclasses import dataclass

import torch
from torch import nn

from trilemma.mixers.base import Capabilities, Mixer
from trilemma.registry import register_mixer
from trilemma.state import State, updated


@dataclass
class MeanState(State):
    total: torch.Tensor
    count: torch.Tensor


@register_mixer("running-mean")
class RunningMean(Mixer):
    capabilities = Capabilities(constant_state=True)

    def __init__(self, d_model: int, causal: bool = True, gain: float = 1.0) -> None:
        super().__init__(d_model, causal)
        self.gain = gain
        self.out = nn.Linear(d_model, d_model)

    def new_state(self, rows, capacity, rewind, dtype, device):
        return MeanState(
            torch.zeros(rows, self.d_model, dtype=dtype, device=device),
            torch.zeros(rows, 1, dtype=dtype, device=device),
        )

    def mix(self, x, state, ragged, shared):
        valid = ragged.valid(x.shape[1]) if ragged is not None else None
        ones = x.new_ones(x.shape[:2]) if valid is None else valid.to(x.dtype)
        sums, counts = x.cumsum(1), ones.cumsum(1)[..., None]
        if state is not None:
            sums, counts = sums + state.total[:, None], counts + state.count[:, None]
            state = MeanState(updated(state.total, sums[:, -1]), updated(state.count, counts[:, -1]))
        return self.out(self.gain * sums / counts.clamp(min=1)), state

    def flops(self, length, context=0):
        return 2 * length * self.d_model**2

    def state_bytes(self, length, dtype=torch.float32):
        return (self.d_model + 1) * dtype.itemsize
'''


@pytest.fixture(autouse=True)
def _same_registry_afterwards() -> Iterator[None]:
    """What a test registers is forgotten."""
    registry.available_mixers()
    before, plugins = dict(registry._MIXERS), dict(registry._PLUGINS)
    yield
    registry._MIXERS.clear()
    registry._MIXERS.update(before)
    registry._PLUGINS.clear()
    registry._PLUGINS.update(plugins)
    for name in [name for name in sys.modules if name.startswith("trilemma_plugin_")]:
        del sys.modules[name]


def plugin(folder: Path, text: str = PLUGIN, name: str = "mean.py") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_every_module_of_the_package_is_found() -> None:
    assert set(registry.available_mixers()) >= BUILT_IN
    assert registry.available_mixers() == sorted(registry.available_mixers())
    for name in registry.available_mixers():
        assert registry.mixer_class(name).name == name
    assert trilemma.available_mixers() == registry.available_mixers()


def test_discovery_needs_no_import_of_the_mixers() -> None:
    code = "from trilemma.registry import available_mixers; print(' '.join(available_mixers()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) >= BUILT_IN


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("retntion", 'unknown mixer "retntion"; did you mean "retention"?'),
        ("LSTM", 'unknown mixer "LSTM"; did you mean "lstm"?'),
    ],
)
def test_an_unknown_mixer_names_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.mixer_class(name)
    assert str(caught.value) == message


def test_a_mixer_like_no_other_lists_them_all() -> None:
    with pytest.raises(ConfigError) as caught:
        registry.mixer_class("zzz")
    assert str(caught.value) == f'unknown mixer "zzz"; valid: {", ".join(registry.available_mixers())}'


BASE: dict[str, Any] = {"layout": "decoder-only", "vocab_size": 5, "d_model": 8, "num_layers": 1, "num_heads": 2}

OPTION_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"name": "attention", "windw": 3}, 'mixer "attention": unknown option "windw"; did you mean "window"?'),
    ({"name": "attention", "d_model": 3}, 'mixer "attention": d_model follows from the model, it is no option'),
    ({"name": "attention", "causal": False}, 'mixer "attention": causal follows from the model, it is no option'),
    (
        {"name": "lstm", "num_heads": 3},
        'mixer "lstm" has no heads: unknown option "num_heads"; valid: forget_bias, hidden',
    ),
    (
        {"name": "attention", "window": "wide"},
        'mixer "attention": option window: Input should be a valid integer, unable to parse string as an integer, '
        "found 'wide'",
    ),
    (
        {"name": "attention", "num_heads": 1.5},
        'mixer "attention": option num_heads: Input should be a valid integer, got a number with a fractional part, '
        "found 1.5",
    ),
    (
        {"name": "retention", "gate": "never"},
        "mixer \"retention\": option gate: Input should be a valid boolean, unable to interpret input, found 'never'",
    ),
    (
        {"name": "retention", "group_norm": "rsm"},
        "mixer \"retention\": option group_norm: Input should be 'rms', 'layer' or 'none', found 'rsm'",
    ),
]


@pytest.mark.parametrize(("spec", "message"), OPTION_MISTAKES, ids=[case[1][:60] for case in OPTION_MISTAKES])
@pytest.mark.parametrize("layout", ["decoder-only", "encoder-only"])
def test_an_option_that_does_not_fit_is_refused(spec: dict[str, Any], message: str, layout: str) -> None:
    """In encoders too, where the mixer may be wrapped."""
    with pytest.raises(ConfigError) as caught:
        build_model({**BASE, "layout": layout, "mixer": spec})
    assert str(caught.value) == message


def test_options_mean_what_they_say() -> None:
    """A word that means false is false, not a text that counts as true."""
    spec = {"name": "retention", "gate": "off", "value_factor": "1", "num_heads": 4}
    plain = {"name": "retention", "gate": False, "value_factor": 1, "num_heads": 4}
    assert build_mixer("retention", 8, gate="off").gated is False
    for layout in ("decoder-only", "encoder-only"):
        models = [build_model({**BASE, "layout": layout, "mixer": each}) for each in (spec, plain)]
        assert models[0].parameter_counts() == models[1].parameter_counts()


def test_a_mixer_may_have_other_heads_than_the_model() -> None:
    mixers = {
        "mixer": {"name": "attention", "num_heads": 8},
        "encoder_mixer": {"name": "retention", "num_heads": 4},
        "cross_mixer": {"name": "cross_attention", "num_heads": 1},
    }
    model = build_model({**BASE, "layout": "encoder-decoder", **mixers})
    assert [mixer.num_heads for mixer in model.stack.mixers()] == [8, 1]
    assert [mixer.ahead.num_heads for mixer in model.encoder.mixers()] == [4]


def test_heads_are_handed_to_mixers_that_have_them() -> None:
    assert build_mixer("attention", 8, num_heads=2).num_heads == 2
    assert build_mixer("lstm", 8, num_heads=2).name == "lstm"


def test_a_name_is_given_once() -> None:
    class Other(Mixer):
        pass

    with pytest.raises(ConfigError) as caught:
        registry.register_mixer("attention")(Other)
    assert str(caught.value) == 'the mixer name "attention" is taken by trilemma.mixers.attention.Attention'


def test_a_plugin_gives_a_mixer_that_works_everywhere(tmp_path: Path) -> None:
    file = plugin(tmp_path)
    assert registry.load_plugin(file) == ["running-mean"]
    assert registry.loaded_plugins() == [file.resolve()]
    assert "running-mean" in registry.available_mixers()
    for layout in ("encoder-decoder", "decoder-only"):
        values = {"layout": layout, "vocab_size": 9, "d_model": 4, "num_layers": 2, "num_heads": 2}
        model = build_model({**values, "mixer": {"name": "running-mean", "gain": 2.0}}).double().eval()
        ids = torch.randint(0, 9, (2, 5))
        source = {"source": ids} if layout == "encoder-decoder" else {}
        whole = model.head(model(ids, **source))
        with torch.no_grad():
            _, state = model.prefill(ids[:, :3], torch.tensor([3, 3]), **source)
            y, _ = model.step(ids[:, 3:], state)
        torch.testing.assert_close(y, whole[:, 3:])


def test_a_plugin_may_be_loaded_twice(tmp_path: Path) -> None:
    """The same file named twice on one command line, or by a process that inherits it."""
    file = plugin(tmp_path)
    assert registry.load_plugin(file) == ["running-mean"]
    assert registry.load_plugin(file) == ["running-mean"]
    assert registry.loaded_plugins() == [file.resolve()]


def test_two_plugins_of_one_file_name(tmp_path: Path) -> None:
    for folder, name in (("a", "first"), ("b", "second")):
        (tmp_path / folder).mkdir()
        text = PLUGIN.replace("running-mean", name).replace("class RunningMean", f"class {name.title()}")
        assert registry.load_plugin(plugin(tmp_path / folder, text)) == [name]


PLUGIN_MISTAKES = {
    "absent": (None, "plug-in {file}: no such file"),
    "empty": ("", "plug-in {file}: registers no mixer; decorate a Mixer subclass with @register_mixer(name)"),
    "broken": ("x = (\n", "plug-in {file}: SyntaxError: '(' was never closed (mean.py, line 1)"),
    "raises": ("1 / 0\n", "plug-in {file}:1: ZeroDivisionError: division by zero"),
    "needs more": (
        "import no_such_package\n",
        "plug-in {file}:1: ModuleNotFoundError: No module named 'no_such_package'",
    ),
    "takes a name": (
        PLUGIN.replace("running-mean", "lstm"),
        'plug-in {file}:20: the mixer name "lstm" is taken by trilemma.mixers.lstm.LSTM',
    ),
}


@pytest.mark.parametrize("case", PLUGIN_MISTAKES)
def test_a_mistaken_plugin_is_one_clear_message(case: str, tmp_path: Path) -> None:
    text, expected = PLUGIN_MISTAKES[case]
    file = tmp_path / "mean.py" if text is None else plugin(tmp_path, text)
    before = registry.available_mixers()
    with pytest.raises(ConfigError) as caught:
        registry.load_plugin(file)
    assert str(caught.value) == expected.format(file=file)
    assert registry.available_mixers() == before
    assert registry.loaded_plugins() == []
    assert not any(name.startswith("trilemma_plugin_") for name in sys.modules)


def test_a_plugin_that_is_no_python_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a Python file$"):
        registry.load_plugin(plugin(tmp_path, "x", "mean.txt"))


def test_a_plugin_that_registers_and_then_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        registry.load_plugin(plugin(tmp_path, PLUGIN + "\n1 / 0\n"))
    assert "running-mean" not in registry.available_mixers()


def test_a_causal_mixer_says_how_to_serve_in_an_encoder() -> None:
    with pytest.raises(CapabilityError) as caught:
        build_mixer("lstm", 8, causal=False)
    assert str(caught.value) == 'mixer "lstm" is causal only; in encoders wrap it: mixer "bidirectional"'
