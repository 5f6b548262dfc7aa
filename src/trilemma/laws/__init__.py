"""The laws: what every mixer must hold, as a public kit.

    report = trilemma.laws.check(lambda: MyMixer(d_model=32))
    print(report)

One law stands above the others: splitting a sequence never changes the answer. See docs/laws.md.
"""

from trilemma.laws.admission import admit, operators_of
from trilemma.laws.records import fingerprint, record, require
from trilemma.laws.registered import verify
from trilemma.laws.report import LawResult, Report
from trilemma.laws.trial import LAWS, check

__all__ = [
    "LAWS",
    "LawResult",
    "Report",
    "admit",
    "check",
    "fingerprint",
    "operators_of",
    "record",
    "require",
    "verify",
]
