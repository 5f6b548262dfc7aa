"""torch-export: written programs, run by the script of docs/export.md where this package cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import LIMIT, documented, make_run, outputs
from hf_models import CASES, make
from safetensors.torch import load_file

import trilemma
from trilemma.errors import CapabilityError, ConfigError, LawError
from trilemma.interop import export_torch, import_model
from trilemma.interop.program import largest_difference, make_programs
from trilemma.interop.target import ExportOptions, new_folder
from trilemma.nn.cache import RingCache
from trilemma.registry import mixer_class
from trilemma.runs.load import LoadedRun, load_run

LINES = ["s3 s4 s5 s6 s7", "s29", "", "s1 s1 s2 s9 s9 s20 s11"]

# Mixers of a stack, where one alone will not do.
STACKS: dict[str, Any] = {"yoco": ["gru", "yoco"]}
# Mixers that fix the number of rows while they are traced, and where.
FIXED_ROWS = {"block_sparse_attention": ("decoder-only", "encoder-decoder"), "mamba": ("encoder-decoder",)}
QUICK = ("attention", "gru", "retention", "yoco")
MIXERS = [name for name in trilemma.available_mixers() if mixer_class(name).capabilities.causal]

# Reads "folder" lines, prints the outputs for LINES; nothing of this package can be imported.
DRIVER = """
import contextlib, io, json, runpy, sys
sys.modules["trilemma"] = None
script, lines, limit = sys.argv[1:4]
for folder in sys.stdin:
    sys.argv, sys.stdin, out = [script, folder.strip(), limit], io.StringIO(lines), io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path(script)
    sys.stdin = sys.__stdin__
    print(json.dumps(out.getvalue().splitlines()), flush=True)
