"""Which languages are written without spaces between words, by their codes."""

from __future__ import annotations

# ISO 639-1 and 639-3.
UNSPACED = {
    **dict.fromkeys(("zh", "zho", "cmn", "yue"), "Chinese"),
    **dict.fromkeys(("ja", "jpn"), "Japanese"),
    "th": "Thai",
    "lo": "Lao",
    "km": "Khmer",
    "my": "Burmese",
    "bo": "Tibetan",
    "dz": "Dzongkha",
}


def language_code(language: str | None) -> str:
    """The language alone: "zh" of "zh-CN", "pt" of "pt_BR"; empty where no language is given."""
    return (language or "").replace("_", "-").split("-")[0].lower()


def is_unspaced(language: str | None) -> bool:
    """Whether a language, such as "ja" or "zh-TW", has no spaces between words."""
    return language_code(language) in UNSPACED
