"""What the tests of exports share: runs of random weights in memory, and our own outputs for their lines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from trilemma.config import RunConfig, merge, parse
from trilemma.data.tokenizer import symbol_tokenizer
from trilemma.decode import Prompts, Request, decode
from trilemma.models import build_model
from trilemma.runs.load import LoadedRun

ROOT = Path(__file__).parents[2]
SYMBOLS = [f"s{number}" for number in range(30)]
LIMIT = 12


def make_run(layout: str, mixer: Any, ending: float = 1.0, **changes: Any) -> LoadedRun:
    """A model of random weights that prefers text to special ids.

    Args:
        ending: logit of end-of-sequence before the model's own. changes: keys of the config, with "__" for ".".
    """
    torch.manual_seed(7)
    tokenizer = symbol_tokenizer(SYMBOLS)
    model: dict[str, Any] = {"layout": layout, "vocab_size": tokenizer.vocab_size, "d_model": 16, "d_ff": 16}
    model |= {"num_layers": 2 if isinstance(mixer, list) else 1, "num_heads": 2, "mixer": mixer}
    model |= {"logit_bias": True, "tie_embeddings": False}
    values = {"model": model, "data": {"max_source_length": 8, "max_target_length": 12}}
    config = parse(RunConfig, merge(values, {key.replace("__", "."): value for key, value in changes.items()}))
    built = build_model(config.model).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
        assert built.logit_bias is not None
        built.logit_bias[:6] = -30.0
        built.logit_bias[tokenizer.eos] = ending
    return LoadedRun(built, tokenizer, config, None)  # type: ignore[arg-type]


def outputs(run: LoadedRun, lines: list[str], **decoding: Any) -> list[str]:
    """Our outputs, each line decoded alone; an empty line too."""
    settings = run.config.decoding.model_copy(update={"max_length": LIMIT, **decoding})
    texts = []
    for request in Prompts(run.tokenizer, run.config).requests(lines, settings):
        assert isinstance(request, Request)
        ((output,),) = decode(run.model, [request], settings, eos=run.tokenizer.eos, pad=run.tokenizer.pad)
        texts.append(run.tokenizer.decode(output.tokens))
    return texts


def documented(script: Path, word: str) -> Path:
    """Writes the example of docs/export.md that contains `word` to `script`."""
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if word in block]
    script.write_text(block, encoding="utf-8")
    return script
