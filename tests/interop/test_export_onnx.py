"""onnx: graphs run by the script of docs/export.md, where neither this package nor torch can be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from export_cases import LIMIT, documented, make_run, outputs

from trilemma.errors import BackendError, CapabilityError
from trilemma.interop import export_onnx
from trilemma.interop.target import ExportOptions, new_folder
from trilemma.runs.load import LoadedRun

LINES = ["s3 s4 s5 s6 s7", "s29", "", "s1 s1 s2 s9 s9 s20 s11"]
WITHOUT = """
import runpy, sys
sys.modules.update(torch=None, trilemma=None)
sys.argv.pop(0)
runpy.run_path(sys.argv[0])
"""

THOROUGH = [pytest.mark.slow, pytest.mark.turns(3)]


def export(run: LoadedRun, path: Path, **options: Any) -> dict[str, Any]:
    with new_folder(path) as folder:
        return export_onnx.write(run, folder, ExportOptions(**options))


@pytest.mark.parametrize(
    ("layout", "mixer"),
    [
        ("encoder-decoder", "attention"),
        ("decoder-only", ["gru", "attention"]),
        pytest.param("encoder-decoder", "retention", marks=THOROUGH),
        pytest.param("decoder-only", ["gated_deltanet", "mamba2"], marks=THOROUGH),
        pytest.param("decoder-only", ["rwkv7", "mlstm"], marks=THOROUGH),
    ],
)
def test_the_same_tokens_without_this_package_and_torch(layout: str, mixer: Any, tmp_path: Path) -> None:
    run = make_run(layout, mixer)
    page = export(run, tmp_path / "out")
    assert page["difference"] < 1e-5
    script = documented(tmp_path / "decode.py", "import onnxruntime")
    command = [sys.executable, "-I", "-c", WITHOUT, str(script), str(tmp_path / "out"), str(LIMIT)]
    done = subprocess.run(command, input="\n".join(LINES), capture_output=True, text=True, check=True)
    ours = outputs(run, LINES, method="greedy")
    assert done.stdout.split("\n")[: len(LINES)] == ours
    assert len(set(ours)) > 1, "the outputs depend on the input"


def test_an_operator_that_does_not_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match=r"step of this model \(latent_attention\).*GatherElements"):
        export(make_run("decoder-only", "latent_attention"), tmp_path / "out")
    assert not list(tmp_path.iterdir()), "nothing is left of what failed"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=rf"needs the package {package} .*pip install onnx onnxscript onnxruntime"):
        export(make_run("decoder-only", "gru"), tmp_path / "out")
