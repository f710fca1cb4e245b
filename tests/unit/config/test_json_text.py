"""Values that can be written in UTF-8 again."""

from __future__ import annotations

import pytest

from megatron_aligndistil.config.json_text import parse_text


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert parse_text(r'{"answer": "\ud83d\ude00"}') == {"answer": "😀"}
    for text in (r'{"answer": "cut \ud83d"}', r'["\ude00"]'):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            parse_text(text)
