"""The wrapper against torch's bidirectional LSTM, whose two directions stand side by side; rows of several lengths."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from trilemma.mixers.bidirectional import Bidirectional
from trilemma.mixers.lstm import LSTM
from trilemma.ragged import Ragged

LENGTH, D_MODEL = 9, 6


def test_two_lstms_are_torchs_bidirectional_one(agrees: Callable[..., None]) -> None:
    ours = Bidirectional(D_MODEL, inner="lstm").double()
    theirs = nn.LSTM(D_MODEL, D_MODEL, batch_first=True, bidirectional=True, dtype=torch.float64)
    with torch.no_grad():
        for mixer, suffix in ((ours.ahead, ""), (ours.back, "_reverse")):
            assert isinstance(mixer, LSTM)
            for name, weight in mixer.kernel.named_parameters():
                theirs.get_parameter(name + suffix).copy_(weight)
    x, lengths = torch.randn(3, LENGTH, D_MODEL, dtype=torch.float64), torch.tensor([LENGTH, 4, 1])
    packed, _ = theirs(pack_padded_sequence(x, lengths, batch_first=True))
    want = pad_packed_sequence(packed, batch_first=True)[0].unflatten(-1, (2, D_MODEL)).sum(2)
    valid = torch.arange(LENGTH) < lengths[:, None]
    got, _ = ours(x, None, Ragged(lengths=lengths))
    agrees("bidirectional", "layer", got[valid], want[valid], oracle="torch LSTM")