"""


def export(run: LoadedRun, path: Path, **options: Any) -> dict[str, Any]:
    with new_folder(path) as folder:
        return export_torch.write(run, folder, ExportOptions(**options))


class Elsewhere:
    """A process that runs the documented script on one folder after another."""

    def __init__(self, script: Path) -> None:
        command = [sys.executable, "-I", "-c", DRIVER, str(script), "\n".join(LINES), str(LIMIT)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def outputs(self, folder: Path) -> list[str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the script ended with an error: see stderr"
        found: list[str] = json.loads(answer)
        return found

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Any:
    script = documented(tmp_path_factory.mktemp("script") / "decode.py", "torch.export.load")
    process = Elsewhere(script)
    yield process
    process.close()


def same_outputs(run: LoadedRun, folder: Path, elsewhere: Elsewhere) -> None:
    ours = outputs(run, LINES, method="greedy")
    assert elsewhere.outputs(folder) == ours
    assert len(set(ours)) > 1, "the outputs depend on the input"


@pytest.mark.turns(3)
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MIXERS]
)
def test_a_step_of_every_mixer_runs_without_this_package(name: str, tmp_path: Path, elsewhere: Elsewhere) -> None:
    run = make_run("decoder-only", STACKS.get(name, name))
    fixed = "decoder-only" in FIXED_ROWS.get(name, ())
    if fixed:
        with pytest.raises(CapabilityError, match=rf"{name}.*cannot be exported.*rows.*--rows 1"):
            export(run, tmp_path / "any")
        assert not list(tmp_path.iterdir()), "nothing is left of what failed"
    page = export(run, tmp_path / "out", rows=1 if fixed else None)
    assert (page["context"] is None) == all(mixer.capabilities.constant_state for mixer in run.model.mixers())
    same_outputs(run, tmp_path / "out", elsewhere)


@pytest.mark.turns(2)
@pytest.mark.parametrize("name", ["attention", "gru", "retention", "mamba"])
def test_an_encoder_is_a_program_of_its_own(name: str, tmp_path: Path, elsewhere: Elsewhere) -> None:
    run = make_run("encoder-decoder", STACKS.get(name, name))
    fixed = "encoder-decoder" in FIXED_ROWS.get(name, ())
    if fixed:
        with pytest.raises(CapabilityError, match=r"cannot be exported.*rows.*--rows 1"):
            export(run, tmp_path / "any")
    page = export(run, tmp_path / "out", rows=1 if fixed else None)
    assert page["source_length"] == 9
    same_outputs(run, tmp_path / "out", elsewhere)


def test_rows_are_free_and_may_be_reordered(tmp_path: Path) -> None:
    run = make_run("decoder-only", ["attention", "gru"])
    page = export(run, tmp_path / "out", context=5)
    step = torch.export.load(tmp_path / "out" / "step.pt2").module()
    start = load_file(tmp_path / "out" / page["start"]["state"])
    order, (first, second) = torch.tensor([2, 0, 0, 1]), torch.randint(6, 36, (2, 4, 1))
    for rows in (1, 3, 4):
        state = {name: tensor.repeat(rows, *[1] * (tensor.ndim - 1)) for name, tensor in start.items()}
        _, state = step(first[:rows], state)
        chosen = order[order < rows]
        logits, _ = step(second[: len(chosen)], {name: tensor[chosen] for name, tensor in state.items()})
        _, own = run.model.step(first[:rows], run.model.begin(rows))
        wanted, _ = run.model.step(second[: len(chosen)], own.select(chosen))
        torch.testing.assert_close(logits, wanted[:, -1])


def test_a_token_beyond_the_context_is_an_error(tmp_path: Path) -> None:
    page = export(make_run("decoder-only", "attention"), tmp_path / "out", context=3)
    step = torch.export.load(tmp_path / "out" / "step.pt2").module()
    state = load_file(tmp_path / "out" / page["start"]["state"])
    for _ in range(3):
        _, state = step(torch.tensor([[7]]), state)
    with pytest.raises((RuntimeError, IndexError)):
        step(torch.tensor([[7]]), state)


def test_a_program_of_other_weights_is_refused() -> None:
    run = make_run("encoder-decoder", "attention")
    programs = make_programs(run, ExportOptions())
    traced = export_torch.trace(programs, ExportOptions())
    step, encoder = (traced[role].module() for role in export_torch.ROLES)
    assert largest_difference(programs, step, encoder) < 1e-5
    run.model.embedding.tokens = torch.nn.Embedding.from_pretrained(torch.randn(36, 16))
    with pytest.raises(LawError, match="gives other logits than the model: they differ by"):
        largest_difference(programs, step, encoder)


def test_what_has_no_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="an encoder-only model has no decoding step"):
        export(make_run("encoder-only", "attention", data__task="masked-language-model"), tmp_path / "out")
    with pytest.raises(CapabilityError, match=r"model\.prefix: the prompt is read whole"):
        export(make_run("decoder-only", "attention", model__prefix=True), tmp_path / "out")
    run = make_run("decoder-only", "attention", model__positions="learned", model__max_length=10)
    with pytest.raises(ConfigError, match=r"--context 11: the model has positions for 10 tokens only"):
        export(run, tmp_path / "out", context=11)
    with pytest.raises(ConfigError, match="--source-length: this model has no encoder"):
        export(run, tmp_path / "out", source_length=11)
    assert export(run, tmp_path / "out")["context"] == 10, "not more than there are positions"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    short = make_run("decoder-only", "gru", model__positions="learned", model__max_length=2)
    assert export(short, tmp_path / "short")["max_length"] == 2


def test_a_state_that_counts_in_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("decoder-only", "attention", model__mixer={"name": "attention", "window": 3})
    append = RingCache.append

    def counting(self: RingCache, *arguments: Any) -> Any:
        seen, after = append(self, *arguments)
        return seen, replace(after, window=self.window + 1)

    monkeypatch.setattr(RingCache, "append", counting)
    with pytest.raises(CapabilityError, match=r"counts in Python, which a program cannot: .*window"):
        export(run, tmp_path / "out")


def test_bart_s_sources_begin_as_ours(tmp_path: Path) -> None:
    make(CASES["bart"], tmp_path / "hf")
    run = load_run(import_model(tmp_path / "hf", tmp_path / "run").path)
    page = export(run, tmp_path / "out", context=LIMIT, source_length=8)
    assert page["start"]["source_begin"] == [1]
    lines = ["w5 w6", "w9 w40 w7 w77", "w30"]
    ours = outputs(run, lines, method="greedy")
    script = documented(tmp_path / "decode.py", "torch.export.load")
    command = [sys.executable, "-I", str(script), str(tmp_path / "out"), str(LIMIT)]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ours
    assert len(set(ours)) > 1, "the outputs depend on the input"
