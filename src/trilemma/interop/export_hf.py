"""`trilemma export --to hf`: a run in the Hugging Face layout, which transformers loads.

The map of weights is the import's, read the other way; what was written is read back and compared before it counts.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import processors

from trilemma.config import RunConfig
from trilemma.data.backends import BOUND, SENTENCEPIECE, Bound
from trilemma.data.pieces import MARIAN
from trilemma.data.tokenizer import ROLES, Tokenizer
from trilemma.errors import CapabilityError
from trilemma.interop import weights
from trilemma.interop.families import FAMILIES
from trilemma.interop.families.base import Blueprint
from trilemma.interop.importing import needed_shapes, understand
from trilemma.interop.target import ExportOptions
from trilemma.mixers.attention import Attention
from trilemma.models import SequenceModel, build_model
from trilemma.runs import files
from trilemma.runs.load import LoadedRun
from trilemma.runs.tensors import encode, model_tensors

_TOLERANCE = 1e-4  # between our hidden vectors and those of what was written, read back


def write(run: LoadedRun, folder: Path, options: ExportOptions) -> dict[str, Any]:
    """Writes config.json, model.safetensors, the tokenizer and the settings of generation.

    Returns:
        what was written: model_type, architecture, number of tensors.

    Raises:
        CapabilityError: no known architecture computes what the run does; says for each why not.
    """
    values = {**_described(run), **_ids(run)}
    family, blueprint = understand(values, "config.json")
    ours = {name: tensor.detach().float() for name, tensor in family.tensors(run.model).items()}
    if needed_shapes(blueprint) != {name: tuple(tensor.shape) for name, tensor in ours.items()}:
        raise CapabilityError(f"{values['model_type']}: the tensors of this run are not those of that architecture")
    tensors = weights.write(ours, blueprint.rules)
    files.write_file(folder / "model.safetensors", encode(tensors))
    _write_json(folder / "config.json", {**values, "dtype": "float32"})
    _write_json(folder / "generation_config.json", _ids(run))
    _write_tokenizer(folder, run.tokenizer, run.config)
    _check(run.model, blueprint, folder)
    return {"model_type": values["model_type"], "architecture": values["architectures"][0], "tensors": len(tensors)}


def _described(run: LoadedRun) -> dict[str, Any]:
    """The config.json of the first family that has this architecture."""
    reasons = []
    for family in FAMILIES:
        try:
            return family.write(run.model, run.config)
        except CapabilityError as error:
            reasons.append(str(error))
    raise CapabilityError(
        f"{run.directory.path}: no architecture of transformers that is known here computes what this run does: "
        + "; ".join(reasons)
    )


def _ids(run: LoadedRun) -> dict[str, Any]:
    """The special ids under their names there."""
    tokenizer = run.tokenizer
    first = tokenizer.backend.before if isinstance(tokenizer.backend, Bound) else None  # of BART's texts
    bos = tokenizer.bos if first is None else first
    ids = {"pad_token_id": tokenizer.pad, "bos_token_id": bos, "eos_token_id": tokenizer.eos}
    return {**ids, "decoder_start_token_id": tokenizer.bos} if run.model.layout == "encoder-decoder" else ids


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    files.write_file(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: RunConfig) -> None:
    """An imported tokenizer as it came; one trained here with the special ids that this run's rows have."""
    values = json.loads(tokenizer.serialize())
    bound = values.get("format") == BOUND
    inner = values["tokenizer"] if bound else values
    if inner.get("format") == SENTENCEPIECE:
        if inner["lowercase"]:
            raise CapabilityError("a SentencePiece tokenizer that lower-cases its text cannot be exported")
        files.write_file(folder / "spiece.model", base64.b64decode(inner["model"]))
        return
    if inner.get("format") == MARIAN:
        _write_json(folder / "vocab.json", inner["vocabulary"])
        for side in ("source", "target"):
            files.write_file(folder / f"{side}.spm", base64.b64decode(inner[side]))
        _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "MarianTokenizer"})
        return
    made = tokenizers.Tokenizer.from_str(json.dumps(inner))
    if not bound:
        made.post_processor = _template(made, tokenizer, config)
    files.write_file(folder / "tokenizer.json", made.to_str(pretty=False).encode())
    ids = {role: getattr(tokenizer, role) for role in ROLES}
    # a role that an imported vocabulary lacks has the padding's id
    own = [role for role in ROLES if ids[role] != tokenizer.pad or role in ("pad", "bos", "eos")]
    names = {f"{role}_token": made.id_to_token(ids[role]) for role in own}
    if config.model.layout == "encoder-only":
        names |= {"cls_token": names["bos_token"], "sep_token": names["eos_token"]}
    known = {name: token for name, token in names.items() if token is not None}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **known})


def _template(made: tokenizers.Tokenizer, tokenizer: Tokenizer, config: RunConfig) -> processors.TemplateProcessing:
    """`text eos` for an encoder-decoder's source, `bos text eos` for an encoder, `bos text` for a language model.

    Any other decoder-only model goes on after `bos text sep`.
    """
    bos, eos, sep = (made.id_to_token(index) for index in (tokenizer.bos, tokenizer.eos, tokenizer.sep))
    prompt = [bos, "$A"] if config.data.task == "language-model" else [bos, "$A", sep]
    rows = {"encoder-decoder": ["$A", eos], "encoder-only": [bos, "$A", eos], "decoder-only": prompt}
    ids = [(bos, tokenizer.bos), (eos, tokenizer.eos), (sep, tokenizer.sep)]
    return processors.TemplateProcessing(single=rows[config.model.layout], special_tokens=ids)


@torch.no_grad()
def _check(model: SequenceModel, blueprint: Blueprint, folder: Path) -> None:
    """What was written, imported again, computes the same."""
    source = weights.Renamed(weights.TensorFiles(folder), blueprint.prefix, blueprint.endings)
    tensors, _ = weights.read(source, blueprint.rules, needed_shapes(blueprint))
    again = build_model(blueprint.model).eval()
    for name, target in model_tensors(again).items():
        target.copy_(tensors[name])
    assert model.config.vocab_size is not None
    windows = [mixer.window or 0 for mixer in model.mixers() if isinstance(mixer, Attention)]
    length = 8 + max(windows, default=0)  # so that the last tokens are beyond every window
    for config in (model.config, blueprint.model):
        length = min(length, config.max_length or length)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    given = {"source": ids} if model.layout == "encoder-decoder" else {}

    def last(computed: SequenceModel) -> torch.Tensor:
        hidden = computed(ids, **given)
        return computed.head(hidden[:, -8:] if hidden.ndim > 2 else hidden).float()

    found, wanted = last(again), last(model)
    if not torch.allclose(found, wanted, rtol=0, atol=_TOLERANCE * max(1.0, float(wanted.abs().max()))):
        raise CapabilityError("what was written does not compute what this run does; this architecture does not fit")
