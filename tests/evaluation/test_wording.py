"""Whole words in answers, by Unicode's word boundaries where the script has them."""

from __future__ import annotations

import pytest

from ibke_hf.evaluation.wording import contains_answer, exact_match, normalised


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        (" Paris", True),
        ("Paris.", True),
        ("Paris, France", True),
        ("Parisian", False),
        ("Paris2", False),
        ("The Paris", False),
        (" New York City", True),
        ("new york", False),
        ("", False),
        ("Par", False),
    ],
)
def test_exact_match(text: str, matches: bool) -> None:
    assert exact_match(text, [" Paris", "", "New York"]) == matches


@pytest.mark.parametrize(
    ("text", "name", "matches"),
    [
        ("上海是中国的城市", "上海", True),
        ("东京", "上海", False),
        ("東京です", "東京", True),
        ("トヨタは会社", "トヨタ", True),
        ("トヨタは会社", "トヨ", False),  # Katakana words have ends
        ("กรุงเทพเป็นเมืองหลวง", "กรุงเทพ", True),
        ("ที่กรุงเทพ", "ท", False),  # a mark stays with its letter
        ("ភ្នំពេញជារាជធានី", "ភ្នំពេញ", True),
        ("Paris是法国的首都", "Paris", True),
        ("1999年", "1999", True),
        ("1999", "19", False),
        ("19.5", "19", False),
        ("19,000", "19", False),
        ("19.", "19", True),
        ("Cafe\u0301", "Cafe", False),
        ("Cafe\u0301", "Café", True),
        ("दिल्ली में", "दिल्ली", True),
        ("दिल्ली में", "दिल", False),
        ("Москва-река", "Москва", True),
        ("Москвабад", "Москва", False),
    ],
)
def test_names_end_where_their_last_word_does(text: str, name: str, matches: bool) -> None:
    assert exact_match(text, [name]) is matches


@pytest.mark.parametrize(
    ("text", "name", "matches"),
    [
        ("The answer is PARIS, of course.", "Paris", True),
        ("It is called the city of New-York", "new york", True),
        ("Parisian", "Paris", False),
        ("comParis", "Paris", False),
        ("It was in 1999.", "19", False),
        ("It was in 1999.", "1999", True),
        ("It was 3.1999", "1999", False),
        ("答えは東京です。", "東京", True),
        ("首都是上海。", "上海", True),
        ("เมืองหลวงคือกรุงเทพครับ", "กรุงเทพ", True),
        ("ＰＡＲＩＳ", "Paris", True),
        ("Strasse", "Straße", True),
        ("anything", "...", False),
        ("", "Paris", False),
    ],
)
def test_an_answer_may_stand_anywhere_as_whole_words(text: str, name: str, matches: bool) -> None:
    assert contains_answer(text, ["", name]) is matches


def test_normalised_text_has_one_case_and_no_punctuation() -> None:
    assert normalised("  It's «Paris» — 1,999.5, or so!  ") == "it s paris 1,999.5 or so"
